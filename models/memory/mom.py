"""Mixture of Memories (arXiv 2502.13685): several Gated DeltaNet memories per head, of which each token writes and reads a few.

    p = softmax(W_r x)        a token goes to its ``top_k`` largest of p; w = these p over their sum, 0 for the other memories
    every memory m has keys, values and gates of its own, and takes the tokens that go to it as if there were no others
    o_t = sum_m w_m S_m^T q_t, and the shared memory, which takes every token, with weight 1
    y = W_o (RMSNorm(o) * silu(W_g x))        the rest as in `models.memory.gated_deltanet`

A memory that a token does not go to is neither decayed nor written: its gates are a = 1, b = 0. So all memories run as heads of one rule on
all tokens, whose shapes do not depend on the routing, and are affine: one exchange over ranks. The price is the rule's arithmetic on
tokens that a memory does not get. Convolutions are taken over the text, before the routing: over a memory's own tokens, as in
the published code, a token would need its memory's last ones from any distance (and that code mixes neighbours of other rows in).
Left out: the loss that balances the memories' load.

Legend: B row, T token, C channel, H head, R memory (the shared one last), E memories to choose from, K key, V value, G = B*R*H, N chunk,
c token in chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.batch import Bounds
from models.config import ModelConfig
from models.linear import Linear, linear
from models.memory.gated_deltanet import GatedDeltaNet
from models.memory.protocol import MemoryCost, State
from models.memory.recurrent import state_dtype
from models.memory.short_conv import gated_norm, to_chunks

_L2_EPS = 1e-6


class _Weights(NamedTuple):
    """Those of Gated DeltaNet, and the router."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_gate: Tensor
    w_beta: Tensor
    w_decay: Tensor
    w_out: Tensor
    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    w_router: Tensor


class MixtureOfMemories(GatedDeltaNet):
    """One mixer. Parameters: Gated DeltaNet's, keys, values and gates once per memory, and the router."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        key_dim: int,
        value_dim: int,
        n_memories: int,
        top_k: int,
        shared: bool,
        conv_kernel: int = 4,
        chunk_size: int = 64,
        norm_eps: float = 1e-5,
    ) -> None:
        memories = n_memories + shared
        super().__init__(d_model, n_heads, key_dim, value_dim, conv_kernel, chunk_size, norm_eps, memories)
        self.n_memories, self.top_k, self.shared, self.memories = n_memories, top_k, shared, memories
        self.w_router = Linear(d_model, n_memories)

    def weights(self) -> _Weights:  # type: ignore[override]
        """See `RecurrentMixer.weights`."""
        return _Weights(*super().weights(), *self.wide([self.w_router.weight]))

    def _route(self, x_BTC: Tensor, w_router: Tensor) -> Tensor:
        """[B, T, R]: weights of the memories that each token goes to, 0 for the others."""
        p_BTE = linear(x_BTC, w_router).to(state_dtype(x_BTC)).softmax(-1)
        chosen_BTk = p_BTE.topk(self.top_k, dim=-1).indices
        kept = torch.zeros_like(p_BTE, dtype=torch.bool).scatter(-1, chosen_BTk, True)
        w_BTE = p_BTE.masked_fill(~kept, 0)
        w_BTE = w_BTE / w_BTE.sum(-1, keepdim=True)
        return torch.cat([w_BTE, torch.ones_like(w_BTE[..., :1])], -1) if self.shared else w_BTE

    def _routed(self, weights: _Weights, x_BTC: Tensor, q_NGcK: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A query for every memory; gates that leave alone the memories which a token does not go to."""
        with torch.no_grad():
            other = (self._route(x_BTC, weights.w_router) == 0).repeat_interleave(self.n_heads, -1)
        q_NBRHcK = q_NGcK.unflatten(1, (len(x_BTC), 1, self.n_heads)).expand(-1, -1, self.memories, -1, -1, -1)
        return q_NBRHcK.flatten(1, 3), beta.masked_fill(other, 0), log_decay.masked_fill(other, 0)

    def _write_out(self, weights: _Weights, x_BTC: Tensor, o_NGcV: Tensor) -> Tensor:  # type: ignore[override]
        w_BTR = self._route(x_BTC, weights.w_router)
        with torch.autocast(x_BTC.device.type, enabled=False):
            w_NBRc1 = to_chunks(w_BTR.unsqueeze(-1), self.chunk_size).unflatten(1, (-1, self.memories))
            o_NBRHcV = o_NGcV.unflatten(1, (len(x_BTC), self.memories, -1))
            o_NGcV = (o_NBRHcV * w_NBRc1.unsqueeze(3)).sum(2).flatten(1, 2)
        return linear(gated_norm(o_NGcV, linear(x_BTC, weights.w_gate), weights.norm, self.norm_eps), weights.w_out)

    # --- twin and arithmetic ------------------------------------------------------------------------------------------------------

    def oracle(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """Token by token, memory by memory."""
        B, T, _ = x_BTC.shape
        n, state = self.halo, state or self.init_state(B, x_BTC.device, x_BTC.dtype)
        inputs = torch.cat([state["conv"], x_BTC], dim=1)
        outputs, after = [], []
        for b in range(B):
            S = list(state["state"][b].unflatten(0, (self.memories, self.n_heads)).unbind(0))
            begin, y = -n, []
            for t in range(T):
                if t > 0 and t in bounds.documents[b]:
                    S, begin = [torch.zeros_like(one) for one in S], t
                window = inputs[b, t : t + n + 1].clone()
                window[: max(0, begin - (t - n))] = 0
                y.append(self._oracle_token(window, x_BTC[b, t], S))
            outputs.append(torch.stack(y))
            after.append(torch.cat(S))
        return torch.stack(outputs), {"state": torch.stack(after), "conv": inputs[:, inputs.shape[1] - n :]}

    def _oracle_token(self, window_nC: Tensor, x_C: Tensor, S: list[Tensor]) -> Tensor:
        """The output of one token; moves on the memories ``S`` [H, K, V] that it goes to."""
        convs = (self.conv_q, self.conv_k, self.conv_v) if self.halo else self._no_convolution()
        projections = zip((self.w_q, self.w_k, self.w_v), convs, strict=True)
        q, k, v = (F.silu((w(window_nC) * conv.t()).sum(0)) for w, conv in projections)
        q, k, v = q.view(self.n_heads, -1), k.view(self.memories, self.n_heads, -1), v.view(self.memories, self.n_heads, -1)
        q, k = (z * (z.square().sum(-1, keepdim=True) + _L2_EPS).rsqrt() for z in (q, k))
        a = torch.exp(-self.A_log.exp() * F.softplus(self.w_decay(x_C) + self.dt_bias)).view(self.memories, self.n_heads, 1, 1)
        beta = self.w_beta(x_C).sigmoid().view(self.memories, self.n_heads, 1, 1)
        p = self.w_router(x_C).softmax(-1)
        best = p.argsort(descending=True)[: self.top_k]
        goes = {int(m): p[m] / p[best].sum() for m in best} | ({self.n_memories: torch.ones_like(p[0])} if self.shared else {})
        o = torch.zeros_like(v[0])
        for m, weight in goes.items():
            erased = S[m] - beta[m] * k[m].unsqueeze(-1) * torch.einsum("hk,hkv->hv", k[m], S[m]).unsqueeze(-2)
            S[m] = a[m] * erased + beta[m] * k[m].unsqueeze(-1) * v[m].unsqueeze(-2)
            o = o + weight * torch.einsum("hk,hkv->hv", q, S[m]) / math.sqrt(self.key_dim)
        o = o * (o.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt() * self.norm_weight
        return self.w_out(o.flatten() * F.silu(self.w_gate(x_C)))

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`: `GatedDeltaNet.cost` with a head for every memory of every head."""
        H, K, V, c, R = self.n_heads, self.key_dim, self.value_dim, self.chunk_size, self.memories
        A, d, split, n, wide = R * H, self.d_model, not self.carry.local, batch_size * tokens, max(itemsize, 4)
        W = V + K if split else V
        projections = 2 * d * (H * (K + 2 * V) + A * (K + V + 2))
        routing = 2 * d * self.n_memories  # once to know where to, once for the weights, which have a gradient
        inverse = max(0, c * c - 256) / 3
        op = 2 * A * (2 * c * K + inverse + c * (K + V) + 2 * K * W + c * W + K * W)
        op_backward = 2 * A * (5 * c * K + 4 * c * W + 6 * K * W)
        read_out = 2 * A * K * V if split else 0
        # Projections before their convolutions, the gate; queries once; the rule's; every memory's output, its weight, their sum.
        projected = itemsize * (d + H * (K + 2 * V) + A * (K + V))
        inside = wide * (H * (K + V) + A * (2 * K + V + c + K + W + K * W / c + V))
        joined = wide * A * (K + V) if split else 0
        if self.tile_tokens and self.tile_tokens < tokens:
            saved = n * (itemsize * d + joined) + batch_size * wide * A * K * W * -(-tokens // self.tile_tokens)
        else:
            saved = n * (projected + inside + joined)
        return MemoryCost(
            flops_forward=n * (projections + 2 * routing + op + read_out),
            flops_backward=n * (2 * projections + 2 * routing + op_backward + 2 * read_out),
            saved_bytes=int(saved),
            state_bytes=batch_size * (A * K * V * wide + self.halo * d * itemsize),
            exchange_bytes=batch_size * (A * K * (K + V) * wide + self.halo * d * itemsize) if split else 0,
        )


def build(config: ModelConfig) -> MixtureOfMemories:
    """The module that ``config.memory`` describes (see `models.memory.protocol.build_memory`)."""
    own, memory = config.memory.mom, config.memory
    sizes = (config.memory_heads, config.memory_key_dim, config.memory_value_dim)
    mixture = (own.n_memories, own.top_k, own.shared)
    module = MixtureOfMemories(config.d_model, *sizes, *mixture, memory.conv_kernel, memory.chunk_size, config.norm_eps)
    module.kernel = memory.kernel
    return module
