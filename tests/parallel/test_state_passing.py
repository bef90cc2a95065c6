"""States across real gloo ranks against one process, float64, forward and backward, both layouts."""

import pytest
import torch
import torch.distributed as dist

from models.batch import Bounds
from models.memory.protocol import LocalCarry
from parallel.sequence import ranges_for
from parallel.state_passing import RingCarry
from tests.distributed import run_distributed

B, H, K, V = 2, 2, 3, 4


def summaries(n_ranges):
    generator = torch.Generator().manual_seed(0)
    m = [torch.randn(B, H, K, K, generator=generator, dtype=torch.float64) for _ in range(n_ranges)]
    e = [torch.randn(B, H, K, V, generator=generator, dtype=torch.float64) for _ in range(n_ranges)]
    return m, e, torch.randn(B, H, K, V, generator=generator, dtype=torch.float64)


def affine_on_ranks(layout):
    rank, size = dist.get_rank(), dist.get_world_size()
    ranges = ranges_for(layout, 24, rank, size)
    n_ranges = size * len(ranges)
    places = [start * n_ranges // 24 for start, _ in ranges]
    m, e, initial = summaries(n_ranges)
    mine = [[x[j].requires_grad_() for j in places] for x in (m, e)]
    initial.requires_grad_()
    incoming, final = RingCarry(dist.group.WORLD, layout).affine(*mine, initial, Bounds(24, ranges, ((0,),) * B))
    loss = sum((x * (j + 1)).square().sum() for x, j in zip(incoming, places, strict=True)) + final.square().sum() / size
    grads = torch.autograd.grad(loss, [*mine[0], *mine[1], initial])
    return places, [x.detach() for x in incoming], final.detach(), grads


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_affine_equals_the_local_carry(layout, size):
    n_ranges = size * (1 if layout == "contiguous" else 2)
    m, e, initial = ([z.requires_grad_() for z in x] if isinstance(x, list) else x.requires_grad_() for x in summaries(n_ranges))
    bounds = Bounds(24, tuple((j * 24 // n_ranges, (j + 1) * 24 // n_ranges) for j in range(n_ranges)), ((0,),) * B)
    incoming, final = LocalCarry().affine(m, e, initial, bounds)
    loss = sum((x * (j + 1)).square().sum() for j, x in enumerate(incoming)) + final.square().sum()
    want = torch.autograd.grad(loss, [*m, *e, initial])
    answers = run_distributed(affine_on_ranks, size, layout)
    for places, got_in, got_final, grads in answers:
        torch.testing.assert_close(got_final, final, rtol=1e-12, atol=1e-12)
        for i, j in enumerate(places):
            torch.testing.assert_close(got_in[i], incoming[j], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grads[i], want[j], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grads[len(places) + i], want[n_ranges + j], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(grads[-1] for *_, grads in answers), want[-1], rtol=1e-12, atol=1e-12)


def tail_on_ranks(layout, n):
    rank, size = dist.get_rank(), dist.get_world_size()
    ranges = ranges_for(layout, 12, rank, size)
    whole = torch.arange(12, dtype=torch.float64).view(1, 12, 1)
    x = torch.cat([whole[:, a:b] for a, b in ranges], 1).requires_grad_()
    tail = RingCarry(dist.group.WORLD, layout).tail(x, n, Bounds(12, ranges, ((0,),)))
    (grad,) = torch.autograd.grad((tail * torch.arange(1, n + 1).view(1, n, 1)).sum(), x)
    owned = {int(t): float(g) for t, g in zip(x[0, :, 0], grad[0, :, 0], strict=True)}
    return tail.detach().flatten().tolist(), owned


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("n", [1, 3, 7, 14])
def test_tail_reaches_every_rank_and_its_gradient_the_owner(layout, n):
    answers = run_distributed(tail_on_ranks, 3, layout, n)
    grads = {}
    for tail, owned in answers:
        assert tail == [max(t, 0) for t in range(12 - n, 12)]
        grads |= owned
    assert grads == {t: 3.0 * max(0, t - (12 - n) + 1) for t in range(12)}


def wrong_part():
    carry = RingCarry(dist.group.WORLD, "zigzag")
    m, e, initial = summaries(1)
    with pytest.raises(ValueError, match="layout 'zigzag' gives it"):
        carry.affine(m, e, initial, Bounds(24, ((0, 12),), ((0,),) * B))


def test_bounds_of_another_layout_are_refused():
    run_distributed(wrong_part, 2)
