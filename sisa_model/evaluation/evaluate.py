"""sisa eval: benchmarks and needles for a trained model, with intervals, chance and a record of
what each figure depends on.
"""

import dataclasses
import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from sisa_model.evaluation import needles as haystack
from sisa_model.evaluation.benchmarks import (
    BENCHMARKS,
    chance,
    paper_requests,
    paper_right,
    read_benchmark,
)
from sisa_model.evaluation.needles import Haystack
from sisa_model.evaluation.scoring import Request, Scorer
from sisa_model.evaluation.statistics import Figure, add_rows, measured, table, write_record
from sisa_model.evaluation.subject import find_subject, with_positions, without_importance
from sisa_model.models.checkpoint import load
from sisa_model.reporting.figures import plot_grid
from sisa_model.runs.config import PRECISIONS
from sisa_model.runs.folder import read_run, weights_by_step
from sisa_model.utils.machine import find_device, versions

PROTOCOLS = ("harness", "paper")
NEEDLES = ("niah", "niah_long", "needle_grid")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a model that `sisa train` made, zero-shot: benchmarks (lambada hellaswag arc_easy
    winogrande piqa) and needles.

    Protocol harness is lm-evaluation-harness with its own prompts and metrics, any of its tasks by
    name; protocol paper the scoring of the paper's authors. They differ so: LAMBADA: the same rule,
    all tokens of the last word by argmax; the harness adds perplexity. HellaSwag, ARC-Easy: harness
    acc compares summed log-likelihoods of the endings, acc_norm those divided by characters; paper
    compares the mean a token. WinoGrande: harness compares the log-likelihood of what follows the
    blank, summed, given each name; paper the mean a token of the whole sentence. PIQA is not in the
    paper. From local HellaSwag files the harness's capital in the second part of a context is
    missing, as the files have it.

    niah: the authors' needle test (512 tokens, 5 needles, 5 seeds of 200). niah_long: the same at
    256 to 3,072 tokens.
    needle_grid: random five-digit numbers, every token right, by depth and by length to twice the
    training length, as a picture.

    Figures go to `RUN/eval/*.json` with each example's outcome, and, of all examples, to
    RUN/eval.jsonl, which `sisa plot` draws."""

    run: tyro.conf.Positional[Path]
    """Run folder of `sisa train`, or with --tokenizer a folder of model weights."""
    checkpoint: str = "newest"
    """Which weights of a run: its newest (final, once it is finished), the step of a checkpoint, or
    all, one after the other.
    """
    tasks: tuple[str, ...] = ("lambada", "hellaswag", "arc_easy", "winogrande", "niah")
    """Tasks, separated by commas or spaces."""
    protocol: str = "harness"
    """Scoring of the benchmarks: harness (needs pip install "sisa[eval]") or paper."""
    data_dir: Path | None = None
    """Folder of local files, such as lambada_test.jsonl, instead of downloads; protocol paper needs
    it.
    """
    limit: int | None = None
    """Take the first N examples of each benchmark, N trials a seed (and cell) of a needle test: a
    quick look, not in eval.jsonl.
    """
    lam_zero: bool = False
    """Ablation: without SISA's importance term, each layer plain attention."""
    tokenizer: str | None = None
    """For a folder of model weights: its tokenizer, a `tokenizers` JSON file or the word bytes."""
    max_seq_len: int | None = None
    """Positions for the benchmarks, to score examples longer than the model's; needle tests take
    what they need, and say so.
    """
    batch_tokens: int = 8192
    """Tokens a forward pass. Changes memory and speed, not the result beyond rounding."""
    precision: str = "auto"
    """fp32, or bf16 autocast with fp32 logits; auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""


def check(config: EvalConfig) -> tuple[str, ...]:
    """The tasks by name, every field checked; ValueError names the first bad one."""
    tasks = tuple(name for part in config.tasks for name in part.split(",") if name)
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(
            f"tasks must name at least one task, each once, got {' '.join(config.tasks)!r}"
        )
    for field, allowed in (("protocol", PROTOCOLS), ("precision", PRECISIONS)):
        if getattr(config, field) not in allowed:
            raise ValueError(
                f"{field} must be one of {', '.join(allowed)}, got {getattr(config, field)!r}"
            )
    if config.checkpoint not in ("newest", "all") and not config.checkpoint.isdecimal():
        raise ValueError(f"checkpoint must be newest, all or a step, got {config.checkpoint!r}")
    for field in ("limit", "max_seq_len", "batch_tokens"):
        if getattr(config, field) is not None and getattr(config, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(config, field)}")
    known = [
        name
        for name, benchmark in BENCHMARKS.items()
        if benchmark.paper or config.protocol == "harness"
    ]
    benchmarks = [task for task in tasks if task not in NEEDLES]
    local = config.protocol == "paper" or config.data_dir is not None
    unknown = [task for task in benchmarks if local and task not in known]
    if unknown:
        where = f"protocol {config.protocol}" + (
            " with local files" if config.protocol == "harness" else ""
        )
        raise ValueError(
            f"tasks must be among {', '.join([*known, *NEEDLES])} in {where}, got {unknown[0]!r}"
        )
    if benchmarks and config.protocol == "paper" and config.data_dir is None:
        raise ValueError(
            f"data_dir must be given for {benchmarks[0]} in protocol paper: a folder of {BENCHMARKS[benchmarks[0]].file}"
        )
    if benchmarks and config.protocol == "harness" and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            'protocol harness needs a package that is not installed: pip install "sisa[eval]"; protocol paper does not'
        )
    return tasks


def evaluate(config: EvalConfig) -> dict[str, list[Figure]]:
    """Evaluate, print the table, write the files; returns each task's figures under the name that
    eval.jsonl has for it.

    Of several checkpoints, the last one's. Raises ValueError, FileNotFoundError or OSError for bad
    settings, data or folders before the model runs."""
    tasks = check(config)
    if config.checkpoint != "all":
        return _Evaluation(config, tasks).run()
    found: dict[str, list[Figure]] = {}
    for step in weights_by_step(config.run, read_run(config.run)["train"].steps):
        print(f"step {step:,}")
        found = _Evaluation(dataclasses.replace(config, checkpoint=str(step)), tasks).run()
    return found


class _Evaluation:
    """What is set up before the model runs: data and requests, checked; then the tasks one by one."""

    def __init__(self, config: EvalConfig, tasks: tuple[str, ...]):
        self.config, self.tasks = config, tasks
        self.subject = find_subject(config.run, config.tokenizer, config.checkpoint)
        device = find_device(config.device)
        benchmarks = [task for task in tasks if task not in NEEDLES]
        folder = config.data_dir
        self.rows = (
            {}
            if folder is None
            else {task: read_benchmark(task, folder, config.limit) for task in benchmarks}
        )
        for task, rows in self.rows.items():
            if config.limit is None and len(rows) != BENCHMARKS[task].examples:
                print(
                    f"{task}: {len(rows):,} examples, where the published set has {BENCHMARKS[task].examples:,}"
                )
        self.needles = {task: self._needles(task) for task in tasks if task in NEEDLES}
        self.requests: dict[str, list[list[Request]]] = {}
        self.harness_tasks: dict[str, Any] = {}
        if config.protocol == "paper":
            self.requests = {
                task: paper_requests(task, self.rows[task], self.subject.encoder)
                for task in benchmarks
            }
        elif benchmarks:
            from sisa_model.evaluation import harness  # seconds

            self.harness_tasks = harness.find_tasks(benchmarks, self.rows)
        model = load(self.subject.weights, device)
        if config.lam_zero:
            model = without_importance(model)
        if config.max_seq_len is not None:
            model = with_positions(model, config.max_seq_len)
        self.bf16 = config.precision == "bf16" or (
            config.precision == "auto" and device.type == "cuda"
        )
        self.scorer = Scorer(model, config.batch_tokens, self.bf16)
        for task, examples in self.requests.items():
            self.scorer.check([request for example in examples for request in example], task)

    def _needles(self, task: str) -> dict[tuple, list[Request]]:
        """The requests of a needle test by (length, seed), or (length, depth, seed)."""
        stack, limit = Haystack(self.subject.encoder), self.config.limit
        if task == "needle_grid":
            wanted, least = haystack.grid_lengths(self.subject.trained), stack.grid_least
            if small := [length for length in wanted if length < least]:
                print(
                    f"{task}: leaves out lengths of {', '.join(map(str, small))} tokens; a needle and its question take {least}"
                )
            if small == wanted:
                raise ValueError(
                    f"tasks: {task} needs a model trained on {least // 2} tokens or more, got {self.subject.trained}"
                )
            cells = [
                (length, depth) for length in wanted[len(small) :] for depth in haystack.GRID_DEPTHS
            ]
            trials = min(haystack.GRID_TRIALS, limit or haystack.GRID_TRIALS)
            return {
                (*cell, seed): stack.grid(*cell, seed, trials)
                for cell in cells
                for seed in haystack.SEEDS
            }
        lengths = haystack.LONG_LENGTHS if task == "niah_long" else (haystack.LENGTH,)
        trials = min(haystack.TRIALS, limit or haystack.TRIALS)
        return {
            (length, seed): stack.paper(length, seed, trials)
            for length in lengths
            for seed in haystack.SEEDS
        }

    def run(self) -> dict[str, list[Figure]]:
        """Each task's figures, printed and written as they come."""
        found: dict[str, list[Figure]] = {}
        start = time.perf_counter()
        for task, figures in self._figures():
            found[self._name(task)] = figures
            self._write(task, figures)
        print(table(found))
        why = "of unknown step" if self.subject.step is None else "a quick look"
        print(f"{time.perf_counter() - start:.0f} s; records: {self.config.run / 'eval'}", end="")
        print("" if self._counts() else f" ({why}: not in eval.jsonl)")
        return found

    def _figures(self) -> Iterator[tuple[str, list[Figure]]]:
        for task in self.requests:
            yield task, [self._paper(task)]
        if self.harness_tasks:
            from sisa_model.evaluation import harness

            model = harness.HarnessModel(self.scorer, self.subject.encoder)
            yield from harness.run_harness(model, self.harness_tasks, self.config.limit).items()
        for task in self.needles:
            yield task, [self._find_needles(task)]

    def _paper(self, task: str) -> Figure:
        examples, rows = self.requests[task], self.rows[task]
        scores = iter(self.scorer([request for example in examples for request in example], task))
        right = [
            paper_right(task, row, [next(scores) for _ in example])
            for row, example in zip(rows, examples)
        ]
        return measured("accuracy", right, chance(task, rows))

    def _find_needles(self, task: str) -> Figure:
        requests = [request for part in self.needles[task].values() for request in part]
        scorer, needed = self.scorer, max(len(request.ids) - 1 for request in requests)
        if needed > scorer.model.config.max_seq_len:
            print(
                f"{task}: raises the model's {scorer.model.config.max_seq_len} positions (max_seq_len) to the {needed} it needs"
            )
            scorer = Scorer(
                with_positions(scorer.model, needed), self.config.batch_tokens, self.bf16
            )
        right = np.array([score.greedy for score in scorer(requests, task)]).reshape(
            len(self.needles[task]), -1
        )
        if task == "needle_grid":
            return self._grid(right)
        keys = list(self.needles[task])
        shares = {
            kind: {
                str(x): right[[key[i] == x for key in keys]].mean().item()
                for x in dict.fromkeys(key[i] for key in keys)
            }
            for i, kind in enumerate(("by_length", "by_seed"))
        }
        return measured(
            "accuracy", right.ravel().tolist(), 1 / len(haystack.NEEDLES), details=shares
        )

    def _grid(self, right: np.ndarray) -> Figure:
        lengths, depths = (
            list(dict.fromkeys(cell[i] for cell in self.needles["needle_grid"])) for i in range(2)
        )
        cells = right.reshape(len(lengths), len(depths), len(haystack.SEEDS), -1)
        shares, path = cells.mean((2, 3)).T, self._path("needle_grid").with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_grid(
            path,
            f"{self.config.run.resolve().name}: five-digit numbers",
            shares,
            depths,
            lengths,
            self.subject.trained,
        )
        print(f"figure: {path}")
        details = {
            "lengths": lengths,
            "depths": depths,
            "by_depth_and_length": shares.tolist(),
            "by_seed": dict(zip(map(str, haystack.SEEDS), cells.mean((0, 1, 3)).tolist())),
        }
        return measured(
            "accuracy", right.ravel().tolist(), 1 / haystack.GRID_VALUES, details=details
        )

    def _name(self, task: str) -> str:
        """The task's name in eval.jsonl: bare where protocol and model are the paper's, whose
        curves nothing else should meet.
        """
        harness, ablation = (
            task not in NEEDLES and self.config.protocol == "harness",
            self.config.lam_zero,
        )
        marks = [mark for mark, on in (("harness", harness), ("lambda 0", ablation)) if on]
        return f"{task} ({', '.join(marks)})" if marks else task

    def _path(self, task: str) -> Path:
        config, step = self.config, self.subject.step
        marks = [
            None if step is None else f"step-{step:08d}",
            task,
            None if task in NEEDLES else config.protocol,
            "lambda0" if config.lam_zero else None,
            None if config.limit is None else f"limit{config.limit}",
        ]
        return config.run / "eval" / ("-".join(mark for mark in marks if mark) + ".json")

    def _counts(self) -> bool:
        """Whether the figures belong in eval.jsonl: those of a known step, on all examples."""
        return self.config.limit is None and self.subject.step is not None

    def _write(self, task: str, figures: list[Figure]) -> None:
        name, settings = self._name(task), dataclasses.asdict(self.config)
        record = {
            "task": name,
            "step": self.subject.step,
            "weights": self.subject.weights,
            "figures": [dataclasses.asdict(figure) for figure in figures],
            "settings": settings,
            "versions": versions(),
        }
        write_record(self._path(task), record)
        shares = [figure for figure in figures if figure.right]
        if self._counts() and shares:
            # HellaSwag's acc_norm is what is commonly reported; of the other tasks, acc.
            best = next(
                (x for x in shares if x.metric == "acc_norm" and task == "hellaswag"), shares[0]
            )
            row = {
                "step": self.subject.step,
                "task": name,
                "accuracy": best.value,
                "low": best.low,
                "high": best.high,
                "chance": best.chance,
                "count": best.count,
                "metric": best.metric,
            }
            add_rows(self.config.run / "eval.jsonl", [{**row, **best.details}])
