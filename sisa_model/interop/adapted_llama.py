"""SISA in someone else's model: :func:`replace_attention` for a Hugging Face Llama (extra ``hf``).

In a model of your own, :meth:`sisa_model.SisaAttention.of` is the module that stands in an
attention block's place."""

import copy
import math
from typing import Any, ClassVar

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)

from sisa_model.interop.folder import CodeInFolder, NoCodeCopied
from sisa_model.interop.llama import LlamaSisaAttention

MASKED = ("sdpa", "eager")
QUANTISED = ("bitsandbytes",)  # bases whose projections go on as they are


class SisaLlamaConfig(CodeInFolder, LlamaConfig):
    """LlamaConfig of a Llama that :func:`replace_attention` has changed."""

    model_type = "sisa_llama"
    code_module = "sisa_model.adapt"
    code_classes: ClassVar = {
        "AutoConfig": "SisaLlamaConfig",
        "AutoModel": "SisaLlamaModel",
        "AutoModelForCausalLM": "SisaLlamaForCausalLM",
    }

    sisa_d_state: list[int] | None = None
    """Of each layer, the width of the importance channel a head; 0: Llama's own attention."""
    sisa_lam: float = 1e-4
    """Lambda at first."""


class SisaLlamaPreTrainedModel(NoCodeCopied, LlamaPreTrainedModel):
    """What a Llama with SISA in some of its layers has, whatever its head."""

    config: SisaLlamaConfig
    _keep_in_fp32_modules_strict = {"lambda_raw"}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaSisaAttention):
            module.reset_own_parameters(self.config.sisa_lam)


class SisaLlamaModel(SisaLlamaPreTrainedModel, LlamaModel):
    """What :func:`replace_attention` makes of a LlamaModel."""

    def __init__(self, config: SisaLlamaConfig):
        super().__init__(config)
        widths = config.sisa_d_state or [0] * config.num_hidden_layers
        chosen = [index for index, width in enumerate(widths) if width]
        for block in _checked_blocks(self, chosen) if chosen else []:
            width = widths[block.self_attn.layer_idx]
            block.self_attn = _attention(block, width, config.sisa_lam)


class SisaLlamaForCausalLM(SisaLlamaPreTrainedModel, LlamaForCausalLM):
    """What :func:`replace_attention` makes of a LlamaForCausalLM."""

    def __init__(self, config: SisaLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = SisaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


ADAPTED: dict[type[PreTrainedModel], type[SisaLlamaPreTrainedModel]] = {
    LlamaModel: SisaLlamaModel,
    LlamaForCausalLM: SisaLlamaForCausalLM,
}


def replace_attention(
    model: LlamaForCausalLM | LlamaModel,
    d_state: int = 16,
    lam: float = 1e-4,
    layers: list[int] | None = None,
) -> list[nn.Parameter]:
    """Add the importance term to the attention of a Hugging Face Llama, in place.

    Returns the new parameters.

    The old projections stay, and lambda begins at ``lam``, so small that the first logits are the
    old ones. It grows in few steps only if ``lambda_raw`` has a larger learning rate of its own:
    lambda is about its exponential, here at -9.2.

    The model becomes a :class:`SisaLlamaForCausalLM` (of a LlamaModel a SisaLlamaModel), whose
    configuration, a copy of the old, says what was done: ``AutoModelForCausalLM.from_pretrained``
    reads what ``save_pretrained`` writes. ``generate`` has its cache (:class:`SisaCacheLayer`);
    other calls run without one unless told ``use_cache=True``, as a cache carries no gradients. A
    base quantised by bitsandbytes, in 4 or 8 bits, keeps its projections; new ones are not
    quantised.

    Args:
        d_state: width of the importance channel a head, even.
        lam: lambda at first, > 0.
        layers: indices of the layers to change; None: all.

    Raises:
        TypeError: not a Llama, or with another head.
        ValueError: an argument out of range, a layer already replaced, attention dropout, another
        attn_implementation, a base quantised in another way."""
    if not isinstance(model, (*ADAPTED, SisaLlamaPreTrainedModel)):
        raise TypeError(
            "model must be a LlamaForCausalLM or LlamaModel of transformers, "
            f"got {type(model).__name__}"
        )
    if d_state < 2 or d_state % 2:
        raise ValueError(f"d_state must be even and at least 2, got {d_state}")
    if not 0 < lam < math.inf:
        raise ValueError(f"lam must be above 0 and finite, got {lam}")
    config = _adapted_config(model.config)
    blocks = _checked_blocks(model, layers)
    added: list[nn.Parameter] = []
    widths = list(config.sisa_d_state or [0] * config.num_hidden_layers)
    for block in blocks:
        widths[block.self_attn.layer_idx] = d_state
        block.self_attn = attn = _attention(block, d_state, lam)
        added += [*attn.importance.parameters(), attn.decay_bias, attn.lambda_raw]
    config.sisa_d_state = widths
    config.sisa_lam = lam
    _become_adapted(model, config)
    return added


def _attention(block: Any, d_state: int, lam: float) -> LlamaSisaAttention:
    """The attention for the place of that in ``block``, a LlamaDecoderLayer."""
    dtype = block.input_layernorm.weight.dtype  # of what is not quantised
    return LlamaSisaAttention(block.self_attn, d_state, lam, dtype).train(block.training)


def _adapted_config(config: LlamaConfig) -> SisaLlamaConfig:
    """A copy of ``config`` as a SisaLlamaConfig; ValueError for an unknown kind of quantisation."""
    adapted: Any = copy.deepcopy(config)  # another model may have it too
    adapted.__class__ = SisaLlamaConfig
    adapted.use_cache = False
    if not isinstance(config, SisaLlamaConfig):
        adapted.sisa_d_state = None
    quantised = getattr(adapted, "quantization_config", None)
    if quantised is None:
        return adapted
    if (
        method := str(getattr(quantised.quant_method, "value", quantised.quant_method))
    ) not in QUANTISED:
        raise ValueError(
            f"model must be quantised by {' or '.join(QUANTISED)}, or not at all, got {method}"
        )
    skipped = quantised.llm_int8_skip_modules or ["lm_head"]
    quantised.llm_int8_skip_modules = sorted({*skipped, r".*\.importance"})
    return adapted


def _become_adapted(model: PreTrainedModel, config: SisaLlamaConfig) -> None:
    """Give ``model`` the class and the configuration of what it is, and the parts of it."""
    old = model.config
    for part in model.modules():
        if getattr(part, "config", None) is old:
            part.config = config  # type: ignore[assignment]
        if isinstance(part, PreTrainedModel):
            part.__class__ = ADAPTED.get(type(part), type(part))
            part._keep_in_fp32_modules_strict = {
                *(part._keep_in_fp32_modules_strict or ()),
                *(SisaLlamaPreTrainedModel._keep_in_fp32_modules_strict or ()),
            }


def _checked_blocks(model: Any, layers: list[int] | None) -> list[Any]:
    """The layers that are to change; raises what :func:`replace_attention` raises for the model."""
    inner = getattr(model, "model", model)
    every = range(len(inner.layers))
    chosen = list(every) if layers is None else layers
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(every):
        raise ValueError(
            f"layers must be different indices from 0 to {len(every) - 1}, got {layers}"
        )
    blocks: list[Any] = [inner.layers[index] for index in chosen]
    for index, block in zip(chosen, blocks):
        if not isinstance(block.self_attn, LlamaAttention):
            raise ValueError(
                f"layers must have LlamaAttention, layer {index} has "
                f"{type(block.self_attn).__name__}"
            )
    if model.config.attention_dropout:
        raise ValueError(
            f"attention_dropout must be 0, SISA has none, got {model.config.attention_dropout}"
        )
    if model.config._attn_implementation not in MASKED:
        raise ValueError(
            f"attn_implementation must be {' or '.join(MASKED)}, whose masks show the padding, "
            f"got {model.config._attn_implementation!r}"
        )
    return blocks


AutoConfig.register(SisaLlamaConfig.model_type, SisaLlamaConfig)
AutoModel.register(SisaLlamaConfig, SisaLlamaModel)
AutoModelForCausalLM.register(SisaLlamaConfig, SisaLlamaForCausalLM)
