"""sisa inspect: what the importance term does in a run's attention, by layer and head, on held-out
text.
"""

from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from sisa_kernels.reference import scores
from sisa_kernels.rotation import rotate
from sisa_model.data.blocks import Blocks
from sisa_model.data.corpus import open_data
from sisa_model.data.synthetic import TASK_EXAM, exams, find_task
from sisa_model.data.text import find_files, read_text
from sisa_model.data.tokenizer import Encoder
from sisa_model.models.checkpoint import load
from sisa_model.models.context import Context
from sisa_model.models.health import half_life, visit_layers
from sisa_model.models.sisa import SisaAttention
from sisa_model.reporting.figures import plot_heads
from sisa_model.reporting.tables import markdown, spread
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.folder import newest_weights, read_run
from sisa_model.utils.files import write_json, write_text
from sisa_model.utils.machine import find_device

LENGTH = 512  # the default: dense fp64 scores of it take 2 MiB a head
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
    """Show what the importance term does in each head of a SISA run: lambda, half-lives, its share
    of the logits, entropies.

    All on held-out text, with dense scores in fp64. Writes OUT/inspect.json, OUT/inspect.png and
    OUT/inspect.md, the printed table."""

    run: tyro.conf.Positional[Path]
    """Run folder of `sisa train`; of an unfinished run, its newest checkpoint is used."""
    text: tuple[Path, ...] = ()
    """Text files or folders to measure on. Default: what the run held out."""
    length: int | None = None
    """Tokens a sequence. Default: 512, or the run's if shorter."""
    blocks: int = 4
    """Sequences, spread over the text."""
    out: Path | None = None
    """Folder of the files, which are replaced if they exist. Default: RUN/inspect."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""


@dataclass
class Inspection:
    """A SISA layer on a batch: one value a query head, means over the batch's rows (positions i of
    all sequences).

    With s = e + p the scores of Eq. 2, e = q.k / sqrt(Dh) and p the importance term, and d(x)_ij =
    x_ij - mean_{j<=i} x_ij what a softmax over row i sees of x (a constant in a row changes
    nothing)."""

    layer: int
    """Which of the model's layers, from 0."""
    lam: list[float]
    """lambda."""
    half_life: list[float]
    """Tokens until a key's importance halves, ln 2 / mean(-log_decay), of the head's key head;
    6.9e11 where nothing decays.
    """
    share: list[float]
    """RMS of d(p) over RMS of d(s), over all i >= j: 0 for an idle term; above 1 where it and q.k
    oppose each other.
    """
    entropy: list[float]
    """-sum_j w_ij ln w_ij, nats, of the attention w = softmax(s)."""
    entropy_without: list[float]
    """The same of softmax(e), the attention with the importance term left out."""


def inspect_model(model: Any, input_ids: Tensor) -> list[Inspection]:
    """The :class:`Inspection` of every SISA layer of ``model`` on ``input_ids`` [B, L]; memory is
    O(H L^2), for one sequence.

    Raises ValueError for a model without a SISA layer: a Transformer, say, or SISA with lambda = 0.
    """
    found: list[Inspection] = []

    def measure(layer: int, attn: SisaAttention, x: Tensor, context: Context) -> None:
        q, k, _, b, c, log_decay, theta = attn.operands(x)
        cos, sin = (table.double()[:, None] for table in context.rotary)
        inputs = (
            x.split(1)
            for x in (
                rotate(q.double(), cos, sin),
                rotate(k.double(), cos, sin),
                b,
                c,
                log_decay,
                theta,
            )
        )
        sequences = [
            _measure(*scores(*one)) for one in zip(*inputs, repeat(attn.lam()), repeat(attn.mode))
        ]
        importance, total, *entropies = torch.stack(sequences).mean(0)
        lives = half_life(log_decay).repeat_interleave(attn.n_heads // attn.n_kv_heads)
        values = (attn.lam(), lives, (importance / total).sqrt(), *entropies)
        found.append(Inspection(layer, *(value.tolist() for value in values)))

    visit_layers(model, input_ids, measure)
    if not found:
        raise ValueError(
            f"the model must have a SISA layer, got a {model.config.family} (lam {model.config.lam!r}) without one"
        )
    return found


def _measure(content: Tensor, importance: Tensor) -> Tensor:
    """Of one sequence's terms [1, H, L, L]: mean squares of d(p) and of d(s), entropies with and
    without p, [4, H].
    """
    seen = content.isfinite()[0, 0]
    count = seen.sum(1)

    def square(x: Tensor) -> Tensor:
        x = x.where(seen, 0)
        return (x - x.sum(-1, keepdim=True) / count[:, None]).where(seen, 0).square().sum(
            (-2, -1)
        ) / count.sum()

    def entropy(score: Tensor) -> Tensor:
        return torch.special.entr(score.softmax(-1)).sum(-1).mean(-1)

    total = content + importance
    return torch.cat((square(importance), square(total), entropy(total), entropy(content)))


def _sequences(
    config: InspectConfig, train: TrainConfig, sha256: str, vocab: int
) -> tuple[Tensor, str]:
    """Tokens [blocks, length] of ``config.text`` or of what the run held out, and where they are
    from.
    """
    length = config.length or min(LENGTH, train.seq_len or LENGTH)
    if config.text:
        encoder = Encoder(train.tokenizer)
        tokens: Any = encoder.encode([read_text(path) for path in find_files([*config.text])])
        where = ", ".join(map(str, config.text))
    elif train.task != "text":
        assert train.seq_len is not None
        if length > train.seq_len:
            raise ValueError(
                f"length must be at most {train.seq_len}, as the run was trained on {train.task}, got {length}"
            )
        held = exams(find_task(train.task), vocab - 1, train.seq_len, TASK_EXAM, 2**63)[1].inputs
        return held[: config.blocks, :length], f"exam of {train.task}"
    else:
        data = open_data(
            train.data, train.val_data, train.tokenizer, length, train.seed, verify=False
        )
        if data.fingerprint != sha256:
            raise ValueError(
                f"the data of {config.run} changed since its training: give text to measure on with --text"
            )
        tokens, where = data.val.tokens, "held-out text of the run"
    blocks = Blocks(tokens, length, 0, "inspected")
    ids = np.linspace(0, blocks.count - 1, min(config.blocks, blocks.count)).astype(int).tolist()
    return blocks.take(ids)[0], where


def inspect_run(config: InspectConfig) -> list[Inspection]:
    """Measure, print the table and write the files.

    Raises ValueError for a run without a SISA layer, a length or number of blocks out of range,
    held-out text that changed since the training or is shorter than a block, and as
    :func:`sisa_model.runs.folder.read_run` and :func:`sisa_model.load` do."""
    device = find_device(config.device)
    record = read_run(config.run)
    weights = newest_weights(config.run)
    model = load(weights, device).eval()
    if config.blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {config.blocks}")
    if config.length is not None and not 2 <= config.length <= model.config.max_seq_len:
        raise ValueError(
            f"length must be from 2 to the model's max_seq_len of {model.config.max_seq_len}, got {config.length}"
        )
    train = record["train"]
    ids, where = _sequences(config, train, record["corpus"]["sha256"], model.config.vocab_size)
    layers = inspect_model(model, ids.to(device))
    about = f"{train.preset}, {weights.name}: {ids.shape[0]} x {ids.shape[1]} tokens, {where}"
    out = config.out or config.run / "inspect"
    out.mkdir(parents=True, exist_ok=True)
    text = table(layers)
    rows = [{**vars(layer), "entropy_change": _change(layer)} for layer in layers]
    settings = {
        "run": config.run,
        "weights": weights.name,
        "measured_on": where,
        "blocks": ids.shape[0],
        "length": ids.shape[1],
    }
    write_json(out / "inspect.json", {**settings, "layers": rows})
    write_text(out / "inspect.md", f"{about}\n\n{text}")
    plot_heads(out / "inspect.png", about, rows, PANELS)
    print(f"{about}\n\n{text}\nfigure: {out / 'inspect.png'}")
    return layers


def _change(layer: Inspection) -> list[float]:
    return [a - b for a, b in zip(layer.entropy, layer.entropy_without)]


def table(layers: list[Inspection]) -> str:
    """A Markdown table, a line a layer: means over heads (half-lives: geometric), minimum to
    maximum.
    """
    titles = (
        "layer",
        "lambda",
        "half-life, tokens",
        "share of the logits",
        "entropy, nats",
        "without importance",
    )
    rows = []
    for x in layers:
        life = spread(x.half_life, "{:.3g}", geometric_mean)
        share, *entropies = (
            spread(values, "{:.3g}") for values in (x.share, x.entropy, x.entropy_without)
        )
        rows.append((x.layer, spread(x.lam, "{:.3g}"), life, share, *entropies))
    return markdown(titles, rows)
