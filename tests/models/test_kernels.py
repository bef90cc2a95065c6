"""Every implementation of a block of attention against the float64 twin; the repairs around the kernels; the CUDA call shapes."""

from __future__ import annotations

import math

import pytest
import torch

from models import kernels
from models.kernels import CAUSAL, NONE, BlockMask, block_attention, block_attention_backward, block_attention_reference, explain

INF = float("inf")


def _inputs(dtype: torch.dtype, n_queries: int = 24, n_keys: int = 24, heads: tuple[int, int] = (4, 2), batch: int = 2, dim: int = 8):
    generator = torch.Generator().manual_seed(7)

    def draw(n_heads: int, length: int) -> torch.Tensor:
        # The layout that a projection gives: [B, T, heads, D] seen as [B, heads, T, D].
        return torch.randn(batch, length, n_heads, dim, dtype=torch.float64, generator=generator).to(dtype).transpose(1, 2)

    return draw(heads[0], n_queries), draw(heads[1], n_keys), draw(heads[1], n_keys), draw(heads[0], n_queries)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual.double() - expected).norm() / expected.norm()).detach())


def _boolean_mask() -> torch.Tensor:
    return (torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(3)) < 0.5) | torch.eye(24, dtype=torch.bool)


MASKS = {
    "none": NONE,
    "causal": CAUSAL,
    "band": BlockMask.band(-5, 2),
    "open_band": BlockMask.band(0, None),
    "boolean": BlockMask.dense(_boolean_mask()),
    "additive": BlockMask.dense(torch.linspace(-2, 2, 24 * 24, dtype=torch.float64).reshape(24, 24), no_empty_rows=True),
    "per_head": BlockMask.dense(torch.linspace(-2, 2, 4 * 24, dtype=torch.float64).reshape(1, 4, 1, 24).expand(2, 4, 24, 24)),
}


@pytest.mark.parametrize("implementation", [kernels.FLASH_CPU, kernels.PLAIN], ids=lambda i: i.name)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("name", MASKS)
def test_block_equals_the_float64_twin(monkeypatch, implementation, name: str, dtype: torch.dtype, limit: float) -> None:
    monkeypatch.setattr(kernels, "IMPLEMENTATIONS", (implementation,))
    monkeypatch.setattr(kernels, "_CHUNK_SCORES", 7 * 2 * 4 * 24)  # the plain implementation takes 7 rows at a time
    q, k, v, dout = _inputs(dtype)
    leaves = [x.double().clone().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = block_attention_reference(leaves[0], leaves[1], leaves[2], MASKS[name], 0.3)
    expected.backward(dout.double())
    out, lse = block_attention(q, k, v, MASKS[name], 0.3)
    grads = block_attention_backward(dout, q, k, v, out, lse, MASKS[name], 0.3)
    assert out.dtype == dtype and lse.is_contiguous() and lse.dtype == torch.promote_types(dtype, torch.float32)
    assert _error(out, expected) < limit and _error(lse, expected_lse) < limit
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.shape == leaf.shape and leaf.grad is not None and _error(grad, leaf.grad) < limit


def test_the_twin_is_softmax_attention() -> None:
    q, k, v, _ = _inputs(torch.float64, heads=(2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert _error(block_attention_reference(q, k, v, CAUSAL)[0], expected) < 1e-14


@pytest.mark.parametrize("implementation", [kernels.FLASH_CPU, kernels.PLAIN], ids=lambda i: i.name)
@pytest.mark.parametrize(
    "mask", [BlockMask.dense(torch.arange(24)[:, None] % 3 != torch.zeros(24, dtype=torch.long)), BlockMask.band(20, None)]
)
def test_a_query_that_sees_nothing_is_neutral(monkeypatch, implementation, mask: BlockMask) -> None:
    monkeypatch.setattr(kernels, "IMPLEMENTATIONS", (implementation,))
    q, k, v, dout = _inputs(torch.float32)
    hidden = kernels.additive_mask(mask, 24, 24, torch.float32, q.device)
    assert hidden is not None
    empty = (hidden == -INF).all(-1)
    assert empty.any() and not empty.all()
    out, lse = block_attention(q, k, v, mask)
    assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -INF).all() and lse[:, :, ~empty].isfinite().all()
    dq, dk, dv = block_attention_backward(dout, q, k, v, out, lse, mask)
    seen = ~empty
    without = BlockMask.dense((hidden == 0)[seen])
    expected = block_attention_backward(dout[:, :, seen], q[:, :, seen], k, v, out[:, :, seen], lse[:, :, seen], without)
    assert (dq[:, :, empty] == 0).all()
    for actual, wanted in zip((dq[:, :, seen], dk, dv), expected, strict=True):
        assert torch.allclose(actual, wanted, atol=1e-6)


def test_blocks_with_merged_lse_sum_to_the_whole_gradient() -> None:
    q, k, v, dout = _inputs(torch.float64)
    out, lse = block_attention(q, k, v, CAUSAL)
    expected = block_attention_backward(dout, q, k, v, out, lse, CAUSAL)
    band = BlockMask.band(-12, None)  # nothing of it hides a key that the causal mask shows
    left = block_attention_backward(dout[:, :, 12:], q[:, :, 12:], k[:, :, :12], v[:, :, :12], out[:, :, 12:], lse[:, :, 12:], band)
    assert torch.allclose(
        left[0]
        + block_attention_backward(dout[:, :, 12:], q[:, :, 12:], k[:, :, 12:], v[:, :, 12:], out[:, :, 12:], lse[:, :, 12:], CAUSAL)[0],
        expected[0][:, :, 12:],
        atol=1e-13,
    )


def test_a_causal_block_must_be_square() -> None:
    q, k, v, _ = _inputs(torch.float32, n_queries=8)
    with pytest.raises(ValueError, match="square, got 8 queries and 24 keys"):
        block_attention(q, k, v, CAUSAL)


def test_mixed_dtypes_and_shapes_are_refused() -> None:
    q, k, v, _ = _inputs(torch.float32)
    with pytest.raises(ValueError, match="one dtype"):
        block_attention(q, k.double(), v, NONE)
    with pytest.raises(ValueError, match="do not fit"):
        block_attention(q[:, :3], k, v, NONE)


def test_explain_names_the_implementation_and_the_reasons() -> None:
    dense = BlockMask.dense(torch.zeros(1, 1))
    assert "flash_cpu" in explain("cpu", torch.float32, 64, CAUSAL)
    assert explain("cuda", torch.bfloat16, 64, CAUSAL).split(": ")[1].startswith("flash_cuda")
    assert "efficient_cuda; " in explain("cuda", torch.bfloat16, 64, dense) and "no dense mask" in explain(
        "cuda", torch.bfloat16, 64, dense
    )
    assert "efficient_cuda; " in explain("cuda", torch.float32, 64)
    assert "plain; " in explain("cuda", torch.float64, 64) and "not torch.float64" in explain("cuda", torch.float64, 64)
    assert "plain; " in explain("cuda", torch.bfloat16, 12) and "not 12" in explain("cuda", torch.bfloat16, 12)


@pytest.mark.parametrize(("implementation", "mask"), [
    (kernels.FLASH_CUDA, NONE), (kernels.FLASH_CUDA, CAUSAL), (kernels.FLASH_CUDA, BlockMask.band(0, 30)),
    (kernels.EFFICIENT_CUDA, CAUSAL), (kernels.EFFICIENT_CUDA, BlockMask.band(0, 30)),
    (kernels.EFFICIENT_CUDA, BlockMask.dense(torch.zeros(100, 130, device="meta"))),
])  # fmt: skip
def test_cuda_calls_have_the_right_arguments_and_shapes(implementation: kernels.Implementation, mask: BlockMask) -> None:
    """Without a GPU: the same aten calls on meta tensors (signatures and shapes, no numbers)."""
    n_keys = 100 if mask is CAUSAL else 130
    q, k, v, dout = (x.to("meta") for x in _inputs(torch.bfloat16, 100, n_keys, dim=64))
    out, lse = implementation.forward(q, k, v, mask, 0.125)
    assert out.shape == q.shape and lse.shape == (2, 4, 100) and lse.dtype == torch.float32
    grads = implementation.backward(dout, q, k, v, out, lse.contiguous(), mask, 0.125)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_flash_window_is_the_same_band() -> None:
    for n_queries, n_keys, low, high in [(4, 9, 0, 5), (6, 6, 0, None), (6, 6, -3, 0), (3, 8, -2, 6)]:
        window = kernels._flash_window(BlockMask.band(low, high), n_queries, n_keys)
        left, right = (math.inf if x == -1 else x for x in (window["window_size_left"], window["window_size_right"]))
        for a in range(n_queries):
            for b in range(n_keys):
                aligned = b - a - (n_keys - n_queries)
                assert (-left <= aligned <= right) == (low <= b - a and (high is None or b - a <= high))
    with pytest.raises(ValueError, match="cannot express"):
        kernels._flash_window(BlockMask.band(3, None), 4, 4)
