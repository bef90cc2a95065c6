"""Attention of a group's tokens by heads, a few at a time: exchange them, attend, send back; forward and backward.

The heads of a rank are taken in stages (``parallel/head_plan.py``). Of each stage queries, keys and values come from a ``Heads``: of
whole tensors here (``WholeHeads``), or projected when their stage begins (``memory_mgmt/staged_attention.py``), so that never more than
the heads of two stages exist. The next heads travel while these are computed, and gradients go home meanwhile. What a rank does with its
own heads is its *inner* attention: of the whole sequence (parallel/ulysses.py), or a ring of groups (parallel/hybrid.py).

Every rank of the group must call it together, forward and backward.

Legend: B batch row, H query heads, G key/value heads, n local tokens, T tokens of the group, D head size, h query and g key/value heads of
one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from models.block import Gradients
from models.errors import UserError
from models.repeat import in_flight
from parallel.comm_dtypes import CommDtypes
from parallel.head_exchange import HeadExchange, Piece, ToHeads, ToTokens
from parallel.head_plan import Range, Stage, keys_are_shared, plan_stages, segments

MESSAGES = 2
"""On their way at a time, with stages: the next heads in, and the last ones back."""


class InnerAttention(Protocol):
    """What a rank computes with its own heads; the backward takes the merged out and log-sum-exp of the forward."""

    def forward(self, q_BhTD: torch.Tensor, k_BgTD: torch.Tensor, v_BgTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out in q's dtype, lse_BhT)"""
        ...

    def backward(
        self,
        dout_BhTD: torch.Tensor,
        q_BhTD: torch.Tensor,
        k_BgTD: torch.Tensor,
        v_BgTD: torch.Tensor,
        out_BhTD: torch.Tensor,
        lse_BhT: torch.Tensor,
    ) -> Gradients:
        """(dq, dk, dv), in float32 or q's dtype"""
        ...


@dataclass
class Landing:
    """Where the gradients of one stage arrive. ``q`` and ``kv``: by rank, the heads of the tensors that come from it."""

    q: Sequence[Range]
    kv: Sequence[Range]
    dq_BHnD: torch.Tensor
    dk_BGnD: torch.Tensor
    dv_BGnD: torch.Tensor


class Heads(Protocol):
    """This rank's tokens of all heads: where a stage takes its queries, keys and values from, and leaves their gradients."""

    def pieces(self, stage: Stage) -> list[Piece]:
        """The stage's queries, and the keys and values that arrive with it."""
        ...

    def landing(self, stage: Stage) -> Landing:
        """For the gradients of the stage's queries, and of the keys and values that leave with it. Those of ``kv`` that come from several
        ranks are added to zeros."""
        ...

    def landed(self, stage: Stage, landing: Landing) -> None:
        """They are there."""
        ...


class WholeHeads:
    """Queries, keys and values that are there, x_BHnD each; ``gradients`` in the end. ``shared``: ranks have parts of one key's gradient,
    which are added in float32 and, unless they travelled narrow, rounded once."""

    def __init__(self, q_BHnD: torch.Tensor, k_BGnD: torch.Tensor, v_BGnD: torch.Tensor, shared: bool) -> None:
        self._q, self._k, self._v, self._shared = q_BHnD, k_BGnD, v_BGnD, shared
        self._found: list[torch.Tensor] = []

    def pieces(self, stage: Stage) -> list[Piece]:
        """See `Heads`."""
        return [Piece([self._q], stage.q), Piece([self._k], stage.arriving), Piece([self._v], stage.arriving)]

    def landing(self, stage: Stage) -> Landing:
        """See `Heads`: whole tensors, those of keys and values zero where they are added to."""
        if not self._found:
            self._found = [torch.empty_like(self._q), *(new_target(x, self._shared) for x in (self._k, self._v))]
        return Landing(stage.q, stage.leaving, *self._found)

    def landed(self, stage: Stage, landing: Landing) -> None:
        """See `Heads`."""

    def gradients(self) -> Gradients:
        """(dq, dk, dv) in the dtypes of q, k and v."""
        dq, dk, dv = self._found
        return dq, dk.to(self._k.dtype), dv.to(self._v.dtype)


def new_target(x_BGnD: torch.Tensor, shared: bool) -> torch.Tensor:
    """What gradients like ``x`` are put into, or with ``shared`` added to."""
    return torch.zeros_like(x_BGnD, dtype=wide(x_BGnD)) if shared else torch.empty_like(x_BGnD)


def wide(x: torch.Tensor) -> torch.dtype:
    """In what gradients are added up."""
    return torch.promote_types(x.dtype, torch.float32)


def check_heads(n_heads: int, size: int) -> None:
    """Raise UserError when ``size`` ranks cannot each get a query head."""
    if n_heads < size:
        raise UserError(
            f"parallel.sequence: a Ulysses group of {size} ranks needs at least {size} query heads and model.n_heads is {n_heads}; "
            f"use parallel.sequence=ring or allgather_kv, or ring_x_ulysses with parallel.ulysses at most {n_heads}"
        )


@lru_cache(maxsize=64)
def _stages(n_heads: int, n_kv_heads: int, size: int, head_chunk: int | None) -> tuple[Stage, ...]:
    return plan_stages(n_heads, n_kv_heads, size, head_chunk)


class ByHeads(NamedTuple):
    """How one layer's heads are dealt and computed."""

    exchange: HeadExchange
    inner: InnerAttention
    n_heads: int
    n_kv_heads: int
    head_chunk: int | None
    comm: CommDtypes
    """Gradients of keys and values travel wider than they are made only where several ranks have parts of one."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """In their order; raises UserError for fewer query heads than ranks."""
        check_heads(self.n_heads, self.exchange.size)
        return _stages(self.n_heads, self.n_kv_heads, self.exchange.size, self.head_chunk)

    @property
    def shared(self) -> bool:
        """Whether several ranks read one key."""
        return keys_are_shared(self.n_heads, self.n_kv_heads, self.exchange.size)

    @property
    def per_kv(self) -> int:
        """Query heads of a key/value head."""
        return self.n_heads // self.n_kv_heads

    def forward(self, heads: Heads, out_BHnD: torch.Tensor) -> torch.Tensor:
        """lse_BhT of this rank's heads; fills ``out``."""
        exchange, stages = self.exchange, self.stages
        lses: list[torch.Tensor] = []
        here: list[_Keys] = []
        coming = exchange.start_to_heads(self._pieces(heads, stages[0]))
        returning: ToTokens | None = None
        for i, stage in enumerate(stages):
            q, k, v = coming.wait()
            if i + 1 < len(stages):
                with in_flight(MESSAGES):  # the next heads travel while these are computed
                    coming = exchange.start_to_heads(self._pieces(heads, stages[i + 1]))
            turn = _Turn(stage, exchange.rank, self.per_kv)
            here.append(_Keys(turn.arriving[0], k, v))
            out, lse = _attend(q, here, turn, self.inner)
            _collect(returning, [(out_BHnD, False)])
            with in_flight(MESSAGES if i + 1 < len(stages) else 0):
                returning = exchange.start_to_tokens([Piece([out], stage.q)], out_BHnD.shape[2])
            lses.append(lse)
            here = _kept(here, turn.kv, stage.leaving[exchange.rank])
            del q, k, v, out
        _collect(returning, [(out_BHnD, False)])
        return lses[0] if len(lses) == 1 else torch.cat(lses, 1)

    def backward(self, dout_BHnD: torch.Tensor, heads: Heads, out_BHnD: torch.Tensor, lse_BhT: torch.Tensor) -> None:
        """Leave the gradients with ``heads``, for what ``forward`` gave."""
        exchange, stages = self.exchange, self.stages
        lses = lse_BhT.split([last - first for first, last in (stage.q[exchange.rank] for stage in stages)], dim=1)
        here: list[_Keys] = []
        coming = self._start_backward(stages[0], heads, out_BHnD, dout_BHnD)
        returning: _Returning | None = None
        for i, stage in enumerate(stages):
            q, out, dout, k, v = coming.wait()
            if i + 1 < len(stages):
                with in_flight(MESSAGES):
                    coming = self._start_backward(stages[i + 1], heads, out_BHnD, dout_BHnD)
            turn = _Turn(stage, exchange.rank, self.per_kv)
            here.append(_Keys(turn.arriving[0], k, v))
            dq = _attend_backward(dout, q, out, lses[i], here, turn, self.inner)
            # Of what leaves only the gradients: keys and values are parts of the message that everything came in.
            leaving = [part.gradients() for keys in here for part in keys.only(stage.leaving[exchange.rank])]
            here = _kept(here, turn.kv, stage.leaving[exchange.rank])
            travels = self.comm.gradient(k.dtype) if self.shared else self.comm.whole_gradient(k.dtype)
            nothing = k.new_empty(k[:, :0].shape, dtype=travels)
            del q, k, v, out, dout
            if returning is not None:
                returning.finish(heads, self.shared)
            with in_flight(MESSAGES if i + 1 < len(stages) else 0):
                returning = _return(dq, leaving, nothing, stage, exchange, dout_BHnD.shape[2])
            del dq, leaving
        assert returning is not None
        returning.finish(heads, self.shared)

    def _start_backward(self, stage: Stage, heads: Heads, out_BHnD: torch.Tensor, dout_BHnD: torch.Tensor) -> ToHeads:
        q, k, v = self._pieces(heads, stage)
        return self.exchange.start_to_heads([q, Piece([out_BHnD], stage.q), Piece([dout_BHnD], stage.q), k, v])

    def _pieces(self, heads: Heads, stage: Stage) -> list[Piece]:
        """The stage's queries, keys and values, the latter as they travel."""
        q, *kv = heads.pieces(stage)
        return [q, *(replace(piece, dtype=self.comm.keys) for piece in kv)]


def by_heads(q_BHnD: torch.Tensor, k_BGnD: torch.Tensor, v_BGnD: torch.Tensor, how: ByHeads) -> torch.Tensor:
    """Attention of each rank's heads over the tokens of the exchange's group; differentiable. out_BHnD in q's dtype.

    Kept for backward are this rank's own q, k, v and output, as by every other scheme, and backward exchanges them again."""
    check_heads(how.n_heads, how.exchange.size)
    return _ByHeads.apply(q_BHnD, k_BGnD, v_BGnD, how)  # pyright: ignore[reportReturnType]


class _ByHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHnD, k_BGnD, v_BGnD, how):
        out_BHnD = torch.empty_like(q_BHnD)
        lse_BhT = how.forward(WholeHeads(q_BHnD, k_BGnD, v_BGnD, how.shared), out_BHnD)
        ctx.how = how
        ctx.save_for_backward(q_BHnD, k_BGnD, v_BGnD, out_BHnD, lse_BhT)
        return out_BHnD

    @staticmethod
    def backward(ctx, dout_BHnD):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BHnD, k_BGnD, v_BGnD, out_BHnD, lse_BhT = ctx.saved_tensors
        heads = WholeHeads(q_BHnD, k_BGnD, v_BGnD, ctx.how.shared)
        ctx.how.backward(dout_BHnD, heads, out_BHnD, lse_BhT)
        return *heads.gradients(), None


@dataclass
class _Keys:
    """Key/value heads from ``first`` on that are here, and their gradients once there are some."""

    first: int
    k_BgTD: torch.Tensor
    v_BgTD: torch.Tensor
    dk_BgTD: torch.Tensor | None = None
    dv_BgTD: torch.Tensor | None = None

    def only(self, heads: Range) -> list[_Keys]:
        """The part that holds ``heads``; nothing where they are not here."""
        low, high = max(heads[0], self.first) - self.first, min(heads[1], self.first + self.k_BgTD.shape[1]) - self.first
        tensors = (self.k_BgTD, self.v_BgTD, self.dk_BgTD, self.dv_BgTD)
        return [_Keys(self.first + low, *(x if x is None else x[:, low:high] for x in tensors))] if high > low else []  # type: ignore[arg-type]

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """dk, dv of heads that were attended to."""
        assert self.dk_BgTD is not None and self.dv_BgTD is not None
        return self.dk_BgTD, self.dv_BgTD

    def detached(self) -> _Keys:
        """A copy of the keys, so that the message that they came in can be let go."""
        return _Keys(self.first, self.k_BgTD.clone(), self.v_BgTD.clone(), self.dk_BgTD, self.dv_BgTD)


class _Turn:
    """One rank's stage: its query heads, and which keys serve them."""

    def __init__(self, stage: Stage, rank: int, per_kv: int) -> None:
        self.kv, self.arriving, self.leaving = stage.kv[rank], stage.arriving[rank], stage.leaving[rank]
        carried = self.kv[1] - self.kv[0] - (self.arriving[1] - self.arriving[0])
        self.segments = segments(stage.q[rank], self.kv, per_kv, carried)

    def keys(self, here: Sequence[_Keys], kv: Range) -> _Keys:
        """The keys of a segment."""
        (found,) = (part for keys in here for part in keys.only((self.kv[0] + kv[0], self.kv[0] + kv[1])))
        return found


def _attend(q_BhTD: torch.Tensor, here: Sequence[_Keys], turn: _Turn, inner: InnerAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a stage's heads."""
    found = []
    for (first, last), kv in turn.segments:
        keys = turn.keys(here, kv)
        found.append(inner.forward(q_BhTD[:, first:last], keys.k_BgTD, keys.v_BgTD))
    if not found:
        return torch.empty_like(q_BhTD), q_BhTD.new_empty(q_BhTD.shape[:3], dtype=wide(q_BhTD))
    if len(found) == 1:
        return found[0]
    return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 1)


def _attend_backward(
    dout_BhTD: torch.Tensor,
    q_BhTD: torch.Tensor,
    out_BhTD: torch.Tensor,
    lse_BhT: torch.Tensor,
    here: Sequence[_Keys],
    turn: _Turn,
    inner: InnerAttention,
) -> torch.Tensor:
    """dq of a stage's heads in q's dtype; dk and dv are left with the keys in ``here``."""
    dqs = [torch.empty_like(q_BhTD[:, :0])]
    if len(here) == len(turn.segments) == 1 and here[0].dk_BgTD is None and turn.kv == turn.arriving == turn.leaving:
        keys = here[0]  # read once and by all queries together: nothing to add up
        dq, keys.dk_BgTD, keys.dv_BgTD = inner.backward(dout_BhTD, q_BhTD, keys.k_BgTD, keys.v_BgTD, out_BhTD, lse_BhT)
        return dq.to(q_BhTD.dtype)
    for keys in here:
        if keys.dk_BgTD is None:
            keys.dk_BgTD, keys.dv_BgTD = (torch.zeros_like(x, dtype=wide(q_BhTD)) for x in (keys.k_BgTD, keys.v_BgTD))
    for (first, last), kv in turn.segments:
        keys = turn.keys(here, kv)
        heads = slice(first, last)
        of_queries = (x[:, heads] for x in (out_BhTD, lse_BhT))
        dq, dk, dv = inner.backward(dout_BhTD[:, heads], q_BhTD[:, heads], keys.k_BgTD, keys.v_BgTD, *of_queries)
        assert keys.dk_BgTD is not None and keys.dv_BgTD is not None
        keys.dk_BgTD += dk
        keys.dv_BgTD += dv
        dqs.append(dq.to(q_BhTD.dtype))
    return dqs[1] if len(dqs) == 2 else torch.cat(dqs, 1)


def _kept(here: Sequence[_Keys], kv: Range, leaving: Range) -> list[_Keys]:
    """The keys that the next stage reads too: of this stage's heads the last one at most."""
    if leaving[1] - leaving[0] == kv[1] - kv[0]:
        return []
    return [part.detached() for keys in here for part in keys.only((kv[1] - 1, kv[1]))]


@dataclass
class _Returning:
    """A stage's gradients on their way home, in one message, or with those of keys and values in another."""

    stage: Stage
    first: ToTokens
    second: ToTokens | None
    together: bool

    def finish(self, heads: Heads, shared: bool) -> None:
        """Put what arrives where ``heads`` wants it."""
        landing = heads.landing(self.stage)
        q: list[_Target] = [(landing.dq_BHnD, False)]
        kv: list[_Target] = [(landing.dk_BGnD, shared), (landing.dv_BGnD, shared)]
        _collect(self.first, q + kv if self.together else q, [landing.q, landing.kv, landing.kv])
        _collect(self.second, kv, [landing.kv, landing.kv])
        heads.landed(self.stage, landing)


def _return(
    dq_BhTD: torch.Tensor,
    leaving: Sequence[tuple[torch.Tensor, torch.Tensor]],
    nothing_BgTD: torch.Tensor,
    stage: Stage,
    exchange: HeadExchange,
    n: int,
) -> _Returning:
    """Send dq and the finished ``leaving`` (dk, dv) home: in one message, or in two where they differ in dtype. ``nothing``: no heads, in
    dk's dtype."""
    dtype = nothing_BgTD.dtype
    parts = [[grads[i].to(dtype) for grads in leaving] for i in range(2)]
    dq_piece = Piece([dq_BhTD], stage.q)
    dkv_pieces = [Piece(part or [nothing_BgTD], stage.leaving) for part in parts]
    if dtype == dq_BhTD.dtype:
        return _Returning(stage, exchange.start_to_tokens([dq_piece, *dkv_pieces], n), None, True)
    first = exchange.start_to_tokens([dq_piece], n)
    some = any(high > low for low, high in stage.leaving)
    return _Returning(stage, first, exchange.start_to_tokens(dkv_pieces, n) if some else None, False)


_Target = tuple[torch.Tensor, bool]
"""x_BHnD that arriving heads are put into, and whether several ranks' parts of a head are added."""


def _collect(message: ToTokens | None, targets: Sequence[_Target], places: Sequence[Sequence[Range]] = ()) -> None:
    """Put what arrives into ``targets``: by rank at ``places`` of them, or at the heads' own numbers."""
    if message is None:
        return
    for i, ((target_BHnD, add), parts) in enumerate(zip(targets, message.wait(), strict=True)):
        for rank, heads, values_BhnD in parts:
            low, high = places[i][rank] if places else heads
            into_BhnD = target_BHnD[:, low:high]
            into_BhnD.add_(values_BhnD) if add else into_BhnD.copy_(values_BhnD)
