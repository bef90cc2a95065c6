"""Time inside a sequence: segment after segment with the memory handed on, and back again (memory replay, arXiv 2010.06891).

Forward, nothing is kept but the states at the borders of segments; backward, each segment is run again from its state, and the gradient of
the state goes to the segment before. So one segment's activations exist at a time, whatever the length, and gradients are those of a
backward pass through all of it. Every segment is a forward and backward pass of the whole model: recomputation, offloading and sharding
inside it are what they are elsewhere.

With a truncation window gradients end at every ``window``-th border: each window is finished before the next one begins, and no states are
kept but its own. With ``states`` sqrt those of every k-th border are kept, k about the root of their number, and the others made again.

Legend: B row, T token, n segments of a window.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

from memory_mgmt.apply import draws_random_numbers
from models.batch import Batch
from models.layer_segments import LayerSegments
from models.memory.armt import AssociativeMemory
from models.memory.armt_diagonals import Diagonals
from models.memory.protocol import State, detached
from models.repeat import again, turns
from models.segments import Segment, Step
from models.transformer import Block, Transformer
from parallel.fsdp import held_together
from trainer.config import RunConfig

Call = Callable[[Batch, Segment], tuple[Tensor, State]]
"""(shard, segment) -> (nll_Bw, state after it), as `Transformer.forward`, in the run's precision."""
Around = Callable[[Tensor], contextlib.AbstractContextManager[None]]
"""Given nll_BT, complete: what to do around the last backward pass."""


class Kept:
    """States at borders, each in its row of one tensor per leaf; made when the first one comes."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.stacked: State = {}
        self.others: dict[int, State] = {}
        """Leaves that not every state has: tokens of rows that wait inside a segment."""

    def put(self, place: int, state: State) -> None:
        """Keep ``state``."""
        if not self.stacked:
            self.stacked = {name: value.new_empty(self.places, *value.shape) for name, value in state.items()}
        for name in self.stacked.keys() & state.keys():
            self.stacked[name][place].copy_(state[name])
        self.others[place] = {name: value.clone() for name, value in state.items() if name not in self.stacked}

    def get(self, place: int) -> State:
        """What ``put`` was given, as leaves that ask for a gradient."""
        state = {name: value[place] for name, value in self.stacked.items()} | self.others.get(place, {})
        return {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in state.items()}


@dataclass
class Chance:
    """States of the random number generators before each step, so that what runs again draws the same."""

    device: torch.device
    before: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def note(self, i: int) -> None:
        """Before step ``i`` runs for the first time."""
        self.before[i] = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    @contextlib.contextmanager
    def as_before(self, i: int) -> Iterator[None]:
        """Around step ``i`` when it runs again; the generators go on from where they are."""
        cpu, cuda = self.before[i]
        with torch.random.fork_rng([self.device] if cuda is not None else []):
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self.device)
            yield


class SegmentRunner:
    """Runs the segments of one pass's sequences forward and backward; see the module.

    ``window``: segments that gradients go through; None: all. ``draws``: whether a forward pass draws random numbers. Sharded parameters
    are gathered, and gradients reduced, once per pass.
    """

    def __init__(self, model: Transformer, window: int | None = None, states: Literal["all", "sqrt"] = "all", draws: bool = False) -> None:
        assert model.segmented is not None
        self.model, self.segmented, self.window, self.states, self.draws = model, model.segmented, window, states, draws

    def __call__(self, call: Call, shard: Batch, divisor: float, around: Around | None = None) -> Tensor:
        """nll_BT without a graph; adds the gradient of ``nll_BT.sum() / divisor`` to every parameter's."""
        steps = self.segmented.plan_carried(shard.bounds)
        size = self.window or len(steps)
        windows = [range(start, min(start + size, len(steps))) for start in range(0, len(steps), size)]
        with held_together(self.model) as reduce, self.segmented.in_place():
            chance = Chance(next(self.model.parameters()).device) if self.draws else None  # a batch may wait in host memory
            one = _Sequence(call, shard, divisor, steps, chance, _Last(windows[-1].start, around, reduce))
            state: State | None = None
            for window in turns(windows, shard.tokens_BT, one.kind):
                n = len(window)
                state = one.run(window, state, math.isqrt(n - 1) if self.states == "sqrt" and n > 3 else 1)
        assert state is not None
        self.segmented.hand_on(state, steps, shard.tokens_BT)
        return one.nll_BT


def segment_runner(config: RunConfig, model: Transformer) -> SegmentRunner | None:
    """What runs the segments of a sequence of ``model``, which is told of ``train.segment_tokens``; None: it is read at once."""
    if config.train.segment_tokens is not None:
        model.layer_segments = LayerSegments([cast(Block, block).mixer for block in model.blocks], config.train.segment_tokens)
    if config.train.diagonal_segments > 1:
        cast(AssociativeMemory, model.stack).diagonals = Diagonals(config.train.diagonal_segments, config.memory.recompute == "block")
    if model.segmented is None:
        return None
    return SegmentRunner(model, config.train.bptt_segments, config.memory.segment_states, draws=draws_random_numbers(model))


@dataclass(frozen=True)
class _Last:
    """The last backward pass of a sequence: that of which step, and what is done with it."""

    step: int
    around: Around | None
    reduce: Callable[[], None]

    def begins(self, nll_BT: Tensor) -> contextlib.AbstractContextManager[None]:
        """Around it."""
        self.reduce()
        return contextlib.nullcontext() if self.around is None else self.around(nll_BT)


class _Sequence:
    """One pass: its losses so far, and how its steps are run."""

    def __init__(self, call: Call, shard: Batch, divisor: float, steps: Sequence[Step], chance: Chance | None, last: _Last) -> None:
        self.call, self.shard, self.divisor, self.steps, self.chance, self.last = call, shard, divisor, steps, chance, last
        self.nll_BT = torch.zeros(0)

    def kind(self, these: Sequence[int]) -> Hashable:
        """Equal for steps that allocate and compute the same."""
        alike = [(tuple((p.new, p.before, p.begins, p.closes) for p in self.steps[i].parts), self.steps[i].pending) for i in these]
        return these[0] == 0, tuple(alike)

    def turns(self, these: Sequence[int]) -> Iterator[int]:
        """The steps one after the other; where only shapes are followed, some of those that are alike."""
        return turns(these, self.shard.tokens_BT, lambda i: self.kind([i]))

    def run(self, window: range, state: State | None, every: int) -> State:
        """Forward and backward through the segments ``window``; the state after them. States are kept at every ``every``-th border."""
        groups = [window[k : k + every] for k in range(0, len(window), every)]
        kept = Kept(len(groups))
        before = state = None if state is None else detached(state)

        def is_kept(i: int) -> bool:
            return (i + 1 - window.start) % every == 0

        with torch.no_grad():
            for i in turns(window[:-1], self.shard.tokens_BT, lambda i: (self.kind([i]), is_kept(i))):
                state = self.forward(i, state, anew=True)
                if is_kept(i):
                    kept.put((i + 1 - window.start) // every, state)
        gradients: State = {}
        left: State | None = None
        for group in turns(groups[::-1], self.shard.tokens_BT, self.kind):
            start = before if group.start == window.start else kept.get((group.start - window.start) // every)
            inner = self._inside(group, start)
            for i in self.turns(group[::-1]):
                given = start if i == group.start else inner.get(i - group.start)
                after, gradients = self.backward(i, given, gradients, anew=i == window.stop - 1)
                left = after if left is None else left
        assert left is not None
        return left

    def _inside(self, group: range, state: State | None) -> Kept:
        """States at the borders inside ``group``, made again."""
        inner = Kept(len(group))
        with torch.no_grad():
            for i in self.turns(group[:-1]):
                state = self.forward(i, state, anew=False)
                inner.put(i + 1 - group.start, state)
        return inner

    def forward(self, i: int, state: State | None, anew: bool) -> State:
        """The state after step ``i``. ``anew``: it runs for the first time. Its losses are made when it runs backward."""
        with self._running(i, anew):
            return self.call(self.shard, Segment(self.steps[i], state, loss=False))[1]

    def backward(self, i: int, given: State | None, gradients: State, anew: bool) -> tuple[State, State]:
        """Step ``i`` forward and backward: the state after it, and gradients of the one ``given`` from those of the one after."""
        with self._running(i, anew):
            nll_Bw, after = self.call(self.shard, Segment(self.steps[i], given))
        self._note(i, nll_Bw)
        into = [(after[name], gradient) for name, gradient in gradients.items() if after[name].requires_grad]
        with self.last.begins(self.nll_BT) if i == self.last.step else contextlib.nullcontext():
            torch.autograd.backward([nll_Bw.sum() / self.divisor, *(x for x, _ in into)], [None, *(g for _, g in into)])
        found = {name: value.grad for name, value in (given or {}).items() if value.grad is not None}
        return detached(after), found

    @contextlib.contextmanager
    def _running(self, i: int, anew: bool) -> Iterator[None]:
        if anew and self.chance is not None:
            self.chance.note(i)
        drawn = contextlib.nullcontext() if anew or self.chance is None else self.chance.as_before(i)
        with contextlib.nullcontext() if anew else again(), drawn:
            yield

    def _note(self, i: int, nll_Bw: Tensor) -> None:
        """Put the losses of step ``i`` in their places."""
        if not self.nll_BT.numel():
            self.nll_BT = torch.zeros(self.shard.tokens_BT.shape, dtype=nll_Bw.dtype, device=nll_Bw.device)
        step = self.steps[i]
        for b, part in enumerate(step.parts):
            self.nll_BT[b, part.start - step.first : part.end - step.first] = nll_Bw[b, : part.new].detach()
