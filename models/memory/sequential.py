"""Memories of vectors that are rewritten once per segment by what is no affine function of them: segments follow one another.

Only the rewriting is serial. What tokens offer to it is made before, what they read after, for all segments together. Over ranks the
state goes from rank to rank in the contiguous layout, and reading goes on while the next rank writes.

Legend: B row, T token, C channel, N segment, c token in segment, m memory vectors, D their size, G = B.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.batch import Bounds, Range
from models.memory.protocol import MemoryTraits, State, last_tokens
from models.memory.recurrent import Streams
from models.memory.segmented import SegmentedMixer
from models.memory.segments import Segments, plan_segments


class SequentialMixer(SegmentedMixer):
    """Base of the mixers with the state ``state`` [B, 1, m, D]. ``anchor`` is a parameter of the layer: see `Carry.arrive`."""

    def __init__(self, d_model: int, n_vectors: int, segment: int, lead: int = 0) -> None:
        super().__init__(d_model, (1, n_vectors, d_model), segment, lead)
        self.n_vectors = n_vectors
        self.traits = MemoryTraits(
            carry="layer",
            transition="nonlinear",
            read_at="segment_start",
            halo_tokens=self.halo,
            layouts=frozenset({"contiguous"}),
        )

    @property
    def anchor(self) -> Tensor:
        """A parameter of the layer."""
        raise NotImplementedError

    def streams(self, bounds: Bounds, span: Range, weights: Any, x_BTC: Tensor, before_BnC: Tensor) -> Streams:
        """What a tile's tokens offer to the memory, segment by segment, [B, N, ...] each."""
        raise NotImplementedError

    def rewrite(self, plan: Segments, n: int, weights: Any, state_BmD: Tensor, streams: Streams) -> Tensor:
        """The memory after segment ``n``, from what it was at its start, whether or not the segment ends here."""
        raise NotImplementedError

    def read(
        self, bounds: Bounds, span: Range, weights: Any, x_BTC: Tensor, before_BnC: Tensor, at_start_BNmD: Tensor, *streams: Tensor
    ) -> Tensor:
        """The layer's output for a tile's tokens, from the memory at their segments' starts (those with tokens of the range)."""
        raise NotImplementedError

    # --- the walk -----------------------------------------------------------------------------------------------------------------

    def _written(
        self, bounds: Bounds, span: Range, rows: Range | None, weights: Any, state_BmD: Tensor, *streams: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The memory at every segment's start [B, N, m, D], and the one that goes on. ``rows``: of the batch, if not all of them."""
        plan = plan_segments(bounds, span, self.segment, state_BmD.device, self.lead)
        plan = plan.of_rows(*rows) if rows else plan
        fresh_BmD = self.init_state(len(state_BmD), state_BmD.device, state_BmD.dtype)["state"][:, 0]
        starts = []
        for n in range(plan.lead, plan.n_segments):
            start_BmD = torch.where(plan.fresh_BN[:, n, None, None], fresh_BmD, state_BmD)
            after_BmD = self.rewrite(plan, n, weights, start_BmD, streams)
            state_BmD = torch.where(plan.whole_BN[:, n, None, None], after_BmD, state_BmD)
            starts.append(start_BmD)
        return torch.stack(starts, 1), state_BmD

    def whole_tile(
        self, bounds: Bounds, span: Range, weights: Any, x_BTC: Tensor, before_BnC: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `RecurrentMixer.whole_tile`."""
        streams = self.streams(bounds, span, weights, x_BTC, before_BnC)
        starts_BNmD, after_BmD = self._written(bounds, span, None, weights, state_GKW, *streams)
        return self.read(bounds, span, weights, x_BTC, before_BnC, starts_BNmD, *streams), after_BmD

    def exchanged(self, pieces: list[Tensor], halos: list[Tensor], initial_BHKW: Tensor, bounds: Bounds) -> tuple[list[Tensor], Tensor]:
        """See `RecurrentMixer.exchanged`: one range per rank, the state from the rank before and on to the next; some rows after others,
        so that the next rank is at work on the first ones while this one is on those that follow."""
        (piece,), (range_,), (before,) = pieces, bounds.ranges, halos
        weights, spans, befores, made = self.weights(), self.tiles(piece, range_), [], []
        for span, x in spans:
            made.append(self.run(bounds, span, partial(self.streams, bounds, span), weights, x, before))
            befores.append(before)
            before = last_tokens(before, x, self.halo)
        flights = in_flight(len(piece), self.carry.ranks)
        sizes = [end - first for first, end in flights]
        dealt = [[stream.split(sizes) for stream in streams] for streams in made]
        begun: list[list[Tensor]] = [[] for _ in spans]
        after = []
        for i, (rows, initial_GmD) in enumerate(zip(flights, initial_BHKW.flatten(0, 1).split(sizes), strict=True)):
            state_GmD = self.carry.arrive(initial_GmD, self.anchor)
            for (span, _), streams, starts in zip(spans, dealt, begun, strict=True):
                body = partial(self._written, bounds, span, rows)
                at_start_GNmD, state_GmD = self.run(bounds, span, body, weights, state_GmD, *(stream[i] for stream in streams))
                starts.append(at_start_GNmD)
            state_GmD, begun[-1][-1] = self.carry.pass_on(state_GmD, begun[-1][-1])
            after.append(state_GmD)
        state_BmD, starts = _joined(after), [_joined(of_tile) for of_tile in begun]
        outputs = [
            self.run(bounds, span, partial(self.read, bounds, span), weights, x, before, at_start, *streams)
            for (span, x), before, at_start, streams in zip(spans, befores, starts, made, strict=True)
        ]
        return [outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)], state_BmD.unflatten(0, initial_BHKW.shape[:2])

    def _state_after(
        self, x_BTC: Tensor, given: State | None, final_BHKW: Tensor, pieces: list[Tensor], halos: list[Tensor], bounds: Bounds
    ) -> State:
        """As of the base; the last rank's state is everyone's."""
        if given is not None and not self.carry.local:
            final_BHKW = self.carry.stacked(final_BHKW)[-1]
        return super()._state_after(x_BTC, given, final_BHKW, pieces, halos, bounds)


def in_flight(rows: int, ranks: int) -> list[Range]:
    """The rows of a batch in groups, each of which goes from rank to rank by itself: at most twice as many as there are ranks, beyond which
    little waiting is left and every group's products are smaller."""
    groups = min(rows, 2 * ranks)
    return [(rows * g // groups, rows * (g + 1) // groups) for g in range(groups)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
