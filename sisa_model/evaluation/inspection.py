"""sisa inspect: what the importance term does in a run's attention, by layer and head."""

import logging
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from sisa_model.data.blocks import Blocks
from sisa_model.data.corpus import open_data
from sisa_model.data.sources import AS_NAMED, read_units
from sisa_model.data.synthetic import TASK_EXAM, TASK_EXAM_SEED, exams, find_task
from sisa_model.data.text import find_files
from sisa_model.evaluation.subject import Subject, find_subject
from sisa_model.evaluation.token_view import view_layers, write_page
from sisa_model.models.checkpoint import load
from sisa_model.models.context import Context
from sisa_model.models.health import half_life, sequence_scores, visit_layers
from sisa_model.models.sisa import SisaAttention
from sisa_model.reporting.figures import plot_heads
from sisa_model.reporting.tables import markdown, spread
from sisa_model.runs.config import ResolvedConfig
from sisa_model.runs.folder import HELD_OUT, RunRecord, read_run
from sisa_model.utils.files import write_json, write_text
from sisa_model.utils.machine import find_device

log = logging.getLogger(__name__)

HELD_OUT_TEXT = "held-out text of the run"
LENGTH = 512  # the default: dense fp64 scores of it take 2 MiB a head
PAGE_LENGTH = 256  # tokens of the page: its numbers take 0.3 MB a head
PANELS = {
    "lam": "lambda",
    "half_life": "half-life, tokens",
    "share": "importance term / logits, RMS",
    "entropy": "attention entropy, nats",
    "entropy_without": "the same without the importance term",
    "entropy_change": "change by the importance term, nats",
}


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what the importance term does in each head of a SISA run.

    Lambda, half-lives, the term's share of the logits and the attention's entropy, on held-out
    text, from dense scores in fp64. Writes OUT/inspect.json, OUT/inspect.png and OUT/inspect.md,
    the printed table."""

    run: tyro.conf.Positional[Path]
    """Run folder of `sisa train`, even unfinished."""
    checkpoint: str = "newest"
    """Weights: newest (the final ones once the run is finished), or the step of a checkpoint."""
    text: tuple[Path, ...] = ()
    """Text files or folders to measure on. Default: what the run held out."""
    length: int | None = None
    """Tokens a sequence. Default: 512, or the run's if shorter."""
    blocks: int = 4
    """Sequences, spread over the text."""
    out: Path | None = None
    """Folder of the files, which are replaced if they exist. Default: RUN/inspect."""
    html: bool = False
    """Also write OUT/inspect.html: the text's beginning, and for a chosen token, layer and head
    which earlier tokens the importance term lifts or lowers, and how far the decay reaches."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""


@dataclass
class Inspection:
    """A SISA layer on a batch: one value a query head, means over rows.

    Rows are the positions i of all sequences. With s = e + p the scores of Eq. 2, e = q.k /
    sqrt(Dh) and p the importance term, and d(x)_ij = x_ij - mean_{j<=i} x_ij what a softmax over
    row i sees of x (a constant in a row changes nothing)."""

    layer: int
    """Which of the model's layers, from 0."""
    lam: list[float]
    """lambda."""
    half_life: list[float]
    """Tokens until a key's importance halves, ln 2 / mean(-log_decay); 6.9e11 without decay."""
    share: list[float]
    """RMS of d(p) over RMS of d(s), over i >= j: 0 if idle, above 1 where it opposes q.k."""
    entropy: list[float]
    """-sum_j w_ij ln w_ij, nats, of the attention w = softmax(s)."""
    entropy_without: list[float]
    """The same of softmax(e), the attention with the importance term left out."""


def inspect_model(model: Any, input_ids: Tensor) -> list[Inspection]:
    """The :class:`Inspection` of every SISA layer of ``model`` on ``input_ids`` [B, L].

    Memory is O(H L^2), for one sequence at a time. Raises ValueError for a model without a SISA
    layer: a Transformer, say, or SISA with lambda = 0."""
    found: list[Inspection] = []

    def measure(layer: int, attn: SisaAttention, x: Tensor, context: Context) -> None:
        parts = [_measure(*terms) for terms in sequence_scores(attn, x, context)]
        importance, total, entropy, entropy_without = torch.stack(parts).mean(0)
        group = attn.n_heads // attn.n_kv_heads
        lives = half_life(attn.operands(x).log_decay).repeat_interleave(group)
        values = (attn.lam(), lives, (importance / total).sqrt(), entropy, entropy_without)
        found.append(Inspection(layer, *(value.tolist() for value in values)))

    visit_layers(model, input_ids, measure)
    if not found:
        config = model.config
        raise ValueError(
            f"the model must have a SISA layer, got a {config.family} (lam {config.lam!r}) "
            "without one"
        )
    return found


def _measure(content: Tensor, importance: Tensor) -> Tensor:
    """Mean squares of d(p) and d(s), entropies with and without p: [4, H], of one sequence.

    ``content`` and ``importance`` are its terms [1, H, L, L]."""
    seen = content.isfinite()[0, 0]
    count = seen.sum(1)

    def square(x: Tensor) -> Tensor:
        x = x.where(seen, 0)
        centred = (x - x.sum(-1, keepdim=True) / count[:, None]).where(seen, 0)
        return centred.square().sum((-2, -1)) / count.sum()

    def entropy(score: Tensor) -> Tensor:
        return torch.special.entr(score.softmax(-1)).sum(-1).mean(-1)

    total = content + importance
    return torch.cat((square(importance), square(total), entropy(total), entropy(content)))


def _sequences(config: InspectConfig, record: RunRecord, subject: Subject) -> tuple[Tensor, str]:
    """Tokens [blocks, length] to measure on, and where they are from.

    Of ``config.text``, or else of what the run held out."""
    train = record.train
    length = config.length or min(LENGTH, train.seq_len)
    if train.task != "text" and not config.text:
        exam = _exam(config.blocks, length, train, subject.model.vocab_size)
        return exam, f"exam of {train.task}"
    encoder = subject.encoder
    if config.text:
        tokens: Any = encoder.encode(read_units(find_files([*config.text]), AS_NAMED)[0])
        where = ", ".join(map(str, config.text))
        if config.length is None:
            length = min(length, len(tokens) - 1)
    elif (config.run / HELD_OUT).is_file():
        return _rows(np.load(config.run / HELD_OUT), config.blocks, length), HELD_OUT_TEXT
    else:  # of a run that keeps no copy
        data = open_data(train.data, train.val_data, encoder, length, train.seed, verify=False)
        if data.fingerprint != record.sha256:
            raise ValueError(
                f"the data of {config.run} changed since its training: "
                "give text to measure on with --text"
            )
        tokens = data.val.tokens
        where = HELD_OUT_TEXT
    blocks = Blocks(tokens, length, 0, "inspected")
    spread_out = np.linspace(0, blocks.count - 1, min(config.blocks, blocks.count))
    return blocks.take(spread_out.astype(int).tolist())[0], where


def _rows(held_out: np.ndarray, count: int, length: int) -> Tensor:
    """``count`` sequences of ``length``, spread over a run's held-out blocks [N, L + 1]."""
    longest = held_out.shape[1] - 1
    if length > longest:
        raise ValueError(
            f"length must be at most {longest}, the run's, without --text, got {length}"
        )
    each = longest // length
    pieces = torch.from_numpy(held_out[:, : each * length].reshape(-1, length)).long()
    chosen = np.linspace(0, len(pieces) - 1, min(count, len(pieces))).astype(int)
    return pieces[chosen.tolist()]


def _exam(count: int, length: int, train: ResolvedConfig, vocab: int) -> Tensor:
    """The first ``count`` sequences of the exam of a run on a task alone, cut to ``length``."""
    if length > train.seq_len:
        raise ValueError(
            f"length must be at most {train.seq_len}, as the run was trained on {train.task}, "
            f"got {length}"
        )
    exam = exams(find_task(train.task), vocab - 1, train.seq_len, TASK_EXAM, TASK_EXAM_SEED)[1]
    return exam.inputs[:count, :length]


def inspect_run(config: InspectConfig) -> list[Inspection]:
    """Measure, log the table and write the files.

    Raises ValueError for a run without a SISA layer, a length or number of blocks out of range,
    held-out text that changed since the training or is shorter than a block, and as
    :func:`sisa_model.runs.folder.read_run` and :func:`sisa_model.load` do."""
    device = find_device(config.device)
    record = read_run(config.run)
    subject = find_subject(config.run, checkpoint=config.checkpoint)
    weights = subject.weights
    model = load(weights, device).eval()
    if config.blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {config.blocks}")
    most = model.config.max_seq_len
    if config.length is not None and not 2 <= config.length <= most:
        raise ValueError(
            f"length must be from 2 to the model's max_seq_len of {most}, got {config.length}"
        )
    ids, where = _sequences(config, record, subject)
    layers = inspect_model(model, ids.to(device))
    settings = {
        "run": config.run,
        "weights": weights.name,
        "measured_on": where,
        "blocks": ids.shape[0],
        "length": ids.shape[1],
    }
    about = (
        f"{record.train.preset}, {weights.name}: {ids.shape[0]} x {ids.shape[1]} tokens, {where}"
    )
    out = config.out or config.run / "inspect"
    _write(out, about, settings, layers)
    if config.html:
        first = ids[:1, :PAGE_LENGTH].to(device)
        encoder = subject.encoder if record.train.task == "text" else None
        write_page(
            out / "inspect.html", about, first[0].tolist(), encoder, view_layers(model, first)
        )
        log.info(f"page: {out / 'inspect.html'}")
    return layers


def _write(out: Path, about: str, settings: dict[str, Any], layers: list[Inspection]) -> None:
    rows = []
    for layer in layers:
        change = [a - b for a, b in zip(layer.entropy, layer.entropy_without)]
        rows.append({**vars(layer), "entropy_change": change})
    text = f"{about}\n\n{table(layers)}"
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "inspect.json", {**settings, "layers": rows})
    write_text(out / "inspect.md", text)
    plot_heads(out / "inspect.png", about, rows, PANELS)
    log.info(f"{text}\nfigure: {out / 'inspect.png'}")


def table(layers: list[Inspection]) -> str:
    """A Markdown table, a line a layer: means over heads, minimum to maximum.

    The mean of half-lives is the geometric one."""
    titles = (
        "layer",
        "lambda",
        "half-life, tokens",
        "share of the logits",
        "entropy, nats",
        "without importance",
    )
    form = "{:.3g}"
    rows = []
    for x in layers:
        life = spread(x.half_life, form, geometric_mean)
        others = (spread(values, form) for values in (x.share, x.entropy, x.entropy_without))
        rows.append((x.layer, spread(x.lam, form), life, *others))
    return markdown(titles, rows)
