"""Folders that explain themselves: code in them by which transformers finds our classes."""

import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

from sisa_model.models.checkpoint import code_map, write_code

# What transformers' tokenizers write.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class CodeInFolder:
    """A configuration in whose folder stands the code that imports its classes.

    By it the Auto classes load the folder with ``trust_remote_code=True`` where nobody has imported
    ``code_module``; without the package, the error names what to install."""

    code_module: ClassVar[str]
    code_classes: ClassVar[dict[str, str]]
    """Auto class -> its class in ``code_module``."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write config.json, the code that it names, and the tokenizer of where it came from."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_code(folder, self.code_module, self.code_classes)
        source = Path(getattr(self, "name_or_path", "") or folder)
        if not any((folder / name).exists() for name in TOKENIZER):
            for name in TOKENIZER:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": code_map(self.code_classes)}  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: the code in the folder imports this package, and needs no copy of it."""


class NoCodeCopied:
    """A model of such a configuration, beside which transformers shall put no copy of its code."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: the code in the folder imports this package, and needs no copy of it."""
