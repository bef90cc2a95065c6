"""Product keys and hierarchical memories: the same training whoever shares the table, from checkpoints of other meshes too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from tests.distributed import run_distributed
from tests.end_to_end.test_parallel_equality import documents, experiment  # noqa: F401  (a fixture)
from trainer.build import build_engine, mesh_for
from trainer.config import RunConfig
from trainer.data.build import build_data

STEPS = 3
MODEL = {
    "feedforward": ["product_keys", "dense", "product_keys"],
    "product_keys": {"n_keys": 9, "heads": 2, "top_k": 4, "key_dim": 16, "value_dim": 10, "qk_norm": True, "attach": "beside"},
}
MESHES = {
    # ranks: (dp_replicate, dp_shard, cp, layout); four ranks hold 3, 3, 3 and 1 of 10 columns
    2: [(1, 1, 2, "zigzag"), (2, 1, 1, "auto")],
    4: [(1, 1, 4, "zigzag"), (2, 1, 2, "contiguous"), (1, 2, 2, "zigzag")],
}


HIERARCHICAL = {
    "feedforward": ["hierarchical", "product_keys", "hierarchical"],
    "product_keys": MODEL["product_keys"],
    "hierarchical": {"branching": [2, 3], "units": [4, 3]},
}
CLUSTERED_MESHES = {2: [(1, 1, 2, "zigzag")], 4: [(2, 1, 2, "contiguous")]}


def config_of(documents: tuple[str, str], mesh: tuple[int, int, int, str], precision: str = "fp64", **changes: Any) -> RunConfig:  # noqa: F811
    replicate, shard, cp, layout = mesh
    data = experiment(*documents, precision, layout, replicate, shard, cp).model_dump(mode="json")
    data["model"] |= {**MODEL, **changes}
    data["optim"] |= {"preset": "adamw_8bit", "groups": [{"match": "value_tables.*", "lr": 3e-2, "weight_decay": 0.1}]}
    return RunConfig.model_validate(data)


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    flat = {f"{part}.{name}": value for part, values in state.items() for name, value in values.items()}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for name, v in flat.items()}


def train(config: RunConfig, start_from: str | None = None, save_to: str | None = None) -> tuple[list[float], list[float], dict, bool]:
    """Losses and norms of STEPS steps (half of them after loading a checkpoint of the first half), the whole state, and whether the
    optimizer's bytes were as planned."""
    mesh = mesh_for(config, torch.device("cpu")) if dist.is_initialized() else None
    dp_rank, dp_size = (mesh.dp_rank, mesh.dims.dp) if mesh else (0, 1)
    data = build_data(config, dp_rank, dp_size)
    engine = build_engine(config, data.vocab_size, mesh, torch.device("cpu"))
    if start_from is not None:
        load(engine.state_dict(), checkpoint_id=start_from)
    losses, norms = [], []
    for step, (micro_batches, _) in enumerate(data.train(), start=1):
        if start_from is None or step > STEPS // 2:
            losses.append(engine.forward_backward(micro_batches).loss)
            norms.append(engine.step(config.optim.lr))
        if step == STEPS // 2 and save_to is not None:
            save(engine.state_dict(), checkpoint_id=save_to)
        if step == STEPS:
            break
    planned = all(row.planned_bytes == row.measured_bytes for row in engine.optimizer.plan())  # pyright: ignore
    return losses, norms, whole(engine.state_dict()), planned


def on_meshes(configs: list[tuple[RunConfig, str]], of_parts: list[RunConfig]) -> tuple[list[tuple], list[tuple]]:
    """Of every configuration a whole run, and one that goes on from a checkpoint."""
    return [(train(config), train(config, start_from)) for config, start_from in configs], [train(config) for config in of_parts]


def clustered(documents: tuple[str, str], mesh: tuple[int, int, int, str]) -> RunConfig:  # noqa: F811
    """Hierarchical memories, on the same documents with clusters."""
    path = Path(documents[0]).with_name("clustered.jsonl")
    if not path.exists():
        lines = [json.loads(line) for line in Path(documents[0]).read_text().splitlines()]
        path.write_text("".join(json.dumps(line | {"cluster": i * 5 % 6}) + "\n" for i, line in enumerate(lines)))
    data = config_of(documents, mesh).model_dump(mode="json")
    data["model"] |= HIERARCHICAL
    data["data"] |= {"path": str(path), "cluster_key": "cluster"}
    return RunConfig.model_validate(data)


def with_tensor_parallel_ranks(config: RunConfig, tp: int) -> RunConfig:
    """By momentum: states of few bits lie in blocks, for which the parts of this model are too narrow."""
    data = config.model_dump(mode="json")
    data["optim"] |= {"preset": "sgd", "momentum": 0.9}
    return RunConfig.model_validate({**data, "parallel": {**data["parallel"], "tp": tp}})


def same(got: tuple, want: tuple, tolerance: float) -> None:
    assert got[0] == pytest.approx(want[0], rel=tolerance, abs=0) and got[1] == pytest.approx(want[1], rel=tolerance, abs=0)
    assert got[2].keys() == want[2].keys() and got[3]
    for name, value in want[2].items():
        torch.testing.assert_close(got[2][name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def alone(documents: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple, str]:  # noqa: F811
    path = str(tmp_path_factory.mktemp("checkpoint") / "half")
    result = train(config_of(documents, (1, 1, 1, "auto")), save_to=path)
    assert result[0][-1] < result[0][0]
    return result, path


@pytest.fixture(scope="module")
def alone_clustered(documents: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple, str]:  # noqa: F811
    path = str(tmp_path_factory.mktemp("checkpoint") / "half")
    result = train(clustered(documents, (1, 1, 1, "auto")), save_to=path)
    assert result[0][-1] < result[0][0]
    values = result[2]["model.value_tables.1.weight"]
    assert values.shape == (2 * (2 * 4 + 6 * 3), 3 * 32)
    return result, path


@pytest.mark.parametrize("world", [2, 4])
def test_same_training_on_any_mesh(
    documents: tuple[str, str],  # noqa: F811
    alone: tuple[tuple, str],
    alone_clustered: tuple[tuple, str],
    world: int,
) -> None:
    """Losses, norms, parameters and states in float64, of whole runs and of runs that go on from one process's checkpoint."""
    configs = [(config_of(documents, mesh), *alone) for mesh in MESHES[world]]
    configs += [(clustered(documents, mesh), *alone_clustered) for mesh in CLUSTERED_MESHES[world]]
    meshes = {2: [(1, 1, 1, "auto")], 4: [(1, 1, 2, "contiguous"), (2, 1, 1, "auto"), (1, 2, 1, "auto")]}
    of_parts = [with_tensor_parallel_ranks(config_of(documents, mesh), 2) for mesh in meshes[world]]
    of_parts += [with_tensor_parallel_ranks(clustered(documents, mesh), 2) for mesh in meshes[world][:1] if world == 4]
    want = train(with_tensor_parallel_ranks(config_of(documents, (1, 1, 1, "auto")), 1))
    want_clustered = train(with_tensor_parallel_ranks(clustered(documents, (1, 1, 1, "auto")), 1))
    for answers, others in run_distributed(on_meshes, world, [(config, path) for config, _, path in configs], of_parts):
        for (started, resumed), (_, result, _) in zip(answers, configs, strict=True):
            same(started, result, 1e-9)
            same(resumed, (result[0][STEPS // 2 :], result[1][STEPS // 2 :], *result[2:]), 1e-9)
        for other, wanted in zip(others, [*[want] * len(meshes[world]), want_clustered], strict=False):
            same(other, wanted, 1e-9)


def test_options_learn_too(documents: tuple[str, str], tmp_path: Path) -> None:  # noqa: F811
    settings = {**MODEL["product_keys"], "shared_table": False, "gate": "none", "value_dim": None, "tucker_rank": 2, "expansion": 3}
    losses, _, state, planned = train(config_of(documents, (1, 1, 1, "auto"), "fp32", product_keys=settings), save_to=str(tmp_path / "c"))
    assert losses[-1] < losses[0] and planned
    assert state["model.value_tables.1.weight"].shape == (27, 32)
