"""The models in Hugging Face transformers, whose Auto classes know model type "sisa".

``import sisa_model.hf`` registers them (extra ``hf``).

One folder serves both libraries: config.json holds ModelConfig's fields, model.safetensors the
names of :func:`sisa_model.save`. ``AutoModelForCausalLM.from_pretrained`` reads what
``sisa_model.save`` wrote, ``sisa_model.load`` what ``save_pretrained`` wrote."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import LoadStateDictInfo, load_state_dict, slice_logits_to_keep
from transformers.utils import can_return_tuple

from sisa_kernels.ops import say_once
from sisa_model.interop.padding import find_padding
from sisa_model.models.checkpoint import MODEL_TYPE, copy_state
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import ModelCache
from sisa_model.models.language_model import LanguageModel

FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


class SisaConfig(PreTrainedConfig):
    """ModelConfig's fields, of every family, as a transformers configuration.

    ``SisaConfig(**dataclasses.asdict(config))`` makes one. Further arguments are PreTrainedConfig's
    (``pad_token_id`` ...). Raises ValueError as ModelConfig does, and for untied embeddings."""

    model_type = MODEL_TYPE
    attribute_map: ClassVar = {
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(self, **kwargs: Any):
        names = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        names.setdefault("tie_word_embeddings", True)
        try:
            config = ModelConfig(**{name: names.pop(name) for name in FIELDS if name in names})
        except TypeError as error:
            raise ValueError(f"SisaConfig must be given ModelConfig's fields: {error}") from error
        for name, value in dataclasses.asdict(config).items():
            setattr(self, name, value)
        super().__init__(**names)
        self.model_config()

    def model_config(self) -> ModelConfig:
        """The ModelConfig of these fields, as they are now; ValueError for what none can have."""
        if not self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be True: the embedding is the output matrix")
        return ModelConfig(**{name: getattr(self, name) for name in FIELDS})


class DecodingCache(Cache):
    """A :class:`ModelCache` for ``generate``, which asks what it has seen and reorders rows."""

    def __init__(self, held: ModelCache):
        super().__init__(layers=[])
        self.held = held
        self.seen = 0
        """Tokens of each row, padding among them."""

    def __len__(self) -> int:
        return len(self.held.layers)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_croppable(self) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        self.held.select(indices.tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.held.lengths)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "this cache cannot be cropped: the running phase before its last tokens is gone"
        )

    def reset(self) -> None:
        raise ValueError("this cache cannot be reset: pass none, and the model makes a new one")


class SisaForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`LanguageModel` of any family in transformers' interface.

    ``model`` is an existing one to wrap, not to copy.

    ``forward`` gives logits [B, L, V] and, with ``labels`` [B, L] (shifted inside, -100 ignored),
    their cross-entropy; with ``num_items_in_batch``, the sum over all tokens divided by it. Padding
    by ``attention_mask`` [B, L] may stand on either side: real tokens get what they get without it,
    and padding the logits of the real token before it, so that ``generate`` continues right-padded
    prompts too. With a cache, the mask covers what it has seen and the new tokens. Positions count
    real tokens.

    Raises ValueError for attentions or hidden states, for ``use_cache=True`` where the model has no
    cache, and as LanguageModel does; ``generate`` then runs all tokens for each new one, and says
    so once. Loading is strict: a folder with missing, unknown or misshapen tensors is a ValueError.
    Parameters that the model keeps in fp32 are fp32 whatever ``dtype`` is."""

    config_class = SisaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True

    def __init__(self, config: SisaConfig, model: LanguageModel | None = None):
        super().__init__(config)
        self.model = LanguageModel(config.model_config()) if model is None else model
        self.gradient_checkpointing = False
        for module in self.model.modules():
            module._is_hf_initialized = True  # LanguageModel drew its values itself
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed = value
        self.config.vocab_size = value.num_embeddings
        self.model.config = self.config.model_config()

    def get_output_embeddings(self) -> None:
        """None: the embedding itself is the output matrix, by construction."""

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable | None = None,
        every_n_layers: int = 1,
    ) -> None:
        rerun = gradient_checkpointing_func or functools.partial(checkpoint, use_reentrant=False)
        for index, layer in enumerate(self.model.layers):
            layer.__dict__.pop("forward", None)
            if enable and index % every_n_layers == 0:
                layer.forward = functools.partial(rerun, layer.forward)
        self.gradient_checkpointing = enable

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: DecodingCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast:
        for name, asked in (
            ("output_attentions", output_attentions),
            ("output_hidden_states", output_hidden_states),
        ):
            if asked:
                raise ValueError(
                    f"{name} must be False: the model keeps neither attentions nor hidden states"
                )
        if cache is not None and not isinstance(cache, DecodingCache):
            raise TypeError(
                "cache must be a DecodingCache that this model returned, "
                f"got {type(cache).__name__}"
            )
        if use_cache and cache is None:
            if why := self.model.cache_refusal():
                raise ValueError(f"use_cache must be False for this model: {why}")
            cache = DecodingCache(self.model.make_cache(len(input_ids)))
        x = self._states(input_ids, attention_mask, cache)
        logits = F.linear(slice_logits_to_keep(x, logits_to_keep), self.model.embed.weight)
        loss = None
        if labels is not None:
            if attention_mask is not None:
                # Padding before a row's first token has that token's logits, which would be trained
                # to repeat it.
                labels = labels.masked_fill(
                    (attention_mask.cumsum(1) <= 1)[:, -labels.shape[1] :], -100
                )
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    def _states(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: DecodingCache | None
    ) -> Tensor:
        """The final states [B, L, D], padding taken out and put back."""
        batch, length = input_ids.shape
        seen = 0 if cache is None else cache.seen
        held = None if cache is None else cache.held
        padding = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, seen + length):
                raise ValueError(
                    f"attention_mask must have shape {[batch, seen + length]}, "
                    f"got {list(attention_mask.shape)}"
                )
            real = attention_mask[:, seen:].bool()
            padding = find_padding(real, seen)
        if padding is None:
            x = self.model.hidden(input_ids, cache=held)
        else:
            ids = padding.pack(input_ids.masked_fill(~real, 0))
            x = padding.unpack(self._padded_states(ids, padding.lengths, held))
        if cache is not None:
            cache.seen += length
        return x

    def _padded_states(self, ids: Tensor, lengths: list[int], held: ModelCache | None) -> Tensor:
        """The final states of rows that are padded on the right."""
        if held is not None:
            return self.model.hidden(ids, cache=held, lengths=lengths)
        if self.config.mode == "clamped":  # whose numerics depend on padding on the right, too
            rows = [self.model.hidden(row[None, :n])[0] for row, n in zip(ids, lengths)]
            return pad_sequence(rows, batch_first=True)
        return self.model.hidden(ids)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """``forward`` makes the cache; where there can be none, run without."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be None, got {generation_config.cache_implementation!r}"
            )
        if generation_config.use_cache and (why := self.model.cache_refusal()):
            say_once(f"generate runs every token again for each new one: {why}")
            generation_config.use_cache = False

    @staticmethod
    def _load_pretrained_model(
        model, state_dict, checkpoint_files, load_config, expected_keys=None
    ):
        """Fill the model, on the meta device in its dtype, strictly from files or a state dict."""
        devices = set((load_config.device_map or {"": "cpu"}).values())
        if len(devices) > 1 or devices & {"disk"} or load_config.hf_quantizer is not None:
            raise ValueError(
                "device_map must name one device, and quantization_config must be None"
            )
        if state_dict is None:
            state_dict = {
                name: x for file in checkpoint_files for name, x in load_state_dict(file).items()
            }
        model.model.to_empty(device=devices.pop())
        copy_state(
            model.model, state_dict, load_config.pretrained_model_name_or_path or "state_dict"
        )
        return LoadStateDictInfo(set(), set(), set(), [], {}, set()), None


def _drop_prefix(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict
) -> None:
    """State dicts have :func:`sisa_model.save`'s names, without the wrapper's "model."."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}model.")]:
        state_dict[prefix + key.removeprefix(f"{prefix}model.")] = state_dict.pop(key)


def _add_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}model.{key.removeprefix(prefix)}"] = state_dict.pop(key)


AutoConfig.register(MODEL_TYPE, SisaConfig)
AutoModelForCausalLM.register(SisaConfig, SisaForCausalLM)
