"""Which heads a form of exact attention can serve, and which form a layer takes.

The forms are those of :mod:`sisa_kernels.paths.forms`. A layer's form is chosen by what its heads
needed when that was last seen: 8 bytes a sequence and key head, copied from the device without
waiting, so that the choice lags by a call or more. It decides speed alone: a head that the form
cannot serve is computed by the exact kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sisa_kernels import selfcheck
from sisa_kernels.inputs import SisaInputs

Form = Literal["exact", "far_and_band", "wide"]
WINDOW = 256
# By how much g in base 2 may fall in the wide form. Split about the middle it leaves the operands
# 2^27 of room in fp32 and bf16, and in fp16 2^8, downwards with all digits.
WIDE_RANGE = {torch.float32: 200, torch.bfloat16: 200, torch.float16: 14}
# The least mean half-life in tokens. The stock kernel rounds its gradients with the pairs i = j in
# them; the shorter the memory, the larger a part they are, and dL/dlog_decay, a sum of differences,
# must lose them again. Its error is 1.3 to 2 times that of Eq. 2 in PyTorch in the same dtype at
# 64, up to 2.7 times at 14, up to 4 at 1 to 3.
WIDE_HALF_LIFE = 64
SERVED = 7 / 8  # of the heads: what a form must serve to be taken


def window_of(length: int) -> int:
    """The band's width at a length: 256 from 1,024 tokens on; below, 64 and 16."""
    if length >= 4 * WINDOW:
        return WINDOW
    return 64 if length >= WINDOW else 16


def flags(needed: Tensor, form: str, window: int, length: int, dtype: torch.dtype) -> Tensor:
    """1 for the key heads that a form cannot serve, [B, G] int32.

    ``needed`` [B, G, 2]: the window in tokens that each needs, and the range of its g in base 2,
    over ``length`` tokens."""
    if form == "exact":
        return torch.zeros_like(needed.select(2, 0))
    if form == "far_and_band":
        return (needed.select(2, 0) > window).int()
    return (needed.select(2, 1) > min(WIDE_RANGE[dtype], length // WIDE_HALF_LIFE)).int()


class Layer(NamedTuple):
    """What a row of the table may ask of a layer's calls."""

    length: int
    d_state: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Row:
    """A form, and where it is worth while."""

    form: Form
    reason: str
    """Why it stands where it stands; nothing of it has been timed."""
    suits: Callable[[Layer], bool]


# Times are multiples of plain attention's, of the kernels as compiled for an H200, on paper
# (`python -m bench roofline`).
TABLE = (
    Row(
        "far_and_band",
        "1.23 at 4,096 tokens, 1.06 at 16,384, where the exact kernels take 1.31 and 1.30; 1.43 at "
        "2,048 against their 1.37: the band's kernels move as many bytes as theirs.",
        lambda layer: layer.length >= 16 * window_of(layer.length),
    ),
    Row(
        "wide",
        "1.14 at Ds 16 and any length, 1.25 where the stock kernel wants v padded; the exact "
        "kernels, at the half-lives that it serves, 1.32 to 1.62. At Ds 32 it is 1.29 and 1.50: "
        "hardly less, or more.",
        lambda layer: layer.d_state <= 16,
    ),
    Row("exact", "Serves every head.", lambda layer: True),
)


def candidates(needed: Tensor, layer: Layer) -> list[Form]:
    """The forms of the table that suit and serve enough of the heads of ``needed``, in order."""
    window = window_of(layer.length)
    found = []
    for row in TABLE:
        left = flags(needed, row.form, window, layer.length, layer.dtype).float().mean().item()
        if row.suits(layer) and 1 - left >= SERVED:
            found.append(row.form)
    return found


class Adaptive:
    """``backend=Adaptive()``: one layer's form, chosen anew as its heads change.

    It begins with "exact". A call that is traced (torch.compile) or captured in a CUDA graph has
    the form of that moment for good, right but perhaps no longer the fastest."""

    def __init__(self) -> None:
        self.form: Form = "exact"
        self._host: Tensor | None = None
        self._arrival: torch.cuda.Event | None = None
        self._layer: Layer | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy, or one read from a file, begins anew."""
        return Adaptive, ()

    def attend(
        self,
        inputs: SisaInputs,
        attend: Callable[[SisaInputs, Form], tuple[Tensor, Tensor]],
        fault: Callable[[Form, SisaInputs], str | None],
    ) -> Tensor:
        """y [B, L, H, Dv] by the form of the moment.

        Args:
            attend: a call in a form, y and what its heads needed.
            fault: what is known to be wrong with a form; a wrong one is not taken.
        """
        observed = not selfcheck.possible(inputs.q.device)
        if observed or torch._C._are_functorch_transforms_active():
            return attend(inputs, self.form)[0]
        able = (form for form in self._seen() if fault(form, inputs) is None)
        self.form = next(able, self.form)
        y, needed = attend(inputs, self.form)
        if self._layer is None:
            self._ask(needed, Layer(inputs.q.shape[1], inputs.b.shape[3], inputs.q.dtype))
        return y

    def _ask(self, needed: Tensor, layer: Layer) -> None:
        """Begin to copy ``needed``; no other copy is under way."""
        self._layer = layer
        if needed.device.type != "cuda":
            self._host = needed
            return
        if self._host is None or self._host.shape != needed.shape:
            self._host = torch.empty(needed.shape, dtype=needed.dtype, pin_memory=True)
        with torch.cuda.device_of(needed):
            self._host.copy_(needed, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def _seen(self) -> list[Form]:
        """The candidates for what has arrived since the last look; none where nothing has."""
        if self._host is None or self._layer is None:
            return []
        if self._arrival is not None and not self._arrival.query():
            return []
        layer = self._layer
        self._layer = None
        return candidates(self._host, layer)
