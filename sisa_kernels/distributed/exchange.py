"""What ranks send each other: small rows by all, keys and their gradients to those who need them.

Keys go point to point, a peer at a time, while the attention over the last peer's runs; or, where
they are small, all at once. Either way only what causality and documents let a peer see is sent."""

from collections.abc import Callable

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


Visit = Callable[[int, Tensor], Tensor | None]  # (source, its message) -> the reply to it


class Exchange:
    """One round: a message from each rank to each other one and, where asked for, a reply to it.

    A reply has the size of its message. All ranks know all sizes, and nothing is sent of size 0."""

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
        most = max(map(sum, zip(*sizes))) * dtype.itemsize
        self.at_once = 0 < most <= AT_ONCE

    def start(self, message: Callable[[int], Tensor]) -> None:
        """Let the first messages go; ``message(destination)``: what goes there, flat."""
        self.message = message
        if self.at_once:
            sent = [message(rank) for rank, size in enumerate(self.to_others) if size]
            self.swapping = self._swap(sent, self.to_others, self.from_others)
        else:
            self.under_way = self._step(1)

    def finish(self, visit: Visit, home: Callable[[int, Tensor], None] | None = None) -> None:
        """``visit(source, message)`` each message to this rank, in an order that never varies.

        ``home(destination, reply)``: takes the replies to its own; None: there are none."""
        if self.at_once:
            self._finish_at_once(visit, home)
        else:
            self._finish_by_step(visit, home)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def _swap(
        self, sent: list[Tensor], to_others: list[int], from_others: list[int]
    ) -> tuple[Tensor, dist.Work]:
        """One all-to-all, under way."""
        out = torch.cat(sent) if sent else self._empty(0)
        found = self._empty(sum(from_others))
        work = dist.all_to_all_single(found, out, from_others, to_others, self.group, async_op=True)
        return found, work

    def _finish_at_once(self, visit: Visit, home: Callable[[int, Tensor], None] | None) -> None:
        found, work = self.swapping
        work.wait()
        parts = enumerate(found.split(self.from_others))
        replies = [visit(source, part) for source, part in parts if len(part)]
        if home is None:
            return
        sent = [reply for reply in replies if reply is not None]
        found, work = self._swap(sent, self.from_others, self.to_others)
        work.wait()
        for destination, part in enumerate(found.split(self.to_others)):
            if len(part):
                home(destination, part)

    def _step(self, step: int) -> "_Transfer":
        """Messages to the rank ``step`` ahead, from the one ``step`` behind."""
        to = (self.rank + step) % self.ranks
        source = (self.rank - step) % self.ranks
        sent = self.message(to) if self.to_others[to] else None
        return _Transfer(self.group, to, sent, source, self._empty(self.from_others[source]))

    def _finish_by_step(self, visit: Visit, home: Callable[[int, Tensor], None] | None) -> None:
        replies: list[_Transfer] = []
        for step in range(1, self.ranks):
            transfer = self.under_way
            found = transfer.wait()
            if step + 1 < self.ranks:
                self.under_way = self._step(step + 1)
            reply = visit(transfer.source, found) if len(found) else None
            if home is None:
                continue
            expected = self._empty(self.to_others[transfer.to])
            replies.append(_Transfer(self.group, transfer.source, reply, transfer.to, expected))
            if step > 1:  # the last step's has had this one's time
                _bring_home(replies.pop(0), home)
        for last in replies:
            _bring_home(last, home)


class _Transfer:
    """What goes to one rank and comes from another, under way from the start."""

    def __init__(
        self, group: ProcessGroup, to: int, sent: Tensor | None, source: int, received: Tensor
    ):
        self.to = to
        self.source = source
        self.sent = sent  # held until it is gone
        self.received = received
        ops = []
        if sent is not None:
            ops.append(dist.P2POp(dist.isend, sent, group=group, group_peer=to))
        if len(received):
            ops.append(dist.P2POp(dist.irecv, received, group=group, group_peer=source))
        self.works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> Tensor:
        """What came; empty where nothing was to."""
        for work in self.works:
            work.wait()
        self.sent = None
        return self.received


def _bring_home(reply: _Transfer, home: Callable[[int, Tensor], None] | None) -> None:
    found = reply.wait()
    if home is not None and len(found):
        home(reply.source, found)
