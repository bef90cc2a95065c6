"""Memories that are small networks: what they compute, the gradient of their inner loss, and how gates weigh it inside a chunk.

The gradient of one token with respect to a weight matrix is an outer product of two vectors, so it is written down as these factors
(``left``, ``right``) and summed over tokens by one product. Everything here is plain differentiable arithmetic: the outer backward pass,
which needs second derivatives, is autograd's.

Inner loss per token, e = f(k) - v: squares 1/2 |e|^2 (Titans); Huber on |e| (Yaad); 1/p |e|_p^p smoothed (Moneta); -f(k).v (LaCT).

Legend: G memories (stream x head), p tokens, K key, V value, U hidden, F all fast weights of one memory, i and o of one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Network = Literal["linear", "mlp", "swiglu"]
Loss = Literal["squares", "huber", "power", "dot"]
Factors = list[tuple[Tensor, Tensor]]

_NORM_EPS = 1e-6
POWER = 3
"""p of Moneta's inner loss."""
RETENTION = 4
"""q of the norm that Moneta keeps its weights at."""
_SIGN_SLOPE = 10.0


@dataclass(frozen=True)
class FastNetwork:
    """The memory's network. linear: x A. mlp: gelu(x A) B. swiglu: (silu(x A1) * (x A2)) B with A = [A1 | A2]."""

    kind: Network
    key_dim: int
    value_dim: int
    hidden: int
    """U; 0 for linear."""
    residual_norm: bool = False
    """x + LayerNorm(...) around it."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """[i, o] of every matrix."""
        if self.kind == "linear":
            return ((self.key_dim, self.value_dim),)
        return ((self.key_dim, self.hidden * (2 if self.kind == "swiglu" else 1)), (self.hidden, self.value_dim))

    @property
    def size(self) -> int:
        """F"""
        return sum(i * o for i, o in self.shapes)

    def matrices(self, weights_GF: Tensor) -> list[Tensor]:
        """The matrices [G, i, o] in a flat row of weights."""
        ends = list(accumulate(i * o for i, o in self.shapes))
        parts = [weights_GF[..., end - i * o : end] for end, (i, o) in zip(ends, self.shapes, strict=True)]
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def __call__(self, weights_GF: Tensor, x_GpK: Tensor) -> Tensor:
        """f(x) [G, p, V]"""
        matrices = self.matrices(weights_GF)
        inner = x_GpK
        if self.kind == "mlp":
            inner = F.gelu(x_GpK @ matrices[0])
        elif self.kind == "swiglu":
            gate, up = (x_GpK @ matrices[0]).chunk(2, dim=-1)
            inner = F.silu(gate) * up
        out = inner @ matrices[-1]
        return x_GpK + _layer_norm(out)[0] if self.residual_norm else out

    def gradient(self, weights_GF: Tensor, k_GpK: Tensor, error: Callable[[Tensor], Tensor]) -> Factors:
        """Factors of each token's gradient of the inner loss with respect to every matrix. ``error``: dloss/df of a prediction."""
        matrices = self.matrices(weights_GF)
        if self.kind == "linear":
            return [(k_GpK, self._into(error, k_GpK, k_GpK @ matrices[0]))]
        hidden = k_GpK @ matrices[0]
        if self.kind == "mlp":
            inner = F.gelu(hidden)
            d = self._into(error, k_GpK, inner @ matrices[1])
            return [(k_GpK, (d @ matrices[1].mT) * _gelu_slope(hidden)), (inner, d)]
        gate, up = hidden.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        inner = silu * up
        d = self._into(error, k_GpK, inner @ matrices[1])
        d_inner = d @ matrices[1].mT
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        return [(k_GpK, torch.cat([d_inner * up * slope, d_inner * silu], -1)), (inner, d)]

    def _into(self, error: Callable[[Tensor], Tensor], k_GpK: Tensor, out_GpV: Tensor) -> Tensor:
        """dloss/d(out), through the norm if there is one."""
        if not self.residual_norm:
            return error(out_GpV)
        normed, scale = _layer_norm(out_GpV)
        d = error(k_GpK + normed)
        return scale * (d - d.mean(-1, keepdim=True) - normed * (d * normed).mean(-1, keepdim=True))


def _layer_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x centred and scaled to unit variance, the scale)"""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + _NORM_EPS).rsqrt()
    return centred * scale, scale


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5


def error_of(loss: Loss, v_GpV: Tensor, delta_Gp1: Tensor | None) -> Callable[[Tensor], Tensor]:
    """dloss/df as a function of the prediction. ``delta``: where Huber's loss turns linear."""

    def error(f_GpV: Tensor) -> Tensor:
        if loss == "dot":
            return -v_GpV
        e = f_GpV - v_GpV
        if loss == "huber":
            assert delta_Gp1 is not None
            return e * (delta_Gp1 * (e.square().sum(-1, keepdim=True) + _NORM_EPS).rsqrt()).clamp(max=1.0)
        if loss == "power":  # Sign(e) |e|^(p-1), smoothed as in section 5.1 of the Miras paper
            return torch.tanh(_SIGN_SLOPE * e) * (e.square() + _NORM_EPS) ** ((POWER - 1) / 2)
        return e

    return error


def outer_sums(factors: Factors, weight_Gp: Tensor) -> Tensor:
    """sum over tokens of weight x gradient, flat [G, F]."""
    weight = weight_Gp.unsqueeze(-1)
    return torch.cat([(left.mT @ (right * weight)).flatten(-2) for left, right in factors], -1)


# --- what happens to the weights at a chunk start ---------------------------------------------------------------------------


def at_norm(network: FastNetwork, weights_GF: Tensor) -> Tensor:
    """Moneta: W = A / |A|_q^(q-2) per matrix; A, which is what is written to, stays."""
    scaled = []
    for A in network.matrices(weights_GF):
        A = A.flatten(-2)
        scaled.append(A * (A.pow(RETENTION).sum(-1, keepdim=True) + _NORM_EPS**2).pow(-(RETENTION - 2) / RETENTION))
    return torch.cat(scaled, -1)


def at_initial_norms(network: FastNetwork, weights_GF: Tensor, initial_GF: Tensor) -> Tensor:
    """LaCT: the incoming weights of every unit scaled back to the norm that they began with."""
    scaled = []
    for A, begun in zip(network.matrices(weights_GF), network.matrices(initial_GF), strict=True):
        norms = [(x.square().sum(-2, keepdim=True) + _NORM_EPS).sqrt() for x in (A, begun)]
        scaled.append((A * (norms[1] / norms[0])).flatten(-2))
    return torch.cat(scaled, -1)


# --- gates inside a chunk ----------------------------------------------------------------------------------------------------

Maps = tuple[Tensor, Tensor, Tensor]
"""(beta, f, m): weights M and momentum S go to beta M + f S and m S."""


def compose(later: Maps, earlier: Maps) -> Maps:
    """First ``earlier``, then ``later``."""
    beta, f, m = later
    return beta * earlier[0], beta * earlier[1] + f * earlier[2], m * earlier[2]


def maps_after(keep: Tensor, cross: Tensor, momentum: Tensor) -> tuple[Maps, Maps]:
    """From the maps [..., p] of single tokens, (keep, cross, momentum): of all tokens after each one, and of all together [..., 1].

    By doubling the reach, log2(p) rounds; no ratios, so nothing overflows where a gate closes.
    """
    reach: Maps = (keep, cross, momentum)
    step = 1
    while step < keep.shape[-1]:
        reach = compose(_shifted(reach, step), reach)
        step *= 2
    whole = (reach[0][..., :1], reach[1][..., :1], reach[2][..., :1])
    return _shifted(reach, 1), whole


def _shifted(maps: Maps, by: int) -> Maps:
    """The entry ``by`` tokens later; the map that changes nothing past the end."""
    beta, f, m = (F.pad(x[..., by:], (0, by), value=fill) for x, fill in zip(maps, (1.0, 0.0, 1.0), strict=True))
    return beta, f, m
