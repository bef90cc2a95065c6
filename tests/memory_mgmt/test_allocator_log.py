"""The log of the real CPU allocator against torch's own memory profiler, with threads, raw (oneDNN) blocks and blocks of earlier logs."""

from __future__ import annotations

import threading

import pytest
import torch

from memory_mgmt.allocator_log import record_cpu_allocations
from memory_mgmt.native import NoCompiler, build
from tests.memory_mgmt.measured import peak_allocated


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    try:
        build("arena_cpu.cpp", with_torch=True)
    except NoCompiler as error:
        pytest.skip(str(error))


def work(width: int) -> None:
    x_NN = torch.ones(width, width, requires_grad=True)
    for _ in range(3):
        y_NN = torch.softmax(x_NN @ x_NN, -1) * x_NN
    y_NN.sum().backward()


def test_peak_is_the_one_of_torchs_memory_profiler() -> None:
    work(64)  # what is made once only
    with record_cpu_allocations() as log:
        start = log.mark()
        work(64)
        peak = log.peak_bytes(start)
    assert peak == peak_allocated(lambda: work(64))
    assert peak > 4 * 64 * 64 * 4


def test_blocks_know_size_order_and_end() -> None:
    with record_cpu_allocations() as log:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(2000, dtype=torch.uint8)
        del a
        c = torch.empty(500, dtype=torch.uint8)
    assert [(block.size, block.made, block.freed) for block in log.blocks()] == [(1000, 0, 2), (2000, 1, None), (500, 3, None)]
    assert (log.peak_bytes(), log.live_bytes()) == (3000, 2500)
    assert (log.peak_bytes(2), log.live_bytes(2)) == (0, -500)  # above what was live at position 2
    del b, c
    assert log.mark() == 4, "the log is closed"


def test_threads_are_told_apart() -> None:
    made: list[torch.Tensor] = []
    with record_cpu_allocations() as log:
        here = torch.empty(64)
        other = threading.Thread(target=lambda: made.append(torch.empty(128)))
        other.start()
        other.join()
        made.clear()  # made there, freed here
    first, second = log.blocks()
    assert first.thread == log.thread != second.thread
    assert (second.size, second.freed_by) == (512, log.thread)
    del here


def test_backward_on_the_cpu_allocates_on_the_calling_thread_only() -> None:
    with record_cpu_allocations() as log:
        work(32)
    assert {block.thread for block in log.blocks()} == {log.thread}


def test_logs_nest_and_see_blocks_of_earlier_logs_freed() -> None:
    with record_cpu_allocations():
        kept = torch.empty(100, dtype=torch.uint8)
    with record_cpu_allocations() as outer:
        torch.empty(10, dtype=torch.uint8)
        with record_cpu_allocations() as inner:
            del kept
    assert inner.rows_E3[:, 1].tolist() == [-100]
    assert outer.rows_E3[:, 1].tolist() == [10, -10, -100]


def test_raw_blocks_of_onednn_are_logged_and_freed() -> None:
    a, b = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    with record_cpu_allocations() as log:
        product = torch.mm(a, b)
    assert float(product[0, 0]) == 64.0
    assert log.blocks()[0].size >= 64 * 64 * 2
