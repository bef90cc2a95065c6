"""Slabs of host memory: exact, reused, given back; locking is tried on a pretended CUDA runtime."""

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_mgmt import host_memory
from memory_mgmt.host_memory import FreeRanges, HostMemory, Range, numa_cpus, parse_cpulist, touch_first


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_blocks_never_overlap_and_everything_comes_back(steps):
    memory = HostMemory(2000)
    live = []
    for take, n in steps:
        if take:
            before = memory.available_bytes
            block = memory.take(n)
            assert (block is None) == (host_memory.rounded(n) > before)
            if block is not None:
                assert sum(p.numel() for p in block.pieces) == n
                for piece in block.pieces:
                    piece.fill_(len(live) % 251)
                live.append((block, len(live) % 251))
        elif live:
            memory.give(live.pop(n % len(live))[0])
        assert all((piece == value).all() for block, value in live for piece in block.pieces)
        assert memory.used_bytes == sum(block.nbytes for block, _ in live) and memory.reserved_bytes <= 2000
    for block, _ in live:
        memory.give(block)
    assert memory.used_bytes == 0 and memory.free_bytes == memory.reserved_bytes


def test_free_ranges_merge_and_prefer_the_best_fit():
    free = FreeRanges()
    for start, stop in ((0, 100), (200, 250), (100, 200), (300, 340)):
        free.add(Range(0, start, stop))
    free.add(Range(1, 340, 400))
    assert free.size == 350
    assert free.take(40) == [Range(0, 300, 340)]
    assert free.take(260) == [Range(0, 0, 250), Range(1, 340, 350)]
    with pytest.raises(ValueError, match="51 bytes asked of 50"):
        free.take(51)


def test_slabs_grow_only_when_all_free_ranges_are_too_small(monkeypatch):
    monkeypatch.setattr(host_memory, "GROWTH_BYTES", 1024)
    memory = HostMemory()
    blocks = [memory.take(1000) for _ in range(8)]
    assert memory.n_slabs == 8
    for block in blocks[::2]:
        memory.give(block)
    whole = memory.take(4 * 1024)  # from four holes
    assert memory.n_slabs == 8 and len(whole.pieces) == 4 and memory.free_bytes == 0
    assert memory.take(5000).pieces[0].numel() == 5000 and memory.n_slabs == 9


def test_slabs_are_of_limited_size(monkeypatch):
    monkeypatch.setattr(host_memory, "MAX_SLAB_BYTES", 4096)
    monkeypatch.setattr(host_memory, "GROWTH_BYTES", 0)
    memory = HostMemory(20_000)
    block = memory.take(10_000)
    assert [p.numel() for p in block.pieces] == [4096, 4096, 10_000 - 2 * 4096]
    assert memory.reserve(20_000) and not memory.reserve(20_001)
    assert memory.reserved_bytes == 20_000


def test_memory_is_unmapped_by_close():
    def mapped():
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")

    before = mapped()
    memory = HostMemory()
    block = memory.take(512 * 2**20)
    assert mapped() - before >= 512 * 2**20
    memory.close()
    assert mapped() - before >= 512 * 2**20  # a piece is still held
    del block
    gc.collect()
    assert mapped() - before < 64 * 2**20


class Runtime:
    """Stands for CUDA's: notes what is registered, and refuses above a limit."""

    def __init__(self, limit):
        self.limit, self.registered = limit, {}

    def cudaHostRegister(self, address, size, flags):
        assert flags == 1 and address % 4096 == 0 and address not in self.registered
        if sum(self.registered.values()) + size > self.limit:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address):
        del self.registered[address]


def locked_memory(monkeypatch, limit):
    runtime, forgotten = Runtime(limit), []
    monkeypatch.setattr(host_memory, "_cudart", lambda: runtime)
    monkeypatch.setattr(host_memory, "numa_cpus", lambda device: None)
    monkeypatch.setattr(host_memory, "touch_first", lambda slab, cpus: None)
    monkeypatch.setattr(host_memory, "_forget_cuda_error", forgotten.append)
    return HostMemory(cuda_device=torch.device("cuda")), runtime, forgotten


def test_registered_memory_is_of_the_size_that_is_needed(monkeypatch):
    memory, runtime, _ = locked_memory(monkeypatch, 10**12)
    for n in (100 * 2**20, 70 * 2**20, 1000):
        memory.take(n)
    assert sum(runtime.registered.values()) == 100 * 2**20 + 70 * 2**20 + 64 * 2**20
    assert not memory.pageable
    memory.close()
    assert not runtime.registered
    memory, runtime, _ = locked_memory(monkeypatch, 10**12)
    memory.take(1000)
    del memory
    gc.collect()
    assert not runtime.registered


def test_pageable_fallback_is_reported_once_with_the_reason(monkeypatch):
    memory, runtime, forgotten = locked_memory(monkeypatch, 100 * 2**20)
    memory.take(90 * 2**20)
    with pytest.warns(RuntimeWarning, match=r"not page-locked.*CUDA error 2.*after 0.09 GiB.*memory.host_gib") as caught:
        for _ in range(3):
            assert memory.take(80 * 2**20) is not None
    assert len(caught) == len(forgotten) == 1 and memory.pageable and "CUDA error 2" in memory.pageable_reason
    memory.close()
    assert not runtime.registered


def test_numa_node_of_a_gpu(tmp_path, monkeypatch):
    card = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    device, mine = torch.device("cuda", 0), os.sched_getaffinity(0)
    assert numa_cpus(device, tmp_path) is None
    node = tmp_path / "bus/pci/devices/0000:1b:00.0/numa_node"
    node.parent.mkdir(parents=True)
    node.write_text("1\n")
    cpus = tmp_path / "devices/system/node/node1/cpulist"
    cpus.parent.mkdir(parents=True)
    cpus.write_text(f"{min(mine)},4000-4003\n")
    assert numa_cpus(device, tmp_path) == {min(mine)}
    cpus.write_text("4000-4003\n")
    assert numa_cpus(device, tmp_path) is None
    node.write_text("-1\n")  # one node only
    assert numa_cpus(device, tmp_path) is None


def test_first_touch_leaves_this_thread_where_it_was():
    mine = os.sched_getaffinity(0)
    slab = torch.ones(10_000, dtype=torch.uint8)
    touch_first(slab, {min(mine)})
    assert not slab.any() and os.sched_getaffinity(0) == mine
    assert parse_cpulist("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11} and parse_cpulist("\n") == set()
