"""The CUDA arena over a CUDA runtime that checks the order of streams: no bytes shared, no race, whatever a step does."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_mgmt.allocator_log import record_cpu_allocations
from memory_mgmt.arena import DIVERGENT_STEPS, Arena
from tests.memory_mgmt.fake_gpu import STREAMS, FakeGpu, Program, build_fake_runtime

MIB = 1 << 20


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> FakeGpu:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return FakeGpu.load(build_fake_runtime(tmp_path_factory.mktemp("fake")))


@pytest.fixture
def gpu(loaded: FakeGpu) -> Iterator[FakeGpu]:
    loaded.runtime.fake_reset()
    loaded.damaged = 0
    yield loaded
    loaded.free_all()
    assert loaded.count("live_bytes") == 0, "memory was lost"


def arena_on(gpu: FakeGpu, messages: list[str] | None = None) -> Arena:
    return Arena(smallest_bytes=512, plan_seconds=0.05, backend=gpu.backend(), warn=(messages if messages is not None else []).append)


def planned(gpu: FakeGpu, program: Program) -> Arena:
    arena = arena_on(gpu)
    for _ in range(2):
        with arena.step():
            program(gpu)
    assert arena.height_bytes() is not None
    return arena


def handed_over(gpu: FakeGpu) -> None:
    """Compute makes and frees, then a copy stream has the same place, then compute again."""
    for name, stream in (("a", 0), ("b", STREAMS[1]), ("c", 0)):
        gpu.make(name, MIB, stream)
        gpu.free(name)


# A program: what is done in order. Numbers pick one of the tensors that live, or a size.
actions = st.one_of(
    st.tuples(st.just("make"), st.integers(1, 12), st.sampled_from(STREAMS)),
    st.tuples(st.just("make"), st.integers(1, 12), st.sampled_from(STREAMS)),
    st.tuples(st.sampled_from(["use", "free", "free"]), st.integers(0, 9), st.just(0)),
    st.tuples(st.sampled_from(["visit", "record"]), st.integers(0, 9), st.sampled_from(STREAMS)),
)
Action = tuple[str, int, int]
programs = st.lists(actions, min_size=2, max_size=30)


def run(gpu: FakeGpu, program: list[Action], keep: int) -> None:
    """Carry it out; ``keep`` tensors live on into the next step, where they are freed at the first chance."""
    for number, (what, which, stream) in enumerate(program):
        if what == "make":
            gpu.make(f"{gpu.made}-{number}", 700 * which, stream)
        elif gpu.tensors:
            name = sorted(gpu.tensors)[which % len(gpu.tensors)]
            if what == "free":
                gpu.free(name)
            elif what == "use":
                gpu.use(name)
            elif gpu.tensors[name].stream != stream:
                gpu.visit(name, stream, recorded=what == "record")
    for name in sorted(gpu.tensors)[keep:]:
        gpu.free(name)


def changed(program: list[Action], how: list[tuple[int, str, Action]]) -> list[Action]:
    """The program with some actions left out, replaced or added."""
    todo = list(program)
    for place, what, action in how:
        if what == "drop" and todo:
            del todo[place % len(todo)]
        elif what == "swap" and todo:
            todo[place % len(todo)] = action
        else:
            todo.insert(place % (len(todo) + 1), action)
    return todo


changes = st.lists(st.tuples(st.integers(0, 29), st.sampled_from(["drop", "swap", "add"]), actions), max_size=4)


@given(programs, st.lists(st.tuples(changes, st.integers(0, 2)), min_size=4, max_size=9))
@settings(max_examples=120, deadline=None)
def test_no_step_shares_bytes_or_races_whatever_it_does(
    loaded: FakeGpu, program: list[Action], steps: list[tuple[list[tuple[int, str, Action]], int]]
) -> None:
    gpu = loaded
    gpu.runtime.fake_reset()
    gpu.damaged = 0
    arena = arena_on(gpu)
    asked = 0
    for number, (how, keep) in enumerate([([], 0), ([], 0), *steps]):
        made = gpu.made
        with arena.step():
            run(gpu, changed(program, how), keep if number > 1 else 0)
        if arena.last_step:
            asked += gpu.made - made
            stats = arena.stats
            found = stats.served + stats.passed + stats.missed + stats.conflicts
            assert found == asked, "a request was not counted, or counted twice"
        gpu.check()
        if number == 2 and not how and arena.last_step:
            assert arena.last_step["missed"] == arena.last_step["conflicts"] == 0, "the step went as planned"
    arena.close()
    gpu.free_all()
    gpu.check()
    assert gpu.count("live_bytes") == 0


def test_long_programs_are_served_and_meet_everything(gpu: FakeGpu) -> None:
    """The same with hundreds of tensors; here every unsafe situation really comes about."""
    totals = dict.fromkeys(("served", "passed", "missed", "conflicts", "waits", "resyncs", "replans"), 0)
    for seed in range(12):
        random = Random(seed)

        def action(random: Random = random) -> Action:
            what = random.choice(
                ["make", "make", "make", "free", "free", "free", "use", "visit", "record" if random.random() < 0.1 else "use"]
            )
            return what, random.randrange(1, 40), random.choice(STREAMS)

        program = [action() for _ in range(300)]
        arena = arena_on(gpu)
        for number in range(10):
            how = [(random.randrange(300), random.choice(["drop", "swap", "add"]), action()) for _ in range(number % 4 * (number > 2))]
            with arena.step():
                run(gpu, changed(program, how), random.randrange(3) if number > 2 else 0)
            gpu.check()
        for name in totals:
            totals[name] += getattr(arena.stats, name)
        arena.close()
        gpu.free_all()
    assert all(totals.values()), totals
    assert totals["served"] > 3 * (totals["missed"] + totals["conflicts"]), totals


def test_a_place_goes_to_another_stream_behind_the_event_that_the_plan_prescribes(gpu: FakeGpu) -> None:
    arena = planned(gpu, handed_over)
    assert arena.height_bytes() == (MIB, MIB), "one place for all three"
    for _ in range(3):
        with arena.step():
            handed_over(gpu)
        assert (arena.last_step["served"], arena.last_step["waits"], arena.last_step["conflicts"]) == (3, 2, 0)
    gpu.check()
    arena.close()


def test_the_checker_finds_what_a_missing_wait_does(gpu: FakeGpu) -> None:
    arena = planned(gpu, handed_over)
    gpu.runtime.fake_ignore_waits()
    with arena.step():
        handed_over(gpu)
    assert gpu.count("races") == 4  # each use of the second tensor and of the third
    assert b"is in use" in gpu.runtime.fake_first_race()
    arena.close()


def test_a_place_whose_last_use_no_event_marks_is_not_served_to_another_stream(gpu: FakeGpu) -> None:
    """The step leaves its plan so that a block of the compute stream stands where none was planned before the copy stream's."""

    def program(gpu: FakeGpu) -> None:
        gpu.make("a", MIB)
        gpu.free("a")
        gpu.make("b", MIB, STREAMS[1])
        gpu.free("b")
        gpu.make("c", 3 * 512)
        gpu.free("c")  # the last one in its place: no event

    arena = planned(gpu, program)
    with arena.step():
        program(gpu)
        gpu.make("again", MIB)  # not in the plan
        gpu.free("again")
    assert (arena.last_step["served"], arena.last_step["missed"]) == (3, 1)
    with arena.step():
        gpu.make("a", MIB)
        gpu.free("a")
        gpu.make("b", MIB, STREAMS[2])  # a stream that the plan does not know
        gpu.free("b")
    assert arena.last_step["missed"] == 1
    gpu.check()
    arena.close()


def test_work_of_one_stream_needs_no_event(gpu: FakeGpu) -> None:
    def program(gpu: FakeGpu) -> None:
        for name in "abc":
            gpu.make(name, MIB, STREAMS[2])
            gpu.free(name)

    arena = planned(gpu, program)
    with arena.step():
        program(gpu)
    records = gpu.count("records")
    with arena.step():
        program(gpu)
    # The default stream, on which the memory itself was taken, and the program's meet before the step; nothing else is recorded.
    assert gpu.count("records") - records == 2 and arena.last_step["waits"] == 0 and arena.last_step["served"] == 3
    gpu.check()
    arena.close()


def test_what_other_streams_were_said_to_use_is_left_to_the_allocator_below(gpu: FakeGpu) -> None:
    def program(gpu: FakeGpu) -> None:
        gpu.make("a", MIB)
        gpu.visit("a", STREAMS[1], recorded=True)
        gpu.free("a")
        gpu.make("b", 2 * MIB)
        gpu.free("b")

    arena = planned(gpu, program)
    with arena.step():
        program(gpu)
    assert (arena.last_step["passed"], arena.last_step["served"]) == (1, 1)
    with arena.step():  # what was not said in the steps that were watched: its stream waits when it is freed
        gpu.make("a", MIB)
        gpu.free("a")
        gpu.make("b", 2 * MIB)
        gpu.visit("b", STREAMS[1], recorded=True)
        gpu.free("b")
        gpu.make("c", 512)
    with arena.step():
        program(gpu)
    gpu.free("c")
    gpu.check()
    arena.close()


def test_other_threads_are_never_served_and_may_free_what_was(gpu: FakeGpu) -> None:
    arena = planned(gpu, handed_over)

    def elsewhere() -> None:
        gpu.make("other", MIB)

    with arena.step():
        for work in (elsewhere, lambda: gpu.free("a")):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            if "a" not in gpu.tensors and work is elsewhere:
                gpu.make("a", MIB)
        first = gpu.tensors["other"].address
        gpu.make("b", MIB, STREAMS[1])
        assert gpu.tensors["b"].address != first
        gpu.free("b")
    assert (arena.last_step["served"], arena.last_step["waits"]) == (2, 1), "an event is recorded on whatever thread frees"
    gpu.free("other")
    gpu.check()
    arena.close()


def test_threads_that_free_while_the_owner_is_served(gpu: FakeGpu) -> None:
    count = 300

    def program(gpu: FakeGpu) -> None:
        for number in range(count):
            gpu.make(f"t{number}", 512 * (1 + number % 5), STREAMS[number % 3])
            gpu.free(f"t{number}")

    arena = planned(gpu, program)
    lib = gpu.arena
    with arena.step():
        waiting = []
        for number in range(count):
            size, stream = 512 * (1 + number % 5), STREAMS[number % 3]
            waiting.append(lib.lsa_malloc(size, 0, stream))
            if len(waiting) == 10:
                threads = [threading.Thread(target=lib.lsa_free, args=(p, 0, 0, 0)) for p in waiting]
                [t.start() for t in threads]
                assert len(set(waiting)) == 10, "two live blocks have one address"
                [t.join() for t in threads]
                waiting.clear()
    assert sum(arena.last_step[name] for name in ("served", "missed", "conflicts")) == count and arena.last_step["served"] > 0
    assert arena.live_blocks() == 0
    arena.close()


def test_memory_that_is_not_there_is_not_missed(gpu: FakeGpu) -> None:
    messages: list[str] = []
    arena = arena_on(gpu, messages)
    for number in range(3):
        if number == 1:
            gpu.runtime.fake_refuse(4)  # after the three of the step: the region
        with arena.step():
            handed_over(gpu)
    assert arena.height_bytes() is None and arena.stats.unplanned_steps == 1 and "in one piece" in messages[0]
    arena.close()
    other = planned(gpu, handed_over)
    assert other.give_back() >= MIB and gpu.count("live_bytes") == 0
    gpu.runtime.fake_refuse(1)
    with other.step():
        handed_over(gpu)
    assert other.last_step == {} and other.stats.unplanned_steps == 1
    with other.step():
        handed_over(gpu)
    assert other.last_step["served"] == 3
    gpu.check()
    other.close()


def test_blocks_outlive_their_region(gpu: FakeGpu) -> None:
    arena = planned(gpu, handed_over)
    with arena.step():
        gpu.make("a", MIB)
    assert arena.give_back() == 0, "a block lives in it"
    arena.close()
    assert gpu.count("live_bytes") > 0
    gpu.free("a")
    gpu.check()


def test_a_lasting_change_is_planned_anew_after_one_warning(gpu: FakeGpu) -> None:
    messages: list[str] = []
    arena = arena_on(gpu, messages)
    for number in range(4 + DIVERGENT_STEPS + 3):
        with arena.step():
            for size in (MIB, 2 * MIB) if number < 4 else (3 * MIB, MIB):
                gpu.make("a", size, STREAMS[number >= 4])
                gpu.free("a")
    assert arena.stats.replans == 1 and arena.last_step["served"] == 2 and len(messages) == 1 and "left its plan" in messages[0]
    assert arena.height_bytes() == (3 * MIB, 3 * MIB)
    gpu.check()
    arena.close()


def test_a_training_step_is_served_as_planned(gpu: FakeGpu) -> None:
    """The requests and frees of a real step on CPU, with the backward pass of every other layer's tensors on a stream of its own."""
    layers = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU()) for _ in range(12)))
    with record_cpu_allocations() as log:
        layers(torch.ones(64, 32)).square().mean().backward()
        for parameter in layers.parameters():
            parameter.grad = None
    rows = [(block, size, STREAMS[block % 7 == 3]) for block, size, _ in log.rows_E3.tolist()]
    inside = {block for block, size, _ in rows if size < 0} & {block for block, size, _ in rows if size > 0}

    def program(gpu: FakeGpu) -> None:
        for block, size, stream in rows:
            if block in inside:
                gpu.make(str(block), size, stream) if size > 0 else gpu.free(str(block))

    arena = planned(gpu, program)
    height, bound = arena.height_bytes() or (0, 1)
    with arena.step():
        program(gpu)
    large = sum(1 for block, size, _ in rows if block in inside and size >= 512)
    assert large > 50 and arena.last_step["served"] == large and arena.last_step["waits"] > 0
    assert height <= 1.02 * bound
    gpu.check()
    arena.close()
