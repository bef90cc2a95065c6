"""The cost model against sums done by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_mgmt.cost_model import Curve, Rates, Topology, op_class, op_seconds, predict_step, step_schedule
from memory_mgmt.cost_rates import dtype_name, rates_from_dict, rates_to_dict
from memory_mgmt.devices import DEVICES, Device
from memory_mgmt.trace import Trace, TracedBuffer, TracedOp
from parallel.dims import ParallelDims

ONE = Topology(1)
# Round numbers: 1 TFLOP/s products, 500 and 250 GFLOP/s attention, 100 GB/s memory, 10 GB/s links, no latency.
LEVEL = {"bf16": Curve.level(1e12), "fp32": Curve.level(1e11)}
ROUND = Rates(
    matmul=LEVEL,
    batched_matmul=LEVEL,
    attention_forward={"bf16": Curve.level(5e11)},
    attention_backward={"bf16": Curve.level(2.5e11)},
    elementwise=Curve.level(1e11),
    math=Curve.level(5e10),
    launch_seconds=0.0,
    copy_out=1e10,
    copy_in=2e10,
    devices_per_host_link=1,
    numa_nodes=1,
    host_bandwidth=math.inf,
    link=1e10,
    link_latency=0.0,
    network=1e9,
    network_latency=0.0,
    overlap=True,
    shared=False,
    source="round numbers",
)


def op(name: str, time: int = 0, **changes: Any) -> TracedOp:
    values: dict[str, Any] = {"module": "", "layer": None, "phase": "forward", "flops": 0, "bytes": 0, "dtype": "bf16"} | changes
    return TracedOp(time=time, name=name, **values)


def trace_of(stretches: list[tuple[str, str, list[TracedOp]]], buffers: list[TracedBuffer] | None = None) -> Trace:
    """A trace of (label, phase, operations); times are given by order."""
    ops, marks, time = [], [], 0
    for label, phase, work in stretches:
        marks.append((time, label))
        for entry in work:
            ops.append(replace(entry, time=time, phase=phase))
            time += 1
    return Trace("cuda", buffers or [], ops, marks, time)


def mm(seconds: float, **changes: Any) -> TracedOp:
    return op("aten::mm", flops=round(seconds * 1e12), **changes)


def predict(stretches: list[tuple[str, str, list[TracedOp]]], rates: Rates = ROUND, topology: Topology = ONE):
    return predict_step(trace_of(stretches), rates, topology, tokens_per_step=1000, model_flops_per_step=1e12, peak_flops=2e12)


# --- one operation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("traced", "seconds"),
    [
        (op("aten::mm", flops=2 * 10**12, bytes=10**9), 2.0),  # work decides
        (op("aten::mm", flops=10**9, bytes=10**11), 1.0),  # traffic decides
        (op("aten::addmm", flops=10**11, dtype="torch.float32"), 1.0),
        (op("aten::bmm", flops=10**12, dtype="float16"), 1.0),
        (op("aten::_flash_attention_forward", flops=10**12), 2.0),
        (op("aten::_flash_attention_backward", flops=10**12), 4.0),
        (op("aten::_scaled_dot_product_flash_attention_for_cpu_backward", flops=10**12), 4.0),
        (op("aten::add", bytes=10**11, dtype="int64"), 1.0),
        (op("aten::silu_backward", bytes=10**11), 2.0),
        (op("aten::_log_softmax.out", bytes=10**11), 2.0),
        (op("aten::expand_copy", bytes=10**11), 1.0),
        (op("fsdp::all_gather_copy_in", bytes=10**11, stream="communication"), 1.0),
        (op("aten::copy_", message_bytes=10**10, stream="copy_out"), 1.0),
        (op("aten::copy_", message_bytes=10**10, stream="copy_in"), 0.5),
        (op("aten::_to_copy", bytes=2 * 10**10, stream="copy_out"), 1.0),  # read here, written there
        (op("c10d::allreduce_", group_size=1, message_bytes=10**10), 0.0),
        (op("aten::_unsafe_view", bytes=10**11), 0.0),
        (op("_c10d_functional::wait_tensor", group_size=8, message_bytes=10**10), 0.0),
    ],
)
def test_one_operation(traced: TracedOp, seconds: float) -> None:
    assert op_seconds(traced, ROUND, ONE) == pytest.approx(seconds)
    assert op_seconds(traced, replace(ROUND, launch_seconds=0.25), ONE) == pytest.approx(seconds + 0.25 * (op_class(traced) != "nothing"))


def test_repeats_are_so_many_smaller_operations() -> None:
    faster_when_large = {"bf16": Curve(((1e9, 1e11), (1e12, 1e12)))}
    rates = replace(ROUND, matmul=faster_when_large, launch_seconds=0.5, link_latency=0.25)
    ten = op("aten::mm", flops=10**10, repeats=10)
    assert op_seconds(ten, rates, ONE) == pytest.approx(10 * (0.01 + 0.5))
    copies = op("aten::copy_", message_bytes=10**10, stream="copy_out", repeats=4)
    assert op_seconds(copies, rates, ONE) == pytest.approx(1.0 + 4 * 0.5)
    sends = op("c10d::send", message_bytes=10**10, group_size=2, repeats=4)
    assert op_seconds(sends, rates, Topology(2, cp=2)) == pytest.approx(1.0 + 4 * 0.25)


def test_collectives_inside_a_node() -> None:
    """8 ranks on one node, 8 GB over 10 GB/s: the well-known (n-1)/n and 2 (n-1)/n."""
    node = Topology(8, cp=8)

    def seconds(name: str, rates: Rates = ROUND, **changes: Any) -> float:
        return op_seconds(op(name, **({"group_size": 8, "message_bytes": 8 * 10**9} | changes)), rates, node)

    assert seconds("c10d::_allgather_base_") == pytest.approx(0.7)
    assert seconds("_c10d_functional::all_gather_into_tensor") == pytest.approx(0.7)
    assert seconds("c10d::_reduce_scatter_base_") == pytest.approx(0.7)
    assert seconds("c10d::allreduce_") == pytest.approx(1.4)
    assert seconds("c10d::alltoall_base_") == pytest.approx(0.7)
    assert seconds("c10d::broadcast_") == pytest.approx(0.8)
    assert seconds("c10d::send") == seconds("c10d::recv_") == pytest.approx(0.8)
    late = replace(ROUND, link_latency=1.0)
    assert seconds("c10d::_allgather_base_", late, message_bytes=0) == 7.0  # a ring of 8 has 7 steps
    assert seconds("c10d::allreduce_", late, message_bytes=0) == 6.0  # a tree up and down
    assert seconds("c10d::send", late, message_bytes=0) == 1.0


def test_collectives_between_nodes() -> None:
    """32 ranks on 4 nodes: 8 adapters of 1 GB/s carry 3/4 of an all-gather into each node, NVLink 31/32 of it to each rank."""
    cluster = Topology(8, cp=32)

    def seconds(name: str, topology: Topology = cluster, group: int = 32) -> float:
        return op_seconds(op(name, group_size=group, message_bytes=32 * 10**9), ROUND, topology)

    assert seconds("c10d::_allgather_base_") == pytest.approx(max(31 / 10, 32 * 3 / 4 / 8))
    assert seconds("c10d::alltoall_base_") == pytest.approx(24.0)  # every rank sends 24 of its 32 parts through its own adapter
    assert seconds("c10d::send") == pytest.approx(32.0)
    # cp 4 x dp_shard 2 fill a node of 8, so the group of the 4 replicas has one rank on each node; cp stays inside.
    hybrid = Topology(8, cp=2, dp_shard=4, dp_replicate=3)
    assert hybrid.members_per_node(3) == 1 and hybrid.ranks == 24
    assert seconds("c10d::allreduce_", hybrid, 3) == pytest.approx(2 * 32 * 2 / 3)
    assert seconds("c10d::send", hybrid, 2) == pytest.approx(3.2)


def test_topology_of_a_mesh() -> None:
    assert Topology.of(ParallelDims(cp=2), 8) == Topology(2, cp=2)
    shared = Topology.of(ParallelDims(cp=8, tp=2), 8)
    assert shared.ranks == 16 and shared.members_per_node(8) == 4, "ranks of a cp group lie tp apart"
    assert not shared.crosses_nodes(2, stride=1) and shared.crosses_nodes(2, stride=8), "what is known of a group counts"
    topology = Topology.of(ParallelDims(dp_replicate=2, dp_shard=2, cp=4), 8)
    assert (topology.ranks, topology.shard, topology.ranks_per_node) == (16, 8, 8)
    assert not topology.crosses_nodes(8) and topology.crosses_nodes(16)
    with pytest.raises(ValueError, match="at least 1"):
        Topology(0)


def test_host_link_is_shared() -> None:
    copy = op("aten::copy_", message_bytes=10**10, stream="copy_out")
    two_per_link = replace(ROUND, devices_per_host_link=2)
    assert op_seconds(copy, two_per_link, Topology(1)) == pytest.approx(1.0)  # alone on it
    assert op_seconds(copy, two_per_link, Topology(8, cp=8)) == pytest.approx(2.0)
    # 8 ranks on 2 NUMA nodes of 16 GB/s: 4 GB/s each, less than the link gives.
    slow_memory = replace(ROUND, numa_nodes=2, host_bandwidth=1.6e10)
    assert op_seconds(copy, slow_memory, Topology(8, cp=8)) == pytest.approx(2.5)


def test_ranks_of_one_cpu_share_its_rates() -> None:
    cpu = replace(ROUND, shared=True, overlap=False)
    assert op_seconds(mm(1.0), cpu, Topology(2, cp=2)) == pytest.approx(2.0)
    assert op_seconds(op("aten::copy_", message_bytes=10**10, stream="copy_out"), cpu, Topology(2, cp=2)) == pytest.approx(2.0)


def test_unknown_costs_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"c10d::scatter_ \(group of 4\)"):
        op_seconds(op("c10d::scatter_", group_size=4, message_bytes=8), ROUND, Topology(4, cp=4))
    with pytest.raises(ValueError, match="no rate for fp8"):
        op_seconds(op("aten::_scaled_mm", flops=1, dtype="fp8"), ROUND, ONE)


@given(st.integers(0, 10**13), st.integers(0, 10**12), st.integers(1, 10), st.sampled_from(["aten::mm", "aten::silu", "aten::add"]))
def test_more_work_never_takes_less_time(flops: int, traffic: int, factor: int, name: str) -> None:
    rates = Rates.from_device(DEVICES["h100"])
    small, large = op(name, flops=flops, bytes=traffic), op(name, flops=flops * factor, bytes=traffic * factor)
    assert op_seconds(small, rates, ONE) <= op_seconds(large, rates, ONE)


@given(
    st.integers(2, 64),
    st.integers(0, 10**12),
    st.sampled_from(["allreduce_", "_allgather_base_", "_reduce_scatter_base_", "alltoall_base_"]),
)
def test_crossing_nodes_never_takes_less_time(group: int, message: int, name: str) -> None:
    rates = Rates.from_device(DEVICES["h100"])
    traced = op(f"c10d::{name}", group_size=group, message_bytes=message)
    inside, across = (op_seconds(traced, rates, Topology(n, cp=group)) for n in (group, 1))
    assert inside <= across


# --- rates --------------------------------------------------------------------------------------------------------------------


def test_curve() -> None:
    curve = Curve(((10, 1.0), (1000, 100.0)))
    assert [curve.at(size) for size in (1, 10, 100, 1000, 10**6)] == pytest.approx([1, 1, 10, 100, 100])
    assert curve.seconds(0) == 0 and curve.seconds(2000) == 20
    assert curve.scaled(2).at(100) == pytest.approx(20)
    for points in ((), ((1, 0),), ((2, 1), (1, 1)), ((1, 1), (1, 2)), ((1, math.nan),)):
        with pytest.raises(ValueError, match="positive with rising sizes"):
            Curve(points)


def test_rates_of_the_device_table() -> None:
    h100 = Rates.from_device(DEVICES["h100"])
    # 595 and 516 TFLOP/s is what the FlashAttention-3 paper measured of cuDNN, 370 and 322 of FlashAttention-2.
    cudnn = Rates.from_device(DEVICES["h100"], attention="cudnn")
    for rates, forward, backward in ((h100, 370e12, 322e12), (cudnn, 595e12, 516e12)):
        assert rates.attention_forward["bf16"].at(1e15) == pytest.approx(forward, rel=0.01)
        assert rates.attention_backward["bf16"].at(1e15) == pytest.approx(backward, rel=0.01)
    a800, a100 = Rates.from_device(DEVICES["a800"]), Rates.from_device(DEVICES["a100-80"])
    assert a800.link / a100.link == pytest.approx(200 / 300) and a800.matmul == a100.matmul
    # 12 GB/s per device is what explains MEMO's crossover at 192K tokens.
    copy = op("aten::copy_", message_bytes=12 * 10**9, stream="copy_out")
    assert op_seconds(copy, a800, Topology(8, cp=8)) == pytest.approx(1.0, rel=0.1)
    assert "assumed" in Rates.from_device(DEVICES["cpu"], cores=2).source
    with pytest.raises(ValueError, match="no attention kernel 'flash9' is known on h100; known: flash2, cudnn, flash3"):
        Rates.from_device(DEVICES["h100"], attention="flash9")
    with pytest.raises(ValueError, match="calibrate"):
        Rates.from_device(Device("NVIDIA T4", None, {}, ("T4",)))


def test_every_device_is_complete_and_ordered() -> None:
    for device in DEVICES.values():
        if device.is_cuda:
            assert device.reached and device.node and device.memory_bandwidth
            assert all(
                0 < share < 1 for share in (device.reached.matmul, device.reached.memory, device.reached.link, device.reached.network)
            )
            assert all(0 < k.backward <= k.forward < 1 for k in device.reached.attention.values())
            assert "flash2" in device.reached.attention and device.node.network < device.node.link
    bandwidths = [DEVICES[name].memory_bandwidth for name in ("a800", "h100", "h200", "b200")]
    assert bandwidths == sorted(bandwidths)


def test_rates_survive_json() -> None:
    for rates in (ROUND, Rates.from_device(DEVICES["b200"]), Rates.from_device(DEVICES["cpu"], cores=4)):
        assert rates_from_dict(rates_to_dict(rates)) == rates
    assert [dtype_name(name) for name in ("torch.bfloat16", "float32", "fp64", "int64")] == ["bf16", "fp32", "fp64", "int64"]


# --- the step -----------------------------------------------------------------------------------------------------------------


def test_prediction_adds_up() -> None:
    host = TracedBuffer(0, 0, 9, 512, 512, "skeletal", "", "", None, "forward", "backward", place="host")
    trace = trace_of(
        [("forward blocks.0", "forward", [mm(1.0)]), ("backward blocks.0", "backward", [mm(0.5, recompute=True), mm(2.0)])], [host]
    )
    p = predict_step(trace, ROUND, Topology(2, cp=2), tokens_per_step=700, model_flops_per_step=3.5e12, peak_flops=1e12)
    assert (p.step_seconds, p.compute_seconds, p.recompute_seconds) == pytest.approx((3.5, 3.5, 0.5))
    assert p.tokens_per_second == pytest.approx(200) and p.mfu == pytest.approx(0.5)
    assert p.exposed_communication_seconds == p.exposed_copy_seconds == p.copied_bytes == 0
    assert p.host_bytes_per_node == 1024 and p.source == "round numbers"
    unknown = predict_step(trace, ROUND, ONE, tokens_per_step=1, model_flops_per_step=1.0)
    assert unknown.mfu is None


GATHER = [op("fsdp::all_gather_copy_in"), op("c10d::_allgather_base_", group_size=8, message_bytes=8 * 10**9)]  # 0.7 s
SCATTER = [op("fsdp::chunk_cat"), op("c10d::_reduce_scatter_base_", group_size=8, message_bytes=8 * 10**9)]  # 0.7 s
NODE = Topology(8, dp_shard=8)


def test_gathers_of_parameters_hide_behind_the_stretch_before() -> None:
    long, short = [*GATHER, mm(1.0)], [*GATHER, mm(0.2)]
    p = predict([(f"forward blocks.{i}", "forward", long) for i in range(4)], topology=NODE)
    assert p.exposed_communication_seconds == pytest.approx(0.7)  # only the first has nothing to hide behind
    p = predict([(f"forward blocks.{i}", "forward", short) for i in range(4)], topology=NODE)
    assert p.exposed_communication_seconds == pytest.approx(0.7 + 3 * 0.5) and p.step_seconds == pytest.approx(4 * 0.7 + 0.2)


def test_reductions_hide_behind_the_next_stretch() -> None:
    def step(seconds: float):
        backward = [(f"backward blocks.{i}", "backward", [mm(seconds), *SCATTER]) for i in range(3)]
        return predict([*backward, ("clip", "clip", [mm(0.1)])], topology=NODE)

    assert step(1.0).exposed_communication_seconds == pytest.approx(0.7)  # the last one, before clipping
    assert step(0.2).step_seconds == pytest.approx(0.2 + 3 * 0.7 + 0.1)  # the link never rests


def test_replicas_reduce_behind_the_next_stretch_too() -> None:
    """With dp_replicate an all-reduce of the shard follows the reduce-scatter; the norm's all-reduce is waited for."""
    shared = op("c10d::allreduce_", group_size=3, message_bytes=3 * 10**9)  # between nodes: 2 x 2 GB over 1 GB/s = 4 s
    hybrid = Topology(8, dp_shard=8, dp_replicate=3)
    backward = [(f"backward blocks.{i}", "backward", [mm(5.0), *SCATTER, shared]) for i in range(2)]
    p = predict(backward, topology=hybrid)
    assert p.step_seconds == pytest.approx(10.0 + 0.7 + 4.0) and p.exposed_communication_seconds == pytest.approx(4.7)
    assert predict([("clip", "clip", [mm(1.0), shared])], topology=hybrid).exposed_communication_seconds == pytest.approx(4.0)


def pair(phase: str = "forward") -> list[TracedOp]:
    return [op(f"c10d::{name}", group_size=8, message_bytes=5 * 10**9, phase=phase) for name in ("send", "recv_")]  # 0.5 s, both at once


def test_ring_transfers_hide_behind_the_attention_of_their_hop() -> None:
    def attend(seconds: float) -> TracedOp:
        return op("aten::_flash_attention_forward", flops=round(seconds * 5e11))

    hidden = [*pair(), attend(1.0), *pair(), attend(1.0), attend(1.0)]
    assert predict([("forward blocks.0", "forward", hidden)], topology=NODE).exposed_communication_seconds == 0
    shown = [*pair(), attend(0.1), *pair(), attend(0.1), attend(0.1)]
    p = predict([("forward blocks.0", "forward", shown)], topology=NODE)
    # The second transfer waits for the first (0.4 not hidden) and the stretch for the second (0.3, behind two attentions).
    assert p.exposed_communication_seconds == pytest.approx(0.4 + 0.3)
    # Backward: keys and gradients are under way together; the third transfer waits for the first only.
    two = [*pair("backward"), attend(0.5), *pair("backward"), attend(0.5)]
    assert predict([("backward blocks.0", "backward", two)], topology=NODE).exposed_communication_seconds == 0


def test_blocking_collectives_are_exposed() -> None:
    work = [
        op("c10d::alltoall_base_", group_size=8, message_bytes=8 * 10**9),
        mm(5.0),
        op("c10d::allreduce_", group_size=8, message_bytes=8 * 10**9),
    ]
    assert predict([("forward blocks.0", "forward", work)], topology=NODE).exposed_communication_seconds == pytest.approx(0.7 + 1.4)


def test_copies_hide_behind_this_and_the_next_stretch() -> None:
    out = op("aten::copy_", message_bytes=2 * 10**10, stream="copy_out")  # 2 s
    back = op("aten::copy_", message_bytes=2 * 10**10, stream="copy_in")  # 1 s
    forward = [(f"forward blocks.{i}", "forward", [out, mm(2.0)]) for i in range(4)]
    p = predict(forward)
    assert p.exposed_copy_seconds == 0 and p.copied_bytes == 8 * 10**10
    # 1 s of computation for each 2 s copy: the copy engine sets the pace.
    p = predict([(label, phase, [out, mm(1.0)]) for label, phase, _ in forward])
    assert p.step_seconds == pytest.approx(8.0) and p.exposed_copy_seconds == pytest.approx(4.0)
    # A copy back is needed one stretch after it was started.
    p = predict([("backward blocks.1", "backward", [back, mm(0.25)]), ("backward blocks.0", "backward", [mm(0.25)])])
    assert p.exposed_copy_seconds == pytest.approx(0.75)


def test_an_offloaded_optimizer_s_buckets_come_and_go_two_at_a_time() -> None:
    out = op("aten::copy_", message_bytes=2 * 10**10, stream="copy_out")  # 2 s
    back = op("aten::copy_", message_bytes=2 * 10**10, stream="copy_in")  # 1 s
    work = mm(0.1)
    buckets = [("update embed", "update", [back, work, out]), ("update blocks.0", "update", [back, work, out])]
    p = predict([("update", "update", [back]), *buckets, ("update blocks.1", "update", [work, out])])
    # The first comes until 1.0 and leaves from 1.1 to 3.1, the second from 3.1 to 5.1. The third comes, from 3.1 to 4.1, into the buffer
    # that the first has left, and leaves from 5.1 to 7.1.
    assert p.step_seconds == pytest.approx(7.1) and p.exposed_copy_seconds == pytest.approx(7.1 - 0.3)
    # Long updates hide all but the first copy in and the last one out.
    slow = [(label, phase, [replace(o, flops=30 * o.flops) for o in ops]) for label, phase, ops in buckets]
    p = predict([("update", "update", [back]), *slow, ("update blocks.1", "update", [mm(3.0), out])])
    assert p.step_seconds == pytest.approx(1.0 + 3 * 3.0 + 2.0)
    # Gradients arrive before the first bucket is touched.
    early = predict([("backward blocks.0", "backward", [mm(1.0), *SCATTER]), ("update", "update", [back])], topology=NODE)
    assert early.step_seconds == pytest.approx(1.0 + 0.7 + 1.0)


def test_more_passes_than_were_traced_repeat_all_but_the_update() -> None:
    stretches = [("forward blocks.0", "forward", [mm(1.0)]), ("backward blocks.0", "backward", [mm(2.0)])]
    update = [op("aten::copy_", message_bytes=10**10, stream="copy_out"), mm(0.5)]
    trace = trace_of([*stretches, ("clip", "clip", [mm(0.25)]), ("update", "update", update)])
    p = predict_step(trace, ROUND, ONE, tokens_per_step=120, model_flops_per_step=1.0, passes=4.0)
    assert p.compute_seconds == pytest.approx(4 * 3.0 + 0.75) and p.step_seconds == pytest.approx(12.0 + 0.25 + 1.0)
    assert p.copied_bytes == 10**10 and p.tokens_per_second == pytest.approx(120 / 13.25)


def test_nothing_overlaps_on_a_cpu() -> None:
    out = op("aten::copy_", message_bytes=10**10, stream="copy_out")
    stretches = [(f"forward blocks.{i}", "forward", [*GATHER, *pair(), out, mm(3.0)]) for i in range(2)]
    p = predict(stretches, replace(ROUND, overlap=False), NODE)
    assert p.step_seconds == pytest.approx(2 * (0.7 + 0.5 + 1.0 + 3.0))
    assert p.exposed_communication_seconds == pytest.approx(2 * 1.2) and p.exposed_copy_seconds == pytest.approx(2.0)


WORK = st.sampled_from([*GATHER, *SCATTER, *pair(), mm(0.3), mm(2.0), op("aten::copy_", message_bytes=10**10, stream="copy_out")])
STRETCH = st.tuples(st.sampled_from(["forward", "loss", "backward", "clip", "update"]), st.lists(WORK, min_size=1, max_size=6))


@given(st.lists(STRETCH, max_size=6))
def test_bounds_of_any_step(work: list[tuple[str, list[TracedOp]]]) -> None:
    """No shorter than computation or any one link alone, no longer than everything one after the other; the parts add up."""
    stretches = [(f"{phase} {i}", phase, ops) for i, (phase, ops) in enumerate(work)]
    p = predict(stretches, topology=NODE)
    assert p.step_seconds == pytest.approx(p.compute_seconds + p.exposed_communication_seconds + p.exposed_copy_seconds)
    seconds = [(op_class(traced), op_seconds(traced, ROUND, NODE)) for _, ops in work for traced in ops]
    assert p.step_seconds <= sum(s for _, s in seconds) + 1e-9
    for engine in ({"matmul", "elementwise"}, {"copy_out"}, {"receive"}, {"all_gather", "reduce_scatter"}):
        assert p.step_seconds >= sum(s for kind, s in seconds if kind in engine) - 1e-9


def test_schedule_gives_the_windows() -> None:
    trace = trace_of([("forward blocks.0", "forward", [mm(1.0, layer=0)]), ("forward blocks.1", "forward", [mm(3.0, layer=1)])])
    first, second = step_schedule(trace, ROUND, ONE)
    assert (first.label, first.layer, first.start, first.end) == ("forward blocks.0", 0, 0.0, 1.0)
    assert (second.label, second.layer, second.start, second.end, second.compute) == ("forward blocks.1", 1, 1.0, 4.0, 3.0)
    assert step_schedule(trace_of([]), ROUND, ONE) == []


def test_needs_no_torch() -> None:
    code = "import sys, memory_mgmt.cost_model; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
