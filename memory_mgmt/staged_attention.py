"""Attention whose queries, keys and values are projected a few heads at a time, when their stage is sent off to other ranks.

Where ranks exchange heads in stages (``parallel.head_chunk`` under ``ulysses`` and ``ring_x_ulysses``) and a layer's projections are
recomputed, they need never exist whole: a stage normalises the block's input again, range by range, projects its own heads, sends, attends
and returns, forward and backward (UPipe, arXiv 2602.21196). What lives between the passes is what every scheme keeps under such a policy:
the block's input, and the output and log-sum-exp as the policy says. The price is the norm once per stage and pass.

    x -> _Staged -> out -> _Leave -> y        (memory_mgmt/execution.py has the rest)

Legend: B row, T token of this rank, C channel, H query heads, G key/value heads, D head size; S tokens of all ranks, h heads of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memory_mgmt.mixer_saving import hold
from memory_mgmt.pieces import Held, alike, assemble
from memory_mgmt.tiles import GradientSums
from models.attention import Attention
from models.repeat import again, turns
from parallel.by_heads import ByHeads, Landing, wide
from parallel.head_exchange import Piece
from parallel.head_plan import Range, Stage

if TYPE_CHECKING:
    from memory_mgmt.execution import Pass

Ranges = Sequence[tuple[int, int]]


def stages_of(one: Pass, x_BTC: Tensor) -> ByHeads | None:
    """How the heads of this layer are dealt where they may be projected in stages; None where its attention has no stages, or ranks share
    its products (their tokens would be gathered once per stage)."""
    mixer = one.run.block.mixer
    given = getattr(mixer.inner_attention, "by_stages", None) if isinstance(mixer, Attention) else None
    if given is None or one.parts.tokens.ranks > 1:
        return None
    assert isinstance(mixer, Attention)
    rows, n, _ = x_BTC.shape
    value = x_BTC.new_empty(1, dtype=one.parts.dtype)
    q_BHTD, k_BGTD = (value.expand(rows, p.weight.shape[0] // mixer.head_dim, n, mixer.head_dim) for p in (mixer.wq, mixer.wk))
    return given(q_BHTD, k_BGTD, one.bounds)


class StagedProjections:
    """`parallel.by_heads.Heads` of a block's input. ``x(start, end)``: these tokens of it, for ``ranges`` of tokens; ``sums`` and ``dx``
    take the gradients, in the backward pass."""

    def __init__(
        self,
        one: Pass,
        how: ByHeads,
        weights: Sequence[Tensor],
        x: Callable[[int, int], Tensor],
        ranges: Ranges,
        sums: GradientSums | None = None,
        dx_BTC: Tensor | None = None,
    ) -> None:
        self._one, self._how, self._weights, self._x, self._ranges = one, how, weights, x, ranges
        self._sums, self._dx = sums, dx_BTC
        self._table = one.table()
        mixer = one.run.block.mixer
        assert isinstance(mixer, Attention)
        self._head_dim, self._biased = mixer.head_dim, mixer.wq.bias is not None

    def pieces(self, stage: Stage) -> list[Piece]:
        """See `parallel.by_heads.Heads`."""
        q_heads, q_places = _union(stage.q)
        kv_heads, kv_places = _union(stage.arriving)
        parts = self._one.parts
        weights, _ = self._of_heads(q_heads, kv_heads)

        def make(a: int, b: int) -> list[Tensor]:
            return parts.enter(self._x(a, b), weights, parts.rows(self._table, a, b))

        with nullcontext() if self._sums is None else again():
            q, k, v = assemble(self._ranges, make, parts.enter_dims, self._one.positions_BT)
        return [Piece([q], q_places), Piece([k], kv_places), Piece([v], kv_places)]

    def landing(self, stage: Stage) -> Landing:
        """See `parallel.by_heads.Heads`."""
        (q_heads, q_places), (kv_heads, kv_places) = _union(stage.q), _union(stage.leaving)
        rows, n = self._one.positions_BT.shape

        def new(heads: list[int], added: bool) -> Tensor:
            # Token after token, as the projections' backward reads it.
            like = self._weights[1].new_empty(0, dtype=self._one.parts.dtype)
            shape = (rows, n, len(heads), self._head_dim)
            whole = like.new_zeros(shape, dtype=wide(like)) if added else like.new_empty(shape)
            return whole.transpose(1, 2)

        shared = self._how.shared
        return Landing(q_places, kv_places, new(q_heads, False), new(kv_heads, shared), new(kv_heads, shared))

    def landed(self, stage: Stage, landing: Landing) -> None:
        """The projections' backward of the stage's queries and of the keys and values that are done with: into ``dx`` and ``sums``."""
        (q_heads, _), (kv_heads, _) = _union(stage.q), _union(stage.leaving)
        parts, sums, dx_BTC = self._one.parts, self._sums, self._dx
        assert sums is not None and dx_BTC is not None
        weights, rows = self._of_heads(q_heads, kv_heads)
        of_stage = GradientSums(sums.needed)
        grads = [x.to(parts.dtype) for x in (landing.dq_BHnD, landing.dk_BGnD, landing.dv_BGnD)]
        for a, b in turns(self._ranges, self._one.positions_BT, alike(lambda a, b: False)):
            slices = [grad.narrow(2, a, b - a) for grad in grads]
            dx = parts.enter_backward(self._x(a, b), slices, weights, parts.rows(self._table, a, b), of_stage)
            dx_BTC.narrow(1, a, b - a).add_(dx)
        for i, own in enumerate(rows):
            sums.add_rows(i, of_stage.taken(i), own, self._weights[i])

    def _of_heads(self, q_heads: list[int], kv_heads: list[int]) -> tuple[list[Tensor], list[list[Range] | None]]:
        """The weights of these heads, in the order of ``TokenWise.enter_weights``, and of each which rows they are (None: all)."""
        q, kv = (self._rows(heads) for heads in (q_heads, kv_heads))
        rows: list[list[Range] | None] = [None, q, kv, kv]
        rows += [q, kv, kv] if self._biased else []
        rows += [None] * (len(self._weights) - len(rows))
        return [x if own is None else _taken(x, own) for x, own in zip(self._weights, rows, strict=True)], rows

    def _rows(self, heads: list[int]) -> list[Range]:
        """Those of some heads, which ascend, as few ranges."""
        found: list[Range] = []
        for head in heads:
            start, end = head * self._head_dim, (head + 1) * self._head_dim
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        return found


def _taken(weight: Tensor, rows: Sequence[Range]) -> Tensor:
    """These rows; a view where they are one range."""
    return weight[slice(*rows[0])] if len(rows) == 1 else torch.cat([weight[:0], *(weight[start:end] for start, end in rows)])


def _union(by_rank: Sequence[Range]) -> tuple[list[int], list[Range]]:
    """The heads of all ranks in their order, each once, and where among them those of each rank are."""
    heads = sorted({head for first, last in by_rank for head in range(first, last)})
    return heads, [(heads.index(first), heads.index(last - 1) + 1) if last > first else (0, 0) for first, last in by_rank]


class StagedAttention:
    """One pass of such a layer; a ``memory_mgmt.mixer_saving.Saving``."""

    def __init__(self, one: Pass, how: ByHeads) -> None:
        self.one, self._how = one, how
        split = one.run.policy.mixer.tokens(one.n_tokens, one.run.tile_tokens)
        self._again, self._swapped, self._kept = split.recomputed > 0, split.swapped, split.kept
        self._held: tuple[Held, Held] | None = None
        self._found: tuple[Tensor, Tensor] | None = None

    def attended(self, x_BTC: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(out_BHTD, x) of the block's input, with what they need of gradients."""
        return _Staged.apply(self, x_BTC, *weights)  # type: ignore[return-value]

    def without_gradients(self, x_BTC: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """out_BHTD"""
        return self._forward(lambda a, b: x_BTC[:, a:b], self.one.ranges(), weights)[0]

    def forward(self, x_BTC: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """out_BHTD; holds of it and of the log-sum-exp what the policy says."""
        out_BHTD, lse_BhS = self._forward(lambda a, b: x_BTC[:, a:b], self.one.ranges(), weights)
        if not self._again:
            self._held = tuple(hold(self.one, x, name, self._swapped, self._kept) for x, name in ((out_BHTD, "out"), (lse_BhS, "lse")))  # type: ignore[assignment]
        return out_BHTD

    def _forward(self, x: Callable[[int, int], Tensor], ranges: Ranges, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(out, lse) of the tokens ``x`` of the block's input."""
        one, how = self.one, self._how
        heads = StagedProjections(one, how, one.parts.narrow(weights), x, ranges)
        rows, n = one.positions_BT.shape
        dim = one.run.block.mixer.head_dim
        # Token after token, as the output projection reads it.
        out_BHTD = weights[1].new_empty(rows, n, how.n_heads, dim, dtype=one.parts.dtype).transpose(1, 2)  # type: ignore[arg-type]
        return out_BHTD, how.forward(heads, out_BHTD)

    def trim(self) -> None:
        """See `memory_mgmt.mixer_saving.Saving.trim`."""
        for held in self._held or ():
            held.trim()

    def mixed(self) -> Tensor:
        """See `memory_mgmt.mixer_saving.Saving.mixed`."""
        if self._found is None:
            if self._held is None:
                one = self.one
                with again(), torch.no_grad():
                    self._found = self._forward(one.x.part, one.ranges((one.input_cut,)), one.parts.enter_weights())
            else:
                out, lse = (held.whole() for held in self._held)
                self._found, self._held = (out, lse), None
        return self._found[0]

    def backward(self, dout_BHTD: Tensor, dx_BTC: Tensor, needed: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of x, added to ``dx`` (in place where that is wide enough), and of the weights."""
        self.mixed()
        assert self._found is not None
        (out_BHTD, lse_BhS), self._found = self._found, None
        one = self.one
        own = one.parts.enter_weights()
        sums = GradientSums(needed)
        total_BTC = dx_BTC.to(wide(dx_BTC))  # one term per stage
        ranges = one.ranges((one.input_cut,))
        heads = StagedProjections(one, self._how, one.parts.narrow(own), one.x.part, ranges, sums, total_BTC)
        self._how.backward(dout_BHTD, heads, out_BHTD, lse_BhS)
        return total_BTC.to(dx_BTC.dtype), sums.results(own)


class _Staged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, saving: StagedAttention, x_BTC: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.saving = saving
        ctx.set_materialize_grads(False)
        with torch.autocast(x_BTC.device.type, enabled=False):
            # The stream goes on through this node, so that its gradients meet here.
            return saving.forward(x_BTC, weights), x_BTC.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saving: StagedAttention = ctx.saving
        dout_BHTD, dx_BTC = grads
        one = saving.one
        one.check_unused()
        assert dout_BHTD is not None and dx_BTC is not None, "both come from the one node that both go to"
        with torch.autocast(dout_BHTD.device.type, enabled=False):
            dx_BTC, found = saving.backward(dout_BHTD, dx_BTC, ctx.needs_input_grad[2:])
        one.release()
        return None, dx_BTC if ctx.needs_input_grad[1] else None, *found
