"""Functions with the signatures of flash-linear-attention's kernels, token by token, differentiable, in the dtype of what comes in.

Independent of `models.memory`: what the kernels compute as their documentation says, on tokens [B, T, H, .], with lengths laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from models.memory.fla_kernels import Operators


def _sequences(x: Tensor, lengths: Tensor | None) -> list[tuple[int, int, int]]:
    """(row, first token, end) of every sequence."""
    if lengths is None:
        return [(row, 0, x.shape[1]) for row in range(len(x))]
    assert len(x) == 1 and lengths[0] == 0 and lengths[-1] == x.shape[1] and (lengths.diff() > 0).all()
    return [(0, int(a), int(b)) for a, b in pairwise(lengths)]


def _over_sequences(step: Callable[..., tuple[Tensor, Any]], tensors: list[Tensor], states: list[Any], lengths: Tensor | None) -> Any:
    """``step(*tokens of one place, state) -> (output, state)`` over all sequences: outputs in place, states after."""
    outputs, finals = [], []
    for number, (row, first, end) in enumerate(_sequences(tensors[0], lengths)):
        state = states[number]
        for t in range(first, end):
            o, state = step(*(x[row, t] for x in tensors), state)
            outputs.append(o)
        finals.append(state)
    assert len(finals) == len(states), "one state for every sequence"
    B, T = tensors[0].shape[:2]
    return torch.stack(outputs).unflatten(0, (B, T)), finals


def _checked(scale: float | None, output_final_state: bool, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> None:
    assert scale == 1.0 and output_final_state
    assert (cu_seqlens is None) == (cu_seqlens_cpu is None)
    assert cu_seqlens is None or torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)  # type: ignore[arg-type]


def chunk_gated_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: Any = None,
    initial_state: Any = None,
    output_final_state=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
):
    _checked(scale, output_final_state, cu_seqlens, cu_seqlens_cpu)

    def step(q_HK, k_HK, v_HV, g_H, beta_H, S):
        S = g_H.exp()[:, None, None] * S
        error = v_HV - torch.einsum("hk,hkv->hv", k_HK, S)
        S = S + torch.einsum("hk,hv->hkv", k_HK * beta_H[:, None], error)
        return torch.einsum("hk,hkv->hv", q_HK, S), S

    o, after = _over_sequences(step, [q, k, v, g, beta], list(initial_state), cu_seqlens)
    return o, torch.stack(after)


def chunk_simple_gla(
    q: Any,
    k: Any,
    v: Any,
    g: Any = None,
    g_gamma: Any = None,
    scale: Any = None,
    initial_state: Any = None,
    output_final_state=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
):
    _checked(scale, output_final_state, cu_seqlens, cu_seqlens_cpu)

    def step(q_HK, k_HK, v_HV, g_H, S):
        S = g_H.exp()[:, None, None] * S + torch.einsum("hk,hv->hkv", k_HK, v_HV)
        return torch.einsum("hk,hkv->hv", q_HK, S), S

    assert q.shape == k.shape and g.shape == v.shape[:3], "a query, a key and a decay for every head"
    o, after = _over_sequences(step, [q, k, v, g], list(initial_state), cu_seqlens)
    return o, torch.stack(after)


def chunk_gsa(
    q: Any,
    k: Any,
    v: Any,
    s: Any,
    g: Any = None,
    scale: Any = None,
    initial_state: Any = None,
    output_final_state=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
):
    _checked(scale, output_final_state, cu_seqlens, cu_seqlens_cpu)

    def step(q_HK, k_HK, v_HV, s_HM, g_HM, state):
        keys, values = state  # [H, K, M], [H, M, V]
        keys = keys * g_HM.exp().unsqueeze(-2) + k_HK.unsqueeze(-1) * s_HM.unsqueeze(-2)
        values = values * g_HM.exp().unsqueeze(-1) + s_HM.unsqueeze(-1) * v_HV.unsqueeze(-2)
        p = torch.einsum("hk,hkm->hm", q_HK, keys).softmax(-1)
        return torch.einsum("hm,hmv->hv", p, values), (keys, values)

    o, after = _over_sequences(step, [q, k, v, s, g], list(zip(*initial_state, strict=True)), cu_seqlens)
    return o, tuple(torch.stack(part) for part in zip(*after, strict=True))


TWINS = Operators(chunk_gated_delta_rule, chunk_simple_gla, chunk_gsa)
