"""Groups of processes for tests: spawned once, over gloo, each then runs many functions."""

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)  # of a rank that waits for another
# One process imports what takes seconds, and the ranks are its forks. (Forks of the tests' own
# process could run no backward once that has.)
PRELOADED = ["sisa_model.training.trainer", "tests.support.ranks"]


class Ranks:
    """``size`` processes that hold one gloo group."""

    def __init__(self, size: int, processes: list[Any], pipes: list[Any]):
        self.size = size
        self.processes = processes
        self.pipes = pipes

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(rank, group, *arguments)`` returns on each rank, or its error here.

        The function is one of a module; tensors go through pickles."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        outcomes = [pipe.recv() for pipe in self.pipes]
        errors = [f"rank {n}:\n{text}" for n, (text, _) in enumerate(outcomes) if text]
        if errors:
            raise AssertionError("\n".join(errors))
        return [result for _, result in outcomes]


def _serve(rank: int, size: int, path: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    while (asked := pipe.recv()) is not None:
        function, arguments = asked
        try:
            outcome = (None, function(rank, dist.group.WORLD, *arguments))
        except BaseException:
            outcome = (traceback.format_exc(), None)
        pipe.send(outcome)
    dist.destroy_process_group()


@contextmanager
def spawned(size: int) -> Iterator[Ranks]:
    """A group of ``size`` processes, ended on leaving."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store")
        pipes = [context.Pipe() for _ in range(size)]
        processes = [
            context.Process(target=_serve, args=(rank, size, path, pipes[rank][1]), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        ranks = Ranks(size, processes, [pipe[0] for pipe in pipes])
        try:
            yield ranks
        finally:
            for pipe in ranks.pipes:
                pipe.send(None)
            for process in processes:
                process.join(10)
                if process.is_alive():
                    process.kill()
