"""Text from a model: greedy, temperature, top-k and top-p sampling."""

import math

import torch
from torch import Tensor

from .model import LanguageModel


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    """Raise ValueError, naming the argument, for a setting that :func:`generate` cannot sample with."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def filter_logits(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Logits [B, V] with -inf for all but the ``top_k`` largest, and past the smallest set whose probability reaches ``top_p``."""
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, order, ordered.masked_fill(before >= top_p, -math.inf))
    return logits


@torch.no_grad()
def generate(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue ``input_ids`` [B, L] by ``max_new_tokens``: returns [B, L + max_new_tokens]; greedy at temperature 0.

    The whole sequence is run for every token, its last ``max_seq_len`` tokens once it is longer. ``top_k`` and ``top_p`` narrow
    what is sampled; ``generator`` seeds it. Raises ValueError for a bad setting or, through the model, bad ids.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = model(input_ids[:, -model.config.max_seq_len :])[:, -1].float()
            if temperature == 0:
                chosen = logits.argmax(-1, keepdim=True)
            else:
                # Relative to the largest logit: a tiny temperature sends the others to -inf and leaves that one at 0.
                scaled = (logits - logits.amax(-1, keepdim=True)).double() / temperature
                chosen = torch.multinomial(filter_logits(scaled, top_k, top_p).softmax(-1), 1, generator=generator)
            input_ids = torch.cat((input_ids, chosen), 1)
    finally:
        model.train(training)
    return input_ids
