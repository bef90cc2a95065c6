"""Training with the arena: the same losses whatever happens in a step, every unsafe situation counted, nothing served to others."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from memory_mgmt.allocator_log import record_cpu_allocations
from memory_mgmt.arena import DIVERGENT_STEPS, MAX_RECORDED_STEPS, MAX_REPLANS, Arena, arena_step, build_arena
from memory_mgmt.arena_native import uninstall
from memory_mgmt.config import MemoryConfig
from memory_mgmt.native import NoCompiler, build
from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer, init_weights

VOCAB = 64


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    try:
        build("arena_cpu.cpp", with_torch=True)
    except NoCompiler as error:
        pytest.skip(str(error))


def batch(seq_len: int, seed: int) -> Batch:
    tokens_BT = torch.randint(VOCAB, (1, seq_len), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens_BT, tokens_BT.roll(-1, 1), torch.arange(seq_len)[None], Bounds.whole(1, seq_len))


def train(arena: Arena | None, steps: int, shapes_in_key: bool = False) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and final parameters of a run in which every so many steps something else happens."""
    model = Transformer(ModelConfig(d_model=16, n_heads=2, layers=("full", "swa"), window=8), VOCAB)
    init_weights(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[float] = []
    kept: deque[tuple[torch.Tensor, float]] = deque()
    for i in range(steps):
        seq_len = 20 if i % 17 == 9 else 32
        with arena_step(arena, "train", seq_len if shapes_in_key else 0):
            extra = [torch.empty(100 + i)] if i % 10 == 7 else []
            for micro in range(2 if i % 23 == 11 else 1):  # gradient accumulation
                nll_BT = model(batch(seq_len, 2 * i + micro))
                nll_BT.mean().backward()
            if i % 19 == 13:
                with torch.no_grad():
                    model(batch(32, -i - 1))  # an evaluation that nobody announced
            optimizer.step()
            losses.append(nll_BT.mean().item())
            optimizer.zero_grad(set_to_none=True)
            if i % 6 == 5:  # lives on beyond its step, in the middle of the planned addresses
                kept.append((nll_BT, float(nll_BT.detach().sum())))
            del nll_BT, extra
        if len(kept) > 2:
            tensor, total = kept.popleft()
            assert float(tensor.detach().sum()) == total
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("shapes_in_key", [False, True])
def test_200_steps_with_everything_that_may_happen_are_bit_identical(shapes_in_key: bool) -> None:
    messages: list[str] = []
    plain_losses, plain_parameters = train(None, 200)
    with_arena = Arena(smallest_bytes=64, plan_seconds=0.2, warn=messages.append)
    losses, parameters = train(with_arena, 200, shapes_in_key)
    assert losses == plain_losses
    assert all(torch.equal(a, b) for a, b in zip(parameters, plain_parameters, strict=True))
    stats = with_arena.stats
    assert stats.served > 3 * (stats.missed + stats.conflicts)
    assert stats.missed > 0 and stats.conflicts > 0 and stats.resyncs > 0 and stats.divergent_steps > 0, "nothing unsafe was tried"
    assert len(messages) == 1 and "left its plan" in messages[0]
    with_arena.close()


def three_blocks(keep: list[torch.Tensor] | None = None, first: int = 1024) -> list[int]:
    """A step whose first and third block share an address. Returns the addresses."""
    a = torch.empty(first, dtype=torch.uint8)
    b = torch.empty(512, dtype=torch.uint8)
    addresses = [a.data_ptr(), b.data_ptr()]
    if keep is not None:
        keep.append(a)
    del a
    c = torch.empty(1024, dtype=torch.uint8)
    return [*addresses, c.data_ptr()]


def planned(work: Callable[[], object], **settings: int) -> Arena:
    arena = Arena(smallest_bytes=64, plan_seconds=0.2, warn=lambda message: None)
    for _ in range(2):
        with arena.step():
            work()
    assert arena.height_bytes() is not None
    return arena


def test_blocks_share_addresses_as_planned_and_the_height_is_the_lower_bound() -> None:
    arena = planned(three_blocks)
    with arena.step():
        a, b, c = three_blocks()
    assert a == c != b
    assert arena.height_bytes() == (1536, 1536)
    assert (arena.last_step["served"], arena.last_step["position"], arena.live_blocks()) == (3, 3, 0)


def test_a_block_that_outlives_its_plan_keeps_its_address_to_itself() -> None:
    arena = planned(three_blocks)
    kept: list[torch.Tensor] = []
    with arena.step():
        a, _, c = three_blocks(kept)
    assert a != c and arena.last_step["conflicts"] == 1 and arena.live_blocks() == 1
    kept[0].fill_(7)
    with arena.step():
        again, _, last = three_blocks()  # both would be at a's address
        torch.full((1024,), 9, dtype=torch.uint8)
    assert a not in (again, last) and arena.last_step["conflicts"] == 2
    assert bool((kept[0] == 7).all())
    kept.clear()
    with arena.step():
        assert three_blocks()[0] == a
    assert arena.last_step["conflicts"] == 0


def test_an_unknown_size_is_missed_and_the_next_request_finds_back() -> None:
    arena = planned(three_blocks)
    with arena.step():
        torch.empty(777, dtype=torch.uint8)
        three_blocks()
    assert (arena.last_step["missed"], arena.last_step["served"], arena.last_step["resyncs"]) == (1, 3, 1)
    with arena.step():
        three_blocks(first=640)  # one size differs; the 1024 bytes after it are taken for the first request
    assert (arena.last_step["missed"], arena.last_step["served"], arena.last_step["position"]) == (2, 1, 1)


def test_missing_requests_are_skipped_after_two_that_match() -> None:
    sizes = [256, 320, 384, 448, 512, 576]

    def work(first: int = 0) -> None:
        for size in sizes[first:]:
            torch.empty(size, dtype=torch.uint8)

    arena = planned(work)
    with arena.step():
        work(first=2)
    assert (arena.last_step["missed"], arena.last_step["served"], arena.last_step["position"]) == (1, 3, 6)


def test_what_outlives_the_recorded_step_is_left_to_the_normal_allocator() -> None:
    kept: deque[torch.Tensor] = deque(maxlen=1)

    def work() -> None:
        kept.append(torch.empty(4096, dtype=torch.uint8))
        torch.empty(2048, dtype=torch.uint8)

    arena = planned(work)
    with arena.step():
        work()
    assert (arena.last_step["passed"], arena.last_step["served"], arena.live_blocks()) == (1, 1, 0)
    assert arena.height_bytes() == (2048, 2048)


def test_a_lasting_change_is_planned_anew_and_chaos_is_given_up() -> None:
    messages: list[str] = []
    arena = Arena(smallest_bytes=64, plan_seconds=0.2, warn=messages.append)

    def steps(count: int, size: Callable[[int], int]) -> None:
        for i in range(count):
            with arena.step():
                torch.empty(size(i), dtype=torch.uint8)

    steps(3, lambda i: 1024)
    steps(DIVERGENT_STEPS + 2 + 1, lambda i: 4096)
    assert arena.stats.replans == 1 and arena.last_step["served"] == 1 and arena.height_bytes() == (4096, 4096)
    assert len(messages) == 1
    steps(DIVERGENT_STEPS + MAX_RECORDED_STEPS + DIVERGENT_STEPS, lambda i: 5000 + 64 * i)
    assert arena.height_bytes() is None and "do not repeat" in messages[-1]
    steps(1, lambda i: 4096)
    assert arena.stats.unplanned_steps == 1 and arena.stats.replans <= MAX_REPLANS


def test_other_threads_are_never_served_and_may_free_what_was() -> None:
    arena = planned(three_blocks)
    theirs: list[list[int]] = []
    ours: list[torch.Tensor] = []
    with arena.step():
        other = threading.Thread(target=lambda: theirs.append(three_blocks()))
        other.start()
        other.join()
        mine = three_blocks(ours)
    assert not set(theirs[0]) & set(mine)
    assert arena.last_step["served"] == 2 and arena.live_blocks() == 1
    freeing = threading.Thread(target=ours.clear)
    freeing.start()
    freeing.join()
    assert arena.live_blocks() == 0
    with arena.step():
        assert three_blocks()[0] == mine[0]
    assert arena.last_step["conflicts"] == 0


def test_blocks_outlive_the_arena() -> None:
    arena = planned(three_blocks)
    kept: list[torch.Tensor] = []
    with arena.step():
        three_blocks(kept)
    kept[0].fill_(5)
    assert not uninstall(), "a block of a region lives"
    arena.close()
    del arena
    gc.collect()
    assert bool((kept[0] == 5).all())
    kept.clear()
    assert uninstall(), "the last block unmapped the region"
    torch.ones(1000).sum()


def test_a_step_that_raises_leaves_the_arena_usable() -> None:
    arena = planned(three_blocks)
    with pytest.raises(RuntimeError, match="odd"), arena.step():
        three_blocks()
        raise RuntimeError("odd")
    with arena.step():
        three_blocks()
    assert arena.last_step["served"] == 3
    fresh = Arena(smallest_bytes=64)
    with pytest.raises(RuntimeError, match="odd"), fresh.step():
        raise RuntimeError("odd")
    assert fresh.stats.recorded_steps == 0


def test_a_log_sees_served_blocks_and_frees_them_right() -> None:
    arena = planned(three_blocks)
    kept: list[torch.Tensor] = []
    with record_cpu_allocations() as log, arena.step():
        three_blocks(kept)
    assert [block.size for block in log.blocks()] == [1024, 512, 1024] and log.peak_bytes() == 2560  # the first one is kept
    assert arena.last_step["served"] == 2 and arena.live_blocks() == 1
    kept.clear()
    assert arena.live_blocks() == 0


def test_the_memory_profiler_sees_served_blocks() -> None:
    arena = planned(three_blocks)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, arena.step():
        three_blocks()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    assert sorted(e.nbytes() for e in events) == [-1024, -1024, -512, 512, 1024, 1024]
    assert arena.last_step["served"] == 3


def test_raw_blocks_of_onednn_are_served() -> None:
    a_NN = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected_NN = a_NN @ a_NN
    found: list[torch.Tensor] = []
    arena = planned(lambda: torch.mm(a_NN, a_NN) + 1)
    with arena.step():
        found.append(torch.mm(a_NN, a_NN) + 1)
    assert arena.last_step["served"] > 0 and torch.equal(found[0], expected_NN + 1)
    found.clear()
    assert arena.live_blocks() == 0


def test_refilled_storages_are_served() -> None:
    storage = torch.empty(4096, dtype=torch.uint8).untyped_storage()

    def work() -> None:
        storage.resize_(0)  # FSDP2 frees and refills gathered parameters so
        storage.resize_(4096)
        storage.resize_(0)

    arena = planned(work)
    with arena.step():
        work()
    assert arena.last_step["served"] == 1 and arena.live_blocks() == 0


def _in_child(connection: Connection, tensor: torch.Tensor) -> None:
    connection.send((three_blocks(), int(tensor.sum())))


def test_a_forked_child_uses_the_normal_allocator() -> None:
    arena = planned(three_blocks)
    ours, theirs = multiprocessing.Pipe()
    with arena.step():
        held = torch.full((1024,), 3, dtype=torch.uint8)
        process = multiprocessing.get_context("fork").Process(target=_in_child, args=(theirs, held))
        process.start()
        assert ours.poll(60)
        addresses, total = ours.recv()
        process.join()
        begin, end = held.data_ptr(), held.data_ptr() + (64 << 10)
    assert total == 3 * 1024 and not any(begin <= address < end for address in addresses)
    assert arena.last_step["served"] == 1


def test_misuse_is_refused_by_name() -> None:
    arena = planned(three_blocks)
    with arena.step(), pytest.raises(ValueError, match="nested"), arena.step():
        pass
    second = planned(three_blocks)
    with arena.step(), pytest.raises(ValueError, match="another arena"), second.step():
        pass
    errors: list[str] = []

    def elsewhere() -> None:
        try:
            with arena.step():
                pass
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert errors and "thread" in errors[0]
    arena.close()
    with pytest.raises(ValueError, match="closed"), arena.step():
        pass
    with pytest.raises(ValueError, match="smallest_bytes"):
        Arena(smallest_bytes=0)


def test_the_configuration_decides() -> None:
    assert build_arena(MemoryConfig(), torch.device("cuda")) is None
    assert isinstance(build_arena(MemoryConfig(arena=True), torch.device("cpu")), Arena)
    if torch.version.cuda is None:
        with pytest.raises(UserError, match=r"memory\.arena: .*CUDA.*Remedy"):
            build_arena(MemoryConfig(arena=True), torch.device("cuda"))
    with arena_step(None, "train"):
        pass
