"""Parameters that live in host memory and come to the device for their layer's gather, one layer ahead.

A rank's parts of a section's parameters (a block, the embedding, the head) lie one after the other in one stretch of host memory, laid out
as the optimizer's buckets (optimizer_buckets.py). Before FSDP2 gathers a unit, they are copied to the device in one go, cast there to what
is gathered, and freed once the gathered parameters exist; forward and backward each fetch the unit that comes next beside the computation
of the present one. On the device stay the gathered parameters of the units at work, and gradients: those are shards already.

FSDP2 sees parameters without memory whose parts it asks for through its all-gather extension (``fsdp_pre_all_gather``). Its own CPU
offload is not used: it moves gradients to the host as well and adds those of several passes there, leaves updates to the CPU, pins memory
in powers of two outside of any budget, and on one rank copies nothing ahead.

Copies, streams and the host's budget are the ``HostStore``'s. The update reads and writes the host memory (optimizer_offload.py).
What it does not do: run without FSDP2; one rank is a mesh of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memory_mgmt.offload import HostStore
from memory_mgmt.offload_layout import fake_mode_of
from memory_mgmt.optimizer_buckets import section_of, starts
from models.transformer import Transformer
from parallel.fsdp import parameter_groups

_STAGED = 3
"""Units whose parts are on the device before their gather, at most; a guess that was wrong is given up for a new one."""


@dataclass
class Rows:
    """One section's parameters in host memory. ``raw``: flat bytes; ``at``: first element of each parameter."""

    names: list[str]
    at: list[int]
    raw: Tensor


@dataclass
class _Unit:
    """One FSDP2 unit: its parameter group, the sections in it, and what of them is on the device: buffers, and the copies' end."""

    group: Any
    rows: list[Rows]
    missing: int = 0
    """Parameters of the present gather that have not been taken over."""
    buffers: list[Tensor] = field(default_factory=list)
    landed: list[Any] = field(default_factory=list)


class OffloadedParameters:
    """See the module. Put onto a model that FSDP2 has sharded, before its first forward pass; values are undefined at first.

    Raises UserError when ``store``'s budget is too small.
    """

    def __init__(self, model: Transformer, store: HostStore, device: torch.device) -> None:
        self._store, self._device = store, device
        self.changed: Any = None
        """The end of the last copy to the host memory: what is fetched waits for it."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        forward = [model, *([] if model.head is None else [model.embed]), *model.blocks, *([] if model.head is None else [model.head])]
        self._parameters = {names[id(p.sharded_param)]: p for unit in forward for p in _group(unit).fsdp_params}
        self._mode = fake_mode_of(next(iter(self._parameters.values())).sharded_param._local_tensor)
        self.sections = self._sections(list(names.values()))
        self._host = {name: self._in_host(name) for name in names.values()}
        self._staged: list[_Unit] = []
        self._units = [self._unit(module) for module in forward]
        self._follow(forward)

    # --- where they are ---------------------------------------------------------------------------------------------------------

    def _sections(self, names: Sequence[str]) -> dict[str, Rows]:
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(section_of(name), []).append(name)
        at = [starts([self._local(name).numel() for name in group]) for group in found.values()]
        sizes = [a[-1] * self._local(group[0]).element_size() for a, group in zip(at, found.values(), strict=True)]
        kept = self._store.keep(sizes, "the parameters", self._mode)
        self.host_bytes = sum(sizes)
        return {section: Rows(group, a, raw) for (section, group), a, raw in zip(found.items(), at, kept, strict=True)}

    def _local(self, name: str) -> Tensor:
        return self._parameters[name].sharded_param._local_tensor

    def _rows_of(self, name: str) -> tuple[Rows, int]:
        rows = self.sections[section_of(name)]
        return rows, rows.at[rows.names.index(name)]

    def _in_host(self, name: str) -> DTensor:
        """The parameter's part in host memory. The mesh's device is not asked for, as FSDP2 does it for parameters that it offloads."""
        (rows, at), local = self._rows_of(name), self._local(name)
        part = rows.raw.view(local.dtype)[at : at + local.numel()].view(local.shape)
        spec = copy(self._parameters[name].sharded_param._spec)
        return cast(Any, DTensor)(part, spec, requires_grad=False)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The parameters by name, in host memory: the live ones, read and written between steps."""
        self.forget()
        self._store.copies_for(self._mode).finish(self.changed)
        return self._host

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's parameters are those in host memory: to give them values."""
        for name, parameter in self._parameters.items():
            parameter._setattr_on_modules(nn.Parameter(self._host[name]))
        try:
            yield
        finally:
            for parameter in self._parameters.values():
                parameter._setattr_on_modules(parameter.sharded_param)

    # --- what FSDP2 sees ----------------------------------------------------------------------------------------------------------

    def _unit(self, module: nn.Module) -> _Unit:
        group = _group(module)
        sections = dict.fromkeys(section_of(parameter_name) for parameter_name, p in self._parameters.items() if p in group.fsdp_params)
        unit = _Unit(group, [self.sections[section] for section in sections])
        for name, parameter in self._parameters.items():
            if parameter in group.fsdp_params:
                self._empty(unit, name, parameter)
        group._reset_sharded_params = True  # there is nothing to pad or to pin
        return unit

    def _empty(self, unit: _Unit, name: str, parameter: Any) -> None:
        """Leave of a parameter its shape, and FSDP2 the way to its values."""
        old: DTensor = parameter.sharded_param
        shape, dtype = old._local_tensor.shape, old._local_tensor.dtype
        with self._mode or contextlib.nullcontext():
            local = torch.empty(shape, dtype=dtype, device=self._device)
        local.untyped_storage().resize_(0)
        shell = cast(Any, DTensor)(local, old._spec, requires_grad=False)
        parameter.sharded_param = nn.Parameter(shell, requires_grad=old.requires_grad)
        parameter._sharded_param_data = local.view(-1)
        parameter._setattr_on_modules(parameter.sharded_param)
        (rows, at), numel = self._rows_of(name), local.numel()

        def before(mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any) -> tuple[tuple[Tensor], None]:
            part = self._taken(unit, rows).view(dtype)[at : at + numel].view(shape)
            narrow = part.to(parameter.param_dtype or dtype)
            padded = parameter.padded_sharded_param_size
            if padded == shape:
                return (narrow,), None
            whole = narrow.new_zeros(padded)
            whole.narrow(0, 0, shape[0]).copy_(narrow)
            return (whole,), None

        def after(outputs: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
            unit.missing -= 1
            if not unit.missing:  # what computes now has waited for the gather of all
                self._drop(unit)
            return None if out is not None else (outputs[0].view(-1), ())  # out is that memory already

        inner: Any = cast(Any, parameter.sharded_param)._local_tensor
        inner.fsdp_pre_all_gather, inner.fsdp_post_all_gather = before, after
        parameter._init_extensions()

    # --- coming and going ---------------------------------------------------------------------------------------------------------

    def _follow(self, modules: Sequence[nn.Module]) -> None:
        """Fetch what comes next while a unit works, by hooks that stay."""
        ahead = 1 if self._units[0].group._all_gather_process_group.size() == 1 else 2  # FSDP2 gathers one unit ahead in backward
        first = next(i for i, module in enumerate(modules) if hasattr(module, "mixer"))
        for i, (unit, module) in enumerate(zip(self._units, modules, strict=True)):
            above = self._units[i + 1 : i + 2]
            below = self._units[max(first, i - ahead) : i][::-1] if i > first else []
            module.register_forward_pre_hook(self._expecting_next(above))
            module.register_forward_hook(self._expecting(below, unit))

    def _expecting_next(self, above: Sequence[_Unit]) -> Callable[..., None]:
        return lambda _module, _args: self._expect(above)

    def _expecting(self, below: Sequence[_Unit], unit: _Unit) -> Callable[..., None]:
        return lambda _module, _args, out: self._expect_in_backward(out, below, unit)

    def _expect_in_backward(self, out: Any, below: Sequence[_Unit], unit: _Unit) -> None:
        if isinstance(out, Tensor) and out.requires_grad and below:
            out.register_hook(lambda _grad: self._expect(below))
            if unit is self._units[-1]:  # its backward comes at once
                self._expect(below[:1])

    def _expect(self, units: Sequence[_Unit]) -> None:
        for unit in units:
            if not unit.group.is_unsharded:
                self._fetch(unit)

    def _fetch(self, unit: _Unit) -> None:
        """Start the copies to the device."""
        if unit.buffers:
            return
        while len(self._staged) >= _STAGED:
            self._drop(self._staged[0])
        copies = self._store.copies_for(self._mode)
        for rows in unit.rows:
            buffer = torch.empty(rows.raw.numel(), dtype=torch.uint8, device=self._device)
            unit.landed.append(copies.to_device([rows.raw], buffer, self.changed))
            unit.buffers.append(buffer)
        self._store.count(to_host=0, to_device=sum(rows.raw.numel() for rows in unit.rows))
        self._staged.append(unit)

    def _taken(self, unit: _Unit, rows: Rows) -> Tensor:
        """The bytes of a section on the device, for the stream that gathers."""
        if not unit.missing:
            self._fetch(unit)
            for event in unit.landed:
                self._store.copies_for(self._mode).hold(event, timed=True)
            unit.missing = len(unit.group.fsdp_params)
        return unit.buffers[[found is rows for found in unit.rows].index(True)]

    def _drop(self, unit: _Unit) -> None:
        for event in unit.landed:
            self._store.copies_for(self._mode).hold(event)  # before the memory is used again
        unit.buffers, unit.landed, unit.missing = [], [], 0
        if unit in self._staged:
            self._staged.remove(unit)

    def forget(self) -> None:
        """Give up what was fetched for a gather that did not come: its values are about to change."""
        for unit in list(self._staged):
            self._drop(unit)


def _group(module: nn.Module) -> Any:
    (group,) = parameter_groups(module)
    return group
