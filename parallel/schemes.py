"""Which attention a split sequence gets: the scheme of ``parallel.sequence`` on a mesh.

A window that reaches no further back than a shard is long needs only the keys before it: such layers exchange a halo under every scheme
(parallel/halo.py), which moves less than any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.attention import InnerAttention
from models.batch import Bounds
from parallel.allgather_kv import AllGatherKVAttention
from parallel.by_heads import ByHeads
from parallel.comm_dtypes import AS_COMPUTED, CommDtypes
from parallel.config import SequenceScheme
from parallel.hybrid import HybridAttention
from parallel.mesh import Mesh
from parallel.ring_attention import RingAttention
from parallel.ring_plan import fits_halo
from parallel.sequence import Layout
from parallel.ulysses import UlyssesAttention


@dataclass(frozen=True)
class NearOrFar:
    """``near`` where the window fits a halo, else ``far``."""

    window: int
    near: InnerAttention
    far: InnerAttention

    def __call__(self, q_BHTD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """See ``models.attention.InnerAttention``."""
        return (self.near if fits_halo(self.window, bounds) else self.far)(q_BHTD, k_BGTD, v_BGTD, bounds)

    def by_stages(self, q_BHTD: torch.Tensor, k_BGTD: torch.Tensor, bounds: Bounds) -> ByHeads | None:
        """See ``UlyssesAttention.by_stages``: None where only a halo travels."""
        given = None if fits_halo(self.window, bounds) else getattr(self.far, "by_stages", None)
        return None if given is None else given(q_BHTD, k_BGTD, bounds)


def attention_over(
    mesh: Mesh, layout: Layout, window: int | None, scheme: SequenceScheme, head_chunk: int | None, comm: CommDtypes = AS_COMPUTED
) -> InnerAttention:
    """Attention of one layer over the sequence-parallel ranks of ``mesh``; ``comm``: dtypes in which keys and gradients travel.

    Raises ValueError where the mesh was made for another scheme, or for a scheme that is still ``auto``.
    """
    if scheme == "double_ring":
        if mesh.sequence is None:
            raise ValueError(f"double_ring needs a mesh with 1 < ring_inner < cp, not {mesh.dims}")
        return RingAttention(mesh.cp_group, layout, window, comm=comm, rings=(mesh.ulysses_group, mesh.ring_group))
    ring = RingAttention(mesh.cp_group, layout, window, comm=comm)
    if scheme == "ring":
        return ring
    far = _far(mesh, layout, window, scheme, head_chunk, comm)
    return far if window is None else NearOrFar(window, ring, far)


def _far(
    mesh: Mesh, layout: Layout, window: int | None, scheme: SequenceScheme, head_chunk: int | None, comm: CommDtypes
) -> InnerAttention:
    expected = mesh.dims.cp if scheme == "ulysses" else 1
    if scheme == "ring_x_ulysses":
        if mesh.sequence is None:
            raise ValueError(f"ring_x_ulysses needs a mesh with 1 < ulysses < cp, not {mesh.dims}")
        return HybridAttention(mesh.ulysses_group, mesh.ring_group, layout, window, head_chunk, comm=comm)
    if mesh.dims.ulysses != expected:
        raise ValueError(f"{scheme} needs a mesh with ulysses {expected}, not {mesh.dims}")
    if scheme == "ulysses":
        return UlyssesAttention(mesh.cp_group, layout, window, head_chunk, comm=comm)
    if scheme == "allgather_kv":
        return AllGatherKVAttention(mesh.cp_group, layout, window, head_chunk or 1, comm=comm)
    raise ValueError(f"parallel.sequence {scheme!r} is not a scheme that can be built")
