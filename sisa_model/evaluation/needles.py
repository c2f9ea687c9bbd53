"""Needles in a haystack: the paper's test as its authors run it, and a harder one over depth and
length.

The haystack is one sentence over and over; a needle hides in it and is asked for at the end. What
is right is read off a forward pass given the answer: each of its tokens the likeliest at its place,
which is what greedy decoding would have written."""

import random

from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.benchmarks import encode
from sisa_model.evaluation.scoring import Request

SEEDS = (42, 123, 456, 789, 1024)
FILLER = "The quick brown fox jumps over the lazy dog. "
NEEDLES = {
    "The secret code is": "ALPHA",
    "The password is": "BRAVO",
    "The answer is": "CHARLIE",
    "The key number is": "DELTA",
    "The magic word is": "ECHO",
}
TRIALS = 200  # a seed
LENGTH = 512
LONG_LENGTHS = (256, 512, 1024, 1536, 2048, 3072)
GRID_PHRASE = " The pass key is"
GRID_VALUES = 90_000  # numbers of five digits
GRID_TRIALS = 10  # a seed and cell
GRID_DEPTHS = tuple(i / 10 for i in range(11))
GRID_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # lengths, of the training length


class Haystack:
    """Makes the requests with one tokenizer.

    The authors publish the filler, the needles and the rule. Here a context of ``length`` tokens is
    filler cut to what needle and question leave, the needle after a uniformly drawn number of its
    tokens, and the needle's first words again at the end."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.filler: list[int] = []
        self.needles = [self._asked(phrase, value) for phrase, value in NEEDLES.items()]

    def _asked(self, phrase: str, value: str) -> tuple[list[int], list[int]]:
        """The needle's tokens, and those of them that it shares with every other value: where the
        question ends.

        So the next token is the value's first whichever way a tokenizer takes the space before it.
        """
        needle, *others = (
            encode(self.encoder, f" {phrase} {v}.")
            for v in (value, *(set(NEEDLES.values()) - {value}))
        )
        shared = next(
            (i for i, tokens in enumerate(zip(needle, *others)) if len(set(tokens)) > 1), None
        )
        if shared is None:
            raise ValueError(f"the tokenizer must tell {' '.join(NEEDLES.values())} apart")
        return needle, needle[:shared]

    def context(
        self, length: int, needle: list[int], question: list[int], depth: float
    ) -> list[int]:
        """``length`` tokens: the needle at ``depth`` (0 the start, 1 the end) of the filler, then
        the question.

        Raises ValueError for a length that has no room for the needle and the question.
        """
        room = length - len(needle) - len(question)
        if room < 1:
            raise ValueError(
                f"length must be above {length - room} tokens, a needle and its question, got {length}"
            )
        if len(self.filler) < room:
            self.filler = encode(self.encoder, FILLER * room)
        place = round(depth * room)
        return self.filler[:place] + needle + self.filler[place:room] + question

    @property
    def grid_least(self) -> int:
        """The least length of :meth:`grid`: the phrase twice, a number with its space and stop, and
        one token of filler.
        """
        return 2 * len(encode(self.encoder, GRID_PHRASE)) + len(" 12345.") + 1

    def paper(self, length: int, seed: int, trials: int) -> list[Request]:
        """The authors' trials: one of five needles at a random depth; the value's first token is
        scored.
        """
        rng, found = random.Random(seed), []
        for _ in range(trials):
            needle, question = rng.choice(self.needles)
            context = self.context(length, needle, question, rng.random())
            found.append(Request([*context, needle[len(question)]], length))
        return found

    def grid(self, length: int, depth: float, seed: int, trials: int) -> list[Request]:
        """The harder trials: a random number of five digits at ``depth``; every token of it is
        scored.
        """
        rng, found = random.Random(f"{seed} {length} {depth}"), []
        question = encode(self.encoder, GRID_PHRASE)
        for _ in range(trials):
            value = f" {10_000 + rng.randrange(GRID_VALUES)}"
            needle = encode(self.encoder, f"{GRID_PHRASE}{value}.")
            answer = encode(self.encoder, GRID_PHRASE + value)[len(question) :]
            found.append(Request(self.context(length, needle, question, depth) + answer, length))
        return found


def grid_lengths(trained: int) -> list[int]:
    """Lengths from an eighth of the training length to twice it, with or without room for a needle."""
    return [round(share * trained) for share in GRID_SHARES]
