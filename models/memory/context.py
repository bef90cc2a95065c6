"""Memory as context (MAC, section 4.1 of arXiv 2501.00663): each segment's attention sees what the memory had for its tokens.

    h = f_A(q(x))                      what the memory at the segment's start has for every token
    z = attention([P | h | x])         causal inside the segment: token i sees P, h_j and x_j for j <= i
    M' = M written with k(z), v(z)     by the rule of `models/memory/titans.py`, a segment being its chunk
    y = W_o (RMSNorm(z) * silu(RMSNorm(f_A(q(z)))))

The paper reads the updated memory in the last line, which would show a token the later ones of its segment; here it is read as it was at
the segment's start. The memory's input depends on what the segment read from it, so segments follow each other. Ranks that share a sequence
therefore share every segment: each works on a slice of its tokens, keys and values are gathered, and the memory's update is the sum of what
they contribute. Convolutions begin anew with every segment; on a slice they read on from the tokens of the slices before.
With ``residual`` the memory is written, and read for the output, with x + z in place of z (decision 0037).

Legend: B row, T token, C channel, S streams (rows, or reset periods), p tokens of this rank per segment, n tokens of a convolution's halo,
N segments, H heads, K key, V value, k keys of a segment, G = S*H memories, Z weights and momentum, F fast weights, P persistent tokens.
"""

from __future__ import annotations

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
from models.memory.chunk_scan import begun, scan_chunks
from models.memory.context_oracle import context_oracle
from models.memory.context_plan import Segment, picked, plan_context
from models.memory.context_shapes import ContextShapes
from models.memory.dealing import collect, deal
from models.memory.documents import DocumentPlan
from models.memory.protocol import MemoryCost, MemoryModule, MemoryTraits, State, last_tokens
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
        self.d_model, self.segment, self.reset_every, self.norm_eps = d, mac.segment, settings.reset_every, config.norm_eps
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
            halo_tokens=mac.segment - 1,
            reset_every=settings.reset_every,
            layouts=frozenset({"contiguous", "zigzag"}),
            attach="context_prefix",
        )

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Norms begin at 1, persistent tokens with unit variance, as the normed stream beside them has."""
        return torch.empty(shape).normal_(generator=generator) if name == "persistent" else torch.ones(shape)

    def init_state(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """``state`` [B, H, Z, F]: weights, and momentum if there is one, at the start of the segment which the next token belongs to;
        ``conv`` [B, segment - 1, d_model], the layer's last inputs, from which a segment that is cut is made again."""
        state = self.memory.init_state(batch_size, device, dtype)["state"][:, :, :-1]
        return {"state": state, "conv": torch.zeros(batch_size, self.segment - 1, self.d_model, device=device, dtype=dtype)}

    def forward(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """See `MemoryModule.forward`. Raises ValueError where one process is given more than one stretch of the sequence."""
        if self.carry.local and len(bounds.ranges) != 1:
            raise ValueError("a memory that is read as context works through one stretch of tokens in one process")
        dtype, (B, T, _) = state_dtype(x_BTC), x_BTC.shape
        start = self.init_state(B, x_BTC.device, dtype) if state is None else state
        span = bounds.ranges[0] if self.carry.local else (0, bounds.seq_len)
        sizes = (self.segment, self.reset_every, self.memory.n_heads, self.memory.halo)
        plan = plan_context(bounds, span, *sizes, self.carry, x_BTC.device)
        conv_BnC, held_BTC = start["conv"].to(x_BTC.dtype), x_BTC
        if plan.before:
            held_BTC = torch.cat([conv_BnC[:, self.segment - 1 - plan.before :], x_BTC], dim=1)
        x_NSpC = deal(held_BTC, plan.share, self.carry)
        before_NSnC = self._before(x_NSpC, plan.tail_NSn, plan.halo_NSn)
        state_ZGF = self.memory.to_streams(plan.chunks, start["state"].to(dtype).flatten(0, 1))
        initial_GF = self.memory.initial_HF(dtype).repeat(plan.chunks.n_streams, 1)
        outputs = []
        for n, step in enumerate(plan.steps):
            before = None if before_NSnC is None else before_NSnC[n]
            y, state_ZGF = self._run(n, T, partial(self._segment, step), x_NSpC[n], before, state_ZGF, initial_GF)
            outputs.append(y)
        y_BTC = collect(torch.stack(outputs), plan.share, self.carry, plan.before + T)[:, plan.before :]
        if not self.carry.local and state is None:
            return y_BTC, {}
        after = self.memory.to_rows(plan.chunks, state_ZGF).unflatten(0, (B, -1))
        return y_BTC, {"state": after, "conv": self._last_inputs(conv_BnC, x_BTC, bounds)}

    def _last_inputs(self, conv_BnC: Tensor, x_BTC: Tensor, bounds: Bounds) -> Tensor:
        """The last inputs before what follows."""
        if self.carry.local or self.segment == 1:
            return last_tokens(conv_BnC, x_BTC, self.segment - 1)
        n = min(self.segment - 1, bounds.seq_len)
        return torch.cat([conv_BnC[:, n:], self.carry.tail(x_BTC, self.segment - 1, bounds)[:, self.segment - 1 - n :]], dim=1)

    def _run(self, n: int, tokens: int, body: Any, *args: Any) -> Any:
        """One segment; with tiles its inside is recomputed in the backward pass unless ``run_tile`` decides."""
        if self.run_tile is not None:
            size = -(-self.segment // self.carry.ranks)
            first = min(n * size, tokens - 1)
            return self.run_tile(first, min(size, tokens - first), body, *args)
        if not self.tile_tokens or not torch.is_grad_enabled():
            return body(*args)
        return checkpoint(body, *args, use_reentrant=False, preserve_rng_state=False)

    def _segment(
        self, step: Segment, x_SpC: Tensor, before_SnC: Tensor | None, state_ZGF: Tensor, initial_GF: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One segment of every stream: this rank's outputs and the state after it."""
        memory = self.memory
        _, anchor_GF = begun(memory.rule, step.turns, 0, state_ZGF, initial_GF, initial_GF)
        q_GpK = self._stream(x_SpC, before_SnC, memory.w_q, 0, 1.0)
        with torch.autocast(x_SpC.device.type, enabled=False):
            h_GpV = memory.network(anchor_GF, q_GpK)
        z_SpC = self._attend(x_SpC, linear(self._heads_together(h_GpV, x_SpC), self.w_context.weight), step)
        known_SpC = x_SpC.to(z_SpC.dtype) + z_SpC if self.residual else z_SpC
        before_SnC = self._before(known_SpC, step.tail_Sn, step.halo_Sn)
        q = self._stream(known_SpC, before_SnC, memory.w_q, 0, 1.0)
        k = self._stream(known_SpC, before_SnC, memory.w_k, 1, 1.0)
        v = self._stream(known_SpC, before_SnC, memory.w_v, 2, 0.0)
        rates = linear(known_SpC, memory.w_rates.weight).to(q.dtype).unflatten(-1, (memory.n_heads, -1)) + memory.rate_bias
        raw = rates.permute(3, 0, 2, 1).flatten(1, 2).unsqueeze(1)  # [R, 1, G, p]
        gates = dict(zip(memory.gates, raw.unbind(0), strict=True))
        write, whole, delta = write_weights(memory.settings, memory.largest_rate, gates, step.share, self.carry)
        tokens = (q[None], k[None], v[None])
        scanned = scan_chunks(memory.rule, step.turns, self.carry.total, state_ZGF, initial_GF, initial_GF, whole, *tokens, write, delta)
        o_1GpV, after_ZGF, _ = scanned
        if step.unfinished_G is not None:
            after_ZGF = torch.where(step.unfinished_G.unsqueeze(-1), state_ZGF, after_ZGF)
        read_SpC = linear(self._heads_together(o_1GpV[0], x_SpC), self.w_read.weight)
        y_SpC = gated(self.norm_eps, compute_dtype(x_SpC), z_SpC, read_SpC, self.attention_norm, self.memory_norm)[0]
        return self.w_out(y_SpC), after_ZGF

    def _before(self, x_SpC: Tensor, tail_Sn: Tensor | None, halo_Sn: Tensor | None) -> Tensor | None:
        """[..., S, n, C]: the tokens of the segment before this rank's, for convolutions; None on one rank, where there are none."""
        if tail_Sn is None or halo_Sn is None or not self.memory.halo:
            return None
        tails = self.carry.stacked(picked(x_SpC, tail_Sn))
        return picked(tails.movedim(0, -3).flatten(-3, -2), halo_Sn)

    def _stream(self, x_SpC: Tensor, before_SnC: Tensor | None, projection: Linear, which: int, norm_scale: float) -> Tensor:
        """[G, p, .]: projection, convolution inside the segment, SiLU, and for queries and keys the unit sphere."""
        memory = self.memory
        x = linear(x_SpC, projection.weight)
        conv = memory.convolutions()[which]
        before = x.new_zeros(len(x), memory.halo, x.shape[-1]) if before_SnC is None else linear(before_SnC, projection.weight)
        conv = conv.to(state_dtype(conv))
        return conv_silu_chunks(x, before, conv, DocumentPlan(), memory.n_heads, x.shape[1], norm_scale)[0]

    def _heads_together(self, o_GpV: Tensor, like_SpC: Tensor) -> Tensor:
        """[S, p, H * V], every head's vector normed."""
        o = o_GpV * (o_GpV.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt() * self.memory.norm_weight
        return o.unflatten(0, (len(like_SpC), -1)).transpose(1, 2).flatten(2).to(compute_dtype(like_SpC))

    def _attend(self, x_SpC: Tensor, h_SpC: Tensor, step: Segment) -> Tensor:
        """Attention of the segment's tokens to persistent tokens, what the memory had, and each other. Over ranks each has its own queries,
        and keys and values of all."""
        attention, S, n = self.attention, len(x_SpC), len(self.persistent)
        own_Sp, seen_Sk = step.own_Sp, step.seen_Sk
        kv_SHkD = self._keys_and_values(torch.cat([h_SpC.to(x_SpC.dtype), x_SpC], dim=1), torch.cat([own_Sp, own_Sp], 1))
        if self.carry.ranks > 1:
            kv_SHkD = self.carry.stacked(kv_SHkD).permute(1, 2, 0, 3, 4).flatten(2, 3)
        prefix = self._keys_and_values(self.persistent.to(x_SpC.dtype).unsqueeze(0), own_Sp.new_zeros(1, n))
        k, v = torch.cat([prefix.expand(S, -1, -1, -1), kv_SHkD], dim=2).chunk(2, dim=-1)
        q = rotate(attention._heads(x_SpC, attention.wq, attention.q_norm), *attention.rope.table(own_Sp, x_SpC.dtype))
        mask = own_Sp[:, :, None] >= torch.cat([own_Sp.new_zeros(len(own_Sp), n), seen_Sk], 1)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1), enable_gqa=k.shape[1] != q.shape[1])
        return attention.wo(out.transpose(1, 2).flatten(2))

    def _keys_and_values(self, x_SpC: Tensor, places_Sp: Tensor) -> Tensor:
        """[S, H, p, 2 D]: keys, rotated to their places, and values."""
        attention = self.attention
        k, v = attention._heads(x_SpC, attention.wk, attention.k_norm), attention._heads(x_SpC, attention.wv, None)
        return torch.cat([rotate(k, *attention.rope.table(places_Sp, k.dtype)), v], dim=-1)

    def oracle(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """See `context_oracle`."""
        return context_oracle(self, x_BTC, state, bounds)

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`."""
        shapes, wide = self.shapes, max(itemsize, 4)
        return MemoryCost(
            flops_forward=batch_size * tokens * shapes.flops_forward(tokens),
            flops_backward=batch_size * tokens * shapes.flops_backward(tokens),
            saved_bytes=shapes.saved_bytes(batch_size, tokens, itemsize, wide, self.tile_tokens > 0, self.carry.ranks),
            state_bytes=batch_size * (shapes.state_elements * wide + (self.segment - 1) * self.d_model * itemsize),
            exchange_bytes=0 if self.carry.local else shapes.exchange_bytes(batch_size, tokens, itemsize, wide, self.carry.ranks),
        )
