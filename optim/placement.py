"""Where a parameter lies: which rows of it this rank holds, with whom it shares them, and states that lie alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from models.parts import Part
from models.tables import Columns, columns_of
from optim.clip import local_part
from optim.codecs import Codec, codec_for
from optim.elementwise import Storage
from optim.methods import Rows, StateSpec


@dataclass(frozen=True)
class Placed:
    """The lie of one parameter. ``group``: the ranks that share it; None where this rank has all of it. Of a table shared by columns
    ``shape`` and ``rows`` are this rank's: a table of its own."""

    shape: tuple[int, ...]
    rows: Rows
    group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()
    columns: Columns | None = None
    part: Part | None = None
    """Of a parameter that tensor-parallel ranks share: ``shape`` and ``rows`` are of this part."""

    @staticmethod
    def of(parameter: Tensor, part: Part | None = None) -> Placed:
        """Of a plain tensor or of a DTensor sharded along dim 0 over one axis of its mesh.

        Raises ValueError for any other placement.
        """
        shape = tuple(parameter.shape)
        total = shape[0] if shape else 1
        if (columns := columns_of(parameter)) is not None:
            group = columns.mesh.get_group(1) if columns.mesh is not None and columns.mesh.size(1) > 1 else None
            return Placed(shape, Rows.whole(total), group, columns=columns)
        if not isinstance(parameter, DTensor):
            return Placed(shape, Rows.whole(total), part=part)
        placed = cast(DTensor, parameter)
        mesh, placements = placed.device_mesh, tuple(placed.placements)
        axes = [axis for axis, placement in enumerate(placements) if not isinstance(placement, Replicate)]
        if not axes:
            return Placed(shape, Rows.whole(total), None, mesh, placements, part=part)
        if len(axes) > 1 or not (isinstance(shard := placements[axes[0]], Shard) and shard.dim == 0):
            raise ValueError(f"a parameter lies as {placements}; optimizers know Shard(0) over one axis of the mesh")
        rows = Rows.chunk(total, mesh.get_local_rank(axes[0]), mesh.size(axes[0]))
        return Placed(shape, rows, mesh.get_group(axes[0]), mesh, placements, part=part)

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a state over all columns and parts: what its codec is chosen by, so that every mesh chooses alike."""
        if self.part is not None:
            return self.part.whole_shape(shape)
        return shape if self.columns is None or len(shape) < 2 else (*shape[:-1], self.columns.total)

    def codec(self, storage: Storage, spec: StateSpec, name: str) -> Codec | None:
        """What keeps a state of the parameter ``name``; None: it is kept as it is.

        Raises ValueError where a part's columns do not begin with a block of the codec: it would not keep what one rank would."""
        if spec.codec == "exact":
            return None
        codec = codec_for("int4_affine" if spec.codec == "basis" else storage, self.whole(spec.shape), spec.codec != "variance")
        block = getattr(codec, "block", 1)
        if self.part is not None and self.part.dim == 1 and spec.shape[1] % block:
            raise ValueError(
                f"{name}: each of {self.part.ranks} tensor-parallel ranks has {spec.shape[1]} columns of it, and codec {codec.name} keeps "
                f"states in blocks of {block}; set optim.preset=adamw, or another parallel.tp"
            )
        return None if codec.name == "fp32" else codec

    def zeros(self, spec: StateSpec, device: torch.device) -> Tensor:
        """A state as ``spec`` says: plain where the parameter is whole, else a DTensor of its global shape."""
        shape = torch.Size(spec.shape)
        if self.mesh is None or spec.placement == "whole" or not self._shares:
            return torch.zeros(shape, dtype=spec.dtype, device=device)
        rows = self.rows if spec.placement == "rows" else Rows.chunk(shape[0], self.rows.rank, self.rows.ranks)
        local = torch.zeros((rows.count, *shape[1:]), dtype=spec.dtype, device=device)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def laid(self, local: Tensor, spec: StateSpec) -> Tensor:
        """This rank's part of a state, wherever its memory is, as ``zeros`` lays one: plain, or a DTensor of its global shape. The mesh's
        device is not asked for, so that states may be in host memory."""
        if self.mesh is None or spec.placement == "whole" or not self._shares:
            return local
        shape = torch.Size(spec.shape)
        meta = TensorMeta(shape, torch.empty(shape, device="meta").stride(), local.dtype)
        return cast(Any, DTensor)(local, DTensorSpec(self.mesh, self.placements, meta), requires_grad=False)

    @property
    def _shares(self) -> bool:
        return self.rows.ranks > 1

    def local_shape(self, spec: StateSpec) -> tuple[int, ...]:
        """Of this rank's part of a state."""
        if spec.placement == "whole" or not self._shares:
            return spec.shape
        rows = self.rows if spec.placement == "rows" else Rows.chunk(spec.shape[0], self.rows.rank, self.rows.ranks)
        return (rows.count, *spec.shape[1:])


def storage_bytes(tensor: Tensor) -> int:
    """Bytes of the storage behind this rank's part of ``tensor``: what it really keeps alive."""
    return local_part(tensor).untyped_storage().nbytes()
