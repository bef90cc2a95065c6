"""What runs that read a sequence segment after segment cannot be asked for. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.stack_config import STACK_KINDS

if TYPE_CHECKING:
    from trainer.config import RunConfig


def not_shared(config: RunConfig) -> str:
    """Why, and what instead, ranks do not share a sequence whatever their number; nothing where they could."""
    if not config.model.memory.around_stack:
        return ""
    return (
        f"not parallel inside: a segment of {config.model.memory.kind} begins with what the one before left; segments are replayed one "
        "at a time (one's activations), and more ranks take more sequences (parallel.dp_shard, parallel.dp_replicate)"
    )


def refused_segments(config: RunConfig) -> str | None:
    """Why a sequence cannot be read segment by segment with these settings; None if it can, or is not to be."""
    kind, parallel = config.model.memory.kind, config.parallel
    if config.train.diagonal_segments > 1 and (refused := _refused_diagonals(config)):
        return refused
    if config.train.segment_tokens is not None:
        return _refused_of_layers(config)
    if not config.model.memory.around_stack:
        kept = config.memory.segment_states
        own = (("train.bptt_segments", config.train.bptt_segments is not None), ("memory.segment_states", kept != "all"))
        asked = [name for name, is_set in own if is_set]
        if not asked:
            return None
        return (
            f"{asked[0]} is read where a sequence is in segments, with train.segment_tokens or a memory around the stack "
            f"(model.memory.kind {' or '.join(STACK_KINDS)}): leave it out or set train.segment_tokens"
        )
    if parallel.cp > 1:
        return (
            f"parallel.cp {parallel.cp}: {kind} is not parallel inside one sequence (what one segment leaves is what the next one begins "
            f"with); set parallel.cp=1 parallel.dp_shard={parallel.cp * max(1, parallel.dp_shard)}"
        )
    if parallel.tp > 1:
        return f"parallel.tp {parallel.tp}: {kind} is not split over tensor-parallel ranks; set parallel.tp=1 and use parallel.dp_shard"
    if config.engine != "native":
        return f"engine {config.engine} runs whole sequences, and {kind} runs segments; set engine native"
    if config.memory.recompute == "auto":
        return f"memory.recompute auto plans whole sequences, and {kind} runs segments one at a time anyway; set recompute none or block"
    if kind == "armt" and config.memory.group_blocks > 1:
        return f"memory.group_blocks {config.memory.group_blocks} runs layers together, between which armt reads and writes; leave it at 1"
    return None


def _refused_of_layers(config: RunConfig) -> str | None:
    """Why `train.segment_tokens` cannot be with these settings."""
    model, parallel = config.model, config.parallel
    if model.memory.around_stack:
        kind = model.memory.kind
        return f"train.segment_tokens: {kind} has segments of its own (model.memory.{kind}.segment); leave it out"
    wrong = [
        remedy
        for held, remedy in (
            ("full" not in model.layer_kinds, "model.layers of kind swa and memory (full attention sees keys of the whole sequence)"),
            (parallel.cp <= 1, f"parallel.cp=1 (a rank has whole sequences; parallel.dp_shard={parallel.cp} shares the parameters)"),
            (parallel.tp <= 1, "parallel.tp=1 (with parallel.dp_shard)"),
            (config.engine == "native", "engine native (others run whole sequences)"),
            (config.memory.recompute != "auto", "memory.recompute none, mixer or block (auto plans whole sequences)"),
            (config.memory.group_blocks == 1, "memory.group_blocks 1 (a state is handed on inside of a group)"),
        )
        if not held
    ]
    return f"train.segment_tokens {config.train.segment_tokens} needs " + " and ".join(wrong) if wrong else None


def _refused_diagonals(config: RunConfig) -> str | None:
    """Why layers cannot work on the segments of a diagonal together."""
    asked = f"train.diagonal_segments {config.train.diagonal_segments}"
    kind, memory, parallel = config.model.memory.kind, config.memory, config.parallel
    if kind != "armt":
        return f"{asked} is for model.memory.kind armt, whose layers' memories follow from their own and the layer below; leave it out"
    if parallel.chosen_by_plan or parallel.ranks_asked > 1:
        return f"{asked} stacks the weights of all layers, which is done on one rank; set all degrees of parallel to 1, or leave it out"
    if config.train.bptt_segments is not None:
        return (
            f"{asked} with train.bptt_segments {config.train.bptt_segments}: gradients cannot end inside a diagonal; leave one of them out"
        )
    wrong = [
        remedy
        for held, remedy in (
            (memory.recompute in ("none", "block"), "memory.recompute none or block"),
            (memory.group_blocks == 1, "memory.group_blocks 1"),
            (memory.offload == "none", "memory.offload none"),
            (memory.quantise == "none", "memory.quantise none"),
            (memory.ffn_tile_tokens == 0, "memory.ffn_tile_tokens 0"),
            (memory.offload_parameters == "none", "memory.offload_parameters none"),
            (config.optim.kept_weights != "int8_stochastic", "optim.weights of another kind than int8_stochastic"),
            (not config.optim.is_fused, "optim.fuse_backward false"),
        )
        if not held
    ]
    return f"{asked} computes whole diagonals in its own way and needs " + " and ".join(wrong) if wrong else None
