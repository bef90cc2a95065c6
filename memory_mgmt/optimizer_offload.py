"""An optimizer whose states wait in host memory and come to the device bucket by bucket, where they are updated.

Works for every elementwise ``torch.optim.Optimizer``: each element's update depends on that element's gradient and states alone, so a
parameter may be updated piece by piece, and the result is the same bits. States with the parameter's shape move; others (AdamW's count
of steps) stay where the optimizer made them.

While one bucket is updated the next one comes and the one before leaves: two buckets are on the device at a time, on CUDA with streams
of their own (``offload_copies.py``). Host memory, its budget and the accounting are the ``HostStore``'s.

Parameters that are in host memory themselves (parameter_offload.py) travel with their states; gradients are on the device.

What it does not do: make the optimizer (optim/build.py), choose buckets (optimizer_buckets.py). Presets of our own, with states of few
bits or of whole matrices, are for optimizer_lanes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memory_mgmt.offload import HostStore
from memory_mgmt.offload_layout import fake_mode_of
from memory_mgmt.optimizer_buckets import ALIGNMENT, BUCKET_BYTES, Bucket, cut, section_of, starts
from memory_mgmt.optimizer_pipeline import through
from memory_mgmt.parameter_offload import OffloadedParameters
from optim.build import allocate_states
from optim.clip import local_part

_PROBE_ELEMENTS = 3
_PARAMETER = "parameter itself"
"""Travels like a state where parameters are in host memory."""
_Shape = tuple[tuple[str, torch.dtype], ...]
"""The states that move: name and dtype."""


@dataclass
class _Slot:
    """One parameter: its group, and what its states are besides those that move."""

    parameter: Tensor
    group: int
    beside: dict[str, Any]


@dataclass
class _Section:
    """Parameters whose states lie together. ``raw``: flat bytes in host memory by state."""

    name: str
    shape: _Shape
    slots: list[_Slot] = field(default_factory=list)
    raw: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Elements of each parameter that this rank holds."""
        return [local_part(slot.parameter).numel() for slot in self.slots]

    @property
    def element_bytes(self) -> int:
        """Of all moving states of one element."""
        return sum(dtype.itemsize for _, dtype in self.shape)


@dataclass(frozen=True)
class _Load:
    """One bucket and where its bytes are in host memory, state after state."""

    section: _Section
    bucket: Bucket
    host: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.numel() for part in self.host)

    def states(self, buffer: Tensor) -> dict[str, Tensor]:
        """Its states in a device buffer, flat, by name."""
        found, at = {}, 0
        for (key, dtype), part in zip(self.section.shape, self.host, strict=True):
            found[key] = buffer[at : at + part.numel()].view(dtype)
            at += part.numel()
        return found


class OffloadedOptimizer:
    """See the module. Has what a training loop uses of an optimizer: ``param_groups``, ``state``, ``step``, ``zero_grad``.

    ``optimizer`` has not made its states yet. ``names``: all parameters of the model by fully qualified name. ``parameters``: where they
    are if that is host memory; they then travel with their states. Raises UserError when ``store``'s budget is too small for the
    states, ValueError for parameters that are not contiguous.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Mapping[str, Tensor],
        store: HostStore,
        bucket_bytes: int = BUCKET_BYTES,
        parameters: OffloadedParameters | None = None,
    ) -> None:
        self._parameters = parameters
        self.param_groups = optimizer.param_groups
        self.watch: Callable[[str], None] = lambda section: None
        """Told the name of every section whose update begins, and first an empty name: for whoever records a step."""
        self._inner, self._store = optimizer, store
        self._state: dict[Tensor, dict[str, Any]] = {}
        self._last_copy: Any = None
        sections = self._sections({id(parameter): name for name, parameter in names.items()})
        first = local_part(self.param_groups[0]["params"][0])
        self._device, self._mode = first.device, fake_mode_of(first.detach())
        self._place(sections)
        self._loads = [load for section in sections for load in _loads(section, bucket_bytes)]

    # --- states ---------------------------------------------------------------------------------------------------------------

    def _sections(self, names: Mapping[int, str]) -> list[_Section]:
        """The parameters by section, in the order of ``names``."""
        found: dict[tuple[str, _Shape], _Section] = {}
        order = {key: i for i, key in enumerate(names)}
        slots = [(parameter, i) for i, group in enumerate(self.param_groups) for parameter in group["params"]]
        kinds: dict[tuple[int, torch.dtype], dict[str, Any]] = {}
        for parameter, i in sorted(slots, key=lambda slot: order.get(id(slot[0]), len(order))):
            local = local_part(parameter.detach())
            if not local.is_contiguous():
                raise ValueError(f"the optimizer of '{names.get(id(parameter))}' cannot be offloaded: its elements are not contiguous")
            if (i, local.dtype) not in kinds:
                kinds[i, local.dtype] = self._states_of_probe(i, local)
            states = kinds[i, local.dtype]
            shape = tuple((key, value.dtype) for key, value in states.items() if _moves(value))
            shape += ((_PARAMETER, local.dtype),) if self._parameters is not None else ()
            name = section_of(names.get(id(parameter), ""))
            beside = {key: _copy(value) for key, value in states.items() if not _moves(value)}
            found.setdefault((name, shape), _Section(name, shape)).slots.append(_Slot(parameter, i, beside))
        return list(found.values())

    def _states_of_probe(self, group: int, like: Tensor) -> dict[str, Any]:
        """The states that the optimizer makes for a parameter of ``group``, seen on one of three elements. A run that has no room for
        all of them on the device never holds them there."""
        probe = torch.zeros(_PROBE_ELEMENTS, dtype=like.dtype, device=like.device)
        self._inner.param_groups = [{**self.param_groups[group], "params": [probe]}]
        try:
            allocate_states(self._inner)
        finally:
            self._inner.param_groups = self.param_groups
        return self._inner.state.pop(probe)

    def _place(self, sections: list[_Section]) -> None:
        """Give all states their host memory, zeros."""
        wanted = [(section, key, dtype) for section in sections for key, dtype in section.shape if key != _PARAMETER]
        sizes = [starts(section.sizes)[-1] * dtype.itemsize for section, _, dtype in wanted]
        for (section, key, _), raw in zip(wanted, self._store.keep(sizes, "the optimizer's states", self._mode), strict=True):
            section.raw[key] = raw.zero_()
        for section in sections:
            if self._parameters is None:
                break
            rows = self._parameters.sections[section.name]
            if rows.at != starts(section.sizes):
                raise ValueError(f"the parameters of '{section.name}' lie in host memory in another order than their states")
            section.raw[_PARAMETER] = rows.raw
        for section in sections:
            for slot, start, size in zip(section.slots, starts(section.sizes), section.sizes, strict=False):
                moving = {
                    key: _shaped_like(slot.parameter, section.raw[key].view(d)[start : start + size])
                    for key, d in section.shape
                    if key != _PARAMETER
                }
                self._state[slot.parameter] = slot.beside | moving
        self.host_bytes = sum(sizes)

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        """States by parameter, in host memory (DTensors where parameters are): the live ones, read and written between steps."""
        self._store.copies_for(self._mode).finish(self._last_copy)
        return self._state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer.zero_grad."""
        self._inner.zero_grad(set_to_none=set_to_none)

    # --- the step ---------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient. On CUDA returns before the last states are back; ``state`` waits for them."""
        loads = self._loads
        self.watch("")
        if self._parameters is not None:
            self._parameters.forget()
        self._last_copy = through(self._store.copies_for(self._mode), loads, self._device, self._begin)
        if self._parameters is not None:
            self._parameters.changed = self._last_copy
        self._store.count(to_host=sum(load.nbytes for load in loads), to_device=sum(load.nbytes for load in loads))

    def _begin(self, load: _Load, buffer: Tensor) -> None:
        self.watch(load.section.name)
        self._update(load, load.states(buffer))

    def _update(self, load: _Load, states: Mapping[str, Tensor]) -> None:
        """The optimizer's step on the pieces of one bucket, as if they were all of its parameters."""
        groups: list[dict[str, Any]] = [{**group, "params": []} for group in self.param_groups]
        pieces: list[tuple[Tensor, _Slot, dict[str, Tensor], bool]] = []
        for piece in load.bucket.pieces:
            slot = load.section.slots[piece.parameter]
            if slot.parameter.grad is None:
                continue
            if self._parameters is not None:
                part = states[_PARAMETER][piece.at : piece.at + piece.stop - piece.start]
            else:
                part = local_part(slot.parameter.detach()).view(-1)[piece.start : piece.stop]
            part.grad = local_part(slot.parameter.grad).reshape(-1)[piece.start : piece.stop]
            moving = {key: value[piece.at : piece.at + part.numel()] for key, value in states.items() if key != _PARAMETER}
            state = self._state[slot.parameter]
            # Every piece starts from the same count of steps; what the last one makes of it stays.
            beside = {key: state[key] if piece.last else _copy(state[key]) for key in slot.beside}
            self._inner.state[part] = beside | moving
            groups[slot.group]["params"].append(part)
            pieces.append((part, slot, moving, piece.last))
        self._inner.param_groups = [group for group in groups if group["params"]]
        try:
            if pieces:
                self._inner.step()
        finally:
            self._inner.param_groups = self.param_groups
        for part, slot, moving, last in pieces:
            self._take_over(self._inner.state.pop(part), slot, moving, last)

    def _take_over(self, made: Mapping[str, Any], slot: _Slot, moving: Mapping[str, Tensor], last: bool) -> None:
        """Keep what the step put into a piece's states; most optimizers write in place."""
        for key, value in moving.items():
            if made[key] is not value:
                value.copy_(made[key])
        if last:
            self._state[slot.parameter] |= {key: made[key] for key in slot.beside}


def _loads(section: _Section, bucket_bytes: int) -> list[_Load]:
    """The section's buckets."""
    most = max(ALIGNMENT, bucket_bytes // max(1, section.element_bytes))
    loads = []
    for bucket in cut(section.sizes, most):
        host = [section.raw[key][bucket.start * dtype.itemsize : bucket.stop * dtype.itemsize] for key, dtype in section.shape]
        loads.append(_Load(section, bucket, host))
    return loads


def _moves(value: Any) -> bool:
    """Whether a state of the probe has one element for each of the parameter's."""
    return isinstance(value, Tensor) and value.shape == (_PROBE_ELEMENTS,)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _shaped_like(parameter: Tensor, flat: Tensor) -> Tensor:
    """``flat`` with the parameter's shape; a DTensor of the same sharding where it is one. The mesh's device is not asked for, as FSDP2
    does it for parameters that it offloads."""
    value = flat.view(local_part(parameter).shape)
    if not isinstance(parameter, DTensor):
        return value
    spec = copy(parameter._spec)
    assert spec.tensor_meta is not None
    spec.tensor_meta = spec.tensor_meta._replace(dtype=value.dtype)
    return cast(Any, DTensor)(value, spec, requires_grad=False)
