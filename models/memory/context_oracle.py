"""Memory as context document by document and segment by segment, written independently of `models/memory/context.py`: attention score by
score, inner gradients by autograd, gates applied one token after another (`models/memory/titans_oracle.py`).

Slow, for tests; one process, one range that begins with a segment in every row.

Legend: c tokens of a segment, C channel, H head, D head size, K key, V value, P persistent tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from models.batch import Bounds
from models.memory.titans_oracle import _EPS, _gradient, _learn, _network, _norms

if TYPE_CHECKING:
    from models.memory.context import MemoryAsContext
    from models.memory.protocol import State


def context_oracle(module: MemoryAsContext, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
    """See `models.memory.protocol.MemoryModule.oracle`."""
    state = state or module.init_state(len(x_BTC), x_BTC.device, x_BTC.dtype)
    memory, outputs, after = module.memory, [], []
    initial: list[Tensor] = [p for p in (memory.start_in, getattr(memory, "start_out", None)) if p is not None]
    lengths = [p[0].numel() for p in initial]
    for x_TC, given_HZF, starts in zip(x_BTC, state["state"], bounds.documents, strict=True):
        parts = [[f.reshape(p.shape) for f, p in zip(row.split(lengths, -1), initial, strict=True)] for row in given_HZF.unbind(1)]
        M, S = parts[0], parts[1] if memory.rule.momentum else [torch.zeros_like(p) for p in initial]
        y_TC = []
        for start, end in zip(starts, [*starts[1:], bounds.seq_len], strict=True):
            for a in range(start, end, module.segment):
                restart = module.reset_every > 0 and (a - start) % module.reset_every == 0
                if a > 0 and (a == start or restart):
                    M, S = list(initial), [torch.zeros_like(p) for p in initial]
                y_cC, M, S = _segment(module, x_TC[a : min(a + module.segment, end)], M, S, initial)
                y_TC.append(y_cC)
        outputs.append(torch.cat(y_TC))
        rows = [torch.cat([m.flatten(1) for m in each], 1) for each in ([M, S] if memory.rule.momentum else [M])]
        after.append(torch.stack(rows, 1))
    inputs = torch.cat([state["conv"], x_BTC], dim=1)
    return torch.stack(outputs), {"state": torch.stack(after), "conv": inputs[:, inputs.shape[1] - module.segment + 1 :]}


def _segment(
    module: MemoryAsContext, x_cC: Tensor, M: list[Tensor], S: list[Tensor], initial: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs of one segment's tokens, and weights and momentum after it."""
    memory = module.memory
    if memory.settings.variant == "lact":
        M = [m * _norms(p) / _norms(m) for m, p in zip(M, initial, strict=True)]
    A = [m / (m.pow(4).sum((-2, -1), keepdim=True) + _EPS**2).pow(0.5) for m in M] if memory.settings.variant == "moneta" else M
    q_HcK, _, _ = _projected(module, x_cC)
    h_cC = _heads_out(module, _network(memory, A, q_HcK)) @ module.w_context.weight.t()
    z_cC = _attended(module, x_cC, h_cC)
    known_cC = x_cC + z_cC if module.residual else z_cC
    q_HcK, k_HcK, v_HcV = _projected(module, known_cC)
    read_cC = _heads_out(module, _network(memory, A, q_HcK)) @ module.w_read.weight.t()
    for j, known_C in enumerate(known_cC):
        raw_HR = memory.w_rates(known_C).view(memory.n_heads, -1) + memory.rate_bias
        gates = {name: raw_HR[:, i, None, None] for i, name in enumerate(memory.gates)}
        gates = {name: F.softplus(z) if name == "delta" else z.sigmoid() for name, z in gates.items()}
        if memory.settings.variant == "lact" and j == 0:  # momentum moves the weights once per chunk
            S = [gates["eta"] * s for s in S]
            M = [m + s for m, s in zip(M, S, strict=True)]
        at = [a.clone() for a in A]  # the key depends on A too, through what the segment read; a gradient step does not look there
        M, S = _learn(memory, M, S, _gradient(memory, at, k_HcK[:, j : j + 1], v_HcV[:, j : j + 1], gates.get("delta")), gates)
    seen, gate = (
        z * (z.square().mean(-1, keepdim=True) + module.norm_eps).rsqrt() * weight
        for z, weight in ((z_cC, module.attention_norm), (read_cC, module.memory_norm))
    )
    return module.w_out(seen * F.silu(gate)), M, S


def _projected(module: MemoryAsContext, x_cC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [H, c, .] of a segment's tokens; convolutions see nothing before it."""
    memory, streams = module.memory, []
    for linear, conv_CK in zip((memory.w_q, memory.w_k, memory.w_v), memory.convolutions(), strict=True):
        padded = F.pad(linear(x_cC), (0, 0, conv_CK.shape[1] - 1, 0))
        taps = [(padded[j : j + conv_CK.shape[1]] * conv_CK.t()).sum(0) for j in range(len(x_cC))]
        streams.append(F.silu(torch.stack(taps)).view(len(x_cC), memory.n_heads, -1).transpose(0, 1))
    q, k, v = streams
    q, k = (z * (z.square().sum(-1, keepdim=True) + _EPS).rsqrt() for z in (q, k))
    return q, k, v


def _heads_out(module: MemoryAsContext, o_HcV: Tensor) -> Tensor:
    """[c, H * V], every head's vector normed."""
    o = o_HcV * (o_HcV.square().mean(-1, keepdim=True) + module.norm_eps).rsqrt() * module.memory.norm_weight
    return o.transpose(0, 1).flatten(1)


def _attended(module: MemoryAsContext, x_cC: Tensor, h_cC: Tensor) -> Tensor:
    """Token by token, head by head: persistent tokens at place 0, then what the memory had and the tokens up to one's own place."""
    attention, c, n = module.attention, len(x_cC), len(module.persistent)
    seen = torch.cat([module.persistent, h_cC, x_cC])
    places = torch.tensor([0] * n + [*range(c), *range(c)], device=x_cC.device)
    heads = {}
    for name, linear, norm, x, at in (
        ("q", attention.wq, attention.q_norm, x_cC, places[n : n + c]),
        ("k", attention.wk, attention.k_norm, seen, places),
        ("v", attention.wv, None, seen, None),
    ):
        z = linear(x).view(len(x), -1, attention.head_dim)
        z = z if norm is None else norm(z)
        heads[name] = z if at is None else _turned(z, at, attention.rope.frequencies, attention.rope.temperature)
    group, rows = heads["q"].shape[1] // heads["k"].shape[1], []
    for i in range(c):
        visible = [*range(n), *range(n, n + i + 1), *range(n + c, n + c + i + 1)]
        of_heads = []
        for head, q_D in enumerate(heads["q"][i]):
            weights = (heads["k"][visible, head // group] @ q_D / math.sqrt(attention.head_dim)).softmax(0)
            of_heads.append(weights @ heads["v"][visible, head // group])
        rows.append(torch.cat(of_heads))
    return attention.wo(torch.stack(rows))


def _turned(x_cHD: Tensor, place_c: Tensor, frequencies: tuple[float, ...] | list[float], temperature: float) -> Tensor:
    """Rotary positions as products of complex numbers: pair (i, i + D/2) is one."""
    real, imaginary = x_cHD.chunk(2, -1)
    angle = place_c[:, None, None].double() * torch.tensor(frequencies, dtype=torch.float64, device=x_cHD.device)
    turned = torch.complex(real, imaginary) * torch.polar(torch.full_like(angle, temperature), angle).to(
        torch.complex(real, imaginary).dtype
    )
    return torch.cat([turned.real, turned.imag], -1)
