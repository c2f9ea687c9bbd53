"""Data: the split, an order that covers every block, tokens round-trip, n-gram losses."""

import gzip
import io
import itertools
import lzma
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from sisa_model.data.blocks import Blocks
from sisa_model.data.corpus import load_corpus
from sisa_model.data.ngrams import ngram_losses
from sisa_model.data.shuffle import shuffled
from sisa_model.data.text import documents, read_text, standard_library
from sisa_model.data.tokenizer import Encoder


def write_files(folder, count, repeat=40):
    folder.mkdir(exist_ok=True)
    for n in range(count):
        (folder / f"{n:03}.txt").write_text(f"file {n} says: " + "lorem ipsum " * repeat)
    return folder


def as_text(tokens):
    return bytes(t for t in tokens.tolist() if t < 256).decode()


def test_split_by_file_is_disjoint_and_stable(tmp_path):
    folder = write_files(tmp_path / "data", 200)
    for n in range(200):
        (folder / f"copy {n}.txt").write_text((folder / f"{n:03}.txt").read_text() + "\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_bytes(b"\xff")
    corpus = load_corpus([folder], [], Encoder(None))
    train, val = as_text(corpus.train), as_text(corpus.val)
    sides = [(f"file {n} says" in train, f"file {n} says" in val) for n in range(200)]
    assert all(a != b for a, b in sides), "each file, with its copies, is on one side"
    assert sum(b for _, b in sides) == 10
    again = load_corpus([folder], [], Encoder(None))
    assert np.array_equal(again.val, corpus.val)


def test_split_by_document_then_by_place(tmp_path):
    many = tmp_path / "many.txt"
    many.write_text("".join(f"document {n} here\n<|endoftext|>\n" for n in range(100)))
    corpus = load_corpus([many], [], Encoder(None))
    assert "5 of 100 distinct documents held out" in corpus.split
    assert all(
        (f"document {n} here" in as_text(corpus.train))
        != (f"document {n} here" in as_text(corpus.val))
        for n in range(100)
    )

    one = tmp_path / "one.txt"
    one.write_text("".join(f"line {n}\n" for n in range(1000)))
    corpus = load_corpus([one], [], Encoder(None))
    assert "the last 5 %" in corpus.split
    assert as_text(corpus.train) + as_text(corpus.val) == one.read_text().strip("\n")
    assert len(corpus.val) / (len(corpus.train) + len(corpus.val)) == pytest.approx(0.05, abs=0.001)


def test_given_held_out_files_are_removed_from_training(tmp_path):
    folder = write_files(tmp_path / "data", 30)
    corpus = load_corpus([folder], [folder / "003.txt"], Encoder(None))
    assert "file 3 says" in as_text(corpus.val)
    assert "file 3 says" not in as_text(corpus.train)
    assert "file 4 says" in as_text(corpus.train)


def test_default_corpus_is_on_every_machine():
    files = standard_library()
    assert len(files) > 100
    assert not any("site-packages" in str(path) for path in files)


def test_compressed_text_and_documents(tmp_path):
    text = "one\n<|endoftext|>\n\ntwo\nlines\n<|endoftext|>\n"
    for suffix, opener in {".txt": open, ".gz": gzip.open, ".xz": lzma.open}.items():
        with opener(tmp_path / f"x{suffix}", "wt") as file:
            file.write(text)
        assert read_text(tmp_path / f"x{suffix}") == text
    assert list(documents(io.StringIO(text))) == ["one", "two\nlines"]


def test_bytes_round_trip():
    encoder = Encoder(None)
    text = "naive, naïve, 你好 \x00"
    ids = encoder.encode([text, "b"])
    assert ids.dtype == np.int32
    assert ids.max() == encoder.end_of_text == 256
    assert encoder.decode(encoder.encode([text])[:-1].tolist()) == text
    assert encoder.decode([97, 256, 98, 0xC3, 256, 300]) == "a<|endoftext|>b\ufffd<|endoftext|>"


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["lorem ipsum"] * 9,
        trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet),
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokenizer_file(tokenizer_file):
    encoder = Encoder(tokenizer_file)
    ids = encoder.encode(["lorem ipsum"])
    assert ids[-1] == encoder.end_of_text == 0
    assert len(ids) < 11
    assert encoder.decode(encoder.encode(["lorem ipsum, " * 30])[:-1].tolist()).count("lorem") == 30
    assert encoder.size > 256


def test_bad_data_is_named(tmp_path):
    encoder = Encoder(None)
    with pytest.raises(FileNotFoundError, match=r"data path .*nowhere does not exist"):
        load_corpus([tmp_path / "nowhere"], [], encoder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data must hold at least one file"):
        load_corpus([tmp_path / "empty"], [], encoder)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="data holds no text in 1 files"):
        load_corpus([tmp_path / "blank.txt"], [], encoder)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary.txt is not a UTF-8 text file"):
        load_corpus([tmp_path / "binary.txt"], [], encoder)
    (tmp_path / "cut.xz").write_bytes(lzma.compress(b"text" * 100)[:-9])
    with pytest.raises(ValueError, match=r"cut.xz is damaged or not compressed as it is named"):
        read_text(tmp_path / "cut.xz")
    with pytest.raises(
        ValueError, match=r"the training corpus must hold at least one block of 65 tokens, got 10"
    ):
        Blocks(np.zeros(10, np.int32), 64, 0, "training")
    with pytest.raises(FileNotFoundError, match=r"tokenizer .* does not exist"):
        Encoder(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json is not a tokenizers JSON file"):
        Encoder(tmp_path / "bad.json")
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "no_end.json"))
    with pytest.raises(ValueError, match=r"must have a token <\|endoftext\|>"):
        Encoder(tmp_path / "no_end.json")


def test_blocks_cover_every_epoch_in_an_order_of_their_own():
    blocks = Blocks(np.arange(1001, dtype=np.int32), 10, seed=3, name="training")
    first, second = blocks.ids(0, 100), blocks.ids(100, 100)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert blocks.ids(95, 10) == first[95:] + second[:5], "a batch may span two epochs"
    assert Blocks(np.arange(1001, dtype=np.int32), 10, seed=4, name="training").ids(0, 100) != first
    inputs, targets = blocks.take([0, 99])
    assert inputs.tolist() == [list(range(10)), list(range(990, 1000))]
    assert targets.tolist() == [list(range(1, 11)), list(range(991, 1001))]


def test_ngram_losses_by_brute_force():
    rng = np.random.default_rng(0)
    train, held_out = (
        rng.integers(5, size=400).astype(np.int32),
        rng.integers(6, size=50).astype(np.int32),
    )
    contexts, targets = held_out[:-1], held_out[1:]
    unigram, bigram = ngram_losses(train, targets, contexts, vocab=6)
    pairs = list(itertools.pairwise(train))
    expected_unigram, expected_bigram = [], []
    for a, b in zip(contexts, targets):
        p = ((train == b).sum() + 1) / (400 + 6)
        expected_unigram.append(-math.log(p))
        seen, context = sum(pair == (a, b) for pair in pairs), sum(x == a for x, _ in pairs)
        expected_bigram.append(-math.log((seen + 10 * p) / (context + 10)))
    assert unigram == pytest.approx(np.mean(expected_unigram))
    assert bigram == pytest.approx(np.mean(expected_bigram))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 17, 1000, 65_537])
def test_a_shuffle_is_a_bijection_of_its_key(count):
    order = shuffled(np.arange(count), count, [3, 1])
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(shuffled(np.arange(count)[::-1], count, [3, 1]), order[::-1]), (
        "each place by itself"
    )
    if count > 16:
        for key in ([3, 2], [4, 1]):
            assert (shuffled(np.arange(count), count, key) == order).mean() < 0.3


def test_a_shuffle_has_the_statistics_of_independent_draws():
    # Small ranges, where a Feistel network is weakest: chi-squared of each place and each pair of
    # neighbours over 1,500 keys, within five standard deviations of its mean.
    for count in (3, 5, 12):
        orders = np.array([shuffled(np.arange(count), count, [key, 0]) for key in range(1500)])
        places = np.array(
            [np.bincount(orders[:, place], minlength=count) for place in range(count)]
        )
        pairs = np.bincount(orders[:, 0] * count + orders[:, 1], minlength=count**2).reshape(
            count, count
        )
        for found, freedom in (
            (places, (count - 1) ** 2),
            (pairs[~np.eye(count, dtype=bool)], count * (count - 1) - 1),
        ):
            chi_squared = ((found - found.mean()) ** 2 / found.mean()).sum()
            assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5
    # A large one: place and element are uncorrelated, and so are neighbours (standard deviation 1 /
    # sqrt(count)).
    order = shuffled(np.arange(100_003), 100_003, [0, 0])
    for x, y in ((np.arange(100_003), order), (order[:-1], order[1:])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / 100_003**0.5
