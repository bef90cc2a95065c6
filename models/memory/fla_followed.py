"""Stand-ins of flash-linear-attention's kernels on fake tensors, for plans: they allocate, keep and multiply what those do.

Allocations are those of fla 0.6.0, in its order (measured in triton's interpreter; ``tests/models/memory/fla_run.py`` does so again).
Chunks have 64 tokens. Workspaces are products of the sizes that the kernels multiply, so that a traced step has their arithmetic too.

Legend: B row, T token, H head, K key, V value, M slot, n = B * T * H, c tokens of a chunk, N chunks of all rows and heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 64


def _made(like: Tensor, rows: int, inner: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """A workspace of rows x columns that is the product of two things as large as ``inner`` says."""
    one = like.new_empty(1, 1, dtype=dtype)
    return one.expand(rows, inner) @ one.expand(inner, columns)


def _counts(q: Tensor) -> tuple[int, int]:
    """n and N."""
    B, T, H = q.shape[:3]
    return B * T * H, B * -(-T // _CHUNK) * H


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        summed, scores, after = torch.empty_like(g), _made(k, _counts(q)[0], q.shape[-1], _CHUNK), torch.empty_like(state)
        held = _states_of_delta(q, v)
        o = _made(v, _counts(q)[0], q.shape[-1] + 2 * _CHUNK, v.shape[-1]).view(v.shape)
        del held
        ctx.save_for_backward(q, k, v, summed, beta, scores, state)
        return o, after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, g, beta, _, state = ctx.saved_tensors
        (n, N), (K, V) = _counts(q), (q.shape[-1], v.shape[-1])
        held = _states_of_delta(q, v)
        inside = _made(v, n, 2 * _CHUNK, V)
        dh, dstate, dv = _made(v, N * K, 2 * _CHUNK, V), torch.empty_like(state), _made(v, n, K, V)
        del inside
        dq, dk, dw = (_made(q, n, inner, K) for inner in (V + _CHUNK, V + _CHUNK, V))
        dg = torch.empty_like(g)
        more = _made(k, n, 3 * _CHUNK, K), dv, torch.empty_like(g), torch.empty_like(g)
        dv, dbeta = _made(v, n, _CHUNK, V), torch.empty_like(beta)
        del held, dh, dw, more
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), dg, dbeta, dstate


def _states_of_delta(q: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """w, u, every chunk's state, and the values that are written."""
    (n, N), (K, V) = _counts(q), (q.shape[-1], v.shape[-1])
    return _made(q, n, _CHUNK, K), _made(v, n, _CHUNK, V), _made(v, N * K, _CHUNK, V), _made(v, n, K, V)


def followed_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, initial_state: Tensor, **rest: Any
) -> tuple[Tensor, Tensor]:
    """Output and state of ``fla.ops.gated_delta_rule.chunk_gated_delta_rule``."""
    return _Delta.apply(q, k, v, g, beta, initial_state)  # type: ignore[return-value]


class _SimpleGla(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        (n, N), (K, V) = _counts(q), (q.shape[-1], v.shape[-1])
        summed, h, after = torch.empty_like(g), _made(v, N * K, _CHUNK, V), torch.empty_like(state)
        o = _made(v, n, K + 2 * _CHUNK, V).view(v.shape)
        del h
        ctx.save_for_backward(q, k, v, summed, state)
        return o, after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, _, v, g, state = ctx.saved_tensors
        (n, N), (K, V) = _counts(q), (q.shape[-1], v.shape[-1])
        h, dh, dstate = _made(v, N * K, _CHUNK, V, torch.float32), _made(v, N * K, _CHUNK, V, torch.float32), torch.empty_like(state)
        dq, dk = (_made(q, n, V + 2 * _CHUNK, K).view(q.shape) for _ in range(2))
        dv, dg = _made(v, n, K + 2 * _CHUNK, V).view(v.shape), torch.empty_like(g)
        del h, dh
        return dq, dk, dv, dg, dstate


def followed_simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, initial_state: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Output and state of ``fla.ops.simple_gla.chunk_simple_gla``."""
    return _SimpleGla.apply(q, k, v, g, initial_state)  # type: ignore[return-value]


class _Gsa(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        (n, N), (K, V, M) = _counts(q), (q.shape[-1], v.shape[-1], s.shape[-1])
        summed, h, keys_after, ok = torch.empty_like(g), _made(k, N * K, _CHUNK, M), torch.empty_like(keys), _made(s, n, K + _CHUNK, M)
        scores = _made(q, n, K, _CHUNK)
        del scores
        p, queries = torch.empty_like(g), torch.empty_like(s)
        more, values_after = _made(s, N * M, _CHUNK, V), torch.empty_like(values)
        weights, o = _made(s, n, M, _CHUNK, torch.float32), _made(v, n, M + _CHUNK, V).view(v.shape)
        del h, more, queries, summed
        ctx.save_for_backward(q, k, v, s, g, ok, p, weights, keys, values)
        return o, keys_after, values_after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, s, g, _, p, _, keys, values = ctx.saved_tensors
        (n, N), (K, V, M), wide = _counts(q), (q.shape[-1], v.shape[-1], s.shape[-1]), torch.float32
        summed, queries = torch.empty_like(g), torch.empty_like(s)
        of_values = _made(s, N * M, _CHUNK, V, wide), _made(s, N * M, _CHUNK, V, wide), _made(s, n, V, _CHUNK, wide)
        dvalues, dv = torch.empty_like(values), _made(v, n, M + _CHUNK, V).view(v.shape)
        dp, ds, dg = (_made(s, n, V + _CHUNK, M, wide) for _ in range(3))
        of_read = torch.empty_like(p), torch.empty_like(p)
        del of_values, of_read
        dok, more = torch.empty_like(p), torch.empty_like(s)
        of_keys = _made(k, N * K, _CHUNK, M), _made(k, N * K, _CHUNK, M, wide), _made(q, n, K, _CHUNK), _made(q, n, M, _CHUNK)
        dkeys, (dq, dk) = torch.empty_like(keys), (_made(q, n, M + _CHUNK, K).view(q.shape) for _ in range(2))
        of_slots = _made(s, n, K + _CHUNK, M), torch.empty_like(g), torch.empty_like(g)
        del of_keys, dok, more, of_slots, dp, summed, queries
        return dq, dk, dv, ds.to(s.dtype).view(s.shape), dg.view(g.shape), dkeys, dvalues


def followed_gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, *, initial_state: tuple[Tensor, Tensor], **rest: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Output and state of ``fla.ops.gsa.chunk_gsa``."""
    o, keys, values = _Gsa.apply(q, k, v, s, g, *initial_state)  # type: ignore[misc]
    return o, (keys, values)
