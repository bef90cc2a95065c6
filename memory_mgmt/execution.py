"""Run one block so that its activations follow a ``LayerPolicy``.

    x -> _Enter -> q, k, v -> attention under saved-tensor hooks -> out -> _Leave -> y        (a memory layer: h instead of q, k, v)

``_Enter`` and ``_Leave`` are one autograd node each for the token-wise parts (memory_mgmt/tiles.py), run a range of tokens at a
time; the sequence-wise mixer between them keeps its own autograd function, and memory_mgmt/mixer_saving.py decides what becomes of
the tensors that it saves. Weight gradients leave each node once, summed over ranges in float32. Works inside FSDP2 units, under
autocast, over ring attention and exchanged memory states; one backward pass per forward pass.

Legend: B row, T token, C channel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memory_mgmt.mixer_saving import AttentionSaving, MemorySaving, Saving
from memory_mgmt.pieces import Held, Parked, Parking, Store, alike, assemble, spans
from memory_mgmt.policy import KEEP, LayerPolicy
from memory_mgmt.quantised import Quantised, quantised
from memory_mgmt.staged_attention import StagedAttention, stages_of
from memory_mgmt.tiles import GradientSums, RopeTable, check_known, token_wise_of
from models.attention import Attention
from models.batch import Bounds
from models.feedforward import compute_dtype
from models.memory.protocol import MemoryModule
from models.repeat import again, turns
from models.transformer import Block

_LAST_PASS = "last pass under a memory policy"


class BlockExecution:
    """The seam ``Block.run`` filled with a policy.

    Args:
        block: the block it runs; its parameters are read at every use.
        index: its number from the input up, a name for the store and for prefetching one layer ahead.
        policy: what happens to its activations.
        tile_tokens: tokens per range of the token-wise parts; 0 for no limit.
        memory_tile_tokens: tokens per tile of a memory layer; 0 for the whole shard, or eighths where the policy splits it.
        store: where swapped tensors go; None if nothing is swapped.
        keep_rng: restore random number states when a memory layer is computed again.
    Raises:
        TypeError: for a block whose parts are not those of models/.
    """

    def __init__(
        self,
        block: Block,
        index: int,
        policy: LayerPolicy,
        tile_tokens: int = 0,
        memory_tile_tokens: int = 0,
        store: Store | None = None,
        keep_rng: bool = False,
    ) -> None:
        check_known(block)
        self.block, self.index, self.policy = block, index, policy
        self.tile_tokens, self.memory_tile_tokens = tile_tokens, memory_tile_tokens
        self.store, self.keep_rng = store, keep_rng
        self._passes: set[int] = set()
        """Numbers of the passes between forward and backward, part of the names of what they park."""

    def __call__(self, body: Callable[..., Tensor], x_BTC: Tensor, positions_BT: Tensor, bounds: Bounds) -> Tensor:
        """The residual stream after the block. ``body``, the plain way to compute it, is not used."""
        one = Pass(self, x_BTC, positions_BT, bounds)
        if not torch.is_grad_enabled():
            return self._without_gradients(one, x_BTC)
        one.hold(x_BTC)
        if one.split["projections"].held == 0 and (how := stages_of(one, x_BTC)) is not None:
            staged = StagedAttention(one, how)
            return self._leave(one, staged, *staged.attended(x_BTC, one.parts.enter_weights()))
        *entered, x_BTC = _Enter.apply(one, x_BTC, *one.parts.enter_weights())  # type: ignore[misc]
        if isinstance(self.block.mixer, Attention):
            entered[1:] = self.block.mixer.keys_leave(entered[1], entered[2], bounds)
        saving = AttentionSaving(one) if isinstance(self.block.mixer, Attention) else MemorySaving(one)
        mixed = saving.run(*entered)
        del entered
        return self._leave(one, saving, mixed, x_BTC)

    def _leave(self, one: Pass, saving: Saving, mixed: Tensor, x_BTC: Tensor) -> Tensor:
        """What follows the mixer; then the pass lets go of what is not kept."""
        y_BTC = _Leave.apply(one, saving, x_BTC, mixed, *one.parts.leave_weights())
        del mixed, x_BTC
        saving.trim()
        one.x.trim()
        return self._feed_forward(y_BTC, one.bounds) if one.parts.ends_with_mixer else y_BTC  # type: ignore[arg-type, return-value]

    def _feed_forward(self, x_BTC: Tensor, bounds: Bounds) -> Tensor:
        """Of a layer that reads a table: kept whole, or all of it run again in the backward pass from the stream after the mixer."""
        if self.policy.feed_forward.recompute > 0:
            return checkpoint(self.block.feed_forward, x_BTC, bounds, use_reentrant=False, preserve_rng_state=self.keep_rng)  # type: ignore[return-value]
        return self.block.feed_forward(x_BTC, bounds)

    def _without_gradients(self, one: Pass, x_BTC: Tensor) -> Tensor:
        """The same arithmetic range by range; nothing is saved."""
        mixer, how = self.block.mixer, stages_of(one, x_BTC)
        with torch.autocast(x_BTC.device.type, enabled=False):
            if how is not None:
                entered = [StagedAttention(one, how).without_gradients(x_BTC, one.parts.enter_weights())]
            else:
                entered = _enter(one, x_BTC, one.parts.enter_weights())
        if how is not None:
            (mixed,) = entered
        elif isinstance(mixer, MemoryModule):
            mixer.tile_tokens = self.memory_tile_tokens
            mixed = mixer.remember(entered[0], one.bounds)
        else:
            mixed = mixer.inner_attention(*entered, one.bounds)  # type: ignore[operator]
        del entered
        if self.block.for_state:
            return x_BTC
        with torch.autocast(x_BTC.device.type, enabled=False):
            y_BTC = _leave(one, x_BTC, mixed, one.parts.leave_weights(), None)
        return self.block.feed_forward(y_BTC, one.bounds) if one.parts.ends_with_mixer else y_BTC

    def start_pass(self) -> int:
        """The smallest number that no pass of this block has."""
        number = next(n for n in range(len(self._passes) + 1) if n not in self._passes)
        self._passes.add(number)
        return number

    def end_pass(self, number: int) -> None:
        """Give the number of a pass back."""
        self._passes.discard(number)


class Pass:
    """One forward and backward pass of one block: what it holds between the two."""

    def __init__(self, run: BlockExecution, x_BTC: Tensor, positions_BT: Tensor, bounds: Bounds) -> None:
        self.run, self.positions_BT, self.bounds = run, positions_BT, bounds
        self.n_tokens = x_BTC.shape[1]
        self.parts = token_wise_of(run.block, compute_dtype(x_BTC))
        self.autocast = _autocast_now(x_BTC)
        self.number: int | None = None
        self.normed_BTC: Tensor | None = None
        """A memory layer's input while its backward runs."""

    def hold(self, x_BTC: Tensor) -> None:
        """Take what has to outlive forward; the swapped tokens of the input leave at once."""
        self.number = self.run.start_pass()
        self.parking = Parking(self.run.store, (self.run.index, self.number))
        self.split = {
            name: self.run.policy.of(name).tokens(self.n_tokens, self.run.tile_tokens) for name in ("projections", "feed_forward")
        }
        if self.parts.ends_with_mixer:  # nothing of it is wanted again
            self.split["feed_forward"] = KEEP.tokens(self.n_tokens, 0)
        split = self.run.policy.input.tokens(self.n_tokens, self.run.tile_tokens)
        self.input_cut = split.swapped
        self.x = Held(x_BTC, 1, split.swapped, split.kept, self.parking, "input")
        # The pass of the layer below, so that its tensors come back while this layer's backward runs.
        before = self.bounds._cache.get(_LAST_PASS)
        self.below = before if self.run.index > 0 else None
        self.bounds._cache[_LAST_PASS] = weakref.ref(self)

    def prefetch_below(self) -> None:
        """Start to bring back what the layer below will need."""
        below = self.below() if self.below is not None else None
        if below is not None:
            below.parking.prefetch()

    def ranges(self, cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Token ranges of the token-wise parts."""
        return spans(self.n_tokens, self.run.tile_tokens, cuts)

    def table(self) -> RopeTable | None:
        """cos and sin of all tokens, shared by all layers of a micro-step."""
        mixer = self.run.block.mixer
        return mixer.rope_table(self.positions_BT, self.parts.dtype, self.bounds) if isinstance(mixer, Attention) else None

    def entered(self, start: int, end: int) -> list[Tensor]:
        """q, k, v, their tokens by rank (a memory: the normed input), of these tokens, made again from the input."""
        with again(), torch.no_grad(), torch.autocast(self.positions_BT.device.type, enabled=False):
            weights = self.parts.narrow(self.parts.enter_weights())
            table = self.table()
            ranges = [(a, b) for a, b in self.ranges((start, end, self.input_cut)) if start <= a and b <= end]

            def make(a: int, b: int) -> list[Tensor]:
                return self.parts.enter(self.x.part(a, b), weights, self.parts.rows(table, a, b))

            return assemble(ranges, make, self.parts.enter_dims, self.positions_BT)

    def normed(self) -> Tensor:
        """A memory layer's whole input, made once per backward pass."""
        if self.normed_BTC is None:
            (self.normed_BTC,) = self.entered(0, self.n_tokens)
        return self.normed_BTC

    def release(self) -> None:
        """Let go of everything; the backward pass is over, or will never come."""
        if self.number is not None:
            self.run.end_pass(self.number)
            self.number = self.normed_BTC = self.below = None
            del self.x

    def check_unused(self) -> None:
        """Raise RuntimeError when this pass has been released."""
        if self.number is None:
            raise RuntimeError("a block under a memory policy was differentiated a second time; run its forward pass again first")

    def __del__(self) -> None:
        self.release()


class _InHost(NamedTuple):
    """What ``TokenWise.leave_backward`` needs of one range, in host memory."""

    parked: list[Parked]

    def tensors(self) -> list[Tensor]:
        """They, on the device again."""
        return [parked.fetch() for parked in self.parked]


class _InEightBits(NamedTuple):
    """The same, on the device up to rounding."""

    packed: list[Quantised]

    @staticmethod
    def of(tensors: list[Tensor]) -> _InEightBits:
        """Takes ``tensors`` out of their list one after another, so that each can be freed once its copy is made."""
        return _InEightBits([quantised(tensors.pop(0)) for _ in range(len(tensors))])

    def tensors(self) -> list[Tensor]:
        """They, near enough; the copies are gone then."""
        return [self.packed.pop(0).restored() for _ in range(len(self.packed))]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: Pass, x_BTC: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.one = one
        ctx.set_materialize_grads(False)
        with torch.autocast(x_BTC.device.type, enabled=False):
            # The stream goes on through this node, so that its two gradients meet here, range by range.
            return *_enter(one, x_BTC, weights), x_BTC.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        one: Pass = ctx.one
        one.check_unused()
        *dentered, dx_BTC = grads
        parts, table = one.parts, one.table()
        own = parts.enter_weights()
        weights, sums = parts.narrow(own), GradientSums(ctx.needs_input_grad[2:])
        dim = parts.mixer_dim
        if any(grad is not None for grad in dentered):
            with torch.autocast(one.positions_BT.device.type, enabled=False):
                for a, b in turns(one.ranges((one.input_cut,)), one.positions_BT, alike(lambda a, b: False)):
                    slices = [parts.by_rank(grad).narrow(dim, a, b - a) for grad in dentered]  # type: ignore[arg-type]
                    dx = parts.enter_backward(one.x.part(a, b), slices, weights, parts.rows(table, a, b), sums)
                    if dx_BTC is None:
                        dx_BTC = dx.new_zeros(len(dx), one.n_tokens, dx.shape[2])
                    dx_BTC.narrow(1, a, b - a).add_(dx)  # no one else sees the gradient that _Leave made
        one.release()
        return None, dx_BTC if ctx.needs_input_grad[1] else None, *sums.results(own)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: Pass, saving: Saving, x_BTC: Tensor, mixed: Tensor, *weights: Tensor) -> Tensor:
        ctx.one, ctx.saving = one, saving
        ctx.middles = {}
        with torch.autocast(x_BTC.device.type, enabled=False):
            return _leave(one, x_BTC, mixed, weights, ctx.middles)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        one, saving = ctx.one, ctx.saving
        one.check_unused()
        one.prefetch_below()
        parts, dim = one.parts, one.parts.mixer_dim
        own = parts.leave_weights()
        weights, sums = parts.narrow(own), GradientSums(ctx.needs_input_grad[4:])
        mixed = None if (found := saving.mixed()) is None else parts.by_rank(found)
        del found
        middles, ctx.middles, ctx.saving = ctx.middles, None, None

        def make(a: int, b: int) -> tuple[Tensor, Tensor]:
            mixed_now = None if mixed is None else mixed.narrow(dim, a, b - a)
            middle = [] if parts.ends_with_mixer else middles.pop((a, b), None)
            if middle is None:
                assert mixed_now is not None
                with again():
                    middle = parts.middle(one.x.part(a, b), mixed_now, weights)
            elif not isinstance(middle, list):
                middle = middle.tensors()
            return parts.leave_backward(grads[0].narrow(1, a, b - a), middle, mixed_now, weights, sums)

        with torch.autocast(grads[0].device.type, enabled=False):
            dx_BTC, dmixed = assemble(one.ranges(_leave_cuts(one)), make, (1, dim), grads[0], lasting=lambda a, b: (a, b) in middles)
        return None, None, dx_BTC, parts.joined(dmixed), *sums.results(own)


def _enter(one: Pass, x_BTC: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    narrow, table = one.parts.narrow(weights), one.table()
    parts, ranges = one.parts, one.ranges()
    made = assemble(ranges, lambda a, b: parts.enter(x_BTC[:, a:b], narrow, parts.rows(table, a, b)), parts.enter_dims, x_BTC)
    return [parts.joined(made.pop(0)) for _ in range(len(made))]


def _leave(one: Pass, x_BTC: Tensor, mixed: Tensor, weights: Sequence[Tensor], middles: dict | None) -> Tensor:
    """y_BTC. ``middles`` takes, by range, what is kept (as it is or in eight bits) or parked of it; None saves nothing."""
    parts, dim = one.parts, one.parts.mixer_dim
    narrow = parts.narrow(weights)
    y_BTC, mixed = torch.empty_like(x_BTC), parts.by_rank(mixed)
    held = 0 if middles is None else one.split["feed_forward"].held
    for a, b in turns(one.ranges(() if middles is None else _leave_cuts(one)), x_BTC, alike(lambda a, b: b <= held)):
        middle = parts.middle(x_BTC[:, a:b], mixed.narrow(dim, a, b - a), narrow)
        parts.leave(middle, narrow, y_BTC[:, a:b])
        if middles is None or parts.ends_with_mixer:
            continue
        split = one.split["feed_forward"]
        if b <= split.swapped:
            parked = [one.parking.park(tensor, ("feed_forward", a, i)) for i, tensor in enumerate(middle)]
            middles[a, b] = _InHost(parked)
        elif b <= split.swapped + split.kept:
            middles[a, b] = middle
        elif b <= split.held:
            middles[a, b] = _InEightBits.of(middle)
    return y_BTC


def _leave_cuts(one: Pass) -> tuple[int, ...]:
    split = one.split["feed_forward"]
    return split.swapped, split.swapped + split.kept, split.held, one.input_cut


def _autocast_now(x: Tensor) -> dict[str, Any]:
    """Arguments that restore the present autocast state, without its cache of weights."""
    device = x.device.type
    enabled = torch.is_autocast_enabled(device)
    return {"device_type": device, "dtype": torch.get_autocast_dtype(device), "enabled": enabled, "cache_enabled": False}
