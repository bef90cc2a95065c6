"""What the mixers with a convolution and an affine state share: tiles, halos, the walk over token ranges, the exchange over ranks.

A mixer says how a tile is computed from its inputs and the state before it (``whole_tile``) and how a sequence that is split is
(``exchanged``). `DiagonalMixer` is the second for states whose transition is elementwise: every range's keys, values and decays are
made and summed up, summaries (decay, sum) are exchanged once, then the range runs on the state that really comes in.

Legend: B row, T token, C channel, H head, G = B*H, K and W the two sides of a head's state, n tokens of halo.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.batch import Bounds, Range
from models.int8_weight import Int8Weight, in_dtype
from models.linear import widened
from models.memory.by_heads import Rows, exchanged_numbers, through_heads, width_of
from models.memory.protocol import LocalCarry, MemoryModule, State, last_tokens, local_offsets, ranges_in_order

Streams = tuple[Tensor, ...]
"""What a mixer makes of a tile's inputs before any state is known."""


def state_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class RecurrentMixer(MemoryModule):
    """Base of mixers with the state ``state`` [B, H, K, W] and, for a convolution, the layer's last inputs ``conv`` [B, n, d_model]."""

    def __init__(self, d_model: int, state_shape: tuple[int, int, int], conv_kernel: int, chunk_size: int) -> None:
        super().__init__()
        self.d_model, self.state_shape = d_model, state_shape
        self.halo, self.chunk_size = conv_kernel - 1, chunk_size
        self.kernel = "auto"
        """Of the recurrence (``model.memory.kernel``)."""

    def init_state(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """``state`` [B, H, K, W] and ``conv`` [B, kernel - 1, d_model], the last inputs of the layer."""
        return {
            "state": torch.zeros(batch_size, *self.state_shape, device=device, dtype=dtype),
            "conv": torch.zeros(batch_size, self.halo, self.d_model, device=device, dtype=dtype),
        }

    # --- what a mixer defines -------------------------------------------------------------------------------------------------

    def weights(self) -> Any:
        """The parameters as the tiles use them."""
        raise NotImplementedError

    def whole_tile(self, bounds: Bounds, span: Range, weights: Any, x_BTC: Tensor, before_BnC: Tensor, state_GKW: Tensor) -> Any:
        """(y_BTC, state after the tile) of the tokens ``span``, from the state before it."""
        raise NotImplementedError

    def exchanged(self, pieces: list[Tensor], halos: list[Tensor], initial_BHKW: Tensor, bounds: Bounds) -> tuple[list[Tensor], Tensor]:
        """The outputs of this rank's ranges and the state after the sequence, where other ranks hold other ranges."""
        raise NotImplementedError

    # --- what one whose heads do not meet defines besides (`models/memory/by_heads.py`) ---------------------------------------------

    n_heads: int
    projections: tuple[str, ...] = ()
    """Names of those of `weights` through which a head gets tokens."""

    def head_rows(self, heads: Range) -> dict[str, Rows]:
        """Which rows of every one of ``projections``, and of other `weights` that are per head, belong to ``heads``."""
        raise NotImplementedError

    def state_rows(self, heads: Range) -> Rows:
        """Which states of the H are those of ``heads``."""
        return (heads,)

    def output_rows(self, heads: Range) -> Rows:
        """Which columns of all heads' outputs are those of ``heads``."""
        raise NotImplementedError

    def narrowed(self, heads: Range) -> Self:
        """This mixer with ``heads`` alone, in one process; it shares everything else with this one."""
        narrow = copy.copy(self)
        narrow.n_heads, narrow.carry = heads[1] - heads[0], LocalCarry()
        narrow.state_shape = (width_of(self.state_rows(heads)), *self.state_shape[1:])
        return narrow

    def recur(
        self, bounds: Bounds, span: Range, weights: Any, f_BTE: Tensor, before_BnE: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(outputs of all heads [B, T, X], state after the tile), from projected tokens."""
        raise NotImplementedError

    def write(self, weights: Any, x_BTC: Tensor, o_BTX: Tensor) -> Tensor:
        """y_BTC of tokens and of what their heads came to."""
        raise NotImplementedError

    @property
    def crosses(self) -> bool:
        """Whether summaries of token ranges go to other ranks; where heads do, every rank works as one process."""
        return not self.carry.local and self.carry.heads is None

    def head_bytes(self, tokens: int, itemsize: int) -> int:
        """What the exchange of heads sends of ``tokens``, which is also what it leaves: kept where a tile's inside is not. 0 without."""
        return 0 if self.carry.heads is None else tokens * itemsize * exchanged_numbers(self)

    # --- the walk -------------------------------------------------------------------------------------------------------------

    def forward(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """See `MemoryModule.forward`."""
        if self.carry.heads is not None:
            return through_heads(self, x_BTC, state, bounds)
        start = self.init_state(len(x_BTC), x_BTC.device, state_dtype(x_BTC)) if state is None else state
        halos = self._halos(x_BTC, start["conv"], bounds)
        offsets = local_offsets(bounds)
        pieces = [x_BTC[:, offsets[i] : offsets[i + 1]] for i in range(len(bounds.ranges))]
        initial_BHKW = start["state"].to(state_dtype(x_BTC))
        walk = self._carried_through if self.carry.local else self.exchanged
        outputs, final_BHKW = walk(pieces, halos, initial_BHKW, bounds)
        y_BTC = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return y_BTC, self._state_after(x_BTC, state, final_BHKW, pieces, halos, bounds)

    def _carried_through(
        self, pieces: list[Tensor], halos: list[Tensor], state_BHKW: Tensor, bounds: Bounds
    ) -> tuple[list[Tensor], Tensor]:
        """One process: the state goes from tile to tile and from range to range."""
        outputs = list(pieces)
        weights, state_GKW = self.weights(), state_BHKW.flatten(0, 1)
        for i in ranges_in_order(bounds):
            tiles, before = [], halos[i]
            for span, x in self.tiles(pieces[i], bounds.ranges[i]):
                y, state_GKW = self.run(bounds, span, partial(self.whole_tile, bounds, span), weights, x, before, state_GKW)
                tiles.append(y)
                before = last_tokens(before, x, self.halo)
            outputs[i] = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)
        return outputs, state_GKW.unflatten(0, state_BHKW.shape[:2])

    def run(self, bounds: Bounds, span: Range, body: Any, *args: Any) -> Any:
        """One tile; with tiles its inside is recomputed in the backward pass unless ``run_tile`` decides."""
        if self.run_tile is not None:
            return self.run_tile(_local_start(bounds, span), span[1] - span[0], body, *args)
        if not self.tile_tokens or not torch.is_grad_enabled():
            return body(*args)
        return checkpoint(body, *args, use_reentrant=False, preserve_rng_state=False)

    def tiles(self, x_BTC: Tensor, span: Range) -> list[tuple[Range, Tensor]]:
        """Global spans and their tokens."""
        start, end = span
        size = self.tile_tokens or end - start
        return [((a, min(a + size, end)), x_BTC[:, a - start : a - start + size]) for a in range(start, end, size)]

    def wide(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """Weights of projections; with tiles, low-precision ones are widened once so that tile gradients add up in float32."""
        return self.widened(weights) if self.tile_tokens else list(weights)

    def widened(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """Weights in the dtype of states."""
        dtypes = ((weight, state_dtype(weight)) for weight in weights)
        return [in_dtype(weight, dtype) if isinstance(weight, Int8Weight) else widened(weight, dtype) for weight, dtype in dtypes]

    # --- edges of the sequence ------------------------------------------------------------------------------------------------

    def _halos(self, x_BTC: Tensor, conv_BnC: Tensor, bounds: Bounds) -> list[Tensor]:
        """Inputs before every range; what lies before the sequence comes from the state."""
        if not self.halo:
            return [x_BTC[:, :0] for _ in bounds.ranges]
        origin = min(start for start, _ in bounds.ranges) if self.carry.local else 0
        halos = self.carry.halo(x_BTC, self.halo, bounds)
        for i, (start, _) in enumerate(bounds.ranges):
            inside = start - origin
            if inside < self.halo:
                halos[i] = torch.cat([conv_BnC[:, inside:].to(x_BTC.dtype), halos[i][:, self.halo - inside :]], dim=1)
        return halos

    def _state_after(
        self, x_BTC: Tensor, given: State | None, final_BHKW: Tensor, pieces: list[Tensor], halos: list[Tensor], bounds: Bounds
    ) -> State:
        """The state to hand to the next sequence; over several ranks only for a caller that carries states at all."""
        if self.carry.local:
            last = ranges_in_order(bounds)[-1]
            return {"state": final_BHKW, "conv": last_tokens(halos[last], pieces[last], self.halo)}
        if given is None:
            return {}
        if self.traits.transition in ("affine_dense", "affine_diag"):
            final_BHKW = self.carry.everywhere(final_BHKW, bounds)
        before_BnC = given["conv"].to(x_BTC.dtype)
        if not self.halo:
            return {"state": final_BHKW, "conv": before_BnC}
        conv = self.carry.tail(x_BTC, self.halo, bounds)
        short = self.halo - min(self.halo, bounds.seq_len)
        return {"state": final_BHKW, "conv": torch.cat([before_BnC[:, self.halo - short :], conv[:, short:]], dim=1)}


class DiagonalMixer(RecurrentMixer):
    """Base of mixers whose state is decayed elementwise and added to: S_out = a S_in + E for every token range."""

    def streams(self, bounds: Bounds, span: Range, weights: Any, x_BTC: Tensor, before_BnC: Tensor) -> Streams:
        """Queries, keys, values and decays of a tile."""
        raise NotImplementedError

    def summary(self, bounds: Bounds, span: Range, streams: Streams, state_GKW: Tensor) -> tuple[Tensor, Tensor]:
        """(decay of the whole tile [G, K or 1, 1], state after it), without reading."""
        raise NotImplementedError

    def mix(self, bounds: Bounds, span: Range, weights: Any, x_BTC: Tensor, state_GKW: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """(y_BTC, state after the tile) of a tile's streams, from the state before it."""
        raise NotImplementedError

    def whole_tile(
        self, bounds: Bounds, span: Range, weights: Any, x_BTC: Tensor, before_BnC: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `RecurrentMixer.whole_tile`."""
        return self.mix(bounds, span, weights, x_BTC, state_GKW, self.streams(bounds, span, weights, x_BTC, before_BnC))

    def exchanged(self, pieces: list[Tensor], halos: list[Tensor], initial_BHKW: Tensor, bounds: Bounds) -> tuple[list[Tensor], Tensor]:
        """See `RecurrentMixer.exchanged`."""
        shape = initial_BHKW.shape[:2]
        weights, nothing_GKW = self.weights(), torch.zeros_like(initial_BHKW.flatten(0, 1))
        decays, updates, made = [], [], []
        for i, piece in enumerate(pieces):
            decay, state_GKW, before, of_tiles = None, nothing_GKW, halos[i], []
            for span, x in self.tiles(piece, bounds.ranges[i]):
                one, state_GKW, *streams = self.run(bounds, span, partial(self._summed_up, bounds, span), weights, x, before, state_GKW)
                decay = one if decay is None else decay * one
                of_tiles.append(streams)
                before = last_tokens(before, x, self.halo)
            assert decay is not None
            decays.append(decay.unflatten(0, shape))
            updates.append(state_GKW.unflatten(0, shape))
            made.append(of_tiles)
        incoming, final_BHKW = self.carry.diagonal(decays, updates, initial_BHKW, bounds)
        outputs = []
        for i, piece in enumerate(pieces):
            tiles, state_GKW = [], incoming[i].flatten(0, 1)
            for (span, x), streams in zip(self.tiles(piece, bounds.ranges[i]), made[i], strict=True):
                y, state_GKW = self.run(bounds, span, partial(self._mixed, bounds, span), weights, x, state_GKW, *streams)
                tiles.append(y)
            outputs.append(tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1))
        return outputs, final_BHKW

    def _summed_up(
        self, bounds: Bounds, span: Range, weights: Any, x_BTC: Tensor, before_BnC: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, ...]:
        streams = self.streams(bounds, span, weights, x_BTC, before_BnC)
        return *self.summary(bounds, span, streams, state_GKW), *streams

    def _mixed(
        self, bounds: Bounds, span: Range, weights: Any, x_BTC: Tensor, state_GKW: Tensor, *streams: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.mix(bounds, span, weights, x_BTC, state_GKW, streams)


def whole_decay(log_decay_NGCK: Tensor, segment_NBC: Tensor | None) -> Tensor:
    """Product of all decays of a tile, [G, K]; 0 for rows in which a document starts."""
    decay_GK = log_decay_NGCK.sum((0, 2)).exp()
    if segment_NBC is None:
        return decay_GK
    cut_B = (segment_NBC != 0).any(-1).any(0)
    return decay_GK.unflatten(0, (len(cut_B), -1)).masked_fill(cut_B.view(-1, 1, 1), 0).flatten(0, 1)


def _local_start(bounds: Bounds, span: Range) -> int:
    """Local index of a span's first token."""
    for offset, (start, end) in zip(local_offsets(bounds), bounds.ranges, strict=False):
        if start <= span[0] < end:
            return offset + span[0] - start
    raise ValueError(f"tokens {span} are not in ranges {bounds.ranges}")
