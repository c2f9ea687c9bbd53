"""What a score has beside q.k, between the tokens of two pieces: what is sent, and its gradients.

Relative to a query piece I's start and a key piece J's end every exponent is <= 0: with

    C'_i = exp(sum of log_decay from I's start to i) R(Phi_i) c_i
    B'_j = exp(sum of log_decay behind j to J's end) R(Phi_j) b_j

Eq. 2's term is ``f C'_i . B'_j``, ``f = lam exp(sum over the pieces strictly between)``: channels
beside those of k and, times ``sqrt(Dh) f``, beside those of q. Sums run inside a piece, in fp64;
what other pieces add is in the prefix, a few sums a piece that all ranks gather.

A score's gradient m_ij, times the term, is that of the sum of log_decay over (j, i]; token t's
gradient is the sum over i >= t > j. Of pairs in different pieces these are the reverse running sum
of rows in its own piece, the exclusive running sum of columns there, and ``through``: the pairs
that begin before t's piece and end behind it. theta's likewise."""

import math

import torch
from torch import Tensor

from sisa_kernels.distributed.layout import Geometry, Piece
from sisa_kernels.rotation import rotate
from sisa_kernels.scans import LOWEST_LOG_DECAY, pair_products, to_key_heads, to_query_heads

FORGET_UNIT = 256.0  # the query's constant beside half-precision keys: a bias of 10^6 fits fp16
FORGET_PARTS = 3  # half-precision numbers that together hold a bias to fp32


def default_horizon(dtype: torch.dtype) -> float:
    """What a logit may lose unseen: half a unit in the last place of a logit of size 1."""
    return torch.finfo(dtype).eps / 2


def _steps(log_decay: Tensor) -> Tensor:
    """log_decay in fp64, bounded where its exp is 0 already: -inf - -inf would be no number."""
    return log_decay.double().clamp(min=LOWEST_LOG_DECAY)


class PlainTerm:
    """No term: attention over q.k alone. What the others specialise."""

    numbers = 1
    """fp64 numbers a head in a piece's prefix; one is as good as none, and NCCL's communicator
    wants all ranks in its first call."""
    sums = 0
    """Of them, the first, those whose gradients are running sums over tokens."""
    channels = 0
    """Sent beside k."""

    def __init__(self, geometry: Geometry, pieces: list[Piece], q: Tensor, k: Tensor):
        self.geometry = geometry
        self.pieces = pieces
        self.H, self.Dh = q.shape[2:]
        self.G = k.shape[2]
        self.batch = q.shape[0]
        self.like = q
        self.heads = self.G
        self.prefix = q.new_empty(0)
        self.through = self.prefix

    def zeros(self, *shape: int) -> Tensor:
        """fp64, on the device of the operands."""
        return self.like.new_zeros(shape, dtype=torch.float64)

    def own_prefix(self) -> Tensor:
        """[own pieces, B, heads, numbers] fp64."""
        return self.zeros(len(self.pieces), self.batch, self.heads, self.numbers)

    def set_prefix(self, prefix: Tensor) -> None:
        """Take all ranks' prefix [pieces, B, heads, numbers]."""
        self.prefix = prefix

    def is_needed(self, query: int, key: int) -> bool:
        """Whether the term counts between two pieces; past the horizon its channels stay away."""
        return False

    def key_channels(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """Of the piece's tail [B, tail, G, channels], as they are sent."""
        raise NotImplementedError

    def query_channels(self, piece: Piece, key: int, dtype: torch.dtype) -> Tensor:
        """Of the piece's head [B, head, H, channels], for an earlier piece's keys."""
        raise NotImplementedError

    def row_bias(self, piece: Piece, key: int) -> Tensor | None:
        """What all of a row's scores have [B, H, head]; added to their log-sum-exp."""
        return None

    def start_backward(self) -> None:
        """Set all gradients to 0."""

    def through_pieces(self) -> Tensor | None:
        """Gradients of all of a piece's steps, by own queries [pieces, B, heads, sums]; ranks sum.

        None where no piece has another one on either side of it that sees the other."""
        far = any(
            n - key > 1 for n in range(len(self.geometry.heads)) for key in self.geometry.seen_by(n)
        )
        return self.through if far and self.sums else None

    def add_queries(self, piece: Piece, key: int, dextra: Tensor, sums: Tensor | None) -> None:
        """Take dL/d(query channels) [B, head, H, channels], by an earlier piece's keys.

        ``sums`` [B, head, H]: of each row's dL/ds over these keys."""
        raise NotImplementedError

    def add_keys(self, piece: Piece, dextra: Tensor) -> None:
        """Take dL/d(key channels) [B, tail, G, channels] from the queries of one rank."""
        raise NotImplementedError

    def gradients(self) -> tuple[Tensor, ...]:
        """Of all operands but q, k and v, by pairs of tokens in different pieces."""
        return ()

    def between(self, query: int, key: int) -> Tensor:
        """Sum of the logs over the pieces strictly between two, [B, heads] fp64."""
        inner = [n for n in self.geometry.seen_by(query) if n > key]
        return self.prefix[inner, ..., 0].sum(0)


class ImportanceTerm(PlainTerm):
    """SISA's: log_decay [B, L, G], theta, b, c and lam of the rank's own tokens."""

    def __init__(
        self,
        geometry: Geometry,
        pieces: list[Piece],
        q: Tensor,
        k: Tensor,
        b: Tensor,
        c: Tensor,
        log_decay: Tensor,
        theta: Tensor,
        lam: Tensor,
    ):
        super().__init__(geometry, pieces, q, k)
        self.b = b
        self.c = c
        self.log_decay = _steps(log_decay)
        self.theta = theta.double()
        self.lam = lam
        self.channels = b.shape[3]
        self.sums = 1 + self.channels // 2
        self.numbers = self.sums + 2
        self.horizon = math.log(default_horizon(q.dtype))
        self.work = torch.promote_types(q.dtype, torch.float32)
        self._bounds: list[float] | None = None
        self._reach: Tensor = q.new_empty(0)
        self._sides: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def own_prefix(self) -> Tensor:
        """Sums of log_decay and theta over each tail, then logs of the norms' bounds."""
        found = self.zeros(len(self.pieces), self.batch, self.heads, self.numbers)
        for row, piece in zip(found, self.pieces):
            tail = piece.tail
            row[..., 0] = self.log_decay[:, tail].sum(1)
            row[..., 1 : self.sums] = self.theta[:, tail].sum(1)
            if tail.start < tail.stop:
                row[..., -2] = _largest(self.b[:, tail])
            if piece.head.start < piece.head.stop:
                by_head = _largest(self.c[:, piece.head]) + self.lam.double().clamp(min=1).log()
                row[..., -1] = by_head.unflatten(1, (self.G, -1)).amax(2)
        return found

    def set_prefix(self, prefix: Tensor) -> None:
        super().set_prefix(prefix)
        self._reach = prefix.detach()[..., [0, -2, -1]].cpu()

    def is_needed(self, query: int, key: int) -> bool:
        """By Cauchy-Schwarz; norms and lam count as 1 at least, for the gradients of small ones."""
        inner = [n for n in self.geometry.seen_by(query) if n > key]
        decay = self._reach[inner, ..., 0].sum(0)
        largest = decay + self._reach[key, ..., 1] + self._reach[query, ..., 2]
        return bool((largest > self.horizon).any())

    def _side(self, piece: Piece, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(operand, decay, cos, sin) of a head's queries or a tail's keys, in the working dtype."""
        known = self._sides.get((kind, piece.number))
        if known is not None:
            return known
        rows = piece.head if kind == "c" else piece.tail
        g = self.log_decay[:, rows].cumsum(1)
        exponent = g if kind == "c" else g[:, -1:] - g
        decay = exponent.clamp(max=0).exp().to(self.work)[..., None]
        phase = self.theta[:, rows].cumsum(1) + self._phase_before(piece, kind)[:, None]
        phase = phase.remainder(2 * math.pi).to(self.work)
        cos, sin = phase.cos(), phase.sin()
        x = self.c if kind == "c" else self.b
        if kind == "c":
            decay, cos, sin = (to_query_heads(t, self.H) for t in (decay, cos, sin))
        operand = rotate(x[:, rows].to(self.work), cos, sin) * decay
        self._sides[kind, piece.number] = operand, decay, cos, sin
        return operand, decay, cos, sin

    def _phase_before(self, piece: Piece, kind: str) -> Tensor:
        """The phase from the document's start to the piece's, [B, G, Ds/2]."""
        n = piece.number
        earlier = self.geometry.seen_by(n) if kind == "c" or self.geometry.goes_on(n) else []
        return self.prefix[earlier][..., 1 : self.sums].sum(0)

    def key_channels(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        return self._side(piece, "b")[0].to(dtype)

    def _scale(self, query: int, key: int) -> Tensor:
        """sqrt(Dh) exp(between), [B, 1, H, 1]."""
        decay = self.between(query, key).exp().to(self.work) * math.sqrt(self.Dh)
        return to_query_heads(decay[:, None, :, None], self.H)

    def query_channels(self, piece: Piece, key: int, dtype: torch.dtype) -> Tensor:
        scale = self._scale(piece.number, key) * self.lam.to(self.work)[:, None]
        return (self._side(piece, "c")[0] * scale).to(dtype)

    # ---- the backward ----------------------------------------------------------------------------

    def start_backward(self) -> None:
        """Set all gradients to 0."""
        pairs = self.channels // 2
        L = self.b.shape[1]
        self.db = torch.zeros_like(self.b, dtype=self.work)
        self.dc = torch.zeros_like(self.c, dtype=self.work)
        self.dlam = self.zeros(self.H)
        self.rows = self.zeros(self.batch, L, self.G, 1 + pairs)
        self.columns = self.zeros(self.batch, L, self.G, 1 + pairs)
        self.through = self.zeros(len(self.geometry.heads), self.batch, self.G, 1 + pairs)

    def add_queries(self, piece: Piece, key: int, dextra: Tensor, sums: Tensor | None) -> None:
        """dL/d(query channels) [B, head, H, channels] from an earlier piece's keys."""
        lam = self.lam.to(self.work)[:, None]
        operand, decay, cos, sin = self._side(piece, "c")
        scale = self._scale(piece.number, key)
        dextra = dextra.to(self.work) * scale
        row, phase = pair_products(dextra, operand)
        self.dlam += row.sum((0, 1))
        found = torch.cat((row[..., None], phase), 3) * lam.double()
        found = to_key_heads(found, self.G)
        self.rows[:, piece.head] += found
        self.through[key + 1 : piece.number] += found.sum(1)
        self.dc[:, piece.head] += rotate(dextra * lam * decay, cos, -sin)

    def add_keys(self, piece: Piece, dextra: Tensor) -> None:
        """dL/d(key channels) [B, tail, G, channels]: those of one rank's queries, or their sum."""
        operand, decay, cos, sin = self._side(piece, "b")
        column, phase = pair_products(dextra, operand)
        self.columns[:, piece.tail] += torch.cat((column[..., None], -phase), 3)
        self.db[:, piece.tail] += rotate(dextra * decay, cos, -sin)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(db, dc, dlog_decay, dtheta, dlam) of all pairs in different pieces."""
        found = by_token(self)
        return self.db, self.dc, found[..., 0], found[..., 1:], self.dlam


class ForgetTerm(PlainTerm):
    """FoX's and ALiBi's g_i - g_j of log_forget [B, L, H].

    The keys' part is in channels, one a query head, the queries' part in their log-sum-exp."""

    numbers = sums = 1

    def __init__(
        self, geometry: Geometry, pieces: list[Piece], q: Tensor, k: Tensor, log_forget: Tensor
    ):
        super().__init__(geometry, pieces, q, k)
        self.heads = self.H
        self.log_forget = _steps(log_forget)
        half = q.dtype in (torch.bfloat16, torch.float16)
        self.parts = FORGET_PARTS if half else 1
        self.unit = FORGET_UNIT if half else math.sqrt(self.Dh)
        self.channels = self.parts * (self.H // self.G)

    def own_prefix(self) -> Tensor:
        found = self.zeros(len(self.pieces), self.batch, self.heads, self.numbers)
        for row, piece in zip(found, self.pieces):
            row[..., 0] = self.log_forget[:, piece.tail].sum(1)
        return found

    def is_needed(self, query: int, key: int) -> bool:
        return True

    def key_channels(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        g = self.log_forget[:, piece.tail].cumsum(1)
        bias = (g[:, -1:] - g).clamp(max=0).unflatten(2, (self.G, -1))
        rest = (bias * (math.sqrt(self.Dh) / self.unit)).clamp(min=-6e4)  # fp16's lowest
        parts = []
        for _ in range(self.parts):
            parts.append(rest.to(dtype))
            rest = rest - parts[-1]
        return torch.cat(parts, 3)

    def query_channels(self, piece: Piece, key: int, dtype: torch.dtype) -> Tensor:
        own = torch.eye(self.H // self.G, dtype=dtype, device=self.like.device)
        unit = self.unit * own.repeat(self.G, self.parts)
        length = piece.head.stop - piece.head.start
        return unit.expand(self.batch, length, -1, -1)

    def row_bias(self, piece: Piece, key: int) -> Tensor | None:
        g = self.log_forget[:, piece.head].cumsum(1) + self.between(piece.number, key)[:, None]
        return g.transpose(1, 2)

    def start_backward(self) -> None:
        """Set all gradients to 0."""
        B, L, H = self.log_forget.shape
        self.rows = self.zeros(B, L, H, 1)
        self.columns = self.zeros(B, L, H, 1)
        self.through = self.zeros(len(self.geometry.heads), B, H, 1)

    def add_queries(self, piece: Piece, key: int, dextra: Tensor, sums: Tensor | None) -> None:
        """``sums``: of dL/ds over an earlier piece's keys [B, head, H]."""
        assert sums is not None
        found = sums.double()[..., None]
        self.rows[:, piece.head] += found
        self.through[key + 1 : piece.number] += found.sum(1)

    def add_keys(self, piece: Piece, dextra: Tensor) -> None:
        """Only a bias' first part carries its gradient."""
        of_first = dextra[..., : self.H // self.G].flatten(2).double()
        self.columns[:, piece.tail] += (of_first * (math.sqrt(self.Dh) / self.unit))[..., None]

    def gradients(self) -> tuple[Tensor, ...]:
        """(dlog_forget,) of all pairs in different pieces."""
        return (by_token(self)[..., 0],)


def by_token(term: "ImportanceTerm | ForgetTerm") -> Tensor:
    """Gradients of the steps [B, L, heads, sums] from rows, columns and what goes through."""
    found = torch.zeros_like(term.rows)
    for piece in term.pieces:
        head, tail = piece.head, piece.tail
        found[:, head] += term.rows[:, head].flip(1).cumsum(1).flip(1)
        columns = term.columns[:, tail]
        found[:, tail] += columns.cumsum(1) - columns
        found[:, piece.rows] += term.through[piece.number][:, None]
    return found


def _largest(x: Tensor) -> Tensor:
    """log of the largest norm of a row of x [B, rows, heads, channels], at least 0: [B, heads]."""
    return x.double().norm(dim=3).amax(1).clamp(min=1).log()
