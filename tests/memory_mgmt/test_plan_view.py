"""What people read of a plan: policy lines, time split, host and address lines, on a pipe and on a terminal."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_mgmt.plan import GIB, Addresses, Change, MemoryPlan, Moment, Prediction, Term
from memory_mgmt.plan_view import percent, plain, policy_lines, prediction_lines, ranges, render, seconds, split_text
from memory_mgmt.policy import KEEP, KEEP_ALL, RECOMPUTE, SWAP, LayerPolicy, Policy, Split

SWAPPED = LayerPolicy(SWAP, RECOMPUTE, KEEP, Split(0.4, 0.0, 0.6))
PREDICTION = Prediction(
    step_seconds=374.0,
    tokens_per_second=2803.7,
    mfu=0.481,
    compute_seconds=352.8,
    recompute_seconds=70.0,
    exposed_communication_seconds=20.0,
    exposed_copy_seconds=1.2,
    host_bytes_per_node=320 * GIB,
    copied_bytes=80 * GIB,
    source="data sheet of h100",
)
PLAN = MemoryPlan(
    method="trace of one step",
    device="h100",
    ranks=8,
    terms=(Term("parameters", "parameters", 2 * GIB, 2 * GIB, "4 bytes each"), Term("inputs", "activations", 30 * GIB, 31 * GIB, "kept")),
    moments=(Moment("forward", GIB), Moment("backward blocks.3", 32 * GIB)),
    budget_bytes=72 * GIB,
    device_bytes=79 * GIB,
    not_counted=("writing a checkpoint",),
    changes=(Change("parallel.cp=16", 17 * GIB, "twice the ranks"),),
    host_bytes=40 * GIB,
    policy=Policy((SWAPPED,) * 30 + (KEEP_ALL,) * 2, ffn_tile_tokens=2048),
    prediction=PREDICTION,
    addresses=Addresses(31 * GIB, 31 * GIB, "optimal", "search", 1.25),
    binding="device memory in the backward pass of layer 3",
    worth=("1 GiB more device memory: 2.1 s less per step (0.56%)", "1 GB/s more copy bandwidth: 0.3 s less per step (0.08%)"),
)


def on_terminal(plan: MemoryPlan) -> str:
    from rich.console import Console

    console = Console(width=200, record=True, force_terminal=True, file=io.StringIO())
    console.print(render(plan))
    return console.export_text()


@pytest.mark.parametrize("show", [plain, on_terminal])
def test_every_fact_of_a_full_plan_is_shown(show):
    text = " ".join(show(PLAN).split())
    for expected in (
        "memory plan (trace of one step; h100, 8 ranks)",
        "inputs",
        "30.00 GiB 94 % kept",
        "0-29 input swap q,k,v recompute mixer keep feed-forward keep 40 % recompute 60 %",
        "30-31 input keep q,k,v keep mixer keep feed-forward keep",
        "feed-forward in tiles of 2,048 tokens",
        "374 s: compute 283 s (76 %), recompute 70 s (19 %), exposed communication 20 s (5 %), exposed copies 1.2 s (0.3 %)",
        "2,804 tokens/s, MFU 48.1 %",
        "data sheet of h100",
        "40.00 GiB per rank, 320.00 GiB per node",
        "80.00 GiB per rank and step, 0.23 GB/s",
        "ratio 1.0000: optimal (search, 1.25 s)",
        "binding device memory in the backward pass of layer 3",
        "more would buy 1 GiB more device memory: 2.1 s less per step",
        "1 GB/s more copy bandwidth: 0.3 s",
        "planned peak 32.00 GiB per rank at 'backward blocks.3'; fits",
        "parallel.cp=16 -> 17.00 GiB (twice the ranks)",
        "writing a checkpoint",
    ):
        assert expected in text, expected


def test_what_a_plan_does_not_hold_is_left_out():
    bare = MemoryPlan("estimate", "cpu", 1, PLAN.terms, PLAN.moments, None, None)
    shown = plain(bare)
    for absent in ("layers", "predicted", "host", "addresses", "binding", "would buy", "None", "not counted"):
        assert absent not in shown
    assert "1 rank)" in shown and "(no limit)" in shown


def test_columns_of_plain_text_line_up():
    lines = plain(PLAN).splitlines()
    column = lines[1].index("kind")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines[1:4])
    labels = [line for line in lines[6:] if line]
    assert {re.match(r"(.{16})", line)[1][-2:] for line in labels} == {"  "}


def test_time_that_no_part_explains_is_shown():
    from dataclasses import replace

    slow = replace(PREDICTION, step_seconds=400.0, mfu=None)
    (_, split), (_, speed), _ = prediction_lines(slow)
    assert split.endswith("other 26 s (6 %)") and "MFU" not in speed


def test_equal_layers_are_one_line_wherever_they_are():
    lines = policy_lines(Policy((SWAPPED, KEEP_ALL) * 4, group_blocks=2))
    assert lines[0].startswith("0-6 every 2nd  input swap") and lines[1].startswith("1-7 every 2nd  input keep")
    assert lines[2].startswith("only the input of every 2nd block is held; loss in tiles of 4,096 tokens")
    assert len(lines) == 3


def test_splits_in_words():
    assert split_text(Split(0.25, 0.5, 0.25)) == "swap 50 % keep 25 % recompute 25 %"
    assert split_text(Split(0.999, 0.0, 0.001)) == "keep"
    assert [seconds(t) for t in (1234.5, 12.34, 0.0451)] == ["1,234 s", "12.3 s", "45.1 ms"]
    assert [percent(s) for s in (0.0, 0.00001, 0.004, 0.38, 1.0)] == ["0 %", "<0.1 %", "0.4 %", "38 %", "100 %"]


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_can_be_read_back(numbers):
    read: list[int] = []
    for part in ranges(sorted(numbers)).split(", "):
        first, last, step = re.fullmatch(r"(\d+)(?:-(\d+)(?: every (\d+)..)?)?", part).groups()
        read += range(int(first), int(last or first) + 1, int(step or 1))
    assert read == sorted(numbers)
