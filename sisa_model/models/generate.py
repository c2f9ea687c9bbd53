"""Text from a model: greedy, temperature, top-k and top-p sampling."""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from sisa_kernels.cache import check_lengths
from sisa_model.models.context import ModelCache
from sisa_model.models.language_model import LanguageModel


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    """Raise ValueError, naming the argument, for what :func:`generate` cannot sample with."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def filter_logits(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Logits [B, V] with -inf for all that ``top_k`` and ``top_p`` leave out.

    The one keeps the k largest, the other the smallest set whose probability reaches p."""
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = torch.full_like(logits, -math.inf).scatter(
            -1, order, ordered.masked_fill(before >= top_p, -math.inf)
        )
    return logits


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The next token of each row, [B, 1], from logits [B, V] fp32; the largest at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # Relative to the largest logit: a tiny temperature sends the others to -inf and leaves that one
    # at 0.
    scaled = (logits - logits.amax(-1, keepdim=True)).double() / temperature
    probabilities = filter_logits(scaled, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)


def last_tokens(input_ids: Tensor, lengths: list[int]) -> Tensor:
    """Each row's last ``lengths[r]`` tokens, [B, max(lengths)], filled up with its last one."""
    length = input_ids.shape[1]
    first = torch.tensor([[length - n] for n in lengths], device=input_ids.device)
    places = first + torch.arange(max(lengths), device=input_ids.device)
    return input_ids.gather(1, places.clamp(max=length - 1))


def _check_tokens(model: LanguageModel, input_ids: Tensor, stop: Collection[int]) -> None:
    if bad := [i for i in stop if not 0 <= i < model.config.vocab_size]:
        raise ValueError(
            f"stop must hold token ids in [0, {model.config.vocab_size}), got {bad[0]}"
        )
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            "input_ids must be [batch, length] with at least one token a row, "
            f"got {list(input_ids.shape)}"
        )


@torch.no_grad()
def generate(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    use_cache: bool = True,
    *,
    prompt_lengths: list[int] | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue ``input_ids`` [B, L] int64: [B, L + max_new_tokens]; greedy at temperature 0.

    Prompts of unequal length are padded on the left, with any token: row r's prompt is its last
    ``prompt_lengths[r]`` tokens (B Python ints), and it is continued as it would be alone.
    ``top_k`` and ``top_p`` narrow what is sampled; ``generator`` seeds it.
    A row ends with its first token of ``stop``, which then fills it up; once every row has ended,
    so does the text, which may have fewer than ``max_new_tokens`` new tokens. ``on_token`` is
    called with each new token [B] int64, as soon as it is chosen.

    With ``use_cache`` the prompt is run once and then each token alone; without, all tokens are run
    again for each, with the same result up to rounding. Once a row is longer than ``max_seq_len``,
    the model sees its last ``max_seq_len`` tokens: their states and positions change with every
    token, so that from there on all of them are run for each, with a cache or without.

    Raises ValueError for a bad setting, for ``use_cache`` where the model cannot
    (:meth:`LanguageModel.cache_refusal`; mode "clamped") or, through the model, for bad ids."""
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    _check_tokens(model, input_ids, stop)
    batch, length = input_ids.shape
    if prompt_lengths is not None:
        check_lengths(prompt_lengths, [0] * batch, length, "prompt_lengths")
    if use_cache and (why := model.cache_refusal()):
        raise ValueError(f"use_cache must be False for this model: {why}")
    lengths = list(prompt_lengths or [length] * batch)
    ends = torch.tensor([*stop], dtype=torch.int64, device=input_ids.device)
    ended = torch.zeros(batch, 1, dtype=torch.bool, device=input_ids.device)
    cache = model.make_cache(batch) if use_cache else None
    training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            states = _last_states(model, input_ids, lengths, cache, prompt_lengths)
            logits = model.logits(states).float()
            chosen = choose(logits, temperature, top_k, top_p, generator)
            chosen = torch.where(ended, input_ids[:, -1:], chosen)
            if on_token is not None:
                on_token(chosen[:, 0])
            input_ids = torch.cat((input_ids, chosen), 1)
            lengths = [n + 1 for n in lengths]
            if stop:
                ended |= torch.isin(chosen, ends)
                if ended.all():
                    break
    finally:
        model.train(training)
    return input_ids


def _last_states(
    model: LanguageModel,
    input_ids: Tensor,
    lengths: list[int],
    cache: ModelCache | None,
    prompt_lengths: list[int] | None,
) -> Tensor:
    """The states [B, D] of each row's last token, of the ``lengths[r]`` that are its own.

    Over the cache as long as no row is longer than ``max_seq_len``."""
    seen = [min(n, model.config.max_seq_len) for n in lengths]
    if cache is None or seen != lengths:
        states = model.hidden(last_tokens(input_ids, seen))
    elif not any(cache.lengths):
        states = model.hidden(last_tokens(input_ids, seen), cache=cache, lengths=prompt_lengths)
    else:
        states = model.hidden(input_ids[:, -1:], cache=cache)
        seen = [1] * len(seen)
    rows = torch.arange(len(seen), device=states.device)
    return states[rows, torch.tensor(seen, device=states.device) - 1]
