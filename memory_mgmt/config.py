"""Settings of the memory budget: what is kept, swapped or recomputed, and in which tile sizes. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.config import PositiveInt, Section


class MemoryConfig(Section):
    """Residence of activations on one rank."""

    budget_gib: float | None = Field(default=None, gt=0)
    """Bytes one rank may use, in GiB; a plan above it is refused before the run starts. null: what the device has."""
    plan: Literal["trace", "estimate"] = "trace"
    """trace: run one step on fake tensors before the run and plan from its allocations. estimate: formulas, in a fraction of a second."""
    recompute: Literal["none", "mixer", "block", "auto"] = "none"
    """What is computed again in the backward pass. block: everything but each block's input. mixer: also keep the output of attention or
    memory. auto: the planner decides per layer and class of activations what to keep, swap or recompute within the budget."""
    group_blocks: PositiveInt = 1
    """With recompute block: keep the input of every so many-th block only."""
    offload: Literal["none", "inputs", "kept"] = "none"
    """What waits in host memory between forward and backward. inputs: block inputs. kept: everything that is not recomputed.
    With recompute auto: none forbids swapping, else the planner decides."""
    quantise: Literal["none", "feed_forward"] = "none"
    """What may be kept in eight bits between forward and backward, which changes gradients a little (the loss of a step not at all).
    feed_forward: the feed-forward's gate, up and the stream before them. With recompute auto the planner decides what share; else all of
    them are, in tiles of ffn_tile_tokens where that is set (and then none of it is recomputed)."""
    offload_optimizer: Literal["none", "host", "auto"] = "none"
    """Where the optimizer's states (AdamW: 8 bytes per parameter) live. host: in host memory; the update brings them to the device bucket
    by bucket. auto: the planner takes host where the step does not fit without it, or is faster with it."""
    offload_parameters: Literal["none", "host", "auto"] = "none"
    """Where this rank's parameters live. host: in host memory, with the optimizer's states (offload_optimizer); they come to the device
    for their layer's gather, one layer ahead, and for the update. auto: the planner takes host where the step does not fit without it, or
    is faster with it."""
    host_gib: float | None = Field(default=None, gt=0)
    """Host memory that the ranks of one node may take together for offload, in GiB. null: four fifths of the machine's."""
    offload_dir: str | None = None
    """Directory on a local disk that takes what does not fit in host_gib. null: none."""
    loss_tile_tokens: PositiveInt = 4096
    """Tokens whose logits exist at the same time."""
    ffn_tile_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens per feed-forward tile, recomputed in backward; 0 processes the whole shard at once."""
    memory_tile_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens per tile of a memory layer, recomputed in backward with the state carried; 0 processes the whole shard at once."""
    segment_states: Literal["all", "sqrt"] = "all"
    """Where a sequence is read in segments (train.segment_tokens, or a memory around the stack: rmt, armt, hmt), what of the states between
    its n segments is kept for the backward pass. all: every one. sqrt: about the root of n of them; those between are made again by one
    more forward pass."""
    arena: bool = False
    """Serve the tensors of a training step from one region at planned addresses (memory_mgmt/arena.py). CUDA: those of
    1 MiB and more, in front of torch's caching allocator."""
    replan_on_oom: bool = False
    """After running out of memory: plan again with the measured peak and go on from the last checkpoint."""

    @model_validator(mode="after")
    def _check(self) -> MemoryConfig:
        if self.offload_parameters != "none":
            if self.offload_optimizer == "none":
                raise ValueError(
                    f"offload_parameters {self.offload_parameters} takes parameters where the optimizer's states are: "
                    "set offload_optimizer host or auto, or offload_parameters none"
                )
            if self.plan == "estimate":
                raise ValueError("offload_parameters needs a traced step: leave plan at trace, or set offload_parameters none")
        if self.quantise != "none":
            if self.recompute in ("mixer", "block"):
                raise ValueError(
                    f"quantise {self.quantise} has nothing to keep in eight bits: recompute {self.recompute} computes the feed-forward "
                    "again; use recompute none or auto, or quantise none"
                )
            if self.offload == "kept" and self.recompute == "none":
                raise ValueError(
                    f"quantise {self.quantise} has nothing to keep in eight bits: offload kept takes it to host memory as it is; "
                    "use offload none or inputs, recompute auto, or quantise none"
                )
        return self
