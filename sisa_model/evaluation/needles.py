"""Needle tests: the authors', and ours, which hide anywhere, reach further and ask for more.

The haystack is one sentence over and over; a needle hides in it and is asked for at the end. What
is right is read off a forward pass given the answer: each of its tokens the likeliest at its place,
which is what greedy decoding would have written."""

import itertools
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np

from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.niah import FILLER, PAIRS, SEEDS, NiahBuilder, Trial
from sisa_model.evaluation.scoring import Request, Score
from sisa_model.evaluation.statistics import Measurement, measure

log = logging.getLogger(__name__)

NeedleTest = Literal["niah", "niah_long", "needle", "needle_long", "needle_grid"]
NEEDLE_TESTS: tuple[str, ...] = get_args(NeedleTest)
PAPER_NEEDLES = ("niah", "niah_long")  # by the authors' builder
TRIALS = 200  # a seed
NIAH_LENGTH = 512
LONG_LENGTHS = (256, 512, 1024, 1536, 2048, 3072)
GRID_PHRASE = " The pass key is"
GRID_VALUES = 90_000  # numbers of five digits
GRID_TRIALS = 10  # a seed and cell
GRID_DEPTHS = tuple(i / 10 for i in range(11))
GRID_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # lengths, of the training length


class Haystack:
    """Makes the trials of our tests with one tokenizer.

    A context of ``length`` tokens is filler cut to what needle and question leave, the needle in
    it, a space before, and the needle's first words again at the end."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.filler: list[int] = []
        self.needles = [self._asked(key, value) for key, value in PAIRS]

    def _asked(self, key: str, value: str) -> tuple[list[int], list[int]]:
        """The needle's tokens, and those that it shares with every other value's: the question.

        So the next token is the value's first whichever way a tokenizer takes the space before
        it."""
        known = [other for _, other in PAIRS]
        values = [value, *(other for other in known if other != value)]
        needle, *others = (self.encoder.encode_text(f" {key} {v}.") for v in values)
        for place, tokens in enumerate(zip(needle, *others)):
            if len(set(tokens)) > 1:
                return needle, needle[:place]
        raise ValueError(f"the tokenizer must tell {' '.join(known)} apart")

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

    def words(self, length: int, seed: int, count: int) -> list[Trial]:
        """One of the authors' five needles at any depth; scored is the value's first token."""
        rng = random.Random(seed)
        found = []
        for _ in range(count):
            needle, question = rng.choice(self.needles)
            depth = rng.random()
            context = self.context(length, needle, question, depth)
            request = Request([*context, needle[len(question)]], length)
            found.append(Trial(request, length, depth, seed))
        return found

    def grid(self, length: int, depth: float, seed: int, count: int) -> list[Trial]:
        """A random number of five digits at ``depth``; scored is every token of it."""
        rng = random.Random(f"{seed} {length} {depth}")
        question = self.encoder.encode_text(GRID_PHRASE)
        found = []
        for _ in range(count):
            value = f" {10_000 + rng.randrange(GRID_VALUES)}"
            needle = self.encoder.encode_text(f"{GRID_PHRASE}{value}.")
            answer = self.encoder.encode_text(GRID_PHRASE + value)[len(question) :]
            context = self.context(length, needle, question, depth)
            found.append(Trial(Request(context + answer, length), length, depth, seed))
        return found


class Needles:
    """A needle test's trials, and what is made of their scores."""

    def __init__(self, task: str, trials: list[Trial], chance: float):
        self.task = task
        self.trials = trials
        self.chance = chance
        self.requests = [trial.request for trial in trials]

    def named_requests(self) -> Iterator[tuple[int, int, Request]]:
        """Each request behind its trial's number; the one answer is number 0."""
        for number, request in enumerate(self.requests):
            yield number, 0, request

    def measure(self, scores: list[Score]) -> list[Measurement]:
        """The share of needles found: of all, then of several lengths each, and of each depth."""
        right = [score.greedy for score in scores]
        lengths = self._groups(right, lambda trial: trial.length)
        depths = self._groups(right, self._depth)
        seeds = self._groups(right, lambda trial: trial.seed)
        details: dict[str, Any] = {}
        for name, group in (("length", lengths), ("depth", depths), ("seed", seeds)):
            details[f"by_{name}"] = {str(x): float(np.mean(found)) for x, found in group.items()}
            details[f"count_by_{name}"] = {str(x): len(found) for x, found in group.items()}
        if self.task == "niah_long":
            prompts = self._groups([x.start for x in self.requests], lambda trial: trial.length)
            details["tokens_by_length"] = {
                str(length): [min(found), max(found)] for length, found in prompts.items()
            }
        if self.task == "needle_grid":
            details |= self._cells(right)
        whole = measure("accuracy", right, self.chance, details=details)
        if len(lengths) == 1:
            return [whole]
        parts = {f"at {length:,} tokens": found for length, found in lengths.items()}
        parts |= {f"at depth {depth}": found for depth, found in depths.items()}
        return [whole, *(measure(name, found, self.chance) for name, found in parts.items())]

    def _depth(self, trial: Trial) -> float:
        """The depth that a trial counts under: the grid's own, else the tenth that it begins."""
        return trial.depth if self.task == "needle_grid" else int(10 * trial.depth) / 10

    def _groups(self, values: list[Any], key: Callable[[Trial], Any]) -> dict[Any, list[Any]]:
        """The trials' ``values`` by the ``key`` of each, in rising order."""
        found: dict[Any, list[Any]] = {}
        for trial, value in zip(self.trials, values):
            found.setdefault(key(trial), []).append(value)
        return dict(sorted(found.items()))

    def _cells(self, right: list[bool]) -> dict[str, Any]:
        """The share of each depth and length."""
        cells = self._groups(right, lambda trial: (trial.depth, trial.length))
        depths, lengths = (sorted(set(axis)) for axis in zip(*cells))
        return {
            "lengths": lengths,
            "depths": depths,
            "trials_a_cell": len(right) // len(cells),
            "by_depth_and_length": [
                [float(np.mean(cells[depth, length])) for length in lengths] for depth in depths
            ],
        }


def find_needles(task: str, encoder: Encoder, trained: int, limit: int | None = None) -> Needles:
    """The needle test ``task`` for a model trained on sequences of ``trained`` tokens.

    It has at most ``limit`` trials a seed (and cell). Raises ValueError for a grid of which no
    length has room for a needle."""
    if task == "needle_grid":
        return Needles(task, _grid(Haystack(encoder), trained, limit), 1 / GRID_VALUES)
    count = min(TRIALS, limit or TRIALS)
    lengths = LONG_LENGTHS if task in ("niah_long", "needle_long") else (NIAH_LENGTH,)
    if task in PAPER_NEEDLES:
        builder = NiahBuilder(encoder)
        make = builder.trials
        chance = builder.chance
        if chance == 1:
            log.warning(
                f"{task}: this tokenizer begins every value with the same token, which is all that "
                "the authors ask for; needle asks for the first that differs"
            )
    else:
        make = Haystack(encoder).words
        chance = 1 / len(PAIRS)
    trials = [trial for pair in itertools.product(lengths, SEEDS) for trial in make(*pair, count)]
    return Needles(task, trials, chance)


def _grid(haystack: Haystack, trained: int, limit: int | None) -> list[Trial]:
    count = min(GRID_TRIALS, limit or GRID_TRIALS)
    cells = itertools.product(_roomy_lengths(haystack, trained), GRID_DEPTHS, SEEDS)
    return [trial for cell in cells for trial in haystack.grid(*cell, count)]


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
