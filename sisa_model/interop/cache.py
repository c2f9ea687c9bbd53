"""DecodingCache: what a model keeps of the tokens so far, as transformers' generate handles it."""

import torch
from torch import Tensor
from transformers import Cache

from sisa_kernels import SisaCache
from sisa_model.models.context import ModelCache
from sisa_model.models.language_model import LanguageModel


class DecodingCache(Cache):
    """A :class:`ModelCache` for ``forward`` and ``generate``; the first tokens make it.

    It takes its batch, dtype and device from them, and grows with what comes. ``crop`` forgets the
    last tokens: of attention, whose caches hold each token by itself; a Mamba's state has no way
    back."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.held: ModelCache | None = None
        """None as long as it is empty."""
        self.seen = 0
        """Tokens of each row, padding among them."""
        self.padded = 0
        """Tokens of the prompt where rows of it are padded, else 0."""
        self.first: Tensor | None = None
        """[B]: the position of each row's first token, as it was given; None: 0."""

    def make(self, model: LanguageModel, batch: int) -> ModelCache:
        """What ``model`` fills, of ``batch`` rows; ValueError where the model has none."""
        if self.held is None:
            self.held = model.make_cache(batch)
            for layer in self.held.layers:
                if isinstance(layer, SisaCache):
                    layer.keep_phases()
        return self.held

    def place(self, position_ids: Tensor | None, real: Tensor | None) -> None:
        """Take note of the first tokens' positions; those of later ones must go on from there.

        ``position_ids`` [B or 1, L] are of the next tokens, ``real`` [B, L] says which are no
        padding. Raises ValueError, naming ``position_ids``, for others than are due."""
        if not self.seen:
            self.first = None
        if position_ids is None:
            return
        if not self.seen:
            positions = position_ids.expand(self.batch_size, -1)
            self.first = positions[:, 0]
            if real is not None:
                self.first = positions.gather(1, real.int().argmax(1, keepdim=True))[:, 0]
            return
        assert self.held is not None
        due = torch.tensor(self.held.lengths, device=position_ids.device)
        due = due if self.first is None else due + self.first
        if not torch.equal(position_ids[:, 0].expand_as(due), due):
            raise ValueError(
                f"position_ids must go on from the cache's tokens, at {due.tolist()}, "
                f"got {position_ids[:, 0].tolist()}"
            )

    def advance(self, length: int, *, padded: bool) -> None:
        """Count ``length`` tokens of each row as seen; ``padded``: some are padding."""
        if padded:
            self.padded = length
        self.seen += length

    def __len__(self) -> int:
        return 0 if self.held is None else len(self.held.layers)

    def __repr__(self) -> str:
        return f"DecodingCache({len(self)} layers, {self.seen} tokens)"

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_croppable(self) -> bool:
        return self.held is not None and self.held.crop_refusal() is None

    @property
    def batch_size(self) -> int:
        return -1 if self.held is None else len(self.held.lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.held is None:
            return
        self.held.select(indices.tolist())
        self.first = None if self.first is None else self.first[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of each row; a number <= 0, as elsewhere.

        Raises ValueError for a positive number, for more tokens than are held or behind the padding
        of a prompt, and, saying what to do, for a cache with states that know no way back."""
        count = -tokens_to_remove
        left = self.seen - count
        if not 0 <= count <= self.seen:
            raise ValueError(
                f"tokens_to_remove must be from {-self.seen} to 0, got {tokens_to_remove}"
            )
        if not count:
            return
        if not left:
            self.reset()
            return
        if left < self.padded:
            raise ValueError(
                f"tokens_to_remove must leave the {self.padded} tokens of the padded prompt, or "
                f"none: got {tokens_to_remove} of {self.seen}"
            )
        assert self.held is not None
        self.held.crop(count)
        self.seen = left

    def reset(self) -> None:
        """Forget all: the next tokens are the first, of any batch."""
        self.held = None
        self.seen = 0
        self.padded = 0
        self.first = None
