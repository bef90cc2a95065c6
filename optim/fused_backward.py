"""Update in the backward pass: a parameter is stepped as soon as its gradient is complete, and the gradient is freed at once.

Parameters are stepped unit by unit. A unit is what one FSDP2 module shards: FSDP2 completes its gradients together, in the order of its own
reduce-scatters, which is the same on all ranks, and calls the hooks there. So the collectives of a unit's update come at the same place
among all others on every rank, whatever order autograd takes inside. A parameter that is whole on its rank needs nobody and is a unit of
its own. What has no gradient when the pass is over is left alone, as by ``step``.

    fused = fuse_backward(model, optimizer, clip_norm=1.0, clip="previous")
    for batches in steps:
        for batch in batches[:-1]:                  # gradients of earlier micro-batches add up, in coordinates where the method allows
            loss_of(model, batch).backward()
        with fused.update():                        # the last one: everything is updated in here
            loss_of(model, batches[-1]).backward()
        print(float(fused.norm))

States, and so checkpoints, are the optimizer's own: a run goes on fused or not.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from optim.clip import elements, square_sum
from optim.driver import ComposedOptimizer
from optim.lane import Lane
from optim.placement import Placed

Clip = Literal["previous", "per_tensor"]
INDEPENDENT = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
"""torch's optimizers that are known to update each parameter by itself."""


@dataclass
class _Member:
    """One parameter: its name, parameter group, the ranks that share its rows, and its lane where it has one."""

    name: str
    parameter: nn.Parameter
    group: int
    shared_by: dist.ProcessGroup | None
    lane: Lane | None

    @property
    def used(self) -> Tensor:
        """What the update is computed from: this rank's part of the gradient, or of its summed coordinates."""
        if self.lane is not None and self.lane.summed is not None:
            return self.lane.summed
        return elements(self.parameter)

    @property
    def has_gradient(self) -> bool:
        return self.parameter.grad is not None or (self.lane is not None and self.lane.summed is not None)


@dataclass
class _Unit:
    """Parameters whose gradients are complete together."""

    members: dict[Tensor, _Member] = field(default_factory=dict)
    missing: set[Tensor] = field(default_factory=set)
    """Of the update that is going on: parameters whose gradients are not complete yet."""
    summing: dict[Tensor, _Member] | None = None
    """Those that may sum coordinates in this step; None: not asked yet."""
    arrived: set[Tensor] = field(default_factory=set)
    """Of ``summing``: those whose gradient waits for the others'."""


class FusedBackward:
    """See the module; made by ``fuse_backward``."""

    def __init__(self, units: Sequence[_Unit], optimizer: torch.optim.Optimizer, clip_norm: float | None, clip: Clip | None) -> None:
        self.optimizer, self.clip_norm, self.clip = optimizer, clip_norm, clip
        self.norm: Tensor | None = None
        """Global L2 norm of the last step's gradients before clipping, a float64 scalar, the same on every rank: what ``previous`` reads
        in the next step, so it belongs into a checkpoint. Of a matrix whose micro-batches were summed in its subspace it is the norm of
        the coordinates. None before the first step, which ``previous`` does not clip."""
        self.watch: Callable[[Iterable[Tensor]], None] = lambda gradients: None
        """Told of gradients and sums that will be freed inside the backward pass: for whoever records a step."""
        self._units = units
        self._unit_of = {parameter: unit for unit in units for parameter in unit.members}
        self._updating = False
        self._squares: dict[dist.ProcessGroup | None, Tensor] = {}
        # Hooks live in C++, where the garbage collector does not look: with a strong reference nothing here would ever be freed.
        arrived = weakref.WeakMethod(self._arrived)

        def hook(parameter: Tensor) -> None:
            if (method := arrived()) is not None:
                method(parameter)

        self._hooks = [parameter.register_post_accumulate_grad_hook(hook) for parameter in self._unit_of]

    def remove(self) -> None:
        """Take the hooks off: from now on the optimizer's own ``step`` updates."""
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Run the backward pass of a step's last micro-batch in here, with the learning rates set. When it is left, every parameter is
        updated, all gradients are freed and ``norm`` is the step's.

        Raises RuntimeError when a gradient is added to after it was used: some parameters are updated then and others are not.
        """
        self._updating, self._squares = True, {}
        for unit in self._units:
            unit.missing = set(unit.members)
        try:
            yield
            for unit in self._units:
                if unit.missing:  # some have no gradient in this pass
                    self._step(unit)
        finally:
            self._updating = False
            self.discard()
        self.norm = self._global_norm()

    def discard(self) -> None:
        """Drop all gradients and sums, as ``zero_grad``."""
        for unit in self._units:
            _clear(unit.members.values())
            unit.summing, unit.arrived = None, set()

    def state_dict(self) -> dict[str, Any]:
        """The norm of the last step."""
        return {} if self.norm is None else {"norm": self.norm}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As ``state_dict`` gave it; a plain number will do."""
        norm = state_dict.get("norm")
        device = next(iter(self._unit_of)).device
        self.norm = None if norm is None else torch.as_tensor(norm, dtype=torch.float64, device=device)

    # --- hooks ------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        """The gradient of ``parameter`` in this backward pass is complete and added to ``grad``."""
        unit = self._unit_of[parameter]
        self.watch([cast(Tensor, parameter.grad)])
        if not self._updating:
            self._sum(unit, parameter)
            return
        if parameter not in unit.missing:
            raise RuntimeError(
                f"the gradient of '{unit.members[parameter].name}' came in parts: it was added to after it was used. A parameter that both "
                "a recomputed part and the rest of a model use cannot be updated in the backward pass"
            )
        unit.missing.remove(parameter)
        if not unit.missing:
            self._step(unit)

    def _sum(self, unit: _Unit, parameter: Tensor) -> None:
        """After a micro-batch that is not the last: once all gradients of the unit that can be kept in coordinates are there, do so."""
        if not isinstance(self.optimizer, ComposedOptimizer):
            return
        if unit.summing is None:
            may_sum = self.optimizer.may_sum
            unit.summing = {p: member for p, member in unit.members.items() if member.lane is not None and may_sum(member.lane)}
        if parameter in unit.summing:
            unit.arrived.add(parameter)
            if len(unit.arrived) == len(unit.summing):
                self._to_coordinates(unit.summing.values())
                unit.arrived = set()

    def _to_coordinates(self, members: Iterable[_Member]) -> None:
        lanes = [member.lane for member in members if member.lane is not None and member.parameter.grad is not None]
        cast(ComposedOptimizer, self.optimizer).sum_coordinates(lanes)
        self.watch(lane.summed for lane in lanes if lane.summed is not None)

    # --- the update of one unit ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self, unit: _Unit) -> None:
        unit.missing = set()
        begun = [member for member in unit.members.values() if member.lane is not None and member.lane.summed is not None]
        if begun:
            self._to_coordinates(begun)
        members = [member for member in unit.members.values() if member.has_gradient]
        if members:
            self._measure_and_clip(members)
            _step_parameters(self.optimizer, members)
            _clear(members)

    def _measure_and_clip(self, members: Sequence[_Member]) -> None:
        """Add the squares of what ``members`` are updated from to those of the step; scale it as the policy says."""
        sharing: dict[dist.ProcessGroup | None, list[_Member]] = {}
        for member in members:
            sharing.setdefault(member.shared_by, []).append(member)
        for group, some in sharing.items():
            used = [member.used for member in some]
            squares = torch.stack([square_sum(tensor) for tensor in used])
            if self.clip == "per_tensor" and group is not None:
                dist.all_reduce(squares, group=group)
            # Squares that are summed over ranks already are nobody's part any more.
            key = None if self.clip == "per_tensor" else group
            self._squares[key] = self._squares.get(key, 0.0) + squares.sum()
            if self.clip == "per_tensor":
                for tensor, square in zip(used, squares, strict=True):
                    tensor.mul_(self._scale(square.sqrt()).to(tensor.dtype))
            elif self.clip == "previous" and self.norm is not None:
                scale = self._scale(self.norm)
                for tensor in used:
                    tensor.mul_(scale.to(tensor.dtype))

    def _scale(self, norm: Tensor) -> Tensor:
        """As ``clip_grad_norm`` scales."""
        return torch.clamp(cast(float, self.clip_norm) / (norm + 1e-12), max=1.0)

    def _global_norm(self) -> Tensor:
        if not self._squares:
            raise ValueError("no parameter has a gradient")
        total = torch.zeros_like(next(iter(self._squares.values())))
        for group, squares in self._squares.items():
            if group is not None:
                dist.all_reduce(squares, group=group)
            total += squares
        return total.sqrt()


def fuse_backward(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, clip_norm: float | None = None, clip: Clip | None = None
) -> FusedBackward:
    """Have ``optimizer`` update the parameters of ``model`` inside the backward pass (``FusedBackward.update``), instead of in its
    ``step``.

    Args:
        model: as it is trained: sharded by FSDP2 before, if at all.
        optimizer: of ``build_optimizer``, or one of ``INDEPENDENT``.
        clip_norm: limit of the norm; None: gradients are not clipped.
        clip: ``previous``: all gradients are scaled by min(1, clip_norm / the global norm of the step before); ``per_tensor``: each
            gradient by min(1, clip_norm / its own norm), for one more collective per unit where it is sharded.
    Raises ValueError for ``clip_norm`` without ``clip`` (the exact norm is known when everything is updated already) and the other way
    round, an optimizer or a wrapper that cannot be fused, a sharded parameter that no FSDP2 module holds.
    """
    if (clip_norm is None) != (clip is None):
        raise ValueError(
            f"clip_norm {clip_norm} with clip {clip!r}: the exact global norm is not known before the last gradient is; "
            "give clip_norm and clip='previous' or 'per_tensor', or neither"
        )
    if not isinstance(optimizer, (ComposedOptimizer, *INDEPENDENT)):
        known = ", ".join(kind.__name__ for kind in INDEPENDENT)
        raise ValueError(f"{type(optimizer).__name__} cannot be fused into the backward pass; known: those of build_optimizer, {known}")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("DistributedDataParallel sums gradients after their hooks; use FSDP2 (its two-axis mesh replicates)")
    return FusedBackward(_units(model, optimizer), optimizer, clip_norm, clip)


def _units(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[_Unit]:
    """The optimizer's parameters by the FSDP2 module that holds them; in an order that depends on the model alone."""
    groups = {parameter: i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
    lanes = optimizer.lanes if isinstance(optimizer, ComposedOptimizer) else {}
    holders = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    units: dict[str, _Unit] = {}
    for name, parameter in model.named_parameters():
        if parameter not in groups:
            continue
        placed = Placed.of(parameter)
        holder = max((h for h in holders if not h or name.startswith(f"{h}.")), key=len, default=None)
        if holder is None and placed.group is not None:
            raise ValueError(f"'{name}' is sharded, but by no FSDP2 module: when its gradient is complete on all ranks is not known")
        member = _Member(name, parameter, groups.pop(parameter), placed.group, lanes.get(parameter))
        key = f"parameter {name}" if holder is None else f"module {holder}"
        units.setdefault(key, _Unit()).members[parameter] = member
    if groups:
        raise ValueError(
            f"{len(groups)} parameters of the optimizer are not the model's; the first has shape {tuple(next(iter(groups)).shape)}"
        )
    return list(units.values())


def _clear(members: Iterable[_Member]) -> None:
    for member in members:
        member.parameter.grad = None
        if member.lane is not None:
            member.lane.summed = None


def _step_parameters(optimizer: torch.optim.Optimizer, members: Sequence[_Member]) -> None:
    by_group: dict[int, list[_Member]] = {}
    for member in members:
        by_group.setdefault(member.group, []).append(member)
    if isinstance(optimizer, ComposedOptimizer):
        for i, some in sorted(by_group.items()):
            optimizer.step_lanes(optimizer.param_groups[i], [cast(Lane, member.lane) for member in some])
        return
    groups = optimizer.param_groups
    # States are kept by parameter: a step over some of them is the step of a smaller optimizer.
    optimizer.param_groups = [{**groups[i], "params": [member.parameter for member in some]} for i, some in sorted(by_group.items())]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
