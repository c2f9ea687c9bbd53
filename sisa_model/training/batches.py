"""What each step trains on: blocks of text or of a task, this process's share, micro-batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_model.data.blocks import IGNORE, Blocks, pack
from sisa_model.data.corpus import open_data
from sisa_model.data.ngrams import ngram_losses
from sisa_model.data.synthetic import (
    LENGTHS,
    TASK_EXAM,
    TASK_EXAM_SEED,
    TASKS,
    Sample,
    TaskBlocks,
    exam_name,
    exams,
    find_task,
)
from sisa_model.data.tokenizer import Encoder
from sisa_model.runs.config import ResolvedConfig
from sisa_model.training.loss import Piece
from sisa_model.training.parallel import World

MIX_BATCH = 16  # sequences a step of each retrieval task in the mix
MIX_EXAM = 256  # sequences a retrieval accuracy is measured on: 256 needles, about 7,000 recalls
EXAM_SEED = 10**9  # of retrieval tasks; training's seeds begin with the run's own


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is evaluated on: text, or a task in its place."""

    blocks: Blocks | TaskBlocks
    val_inputs: Tensor
    """Held-out inputs [B, L] int64."""
    val_targets: Tensor
    """Their targets [B, L] int64."""
    exams: dict[str, Sample]
    """What accuracies are measured on, by name: the same for every evaluation and every model."""
    about: str
    """How much there is and how it was split, in words."""
    sha256: str
    """Of its tokens and of how they are split."""
    text: np.ndarray
    """Training tokens that n-grams are counted on and needles hidden in, int32; none for a task."""

    def held_out(self) -> np.ndarray:
        """The held-out blocks of text with the token after each, [N, L + 1] int32; none of a task.

        A target that counts for nothing is -100."""
        if not len(self.text):
            return np.empty((0, 0), np.int32)
        blocks = torch.cat((self.val_inputs, self.val_targets[:, -1:]), 1)
        return blocks.numpy().astype(np.int32)

    def ngram_losses(self, vocab_size: int) -> tuple[float, float]:
        """Held-out loss of a unigram and a bigram model, nats a token; nan for a task."""
        if not len(self.text):
            return float("nan"), float("nan")
        targets = self.val_targets.numpy().ravel()
        contexts = self.val_inputs.numpy().ravel()
        return ngram_losses(self.text, targets, contexts, vocab_size)


def open_run_data(config: ResolvedConfig, encoder: Encoder, top: int, world: World) -> RunData:
    """The data of a run; ``top`` is the vocabulary's last token.

    Raises as :func:`sisa_model.data.corpus.open_data` does."""
    if config.task != "text":
        return _open_task(config, top)
    corpus = open_data(
        config.data,
        config.val_data,
        encoder,
        config.seq_len,
        config.seed,
        reading=config.reading,
        rank=world.rank,
        size=world.size,
    )
    # Spread over the whole held-out text rather than its first files.
    count = min(config.val_blocks, corpus.val.count)
    held_out = np.linspace(0, corpus.val.count - 1, count).astype(int).tolist()
    val_inputs, val_targets = corpus.val.take(held_out)
    retrieval: dict[str, Sample] = {}
    for number, task in enumerate(config.mix):
        rng = np.random.default_rng([EXAM_SEED, number])
        retrieval[task] = TASKS[task](corpus.val_text, top, config.seq_len, MIX_EXAM, rng)
    return RunData(
        blocks=corpus.train,
        val_inputs=val_inputs,
        val_targets=val_targets,
        exams=retrieval,
        about=corpus.split,
        sha256=corpus.fingerprint,
        text=corpus.train_text,
    )


def _open_task(config: ResolvedConfig, top: int) -> RunData:
    task = find_task(config.task)
    samples = exams(task, top, config.seq_len, TASK_EXAM, TASK_EXAM_SEED)
    targets = samples[1].targets
    longest = LENGTHS[-1] * config.seq_len
    return RunData(
        blocks=TaskBlocks(task, top, config.seq_len, config.seed),
        val_inputs=samples[1].inputs,
        val_targets=targets,
        exams={exam_name(config.task, factor): sample for factor, sample in samples.items()},
        about=f"task {config.task} at length {config.seq_len}, evaluated to {longest}",
        sha256=hashlib.sha256(targets.numpy().tobytes()).hexdigest(),
        text=np.empty(0, np.int32),
    )


@dataclass(frozen=True)
class Splitter:
    """Cuts rows [B, L] into this process's share, and a share into micro-batches on its device.

    Of a micro-batch that is cut over several processes it gives this one's tokens.
    Shares are of equal size: rows that count for nothing fill them up, as FSDP's processes must run
    their layers equally often."""

    world: World
    device: torch.device
    rows: int
    """Sequences a micro-batch."""
    end_of_text: int
    packed: bool
    """Whether documents of text are packed apart."""

    def share(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """This process's share of ``inputs`` and ``targets`` [B, L]."""
        mine, short = self.world.share(len(inputs))
        rows = slice(mine.start, mine.stop)
        return fill_rows(inputs[rows], targets[rows], short, self.end_of_text)

    def pieces(self, inputs: Tensor, targets: Tensor, *, text: bool) -> Iterator[Piece]:
        """Micro-batches of a share; of ``text`` whose documents are packed, with their bounds."""
        for x, y in zip(inputs.split(self.rows), targets.split(self.rows)):
            if text and self.packed:
                yield self._mine(*pack(x, y, self.end_of_text))
            else:
                yield self._mine(x, y)

    def _mine(self, x: Tensor, y: Tensor, cu_seqlens: Tensor | None = None) -> Piece:
        """This process's tokens of a micro-batch, on its device."""
        layout = self.world.layout(x.shape[1], cu_seqlens)
        if layout is not None:
            x, y = (layout.shard(rows, self.world.place_in_context) for rows in (x, y))
        elif cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(self.device)
        return Piece(x.to(self.device), y.to(self.device), cu_seqlens, layout)


@dataclass(frozen=True)
class Batch:
    """A step's work: text (or a task alone), then each retrieval task, a mean of its own each."""

    blocks: list[int]
    """Which blocks of the training data it takes."""
    tokens: int
    """Of all processes."""
    groups: list[tuple[Tensor, Tensor]]
    """This process's share of each group's inputs and targets [B, L]."""

    def answers(self) -> list[Tensor]:
        """How many targets of each group count, in this process."""
        return [(targets != IGNORE).sum() for _, targets in self.groups]


class Batches:
    """The batch of any step, which depends on the settings and the step alone."""

    def __init__(self, config: ResolvedConfig, data: RunData, top: int, splitter: Splitter):
        self.config = config
        self.data = data
        self.top = top
        self.splitter = splitter

    def of_step(self, step: int) -> Batch:
        """The batch of ``step``, counted from 0."""
        size = self.config.batch_size
        blocks = self.data.blocks.ids(step * size, size)
        groups = [self._take(blocks)]
        tokens = len(blocks) * groups[0][0].shape[1]
        for number, task in enumerate(self.config.mix):
            rng = np.random.default_rng([self.config.seed, number, step])
            sample = TASKS[task](self.data.text, self.top, self.config.seq_len, MIX_BATCH, rng)
            tokens += sample.inputs.numel()
            groups.append(self.splitter.share(sample.inputs, sample.targets))
        return Batch(blocks, tokens, groups)

    def _take(self, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """This process's share of ``blocks``: the only ones that it reads."""
        mine, short = self.splitter.world.share(len(blocks))
        # A process without a share takes one all the same, for its shape.
        read = [blocks[i] for i in mine] or [blocks[0]]
        inputs, targets = self.data.blocks.take(read)
        count = len(mine)
        return fill_rows(inputs[:count], targets[:count], short, self.splitter.end_of_text)


def fill_rows(
    inputs: Tensor, targets: Tensor, short: int, end_of_text: int
) -> tuple[Tensor, Tensor]:
    """``inputs`` and ``targets`` [B, L] with ``short`` more rows, whose targets are IGNORE.

    Each is one document."""
    filler = int(end_of_text == 0)  # a token that ends nothing
    return (
        F.pad(inputs, (0, 0, 0, short), value=filler),
        F.pad(targets, (0, 0, 0, short), value=IGNORE),
    )
