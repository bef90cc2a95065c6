"""Titans token by token, written independently of the chunked form: inner gradients by autograd, gates applied one token after another.

Slow, for tests; one process, one range.

Legend: B row, T token, C channel, H head, K key, V value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from models.batch import Bounds

if TYPE_CHECKING:
    from models.memory.protocol import State
    from models.memory.titans import Titans

_EPS = 1e-6


def titans_oracle(module: Titans, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
    """See `models.memory.protocol.MemoryModule.oracle`."""
    B, T, _ = x_BTC.shape
    state = state or module.init_state(B, x_BTC.device, x_BTC.dtype)
    initial = [p.expand(B, *p.shape) for p in (module.start_in, getattr(module, "start_out", None)) if p is not None]
    lengths = [p[0, 0].numel() for p in initial]

    def matrices(flat: Tensor) -> list[Tensor]:
        return [part.reshape(p.shape) for part, p in zip(flat.split(lengths, -1), initial, strict=True)]

    inputs, first = torch.cat([state["conv"], x_BTC], dim=1), bounds.ranges[0][0]
    M = matrices(state["state"][:, :, 0])
    S = matrices(state["state"][:, :, 1]) if module.rule.momentum else [torch.zeros_like(m) for m in M]
    A = matrices(state["state"][:, :, -1])
    outputs = []
    for t in range(first, first + T):
        q, k, v, gates = _features(module, inputs, x_BTC, t, bounds)
        begins, fresh = _marks(module, t, bounds, x_BTC.device)
        M = [torch.where(fresh, p, m) for m, p in zip(M, initial, strict=True)]
        S = [torch.where(fresh, torch.zeros_like(s), s) for s in S]
        if module.settings.variant == "lact":
            M = [torch.where(begins, m * _norms(p) / _norms(m), m) for m, p in zip(M, initial, strict=True)]
            S = [torch.where(begins, gates["eta"] * s, s) for s in S]
            M = [torch.where(begins, m + s, m) for m, s in zip(M, S, strict=True)]
            before = [m - torch.where(begins, s, torch.zeros_like(s)) for m, s in zip(M, S, strict=True)]
        else:
            before = M
        if module.settings.variant == "moneta":
            before = [m / (m.pow(4).sum((-2, -1), keepdim=True) + _EPS**2).pow(0.5) for m in before]
        A = [torch.where(begins, new, a) for new, a in zip(before, A, strict=True)]
        u = _gradient(module, A, k, v, gates.get("delta"))
        M, S = _learn(module, M, S, u, gates)
        at = A if module.settings.read == "chunk_start" else _read_at(module, A, M, t, bounds)
        outputs.append(_write_out(module, _network(module, at, q), x_BTC[:, t - first]))
    flat = [torch.cat([m.flatten(2) for m in each], -1) for each in (M, S, A)]
    learnt = torch.stack(flat if module.rule.momentum else [flat[0], flat[2]], 2)
    return torch.stack(outputs, 1), {"state": learnt, "conv": inputs[:, inputs.shape[1] - module.halo :]}


def _learn(
    module: Titans, M: list[Tensor], S: list[Tensor], u: list[Tensor], gates: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    theta = gates["theta"] * module.settings.largest_rate / max(1.0, module.network.hidden / 2)
    if module.settings.variant == "lact":
        return [m - theta * g for m, g in zip(M, u, strict=True)], [s - theta * g for s, g in zip(S, u, strict=True)]
    if module.settings.variant == "titans":
        S = [gates["eta"] * s - (1 - gates["eta"]) * theta * g for s, g in zip(S, u, strict=True)]
        return [(1 - gates["alpha"]) * m + s for m, s in zip(M, S, strict=True)], S
    return [(1 - gates["alpha"]) * m - theta * g for m, g in zip(M, u, strict=True)], S


def _read_at(module: Titans, A: list[Tensor], M: list[Tensor], t: int, bounds: Bounds) -> list[Tensor]:
    """The weights that token t reads, M being those after it: M itself, or at a full chunk's last token what the next chunk would read."""
    if module.settings.read == "token":
        return M
    origins = [max((s for s in row if s <= t), default=0) for row in bounds.documents]
    closes = torch.tensor([(t + 1 - o) % module.settings.chunk_size == 0 for o in origins], device=A[0].device).view(-1, 1, 1, 1)
    if module.settings.variant == "moneta":
        M = [m / (m.pow(4).sum((-2, -1), keepdim=True) + _EPS**2).pow(0.5) for m in M]
    if module.settings.variant == "lact":
        initial = [p for p in (module.start_in, getattr(module, "start_out", None)) if p is not None]
        M = [m * _norms(p) / _norms(m) for m, p in zip(M, initial, strict=True)]
    return [torch.where(closes, m, a) for m, a in zip(M, A, strict=True)]


def _marks(module: Titans, t: int, bounds: Bounds, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per row: a chunk begins at token t; it begins with the initial weights."""
    origins = [max((s for s in row if s <= t), default=0) for row in bounds.documents]
    period = module.settings.reset_every
    begins = [(t - o) % module.settings.chunk_size == 0 for o in origins]
    fresh = [t > 0 and (t == o or (period > 0 and (t - o) % period == 0)) for o in origins]
    return tuple(torch.tensor(marks, device=device).view(-1, 1, 1, 1) for marks in (begins, fresh))  # type: ignore[return-value]


def _features(module: Titans, inputs: Tensor, x_BTC: Tensor, t: int, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """q, k, v [B, H, 1, .] and gates [B, H, 1, 1] of token t."""
    n, i = module.halo, t - bounds.ranges[0][0]
    window = inputs[:, i : i + n + 1].clone()
    for b, row in enumerate(bounds.documents):
        start = max((s for s in row if 0 < s <= t), default=t - n)
        window[b, : max(0, start - (t - n))] = 0
    q, k, v = (
        F.silu((linear(window) * conv.t()).sum(1)).view(len(x_BTC), module.n_heads, 1, -1)
        for linear, conv in zip((module.w_q, module.w_k, module.w_v), module.convolutions(), strict=True)
    )
    q, k = (z * (z.square().sum(-1, keepdim=True) + _EPS).rsqrt() for z in (q, k))
    raw = module.w_rates(x_BTC[:, i]).view(len(x_BTC), module.n_heads, -1) + module.rate_bias
    by_name = {name: raw[..., j, None, None] for j, name in enumerate(module.gates)}
    return q, k, v, {name: F.softplus(z) if name == "delta" else z.sigmoid() for name, z in by_name.items()}


def _network(module: Titans, weights: list[Tensor], x: Tensor) -> Tensor:
    kind = module.network.kind
    if kind == "linear":
        y = x @ weights[0]
    elif kind == "mlp":
        y = F.gelu(x @ weights[0]) @ weights[1]
    else:
        gate, up = (x @ weights[0]).chunk(2, -1)
        y = (F.silu(gate) * up) @ weights[1]
    return x + F.layer_norm(y, y.shape[-1:], eps=_EPS) if module.network.residual_norm else y


def _gradient(module: Titans, A: list[Tensor], k: Tensor, v: Tensor, delta: Tensor | None) -> list[Tensor]:
    """Of one token's inner loss at A, by autograd, differentiable."""
    A = [a if a.requires_grad else a.detach().requires_grad_() for a in A]
    with torch.enable_grad():
        f = _network(module, A, k)
        e = f - v
        if module.rule.loss == "power":  # smoothed as a gradient, not as a loss
            return list(torch.autograd.grad(f, A, torch.tanh(10 * e) * (e.square() + _EPS), create_graph=True))
        if module.rule.loss == "dot":
            loss = -(f * v).sum()
        elif module.rule.loss == "huber":
            assert delta is not None
            norm = (e.square().sum(-1, keepdim=True) + _EPS).sqrt()
            loss = torch.where(norm <= delta, 0.5 * e.square().sum(-1, keepdim=True), delta * norm).sum()
        else:
            loss = 0.5 * e.square().sum()
        return list(torch.autograd.grad(loss, A, create_graph=True))


def _norms(weights: Tensor) -> Tensor:
    return (weights.square().sum(-2, keepdim=True) + _EPS).sqrt()


def _write_out(module: Titans, o_BH1V: Tensor, x_BC: Tensor) -> Tensor:
    o = o_BH1V.squeeze(2)
    o = o * (o.square().mean(-1, keepdim=True) + module.norm_eps).rsqrt() * module.norm_weight
    return module.w_out(o.flatten(1) * F.silu(module.w_gate(x_BC)))
