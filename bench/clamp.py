"""Rows of `sisa study clamp`: what the clamp, and parameters in bf16, do to small models.

Of each finished run the held-out loss, and on held-out sequences how its heads forget: half-lives,
the range of g, the share of positions whose exponent the clamp binds (of a run in mode exact: would
bind), all heads of all layers together. Rows are appended to clamp.csv."""

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor

from bench.rows import WHERE, add_destination, append, now, provenance
from sisa_kernels.rotation import CLAMP
from sisa_model.data.tokenizer import Encoder
from sisa_model.models.checkpoint import load
from sisa_model.models.context import Context
from sisa_model.models.health import half_life, visit_layers
from sisa_model.models.language_model import LanguageModel, count_parameters
from sisa_model.models.sisa import DECAY_BIAS_INIT, SisaAttention
from sisa_model.runs.config import ResolvedConfig, runs_in_bf16
from sisa_model.runs.folder import read_run
from sisa_model.runs.log import read_rows
from sisa_model.training.batches import open_run_data
from sisa_model.training.parallel import World

WHAT = ("op", "mode", "precision", "seed", "steps", "tokens", "length", "parameters")
HALF_LIVES = ("half_life_least", "half_life_median", "half_life_most")
FOUND = ("loss", *HALF_LIVES, "g_range_median", "g_range_most", "clamped")
MOVED = ("biases_moved", "gains_moved")  # shares of b_a and of the norms' gains that training moved
COLUMNS = (*WHAT, *FOUND, *MOVED, "status", *WHERE)
SEQUENCES = 16  # held-out ones that heads are measured on


def moved(parameters: list[Tensor], start: float) -> float:
    """The share of all entries of ``parameters`` that are not ``start``, where they began."""
    return (torch.cat([p.detach().flatten() for p in parameters]) != start).double().mean().item()


def heads_of(model: LanguageModel, inputs: Tensor) -> dict[str, float]:
    """How the heads of ``model`` forget on ``inputs`` [B, L], and what of them training moved."""
    half_lives: list[float] = []
    ranges: list[float] = []
    clamped: list[float] = []
    biases: list[Tensor] = []

    def measure(_: int, attn: SisaAttention, x: Tensor, context: Context) -> None:
        log_decay = attn.operands(x).log_decay
        g = log_decay.double().cumsum(1)
        middle = (g[:, :1] + g[:, -1:]) / 2
        half_lives.extend(half_life(log_decay).tolist())
        ranges.extend((g[:, 0] - g[:, -1]).amax(0).tolist())
        clamped.append(((g - middle).abs() > CLAMP).double().mean().item())
        biases.append(attn.decay_bias)

    visit_layers(model, inputs, measure)
    gains = [module.weight for module in model.modules() if isinstance(module, torch.nn.RMSNorm)]
    return {
        "half_life_least": min(half_lives),
        "half_life_median": statistics.median(half_lives),
        "half_life_most": max(half_lives),
        "g_range_median": statistics.median(ranges),
        "g_range_most": max(ranges),
        "clamped": statistics.mean(clamped),
        "biases_moved": moved(biases, DECAY_BIAS_INIT),
        "gains_moved": moved(gains, 1.0),
    }


def held_out(config: ResolvedConfig) -> Tensor:
    """Sequences [B, L] that the run held out."""
    encoder = Encoder(config.tokenizer)
    data = open_run_data(config, encoder, encoder.size - 1, World())
    return data.val_inputs[:SEQUENCES]


def row_of(run: Path) -> dict[str, str]:
    """The row of a finished run; FileNotFoundError where it isn't one."""
    config = read_run(run).train
    model = load(run / "final").eval()
    bf16 = runs_in_bf16(config.precision, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = heads_of(model, held_out(config))
    last = read_rows(run / "val.jsonl")[-1]
    what = {
        "op": "clamp",
        "mode": config.mode,
        "precision": config.precision,
        "seed": str(config.seed),
        "steps": str(last["step"]),
        "tokens": str(last["step"] * config.batch_size * config.seq_len),
        "length": str(config.seq_len),
        "parameters": str(count_parameters(model)),
        "loss": f"{last['loss']:.4f}",
        "status": "ok",
        "date": now(),
    }
    return what | {name: f"{value:.4g}" for name, value in found.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench clamp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    add_destination(parser)
    args = parser.parse_args(arguments)
    where = provenance(torch.device("cpu"))
    for run in args.runs:
        row = append(args.out / "clamp.csv", COLUMNS, where | row_of(run))
        print(" ".join(row[name] for name in (*WHAT[1:4], *FOUND, *MOVED)), flush=True)
    return 0
