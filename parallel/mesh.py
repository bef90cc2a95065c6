"""Device meshes of a run: one that says who shares a sequence, one that says who shares the parameters.

Try alone: ``torchrun --nproc-per-node 4 -m parallel.mesh``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.dims import ParallelDims


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run. ``axes``: (dp_replicate, dp_shard, cp). ``fsdp``: (dp_replicate, dp_shard_cp), the same ranks with
    dp_shard and cp flattened, over which FSDP2 shards parameters (its second axis) and replicates them (its first). ``sequence``: (data,
    ring, ulysses), where cp is split into a ring of Ulysses groups, ``ulysses`` varying fastest; for double_ring
    these are the inner rings."""

    dims: ParallelDims
    axes: DeviceMesh
    fsdp: DeviceMesh
    sequence: DeviceMesh | None = None

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
        """Ranks that together hold one copy of the parameters."""
        return self.fsdp.get_group("dp_shard_cp")

    @property
    def cp_rank(self) -> int:
        """This rank among those that share its sequence."""
        return self.dims.cp_rank(dist.get_rank())

    @property
    def dp_rank(self) -> int:
        """Which sequences of a step this rank reads."""
        return self.dims.dp_rank(dist.get_rank())


def build_mesh(dims: ParallelDims, device_type: str) -> Mesh:
    """The meshes over all ranks of the default process group, which must be initialised with ``dims.world_size`` ranks."""
    if dist.get_world_size() != dims.world_size:
        raise ValueError(f"{dims} needs {dims.world_size} ranks, the process group has {dist.get_world_size()}")
    axes = init_device_mesh(device_type, (dims.dp_replicate, dims.dp_shard, dims.cp), mesh_dim_names=("dp_replicate", "dp_shard", "cp"))
    fsdp = init_device_mesh(device_type, (dims.dp_replicate, dims.shard), mesh_dim_names=("dp_replicate", "dp_shard_cp"))
    sequence = None
    if 1 < dims.ulysses < dims.cp:
        shape = (dims.dp, dims.cp // dims.ulysses, dims.ulysses)
        sequence = init_device_mesh(device_type, shape, mesh_dim_names=("data", "ring", "ulysses"))
    return Mesh(dims, axes, fsdp, sequence)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    shown = build_mesh(ParallelDims(dp_shard=dist.get_world_size() // 2, cp=2), "cuda" if torch.cuda.is_available() else "cpu")
    print(dist.get_rank(), "cp_rank", shown.cp_rank, "dp_rank", shown.dp_rank)
    dist.destroy_process_group()
