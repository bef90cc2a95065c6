"""What ``parallel.tp`` above 1 asks of the other settings. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import RunConfig


def refusal(config: RunConfig) -> str | None:
    """Why a run with ``parallel.tp`` above 1 cannot be as ``config`` says, with the remedy; None if it can."""
    tp = config.parallel.tp
    return _of_shapes(config, tp) or _of_layers(config, tp) or _of_updates(config, tp) or _of_memory(config, tp)


def _of_shapes(config: RunConfig, tp: int) -> str | None:
    model = config.model
    dealt = {"model.vocab_size": model.vocab_size}
    if model.has_attention:
        dealt |= {"model.n_heads": model.n_heads, "model.n_kv_heads": model.kv_heads}
    if "dense" in model.feedforward_kinds:
        dealt["model.d_ff"] = model.ff_width
    for key, size in dealt.items():
        if size is not None and size % tp:
            what = "every rank needs as many whole heads" if "heads" in key else "every rank needs an equal part"
            return f"parallel.tp {tp} does not divide {key} {size}: {what}; set {key} to a multiple of {tp}, or another parallel.tp"
    return None


def _of_layers(config: RunConfig, tp: int) -> str | None:
    if "memory" in config.model.layer_kinds:
        return (
            f"parallel.tp {tp}: layers of kind memory (model.memory.kind {config.model.memory.kind}) are not shared by tensor-parallel "
            f"ranks: set parallel.tp=1 parallel.cp={tp * max(1, config.parallel.cp)}"
        )
    if "product_keys" in config.model.feedforward_kinds:
        return f"parallel.tp {tp}: memory layers with product keys are not shared by tensor-parallel ranks: set parallel.tp=1"
    return None


def _of_updates(config: RunConfig, tp: int) -> str | None:
    optim = config.optim
    if optim.fuse_backward:
        return (
            f"parallel.tp {tp}: optim.fuse_backward updates norms before their gradients are summed over tensor-parallel ranks: "
            "set optim.fuse_backward=false"
        )
    if not optim.is_torch_adamw or optim.preset == "auto":
        return (
            f"parallel.tp {tp}: optim.preset {optim.preset} has not been shown to update parts of matrices as it does whole ones: "
            "set optim.preset=adamw"
        )
    return None


def _of_memory(config: RunConfig, tp: int) -> str | None:
    memory = config.memory
    if memory.plan == "estimate":
        return f"parallel.tp {tp} needs a traced step (formulas know no tensor parallelism): set memory.plan=trace"
    if (memory.recompute, memory.offload, memory.quantise, memory.ffn_tile_tokens) != ("none", "none", "none", 0):
        return (
            f"parallel.tp {tp}: tensor-parallel ranks keep everything between forward and backward so far: set memory.recompute=none "
            "memory.offload=none memory.quantise=none memory.ffn_tile_tokens=0"
        )
    if config.parallel.kv_residence == "host":
        return f"parallel.tp {tp}: tensor-parallel ranks hold their keys on the device so far: set parallel.kv_residence=device"
    return None
