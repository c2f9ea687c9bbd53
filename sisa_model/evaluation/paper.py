"""The protocol of the paper's authors: what each benchmark asks, token for token, and its score."""

import logging
from collections.abc import Iterator

import numpy as np

from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.benchmarks import Row, chance
from sisa_model.evaluation.scoring import Request, Score
from sisa_model.evaluation.statistics import Measurement, measure

log = logging.getLogger(__name__)

TOKENS = 2048  # of a request at most: what is longer loses its beginning
ARC_KEYS = 4  # A to D or 1 to 4; an example with another key is not scored


class PaperBenchmark:
    """A benchmark's examples as the authors ask and score them, one request an answer.

    ``rows`` are examples by their number in the file, without those that are not scored."""

    def __init__(self, task: str, rows: list[Row], encoder: Encoder):
        self.task = task
        self.rows = {number: row for number, row in enumerate(rows) if _is_scored(task, row)}
        self.options = [paper_requests(task, row, encoder) for row in self.rows.values()]
        if len(self.rows) < len(rows):
            log.info(
                f"{task}: {len(rows) - len(self.rows)} of {len(rows):,} examples not scored, "
                "whose key is none of A to D and 1 to 4"
            )

    @property
    def requests(self) -> list[Request]:
        """All requests, an example's answers in a row."""
        return [request for options in self.options for request in options]

    def named_requests(self) -> Iterator[tuple[int, int, Request]]:
        """Each request behind its example's number in the file and the number of its answer."""
        for number, options in zip(self.rows, self.options):
            for choice, request in enumerate(options):
                yield number, choice, request

    def measure(self, scores: list[Score]) -> list[Measurement]:
        """The accuracy, of the scores of :attr:`requests`."""
        left = iter(scores)
        right = [
            _is_right(self.task, row, options, [next(left) for _ in options])
            for row, options in zip(self.rows.values(), self.options)
        ]
        return [measure("accuracy", right, chance(self.task, list(self.rows.values())))]


def _is_scored(task: str, row: Row) -> bool:
    return task != "arc_easy" or row["label"] < ARC_KEYS


def paper_requests(task: str, row: Row, encoder: Encoder) -> list[Request]:
    """A request an answer, in the order of the answers.

    Context and continuation are tokenised apart, and the continuation's tokens are scored: LAMBADA,
    " " and the word after the text's last space; HellaSwag, each ending as it is after ``ctx`` as
    it is; ARC-Easy, " " and each choice after the bare question. WinoGrande: the sentence with each
    option in the blank, from its second token on."""
    if task == "winogrande":
        sentences = [row["sentence"].replace("_", row[name]) for name in ("option1", "option2")]
        return [Request(encoder.encode_text(text)[-TOKENS:], 1) for text in sentences]
    if task in ("lambada", "lambada_openai"):
        context, _, word = row["text"].rpartition(" ")
        continuations = [f" {word}"]
    elif task == "hellaswag":
        context = row["ctx"]
        continuations = row["endings"]
    else:
        context = row["question"]
        continuations = [f" {choice}" for choice in row["choices"]]
    before = encoder.encode_text(context)
    return [join(before, encoder.encode_text(text)) for text in continuations]


def join(context: list[int], continuation: list[int]) -> Request:
    """The tokens of both, cut on the left to :data:`TOKENS`, scored from the continuation on.

    The first token of all, which nothing predicts, is never scored."""
    ids = (context + continuation)[-TOKENS:]
    return Request(ids, max(1, len(ids) - len(continuation)))


def _is_right(task: str, row: Row, options: list[Request], scores: list[Score]) -> bool:
    """Whether the scores of ``options`` answer ``row``.

    LAMBADA: every token of the word by argmax. Else the first of the greatest log-likelihoods a
    scored token; WinoGrande's is a token of the whole sentence, the first one counted."""
    if task in ("lambada", "lambada_openai"):
        return scores[0].greedy
    if task == "winogrande":
        values = [score.total / len(request.ids) for score, request in zip(scores, options)]
    else:
        values = [score.mean for score in scores]
    return int(np.argmax(values)) == row["label"]
