"""The training loss: cross entropy of the tied output, whose [B, L, V] logits never exist whole."""

import contextlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sisa_kernels import SequenceLayout
from sisa_kernels.ops import say_once
from sisa_model.data.blocks import IGNORE
from sisa_model.models.language_model import LanguageModel
from sisa_model.models.linear import is_split, local, pack, padded_width
from sisa_model.models.tensor_parallel import vocabulary_shard
from sisa_model.utils.buffers import empty_aligned, tiles

try:
    from sisa_kernels.triton import cross_entropy as fused
except ImportError:
    fused = None  # type: ignore[assignment]

CHUNK_LOGITS = 2**25  # logits that exist at a time: 128 MiB in fp32


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk: three products, as for whole logits, none recomputed.

    A chunk's logits become their own gradient in place, in one buffer that all chunks share."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        wanted = any(ctx.needs_input_grad)
        vocab = len(weight)
        loss = hidden.new_zeros((), dtype=torch.float32)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        matrix = _padded(weight, dtype)
        rows = _rows_of_a_chunk(len(hidden), vocab)
        buffer = empty_aligned(matrix, rows, len(matrix))
        product = torch.empty_like(matrix) if wanted and dtype != torch.float32 else None
        chunks = zip(hidden.split(rows), targets[:, None].split(rows), dhidden.split(rows))
        with torch.autocast(hidden.device.type, enabled=False):
            for h, y, dh in chunks:
                h = h.to(dtype)
                logits = torch.mm(h, matrix.t(), out=buffer[: len(h)])
                # Those of the padding are 0 and stay so.
                loss += _cross_entropy_(logits, y, vocab, wanted)
                if not wanted:
                    continue
                dlogits = logits
                dh.copy_(dlogits @ matrix)
                if product is None:
                    dweight.addmm_(dlogits[:, :vocab].t(), h)
                else:
                    dweight += torch.mm(dlogits.t(), h, out=product)[:vocab]
        if wanted:
            ctx.save_for_backward(dhidden, dweight)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dhidden, dweight = ctx.saved_tensors
        # In place, as the weight's gradient may be the largest tensor there is; autograd refuses a
        # second backward for it.
        return (
            dhidden.mul_(dloss.to(dhidden.dtype)),
            dweight.mul_(dloss).to(ctx.weight_dtype),
            None,
            None,
        )


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` [V, D] in ``dtype``, with rows of zeros up to a width that products like."""
    rows = padded_width(len(weight), weight.device, dtype)
    if rows == len(weight):
        return weight.to(dtype)
    return pack([weight], dtype, [rows], weight.shape[1])


class _SplitCrossEntropy(torch.autograd.Function):
    """The same where each process of ``group`` has the rows ``words`` of the weight.

    Of each chunk the processes exchange three numbers a token: the highest of their logits, the sum
    of exponentials below it, the target's logit. The gradient of hidden is this process's share."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, words, most, group):
        wanted = any(ctx.needs_input_grad)
        loss = hidden.new_zeros((), dtype=torch.float32)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        matrix = _padded(weight, dtype)
        rows = _rows_of_a_chunk(len(hidden), most)  # as many in every process
        buffer = empty_aligned(matrix, rows, len(matrix))
        targets = targets[:, None]
        here = (targets >= words.start) & (targets < words.stop)
        at = (targets - words.start).clamp(0, len(weight) - 1)
        counts = targets != IGNORE
        chunks = zip(*(x.split(rows) for x in (hidden, at, here, counts, dhidden)))
        with torch.autocast(hidden.device.type, enabled=False):
            for h, y, mine, counted, dh in chunks:
                h = h.to(dtype)
                dlogits = torch.mm(h, matrix.t(), out=buffer[: len(h)])
                logits = dlogits[:, : len(weight)]
                log_sums, at_target = _over_all(*_row_sums(logits, y, mine), group)
                loss += (log_sums - at_target).where(counted, 0).sum()
                if not wanted:
                    continue
                log_sums = log_sums.where(counted, torch.inf)  # a softmax of 0
                _softmax_minus_target_(logits, log_sums, y, mine)
                dh.copy_(dlogits @ matrix)
                dweight += (dlogits.t() @ h)[: len(weight)]
        if wanted:
            ctx.save_for_backward(dhidden, dweight)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        return *_ChunkedCrossEntropy.backward(ctx, dloss), None, None, None


def _row_sums(logits: Tensor, at: Tensor, mine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the highest logit, the sum of exponentials below it, the target's or 0: fp32."""
    found = []
    for tile, y, here in tiles(logits, at, mine):
        x = tile.float()
        at_target = x.gather(1, y) * here
        highest = x.amax(1, keepdim=True)
        found.append((highest, (x - highest).exp_().sum(1, keepdim=True), at_target))
    highest, sums, at_target = (torch.cat(parts) for parts in zip(*found))
    return highest, sums, at_target


def _over_all(
    highest: Tensor, sums: Tensor, at_target: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and target's logit of rows [N, 1] whose parts are :func:`_row_sums`'s."""
    mine = torch.cat((highest, sums, at_target), 1)
    everyone = mine.new_empty(group.size() * len(mine), 3)
    dist.all_gather(list(everyone.chunk(group.size())), mine, group)
    tops, sums, at_targets = everyone.view(group.size(), -1, 3).unbind(-1)
    return (tops + sums.log()).logsumexp(0)[:, None], at_targets.sum(0)[:, None]


def _softmax_minus_target_(logits: Tensor, log_sums: Tensor, at: Tensor, mine: Tensor) -> None:
    """Let each row of ``logits`` become ``softmax - onehot``, its part in this process."""
    for tile, log_sum, y, here in tiles(logits, log_sums, at, mine):
        softmax = tile.float().sub_(log_sum).exp_()
        softmax.scatter_add_(1, y, -here.to(softmax.dtype))
        tile.copy_(softmax)


def _rows_of_a_chunk(rows: int, vocab: int) -> int:
    """Of chunks of one size (a small rest would multiply slowly) of ``CHUNK_LOGITS`` at most."""
    most = max(1, CHUNK_LOGITS // vocab)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _cross_entropy_(logits: Tensor, targets: Tensor, vocab: int, gradient: bool) -> Tensor:
    """The sum of the cross entropies of ``logits`` [N, W] at ``targets`` [N, 1], an fp32 scalar.

    Of the first ``vocab`` columns, without targets that are IGNORE. With ``gradient`` the logits
    become its gradient, ``softmax(logits) - onehot(targets)``, else they are lost. All is computed
    in fp32."""
    if logits.is_cuda and _runs_fused(logits):
        return fused.cross_entropy_(logits, targets[:, 0], vocab, IGNORE, gradient).sum()
    loss = logits.new_zeros((), dtype=torch.float32)
    for tile, y in tiles(logits[:, :vocab], targets):
        x = tile.float()
        counts = y != IGNORE
        y = y.clamp(min=0)
        at_target = x.gather(1, y)
        highest = x.amax(1, keepdim=True)
        exps = x.sub_(highest).exp_()
        sums = exps.sum(1, keepdim=True)
        loss += (sums.log() + highest - at_target).where(counts, 0).sum()
        if gradient:
            softmax = exps.mul_(counts / sums)
            softmax.scatter_add_(1, y, counts.float().neg_())
            tile.copy_(softmax)
    return loss


def _runs_fused(logits: Tensor) -> bool:
    """Whether the Triton kernel takes such logits on a GPU; where not, it is said once."""
    why = fused.fault(logits) if fused is not None else "the package triton is missing"
    if why is not None:
        say_once(f"the loss on a GPU runs in plain PyTorch, slower: {why}")
    return why is None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies of ``hidden weight^T`` at ``targets``: nats, an fp32 scalar.

    Targets equal to IGNORE are left out. hidden [..., D] and weight [V, D] in fp32 or bf16, targets
    [...] int64. Products run in autocast's dtype where it is on; softmax, sum and the weight's
    gradient are fp32. At most ``CHUNK_LOGITS`` logits exist at a time, or one token's. On a GPU
    nothing waits for it; the softmax and its gradient are one Triton kernel there. With a weight
    that tensor parallel splits all of its processes call this, with the same tokens; each gets the
    whole sum, and its share of hidden's gradient."""
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if targets.device.type == "cpu":  # elsewhere to find them would be a wait
        kept = targets != IGNORE
        if not kept.all():
            hidden, targets = hidden[kept], targets[kept]
    dtype = _compute_dtype(hidden)
    if not is_split(weight):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, dtype)
    words = vocabulary_shard(weight)
    most = -(-weight.shape[0] // weight.device_mesh.size())
    group = weight.device_mesh.get_group()
    return _SplitCrossEntropy.apply(hidden, local(weight), targets, dtype, words, most, group)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Piece(NamedTuple):
    """What an objective takes: a micro-batch, or one process's tokens of it."""

    inputs: Tensor
    """[B, L] int64."""
    targets: Tensor
    """[B, L] int64."""
    cu_seqlens: Tensor | None = None
    """Bounds of packed documents, of the whole micro-batch; on the CPU."""
    layout: SequenceLayout | None = None
    """Which tokens of the micro-batch these are, where context parallel cuts it."""


class Objective(nn.Module):
    """``objective(*piece)``: the sum of losses, nats, fp32.

    Targets that are IGNORE do not count. Pieces with a layout belong to ``group``, whose processes
    then call this together and have a part of the sum each."""

    group: dist.ProcessGroup | None = None

    def __init__(self, model: LanguageModel, autocast: contextlib.AbstractContextManager):
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor | None = None,
        layout: SequenceLayout | None = None,
    ) -> Tensor:
        # As integers, since FSDP moves tensors to the device, which waits for it.
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        with self.autocast:
            hidden = self.model.hidden(inputs, bounds, group=self.group, layout=layout)
            return linear_cross_entropy(hidden, self.model.embed.weight, targets)
