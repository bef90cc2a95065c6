"""Mixture of Memories (arXiv 2502.13685): several Gated DeltaNet memories per head, of which each token writes and reads a few.

    p = softmax(W_r x)        a token goes to its ``top_k`` largest of p; w = these p over their sum, 0 for the other memories
    every memory m has keys, values and gates of its own, and takes the tokens that go to it as if there were no others
    o_t = sum_m w_m S_m^T q_t, and the shared memory, which takes every token, with weight 1
    y = W_o (RMSNorm(o) * silu(W_g x))        the rest as in `models.memory.gated_deltanet`

A memory that a token does not go to is neither decayed nor written: its gates are a = 1, b = 0. Each memory works on its own tokens, sorted
into lanes (`models.memory.lanes`) whose shapes do not depend on the routing; or, the same to rounding, all memories run as heads of one
rule on all tokens. States are affine either way: one exchange over ranks, for which each memory's outputs are put back in the order of
tokens. Projections and convolutions are those of all memories for all tokens: a convolution reads a token's neighbours, so that with two
chosen of eight by chance a memory needs two tokens in three, of four nearly all. Convolutions are taken over the text, before the routing:
over a memory's own tokens, as in the published code, a token would need its memory's last ones from any distance (and that code mixes
neighbours of other rows in).
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

from models.batch import Bounds, Range
from models.config import ModelConfig
from models.linear import Linear, linear
from models.memory.by_heads import Rows
from models.memory.delta_rule import gated_delta_rule
from models.memory.gated_deltanet import GatedDeltaNet
from models.memory.lanes import Lanes, chunks_needed, combined, picked, plan_lanes, returned, spread
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
        routed: bool = True,
    ) -> None:
        """``routed``: memories work on their own tokens; false: on all."""
        memories = n_memories + shared
        super().__init__(d_model, n_heads, key_dim, value_dim, conv_kernel, chunk_size, norm_eps, memories)
        self.n_memories, self.top_k, self.shared, self.memories = n_memories, top_k, shared, memories
        self.w_router = Linear(d_model, n_memories)
        self.routed = routed

    def weights(self) -> _Weights:  # type: ignore[override]
        """See `RecurrentMixer.weights`."""
        return _Weights(*super().weights(), *self.wide([self.w_router.weight]))

    projections = (*GatedDeltaNet.projections, "w_router")

    def head_rows(self, heads: Range) -> dict[str, Rows]:
        """See `RecurrentMixer.head_rows`: all heads of a token go to the same memories."""
        return {**super().head_rows(heads), "w_router": ((0, self.n_memories),)}

    def _route(self, x_BTC: Tensor, w_router: Tensor) -> Tensor:
        """[B, T, R]: weights of the memories that each token goes to, 0 for the others."""
        p_BTE = linear(x_BTC, w_router).to(state_dtype(x_BTC)).softmax(-1)
        chosen_BTk = p_BTE.topk(self.top_k, dim=-1).indices
        kept = torch.zeros_like(p_BTE, dtype=torch.bool).scatter(-1, chosen_BTk, True)
        w_BTE = p_BTE.masked_fill(~kept, 0)
        w_BTE = w_BTE / w_BTE.sum(-1, keepdim=True)
        return torch.cat([w_BTE, torch.ones_like(w_BTE[..., :1])], -1) if self.shared else w_BTE

    def _chosen(self, x_BTC: Tensor, w_router: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, k]: the memories that each token goes to, the shared one last, and their weights."""
        p_BTE = linear(x_BTC, w_router).to(state_dtype(x_BTC)).softmax(-1)
        p_BTk, chosen_BTk = p_BTE.topk(self.top_k, dim=-1)
        w_BTk = p_BTk / p_BTk.sum(-1, keepdim=True)
        if not self.shared:
            return chosen_BTk, w_BTk
        last_BT1 = torch.full_like(chosen_BTk[..., :1], self.n_memories)
        return torch.cat([chosen_BTk, last_BT1], -1), torch.cat([w_BTk, torch.ones_like(w_BTk[..., :1])], -1)

    def in_lanes(self, bounds: Bounds, span: Range) -> bool:
        """Whether a tile is computed by lanes: not where many short documents would need more chunks than all memories on all tokens."""
        needed = chunks_needed(bounds, span, self.top_k + self.shared, self.memories, self.chunk_size)
        return self.routed and needed < self.memories * -(-(span[1] - span[0]) // self.chunk_size)

    def whole_tile(  # type: ignore[override]
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor, state_GKV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `RecurrentMixer.whole_tile`."""
        if not self.in_lanes(bounds, span):
            return super().whole_tile(bounds, span, weights, x_BTC, before_BnC, state_GKV)  # type: ignore[arg-type]
        o_nGcV, state_GKV, lanes, w_BTk = self._recur_in_lanes(bounds, span, weights, x_BTC, before_BnC, state_GKV)
        with torch.autocast(x_BTC.device.type, enabled=False):
            w_kNBc = to_chunks(w_BTk.unsqueeze(-1), self.chunk_size).unflatten(1, (len(x_BTC), -1)).squeeze(-1).movedim(2, 0)
            o_NGcV = combined(o_nGcV, w_kNBc, lanes)
        return self._gated_out(weights, x_BTC, o_NGcV), state_GKV

    def _recur(  # type: ignore[override]
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of all memories: where ranks exchange states, each output reads what comes in of its own."""
        if not self.in_lanes(bounds, span):
            return super()._recur(bounds, span, weights, x_BTC, before_BnC, state_GKW)  # type: ignore[arg-type]
        o_nGcW, state_GKW, lanes, _ = self._recur_in_lanes(bounds, span, weights, x_BTC, before_BnC, state_GKW)
        return returned(o_nGcW, lanes), state_GKW

    def _recur_in_lanes(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, Tensor, Lanes, Tensor]:
        """Outputs in lanes, the states of all memories after the tile, the lanes, and the weights w_BTk of what each token gets."""
        chosen_BTk, w_BTk = self._chosen(x_BTC, weights.w_router)
        lanes = plan_lanes(chosen_BTk, bounds, span, self.n_heads, self.memories, self.chunk_size)
        _, q_NGcK, k_NAcK, v_NAcV, beta_BTA, log_decay_BTA = self._streams(bounds, span, weights, x_BTC, before_BnC)  # type: ignore[arg-type]
        with torch.autocast(x_BTC.device.type, enabled=False):
            gates_BTA2 = torch.stack([beta_BTA, log_decay_BTA], -1)
            gates_nGc2 = picked(to_chunks(gates_BTA2, self.chunk_size), lanes).masked_fill(lanes.empty_nGc.unsqueeze(-1), 0)
            streams = spread(q_NGcK, lanes), picked(k_NAcK, lanes), picked(v_NAcV, lanes)
            beta_nGc, log_decay_nGc = (gate.contiguous() for gate in gates_nGc2.unbind(-1))
        o_nGcW, state_GKW = gated_delta_rule(*streams, beta_nGc, log_decay_nGc, state_GKW, None, lanes.switches)
        return o_nGcW, state_GKW, lanes, w_BTk

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
        return self._gated_out(weights, x_BTC, o_NGcV)

    def _gated_out(self, weights: _Weights, x_BTC: Tensor, o_NGcV: Tensor) -> Tensor:
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
        """See `MemoryModule.cost`: `GatedDeltaNet.cost` with a head for every memory of every head, or for every memory that a token goes
        to; of sequences that are one document."""
        H, K, V, c, R = self.n_heads, self.key_dim, self.value_dim, self.chunk_size, self.memories
        A, d, split, n, wide = R * H, self.d_model, self.crosses, batch_size * tokens, max(itemsize, 4)
        W = V + K if split else V
        size = min(self.tile_tokens or tokens, tokens)
        spans = [(a, min(a + size, tokens)) for a in range(0, tokens, size)]
        bounds, k = Bounds.whole(1, tokens), self.top_k + self.shared
        lanes = [self.in_lanes(bounds, span) for span in spans]
        in_lanes = sum(b - a for (a, b), held in zip(spans, lanes, strict=True) if held)
        slots = c * sum(chunks_needed(bounds, span, k, R, c) for span, held in zip(spans, lanes, strict=True) if held)
        worked = batch_size * (slots * H + (tokens - in_lanes) * A)  # tokens times the heads that the rule works on for them
        projections = 2 * d * (H * (K + 2 * V) + A * (K + V + 2))
        routing = 2 * d * self.n_memories  # dense or split, once to know where to, once for the weights, which alone have a gradient
        inverse = max(0, c * c - 256) / 3
        op = 2 * (2 * c * K + inverse + c * (K + V) + 2 * K * W + c * W + K * W)
        op_backward = 2 * (5 * c * K + 4 * c * W + 6 * K * W)
        read_out = 2 * A * K * V if split else 0
        # Projections before their convolutions, the gate; queries and keys after theirs; of the rule inputs, inverse and states.
        projected = itemsize * (d + H * (K + 2 * V) + A * (K + V))
        of_rule = 3 * K + V + c + W + K * W / c
        joined = A * (K + V) if split else 0
        if len(spans) > 1:
            saved = n * (itemsize * d + wide * joined) + batch_size * wide * A * K * W * len(spans) + self.head_bytes(n, itemsize)
        elif in_lanes:
            outputs = n * A * V if split or self.carry.heads is not None else batch_size * slots * H * V
            places = 8 * batch_size * (tokens * k + slots)
            saved = n * (projected + wide * (H * (K + V) + A * K + joined)) + wide * (worked * of_rule + outputs) + places
        else:
            saved = n * (projected + wide * (H * (K + V) + A * (of_rule + V) + joined))
        return MemoryCost(
            flops_forward=n * (projections + read_out) + (2 * n - (0 if split else batch_size * in_lanes)) * routing + worked * op,
            flops_backward=n * (2 * projections + 2 * routing + 2 * read_out) + worked * op_backward,
            saved_bytes=int(saved),
            state_bytes=batch_size * (A * K * V * wide + self.halo * d * itemsize),
            exchange_bytes=batch_size * (self.carry.summary_bytes(A * K * K * wide, A * K * V * wide) + self.halo * d * itemsize)
            if split
            else self.head_bytes(n, itemsize),
        )


def build(config: ModelConfig) -> MixtureOfMemories:
    """The module that ``config.memory`` describes (see `models.memory.protocol.build_memory`)."""
    own, memory = config.memory.mom, config.memory
    sizes = (config.memory_heads, config.memory_key_dim, config.memory_value_dim)
    mixture = (own.n_memories, own.top_k, own.shared)
    module = MixtureOfMemories(
        config.d_model, *sizes, *mixture, memory.conv_kernel, memory.chunk_size, config.norm_eps, own.compute == "routed"
    )
    module.kernel = "eager" if module.routed else memory.kernel  # fla has no lanes
    return module
