"""The native occupancy check against intervals in plain Python, and served tensors that keep what was written into them."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_mgmt.arena_native import STATS, installed_library, library, new_plan
from memory_mgmt.arena_recording import LIVES_ON, plan_step, step_record
from memory_mgmt.native import NoCompiler, build

GRANULE = 64
CHUNK = 64 * 1024
REGION = 4 << 20


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    try:
        build("arena_cpu.cpp", with_torch=True)
    except NoCompiler as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def region(size: int) -> Iterator[int]:
    handle = library().lsa_region_new(size)
    try:
        yield handle
    finally:
        assert library().lsa_region_blocks(handle) == 0
        library().lsa_region_close(handle)


# Sizes and offsets crowd around the ends of chunks, where the bookkeeping changes its form.
offsets = st.one_of(
    st.integers(0, REGION // GRANULE).map(lambda g: g * GRANULE),
    st.builds(lambda c, g: max(0, c * CHUNK + g * GRANULE), st.integers(0, REGION // CHUNK), st.integers(-2, 2)),
)
sizes = st.one_of(
    st.integers(1, 3 * GRANULE),
    st.integers(1, 3 * CHUNK),
    st.builds(lambda c, d: max(1, c * CHUNK + d), st.integers(0, 20), st.integers(-GRANULE - 1, GRANULE + 1)),
)


@given(st.lists(st.tuples(st.booleans(), offsets, sizes, st.booleans()), max_size=60))
@settings(max_examples=150, deadline=None)
def test_a_range_is_given_exactly_if_nothing_lives_in_it(requests: list[tuple[bool, int, int, bool]]) -> None:
    lib = library()
    with region(REGION) as handle:
        live: dict[int, tuple[int, int]] = {}  # address -> granules [first, end)
        for take, offset, size, elsewhere in requests:
            if not take and live:
                address = sorted(live)[offset % len(live)]
                del live[address]
                free = threading.Thread(target=lib.lsa_region_release, args=(address,)) if elsewhere else None
                if free is None:
                    lib.lsa_region_release(address)
                else:
                    free.start()
                    free.join()
                continue
            first, end = offset // GRANULE, -(-(offset + size) // GRANULE)
            possible = end * GRANULE <= REGION and all(end <= a or b <= first for a, b in live.values())
            address = lib.lsa_region_take(handle, offset, size)
            assert (address is not None) == possible
            if address is not None:
                live[address] = (first, end)
        assert lib.lsa_region_blocks(handle) == len(live)
        for address in live:
            lib.lsa_region_release(address)
        whole = lib.lsa_region_take(handle, 0, REGION)
        assert whole is not None, "everything is free again"
        lib.lsa_region_release(whole)


def test_unaligned_and_negative_offsets_are_never_given() -> None:
    with region(REGION) as handle:
        assert library().lsa_region_take(handle, 8, 64) is None
        assert library().lsa_region_take(handle, -64, 64) is None


planned_offsets = st.integers(-1, 100).map(lambda g: max(-1, g * GRANULE))
plans = st.lists(st.tuples(st.integers(1, 5000), planned_offsets), min_size=1, max_size=30)


@given(plans, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_tensors_served_from_any_plan_never_share_a_byte(plan: list[tuple[int, int]], actions: list[tuple[int, int]]) -> None:
    """Plans are nonsense on purpose; requests follow them, leave them, and blocks die at random."""
    lib = installed_library()
    planned_sizes = [size for size, _ in plan]
    with region(1 << 20) as handle:
        native = new_plan(lib, planned_sizes, [offset for _, offset in plan])
        assert lib.lsa_begin(native, handle, 1) == 1
        live: list[tuple[torch.Tensor, int]] = []
        counts = np.zeros(len(STATS), dtype=np.int64)
        try:
            for number, (which, victim) in enumerate(actions):
                size = planned_sizes[which % len(plan)] if which < 36 else 6000 + which
                tensor = torch.empty(size, dtype=torch.uint8)
                tensor.numpy().fill(number % 251)  # through numpy: it asks torch's allocator for nothing
                live.append((tensor, number % 251))
                del tensor
                if victim < len(live):
                    del live[victim]
                assert all(bool((held.numpy() == value).all()) for held, value in live)
        finally:
            lib.lsa_end(counts.ctypes.data)
            live.clear()
        stats = dict(zip(STATS, counts.tolist(), strict=True))
        assert stats["served"] + stats["passed"] + stats["missed"] + stats["conflicts"] == len(actions)
        lib.lsa_plan_delete(native)


def test_frees_on_another_thread_while_the_owner_goes_on() -> None:
    lib = installed_library()
    slots = 64
    with region(slots * 4096) as handle:
        sizes = [4096 - 64 * (k % 3) for k in range(4000)]
        native = new_plan(lib, sizes, [4096 * (k * 7 % slots) for k in range(len(sizes))])
        waiting: queue.Queue[tuple[torch.Tensor, int] | None] = queue.Queue(maxsize=slots // 2)
        damaged: list[int] = []

        def consume() -> None:
            while (item := waiting.get()) is not None:
                tensor, value = item
                if not bool((tensor.numpy() == value).all()):
                    damaged.append(value)
                del tensor, item

        consumer = threading.Thread(target=consume)
        consumer.start()
        assert lib.lsa_begin(native, handle, 1) == 1
        for k, size in enumerate(sizes):
            tensor = torch.empty(size, dtype=torch.uint8)
            tensor.numpy().fill(k % 251)
            waiting.put((tensor, k % 251))
            del tensor
        counts = np.zeros(len(STATS), dtype=np.int64)
        lib.lsa_end(counts.ctypes.data)
        waiting.put(None)
        consumer.join()
        assert not damaged and counts[STATS.index("served")] > len(sizes) // 2
        lib.lsa_plan_delete(native)


def test_what_another_thread_frees_waits_for_the_owner() -> None:
    lib = library()
    with region(REGION) as handle:
        for owner_frees in (True, False):
            address = lib.lsa_region_take(handle, 0, 4096)
            memory = (ctypes.c_uint8 * 4096).from_address(address)
            ctypes.memset(address, 255, 4096)
            if owner_frees:
                lib.lsa_region_release(address)
            else:
                other = threading.Thread(target=lib.lsa_region_release, args=(address,))
                other.start()
                other.join()
            # Freed elsewhere, the block is a link of the list that the owner collects; the books are the owner's alone.
            assert set(memory[:8]) == ({255} if owner_frees else {0})
            assert lib.lsa_region_blocks(handle) == 0
        whole = lib.lsa_region_take(handle, 0, REGION)
        assert whole is not None
        lib.lsa_region_release(whole)


def test_thousands_of_blocks_are_freed_in_any_order() -> None:
    lib = library()
    random = np.random.default_rng(0)
    with region(REGION) as handle:
        offsets = (random.permutation(REGION // GRANULE)[:20_000] * GRANULE).tolist()
        addresses = [lib.lsa_region_take(handle, offset, 1) for offset in offsets]
        for k in random.permutation(len(addresses)).tolist():
            assert lib.lsa_region_take(handle, offsets[k], 1) is None
            lib.lsa_region_release(addresses[k])
        whole = lib.lsa_region_take(handle, 0, REGION)
        assert whole is not None, "a block was lost"
        lib.lsa_region_release(whole)


def test_free_pages_are_given_back_and_live_ones_kept() -> None:
    lib = library()
    with region(4 * CHUNK) as handle:
        kept, freed = (lib.lsa_region_take(handle, i * CHUNK, CHUNK) for i in (0, 2))
        views = [np.ctypeslib.as_array((ctypes.c_uint8 * CHUNK).from_address(address)) for address in (kept, freed)]
        for view in views:
            view.fill(1)
        lib.lsa_region_release(freed)
        assert lib.lsa_region_give_back(handle) >= 3 * CHUNK
        assert bool((views[0] == 1).all()) and bool((views[1] == 0).all())
        lib.lsa_region_release(kept)


def test_records_count_time_in_requests() -> None:
    rows_E3 = np.array(
        [
            [0, 100, 1],
            [1, 10, 1],  # too small
            [2, 200, 1],
            [0, -100, 1],  # after two requests
            [3, 300, 2],  # another thread's
            [4, 400, 1],
            [9, -50, 1],  # of a block made before
            [2, -200, 2],  # freed elsewhere
            [1, -10, 1],
        ]
    )
    record = step_record(rows_E3, thread=1, smallest=64)
    assert record.sizes_N.tolist() == [100, 200, 400]
    assert record.until_N.tolist() == [2, LIVES_ON, LIVES_ON]
    later = step_record(rows_E3[[0, 2, 5, 3]], thread=1, smallest=64)
    assert record.repeats(later) and record.joined(later).until_N.tolist() == [3, LIVES_ON, LIVES_ON]
    plan = plan_step(record.joined(later), seconds=0.1, alignment=64)
    assert plan.offsets == (0, -1, -1) and plan.addresses.height == 128
