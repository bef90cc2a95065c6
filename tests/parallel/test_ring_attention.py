"""Attention over ranks equals dense float64 attention of the whole sequence, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from models import attention
from models.attention import LocalAttention, attention_reference
from models.attention_plan import TileLimits
from models.batch import Bounds
from parallel import ring_attention
from parallel.ring_attention import RingAttention
from parallel.ring_plan import HaloPlan, plan_halo, plan_ring
from parallel.sequence import ranges_for
from tests.distributed import run_on_kept_ranks as run_distributed

SEQ_LEN = 48
DOCUMENTS = {
    "one": [(0,), (0,)],
    "longer_than_a_shard": [(0, 7, 43), (0, 7, 43)],
    "tiny": [tuple(range(0, 48, 3)), (0, 1, 2, 4, 7, 8, 30, 31, 33, 34, 36)],
    "rows_differ": [(0, 20), (0, 12, 24, 36)],
}
WINDOWS = [None, 1, 5, 20, 40]
TINY = TileLimits(block=3, keys_per_call=17, triangle=2, small=3, packed=7)


def _whole(dtype: torch.dtype, heads: tuple[int, int] = (4, 2), dim: int = 8, length: int = SEQ_LEN) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(23)
    shapes = [(2, length, n, dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).transpose(1, 2) for s in shapes]


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    # At least 1: with window 1, or a shard of one-token documents, the exact dq and dk are 0.
    return float(((actual.double() - expected).norm() / expected.norm().clamp_min(1.0)).detach())


def _reference(tensors: list[torch.Tensor], documents: list[tuple[int, ...]], window: int | None) -> list[torch.Tensor]:
    """[out, dq, dk, dv] of the whole sequence in float64."""
    q, k, v = (x.double().clone().requires_grad_() for x in tensors[:3])
    out = attention_reference(q, k, v, documents, window)
    return [out, *torch.autograd.grad(out, (q, k, v), tensors[3].double())]


def _ring(tensors: list[torch.Tensor], documents: list[tuple[int, ...]], window: int | None, layout: str) -> tuple[list, list[int]]:
    """This rank's [out, dq, dk, dv] and the global indices of its tokens."""
    rank, size, length = dist.get_rank(), dist.get_world_size(), tensors[0].shape[2]
    bounds = Bounds(length, ranges_for(layout, length, rank, size), tuple(documents))  # type: ignore[arg-type]
    index = [i for start, end in bounds.ranges for i in range(start, end)]
    q, k, v = (x[:, :, index].clone().requires_grad_() for x in tensors[:3])
    out = RingAttention(dist.group.WORLD, layout, window)(q, k, v, bounds)  # type: ignore[arg-type]
    assert out.dtype == q.dtype
    return [out, *torch.autograd.grad(out, (q, k, v), tensors[3][:, :, index])], index


def _compare(dtype: torch.dtype, layout: str, heads: tuple[int, int], tiny: bool) -> dict[str, float]:
    """Largest relative error of this rank for every window and set of documents."""
    if tiny:
        attention.tile_limits = ring_attention.tile_limits = lambda q, window, call: TINY
    tensors = _whole(dtype, heads)
    errors = {}
    for window in WINDOWS:
        for name, documents in DOCUMENTS.items():
            actual, index = _ring(tensors, documents, window, layout)
            expected = _reference(tensors, documents, window)
            errors[f"{window} {name}"] = max(_relative(a, e[:, :, index]) for a, e in zip(actual, expected, strict=True))
    return errors


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("cp", "heads"), [(1, (4, 2)), (2, (4, 1)), (3, (4, 4)), (4, (4, 2))])
def test_float64_equals_dense(layout: str, cp: int, heads: tuple[int, int]) -> None:
    for rank, errors in enumerate(run_distributed(_compare, cp, torch.float64, layout, heads, cp == 4)):
        for case, error in errors.items():
            assert error < 1e-10, f"rank {rank}, window and documents {case}: {error}"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_float32_equals_dense(layout: str) -> None:
    for errors in run_distributed(_compare, 4, torch.float32, layout, (4, 2), False):
        assert max(errors.values()) < 1e-5, errors


def _bf16(layout: str, window: int | None) -> tuple[list[torch.Tensor], list[int]]:
    tensors = _whole(torch.bfloat16, dim=32, length=256)
    actual, index = _ring(tensors, [(0,), (0,)], window, layout)
    return [x.detach().float() for x in actual], index


@pytest.mark.parametrize("window", [None, 40, 150])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_bf16_is_as_good_as_one_kernel_call(layout: str, window: int | None) -> None:
    tensors, documents = _whole(torch.bfloat16, dim=32, length=256), [(0,), (0,)]
    exact = _reference(tensors, documents, window)
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    out = LocalAttention(window)(q, k, v, Bounds.whole(2, 256))
    single = [out, *torch.autograd.grad(out, (q, k, v), tensors[3])]
    gathered = [torch.zeros(x.shape) for x in exact]
    for parts, index in run_distributed(_bf16, 4, layout, window):
        for whole, part in zip(gathered, parts, strict=True):
            whole[:, :, index] = part
    for ring, one, truth in zip(gathered, single, exact, strict=True):
        assert _relative(ring, truth) < 1.3 * _relative(one, truth)


def _gradcheck() -> bool:
    """The gradient of one rank's loss that other ranks' tokens influence: the sum over ranks is what backward returns."""
    tensors = _whole(torch.float64, heads=(2, 1), dim=4, length=8)
    (_, _, dk, _), index = _ring(tensors, [(0,), (0, 3)], None, "zigzag")
    k = tensors[1]
    numeric = torch.zeros_like(k)
    for position in torch.cartesian_prod(*(torch.arange(n) for n in k.shape)).tolist():
        for sign in (1, -1):
            moved = k.clone()
            moved[tuple(position)] += sign * 1e-6
            out = attention_reference(tensors[0], moved, tensors[2], [(0,), (0, 3)], None)
            numeric[tuple(position)] += sign * (out * tensors[3]).sum() / 2e-6
    return torch.allclose(dk, numeric[:, :, index], atol=1e-7)


def test_gradient_is_the_finite_difference() -> None:
    assert run_distributed(_gradcheck, 2) == [True, True]


def test_hops_that_no_rank_needs_are_not_made() -> None:
    limits = TileLimits()
    held = [ranges_for("contiguous", 48, rank, 4) for rank in range(4)]
    assert len(plan_ring(held, 0, [(0,)], None, limits).hops) == 4
    assert len(plan_ring(held, 0, [(0, 12, 24, 36)], None, limits).hops) == 1, "documents end where shards end"
    assert [len(plan_ring(held, rank, [(0, 30)], None, limits).hops) for rank in range(4)] == [3, 3, 3, 3]
    assert len(plan_ring(held, 0, [(0,)], 14, limits).hops) == 3


def test_zigzag_ranks_have_equal_work() -> None:
    held = [ranges_for("zigzag", 48, rank, 4) for rank in range(4)]
    work = [
        [
            sum(t.q_len * t.k_len / (2 if t.kind == "causal" else 1) for rows in hop for t in rows.tiles)
            for hop in plan_ring(held, rank, [(0,)], None, TileLimits()).hops
        ]
        for rank in range(4)
    ]
    assert all(hops == work[0] for hops in work)
    calls = [len(rows.tiles) for rank in range(4) for hop in plan_ring(held, rank, [(0,)], None, TileLimits()).hops for rows in hop]
    assert set(calls) == {1}, "one causal square of the own tokens, then one rectangle per hop"


def test_halo_padding_is_never_seen() -> None:
    held = [ranges_for("zigzag", 48, rank, 2) for rank in range(2)]
    plan = plan_halo(held, 1, [(0,)], 18, TileLimits())
    assert plan.n == 17
    assert min(t.k_start for rows in plan.halos[0] for t in rows.tiles) == 17 - 12, "before index 0 there are 5 padding tokens"


def _choice(window: int | None) -> bool:
    bounds = Bounds.whole(1, 16).with_ranges(ranges_for("contiguous", 16, dist.get_rank(), 2))
    return isinstance(RingAttention(dist.group.WORLD, "contiguous", window)._plan(bounds, TileLimits()), HaloPlan)  # type: ignore[arg-type]


@pytest.mark.parametrize(("window", "is_halo"), [(None, False), (9, True), (10, False)])
def test_a_window_up_to_a_shard_uses_the_halo(window: int | None, is_halo: bool) -> None:
    assert run_distributed(_choice, 2, window) == [is_halo, is_halo]


def _wrong_bounds() -> str:
    try:
        _, k, v, q = _whole(torch.float32)
        RingAttention(dist.group.WORLD, "zigzag", None)(q[:, :, :24], k[:, :, :24], v[:, :, :24], Bounds(48, ((0, 24),), ((0,), (0,))))  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return "accepted"


def test_bounds_of_another_layout_are_refused() -> None:
    assert all("layout 'zigzag' gives it" in answer for answer in run_distributed(_wrong_bounds, 2))
