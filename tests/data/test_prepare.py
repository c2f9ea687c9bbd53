"""Prepared data: the same bytes by any format, workers and kill; faults named; the loader."""

import contextlib
import errno
import gzip
import itertools
import json
import lzma
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sisa_model as sm
import sisa_model.data.prepare as prepare_module
from sisa_model.cli import main
from sisa_model.data.blocks import IGNORE, Blocks, pack
from sisa_model.data.corpus import find_tokenizer, open_data
from sisa_model.data.prepare import PrepareConfig, prepare
from sisa_model.data.shards import Shards
from sisa_model.data.text import END_OF_TEXT
from sisa_model.data.tokenizer import Encoder
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.log import read_rows
from sisa_model.training.batches import fill_rows
from sisa_model.training.trainer import train
from tests.support import ROOT

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from sisa_model.cli import main; sys.exit(main(sys.argv[1:]))",
]
TEXTS = [
    f"document {n}: " + "lorem ipsum, naïve 你好\n" * (n % 7 + 1) + f"end of {n}"
    for n in range(300)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, vocab_size=400
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 2000)


def write_text(path, texts=TEXTS, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{text}\n{END_OF_TEXT}\n" for text in texts)
    return path


def write_jsonl(path, texts=TEXTS, field="text", opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": 1, field: text}) + "\n" for text in texts)
    return path


def write_parquet(path):
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=70
    )
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's datasets are tmp_path/a.parquet, by the real library; returns what was asked."""
    real, asked = datasets.load_dataset, []

    def load_dataset(name, subset, **options):
        asked.append((name, subset, options))
        return real(
            "parquet",
            data_files=str(tmp_path / "a.parquet"),
            split="train",
            streaming=options["streaming"],
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda self, name, revision: SimpleNamespace(sha=f"commit {revision}"),
    )
    return asked


def settings(source, out, **changes):
    return PrepareConfig(
        **{
            "sources": (str(source),),
            "out": out,
            "tokenizer": "bytes",
            "held_out": 0.1,
            "workers": 1,
            **changes,
        }
    )


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def texts_of(tokens, encoder):
    ids = tokens[:].tolist()
    assert ids[-1] == encoder.end_of_text
    cuts = [-1, *(i for i, token in enumerate(ids) if token == encoder.end_of_text)]
    return [encoder.decode(ids[a + 1 : b]) for a, b in itertools.pairwise(cuts)]


def test_every_format_gives_the_same_tokens(tmp_path, tokenizer, hub, monkeypatch):
    sources = {
        "text": write_text(tmp_path / "a.txt"),
        "text.gz": write_text(tmp_path / "a.txt.gz", opener=gzip.open),
        "jsonl": write_jsonl(tmp_path / "a.jsonl"),
        "jsonl.xz": write_jsonl(tmp_path / "a.jsonl.xz", opener=lzma.open),
        "parquet": write_parquet(tmp_path / "a.parquet"),
        "hub": "somebody/some-text@v1",
    }
    for name in ("text", "jsonl"):
        sources[f"{name}.zst"] = Path(f"{sources[name]}.zst")
        with pyarrow.output_stream(sources[f"{name}.zst"], compression="zstd") as file:
            file.write(sources[name].read_bytes())
    (tmp_path / "folder").mkdir()
    sources["folder"] = tmp_path / "folder"
    for n in range(3):
        write_jsonl(tmp_path / "folder" / f"{n}.jsonl", TEXTS[100 * n : 100 * n + 100])

    shards = {}
    for name, source in sources.items():
        chosen = {"subset": "xl", "split": "test"} if name == "hub" else {}
        shards[name] = prepare(
            settings(source, tmp_path / f"out {name}", tokenizer=str(tokenizer), **chosen)
        )
        assert shards[name].fingerprint() == shards["text"].fingerprint(), name
    assert hub == [
        ("somebody/some-text", "xl", {"split": "test", "revision": "commit v1", "streaming": True})
    ]
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda name, file: {"some/tokenizer": {"tokenizer.json": tokenizer}}[name][file],
    )
    assert (
        prepare(
            settings(sources["text"], tmp_path / "hub's", tokenizer="some/tokenizer")
        ).fingerprint()
        == shards["text"].fingerprint()
    )
    encoder = Encoder(tokenizer)
    train, val = (
        texts_of(tokens, encoder) for tokens in (shards["text"].train, shards["text"].val)
    )
    assert sorted(train + val) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)], "in the order of the sources"


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, tokenizer, small_batches):
    source = write_jsonl(tmp_path / "a.jsonl")
    folders = [tmp_path / f"{workers}" for workers in (1, 3)]
    for folder, workers in zip(folders, (1, 3)):
        prepare(
            settings(source, folder, tokenizer=str(tokenizer), shard_tokens=2000, workers=workers)
        )
    one, three = map(contents, folders)
    assert one == three
    assert len(list(folders[0].glob("shard-*"))) > 3
    whole = prepare(settings(source, tmp_path / "whole", tokenizer=str(tokenizer)))
    assert np.array_equal(whole.train[:], Shards(folders[0]).train[:]), (
        "shards change where files end, not the tokens"
    )


def alive(process):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_killed_and_run_again_it_gives_the_same_bytes(tmp_path):
    texts = [
        f"{n} " + "the quick brown fox " * 5000 for n in range(300)
    ]  # 30 MB: one shard a batch of 1 MB
    (tmp_path / "data").mkdir()
    for n in range(3):
        write_jsonl(tmp_path / "data" / f"{n}.jsonl", texts[100 * n : 100 * n + 100])
    straight = settings(tmp_path / "data", tmp_path / "straight", shard_tokens=1)
    prepare(straight)
    out = tmp_path / "killed"
    options = shlex.split("--tokenizer bytes --held-out 0.1 --shard-tokens 1 --workers 2")
    command = [*COMMAND, "prepare", str(tmp_path / "data"), "--out", str(out), *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (out / "shard-00003").exists() and time.time() < deadline:
        time.sleep(0.005)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not json.loads((out / "index.json").read_text())["complete"]
    with pytest.raises(
        ValueError,
        match="killed is not finished; the sisa prepare that began it, run again, goes on",
    ):
        Shards(out)
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, workers)), "a worker outlives its parent"

    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-*/*")}
    assert kept
    # What a kill leaves in the middle of a shard, and of a file.
    (out / ".shard-00099.left").mkdir()
    (out / ".index.json.1.tmp").write_text("{")
    prepare(settings(tmp_path / "data", out, shard_tokens=1))
    assert contents(out) == contents(tmp_path / "straight")
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items()), (
        "finished shards are kept"
    )
    assert not list(out.glob(".*"))


def test_hidden_files_that_are_not_its_own_stay(tmp_path):
    """A folder of hidden files alone counts as empty: a repository just begun, a new home."""
    write_jsonl(tmp_path / "data.jsonl", [f"document {n}" for n in range(40)])
    out = tmp_path / "out"
    (out / ".git").mkdir(parents=True)
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (out / ".gitignore").write_text("*.bin")
    prepare(settings(tmp_path / "data.jsonl", out))
    assert (out / ".git" / "HEAD").read_text() == "ref: refs/heads/main"
    assert (out / ".gitignore").read_text() == "*.bin"


def test_held_out_documents_and_their_copies_are_never_trained_on(tmp_path, caplog):
    texts = [
        *TEXTS,
        *(f"{text}\n\n" for text in TEXTS[::2]),
        f"a text about {END_OF_TEXT} in a text",
        "",
        " \n",
    ]
    shards = prepare(settings(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out"))
    encoder = Encoder(None)
    train, val = (
        {text.strip() for text in texts_of(tokens, encoder)}
        for tokens in (shards.train, shards.val)
    )
    assert not train & val
    assert train | val == {text.strip() for text in texts} - {""}
    assert len(val) / len(train | val) == pytest.approx(0.1, abs=0.05)
    more = prepare(settings(tmp_path / "a.jsonl", tmp_path / "more", held_out=0.3))
    assert val < {text.strip() for text in texts_of(more.val, encoder)}
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (
        sum(shard[split]["documents"] for shard in index["shards"] for split in ("train", "val"))
        == len(texts) - 2
    )
    prepare(settings(tmp_path / "a.jsonl", tmp_path / "out"))
    amounts = f"{len(shards.train):,} training and {len(shards.val):,} held-out"
    assert f"out is finished already: {amounts}" in caplog.text


def test_a_tokenizer_of_many_tokens_takes_four_bytes(tmp_path):
    vocabulary = {END_OF_TEXT: 0, "?": 1, **{f"w{n}": n for n in range(2, 70_000)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(tmp_path / "large.json"))
    source = write_jsonl(tmp_path / "a.jsonl", [f"w{n} w69999" for n in range(2, 100)])
    shards = prepare(settings(source, tmp_path / "out", tokenizer=str(tmp_path / "large.json")))
    assert shards.train.dtype == np.dtype("<u4")
    assert {69_999, 0} <= set(shards.train[:].tolist())


@pytest.fixture
def folder(tmp_path, small_batches):
    prepare(settings(write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out", shard_tokens=5000))
    return tmp_path / "out"


def test_blocks_of_shards_are_the_blocks_of_their_tokens(folder):
    shards = Shards(folder)
    tokens = np.concatenate(
        [np.fromfile(path, "<u2") for path in sorted(folder.glob("shard-*/train.bin"))]
    )
    assert len(shards.train.ends) > 3
    blocks, expected = Blocks(shards.train, 700, 3, "training"), Blocks(tokens, 700, 3, "training")
    everything = list(range(blocks.count))
    for x, y in zip(blocks.take(everything), expected.take(everything)):
        assert torch.equal(x, y)
    assert len(shards.train) == len(tokens)
    assert np.array_equal(shards.train[-10:], tokens[-10:])
    assert len(shards.train[5:5]) == 0


def test_a_run_resumes_in_mid_epoch_on_the_exact_sample(folder):
    straight = Blocks(Shards(folder).train, 64, 7, "training")
    batches = [straight.ids(step * 8, 8) for step in range(2 * straight.count // 8)]
    for step in (3, len(batches) // 2, len(batches) - 1):
        fresh = Blocks(Shards(folder).train, 64, 7, "training")
        assert fresh.ids(step * 8, 8) == batches[step]
        assert [*fresh.ids(step * 8, 4), *fresh.ids(step * 8 + 4, 4)] == batches[step], (
            "two ranks read halves"
        )


def test_packed_documents_see_nothing_of_each_other(folder):
    shards = Shards(folder)
    blocks = Blocks(shards.train, 300, 0, "training")
    ids = blocks.ids(0, 3)
    inputs, targets, cu_seqlens = pack(*blocks.take(ids), 256)
    assert inputs.shape == targets.shape == (1, 900)
    assert cu_seqlens.dtype == torch.int32
    expected = sorted(
        {0, 300, 600, 900} | {i for i, token in enumerate(inputs[0].tolist()) if token == 256}
    )
    assert cu_seqlens.tolist() == expected
    assert len(expected) > 6
    for x, y in zip((inputs, targets), blocks.take(ids)):
        assert torch.equal(x.view(3, 300), y)
    torch.manual_seed(0)
    model = sm.build("sisa-tiny-ds16").eval()
    with torch.no_grad():
        packed = model(inputs, cu_seqlens)
        for a, b in itertools.pairwise(expected):
            torch.testing.assert_close(packed[:, a:b], model(inputs[:, a:b]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end_of_text", [0, 256])
def test_rows_that_fill_up_a_packed_batch_are_one_document_each(end_of_text):
    row = torch.full((1, 50), 7)
    inputs, targets, cu_seqlens = pack(*fill_rows(row, row, 2, end_of_text), end_of_text)
    assert cu_seqlens.tolist() == [0, 50, 100, 150]
    assert (targets[0, 50:] == IGNORE).all()
    assert inputs.max() < 256


def test_damaged_cut_and_vanished_shards_are_named(folder):
    path = folder / "shard-00001" / "train.bin"
    whole = path.read_bytes()
    shards, blocks = Shards(folder), Blocks(Shards(folder).train, 64, 0, "training")
    everything = list(range(blocks.count))
    shards.verify()

    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match=r"shard-00001/train.bin is damaged: its sha256 is"):
        Shards(folder).verify()
    with pytest.raises(ValueError, match=r"shard-00001/train.bin is damaged"):
        open_data((folder,), (), Encoder(None), 64, 0)
    assert open_data((folder,), (), Encoder(None), 64, 0, verify=False).train.count == blocks.count
    found = []
    for rank in range(2):  # of two processes, each reads half
        with contextlib.suppress(ValueError):
            Shards(folder).verify(rank, 2)
            found.append(rank)
    assert len(found) == 1

    path.write_bytes(whole[:-2])
    for read in (lambda: Shards(folder), lambda: blocks.take(everything)):
        with pytest.raises(ValueError, match=r"shard-00001/train.bin must be .* bytes"):
            read()
    path.unlink()
    for read in (lambda: Shards(folder), lambda: blocks.take(everything)):
        with pytest.raises(FileNotFoundError, match=r"shard .*shard-00001/train.bin is gone"):
            read()
    path.write_bytes(whole)
    shards.verify()
    blocks.take(everything)


def test_damaged_indices_are_named(folder):
    index = folder / "index.json"
    good = json.loads(index.read_text())
    for text in (
        "{",
        "[]",
        "{}",
        '{"version": 1}',
        json.dumps({**good, "shards": [{}]}),
        json.dumps({**good, "options": {}}),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index.json is damaged or not of sisa prepare"):
            Shards(folder)
    index.write_text(json.dumps({**good, "version": 99}))
    with pytest.raises(ValueError, match=r"index.json must be of version 1"):
        Shards(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="is not a folder of sisa prepare"):
        Shards(folder)


def test_a_damaged_shard_is_not_gone_on_from(folder, tmp_path):
    index = folder / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "complete": False}))
    (folder / "shard-00001" / "train.bin").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"shard-00001/train.bin must be .* bytes, .* got 4"):
        prepare(settings(tmp_path / "a.jsonl", folder, shard_tokens=5000))
    (folder / "shard-00000" / "shard.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match=r"shard-00000/shard.json is damaged"):
        prepare(settings(tmp_path / "a.jsonl", folder, shard_tokens=5000))


def test_other_options_for_a_folder_are_named(folder, tmp_path, tokenizer):
    for changes, message in (
        ({"held_out": 0.2}, r"held_out must stay 0.1, as .* was begun with it, got 0.2"),
        ({"tokenizer": str(tokenizer)}, r"tokenizer must stay {'name': 'bytes', 'sha256': None}"),
        ({"shard_tokens": 7}, r"shard_tokens must stay 5000"),
        ({"text_field": "id"}, r"text_field must stay 'text'"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(settings(tmp_path / "a.jsonl", folder, **changes))
    write_jsonl(tmp_path / "a.jsonl", TEXTS[1:])
    with pytest.raises(
        ValueError, match=r"sources must stay {'name': .*a.jsonl', .* got {'name': .*a.jsonl'"
    ):
        prepare(settings(tmp_path / "a.jsonl", folder))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not to be touched")
    with pytest.raises(FileExistsError, match=r"out .*mine exists and is not of sisa prepare"):
        prepare(settings(tmp_path / "a.jsonl", tmp_path / "mine"))


def test_the_same_files_by_another_path_go_on(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    prepare(settings("a.jsonl", folder, shard_tokens=5000))
    assert "is finished already" in caplog.text


def test_bad_sources_and_tokenizers_are_named(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", field="content")
    pyarrow.parquet.write_table(
        pyarrow.table({"url": ["x"], "content": ["y"]}), tmp_path / "a.parquet"
    )
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "mixed").mkdir()
    for path in (source, tmp_path / "blank.txt"):
        shutil.copy(path, tmp_path / "mixed")
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "no_end.json"))
    Tokenizer(models.WordLevel({END_OF_TEXT: 0}, END_OF_TEXT)).save(
        str(tmp_path / "plain_end.json")
    )

    unreadable = [
        (source, r"text_field must be a field of .*a.jsonl, line 1, which has id, content"),
        ("a.parquet", r"text_field must be a field of .*a.parquet, which has url, content"),
        ("bad.jsonl", r"bad.jsonl must hold a JSON object a line, but line 2 is not"),
        ("number.jsonl", r"text_field must hold text, .* of .*number.jsonl, line 1 holds int"),
        ("list.jsonl", r"list.jsonl, line 1, which has no object but list"),
        ("bad.parquet", r"bad.parquet is not a parquet file, or is damaged"),
        ("blank.txt", r"sources must hold text, but there is none in .*blank.txt"),
        ("mixed", r"source .*mixed must hold files of one kind"),
        ("nowhere.txt", r"source .*nowhere.txt is neither a file or folder here nor"),
    ]
    cases = [(tmp_path / name, {}, message) for name, message in unreadable]
    refused = [
        ({"sources": ()}, "sources must be at least one"),
        ({"held_out": 0.0}, "held_out must be"),
        ({"shard_tokens": 0}, "shard_tokens must be"),
        ({"workers": 0}, "workers must be"),
        ({"subset": "en"}, "subset must be left out"),
        ({"split": "test"}, "split must be left out"),
        ({"text_field": "content", "held_out": 1e-9}, "held_out 1e-09 puts 300 documents on"),
        ({"tokenizer": str(tmp_path / "none.json")}, "tokenizer .*none.json does not exist"),
        ({"tokenizer": str(tmp_path / "no_end.json")}, "must have a token"),
        ({"tokenizer": str(tmp_path / "plain_end.json")}, "must mark its token .* as special"),
    ]
    cases += [(source, changes, message) for changes, message in refused]
    for number, (path, changes, message) in enumerate(cases):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prepare(settings(path, tmp_path / f"out {number}", **changes))
    prepare(settings(source, tmp_path / "right", text_field="content"))


def test_an_unreachable_hub_is_named(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise RuntimeError("no route to the hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(
        FileNotFoundError,
        match=r"source some/name@v1 is no file .* the Hub does not give it: no route to the hub",
    ):
        prepare(settings("some/name@v1", tmp_path / "out"))
    with pytest.raises(
        FileNotFoundError,
        match="tokenizer some/tokenizer is no file here, and the Hub does not give it: no route",
    ):
        prepare(
            settings(write_text(tmp_path / "a.txt"), tmp_path / "out", tokenizer="some/tokenizer")
        )
    assert not (tmp_path / "out").exists()


def test_half_a_surrogate_pair_null_rows_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "half \\ud800 a pair"}\n\n{"text": null}\n \n'
        + json.dumps({"text": "x"})
        + "\n\n"
    )
    shards = prepare(settings(tmp_path / "a.jsonl", tmp_path / "out", held_out=0.5))
    found = [
        text for tokens in (shards.train, shards.val) for text in texts_of(tokens, Encoder(None))
    ]
    assert sorted(found) == ["half ? a pair", "x"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text", "hub"])
def test_a_full_disk_keeps_the_finished_shards(
    tmp_path, kind, small_batches, hub, monkeypatch, capsys
):
    write_parquet(tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:120])
    write_text(tmp_path / "a.text")
    source = "somebody/some-text" if kind == "hub" else str(tmp_path / f"a.{kind}")
    real, calls = prepare_module._write_shard, []

    def full_disk(folder, **kwargs):
        calls.append(folder)
        if len(calls) == 3:
            (folder / "train.bin").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(folder, **kwargs)

    out = tmp_path / "out"
    options = shlex.split("--tokenizer bytes --held-out 0.1 --shard-tokens 5000 --workers 1")
    flags = ["prepare", source, str(tmp_path / "a.jsonl"), "--out", str(out), *options]
    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "_write_shard", full_disk)
        assert main(flags) == 1
    assert "No space left on device; the 2 finished shards stay" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [
        "index.json",
        "shard-00000",
        "shard-00001",
    ]
    assert main(flags) == 0
    flags[flags.index(str(out))] = str(tmp_path / "straight")
    assert main(flags) == 0
    assert contents(out) == contents(tmp_path / "straight")


def test_a_killed_worker_is_an_error_that_says_how_to_go_on(tmp_path, monkeypatch):
    def submit(*args):
        raise BrokenProcessPool("a process in the pool was terminated abruptly")

    monkeypatch.setattr(prepare_module.ProcessPoolExecutor, "submit", submit)
    with pytest.raises(
        OSError, match=r"a worker was killed .*the same command goes on after the finished shards"
    ):
        prepare(settings(write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out", workers=2))


def test_train_on_a_prepared_folder_resumes_and_generates(
    tmp_path, tokenizer, small_batches, capsys, caplog
):
    out = tmp_path / "data"
    prepare(
        settings(
            write_jsonl(tmp_path / "a.jsonl"), out, tokenizer=str(tokenizer), shard_tokens=3000
        )
    )
    run = {
        "data": (out,),
        "steps": 4,
        "seq_len": 64,
        "batch_size": 2,
        "val_every": 2,
        "val_blocks": 4,
        "sample_tokens": 5,
    }
    straight = train(TrainConfig(out=tmp_path / "a", mix=("needle",), **run))
    assert straight.finished
    assert "held-out tokens of" in caplog.text
    train(TrainConfig(out=tmp_path / "b", mix=("needle",), stop_at=2, **run))
    out.rename(tmp_path / "moved")
    train(TrainConfig(out=tmp_path / "b", resume=True, data=(tmp_path / "moved",)))
    assert (
        main(["generate", str(tmp_path / "b"), "--max-new-tokens", "3", "--prompt", "lorem"]) == 0
    )
    (tmp_path / "moved").rename(out)
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [row["loss"] for row in read_rows(tmp_path / "a" / "train.jsonl")] == [
        row["loss"] for row in read_rows(tmp_path / "b" / "train.jsonl")
    ]
    assert (
        main(["generate", str(tmp_path / "a"), "--max-new-tokens", "3", "--prompt", "lorem"]) == 0
    )
    assert (
        find_tokenizer((out,), tokenizer).read_bytes() == find_tokenizer((out,), None).read_bytes()
    )

    with pytest.raises(ValueError, match=r"val_data must be left out: .*data brings the documents"):
        train(TrainConfig(out=tmp_path / "d", val_data=(tmp_path / "a.jsonl",), **run))
    with pytest.raises(ValueError, match=r"data must be one folder of sisa prepare alone, or text"):
        train(TrainConfig(out=tmp_path / "d", **{**run, "data": (out, tmp_path / "a.jsonl")}))
    (tmp_path / "other.json").write_text(tokenizer.read_text() + "\n")
    with pytest.raises(
        ValueError,
        match=r"tokenizer must be the one that .* prepared with .*, got another in .*other.json",
    ):
        train(TrainConfig(out=tmp_path / "d", tokenizer=tmp_path / "other.json", **run))
    (out / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*data/tokenizer.json does not exist"):
        train(TrainConfig(out=tmp_path / "d", **run))
    assert not (tmp_path / "d").exists()
    shutil.rmtree(out)
    assert main(["generate", str(tmp_path / "a")]) == 0, "by the copy of the tokenizer in it"
    (tmp_path / "a" / "tokenizer.json").unlink()
    assert main(["generate", str(tmp_path / "a")]) == 1, "bytes are not taken instead"
    assert "has lost its tokenizer" in capsys.readouterr().err


def test_a_shard_that_vanishes_in_mid_run_ends_it_by_name(tmp_path, folder, monkeypatch, capsys):
    real, calls = Blocks.take, []

    def take(self, ids):
        calls.append(ids)
        if len(calls) == 4:  # the held-out blocks, two steps, and a step in which the data are gone
            for path in folder.glob("shard-*/train.bin"):
                path.unlink()
        return real(self, ids)

    monkeypatch.setattr(Blocks, "take", take)
    flags = shlex.split("--steps 9 --seq-len 64 --batch-size 2 --val-blocks 2 --save-every 1")
    assert main(["train", "--data", str(folder), "--out", str(tmp_path / "run"), *flags]) == 1
    assert re.search(r"sisa: error: shard .*shard-\d+/train.bin is gone", capsys.readouterr().err)
    assert [row["step"] for row in read_rows(tmp_path / "run" / "train.jsonl")] == [1, 2]
