"""sisa eval: benchmarks and needles for a trained model, with intervals, chance and records."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sisa_model.evaluation.benchmarks import BENCHMARKS, PaperBenchmark, Row, read_benchmark
from sisa_model.evaluation.config import EvalConfig, benchmarks_of, check
from sisa_model.evaluation.needles import NEEDLE_TESTS, Needles, find_needles
from sisa_model.evaluation.records import Records
from sisa_model.evaluation.scoring import Scorer
from sisa_model.evaluation.statistics import Measurement, table
from sisa_model.evaluation.subject import Subject, find_subject, with_positions, without_importance
from sisa_model.models.checkpoint import load
from sisa_model.reporting.figures import plot_grid
from sisa_model.runs.config import runs_in_bf16
from sisa_model.runs.folder import read_run, weights_by_step
from sisa_model.utils.machine import find_device

log = logging.getLogger(__name__)


def evaluate(config: EvalConfig) -> dict[str, list[Measurement]]:
    """Evaluate, log the table, write the files; each task's figures by its name in eval.jsonl.

    Of several checkpoints, the last one's. Raises ValueError, FileNotFoundError or OSError for bad
    settings, data or folders before the model runs."""
    tasks = check(config)
    if config.checkpoint != "all":
        return _evaluate(config, tasks)
    found: dict[str, list[Measurement]] = {}
    for step in weights_by_step(config.run, read_run(config.run).train.steps):
        log.info(f"step {step:,}")
        found = _evaluate(dataclasses.replace(config, checkpoint=str(step)), tasks)
    return found


def _evaluate(config: EvalConfig, tasks: tuple[str, ...]) -> dict[str, list[Measurement]]:
    """One model: all that can be wrong is found before it runs, then the tasks one by one."""
    subject = find_subject(config.run, config.tokenizer, config.checkpoint)
    device = find_device(config.device)
    asked = _ask(config, tasks, subject)
    scorer = _load_scorer(config, subject, device)
    for benchmark in asked.paper:
        scorer.check(benchmark.requests, benchmark.task)

    start = time.perf_counter()
    records = Records(config, subject)
    found = {}
    for task, measurements in _answers(asked, scorer, subject, config.limit):
        records.write(task, measurements)
        found[records.title(task)] = measurements
        if task == "needle_grid":
            _draw_grid(records, measurements[0])
    log.info(table(found))
    why = f" ({records.left_out}: not in eval.jsonl)" if records.left_out else ""
    log.info(f"{time.perf_counter() - start:.0f} s; records: {records.folder}{why}")
    return found


@dataclass
class _Asked:
    """What the model is asked: by the paper's protocol, by the harness, and for needles."""

    paper: list[PaperBenchmark]
    harness: dict[str, Any]
    needles: list[Needles]


def _ask(config: EvalConfig, tasks: tuple[str, ...], subject: Subject) -> _Asked:
    benchmarks = benchmarks_of(tasks)
    rows = _read_rows(config, benchmarks)
    needles = [
        find_needles(task, subject.encoder, subject.trained, config.limit)
        for task in tasks
        if task in NEEDLE_TESTS
    ]
    if config.protocol == "paper":
        paper = [PaperBenchmark(task, rows[task], subject.encoder) for task in benchmarks]
        return _Asked(paper, {}, needles)
    if not benchmarks:
        return _Asked([], {}, needles)
    from sisa_model.evaluation import harness  # takes seconds to import

    return _Asked([], harness.find_tasks(benchmarks, rows), needles)


def _read_rows(config: EvalConfig, benchmarks: list[str]) -> dict[str, list[Row]]:
    """The examples of local files, by task."""
    if config.data_dir is None:
        return {}
    found = {task: read_benchmark(task, config.data_dir, config.limit) for task in benchmarks}
    for task, rows in found.items():
        published = BENCHMARKS[task].examples
        if config.limit is None and len(rows) != published:
            log.info(f"{task}: {len(rows):,} examples, where the published set has {published:,}")
    return found


def _load_scorer(config: EvalConfig, subject: Subject, device: torch.device) -> Scorer:
    model = load(subject.weights, device)
    if config.lam_zero:
        model = without_importance(model)
    if config.max_seq_len is not None:
        model = with_positions(model, config.max_seq_len)
    autocast = runs_in_bf16(config.precision, device)
    return Scorer(model, config.batch_tokens, autocast=autocast)


def _answers(
    asked: _Asked, scorer: Scorer, subject: Subject, limit: int | None
) -> Iterator[tuple[str, list[Measurement]]]:
    """Each task with its figures, as they come."""
    for benchmark in asked.paper:
        yield benchmark.task, [benchmark.measure(scorer(benchmark.requests, benchmark.task))]
    if asked.harness:
        from sisa_model.evaluation import harness

        model = harness.HarnessModel(scorer, subject.encoder)
        yield from harness.run_harness(model, asked.harness, limit).items()
    for needles in asked.needles:
        roomy = _with_room(scorer, needles)
        yield needles.task, [needles.measure(roomy(needles.requests, needles.task))]


def _with_room(scorer: Scorer, needles: Needles) -> Scorer:
    """``scorer``, with as many positions as the longest request takes."""
    held = scorer.model.config.max_seq_len
    needed = max(len(request.ids) - 1 for request in needles.requests)
    if needed <= held:
        return scorer
    log.info(
        f"{needles.task}: raises the model's {held} positions (max_seq_len) "
        f"to the {needed} it needs"
    )
    return scorer.of(with_positions(scorer.model, needed))


def _draw_grid(records: Records, found: Measurement) -> None:
    path = records.path("needle_grid", ".png")
    title = f"{records.config.run.resolve().name}: five-digit numbers"
    grid = found.details
    shares = np.array(grid["by_depth_and_length"])
    trained = records.subject.trained
    plot_grid(path, title, shares, grid["depths"], grid["lengths"], trained)
    log.info(f"figure: {path}")
