"""The paper's protocol, request by request: golden hashes and tokens derived by hand."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

import sisa_model as sm
from sisa_model.cli import main
from sisa_model.data.text import END_OF_TEXT
from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.niah import PAIRS, SEEDS, NiahBuilder
from sisa_model.evaluation.paper import PaperBenchmark, paper_requests
from sisa_model.evaluation.scoring import Request, Score, Scorer
from tests.support.paper_requests import (
    DATA,
    FIRST,
    GOLDEN,
    TOKENIZER,
    arc_easy,
    hash_request,
    niah,
    short_hash,
    winogrande,
)

needs_tokenizer = pytest.mark.skipif(
    not (DATA / TOKENIZER).is_file(), reason=f"no {TOKENIZER} in the folder SISA_DATA"
)
FILES = {"winogrande": "winogrande_xl_validation.jsonl", "arc_easy": "arc_easy_test.jsonl"}


def model_of(tokens, path):
    """A model's folder; that it has weights does not matter to what is asked."""
    shape = {"n_layers": 1, "d_model": 16, "n_heads": 1, "d_ff": 16}
    sm.save(sm.build("transformer-tiny", vocab_size=tokens, **shape), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_of(50_277, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory):
    return model_of(257, tmp_path_factory.mktemp("of-bytes"))


def dumped(path, *args):
    """task -> the lines that `sisa eval --dump-requests` writes, checked for their form."""
    assert main(["eval", *map(str, args), "--protocol", "paper", "--dump-requests", str(path)]) == 0
    found = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert list(row) == ["task", "id", "tokens", "scored_from", "choice"]
        assert 1 <= row["scored_from"] < len(row["tokens"]) <= 2048
        found.setdefault(row["task"], []).append(row)
    return found


@needs_tokenizer
@pytest.mark.parametrize("task", ["niah", "winogrande", "arc_easy"])
def test_requests_are_the_definitions_token_for_token(task, folder, tmp_path):
    golden = json.loads(GOLDEN.read_text())[task]
    if task in FILES and not (DATA / "eval" / FILES[task]).is_file():
        pytest.skip(f"no eval/{FILES[task]} in the folder SISA_DATA")
    flags = [folder, "--tokenizer", DATA / TOKENIZER, "--data-dir", DATA / "eval"]
    rows = dumped(tmp_path / "new" / "requests.jsonl", *flags, "--tasks", task)[task]
    hashes = [hash_request(x["id"], x["choice"], x["scored_from"], x["tokens"]) for x in rows]
    assert hashes[:FIRST] == golden["first"].split()
    assert len(hashes) == golden["requests"]
    assert short_hash("".join(hashes)) == golden["all"]


def test_the_first_trial_by_hand():
    """In bytes. Seed 42 draws the first of five pairs, then 11 of 5 to 229.

    229 is half of the 458 that 512 leave: less 25 of the needle, 19 of the question and 10."""
    filler = "The quick brown fox jumps over the lazy dog. " * 50
    needle = "The secret code is ALPHA."
    text = filler[:11] + needle + filler[: 458 - 11] + " The secret code is"
    (trial,) = NiahBuilder(Encoder(None)).trials(512, 42, 1)
    assert trial.request == Request([*f"{text} ".encode()], 502)
    assert (trial.length, trial.seed, trial.depth) == (512, 42, 11 / 458)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A tokenizer of letters and three pairs: "es", " s" and "ab", so that joining would show."""
    letters = [" ", *"abcdefhistw,."]
    vocab = {piece: n for n, piece in enumerate([*letters, "es", " s", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("e", "s"), (" ", "s"), ("a", "b")]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    path = tmp_path_factory.mktemp("tokenizer") / "pieces.json"
    tokenizer.save(str(path))
    return Encoder(path)


# Of `pieces`: " " is 0, a to f are 1 to 6, h i s t w , . are 7 to 13, "es" 14, " s" 15, "ab" 16.
@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        (
            "lambada",
            {"text": "a tie , he saw"},
            # a _ t i e _ , _ h e | _s a w
            [([1, 0, 10, 8, 5, 0, 12, 0, 7, 5, 15, 1, 11], 10)],
        ),
        (
            "lambada",
            {"text": f"{'a' * 3000} b"},
            [([1] * 2046 + [0, 2], 2046)],
        ),
        (
            "hellaswag",
            {"ctx": "a hat. he", "endings": ["saw .", " is"], "label": 0},
            # a _ h a t . _ h e | s a w _ .      (joined, e and s would be one token) and | _ i s
            [
                ([1, 0, 7, 1, 10, 13, 0, 7, 5, 9, 1, 11, 0, 13], 9),
                ([1, 0, 7, 1, 10, 13, 0, 7, 5, 0, 8, 9], 9),
            ],
        ),
        (
            "hellaswag",
            {"ctx": "a [h", "endings": ["b[i]"], "label": 0},
            # nothing is cleaned; the brackets, which this vocabulary has not, fall away
            [([1, 0, 7, 2, 8], 3)],
        ),
        (
            "arc_easy",
            {"question": "is it a", "choices": ["bed", "sea"], "label": 0},
            # i s _ i t _ a | _ b e d and | _s e a
            [
                ([8, 9, 0, 8, 10, 0, 1, 0, 2, 5, 4], 7),
                ([8, 9, 0, 8, 10, 0, 1, 15, 5, 1], 7),
            ],
        ),
        (
            "winogrande",
            {"sentence": "a_ sat", "option1": "b", "option2": "c", "label": 0},
            # ab _s a t and a c _s a t
            [([16, 15, 1, 10], 1), ([1, 3, 15, 1, 10], 1)],
        ),
    ],
)
def test_requests_by_hand(task, row, expected, pieces):
    assert paper_requests(task, row, pieces) == [Request(*request) for request in expected]


def test_lambada_and_hellaswag_are_dumped_with_their_choices(pieces, tmp_path):
    folder = model_of(pieces.size, tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    (data / "lambada_cimec_test.jsonl").write_text('{"text": "a tie , he saw"}\n')
    rows = [{"ctx": "a hat. he", "endings": ["saw .", " is"], "label": n} for n in (0, 1)]
    (data / "hellaswag_validation.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in rows))
    path = tmp_path / "pieces.json"
    pieces.tokenizer.save(str(path))
    flags = [folder, "--tokenizer", path, "--data-dir", data, "--tasks", "hellaswag,lambada"]
    found = dumped(tmp_path / "requests.jsonl", *flags)
    assert list(found) == ["hellaswag", "lambada"], "in the order they are asked for"
    assert [(x["id"], x["choice"]) for x in found["hellaswag"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [x["scored_from"] for x in found["hellaswag"]] == [9] * 4
    (row,) = found["lambada"]
    assert row["tokens"] == [1, 0, 10, 8, 5, 0, 12, 0, 7, 5, 15, 1, 11]
    assert (row["id"], row["choice"], row["scored_from"]) == (0, 0, 10)
    assert not (folder / "eval").exists(), "nothing is scored"


def test_the_former_name_of_lambadas_file_is_known_by_what_it_holds(of_bytes, tmp_path, capsys):
    flags = ["--tokenizer", "bytes", "--data-dir", tmp_path]
    path = tmp_path / "lambada_test.jsonl"
    path.write_text('{"text": "a tie , he saw"}\n')
    found = dumped(tmp_path / "requests.jsonl", of_bytes, *flags, "--tasks", "lambada")
    assert bytes(found["lambada"][0]["tokens"]).decode() == "a tie , he saw"
    path.write_text('{"text": "A tie, he saw"}\n')
    arguments = ["eval", of_bytes, *flags, "--protocol", "paper", "--tasks", "lambada"]
    assert main([*map(str, arguments)]) == 1
    assert "must hold lambada, and is lambada_openai" in capsys.readouterr().err


@pytest.mark.parametrize("requests", [winogrande, arc_easy])
def test_scripts_and_requests_agree_in_bytes_too(requests, of_bytes, tmp_path):
    """The two makers of requests on a few rows of their own, without the tokenizer's file."""
    rows = {
        "winogrande": {"sentence": "the _ sat", "option1": "caf\u00e9", "option2": "b", "label": 1},
        "arc_easy": {"question": "q?", "choices": ["x", "y", "z", "v", "w"], "label": 3},
    }
    task = requests.__name__
    unscored = {**rows["arc_easy"], "label": 4} if task == "arc_easy" else rows[task]
    (tmp_path / "eval").mkdir()
    path = tmp_path / "eval" / FILES[task]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in (rows[task], unscored, rows[task])))
    flags = [of_bytes, "--tokenizer", "bytes", "--data-dir", path.parent, "--tasks", task]
    found = dumped(tmp_path / "requests.jsonl", *flags)[task]
    expected = list(requests(lambda text: list(text.encode()), tmp_path))
    assert [(x["id"], x["choice"], x["scored_from"], x["tokens"]) for x in found] == expected
    assert {x["id"] for x in found} == ({0, 2} if task == "arc_easy" else {0, 1, 2})


def test_niah_in_bytes(of_bytes, tmp_path):
    flags = [of_bytes, "--tokenizer", "bytes", "--tasks", "niah"]
    found = dumped(tmp_path / "x.jsonl", *flags)["niah"]
    expected = list(niah(lambda text: list(text.encode()), None))
    assert [(x["id"], x["choice"], x["scored_from"], x["tokens"]) for x in found] == expected
    assert len(found) == 1000


@needs_tokenizer
def test_the_needle_is_in_the_first_half_and_long_prompts_are_not_as_long_as_they_say():
    encoder = Encoder(DATA / TOKENIZER)
    builder = NiahBuilder(encoder)
    trials = [trial for seed in SEEDS for trial in builder.trials(512, seed, 200)]
    assert {trial.request.start for trial in trials} == {502}
    assert all(trial.depth <= 0.5 for trial in trials)
    texts = [encoder.decode(trial.request.ids[:502]) for trial in trials]
    needles = [f"{key} {value}." for key, value in PAIRS]
    after = [text.split(needle)[1] for text in texts for needle in needles if needle in text]
    behind = [len(encoder.encode_text(text)) for text in after]
    assert (len(behind), min(behind), max(behind)) == (1000, 250, 490)
    assert np.median(behind) == pytest.approx(370, abs=5)
    lengths = [trial.request.start for trial in builder.trials(2048, 42, 200)]
    assert (min(lengths), max(lengths)) == (519, 1013)
    with pytest.raises(
        ValueError, match=r"length must be at least \d+ tokens for a needle, got 20"
    ):
        builder.trials(20, 42, 1)


def score(total, tokens, greedy=False):
    return Score(float(total), tokens, greedy)


def test_winogrande_counts_the_first_token_too():
    """Of 3 and 6 tokens: -2 / 3 is above -4.1 / 6, and -2 / 2 below -4.1 / 5."""
    row = {"sentence": "_ab", "option1": "c", "option2": "cdef", "label": 1}
    benchmark = PaperBenchmark("winogrande", [row, {**row, "label": 0}], Encoder(None))
    assert [len(request.ids) for request in benchmark.requests] == [3, 6] * 2
    (found,) = benchmark.measure([score(-2, 2), score(-4.1, 5)] * 2)
    assert found.right == "01"
    (found,) = benchmark.measure([score(-2, 2), score(-3.9, 5)] * 2)
    assert found.right == "10"


def test_endings_are_compared_by_the_mean_token_and_ties_go_to_the_first():
    row = {"ctx": "c", "endings": ["a", "bb", "c"], "label": 1}
    benchmark = PaperBenchmark("hellaswag", [row] * 2, Encoder(None))
    untied = [score(-2, 1), score(-3, 2), score(-1.6, 1)]
    tied = [score(-1.5, 1), score(-3, 2), score(-1.5, 1)]
    (found,) = benchmark.measure([*untied, *tied])
    assert found.right == "10"


def test_a_fifth_key_is_not_scored(caplog):
    row = {"question": "q", "choices": list("abcde"), "label": 2}
    benchmark = PaperBenchmark("arc_easy", [row, {**row, "label": 4}, row], Encoder(None))
    assert "1 of 3 examples not scored" in caplog.text
    best = [score(0 if n == 2 else -9, 2) for n in range(5)]
    (found,) = benchmark.measure(best * 2)
    assert (found.count, found.right) == (2, "11")


def test_only_the_papers_requests_are_dumped(of_bytes, tmp_path, capsys):
    path = tmp_path / "requests.jsonl"
    arguments = ["eval", str(of_bytes), "--tokenizer", "bytes", "--dump-requests", str(path)]
    assert main([*arguments, "--tasks", "lambada_openai"]) == 1
    assert "dump_requests must be left out in protocol harness" in capsys.readouterr().err
    assert not path.exists()
    assert main([*arguments, "--tasks", "needle", "--limit", "1"]) == 0
    assert len(path.read_text().splitlines()) == 5


def test_a_token_across_a_contexts_end_aborts_no_harness_task(pieces, caplog):
    """By its own rule "ab" would leave nothing of "b" behind "a" to score."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    from sisa_model.evaluation.harness import HarnessModel

    torch.manual_seed(0)
    model = sm.build("transformer-tiny", vocab_size=pieces.size).eval()
    pairs = [("a", "b"), ("he ", "saw")]
    requests = [instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    found = HarnessModel(Scorer(model, 500), pieces).loglikelihood(requests)
    (a,), (b,) = pieces.encode_text("a"), pieces.encode_text("b")
    logits = model(torch.tensor([[a]]))[0, 0]
    assert found[0][0] == pytest.approx(logits.log_softmax(-1)[b].item(), abs=1e-5)
    assert "1 contexts and continuations, across which a token spans" in caplog.text
