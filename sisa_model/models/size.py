"""How large a model is: parameters, FLOPs a token, and the memory of training and decoding."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sisa_kernels import TokenCache
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import Context, rotary_tables
from sisa_model.models.flops import forward_flops, training_flops
from sisa_model.models.hybrid import HeadCaches
from sisa_model.models.language_model import LanguageModel, count_parameters
from sisa_model.models.mamba import StateCache

FP32 = 4  # bytes
PROBE = 128  # tokens that a layer is run on


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a model costs; memory in bytes."""

    parameters: int
    forward_flops: float
    """Of a token in a sequence of the given length."""
    training_flops: float
    """The same, forward and backward."""
    weights: int
    """In fp32; their gradients take as much, AdamW's two moments twice that."""
    activations: int
    """What the layers keep of one training sequence for its backward, in fp32 on the CPU's paths;
    without the loss, of which at most 128 MiB of logits exist at a time."""
    activations_bf16: int
    """The same under bf16 autocast."""
    cache_per_token: int | None
    """What decoding in fp32 keeps of each token; None where there is no cache."""
    cache_per_sequence: int | None
    """What decoding in fp32 keeps of a sequence of any length: Mamba's states."""


def model_size(config: ModelConfig, seq_len: int) -> ModelSize:
    """The :class:`ModelSize` of a model, trained on sequences of ``seq_len`` tokens.

    Activations are counted in one layer of each kind, run on a few tokens. Raises ValueError for a
    ``seq_len`` below 1."""
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    with torch.device("meta"):
        model = LanguageModel(config)
    parameters = count_parameters(model)
    cache = _cache_bytes(model)
    return ModelSize(
        parameters=parameters,
        forward_flops=forward_flops(config, seq_len),
        training_flops=training_flops(config, seq_len),
        weights=FP32 * parameters,
        activations=_activation_bytes(model, seq_len, autocast=False),
        activations_bf16=_activation_bytes(model, seq_len, autocast=True),
        cache_per_token=None if cache is None else cache[0],
        cache_per_sequence=None if cache is None else cache[1],
    )


def _activation_bytes(model: LanguageModel, seq_len: int, autocast: bool) -> int:
    """Bytes that the layers of a meta ``model`` save of one more sequence for its backward."""
    config = model.config
    cpu = torch.device("cpu")
    context = Context(rotary_tables(PROBE, config.head_dim, cpu))
    total = 0
    for kind in set(config.layer_kinds):
        layer = copy.deepcopy(model.layers[config.layer_kinds.index(kind)]).to_empty(device=cpu)
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            one, two = (
                _saved_bytes(layer, torch.zeros(batch, PROBE, config.d_model), context)
                for batch in (1, 2)
            )
        # The difference leaves out what there is once for all: copies of weights, masks.
        total += config.layer_kinds.count(kind) * (two - one)
    return total * seq_len // PROBE


def _saved_bytes(layer: nn.Module, x: Tensor, context: Context) -> int:
    """Bytes of all that ``layer`` saves for its backward, each memory counted once."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x.requires_grad_(), context)
    return sum(storage.nbytes() for storage in saved.values())


@torch.no_grad()
def _cache_bytes(model: LanguageModel) -> tuple[int, int] | None:
    """Bytes that a meta ``model``'s caches hold a token and a sequence; None where it has none."""
    if model.cache_refusal() is not None:
        return None
    cache = model.make_cache(1)
    model(torch.zeros(1, 1, dtype=torch.int64, device="meta"), cache=cache)
    held = [_layer_cache_bytes(layer) for layer in cache.layers]
    return sum(token for token, _ in held), sum(sequence for _, sequence in held)


def _layer_cache_bytes(cache: TokenCache | StateCache | HeadCaches) -> tuple[int, int]:
    if isinstance(cache, HeadCaches):
        attn = _layer_cache_bytes(cache.attn)
        ssd = _layer_cache_bytes(cache.ssd)
        return attn[0] + ssd[0], attn[1] + ssd[1]
    if isinstance(cache, StateCache):
        return 0, sum(x.nbytes for x in cache.state.values())
    return sum(x.nbytes // x.shape[2] for x in cache.buffers.values()), 0
