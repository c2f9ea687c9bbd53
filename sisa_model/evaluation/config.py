"""The settings of `sisa eval`, and what they may be."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

from sisa_model.evaluation.benchmarks import BENCHMARKS
from sisa_model.evaluation.needles import NEEDLE_TESTS
from sisa_model.runs.config import Precision

Protocol = Literal["harness", "paper"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a model that `sisa train` made, zero-shot, on benchmarks and needles.

    Benchmarks are lambada, hellaswag, arc_easy, winogrande and piqa, which is not in the paper.
    Protocol harness is lm-evaluation-harness with its own prompts and metrics, and any of its tasks
    by name; protocol paper is the scoring of the paper's authors. They differ so. LAMBADA: the same
    rule, all tokens of the last word by argmax; the harness adds perplexity. HellaSwag, ARC-Easy:
    harness acc compares summed log-likelihoods of the endings, acc_norm those divided by
    characters; paper compares the mean a token. WinoGrande: harness compares the log-likelihood of
    what follows the blank, summed, given each name; paper the mean a token of the whole sentence.
    From local HellaSwag files the harness's capital in the second part of a context is missing, as
    the files have it.

    niah: the authors' needle test (512 tokens, 5 needles, 5 seeds of 200). niah_long: the same at
    six lengths to 3,072 tokens. needle_grid: random five-digit numbers, every token right, by depth
    and by length to twice the training length, as a picture.

    Figures go to `RUN/eval/*.json` with each example's outcome, and, of all examples, to
    RUN/eval.jsonl, which `sisa plot` draws."""

    run: tyro.conf.Positional[Path]
    """Run folder of `sisa train`, or with --tokenizer a folder of model weights."""
    checkpoint: str = "newest"
    """Weights of a run: newest (final, once finished), the step of a checkpoint, or all in turn."""
    tasks: tuple[str, ...] = ("lambada", "hellaswag", "arc_easy", "winogrande", "niah")
    """Tasks, separated by commas or spaces."""
    protocol: Protocol = "harness"
    """Scoring of the benchmarks: harness (needs pip install "sisa-attention[eval]") or paper."""
    data_dir: Path | None = None
    """Folder of local files in place of downloads (docs/evaluate.md); protocol paper needs it."""
    limit: int | None = None
    """The first N examples of a benchmark, N trials a seed (and cell); not in eval.jsonl."""
    lam_zero: bool = False
    """Ablation: without SISA's importance term, each layer plain attention."""
    tokenizer: str | None = None
    """For a folder of model weights: its tokenizer, a `tokenizers` JSON file or the word bytes."""
    max_seq_len: int | None = None
    """Positions, for benchmark examples longer than the model's; needles take what they need."""
    batch_tokens: int = 8192
    """Tokens a forward pass. Changes memory and speed, not the result beyond rounding."""
    precision: Precision = "auto"
    """fp32, or bf16 autocast with fp32 logits; auto: bf16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""


def check(config: EvalConfig) -> tuple[str, ...]:
    """The tasks by name, every field checked; ValueError names the first bad one."""
    tasks = tuple(name for part in config.tasks for name in part.split(",") if name)
    if not tasks or len(set(tasks)) < len(tasks):
        given = " ".join(config.tasks)
        raise ValueError(f"tasks must name at least one task, each once, got {given!r}")
    for field, choices in (("protocol", Protocol), ("precision", Precision)):
        value = getattr(config, field)
        allowed = get_args(choices)
        if value not in allowed:
            raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {value!r}")
    if config.checkpoint not in ("newest", "all") and not config.checkpoint.isdecimal():
        raise ValueError(f"checkpoint must be newest, all or a step, got {config.checkpoint!r}")
    for field in ("limit", "max_seq_len", "batch_tokens"):
        value = getattr(config, field)
        if value is not None and value < 1:
            raise ValueError(f"{field} must be at least 1, got {value}")
    if benchmarks := benchmarks_of(tasks):
        _check_benchmarks(config, benchmarks)
    return tasks


def benchmarks_of(tasks: tuple[str, ...]) -> list[str]:
    """Those of ``tasks`` that are no needle tests, and which a protocol scores."""
    return [task for task in tasks if task not in NEEDLE_TESTS]


def _check_benchmarks(config: EvalConfig, benchmarks: list[str]) -> None:
    paper = config.protocol == "paper"
    known = [name for name, benchmark in BENCHMARKS.items() if benchmark.paper or not paper]
    unknown = [task for task in benchmarks if task not in known]
    if unknown and (paper or config.data_dir is not None):
        where = "protocol paper" if paper else "protocol harness with local files"
        allowed = ", ".join([*known, *NEEDLE_TESTS])
        raise ValueError(f"tasks must be among {allowed} in {where}, got {unknown[0]!r}")
    if paper and config.data_dir is None:
        raise ValueError(
            f"data_dir must be given for {benchmarks[0]} in protocol paper: "
            f"a folder of {BENCHMARKS[benchmarks[0]].file}"
        )
    if not paper and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "protocol harness needs a package that is not installed: pip install "
            '"sisa-attention[eval]"; protocol paper does not'
        )
