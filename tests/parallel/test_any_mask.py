"""Masks with no rule behind them, under the scheme that gathers keys: out and gradients of dense float64 attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.block import BlockMask
from models.kernels import block_attention_reference
from parallel import visible
from parallel.allgather_kv import allgather_kv_attention
from parallel.sequence import shard_sequence, unshard_sequence
from tests.parallel.simulated import run_simulated

TOKENS, DIM = 48, 8


def _whole(rows: int, heads: tuple[int, int], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v, dout [2, T, heads, D], and a mask of which some queries see nothing, some keys are seen by none."""
    generator = torch.Generator().manual_seed(31)
    tensors = [torch.randn(2, TOKENS, n, DIM, dtype=torch.float64, generator=generator).to(dtype) for n in (*heads, heads[1], heads[0])]
    mask = torch.rand(rows, TOKENS, TOKENS, generator=generator) < 0.4
    mask[:, 7:20] = False
    mask[:, :, 30] = False
    return tensors, mask


def _on_a_rank(dist: Any, tensors: list[torch.Tensor], mask: torch.Tensor, layout: Any, options: dict) -> list[torch.Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    q, k, v = (shard_sequence(x, 1, rank, size, layout).clone().requires_grad_() for x in tensors[:3])
    out = allgather_kv_attention(q, k, v, group=None, layout=layout, mask=shard_sequence(mask, 1, rank, size, layout), **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), shard_sequence(tensors[3], 1, rank, size, layout))]


@pytest.mark.parametrize(
    ("cp", "layout", "rows", "heads", "dtype", "limit", "options"),
    [
        (1, "zigzag", 2, (4, 2), torch.float64, 1e-12, {}),
        (2, "zigzag", 1, (4, 2), torch.float64, 1e-12, {"head_chunk": 2, "scale": 0.3}),
        (3, "contiguous", 2, (7, 1), torch.float64, 1e-12, {"kernel": "plain"}),
        (4, "zigzag", 2, (6, 3), torch.float32, 1e-5, {"head_chunk": 2}),
        (4, "contiguous", 1, (4, 4), torch.float64, 1e-12, {"kv_dtype": "bf16"}),
        (1, "zigzag", 1, (4, 4), torch.float64, 1e-12, {"kv_dtype": "bf16"}),
    ],
)
def test_any_mask_equals_dense_float64(monkeypatch, cp, layout, rows, heads, dtype, limit, options) -> None:
    monkeypatch.setattr(visible, "TILE", 5)
    tensors, mask = _whole(rows, heads, dtype)
    read = [x.bfloat16() if "kv_dtype" in options and i in (1, 2) else x for i, x in enumerate(tensors)]
    leaves = [x.double().transpose(1, 2).clone().requires_grad_() for x in read[:3]]
    out, _ = block_attention_reference(*leaves, BlockMask.dense(mask[:, None]), options.get("scale"))
    wanted = [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].double().transpose(1, 2))]
    shards = run_simulated(monkeypatch, _on_a_rank, cp, tensors, mask, layout, options)
    for parts, exact in zip(zip(*shards, strict=True), wanted, strict=True):
        got = unshard_sequence(list(parts), 1, layout).double().transpose(1, 2)
        assert float((got - exact).norm() / exact.norm()) < limit
        assert (got[:, :, 7:20] == 0).all() or exact is not wanted[0], "what sees nothing is 0"


@pytest.mark.parametrize(
    ("mask", "others", "text"),
    [
        (torch.ones(1, 4, 4), {}, r"mask must be booleans \[B or 1, T/cp, T\], not torch.float32"),
        (torch.ones(1, 4, 5, dtype=torch.bool), {}, r"mask \(1, 4, 5\) must be \[B or 1, T/cp, T\], here \(2, 4, 4\)"),
        (torch.ones(1, 4, 4, dtype=torch.bool), {"window": 2}, "mask already says what window would"),
        (torch.ones(1, 4, 4, dtype=torch.bool), {"causal": False}, "mask already says what causal=False would"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, others, text) -> None:
    q = torch.zeros(2, 4, 2, 8)
    with pytest.raises(ValueError, match=text):
        allgather_kv_attention(q, q, q, group=None, mask=mask, **others)
