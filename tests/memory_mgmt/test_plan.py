"""The plan's own arithmetic, its file format, and what it says when a run does not fit."""

import dataclasses
import io
import json
import subprocess
import sys

import pytest

from memory_mgmt.devices import DEVICES, device_from_torch_name, device_named
from memory_mgmt.plan import GIB, Change, MemoryPlan, Moment, Term, refusal, verdict
from memory_mgmt.plan_view import plain, render


def example(**changes) -> MemoryPlan:
    plan = MemoryPlan(
        method="test",
        device="h100",
        ranks=2,
        terms=(
            Term("parameters", "parameters", 2 * GIB, 2 * GIB, "4 bytes each"),
            Term("kept", "activations", 3 * GIB, 4 * GIB, "per layer"),
            Term("clipping", "transient", 0, GIB, "only at the end"),
            Term("context", "outside", GIB, GIB),
        ),
        moments=(Moment("forward", 5 * GIB), Moment("backward", 6 * GIB), Moment("optimizer", 4 * GIB)),
        budget_bytes=None,
        device_bytes=None,
        not_counted=("checkpoint writing",),
    )
    return dataclasses.replace(plan, **changes)


def test_peak_is_the_sum_of_its_terms_and_outside_is_not_measurable():
    plan = example()
    assert plan.peak_bytes == 6 * GIB
    assert plan.measurable_peak_bytes == 5 * GIB
    assert plan.peak_moment == "backward"
    assert plan.by_kind() == {"parameters": 2 * GIB, "activations": 3 * GIB, "outside": GIB}


def test_the_smaller_of_budget_and_device_decides():
    assert example().fits
    assert example(budget_bytes=6 * GIB, device_bytes=79 * GIB).fits
    assert not example(budget_bytes=6 * GIB - 1, device_bytes=79 * GIB).fits
    assert not example(budget_bytes=100 * GIB, device_bytes=5 * GIB).fits


def test_smallest_budget_fits_when_set():
    plan = example(terms=(Term("odd", "batch", 5 * GIB + 12_345, 5 * GIB + 12_345),))
    allowed = int(plan.smallest_budget_gib * GIB)
    assert dataclasses.replace(plan, budget_bytes=allowed).fits
    assert not dataclasses.replace(plan, budget_bytes=allowed - GIB // 100).fits


def test_json_round_trip_and_refused_files():
    plan = example(budget_bytes=7 * GIB, changes=(Change("memory.recompute=block", GIB, "one more forward"),))
    assert MemoryPlan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    assert data["derived"]["peak_bytes"] == plan.peak_bytes and data["derived"]["fits"] is True
    with pytest.raises(ValueError, match="version 99"):
        MemoryPlan.from_json(json.dumps({**data, "format_version": 99}))
    for broken in ("", "[]", "{}", '{"format_version": 2}', json.dumps({**data, "terms": [{"nonsense": 1}]})):
        with pytest.raises(ValueError, match="not a memory plan"):
            MemoryPlan.from_json(broken)


def test_refusal_names_the_limit_the_need_and_settings_that_fit():
    changes = (
        Change("memory.loss_tile_tokens=1024", 5 * GIB, "free"),
        Change("memory.recompute=block", 3 * GIB, "one more forward"),
    )
    text = refusal(example(budget_bytes=4 * GIB, changes=changes))
    assert len(text.splitlines()) == 2
    assert "memory.budget_gib 4:" in text and "memory.budget_gib=6.00" in text
    assert "memory.recompute=block -> 3.00 GiB" in text
    assert "loss_tile_tokens" not in text  # it lowers the peak but does not fit
    nearest = refusal(example(budget_bytes=2 * GIB, changes=changes))
    assert "no single setting fits" in nearest and nearest.index("recompute") < nearest.index("loss_tile")
    assert "shorten data.seq_len" in refusal(example(budget_bytes=2 * GIB))
    assert "on h100" in refusal(example(device_bytes=2 * GIB))
    with pytest.raises(ValueError, match="fits"):
        refusal(example())


def test_shown_plan_holds_every_term_the_verdict_and_what_is_missing():
    from rich.console import Console

    plan = example(budget_bytes=7 * GIB)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(plan))
    for shown in (plain(plan), console.export_text()):
        for expected in ("parameters", "kept", "context", "6.00 GiB", verdict(plan), "checkpoint writing"):
            assert expected in shown
        assert "clipping" not in shown  # nothing of it is held at the peak


def test_a_plan_that_does_not_fit_names_the_smallest_budget_that_is_enough():
    assert "would be enough memory.budget_gib=6.00\n" in plain(example(budget_bytes=5 * GIB))
    assert "would be enough memory.budget_gib=6.00 and a device that has it\n" in plain(example(device_bytes=5 * GIB))
    assert "would be enough" not in plain(example(budget_bytes=6 * GIB))


def test_device_table():
    assert device_named("H100").peak_tflops["bf16"] == 989.5
    with pytest.raises(ValueError, match="a100-80"):
        device_named("v100")
    named = {
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA A800-SXM4-80GB": "a800",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA B200": "b200",
        "NVIDIA A100-PCIE-40GB": None,
        "NVIDIA GeForce RTX 4090": None,
    }
    for torch_name, expected in named.items():
        device = device_from_torch_name(torch_name)
        assert (device.name if device else None) == expected, torch_name
    assert not DEVICES["cpu"].is_cuda and all(d.is_cuda and d.memory_bytes for d in DEVICES.values() if d.name != "cpu")


def test_planning_needs_no_torch():
    code = "import sys, memory_mgmt.plan, memory_mgmt.estimate, memory_mgmt.devices, models.flops; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
