"""What two ranks find out about both engines in one go, for test_deepspeed_engine.py: starting ranks and imports take longest."""

from __future__ import annotations

from typing import Any

import torch

from memory_mgmt.policy_settings import policy_of
from models.batch import Batch, Bounds
from tests.trainer import engine_questions
from trainer.build import Fill, _beginning, build_engine, host_store, mesh_for
from trainer.checkpoint import CheckpointManager
from trainer.config import CheckpointSection, RunConfig
from trainer.engine import Engine
from trainer.run_dir import RunDir

SEQ_LEN, VOCAB, PASSES = 32, 64, 2
CPU = torch.device("cpu")
STAGES: dict[str, dict[str, Any]] = {
    "zero_1": {"stage": 1},
    "zero_2": {"stage": 2},
    "zero_3": {"stage": 3, "bucket_elements": 3000},
    "zero_2 offload": {"stage": 2, "offload_optimizer": "cpu"},
    "zero_3 offload": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
}
BESIDE: dict[str, dict[str, Any]] = {
    "sequence parallel": {"parallel": {"cp": 2}, "memory": {"recompute": "mixer"}},
    "ulysses": {"parallel": {"cp": 2, "sequence": "ulysses"}},
    "blocks again": {"memory": {"recompute": "block"}, "model": {"tie_embeddings": True}},
    "groups again": {"memory": {"recompute": "block", "group_blocks": 2}},
    "tiles": {"memory": {"recompute": "block", "ffn_tile_tokens": 8, "memory_tile_tokens": 8}},
    "swapped": {"memory": {"offload": "kept"}},
    "swapped inputs": {"memory": {"recompute": "block", "offload": "inputs"}},
    "eight bits": {"memory": {"quantise": "feed_forward"}},
    "autocast": {"train": {"precision": "bf16"}},
}
"""Settings that are lawful with both engines."""


def config(zero: dict[str, Any] | None, beside: dict[str, Any] | None = None) -> RunConfig:
    """Of the native engine where ``zero`` is None."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"d_model": 16, "n_heads": 2, "layers": ["full", "memory"], "memory": {"chunk_size": 8}},
        "data": {"seq_len": SEQ_LEN},
        "train": {"device": "cpu"},
        "optim": {"clip_norm": 0.5, "eps": 1e-6},
        "parallel": {"dp_shard": 2, "layout": "contiguous"},
    }
    for name, values in (beside or {}).items():
        sections[name] = {**sections.get(name, {}), **values}
    if "cp" in sections["parallel"]:
        sections["parallel"]["dp_shard"] = 1
    engine = {} if zero is None else {"engine": "deepspeed", "deepspeed": zero}
    return RunConfig.model_validate({**sections, **engine})


def build(settings: RunConfig, fill: Fill | None = None) -> Engine:
    policy = policy_of(settings.memory, settings.model.layer_kinds)
    store = host_store(policy, CPU, None, None)
    return build_engine(settings, VOCAB, mesh_for(settings, CPU), CPU, policy, store, *([] if fill is None else [fill]))


def batch(seed: int) -> Batch:
    tokens_BT = torch.randint(VOCAB, (1, SEQ_LEN), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens_BT, tokens_BT.roll(-1, 1), torch.arange(SEQ_LEN)[None], Bounds.whole(1, SEQ_LEN))


def train(engine: Engine, steps: range, refused: tuple[int, ...] = ()) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step; those in ``refused`` update nothing."""
    assert engine.mesh is not None
    found = []
    for step in steps:
        sums = engine.forward_backward([batch(1000 * step + 10 * number + engine.mesh.dp_rank) for number in range(PASSES)])
        found.append((sums.loss, engine.step(1e-2, lambda _, step=step: step not in refused)))
    return found


def whole_run(zero: dict[str, Any] | None, beside: dict[str, Any] | None, steps: int, refused: tuple[int, ...] = ()) -> Any:
    """Losses and norms of a run, and its evaluations in the midst of it."""
    engine = build(config(zero, beside))
    first = train(engine, range(steps // 2), refused)
    seen = engine.evaluate([batch(1)]).loss
    found = [*first, *train(engine, range(steps // 2, steps), refused)]
    return [*found, (seen, float(engine.is_finite()))]


def handed_on(folder: str) -> list[Any]:
    """One run of which every engine makes two steps and saves, in the other's turn by a copy in the background."""
    found: list[Any] = []
    earlier: CheckpointManager | None = None
    for number, zero in enumerate([None, *STAGES.values(), None]):
        engine = build(config(zero))
        checkpoints = CheckpointManager(RunDir(f"{folder}/{number}"), CheckpointSection(asynchronous=bool(number % 2)))
        if earlier is not None:
            good, state = earlier.latest_good(), engine.state_dict()
            assert good is not None
            earlier.load(good, state)
            engine.loaded()
        found += train(engine, range(2 * number, 2 * number + 2))
        checkpoints.save(2 * number + 2, engine.state_dict())
        train(engine, range(100, 101))  # what comes later is not in the checkpoint
        checkpoints.wait()
        earlier = checkpoints
    return found


def begun(zero: dict[str, Any] | None, folder: str) -> list[tuple[float, float]]:
    """Five steps of a run with ``train.init_from``: the weights that the native engine saved in ``folder``."""
    settings = config(zero, {"train": {"init_from": folder, "device": "cpu"}})
    new = RunDir(f"{folder}-begun")
    fill, notes = _beginning(settings, new, CheckpointManager(new, CheckpointSection()))
    engine = build(settings, fill)
    assert notes == [f"begins with the weights of {folder}/checkpoints/step_00000004"]
    return train(engine, range(5))


def given_weights(folder: str) -> None:
    """Make them: other ones than those that a run begins with by chance."""
    engine = build(config(None))
    train(engine, range(200, 204))
    CheckpointManager(RunDir(folder), CheckpointSection()).save(4, engine.state_dict())


def all_cases(folder: str) -> dict[str, Any]:
    """By name of the question, pairs of what the native engine found and what the other one did."""
    native = whole_run(None, None, 20)
    found: dict[str, Any] = {f"20 steps, {name}": (native, whole_run(zero, None, 20)) for name, zero in STAGES.items()}
    for number, (name, beside) in enumerate(BESIDE.items()):
        zero = {"stage": 3 - number % 2}
        found[f"{name}, zero_{zero['stage']}"] = (whole_run(None, beside, 4), whole_run(zero, beside, 4))
    without = whole_run(None, None, 6, (1, 4))
    for name, zero in STAGES.items():
        found[f"refused steps, {name}"] = (without, whole_run(zero, None, 6, (1, 4)))
    given_weights(f"{folder}/given")
    with_given = begun(None, f"{folder}/given")
    assert with_given != native[:5]
    for name, zero in STAGES.items():
        found[f"given weights, {name}"] = (with_given, begun(zero, f"{folder}/given"))
    answers = engine_questions.answers(lambda beside: build(config(None, beside)))
    for name, zero in STAGES.items():
        theirs = engine_questions.answers(lambda beside, zero=zero: build(config(zero, beside)))
        found |= {f"{question}, {name}": (answers[question], theirs[question]) for question in answers}
    on_and_on = handed_on(folder)
    found["handed from engine to engine"] = (train(build(config(None)), range(len(on_and_on))), on_and_on)
    return found
