"""States across real gloo ranks against one process, float64, forward and backward, both layouts."""

import itertools

import pytest
import torch
import torch.distributed as dist

from models.batch import Bounds
from models.memory.protocol import LocalCarry
from parallel import state_blocks
from parallel.sequence import ranges_for
from parallel.state_blocks import BLOCK_BYTES, column_blocks
from parallel.state_passing import RingCarry
from parallel.state_ring import hops_of
from tests.distributed import run_distributed

B, H, K, V = 2, 2, 3, 4


KINDS = ("dense", "by rows", "one number")
"""Transitions: matrices, one decay per row of a state, one per head."""
EXCHANGES = ("gathered", "ring", "ring, many blocks")


def summaries(kind, n_ranges):
    generator = torch.Generator().manual_seed(0)
    shape = {"dense": (K, K), "by rows": (K, 1), "one number": (1, 1)}[kind]
    m = [torch.randn(B, H, *shape, generator=generator, dtype=torch.float64) for _ in range(n_ranges)]
    e = [torch.randn(B, H, K, V, generator=generator, dtype=torch.float64) for _ in range(n_ranges)]
    return m, e, torch.randn(B, H, K, V, generator=generator, dtype=torch.float64)


def compose(carry, kind, m, e, initial, bounds):
    return (carry.affine if kind == "dense" else carry.diagonal)(m, e, initial, bounds)


def exchanged_on_ranks(layout):
    """Of every exchange and kind of transition: places, incoming states, the final one, gradients, bytes sent (forward, backward)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ranges = ranges_for(layout, 24, rank, size)
    n_ranges = size * len(ranges)
    places = [start * n_ranges // 24 for start, _ in ranges]
    sent, send = [0], dist.batch_isend_irecv
    gather = dist.all_gather
    dist.all_gather = lambda out, x, group: (sent.__setitem__(0, sent[0] + x.nbytes), gather(out, x, group=group))[1]
    dist.batch_isend_irecv = lambda ops: (
        sent.__setitem__(0, sent[0] + sum(op.tensor.nbytes for op in ops if op.op is dist.isend)),
        send(ops),
    )[1]
    answers = {}
    for exchange in EXCHANGES:
        state_blocks.BLOCK_BYTES = 1 if exchange == "ring, many blocks" else 2**19
        for kind in KINDS:
            m, e, initial = summaries(kind, n_ranges)
            mine = [[x[j].requires_grad_() for j in places] for x in (m, e)]
            initial.requires_grad_()
            bounds, carry = Bounds(24, ranges, ((0,),) * B), RingCarry(dist.group.WORLD, layout, ring=exchange != "gathered")
            sent[0] = 0
            incoming, final = compose(carry, kind, *mine, initial, bounds)
            forward, sent[0] = sent[0], 0
            final = carry.everywhere(final, bounds)
            loss = sum((x * (j + 1)).square().sum() for x, j in zip(incoming, places, strict=True)) + final.square().sum() / size
            grads = torch.autograd.grad(loss, [*mine[0], *mine[1], initial])
            answers[exchange, kind] = places, [x.detach() for x in incoming], final.detach(), grads, (forward, sent[0])
    return answers


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_exchanges_equal_the_local_carry(layout, size):
    n_ranges = size * (1 if layout == "contiguous" else 2)
    bounds = Bounds(24, tuple((j * 24 // n_ranges, (j + 1) * 24 // n_ranges) for j in range(n_ranges)), ((0,),) * B)
    answers = run_distributed(exchanged_on_ranks, size, layout)
    for exchange, kind in itertools.product(EXCHANGES, KINDS):
        m, e, initial = ([z.requires_grad_() for z in x] if isinstance(x, list) else x.requires_grad_() for x in summaries(kind, n_ranges))
        incoming, final = compose(LocalCarry(), kind, m, e, initial, bounds)
        loss = sum((x * (j + 1)).square().sum() for j, x in enumerate(incoming)) + final.square().sum()
        want = torch.autograd.grad(loss, [*m, *e, initial])
        of_ranks = [answer[exchange, kind] for answer in answers]
        for places, got_in, got_final, grads, _ in of_ranks:
            torch.testing.assert_close(got_final, final, rtol=1e-12, atol=1e-12)
            for i, j in enumerate(places):
                torch.testing.assert_close(got_in[i], incoming[j], rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(grads[i], want[j], rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(grads[len(places) + i], want[n_ranges + j], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sum(grads[-1] for *_, grads, _ in of_ranks), want[-1], rtol=1e-12, atol=1e-12)
        state, ranges = 8 * B * H * K * V, n_ranges // size
        if exchange == "gathered":  # contributed to gathers: all summaries; the gradients of all states and of the last one
            assert [sent for *_, sent in of_ranks] == [(ranges * (m[0].nbytes + state), (ranges + 1) * state)] * size
        else:  # one state per hop and direction, however it is cut; transitions stay where they are
            hops = size - 1 if layout == "contiguous" else 2 * (size - 1)
            assert [sum(sent[i] for *_, sent in of_ranks) for i in (0, 1)] == [hops * state] * 2
            most = max(sent[0] for *_, sent in of_ranks)
            assert most == (state if layout == "contiguous" or size == 2 else 2 * state)


def test_blocks_follow_what_a_link_carries_in_its_latency():
    assert column_blocks(2**30, 128, 1) == 1, "one hop: nothing to work on meanwhile"
    assert column_blocks(1024, 128, 7) == 1, "a small state is one message"
    assert column_blocks(8 * BLOCK_BYTES, 128, 3) == 4
    assert column_blocks(8 * BLOCK_BYTES, 3, 3) == 3, "no more than there are columns"
    assert hops_of([0, 1, 2, 2, 1, 0]) == 4


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
    m, e, initial = summaries("dense", 1)
    with pytest.raises(ValueError, match="layout 'zigzag' gives it"):
        carry.affine(m, e, initial, Bounds(24, ((0, 12),), ((0,),) * B))


def test_bounds_of_another_layout_are_refused():
    run_distributed(wrong_part, 2)
