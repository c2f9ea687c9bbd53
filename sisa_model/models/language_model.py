"""The language model: embedding, layers, tied output; build() makes one from a preset."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sisa_kernels import SequenceLayout
from sisa_kernels.cache import check_lengths
from sisa_kernels.checks import check_documents, readable
from sisa_model.models.biased import AlibiAttention, ForgettingAttention
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import (
    Context,
    ModelCache,
    as_bounds,
    context_refusal,
    rotary_at,
    rotary_behind,
)
from sisa_model.models.hybrid import make_layer
from sisa_model.models.linear import PackedLinear, is_split, local
from sisa_model.models.mamba import MambaMixer
from sisa_model.models.presets import preset_config
from sisa_model.models.sisa import SisaAttention
from sisa_model.models.softmax import TransformerAttention
from sisa_model.models.tensor_parallel import gather_logits

ATTENTION: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "sisa": SisaAttention,
    "transformer": TransformerAttention,
    "fox": ForgettingAttention,
    "alibi": AlibiAttention,
}


class LanguageModel(nn.Module):
    """A causal language model: ``model(input_ids [B, L] int64) -> logits [B, L, V]``.

    ``cu_seqlens`` [documents + 1] int32 or int64, rising from 0 to at most L, packs documents into
    one sequence (B = 1): none sees another. They may be on the CPU, or plain integers: a
    Transformer, FoX, ALiBi, a Mamba and mode "clamped" then read them without waiting for a GPU (to
    which FSDP moves every tensor that a model is called with, but not integers). ``cache``
    (:meth:`make_cache`) holds the tokens before these, which are appended to it; ``lengths``, with
    the first of them, are the real tokens of each row, whose rest is padding on the right. A cache
    is for inference, under ``torch.no_grad()``. Works under ``torch.device("meta")``; after
    ``to_empty`` call :meth:`reset_parameters`. Raises ValueError for a sequence (packed: a
    document) longer than ``config.max_seq_len``, with what the cache holds, and, on the CPU, for a
    token outside the vocabulary. With ``checkpoint_layers`` training keeps the layers' inputs only,
    and runs each layer again in the backward.

    With ``group`` and ``layout`` the ids are this process's tokens of a sequence that the processes
    of ``group`` have together (:class:`sisa_kernels.SequenceLayout`), and so are the logits;
    ``cu_seqlens`` bounds documents of the whole sequence, unless the layout does. All of them call
    the model at once; a weight's gradient is then this process's share of a sum."""

    checkpoint_layers = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        # With lambda = 0 the importance term is gone, and with it every parameter it had: a
        # Transformer of SISA's d_ff.
        family = "transformer" if config.lam == "zero" else config.family
        attention = ATTENTION.get(family, TransformerAttention)  # Mamba's layers have none
        self.layers = nn.ModuleList(
            make_layer(kind, attention, config) for kind in config.layer_kinds
        )
        self.final_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.reset_parameters()
        if config.weights == "bf16":
            _round_parameters(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values: matrices with std ``init_std``, and a family's own."""
        _draw_matrices(self, self.config.init_std)
        for module in self.modules():
            if isinstance(module, (SisaAttention, ForgettingAttention, MambaMixer)):
                module.reset_parameters()

    def make_cache(self, batch: int) -> ModelCache:
        """An empty cache of ``batch`` sequences; ValueError, saying why, where a layer has none."""
        layers: list[Any] = list(self.layers)
        return ModelCache([layer.mixer.make_cache(batch) for layer in layers], [0] * batch)

    def cache_refusal(self) -> str | None:
        """Why the model cannot decode with a cache, or None."""
        try:
            self.make_cache(1)
        except ValueError as error:
            return str(error)
        return None

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        cache: ModelCache | None = None,
        lengths: list[int] | None = None,
        group: dist.ProcessGroup | None = None,
        layout: SequenceLayout | None = None,
    ) -> Tensor:
        return self.logits(self.hidden(input_ids, cu_seqlens, cache, lengths, group, layout))

    def logits(self, states: Tensor) -> Tensor:
        """[..., V] of the final normed states [..., D]."""
        weight = self.embed.weight
        logits = F.linear(states, local(weight))
        return gather_logits(logits, weight) if is_split(weight) else logits

    def hidden(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        cache: ModelCache | None = None,
        lengths: list[int] | None = None,
        group: dist.ProcessGroup | None = None,
        layout: SequenceLayout | None = None,
    ) -> Tensor:
        """The final normed states [B, L, D], before the output matrix."""
        cu_seqlens = as_bounds(cu_seqlens)
        self.check_ids(input_ids)
        if layout is None:
            self._check_longest(input_ids, cu_seqlens, cache)
        else:
            self._check_layout(layout, cu_seqlens, cache)
        x = self.embed(input_ids)
        return self.states(x, cu_seqlens, cache, lengths, group=group, layout=layout)

    def states(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: ModelCache | None = None,
        lengths: list[int] | None = None,
        inputs: list[Tensor] | None = None,
        group: dist.ProcessGroup | None = None,
        layout: SequenceLayout | None = None,
    ) -> Tensor:
        """:meth:`hidden` of embedded tokens x [B, L, D], of any length: the layers and last norm.

        To ``inputs``, where it is given, the input of each layer [B, L, D] is appended."""
        if cache is not None:
            self._check_cache(x, cu_seqlens, cache, lengths)
        elif lengths is not None:
            raise ValueError(
                "lengths needs a cache: without one, padding on the right changes no token "
                "before it"
            )
        batch, length, _ = x.shape
        if group is not None and layout is not None:
            positions = layout.positions(group.rank(), x.device)
            rotary = rotary_at(positions, self.config.head_dim)
        else:
            held = [0] if cache is None else cache.lengths
            rotary = rotary_behind(held, length, self.config.head_dim, x.device)
        if self.config.weights == "bf16":  # a table of the model's dtype, as the authors'
            cos, sin = (table.bfloat16().float() for table in rotary)
            rotary = cos, sin
        context = Context(rotary, cu_seqlens, lengths, group, layout).on_device()
        held_by_layer = cache.layers if cache is not None else [None] * len(self.layers)
        for layer, layer_cache in zip(self.layers, held_by_layer):
            if inputs is not None:
                inputs.append(x)
            if self.checkpoint_layers and self.training and cache is None:
                x = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x = layer(x, context, layer_cache)
        if cache is not None:
            new = lengths or [length] * batch
            cache.lengths = [before + count for before, count in zip(held, new)]
        return self.final_norm(x)

    def check_ids(self, input_ids: Tensor) -> None:
        """ValueError for ids of another shape or dtype, or (on the CPU) outside the vocabulary."""
        integers = input_ids.dtype in (torch.int64, torch.int32)
        if input_ids.ndim != 2 or input_ids.shape[0] == 0 or not integers:
            raise ValueError(
                "input_ids must be int64 [batch >= 1, length], "
                f"got {input_ids.dtype} {list(input_ids.shape)}"
            )
        vocab = self.config.vocab_size
        ids = readable(input_ids)
        if ids is not None and ids.numel():
            lowest, highest = (int(x) for x in torch.aminmax(ids))
            if lowest < 0 or highest >= vocab:
                raise ValueError(f"input_ids must lie in [0, {vocab}), got {lowest} to {highest}")

    def _check_longest(
        self, input_ids: Tensor, cu_seqlens: Tensor | None, cache: ModelCache | None
    ) -> None:
        """Refuse wrong ``cu_seqlens``, and sequences above ``max_seq_len`` (packed: on the CPU)."""
        check_documents(cu_seqlens, input_ids)
        longest = input_ids.shape[1]
        if cu_seqlens is not None:
            bounds = readable(cu_seqlens)
            if bounds is None:
                return
            longest = int(bounds.diff().max())
        limit = self.config.max_seq_len
        held = max(cache.lengths) if cache is not None else 0
        if not 1 <= longest <= limit - held:
            behind = f" behind {held} in the cache" if held else ""
            raise ValueError(
                f"input_ids must be 1 to {limit} (max_seq_len) tokens long, got {longest}{behind}"
            )

    def _check_layout(
        self, layout: SequenceLayout, cu_seqlens: Tensor | None, cache: ModelCache | None
    ) -> None:
        """Refuse what has no layout, and sequences (packed: documents) above ``max_seq_len``."""
        why = "a cache's rows are whole" if cache is not None else context_refusal(self.config)
        if why is not None:
            raise ValueError(f"layout must be left out: {why}")
        bounds = torch.tensor(layout.documents or (0, layout.length))
        if layout.documents is None and cu_seqlens is not None:
            given = readable(cu_seqlens)
            if given is None:
                return
            bounds = given
        limit = self.config.max_seq_len
        longest = int(bounds.diff().max())
        if longest > limit:
            raise ValueError(
                f"layout must be of at most {limit} (max_seq_len) tokens, got {longest}"
            )

    def _check_cache(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        cache: ModelCache,
        lengths: list[int] | None,
    ) -> None:
        """Refuse what the layers could not append, before the first of them does."""
        batch, length, _ = x.shape
        if torch.is_grad_enabled():
            raise ValueError("a cache is for inference: call the model under torch.no_grad()")
        if cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens cannot be combined with a cache, whose rows are one document each"
            )
        if len(cache.layers) != len(self.layers):
            raise ValueError(
                f"cache must be one of this model's make_cache: it has {len(cache.layers)} layers, "
                f"the model {len(self.layers)}"
            )
        if batch != len(cache.lengths):
            raise ValueError(
                f"input_ids must have the cache's batch of {len(cache.lengths)}, got {batch}"
            )
        if lengths is not None:
            check_lengths(lengths, cache.lengths, length)


def _draw_matrices(module: nn.Module, std: float) -> None:
    """Draw ``module``'s matrices and embeddings in the order of its modules; norms begin at 1."""
    if isinstance(module, PackedLinear):
        module.reset_parameters(std)
        return
    if isinstance(module, (nn.Embedding, nn.Linear)):
        nn.init.normal_(module.weight, std=std)
    elif isinstance(module, nn.RMSNorm):
        nn.init.ones_(module.weight)
    for child in module.children():
        _draw_matrices(child, std)


def _round_parameters(model: LanguageModel) -> None:
    """Make parameters bf16: all but lambda_raw, and that, too, in a hybrid, as the authors did."""
    kept = "" if model.config.pattern else "lambda_raw"
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] != kept:
            parameter.data = parameter.data.bfloat16()


def build(preset: str, **overrides: Any) -> LanguageModel:
    """A new model from a preset, initialised from torch's random state.

    :func:`sisa_model.presets` lists the names.

    ``overrides`` are fields of :class:`ModelConfig` (d_model n_heads n_kv_heads n_layers d_ff
    d_state vocab_size max_seq_len mode backend ...); d_ff is computed anew unless it is given.
    Raises ValueError as :func:`preset_config` does."""
    return LanguageModel(preset_config(preset, **overrides))


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, the tied embedding counted once."""
    return sum(p.numel() for p in model.parameters())
