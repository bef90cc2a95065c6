"""Every implementation of a block of attention against the float64 twin; the repairs around the kernels; the CUDA call shapes."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch

from models import kernels, kernels_cuda, kernels_flash, kernels_plain
from models.block import CAUSAL, NONE, BlockMask, Implementation, additive_mask
from models.errors import UserError
from models.head_runs import by_heads, head_runs
from models.kernels import block_attention, block_attention_backward, block_attention_reference, explain

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


@pytest.mark.parametrize("implementation", [kernels.FLASH_CPU, kernels.PLAIN, kernels.FLOAT64], ids=lambda i: i.name)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("name", MASKS)
def test_block_equals_the_float64_twin(monkeypatch, implementation, name: str, dtype: torch.dtype, limit: float) -> None:
    monkeypatch.setattr(kernels, "IMPLEMENTATIONS", (implementation,))
    monkeypatch.setattr(kernels_plain, "_CHUNK_SCORES", 7 * 2 * 4 * 24)  # the plain implementation takes 7 rows at a time
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


@pytest.mark.parametrize("implementation", [kernels.FLASH_CPU, kernels.PLAIN, kernels.FLOAT64], ids=lambda i: i.name)
@pytest.mark.parametrize(
    "mask", [BlockMask.dense(torch.arange(24)[:, None] % 3 != torch.zeros(24, dtype=torch.long)), BlockMask.band(20, None)]
)
def test_a_query_that_sees_nothing_is_neutral(monkeypatch, implementation, mask: BlockMask) -> None:
    monkeypatch.setattr(kernels, "IMPLEMENTATIONS", (implementation,))
    q, k, v, dout = _inputs(torch.float32)
    hidden = additive_mask(mask, 24, 24, torch.float32, q.device)
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


def _chosen(capability: tuple[int, int] | None, mask: BlockMask = CAUSAL, head_dim: int = 128) -> str:
    return explain("cuda", torch.bfloat16, head_dim, mask, capability=capability).split(": ")[1].split(";")[0]


def test_cudnn_comes_first_where_it_is_faster() -> None:
    assert [_chosen(c) for c in ((9, 0), (10, 0))] == ["cudnn", "cudnn"]
    assert [_chosen(c) for c in ((8, 0), (8, 9), (12, 0), None)] == ["flash_cuda"] * 4
    assert _chosen((7, 5)) == "efficient_cuda"
    assert _chosen((9, 0), BlockMask.band(0, 30)) == "flash_cuda"
    assert [_chosen(c, head_dim=192) for c in ((9, 0), (10, 0))] == ["cudnn", "flash_cuda"]
    assert "FlashAttention is faster before Hopper" in explain("cuda", torch.bfloat16, 128, CAUSAL, capability=(8, 0))


def test_cudnn_is_left_out_of_deterministic_runs() -> None:
    line = explain("cuda", torch.bfloat16, 128, CAUSAL, capability=(9, 0), deterministic=True)
    assert ": flash_cuda; " in line and "not cudnn: is not deterministic" in line


def test_another_flash_attention_in_torch_comes_before_cudnn(monkeypatch) -> None:
    monkeypatch.setattr(kernels_cuda, "active_flash", lambda: "FA3")
    assert _chosen((9, 0)) == "flash_cuda" and "FA3 is active" in explain("cuda", torch.bfloat16, 128, CAUSAL, capability=(9, 0))


def test_the_package_stands_in_for_a_torch_without_flash_attention(monkeypatch) -> None:
    monkeypatch.setattr(kernels_flash, "_package_missing", lambda: False)
    assert _chosen((8, 0)) == "flash_cuda"
    monkeypatch.setattr(kernels_flash, "_left_out", lambda: "this torch was built without FlashAttention")
    assert _chosen((8, 0)) == "flash_attn" and _chosen((8, 0), BlockMask.dense(torch.zeros(1, 1))) == "efficient_cuda"


def test_a_kernel_asked_for_by_name_is_used_or_refused() -> None:
    q, k, v, dout = _inputs(torch.bfloat16)
    expected = block_attention_reference(q, k, v, CAUSAL)[0]
    out, lse = block_attention(q, k, v, CAUSAL, kernel="float64")
    assert torch.equal(out, expected.to(torch.bfloat16)) and lse.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in block_attention_backward(dout, q, k, v, out, lse, CAUSAL, kernel="float64"))
    with pytest.raises(UserError, match="'flash_cuda' cannot compute a causal block of torch.bfloat16 on cpu: it runs on CUDA only"):
        block_attention(q, k, v, CAUSAL, kernel="flash_cuda")
    with pytest.raises(UserError, match="'nothing' is not known; use one of auto, "):
        block_attention(q, k, v, CAUSAL, kernel="nothing")
    assert "float64" in explain("cuda", torch.bfloat16, 12, kernel="float64")


def _package_on_cpu() -> ModuleType:
    """A flash-attn whose functions have the package's arguments (2.8.3) and compute with torch's CPU kernel."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
    ):
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax) == (0.0, -1, -1, 0.0, None, False)
        mask = CAUSAL if causal else NONE
        out, lse = block_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, softmax_scale, "plain")
        return out.transpose(1, 2), lse, None, None

    def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                             window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        tensors = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        grads = block_attention_backward(*tensors, softmax_lse, CAUSAL if causal else NONE, softmax_scale, "plain")
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad.transpose(1, 2))

    module = ModuleType("flash_attn.flash_attn_interface")
    module.__dict__.update(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)
    return module


@pytest.mark.parametrize("mask", [NONE, CAUSAL])
def test_the_package_is_called_with_its_own_arguments(monkeypatch, mask: BlockMask) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", _package_on_cpu())
    q, k, v, dout = _inputs(torch.float32)
    out, lse = kernels.FLASH_ATTN.forward(q, k, v, mask, 0.3)
    wanted, wanted_lse = block_attention(q, k, v, mask, 0.3)
    assert torch.allclose(out, wanted, atol=1e-6) and torch.allclose(lse, wanted_lse, atol=1e-5)
    actual = kernels.FLASH_ATTN.backward(dout, q, k, v, out, lse, mask, 0.3)
    for grad, exact in zip(actual, block_attention_backward(dout, q, k, v, out, lse, mask, 0.3), strict=True):
        assert torch.allclose(grad, exact, atol=1e-5)


@pytest.mark.parametrize(("implementation", "mask"), [
    (kernels.FLASH_CUDA, NONE), (kernels.FLASH_CUDA, CAUSAL), (kernels.FLASH_CUDA, BlockMask.band(0, 30)),
    (kernels.CUDNN, NONE), (kernels.CUDNN, CAUSAL),
    (kernels.EFFICIENT_CUDA, CAUSAL), (kernels.EFFICIENT_CUDA, BlockMask.band(0, 30)),
    (kernels.EFFICIENT_CUDA, BlockMask.dense(torch.zeros(100, 130, device="meta"))),
])  # fmt: skip
def test_cuda_calls_have_the_right_arguments_and_shapes(implementation: Implementation, mask: BlockMask) -> None:
    """Without a GPU: the same aten calls on meta tensors (signatures and shapes, no numbers)."""
    n_keys = 100 if mask is CAUSAL else 130
    q, k, v, dout = (x.to("meta") for x in _inputs(torch.bfloat16, 100, n_keys, dim=64))
    out, lse = implementation.forward(q, k, v, mask, 0.125)
    assert out.shape == q.shape and lse.shape == (2, 4, 100) and lse.dtype == torch.float32
    grads = implementation.backward(dout, q, k, v, out, lse.contiguous(), mask, 0.125)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_flash_window_is_the_same_band() -> None:
    for n_queries, n_keys, low, high in [(4, 9, 0, 5), (6, 6, 0, None), (6, 6, -3, 0), (3, 8, -2, 6)]:
        window = kernels_flash._flash_window(BlockMask.band(low, high), n_queries, n_keys)
        left, right = (math.inf if x == -1 else x for x in (window["window_size_left"], window["window_size_right"]))
        for a in range(n_queries):
            for b in range(n_keys):
                aligned = b - a - (n_keys - n_queries)
                assert (-left <= aligned <= right) == (low <= b - a and (high is None or b - a <= high))
    with pytest.raises(ValueError, match="cannot express"):
        kernels_flash._flash_window(BlockMask.band(3, None), 4, 4)


@pytest.mark.parametrize("runs", [2, 4])
def test_heads_one_run_after_the_other_give_the_same_bits(runs: int) -> None:
    """Grouped heads, two rows, laid out as a model's: one token's heads beside one another."""
    torch.manual_seed(0)
    q, dout = (torch.randn(2, 24, 8, 16).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, 24, 4, 16).transpose(1, 2) for _ in range(2))
    out, lse = block_attention(q, k, v, CAUSAL)
    whole = kernels_plain.PLAIN.backward(dout, q, k, v, out, lse, CAUSAL, 0.25)
    parts = by_heads(kernels_plain.PLAIN.backward, (dout, q, k, v, out, lse), CAUSAL, 0.25, runs)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_how_many_runs_of_heads() -> None:
    q = torch.empty(1, 32, 1000, 128, device="meta")
    assert [head_runs(q, 8, elements) for elements in (q.numel(), q.numel() - 1, q.numel() // 8, 1)] == [1, 2, 8, 8]
    assert head_runs(q, 4, q.numel() // 3) == 4
