"""Attention with documents, prefixes and an optional sliding window, as a sum over blocks, and the layer around it.

``attend`` and ``attend_backward`` run a plan (models/attention_plan.py) over the kernels of models/kernels.py and merge the
blocks in float32; parallel/ring_attention.py uses them too, block after block as keys arrive. ``LocalAttention`` is the
single-device form, ``Attention`` the layer, whose seam ``inner_attention`` is what parallel replaces.

Legend: B batch row, H query heads, G key/value heads, T queries, S keys, D head size, C width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from models.attention_plan import DEFAULT_LIMITS, NATIVE_BAND_LIMITS, Pair, RowTiles, Tile, TileLimits, plan_rows, plan_tiles
from models.batch import Bounds
from models.block import CAUSAL, NONE, BlockMask, Gradients
from models.config import RopeConfig
from models.feedforward import RMSNorm
from models.kernels import block_attention, block_attention_backward, block_attention_reference, block_of, has_native_band
from models.linear import Linear
from models.rope import Rope, rotate
from models.tokens import ALL_TOKENS, Tokens

__all__ = ["Attention", "LocalAttention", "attend", "attend_backward", "attention_reference", "calls_of", "plan_tiles"]

InnerAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Bounds], torch.Tensor]
"""(q_BHTD after rope, k_BGTD after rope, v_BGTD, bounds) -> out_BHTD"""
Plan = tuple[RowTiles, ...]


class KernelCall(NamedTuple):
    """What every kernel call of an attention is told."""

    kernel: str = "auto"
    """A name of ``models.kernels``; ``auto``: the first that takes the block."""
    scale: float | None = None
    """Factor of the scores; None: 1/sqrt(head size)."""


DEFAULT_CALL = KernelCall()
NOTHING_SEEN = -1e30
"""Log-sum-exp of no keys, for ``merge``: exp of its distance to any other is 0 or infinite."""


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions.

    Args:
        d_model: width of the residual stream.
        n_heads, n_kv_heads, head_dim: query heads, key/value heads (a divisor), size of a head.
        window: tokens a query sees, its own included; None for all before it.
        rope: settings of the rotary embedding.
        qkv_bias: add a bias to the projections of query, key and value.
        qk_norm_eps: normalise every head's query and key by RMSNorm before the rotation, with this epsilon; None: do not.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        window: int | None,
        rope: RopeConfig,
        qkv_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        if n_heads % n_kv_heads:
            raise ValueError(f"model.n_heads {n_heads} is not a multiple of model.n_kv_heads {n_kv_heads}")
        self.head_dim = head_dim
        self.window = window
        self.wq = Linear(d_model, n_heads * head_dim, qkv_bias)
        self.wk = Linear(d_model, n_kv_heads * head_dim, qkv_bias)
        self.wv = Linear(d_model, n_kv_heads * head_dim, qkv_bias)
        self.wo = Linear(n_heads * head_dim, d_model)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.rope = Rope(rope, head_dim)
        self.inner_attention: InnerAttention = LocalAttention(window)
        self.tokens: Tokens = ALL_TOKENS

    def forward(self, x_BTC: torch.Tensor, positions_BT: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]; ``positions_BT`` count from the start of each document. x and what is returned are the tokens that
        ``tokens`` leaves to this rank, everything between and ``positions`` all of its group's."""
        q_BHTD, k_BGTD, v_BGTD = self.project(self.tokens.gathered(x_BTC))
        cos_sin = self.rope_table(positions_BT, q_BHTD.dtype, bounds)
        k_BGTD = rotate(k_BGTD, *cos_sin)
        k_BGTD, v_BGTD = self.keys_leave(k_BGTD, v_BGTD, bounds)
        out_BHTD = self.inner_attention(rotate(q_BHTD, *cos_sin), k_BGTD, v_BGTD, bounds)
        return self.tokens.summed(self.wo(out_BHTD.transpose(1, 2).flatten(2)))

    def keys_leave(self, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as ``inner_attention`` wants them: themselves, or where it reads them from host memory
        (parallel/host_keys.py) stand-ins, so that the memory of the given ones is free when the caller lets go of them."""
        leave = getattr(self.inner_attention, "leave", None)
        return (k_BGTD, v_BGTD) if leave is None else leave(k_BGTD, v_BGTD, bounds)

    def project(self, x_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q_BHTD, k_BGTD, v_BGTD) of these tokens before rope: views of [B, T, heads, D]."""
        q_BHTD, k_BGTD = self._heads(x_BTC, self.wq, self.q_norm), self._heads(x_BTC, self.wk, self.k_norm)
        return q_BHTD, k_BGTD, self._heads(x_BTC, self.wv, None)

    def keys(self, x_BTC: torch.Tensor, positions_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(k_BGTD after rope, v_BGTD) of these tokens alone."""
        return self.rope(self._heads(x_BTC, self.wk, self.k_norm), positions_BT), self._heads(x_BTC, self.wv, None)

    def _heads(self, x_BTC: torch.Tensor, project: Linear, norm: RMSNorm | None) -> torch.Tensor:
        y_BTHD = project(x_BTC).unflatten(-1, (-1, self.head_dim))
        return (y_BTHD if norm is None else norm(y_BTHD)).transpose(1, 2)  # [B, T, heads, D] -> [B, heads, T, D], a view

    def rope_table(self, positions_BT: torch.Tensor, dtype: torch.dtype, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """The table of this micro-step, computed by the first layer that asks and shared by all layers with the same rotation."""
        key = ("rope", dtype, *self.rope.frequencies, self.rope.temperature)
        cached = bounds._cache.get(key)
        if cached is None or cached[0] is not positions_BT:
            cached = bounds._cache[key] = (positions_BT, self.rope.table(positions_BT, dtype))
        return cached[1]


class LocalAttention:
    """Attention of a whole sequence on one device: ``(q_BHTD, k_BGTD, v_BGTD, bounds) -> out_BHTD``, differentiable.

    ``window``: tokens a query sees, its own included; None for all before it. ``call``: what the kernels are told. ``keys_dtype``: keys
    and values are rounded to it first, as where they travel in it (parallel/comm_dtypes.py).
    """

    def __init__(self, window: int | None, call: KernelCall = DEFAULT_CALL, keys_dtype: torch.dtype | None = None) -> None:
        self.window, self.call, self.keys_dtype = window, call, keys_dtype

    def __call__(self, q_BHTD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        if bounds.ranges != ((0, bounds.seq_len),):
            raise ValueError(
                f"LocalAttention got ranges {bounds.ranges} of {bounds.seq_len} tokens; with parallel.cp > 1 use RingAttention"
            )
        check_shapes(q_BHTD, k_BGTD, bounds)
        limits = tile_limits(q_BHTD, self.window, self.call)
        key = ("local attention", self.window, limits)
        plan = bounds._cache.get(key)
        if plan is None:
            whole = (0, bounds.seq_len)
            plan = bounds._cache[key] = plan_rows(bounds.documents, [Pair(whole, 0, whole, 0)], self.window, limits, bounds.prefixes)
        return attended(q_BHTD, k_BGTD, v_BGTD, plan, self.keys_dtype)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHTD, k_BGTD, v_BGTD, plan, keys_dtype):
        out_BHTD, lse_BHT = attend_all(q_BHTD, *_rounded(k_BGTD, v_BGTD, keys_dtype), plan)
        ctx.plan, ctx.keys_dtype = plan, keys_dtype
        ctx.save_for_backward(q_BHTD, k_BGTD, v_BGTD, out_BHTD, lse_BHT)
        return out_BHTD

    @staticmethod
    def backward(ctx, dout_BHTD):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_BHTD, k_BGTD, v_BGTD, out_BHTD, lse_BHT = ctx.saved_tensors
        grads = attend_all_backward(dout_BHTD, q_BHTD, *_rounded(k_BGTD, v_BGTD, ctx.keys_dtype), out_BHTD, lse_BHT, ctx.plan)
        return *(grad.to(dout_BHTD.dtype) for grad in grads), None, None


def attended(
    q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, plan: Plan, keys_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """out_BHTD of `attend_all`, differentiable; ``keys_dtype`` as in `LocalAttention`."""
    return _TiledAttention.apply(q_BHTD, k_BGSD, v_BGSD, plan, keys_dtype)  # pyright: ignore[reportReturnType]


def _rounded(k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with the bits of ``dtype`` only."""
    return (k_BGSD, v_BGSD) if dtype is None else (k_BGSD.to(dtype).to(k_BGSD.dtype), v_BGSD.to(dtype).to(v_BGSD.dtype))


def attend_all(q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out_BHTD in q's dtype, lse_BHT)`` of a plan that holds all blocks of these queries; a single block is not copied."""
    only = _only_tile(plan, q_BHTD, k_BGSD)
    if only is not None:
        return block_attention(q_BHTD, k_BGSD, v_BGSD, tile_mask(only, q_BHTD.device), plan[0].scale, plan[0].kernel)
    out_BHTD, lse_BHT = new_accumulators(q_BHTD)
    attend(q_BHTD, k_BGSD, v_BGSD, plan, out_BHTD, lse_BHT)
    return out_BHTD.to(q_BHTD.dtype), lse_BHT


def attend_all_backward(
    dout_BHTD: torch.Tensor,
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    out_BHTD: torch.Tensor,
    lse_BHT: torch.Tensor,
    plan: Plan,
) -> Gradients:
    """``(dq, dk, dv)`` for what ``attend_all`` gave: float32 sums (float64 for float64), or q's dtype where one block was all."""
    only = _only_tile(plan, q_BHTD, k_BGSD)
    if only is not None:
        mask = tile_mask(only, q_BHTD.device)
        return block_attention_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, mask, plan[0].scale, plan[0].kernel)
    dq_BHTD, dk_BGSD, dv_BGSD = (new_gradient(x) for x in (q_BHTD, k_BGSD, v_BGSD))
    attend_backward(dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, plan, dq_BHTD, lambda: (dk_BGSD, dv_BGSD))
    return dq_BHTD, dk_BGSD, dv_BGSD


def attend(
    q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, plan: Plan, out_acc_BHTD: torch.Tensor, lse_acc_BHT: torch.Tensor
) -> None:
    """Merge the blocks of ``plan`` into the accumulators (``new_accumulators``), in place.

    The plan with every query's own token must run first: its blocks overwrite, all others merge. Plans in another order have no block
    that is marked ``own`` and begin with ``empty_accumulators``.
    """
    for rows, tile, how in _calls(plan, q_BHTD.device):
        q, out_acc, lse_acc = q_BHTD[rows], out_acc_BHTD[rows], lse_acc_BHT[rows]
        q_block, k_block, v_block = _stack_q(q, tile), _stack_k(k_BGSD[rows], tile), _stack_k(v_BGSD[rows], tile)
        out, lse = block_attention(q_block, k_block, v_block, *how)
        if tile.own:
            _unstack(out_acc, tile).copy_(out.unflatten(0, (-1, tile.count)))
            _unstack(lse_acc, tile).copy_(lse.unflatten(0, (-1, tile.count)))
        else:
            out, lse = (x.unflatten(0, (-1, tile.count)) for x in (out, lse))
            merge(_unstack(out_acc, tile), _unstack(lse_acc, tile), out, lse)


def calls_of(plan: Plan) -> int:
    """How many calls of a kernel a plan is."""
    return sum(len(group.tiles) for group in plan)


def merge(out_acc_BHTD: torch.Tensor, lse_acc_BHT: torch.Tensor, out_BHTD: torch.Tensor, lse_BHT: torch.Tensor) -> None:
    """Add one more block of keys to an accumulated softmax, in place; ``lse_acc`` is finite, ``lse`` may be -inf (no effect)."""
    weight_BHT1 = torch.sigmoid(lse_BHT - lse_acc_BHT).unsqueeze(-1)
    out_acc_BHTD.lerp_(out_BHTD.to(out_acc_BHTD.dtype), weight_BHT1)
    lse_acc_BHT.copy_(torch.logaddexp(lse_acc_BHT, lse_BHT))


def attend_backward(
    dout_BHTD: torch.Tensor,
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    out_BHTD: torch.Tensor,
    lse_BHT: torch.Tensor,
    plan: Plan,
    dq_acc_BHTD: torch.Tensor,
    dkv_acc: Callable[[], Sequence[torch.Tensor]],
) -> None:
    """Add the gradients of the blocks of ``plan`` to the accumulators, in place.

    ``out`` (in q's dtype) and ``lse`` are the merged ones, over all plans of these queries. ``dkv_acc`` gives (dk, dv) when the first of
    them is to be added to: after the kernel's call, if there is one only (``calls_of``).
    """
    for rows, tile, how in _calls(plan, q_BHTD.device):
        k_block, v_block = _stack_k(k_BGSD[rows], tile), _stack_k(v_BGSD[rows], tile)
        dout, q, out, lse = (_stack_q(x[rows], tile) for x in (dout_BHTD, q_BHTD, out_BHTD, lse_BHT))
        dq, dk, dv = block_attention_backward(dout, q, k_block, v_block, out, lse, *how)
        _unstack(dq_acc_BHTD[rows], tile).add_(dq.unflatten(0, (-1, tile.count)))
        dk_acc_BGSD, dv_acc_BGSD = dkv_acc()
        _add_overlapping(dk_acc_BGSD[rows], dk, tile)
        _add_overlapping(dv_acc_BGSD[rows], dv, tile)


def new_accumulators(q_BHTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised (out, lse) for ``attend``, float32 (float64 for float64)."""
    dtype = torch.promote_types(q_BHTD.dtype, torch.float32)
    return torch.empty_like(q_BHTD, dtype=dtype), torch.empty(q_BHTD.shape[:3], dtype=dtype, device=q_BHTD.device)


def empty_accumulators(q_BHTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of queries that have seen no key yet: lse so small that the first block merged counts alone, and finite."""
    out_BHTD, lse_BHT = new_accumulators(q_BHTD)
    return out_BHTD.zero_(), lse_BHT.fill_(NOTHING_SEEN)


def new_gradient(x: torch.Tensor) -> torch.Tensor:
    """Zeros to add gradients of ``x`` to, float32 (float64 for float64)."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def tile_limits(q_BHTD: torch.Tensor, window: int | None, call: KernelCall = DEFAULT_CALL) -> TileLimits:
    """How to cut a window on this device: small masked blocks, or one call where the kernel skips what a band hides."""
    native = window is not None and has_native_band(block_of(q_BHTD), call.kernel)
    return (NATIVE_BAND_LIMITS if native else DEFAULT_LIMITS)._replace(kernel=call.kernel, scale=call.scale)


def tile_mask(tile: Tile, device: torch.device) -> BlockMask:
    """The mask of a tile as the kernels take it."""
    if tile.kind == "none":
        return NONE
    if tile.kind == "causal":
        return CAUSAL
    if tile.kind == "band":
        return BlockMask.band(tile.low, tile.high)
    index_T = torch.arange(tile.q_len, device=device)
    document_T = torch.bucketize(index_T, torch.tensor(tile.starts, device=device), right=True)
    distance_TT = index_T[:, None] - index_T
    shown_TT = distance_TT >= 0
    if tile.prefix_ends:
        shown_TT |= index_T < torch.tensor(tile.prefix_ends, device=device)[document_T - 1]
    visible_TT = (document_T[:, None] == document_T) & shown_TT
    if tile.high is not None:
        visible_TT &= distance_TT.abs() <= tile.high
    return BlockMask.dense(visible_TT, no_empty_rows=True)


def check_shapes(q_BHTD: torch.Tensor, k_BGTD: torch.Tensor, bounds: Bounds) -> None:
    """Raise ValueError unless q and k hold the tokens and rows that ``bounds`` describes."""
    rows, tokens = len(bounds.documents), bounds.local_len
    if not (q_BHTD.shape[0] == k_BGTD.shape[0] == rows and q_BHTD.shape[2] == k_BGTD.shape[2] == tokens):
        raise ValueError(f"q {tuple(q_BHTD.shape)} and k {tuple(k_BGTD.shape)} do not hold the {rows} rows of {tokens} tokens in bounds")


def attention_reference(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    documents: Sequence[Sequence[int]],
    window: int | None,
    prefixes: Sequence[Sequence[int]] = (),
    scale: float | None = None,
) -> torch.Tensor:
    """The readable twin of attention on a whole sequence: one explicit mask in global coordinates, float64, differentiable."""
    index_T = torch.arange(q_BHTD.shape[2], device=q_BHTD.device)
    distance_TT = index_T[:, None] - index_T
    near_TT = distance_TT.abs() < (window or q_BHTD.shape[2])
    visible = []
    for starts, ends in zip(documents, prefixes or documents, strict=True):
        document_T = (index_T[:, None] >= torch.tensor(list(starts), device=q_BHTD.device)).sum(1)
        in_prefix_T = index_T < torch.tensor(list(ends), device=q_BHTD.device)[document_T - 1]
        visible.append(near_TT & (document_T[:, None] == document_T) & ((distance_TT >= 0) | in_prefix_T))
    return block_attention_reference(q_BHTD, k_BGTD, v_BGTD, BlockMask.dense(torch.stack(visible).unsqueeze(1)), scale)[0]


def _only_tile(plan: Plan, q_BHTD: torch.Tensor, k_BGSD: torch.Tensor) -> Tile | None:
    """The tile, if a single unstacked one covers all rows and tokens, so that nothing needs merging."""
    if len(plan) != 1 or len(plan[0].tiles) != 1:
        return None
    tile = plan[0].tiles[0]
    covers_all = (plan[0].first, plan[0].last, tile.q_len, tile.k_len) == (0, q_BHTD.shape[0], q_BHTD.shape[2], k_BGSD.shape[2])
    return tile if covers_all and tile.count == 1 else None


def _calls(plan: Plan, device: torch.device) -> Iterator[tuple[slice, Tile, tuple[BlockMask, float | None, str]]]:
    """(batch rows, tile, what the kernel is told: mask, scale, kernel) of every call."""
    for group in plan:
        rows = slice(group.first, group.last)
        for tile in group.tiles:
            yield rows, tile, (tile_mask(tile, device), group.scale, group.kernel)


def _stack_q(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """[B, H, T, ...] -> [B * count, H, q_len, ...]; a view for one row or one block."""
    return _stack(x, tile.q_start, tile.q_len, tile)


def _stack_k(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """[B, G, S, D] -> [B * count, G, k_len, D]; blocks may overlap."""
    return _stack(x, tile.k_start, tile.k_len, tile)


def _stack(x: torch.Tensor, start: int, length: int, tile: Tile) -> torch.Tensor:
    if tile.count == 1:
        return x.narrow(2, start, length)
    blocks = x.narrow(2, start, (tile.count - 1) * tile.step + length).unfold(2, length, tile.step)
    # [B, H, count, (D,) length] -> [B, count, H, length, (D)] -> [B * count, H, length, (D)]
    blocks = blocks.transpose(1, 2) if x.ndim == 3 else blocks.permute(0, 2, 1, 4, 3)
    return blocks.flatten(0, 1)


def _unstack(acc: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The part of [B, H, T, ...] that a tile's queries occupy, as a view [B, count, H, q_len, ...]."""
    part = acc.narrow(2, tile.q_start, tile.count * tile.q_len)
    return part.unflatten(2, (tile.count, tile.q_len)).transpose(1, 2)


def _add_overlapping(acc_BGSD: torch.Tensor, grad_NGSD: torch.Tensor, tile: Tile) -> None:
    """Add [B * count, G, k_len, D] to the key positions of a tile's blocks, which may overlap."""
    grad_BNGSD = grad_NGSD.unflatten(0, (-1, tile.count))
    pieces = -(-tile.k_len // tile.step) if tile.step else tile.count
    if tile.count <= pieces:
        for i in range(tile.count):
            acc_BGSD.narrow(2, tile.k_start + i * tile.step, tile.k_len).add_(grad_BNGSD[:, i])
        return
    # The p-th stretch of ``step`` keys of every block: these do not overlap, so that one strided add takes all blocks.
    for p in range(pieces):
        length = min(tile.step, tile.k_len - p * tile.step)
        covered = acc_BGSD.narrow(2, tile.k_start + p * tile.step, (tile.count - 1) * tile.step + length).unfold(2, length, tile.step)
        # [B, G, count, D, length] -> [B, count, G, length, D]
        covered.permute(0, 2, 1, 4, 3).add_(grad_BNGSD[:, :, :, p * tile.step : p * tile.step + length])
