"""States of our own presets in host memory: the same bits as without, whatever the buckets, and no copy before its turn."""

import gc

import pytest
import torch
from torch import nn

from memory_mgmt.offload import HostStore
from memory_mgmt.optimizer_lanes import OffloadedLanes, _pieces
from memory_mgmt.optimizer_on_host import build_on_host
from models.errors import UserError
from models.int8_weight import stored
from optim.build import build_optimizer, lanes_of, parameter_groups, quantise_matrices_
from optim.config import OptimConfig
from optim.driver import ComposedOptimizer
from optim.routing import route
from tests.memory_mgmt.test_offload_streams import LateCopies

PRESETS = {
    "adamw_8bit": {},
    "adamw_4bit": {},
    "adamw_8bit, rounded by chance": {"weights": "bf16_stochastic"},
    "adamw_4bit, weights of 24 bits": {"weights": "bf16_24bit"},
    "sgd": {},
    "galore": {"rank": 8, "update_gap": 2},
    "q_galore": {"rank": 8, "update_gap": 2},
    "apollo": {"rank": 8, "update_gap": 2},
    "muon": {},
    "adafactor": {},
}


class Net(nn.Module):
    """Two equal blocks, a wide embedding, a head: matrices of hidden layers, the rest, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}) for _ in range(2))
        self.head = nn.Linear(64, 300, bias=False)


def model(config: OptimConfig) -> Net:
    torch.manual_seed(0)
    net = Net().to(torch.bfloat16 if config.bfloat16_weights else torch.float32)
    if config.kept_weights == "int8_stochastic":
        quantise_matrices_(net)
    return net


def settings(name: str) -> OptimConfig:
    return OptimConfig.model_validate({"preset": name.split(",")[0], "lr": 1e-2, **PRESETS[name]})


def offloaded(net: Net, config: OptimConfig, store: HostStore, bucket_bytes: int) -> OffloadedLanes:
    lanes = lanes_of(net, config)
    assert lanes is not None
    return OffloadedLanes(parameter_groups(net, route(net), config), lanes, config.lr, store, bucket_bytes)


def steps(net: Net, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """In some steps a parameter has no gradient."""
    for step in range(first, last):
        torch.manual_seed(100 + step)
        for i, parameter in enumerate(net.parameters()):
            gradient = torch.randn(parameter.shape, dtype=parameter.dtype)
            parameter.grad = None if i == step else gradient
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()


def same(ours: Net, theirs: Net, one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    states, expected = one.state, other.state
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(stored(a), stored(b)), name
        assert states[a].keys() == expected[b].keys()
        for key, value in expected[b].items():
            assert states[a][key].dtype == value.dtype and torch.equal(states[a][key], value), (name, key)


@pytest.mark.parametrize("name", PRESETS)
def test_same_bits_as_on_the_device(name: str) -> None:
    config = settings(name)
    theirs = model(config)
    plain = build_optimizer(theirs, config)
    assert isinstance(plain, ComposedOptimizer)
    steps(theirs, plain, 0, 4)
    for bucket_bytes in (3000, 1 << 20):
        ours = model(config)
        with HostStore("cpu") as store:
            optimizer = offloaded(ours, config, store, bucket_bytes)
            held = sum(v.numel() * v.element_size() for s in optimizer.state.values() for key, v in s.items() if key != "step")
            split = [load for load in optimizer._loads if load.units[0].rows is not None]
            assert not (split and bucket_bytes > 5000) and (len(split) > 2 or bucket_bytes > 5000 or "adamw" not in name)
            steps(ours, optimizer, 0, 4)
            same(ours, theirs, optimizer, plain)
            assert held <= optimizer.host_bytes <= held + 64 * sum(len(load.units) * 8 for load in optimizer._loads)
            assert store.copied_bytes.to_host == 4 * optimizer.host_bytes == store.copied_bytes.to_device
            assert store.used_bytes >= held and not optimizer._near


def test_checkpoints_go_both_ways() -> None:
    config = settings("adamw_8bit")
    nets, optimizers = [model(config) for _ in range(3)], []
    optimizers.append(build_optimizer(nets[0], config))
    optimizers.extend(offloaded(net, config, HostStore("cpu"), 3000) for net in nets[1:])
    steps(nets[0], optimizers[0], 0, 2)
    for before, after in ((0, 1), (1, 2)):
        nets[after].load_state_dict(nets[before].state_dict())
        places = [value.data_ptr() for states in optimizers[after].state.values() for value in states.values()]
        optimizers[after].load_state_dict(optimizers[before].state_dict())
        assert places == [value.data_ptr() for states in optimizers[after].state.values() for value in states.values()]
        same(nets[after], nets[before], optimizers[after], optimizers[before])
    for net, optimizer in zip(nets, optimizers, strict=True):
        steps(net, optimizer, 2, 4)
    same(nets[2], nets[0], optimizers[2], optimizers[0])


@pytest.mark.parametrize("name", ["adamw_4bit", "galore"])
def test_copies_as_late_as_allowed(name: str) -> None:
    """On streams that run only when somebody waits, and on memory that they do not keep alive, a missing wait gives other bits."""
    config = settings(name)
    ours, theirs, late = model(config), model(config), HostStore("cpu")
    late._plain = LateCopies()  # pyright: ignore[reportAttributeAccessIssue]
    one, other = offloaded(theirs, config, HostStore("cpu"), 2000), offloaded(ours, config, late, 2000)
    assert len(other._loads) > 6
    for step in range(3):
        steps(theirs, one, step, step + 1)
        steps(ours, other, step, step + 1)
        gc.collect()
    same(ours, theirs, other, one)


def test_large_parameters_go_in_runs_of_rows_and_equal_layers_alike() -> None:
    net = model(settings("adamw_8bit"))
    optimizer = offloaded(net, settings("adamw_8bit"), HostStore("cpu"), 8000)
    loads: dict[str, list[list[tuple[int, int] | None]]] = {}
    for load in optimizer._loads:
        assert load.nbytes <= 2 * 8000
        rows = [None if unit.rows is None else (unit.rows.start, unit.rows.stop) for unit in load.units]
        loads.setdefault(load.section, []).append(rows)
    assert list(loads) == ["embed", "blocks.0", "blocks.1", "head"] and loads["blocks.0"] == loads["blocks.1"]
    lane = optimizer.lanes[next(net.embed.parameters())]
    runs = _pieces(lane, 8000)
    assert [(run.start, run.stop) for run in runs] == [rows for (rows,) in loads["embed"]]
    assert [run.stop for run in runs][:-1] == [run.start for run in runs][1:] and runs[-1].stop == 300


def test_a_budget_too_small_names_the_settings() -> None:
    net = model(settings("adamw_8bit"))
    with HostStore("cpu", 1000) as store, pytest.raises(UserError, match="memory.offload_optimizer=none"):
        build_on_host(net, settings("adamw_8bit"), 0, store)
