"""sisa eval: scoring rules against one example at a time, the files, what it refuses."""

import dataclasses
import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sisa_model as sm
from sisa_model.cli import main
from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.benchmarks import (
    BENCHMARKS,
    PIQA_LABELS,
    benchmarks_of,
    read_benchmark,
)
from sisa_model.evaluation.config import EvalConfig, check, precision_of
from sisa_model.evaluation.evaluate import evaluate
from sisa_model.evaluation.paper import PaperBenchmark
from sisa_model.evaluation.records import add_rows, read_evaluations
from sisa_model.evaluation.scoring import Request, Scorer
from sisa_model.evaluation.statistics import bootstrap, measure, wilson
from sisa_model.evaluation.subject import load_in, with_positions, without_importance
from sisa_model.models.generate import generate
from sisa_model.models.language_model import LanguageModel
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.log import read_rows
from sisa_model.training.trainer import train
from tests.support import ROOT

WORDS = ["cat", "dog", "bird", "fish", "mouse", "horse"]
TEXT = "the cat saw the dog and the dog saw the cat. "


def sentence(rng, length):
    return " ".join(rng.choice(WORDS, length))


def write_data(folder, count=12):
    """Local files of every benchmark: uneven lengths, answers of several words, non-ASCII text."""
    rng = np.random.default_rng(0)
    rows = {task: [] for task in BENCHMARKS}
    for i in range(count):
        label = int(rng.integers(2))
        lambada = (
            TEXT.strip()[: 20 + i] + " the dog"
            if i % 2
            else f"{sentence(rng, 3 + i)} caf\u00e9 {i}"
        )
        rows["lambada"].append({"text": lambada})
        rows["lambada_openai"].append({"text": lambada.capitalize()})
        before, after = sentence(rng, 2 + i), sentence(rng, 1)
        rows["hellaswag"].append(
            {
                "activity_label": "Pets",
                "ctx_a": f"{before}.",
                "ctx_b": after,
                "ctx": f"{before}. {after}",
                "endings": [sentence(rng, 1 + j) for j in range(4)],
                "label": 2 * label,
            }
        )
        choices = [sentence(rng, 1 + (i + j) % 3) for j in range(3 + i % 3)]
        rows["arc_easy"].append(
            {"question": f"{sentence(rng, 1 + i)}?", "choices": choices, "label": label}
        )
        rows["winogrande"].append(
            {
                "sentence": f"{sentence(rng, 2)} _ {sentence(rng, 1 + i)}.",
                "option1": "cat",
                "option2": "the bird",
                "label": label,
            }
        )
        rows["piqa"].append(
            {"goal": sentence(rng, 1 + i), "sol1": sentence(rng, 2), "sol2": sentence(rng, 4)}
        )
    folder.mkdir()
    for task, examples in rows.items():
        (folder / BENCHMARKS[task].file).write_text(
            "".join(json.dumps(row) + "\n" for row in examples)
        )
    (folder / PIQA_LABELS).write_text("".join(f"{i % 2}\n" for i in range(count)))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("eval") / "data")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned a little of TEXT: some last words come out right, some don't."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT * 400)
    settings = {
        "steps": 40,
        "seq_len": 64,
        "batch_size": 8,
        "val_blocks": 1,
        "val_every": 40,
        "save_every": 20,
    }
    return train(
        TrainConfig(
            data=(folder / "text.txt",), out=folder / "run", lr=5e-3, sample_tokens=0, **settings
        )
    ).folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run that a test may write into."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def model(trained):
    return sm.load(trained / "final").eval()


@torch.no_grad()
def token_scores(model, prefix, text):
    """The log-likelihood of each byte of ``text``, and the argmax's hits.

    One sequence at a time, from the whole logits in fp64."""
    prefix, text = list(prefix.encode()), list(text.encode())
    if not prefix:
        prefix, text = text[:1], text[1:]
    ids = torch.tensor([prefix + text])
    logits = model(ids)[0, len(prefix) - 1 : -1].double()
    target = ids[0, len(prefix) :]
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0].numpy(), (
        logits.argmax(-1) == target
    ).numpy()


def paper_answer(model, task, row):
    """The log-likelihoods of a row's answers and whether it is right, by the authors' rules."""
    if task.startswith("lambada"):
        *context, word = row["text"].split(" ")
        found, hits = token_scores(model, " ".join(context), f" {word}")
        return [found.sum()], bool(hits.all())
    if task == "winogrande":
        before, after = row["sentence"].split("_")
        sentences = [before + row[option] + after for option in ("option1", "option2")]
        found = [token_scores(model, "", text)[0].sum() for text in sentences]
        means = [total / len(text.encode()) for total, text in zip(found, sentences)]
        return found, int(np.argmax(means)) == row["label"]
    if task == "hellaswag":
        found = [token_scores(model, row["ctx"], ending)[0] for ending in row["endings"]]
    else:
        found = [token_scores(model, row["question"], f" {x}")[0] for x in row["choices"]]
    return [x.sum() for x in found], int(np.argmax([x.mean() for x in found])) == row["label"]


@pytest.fixture
def forwards(monkeypatch):
    """The shapes of the forward passes that a test makes."""
    shapes, hidden = [], LanguageModel.hidden

    def counted(self, input_ids, *args):
        shapes.append(tuple(input_ids.shape))
        return hidden(self, input_ids, *args)

    monkeypatch.setattr(LanguageModel, "hidden", counted)
    return shapes


@pytest.mark.parametrize("task", benchmarks_of("paper"))
def test_paper_protocol_equals_one_at_a_time(task, model, data, run, forwards):
    rows = read_benchmark(task, data)
    (figure,) = evaluate(EvalConfig(run=run, tasks=(task,), protocol="paper", data_dir=data))[task]
    requests = PaperBenchmark(task, rows, Encoder(None)).requests
    assert len(forwards) == 1, "the whole task fits into one batch"
    assert forwards[0][0] == len(requests)
    expected = [paper_answer(model, task, row) for row in rows]
    totals = [total for found, _ in expected for total in found]
    for score, request, total in zip(Scorer(model, 700)(requests), requests, totals, strict=True):
        assert score.tokens == len(request.ids) - request.start
        assert score.total == pytest.approx(total, abs=1e-5 * score.tokens)
    assert figure.right == "".join(str(int(right)) for _, right in expected)
    assert figure.value == figure.right.count("1") / len(rows)
    assert 0 < figure.value < 1, "both outcomes are met"
    guesses = {
        "lambada": 0,
        "lambada_openai": 0,
        "hellaswag": 1 / 4,
        "winogrande": 1 / 2,
        "arc_easy": np.mean([1 / 3, 1 / 4, 1 / 5]),
    }
    assert figure.chance == pytest.approx(guesses[task])


def test_batches_keep_to_their_tokens_and_change_nothing(model, forwards):
    rng = np.random.default_rng(0)
    requests = [
        Request(rng.integers(256, size=n).tolist(), int(rng.integers(1, n)))
        for n in rng.integers(2, 60, size=100)
    ]
    alone = Scorer(model, 1)(requests)
    assert len(forwards) == 100
    forwards.clear()
    together = Scorer(model, 1000)(requests)
    assert len(forwards) < 8
    assert all(rows * length <= 1000 for rows, length in forwards)
    assert [x.total for x in together] == pytest.approx([x.total for x in alone], abs=1e-5 * 60)
    assert [(x.tokens, x.greedy) for x in together] == [(x.tokens, x.greedy) for x in alone]


def test_clamped_mode_is_never_padded(forwards):
    torch.manual_seed(0)
    model = sm.build("sisa-tiny-ds16", mode="clamped").eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.attn.decay_bias.fill_(1.0)  # g falls by more than a nat a token: the clamp binds
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(256, size=n).tolist(), n // 2) for n in (50, 80, 80, 50, 79)]
    together = Scorer(model, 10**6)(requests)
    assert sorted(forwards) == [(1, 78), (2, 49), (2, 79)]
    alone = Scorer(model, 1)(requests)
    assert [x.total for x in together] == pytest.approx([x.total for x in alone], abs=1e-5 * 40)
    padded = Scorer(model, 10**6)
    padded.batches = lambda requests: [[1, 2, 4, 0, 3]]
    assert abs(padded(requests)[0].total - alone[0].total) > 0.1, (
        "padding would have changed the result"
    )


def test_bf16_changes_scores_little(model):
    requests = [Request(list(TEXT.encode()), 1)]
    exact = Scorer(model, 100)(requests)[0]
    rounded = Scorer(model, 100, "bf16")(requests)[0]
    assert exact.total != rounded.total
    assert rounded.total == pytest.approx(exact.total, rel=0.05)


@torch.no_grad()
def test_bf16_pure_is_a_model_cast_whole_as_the_authors_evaluate(trained):
    """Weights, autocast and logits in bf16, lambda at bf16's values."""
    cpu = torch.device("cpu")
    model = load_in("fp32", trained / "final", cpu)
    cast = load_in("bf16-pure", trained / "final", cpu)
    assert cast.config.weights == "bf16", "RoPE's tables and the decay's logits too"
    for (name, original), x in zip(model.named_parameters(), cast.parameters()):
        assert x.dtype == (torch.float32 if name.endswith("lambda_raw") else torch.bfloat16)
        assert torch.equal(x.float(), original.bfloat16().float())
    ids = torch.tensor([list(TEXT.encode())])
    with torch.autocast("cpu", torch.bfloat16):
        logits = cast(ids[:, :-1])
    assert logits.dtype == torch.bfloat16
    logs = logits[0].float().log_softmax(-1).double()
    expected = logs.gather(1, ids[0, 1:, None]).sum().item()
    (score,) = Scorer(cast, 100, "bf16-pure")([Request(ids[0].tolist(), 1)])
    assert score.total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [([], "fp32"), (["--precision", "bf16"], "bf16"), (["--precision", "bf16-pure"], "bf16-pure")],
)
def test_a_row_says_in_what_and_by_whose_rules_it_was_measured(run, data, flags, dtype):
    tasks = ["--tasks", "winogrande,niah,needle", "--protocol", "paper", "--data-dir", str(data)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sisa_model.evaluation.needles.TRIALS", 1)
        assert main(["eval", str(run), *tasks, *flags]) == 0
    rows = {row["task"]: row for row in read_rows(run / "eval.jsonl")}
    assert {task: row["protocol"] for task, row in rows.items()} == {
        "winogrande": "paper",
        "niah": "paper",
        "needle": "ours",
    }
    assert {row["dtype"] for row in rows.values()} == {dtype}
    record = json.loads((run / "eval" / "step-00000040-winogrande-paper.json").read_text())
    assert (record["protocol"], record["dtype"]) == ("paper", dtype)


def test_on_a_gpu_the_papers_tasks_are_bf16_whole(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for has_bf16, expected in ((True, ("bf16-pure", "bf16")), (False, ("fp32", "fp32"))):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bf16, **_: has)
        found = [precision_of(x, "auto", "fp32", cuda) for x in ("paper", "ours")]
        assert tuple(found) == expected
    assert precision_of("paper", "fp32", "fp32", cuda) == "fp32"
    assert precision_of("paper", "auto", "fp32", cpu) == "fp32"
    assert precision_of("ours", "auto", "bf16", cpu) == "bf16-pure", "a model of bf16 stays one"


def test_the_command_prints_and_writes_every_figure(run, data, tmp_path, capsys):
    flags = [str(run), "--protocol", "paper", "--data-dir", str(data)]
    assert main(["eval", *flags, "--tasks", "lambada,winogrande", "arc_easy"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[4:7]] == [
        "lambada",
        "winogrande",
        "arc_easy",
    ]
    assert " to " in out
    assert "lambada: 12 examples, where the published set has 5,153" in out
    rows = read_rows(run / "eval.jsonl")
    assert [row["task"] for row in rows] == ["lambada", "winogrande", "arc_easy"]
    for row in rows:
        assert row["step"] == 40
        assert row["count"] == 12
        assert row["low"] <= row["accuracy"] <= row["high"]
        record = json.loads((run / "eval" / f"step-00000040-{row['task']}-paper.json").read_text())
        assert record["settings"]["protocol"] == "paper"
        assert record["figures"][0]["value"] == row["accuracy"]
        assert record["figures"][0]["right"].count("1") == round(12 * row["accuracy"])
    assert main(["eval", *flags, "--tasks", "lambada"]) == 0
    assert [row["task"] for row in read_rows(run / "eval.jsonl")] == [
        "winogrande",
        "arc_easy",
        "lambada",
    ], "replaced"
    assert main(["eval", *flags, "--tasks", "lambada", "--lam-zero"]) == 0
    assert read_rows(run / "eval.jsonl")[-1]["task"] == "lambada (lambda 0)"
    capsys.readouterr()
    assert main(["eval", *flags, "--tasks", "piqa,lambada", "--limit", "3"]) == 1
    assert main(["eval", *flags, "--tasks", "winogrande", "--limit", "3"]) == 0
    out = capsys.readouterr().out
    assert "a quick look: not in eval.jsonl" in out
    assert "published" not in out
    assert len(read_rows(run / "eval.jsonl")) == 4
    record = json.loads((run / "eval" / "step-00000040-winogrande-paper-limit3.json").read_text())
    assert record["figures"][0]["count"] == 3
    assert main(["plot", str(run), "--out", str(tmp_path / "runs.png")]) == 0


def test_a_folder_of_weights_takes_a_tokenizer(run, data):
    config = EvalConfig(
        run=run / "final", tasks=("lambada",), protocol="paper", data_dir=data, tokenizer="bytes"
    )
    (figure,) = evaluate(config)["lambada"]
    (same,) = evaluate(dataclasses.replace(config, run=run, tokenizer=None))["lambada"]
    assert figure == same
    assert (run / "final" / "eval" / "lambada-paper.json").is_file()
    assert not (run / "final" / "eval.jsonl").exists(), "its step is unknown"


@pytest.mark.parametrize(
    ("right", "count", "expected"),
    [
        (0, 40, (0.0, 0.0876)),  # by hand: z^2 / (n + z^2)
        (40, 40, (0.9124, 1.0)),
        (1, 40, (0.0044, 0.1288)),
        (100, 400, (0.2101, 0.2947)),
    ],
)
def test_a_shares_interval_is_wilsons(right, count, expected):
    stats = pytest.importorskip("scipy.stats")
    low, high = wilson(right, count)
    assert (low, high) == pytest.approx(expected, abs=5e-5)
    theirs = stats.binomtest(right, count).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    scores = [1] * right + [0] * (count - right)
    found = measure("accuracy", scores, None)
    assert (found.low, found.high, found.value) == (low, high, right / count)
    assert wilson(right, count) == pytest.approx(
        tuple(1 - edge for edge in reversed(wilson(count - right, count)))
    )


def test_a_share_of_nothing_is_refused():
    for right, count in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=r"right must be in \[0, count\]"):
            wilson(right, count)


def test_other_figures_have_bootstrap_intervals():
    losses = np.random.default_rng(0).normal(2, 0.5, 300)
    low, high = bootstrap(losses)
    error = 1.96 * losses.std() / math.sqrt(300)
    # 2,000 resamples: their quantiles are good to a twentieth of the error
    assert (low, high) == pytest.approx(
        (losses.mean() - error, losses.mean() + error), abs=0.1 * error
    )
    assert bootstrap(losses) == (low, high)
    aggregated = measure("perplexity", list(losses), None, lambda x: math.exp(np.mean(x)))
    assert (aggregated.low, aggregated.high) == pytest.approx(np.exp((low, high)), rel=1e-3)
    assert aggregated.right == ""


def test_rows_of_the_same_step_and_task_are_replaced(tmp_path):
    path = tmp_path / "eval.jsonl"
    add_rows(
        path, [{"step": 1, "task": "a", "accuracy": 0.1}, {"step": 1, "task": "b", "accuracy": 0.2}]
    )
    add_rows(
        path, [{"step": 2, "task": "a", "accuracy": 0.3}, {"step": 1, "task": "b", "accuracy": 0.4}]
    )
    assert [(row["step"], row["task"], row["accuracy"]) for row in read_rows(path)] == [
        (1, "a", 0.1),
        (2, "a", 0.3),
        (1, "b", 0.4),
    ]


def test_rows_of_earlier_rules_go_by_what_they_are(tmp_path):
    """A row without a protocol is of a version whose "paper" was not the authors' own."""
    names = {
        "lambada": "lambada_openai",
        "lambada (harness)": "lambada_openai (harness)",
        "lambada (lambda 0)": "lambada_openai (lambda 0)",
        "hellaswag": "hellaswag, earlier rule",
        "hellaswag (harness)": "hellaswag (harness)",
        "hellaswag (lambda 0)": "hellaswag, earlier rule (lambda 0)",
        "niah": "needle",
        "niah_long": "needle_long",
        "needle_grid": "needle_grid",
        "piqa (harness)": "piqa (harness)",
    }
    path = tmp_path / "eval.jsonl"
    other = {"step": 9, "task": "arc_easy", "protocol": "harness", "accuracy": 0.5}
    add_rows(path, [other])
    assert [row["task"] for row in read_evaluations(tmp_path)] == ["arc_easy (harness)"]
    path.unlink()
    add_rows(path, [{"step": 9, "task": name, "accuracy": 0.5} for name in names])
    assert [row["task"] for row in read_evaluations(tmp_path)] == list(names.values())
    add_rows(path, [{"step": 9, "task": "niah", "protocol": "paper", "accuracy": 1.0}])
    found = {row["task"]: row["accuracy"] for row in read_evaluations(tmp_path)}
    assert (found["niah"], found["needle"]) == (1.0, 0.5), "both stay"
    add_rows(path, [{"step": 9, "task": "needle", "protocol": "ours", "accuracy": 0.75}])
    assert len(read_evaluations(tmp_path)) == len(names) + 1, "the earlier row is replaced"


@pytest.mark.parametrize(
    "preset", ["sisa-tiny-ds16", "sisa-tiny-ds32-nodecay", "sisa-tiny-ds32-lambdashared"]
)
@torch.no_grad()
def test_lambda_zero_is_the_limit_of_a_small_lambda(preset):
    torch.manual_seed(0)
    model = sm.build(preset, d_ff=48).eval()
    ids = torch.randint(256, (2, 40))
    before, plain = model(ids), without_importance(model)(ids)
    assert (plain - before).abs().max() > 0.01
    for layer in model.layers:
        layer.attn.lambda_raw.fill_(-60.0)
    assert (plain - model(ids)).abs().max() < 1e-5


HARNESS_PROMPTS = {
    "lambada_openai": lambda row: [
        (" ".join(row["text"].split(" ")[:-1]), " " + row["text"].split(" ")[-1])
    ],
    "hellaswag": lambda row: [
        (f"Pets: {row['ctx_a']} {row['ctx_b'].capitalize()}", f" {ending}")
        for ending in row["endings"]
    ],
    "arc_easy": lambda row: [
        (f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"]
    ],
    # The name belongs to the context, and only what follows the blank is scored.
    "winogrande": lambda row: [
        (row["sentence"].split("_")[0] + row[option], f" {row['sentence'].split('_ ')[1]}")
        for option in ("option1", "option2")
    ],
    "piqa": lambda row: [
        (f"Question: {row['goal']}\nAnswer:", f" {row[solution]}") for solution in ("sol1", "sol2")
    ],
}


@pytest.mark.slow
def test_harness_protocol_by_hand(model, data, run, forwards):
    pytest.importorskip("lm_eval")
    tasks = tuple(benchmarks_of("harness"))
    found = evaluate(EvalConfig(run=run, tasks=tasks, data_dir=data))
    assert len(forwards) < 12, "about 160 sequences"
    for task, prompts in HARNESS_PROMPTS.items():
        figures = {figure.metric: figure for figure in found[f"{task} (harness)"]}
        rows = read_benchmark(task, data, protocol="harness")
        scores = [[token_scores(model, *option) for option in prompts(row)] for row in rows]
        if task == "lambada_openai":
            expected = [int(hits.all()) for ((_, hits),) in scores]
            total = np.mean([x.sum() for ((x, _),) in scores])
            assert figures["perplexity"].value == pytest.approx(math.exp(-total), rel=1e-4)
            assert (
                figures["perplexity"].low < figures["perplexity"].value < figures["perplexity"].high
            )
        else:
            expected = [
                int(np.argmax([x.sum() for x, _ in s]) == row["label"])
                for s, row in zip(scores, rows)
            ]
        assert figures["acc"].right == "".join(map(str, expected)), task
        assert figures["acc"].value == pytest.approx(np.mean(expected))
        if "acc_norm" in figures:
            lengths = [[len(option[1]) - 1 for option in prompts(row)] for row in rows]
            means = [[x.sum() / n for (x, _), n in zip(s, ns)] for s, ns in zip(scores, lengths)]
            expected = [int(np.argmax(m) == row["label"]) for m, row in zip(means, rows)]
            assert figures["acc_norm"].right == "".join(map(str, expected)), task
    rows = {row["task"]: row["metric"] for row in read_rows(run / "eval.jsonl")}
    assert rows["hellaswag (harness)"] == "acc_norm"
    assert rows["piqa (harness)"] == "acc"


@pytest.mark.slow
def test_harness_takes_cleaned_contexts(model, data, run, tmp_path):
    """A file of HellaSwag made for an earlier version, with ``query`` in place of its parts."""
    pytest.importorskip("lm_eval")
    rows = read_benchmark("hellaswag", data, protocol="harness")
    prompts = [HARNESS_PROMPTS["hellaswag"](row) for row in rows]
    older = [
        {"query": options[0][0], "endings": row["endings"], "label": row["label"]}
        for row, options in zip(rows, prompts)
    ]
    path = tmp_path / BENCHMARKS["hellaswag"].file
    path.write_text("".join(json.dumps(row) + "\n" for row in older))
    found = evaluate(EvalConfig(run=run, tasks=("hellaswag",), data_dir=tmp_path))
    totals = [[token_scores(model, *option)[0].sum() for option in options] for options in prompts]
    expected = [int(np.argmax(x) == row["label"]) for x, row in zip(totals, rows)]
    (acc,) = (x for x in found["hellaswag (harness)"] if x.metric == "acc")
    assert acc.right == "".join(map(str, expected))


def test_former_names_of_the_natural_lambada(data, run, tmp_path, caplog):
    pytest.importorskip("lm_eval")
    shutil.copy(data / BENCHMARKS["lambada_openai"].file, tmp_path / "lambada_test.jsonl")
    assert read_benchmark("lambada_openai", tmp_path) == read_benchmark("lambada_openai", data)
    tasks = ("lambada", "lambada_openai,niah")
    assert check(EvalConfig(run=run, tasks=tasks)) == ("lambada_openai", "niah")
    assert "lambada in protocol harness is lambada_openai" in caplog.text
    assert check(EvalConfig(run=run, tasks=tasks, protocol="paper"))[0] == "lambada"


def test_harness_model_scores_texts_and_generates(model):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from sisa_model.evaluation.harness import HarnessModel

    def ask(model, kind, *args):
        return getattr(HarnessModel(Scorer(model, 500), Encoder(None)), kind)(
            [Instance(kind, {}, args, 0)]
        )[0]

    text = TEXT * 3
    ids = torch.tensor([[256, *text.encode()]])
    with torch.no_grad():
        logs = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        whole, rest = divmod(ids.shape[1] - 1, 40)
        windows = [model(ids[:, 40 * i : 40 * i + 40])[0].log_softmax(-1) for i in range(whole)]
        windows.append(model(ids[:, -41:-1])[0, -rest:].log_softmax(-1))
    assert ask(model, "loglikelihood_rolling", text) == pytest.approx(logs.sum().item(), rel=1e-5)
    cut = torch.cat(windows).gather(1, ids[0, 1:, None]).sum().item()
    assert ask(with_positions(model, 40), "loglikelihood_rolling", text) == pytest.approx(
        cut, rel=1e-5
    )
    assert ask(model, "loglikelihood", "", "the")[0] == pytest.approx(
        logs[:3].sum().item(), rel=1e-5
    )
    prompt = torch.tensor([list(b"the cat ")])
    greedy = Encoder(None).decode(generate(model, prompt, 40)[0, 8:].tolist())
    assert ask(model, "generate_until", "the cat ", {"max_gen_toks": 40}) == greedy
    stop = greedy[20:22]
    assert (
        ask(model, "generate_until", "the cat ", {"max_gen_toks": 40, "until": [stop]})
        == greedy[: greedy.find(stop)]
    )
    with pytest.raises(ValueError, match="generation is greedy"):
        ask(model, "generate_until", "the cat ", {"do_sample": True})
    with pytest.raises(
        ValueError, match=r"a prompt of 8 tokens and 256 more pass the model's 100 positions"
    ):
        ask(with_positions(model, 100), "generate_until", "the cat ", {})
    clamped = sm.build("sisa-tiny-ds16", mode="clamped").eval()  # which has no cache
    clamped.load_state_dict(model.state_dict())
    greedy = Encoder(None).decode(generate(clamped, prompt, 20, use_cache=False)[0, 8:].tolist())
    assert ask(clamped, "generate_until", "the cat ", {"max_gen_toks": 20}) == greedy


@pytest.mark.slow
def test_harness_task_that_generates_with_filters_and_a_metric_of_the_whole(
    model, tmp_path, caplog
):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from sisa_model.evaluation.harness import HarnessModel, run_harness

    prompts = ("the cat saw the ", "and the dog saw the ")
    asked = [torch.tensor([list(prompt.encode())]) for prompt in prompts]
    words = [
        Encoder(None).decode(generate(model, ids, 9)[0, ids.shape[1] :].tolist()).split(" ")[0]
        for ids in asked
    ]
    rows = [{"q": prompts[0], "a": words[0]}, {"q": prompts[1], "a": words[1] + "s"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "pets",
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "generate_until",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "rows.jsonl")},
            "cache_dir": str(tmp_path),
        },
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": [" "], "max_gen_toks": 9},
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {
                "name": "initial",
                "filter": [
                    {"function": "regex", "regex_pattern": "(.)"},
                    {"function": "take_first"},
                ],
            },
        ],
        "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}],
    }
    loaded = TaskManager(include_defaults=False).load([task])["tasks"]
    figures = run_harness(HarnessModel(Scorer(model, 500), Encoder(None)), loaded, None)["pets"]
    assert {figure.metric: figure.right for figure in figures} == {
        "exact_match, whole": "10",
        "exact_match, initial": "00",
    }
    assert "pets: bleu, whole" in caplog.text


@pytest.mark.slow  # the harness reads all its 14,000 tasks to know one by name
def test_a_task_the_harness_does_not_know_is_named(run, capsys):
    pytest.importorskip("lm_eval")
    assert main(["eval", str(run), "--tasks", "lambda_openai"]) == 1
    assert "got 'lambda_openai'; near are lambada_openai," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tasks", "mmlu"],
            "tasks must be among lambada, lambada_openai, hellaswag, arc_easy, winogrande, niah,",
        ),
        (["--tasks", "piqa"], "in protocol paper, got 'piqa'"),
        (["--tasks", "mmlu", "--protocol", "harness"], "in protocol harness with local files"),
        (["--tasks", "niah,niah"], "tasks must name at least one task, each once, got 'niah,niah'"),
        (["--tasks", ","], "tasks must name at least one task"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--batch-tokens", "0"], "batch_tokens must be"),
        (["--device", "tpu9"], "device must be"),
        (["--tokenizer", "none.json"], "tokenizer none.json does not exist"),
        (
            ["--tasks", "lambada", "--max-seq-len", "20"],
            "positions, and the model has 20 (max_seq_len); --max-seq-len allows more",
        ),
    ],
)
def test_bad_settings_are_named_before_the_model_runs(run, data, flags, message, capsys, forwards):
    assert main(["eval", str(run), "--protocol", "paper", "--data-dir", str(data), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not forwards
    assert not (run / "eval").exists()


@pytest.mark.parametrize("field", ["protocol", "precision"])
def test_a_choice_that_there_is_not_is_named(field, run):
    with pytest.raises(ValueError, match=f"{field} must be one of .*, got 'mine'"):
        evaluate(EvalConfig(run=run, **{field: "mine"}))


def test_longer_examples_need_max_seq_len(run, tmp_path, capsys):
    (tmp_path / "lambada_cimec_test.jsonl").write_text(
        json.dumps({"text": "a cat " * 200 + "sat"}) + "\n"
    )
    flags = f"eval {run} --tasks lambada --protocol paper --data-dir {tmp_path}".split()
    assert main(flags) == 1
    assert "sequence 0 takes 1202 positions, and the model has 1024" in capsys.readouterr().err
    assert main([*flags, "--max-seq-len", "2000"]) == 0


def test_every_checkpoint_of_a_run(run, data):
    """`--checkpoint all` leaves a row a step, each what that step's weights give alone."""
    settings = {"run": run, "tasks": ("lambada",), "protocol": "paper", "data_dir": data}
    last = evaluate(EvalConfig(checkpoint="all", **settings))
    rows = {row["step"]: row["accuracy"] for row in read_rows(run / "eval.jsonl")}
    assert list(rows) == [20, 40]
    assert (
        last["lambada"][0].value == rows[40] == evaluate(EvalConfig(**settings))["lambada"][0].value
    )
    assert evaluate(EvalConfig(checkpoint="20", **settings))["lambada"][0].value == rows[20]
    for wrong, allowed in (("30", "one of 20, 40, got 30"), ("last", "or a step, got 'last'")):
        with pytest.raises(ValueError, match=f"checkpoint must be newest, all .*{allowed}"):
            evaluate(EvalConfig(checkpoint=wrong, **settings))
    weights = {**settings, "run": run / "final", "tokenizer": "bytes"}
    with pytest.raises(ValueError, match="checkpoint must be left at newest"):
        evaluate(EvalConfig(checkpoint="20", **weights))
    with pytest.raises(FileNotFoundError, match="final is not a run folder"):
        evaluate(EvalConfig(checkpoint="all", **weights))


def test_bad_folders_are_named(run, data, tmp_path, capsys):
    def fails(folder, *flags):
        settings = f"eval {folder} --tasks lambada --protocol paper --data-dir {data}".split()
        assert main([*settings, *flags]) == 1
        return capsys.readouterr().err

    assert "run must be a run folder of sisa train or" in fails(data)
    none = tmp_path / "none"
    assert f"tokenizer {none} does not exist" in fails(run / "final", "--tokenizer", str(none))
    words = {f"w{i}": i for i in range(300)}
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "words.json"))
    words = str(tmp_path / "words.json")
    assert "tokenizer must be the one that" in fails(run / "final", "--tokenizer", words)
    torch.manual_seed(0)
    sm.save(sm.build("transformer-tiny"), tmp_path / "plain")
    assert "lam_zero needs a model with an importance term" in fails(
        tmp_path / "plain", "--tokenizer", "bytes", "--lam-zero"
    )


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("lambada", "", "holds no example"),
        (
            "lambada",
            '{"text": "word"}',
            "line 1: text must have a last word after others, got 'word'",
        ),
        (
            "lambada",
            '{"text": "a b"}\n{"txt": 1}',
            "line 2 is no example of lambada in protocol paper: it has txt and no text; "
            "fetch cimec/lambada",
        ),
        ("lambada", '{"text": "a b"}\n{"text": 3}', "line 2: text must be str"),
        ("lambada", "[1]", "line 1 is no example of lambada"),
        (
            "lambada",
            '{"text": "A stone fell"}\n{"text": "It fell"}\n{"text": "he fell"}',
            "must hold lambada, and is lambada_openai: 2 of 3 examples have capitals; "
            "fetch cimec/lambada, split test",
        ),
        (
            "lambada_openai",
            '{"text": "a stone fell"}\n{"text": "it fell"}\n{"text": "He fell"}',
            "must hold lambada_openai, and is lambada: 1 of 3 examples have capitals; "
            "fetch EleutherAI/lambada_openai, split test",
        ),
        (
            "hellaswag",
            '{"query": "q", "endings": ["a", "b"], "label": 1}',
            "line 1 is no example of hellaswag in protocol paper: it has query, endings, label and "
            "no ctx; fetch Rowan/hellaswag, split validation",
        ),
        (
            "hellaswag",
            '{"ctx": "q", "endings": ["a", "b"], "label": 2}',
            "label must be the index of one of 2 answers, got 2",
        ),
        (
            "arc_easy",
            '{"question": "q", "choices": ["a", ""], "label": 0}',
            "the answers must be texts, none of them empty",
        ),
        (
            "winogrande",
            '{"sentence": "s", "option1": "a", "option2": "b", "label": 0}',
            "must have a blank _ to fill, got 's'",
        ),
        (
            "piqa",
            '{"goal": "g", "sol1": "a", "sol2": "b"}',
            "must have a label for each of 1 examples, got 12",
        ),
    ],
)
def test_bad_data_is_named(task, text, message, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / BENCHMARKS[task].file).write_text(text)
    with pytest.raises(
        ValueError, match=BENCHMARKS[task].file if task != "piqa" else PIQA_LABELS
    ) as error:
        read_benchmark(task, folder)
    assert message in str(error.value)


def test_missing_data_is_named_with_what_to_fetch(data, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(run), "--tasks", "lambada,winogrande", "--protocol", "paper"]) == 1
    said = capsys.readouterr().err
    for task, parts in {
        "lambada": ("cimec/lambada", "split test", "5,153 examples", '{"text"}'),
        "winogrande": ("allenai/winogrande", "winogrande_xl", "split validation", '"option1"'),
    }.items():
        file = BENCHMARKS[task].file
        (line,) = (line for line in said.splitlines() if f"task {task} needs" in line)
        assert f"data/eval/{file}, which is not there" in line
        assert all(part in line for part in (*parts, f"into {file}", "docs/evaluate.md"))
    shutil.copytree(data, tmp_path / "data" / "eval")
    assert main(["eval", str(run), "--tasks", "lambada,winogrande", "--protocol", "paper"]) == 0


def test_missing_labels_of_piqa_are_named(data, tmp_path):
    shutil.copy(data / BENCHMARKS["piqa"].file, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"task piqa needs .*{PIQA_LABELS}"):
        read_benchmark("piqa", tmp_path)
    shutil.copy(data / PIQA_LABELS, tmp_path)
    (tmp_path / PIQA_LABELS).write_text("0\n2\n")
    with pytest.raises(ValueError, match="must hold lines of 0 or 1"):
        read_benchmark("piqa", tmp_path)


def test_the_documented_script_makes_the_files(tmp_path, monkeypatch):
    """That of docs/evaluate.md, on rows as the Hub's data sets have them."""
    pets = {
        "activity_label": "Pets",
        "ctx_a": "A cat [header] sits.",
        "ctx_b": "it",
        "ctx": "A cat [header] sits. it",
        "endings": ["[step] purrs.", "b"],
    }
    hub = {
        "cimec/lambada": {"text": "a cat , sat", "domain": None},
        "EleutherAI/lambada_openai": {"text": "A cat sat"},
        "Rowan/hellaswag": {**pets, "ind": 3, "label": "1"},
        "allenai/ai2_arc": {
            "question": "q",
            "choices": {"text": ["x", "y"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "allenai/winogrande": {
            "sentence": "The _ sat",
            "option1": "cat",
            "option2": "dog",
            "answer": "2",
        },
        "baber/piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
    }
    loaded = []

    def load_dataset(name, config=None, *, split):
        loaded.append((name, config, split))
        return [hub[name]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "evaluate.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
    folder = tmp_path / "data" / "eval"
    for (task, benchmark), (name, config, split) in zip(BENCHMARKS.items(), loaded, strict=True):
        assert name in benchmark.source
        assert f"split {split}" in benchmark.source
        assert config in (None, "default", "plain_text") or config in benchmark.source
        assert f"`{benchmark.file}`" in page
        assert f"| {benchmark.examples:,} |" in page
        for protocol in benchmark.protocols:
            (row,) = read_benchmark(task, folder, protocol=protocol)
            assert row.get("label", 1) == 1
    assert read_benchmark("hellaswag", folder) == [{**pets, "label": 1}], "as the Hub has it"


def test_limit_takes_the_first(data):
    assert read_benchmark("piqa", data, 5) == read_benchmark("piqa", data)[:5]
