"""A small run to save and load: FSDP2 where there is a process group, plain otherwise."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer.checkpoint import CheckpointManager
from trainer.checkpoint_state import split_leaves
from trainer.config import CheckpointSection
from trainer.run_dir import RunDir


class Net(torch.nn.Module):
    """Sizes that no number of ranks divides; the last parameter has fewer rows than ranks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(7, 7, dtype=dtype) for _ in range(2)])
        self.out = torch.nn.Linear(7, 2, dtype=dtype)

    def forward(self, x):
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return self.out(x)


class Run:
    """Model and optimizer with the Engine's form of state."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.net = Net(dtype)
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in self.net.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        for parameter in self.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def step(self, number: int) -> None:
        """The same whole batch on every rank, so that the gradient does not depend on the number of ranks' split."""
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(self.dtype)
        self.optimizer.zero_grad()
        self.net(x).pow(2).sum().backward()
        self.optimizer.step()

    def state(self) -> dict:
        optim = {f"{n}.{k}": v for n, p in self.net.named_parameters() for k, v in self.optimizer.state[p].items()}
        return {"model": dict(self.net.named_parameters()), "optim": optim}

    def whole(self) -> dict[str, torch.Tensor]:
        tensors, _ = split_leaves(self.state())
        return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for k, v in tensors.items()}


class Progress:
    """A Stateful that holds JSON values."""

    def __init__(self, **values) -> None:
        self.values = values

    def state_dict(self):
        return self.values

    def load_state_dict(self, state_dict):
        self.values = state_dict


def manager(folder: Path | str, **settings) -> CheckpointManager:
    return CheckpointManager(RunDir(folder), CheckpointSection(**settings), config_hash="cafe")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def saved(folder: Path, *steps: int, **settings) -> tuple[CheckpointManager, Run]:
    """A plain one-process run saved at ``steps``."""
    run, checkpoints = Run(), manager(folder, **settings)
    for step in steps:
        run.step(step)
        checkpoints.save(step, {**run.state(), "train": Progress(step=step)})
    return checkpoints, run


def files(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())
