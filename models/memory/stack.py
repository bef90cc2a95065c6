"""Memories around the whole stack of layers: the layers run on one segment at a time, and what they remember goes to the next one.

A new one is a subclass of `StackMemory` with ``begin`` and ``read``. Who runs the steps decides what is kept for the backward pass:
``models/transformer.py`` keeps everything, ``trainer/replay.py`` one segment.

The state inside a sequence is what ``begin`` gives. Between sequences it also has ``pending`` [B, size, C], the tokens of an unfinished
segment as the embedding gave them, and their number ``pending_count`` [B].

Legend: B row, T token, C channel, w most new tokens of a row in a step, s most tokens of a row in a segment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from models.batch import Bounds
from models.memory.protocol import MemoryCost, MemoryModule, State, detached
from models.memory.stack_shapes import StackShapes
from models.segments import Step, joined, padded, plan_segments, put_together, with_idle


@dataclass(frozen=True)
class Backbone:
    """The layers that a memory stands around."""

    blocks: nn.ModuleList
    run: Callable[..., Tensor] | None = None
    """(blocks, x_BTC, positions_BT, bounds) -> the stream after all of them; None: one after the other."""

    def __call__(self, x_BTC: Tensor, positions_BT: Tensor, bounds: Bounds) -> Tensor:
        """The stream after all layers."""
        if self.run is not None:
            return self.run(self.blocks, x_BTC, positions_BT, bounds)
        for block in self.blocks:
            x_BTC = block(x_BTC, positions_BT, bounds)
        return x_BTC


PENDING, COUNT = "pending", "pending_count"


class StackMemory(MemoryModule):
    """Base of memories around the stack. ``size``: tokens of a segment; ``width``: channels of the stream."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size, self.width = size, width
        self.agree: Callable[[int], int] = lambda n: n
        """A seam: the most steps that any rank has for its sequences. Where parameters are sharded all must take equally many."""

    # --- what an architecture defines ------------------------------------------------------------------------------------------

    def begin(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """What a document begins with."""
        raise NotImplementedError

    def read(self, backbone: Backbone, x_BsC: Tensor, lengths: Sequence[int], state: State, cache: dict) -> tuple[Tensor, State]:
        """One segment: the stream after all layers at its tokens, and what is remembered of it.

        ``lengths``: tokens of each row; what follows them in ``x_BsC`` is to have no influence. ``cache``: scratch of the sequence.
        """
        raise NotImplementedError

    def together(self) -> int:
        """How many whole segments `read` takes at once."""
        return 1

    # --- the state between sequences -------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """See `MemoryModule.init_state`."""
        pending = torch.zeros(batch_size, self.size, self.width, device=device, dtype=dtype)
        count = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return {**self.begin(batch_size, device, dtype), PENDING: pending, COUNT: count}

    def plan(self, state: State | None, bounds: Bounds) -> list[Step]:
        """The steps of a sequence that goes on from ``state``."""
        return plan_segments(bounds, self.size, _waiting(state, len(bounds.documents)))

    def plan_carried(self, bounds: Bounds) -> list[Step]:
        """The steps of a sequence that goes on from what is ``carried``, if anything is. Reads no parameters."""
        waiting = [0] * len(bounds.documents)
        if self.carried is not None:
            waiting, fresh = _waiting(self.carried.given, len(waiting)), self.carried.fresh_B
            if not isinstance(fresh, FakeTensor):
                waiting = [0 if new else n for n, new in zip(waiting, fresh.tolist(), strict=True)]
        steps = joined(plan_segments(bounds, self.size, waiting, whole=self.carried is None), self.size, self.together())
        return with_idle(steps, self.agree(len(steps)))

    def opened(self, state: State | None, like: Tensor) -> State:
        """The state before the first step; None: what is carried, or the beginning of a document in every row."""
        if state is None and self.carried is not None:
            state = self.reset(self.carried.given, self.carried.fresh_B)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if state is None:
            return self.begin(len(like), like.device, dtype)
        return {name: value for name, value in state.items() if name != COUNT}

    def closed(self, state: State, steps: Sequence[Step], like: Tensor) -> State:
        """The state after the sequence, from that after its last step."""
        counts = [sum(step.parts[b].length for step in steps if not step.parts[b].closes) for b in range(len(like))]
        dtype = next(iter(state.values())).dtype
        empty = torch.zeros(len(like), self.size, self.width, device=like.device, dtype=dtype)
        count = torch.tensor(counts, dtype=torch.int64, device=like.device)
        return {**state, PENDING: state.get(PENDING, empty).to(dtype), COUNT: count}

    def in_place(self) -> contextlib.AbstractContextManager[None]:
        """Around all steps of a sequence, forward and backward: nothing is to be put anywhere."""
        return contextlib.nullcontext()

    def hand_on(self, state: State, steps: Sequence[Step], like: Tensor) -> None:
        """Leave the state after the last step to the next sequence, where states are carried."""
        if self.carried is not None:
            self.carried.left = detached(self.closed(state, steps, like))

    # --- one step ----------------------------------------------------------------------------------------------------------------

    def step(self, backbone: Backbone, x_BwC: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        """The stream at the step's new tokens, and the state after it."""
        waiting = state.get(PENDING)
        before = {name: value for name, value in state.items() if name != PENDING}
        begins_B, closes_B = step.mask("begins", x_BwC.device), step.mask("closes", x_BwC.device)
        if begins_B is not None:
            dtype = next(iter(before.values())).dtype
            before = _chosen(begins_B, self.begin(len(x_BwC), x_BwC.device, dtype), before)
        lengths = [part.length for part in step.parts]
        x_BsC = self._segment(x_BwC, waiting, step)
        y_BsC, after = self.read(backbone, x_BsC, lengths, before, step.cache)
        if closes_B is None:
            after = before
        elif not all(part.closes for part in step.parts):
            after = _chosen(closes_B, after, before)
        if not step.even:
            y_BsC = padded([y_BsC[b, part.before : part.length] for b, part in enumerate(step.parts)], step.width)
        return y_BsC, {**after, PENDING: self._left(x_BsC, waiting, step)} if step.pending else after

    def _segment(self, x_BwC: Tensor, waiting_BsC: Tensor | None, step: Step) -> Tensor:
        """The segment's tokens, those that waited first."""
        if waiting_BsC is None or not any(part.before for part in step.parts):
            return x_BwC
        old = waiting_BsC.to(x_BwC.dtype)
        rows = [torch.cat([old[b, : part.before], x_BwC[b, : part.new]]) for b, part in enumerate(step.parts)]
        return padded(rows, max(part.length for part in step.parts))

    def _left(self, x_BsC: Tensor, waiting_BsC: Tensor | None, step: Step) -> Tensor:
        """Tokens of unfinished segments: of those that this step leaves so, and of rows that had nothing more to read."""
        rows = []
        for b, part in enumerate(step.parts):
            if part.new:
                rows.append(x_BsC[b, : 0 if part.closes else part.length])
            else:
                rows.append(x_BsC[b, :0] if waiting_BsC is None else waiting_BsC[b].to(x_BsC.dtype))
        return padded(rows, self.size)


def _waiting(state: State | None, rows: int) -> list[int]:
    """Tokens of each row that wait in ``state``. A trace knows no values: there none do."""
    return [0] * rows if state is None or isinstance(state[COUNT], FakeTensor) else state[COUNT].tolist()


def _chosen(rows_B: Tensor, one: State, other: State) -> State:
    """Row by row of ``one`` where the flag is set, else of ``other``."""
    return {name: torch.where(rows_B.view(-1, *[1] * (value.dim() - 1)), one[name].to(value.dtype), value) for name, value in other.items()}


class Stacked(MemoryModule):
    """A memory around blocks as one memory module from stream to stream. ``tile_tokens``: other than 0, every segment is run again in the
    backward pass, and only what goes from one to the next is kept."""

    def __init__(self, memory: StackMemory, blocks: nn.ModuleList, shapes: StackShapes) -> None:
        super().__init__()
        self.memory, self.blocks, self.shapes, self.traits = memory, blocks, shapes, memory.traits

    def init_state(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """See `MemoryModule.init_state`."""
        return self.memory.init_state(batch_size, device, dtype)

    def forward(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """See `MemoryModule.forward`."""
        steps = self.memory.plan(state, bounds)
        inner, found = self.memory.opened(state, x_BTC), []
        for step in steps:
            y_BwC, inner = self._step(step.take(x_BTC), inner, step)
            found.append(y_BwC)
        return put_together(found, steps), self.memory.closed(inner, steps, x_BTC)

    def _step(self, x_BwC: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        backbone = Backbone(self.blocks)
        if not self.tile_tokens:
            return self.memory.step(backbone, x_BwC, state, step)

        def body(x_BwC: Tensor, *values: Tensor) -> tuple[Tensor, State]:
            return self.memory.step(backbone, x_BwC, dict(zip(state, values, strict=True)), step)

        return checkpoint(body, x_BwC, *state.values(), use_reentrant=False)  # type: ignore[return-value]

    def oracle(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """See `MemoryModule.oracle`."""
        from models.memory.stack_oracle import ORACLES, by_segments

        read = ORACLES[type(self.memory).__name__](self.memory, self.blocks)
        return by_segments(self.memory, read, x_BTC, state, bounds)

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`."""
        shapes, wide = self.shapes, max(itemsize, 4)
        return MemoryCost(
            flops_forward=batch_size * shapes.flops_forward(tokens),
            flops_backward=batch_size * shapes.flops_backward(tokens),
            saved_bytes=shapes.saved_bytes(batch_size, tokens, itemsize, wide, self.tile_tokens > 0),
            state_bytes=batch_size * ((shapes.state_elements + shapes.size * shapes.d_model) * wide + 8),
            exchange_bytes=0,
        )
