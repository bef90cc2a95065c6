"""Infini-attention (arXiv 2404.07143): causal attention inside a segment, and a compressive memory of the segments before it.

    A_dot = attention(q, k, v) inside the segment, rotated by places in it        s(x) = ELU(x) + 1, per head, without rotation
    A_mem = s(q) M / (s(q) z)        M' = M + sum s(k)^T v        z' = z + sum s(k), over the segment's tokens
    delta:                           M' = M + sum s(k)^T (v - s(k) M / (s(k) z))
    y = W_o (g A_mem + (1 - g) A_dot)        g = sigmoid of one learned number per head

Left unspecified by the paper: the number added to the divisors (1e-6), the first value of the gates (0: both halves count alike), how the
end of a document is treated (its last segment is as short as it comes; the next document's memory is empty). Nothing is cut off between
segments: gradients flow through M and z (a public version detaches both).

Layer-local. M and z are sums over tokens: one exchange of [M | z] over ranks. With the delta rule M is affine in what comes in, once z is
known: two exchanges, z first. Tokens read at their segment's start, so ranks also hand on the inputs of an unfinished segment.

Legend: B row, T token, C channel, H head, K key and value size, W = K + 1 columns of [M | z], G = B*H, N segment, c token in segment.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.batch import Bounds, Range
from models.config import ModelConfig, RopeConfig
from models.feedforward import compute_dtype
from models.linear import Linear, linear
from models.memory.by_heads import Rows, rows_of
from models.memory.chunks import states
from models.memory.protocol import MemoryCost, MemoryTraits, last_tokens
from models.memory.recurrent import DiagonalMixer, Streams, state_dtype
from models.memory.segmented import SegmentedMixer
from models.memory.segments import Segments, plan_segments
from models.recomputed import recomputed
from models.rope import Rope, rotate

_EPS = 1e-6


class _Weights(NamedTuple):
    """The parameters in the dtype in which their gradients add up over tiles."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_out: Tensor
    gate: Tensor


class InfiniAttention(SegmentedMixer, DiagonalMixer):
    """One mixer. Parameters: four projections, which attention and memory share, and a gate per head."""

    def __init__(self, d_model: int, n_heads: int, head_dim: int, segment: int, delta: bool, rope: RopeConfig) -> None:
        super().__init__(d_model, (n_heads, head_dim, head_dim + 1), segment)
        self.traits = MemoryTraits(
            carry="layer",
            transition="affine_dense" if delta else "affine_diag",
            read_at="segment_start",
            halo_tokens=segment - 1,
            head_splittable=n_heads,
            layouts=frozenset({"contiguous", "zigzag"}),
        )
        self.n_heads, self.head_dim, self.delta = n_heads, head_dim, delta
        self.w_q = Linear(d_model, n_heads * head_dim)
        self.w_k = Linear(d_model, n_heads * head_dim)
        self.w_v = Linear(d_model, n_heads * head_dim)
        self.w_out = Linear(n_heads * head_dim, d_model)
        self.gate = nn.Parameter(torch.empty(n_heads))
        self.rope = Rope(rope, head_dim)

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Gates begin at 0."""
        return torch.zeros(shape) if name == "gate" else None

    def weights(self) -> _Weights:
        """See `RecurrentMixer.weights`."""
        projections = self.wide(p.weight for p in (self.w_q, self.w_k, self.w_v, self.w_out))
        return _Weights(*projections, *[self.gate.to(state_dtype(self.gate))])

    # --- a tile -------------------------------------------------------------------------------------------------------------------

    def streams(self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor) -> Streams:
        """See `DiagonalMixer.streams`: q, k, v [B, N, c, H, K]."""
        plan, x = self.segments(bounds, span, x_BTC, before_BnC)
        projections = (weights.w_q, weights.w_k, weights.w_v)
        return tuple(plan.deal(linear(x, w)).unflatten(-1, (self.n_heads, -1)) for w in projections)

    def summary(self, bounds: Bounds, span: Range, streams: Streams, state_GKW: Tensor) -> tuple[Tensor, Tensor]:
        """See `DiagonalMixer.summary`."""
        _, k_BNcHK, v_BNcHK = streams
        plan = plan_segments(bounds, span, self.segment, state_GKW.device)
        keep_NG11 = _kept(plan, self.n_heads, state_GKW.dtype)
        return keep_NG11.prod(0), states(_sums(plan, k_BNcHK, v_BNcHK), keep_NG11, state_GKW)[-1].clone()

    def mix(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, state_GKW: Tensor, streams: Streams
    ) -> tuple[Tensor, Tensor]:
        """See `DiagonalMixer.mix`."""
        o_BTX, after = self._found(bounds, span, weights, x_BTC, state_GKW, streams)
        return self.write(weights, x_BTC, o_BTX), after

    def _found(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, state_GKW: Tensor, streams: Streams
    ) -> tuple[Tensor, Tensor]:
        """What the heads of a tile came to, [B, T, H K], and the state after it."""
        plan = plan_segments(bounds, span, self.segment, x_BTC.device)
        q_BNcHK, k_BNcHK, v_BNcHK = streams
        states_MGKW = self._states(plan, k_BNcHK, v_BNcHK, state_GKW)
        near_BNcHK = self._attend(q_BNcHK, k_BNcHK, v_BNcHK)
        read = partial(_read, plan.fresh_BN, compute_dtype(x_BTC))
        (o_BNcHK,) = recomputed(read, q_BNcHK, states_MGKW, near_BNcHK, weights.gate)
        return plan.collect(o_BNcHK.flatten(3)), states_MGKW[-1].clone()

    # --- by heads (`models/memory/by_heads.py`) -----------------------------------------------------------------------------------

    projections = ("w_q", "w_k", "w_v")

    def head_rows(self, heads: Range) -> dict[str, Rows]:
        """See `RecurrentMixer.head_rows`."""
        rows = rows_of(self.n_heads, heads, self.head_dim)
        return {"w_q": rows, "w_k": rows, "w_v": rows, "gate": (heads,)}

    def output_rows(self, heads: Range) -> Rows:
        """See `RecurrentMixer.output_rows`."""
        return rows_of(self.n_heads, heads, self.head_dim)

    def recur(
        self, bounds: Bounds, span: Range, weights: _Weights, f_BTE: Tensor, before_BnE: Tensor, state_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `RecurrentMixer.recur`."""
        return self._found(bounds, span, weights, f_BTE, state_GKW, self.streams(bounds, span, weights, f_BTE, before_BnE))

    def write(self, weights: _Weights, x_BTC: Tensor, o_BTX: Tensor) -> Tensor:
        """See `RecurrentMixer.write`."""
        return linear(o_BTX, weights.w_out)

    def _states(self, plan: Segments, k_BNcHK: Tensor, v_BNcHK: Tensor, state_GKW: Tensor) -> Tensor:
        """[M | z] before every segment and after the last, [N + 1, G, K, W]."""
        keep_NG11 = _kept(plan, self.n_heads, state_GKW.dtype)
        if not self.delta:
            return states(_sums(plan, k_BNcHK, v_BNcHK), keep_NG11, state_GKW)
        M_GKK, z_GK1 = state_GKW.split([self.head_dim, 1], -1)
        z_MGK1 = states(_sums(plan, k_BNcHK), keep_NG11, z_GK1)
        return torch.cat([_corrected(plan, k_BNcHK, v_BNcHK, z_MGK1, M_GKK), z_MGK1], -1)

    def _attend(self, q_BNcHK: Tensor, k_BNcHK: Tensor, v_BNcHK: Tensor) -> Tensor:
        """Causal attention inside every segment, [B, N, c, H, K]; filling comes last, where no token looks."""
        B, _, c, _, _ = q_BNcHK.shape
        table = self.rope.table(torch.arange(c, device=q_BNcHK.device)[None], q_BNcHK.dtype)
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q_BNcHK, k_BNcHK, v_BNcHK))
        o = F.scaled_dot_product_attention(rotate(q, *table), rotate(k, *table), v, is_causal=True)
        return o.transpose(1, 2).unflatten(0, (B, -1))

    # --- over ranks, with the delta rule ------------------------------------------------------------------------------------------

    def exchanged(self, pieces: list[Tensor], halos: list[Tensor], initial_BHKW: Tensor, bounds: Bounds) -> tuple[list[Tensor], Tensor]:
        """See `RecurrentMixer.exchanged`. Delta: z of every range is exchanged first; with it a range's transition of M is known."""
        if not self.delta:
            return super().exchanged(pieces, halos, initial_BHKW, bounds)
        weights, shape = self.weights(), initial_BHKW.shape[:2]
        M_BHKK, z_BHK1 = initial_BHKW.split([self.head_dim, 1], -1)
        made, kept, sums = [], [], []
        for i, piece in enumerate(pieces):
            of_tiles, before, z_GK1, keep_G11 = [], halos[i], torch.zeros_like(z_BHK1.flatten(0, 1)), None
            for span, x in self.tiles(piece, bounds.ranges[i]):
                keep, z_GK1, *streams = self.run(bounds, span, partial(self._counted, bounds, span), weights, x, before, z_GK1)
                keep_G11 = keep if keep_G11 is None else keep_G11 * keep
                of_tiles.append(streams)
                before = last_tokens(before, x, self.halo)
            assert keep_G11 is not None
            made.append(of_tiles)
            kept.append(keep_G11.unflatten(0, shape))
            sums.append(z_GK1.unflatten(0, shape))
        z_in, z_final_BHK1 = self.carry.diagonal(kept, sums, z_BHK1, bounds)
        eye = torch.eye(self.head_dim, dtype=M_BHKK.dtype, device=M_BHKK.device).expand(shape[0] * shape[1], -1, -1)
        transitions, updates = [], []
        for i, piece in enumerate(pieces):
            S_GKW, z_GK1 = torch.cat([torch.zeros_like(eye), eye], -1), z_in[i].flatten(0, 1)
            for (span, _), streams in zip(self.tiles(piece, bounds.ranges[i]), made[i], strict=True):
                S_GKW, z_GK1 = self.run(bounds, span, partial(self._carried_over, bounds, span), *streams[1:], z_GK1, S_GKW)
            update, transition = S_GKW.unflatten(0, shape).split(self.head_dim, -1)
            transitions.append(transition)
            updates.append(update)
        M_in, M_final_BHKK = self.carry.affine(transitions, updates, M_BHKK, bounds)
        outputs = []
        for i, piece in enumerate(pieces):
            tiles, state_GKW = [], torch.cat([M_in[i], z_in[i]], -1).flatten(0, 1)
            for (span, x), streams in zip(self.tiles(piece, bounds.ranges[i]), made[i], strict=True):
                y, state_GKW = self.run(bounds, span, partial(self._mixed, bounds, span), weights, x, state_GKW, *streams)
                tiles.append(y)
            outputs.append(torch.cat(tiles, dim=1))
        return outputs, torch.cat([M_final_BHKK, z_final_BHK1], -1)

    def _counted(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor, z_GK1: Tensor
    ) -> tuple[Tensor, ...]:
        """Of a tile: whether z is kept, z after it, and its streams."""
        streams = self.streams(bounds, span, weights, x_BTC, before_BnC)
        plan = plan_segments(bounds, span, self.segment, x_BTC.device)
        keep_NG11 = _kept(plan, self.n_heads, z_GK1.dtype)
        return keep_NG11.prod(0), states(_sums(plan, streams[1]), keep_NG11, z_GK1)[-1].clone(), *streams

    def _carried_over(
        self, bounds: Bounds, span: Range, k_BNcHK: Tensor, v_BNcHK: Tensor, z_GK1: Tensor, S_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[update | transition] and z after a tile, from those before it."""
        plan = plan_segments(bounds, span, self.segment, z_GK1.device)
        z_MGK1 = states(_sums(plan, k_BNcHK), _kept(plan, self.n_heads, z_GK1.dtype), z_GK1)
        return _corrected(plan, k_BNcHK, v_BNcHK, z_MGK1, S_GKW)[-1].clone(), z_MGK1[-1].clone()

    # --- twin and arithmetic ------------------------------------------------------------------------------------------------------

    def oracle_segment(self, x_DC: Tensor, a: int, b: int, memory_HKW: Tensor) -> tuple[Tensor, Tensor]:
        """See `SegmentedMixer.oracle_segment`."""
        K = self.head_dim
        q, k, v = (w(x_DC[a:b]).unflatten(-1, (self.n_heads, K)).transpose(0, 1) for w in (self.w_q, self.w_k, self.w_v))
        turned_q, turned_k = (self.rope(z[None], torch.arange(b - a)[None])[0] for z in (q, k))
        M, z, outputs = memory_HKW[..., :K], memory_HKW[..., K], []
        for t in range(b - a):
            p = torch.einsum("hk,hsk->hs", turned_q[:, t], turned_k[:, : t + 1] / K**0.5).softmax(-1)
            near = torch.einsum("hs,hsk->hk", p, v[:, : t + 1])
            sq = F.elu(q[:, t]) + 1
            far = torch.einsum("hk,hkv->hv", sq, M) / (torch.einsum("hk,hk->h", sq, z) + _EPS).unsqueeze(-1)
            g = self.gate.sigmoid().unsqueeze(-1)
            outputs.append(self.w_out((g * far + (1 - g) * near).flatten()))
        M_after, z_after = M, z
        for t in range(b - a):
            sk = F.elu(k[:, t]) + 1
            had = torch.einsum("hk,hkv->hv", sk, M) / (torch.einsum("hk,hk->h", sk, z) + _EPS).unsqueeze(-1)
            M_after = M_after + torch.einsum("hk,hv->hkv", sk, v[:, t] - had if self.delta else v[:, t])
            z_after = z_after + sk
        return torch.stack(outputs), torch.cat([M_after, z_after.unsqueeze(-1)], -1)

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`. With tiles only one tile's inside is alive; recomputation is not in ``flops_backward``."""
        H, K, c, d = self.n_heads, self.head_dim, min(self.segment, tokens), self.d_model
        split, n, wide = self.crosses, batch_size * tokens, max(itemsize, 4)
        tile = self.tile_tokens if 0 < self.tile_tokens < tokens else tokens
        projections, near = 8 * d * H * K, 2 * H * K * (c + 1)
        read, summed = 2 * H * K * (K + 1), 2 * H * K * (K + 1)
        if self.delta:
            summed = 2 * H * K * (2 * K + 1)
        across = 0
        if split:
            across = 2 * H * K * (4 * K + 1) if self.delta else summed
        streams = 3 * itemsize * H * K
        state = wide * H * K * (K + 1)
        # The rotated pair, what attention found and a statistic, what is projected; [M | z], with the delta rule M and z of it apart too,
        # and over ranks the transition beside.
        copies = (4 if split else 2) if self.delta else 1
        inside = itemsize * (d + 4 * H * K) + streams + wide * H + copies * state / c
        if self.tile_tokens and tile < tokens:
            tiles = -(-tokens // tile) * ((3 if self.delta else 2) if split else 1)  # states of its own width for every walk over them
            saved = n * (itemsize * d + (streams if split else 0)) + batch_size * (tiles * state + self.halo * d * itemsize)
            saved += self.head_bytes(n, itemsize)
        else:
            saved = n * inside + batch_size * state * (2 if split else 1)
        summaries = self.carry.summary_bytes(H * wide, H * K * wide if self.delta else state)
        if self.delta:
            summaries += self.carry.summary_bytes(H * K * K * wide, H * K * K * wide)
        return MemoryCost(
            flops_forward=n * (projections + near + read + summed + across),
            flops_backward=n * (2 * projections + 2.5 * near + 3 * (read + summed + across)),
            saved_bytes=int(saved),
            state_bytes=batch_size * (state + self.halo * d * itemsize),
            exchange_bytes=batch_size * (summaries + self.halo * d * itemsize) if split else self.head_bytes(n, itemsize),
        )


def _features(x: Tensor, dtype: torch.dtype) -> Tensor:
    return F.elu(x.to(dtype)) + 1


def _kept(plan: Segments, heads: int, dtype: torch.dtype) -> Tensor:
    """[N, G, 1, 1]: 0 where a document begins with a segment that ends here, else 1."""
    return (~(plan.fresh_BN & plan.whole_BN)).to(dtype).t().repeat_interleave(heads, 1)[..., None, None]


def _sums(plan: Segments, k_BNcHK: Tensor, v_BNcHK: Tensor | None = None) -> Tensor:
    """What every segment adds to [M | z], or without values to z alone; nothing where it does not end here. [N, G, K, W]"""
    counts = (plan.real_BNc & plan.whole_BN.unsqueeze(-1))[..., None, None]

    def fn(k: Tensor, *v: Tensor) -> tuple[Tensor]:
        dtype = state_dtype(k)
        features = _features(k, dtype) * counts
        ones = torch.ones_like(features[..., :1])
        values = torch.cat([v[0].to(dtype), ones], -1) if v else ones
        return (torch.einsum("bnchk,bnchw->nbhkw", features, values).flatten(1, 2),)

    return recomputed(fn, k_BNcHK, *(() if v_BNcHK is None else (v_BNcHK,)))[0]


def _corrected(plan: Segments, k_BNcHK: Tensor, v_BNcHK: Tensor, z_MGK1: Tensor, state_GKW: Tensor) -> Tensor:
    """The delta rule: the state before every segment and after the last, [N + 1, G, K, W].

    Columns behind the first K have no values to learn: with the identity in them, they become the transition.
    """
    found, heads = [state_GKW], k_BNcHK.shape[3]
    for n in range(plan.n_segments):
        masks = [x[:, n].repeat_interleave(heads, 0)[:, None, None] for x in (plan.fresh_BN, plan.whole_BN)]
        step = partial(_correct, plan.real_BNc[:, n, None], *masks)
        (after,) = recomputed(step, k_BNcHK[:, n], v_BNcHK[:, n], z_MGK1[n], found[-1])
        found.append(after)
    return torch.stack(found)


def _correct(
    real_B1c: Tensor, fresh_G11: Tensor, whole_G11: Tensor, k_BcHK: Tensor, v_BcHK: Tensor, z_GK1: Tensor, M_GKW: Tensor
) -> tuple[Tensor]:
    k_GcK = _features(k_BcHK, M_GKW.dtype).transpose(1, 2).masked_fill(~real_B1c.unsqueeze(-1), 0).flatten(0, 1)
    v_GcW = F.pad(v_BcHK.to(M_GKW.dtype).transpose(1, 2).flatten(0, 1), (0, M_GKW.shape[-1] - v_BcHK.shape[-1]))
    start, z = M_GKW.masked_fill(fresh_G11, 0), z_GK1.masked_fill(fresh_G11, 0)
    had_GcW = (k_GcK @ start) / (k_GcK @ z + _EPS)
    return (torch.where(whole_G11, start + k_GcK.mT @ (v_GcW - had_GcW), M_GKW),)


def _read(fresh_BN: Tensor, dtype: torch.dtype, q_BNcHK: Tensor, states_MGKW: Tensor, near_BNcHK: Tensor, gate_H: Tensor) -> tuple[Tensor]:
    """What attention and memory found, gated."""
    B, _, _, H, K = q_BNcHK.shape
    at_start = states_MGKW[:-1].unflatten(1, (B, H)).masked_fill(fresh_BN.t()[..., None, None, None], 0)
    read = torch.einsum("bnchk,nbhkw->bnchw", _features(q_BNcHK, at_start.dtype), at_start)
    far = read[..., :K] / (read[..., K:] + _EPS)
    g_H1 = gate_H.sigmoid().unsqueeze(-1)
    return ((g_H1 * far + (1 - g_H1) * near_BNcHK.to(far.dtype)).to(dtype),)


def build(config: ModelConfig) -> InfiniAttention:
    """The module that ``config.memory`` describes (see `models.memory.protocol.build_memory`)."""
    own = config.memory.infini
    return InfiniAttention(config.d_model, config.memory_heads, config.memory_key_dim, own.segment, own.delta, config.rope)
