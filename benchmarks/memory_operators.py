"""Operators of memories that ``benchmarks/memory_peers.py`` compares (gated delta rule, gated slots, decayed sum), longstride's and other
packages', and what every case of that benchmark is made of. All of a case take the same tensors [B, T, H, .]; exact is the token recurrence
in float64, written here.

Legend: B row, T token, H head, K key, V value, M slot, C channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.memory.decayed_sum import decayed_sum
from models.memory.delta_rule import gated_delta_rule
from models.memory.gated_slots import gated_slots
from models.memory.short_conv import from_chunks, to_chunks

Step = Callable[[], list[Tensor]]
"""One forward and backward pass: the result and its gradients."""


@dataclass(frozen=True)
class Size:
    """Of one case: one row of ``tokens`` tokens."""

    tokens: int
    heads: int = 4
    dim: int = 64
    """Of a head."""
    slots: int = 64
    chunk: int = 64
    segment: int = 512
    n_keys: int = 128

    @property
    def width(self) -> int:
        """C"""
        return self.heads * self.dim


@dataclass(frozen=True)
class System:
    """``prepare(size, dtype)`` makes the step, in float32 or, to compare with, float64; it raises what the package raises."""

    name: str
    package: str
    """As it is known to the package index; empty: longstride."""
    prepare: Callable[[Size, torch.dtype], Step]
    exact: Callable[[Size], Step] | None = None
    """What its results are compared with at smoke size; None, or at another size: those of the case, or ``prepare`` in float64."""
    note: str = ""


@dataclass(frozen=True)
class Case:
    """What is computed, by whom."""

    name: str
    about: str
    sizes: Size
    systems: Sequence[System]
    exact: Callable[[Size], Step] | None = None
    """The results that every system should have; None: each has its own."""
    results: Sequence[str] = field(default=("out", "dx", "dparameters"))
    """What a step gives."""


# --- operators ------------------------------------------------------------------------------------------------------------------


def _drawn(size: Size, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Normal numbers of these shapes, drawn in float32."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def delta_inputs(size: Size, dtype: torch.dtype) -> list[Tensor]:
    """q, k (unit length), v [B, T, H, .], beta and log decay [B, T, H], dout."""
    T, H, D = size.tokens, size.heads, size.dim
    drawn = _drawn(size, dict.fromkeys("qkvo", (1, T, H, D)) | dict.fromkeys("bg", (1, T, H)), torch.float32)
    q, k = (F.normalize(drawn[name], dim=-1) for name in "qk")
    return [x.to(dtype) for x in (q, k, drawn["v"], drawn["b"].sigmoid(), 0.1 * F.logsigmoid(drawn["g"]), drawn["o"])]


def slot_inputs(size: Size, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v [B, T, H, .], log decay [B, T, H, M], dout."""
    T, H, D = size.tokens, size.heads, size.dim
    drawn = _drawn(size, dict.fromkeys("qkvo", (1, T, H, D)) | {"g": (1, T, H, size.slots)}, torch.float32)
    return [x.to(dtype) for x in (*(drawn[name] for name in "qkv"), F.logsigmoid(drawn["g"]) / 8, drawn["o"])]


def _step(function: Callable[..., Tensor], inputs: list[Tensor]) -> Step:
    """``function`` of all but the last, which is the gradient of what it returns."""
    leaves, dout = [x.clone().requires_grad_() for x in inputs[:-1]], inputs[-1]

    def step() -> list[Tensor]:
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return step


def _operator(inputs: Callable[[Size, torch.dtype], list[Tensor]], function: Callable[..., Tensor], size: Size, dtype: torch.dtype) -> Step:
    return _step(partial(function, size), inputs(size, dtype))


def _by_token(advance: Callable[..., tuple[Tensor, ...]], states: Sequence[Tensor], *inputs: Tensor) -> Tensor:
    """A token recurrence; inside stretches of 64 tokens it is run again in the backward pass, or a state per token would be kept."""

    def stretch(*given: Tensor) -> tuple[Tensor, ...]:
        states, tokens, outputs = given[: len(given) - len(inputs)], given[len(given) - len(inputs) :], []
        for t in range(tokens[0].shape[1]):
            out, *states = advance(*(x[:, t] for x in tokens), *states)
            outputs.append(out)
        return torch.stack(outputs, 1), *states

    outputs = []
    for pieces in zip(*(x.split(64, dim=1) for x in inputs), strict=True):
        out, *states = checkpoint(stretch, *states, *pieces, use_reentrant=False)
        outputs.append(out)
    return torch.cat(outputs, 1)


def exact_delta(size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """S = a (I - b k k') S + b k v', o = S' q / sqrt(K)."""

    def advance(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        S = S * g.exp()[..., None, None]
        S = S + k.unsqueeze(-1) * (beta.unsqueeze(-1) * (v - (k.unsqueeze(-2) @ S).squeeze(-2))).unsqueeze(-2)
        return (q.unsqueeze(-2) @ S).squeeze(-2) / size.dim**0.5, S

    return _by_token(advance, [q.new_zeros(1, size.heads, size.dim, size.dim)], q, k, v, beta, g)


def exact_slots(size: Size, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Slots' keys and values decay by a and take (1 - a) of the token's; o = values' softmax(keys q / sqrt(K))."""

    def advance(q: Tensor, k: Tensor, v: Tensor, g: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        a = g.exp().unsqueeze(-1)
        keys, values = (a * old + (1 - a) * new.unsqueeze(-2) for old, new in ((keys, k), (values, v)))
        p = ((keys @ q.unsqueeze(-1)).squeeze(-1) / size.dim**0.5).softmax(-1)
        return (p.unsqueeze(-2) @ values).squeeze(-2), keys, values

    return _by_token(advance, [q.new_zeros(1, size.heads, size.slots, size.dim) for _ in range(2)], q, k, v, g)


def exact_sum(size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """S = a S + b k v', o = S' q."""

    def advance(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        S = S * g.exp()[..., None, None] + k.unsqueeze(-1) * (beta.unsqueeze(-1) * v).unsqueeze(-2)
        return (q.unsqueeze(-2) @ S).squeeze(-2), S

    return _by_token(advance, [q.new_zeros(1, size.heads, size.dim, size.dim)], q, k, v, beta, g)


def _own_delta(size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    q = q * size.dim**-0.5
    beta, g = (to_chunks(x.unsqueeze(-1), size.chunk).squeeze(-1) for x in (beta, g))
    q, k, v = (to_chunks(x, size.chunk) for x in (q, k, v))
    return from_chunks(gated_delta_rule(q, k, v, beta, g, q.new_zeros(size.heads, size.dim, size.dim))[0], 1, size.tokens)


def _own_slots(size: Size, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, k, v, g = (to_chunks(x, 16) for x in (q * size.dim**-0.5, k, v, g))
    out, _ = gated_slots(q, k, v, g, q.new_zeros(size.heads, size.slots, 2 * size.dim))
    assert out is not None
    return from_chunks(out, 1, size.tokens)


def _own_sum(size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    beta, g = (to_chunks(x.unsqueeze(-1), size.chunk).squeeze(-1) for x in (beta, g))
    q, k, v = (to_chunks(x, size.chunk) for x in (q, k, v))
    out, _ = decayed_sum(q, k, v, beta, g, q.new_zeros(size.heads, size.dim, size.dim))
    assert out is not None
    return from_chunks(out, 1, size.tokens)


def _fla_delta(recurrent: bool, size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import naive  # pyright: ignore[reportMissingImports]

    if recurrent:
        return naive.naive_recurrent_gated_delta_rule(q, k, v, beta, g)[0]
    return naive.naive_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, chunk_size=size.chunk)[0]


def _fla_slots(size: Size, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    from fla.ops.gsa.naive import naive_recurrent_gsa  # pyright: ignore[reportMissingImports]

    return naive_recurrent_gsa(q, k, v, 1 - g.exp(), g)[0]


def _fla_sum(name: str, size: Size, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    from fla.ops.simple_gla import naive  # pyright: ignore[reportMissingImports]

    own = {"chunk_size": size.chunk} if "chunk" in name else {}
    return getattr(naive, name)(q, k, v * beta.unsqueeze(-1), g, scale=1.0, **own)[0]


# --- their cases ----------------------------------------------------------------------------------------------------------------

_SUMS = ("naive_chunk_simple_gla", "naive_recurrent_simple_gla", "naive_parallel_simple_gla")
_SUM_RESULTS = ("out", "dq", "dk", "dv", "dbeta", "dlog_decay")

OPERATORS = (
    Case(
        "Gated DeltaNet",
        "the gated delta rule",
        Size(2048),
        (
            System("gated_delta_rule", "", partial(_operator, delta_inputs, _own_delta)),
            System("naive_chunk_gated_delta_rule", "fla-core", partial(_operator, delta_inputs, partial(_fla_delta, False))),
            System("naive_recurrent_gated_delta_rule", "fla-core", partial(_operator, delta_inputs, partial(_fla_delta, True))),
        ),
        partial(_operator, delta_inputs, exact_delta, dtype=torch.float64),
        _SUM_RESULTS,
    ),
    Case(
        "Gated Slot Attention",
        "64 slots per head",
        Size(2048),
        (
            System("gated_slots", "", partial(_operator, slot_inputs, _own_slots)),
            System("naive_recurrent_gsa", "fla-core", partial(_operator, slot_inputs, _fla_slots)),
        ),
        partial(_operator, slot_inputs, exact_slots, dtype=torch.float64),
        ("out", "dq", "dk", "dv", "dlog_decay"),
    ),
    Case(
        "Mamba-2",
        "its scan, one decay per head (SSD)",
        Size(2048),
        (
            System("decayed_sum", "", partial(_operator, delta_inputs, _own_sum)),
            *(System(name, "fla-core", partial(_operator, delta_inputs, partial(_fla_sum, name))) for name in _SUMS),
        ),
        partial(_operator, delta_inputs, exact_sum, dtype=torch.float64),
        _SUM_RESULTS,
    ),
)
