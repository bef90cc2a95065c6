"""States carried from sequence to sequence: rows that read on, any number of ranks, cut and resumed runs, refused settings."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from models.batch import Batch, Bounds
from models.stack_config import STACK_KINDS
from tests.distributed import run_distributed
from tests.trainer.small_run import manager
from trainer.build import _starting_state, build_engine, mesh_for
from trainer.config import RunConfig
from trainer.data.loader import Share, StoredSequences, stored_steps
from trainer.data.packing import Packing

SEQ_LEN, VOCAB, STEPS = 16, 64, 6
LENGTHS = np.array([150, 40, 97, 200, 10, 64, 120])


class Store:
    """Documents of random tokens."""

    documents = {"tokens": LENGTHS}
    prefixes = clusters = None

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return np.random.default_rng(document).integers(0, VOCAB, LENGTHS[document])[start:stop]


def config(
    dp: int = 1, cp: int = 1, micro: int = 2, accum: int = 2, carry: str = "document", layers=("swa", "memory"), **memory
) -> RunConfig:
    chunk = {} if memory.get("kind") in STACK_KINDS else {"chunk_size": 8}
    model = {"d_model": 16, "n_heads": 2, "window": 8, "layers": list(layers), "memory": {**chunk, **memory}}
    train = {"precision": "fp64", "device": "cpu", "carry_state": carry, "micro_batch_size": micro, "grad_accum": accum}
    data = {"seq_len": SEQ_LEN, "shuffle": "documents"}
    return RunConfig.model_validate({"model": model, "data": data, "train": train, "parallel": {"dp_shard": dp, "cp": cp}})


def segmented(dp: int = 1, micro: int = 2, accum: int = 2, carry: str = "document") -> RunConfig:
    """A memory around the stack, sequences that are no whole number of segments."""
    return config(dp, 1, micro, accum, carry, ("full", "swa"), kind="rmt", rmt={"segment": 6, "tokens": 2})


def in_segments(*topology: int) -> RunConfig:
    """As `config`, sequences read in segments of which the last is short."""
    settings = config(*topology)
    return settings.model_copy(update={"train": settings.train.model_copy(update={"segment_tokens": 6})})


def on_tensor_parallel_ranks(dp: int) -> RunConfig:
    """As `config`, each sequence on two tensor-parallel ranks."""
    settings = config(dp, 1, 2 // dp, 2)
    return RunConfig.model_validate({**settings.model_dump(), "parallel": {"dp_shard": dp, "tp": 2}})


def steps(settings: RunConfig, dp_rank: int = 0, consumed: int = 0):
    lanes = settings.global_batch_sequences
    sequences = StoredSequences(
        Store(), np.arange(len(LENGTHS)), seq_len=SEQ_LEN, seed=0, shuffle="documents", document_mask=True, pad_id=0, lanes=lanes
    )  # fmt: skip
    share = Share(dp_rank, settings.parallel.dp_shard, settings.train.micro_batch_size, settings.train.grad_accum)
    return (batches for batches, _ in stored_steps(sequences, share, consumed, {}))


def make_engine(settings: RunConfig):
    return build_engine(settings, VOCAB, mesh_for(settings, torch.device("cpu")), torch.device("cpu"))


def trained(settings: RunConfig, folder: str | None = None) -> tuple[list[tuple[float, float]], dict]:
    """Losses and gradient norms of ``STEPS`` steps and the states after them; ``folder``: from the checkpoint in it."""
    engine, done = make_engine(settings), 0
    if folder is not None:
        done = _starting_state(manager(folder), engine)[0].step
    found = []
    dp_rank = engine.mesh.dp_rank if engine.mesh is not None else 0
    for batches in islice(steps(settings, dp_rank, done * settings.global_batch_sequences), STEPS - done):
        sums = engine.forward_backward(batches)
        found.append((sums.loss, engine.step(1e-2)))
    return found, engine.memory_states()["memory"] if settings.train.carry_state == "document" else {}


@pytest.mark.parametrize("lanes", [1, 3, 4, 7])
def test_a_row_reads_on_where_it_stood(lanes: int) -> None:
    packing = Packing(LENGTHS, SEQ_LEN, 0, "documents", lanes)
    for epoch in (0, 1):
        numbers = range(epoch * packing.n_sequences, (epoch + 1) * packing.n_sequences)
        seen = sorted((p.document, p.start) for n in numbers for p in packing.pieces(n))
        plain = Packing(LENGTHS, SEQ_LEN, 0, "documents")
        assert seen == sorted((p.document, p.start) for n in numbers for p in plain.pieces(n))  # every sequence once
        for n in numbers:
            first = packing.pieces(n)[0]
            if packing.continues(n):
                before = packing.pieces(n - lanes)[-1]  # its last token is a label only, and the first one here
                assert (before.document, before.stop - 1) == (first.document, first.start)
            else:
                assert first.start == 0 or n - numbers[0] < lanes
    assert any(packing.continues(n) for n in range(packing.n_sequences)) and not packing.continues(0)


@pytest.mark.parametrize("settings", [config(layers=("memory",), micro=2, accum=1), segmented(accum=1)], ids=["in layers", "around"])
def test_two_sequences_with_a_carried_state_are_one_long_one(settings: RunConfig) -> None:
    """A model that looks back by its memory alone: the losses of the second half are those inside a sequence of twice the length."""
    tokens_BT = torch.randint(VOCAB, (2, 2 * SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))

    def batch(start: int, end: int, continued: tuple[bool, ...]) -> Batch:
        positions_BT = torch.arange(end - start).expand(2, -1)
        return Batch(tokens_BT[:, start:end], tokens_BT[:, start + 1 : end + 1], positions_BT, Bounds.whole(2, end - start), continued)

    with torch.no_grad():
        whole = make_engine(settings).model(batch(0, 2 * SEQ_LEN, ()))
    for continued in ((True, True), (True, False)):
        engine = make_engine(settings)
        engine.forward_backward([batch(0, SEQ_LEN, ())])
        second = batch(SEQ_LEN, 2 * SEQ_LEN, continued)
        with engine.carried.handed_on(0, second):
            nll_BT = engine.model(second)
        torch.testing.assert_close(nll_BT[0], whole[0, SEQ_LEN:], rtol=1e-10, atol=1e-10)
        same = torch.allclose(nll_BT[1], whole[1, SEQ_LEN:], rtol=1e-10, atol=1e-10)
        assert same == continued[1]


def all_on_ranks(folder: str) -> dict:
    """Every topology of two and of four ranks, and a checkpoint of one process read by two data-parallel ranks."""
    ranks = dist.get_world_size()
    cases = {2: {"cp 2": (1, 2, 2, 2), "dp 2": (2, 1, 1, 2), "dp 2, other passes": (2, 1, 2, 1)}, 4: {"dp 2, cp 2": (2, 2, 1, 2)}}
    found = {name: trained(config(*case)) for name, case in cases[ranks].items()}
    found["tp 2"] = trained(on_tensor_parallel_ranks(ranks // 2))
    if ranks == 2:
        found["resumed"] = trained(config(2, 1, 2, 1), folder)
        found["in segments, dp 2"] = trained(in_segments(2, 1, 1, 2))
        found["around, dp 2"] = trained(segmented(2, 1, 2))
        found["around, dp 2, other passes"] = trained(segmented(2, 2, 1))
    return found


@pytest.fixture(scope="module")
def uninterrupted():
    return trained(config())


@pytest.fixture(scope="module")
def uninterrupted_around():
    return trained(segmented())


def test_the_memory_is_used(uninterrupted, uninterrupted_around) -> None:
    for make_config, (losses, _) in ((config, uninterrupted), (segmented, uninterrupted_around)):
        without, _ = trained(make_config(carry="none"))
        assert without[0] == losses[0]  # nothing to carry yet
        assert all(abs(a[0] - b[0]) > 1e-9 for a, b in zip(without[2:], losses[2:], strict=True))


def check_resumed(settings: RunConfig, want: list, states: dict, folder) -> None:
    engine = make_engine(settings)
    for batches in islice(steps(settings), 3):
        engine.forward_backward(batches)
        engine.step(1e-2)
    train = {"step": 3, "tokens": 0, "cursor": {}}
    manager(folder).save(3, {**engine.state_dict(), **engine.memory_states(), "train": train}, block=True)
    resumed, after = trained(settings, str(folder))
    assert resumed == want[3:]
    for name, state in states.items():
        assert all(torch.equal(after[name][key], value) for key, value in state.items())


def test_a_resumed_run_with_a_memory_around_the_stack_is_the_same_bit_for_bit(uninterrupted_around, tmp_path) -> None:
    want, states = uninterrupted_around
    assert states["stack"]["pending_count"].any()  # the sequence ends inside a segment
    check_resumed(segmented(), want, states, tmp_path)


def test_a_resumed_run_is_the_same_bit_for_bit_and_any_ranks_give_the_same_losses(uninterrupted, uninterrupted_around, tmp_path) -> None:
    check_resumed(config(), *uninterrupted, tmp_path)
    for ranks in (2, 4):
        for found in run_distributed(all_on_ranks, ranks, str(tmp_path)):
            for name, (losses, reached) in found.items():
                want, states = uninterrupted_around if name.startswith("around") else uninterrupted
                expected = want[3:] if name == "resumed" else want
                assert losses == [pytest.approx(pair, rel=1e-9) for pair in expected], name
                for module, state in states.items():
                    for key, value in state.items():
                        torch.testing.assert_close(reached[module][key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "memory",
    [
        {"attach": "mag"},
        {"attach": "mal", "kind": "gsa", "chunk_size": 64, "gsa": {"n_slots": 4}},
        {"kind": "titans", "attach": "mac", "chunk_size": 64, "mac": {"segment": 8}},
    ],
    ids=str,
)
def test_memories_beside_attention_carry_theirs(memory) -> None:
    """The first step begins afresh, later ones do not; every module's state moves."""
    (want, states), (without, _) = trained(config(**memory)), trained(config(carry="none", **memory))
    assert want[0] == without[0] and all(abs(a[0] - b[0]) > 1e-9 for a, b in zip(want[2:], without[2:], strict=True))
    assert states and all(state["state"].abs().sum() > 0 for state in states.values())


@pytest.mark.parametrize("memory", [{}, {"recompute": "block"}, {"memory_tile_tokens": 5, "ffn_tile_tokens": 4}], ids=str)
def test_policies_hand_on_the_same_states(uninterrupted, memory) -> None:
    settings = config()
    settings = settings.model_copy(update={"memory": settings.memory.model_copy(update=memory)})
    losses, states = trained(settings)
    assert losses == [pytest.approx(pair, rel=1e-9) for pair in uninterrupted[0]]
    for name, state in uninterrupted[1].items():
        for key, value in state.items():
            torch.testing.assert_close(states[name][key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("section", "change", "remedy"),
    [
        ("data", {"shuffle": "sequences"}, "data.shuffle documents or none"),
        ("data", {"document_mask": False}, "data.document_mask true"),
        ("data", {"streaming": True, "shuffle": "none"}, "data.streaming false"),
        ("model", {"layers": ["swa"]}, "a layer of kind memory"),
        ("memory", {"plan": "estimate"}, "memory.plan trace"),
        ("guards", {"on_not_finite": "skip_step"}, "guards.on_not_finite stop"),
        ("guards", {"on_spike": "skip_step"}, "guards.on_spike report or stop"),
    ],
)
def test_what_cannot_carry_is_refused(section: str, change: dict, remedy: str) -> None:
    settings = config().model_dump()
    settings[section] |= change
    with pytest.raises(ValidationError, match=f"train.carry_state document needs {remedy}"):
        RunConfig.model_validate(settings)
