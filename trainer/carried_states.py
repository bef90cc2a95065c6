"""Memory states that go from one training sequence to the next of the same document, kept with the run.

Row b of pass m of a step continues row b of pass m of the step before, or begins afresh (``Batch.continued``): a document that runs
through several sequences is read by one row from start to end, its gradients cut at the sequences' bounds. The states are saved by the
number of the row in the step, so a run may go on with other data-parallel degrees, micro-batches and passes.

Legend: B rows of a pass, L rows of a step over all data-parallel ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from models.batch import Batch
from models.memory.protocol import Carried, MemoryModule, State
from models.transformer import Transformer
from parallel.mesh import Mesh

States = dict[str, State]
"""By name of the memory module."""


class CarriedStates:
    """The states of all memories of ``model`` for the rows of this rank's passes; zeros until the first step."""

    def __init__(self, model: Transformer, rows: int, passes: int, device: torch.device, dtype: torch.dtype, mesh: Mesh | None) -> None:
        mixers = {f"blocks.{i}.mixer": block.mixer for i, block in enumerate(model.blocks)}
        self.modules = {name: mixer.carrier for name, mixer in mixers.items() if isinstance(mixer, MemoryModule)}
        if model.stack is not None:
            self.modules["stack"] = model.stack
        self.mesh, self.rows, self.device = mesh, rows, device
        with torch.no_grad():
            like = {name: module.init_state(rows, device, dtype) for name, module in self.modules.items()}
        self.kept: list[States] = [
            {name: {key: torch.zeros(x.shape, dtype=x.dtype, device=device) for key, x in state.items()} for name, state in like.items()}
            for _ in range(passes)
        ]
        """By pass."""

    @contextlib.contextmanager
    def handed_on(self, number: int, batch: Batch) -> Iterator[None]:
        """Around forward and backward of pass ``number`` of a step: rows go on from what their last sequence left."""
        kept = self.kept[number]
        fresh_B = torch.tensor([not row for row in batch.continued or (False,) * self.rows], device=self.device)
        for name, module in self.modules.items():
            module.carried = Carried(kept[name], fresh_B)
        try:
            yield
            for name, module in self.modules.items():
                assert module.carried is not None and module.carried.left is not None, f"{name} left no state"
                for key, value in module.carried.left.items():
                    kept[name][key].copy_(value)
        finally:
            for module in self.modules.values():
                module.carried = None

    def gathered(self) -> States:
        """Every state [L, ...] of the step's rows in their order, in host memory, the same on all ranks; all ranks must call it."""
        return {
            name: {key: self._whole([states[name][key] for states in self.kept]) for key in self.kept[0][name]} for name in self.modules
        }

    def take_over(self, states: States) -> None:
        """Keep this rank's rows of what ``gathered`` gave, on any number of ranks."""
        dp_size, dp_rank = (self.mesh.dims.dp, self.mesh.dp_rank) if self.mesh is not None else (1, 0)
        for name in self.modules:
            for key, whole in states[name].items():
                mine = whole.unflatten(0, (len(self.kept), dp_size, self.rows))[:, dp_rank]
                for kept, value in zip(self.kept, mine, strict=True):
                    kept[name][key].copy_(value)

    def _whole(self, passes: list[torch.Tensor]) -> torch.Tensor:
        mine = torch.stack(passes)  # [passes, B, ...]
        parts = [mine]
        if self.mesh is not None and self.mesh.dims.dp > 1:
            everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, mine)
            dims = self.mesh.dims
            first = {dims.dp_rank(rank): rank for rank in reversed(range(len(everyone)))}  # ranks of one sequence hold the same
            parts = [everyone[first[dp_rank]] for dp_rank in range(dims.dp)]
        return torch.stack(parts, dim=1).flatten(0, 2).cpu()  # [passes, dp, B, ...] -> [L, ...]
