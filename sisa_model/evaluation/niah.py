"""The authors' needle test, token for token: five needles in one sentence over and over.

Its prompts are 10 tokens shorter than their nominal length, and the needle is always in the first
half: the filler starts again after it. The filler is never longer than 501 tokens (GPT-NeoX), so
prompts of a nominal length above about 1,000 vary in length: "2,048" is 519 to 1,013. By that
builder no prompt is longer; the script of the paper's figures by length is not published."""

import random
from typing import NamedTuple

from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.scoring import Request

SEEDS = (42, 123, 456, 789, 1024)
FILLER = "The quick brown fox jumps over the lazy dog. "
REPEATS = 50  # of the filler's sentence
PAIRS = (
    ("The secret code is", "ALPHA"),
    ("The password is", "BRAVO"),
    ("The answer is", "CHARLIE"),
    ("The key number is", "DELTA"),
    ("The magic word is", "ECHO"),
)
MARGIN = 10  # tokens of the nominal length that stay unused
FIRST_PLACE = 5


class Trial(NamedTuple):
    """A prompt with a needle in it, and what it is counted under."""

    request: Request
    length: int
    """Tokens asked for."""
    depth: float
    """Share of the filler that is before the needle."""
    seed: int


class NiahBuilder:
    """Makes the authors' trials with one tokenizer."""

    def __init__(self, encoder: Encoder):
        self.filler = encoder.encode_text(FILLER * REPEATS)
        self.parts = [
            (
                encoder.encode_text(f"{key} {value}."),
                encoder.encode_text(f" {key}"),
                encoder.encode_text(f" {value}")[0],
            )
            for key, value in PAIRS
        ]

    @property
    def chance(self) -> float:
        """What guessing gives: 1 where a tokenizer begins every value alike, bytes by the space."""
        return 1 / len({answer for _, _, answer in self.parts})

    def trials(self, length: int, seed: int, count: int) -> list[Trial]:
        """``count`` trials of nominal ``length``, drawn with Python's ``random`` from ``seed``.

        Scored is the value's first token, after the question. Raises ValueError for a length that
        has no room."""
        rng = random.Random(seed)
        return [self._trial(length, seed, rng) for _ in range(count)]

    def _trial(self, length: int, seed: int, rng: random.Random) -> Trial:
        needle, question, answer = rng.choice(self.parts)
        room = length - len(needle) - len(question) - MARGIN
        if room < 2 * FIRST_PLACE:
            least = length - room + 2 * FIRST_PLACE
            raise ValueError(f"length must be at least {least} tokens for a needle, got {length}")
        place = rng.randint(FIRST_PLACE, room // 2)
        before = self.filler[:place]
        after = self.filler[: room - place]
        prompt = before + needle + after + question
        depth = len(before) / (len(before) + len(after))
        return Trial(Request([*prompt, answer], len(prompt)), length, depth, seed)
