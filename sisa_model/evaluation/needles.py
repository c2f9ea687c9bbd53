"""Needles in a haystack: the paper's test, and a harder one over depth and length.

The haystack is one sentence over and over; a needle hides in it and is asked for at the end. What
is right is read off a forward pass given the answer: each of its tokens the likeliest at its place,
which is what greedy decoding would have written."""

import itertools
import logging
import random
from typing import Any, Literal, get_args

import numpy as np

from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.scoring import Request, Score
from sisa_model.evaluation.statistics import Measurement, measure

log = logging.getLogger(__name__)

NeedleTest = Literal["niah", "niah_long", "needle_grid"]
NEEDLE_TESTS: tuple[str, ...] = get_args(NeedleTest)
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
NIAH_LENGTH = 512
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
        """The needle's tokens, and those that it shares with every other value's: the question.

        So the next token is the value's first whichever way a tokenizer takes the space before
        it."""
        values = [value, *(set(NEEDLES.values()) - {value})]
        needle, *others = (self.encoder.encode_text(f" {phrase} {v}.") for v in values)
        for place, tokens in enumerate(zip(needle, *others)):
            if len(set(tokens)) > 1:
                return needle, needle[:place]
        raise ValueError(f"the tokenizer must tell {' '.join(NEEDLES.values())} apart")

    def context(
        self, length: int, needle: list[int], question: list[int], depth: float
    ) -> list[int]:
        """``length`` tokens: filler with the needle at ``depth``, then the question.

        Depth 0 is the start, 1 the end. Raises ValueError for a length that has no room for the
        needle and the question."""
        room = length - len(needle) - len(question)
        if room < 1:
            least = length - room
            raise ValueError(
                f"length must be above {least} tokens, a needle and its question, got {length}"
            )
        if len(self.filler) < room:
            self.filler = self.encoder.encode_text(FILLER * room)
        place = round(depth * room)
        return self.filler[:place] + needle + self.filler[place:room] + question

    @property
    def grid_least(self) -> int:
        """The least length of :meth:`grid`.

        It holds the phrase twice, a number with its space and stop, and one token of filler."""
        return 2 * len(self.encoder.encode_text(GRID_PHRASE)) + len(" 12345.") + 1

    def paper(self, length: int, seed: int, trials: int) -> list[Request]:
        """The authors' trials: one of five needles at a random depth.

        Scored is the value's first token."""
        rng = random.Random(seed)
        found = []
        for _ in range(trials):
            needle, question = rng.choice(self.needles)
            context = self.context(length, needle, question, rng.random())
            found.append(Request([*context, needle[len(question)]], length))
        return found

    def grid(self, length: int, depth: float, seed: int, trials: int) -> list[Request]:
        """The harder trials: a random number of five digits at ``depth``.

        Scored is every token of it."""
        rng = random.Random(f"{seed} {length} {depth}")
        question = self.encoder.encode_text(GRID_PHRASE)
        found = []
        for _ in range(trials):
            value = f" {10_000 + rng.randrange(GRID_VALUES)}"
            needle = self.encoder.encode_text(f"{GRID_PHRASE}{value}.")
            answer = self.encoder.encode_text(GRID_PHRASE + value)[len(question) :]
            found.append(Request(self.context(length, needle, question, depth) + answer, length))
        return found


class Needles:
    """A needle test's requests, equally many in each cell.

    A cell is a length and a seed; in the grid a length, a depth and a seed."""

    def __init__(self, task: str, cells: dict[tuple, list[Request]]):
        self.task = task
        self.cells = cells
        self.requests = [request for trials in cells.values() for request in trials]

    def measure(self, scores: list[Score]) -> Measurement:
        """The share of needles found, and by each axis of the cells."""
        right = np.array([score.greedy for score in scores])
        by_cell = right.reshape(len(self.cells), -1)
        grid = self.task == "needle_grid"
        details = self._by_depth_and_length(by_cell) if grid else self._by_length_and_seed(by_cell)
        chance = 1 / GRID_VALUES if grid else 1 / len(NEEDLES)
        return measure("accuracy", right.tolist(), chance, details=details)

    def _axis(self, axis: int) -> list:
        return list(dict.fromkeys(cell[axis] for cell in self.cells))

    def _by_length_and_seed(self, right: np.ndarray) -> dict[str, Any]:
        def shares(axis: int) -> dict[str, float]:
            cells = {x: [cell[axis] == x for cell in self.cells] for x in self._axis(axis)}
            return {str(x): right[chosen].mean().item() for x, chosen in cells.items()}

        return {"by_length": shares(0), "by_seed": shares(1)}

    def _by_depth_and_length(self, right: np.ndarray) -> dict[str, Any]:
        lengths, depths, seeds = map(self._axis, range(3))
        cells = right.reshape(len(lengths), len(depths), len(seeds), -1)
        return {
            "lengths": lengths,
            "depths": depths,
            "by_depth_and_length": cells.mean((2, 3)).T.tolist(),
            "by_seed": dict(zip(map(str, seeds), cells.mean((0, 1, 3)).tolist())),
        }


def find_needles(task: str, encoder: Encoder, trained: int, limit: int | None = None) -> Needles:
    """The needle test ``task`` for a model trained on sequences of ``trained`` tokens.

    It has at most ``limit`` trials a cell. Raises ValueError for a grid of which no length has
    room for a needle."""
    haystack = Haystack(encoder)
    if task == "needle_grid":
        trials = min(GRID_TRIALS, limit or GRID_TRIALS)
        cells = itertools.product(_roomy_lengths(haystack, trained), GRID_DEPTHS, SEEDS)
        return Needles(task, {cell: haystack.grid(*cell, trials) for cell in cells})
    lengths = LONG_LENGTHS if task == "niah_long" else (NIAH_LENGTH,)
    trials = min(TRIALS, limit or TRIALS)
    pairs = itertools.product(lengths, SEEDS)
    return Needles(task, {pair: haystack.paper(*pair, trials) for pair in pairs})


def grid_lengths(trained: int) -> list[int]:
    """Lengths from an eighth of the training length to twice it, with room for a needle or not."""
    return [round(share * trained) for share in GRID_SHARES]


def _roomy_lengths(haystack: Haystack, trained: int) -> list[int]:
    """The grid's lengths that have room for a needle and its question."""
    wanted = grid_lengths(trained)
    least = haystack.grid_least
    small = [length for length in wanted if length < least]
    if small:
        log.info(
            f"needle_grid: leaves out lengths of {', '.join(map(str, small))} tokens; "
            f"a needle and its question take {least}"
        )
    if small == wanted:
        raise ValueError(
            f"tasks: needle_grid needs a model trained on {least // 2} tokens or more, "
            f"got {trained}"
        )
    return wanted[len(small) :]
