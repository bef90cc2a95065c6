"""Memory as context (MAC, section 4.1 of arXiv 2501.00663): each segment's attention sees what the memory had for its tokens.

    h = f_A(q(x))                      what the memory at the segment's start has for every token
    z = attention([P | h | x])         causal inside the segment: token i sees P, h_j and x_j for j <= i
    M' = M written with k(z), v(z)     by the rule of `models/memory/titans.py`, a segment being its chunk
    y = W_o (RMSNorm(z) * silu(RMSNorm(f_A(q(z)))))

The paper reads the updated memory in the last line, which would show a token the later ones of its segment; here it is read as it was at
the segment's start. The memory's input depends on what the segment read from it, so segments follow each other and one sequence cannot be
shared by ranks. Convolutions begin anew with every segment.
With ``residual`` the memory is written, and read for the output, with x + z in place of z (decision 0037).

Legend: B row, T token, C channel, S streams (rows, or reset periods), c tokens of a segment, N segments, H heads, K key, V value, G = S*H
memories, Y rows of the state, F fast weights, P persistent tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.attention import Attention
from models.batch import Bounds
from models.config import ModelConfig
from models.feedforward import compute_dtype
from models.linear import Linear, linear
from models.memory.attached import gated
from models.memory.chunk_plan import Share, plan_chunks
from models.memory.chunk_scan import Turns, begun, scan_chunks, turns_of
from models.memory.context_shapes import ContextShapes
from models.memory.dealing import collect, deal, share_in
from models.memory.documents import DocumentPlan
from models.memory.protocol import LocalCarry, MemoryCost, MemoryModule, MemoryTraits, State
from models.memory.recurrent import state_dtype
from models.memory.short_conv import conv_silu_chunks
from models.memory.titans import Titans
from models.memory.titans_gates import write_weights
from models.rope import rotate


class MemoryAsContext(MemoryModule):
    """One MAC mixer. ``memory`` lends its parameters and its rule; attention those of an ordinary layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        settings, d = config.memory.titans, config.d_model
        mac = config.memory.mac
        self.segment, self.reset_every, self.norm_eps = mac.segment, settings.reset_every, config.norm_eps
        settings = settings.model_copy(update={"chunk_size": mac.segment})
        sizes = (config.memory_heads, config.memory_key_dim, config.memory_value_dim)
        self.residual = mac.residual
        self.memory = Titans(d, *sizes, settings=settings, conv_kernel=config.memory.conv_kernel, norm_eps=config.norm_eps, as_mixer=False)
        heads = (config.n_heads, config.kv_heads, config.attention_head_dim)
        self.attention = Attention(d, *heads, None, config.rope, config.qkv_bias, config.norm_eps if config.qk_norm else None)
        self.persistent = nn.Parameter(torch.empty(mac.persistent, d))
        self.w_context = Linear(sizes[0] * sizes[2], d)
        self.w_read = Linear(sizes[0] * sizes[2], d)
        self.attention_norm = nn.Parameter(torch.empty(d))
        self.memory_norm = nn.Parameter(torch.empty(d))
        self.w_out = Linear(d, d)
        self.shapes = ContextShapes.of(config)
        self.traits = MemoryTraits(
            carry="layer",
            transition="nonlinear",
            read_at="segment_start",
            granularity=mac.segment,
            reset_every=settings.reset_every,
            layouts=frozenset(),
            attach="context_prefix",
        )

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Norms begin at 1, persistent tokens with unit variance, as the normed stream beside them has."""
        return torch.empty(shape).normal_(generator=generator) if name == "persistent" else torch.ones(shape)

    def init_state(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """``state`` [B, H, Y, F] as of Titans; segments share nothing else."""
        return {"state": self.memory.init_state(batch_size, device, dtype)["state"]}

    def forward(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """See `MemoryModule.forward`. Raises ValueError where this rank does not hold one stretch of the sequence."""
        if not self.carry.local or len(bounds.ranges) != 1:
            raise ValueError("a memory that is read as context works through one stretch of tokens on one rank; set parallel.cp=1")
        dtype, (span,) = state_dtype(x_BTC), bounds.ranges
        start = self.init_state(len(x_BTC), x_BTC.device, dtype) if state is None else state
        chunks = plan_chunks(bounds, span, self.segment, self.reset_every)
        share = share_in(LocalCarry(), bounds, chunks, x_BTC.device)
        turns = turns_of(chunks, self.memory.n_heads, x_BTC.device)
        x_NScC = deal(x_BTC, share, LocalCarry())
        state_YGF = self.memory.to_streams(chunks, start["state"].to(dtype).flatten(0, 1))
        initial_GF = self.memory.initial_HF(dtype).repeat(chunks.n_streams, 1)
        outputs = []
        for n in range(chunks.n_steps):
            one = replace(share, mask_NSp=share.mask_NSp[n : n + 1], first_NSp=share.first_NSp[n : n + 1])
            body = partial(self._segment, turns.part(n, n + 1), one)
            y, state_YGF = self._run(n, x_BTC.shape[1], body, x_NScC[n], state_YGF, initial_GF)
            outputs.append(y)
        y_BTC = collect(torch.stack(outputs), share, LocalCarry(), x_BTC.shape[1])
        after = self.memory.to_rows(chunks, state_YGF).unflatten(0, (len(x_BTC), -1))
        return y_BTC, {"state": after}

    def _run(self, n: int, tokens: int, body: Any, *args: Any) -> Any:
        """One segment; with tiles its inside is recomputed in the backward pass unless ``run_tile`` decides."""
        if self.run_tile is not None:
            first = min(n * self.segment, tokens - 1)
            return self.run_tile(first, min(self.segment, tokens - first), body, *args)
        if not self.tile_tokens or not torch.is_grad_enabled():
            return body(*args)
        return checkpoint(body, *args, use_reentrant=False, preserve_rng_state=False)

    def _segment(self, turns: Turns, share: Share, x_ScC: Tensor, state_YGF: Tensor, initial_GF: Tensor) -> tuple[Tensor, Tensor]:
        """One segment of every stream: its outputs and the state after it."""
        memory = self.memory
        _, anchor_GF = begun(memory.rule, turns, 0, state_YGF[:-1], initial_GF, state_YGF[-1])
        q_GcK = self._stream(x_ScC, memory.w_q, 0, 1.0)
        with torch.autocast(x_ScC.device.type, enabled=False):
            h_GcV = memory.network(anchor_GF, q_GcK)
        z_ScC = self._attend(x_ScC, linear(self._heads_together(h_GcV, x_ScC), self.w_context.weight))
        known_ScC = x_ScC.to(z_ScC.dtype) + z_ScC if self.residual else z_ScC
        q = self._stream(known_ScC, memory.w_q, 0, 1.0)
        k = self._stream(known_ScC, memory.w_k, 1, 1.0)
        v = self._stream(known_ScC, memory.w_v, 2, 0.0)
        rates = linear(known_ScC, memory.w_rates.weight).to(q.dtype).unflatten(-1, (memory.n_heads, -1)) + memory.rate_bias
        raw = rates.permute(3, 0, 2, 1).flatten(1, 2).unsqueeze(1)  # [R, 1, G, c]
        gates = dict(zip(memory.gates, raw.unbind(0), strict=True))
        write, whole, delta = write_weights(memory.settings, memory.largest_rate, gates, share, LocalCarry())
        carried, tokens = (state_YGF[:-1], initial_GF, state_YGF[-1]), (q[None], k[None], v[None])
        o_1GcV, state_ZGF, anchor_GF = scan_chunks(memory.rule, turns, LocalCarry().total, *carried, whole, *tokens, write, delta)
        read_ScC = linear(self._heads_together(o_1GcV[0], x_ScC), self.w_read.weight)
        y_ScC = gated(self.norm_eps, compute_dtype(x_ScC), z_ScC, read_ScC, self.attention_norm, self.memory_norm)[0]
        return self.w_out(y_ScC), torch.cat([state_ZGF, anchor_GF.unsqueeze(0)])

    def _stream(self, x_ScC: Tensor, projection: Linear, which: int, norm_scale: float) -> Tensor:
        """[G, c, .]: projection, convolution inside the segment, SiLU, and for queries and keys the unit sphere."""
        memory = self.memory
        x = linear(x_ScC, projection.weight)
        conv = memory.convolutions()[which]
        before = x.new_zeros(len(x), memory.halo, x.shape[-1])
        conv = conv.to(state_dtype(conv))
        return conv_silu_chunks(x, before, conv, DocumentPlan(), memory.n_heads, x.shape[1], norm_scale)[0]

    def _heads_together(self, o_GcV: Tensor, like_ScC: Tensor) -> Tensor:
        """[S, c, H * V], every head's vector normed."""
        o = o_GcV * (o_GcV.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt() * self.memory.norm_weight
        return o.unflatten(0, (len(like_ScC), -1)).transpose(1, 2).flatten(2).to(compute_dtype(like_ScC))

    def _attend(self, x_ScC: Tensor, h_ScC: Tensor) -> Tensor:
        """Attention of the segment's tokens to persistent tokens, what the memory had, and each other."""
        attention, c, n = self.attention, x_ScC.shape[1], len(self.persistent)
        prefix = self.persistent.to(x_ScC.dtype).expand(len(x_ScC), -1, -1)
        seen = torch.cat([prefix, h_ScC.to(x_ScC.dtype), x_ScC], dim=1)
        own, places = torch.arange(c, device=x_ScC.device), torch.zeros(n, dtype=torch.int64, device=x_ScC.device)
        q = attention._heads(x_ScC, attention.wq, attention.q_norm)
        k, v = attention._heads(seen, attention.wk, attention.k_norm), attention._heads(seen, attention.wv, None)
        q = rotate(q, *attention.rope.table(own[None], q.dtype))
        k = rotate(k, *attention.rope.table(torch.cat([places, own, own])[None], k.dtype))
        causal = own[:, None] >= own[None]
        mask = torch.cat([torch.ones(c, n, dtype=torch.bool, device=x_ScC.device), causal, causal], dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        return attention.wo(out.transpose(1, 2).flatten(2))

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`."""
        shapes, wide = self.shapes, max(itemsize, 4)
        return MemoryCost(
            flops_forward=batch_size * tokens * shapes.flops_forward(tokens),
            flops_backward=batch_size * tokens * shapes.flops_backward(tokens),
            saved_bytes=shapes.saved_bytes(batch_size, tokens, itemsize, wide, self.tile_tokens > 0),
            state_bytes=batch_size * shapes.titans.state_elements * wide,
            exchange_bytes=0,
        )
