"""What every memory architecture is to the rest of the model: traits, a state, a carry, one module class, one registry.

A new architecture is one file in this folder with ``build(config) -> MemoryModule`` and one line in ``BUILDERS``.
The module never knows of other ranks: what crosses from one token range to another goes through ``self.carry``.

Legend: B row, T local token, C channel, H head, K key, V value, n tokens of halo.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from models.batch import Bounds, Range
from models.config import ModelConfig

if TYPE_CHECKING:
    from models.memory.by_heads import Heads

State = dict[str, Tensor]
"""What a memory remembers, batch first. Plain tensors handed in and out, never buffers: they are not model weights."""

BUILDERS: dict[str, str] = {
    "fam": "models.memory.fam",
    "gated_deltanet": "models.memory.gated_deltanet",
    "gsa": "models.memory.gsa",
    "infini": "models.memory.infini",
    "mamba2": "models.memory.mamba2",
    "mom": "models.memory.mom",
    "neurocache": "models.memory.neurocache",
    "slots": "models.memory.slots",
    "titans": "models.memory.titans",
    "rmt": "models.memory.rmt",
    "armt": "models.memory.armt",
    "hmt": "models.memory.hmt",
}
"""``model.memory.kind`` -> module that defines ``build``; imported only when asked for."""


@dataclass(frozen=True)
class MemoryTraits:
    """Static facts of an architecture; planner and parallelisation decide from these and nothing else."""

    carry: Literal["none", "layer", "stack"]
    """layer: state of (layer, segment s) follows from (layer, s-1) and the layer below; stack: top of s-1 feeds the bottom of s."""
    transition: Literal["affine_diag", "affine_dense", "token_sum", "nonlinear", "append_detached"]
    """How the outgoing state depends on the incoming one."""
    read_at: Literal["segment_start", "segment_end", "token"]
    """What a token may see of its own segment: nothing; all of it, if it is the last one; what is up to itself."""
    granularity: int = 1
    """Token ranges held by a rank must be multiples of this."""
    halo_tokens: int = 0
    """Preceding tokens needed besides the state (convolutions); -1: data dependent."""
    reset_every: int = 0
    """Tokens after which the state starts anew; 0: never."""
    head_splittable: int = 1
    """Into how many independent heads the layer splits, between its projections and what is made of all heads' outputs."""
    layouts: frozenset[str] = frozenset({"contiguous"})
    """Sequence layouts the carry can serve exactly; empty: one rank only."""
    attach: Literal["mixer", "pre_attn", "post_attn", "parallel_attn", "ffn_replace", "ffn_parallel", "context_prefix", "stack"] = "mixer"
    """Where in the block the module sits; mixer: in place of attention; stack: around all layers, which run segment by segment."""


@dataclass(frozen=True)
class MemoryCost:
    """What one layer costs for the given tokens of one rank. Flops count 2 per multiply-add."""

    flops_forward: float
    flops_backward: float
    saved_bytes: int
    """Bytes kept from forward to backward, the module's input included, parameters excluded."""
    state_bytes: int
    """Bytes of all that `MemoryModule.init_state` holds, of all rows."""
    exchange_bytes: int
    """Bytes one rank contributes to the exchange of one forward pass when the sequence is split."""


class Carry(Protocol):
    """How memory crosses from one token range to the next. ``LocalCarry`` here; the exchange over ranks in parallel/."""

    local: bool
    """True when no other rank is involved: a module may then simply carry its state through."""
    ranks: int
    """How many share the sequence."""
    heads: Heads | None
    """Set where ranks exchange heads, and no state crosses: for memories whose traits say how many there are."""

    def held(self, bounds: Bounds) -> Bounds:
        """The bounds of the tokens that a layer is given here, where ``bounds`` are those of this rank's batch."""
        ...

    def halo(self, x_BTC: Tensor, n: int, bounds: Bounds) -> list[Tensor]:
        """For each local range the n tokens [B, n, C] before it in the global sequence, zeros where there are none."""
        ...

    def affine(
        self, transitions: Sequence[Tensor], updates: Sequence[Tensor], initial: Tensor, bounds: Bounds
    ) -> tuple[list[Tensor], Tensor]:
        """Compose ``S_out = M S_in + E`` over all ranges of the sequence.

        transitions M_BHKK and updates E_BHKV per local range, initial S_BHKV before the sequence. Returns each local
        range's incoming state and the state after the last token of the sequence, to be taken by `everywhere`.
        """
        ...

    def diagonal(self, decays: Sequence[Tensor], updates: Sequence[Tensor], initial: Tensor, bounds: Bounds) -> tuple[list[Tensor], Tensor]:
        """Compose ``S_out = a S_in + E`` over all ranges of the sequence, elementwise.

        As `affine`, with decays a_BH?? per local range that broadcast to E (one number per head, one per row of the state ...).
        """
        ...

    def everywhere(self, final: Tensor, bounds: Bounds) -> Tensor:
        """The state after the sequence that `affine` or `diagonal` gave, on every rank. A separate step: few callers want it."""
        ...

    def summary_bytes(self, transition: int, state: int) -> int:
        """What a rank contributes to one of these exchanges, of bytes of a transition and of a state."""
        ...

    def tail(self, x_BTC: Tensor, n: int, bounds: Bounds) -> Tensor:
        """The last n tokens [B, n, C] of the sequence, on every rank, zeros where the sequence is shorter."""
        ...

    # For states that follow one another (models/memory/sequential.py); contiguous layout only.

    def arrive(self, initial: Tensor, anchor: Tensor) -> Tensor:
        """The state that the rank before passed on, or ``initial`` on the first. ``anchor``: takes a gradient on every rank or on none."""
        ...

    def pass_on(self, state: Tensor, tied: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are, the state also to the next rank. What comes back for it waits for ``tied``, which every rank's loss needs."""
        ...

    # For updates that are sums over tokens: every rank works on a slice of every chunk (models/memory/chunk_plan.py).

    def holders(self, bounds: Bounds) -> tuple[int, list[tuple[Range, ...]]]:
        """This rank, and the ranges that each rank holds."""
        ...

    def swap(self, x_nC: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """Give every rank its stretch of rows (``given`` rows to each, in order) and return theirs. No gradient."""
        ...

    def stacked(self, x: Tensor) -> Tensor:
        """[ranks, ...]: every rank's ``x``; differentiable."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """Sum of every rank's ``x``, which may be overwritten. No gradient."""
        ...


def ranges_in_order(bounds: Bounds) -> list[int]:
    """Local range indices in global order. Raises ValueError if the ranges leave a gap (a carry would skip tokens)."""
    order = sorted(range(len(bounds.ranges)), key=lambda i: bounds.ranges[i])
    for left, right in pairwise(order):
        if bounds.ranges[left][1] != bounds.ranges[right][0]:
            raise ValueError(
                f"ranges {bounds.ranges} leave a gap: a memory on one rank needs adjoining ranges (parallel.cp sets the carry)"
            )
    return order


def local_offsets(bounds: Bounds) -> list[int]:
    """Where each local range begins in the local token dim."""
    offsets = [0]
    for start, end in bounds.ranges:
        offsets.append(offsets[-1] + end - start)
    return offsets


def _folded(
    moves: Sequence[Callable[[Tensor], Tensor]], updates: Sequence[Tensor], initial: Tensor, bounds: Bounds
) -> tuple[list[Tensor], Tensor]:
    """Each range's incoming state and the last one, ranges taken in global order."""
    incoming: list[Tensor] = [initial] * len(bounds.ranges)
    state = initial
    for i in ranges_in_order(bounds):
        incoming[i] = state
        state = moves[i](state) + updates[i]
    return incoming, state


class LocalCarry:
    """One process holds everything there is: adjoining ranges in any local order."""

    local = True
    ranks = 1
    heads: Heads | None = None

    def held(self, bounds: Bounds) -> Bounds:
        """See `Carry.held`: all of them."""
        return bounds

    def halo(self, x_BTC: Tensor, n: int, bounds: Bounds) -> list[Tensor]:
        """See `Carry.halo`; tokens before the first range are zeros."""
        offsets = local_offsets(bounds)
        before = x_BTC.new_zeros(x_BTC.shape[0], n, x_BTC.shape[2])
        halos: list[Tensor] = [before] * len(bounds.ranges)
        for i in ranges_in_order(bounds):
            halos[i] = before
            before = last_tokens(before, x_BTC[:, offsets[i] : offsets[i + 1]], n)
        return halos

    def affine(
        self, transitions: Sequence[Tensor], updates: Sequence[Tensor], initial: Tensor, bounds: Bounds
    ) -> tuple[list[Tensor], Tensor]:
        """See `Carry.affine`."""
        return _folded([lambda state, m=m: m @ state for m in transitions], updates, initial, bounds)

    def diagonal(self, decays: Sequence[Tensor], updates: Sequence[Tensor], initial: Tensor, bounds: Bounds) -> tuple[list[Tensor], Tensor]:
        """See `Carry.diagonal`."""
        return _folded([lambda state, a=a: a * state for a in decays], updates, initial, bounds)

    def everywhere(self, final: Tensor, bounds: Bounds) -> Tensor:
        """See `Carry.everywhere`."""
        return final

    def summary_bytes(self, transition: int, state: int) -> int:
        """See `Carry.summary_bytes`: as if ranges were gathered."""
        return transition + state

    def tail(self, x_BTC: Tensor, n: int, bounds: Bounds) -> Tensor:
        """See `Carry.tail`."""
        offsets = local_offsets(bounds)
        tail = x_BTC.new_zeros(x_BTC.shape[0], n, x_BTC.shape[2])
        for i in ranges_in_order(bounds):
            tail = last_tokens(tail, x_BTC[:, offsets[i] : offsets[i + 1]], n)
        return tail

    def arrive(self, initial: Tensor, anchor: Tensor) -> Tensor:
        """See `Carry.arrive`."""
        return initial

    def pass_on(self, state: Tensor, tied: Tensor) -> tuple[Tensor, Tensor]:
        """See `Carry.pass_on`."""
        return state, tied

    def holders(self, bounds: Bounds) -> tuple[int, list[tuple[Range, ...]]]:
        """See `Carry.holders`."""
        return 0, [bounds.ranges]

    def swap(self, x_nC: Tensor, given: Sequence[int], taken: Sequence[int]) -> Tensor:
        """See `Carry.swap`."""
        return x_nC

    def stacked(self, x: Tensor) -> Tensor:
        """See `Carry.stacked`."""
        return x.unsqueeze(0)

    def total(self, x: Tensor) -> Tensor:
        """See `Carry.total`."""
        return x


def last_tokens(before_BnC: Tensor, x_BTC: Tensor, n: int) -> Tensor:
    """The last n tokens of ``before`` followed by ``x``; a view of ``x`` when it is long enough."""
    if x_BTC.shape[1] >= n:
        return x_BTC[:, x_BTC.shape[1] - n :]
    return torch.cat([before_BnC, x_BTC], dim=1)[:, -n:]


def detached(state: State) -> State:
    """The state cut off from what made it: where a truncation window ends, gradients do too."""
    return {name: value.detach() for name, value in state.items()}


@dataclass
class Carried:
    """A memory's state between two sequences: ``given`` to the present one, ``left`` by it, cut off from what made it."""

    given: State
    fresh_B: Tensor
    """Rows that begin anew instead. They are reset inside the layer, where parameters that a state may begin with are at hand."""
    left: State | None = None


class Handed:
    """A memory's state between two segments of a sequence, in the graph. ``given``: to the present one; None: nothing is before it."""

    def __init__(self, given: State | None) -> None:
        self.given = given
        self._left: State | None = None
        self._taken = False

    def leave(self, state: State) -> None:
        """The state after the segment. Work that is done again in a backward pass, after `take`, leaves nothing."""
        if not self._taken:
            self._left = state

    def take(self) -> State:
        """What goes on."""
        assert self._left is not None, "the memory has not run"
        left, self._left, self._taken = self._left, None, True
        return left


class MemoryModule(nn.Module):
    """Base of all memory architectures.

    ``carried`` is where a trainer that carries states from sequence to sequence hands them in; None: every sequence begins afresh.
    ``handed`` is the same between segments of one sequence (`models.layer_segments`). ``carry`` is the seam that parallel/ fills;
    ``tile_tokens`` and ``run_tile`` those memory_mgmt/ fills. ``tile_tokens`` 0: whole shard at once, otherwise tiles
    of that many tokens with the state carried. ``run_tile(first, n_tokens, body, *args)`` runs a tile whose first token is the shard's
    ``first``; without it each tile is recomputed in backward.
    """

    traits: MemoryTraits

    def __init__(self) -> None:
        super().__init__()
        self.carried: Carried | None = None
        self.handed: Handed | None = None
        self.carry: Carry = LocalCarry()
        self.tile_tokens: int = 0
        self.run_tile: Callable[..., Any] | None = None

    def init_state(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token. Hand it in to get the state after the last token back on every rank."""
        raise NotImplementedError

    def reset(self, state: State, rows_B: Tensor) -> State:
        """``state`` with the rows where the boolean ``rows_B`` is true as before the first token."""
        wide = torch.float64 if any(value.dtype == torch.float64 for value in state.values()) else torch.float32
        fresh = self.init_state(len(rows_B), rows_B.device, wide)
        return {
            name: torch.where(rows_B.view(-1, *[1] * (value.dim() - 1)), fresh[name].to(value.dtype), value)
            for name, value in state.items()
        }

    def forward(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """``y_BTC`` and the state after the sequence.

        ``state`` is the one before the first token described by ``bounds``. A document start resets it, except at
        global index 0, where the given state is what the sequence continues from. With ``state=None`` the sequence
        begins afresh, and when other ranks are involved the returned state is empty (no extra exchange).
        """
        raise NotImplementedError

    @property
    def carrier(self) -> MemoryModule:
        """The module whose state goes on to the next sequence: this one, or the memory inside."""
        return self

    def goes_on(self, x_BTC: Tensor, bounds: Bounds) -> tuple[Tensor, State]:
        """`forward` from the state that is ``handed`` or ``carried``, if one is, leaving one there; else from the beginning."""
        if self.handed is not None:
            y_BTC, after = self(x_BTC, self.handed.given, bounds)
            self.handed.leave(after)
            return y_BTC, after
        if self.carried is None:
            return self(x_BTC, None, bounds)
        y_BTC, after = self(x_BTC, self.reset(self.carried.given, self.carried.fresh_B), bounds)
        self.carried.left = detached(after)
        return y_BTC, after

    def remember(self, x_BTC: Tensor, bounds: Bounds) -> Tensor:
        """The output of `goes_on` for tokens of a batch with ``bounds``, of which ``x`` may be a part (`Carry.held`)."""
        return self.goes_on(x_BTC, self.carrier.carry.held(bounds))[0]

    def oracle(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """The same by the plain token recurrence, slow, for tests; one process, the whole sequence from its first range on."""
        raise NotImplementedError

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """Arithmetic and bytes for ``tokens`` per row on one rank, activations of ``itemsize`` bytes."""
        raise NotImplementedError

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Initial value (CPU, float32) of the module's own parameter ``name``; None: the model's default rule."""
        return None


def build_memory(config: ModelConfig) -> MemoryModule:
    """The memory module that ``config.memory.kind`` names. Raises ValueError for an unknown kind."""
    kind = config.memory.kind
    if kind not in BUILDERS:
        raise ValueError(f"model.memory.kind {kind!r} is unknown; known: {', '.join(sorted(BUILDERS))}")
    # An exported model's files are one flat package, whose BUILDERS are relative names (trainer/interchange/bundle.py).
    return importlib.import_module(BUILDERS[kind], __package__).build(config)
