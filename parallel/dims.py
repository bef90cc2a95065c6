"""How many ranks lie along each mesh axis, as plain integers before any process group exists. Imports no torch.

Rank order: ``tp`` varies fastest (neighbours on one node exchange most), then ``cp``, then ``dp_shard``, then ``dp_replicate``.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import UserError
from parallel.config import INNER_DEGREES, ParallelConfig


@dataclass(frozen=True)
class ParallelDims:
    """Validated sizes of the mesh axes."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    ulysses: int = 1
    """Of the cp ranks, neighbours that exchange heads against tokens, or for double_ring form an inner ring: cp for the ulysses scheme,
    1 for those without."""
    tp: int = 1

    @staticmethod
    def from_config(config: ParallelConfig, world_size: int | None = None) -> ParallelDims:
        """The degrees of ``config``; raises UserError when their product is not ``world_size`` (if given), or one is still ``auto``."""
        if config.chosen_by_plan:
            raise UserError(f"parallel.{config.chosen_by_plan[0]}: auto has not been resolved here; give a number")
        if config.scheme_is_auto and config.cp > 1:
            open_key = "sequence: auto" if config.sequence == "auto" else f"{INNER_DEGREES[config.sequence]}: null"
            raise UserError(f"parallel.{open_key} has not been resolved here; give a value")
        inside = (config.cp if config.sequence == "ulysses" else config.inner_degree or 1) if config.cp > 1 else 1
        dims = ParallelDims(config.dp_replicate, config.dp_shard, config.cp, inside, config.tp)
        if world_size is not None and dims.world_size != world_size:
            raise UserError(
                f"parallel: {config.product} = {dims.world_size} ranks, "
                f"but {world_size} were started; start {dims.world_size} or change parallel.dp_replicate, parallel.dp_shard or parallel.cp"
            )
        return dims

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Groups of cp x tp ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard(self) -> int:
        """Ranks over which one copy of the parameters, or of a tensor-parallel rank's part of them, is sharded: dp_shard x cp."""
        return self.dp_shard * self.cp

    def cp_rank(self, global_rank: int) -> int:
        """Position of a rank among those that share its sequence."""
        return global_rank // self.tp % self.cp

    def dp_rank(self, global_rank: int) -> int:
        """Which sequences of a step a rank reads, 0 to dp - 1."""
        return global_rank // (self.cp * self.tp)

    def tp_rank(self, global_rank: int) -> int:
        """Which heads, columns and rows a rank holds, 0 to tp - 1."""
        return global_rank % self.tp
