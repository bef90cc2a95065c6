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


def on_cuda(*buffers: TracedBuffer, arena: bool) -> MemoryPlan:
    trace = Trace("cuda", list(buffers), [], [(1, "forward blocks.0")], 40)
    return plan_of_trace(trace, DEVICES["h100"], 1, Limits(None, None), arena=arena)


def test_on_cuda_the_arenas_region_and_the_rest_of_the_caching_allocator_are_counted():
    """Sizes that grow leave the caching allocator with a hole behind each; the arena's region has none."""
    growing = [block(i, i, i + 1, 4 * i) for i in range(2, 9)]
    small = [TracedBuffer(50 + i, 1 + i, 3 + i, MIB // 4, MIB // 4, "transient", "aten::mm", "", 0, "forward", "forward") for i in range(8)]
    kept = block(99, 1, 40, 10)  # lives on: not in the region
    plain, served = (on_cuda(*growing, *small, kept, arena=arena) for arena in (False, True))
    (term,) = (t for t in served.terms if t.name == "reserved but not used")
    assert "arena's region of 32.0 MiB" in term.formula, term.formula
    # What is watched first takes what the caching allocator takes, so the arena cannot make a step fit that does not fit without it.
    assert served.peak_bytes >= plain.peak_bytes and held(plain, "reserved but not used") <= held(served, "reserved but not used")
    assert MemoryPlan.from_json(served.to_json()) == served


def test_on_cuda_the_arena_may_need_more_than_the_caching_allocator_and_the_plan_says_so():
    """Tensors of 1 MiB that take turns with smaller ones share the caching allocator's memory, but not the region's."""
    turns = [block(i, 2 * i, 2 * i + 1, 2) for i in range(1, 5)]
    small = [
        TracedBuffer(50 + i, 2 * i + 1, 2 * i + 2, MIB - 1, MIB - 1, "transient", "aten::mm", "", 0, "forward", "forward")
        for i in range(1, 5)
    ]
    plain, served = (on_cuda(*turns, *small, arena=arena) for arena in (False, True))
    assert served.peak_bytes - plain.peak_bytes == 2 * MIB


def test_on_cuda_a_stream_cannot_take_what_another_one_freed():
    """The caching allocator has a pool per stream: gathered parameters leave theirs behind."""
    one_after_another = [block(1, 2, 4, 8), replace(block(2, 5, 7, 8), stream="side 1"), block(3, 8, 10, 8)]
    same = on_cuda(*(replace(b, stream="compute") for b in one_after_another), arena=False)
    apart = on_cuda(*one_after_another, arena=False)
    assert held(same, "reserved but not used") == 0
    assert held(apart, "reserved but not used") == 8 * MIB
