"""Reading torch.distributed.checkpoint folders, without running what their pickles say."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.tensor import DTensor, distribute_tensor

INDEX = ".metadata"  # torch's name
# The index is a pickle: these are the modules whose names it may hold, and the names.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """FileSystemReader loads tensors with weights_only, but its index with pickle.load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / INDEX, "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_DAMAGES = (
    pickle.UnpicklingError,
    OSError,
    EOFError,
    AttributeError,
    RuntimeError,
    KeyError,
)
# The name of a projection's weight, or of its optimizer's state: "a.proj.W_Q.weight.exp_avg".
_PROJECTION = re.compile(r"(.+)\.\w+(\.weight(?:\.\w+)?)$")


def expect_one_process() -> None:
    """No warning of torch's that only one process reads or writes a folder."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def read_tensors(
    folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Fill ``tensors`` (plain or DTensors) with what ``folder`` holds by name, however sharded.

    What it does not hold may stand in a packed matrix, below each other in the order of
    ``tensors``: "proj.weight" for "proj.W_Q.weight", "proj.W_K.weight" ..., which runs held before
    each projection was a parameter. With ``group`` every process of it must call this. Raises
    ValueError for a folder that is damaged or holds other tensors."""
    if group is None:
        expect_one_process()
    try:
        held: dict[str, Any] = _Reader(folder).read_metadata().state_dict_metadata
        wanted: dict[str, Tensor] = {}
        parts: dict[str, list[Tensor]] = {}
        for name, tensor in tensors.items():
            packed = _PROJECTION.sub(r"\1\2", name)
            if name in held or packed not in held:
                wanted[name] = tensor
            else:
                parts.setdefault(packed, []).append(tensor)
        wholes = {
            name: torch.empty(held[name].size, dtype=held[name].properties.dtype) for name in parts
        }
        with torch.no_grad():
            dcp.load(
                wanted | wholes,
                storage_reader=_Reader(folder),
                process_group=group,
                no_dist=group is None,
            )
            for name, whole in wholes.items():
                _unpack(whole, parts[name])
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise ValueError(
            f"checkpoint {folder} is truncated or does not hold this model: {first}"
        ) from error
    except _DAMAGES as error:
        raise ValueError(f"checkpoint {folder} is truncated or foreign: {error}") from error


def _unpack(whole: Tensor, parts: list[Tensor]) -> None:
    """Copy the rows of ``whole`` into ``parts``, in their order; a scalar into each of them."""
    rows = whole.split([len(part) for part in parts]) if whole.ndim else [whole] * len(parts)
    for part, values in zip(parts, rows):
        if isinstance(part, DTensor):  # each process has the whole, and takes its own share
            values = distribute_tensor(
                values.to(part.device), part.device_mesh, part.placements, src_data_rank=None
            )
        part.copy_(values)
