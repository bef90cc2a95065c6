"""ARMT's layers on several segments at once: the steps (segment i, layer l) of one diagonal i + l as one batched call.

The memory of layer l after segment i follows from that of segment i - 1 and from the layer below, so that

    (0, 0)   (1, 0) (0, 1)   (2, 0) (1, 1) (0, 2)   ...            one column of brackets after the other

may each be worked on together: g segments of L layers take g + L - 1 calls instead of g L, each of a product per layer where one product
was. Results are those of one segment after the other. Layers' weights are copied into one tensor per kind of weight: so much more memory is
needed, and the activations of all segments that are in flight (with ``recompute`` what enters every diagonal, whose inside is made again).

Legend: A layers of a diagonal, B row, X places of a segment: s tokens and m memory tokens, C channel, I and O of a linear map, F numbers of
the feature map, H head, D head size.
Try alone: ``pytest tests/models/memory/test_armt_diagonals.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.feedforward import _GatedProduct, compute_dtype
from models.memory.rmt import placed
from models.recomputed import recomputed
from models.rope import rotate

if TYPE_CHECKING:
    from models.memory.armt import AssociativeMemory

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Diagonals:
    """How many ``segments`` are in flight, and whether the inside of a diagonal is made again in the backward pass."""

    segments: int
    recompute: bool = False


def stacked(modules: Sequence[nn.Module]) -> Weights:
    """Every parameter of modules that are alike, over all of them in one tensor. Differentiable."""
    return {name: torch.stack([module.get_parameter(name) for module in modules]) for name, _ in modules[0].named_parameters()}


def linear(x_ABXI: Tensor, weights: Weights, name: str) -> Tensor:
    """Every layer's own map."""
    weight_AOI, bias_AO = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    y = torch.bmm(x_ABXI.flatten(1, 2), weight_AOI.mT).unflatten(1, x_ABXI.shape[1:3])
    return y if bias_AO is None else y + bias_AO[:, None, None].to(y.dtype)


def rms_norm(x: Tensor, weight_AC: Tensor, eps: float) -> Tensor:
    """Every layer's own norm of x [A, ..., C]; float32 inside (float64), in the dtype of products outside."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        wide = x if x.dtype == torch.float64 else x.float()
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        return (wide * scale * weight_AC.view(len(x), *[1] * (x.dim() - 2), -1)).to(dtype)


class Layers:
    """All layers and their memories, by one set of weights each."""

    def __init__(self, memory: AssociativeMemory, blocks: Sequence[Any]) -> None:
        self.memory, self.blocks = memory, list(blocks)
        self.weights, self.own = stacked(self.blocks), stacked(list(memory.layers))

    def part(self, first: int, last: int) -> tuple[Weights, Weights]:
        """The weights of the layers [first, last)."""
        if (first, last) == (0, len(self.blocks)):
            return self.weights, self.own
        own = {name: x[first:last] for name, x in self.own.items()}
        return {name: x[first:last] for name, x in self.weights.items()}, own

    def run(self, first: int, last: int, x_ABXC: Tensor, w_ABFC: Tensor, z_ABF: Tensor, cache: dict) -> tuple[Tensor, Tensor, Tensor]:
        """The streams after the layers [first, last), each on a segment of its own, and the layers' memories with it written."""
        weights, own = self.part(first, last)
        q_ABXk = torch.bmm(x_ABXC.flatten(1, 2), own["w_q"].mT).unflatten(1, x_ABXC.shape[1:3])
        one = self.memory.layers[0]
        (found_ABXC,) = recomputed(one.found, q_ABXk, w_ABFC, z_ABF)  # type: ignore[arg-type]
        x_ABXC = x_ABXC + found_ABXC.to(x_ABXC.dtype)
        x_ABXC = x_ABXC + self._attend(first, last, x_ABXC, weights, cache)
        h_ABXC = rms_norm(x_ABXC, weights["norm2.weight"], self.blocks[0].norm2.eps)
        gate, up = linear(h_ABXC, weights, "ffn.w_gate"), linear(h_ABXC, weights, "ffn.w_up")
        x_ABXC = x_ABXC + linear(_GatedProduct.apply(gate, up), weights, "ffn.w_down")  # type: ignore[arg-type]
        t_ABmC = x_ABXC[:, :, x_ABXC.shape[2] - self.memory.tokens :].to(w_ABFC.dtype)
        written = recomputed(one.written, t_ABmC, w_ABFC, z_ABF, *(own[name] for name in ("norm", "w_k", "w_v", "w_beta")))  # type: ignore[arg-type]
        return x_ABXC, *written  # type: ignore[return-value]

    def _attend(self, first: int, last: int, x_ABXC: Tensor, weights: Weights, cache: dict) -> Tensor:
        """What the mixers add: projections of all layers together, attention of those with the same window together."""
        A, B, X, _ = x_ABXC.shape
        h_ABXC, mixers = rms_norm(x_ABXC, weights["norm1.weight"], self.blocks[0].norm1.eps), [b.mixer for b in self.blocks[first:last]]
        eps = None if mixers[0].q_norm is None else mixers[0].q_norm.eps
        q, k, v = (linear(h_ABXC, weights, f"mixer.w{name}").unflatten(-1, (-1, mixers[0].head_dim)) for name in "qkv")
        if eps is not None:
            q, k = rms_norm(q, weights["mixer.q_norm.weight"], eps), rms_norm(k, weights["mixer.k_norm.weight"], eps)
        positions_1X, bounds = placed([X], X, x_ABXC.device, cache)
        cos_sin, found, start = mixers[0].rope_table(positions_1X, q.dtype, bounds), [], 0
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))  # [A, B, H, X, D]
        q, k = (rotate(x.flatten(0, 1), *cos_sin) for x in (q, k))
        for _, alike in groupby(mixers, key=lambda mixer: mixer.window):
            n = len(list(alike))
            rows = slice(start * B, (start + n) * B)
            _, bounds = placed([X] * (n * B), X, x_ABXC.device, cache)
            found.append(mixers[start].inner_attention(q[rows], k[rows], v.flatten(0, 1)[rows], bounds))
            start += n
        out = found[0] if len(found) == 1 else torch.cat(found)
        return linear(out.transpose(1, 2).flatten(2).unflatten(0, (A, B)), weights, "mixer.wo")


def read_diagonals(
    memory: AssociativeMemory, blocks: Sequence[Any], how: Diagonals, x_BTC: Tensor, w_LBFC: Tensor, z_LBF: Tensor, cache: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream after all layers at the tokens of whole segments, and every layer's memory after them."""
    layers, L = Layers(memory, blocks), len(blocks)
    own_BmC = memory.initial.to(x_BTC.dtype).expand(len(x_BTC), -1, -1)
    segments = [torch.cat([x, own_BmC], 1) for x in x_BTC.split(memory.size, 1)]
    outputs, entering = [], x_BTC.new_empty(0)
    for d in range(len(segments) + L - 1):
        first, last = max(0, d - len(segments) + 1), min(L, d + 1)
        if d < len(segments):
            new = segments[d].unsqueeze(0)
            entering = torch.cat([new, entering]) if d else new
        part = (entering, w_LBFC[first:last], z_LBF[first:last])
        if how.recompute and torch.is_grad_enabled():
            left_ABXC, w, z = checkpoint(layers.run, first, last, *part, cache, use_reentrant=False)  # type: ignore[misc]
        else:
            left_ABXC, w, z = layers.run(first, last, *part, cache)
        w_LBFC, z_LBF = (torch.cat([old[:first], new, old[last:]]) for old, new in ((w_LBFC, w), (z_LBF, z)))
        entering = left_ABXC
        if last == L:
            outputs.append(left_ABXC[-1, :, : memory.size])
            entering = left_ABXC[:-1]
    return torch.cat(outputs, 1), w_LBFC, z_LBF
