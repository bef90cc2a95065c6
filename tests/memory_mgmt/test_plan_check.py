"""Measured against planned: when a line is due, what it says, and what counts as having run out of memory."""

from dataclasses import replace

import pytest
import torch

from memory_mgmt.offload import HostStore
from memory_mgmt.plan import MemoryPlan, Moment, Prediction, Term
from memory_mgmt.plan_check import PlanCheck, is_out_of_memory, tensor_bytes

GIB = 2**30


def plan(device="h100", size=10 * GIB):
    terms = (Term("parameters", "parameters", size, size), Term("context", "outside", GIB, GIB))
    return MemoryPlan("test", device, 1, terms, (Moment("loss", size + GIB),), None, None, host_bytes=GIB)


@pytest.mark.parametrize(("measured", "words"), [(10.2, None), (9.6, None), (10.6, "6% more than planned"), (9.0, "10% less than planned")])
def test_a_line_when_they_part_by_more_than_five_percent(measured, words):
    line = PlanCheck(plan()).warning(int(measured * GIB))
    assert (line is None) if words is None else (line is not None and words in line and "memory_plan.json" in line)


def test_one_line_until_the_gap_has_doubled():
    check = PlanCheck(plan())
    lines = [check.warning(int(m * GIB)) for m in (10.6, 10.7, 10.9, 11.5, 11.6)]
    assert [line is not None for line in lines] == [True, False, False, True, False]


def test_small_differences_of_a_resident_set_say_nothing():
    check = PlanCheck(plan("cpu", 2**28))
    assert check.warning(2**28 + 60 * 2**20) is None
    assert check.warning(2**28 + 80 * 2**20) is not None


def test_holes_that_a_run_happens_not_to_have_say_nothing():
    spread = replace(plan("cpu", GIB), spread_bytes=GIB // 4)
    assert PlanCheck(spread).warning(GIB - GIB // 4 - 60 * 2**20) is None
    assert PlanCheck(spread).warning(GIB - GIB // 4 - 80 * 2**20) is not None
    assert PlanCheck(spread).warning(GIB + 80 * 2**20) is not None  # never more


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match")) and not is_out_of_memory(ValueError())


def test_host_memory_is_measured_and_reset_each_step():
    with_store = PlanCheck(plan(), HostStore("cpu"))
    parked = with_store.store.park(torch.ones(2**16), (0, "x"))
    found = with_store.measurements()
    assert found["host_peak_bytes"] >= 2**18 and found["copied_bytes"] >= 2**18 and found["host_planned_bytes"] == GIB
    assert found["exposed_copy_seconds"] >= 0
    assert with_store.measurements()["copied_bytes"] == 0
    lines = with_store.state(11 * GIB)
    assert "planned 10.00 GiB" in " ".join(lines[1].split()) and "host memory" in lines[-1]
    parked.drop()
    assert PlanCheck(plan()).measurements() == {}


def test_host_memory_that_parts_from_its_plan_is_told_once():
    check = PlanCheck(replace(plan(), host_bytes=2**20), HostStore("cpu"))
    assert check.host_warning() is None  # nothing measured yet, and too little planned to miss
    parked = check.store.park(torch.empty(66 * 2**20, dtype=torch.uint8), (0, "x"))
    check.measurements()
    assert "host memory: measured 66.0 MiB, planned 1.0 MiB" in (check.host_warning() or "")
    assert check.host_warning() is None
    parked.drop()
    assert PlanCheck(plan()).host_warning() is None


def test_copies_are_measured_beside_their_prediction():
    predicted = Prediction(1.0, 1.0, None, 1.0, 0.0, 0.0, 0.25, 0, 0)
    found = PlanCheck(replace(plan(), prediction=predicted), HostStore("cpu")).measurements()
    assert (found["exposed_copy_seconds"], found["exposed_copy_planned_seconds"]) == (0.0, 0.25)


def test_state_counts_what_comes_and_goes_at_that_moment():
    terms = (Term("gradients", "gradients", GIB, GIB), Term("parameters", "parameters", GIB, GIB))
    check = PlanCheck(replace(plan(), terms=terms), resident={"parameters": GIB // 2})
    lines = [" ".join(line.split()) for line in check.state(2 * GIB, {"gradients": GIB // 4})]
    assert "gradients planned 1.00 GiB now 0.25 GiB" in lines and "parameters planned 1.00 GiB now 0.50 GiB" in lines


def test_tensor_bytes_counts_what_is_held_here():
    assert tensor_bytes({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.float64)}) == 28
