"""Blocks: tokens cut to training's length, in an order that is a function of the seed alone."""

import numpy as np
import torch
from torch import Tensor

from sisa_model.data.shards import Tokens
from sisa_model.data.shuffle import shuffled

IGNORE = -100  # targets of positions that are not scored


class Blocks:
    """Blocks of ``seq_len`` tokens and their successors, shuffled anew each epoch.

    A block spans documents joined by their end-of-text tokens. There is no state of a loader to
    save: sample n of a run is arithmetic on (seed, n), whoever asks and whatever was read before,
    so a run resumes on the exact sample from its step alone. Raises ValueError if ``tokens`` is
    shorter than one block."""

    def __init__(self, tokens: np.ndarray | Tokens, seq_len: int, seed: int, name: str):
        self.count = (len(tokens) - 1) // seq_len
        if self.count < 1:
            raise ValueError(
                f"the {name} corpus must hold at least one block of {seq_len + 1} tokens, "
                f"got {len(tokens)}"
            )
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed

    def ids(self, first: int, count: int) -> list[int]:
        """Which blocks are the samples ``first`` to ``first + count`` of the run."""
        found: list[int] = []
        while len(found) < count:
            epoch, place = divmod(first + len(found), self.count)
            places = np.arange(place, min(place + count - len(found), self.count))
            found += shuffled(places, self.count, [self.seed, epoch]).tolist()
        return found

    def take(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of blocks, each [len(ids), seq_len] int64.

        Raises FileNotFoundError or ValueError, naming the shard, for one that vanished or was cut
        since it was opened."""
        starts = (i * self.seq_len for i in ids)
        windows = [self.tokens[start : start + self.seq_len + 1] for start in starts]
        tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]


def pack(inputs: Tensor, targets: Tensor, end_of_text: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks [n, L] as one sequence of documents: inputs, targets and cu_seqlens.

    The first two are [1, n * L] int64, the last int32. The end-of-text token of a document opens
    the next one, as it opens a text that is generated: the first token of a document is
    predicted from it alone, the last predicts the next. Blocks are cut apart too."""
    opens = inputs == end_of_text
    opens[:, 0] = True
    bounds = [opens.flatten().nonzero()[:, 0], torch.tensor([opens.numel()], device=inputs.device)]
    return inputs.reshape(1, -1), targets.reshape(1, -1), torch.cat(bounds).int()
