"""A run with its parameters in host memory: the same bits as without, alone and sharded, and checkpoints that serve both."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from memory_mgmt.offload import HostStore
from memory_mgmt.parameter_offload import OffloadedParameters
from memory_mgmt.plan import MemoryPlan
from memory_mgmt.plan_view import plain
from memory_mgmt.problem import baseline_policy, problem_of_trace
from models.batch import Batch, Bounds
from models.errors import UserError
from models.flops import block_parameters
from optim.clip import local_part
from tests.distributed import run_distributed
from trainer import planning
from trainer.build import build_engine, mesh_for
from trainer.checkpoint import CheckpointManager
from trainer.choosing_offload import as_planned, places
from trainer.config import CheckpointSection, RunConfig
from trainer.engine import Engine
from trainer.run_dir import RunDir
from trainer.tracing import trace_step

GIB = 2**30
SEQ_LEN, VOCAB = 32, 75  # rows that two ranks cannot share evenly


def config(where: str, ranks: int, changes: dict) -> RunConfig:
    tied = changes.get("tied", False)
    return RunConfig.model_validate(
        {
            "model": {
                "d_model": 24,
                "n_heads": 3,
                "layers": ["full", "memory"],
                "n_layers": 4,
                "memory": {"chunk_size": 8},
                "tie_embeddings": tied,
            },
            "data": {"seq_len": SEQ_LEN},
            "train": {"device": "cpu", "grad_accum": 2, "precision": changes.get("precision", "bf16")},
            "optim": {"clip_norm": 0.05},
            "parallel": {"dp_shard": ranks, "layout": "contiguous"},
            "memory": {
                "offload_parameters": where,
                "offload_optimizer": "host" if where == "host" else changes.get("optimizer", "none"),
                **changes.get("memory", {}),
            },
        }
    )


def engine_of(where: str, changes: dict) -> Engine:
    settings = config(where, dist.get_world_size() if dist.is_initialized() else 1, changes)
    device = torch.device("cpu")
    return build_engine(settings, VOCAB, mesh_for(settings, device), device, store=HostStore(device))


def batches(step: int) -> list[Batch]:
    seeds = torch.Generator().manual_seed(100 * step + (dist.get_rank() if dist.is_initialized() else 0))
    tokens = [torch.randint(VOCAB, (1, SEQ_LEN + 1), generator=seeds) for _ in range(2)]
    return [Batch(t[:, :-1], t[:, 1:], torch.arange(SEQ_LEN)[None], Bounds.whole(1, SEQ_LEN)) for t in tokens]


def steps(engine: Engine, first: int, last: int) -> list[float]:
    found = []
    for step in range(first, last):
        found.append(engine.forward_backward(batches(step)).nll)
        found.append(engine.step(1e-2))
        found.append(engine.evaluate(batches(step)[:1]).nll)
    return found


def values(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's part of every parameter and state, by name."""
    state = engine.state_dict()
    return {f"{part}.{name}": local_part(t).detach().clone() for part, entries in state.items() for name, t in entries.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


CASES = [
    {},
    {"tied": True, "precision": "fp64"},
    {"precision": "fp32", "memory": {"recompute": "block", "ffn_tile_tokens": 8}},
    {"memory": {"recompute": "block", "group_blocks": 2}},
]


def both_ways(changes: dict) -> None:
    plain, offloaded = engine_of("none", changes), engine_of("host", changes)
    assert isinstance(offloaded.offloaded, OffloadedParameters) and plain.offloaded is None
    before = values(plain)
    equal(before, values(offloaded))
    assert steps(plain, 0, 3) == steps(offloaded, 0, 3)
    after = values(plain)
    equal(after, values(offloaded))
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in after.items() if tensor.numel()) > 0.9 * len(after)
    on_device = [local_part(p).untyped_storage().nbytes() for p in offloaded.model.parameters()]
    assert set(on_device) == {0}  # nothing is left of them, and nothing is left staged
    assert not any(unit.buffers for unit in offloaded.offloaded._units)


def all_cases(folder: str) -> None:
    for changes in CASES:
        both_ways(changes)
    for first, then in (("host", "none"), ("none", "host")):
        saved_and_resumed(f"{folder}/{first}", first, then)


def test_the_same_bits_and_checkpoints_on_two_ranks(tmp_path: Path) -> None:
    run_distributed(all_cases, 2, str(tmp_path))


def alone(where: str, changes: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process; with parameters in host memory it is a mesh of one rank."""
    engine = engine_of(where, changes)
    try:
        return steps(engine, 0, 3), values(engine)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("changes", CASES[:3], ids=["bf16", "fp64 tied", "fp32 tiles"])
def test_one_process_gets_the_same_bits(changes: dict) -> None:
    want, expected = alone("none", changes)
    got, found = alone("host", changes)
    assert got == want
    equal(expected, found)


def saved_and_resumed(folder: str, first: str, then: str) -> None:
    """Two steps, a checkpoint, two steps with the parameters elsewhere; against four steps without a break."""
    checkpoints = CheckpointManager(RunDir(Path(folder)), CheckpointSection())
    whole, before, after = engine_of("none", {}), engine_of(first, {}), engine_of(then, {})
    steps(whole, 0, 4)
    steps(before, 0, 2)
    checkpoints.save(2, before.state_dict(), block=True)
    steps(after, 0, 1)  # values that the checkpoint must replace
    good = checkpoints.latest_good()
    assert good is not None
    checkpoints.load(good, after.state_dict())
    steps(after, 2, 4)
    equal(values(whole), values(after))


def test_the_next_layer_is_on_its_way_while_one_computes() -> None:
    engine = engine_of("host", {})
    try:
        offloaded = engine.offloaded
        assert offloaded is not None
        staged: list[tuple[str, list[int]]] = []
        blocks = {id(unit): i - 2 for i, unit in enumerate(offloaded._units)}

        def note(words: str) -> None:
            staged.append((words, [blocks[id(unit)] for unit in offloaded._staged]))

        def noting(i: int) -> Callable[..., None]:
            return lambda _module, _args, out: (out.register_hook(lambda _grad: note(f"backward {i}")), None)[1]

        for i, block in enumerate(engine.model.blocks):
            block.register_forward_pre_hook(lambda *_, i=i: note(f"forward {i}"))
            block.register_forward_hook(noting(i))
        engine.forward_backward(batches(0)[:1])
        assert staged == [
            *((f"forward {i}", [i + 1]) for i in range(4)),
            *((f"backward {i}", [i - 1] if i else []) for i in (3, 2, 1, 0)),
        ]
    finally:
        dist.destroy_process_group()


def test_host_memory_is_counted_and_its_budget_held_to() -> None:
    settings, device = config("host", 1, {"precision": "fp32"}), torch.device("cpu")
    try:
        mesh = mesh_for(settings, device)
        with HostStore(device) as store:
            engine = build_engine(settings, VOCAB, mesh, device, store=store)
            elements = sum(p.numel() for p in engine.parameters.values())
            assert store.used_bytes == pytest.approx(12 * elements, rel=0.05)  # parameters and two moments
        with HostStore(device, int(11 * elements)) as store, pytest.raises(UserError, match="memory.host_gib"):
            build_engine(settings, VOCAB, mesh, device, store=store)
    finally:
        dist.destroy_process_group()
    assert all(isinstance(p, DTensor) for p in engine.parameters.values())


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"offload_optimizer": "none"}, "set offload_optimizer"),
        ({"offload_optimizer": "host", "plan": "estimate"}, "leave plan at trace"),
    ],
)
@pytest.mark.parametrize("where", ["host", "auto"])
def test_what_cannot_be_is_refused_by_name(where: str, memory: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunConfig.model_validate({"memory": {"offload_parameters": where, **memory}})


@pytest.mark.parametrize("states", ["host", "auto"])
@pytest.mark.parametrize(
    ("optim", "reason"),
    [
        ({"preset": "galore"}, "preset galore updates them where they are"),
        ({"fuse_backward": True, "clip_norm": None}, "updates them inside it"),
        ({"weights": "bf16_stochastic"}, "rounds them where they are"),
    ],
)
def test_optimizers_that_write_on_the_device_keep_the_parameters(states: str, optim: dict, reason: str) -> None:
    train = {"precision": "bf16"}
    fused = "fuse_backward" in optim
    with pytest.raises(ValueError, match="memory.offload_optimizer host" if states == "host" and fused else reason):
        RunConfig.model_validate({"memory": {"offload_parameters": "host", "offload_optimizer": states}, "optim": optim, "train": train})
    if states == "auto":
        memory = {"offload_parameters": "auto", "offload_optimizer": "auto"}
        found = places(RunConfig.model_validate({"memory": memory, "optim": optim, "train": train}))
        assert [place.memory.offload_optimizer for place in found] == ["none", *([] if fused else ["host"])]
        assert {place.memory.offload_parameters for place in found} == {"none"}


def test_auto_tries_the_states_first() -> None:
    def tried(**memory: str) -> list[tuple[str, str]]:
        found = places(RunConfig.model_validate({"memory": memory}))
        return [(one.memory.offload_optimizer, one.memory.offload_parameters) for one in found]

    assert tried(offload_optimizer="auto", offload_parameters="auto") == [("none", "none"), ("host", "none"), ("host", "host")]
    assert tried(offload_optimizer="host", offload_parameters="auto") == [("host", "none"), ("host", "host")]
    assert tried(offload_optimizer="auto", offload_parameters="host") == [("host", "host")]


def test_places_that_no_policy_makes_fit_are_not_planned() -> None:
    """Of a thousand parameters on two ranks: 16, 8 and 4 bytes of each must be on the devices."""
    auto = {"offload_optimizer": "auto", "offload_parameters": "auto"}
    config = RunConfig.model_validate({"memory": auto, "parallel": {"dp_shard": 2}})

    def left(room: int | None) -> int:
        return len(places(config, room, 1000))

    assert [left(room) for room in (None, 8000, 7999, 4000, 3999, 1)] == [3, 3, 2, 2, 1, 1]
    fused = {"optim": {"fuse_backward": True, "clip_norm": None}, "memory": auto}
    assert len(places(RunConfig.model_validate(fused), 1, 1000)) == 1


def test_a_plan_for_a_gpu_counts_host_memory_and_the_copies() -> None:
    """On an H100 that holds everything but the parameters: auto takes them to the host, and the plan says so."""

    def config_of(states: str, parameters: str, **memory: object) -> RunConfig:
        model = {"d_model": 512, "n_heads": 4, "layers": ["full"], "n_layers": 4, "tie_embeddings": False}
        places_of = {"offload_optimizer": states, "offload_parameters": parameters}
        return RunConfig.model_validate(
            {"model": model, "data": {"seq_len": 256}, "train": {"precision": "bf16"}, "memory": {**places_of, **memory}}
        )

    here, there = (planning.plan_run(config_of("host", where), "h100", with_changes=False) for where in ("none", "host"))
    parameters = next(term.bytes for term in here.terms if term.name == "parameters")
    assert parameters > 32 * 2**20 and there.host_bytes - here.host_bytes == pytest.approx(parameters, rel=0.01)
    assert here.peak_bytes - parameters < there.peak_bytes < here.peak_bytes
    assert here.prediction is not None and there.prediction is not None
    # To the device in forward and backward (the embedding and the head once each) and for the update, and back from it.
    copied = there.prediction.copied_bytes - here.prediction.copied_bytes
    assert 3.0 * parameters < copied <= 4.0 * parameters
    assert "parameters and the optimizer's states live there" in plain(there)
    tight = planning.plan_run(config_of("auto", "auto", budget_gib=(here.peak_bytes + there.peak_bytes) / 2 / GIB), "h100")
    assert tight.fits and (tight.offload_optimizer, tight.offload_parameters) == ("host", "host")
    read = as_planned(config_of("auto", "auto"), MemoryPlan.from_json(tight.to_json()))
    assert (read.memory.offload_optimizer, read.memory.offload_parameters) == ("host", "host")


def test_the_planner_counts_the_copies_of_parameters_against_the_link() -> None:
    """A block's parameters come once for its backward pass, at the link's rate; two passes take the link twice."""
    model = {"d_model": 512, "n_heads": 4, "layers": ["full"], "n_layers": 4, "tie_embeddings": False}
    memory = {"offload_optimizer": "host", "offload_parameters": "host", "recompute": "auto", "offload": "kept"}
    problems = []
    for passes in (1, 2):
        config = RunConfig.model_validate(
            {"model": model, "data": {"seq_len": 256}, "train": {"precision": "bf16", "grad_accum": passes}, "memory": memory}
        )
        target = planning.target_for(config, "h100")
        setting = planning.setting_for(target)
        trace = trace_step(target.request(baseline_policy(setting)))
        streams = {kind: {b.stream for b in trace.of("device") if b.kind == kind} for kind in ("parameter", "gradient", "skeletal")}
        assert streams["skeletal"] == {"compute"} and streams["gradient"] != {"compute"}, "FSDP2 reduces on a stream of its own"
        problems.append(problem_of_trace(trace, baseline_policy(setting), setting))
    block = 4 * block_parameters(config.model, "full")
    once, twice = problems
    assert once.layers[1].fetch_seconds == pytest.approx(block / once.bandwidth_in, rel=0.05)
    assert twice.layers[1].fetch_seconds == pytest.approx(2 * once.layers[1].fetch_seconds, rel=1e-6)
    assert (once.passes, twice.passes) == (1, 2) and twice.bandwidth_in == pytest.approx(once.bandwidth_in / 2)
