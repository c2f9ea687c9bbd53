"""Our models in lm-evaluation-harness: one of its LM classes, and its own tasks on local files."""

import difflib
import json
import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval
import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.benchmarks import Row
from sisa_model.evaluation.scoring import Request, Scorer
from sisa_model.evaluation.statistics import Measurement, measure
from sisa_model.models.generate import generate

log = logging.getLogger(__name__)

STRIDE = 16  # tokens generated between looks for a stop string


class HarnessTask(NamedTuple):
    """One of the harness's tasks, to be run on examples of ours."""

    name: str
    yaml: str
    split: str
    """The split that it evaluates."""
    convert: Callable[[Row], Row] = dict
    """An example of ours as its data set has it."""


def _hellaswag(row: Row) -> Row:
    """The data set's own fields; of a cleaned ``query`` what the harness joins to it again."""
    if "activity_label" in row:
        return {**row, "label": str(row["label"])}
    label, _, context = row["query"].partition(": ")
    parts = {"activity_label": label, "ctx_a": context, "ctx_b": ""}
    return {**parts, "endings": row["endings"], "label": str(row["label"])}


TASKS = {
    "lambada_openai": HarnessTask("lambada_openai", "lambada/lambada_openai.yaml", "test"),
    "hellaswag": HarnessTask("hellaswag", "hellaswag/hellaswag.yaml", "validation", _hellaswag),
    "arc_easy": HarnessTask(
        "arc_easy",
        "arc/arc_easy.yaml",
        "test",
        lambda row: {
            "question": row["question"],
            "answerKey": "ABCDEFGH"[row["label"]],
            "choices": {"text": row["choices"], "label": list("ABCDEFGH"[: len(row["choices"])])},
        },
    ),
    "winogrande": HarnessTask(
        "winogrande",
        "winogrande/default.yaml",
        "validation",
        lambda row: {**row, "answer": str(row["label"] + 1)},
    ),
    "piqa": HarnessTask("piqa", "piqa/piqa.yaml", "validation"),
}


class HarnessModel(TemplateLM):
    """A model and its tokenizer as the harness's LM.

    A text without context is scored after an end-of-text token. Where a token spans a context's end
    so that nothing of the continuation is left, both are tokenised apart, and the log says how
    often. Generation is greedy. Raises ValueError for a sequence longer than the model's positions,
    where the harness's own classes cut."""

    def __init__(self, scorer: Scorer, encoder: Encoder):
        super().__init__()
        self.scorer = scorer
        self.encoder = encoder
        self.apart = 0
        """Pairs tokenised apart."""

    @property
    def eot_token_id(self) -> int:
        return self.encoder.end_of_text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.encoder.encode_text(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if after or not continuation:
            return before, after
        self.apart += 1
        return self.tok_encode(context), self.tok_encode(continuation)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        if self.apart:
            log.warning(
                f"{self.apart} contexts and continuations, across which a token spans, are "
                "tokenised apart"
            )
            self.apart = 0
        sequences = [
            Request(context + continuation, len(context)) for _, context, continuation in requests
        ]
        return [(score.total, score.greedy) for score in self.scorer(sequences, "log-likelihoods")]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each token once.

        In windows of all the model's positions, of which the last reaches back."""
        limit = self.scorer.model.config.max_seq_len
        totals = []
        for request in requests:
            tokens = self.encoder.encode_text(request.args[0])
            windows = get_rolling_token_windows(tokens, self.eot_token_id, limit, 1)
            parts = [make_disjoint_window(window) for window in windows]
            sequences = [
                Request(context + continuation, len(context)) for context, continuation in parts
            ]
            totals.append(math.fsum(score.total for score in self.scorer(sequences, "text")))
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations to a stop string, end of text or ``max_gen_toks`` (256) tokens."""
        if why := self.scorer.model.cache_refusal():
            log.info(f"every token runs all before it again: {why}")
        return [self._generate(why is None, *request.args) for request in requests]

    def _generate(self, use_cache: bool, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise ValueError(f"generation is greedy; the task asks for sampling: {settings}")
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        prompt = self.encoder.encode_text(context) or [self.eot_token_id]
        budget = settings.get("max_gen_toks", 256)
        limit = self.scorer.model.config.max_seq_len
        if len(prompt) + budget > limit:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {budget} more pass the model's {limit} "
                "positions (max_seq_len); --max-seq-len allows more, past what it was trained on"
            )
        new: list[int] = []
        text = ""
        while len(new) < budget:
            ids = torch.tensor([prompt + new], device=self.scorer.device)
            count = min(STRIDE, budget - len(new))
            with self.scorer.autocast:
                found = generate(self.scorer.model, ids, count, use_cache=use_cache)
            new = found[0, len(prompt) :].tolist()
            ended = self.eot_token_id in new
            text = self.encoder.decode(new[: new.index(self.eot_token_id)] if ended else new)
            ends = [place for stop in stops if (place := text.find(stop)) >= 0]
            if ends or ended:
                return text[: min(ends, default=None)]
        return text


def find_tasks(names: list[str], data: dict[str, list[Row]]) -> dict[str, Any]:
    """The harness's task objects by our names.

    They have the examples of ``data`` where it has the name, else the task's own data set.
    Raises ValueError for a name the harness does not know, OSError for a data set that cannot be
    had."""
    found = {name: _on_rows(name, data[name]) for name in names if name in data}
    online = [name for name in names if name not in data]
    if not online:
        return found
    manager = TaskManager()
    known = {name: TASKS[name].name if name in TASKS else name for name in online}
    for name, theirs in known.items():
        if theirs not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            like = f"; near are {', '.join(near)}" if near else ""
            raise ValueError(
                f"tasks must be known to lm-evaluation-harness {lm_eval.__version__}, "
                f"got {name!r}{like}"
            )
    for name, theirs in known.items():
        try:
            loaded = manager.load([theirs])["tasks"]
        except Exception as error:  # as many kinds as there are data sets
            raise OSError(
                f"task {name}: its data set cannot be loaded ({error!r}); "
                "--data-dir takes local files"
            ) from error
        found.update({name: loaded[theirs]} if name in TASKS else loaded)
    return found


def _on_rows(name: str, rows: list[Row]) -> Any:
    """The harness's own task, prompts and metrics, with ``rows`` as its data set."""
    theirs, yaml, split, convert = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(convert(row)) + "\n" for row in rows), encoding="utf-8")
        splits = {
            f"{which}_split": split if which == split else None
            for which in ("training", "validation", "test")
        }
        config = {
            "include": str(Path(lm_eval.tasks.__file__).parent / yaml),
            "task": theirs,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path)}, "cache_dir": folder},
            **splits,
        }
        (Path(folder) / "task.yaml").write_text(json.dumps(config), encoding="utf-8")
        manager = TaskManager(include_defaults=False, include_path=folder)
        task = manager.load([theirs])["tasks"][theirs]
        # In memory: the folder goes.
        task.dataset = {split: datasets.Dataset.from_list(list(task.dataset[split]))}
        return task


def run_harness(
    model: HarnessModel, tasks: dict[str, Any], limit: int | None
) -> dict[str, list[Measurement]]:
    """The figures of each task: every metric that the harness gives of every filter of answers.

    Intervals are from the examples. A metric of texts as a whole, such as BLEU, has no score an
    example to take an interval from: it is logged, and left out."""
    names = {task.config.task: name for name, task in tasks.items()}
    found = lm_eval.simple_evaluate(
        model, tasks=list(tasks.values()), limit=limit, bootstrap_iters=0
    )
    return {
        names[theirs]: _measurements(names[theirs], tasks[names[theirs]], samples)
        for theirs, samples in found["samples"].items()
    }


def _measurements(name: str, task: Any, samples: list[dict[str, Any]]) -> list[Measurement]:
    """Chance is known where the answer is a choice, and for LAMBADA, where it is 0."""
    guess = 0.0 if name == "lambada_openai" else None
    if task.OUTPUT_TYPE == "multiple_choice":
        guess = float(np.mean([1 / len(sample["resps"]) for sample in samples]))
    found = []
    for metric, aggregate in task.aggregation().items():
        for which in dict.fromkeys(sample["filter"] for sample in samples):
            title = metric if which == "none" else f"{metric}, {which}"
            scores = [sample[metric] for sample in samples if sample["filter"] == which]
            if np.asarray(scores).dtype.kind not in "biuf":
                log.info(f"{name}: {title} {aggregate(scores):.4g}, no interval")
                continue
            chance = guess if metric.startswith("acc") else None
            found.append(measure(title, scores, chance, aggregate))
    return found
