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


class _Words(NamedTuple):
    """Which rows of a weight that tensor parallel splits this process has."""

    rows: slice
    most: int
    """Rows of the largest part."""
    group: dist.ProcessGroup


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk: three products, as for whole logits, none recomputed.

    A chunk's logits become their own gradient in place, in one buffer that all chunks share. With
    ``words`` the weight's rows are this process's, as are the logits' columns; the gradient of
    hidden is its share of a sum."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, words):
        wanted = any(ctx.needs_input_grad)
        vocab = len(weight)
        loss = hidden.new_zeros((), dtype=torch.float32)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        matrix = _padded(weight, dtype)
        # As many rows in every process.
        rows = _rows_of_a_chunk(len(hidden), vocab if words is None else words.most)
        buffer = empty_aligned(matrix, rows, len(matrix))
        product = torch.empty_like(matrix) if wanted and dtype != torch.float32 else None
        chunks = zip(hidden.split(rows), targets[:, None].split(rows), dhidden.split(rows))
        with torch.autocast(hidden.device.type, enabled=False):
            for h, y, dh in chunks:
                h = h.to(dtype)
                logits = torch.mm(h, matrix.t(), out=buffer[: len(h)])
                # Those of the padding are 0 and stay so.
                if words is None:
                    loss += _cross_entropy_(logits, y, vocab, wanted)
                else:
                    loss += _split_cross_entropy_(logits, y, vocab, wanted, words)
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
            None,
        )


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` [V, D] in ``dtype``, with rows of zeros up to a width that products like."""
    rows = padded_width(len(weight), weight.device, dtype)
    if rows == len(weight):
        return weight.to(dtype)
    return pack([weight], dtype, [rows], weight.shape[1])


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
    if _runs_fused(logits):
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


def _split_cross_entropy_(
    logits: Tensor, targets: Tensor, vocab: int, gradient: bool, words: _Words
) -> Tensor:
    """:func:`_cross_entropy_` where ``logits`` are of the vocabulary's ``words``: the same sum.

    The processes exchange three numbers a row: the highest of their logits, the sum of exponentials
    below it, the target's logit."""
    counts = targets != IGNORE
    at = targets - words.rows.start
    at = at.where((at >= 0) & (at < vocab), -1)  # -1: in another process
    in_triton = _runs_fused(logits, parts=True)
    sums = (
        fused.softmax_sums(logits, at[:, 0], vocab) if in_triton else _sums(logits[:, :vocab], at)
    )
    log_sums, at_target = _over_all(sums, words.group)
    if gradient:
        scales = log_sums.where(counts, torch.inf)  # a softmax of 0
        if in_triton:
            fused.softmax_minus_target_(logits, at[:, 0], scales[:, 0], vocab)
        else:
            _softmax_minus_target_(logits[:, :vocab], at, scales)
    return (log_sums - at_target).where(counts, 0).sum()


def _sums(logits: Tensor, at: Tensor) -> Tensor:
    """[N, 3] fp32: the highest of each row, the sum of exponentials below it, the one ``at``.

    The last is 0 where ``at`` [N, 1] is -1."""
    found = []
    for tile, y in tiles(logits, at):
        x = tile.float()
        at_target = x.gather(1, y.clamp(min=0)).where(y >= 0, 0)
        highest = x.amax(1, keepdim=True)
        found.append(torch.cat((highest, (x - highest).exp_().sum(1, keepdim=True), at_target), 1))
    return torch.cat(found)


def _over_all(sums: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and target's logit of rows [N, 1], whose parts are :func:`_sums`'s."""
    everyone = sums.new_empty(group.size() * len(sums), 3)
    dist.all_gather(list(everyone.chunk(group.size())), sums, group)
    highest, exps, at_target = everyone.view(group.size(), -1, 3).unbind(-1)
    return (highest + exps.log()).logsumexp(0)[:, None], at_target.sum(0)[:, None]


def _softmax_minus_target_(logits: Tensor, at: Tensor, log_sums: Tensor) -> None:
    """Let each row of ``logits`` become ``softmax - onehot``, its part in this process."""
    for tile, y, log_sum in tiles(logits, at, log_sums):
        softmax = tile.float().sub_(log_sum).exp_()
        softmax.scatter_add_(1, y.clamp(min=0), -(y >= 0).to(softmax.dtype))
        tile.copy_(softmax)


def _runs_fused(logits: Tensor, parts: bool = False) -> bool:
    """Whether Triton's kernels take such logits on a GPU; where not, it is said once."""
    if not logits.is_cuda:
        return False
    why = fused.fault(logits, parts) if fused is not None else "the package triton is missing"
    if why is not None:
        say_once(f"the loss on a GPU runs in plain PyTorch, slower: {why}")
    return why is None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies of ``hidden weight^T`` at ``targets``: nats, an fp32 scalar.

    Targets equal to IGNORE are left out. hidden [..., D] and weight [V, D] in fp32 or bf16, targets
    [...] int64. Products run in autocast's dtype where it is on; softmax, sum and the weight's
    gradient are fp32. At most ``CHUNK_LOGITS`` logits exist at a time, or one token's. On a GPU
    nothing waits for it; the softmax and its gradient are one Triton kernel there, two where the
    weight is split. With a weight that tensor parallel splits all of its processes call this, with
    the same tokens; each gets the whole sum, and its share of hidden's gradient."""
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if targets.device.type == "cpu":  # elsewhere to find them would be a wait
        kept = targets != IGNORE
        if not kept.all():
            hidden, targets = hidden[kept], targets[kept]
    dtype = _compute_dtype(hidden)
    words = None
    if is_split(weight):
        most = -(-weight.shape[0] // weight.device_mesh.size())
        words = _Words(vocabulary_shard(weight), most, weight.device_mesh.get_group())
    return _ChunkedCrossEntropy.apply(hidden, local(weight), targets, dtype, words)


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
