"""What a plan adds to the traced tensors of a CPU rank: holes of the heap by how freed blocks are handled, and oneDNN's kernels."""

from dataclasses import replace

import pytest

from memory_mgmt.devices import DEVICES, GIB, MIB
from memory_mgmt.overheads import ONEDNN_LIBRARY
from memory_mgmt.plan import MemoryPlan
from memory_mgmt.trace import Trace, TracedBuffer
from memory_mgmt.traced_plan import HOLES_SHARE, HOLES_SHARE_LEAST, Limits, plan_of_trace


def block(i, lower, upper, mib):
    return TracedBuffer(i, lower, upper, mib * MIB, mib * MIB, "transient", "aten::mm", "blocks.0", 0, "forward", "forward")


LARGE = block(1, 9, 12, 64)
TRACE = Trace("cpu", [*(block(i, i, i + 8, 8) for i in range(2, 6)), LARGE], [], [(1, "forward blocks.0")], 20)
SMALL = 4 * 8 * MIB
"""Live at once of blocks below 32 MiB."""


def planned(trace=TRACE, budget=None, **settings):
    return plan_of_trace(trace, DEVICES["cpu"], 1, Limits(budget, None), **settings)


def held(plan: MemoryPlan, name: str) -> int:
    return sum(term.bytes for term in plan.terms if term.name == name)


def test_an_ordinary_heaps_holes_are_planned_at_most_and_the_plan_says_how_much_less_a_run_may_hold():
    plan = planned()
    assert not plan.return_freed_blocks
    assert held(plan, "heap holes") == pytest.approx(HOLES_SHARE * SMALL, abs=1)
    assert plan.spread_bytes == pytest.approx((HOLES_SHARE - HOLES_SHARE_LEAST) * SMALL, abs=2)
    assert "up to 19.2 MiB less" in plan.not_counted[-1]
    assert MemoryPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("settings", [{"budget": GIB}, {"arena": True}])
def test_holes_that_go_back_to_the_system_leave_nothing_to_chance(settings):
    plan = planned(**settings)
    assert plan.spread_bytes == 0 and not any("heap" in text for text in plan.not_counted)
    assert held(plan, "heap holes") < 0.1 * SMALL
    assert plan.return_freed_blocks == ("budget" in settings)


def test_no_limit_that_an_ordinary_heap_is_planned_for_is_below_twice_its_holes_at_most():
    plan = planned(budget=2 * planned().peak_bytes)
    assert not plan.return_freed_blocks
    assert planned(budget=2 * planned().peak_bytes - 1).return_freed_blocks


def test_kernels_that_the_trace_counted_are_planned():
    plan = planned(replace(TRACE, notes={"onednn_kernels": 20}))
    assert held(plan, "oneDNN kernels") > ONEDNN_LIBRARY + 20 * MIB // 2
    assert plan.peak_bytes - planned().peak_bytes == held(plan, "oneDNN kernels")
    assert held(planned(), "oneDNN kernels") == 0
