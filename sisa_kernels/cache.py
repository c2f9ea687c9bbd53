"""TokenCache: what a layer of attention keeps of the tokens so far, no entry ever rewritten."""

import torch
from torch import Tensor

MIN_CAPACITY = 64
MAX_ROWS = 256  # new tokens whose dense scores are held at once


def uniform(lengths: list[int]) -> int | None:
    """The length that all rows have, or None."""
    return lengths[0] if min(lengths) == max(lengths) else None


def write(buffer: Tensor, x: Tensor, lengths: list[int]) -> None:
    """Put x [B, T, heads, ...] in buffer [B, heads, capacity, ...], row r behind ``lengths[r]``."""
    T, x = x.shape[1], x.transpose(1, 2)
    start = uniform(lengths)
    if start is not None:
        buffer[:, :, start : start + T] = x
        return
    for row, tokens, start in zip(buffer, x, lengths):
        row[:, start : start + T] = tokens


def take(x: Tensor, starts: list[int], count: int) -> Tensor:
    """A copy of each row's ``count`` entries from ``starts[r]``: [B, L, ...] -> [B, count, ...]."""
    start = uniform(starts)
    if start is not None:
        return x[:, start : start + count].clone()
    return torch.stack([row[start : start + count] for row, start in zip(x, starts)])


def last(x: Tensor, lengths: list[int]) -> Tensor:
    """A copy of each row's entry ``lengths[r] - 1``: [B, L, ...] -> [B, ...]."""
    return take(x, [n - 1 for n in lengths], 1)[:, 0]


def visible(lengths: list[int], new: int, device: torch.device) -> Tensor:
    """Which slots each of ``new`` tokens behind ``lengths`` sees: itself and all before.

    bool [B, 1, new, max(lengths) + new]."""
    held = torch.tensor(lengths, device=device)[:, None]
    place = held + torch.arange(new, device=device)
    slots = torch.arange(max(lengths) + new, device=device)
    return (slots <= place[..., None])[:, None]


def check_lengths(lengths: list[int], held: list[int], length: int, name: str = "lengths") -> None:
    """ValueError unless ``lengths`` are each row's real tokens of the first [batch, length]."""
    if any(held):
        raise ValueError(f"{name} is for the first tokens of an empty cache, this one holds {held}")
    fitting = isinstance(lengths, (list, tuple)) and len(lengths) == len(held)
    if not fitting or not all(isinstance(n, int) and 1 <= n <= length for n in lengths):
        raise ValueError(f"{name} must be {len(held)} integers from 1 to {length}, got {lengths}")


def refuse_gradients(inputs: dict[str, Tensor]) -> None:
    """Raise ValueError for a tensor through which a gradient would be lost."""
    for name, x in inputs.items():
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{name} requires grad, but a cache is for inference: call it under torch.no_grad()"
            )


class TokenCache:
    """Named buffers [B, heads, capacity(, channels)]; row r holds its first ``lengths[r]`` slots.

    They take the dtype and device of what is first appended, and grow by half, so that a token
    costs no copy on average. Rows may differ in length: prompts are padded on the right, where
    causal attention never looks, and later tokens of a row overwrite its padding. Raises ValueError
    for a batch below 1."""

    def __init__(self, batch: int):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.lengths = [0] * batch
        self.buffers: dict[str, Tensor] = {}

    def check(self, new: dict[str, Tensor], lengths: list[int] | None) -> None:
        """Refuse, before any write, tokens [B, T, heads(, channels)] that the cache cannot take."""
        refuse_gradients(new)
        if not new:
            raise ValueError("a cache needs at least one tensor of new tokens, got none")
        odd = self.buffers.keys() ^ new.keys()
        if self.buffers and odd:
            names = ", ".join(sorted(odd))
            raise ValueError(
                f"{names}: the cache holds {', '.join(self.buffers)}, got {', '.join(new)}"
            )
        first, length = next((name, x.shape[1]) for name, x in new.items())
        for name, x in new.items():
            if x.shape[1] != length:
                raise ValueError(f"{name} must have {length} tokens like {first}, got {x.shape[1]}")
            self._check_like_held(name, x)
        if lengths is not None:
            check_lengths(lengths, self.lengths, length)

    def _check_like_held(self, name: str, x: Tensor) -> None:
        batch, _, *rest = x.shape
        if batch != len(self.lengths):
            raise ValueError(
                f"{name} must have the cache's batch of {len(self.lengths)}, got {batch}"
            )
        held = self.buffers.get(name)
        if held is None:
            return
        wanted = [held.shape[1], *held.shape[3:]]
        if wanted != rest:
            raise ValueError(
                f"{name} must be [heads, channels] {wanted} as in the cache, got {rest}"
            )
        if (held.dtype, held.device) != (x.dtype, x.device):
            raise ValueError(
                f"{name} must be {held.dtype} on {held.device} as in the cache, "
                f"got {x.dtype} on {x.device}"
            )

    def reserve(self, new: dict[str, Tensor]) -> None:
        """Make room for tokens such as ``new``, of which shape, dtype and device matter."""
        length = next(iter(new.values())).shape[1]
        if self.buffers:
            self.make_room(length)
            return
        capacity = max(MIN_CAPACITY, length + length // 2)
        # Zeros: a slot behind a row's tokens has weight 0 in its softmax, which a NaN there would
        # survive.
        self.buffers = {
            name: x.new_zeros(len(x), x.shape[2], capacity, *x.shape[3:]) for name, x in new.items()
        }

    def make_room(self, new: int) -> None:
        """Make room for ``new`` more tokens in a cache that holds some."""
        capacity = next(iter(self.buffers.values())).shape[2]
        needed = max(self.lengths) + new
        if needed <= capacity:
            return
        buffers = {}
        for name, held in self.buffers.items():
            batch, heads, _, *channels = held.shape
            grown = held.new_zeros(batch, heads, needed + needed // 2, *channels)
            grown[:, :, :capacity] = held
            buffers[name] = grown
        self.buffers = buffers  # all, or after an error none

    def put(self, new: dict[str, Tensor]) -> None:
        """Write tokens [B, T, heads(, channels)] behind those held; :meth:`advance` counts them."""
        self.reserve(new)
        for name, x in new.items():
            write(self.buffers[name], x, self.lengths)

    def advance(self, new: int, lengths: list[int] | None) -> None:
        """Count ``new`` tokens as held, or ``lengths[r]`` of them where rows differ."""
        self.lengths = [
            old + count for old, count in zip(self.lengths, lengths or [new] * len(self.lengths))
        ]

    def append(self, lengths: list[int] | None = None, **new: Tensor) -> list[int]:
        """Write tokens [B, T, heads(, channels)] behind those held; returns the lengths before.

        Args:
            lengths: for the first tokens of an empty cache: row r's tokens are the first
                ``lengths[r]``, the rest is padding.

        Raises:
            ValueError: other names than the cache's, or none; another batch, width, dtype or
                device; tensors of unequal numbers of tokens, or that require grad; lengths out of
                range.
        """
        self.check(new, lengths)
        self.put(new)
        before = self.lengths
        self.advance(next(iter(new.values())).shape[1], lengths)
        return before

    def select(self, rows: list[int]) -> None:
        """Let row r be what row ``rows[r]`` was: the beams that go on, say."""
        self.lengths = [self.lengths[row] for row in rows]
        self.buffers = {name: x[rows] for name, x in self.buffers.items()}

    def crop(self, count: int) -> None:
        """Forget each row's last ``count`` tokens; ValueError unless each row keeps one."""
        if not 0 <= count < min(self.lengths):
            raise ValueError(
                f"count must be from 0 to {min(self.lengths) - 1}, which leaves each row a token, "
                f"got {count}"
            )
        self.lengths = [held - count for held in self.lengths]
