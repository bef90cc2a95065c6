"""Device meshes of a run: one that says who shares a sequence, one that says who shares the parameters.

Try alone: ``torchrun --nproc-per-node 4 -m parallel.mesh``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.dims import ParallelDims


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run. ``axes``: (dp_replicate, dp_shard, cp). ``fsdp``: (dp_replicate, dp_shard_cp), the same ranks with
    dp_shard and cp flattened, over which FSDP2 shards parameters, or a tensor-parallel rank's part of them (its second axis), and
    replicates them (its first). ``sequence``: (data, ring, ulysses), where cp is split into a ring of Ulysses groups, ``ulysses``
    varying fastest; for double_ring these are the inner rings. Each has ``tp`` as its last axis where that is above 1; then
    ``tensor`` are more meshes."""

    dims: ParallelDims
    axes: DeviceMesh
    fsdp: DeviceMesh
    sequence: DeviceMesh | None = None
    tensor: TensorMeshes | None = None

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """Ranks that share this rank's sequence."""
        return self.axes.get_group("cp")

    @property
    def ulysses_group(self) -> dist.ProcessGroup:
        """Neighbours that exchange heads against tokens, or are an inner ring."""
        assert self.sequence is not None, "cp is not split into groups"
        return self.sequence.get_group("ulysses")

    @property
    def ring_group(self) -> dist.ProcessGroup:
        """Ranks with this one's place in each Ulysses group of its sequence."""
        assert self.sequence is not None, "cp is not split into groups"
        return self.sequence.get_group("ring")

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """Ranks that together hold one copy of the parameters, or of a tensor-parallel rank's part of them."""
        return self.fsdp.get_group("dp_shard_cp")

    @property
    def parameters(self) -> DeviceMesh:
        """Over which FSDP2 lays parameters: one axis, or two where there are replicas."""
        return self.fsdp["dp_replicate", "dp_shard_cp"] if self.dims.dp_replicate > 1 else self.fsdp["dp_shard_cp"]

    @property
    def copies_and_shards(self) -> DeviceMesh:
        """(dp_replicate, dp_shard_cp) of this tensor-parallel rank."""
        return self.fsdp if self.dims.tp == 1 else self.fsdp["dp_replicate", "dp_shard_cp"]

    @property
    def model_group(self) -> dist.ProcessGroup:
        """Ranks that together hold one copy of all parameters."""
        return self.shard_group if self.tensor is None else self.tensor.model.get_group("model")

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that share the tokens of one sequence-parallel rank."""
        return self.axes.get_group("tp")

    @property
    def tokens_group(self) -> dist.ProcessGroup:
        """Ranks that share a sequence, each with its own tokens of the residual stream; ``tp`` neighbours share those of one cp rank."""
        return self.cp_group if self.tensor is None else self.tensor.tokens.get_group("tokens")

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """Ranks with this one's part of the parameters, which together read every token once; None: all ranks."""
        return None if self.tensor is None else self.tensor.data.get_group("data")

    @property
    def cp_rank(self) -> int:
        """This rank among those that share its sequence."""
        return self.dims.cp_rank(dist.get_rank())

    @property
    def dp_rank(self) -> int:
        """Which sequences of a step this rank reads."""
        return self.dims.dp_rank(dist.get_rank())

    @property
    def tp_rank(self) -> int:
        """Which part of the parameters this rank holds."""
        return self.dims.tp_rank(dist.get_rank())


@dataclass(frozen=True)
class TensorMeshes:
    """Views of all ranks that only tensor parallelism needs. ``model``: (dp_replicate, model), ``data``: (data, tp), ``tokens``: (dp,
    tokens), ``saved``: (dp_replicate, tp, dp_shard_cp), in which order a parameter is first dealt out to tensor-parallel ranks and then
    sharded."""

    model: DeviceMesh
    data: DeviceMesh
    tokens: DeviceMesh
    saved: DeviceMesh

    @staticmethod
    def of(dims: ParallelDims, device_type: str) -> TensorMeshes:
        """Over all ranks."""
        model = init_device_mesh(device_type, (dims.dp_replicate, dims.shard * dims.tp), mesh_dim_names=("dp_replicate", "model"))
        data = init_device_mesh(device_type, (dims.dp * dims.cp, dims.tp), mesh_dim_names=("data", "tp"))
        tokens = init_device_mesh(device_type, (dims.dp, dims.cp * dims.tp), mesh_dim_names=("dp", "tokens"))
        ranks: Any = torch.arange(dims.world_size).view(dims.dp_replicate, dims.shard, dims.tp).transpose(1, 2)
        return TensorMeshes(model, data, tokens, DeviceMesh(device_type, ranks, mesh_dim_names=("dp_replicate", "tp", "dp_shard_cp")))


def build_mesh(dims: ParallelDims, device_type: str) -> Mesh:
    """The meshes over all ranks of the default process group, which must be initialised with ``dims.world_size`` ranks."""
    if dist.get_world_size() != dims.world_size:
        raise ValueError(f"{dims} needs {dims.world_size} ranks, the process group has {dist.get_world_size()}")
    last = {} if dims.tp == 1 else {"tp": dims.tp}

    def mesh(**sizes: int) -> DeviceMesh:
        sizes |= last
        return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    axes = mesh(dp_replicate=dims.dp_replicate, dp_shard=dims.dp_shard, cp=dims.cp)
    fsdp = mesh(dp_replicate=dims.dp_replicate, dp_shard_cp=dims.shard)
    sequence = None
    if 1 < dims.ulysses < dims.cp:
        sequence = mesh(data=dims.dp, ring=dims.cp // dims.ulysses, ulysses=dims.ulysses)
    return Mesh(dims, axes, fsdp, sequence, TensorMeshes.of(dims, device_type) if dims.tp > 1 else None)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    shown = build_mesh(ParallelDims(dp_shard=dist.get_world_size() // 2, cp=2), "cuda" if torch.cuda.is_available() else "cpu")
    print(dist.get_rank(), "cp_rank", shown.cp_rank, "dp_rank", shown.dp_rank)
    dist.destroy_process_group()
