"""What the conformance suite does on real ranks, and in place of other ranks; see ``test_conformance.py``."""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from memory_mgmt.op_costs import op_flops
from models.memory.protocol import LocalCarry
from parallel import state_blocks
from parallel.memory_exchange import refused_exchange
from parallel.sequence import ranges_for
from parallel.state_passing import RingCarry
from tests.models.memory.conformance_cases import BY_HEADS, SPLIT_T, B, D, make, make_state, make_x, whole


def total(state):
    """A number that depends on everything in a state."""
    return sum(value.square().sum() for value in state.values() if value.is_floating_point())


def gradients(loss, module, *inputs):
    """Of ``inputs`` and parameters, zeros where there is none."""
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


class CountFlops(TorchDispatchMode):
    """Flops of all matrix products in ``total``."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.total += op_flops(func, args, kwargs or {}, out)
        return out


class OneOfMany(LocalCarry):
    """Makes a module take the path of a split sequence while there is one rank only."""

    local = False


class OwnHeads:
    """The exchange of heads with nobody else: columns are copied as they would be."""

    rank, ranks = 0, 1

    def whole(self, bounds):
        return bounds

    def to_heads(self, x_BnF, columns, bounds):
        return torch.cat([x_BnF[..., first:last] for first, last in columns[0]], -1)

    def to_tokens(self, o_BSE, columns, bounds):
        return torch.cat([o_BSE[..., first:last] for first, last in columns[0]], -1)

    def together(self, x_Bh, rows, n_rows):
        return x_Bh


class OneOfManyByHeads(OneOfMany):
    """The same for a sequence that is shared by heads."""

    heads = OwnHeads()


SCENARIOS = {"one document": (False, 0, True), "packed": (True, 0, False), "packed, tiles, state": (True, 5, True)}
"""Packed documents, tile_tokens, whether a state is handed in."""
SIZES, LAYOUTS = (2, 3, 4), ("contiguous", "zigzag")


def split_run(name, module, scenario, take=lambda z: z, ranges=None, share=1):
    """Output, gradients (input, state, parameters) and final state of this rank's part; ``share``: ranks that hold the same final state."""
    packed, tile, with_state = SCENARIOS[scenario]
    module.tile_tokens = tile - tile % module.traits.granularity
    bounds = whole(SPLIT_T, packed)
    state = {k: v.requires_grad_(v.is_floating_point()) for k, v in make_state(name).items()} if with_state else None
    x = take(make_x(SPLIT_T)).clone().requires_grad_()
    weight = take(torch.randn(B, SPLIT_T, D, generator=torch.Generator().manual_seed(3), dtype=x.dtype))
    y, after = module(x, state, bounds if ranges is None else bounds.with_ranges(ranges))
    loss = (y * weight).sum() + (total(after) / share if with_state else 0)
    given = [v for v in (state or {}).values() if v.requires_grad]
    dx, *rest = gradients(loss, module, x, *given)
    return {"y": y.detach(), "dx": dx, "summed": rest, "after": {k: v.detach() for k, v in after.items()} if with_state else {}}


def ways(name, size, scenario):
    """(exchange, layout) of everything that the traits claim for ``size`` ranks; without documents the first exchange is enough."""
    module = make(name)
    exchanges = ("ulysses",) if name in BY_HEADS else ("states",) if scenario == "one document" else ("states", "ring")
    return sorted(product([e for e in exchanges if refused_exchange(e, module, size) is None], module.traits.layouts))


def carry_over(exchange, layout, group):
    """The ring with as many blocks of columns as there can be."""
    state_blocks.BLOCK_BYTES = 1
    return RingCarry(group, layout, ring=exchange == "ring", by_heads=exchange == "ulysses")


def on_ranks(names):
    """Every case in every layout and exchange on groups of the first 2, 3 and 4 ranks; one answer per (name, layout, size, scenario)."""
    torch.manual_seed(0)
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    answers = {}
    for size, group in groups.items():
        if dist.get_rank() >= size:
            continue
        for name in names:
            for scenario, how in ((each, how) for each in SCENARIOS for how in ways(name, size, each)):
                exchange, layout = how
                ranges = ranges_for(layout, SPLIT_T, dist.get_rank(), size)
                module = make(name)
                module.carry = carry_over(exchange, layout, group)
                try:
                    part = split_run(name, module, scenario, lambda z, r=ranges: torch.cat([z[:, a:b] for a, b in r], 1), ranges, size)
                except Exception as error:
                    raise AssertionError(f"{name}, {exchange}, {layout}, {size} ranks, {scenario}") from error
                answers[name, how, size, scenario] = (ranges, part)
    return answers
