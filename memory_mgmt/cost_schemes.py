"""What each sequence-parallel scheme sends, waits for and holds, and which one ``parallel.sequence: auto`` takes. Pure; imports no torch.

Per layer of full attention and micro-batch, on one of P ranks with n tokens (rows counted in), G key/value and H query heads of size d, b
bytes per value, k per value of keys and values on their way (b, or what ``parallel.kv_dtype`` says) and w per gradient (float32, or float64
for float64; b with ``parallel.kv_gradient_dtype: compute``, 2 with ``bf16``). S is the number of key/value heads that the ranks of a
Ulysses group of U get together: G, or more where several read the same one. Bytes that a rank sends:

  scheme           forward                                  backward
  ring             (P-1) n 2G d k                           (P-1) n 2G d (k + w)
  double_ring      as ring; to other inner rings, of I ranks, N = P/I of them:
                   (N-1) n 2G d k                           n 2G d ((N-1) k + N w)
  allgather_kv     (P-1) n 2G d k                           (P-1) n 2G d (k + w)
  ulysses          (U-1)/U n d (2H b + 2S k), U = P         (U-1)/U n d (4H b + 2S (k + w')), w' = w where keys are shared, else at most b
  ring_x_ulysses   that of ulysses with U, and of a ring of P/U ranks with U n tokens and a rank's own key/value heads

The ring's transfers run beside the attention of the same hop, all but the first keys of the backward pass, and the double ring's messages
between inner rings beside a whole turn of these (gradients beside one hop); the gathers of allgather_kv
beside the attention of the heads before, all but the first; of ulysses with stages all but the first heads' way in and the last ones' way
out. What is left is exposed. Where exposed times differ by less than ``TIE`` of the attention's own time, memory decides: from 64K tokens
per rank on nearly everything hides. The buffers here are the largest messages and their copies, for the comparison; the plan itself
traces all of them.

Try alone: ``pytest -k test_cost_schemes``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memory_mgmt.cost_ops import communication_seconds
from memory_mgmt.cost_rates import Rates, Topology
from parallel.config import INNER_DEGREES, KVGradientDtype, SequenceScheme
from parallel.head_plan import head_ranges, keys_are_shared, plan_stages

TIE = 0.02
"""Of the attention's own time."""
_MIB = 2**20


@dataclass(frozen=True)
class SequenceProblem:
    """One layer of causal attention on a mesh."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    tokens: int
    """Of one rank, all rows together."""
    rows: int
    value_bytes: int
    precision: str
    topology: Topology
    rates: Rates
    gradient_dtype: KVGradientDtype = "fp32"
    """``parallel.kv_gradient_dtype``."""
    kv_bytes: int | None = None
    """Of a value of keys and values on their way (``parallel.kv_dtype``); None: as computed."""

    @property
    def key_bytes(self) -> int:
        """Of keys and values on their way."""
        return self.value_bytes if self.kv_bytes is None else self.kv_bytes

    @property
    def read_bytes(self) -> int:
        """Of keys and values as they are computed with, where they are copies of narrower ones."""
        return self.value_bytes if self.key_bytes < self.value_bytes else 0

    @property
    def gradient_bytes(self) -> int:
        """Of gradients of keys and values on their way."""
        return {"fp32": max(4, self.value_bytes), "compute": self.value_bytes, "bf16": 2}[self.gradient_dtype]

    def attention_seconds(self) -> tuple[float, float]:
        """(forward, backward) of one rank's share, causal: half of all scores, two and five products over them."""
        cp = self.topology.cp
        scores = self.tokens * (self.tokens // self.rows) * cp / 2 * self.n_heads * self.head_dim
        sharing = self.topology.ranks_per_node if self.rates.shared else 1
        forward = self.rates.of(self.rates.attention_forward, self.precision).seconds(4 * scores)
        backward = self.rates.of(self.rates.attention_backward, self.precision).seconds(10 * scores)
        return forward * sharing, backward * sharing


@dataclass(frozen=True)
class SchemeCost:
    """One scheme for one layer and micro-batch, forward and backward together."""

    scheme: SequenceScheme
    ulysses: int
    """Ranks of a Ulysses group, or of an inner ring; 1 for schemes without."""
    forward_bytes: int
    backward_bytes: int
    communication: float
    """Seconds of all messages, hidden or not."""
    exposed: float
    buffers: int
    across: tuple[int, int] = (0, 0)
    """Of a double ring, (forward, backward) bytes that leave the inner ring."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.scheme} ({INNER_DEGREES[self.scheme]} {self.ulysses})" if self.scheme in INNER_DEGREES else self.scheme


@dataclass(frozen=True)
class SchemeChoice:
    """The scheme that is taken, and why."""

    chosen: SchemeCost
    costs: tuple[SchemeCost, ...]
    reasons: tuple[str, ...]


def choose_scheme(problem: SequenceProblem, allowed: Sequence[tuple[SequenceScheme, int]]) -> SchemeChoice:
    """The scheme with the least exposed communication; of those within ``TIE`` the one with the smallest buffers, then the first.

    ``allowed``: (scheme, Ulysses degree or ranks of an inner ring), at least one. Raises ValueError for an empty list or heads that
    cannot be dealt.
    """
    if not allowed:
        raise ValueError("no sequence scheme is allowed")
    costs = tuple(scheme_cost(problem, scheme, ulysses) for scheme, ulysses in allowed)
    attention = sum(problem.attention_seconds())
    least = min(cost.exposed for cost in costs)
    close = [cost for cost in costs if cost.exposed - least <= TIE * attention]
    chosen = min(close, key=lambda cost: cost.buffers)
    return SchemeChoice(chosen, costs, tuple(_reasons(problem, costs, close, chosen, attention)))


def scheme_cost(problem: SequenceProblem, scheme: SequenceScheme, ulysses: int = 1, head_chunk: int | None = None) -> SchemeCost:
    """Bytes, seconds and buffers of one scheme (the table above). ``head_chunk`` as in ``parallel.head_chunk``."""
    if scheme == "ring":
        return _ring(problem)
    if scheme == "double_ring":
        return _double_ring(problem, ulysses)
    if scheme == "allgather_kv":
        return _allgather(problem, head_chunk or 1)
    degree = problem.topology.cp if scheme == "ulysses" else ulysses
    return _ulysses(problem, scheme, degree, head_chunk)


def _ring(p: SequenceProblem, attention: tuple[float, float] | None = None) -> SchemeCost:
    """A ring over ``topology.cp // topology.ulysses`` ranks. ``attention``: (forward, backward) seconds to hide behind."""
    size = p.topology.cp // p.topology.ulysses
    keys = 2 * p.tokens * p.n_kv_heads * p.head_dim
    forward, backward = attention or p.attention_seconds()
    there, back = (communication_seconds("send", keys * each, size, p.rates, p.topology) for each in (p.key_bytes, p.gradient_bytes))
    hops = size - 1
    exposed = hops * _left(p, there, forward / size)
    # In backward the first keys are waited for; the others travel during the hops before theirs, the gradients of a hop during the next
    # one, and those of the last hop home during the own keys', which come last.
    beside = [(there if hop < hops else 0.0) + (back if hop >= 2 else 0.0) for hop in range(1, size)] + [min(hops, 1) * back]
    exposed += sum(_left(p, seconds, backward / size) for seconds in beside) + min(hops, 1) * there
    buffers = keys * (2 * p.key_bytes + p.read_bytes + 3 * p.gradient_bytes)
    sent = hops * keys * p.key_bytes
    return SchemeCost("ring", 1, sent, sent + hops * keys * p.gradient_bytes, hops * (2 * there + back), exposed, buffers)


def _double_ring(p: SequenceProblem, inner: int) -> SchemeCost:
    """Rings of ``inner`` ranks inside a ring of these (``parallel/ring_links.py``)."""
    size = p.topology.cp
    turns = size // inner
    keys = 2 * p.tokens * p.n_kv_heads * p.head_dim
    nested = replace(p.topology, ulysses=inner)
    key_in, back_in = (communication_seconds("send", keys * b, inner, p.rates, p.topology) for b in (p.key_bytes, p.gradient_bytes))
    key_out, back_out = (communication_seconds("send", keys * b, turns, p.rates, nested) for b in (p.key_bytes, p.gradient_bytes))
    forward, backward = (seconds / size for seconds in p.attention_seconds())
    exposed = turns * (inner - 1) * _left(p, key_in, forward) + (turns - 1) * _left(p, key_out, inner * forward)
    # Backward: the first keys are waited for. Gradients of a hop travel during the next one, those of a turn's last hop between rings.
    exposed += key_in + (turns - 1) * _left(p, key_out, inner * backward)
    for hop in range(1, size + 1):
        key = key_in if hop < size and (hop + 1) % inner else 0.0
        gradient = 0.0 if hop == 1 else back_out if hop % inner == 0 else back_in
        exposed += _left(p, key + gradient, backward) if gradient == back_in else _left(p, max(key, gradient), backward)
    sent, of_gradients = (size - 1) * keys * p.key_bytes, (size - 1) * keys * p.gradient_bytes
    across = ((turns - 1) * keys * p.key_bytes, (turns - 1) * keys * p.key_bytes + turns * keys * p.gradient_bytes)
    seconds = 2 * (turns * (inner - 1) * key_in + (turns - 1) * key_out) + (size - 1 - turns) * back_in + turns * back_out
    # A turn's first keys on their way across, and those that arrive.
    buffers = keys * (4 * p.key_bytes + p.read_bytes + 3 * p.gradient_bytes)
    return SchemeCost("double_ring", inner, sent, sent + of_gradients, seconds, exposed, buffers, across)


def _allgather(p: SequenceProblem, head_chunk: int) -> SchemeCost:
    size, chunks = p.topology.cp, math.ceil(p.n_kv_heads / head_chunk)
    keys = 2 * p.tokens * p.n_kv_heads * p.head_dim  # this rank's
    whole = size * keys // chunks
    gather = communication_seconds("all_gather", whole * p.key_bytes, size, p.rates, p.topology)
    scatter = communication_seconds("reduce_scatter", whole * p.gradient_bytes, size, p.rates, p.topology)
    forward, backward = (seconds / chunks for seconds in p.attention_seconds())
    exposed = gather + (chunks - 1) * _left(p, gather, forward)
    exposed += gather + scatter + (chunks - 1) * _left(p, gather + scatter, backward)
    buffers = whole * (
        2 * p.key_bytes + p.value_bytes + 3 * p.gradient_bytes
    )  # here, on its way and in order; sums, in order and on their way
    sent = (size - 1) * keys * p.key_bytes
    return SchemeCost(
        "allgather_kv", 1, sent, sent + (size - 1) * keys * p.gradient_bytes, chunks * (2 * gather + scatter), exposed, buffers
    )


def _ulysses(p: SequenceProblem, scheme: SequenceScheme, size: int, head_chunk: int | None) -> SchemeCost:
    heads, dealt = p.n_heads, dealt_keys(p.n_heads, p.n_kv_heads, size)
    shared = keys_are_shared(p.n_heads, p.n_kv_heads, size)
    stages = len(plan_stages(p.n_heads, p.n_kv_heads, size, head_chunk))
    value = p.tokens * p.head_dim * p.value_bytes
    of_keys = p.tokens * p.head_dim * (p.gradient_bytes if shared else min(p.gradient_bytes, p.value_bytes))
    keys = 2 * dealt * p.tokens * p.head_dim * p.key_bytes
    alone = p.key_bytes != p.value_bytes  # keys and values are a message of their own
    parts = {  # by messages, whole, with what stays here: forward in and out, backward in and out
        "in": (value * heads, keys),
        "out": (value * heads, 0),
        "back in": (value * 3 * heads, keys),
        "back out": (value * heads, 2 * of_keys * dealt),
    }
    messages = {name: sum(each) for name, each in parts.items()}
    inside = replace(p.topology, ulysses=size)

    def at(name: str) -> float:
        sent = parts[name] if alone and name.endswith("in") else (messages[name],)
        return stages * sum(communication_seconds("all_to_all", each // stages, size, p.rates, inside) for each in sent)

    seconds = {name: at(name) for name in messages}
    forward, backward = p.attention_seconds()
    exposed = 0.0
    for names, attention in ((("in", "out"), forward), (("back in", "back out"), backward)):
        total = sum(seconds[name] for name in names)
        exposed += total / stages + _left(p, total * (stages - 1) / stages, attention * (stages - 1) / stages)
    away = (size - 1) / size
    ring_part = None
    if scheme == "ring_x_ulysses":
        mine = max(last - first for first, last in _keys_of_ranks(p.n_heads, p.n_kv_heads, size))
        ring_part = _ring(replace(p, tokens=p.tokens * size, n_kv_heads=mine, topology=inside), (forward, backward))
    sums = [sum(messages[name] for name in names) * away for names in (("in", "out"), ("back in", "back out"))]
    in_flight = 2 if stages > 1 else 1
    buffers = round((2 * messages["back in"] + 2 * messages["back out"]) * in_flight / stages)
    return SchemeCost(
        scheme,
        size,
        round(sums[0]) + (ring_part.forward_bytes if ring_part else 0),
        round(sums[1]) + (ring_part.backward_bytes if ring_part else 0),
        sum(seconds.values()) + (ring_part.communication if ring_part else 0.0),
        exposed + (ring_part.exposed if ring_part else 0.0),
        buffers + (ring_part.buffers if ring_part else 0),
    )


def dealt_keys(n_heads: int, n_kv_heads: int, size: int) -> int:
    """Key/value heads that the ranks of a Ulysses group get together, one that several read counted for each."""
    return sum(last - first for first, last in _keys_of_ranks(n_heads, n_kv_heads, size))


def _keys_of_ranks(n_heads: int, n_kv_heads: int, size: int) -> list[tuple[int, int]]:
    per_kv = n_heads // n_kv_heads
    return [(first // per_kv, -(-last // per_kv)) for first, last in head_ranges(n_heads, size)]


def _left(p: SequenceProblem, communication: float, compute: float) -> float:
    """What computation does not hide."""
    return max(0.0, communication - compute) if p.rates.overlap else communication


def _reasons(
    p: SequenceProblem, costs: Sequence[SchemeCost], close: Sequence[SchemeCost], chosen: SchemeCost, attention: float
) -> list[str]:
    across = "spans nodes" if p.topology.crosses_nodes(p.topology.cp) else "inside a node"
    lines = [
        f"parallel.sequence: {chosen.name}, for {p.topology.cp} ranks ({across}), {p.n_heads} query and {p.n_kv_heads} key/value heads, "
        f"{p.tokens:,} tokens per rank; link {p.rates.link / 1e9:.4g} GB/s, network {p.rates.network / 1e9:.4g} GB/s"
    ]
    for cost in costs:
        share = f"{cost.exposed / attention:.1%} of" if attention else "beside"
        lines.append(
            f"  {cost.name:<28} sends {(cost.forward_bytes + cost.backward_bytes) / _MIB:,.1f} MiB per layer, exposed "
            f"{1e3 * cost.exposed:.3g} ms ({share} {1e3 * attention:.3g} ms of attention), buffers {cost.buffers / _MIB:,.1f} MiB"
        )
    if len(close) > 1:
        others = ", ".join(cost.name for cost in close if cost is not chosen)
        lines.append(f"  {chosen.name}: as fast as {others} to {TIE:.0%} of the attention, with the smallest buffers")
    else:
        lines.append(f"  {chosen.name}: the least exposed communication, by more than {TIE:.0%} of the attention")
    return lines
