"""Mamba-2 (arXiv 2405.21060, SSD): linear attention with one data-dependent decay per head, keys and queries shared by groups of heads.

    x, B, C = silu(conv4(W u))      dt = softplus(W_dt u + dt_bias)      log a = -exp(A_log) dt
    S_t = a_t S_{t-1} + dt_t B_t x_t^T       o_t = S_t^T C_t + D x_t
    y = W_o RMSNorm(o * silu(W_z u)), one norm per group of heads

Left unspecified by the paper and chosen here as in its reference code: A ~ U(1, 16), dt log-uniform in [1e-3, 0.1], the norm after the
gate and over each group's width, D one number per head. The convolutions have no bias.

Layer-local and affine with one number per head as transition: see `models.memory.recurrent.DiagonalMixer`.

Legend: B row, T token, C channel, H head, K state dimension (keys), V head size (values), G = B*H, Q = B*groups, N chunk, c token in chunk.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.batch import Bounds, Range
from models.config import ModelConfig
from models.feedforward import compute_dtype
from models.linear import Linear, linear
from models.memory.active_norm import active_norm
from models.memory.by_heads import Rows, rows_of
from models.memory.documents import plan_documents
from models.memory.initial import initial_gate
from models.memory.kernels import decayed_sum
from models.memory.protocol import MemoryCost, MemoryTraits, State
from models.memory.recurrent import DiagonalMixer, Streams, state_dtype, whole_decay
from models.memory.short_conv import conv_silu_chunks, from_chunks, to_chunks


class _Weights(NamedTuple):
    """The parameters in the dtype in which their gradients add up over tiles."""

    w_x: Tensor
    w_B: Tensor
    w_C: Tensor
    w_gate: Tensor
    w_dt: Tensor
    w_out: Tensor
    conv_x: Tensor
    conv_B: Tensor
    conv_C: Tensor
    A_log: Tensor
    dt_bias: Tensor
    D: Tensor
    norm: Tensor


class Mamba2(DiagonalMixer):
    """One Mamba-2 mixer. Parameters: five projections in, one out, depthwise convolutions, decay scale, bias and skip per head, a norm."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_size: int,
        state_dim: int,
        n_groups: int = 1,
        conv_kernel: int = 4,
        chunk_size: int = 64,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model, (n_heads, state_dim, head_size), conv_kernel, chunk_size)
        self.traits = MemoryTraits(
            carry="layer",
            transition="affine_diag",
            read_at="token",
            halo_tokens=conv_kernel - 1,
            head_splittable=n_heads,
            layouts=frozenset({"contiguous", "zigzag"}),
        )
        self.n_heads, self.head_size, self.state_dim, self.n_groups, self.norm_eps = n_heads, head_size, state_dim, n_groups, norm_eps
        inner, shared = n_heads * head_size, n_groups * state_dim
        self.w_x = Linear(d_model, inner)
        self.w_B = Linear(d_model, shared)
        self.w_C = Linear(d_model, shared)
        self.w_gate = Linear(d_model, inner)
        self.w_dt = Linear(d_model, n_heads)
        self.w_out = Linear(inner, d_model)
        if self.halo:
            self.conv_x = nn.Parameter(torch.empty(inner, conv_kernel))
            self.conv_B = nn.Parameter(torch.empty(shared, conv_kernel))
            self.conv_C = nn.Parameter(torch.empty(shared, conv_kernel))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.empty(n_heads))
        self.norm_weight = nn.Parameter(torch.empty(inner))

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """See `models.memory.initial`; D and the norm start at 1."""
        return torch.ones(shape) if name in ("D", "norm_weight") else initial_gate(name, shape, generator)

    def weights(self) -> _Weights:
        """See `RecurrentMixer.weights`."""
        linears = (self.w_x, self.w_B, self.w_C, self.w_gate, self.w_dt, self.w_out)
        small = (p.to(state_dtype(p)) for p in (*self._convolutions(), self.A_log, self.dt_bias, self.D, self.norm_weight))
        return _Weights(*self.wide(linear.weight for linear in linears), *small)

    def _convolutions(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.halo:
            return self.conv_x, self.conv_B, self.conv_C
        return tuple(self.A_log.new_ones(linear.out_features, 1) for linear in (self.w_x, self.w_B, self.w_C))  # type: ignore[return-value]

    # --- a tile -------------------------------------------------------------------------------------------------------------------

    def streams(self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor) -> Streams:
        """See `DiagonalMixer.streams`: C, B, x, dt and log decays in chunks."""
        plan = plan_documents(bounds, span, self.chunk_size, self.halo, x_BTC.device)

        def stream(weight: Tensor, conv: Tensor, heads: int) -> Tensor:
            x, before = linear(x_BTC, weight), linear(before_BnC.to(x_BTC.dtype), weight)
            return conv_silu_chunks(x, before, conv, plan, heads, self.chunk_size)

        v_NGcV = stream(weights.w_x, weights.conv_x, self.n_heads)
        k_NQcK = stream(weights.w_B, weights.conv_B, self.n_groups)
        q_NQcK = stream(weights.w_C, weights.conv_C, self.n_groups)
        dt_BTH = F.softplus(linear(x_BTC, weights.w_dt).to(v_NGcV.dtype) + weights.dt_bias)
        dt_NGc = to_chunks(dt_BTH.unsqueeze(-1), self.chunk_size).squeeze(-1)
        rate_G = weights.A_log.exp().neg().repeat(len(x_BTC))
        return q_NQcK, k_NQcK, v_NGcV, dt_NGc, dt_NGc * rate_G.unsqueeze(-1)

    def summary(self, bounds: Bounds, span: Range, streams: Streams, state_GKW: Tensor) -> tuple[Tensor, Tensor]:
        """See `DiagonalMixer.summary`."""
        _, k_NQcK, v_NGcV, dt_NGc, log_decay_NGc = streams
        plan = plan_documents(bounds, span, self.chunk_size, self.halo, state_GKW.device)
        rule = partial(decayed_sum, plan=plan, rows=len(bounds.documents), kernel=self.kernel, dtype=compute_dtype(state_GKW))
        _, after = rule(None, k_NQcK, v_NGcV, dt_NGc, log_decay_NGc, state_GKW)
        return whole_decay(log_decay_NGc.unsqueeze(-1), plan.segment_NBC).unsqueeze(-1), after

    def mix(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, state_GKW: Tensor, streams: Streams
    ) -> tuple[Tensor, Tensor]:
        """See `DiagonalMixer.mix`."""
        o_BTX, after = self._read(bounds, span, weights, x_BTC, state_GKW, streams)
        return self.write(weights, x_BTC, o_BTX), after

    def _read(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, state_GKW: Tensor, streams: Streams
    ) -> tuple[Tensor, Tensor]:
        """What the heads of a tile came to, [B, T, H V], and the state after it."""
        B, T, _ = x_BTC.shape
        plan = plan_documents(bounds, span, self.chunk_size, self.halo, x_BTC.device)
        rule = partial(decayed_sum, plan=plan, rows=B, kernel=self.kernel, dtype=compute_dtype(x_BTC))
        q_NQcK, k_NQcK, v_NGcV, dt_NGc, log_decay_NGc = streams
        o_NGcV, after = rule(q_NQcK, k_NQcK, v_NGcV, dt_NGc, log_decay_NGc, state_GKW)
        assert o_NGcV is not None
        o_NGcV = torch.addcmul(o_NGcV, v_NGcV, weights.D.repeat(B).view(-1, 1, 1))
        return from_chunks(o_NGcV, B, T).flatten(2), after

    # --- by heads (`models/memory/by_heads.py`) -----------------------------------------------------------------------------------

    projections = ("w_x", "w_B", "w_C", "w_dt")

    def head_rows(self, heads: Range) -> dict[str, Rows]:
        """See `RecurrentMixer.head_rows`. Every rank gets B and C of the groups that its heads are in."""
        values, one = rows_of(self.n_heads, heads, self.head_size), rows_of(self.n_heads, heads, 1)
        shared = tuple((group * self.state_dim, (group + 1) * self.state_dim) for group in self._groups_of(heads))
        projections = {"w_x": values, "w_B": shared, "w_C": shared, "w_dt": one}
        return {**projections, "conv_x": values, "conv_B": shared, "conv_C": shared, "A_log": one, "dt_bias": one, "D": one}

    def _groups_of(self, heads: Range) -> list[int]:
        """Of each of ``heads`` its group; one for all where they share it, and as few as there are where each has all its heads here."""
        per_group = self.n_heads // self.n_groups
        groups = [head // per_group for head in range(*heads)]
        whole = heads[0] % per_group == heads[1] % per_group == 0
        return sorted(set(groups)) if whole or len(set(groups)) == 1 else groups

    def output_rows(self, heads: Range) -> Rows:
        """See `RecurrentMixer.output_rows`."""
        return rows_of(self.n_heads, heads, self.head_size)

    def narrowed(self, heads: Range) -> Self:
        """See `RecurrentMixer.narrowed`."""
        narrow = super().narrowed(heads)
        narrow.n_groups = len(self._groups_of(heads))
        return narrow

    def recur(
        self, bounds: Bounds, span: Range, weights: _Weights, f_BTE: Tensor, before_BnE: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `RecurrentMixer.recur`."""
        return self._read(bounds, span, weights, f_BTE, state_GKW, self.streams(bounds, span, weights, f_BTE, before_BnE))

    def write(self, weights: _Weights, x_BTC: Tensor, o_BTX: Tensor) -> Tensor:
        """See `RecurrentMixer.write`."""
        by_groups = (self.n_groups, -1)
        o_BTgC = o_BTX.to(state_dtype(x_BTC)).unflatten(-1, by_groups)
        gate_BTgC = linear(x_BTC, weights.w_gate).unflatten(-1, by_groups)
        normed = active_norm(o_BTgC, gate_BTgC, weights.norm.unflatten(0, by_groups), self.norm_eps).flatten(2)
        return linear(normed.to(x_BTC.dtype), weights.w_out)

    # --- twin and arithmetic ------------------------------------------------------------------------------------------------------

    def oracle(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """The recurrence token by token, written independently of the chunked form (one range)."""
        B, T, _ = x_BTC.shape
        H, V, n = self.n_heads, self.head_size, self.halo
        state = state or self.init_state(B, x_BTC.device, x_BTC.dtype)
        inputs = torch.cat([state["conv"], x_BTC], dim=1)
        offset, outputs = bounds.ranges[0][0], []
        S = state["state"].clone()
        for t in range(T):
            fresh = [offset + t > 0 and offset + t in row for row in bounds.documents]
            begins = [max([s - offset for s in row if 0 < s <= offset + t], default=-n) for row in bounds.documents]
            S = S.masked_fill(torch.tensor(fresh, device=S.device).view(B, 1, 1, 1), 0)
            window = inputs[:, t : t + n + 1].clone()
            for b in range(B):
                window[b, : max(0, begins[b] - (t - n))] = 0
            projections = (self.w_x, self.w_B, self.w_C)
            x, k, q = (F.silu((linear(window) * conv.t()).sum(1)) for linear, conv in zip(projections, self._convolutions(), strict=True))
            x = x.view(B, H, V)
            k, q = (z.view(B, self.n_groups, -1).repeat_interleave(H // self.n_groups, 1) for z in (k, q))
            dt = F.softplus(self.w_dt(x_BTC[:, t]) + self.dt_bias)
            a = torch.exp(-self.A_log.exp() * dt)
            S = a[..., None, None] * S + dt[..., None, None] * k.unsqueeze(-1) * x.unsqueeze(-2)
            o = torch.einsum("bhkv,bhk->bhv", S, q) + self.D.unsqueeze(-1) * x
            gated = (o.flatten(1) * F.silu(self.w_gate(x_BTC[:, t]))).view(B, self.n_groups, -1)
            gated = gated * (gated.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()
            outputs.append(self.w_out(gated.flatten(1) * self.norm_weight))
        return torch.stack(outputs, 1), {"state": S, "conv": inputs[:, inputs.shape[1] - n :]}

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`. With tiles only one tile's inside is alive; recomputation is not in ``flops_backward``."""
        H, K, V, c, d, g = self.n_heads, self.state_dim, self.head_size, self.chunk_size, self.d_model, self.n_groups
        split, n, wide = self.crosses, batch_size * tokens, max(itemsize, 4)
        projections = 2 * d * (3 * H * V + 2 * g * K + H)
        # Scores per group; per head the scores' sum of values, K^T U and q S.
        op = 2 * (g * c * K + H * (c * V + 2 * K * V))
        # Scores again, dK and dQ through them; per head two with scores, q^T dO, K dS, U dS^T and dO S^T.
        op_backward = 2 * (3 * g * c * K + H * (2 * c * V + 4 * K * V))
        summary, summary_backward = (2 * H * K * V, 4 * H * K * V) if split else (0, 0)
        streams = wide * (2 * g * K + H * (V + 2))
        # Projections before their convolutions and the gate; softplus's input; the read-out and what the norm keeps; states and sums.
        inside = itemsize * (d + 2 * g * K + 2 * H * V) + streams + wide * H * (2 + V)
        states = wide * H * (K * V / c + 1)
        if self.tile_tokens and self.tile_tokens < tokens:
            tiles = -(-tokens // self.tile_tokens) * (2 if split else 1)
            saved = n * (itemsize * d + (streams if split else 0)) + batch_size * tiles * wide * H * K * V
            saved += self.head_bytes(n, itemsize)
        else:
            saved = n * (inside + itemsize * H * V + states * (2 if split else 1))
        summaries = self.carry.summary_bytes(H * wide, H * K * V * wide)
        return MemoryCost(
            flops_forward=n * (projections + op + summary),
            flops_backward=n * (2 * projections + op_backward + summary_backward),
            saved_bytes=int(saved),
            state_bytes=batch_size * (H * K * V * wide + self.halo * d * itemsize),
            exchange_bytes=batch_size * (summaries + self.halo * d * itemsize) if split else self.head_bytes(n, itemsize),
        )


def build(config: ModelConfig) -> Mamba2:
    """The module that ``config.memory`` describes (see `models.memory.protocol.build_memory`)."""
    own = config.memory.mamba2
    module = Mamba2(
        d_model=config.d_model,
        n_heads=config.memory_heads,
        head_size=config.memory_value_dim,
        state_dim=own.state_dim,
        n_groups=own.n_groups,
        conv_kernel=config.memory.conv_kernel,
        chunk_size=config.memory.chunk_size,
        norm_eps=config.norm_eps,
    )
    module.kernel = config.memory.kernel
    return module
