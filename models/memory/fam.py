"""TransformerFAM (arXiv 2404.09173): attention over blocks, and feedback memory that each layer's attention writes for its next block.

    block queries see    their block up to themselves, the ``memory_blocks`` blocks before, and the feedback F of the block before
    F' = F + W_o attention(q(F); [k(F), v(F) | k(x), v(x) of the block])          F is read by RMSNorm, without weights
    y = W_o of what the block's queries found

Feedback uses the layer's own projections: the model has no weights beside an ordinary layer's, except the feedback that a document begins
with. Left unspecified by the summary that this follows: a residual and a norm on the way from block to block (without them the values of
thousands of blocks are products of thousands of W_o), rotary positions (places in the window; feedback has none, and is compared with
queries before rotation), the first feedback (learned, as RMSNorm of b). Here the feedback passes attention, not the feed-forward.

Legend: B row, T token, C channel and size of a feedback vector, H head, K head size, A = H K, N block, c token in block, m feedback
vector, w key in the window of blocks.
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
from models.memory.protocol import MemoryCost
from models.memory.recurrent import Streams, state_dtype
from models.memory.segments import Segments
from models.memory.sequential import SequentialMixer
from models.recomputed import recomputed
from models.rope import Rope, rotate


class _Weights(NamedTuple):
    """The parameters in the dtype in which their gradients add up over tiles; those of rewriting in that of states."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_out: Tensor
    rewriting: tuple[Tensor, ...]


class FeedbackAttention(SequentialMixer):
    """One mixer. Parameters: four projections, and the feedback that a document begins with."""

    def __init__(
        self, d_model: int, n_heads: int, head_dim: int, n_feedback: int, block: int, memory_blocks: int, rope: RopeConfig, norm_eps: float
    ) -> None:
        super().__init__(d_model, n_feedback, block, memory_blocks)
        self.n_heads, self.head_dim, self.norm_eps = n_heads, head_dim, norm_eps
        self.w_q = Linear(d_model, n_heads * head_dim)
        self.w_k = Linear(d_model, n_heads * head_dim)
        self.w_v = Linear(d_model, n_heads * head_dim)
        self.w_out = Linear(n_heads * head_dim, d_model)
        self.feedback = nn.Parameter(torch.empty(n_feedback, d_model))
        self.rope = Rope(rope, head_dim)

    @property
    def anchor(self) -> Tensor:
        """See `SequentialMixer.anchor`."""
        return self.feedback

    def weights(self) -> _Weights:
        """See `RecurrentMixer.weights`."""
        projections = [p.weight for p in (self.w_q, self.w_k, self.w_v, self.w_out)]
        rewriting = (self.feedback.to(state_dtype(self.feedback)), *self.widened(projections))
        return _Weights(*self.wide(projections), rewriting=rewriting)

    # --- a tile -------------------------------------------------------------------------------------------------------------------

    def streams(self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor) -> Streams:
        """See `SequentialMixer.streams`: keys and values [B, N, c, H, K], those of blocks before the range first."""
        plan, x = self.segments(bounds, span, x_BTC, before_BnC)
        return tuple(plan.deal(linear(x, w)).unflatten(-1, (self.n_heads, -1)) for w in (weights.w_k, weights.w_v))

    def rewrite(self, plan: Segments, n: int, weights: _Weights, state_BmD: Tensor, streams: Streams) -> Tensor:
        """See `SequentialMixer.rewrite`."""
        fn = partial(_fed_back, self.norm_eps, plan.real_BNc[:, n])
        return recomputed(fn, state_BmD, *(stream[:, n] for stream in streams), *weights.rewriting)[0]

    def read(
        self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, before_BnC: Tensor, at_start_BNmD: Tensor, *streams: Tensor
    ) -> Tensor:
        """See `SequentialMixer.read`."""
        plan, x = self.segments(bounds, span, x_BTC, before_BnC)
        (begun_BNmD,) = recomputed(partial(_begun, self.norm_eps), at_start_BNmD, weights.rewriting[0])
        begun_BNmD = begun_BNmD.to(compute_dtype(x))
        q_BNcHK = plan.deal(linear(x, weights.w_q)).unflatten(-1, (self.n_heads, -1))
        fed = (linear(begun_BNmD, w).unflatten(-1, (self.n_heads, -1)) for w in (weights.w_k, weights.w_v))
        keys = (1 + self.lead) * self.segment
        table = self.rope.table(torch.arange(keys, device=x.device)[None], state_dtype(x))
        fn = partial(_seen, _visible(plan, self.lead), plan.lead, self.lead, table, compute_dtype(x))
        (o_BNcA,) = recomputed(fn, q_BNcHK, *streams, *fed)
        return linear(plan.collect(o_BNcA), weights.w_out)

    # --- twin and arithmetic ------------------------------------------------------------------------------------------------------

    def oracle_segment(self, x_DC: Tensor, a: int, b: int, memory_HKW: Tensor) -> tuple[Tensor, Tensor]:
        """See `SegmentedMixer.oracle_segment`."""
        begun = memory_HKW[0] + self.feedback
        begun = begun * (begun.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()

        def heads(z: Tensor) -> Tensor:
            return z.unflatten(-1, (self.n_heads, self.head_dim))

        def turned(z_tHK: Tensor, first: int) -> Tensor:
            return self.rope(z_tHK.transpose(0, 1)[None], first + torch.arange(len(z_tHK))[None])[0].transpose(0, 1)

        low = max(0, a - self.lead * self.segment)
        fed_k, fed_v = heads(self.w_k(begun)), heads(self.w_v(begun))
        outputs = []
        for t in range(a, b):
            q, k, v = heads(self.w_q(x_DC[t : t + 1])), heads(self.w_k(x_DC[low : t + 1])), heads(self.w_v(x_DC[low : t + 1]))
            near = torch.einsum("hk,whk->hw", turned(q, t)[0], turned(k, low))
            far = torch.einsum("hk,mhk->hm", q[0], fed_k)
            p = (torch.cat([far, near], -1) / self.head_dim**0.5).softmax(-1)
            outputs.append(self.w_out(torch.einsum("hw,whk->hk", p, torch.cat([fed_v, v])).flatten()))
        k, v = torch.cat([fed_k, heads(self.w_k(x_DC[a:b]))]), torch.cat([fed_v, heads(self.w_v(x_DC[a:b]))])
        p = (torch.einsum("mhk,whk->mhw", heads(self.w_q(begun)), k) / self.head_dim**0.5).softmax(-1)
        after = begun + self.w_out(torch.einsum("mhw,whk->mhk", p, v).flatten(1))
        return torch.stack(outputs), after[None]

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`. With tiles only one tile's inside is alive; recomputation is not in ``flops_backward``."""
        A, m, c, d = self.n_heads * self.head_dim, self.n_vectors, min(self.segment, tokens), self.d_model
        split, n, wide = not self.carry.local, batch_size * tokens, max(itemsize, 4)
        segments, tiles = batch_size * -(-tokens // c), 1
        if self.tile_tokens and self.tile_tokens < tokens:
            tiles = -(-tokens // self.tile_tokens)
        again = batch_size * (tiles - 1) * self.lead * self.segment  # tokens before a tile, projected again
        projections = 6 * d * A * (n + again) + 2 * d * A * n
        near = 4 * A * ((1 + self.lead) * self.segment + m)  # per token
        fed = 4 * m * d * A  # per block, keys and values
        rewriting = 8 * m * d * A + 4 * m * (c + m) * A
        state = m * d * wide
        # Inputs; q, k, v; what was found. Per block: feedback as it is handed on, all of it together, what is read of it, keys and values.
        streams = 2 * itemsize * A
        inside = itemsize * (d + 4 * A)
        per_segment = 3 * state + 2 * m * A * itemsize
        if tiles > 1:
            kept = (n + again) * streams + segments * state if split else 0
            saved = n * itemsize * d + batch_size * (tiles * state + self.halo * d * itemsize) + kept
        else:
            saved = n * inside + segments * per_segment
        return MemoryCost(
            flops_forward=projections + n * near + segments * (fed + rewriting),
            flops_backward=2 * projections + 3 * n * near + segments * (2 * fed + 3 * rewriting),
            saved_bytes=int(saved),
            state_bytes=batch_size * (state + self.halo * d * itemsize),
            exchange_bytes=batch_size * (state + self.halo * d * itemsize) if split else 0,
        )


def _begun(eps: float, feedback: Tensor, first_mD: Tensor) -> tuple[Tensor]:
    """Feedback as it is read."""
    x = feedback + first_mD
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt(),)


def _visible(plan: Segments, wanted: int) -> Tensor:
    """[B, N, 1, c, w]: keys of the window that each query sees. Blocks before its own are whole."""
    c = plan.real_BNc.shape[-1]
    place_BN = plan.place_BN[:, plan.lead :]
    back = torch.arange(wanted, 0, -1, device=place_BN.device) * c
    before_BNw = (place_BN.unsqueeze(-1) >= back).repeat_interleave(c, -1)
    own_cc = torch.ones(c, c, dtype=torch.bool, device=place_BN.device).tril()
    shape = (*place_BN.shape, c, -1)
    return torch.cat([before_BNw.unsqueeze(2).expand(*shape), own_cc.expand(*place_BN.shape, c, c)], -1).unsqueeze(2)


def _window(x_BNcHK: Tensor, lead: int, wanted: int) -> Tensor:
    """[B, N, H, w, K]: every block with the ``wanted`` ones before it; ``lead`` of the N + lead blocks are before the first."""
    x = F.pad(x_BNcHK, (0, 0, 0, 0, 0, 0, wanted - lead, 0))
    n = x.shape[1] - wanted
    return torch.cat([x[:, i : i + n] for i in range(wanted + 1)], 2).transpose(2, 3)


def _seen(
    visible_BN1cw: Tensor,
    lead: int,
    wanted: int,
    table: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    q_BNcHK: Tensor,
    k_BNcHK: Tensor,
    v_BNcHK: Tensor,
    fed_k_BNmHK: Tensor,
    fed_v_BNmHK: Tensor,
) -> tuple[Tensor]:
    """What the queries of every block find in their window and in the feedback, [B, N + lead, c, A]; 0 for blocks before the range."""
    cos, sin = (x.to(table[0].dtype) for x in table)
    c = q_BNcHK.shape[2]
    q = q_BNcHK[:, lead:].to(cos.dtype).transpose(2, 3)
    k, v = (_window(x.to(cos.dtype), lead, wanted) for x in (k_BNcHK, v_BNcHK))
    fed_k, fed_v = (x.to(cos.dtype).transpose(2, 3) for x in (fed_k_BNmHK, fed_v_BNmHK))
    turned = rotate(q.flatten(0, 1), cos[:, :, -c:], sin[:, :, -c:]).unflatten(0, q.shape[:2])
    near = turned @ rotate(k.flatten(0, 1), cos, sin).unflatten(0, k.shape[:2]).mT
    near = near.masked_fill(~visible_BN1cw, torch.finfo(near.dtype).min)
    p = (torch.cat([q @ fed_k.mT, near], -1) / q.shape[-1] ** 0.5).softmax(-1)
    m = fed_k.shape[-2]
    o = p[..., :m] @ fed_v + p[..., m:] @ v
    return (F.pad(o.transpose(2, 3).flatten(3).to(dtype), (0, 0, 0, 0, lead, 0)),)


def _fed_back(
    eps: float,
    real_Bc: Tensor,
    feedback: Tensor,
    k_BcHK: Tensor,
    v_BcHK: Tensor,
    first: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_out: Tensor,
) -> tuple[Tensor]:
    """The feedback after a block."""
    (begun,) = _begun(eps, feedback, first)
    heads = k_BcHK.shape[-2:]
    q, own_k, own_v = (F.linear(begun, w).unflatten(-1, heads) for w in (w_q, w_k, w_v))
    k, v = torch.cat([own_k, k_BcHK.to(begun.dtype)], 1), torch.cat([own_v, v_BcHK.to(begun.dtype)], 1)
    hidden = ~F.pad(real_Bc, (own_k.shape[1], 0), value=True)[:, None, None]
    scores = torch.einsum("bmhk,bwhk->bhmw", q, k) / heads[1] ** 0.5
    p = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return (begun + F.linear(torch.einsum("bhmw,bwhk->bmhk", p, v).flatten(2), w_out),)


def build(config: ModelConfig) -> FeedbackAttention:
    """The module that ``config.memory`` describes (see `models.memory.protocol.build_memory`)."""
    own = config.memory.fam
    heads = (config.memory_heads, config.memory_key_dim)
    return FeedbackAttention(config.d_model, *heads, own.n_feedback, own.block, own.memory_blocks, config.rope, config.norm_eps)
