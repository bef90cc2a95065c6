"""Halos equal a slice of the whole sequence, forward and backward, for every layout and reach."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from models.batch import Bounds
from parallel.halo import exchange_halo, halo_segments
from parallel.sequence import ranges_for
from tests.distributed import run_on_kept_ranks as run_distributed

SEQ_LEN = 24
REACHES = (0, 1, 3, 7, 13, 24, 30)


def _reference(x_BTC: torch.Tensor, n: int, start: int) -> torch.Tensor:
    padded = torch.cat((x_BTC.new_zeros(x_BTC.shape[0], n, x_BTC.shape[2]), x_BTC), dim=1)
    return padded[:, start : start + n]


def _weights(n: int, start: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * n + start))


def _compare(layout: str) -> float:
    """Largest error of halos and gradients over all reaches and token dimensions, on this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = torch.randn(2, SEQ_LEN, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bounds = Bounds.whole(2, SEQ_LEN).with_ranges(ranges_for(layout, SEQ_LEN, rank, size))  # type: ignore[arg-type]
    index = [i for start, end in bounds.ranges for i in range(start, end)]
    worst = 0.0
    for n in REACHES:
        reference = whole.clone().requires_grad_()
        total = whole.new_zeros(())
        for other in range(size):
            for start, _ in ranges_for(layout, SEQ_LEN, other, size):  # type: ignore[arg-type]
                expected = _reference(reference, n, start)
                total = total + (expected**2 * _weights(n, start, expected.shape)).sum()
        total.backward()
        for dim in (1, -1):
            local = whole[:, index].clone().requires_grad_()
            halos = exchange_halo(local if dim == 1 else local.transpose(1, 2), n, dim, bounds, layout, dist.group.WORLD)  # type: ignore[arg-type]
            halos = halos if dim == 1 else [halo.transpose(1, 2) for halo in halos]
            assert len(halos) == len(bounds.ranges)
            loss = whole.new_zeros(())
            for halo, (start, _) in zip(halos, bounds.ranges, strict=True):
                expected = _reference(whole, n, start)
                assert halo.shape == expected.shape
                worst = max(worst, float((halo - expected).abs().max()) if n else 0.0)
                loss = loss + (halo**2 * _weights(n, start, halo.shape)).sum()
            loss.backward()
            assert local.grad is not None and reference.grad is not None
            worst = max(worst, float((local.grad - reference.grad[:, index]).abs().max()))
    return worst


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("cp", [2, 3, 4])
def test_halo_and_its_gradient_equal_a_slice_of_the_whole(layout: str, cp: int) -> None:
    assert max(run_distributed(_compare, cp, layout)) < 1e-12


def test_one_process_needs_no_group() -> None:
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    (halo,) = exchange_halo(x, 3, 1, Bounds.whole(1, 5), "zigzag", None)
    assert torch.equal(halo, torch.zeros(1, 3, 2, dtype=torch.float64))


def test_volume_is_bounded_by_the_reach() -> None:
    for layout in ("contiguous", "zigzag"):
        moved = sum(s.length for s in halo_segments(5, layout, 4096, 4) if s.src != s.dst)  # type: ignore[arg-type]
        assert 0 < moved <= 5 * 8


def test_bounds_of_another_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="layout 'contiguous' gives it"):
        exchange_halo(torch.zeros(1, 4, 1), 1, 1, Bounds(8, ((4, 8),), ((0,),)), "contiguous", None)


def _bf16_sum() -> torch.Tensor:
    """Gradient of a token that every later rank's halo holds, when the exact sum needs more than bf16's 8 bits on the way."""
    rank, size = dist.get_rank(), dist.get_world_size()
    bounds = Bounds.whole(1, size).with_ranges(((rank, rank + 1),))
    x = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    (halo,) = exchange_halo(x, size, 1, bounds, "contiguous", dist.group.WORLD)
    (halo.float() * (256.0 if rank == 1 else 1.0)).sum().backward()
    assert x.grad is not None
    return x.grad.float()


def test_bf16_gradients_are_summed_in_fp32() -> None:
    # 256 + 1 + 1 = 258 is a bf16 number; summed in bf16, 256 + 1 rounds back to 256 each time.
    assert run_distributed(_bf16_sum, 4)[0].item() == 258.0
