"""What ranks send each other: small rows by all, keys and their gradients to those who need them.

Keys go point to point, a peer at a time, while the attention over the last peer's runs; or, where
they are small, all at once. Either way only what causality and documents let a peer see is sent."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Bytes that a rank receives up to which one all-to-all costs less than a step for each peer.
AT_ONCE = 2**20


def gather_rows(rows: Tensor, owners: tuple[int, ...], group: ProcessGroup) -> Tensor:
    """Each rank's rows [its pieces, ...], of all ranks, in the order of the pieces.

    ``owners``: the rank of each piece."""
    ranks = dist.get_world_size(group)
    counts = [owners.count(rank) for rank in range(ranks)]
    most = max(counts)
    filled = rows.new_zeros(most, *rows.shape[1:])
    filled[: len(rows)] = rows
    found = [torch.empty_like(filled) for _ in range(ranks)]
    dist.all_gather(found, filled, group=group)
    places = [owners[:n].count(owner) for n, owner in enumerate(owners)]
    return torch.stack([found[owner][place] for owner, place in zip(owners, places)])


class Exchange:
    """One round: a message from each rank to each other one, and with a backward its reply.

    A reply has the size of its message. All ranks know all sizes."""

    def __init__(
        self, group: ProcessGroup, sizes: list[list[int]], dtype: torch.dtype, device: torch.device
    ):
        """``sizes``: elements from each rank to each other, [source][destination]."""
        self.group = group
        self.rank = dist.get_rank(group)
        self.ranks = len(sizes)
        self.to_others = sizes[self.rank]
        self.from_others = [row[self.rank] for row in sizes]
        self.dtype = dtype
        self.device = device
        most = max(map(sum, zip(*sizes)))
        self.at_once = 0 < most * dtype.itemsize <= AT_ONCE

    def fetch(self, message: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """(source, what it sent) of each source that sends; the first is under way on return.

        ``message(destination)``: what goes there, flat."""
        if self.at_once:
            return self._fetch_at_once(self._start_at_once(message))
        return self._fetch_by_step(message, self._start_step(1, message))

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def _swap(
        self, sent: list[Tensor], received: list[int], given: list[int]
    ) -> tuple[list[Tensor], dist.Work]:
        """One all-to-all, under way: of the sizes ``given``, into tensors of ``received``."""
        found = self._empty(sum(received))
        out = torch.cat(sent) if sent else self._empty(0)
        work = dist.all_to_all_single(found, out, received, given, self.group, async_op=True)
        return list(found.split(received)), work

    def _start_at_once(self, message: Callable[[int], Tensor]) -> tuple[list[Tensor], dist.Work]:
        sent = [message(rank) for rank in range(self.ranks) if self.to_others[rank]]
        return self._swap(sent, self.from_others, self.to_others)

    def _fetch_at_once(
        self, started: tuple[list[Tensor], dist.Work]
    ) -> Iterator[tuple[int, Tensor]]:
        found, work = started
        work.wait()
        yield from ((rank, part) for rank, part in enumerate(found) if len(part))

    def _start_step(self, step: int, message: Callable[[int], Tensor]) -> "_Transfer":
        """To the rank ``step`` ahead, from the one ``step`` behind."""
        to = (self.rank + step) % self.ranks
        source = (self.rank - step) % self.ranks
        sent = message(to) if self.to_others[to] else None
        return _Transfer(self, to, sent, source, self.from_others[source])

    def _fetch_by_step(
        self, message: Callable[[int], Tensor], under_way: "_Transfer"
    ) -> Iterator[tuple[int, Tensor]]:
        for step in range(1, self.ranks):
            transfer = under_way
            found = transfer.wait()
            if step + 1 < self.ranks:
                under_way = self._start_step(step + 1, message)
            if found is not None:
                yield transfer.source, found

    def round_trip(
        self, message: Callable[[int], Tensor], reply: Callable[[int, Tensor], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """(destination, its reply) of each destination, replies of ``reply(source, message)``.

        The first messages are under way on return."""
        if self.at_once:
            return self._round_trip_at_once(self._start_at_once(message), reply)
        return self._round_trip_by_step(message, self._start_step(1, message), reply)

    def _round_trip_at_once(
        self,
        started: tuple[list[Tensor], dist.Work],
        reply: Callable[[int, Tensor], Tensor],
    ) -> Iterator[tuple[int, Tensor]]:
        answers = [reply(*got) for got in self._fetch_at_once(started)]
        found, work = self._swap(answers, self.to_others, self.from_others)
        work.wait()
        yield from ((rank, part) for rank, part in enumerate(found) if len(part))

    def _round_trip_by_step(
        self,
        message: Callable[[int], Tensor],
        under_way: "_Transfer",
        reply: Callable[[int, Tensor], Tensor],
    ) -> Iterator[tuple[int, Tensor]]:
        answered: _Transfer | None = None
        for step in range(1, self.ranks):
            transfer = under_way
            found = transfer.wait()
            if step + 1 < self.ranks:
                under_way = self._start_step(step + 1, message)
            answer = None if found is None else reply(transfer.source, found)
            expected = self.to_others[transfer.to]
            answering = _Transfer(self, transfer.source, answer, transfer.to, expected)
            if answered is not None and (back := answered.wait()) is not None:
                yield answered.source, back
            answered = answering
        if answered is not None and (back := answered.wait()) is not None:
            yield answered.source, back


class _Transfer:
    """What goes to one rank and comes from another, under way from the start."""

    def __init__(
        self, exchange: Exchange, to: int, sent: Tensor | None, source: int, received: int
    ):
        self.to = to
        self.source = source
        self.sent = sent  # held until it is gone
        self.received = exchange._empty(received) if received else None
        ops = []
        for op, x, peer in ((dist.isend, sent, to), (dist.irecv, self.received, source)):
            if x is not None:
                ops.append(dist.P2POp(op, x, group=exchange.group, group_peer=peer))
        self.works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> Tensor | None:
        """What came, if anything was to."""
        for work in self.works:
            work.wait()
        self.sent = None
        return self.received
