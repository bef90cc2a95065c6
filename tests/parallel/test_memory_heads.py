"""Tokens against heads on real ranks: every number goes where it belongs, and its gradient home."""

import torch
import torch.distributed as dist

from models.batch import Bounds
from models.memory.by_heads import deal_heads, rows_of
from parallel.memory_heads import HeadsOverRanks
from parallel.sequence import ranges_for
from tests.distributed import run_distributed

B, S, HEADS, WIDTH = 2, 24, 5, 3
SHARED = (HEADS * WIDTH, HEADS * WIDTH + 2)
"""Columns that every rank wants."""
WAYS = [("contiguous", 1), ("zigzag", 1), ("contiguous", 2)]
"""Layout, and ranks that share what it gives to one."""


def whole(columns):
    return torch.arange(B * S * columns, dtype=torch.float64).view(B, S, columns)


def held_by(rank, size, layout, parts):
    return ranges_for(layout, S, rank, size, ((0,),) * B, parts=parts)


def of_tokens(x_BSF, ranges):
    return torch.cat([x_BSF[:, a:b] for a, b in ranges], 1)


def exchanged():
    rank, size = dist.get_rank(), dist.get_world_size()
    dealt, found = deal_heads(HEADS, size), {}
    for layout, parts in WAYS:
        heads, ranges = HeadsOverRanks(dist.group.WORLD, layout, parts), held_by(rank, size, layout, parts)
        bounds = Bounds(S, ranges, ((0,),) * B)
        columns = [(*rows_of(HEADS, each, WIDTH), SHARED) for each in dealt]
        x = of_tokens(whole(SHARED[1]), ranges).requires_grad_()
        there = heads.to_heads(x, columns, bounds)
        back = heads.to_tokens(there[..., :-2], [rows_of(HEADS, each, WIDTH) for each in dealt], bounds)
        (grad,) = torch.autograd.grad([there, back], x, [torch.ones_like(there), 2 * torch.ones_like(back)])
        state = torch.full((B, dealt[rank][1] - dealt[rank][0]), float(rank), requires_grad=True)
        joined = heads.together(state, (dealt[rank],), HEADS)
        (of_state,) = torch.autograd.grad(joined.sum() * (rank + 1), state)
        found[layout, parts] = there.detach(), back.detach(), grad, joined.detach(), of_state
    return found


def test_tokens_go_to_heads_and_back():
    size = 4
    dealt = deal_heads(HEADS, size)
    owners = torch.tensor([float(rank) for rank, (first, last) in enumerate(dealt) for _ in range(first, last)])
    for rank, found in enumerate(run_distributed(exchanged, size)):
        (first, last), x_BSF = dealt[rank], whole(SHARED[1])
        for (layout, parts), (there, back, grad, joined, of_state) in found.items():
            ranges = held_by(rank, size, layout, parts)
            assert torch.equal(there, torch.cat([x_BSF[..., first * WIDTH : last * WIDTH], x_BSF[..., SHARED[0] :]], -1))
            assert torch.equal(back, of_tokens(x_BSF, ranges)[..., : SHARED[0]])
            want = torch.full_like(grad, 3.0)  # once there, twice back
            want[..., SHARED[0] :] = size  # what all ranks want, from all of them
            assert torch.equal(grad, want)
            assert torch.equal(joined, owners.expand(B, -1)) and bool((of_state == 1 + 2 + 3 + 4).all())
