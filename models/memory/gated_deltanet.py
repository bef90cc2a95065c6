"""Gated DeltaNet (arXiv 2412.06464): a matrix memory per head, written by a gated delta rule, read by a query.

    q, k, v = silu(conv4(W x)), q and k on the unit sphere      b = sigmoid(W_b x)    log a = -exp(A_log) softplus(W_a x + dt)
    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T       o_t = S_t^T q_t / sqrt(K)
    y = W_o (RMSNorm(o) * silu(W_g x))

Layer-local and affine in the state, so a sequence splits over ranks with one exchange of (M, S_ext) per token range:
the chunked op runs once on the state [0 | I], which gives the range's own outputs, its read-out of whatever comes in, and
its summary; ``carry.affine`` turns summaries into incoming states. State arithmetic is float32 (float64 in float64).

Legend: B row, T token, C channel, H head, K key, V value, G = B*H, N chunk, c token in chunk, W columns of the carried state.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.batch import Bounds, Range
from models.config import ModelConfig
from models.feedforward import compute_dtype
from models.linear import Linear, linear
from models.memory.by_heads import Rows, rows_of
from models.memory.documents import DocumentPlan, plan_documents
from models.memory.initial import initial_gate
from models.memory.kernels import gated_delta_rule
from models.memory.protocol import MemoryCost, MemoryTraits, State, last_tokens
from models.memory.recurrent import RecurrentMixer, state_dtype
from models.memory.short_conv import conv_silu_chunks, from_chunks, gated_norm, to_chunks

_L2_EPS = 1e-6


class _Weights(NamedTuple):
    """The parameters in the dtype in which their gradients add up over tiles."""

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


class GatedDeltaNet(RecurrentMixer):
    """One Gated DeltaNet mixer. Parameters: six projections in, one out, depthwise convolutions, decay scale and bias per head."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        key_dim: int,
        value_dim: int,
        conv_kernel: int = 4,
        chunk_size: int = 64,
        norm_eps: float = 1e-5,
        memories: int = 1,
    ) -> None:
        """``memories``: each head has so many states, with keys, values and gates of their own (`models.memory.mom`)."""
        super().__init__(d_model, (memories * n_heads, key_dim, value_dim), conv_kernel, chunk_size)
        self.traits = MemoryTraits(
            carry="layer",
            transition="affine_dense",
            read_at="token",
            halo_tokens=conv_kernel - 1,
            head_splittable=n_heads,
            layouts=frozenset({"contiguous", "zigzag"}),
        )
        self.n_heads, self.key_dim, self.value_dim, self.copies = n_heads, key_dim, value_dim, memories
        self.norm_eps = norm_eps
        queries, values, written = n_heads * key_dim, n_heads * value_dim, memories * n_heads
        self.w_q = Linear(d_model, queries)
        self.w_k = Linear(d_model, written * key_dim)
        self.w_v = Linear(d_model, written * value_dim)
        self.w_gate = Linear(d_model, values)
        self.w_beta = Linear(d_model, written)
        self.w_decay = Linear(d_model, written)
        self.w_out = Linear(values, d_model)
        if self.halo:
            self.conv_q = nn.Parameter(torch.empty(queries, conv_kernel))
            self.conv_k = nn.Parameter(torch.empty(written * key_dim, conv_kernel))
            self.conv_v = nn.Parameter(torch.empty(written * value_dim, conv_kernel))
        self.A_log = nn.Parameter(torch.empty(written))
        self.dt_bias = nn.Parameter(torch.empty(written))
        self.norm_weight = nn.Parameter(torch.empty(value_dim))

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """See `models.memory.initial`."""
        return initial_gate(name, shape, generator)

    def exchanged(self, pieces: list[Tensor], halos: list[Tensor], initial_BHKV: Tensor, bounds: Bounds) -> tuple[list[Tensor], Tensor]:
        """See `RecurrentMixer.exchanged`: run every range on [0 | I], exchange summaries once, add what the incoming state contributes."""
        B, H, K, V = initial_BHKV.shape
        weights = self.weights()
        identity = torch.eye(K, dtype=initial_BHKV.dtype, device=initial_BHKV.device).expand(B * H, K, K)
        blank_GKW = torch.cat([identity.new_zeros(B * H, K, V), identity], dim=-1)
        own: list[list[Tensor]] = []
        transitions, updates = [], []
        for i, piece in enumerate(pieces):
            own.append([])
            state_GKW, before = blank_GKW, halos[i]
            for span, x in self.tiles(piece, bounds.ranges[i]):
                o_NGcW, state_GKW = self.run(bounds, span, partial(self._recur, bounds, span), weights, x, before, state_GKW)
                own[i].append(o_NGcW)
                before = last_tokens(before, x, self.halo)
            summary = state_GKW.unflatten(0, (B, H))
            transitions.append(summary[..., V:])
            updates.append(summary[..., :V])
        incoming, final_BHKV = self.carry.affine(transitions, updates, initial_BHKV, bounds)
        outputs = []
        for i, piece in enumerate(pieces):
            state_GKV = incoming[i].flatten(0, 1)
            spans = self.tiles(piece, bounds.ranges[i])
            tiles = [self.run(bounds, span, self._read_out, weights, x, o, state_GKV) for (span, x), o in zip(spans, own[i], strict=True)]
            outputs.append(tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1))
        return outputs, final_BHKV

    def weights(self) -> _Weights:
        """See `RecurrentMixer.weights`."""
        convs = (self.conv_q, self.conv_k, self.conv_v) if self.halo else self._no_convolution()
        linears = (self.w_q, self.w_k, self.w_v, self.w_gate, self.w_beta, self.w_decay, self.w_out)
        small = (p.to(state_dtype(p)) for p in (*convs, self.A_log, self.dt_bias, self.norm_weight))
        return _Weights(*self.wide(linear.weight for linear in linears), *small)

    def _no_convolution(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.A_log.new_ones(linear.out_features, 1) for linear in (self.w_q, self.w_k, self.w_v))  # type: ignore[return-value]

    # --- by heads (`models/memory/by_heads.py`) -----------------------------------------------------------------------------------

    projections = ("w_q", "w_k", "w_v", "w_beta", "w_decay")

    def head_rows(self, heads: Range) -> dict[str, Rows]:
        """See `RecurrentMixer.head_rows`."""
        queries, keys, values, one = (
            rows_of(self.n_heads, heads, width, copies)
            for width, copies in ((self.key_dim, 1), (self.key_dim, self.copies), (self.value_dim, self.copies), (1, self.copies))
        )
        projections = {"w_q": queries, "w_k": keys, "w_v": values, "w_beta": one, "w_decay": one}
        return {**projections, "conv_q": queries, "conv_k": keys, "conv_v": values, "A_log": one, "dt_bias": one}

    def state_rows(self, heads: Range) -> Rows:
        """See `RecurrentMixer.state_rows`."""
        return rows_of(self.n_heads, heads, 1, self.copies)

    def output_rows(self, heads: Range) -> Rows:
        """See `RecurrentMixer.output_rows`."""
        return rows_of(self.n_heads, heads, self.value_dim, self.copies)

    def recur(
        self, bounds: Bounds, span: Range, weights: _Weights, f_BTE: Tensor, before_BnE: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `RecurrentMixer.recur`."""
        o_NGcV, state_GKW = self._recur(bounds, span, weights, f_BTE, before_BnE, state_GKW)
        return from_chunks(o_NGcV, *f_BTE.shape[:2]).flatten(2), state_GKW

    def write(self, weights: _Weights, x_BTC: Tensor, o_BTX: Tensor) -> Tensor:
        """See `RecurrentMixer.write`."""
        o_BTHV = o_BTX.to(state_dtype(x_BTC)).unflatten(-1, (-1, self.value_dim))
        return self._write_out(weights, x_BTC, to_chunks(o_BTHV, self.chunk_size))

    def whole_tile(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor, state_GKV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `RecurrentMixer.whole_tile`."""
        o_NGcV, state_GKV = self._recur(bounds, span, weights, x_BTC, before_BnC, state_GKV)
        return self._write_out(weights, x_BTC, o_NGcV), state_GKV

    def _recur(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Projections, convolutions and the delta rule of one tile: o_NGcW and the state after it."""
        plan, q_NGcK, k_NGcK, v_NGcV, beta_BTH, log_decay_BTH = self._streams(bounds, span, weights, x_BTC, before_BnC)
        q_NGcK, beta_BTH, log_decay_BTH = self._routed(weights, x_BTC, q_NGcK, beta_BTH, log_decay_BTH)
        beta_NGc, log_decay_NGc = (to_chunks(z.unsqueeze(-1), self.chunk_size).squeeze(-1) for z in (beta_BTH, log_decay_BTH))
        rule = partial(gated_delta_rule, plan=plan, rows=len(x_BTC), kernel=self.kernel, dtype=compute_dtype(x_BTC))
        return rule(q_NGcK, k_NGcK, v_NGcV, beta_NGc, log_decay_NGc, state_GKW)

    def _streams(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor
    ) -> tuple[DocumentPlan, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Where documents begin in a tile; its queries, keys and values in chunks; b and log a, [B, T, H]."""
        plan = plan_documents(bounds, span, self.chunk_size, self.halo, x_BTC.device)

        def stream(weight: Tensor, conv: Tensor, scale: float, heads: int) -> Tensor:
            x, before = linear(x_BTC, weight), linear(before_BnC.to(x_BTC.dtype), weight)
            return conv_silu_chunks(x, before, conv, plan, heads, self.chunk_size, scale)

        q_NGcK = stream(weights.w_q, weights.conv_q, self.key_dim**-0.5, self.n_heads)
        k_NGcK = stream(weights.w_k, weights.conv_k, 1.0, self.state_shape[0])
        v_NGcV = stream(weights.w_v, weights.conv_v, 0.0, self.state_shape[0])
        beta_BTH = linear(x_BTC, weights.w_beta).to(q_NGcK.dtype).sigmoid()
        step_BTH = F.softplus(linear(x_BTC, weights.w_decay).to(q_NGcK.dtype) + weights.dt_bias)
        return plan, q_NGcK, k_NGcK, v_NGcV, beta_BTH, -weights.A_log.exp() * step_BTH

    def _routed(self, weights: Any, x_BTC: Tensor, q_NGcK: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and gates [B, T, H] as the rule gets them; here as they are."""
        return q_NGcK, beta, log_decay

    def _read_out(self, weights: _Weights, x_BTC: Tensor, o_NGcW: Tensor, state_GKV: Tensor) -> Tensor:
        """Add Qhat S_in, held in the columns after V, to a range's own outputs."""
        own_NGcV, query_NGcK = o_NGcW.split([self.value_dim, self.key_dim], dim=-1)
        with torch.autocast(x_BTC.device.type, enabled=False):
            o_NGcV = own_NGcV + query_NGcK @ state_GKV
        return self._write_out(weights, x_BTC, o_NGcV)

    def _write_out(self, weights: _Weights, x_BTC: Tensor, o_NGcV: Tensor) -> Tensor:
        gate_BTC = linear(x_BTC, weights.w_gate)
        return linear(gated_norm(o_NGcV, gate_BTC, weights.norm, self.norm_eps), weights.w_out)

    # ------------------------------------------------------------------------------------------------ twin and arithmetic

    def oracle(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """The recurrence token by token, written independently of the chunked form (one range)."""
        B, T, _ = x_BTC.shape
        H, K, V, n = self.n_heads, self.key_dim, self.value_dim, self.halo
        state = state or self.init_state(B, x_BTC.device, x_BTC.dtype)
        inputs = torch.cat([state["conv"], x_BTC], dim=1)
        convs = (self.conv_q, self.conv_k, self.conv_v) if n else self._no_convolution()
        offset, outputs = bounds.ranges[0][0], []
        S = state["state"].clone()
        for t in range(T):
            fresh = [offset + t > 0 and offset + t in row for row in bounds.documents]
            begins = [max([s - offset for s in row if 0 < s <= offset + t], default=-n) for row in bounds.documents]
            S = S.masked_fill(torch.tensor(fresh, device=S.device).view(B, 1, 1, 1), 0)
            window = inputs[:, t : t + n + 1].clone()
            for b in range(B):
                window[b, : max(0, begins[b] - (t - n))] = 0
            q, k, v = (
                F.silu((linear(window) * conv.t()).sum(1)).view(B, H, -1)
                for linear, conv in zip((self.w_q, self.w_k, self.w_v), convs, strict=True)
            )
            q, k = (z * (z.square().sum(-1, keepdim=True) + _L2_EPS).rsqrt() for z in (q, k))
            x = x_BTC[:, t]
            a = torch.exp(-self.A_log.exp() * F.softplus(self.w_decay(x) + self.dt_bias)).view(B, H, 1, 1)
            b = self.w_beta(x).sigmoid().view(B, H, 1, 1)
            S = a * (S - b * k.unsqueeze(-1) * (k.unsqueeze(-2) @ S)) + b * k.unsqueeze(-1) * v.unsqueeze(-2)
            o = (q.unsqueeze(-2) @ S).squeeze(-2) / math.sqrt(K)
            o = o * (o.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt() * self.norm_weight
            outputs.append(self.w_out(o.reshape(B, H * V) * F.silu(self.w_gate(x))))
        return torch.stack(outputs, 1), {"state": S, "conv": inputs[:, inputs.shape[1] - n :]}

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`. With tiles only one tile's inside is alive; recomputation is not in ``flops_backward``."""
        H, K, V, c = self.n_heads, self.key_dim, self.value_dim, self.chunk_size
        d, split = self.w_q.in_features, self.crosses
        W = V + K if split else V
        n = batch_size * tokens
        projections = 2 * d * H * (2 * K + 3 * V + 2)
        # Per token and head: two Gram products, the inverse, T [bV | bK], W S and K^T U of the scan, read U and q S.
        inverse = max(0, c * c - 256) / 3  # two products per halving, down to blocks of 16
        op = 2 * H * (2 * c * K + inverse + c * (K + V) + 2 * K * W + c * W + K * W)
        # Gram products again, dU and dread, two of the scan, four with S, the solve, dlower, three into q and k.
        op_backward = 2 * H * (5 * c * K + 4 * c * W + 6 * K * W)
        read_out = 2 * H * K * V if split else 0
        wide = max(itemsize, 4)
        projected = itemsize * (d + H * (2 * K + 3 * V))
        inside = wide * H * (2 * K + V + c + K + W + K * W / c + V)
        joined = wide * H * (K + V) if split else 0
        if self.tile_tokens and self.tile_tokens < tokens:
            saved = n * (itemsize * d + joined) + batch_size * wide * H * K * W * -(-tokens // self.tile_tokens)
            saved += self.head_bytes(n, itemsize)
        else:
            saved = n * (projected + inside + joined)
        return MemoryCost(
            flops_forward=n * (projections + op + read_out),
            flops_backward=n * (2 * projections + op_backward + 2 * read_out),
            saved_bytes=int(saved),
            state_bytes=batch_size * (H * K * V * wide + self.halo * d * itemsize),
            exchange_bytes=batch_size * (self.carry.summary_bytes(H * K * K * wide, H * K * V * wide) + self.halo * d * itemsize)
            if split
            else self.head_bytes(n, itemsize),
        )


def build(config: ModelConfig) -> GatedDeltaNet:
    """The module that ``config.memory`` describes (see `models.memory.protocol.build_memory`)."""
    module = GatedDeltaNet(
        d_model=config.d_model,
        n_heads=config.memory_heads,
        key_dim=config.memory_key_dim,
        value_dim=config.memory_value_dim,
        conv_kernel=config.memory.conv_kernel,
        chunk_size=config.memory.chunk_size,
        norm_eps=config.norm_eps,
    )
    module.kernel = config.memory.kernel
    return module
