"""What ``parallel.tp`` above 1 asks of the other settings. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import RunConfig


ELEMENTWISE = ("adamw", "adamw_8bit", "adamw_4bit", "sgd")
"""Presets that update every element by itself: on a part as on the whole."""
ROUNDED_ALIKE = ("fp32", "bf16", "bf16_24bit")
"""Of ``optim.weights`` those that round without chance."""
STATE_BLOCK = 128
"""Elements that a codec of 8 or 4 bits keeps with one scale (``optim/codecs.py``)."""


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
    attach = config.model.memory.attach
    if "memory" in config.model.layer_kinds and attach == "mac":
        return (
            f"parallel.tp {tp}: model.memory.attach mac has not been shown to be exact over tensor-parallel ranks; set parallel.tp=1 and "
            "parallel.cp or parallel.dp_shard, or model.memory.attach=mag"
        )
    # Ranges of a zigzag layout that neighbours share in equal parts: attention beside a memory knows none such, and an odd number of
    # neighbours would cut them to unequal ranges.
    if "memory" in config.model.layer_kinds and config.layout == "zigzag" and (tp % 2 or attach != "mixer"):
        return (
            f"parallel.tp {tp} with parallel.layout zigzag: a memory layer {'of' if attach == 'mixer' else 'beside attention and'} {tp} "
            "tensor-parallel ranks needs each one's tokens in one piece: set parallel.layout=contiguous"
        )
    return None


def _of_updates(config: RunConfig, tp: int) -> str | None:
    optim = config.optim
    if optim.is_fused:
        return (
            f"parallel.tp {tp}: an update in the backward pass (optim.fuse_backward, optim.preset lomo) would move norms before their "
            "gradients are summed over tensor-parallel ranks: set optim.fuse_backward=false"
        )
    if optim.preset not in (*ELEMENTWISE, "auto") and optim.kept_weights == "bf16_24bit":
        return (
            f"parallel.tp {tp}: optim.weights bf16_24bit keeps a correction beside each weight, and optim.preset {optim.preset} updates "
            f"matrices where their rows are dealt anew: set optim.weights=bf16 or fp32, or optim.preset to one of {', '.join(ELEMENTWISE)}"
        )
    if optim.kept_weights not in ROUNDED_ALIKE:
        return (
            f"parallel.tp {tp}: optim.weights {optim.kept_weights} rounds by each element's place in the whole matrix, of which a "
            f"tensor-parallel rank has a part: set optim.weights to one of {', '.join(ROUNDED_ALIKE)}"
        )
    return _of_blocks(config, tp) if optim.preset in ("adamw_8bit", "adamw_4bit") else None


def _of_blocks(config: RunConfig, tp: int) -> str | None:
    """Matrices that are shared by columns, whose states are kept in blocks along rows."""
    model = config.model
    widths = {"model.d_ff": model.ff_width}
    if model.has_attention:
        widths["model.n_heads times the size of a head"] = model.n_heads * model.attention_head_dim
    for what, width in widths.items():
        if width // tp % STATE_BLOCK:
            return (
                f"parallel.tp {tp}: optim.preset {config.optim.preset} keeps states in blocks of {STATE_BLOCK} along rows, and a rank has "
                f"{width // tp} columns of matrices that are {width} wide ({what}): set optim.preset=adamw, or widths that divide"
            )
    return None


def _of_memory(config: RunConfig, tp: int) -> str | None:
    memory = config.memory
    if memory.plan == "estimate":
        return f"parallel.tp {tp} needs a traced step (formulas know no tensor parallelism): set memory.plan=trace"
    return None
