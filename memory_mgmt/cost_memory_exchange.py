"""What each ``parallel.memory_exchange`` sends, waits for and holds, and which one ``auto`` takes. Pure; imports no torch.

Per memory layer and micro-batch, on one of P ranks with n tokens in R ranges (J = P R), A states per row of s numbers with transitions of
m, B rows, w bytes per number of a state, b per computed value; F and X numbers of a token go to heads and come back
(`models/memory/exchange_shapes.py`). Bytes that a rank contributes:

  exchange           forward                          backward              kept for backward
  states, affine     R B A (m + s) w, gathered        (R + 1) B A s w       B A (J m + R s) w
  states, Titans     n (F + X) w, and B sums w        the same              states of all chunks
                     per chunk, reduced
  ring               R B A s w, in k blocks           the same              B A R (m + s) w
  ulysses            n (F + X) b                      the same              of one rank's heads what one process keeps

Nothing of it runs beside computation, so all of it is exposed. The ring's last rank waits for its hops (P - 1, zigzag 2 (P - 1)) and the
other blocks, each a message and a product of a k-th of a state; a gather's states are then folded J times on every rank. States and ring
cost arithmetic that one process does not do: a dense transition is made by K more columns of the recurrence, a diagonal one by summing up
first. With heads that do not divide, Ulysses waits for the rank with most. Where exposed times differ by less than ``TIE`` of the layer's
own time, what is kept and the buffers decide. Try alone: ``pytest -k test_cost_memory_exchange``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memory_mgmt.cost_ops import communication_seconds
from memory_mgmt.cost_rates import Rates, Topology
from models.memory.exchange_shapes import ExchangeShapes
from parallel.config import MemoryExchange
from parallel.state_blocks import column_blocks

TIE = 0.02
"""Of the layer's own time."""
_MIB = 2**20


@dataclass(frozen=True)
class MemoryProblem:
    """One memory layer on a mesh."""

    shapes: ExchangeShapes
    ranks: int
    """That share a sequence: cp x tp."""
    ranges: int
    """Token ranges of one rank."""
    tokens: int
    """Of one rank, all rows together."""
    rows: int
    value_bytes: int
    precision: str
    topology: Topology
    rates: Rates
    projection_flops: float
    """Of one token, forward and backward."""
    mixing_flops: float
    """Likewise: what is done per head outside projections."""

    @property
    def wide(self) -> int:
        """Bytes of a number of a state."""
        return max(4, self.value_bytes)

    @property
    def state_bytes(self) -> int:
        """Of one range."""
        return self.rows * self.shapes.states * self.shapes.state * self.wide

    @property
    def transition_bytes(self) -> int:
        """Of one range."""
        return self.rows * self.shapes.states * self.shapes.transition * self.wide

    def product_seconds(self, flops: float) -> float:
        """Of many small products."""
        sharing = self.topology.ranks_per_node if self.rates.shared else 1
        return sharing * self.rates.of(self.rates.batched_matmul, "fp64" if self.precision == "fp64" else "fp32").seconds(flops)

    def step_seconds(self, blocks: int = 1) -> float:
        """One range's step of a ``blocks``-th of the state."""
        if self.shapes.dense:
            K = math.isqrt(self.shapes.transition)
            flops = 2 * self.rows * self.shapes.states * self.shapes.state * K / blocks
            return self.product_seconds(flops) + self.rates.launch_seconds
        return self.rates.elementwise.seconds(3 * self.state_bytes / blocks) + self.rates.launch_seconds

    def summary_seconds(self) -> float:
        """Arithmetic for summaries that one process does not do, forward and backward."""
        per_state = 18 * self.shapes.transition if self.shapes.dense else 6 * self.shapes.state
        return self.product_seconds(self.tokens * self.shapes.states * per_state)

    def layer_seconds(self) -> float:
        """The layer's own time without an exchange."""
        sharing = self.topology.ranks_per_node if self.rates.shared else 1
        projections = self.rates.of(self.rates.matmul, self.precision).seconds(self.tokens * self.projection_flops)
        return sharing * projections + self.product_seconds(self.tokens * self.mixing_flops)

    def message_seconds(self, kind: str, message: int) -> float:
        """See `communication_seconds`."""
        return communication_seconds(kind, message, self.ranks, self.rates, self.topology)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ExchangeCost:
    """One exchange for one layer and micro-batch, forward and backward together."""

    exchange: MemoryExchange
    forward_bytes: int
    """That one rank contributes."""
    backward_bytes: int
    exposed: float
    """Seconds of messages, of arithmetic that only the exchange needs, and of waiting."""
    held: int
    """Bytes kept from forward to backward for the exchange, and its buffers."""


@dataclass(frozen=True)
class ExchangeChoice:
    """The exchange that is taken, and why."""

    chosen: ExchangeCost
    costs: tuple[ExchangeCost, ...]
    reasons: tuple[str, ...]


def choose_exchange(problem: MemoryProblem, allowed: Sequence[MemoryExchange]) -> ExchangeChoice:
    """The exchange that exposes least; of those within ``TIE`` the one that holds least, then the first.

    Raises ValueError for an empty list."""
    if not allowed:
        raise ValueError("no memory exchange is allowed")
    costs = tuple(exchange_cost(problem, exchange) for exchange in allowed)
    least, layer = min(cost.exposed for cost in costs), problem.layer_seconds()
    close = [cost for cost in costs if cost.exposed - least <= TIE * layer]
    chosen = min(close, key=lambda cost: cost.held)
    return ExchangeChoice(chosen, costs, tuple(_reasons(problem, costs, close, chosen, layer)))


def exchange_cost(problem: MemoryProblem, exchange: MemoryExchange) -> ExchangeCost:
    """Bytes, seconds and what is held, by the table above. Raises ValueError for a ring of a state that is not affine."""
    if exchange == "ulysses":
        return _ulysses(problem)
    if problem.shapes.per_chunk:
        if exchange == "ring":
            raise ValueError("a state that is no affine function of the one before has no columns to send around")
        return _chunk_sums(problem)
    return _ring(problem) if exchange == "ring" else _gathered(problem)


def _gathered(p: MemoryProblem) -> ExchangeCost:
    state, transition, ranges = p.state_bytes, p.transition_bytes, p.ranks * p.ranges
    forward, backward = p.ranges * (transition + state), (p.ranges + 1) * state
    messages = sum(p.message_seconds("all_gather", p.ranks * each) for each in (forward, backward))
    exposed = messages + (2 * ranges + p.ranges) * p.step_seconds() + p.summary_seconds()
    held = ranges * transition + p.ranges * state + p.ranks * max(forward, backward)
    return ExchangeCost("states", forward, backward, exposed, held)


def _ring(p: MemoryProblem) -> ExchangeCost:
    state, hops = p.state_bytes, (p.ranks - 1) * p.ranges
    blocks = column_blocks(state, p.shapes.columns, hops)
    turn = p.message_seconds("send", state // blocks) + p.step_seconds(blocks)
    exposed = 2 * (hops + blocks - 1) * turn + p.ranges * p.step_seconds() + p.summary_seconds()
    held = p.ranges * (p.transition_bytes + state) + 2 * state // blocks
    return ExchangeCost("ring", p.ranges * state, p.ranges * state, exposed, held)


def _chunk_sums(p: MemoryProblem) -> ExchangeCost:
    sums = p.rows * p.shapes.per_chunk * p.wide
    chunks = -(-p.tokens // p.rows * p.ranks // p.shapes.chunk)
    there, back = (p.tokens * numbers * p.wide for numbers in (p.shapes.to_heads, p.shapes.to_tokens))
    seconds = (
        p.message_seconds("all_to_all", there) + p.message_seconds("all_to_all", back) + chunks * p.message_seconds("all_reduce", sums)
    )
    sent = there + back + chunks * sums
    return ExchangeCost("states", sent, sent, 2 * seconds, chunks * sums + 2 * max(there, back))


def _ulysses(p: MemoryProblem) -> ExchangeCost:
    there, back = (p.tokens * numbers * p.value_bytes for numbers in (p.shapes.to_heads, p.shapes.to_tokens))
    most = -(-p.shapes.heads // p.ranks) * p.ranks / p.shapes.heads
    waiting = (most - 1) * p.product_seconds(p.tokens * p.mixing_flops)
    seconds = most * sum(p.message_seconds("all_to_all", each) for each in (there, back))
    chunks = -(-p.tokens // p.rows * p.ranks // p.shapes.chunk) if p.shapes.chunk else 0
    states = round(most * chunks * p.rows * p.shapes.per_chunk * p.wide / p.ranks)
    return ExchangeCost("ulysses", there + back, there + back, 2 * seconds + waiting, states + 2 * max(there, back))


def _reasons(
    p: MemoryProblem, costs: Sequence[ExchangeCost], close: Sequence[ExchangeCost], chosen: ExchangeCost, layer: float
) -> list[str]:
    across = "spans nodes" if p.topology.crosses_nodes(p.ranks) else "inside a node"
    lines = [
        f"parallel.memory_exchange: {chosen.exchange}, for {p.ranks} ranks ({across}), {p.shapes.heads} memory heads, {p.tokens:,} tokens "
        f"per rank; link {p.rates.link / 1e9:.4g} GB/s, network {p.rates.network / 1e9:.4g} GB/s"
    ]
    for cost in costs:
        sent, share = cost.forward_bytes + cost.backward_bytes, cost.exposed / layer
        lines.append(
            f"  {cost.exchange:<8} sends {sent / _MIB:,.1f} MiB per layer, exposed {1e3 * cost.exposed:.3g} ms ({share:.1%} of "
            f"{1e3 * layer:.3g} ms of the layer), holds {cost.held / _MIB:,.1f} MiB"
        )
    if len(close) > 1:
        others = ", ".join(cost.exchange for cost in close if cost is not chosen)
        lines.append(f"  {chosen.exchange}: as fast as {others} to {TIE:.0%} of the layer, and holds least")
    elif len(costs) > 1:
        lines.append(f"  {chosen.exchange}: the least exposed, by more than {TIE:.0%} of the layer")
    return lines
