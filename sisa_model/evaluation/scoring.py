"""Log-likelihoods of many token sequences, batched by length, logits only where scored."""

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sisa_model.models.language_model import LanguageModel

# fp32; bf16 autocast over fp32 weights, logits in fp32; weights and logits in bf16 as well.
ScoringPrecision = Literal["fp32", "bf16", "bf16-pure"]
LOGITS = 2**25  # of them in memory at a time: 128 MiB in fp32


class Request(NamedTuple):
    """A sequence of tokens; those from ``start`` (at least 1) on are scored, given all before."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Score:
    """What the model makes of a request's scored tokens."""

    total: float
    """Their log-likelihood, summed, in nats."""
    tokens: int
    greedy: bool
    """Each is the likeliest token at its place, so greedy decoding would have written them."""

    @property
    def mean(self) -> float:
        """Log-likelihood a token."""
        return self.total / self.tokens


class Scorer:
    """Scores requests in batches of at most ``batch_tokens`` tokens, or of one request.

    Batches are padded on the right. A causal model's real positions do not see what follows
    them, so a batch's result is that of one request at a time; not so in "clamped" mode, whose
    offset is taken over the whole sequence: there a batch holds requests of one length. Hidden
    states are made in ``precision``, logits in the weights' dtype: bf16-pure, as the authors
    evaluate, is of a model whose weights are bf16, and its logits tie."""

    def __init__(
        self, model: LanguageModel, batch_tokens: int, precision: ScoringPrecision = "fp32"
    ):
        self.model = model.eval()
        self.batch_tokens = batch_tokens
        self.device = model.embed.weight.device
        self.precision = precision
        in_bf16 = precision != "fp32"
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=in_bf16)

    def of(self, model: LanguageModel) -> "Scorer":
        """A scorer of another model on the same device, with the same settings."""
        other = copy.copy(self)
        other.model = model.eval()
        return other

    def check(self, requests: list[Request], name: str) -> None:
        """Raise ValueError, before any work, for a request that cannot be scored.

        It has no token to score, or more than the model has positions."""
        limit = self.model.config.max_seq_len
        for number, (ids, start) in enumerate(requests):
            if not 1 <= start < len(ids):
                raise ValueError(
                    f"{name}: sequence {number} has no token to score after its first {start} "
                    f"of {len(ids)}"
                )
            if len(ids) - 1 > limit:
                raise ValueError(
                    f"{name}: sequence {number} takes {len(ids) - 1} positions, and the model has "
                    f"{limit} (max_seq_len); --max-seq-len allows more, past what it was trained on"
                )

    def batches(self, requests: list[Request]) -> list[list[int]]:
        """Which requests go together, the longest first.

        So a batch too large for memory fails at once."""
        lengths = [len(ids) - 1 for ids, _ in requests]
        clamped = self.model.config.mode == "clamped"
        found: list[list[int]] = []
        for number in sorted(range(len(requests)), key=lambda number: -lengths[number]):
            longest = lengths[found[-1][0]] if found else 0
            full = not found or (len(found[-1]) + 1) * longest > self.batch_tokens
            if full or (clamped and lengths[number] != longest):
                found.append([])
            found[-1].append(number)
        return found

    @torch.inference_mode()
    def __call__(self, requests: list[Request], name: str = "requests") -> list[Score]:
        """The scores of ``requests`` in their order; raises as :meth:`check` does."""
        self.check(requests, name)
        scores: dict[int, Score] = {}
        on_terminals = {"dynamic_ncols": True, "leave": False, "disable": None}
        with tqdm(total=len(requests), desc=name, **on_terminals) as bar:
            for batch in self.batches(requests):
                scores.update(zip(batch, self._score([requests[number] for number in batch])))
                bar.update(len(batch))
        return [scores[number] for number in range(len(requests))]

    def _score(self, batch: list[Request]) -> list[Score]:
        inputs = torch.zeros(len(batch), len(batch[0].ids) - 1, dtype=torch.int64)
        for row, (ids, _) in enumerate(batch):
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        with self.autocast:
            hidden = self.model.hidden(inputs.to(self.device))
        counts = [len(ids) - start for ids, start in batch]
        rows = np.repeat(np.arange(len(batch)), counts)
        columns = np.concatenate([np.arange(start - 1, len(ids) - 1) for ids, start in batch])
        scored = [token for ids, start in batch for token in ids[start:]]
        targets = torch.tensor(scored, device=self.device)
        weight = self.model.embed.weight
        states = hidden[torch.from_numpy(rows), torch.from_numpy(columns)].to(weight.dtype)
        size = max(1, LOGITS // self.model.config.vocab_size)
        pieces = map(self._token_scores, states.split(size), targets.split(size))
        losses, right = (torch.cat(x).cpu().split(counts) for x in zip(*pieces))
        return [
            Score(-x.sum().item(), count, bool(y.all()))
            for x, y, count in zip(losses, right, counts)
        ]

    def _token_scores(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss in fp64 and whether the target is the argmax, of states [N, D] and targets [N]."""
        logits = F.linear(states, self.model.embed.weight).float()
        losses = F.cross_entropy(logits, targets, reduction="none").double()
        return losses, logits.argmax(-1) == targets
