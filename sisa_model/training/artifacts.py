"""What a run leaves beside its rows and checkpoints: final weights, a sample of text, figures."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sisa_model.data.tokenizer import Encoder
from sisa_model.models.checkpoint import load, save
from sisa_model.models.config import ModelConfig
from sisa_model.models.generate import generate
from sisa_model.models.language_model import LanguageModel
from sisa_model.reporting.figures import plot_health, plot_losses
from sisa_model.runs.config import ResolvedConfig
from sisa_model.runs.log import read_rows
from sisa_model.utils.files import make_folder_atomically, write_text

TEMPERATURE = 0.8  # of the sample


def write_final(
    folder: Path, weights: Mapping[str, Tensor], config: ModelConfig, encoder: Encoder | None
) -> None:
    """Write FOLDER/final, the model of ``weights`` by name with its tokenizer, unless there."""

    def fill(final: Path) -> None:
        with torch.device("meta"):
            model = LanguageModel(config)
        for name, parameter in model.to_empty(device="cpu").named_parameters():
            parameter.detach().copy_(weights[name])
        save(model, final, encoder)

    for unfinished in folder.glob(".final.*"):  # of a kill
        shutil.rmtree(unfinished)
    if not (folder / "final").exists():
        make_folder_atomically(folder / "final", fill)


def write_sample(
    folder: Path, config: ResolvedConfig, encoder: Encoder, device: torch.device
) -> str:
    """Write FOLDER/sample.txt, text of the final weights, and return it."""
    start = torch.tensor([[encoder.end_of_text]], device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    model = load(folder / "final", device)
    ids = generate(
        model,
        start,
        config.sample_tokens,
        TEMPERATURE,
        model.cache_refusal() is None,
        generator=generator,
    )
    text = encoder.decode(ids[0, 1:].tolist())
    write_text(folder / "sample.txt", text + "\n")
    return text


def draw_figures(folder: Path, title: str, unigram: float, bigram: float) -> None:
    """Draw FOLDER/loss.png, and health.png of a model that has a health, from the run's rows."""
    train = read_rows(folder / "train.jsonl")
    val = read_rows(folder / "val.jsonl")
    plot_losses(folder / "loss.png", title, train, val, unigram, bigram)
    if val[0]["layers"]:
        plot_health(folder / "health.png", title, val)
