"""The models in Hugging Face transformers, whose Auto classes know model type "sisa".

``import sisa_model.hf`` registers them (extra ``hf``).

One folder serves both libraries: config.json holds ModelConfig's fields, model.safetensors the
names of :func:`sisa_model.save`. ``AutoModelForCausalLM.from_pretrained`` reads what
``sisa_model.save`` wrote, ``sisa_model.load`` what ``save_pretrained`` wrote."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from typing_extensions import Unpack

from sisa_kernels.ops import say_once
from sisa_model.interop.cache import DecodingCache
from sisa_model.interop.folder import CodeInFolder, NoCodeCopied
from sisa_model.interop.padding import (
    PackedBounds,
    blank,
    find_begins,
    find_layout,
    real_tokens,
)
from sisa_model.models.checkpoint import CODE_CLASSES, CODE_MODULE, MODEL_TYPE, with_prefix
from sisa_model.models.config import ModelConfig
from sisa_model.models.language_model import LanguageModel
from sisa_model.models.layers import Layer
from sisa_model.models.linear import Fp32Parameters
from sisa_model.models.mamba import MambaBlock

FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


class SisaConfig(CodeInFolder, PreTrainedConfig):
    """ModelConfig's fields, of every family, as a transformers configuration.

    ``SisaConfig(**dataclasses.asdict(config))`` makes one. Further arguments are PreTrainedConfig's
    (``pad_token_id`` ...); with ``tie_word_embeddings=False`` the output matrix is not the
    embedding, as adapters can leave it. Raises ValueError as ModelConfig does."""

    model_type = MODEL_TYPE
    code_module = CODE_MODULE
    code_classes = CODE_CLASSES
    attribute_map: ClassVar = {
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    def __init__(self, **kwargs: Any):
        names = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        names.setdefault("tie_word_embeddings", True)
        self.use_cache = names.pop("use_cache", True)
        try:
            config = ModelConfig(**{name: names.pop(name) for name in FIELDS if name in names})
        except TypeError as error:
            raise ValueError(f"SisaConfig must be given ModelConfig's fields: {error}") from error
        for name, value in dataclasses.asdict(config).items():
            setattr(self, name, value)
        super().__init__(**names)
        self.model_config()

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    def model_config(self) -> ModelConfig:
        """The ModelConfig of these fields, as they are now; ValueError for what none can have."""
        return ModelConfig(**{name: getattr(self, name) for name in FIELDS})


class CheckpointedLayer(GradientCheckpointingLayer, Layer):
    """A layer that training may run once more in the backward, as transformers switches it."""


class CheckpointedMamba(GradientCheckpointingLayer, MambaBlock):
    """The same of a Mamba model."""


CHECKPOINTED: dict[type, type] = {Layer: CheckpointedLayer, MambaBlock: CheckpointedMamba}


class SisaPreTrainedModel(NoCodeCopied, PreTrainedModel):
    """What the models share: how they are initialised, saved and loaded.

    A state dict, ``named_parameters`` and the file have the same names. Loading is
    transformers' own, but strict: a folder whose tensors are missing, unknown or misshapen is a
    ValueError. Parameters that the model keeps in fp32 are fp32 whatever ``dtype`` is."""

    config_class = SisaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [layer.__name__ for layer in CHECKPOINTED.values()]  # noqa: RUF012

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what was not loaded, as :func:`sisa_model.build` does: all in one order."""
        for body in [module for module in self.modules() if isinstance(module, SisaModel)]:
            body.draw_missing()
        super().initialize_weights()

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """Refuse a folder of other tensors, which transformers would fill up with new ones."""
        folder = load_config.pretrained_model_name_or_path
        misshapen = {} if load_config.ignore_mismatched_sizes else loading_info.mismatched_keys
        missing = set(loading_info.missing_keys)
        for twin, name in model.all_tied_weights_keys.items():
            if not {twin, name} <= missing:  # one of them is enough
                missing -= {twin, name}
        wrong = [
            *(f"missing {name}" for name in sorted(missing)),
            *(f"unknown {name}" for name in sorted(loading_info.unexpected_keys)),
            *(
                f"{name} is {list(held)}, the model's {list(own)}"
                for name, held, own in sorted(misshapen)
            ),
        ]
        if folder and wrong:
            raise ValueError(
                f"{folder} does not hold this {model.config.family} model: {'; '.join(wrong[:3])}"
            )
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)


class SisaModel(LanguageModel, SisaPreTrainedModel):
    """The embedding and layers of a :class:`LanguageModel`; ``model``: of one to wrap, not copy.

    ``forward`` gives the final normed states [B, L, D]; its arguments are those of
    :class:`SisaForCausalLM` without labels and logits."""

    config: SisaConfig  # type: ignore[assignment]  # which has ModelConfig's fields

    def __init__(self, config: SisaConfig, model: LanguageModel | None = None):
        SisaPreTrainedModel.__init__(self, config)
        body = LanguageModel(config.model_config()) if model is None else model
        self.embed = body.embed
        self.layers = body.layers
        for layer in self.layers:
            layer.__class__ = CHECKPOINTED.get(type(layer), type(layer))
        self.final_norm = body.final_norm
        if not self.embed.weight.is_meta:
            _mark_initialised(self)
        kept = [part.fp32 for part in self.modules() if isinstance(part, Fp32Parameters)]
        self._keep_in_fp32_modules_strict = {name for names in kept for name in names}
        self.post_init()

    def draw_missing(self) -> None:
        """Draw the parameters that are neither loaded nor drawn; the others keep their values."""
        if getattr(self, "_is_hf_initialized", False):
            return
        loaded = {p: p.clone() for p in self.parameters() if hasattr(p, "_is_hf_initialized")}
        if len(loaded) < len(list(self.parameters())):
            self.reset_parameters()
            for parameter, values in loaded.items():
                parameter.copy_(values)
        _mark_initialised(self)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.embed = value
        self.config.vocab_size = value.num_embeddings

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DecodingCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        is_causal: bool | None = None,
        **bounds: Unpack[PackedBounds],
    ) -> BaseModelOutputWithPast:
        self._refuse(output_attentions, is_causal, cache)
        given = self._given(input_ids, inputs_embeds)
        batch, length = given.shape[:2]
        seen = 0 if cache is None else cache.seen
        real = real_tokens(attention_mask, batch, seen, length)
        begins = find_begins((batch, length), position_ids, real, **bounds)
        layout = find_layout(real, begins, joined=self.config.mode == "clamped")
        cu_seqlens = None if layout is None else layout.cu_seqlens
        cache = self._asked_cache(cache, use_cache, cu_seqlens)
        held = None
        if cache is not None:
            held = cache.make(self, batch)
            cache.place(position_ids, real)
        if layout is not None:
            given = layout.pack(given if real is None else blank(given, real))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        inputs: list[Tensor] = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and held is None):
            x = self.states(
                self.embed(given) if inputs_embeds is None else given,
                cu_seqlens,
                held,
                layout.lengths if layout is not None and held is not None else None,
                inputs if output_hidden_states else None,
            )
        if cache is not None:
            cache.advance(length, padded=layout is not None)
        if layout is not None:
            x, *inputs = (layout.unpack(part) for part in (x, *inputs))
        hidden_states = (*inputs, x) if output_hidden_states else None
        return BaseModelOutputWithPast(
            last_hidden_state=x, cache=cache, hidden_states=hidden_states
        )

    def _refuse(self, output_attentions: bool | None, is_causal: bool | None, cache: Any) -> None:
        """Raise ValueError or TypeError, saying what to do, for what this model does not do."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:
            raise ValueError("output_attentions must be False: no layer forms its attentions")
        if is_causal is False:
            raise ValueError("is_causal must be True: every layer is causal")
        if cache is not None and not isinstance(cache, DecodingCache):
            raise TypeError(
                "cache must be a sisa_model.hf.DecodingCache, fresh or as this model returned it, "
                f"got {type(cache).__name__}: pass DecodingCache(), or use_cache=True alone"
            )

    def _given(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The one of both that is given, checked: [B, L], or [B, L, D]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            assert input_ids is not None
            self.check_ids(input_ids)
            given = input_ids
        else:
            given = inputs_embeds
            if given.ndim != 3 or given.shape[2] != self.config.d_model:
                raise ValueError(
                    f"inputs_embeds must be [batch, length, {self.config.d_model}], "
                    f"got {list(given.shape)}"
                )
        if 0 in given.shape:
            raise ValueError(f"the input must have a token in each row, got {list(given.shape)}")
        return given

    def _asked_cache(
        self, cache: DecodingCache | None, use_cache: bool | None, cu_seqlens: Tensor | None
    ) -> DecodingCache | None:
        """The given cache, or a fresh one where ``use_cache`` asks for it, or the config can."""
        if cache is None and use_cache is None:
            able = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            use_cache = self.config.use_cache and able and cu_seqlens is None
            use_cache = use_cache and self.cache_refusal() is None
        if cache is None and not use_cache:
            return None
        if why := self.cache_refusal():
            raise ValueError(f"use_cache must be False for this model: {why}")
        if self.training and torch.is_grad_enabled():
            raise ValueError("use_cache must be False in training: a cache records no gradient")
        if cu_seqlens is not None:
            raise ValueError(
                "use_cache must be False where position_ids restart: the rows of a cache are one "
                "document each"
            )
        return DecodingCache() if cache is None else cache


class SisaForCausalLM(SisaPreTrainedModel, GenerationMixin):
    """A :class:`LanguageModel` of any family in transformers' interface.

    ``model`` is an existing one to wrap, not to copy.

    ``forward`` gives logits [B, L, V] of ``input_ids`` [B, L] or ``inputs_embeds`` [B, L, D] and,
    with ``labels`` [B, L] (shifted inside, -100 ignored) or ``shift_labels``, their cross-entropy;
    with ``num_items_in_batch``, the sum over all tokens divided by it. With
    ``output_hidden_states``, each layer's input and the final normed states.

    Padding by ``attention_mask`` [B, L] may stand on either side: real tokens get what they get
    without it, and padding the logits of the real token before it, so that ``generate`` continues
    right-padded prompts too. ``position_ids`` [B or 1, L] that fall back begin a further document
    of their row, which sees none before it; so do ``cu_seq_lens_q`` and ``seq_idx`` of packing
    collators. Otherwise positions count real tokens: an offset changes nothing, a gap is refused.

    With ``use_cache`` (by default as the config says, where no gradient is recorded and the model
    has one) the output has a :class:`DecodingCache`, to be given as ``cache`` (also called
    ``past_key_values``) with the tokens that follow; the mask then covers what it has seen too. No
    gradient is recorded over a cache.
    ``generate`` goes on past ``max_seq_len``, as a Llama does, and where there can be no cache runs
    all tokens for each new one, and says so once.

    Raises ValueError or TypeError, naming the argument, for attentions, ``is_causal=False``, caches
    of other kinds, ``use_cache=True`` in training, of several documents or where the model has no
    cache, assisted decoding where the cache cannot be cropped, and any argument unknown to it."""

    accepts_loss_kwargs = True
    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config: SisaConfig, model: LanguageModel | None = None):
        super().__init__(config)
        self.model = SisaModel(config, model)
        tied = config.tie_word_embeddings
        device = "meta" if tied else None  # a matrix that is not kept is not made
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False, device=device)
        if tied:
            self.lm_head.weight = self.model.embed.weight
            _mark_initialised(self.lm_head)
        self.post_init()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load ``state_dict``, also one by the names of :func:`sisa_model.save`.

        These a Trainer's checkpoints have that version 0.1 of this package wrote."""
        return super().load_state_dict(with_prefix(state_dict), strict, assign)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head = value

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DecodingCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        states = outputs.last_hidden_state
        logits = self.lm_head(slice_logits_to_keep(states, logits_to_keep))
        if outputs.cache is not None:
            logits = logits.detach()  # the states record no gradient, a part of one would mislead
        loss = None
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        if shift_labels is not None:
            if attention_mask is not None:
                # Padding before a row's first token has that token's logits, which would be trained
                # to repeat it.
                leading = attention_mask.cumsum(1)[:, -states.shape[1] :] == 0
                shift_labels = shift_labels.masked_fill(leading, -100)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels.contiguous(),
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor: Any, model_kwargs: dict) -> None:
        """None: ``forward`` counts real tokens itself, also behind padding on the right."""

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Put a fresh cache into ``model_kwargs``; where there can be none, run without."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "cache_implementation must be None: a DecodingCache grows with its tokens, "
                f"got {generation_config.cache_implementation!r}"
            )
        if model_kwargs.get("cache") is not None or not generation_config.use_cache:
            return
        if why := self.model.cache_refusal():
            say_once(f"generate runs every token again for each new one: {why}")
            generation_config.use_cache = False
            return
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        refusal = self.model.make_cache(1).crop_refusal()
        if refusal and (assisted or generation_config.is_assistant):
            raise ValueError(
                "assistant_model, prompt_lookup_num_tokens and the like must be left out: rejected "
                f"tokens leave the cache, but {refusal}"
            )
        model_kwargs["cache"] = DecodingCache()


def _mark_initialised(module: nn.Module) -> None:
    """Tell transformers that the values of ``module``'s parameters are drawn or loaded."""
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]


AutoConfig.register(MODEL_TYPE, SisaConfig)
AutoModel.register(SisaConfig, SisaModel)
AutoModelForCausalLM.register(SisaConfig, SisaForCausalLM)
