"""Planned tensors of one allocation: places, references, and the waits between streams against a graph of the whole program."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_mgmt.arena_streams import Sync, Tenant, Wait, needed_waits
from memory_mgmt.arena_tensors import PlannedTensor, TensorArena, use_expandable_segments

CPU = torch.device("cpu")
STREAMS = ("a", "b", "c")


@dataclass
class FakeStream:
    """Writes down what is asked of it; an event is the number of the entry that recorded it."""

    name: str
    log: list[tuple[str, str, Any]]

    def record_event(self) -> Any:
        self.log.append(("record", self.name, None))
        return (self.name, len(self.log) - 1)

    def wait_event(self, event: Any, /) -> None:
        self.log.append(("wait", self.name, event))


def two_in_one_place(second_stream: str = "compute") -> list[PlannedTensor]:
    return [
        PlannedTensor("first", 0, 2, (8, 16), torch.float32),
        PlannedTensor("second", 2, 4, (16, 8), torch.float32, (second_stream,)),
        PlannedTensor("beside", 0, 4, (3,), torch.bfloat16),
    ]


def test_tensors_take_turns_in_one_place_and_keep_what_is_written() -> None:
    arena = TensorArena(two_in_one_place(), CPU)
    assert arena.addresses.height == 1024 and arena.waits == []
    for _ in range(2):
        arena.begin_step()
        first, beside = arena.take("first"), arena.take("beside")
        assert (first.shape, first.dtype, first.stride()) == ((8, 16), torch.float32, (16, 1))
        first.fill_(1), beside.fill_(2)
        assert bool((first == 1).all()) and arena.in_use() == ["first", "beside"]
        address = first.data_ptr()
        del first
        arena.release("first")
        second = arena.take("second")
        assert second.data_ptr() == address and bool((beside == 2).all())
        del second, beside
    assert arena.fallbacks == 0


def test_a_place_is_not_reused_while_anyone_refers_to_it() -> None:
    messages: list[str] = []
    arena = TensorArena(two_in_one_place(), CPU, warn=messages.append)
    weight = torch.ones(8, 16, requires_grad=True)
    arena.begin_step()
    first = arena.take("first").fill_(3)
    product = (weight * first).sum()  # autograd keeps it for the backward pass
    arena.release("first")
    address = first.data_ptr()
    del first
    second = arena.take("second").zero_()
    assert second.data_ptr() != address and arena.fallbacks == 1 and len(messages) == 1
    product.backward()
    assert weight.grad is not None and bool((weight.grad == 3).all())
    del product, second
    assert arena.take("second").data_ptr() == address


def test_tensors_outlive_the_arena() -> None:
    arena = TensorArena(two_in_one_place(), CPU)
    kept = arena.take("first").fill_(4)
    del arena
    gc.collect()
    assert bool((kept == 4).all()) and [bool((torch.zeros(256) == 0).all()) for _ in range(3)]
    assert bool((kept == 4).all())


def test_another_stream_waits_for_the_last_use() -> None:
    log: list[tuple[str, str, Any]] = []
    streams = {name: FakeStream(name, log) for name in ("compute", "copy")}
    arena = TensorArena(two_in_one_place("copy"), CPU, streams=streams, warn=lambda message: None)
    assert arena.waits == [Wait(after=1, before=0, stream="compute")]
    arena.take("first")
    arena.release("first")
    arena.take("second")
    assert log == [("record", "compute", None), ("wait", "copy", ("compute", 0))]
    arena.begin_step()
    assert {entry for entry in log[2:] if entry[0] == "wait"} == {
        ("wait", waiter, (source, 2 + i)) for waiter in streams for i, source in enumerate(streams)
    }
    arena.take("first")
    arena.take("second")  # without a release nobody knows what to wait for
    assert arena.fallbacks == 1


def test_what_the_program_synchronises_is_not_waited_for_again() -> None:
    tensors = two_in_one_place("copy")
    streams = {name: FakeStream(name, []) for name in ("compute", "copy")}
    assert TensorArena(tensors, CPU, streams=streams, syncs=[Sync(2, 2, "compute", "copy")]).waits == []
    assert TensorArena(tensors, CPU, streams=streams, syncs=[Sync(1, 2, "compute", "copy")]).waits != []  # recorded too early
    assert TensorArena(tensors, CPU, streams=streams, syncs=[Sync(2, 3, "compute", "copy")]).waits != []  # waited for too late


def test_misuse_is_refused_by_name() -> None:
    arena = TensorArena(two_in_one_place(), CPU)
    for use in (arena.take, arena.release):
        with pytest.raises(ValueError, match="'third'"):
            use("third")
    with pytest.raises(ValueError, match="same name"):
        TensorArena([*two_in_one_place(), *two_in_one_place()], CPU)
    with pytest.raises(ValueError, match="not given: compute, copy"):
        TensorArena(two_in_one_place("copy"), CPU)
    with pytest.raises(ValueError, match="both are live"):
        needed_waits([Tenant(0, 3, 0, 64, ("a",)), Tenant(2, 4, 0, 64, ("a",))])
    with pytest.raises(ValueError, match="cpu"):
        use_expandable_segments(CPU)


def ordered_by_graph(first: tuple[str, int], then: tuple[str, int], syncs: list[Sync]) -> bool:
    """Reachability between (stream, position) in a graph with one node per stream and position; last use is at ``end - 1``."""
    todo, seen = [first], set()
    while todo:
        stream, position = todo.pop()
        if (stream, position) in seen or position > 40:
            continue
        seen.add((stream, position))
        todo.append((stream, position + 1))
        todo += [(sync.waiter, sync.waited) for sync in syncs if sync.source == stream and sync.recorded > position]
    return then in seen


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Tenant], list[Sync]]:
    # Tenants of one place one after the other, and two places that overlap halfway.
    time, tenants = 0, []
    for _ in range(draw(st.integers(2, 6))):
        lower = time + draw(st.integers(0, 2))
        time = lower + draw(st.integers(1, 4))
        used_on = tuple(draw(st.permutations(STREAMS))[: draw(st.integers(1, 2))])
        tenants.append(Tenant(lower, time, draw(st.sampled_from([0, 64])), draw(st.sampled_from([64, 128])), used_on))
    syncs = []
    for _ in range(draw(st.integers(0, 6))):
        recorded = draw(st.integers(0, 30))
        source, waiter, _ = draw(st.permutations(STREAMS))
        syncs.append(Sync(recorded, recorded + draw(st.integers(0, 3)), source, waiter))
    return tenants, syncs


@given(programs())
@settings(max_examples=200, deadline=None)
def test_waits_are_exactly_the_pairs_that_nothing_else_orders(program: tuple[list[Tenant], list[Sync]]) -> None:
    tenants, syncs = program
    expected = set()
    for after, late in enumerate(tenants):
        for before, early in enumerate(tenants):
            overlap = max(early.offset, late.offset) < min(early.offset + early.size, late.offset + late.size)
            if not overlap or early.upper > late.lower:
                continue
            for stream in early.streams:
                if not ordered_by_graph((stream, early.upper - 1), (late.streams[0], late.lower), syncs):
                    expected.add(Wait(after, before, stream))
    assert set(needed_waits(tenants, syncs)) == expected
