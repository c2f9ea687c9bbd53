"""sisa eval: benchmarks and needles for a trained model, with intervals, chance and records."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sisa_model.evaluation.benchmarks import (
    BENCHMARKS,
    Row,
    find_file,
    missing_file,
    read_benchmark,
)
from sisa_model.evaluation.config import DATA_DIR, EvalConfig, check, precision_of, protocol_of
from sisa_model.evaluation.needles import NEEDLE_TESTS, Needles, find_needles
from sisa_model.evaluation.paper import PaperBenchmark
from sisa_model.evaluation.records import Records, write_requests
from sisa_model.evaluation.scoring import Scorer, ScoringPrecision
from sisa_model.evaluation.statistics import Measurement, table
from sisa_model.evaluation.subject import (
    Subject,
    find_subject,
    load_in,
    with_positions,
    without_importance,
)
from sisa_model.reporting.figures import plot_grid
from sisa_model.runs.folder import read_run
from sisa_model.runs.weights import weights_by_step
from sisa_model.utils.machine import find_device

log = logging.getLogger(__name__)

Questions = PaperBenchmark | Needles


def evaluate(config: EvalConfig) -> dict[str, list[Measurement]]:
    """Evaluate, log the table, write the files; each task's figures by its name in eval.jsonl.

    Of several checkpoints, the last one's; nothing where ``dump_requests`` only writes what would
    be asked. Raises ValueError, FileNotFoundError or OSError for bad settings, data or folders
    before the model runs."""
    tasks = check(config)
    if config.dump_requests is not None:
        _dump(config, tasks, config.dump_requests)
        return {}
    if config.checkpoint != "all":
        return _evaluate(config, tasks)
    found: dict[str, list[Measurement]] = {}
    for step in weights_by_step(config.run, read_run(config.run).train.steps):
        log.info(f"step {step:,}")
        found = _evaluate(dataclasses.replace(config, checkpoint=str(step)), tasks)
    return found


def _dump(config: EvalConfig, tasks: tuple[str, ...], path: Path) -> None:
    """Write the requests of ``tasks``, the same at every checkpoint."""
    checkpoint = "newest" if config.checkpoint == "all" else config.checkpoint
    subject = find_subject(config.run, config.tokenizer, checkpoint)
    count = write_requests(path, _ask(config, tasks, subject).questions)
    log.info(f"{count:,} requests, none scored: {path}")


def _evaluate(config: EvalConfig, tasks: tuple[str, ...]) -> dict[str, list[Measurement]]:
    """One model: all that can be wrong is found before it runs, then the tasks one by one."""
    subject = find_subject(config.run, config.tokenizer, config.checkpoint)
    device = find_device(config.device)
    asked = _ask(config, tasks, subject)
    protocols = {protocol_of(task, config.protocol) for task in tasks}
    scorers = _load_scorers(config, subject, device, protocols)
    for questions in asked.questions:
        if isinstance(questions, PaperBenchmark):
            scorers["paper"].check(questions.requests, questions.task)

    start = time.perf_counter()
    records = Records(config, subject)
    found = {}
    for task, measurements in _answers(asked, scorers, config, subject):
        precision = scorers[protocol_of(task, config.protocol)].precision
        records.write(task, measurements, precision)
        found[records.title(task)] = measurements
        if task == "needle_grid":
            _draw_grid(records, measurements[0])
    log.info(table(found))
    why = f" ({records.left_out}: not in eval.jsonl)" if records.left_out else ""
    log.info(f"{time.perf_counter() - start:.0f} s; records: {records.folder}{why}")
    return found


@dataclass
class _Asked:
    """What the model is asked: by the paper's protocol and for needles, and by the harness."""

    questions: list[Questions]
    harness: dict[str, Any]


def _ask(config: EvalConfig, tasks: tuple[str, ...], subject: Subject) -> _Asked:
    benchmarks = [task for task in tasks if task not in NEEDLE_TESTS]
    rows = _read_rows(config, benchmarks)
    questions: list[Questions] = []
    for task in tasks:
        if task in NEEDLE_TESTS:
            questions.append(find_needles(task, subject.encoder, subject.trained, config.limit))
        elif config.protocol == "paper":
            questions.append(PaperBenchmark(task, rows[task], subject.encoder))
    if config.protocol == "paper" or not benchmarks:
        return _Asked(questions, {})
    from sisa_model.evaluation import harness  # takes seconds to import

    return _Asked(questions, harness.find_tasks(benchmarks, rows))


def _read_rows(config: EvalConfig, benchmarks: list[str]) -> dict[str, list[Row]]:
    """The examples of local files, by task; FileNotFoundError naming every file that is missing."""
    folder = config.data_dir
    if folder is None and config.protocol == "harness":
        return {}
    folder = folder or DATA_DIR
    if missing := [task for task in benchmarks if find_file(task, folder) is None]:
        raise FileNotFoundError("\n".join(missing_file(task, folder) for task in missing))
    found = {}
    for task in benchmarks:
        found[task] = read_benchmark(task, folder, config.limit, config.protocol)
        published = BENCHMARKS[task].examples
        if config.limit is None and len(found[task]) != published:
            log.info(
                f"{task}: {len(found[task]):,} examples, where the published set has {published:,}"
            )
    return found


def _load_scorers(
    config: EvalConfig, subject: Subject, device: torch.device, protocols: set[str]
) -> dict[str, Scorer]:
    """A scorer of the model for each of ``protocols``, in what that is computed in."""
    weights = subject.model.weights
    precisions = {x: precision_of(x, config.precision, weights, device) for x in protocols}
    scorers = {x: _load_scorer(config, subject, device, x) for x in set(precisions.values())}
    return {protocol: scorers[precision] for protocol, precision in precisions.items()}


def _load_scorer(
    config: EvalConfig, subject: Subject, device: torch.device, precision: ScoringPrecision
) -> Scorer:
    model = load_in(precision, subject.weights, device)
    if config.lam_zero:
        model = without_importance(model)
    if config.max_seq_len is not None:
        model = with_positions(model, config.max_seq_len)
    return Scorer(model, config.batch_tokens, precision)


def _answers(
    asked: _Asked, scorers: dict[str, Scorer], config: EvalConfig, subject: Subject
) -> Iterator[tuple[str, list[Measurement]]]:
    """Each task with its figures, as they come."""
    for questions in asked.questions:
        scorer = scorers[protocol_of(questions.task, config.protocol)]
        if isinstance(questions, Needles):
            scorer = _with_room(scorer, questions)
        yield questions.task, questions.measure(scorer(questions.requests, questions.task))
    if asked.harness:
        from sisa_model.evaluation import harness

        model = harness.HarnessModel(scorers["harness"], subject.encoder)
        yield from harness.run_harness(model, asked.harness, config.limit).items()


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
