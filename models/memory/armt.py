"""Associative Recurrent Memory Transformer (arXiv 2407.04841): every layer has a linear memory, written once per segment by the delta rule.

    before layer l, at every place:     h += phi(q)' W / (phi(q)' z + eps)            q = W_q h
    after it, at the memory tokens t:   W' = W + sum beta phi(k) (v - phi(k)' W / (phi(k)' z + eps))'    k, v = W_k t, W_v t
                                        z' = z + sum gamma phi(k)                     beta = sigmoid(w_b t)
                                        gamma = clip(1 - phi(k)' z / |phi(k)|^2, 0, 1), no gradient

    phi (DPFP): products of the entries of r = relu([x, -x]) with those 1, 2, ... features places further

The memory tokens are learned and stand behind every segment; what is remembered is W and z alone. The memory of a layer depends on that
layer's of the segment before, but what is written depends on what was read: ranks would have to wait for each other layer by layer, which
is not built. On one device layers work on several segments at once (`models/memory/armt_diagonals.py`).

Left unspecified by the paper, or other than there: queries and keys have unit length, which makes eps small beside phi(k)' z whatever
the width; what is written is normed first, as the stream's size grows with depth; all tokens of a segment are written at once, against
the same W.

Legend: B row, C channel, m memory tokens, s tokens of the segment, X = s + m, k size of q and k, F numbers of phi.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelConfig
from models.linear import linear
from models.memory.armt_diagonals import Diagonals, read_diagonals
from models.memory.protocol import MemoryTraits, State
from models.memory.rmt import placed
from models.memory.stack import Backbone, StackMemory
from models.recomputed import recomputed
from models.segments import padded

EPS = 1e-5

TRAITS = MemoryTraits(carry="layer", transition="nonlinear", read_at="segment_start", layouts=frozenset(), attach="stack")


def dpfp(x: Tensor, features: int) -> Tensor:
    """[..., k] -> [..., 2 k features]: x made unit length, then products of its positive and negative parts with shifted ones."""
    r = F.normalize(x, dim=-1)
    r = torch.cat([r, -r], -1).relu()
    return torch.cat([r * r.roll(shift, -1) for shift in range(1, features + 1)], -1)


class LayerMemory(nn.Module):
    """The associative memory of one layer. State: ``w`` [B, F, C], ``z`` [B, F]."""

    def __init__(self, d_model: int, key_dim: int, features: int, norm_eps: float) -> None:
        super().__init__()
        self.features, self.norm_eps, self.size = features, norm_eps, 2 * key_dim * features
        self.w_q = nn.Parameter(torch.empty(key_dim, d_model))
        self.w_k = nn.Parameter(torch.empty(key_dim, d_model))
        self.w_v = nn.Parameter(torch.empty(d_model, d_model))
        self.w_beta = nn.Parameter(torch.empty(1, d_model))
        self.norm = nn.Parameter(torch.empty(d_model))

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """The norm begins at 1; values at 0, so that the model begins as one without memory."""
        return torch.ones(shape) if name == "norm" else torch.zeros(shape) if name == "w_v" else None

    def read(self, x_BXC: Tensor, w_BFC: Tensor, z_BF: Tensor) -> Tensor:
        """What is remembered at each place, added to the stream."""
        (found_BXC,) = recomputed(self.found, linear(x_BXC, self.w_q), w_BFC, z_BF)
        return x_BXC + found_BXC.to(x_BXC.dtype)

    def found(self, q_BXk: Tensor, w_BFC: Tensor, z_BF: Tensor) -> tuple[Tensor]:
        """What the queries find; further leading dims may stand before B."""
        phi_BXF = dpfp(q_BXk.to(w_BFC.dtype), self.features)
        return (phi_BXF @ w_BFC / (phi_BXF @ z_BF.unsqueeze(-1) + EPS),)

    def write(self, t_BmC: Tensor, w_BFC: Tensor, z_BF: Tensor) -> tuple[Tensor, Tensor]:
        """The state with the memory tokens ``t`` written."""
        return recomputed(self.written, t_BmC.to(w_BFC.dtype), w_BFC, z_BF, self.norm, self.w_k, self.w_v, self.w_beta)  # type: ignore[return-value]

    def written(self, t: Tensor, w_BFC: Tensor, z_BF: Tensor, norm: Tensor, w_k: Tensor, w_v: Tensor, w_beta: Tensor) -> tuple[Tensor, ...]:
        """``w`` and ``z`` with ``t`` written. All may be of several layers, in a dim before B, and so may be the weights."""
        if norm.dim() > 1:
            norm, w_k, w_v, w_beta = (weight.unsqueeze(1) for weight in (norm.unsqueeze(1), w_k, w_v, w_beta))
        t = t * (t.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt() * norm
        w_k, w_v, w_beta = (weight.to(t.dtype).mT for weight in (w_k, w_v, w_beta))
        phi_BmF, beta_Bm1 = dpfp(t @ w_k, self.features), torch.sigmoid(t @ w_beta)
        known_Bm1 = phi_BmF @ z_BF.unsqueeze(-1)
        error_BmC = t @ w_v - phi_BmF @ w_BFC / (known_Bm1 + EPS)
        new_Bm1 = (1 - known_Bm1 / (phi_BmF.square().sum(-1, keepdim=True) + EPS)).clamp(0, 1).detach()
        return w_BFC + phi_BmF.mT @ (beta_Bm1 * error_BmC), z_BF + (new_Bm1 * phi_BmF).sum(-2)


class AssociativeMemory(StackMemory):
    """The memories of all layers and the memory tokens. State: ``w0``, ``z0``, ``w1`` ... as of `LayerMemory`."""

    traits = TRAITS

    def __init__(self, segment: int, tokens: int, layers: int, d_model: int, key_dim: int, features: int, norm_eps: float) -> None:
        super().__init__(segment, d_model)
        self.tokens = tokens
        self.initial = nn.Parameter(torch.empty(tokens, d_model))
        self.diagonals: Diagonals | None = None
        """A seam: so many segments are worked on together; None: one after the other."""
        self.layers = nn.ModuleList(LayerMemory(d_model, key_dim, features, norm_eps) for _ in range(layers))

    def together(self) -> int:
        """See `StackMemory.together`."""
        return 1 if self.diagonals is None else self.diagonals.segments

    def begin(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """Nothing is remembered."""
        state = {}
        for i, layer in enumerate(self.layers):
            state[f"w{i}"] = torch.zeros(rows, layer.size, self.width, device=device, dtype=dtype)  # type: ignore[arg-type]
            state[f"z{i}"] = torch.zeros(rows, layer.size, device=device, dtype=dtype)  # type: ignore[arg-type]
        return state

    def read(self, backbone: Backbone, x_BsC: Tensor, lengths: Sequence[int], state: State, cache: dict) -> tuple[Tensor, State]:
        """See `StackMemory.read`."""
        m, s = self.tokens, x_BsC.shape[1]
        if s > self.size:
            return self._read_diagonals(backbone, x_BsC, state, cache)
        own_mC = self.initial.to(x_BsC.dtype)
        even = all(length == s for length in lengths)
        if even:
            h_BXC = torch.cat([x_BsC, own_mC.expand(len(x_BsC), -1, -1)], 1)
        else:
            h_BXC = padded([torch.cat([x[:length], own_mC]) for x, length in zip(x_BsC, lengths, strict=True)], s + m)
        where, after = placed([length + m for length in lengths], s + m, x_BsC.device, cache), {}
        for i, (block, layer) in enumerate(zip(backbone.blocks, self.layers, strict=True)):
            w_BFC, z_BF = state[f"w{i}"], state[f"z{i}"]
            h_BXC = block(layer.read(h_BXC, w_BFC, z_BF), *where)  # type: ignore[operator]
            t_BmC = h_BXC[:, s:] if even else torch.stack([h[length : length + m] for h, length in zip(h_BXC, lengths, strict=True)])
            after[f"w{i}"], after[f"z{i}"] = layer.write(t_BmC, w_BFC, z_BF)  # type: ignore[operator]
        return h_BXC[:, :s], after

    def _read_diagonals(self, backbone: Backbone, x_BTC: Tensor, state: State, cache: dict) -> tuple[Tensor, State]:
        """Several whole segments of every row."""
        assert self.diagonals is not None
        w_LBFC, z_LBF = (torch.stack([state[f"{leaf}{i}"] for i in range(len(self.layers))]) for leaf in "wz")
        y_BTC, w_LBFC, z_LBF = read_diagonals(self, list(backbone.blocks), self.diagonals, x_BTC, w_LBFC, z_LBF, cache)
        return y_BTC, {f"{leaf}{i}": one for leaf, all_L in (("w", w_LBFC), ("z", z_LBF)) for i, one in enumerate(all_L)}


def build(config: ModelConfig) -> AssociativeMemory:
    """The memory that ``config.memory`` describes."""
    own = config.memory.armt
    layers = len(config.layer_kinds)
    return AssociativeMemory(own.segment, own.tokens, layers, config.d_model, own.key_dim, own.features, config.norm_eps)
