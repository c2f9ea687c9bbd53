"""Reading torch.distributed.checkpoint folders: onto any number of processes, and without running
what a pickle says.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled"
)  # one process is no mishap
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


def read_tensors(
    folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Fill ``tensors``, plain ones or DTensors, with those that ``folder`` holds under their names,
    however it was sharded.

    With ``group`` every process of it must call this. Raises ValueError for a folder that is
    damaged or holds other tensors."""
    try:
        with torch.no_grad():
            dcp.load(
                dict(tensors),
                storage_reader=_Reader(folder),
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise ValueError(
            f"checkpoint {folder} is truncated or does not hold this model: {first}"
        ) from error
    except (pickle.UnpicklingError, EOFError, AttributeError, RuntimeError, KeyError) as error:
        raise ValueError(f"checkpoint {folder} is truncated or foreign: {error}") from error
