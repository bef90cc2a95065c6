"""A sequence read segment after segment by layers that remember inside of themselves: memories and sliding windows.

Every segment goes through all layers before the next one begins. What a layer hands on is its memory's state, and of a window the last
keys and values. So a model of such layers reads any length in the memory of one segment; the result is that of the whole sequence at once.
Segments are counted from the sequence's start: states may be handed on anywhere, and a document's start resets them where it stands.

`LayerStates` are the seams, `LayerSegments` what runs steps, as `StackMemory` does for a memory around the stack (`models/segments.py`,
``trainer/replay.py``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from models.attention import Attention
from models.batch import IGNORE_INDEX, Batch, Bounds
from models.memory.attached import AttachedMemory
from models.memory.protocol import Handed, MemoryModule, State, detached
from models.segments import Step, plan_stretches
from models.window_keys import Keys, WindowKeys


class LayerStates:
    """What the layers ``mixers`` (by name) hand from one segment to the next, as one state: ``NAME.KEY`` of every leaf.

    ``attentions``: the layers that attend, those without a window too, whose keys are handed on by nobody here. ``others``: layers that
    hand nothing on.
    """

    def __init__(self, mixers: Mapping[str, nn.Module]) -> None:
        self.attentions: dict[str, Attention] = {}
        self.memories: dict[str, MemoryModule] = {}
        self.others: dict[str, nn.Module] = {}
        for name, mixer in mixers.items():
            if isinstance(mixer, MemoryModule) and mixer.traits.carry != "stack":
                self.memories[name] = mixer.carrier
            if isinstance(mixer, Attention | AttachedMemory):
                self.attentions[name] = mixer if isinstance(mixer, Attention) else mixer.attention
            elif name not in self.memories:
                self.others[name] = mixer
        self.windows = {name: WindowKeys(layer.window) for name, layer in self.attentions.items() if layer.window is not None}

    @property
    def without_window(self) -> dict[str, Attention]:
        """The layers that attend to the whole sequence."""
        return {name: layer for name, layer in self.attentions.items() if layer.window is None}

    @property
    def granularity(self) -> int:
        """Of how many tokens a segment has to be a multiple."""
        return math.lcm(*(memory.traits.granularity for memory in self.memories.values()))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Around all segments of a sequence, forward and backward: the seams are filled."""
        seams = {name: self.attentions[name].inner_attention for name in self.windows}
        try:
            for name, window in self.windows.items():
                self.attentions[name].inner_attention = window
            yield
        finally:
            for name, seam in seams.items():
                self.attentions[name].inner_attention = seam
                self.windows[name].begin(None)
            for memory in self.memories.values():
                memory.handed = None

    def begin(self, state: State | None) -> None:
        """Before a segment: ``state`` is what the one before left. None: the sequence begins, where it does from what is ``carried``."""
        for name, window in self.windows.items():
            window.begin(None if state is None else Keys(state[f"{name}.keys"], state[f"{name}.values"]))
        for name, memory in self.memories.items():
            if state is not None:
                given = self._of(name, state)
            else:
                given = None if memory.carried is None else memory.reset(memory.carried.given, memory.carried.fresh_B)
            memory.handed = Handed(given)

    def take(self) -> State:
        """After the segment's forward pass: what goes on."""
        state: State = {}
        for name, window in self.windows.items():
            keys = window.take()
            state |= {f"{name}.keys": keys.k_BGnD, f"{name}.values": keys.v_BGnD}
        for name, memory in self.memories.items():
            assert memory.handed is not None, "begin comes first"
            state |= {f"{name}.{key}": _alone(value) for key, value in memory.handed.take().items()}
        return state

    def hand_on(self, state: State) -> None:
        """Leave what memories remember after the last segment to the next sequence, where states are carried; keys are not."""
        for name, memory in self.memories.items():
            if memory.carried is not None:
                memory.carried.left = detached(self._of(name, state))

    def _of(self, name: str, state: State) -> State:
        """The state of one layer's memory."""
        leaves = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        return {key: value for key, value in leaves.items() if name not in self.windows or key not in ("keys", "values")}


class LayerSegments:
    """Segments of ``size`` tokens of the sequences of a model with the layers ``mixers``."""

    def __init__(self, mixers: Sequence[nn.Module], size: int) -> None:
        self.size = size
        self.states = LayerStates({str(i): mixer for i, mixer in enumerate(mixers)})

    def in_place(self) -> contextlib.AbstractContextManager[None]:
        """See `LayerStates.in_place`."""
        return self.states.in_place()

    def plan_carried(self, bounds: Bounds) -> list[Step]:
        """The steps of a sequence."""
        return plan_stretches(bounds, self.size)

    def hand_on(self, state: State, steps: Sequence[Step], like: Tensor) -> None:
        """See `LayerStates.hand_on`."""
        self.states.hand_on(state)

    def step(self, run: Callable[[Batch], Tensor], batch: Batch, state: State | None, step: Step) -> tuple[Tensor, State]:
        """``run`` on the tokens of one step, and the state after it. The seams stay as they are for its backward pass."""
        part = step.parts[0]
        piece = replace(
            batch,
            tokens_BT=step.take(batch.tokens_BT),
            labels_BT=step.take(batch.labels_BT, IGNORE_INDEX),
            positions_BT=step.take(batch.positions_BT),
            bounds=batch.bounds.with_ranges(((part.start, part.end),)),
        )
        self.states.begin(state)
        return run(piece), self.states.take()


def _alone(x: Tensor) -> Tensor:
    """The value, copied where it is a small part of something: a layer's last inputs would keep the whole segment's alive."""
    return x.clone() if x.untyped_storage().nbytes() > 2 * x.numel() * x.element_size() else x
