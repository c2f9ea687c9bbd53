"""The settings of `sisa eval`, and what they may be."""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro

from sisa_model.evaluation.benchmarks import Protocol, benchmarks_of
from sisa_model.evaluation.needles import NEEDLE_TESTS, PAPER_NEEDLES
from sisa_model.evaluation.scoring import ScoringPrecision
from sisa_model.models.config import Weights

log = logging.getLogger(__name__)

EvalPrecision = Literal["auto", ScoringPrecision]
DATA_DIR = Path("data/eval")  # where the script of docs/evaluate.md puts the files
FORMER_TASKS = {"lambada": "lambada_openai"}  # of the harness


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a model that `sisa train` made, zero-shot, on benchmarks and needles.

    Protocol paper is the paper's authors' own, token for token, on the sets that they used: lambada
    (lower-cased, tokenised text), hellaswag, arc_easy, winogrande. Protocol harness is
    lm-evaluation-harness with its own prompts and metrics: lambada_openai (natural text),
    hellaswag, arc_easy, winogrande, piqa, and any of its tasks by name. docs/evaluate.md sets the
    two side by side.

    niah: the authors' needle test (502 tokens, 5 needles, 5 seeds of 200), paper's in any protocol.
    niah_long: their prompts at six nominal lengths to 3,072, which are never longer than 1,013.
    needle, needle_long: the needle anywhere in 512 tokens, and in 256 to 3,072. needle_grid: random
    five-digit numbers, every token right, by depth and by length to twice the training length, as a
    picture.

    Figures go to `RUN/eval/*.json` with each example's outcome, and, of all examples, to
    RUN/eval.jsonl, which `sisa plot` draws."""

    run: tyro.conf.Positional[Path]
    """Run folder of `sisa train`, or with --tokenizer a folder of model weights."""
    checkpoint: str = "newest"
    """Weights of a run: newest (final, once finished), the step of a checkpoint, or all in turn."""
    tasks: tuple[str, ...] = ("lambada", "hellaswag", "arc_easy", "winogrande", "niah")
    """Tasks, separated by commas or spaces; lambada is lambada_openai in protocol harness."""
    protocol: Protocol = "harness"
    """Benchmarks by the harness (needs pip install "sisa-attention[eval]") or as the paper."""
    data_dir: Path | None = None
    """Folder of local files (docs/evaluate.md). Default: downloads; in protocol paper data/eval."""
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
    precision: EvalPrecision = "auto"
    """fp32; bf16, autocast with fp32 weights and logits; bf16-pure, weights and logits in bf16 too.
    auto: fp32 on a CPU; on a GPU bf16, and the paper's tasks, as its authors ran them, bf16-pure; a
    model trained bf16-pure stays that."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""
    dump_requests: Path | None = None
    """Write the tasks' requests into this jsonl file and score nothing."""


def check(config: EvalConfig) -> tuple[str, ...]:
    """The tasks by name, every field checked; ValueError names the first bad one."""
    tasks = tuple(name for part in config.tasks for name in part.split(",") if name)
    if not tasks or len(set(tasks)) < len(tasks):
        given = " ".join(config.tasks)
        raise ValueError(f"tasks must name at least one task, each once, got {given!r}")
    for field, choices in (("protocol", Protocol), ("precision", EvalPrecision)):
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
    if config.protocol == "harness":
        tasks = _present_names(tasks)
    if benchmarks := [task for task in tasks if task not in NEEDLE_TESTS]:
        _check_benchmarks(config, benchmarks)
    return tasks


def _present_names(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """The harness's tasks by the names that they have, said where that is another one."""
    for name in FORMER_TASKS.keys() & set(tasks):
        log.info(f"{name} in protocol harness is {FORMER_TASKS[name]}: the natural text")
    return tuple(dict.fromkeys(FORMER_TASKS.get(task, task) for task in tasks))


def _check_benchmarks(config: EvalConfig, benchmarks: list[str]) -> None:
    paper = config.protocol == "paper"
    known = benchmarks_of(config.protocol)
    unknown = [task for task in benchmarks if task not in known]
    if unknown and (paper or config.data_dir is not None):
        where = "protocol paper" if paper else "protocol harness with local files"
        allowed = ", ".join([*known, *NEEDLE_TESTS])
        raise ValueError(f"tasks must be among {allowed} in {where}, got {unknown[0]!r}")
    if config.dump_requests is not None and not paper:
        raise ValueError(
            f"dump_requests must be left out in protocol harness, which makes the requests of "
            f"{benchmarks[0]} itself, got {config.dump_requests}; protocol paper's can be written"
        )
    if not paper and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "protocol harness needs a package that is not installed: pip install "
            '"sisa-attention[eval]"; protocol paper does not'
        )


def protocol_of(task: str, protocol: Protocol) -> str:
    """By whose rules ``task`` is asked and scored: paper, harness, or for our own needles ours."""
    if task in PAPER_NEEDLES:
        return "paper"
    return "ours" if task in NEEDLE_TESTS else protocol


def precision_of(
    protocol: str, asked: EvalPrecision, weights: Weights, device: torch.device
) -> ScoringPrecision:
    """What tasks of ``protocol`` (as of :func:`protocol_of`) are computed in, "auto" resolved.

    ``weights`` are the model's: one of bf16 stays what it is."""
    if asked != "auto":
        return asked
    if weights == "bf16":
        return "bf16-pure"
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp32"
    return "bf16-pure" if protocol == "paper" else "bf16"
