"""Gated Slot Attention (arXiv 2409.07146): a few slots of keys and values per head, all written and forgotten by gates, read by softmax.

    q, k, v = silu(conv4(W x))        log a = logsigmoid(W_a x) / tau per slot, a >= e^-4
    K_t = diag(a_t) K_{t-1} + (1 - a_t) k_t^T       V_t likewise       o_t = V_t^T softmax(K_t q_t / sqrt(K))
    y = W_o RMSNorm(silu(o))

Left unspecified by the paper: the convolution (its code has one that is off; ``conv_kernel: 1`` switches it off), the scale of the
scores (1 / sqrt(K), as its kernels), a lower bound for a gate (here e^-4 per token, which tau = 8 reaches at W_a x = -32 only).

Layer-local and affine: what is written does not depend on what is read, so both halves of the state need one exchange; one decay per
slot: see `models.memory.recurrent.DiagonalMixer`.

Legend: B row, T token, C channel, H head, K key, V value, W = K + V, M slot, G = B*H, N chunk, c token in chunk.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

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
from models.memory.gated_slots import MIN_LOG_DECAY
from models.memory.initial import initial_gate
from models.memory.kernels import gated_slots
from models.memory.protocol import MemoryCost, MemoryTraits, State
from models.memory.recurrent import DiagonalMixer, Streams, state_dtype, whole_decay
from models.memory.short_conv import conv_silu_chunks, from_chunks, to_chunks


class _Weights(NamedTuple):
    """The parameters in the dtype in which their gradients add up over tiles."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_decay: Tensor
    w_out: Tensor
    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor
    norm: Tensor


class GatedSlotAttention(DiagonalMixer):
    """One mixer. Parameters: four projections in, one out, depthwise convolutions, a norm."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        key_dim: int,
        value_dim: int,
        n_slots: int,
        gate_temperature: float = 8.0,
        conv_kernel: int = 4,
        chunk_size: int = 16,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model, (n_heads, n_slots, key_dim + value_dim), conv_kernel, chunk_size)
        self.traits = MemoryTraits(
            carry="layer",
            transition="affine_diag",
            read_at="token",
            halo_tokens=conv_kernel - 1,
            head_splittable=n_heads,
            layouts=frozenset({"contiguous", "zigzag"}),
        )
        self.n_heads, self.key_dim, self.value_dim, self.n_slots = n_heads, key_dim, value_dim, n_slots
        self.gate_temperature, self.norm_eps = gate_temperature, norm_eps
        keys, values = n_heads * key_dim, n_heads * value_dim
        self.w_q = Linear(d_model, keys)
        self.w_k = Linear(d_model, keys)
        self.w_v = Linear(d_model, values)
        self.w_decay = Linear(d_model, n_heads * n_slots)
        self.w_out = Linear(values, d_model)
        if self.halo:
            self.conv_q = nn.Parameter(torch.empty(keys, conv_kernel))
            self.conv_k = nn.Parameter(torch.empty(keys, conv_kernel))
            self.conv_v = nn.Parameter(torch.empty(values, conv_kernel))
        self.norm_weight = nn.Parameter(torch.empty(values))

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """See `models.memory.initial`."""
        return initial_gate(name, shape, generator)

    def weights(self) -> _Weights:
        """See `RecurrentMixer.weights`."""
        linears = (self.w_q, self.w_k, self.w_v, self.w_decay, self.w_out)
        small = (p.to(state_dtype(p)) for p in (*self._convolutions(), self.norm_weight))
        return _Weights(*self.wide(linear.weight for linear in linears), *small)

    def _convolutions(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.halo:
            return self.conv_q, self.conv_k, self.conv_v
        return tuple(self.norm_weight.new_ones(linear.out_features, 1) for linear in (self.w_q, self.w_k, self.w_v))  # type: ignore[return-value]

    # --- a tile -------------------------------------------------------------------------------------------------------------------

    def streams(self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor) -> Streams:
        """See `DiagonalMixer.streams`: q, k, v and log decays in chunks."""
        plan = plan_documents(bounds, span, self.chunk_size, self.halo, x_BTC.device)

        def stream(weight: Tensor, conv: Tensor) -> Tensor:
            x, before = linear(x_BTC, weight), linear(before_BnC.to(x_BTC.dtype), weight)
            return conv_silu_chunks(x, before, conv, plan, self.n_heads, self.chunk_size)

        q_NGcK = stream(weights.w_q, weights.conv_q) * self.key_dim**-0.5
        k_NGcK = stream(weights.w_k, weights.conv_k)
        v_NGcV = stream(weights.w_v, weights.conv_v)
        gate_BTHM = linear(x_BTC, weights.w_decay).to(v_NGcV.dtype).unflatten(-1, (self.n_heads, -1))
        log_decay_BTHM = (F.logsigmoid(gate_BTHM) / self.gate_temperature).clamp(min=MIN_LOG_DECAY)
        return q_NGcK, k_NGcK, v_NGcV, to_chunks(log_decay_BTHM, self.chunk_size)

    def summary(self, bounds: Bounds, span: Range, streams: Streams, state_GKW: Tensor) -> tuple[Tensor, Tensor]:
        """See `DiagonalMixer.summary`."""
        _, k_NGcK, v_NGcV, log_decay_NGcM = streams
        plan = plan_documents(bounds, span, self.chunk_size, self.halo, state_GKW.device)
        rule = partial(gated_slots, plan=plan, rows=len(bounds.documents), kernel=self.kernel, dtype=compute_dtype(state_GKW))
        _, after = rule(None, k_NGcK, v_NGcV, log_decay_NGcM, state_GKW)
        return whole_decay(log_decay_NGcM, plan.segment_NBC).unsqueeze(-1), after

    def mix(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, state_GKW: Tensor, streams: Streams
    ) -> tuple[Tensor, Tensor]:
        """See `DiagonalMixer.mix`."""
        o_BTX, after = self._read(bounds, span, x_BTC, state_GKW, streams)
        return self.write(weights, x_BTC, o_BTX), after

    def _read(self, bounds: Bounds, span: Range, x_BTC: Tensor, state_GKW: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """What the heads of a tile came to, [B, T, H V], and the state after it."""
        plan = plan_documents(bounds, span, self.chunk_size, self.halo, x_BTC.device)
        rule = partial(gated_slots, plan=plan, rows=len(x_BTC), kernel=self.kernel, dtype=compute_dtype(x_BTC))
        q_NGcK, k_NGcK, v_NGcV, log_decay_NGcM = streams
        o_NGcV, after = rule(q_NGcK, k_NGcK, v_NGcV, log_decay_NGcM, state_GKW)
        assert o_NGcV is not None
        return from_chunks(o_NGcV, *x_BTC.shape[:2]).flatten(2), after

    # --- by heads (`models/memory/by_heads.py`) -----------------------------------------------------------------------------------

    projections = ("w_q", "w_k", "w_v", "w_decay")

    def head_rows(self, heads: Range) -> dict[str, Rows]:
        """See `RecurrentMixer.head_rows`."""
        keys, values, slots = (rows_of(self.n_heads, heads, width) for width in (self.key_dim, self.value_dim, self.n_slots))
        return {"w_q": keys, "w_k": keys, "w_v": values, "w_decay": slots, "conv_q": keys, "conv_k": keys, "conv_v": values}

    def output_rows(self, heads: Range) -> Rows:
        """See `RecurrentMixer.output_rows`."""
        return rows_of(self.n_heads, heads, self.value_dim)

    def recur(
        self, bounds: Bounds, span: Range, weights: _Weights, f_BTE: Tensor, before_BnE: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `RecurrentMixer.recur`."""
        return self._read(bounds, span, f_BTE, state_GKW, self.streams(bounds, span, weights, f_BTE, before_BnE))

    def write(self, weights: _Weights, x_BTC: Tensor, o_BTX: Tensor) -> Tensor:
        """See `RecurrentMixer.write`."""
        o_BTX = o_BTX.to(state_dtype(x_BTC))
        return linear(active_norm(o_BTX, None, weights.norm, self.norm_eps).to(x_BTC.dtype), weights.w_out)

    # --- twin and arithmetic ------------------------------------------------------------------------------------------------------

    def oracle(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """The recurrence token by token, written independently of the chunked form (one range)."""
        B, T, _ = x_BTC.shape
        H, K, n = self.n_heads, self.key_dim, self.halo
        state = state or self.init_state(B, x_BTC.device, x_BTC.dtype)
        inputs = torch.cat([state["conv"], x_BTC], dim=1)
        offset, outputs = bounds.ranges[0][0], []
        slot_keys, slot_values = state["state"].split([K, self.value_dim], -1)
        for t in range(T):
            fresh = torch.tensor([offset + t > 0 and offset + t in row for row in bounds.documents], device=x_BTC.device)
            begins = [max([s - offset for s in row if 0 < s <= offset + t], default=-n) for row in bounds.documents]
            slot_keys, slot_values = (z.masked_fill(fresh.view(B, 1, 1, 1), 0) for z in (slot_keys, slot_values))
            window = inputs[:, t : t + n + 1].clone()
            for b in range(B):
                window[b, : max(0, begins[b] - (t - n))] = 0
            projections = (self.w_q, self.w_k, self.w_v)
            q, k, v = (
                F.silu((linear(window) * conv.t()).sum(1)).view(B, H, -1)
                for linear, conv in zip(projections, self._convolutions(), strict=True)
            )
            gate = self.w_decay(x_BTC[:, t]).sigmoid().pow(1 / self.gate_temperature)
            a = gate.clamp(min=torch.tensor(MIN_LOG_DECAY, dtype=gate.dtype).exp()).view(B, H, -1, 1)
            slot_keys = a * slot_keys + (1 - a) * k.unsqueeze(-2)
            slot_values = a * slot_values + (1 - a) * v.unsqueeze(-2)
            p = torch.einsum("bhmk,bhk->bhm", slot_keys, q / K**0.5).softmax(-1)
            o = F.silu(torch.einsum("bhmv,bhm->bhv", slot_values, p).flatten(1))
            outputs.append(self.w_out(o * (o.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt() * self.norm_weight))
        return torch.stack(outputs, 1), {"state": torch.cat([slot_keys, slot_values], -1), "conv": inputs[:, inputs.shape[1] - n :]}

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`. With tiles only one tile's inside is alive; recomputation is not in ``flops_backward``."""
        H, K, V, M, c, d = self.n_heads, self.key_dim, self.value_dim, self.n_slots, self.chunk_size, self.d_model
        split, n, wide = self.crosses, batch_size * tokens, max(itemsize, 4)
        projections = 2 * d * H * (2 * K + 2 * V + M)
        states = M * (K + V)  # what a token adds to the state
        read = states + c * (K + V + 2 * M)
        op = 2 * H * (states + read)
        # States and reading again; their gradients; two products of a chunk's writing with the states' gradients.
        op_backward = 2 * H * (states + read + 2 * read + 2 * states)
        summary, summary_backward = (2 * H * states, 6 * H * states) if split else (0, 0)
        streams = wide * H * (2 * K + V + M)
        # Projections before their convolutions; the scaled query apart; the gate's input and what its clamp reads; outputs.
        inside = itemsize * (d + H * (2 * K + V)) + streams + wide * H * (2 * M + V) + itemsize * H * V
        if self.tile_tokens and self.tile_tokens < tokens:
            tiles = -(-tokens // self.tile_tokens) * (2 if split else 1)
            saved = n * (itemsize * d + (streams if split else 0)) + batch_size * tiles * wide * H * states
            saved += self.head_bytes(n, itemsize)
        else:
            saved = n * inside
        return MemoryCost(
            flops_forward=n * (projections + op + summary),
            flops_backward=n * (2 * projections + op_backward + summary_backward),
            saved_bytes=int(saved),
            state_bytes=batch_size * (H * states * wide + self.halo * d * itemsize),
            exchange_bytes=batch_size * (self.carry.summary_bytes(H * M * wide, H * states * wide) + self.halo * d * itemsize)
            if split
            else self.head_bytes(n, itemsize),
        )


def build(config: ModelConfig) -> GatedSlotAttention:
    """The module that ``config.memory`` describes (see `models.memory.protocol.build_memory`)."""
    own = config.memory.gsa
    module = GatedSlotAttention(
        d_model=config.d_model,
        n_heads=config.memory_heads,
        key_dim=config.memory_key_dim,
        value_dim=config.memory_value_dim,
        n_slots=own.n_slots,
        gate_temperature=own.gate_temperature,
        conv_kernel=config.memory.conv_kernel,
        chunk_size=own.chunk_size,
        norm_eps=config.norm_eps,
    )
    module.kernel = config.memory.kernel
    return module
