"""sisa convert: a checkpoint of the paper's authors as a folder of a model."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from sisa_kernels.inputs import Mode
from sisa_model.interop.authors import load_paper_checkpoint
from sisa_model.models.checkpoint import save
from sisa_model.models.language_model import count_parameters
from sisa_model.runs.folder import is_taken
from sisa_model.utils.files import make_folder_atomically


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn a checkpoint of the paper's authors into config.json and model.safetensors."""

    checkpoint: tyro.conf.Positional[Path]
    """The authors' .pt file."""
    preset: str
    """Model it holds; `sisa info` lists them."""
    out: Path
    """Folder to make."""
    mode: Mode = "clamped"
    """SISA's numerics: clamped, what the authors trained with, or exact."""


def convert(config: ConvertConfig) -> str:
    """Write the authors' model as a folder that :func:`sisa_model.load` reads; says what it is.

    Raises FileExistsError for a folder that exists, and as
    :func:`sisa_model.load_paper_checkpoint` does."""
    if is_taken(config.out):
        raise FileExistsError(f"out {config.out} exists; choose another folder")
    model = load_paper_checkpoint(config.checkpoint, config.preset, config.mode)
    make_folder_atomically(config.out, lambda folder: save(model, folder))
    count = count_parameters(model)
    return f"{config.preset}, {count:,} parameters, mode {model.config.mode}: {config.out}"
