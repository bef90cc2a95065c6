"""What the planner chooses from: bytes, seconds and limits of one rank's training step, layer by layer. Imports no torch.

The step that is modelled (the execution follows it, ``planner_simulate.py`` walks it, ``planner_lp.py`` writes it as rows):

- Forward of layer i makes all its activations. Then the recomputed shares are dropped, the swapped shares start their copy to host
  memory, the quantised shares are copied into eight bits, the kept shares stay. Two rounding buffers: forward of layer i waits
  until the copies of layer i-2 are done.
- Backward of layer i starts when backward of i+1 has ended; at that moment the copy back of layer i-1 is started (one layer ahead).
  It waits for its own swapped shares, recomputes what is missing (the whole block in order, so that every class finds what it
  is made of) and makes the quantised shares wide again, then goes through feed-forward, mixer and entrance (norm and
  projections), each dropping its class.
- Copies out, copies in and computation are three queues; each is served in order. Parameters that live in host memory
  (``fetch_seconds``) come in with the layer's swapped shares. In the forward pass nothing else comes in: what is waited for there is
  in the layer's seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from memory_mgmt.policy import CLASSES, QUANTISABLE, ActivationClass, Policy

UNLIMITED = 1 << 60
"""Bytes of a budget that never binds."""


@dataclass(frozen=True)
class ClassCost:
    """One class of a layer's activations."""

    bytes: int = 0
    """Held from forward to backward when all tokens are kept."""
    recompute_seconds: float = 0.0
    """To make all of it again from the classes before it, which are there: kept, copied back, or recomputed just before. Of an
    ``input`` inside a checkpoint group: what the layer before still has to do once its ``feed_forward`` class is there."""
    may_keep: bool = True
    may_swap: bool = True
    may_recompute: bool = True
    whole_recompute: bool = False
    """All tokens are recomputed or none, as for an attention whose later tokens cost more than its earlier ones."""
    tiled_bytes: int | None = None
    """Bytes that exist at once when all of it is recomputed in tiles (what stays whole; the tile itself is in ``Stage``). None: it
    cannot be recomputed in tiles."""
    quantised_bytes: int | None = None
    """Held from forward to backward when all tokens are kept in eight bits; None: that is not allowed. In tiles they are wide one tile at
    a time only, as recomputed ones."""
    quantise_seconds: float = 0.0
    """To make the eight-bit copy of all of it, in forward; ``dequantise_seconds``: to make it wide again, in backward."""
    dequantise_seconds: float = 0.0


NOTHING = ClassCost()


@dataclass(frozen=True)
class Stage:
    """One part of a layer under one tile size: what it holds beside the activation classes that are there then."""

    forward_bytes: int = 0
    backward_bytes: int = 0
    seconds: float = 0.0
    """Per step and layer on top of the layer's own seconds: what the tiles cost."""

    def repeating_forward(self) -> Stage:
        """The same, where backward may run forward again: it holds at least what forward does."""
        return replace(self, backward_bytes=max(self.forward_bytes, self.backward_bytes))


@dataclass(frozen=True)
class LayerCost:
    """One layer on one rank. Seconds are without recomputation."""

    kind: str
    input: ClassCost
    projections: ClassCost
    mixer: ClassCost
    feed_forward: ClassCost
    forward_seconds: float
    backward_seconds: float
    entrance_stages: tuple[Stage, ...] = (Stage(),)
    """Norm and projections: in forward beside input and projections, in backward beside the input. One per entry of
    ``Problem.ffn_tiles``, which cuts all token-wise parts, or a single one."""
    mixer_stages: tuple[Stage, ...] = (Stage(),)
    """Attention or memory: beside input, projections and mixer. One per entry of ``Problem.memory_tiles``, or a single one."""
    ffn_stages: tuple[Stage, ...] = (Stage(),)
    """Output projection, norm and feed-forward: beside all classes. One per entry of ``Problem.ffn_tiles``, or a single one."""
    fetch_seconds: float = 0.0
    """Of the copies to the device that its backward pass waits for whatever is chosen: parameters that live in host memory. They come
    by the same queue as what was swapped, one layer ahead."""
    gradient_bytes: int = 0
    """Gradients of parameters that appear in this layer's backward and stay until the update (0 where they are resident)."""

    def of(self, name: ActivationClass) -> ClassCost:
        """The costs of a class."""
        return getattr(self, name)

    @property
    def tile_seconds(self) -> float:
        """What the tiles of the first candidates cost."""
        return self.entrance_stages[0].seconds + self.mixer_stages[0].seconds + self.ffn_stages[0].seconds

    @property
    def recompute_seconds(self) -> float:
        """To make everything but the input again."""
        return self.projections.recompute_seconds + self.mixer.recompute_seconds + self.feed_forward.recompute_seconds


@dataclass(frozen=True)
class LossTile:
    """One size of the loss tile: bytes beside what is resident and kept, and seconds of forward and backward of head and loss."""

    tokens: int
    working_bytes: int
    seconds: float


@dataclass(frozen=True)
class Problem:
    """One rank's step. Bytes, seconds, bytes per second."""

    layers: tuple[LayerCost, ...]
    loss_tiles: tuple[LossTile, ...]
    """Candidates, at least one."""
    resident_bytes: int = 0
    """Held through forward and backward: parameters, optimizer states, buffers, gathered weights, overheads."""
    other_peak_bytes: int = 0
    """The most that is held outside forward, loss and backward (clipping, update); everything included."""
    budget_bytes: int = UNLIMITED
    host_bytes: int = 0
    """Host memory this rank may take: the node's, divided by its ranks. 0 forbids swapping."""
    bandwidth_out: float = 1.0
    bandwidth_in: float = 1.0
    """Of this rank's copies to and from host memory while its neighbours copy too. Where seconds are those of several passes, which
    copy the same bytes each, a second of all passes moves so much of one."""
    passes: int = 1
    """What the real bandwidth was divided by."""
    overlap: bool = True
    """Copies run beside computation. False (a CPU): each is waited for where it starts, and nothing is fetched ahead."""
    swap_ratio: float = 1.0
    """Bytes copied and held in host memory per byte swapped; below 1 where parking in eight bits is allowed."""
    fixed_seconds: float = 0.0
    """Of the step, whatever is chosen: update, exposed communication, data."""
    step_tokens: int = 1
    """Tokens of a step, all ranks together: what makes the seconds of two problems comparable."""
    tokens: int = 0
    """Of this rank, per row; shares are cut at tokens. 0: shares are not rounded."""
    share_tokens: int = 1
    """Shares are multiples of so many tokens; smaller ones become 0."""
    unswapped_last: int = 2
    """Layers at the end that are never swapped: their backward starts at once."""
    ffn_tiles: tuple[int, ...] = (0,)
    memory_tiles: tuple[int, ...] = (0,)
    group_blocks: tuple[int, ...] = (1,)
    """Candidates for ``Policy.group_blocks``; above 1 all classes but the first input of a group are recomputed."""
    group_inside: str = "all"
    """Of a group being recomputed: ``all`` blocks' activations live until their backward, or ``one``: the group's inputs are made
    first, then each block is computed once more before its backward."""

    def __post_init__(self) -> None:
        if not 0 < self.swap_ratio <= 1:
            raise ValueError(f"swap_ratio is {self.swap_ratio}; it is a share of the bytes that are swapped")
        if not self.layers or not self.loss_tiles:
            raise ValueError("a problem needs at least one layer and one loss tile")
        if self.bandwidth_out <= 0 or self.bandwidth_in <= 0:
            raise ValueError("bandwidth_out and bandwidth_in must be positive; host_bytes=0 forbids swapping")
        if not self.ffn_tiles or not self.memory_tiles or not self.group_blocks or min(self.group_blocks) < 1:
            raise ValueError("ffn_tiles, memory_tiles and group_blocks each need a candidate; group_blocks at least 1")
        if self.group_inside not in ("all", "one"):
            raise ValueError(f"group_inside is '{self.group_inside}'; known: all, one")
        for i, layer in enumerate(self.layers):
            if any(layer.of(name).quantised_bytes is not None for name in CLASSES if name not in QUANTISABLE):
                raise ValueError(f"layer {i} may keep in eight bits what cannot be; only {', '.join(QUANTISABLE)} can")
            for name, tiles in (("entrance", self.ffn_tiles), ("mixer", self.memory_tiles), ("ffn", self.ffn_tiles)):
                stages = getattr(layer, f"{name}_stages")
                if len(stages) not in (1, len(tiles)):
                    raise ValueError(f"layer {i} has {len(stages)} {name}_stages for {len(tiles)} tile sizes")

    @cached_property
    def base_seconds(self) -> float:
        """A step that keeps everything, without tiles, with the fastest loss tile."""
        layers = sum(layer.forward_seconds + layer.backward_seconds for layer in self.layers)
        return self.fixed_seconds + layers + min(tile.seconds for tile in self.loss_tiles)

    @property
    def n_swappable(self) -> int:
        """The first so many layers may be swapped."""
        return max(0, len(self.layers) - self.unswapped_last) if self.host_bytes > 0 else 0

    def tilings(self) -> Iterator[Tiling]:
        """Every pair of feed-forward and memory tile candidates."""
        for i in range(len(self.ffn_tiles)):
            for j in range(len(self.memory_tiles)):
                yield Tiling(i, j)

    def with_tiles(self, tiling: Tiling) -> Problem:
        """The same problem with one candidate of each tile left; ``tiled_bytes`` remains only where tiles are really used."""
        made = {layer: self._layer_with_tiles(layer, tiling) for layer in set(self.layers)}
        return replace(
            self,
            layers=tuple(made[layer] for layer in self.layers),
            ffn_tiles=(self.ffn_tiles[tiling.ffn],),
            memory_tiles=(self.memory_tiles[tiling.memory],),
        )

    def _layer_with_tiles(self, layer: LayerCost, tiling: Tiling) -> LayerCost:
        mixer, ffn = layer.mixer, layer.feed_forward
        if self.memory_tiles[tiling.memory] == 0:
            mixer = replace(mixer, tiled_bytes=None)
        if self.ffn_tiles[tiling.ffn] == 0:
            ffn = replace(ffn, tiled_bytes=None)

        def left(stages: tuple[Stage, ...], index: int) -> tuple[Stage, ...]:
            return (stages[index if len(stages) > 1 else 0].repeating_forward(),)

        return replace(
            layer,
            mixer=mixer,
            feed_forward=ffn,
            entrance_stages=left(layer.entrance_stages, tiling.ffn),
            mixer_stages=left(layer.mixer_stages, tiling.memory),
            ffn_stages=left(layer.ffn_stages, tiling.ffn),
        )

    def for_policy(self, policy: Policy) -> Problem:
        """The problem with the tiles that ``policy`` names. Raises ValueError where they, or its layers, are not the problem's."""
        if len(policy.layers) != len(self.layers):
            raise ValueError(f"the policy has {len(policy.layers)} layers, the problem {len(self.layers)}")
        loss = [tile for tile in self.loss_tiles if tile.tokens == policy.loss_tile_tokens]
        known = policy.ffn_tile_tokens in self.ffn_tiles and policy.memory_tile_tokens in self.memory_tiles
        if not known or not loss or policy.group_blocks not in self.group_blocks:
            raise ValueError("a tile size or group_blocks of the policy is not among the problem's candidates")
        tiling = Tiling(self.ffn_tiles.index(policy.ffn_tile_tokens), self.memory_tiles.index(policy.memory_tile_tokens))
        return replace(self.with_tiles(tiling), loss_tiles=(loss[0],), group_blocks=(policy.group_blocks,))


@dataclass(frozen=True)
class Tiling:
    """Indices into ``Problem.ffn_tiles`` and ``Problem.memory_tiles``."""

    ffn: int
    memory: int
