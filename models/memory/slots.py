"""Slots of memory per layer, read by cross-attention and rewritten through gates once per segment: Memformer's and LM2's, made causal.

Tokens read the slots as they were at their segment's start; after the segment every slot attends to its tokens. Heads as in attention:

    read             e = heads of softmax(q(x) k_s(M)^T / sqrt K) v_s(M)
    memformer        y = W_o e
                     M~ = RMSNorm(M + b)    u = W_u softmax(q_s(M~) [k_s(M~) of the slot itself | k(x) of the segment]^T / sqrt K) [v_s | v]
                     a = sigmoid(W_a u + c)    M' = a u + (1 - a) M~                 reads see M~ too
    lm2              y = W_o (sigmoid(W_g e) * e)
                     u = W_u softmax(q_s(M) k(x)^T / sqrt K) v(x)
                     M' = sigmoid(W_i mean of x) tanh(u) + sigmoid(W_a u + c) M

Memformer (arXiv 2010.06891) is published with slots that all layers share, from the top of one segment to the bottom of the next; here each
layer has its own, so that layers run side by side over ranks. Its feed-forward for slots is left out. LM2 (arXiv 2502.06049) equates slots
with tokens in its write, and its code pools over the segment that is being read, so that a token sees later ones; here each slot writes
what it attended to, and the input gate pools a segment that is over. Initial slots: b, by RMSNorm of unit size whatever b's, and the
identity. First gates (c): a slot keeps 88 percent of itself per segment.

Legend: B row, T token, C channel and size of a slot, H head, K head size, N segment, c token in segment, m slot.
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
from models.memory.protocol import MemoryCost, State
from models.memory.recurrent import Streams, state_dtype
from models.memory.segments import Segments
from models.memory.sequential import SequentialMixer
from models.recomputed import recomputed

_KEPT = 2.0
"""First bias of the gates: sigmoid(2) = 0.88."""


class _Weights(NamedTuple):
    """The parameters in the dtype in which their gradients add up over tiles; those of rewriting in that of states."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_slot_k: Tensor
    w_slot_v: Tensor
    w_out: Tensor
    extra: Tensor
    """memformer: b; lm2: W_g."""
    rewriting: tuple[Tensor, ...]


class GatedSlots(SequentialMixer):
    """One mixer. Parameters: four projections of tokens, four of slots, the gates."""

    def __init__(self, d_model: int, n_heads: int, head_dim: int, n_slots: int, segment: int, lm2: bool, norm_eps: float) -> None:
        super().__init__(d_model, n_slots, segment)
        self.n_heads, self.head_dim, self.lm2, self.norm_eps = n_heads, head_dim, lm2, norm_eps
        width = n_heads * head_dim
        self.w_q = Linear(d_model, width)
        self.w_k = Linear(d_model, width)
        self.w_v = Linear(d_model, width)
        self.w_slot_q = Linear(d_model, width)
        self.w_slot_k = Linear(d_model, width)
        self.w_slot_v = Linear(d_model, width)
        self.w_slot_out = Linear(width, d_model)
        self.w_gate = Linear(d_model, d_model)
        self.gate_bias = nn.Parameter(torch.empty(d_model))
        self.w_out = Linear(width, d_model)
        if lm2:
            self.w_in = Linear(d_model, d_model)
            self.w_read_gate = Linear(width, width)
        else:
            self.slots = nn.Parameter(torch.empty(n_slots, d_model))

    @property
    def anchor(self) -> Tensor:
        """See `SequentialMixer.anchor`."""
        return self.gate_bias

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Gates that keep."""
        return torch.full(shape, _KEPT if self.lm2 else -_KEPT) if name == "gate_bias" else None

    def init_state(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """See `SequentialMixer`; the identity for lm2, 0 for memformer, whose first slots are a parameter."""
        state = super().init_state(batch_size, device, dtype)
        if self.lm2:
            state["state"] = state["state"] + torch.eye(self.n_vectors, self.d_model, device=device, dtype=dtype)
        return state

    def weights(self) -> _Weights:
        """See `RecurrentMixer.weights`."""
        read = self.wide(p.weight for p in (self.w_q, self.w_k, self.w_v, self.w_slot_k, self.w_slot_v, self.w_out))
        rewriting = self.widened(p.weight for p in (self.w_slot_q, self.w_slot_k, self.w_slot_v, self.w_slot_out, self.w_gate))
        rewriting.append(self.gate_bias.to(state_dtype(self.gate_bias)))
        if self.lm2:
            rewriting += self.widened([self.w_in.weight])
            extra = self.wide([self.w_read_gate.weight])
        else:
            extra = [self.slots.to(state_dtype(self.slots))]
            rewriting += extra
        return _Weights(*read, *extra, rewriting=tuple(rewriting))

    # --- a tile -------------------------------------------------------------------------------------------------------------------

    def streams(self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor) -> Streams:
        """See `SequentialMixer.streams`: keys and values [B, N, c, H, K], for lm2 the mean of every segment's inputs [B, N, C]."""
        plan, x = self.segments(bounds, span, x_BTC, before_BnC)
        k_v = [plan.deal(linear(x, w)).unflatten(-1, (self.n_heads, -1)) for w in (weights.w_k, weights.w_v)]
        if not self.lm2:
            return tuple(k_v)
        (mean_BNC,) = recomputed(partial(_mean, plan.real_BNc), plan.deal(x))
        return *k_v, mean_BNC

    def rewrite(self, plan: Segments, n: int, weights: _Weights, state_BmD: Tensor, streams: Streams) -> Tensor:
        """See `SequentialMixer.rewrite`."""
        fn = partial(_lm2 if self.lm2 else partial(_memformer, self.norm_eps), plan.real_BNc[:, n])
        return recomputed(fn, state_BmD, *(stream[:, n] for stream in streams), *weights.rewriting)[0]

    def read(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor, at_start_BNmD: Tensor, *streams: Tensor
    ) -> Tensor:
        """See `SequentialMixer.read`."""
        plan, x = self.segments(bounds, span, x_BTC, before_BnC)
        if not self.lm2:
            (at_start_BNmD,) = recomputed(partial(_begun, self.norm_eps), at_start_BNmD, weights.extra)
        slots_BNmD = at_start_BNmD.to(compute_dtype(x))

        def heads(z: Tensor) -> Tensor:
            return z.flatten(0, 1).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

        q, k, v = plan.deal(linear(x, weights.w_q)), linear(slots_BNmD, weights.w_slot_k), linear(slots_BNmD, weights.w_slot_v)
        o = F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2).unflatten(0, q.shape[:2])
        e_BTV = plan.collect(o)
        if self.lm2:
            (e_BTV,) = recomputed(_gated, e_BTV, linear(e_BTV, weights.extra))
        return linear(e_BTV, weights.w_out)

    # --- twin and arithmetic ------------------------------------------------------------------------------------------------------

    def oracle_segment(self, x_DC: Tensor, a: int, b: int, memory_HKW: Tensor) -> tuple[Tensor, Tensor]:
        """See `SegmentedMixer.oracle_segment`."""
        x, M = x_DC[a:b], memory_HKW[0]
        if not self.lm2:
            M = M + self.slots
            M = M * (M.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()

        def heads(z: Tensor) -> Tensor:
            return z.unflatten(-1, (self.n_heads, self.head_dim))

        slot_q, slot_k, slot_v = (heads(w(M)) for w in (self.w_slot_q, self.w_slot_k, self.w_slot_v))
        outputs = []
        for token in x:
            p = torch.einsum("hk,mhk->hm", heads(self.w_q(token)), slot_k).div(self.head_dim**0.5).softmax(-1)
            e = torch.einsum("hm,mhk->hk", p, slot_v).flatten()
            outputs.append(self.w_out(self.w_read_gate(e).sigmoid() * e if self.lm2 else e))
        k, v, after = heads(self.w_k(x)), heads(self.w_v(x)), []
        for s, slot in enumerate(M):
            seen_k = k if self.lm2 else torch.cat([slot_k[s : s + 1], k])
            seen_v = v if self.lm2 else torch.cat([slot_v[s : s + 1], v])
            p = torch.einsum("hk,chk->hc", slot_q[s], seen_k).div(self.head_dim**0.5).softmax(-1)
            u = self.w_slot_out(torch.einsum("hc,chk->hk", p, seen_v).flatten())
            gate = (self.w_gate(u) + self.gate_bias).sigmoid()
            if self.lm2:
                after.append(self.w_in(x.mean(0)).sigmoid() * u.tanh() + gate * slot)
            else:
                after.append(gate * u + (1 - gate) * slot)
        return torch.stack(outputs), torch.stack(after)[None]

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`. With tiles only one tile's inside is alive; recomputation is not in ``flops_backward``."""
        A, m, c, d = self.n_heads * self.head_dim, self.n_vectors, min(self.segment, tokens), self.d_model
        split, n, wide = not self.carry.local, batch_size * tokens, max(itemsize, 4)
        segments = batch_size * -(-tokens // c)
        projections = 8 * d * A + (2 * A * A if self.lm2 else 0)
        near = 4 * m * A  # per token
        slots = 4 * m * d * A  # per segment, keys and values
        rewriting = 4 * m * d * A + 2 * m * d * d + 4 * m * c * A + (2 * d * d if self.lm2 else slots)
        state = m * d * wide
        # Inputs; q, k, v; what was read, a statistic; lm2: its gate, and both together. Per segment: the memory as it is handed on, all of
        # them together, memformer: what is read of them; keys and values of slots; lm2: the mean.
        streams = 2 * itemsize * A
        inside = itemsize * (d + 4 * A + (2 * A if self.lm2 else 0)) + wide * self.n_heads
        per_segment = (2 if self.lm2 else 3) * state + 2 * m * A * itemsize + (d * wide if self.lm2 else 0)
        if self.tile_tokens and self.tile_tokens < tokens:
            tiles = batch_size * -(-tokens // self.tile_tokens)
            kept = (streams + (d * wide / c if self.lm2 else 0)) * n + segments * state if split else 0
            saved = n * itemsize * d + tiles * state + batch_size * self.halo * d * itemsize + kept
        else:
            saved = n * inside + segments * per_segment
        return MemoryCost(
            flops_forward=n * (projections + near) + segments * (slots + rewriting),
            flops_backward=n * (2 * projections + 2.5 * near) + segments * (2 * slots + 3 * rewriting),
            saved_bytes=int(saved),
            state_bytes=batch_size * (state + self.halo * d * itemsize),
            exchange_bytes=batch_size * (state + self.halo * d * itemsize) if split else 0,
        )


def _mean(real_BNc: Tensor, x_BNcC: Tensor) -> tuple[Tensor]:
    real = real_BNc.unsqueeze(-1)
    total = (x_BNcC.to(state_dtype(x_BNcC)) * real).sum(2)
    return (total / real.sum(2).clamp(min=1),)


def _begun(eps: float, M: Tensor, slots_mD: Tensor) -> tuple[Tensor]:
    """M~"""
    x = M + slots_mD
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt(),)


def _gated(e: Tensor, gate: Tensor) -> tuple[Tensor]:
    return (e * gate.sigmoid(),)


def _heads(x: Tensor, weight: Tensor, like_BcHK: Tensor) -> Tensor:
    return F.linear(x, weight).unflatten(-1, like_BcHK.shape[-2:])


def _scores(q_BmHK: Tensor, k_BcHK: Tensor, real_Bc: Tensor) -> Tensor:
    scores_BHmc = torch.einsum("bmhk,bchk->bhmc", q_BmHK, k_BcHK) / q_BmHK.shape[-1] ** 0.5
    return scores_BHmc.masked_fill(~real_Bc[:, None, None], torch.finfo(scores_BHmc.dtype).min)


def _memformer(
    eps: float,
    real_Bc: Tensor,
    M: Tensor,
    k_BcHK: Tensor,
    v_BcHK: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_out: Tensor,
    w_gate: Tensor,
    gate_bias: Tensor,
    slots: Tensor,
) -> tuple[Tensor]:
    """The slots after a segment."""
    (begun,) = _begun(eps, M, slots)
    k, v = k_BcHK.to(M.dtype), v_BcHK.to(M.dtype)
    q, own_k, own_v = (_heads(begun, w, k) for w in (w_q, w_k, w_v))
    own_BHm1 = ((q * own_k).sum(-1) / q.shape[-1] ** 0.5).transpose(1, 2).unsqueeze(-1)
    p = torch.cat([own_BHm1, _scores(q, k, real_Bc)], -1).softmax(-1)
    u = torch.einsum("bhmc,bchk->bmhk", p[..., 1:], v) + p[..., 0].transpose(1, 2).unsqueeze(-1) * own_v
    u = F.linear(u.flatten(2), w_out)
    a = (F.linear(u, w_gate) + gate_bias).sigmoid()
    return (a * u + (1 - a) * begun,)


def _lm2(
    real_Bc: Tensor,
    M: Tensor,
    k_BcHK: Tensor,
    v_BcHK: Tensor,
    mean_BC: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_out: Tensor,
    w_gate: Tensor,
    gate_bias: Tensor,
    w_in: Tensor,
) -> tuple[Tensor]:
    """The slots after a segment; keys and values of slots are for reading alone."""
    k, v = k_BcHK.to(M.dtype), v_BcHK.to(M.dtype)
    p = _scores(_heads(M, w_q, k), k, real_Bc).softmax(-1)
    u = F.linear(torch.einsum("bhmc,bchk->bmhk", p, v).flatten(2), w_out)
    forget = (F.linear(u, w_gate) + gate_bias).sigmoid()
    return (F.linear(mean_BC.to(M.dtype), w_in).sigmoid().unsqueeze(1) * u.tanh() + forget * M,)


def build(config: ModelConfig) -> GatedSlots:
    """The module that ``config.memory`` describes (see `models.memory.protocol.build_memory`)."""
    own = config.memory.slots
    heads = (config.memory_heads, config.memory_key_dim)
    return GatedSlots(config.d_model, *heads, own.n_slots, own.segment, own.variant == "lm2", config.norm_eps)
