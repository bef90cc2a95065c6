"""Which blocks ``train.compile`` compiles, which it leaves and why, and what it needs of a machine. Imports no torch."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import UserError

if TYPE_CHECKING:
    from trainer.config import RunConfig

_OTHERS = "attention itself, embedding, loss and optimizer run as they are"


def _whole_run(config: RunConfig) -> str | None:
    """What keeps every block of a run from being compiled: the setting, why, and what instead."""
    memory, optim, parallel, train = config.memory, config.optim, config.parallel, config.train
    bodies = "replaces what a block runs by passes of its own, which keep, move or recompute its parts"
    found = (
        (memory.recompute != "none", f"memory.recompute {memory.recompute} {bodies}: set memory.recompute=none"),
        (memory.offload != "none", f"memory.offload {memory.offload} {bodies}: set memory.offload=none"),
        (memory.quantise != "none", f"memory.quantise {memory.quantise} {bodies}: set memory.quantise=none"),
        (bool(memory.ffn_tile_tokens), f"memory.ffn_tile_tokens {memory.ffn_tile_tokens} {bodies}: set memory.ffn_tile_tokens=0"),
        (
            bool(memory.memory_tile_tokens),
            f"memory.memory_tile_tokens {memory.memory_tile_tokens} {bodies}: set memory.memory_tile_tokens=0",
        ),
        (memory.offload_parameters != "none", "memory.offload_parameters brings weights from host memory; not shown: set it none"),
        (parallel.tp != 1, "parallel.tp exchanges tokens inside a block, between its products, which no graph holds: set parallel.tp=1"),
        (parallel.kv_residence == "host", "parallel.kv_residence host frees keys inside a block, which a graph would hold: set it device"),
        (
            config.engine != "native",
            f"engine {config.engine} gathers weights by hooks inside of blocks, which no graph holds: set engine=native",
        ),
        (
            config.model.memory.around_stack,
            f"model.memory.kind {config.model.memory.kind} runs segments of several lengths through all layers",
        ),
        (train.segment_tokens is not None, "train.segment_tokens runs segments of several lengths through all layers: leave it null"),
        (optim.kept_weights == "int8_stochastic", "optim.weights int8_stochastic is no tensor that a compiler knows: set another"),
        (
            optim.gradients == "fp32",
            "optim.gradients fp32 keeps gradients wider than their weights, which a graph would round: set it bf16",
        ),
        (optim.is_fused, "optim.fuse_backward updates weights between the products of a backward pass; not shown: set it false"),
    )
    return next((text for held, text in found if held), None)


def _of_layers(config: RunConfig) -> tuple[tuple[int, ...], list[str]]:
    """The layers whose blocks can be compiled, and of the others which they are and why not."""
    kinds = list(zip(config.model.layer_kinds, config.model.feedforward_kinds, strict=True))
    reasons = {
        "memory layers: their states follow one another, in loops that a graph would unroll": [
            i for i, (kind, _) in enumerate(kinds) if kind == "memory"
        ],
        "a table in place of the feed-forward or beside it: which rows are read depends on the tokens": [
            i for i, (kind, ffn) in enumerate(kinds) if kind != "memory" and ffn != "dense"
        ],
    }
    left = {i for layers in reasons.values() for i in layers}
    lines = [f"  as they are: layers {', '.join(map(str, layers))} ({reason})" for reason, layers in reasons.items() if layers]
    return tuple(i for i in range(len(kinds)) if i not in left), lines


def compiled_layers(config: RunConfig) -> tuple[int, ...]:
    """Indices of the layers whose blocks ``config`` has compiled."""
    return () if config.train.compile == "none" or _whole_run(config) else _of_layers(config)[0]


def refused_compile(config: RunConfig) -> str | None:
    """Why ``train.compile block`` compiles nothing with these settings; None if it does, or is not asked for."""
    if config.train.compile != "block":
        return None
    reason = _whole_run(config)
    if reason is None and not _of_layers(config)[0]:
        reason = "model has no layer of attention and a dense feed-forward, the blocks that are compiled"
    return None if reason is None else f"train.compile block: {reason}, or train.compile=none"


def compile_lines(config: RunConfig) -> list[str]:
    """For people: which blocks are compiled and what is left as it is, with the reasons; nothing where that is not asked for."""
    if config.train.compile == "none":
        return []
    if reason := _whole_run(config):
        return [f"compiled: no block ({reason})"]
    layers, left = _of_layers(config)
    if not layers:
        return ["compiled: no block", *left]
    where = f"layers {', '.join(map(str, layers))}" if left else f"all {len(layers)} blocks"
    return [f"compiled: {where}, before and after attention; {_OTHERS}", *left]


def plan_note(config: RunConfig) -> str:
    """What a plan says of compiled blocks, which it does not trace; nothing where none is."""
    layers = compiled_layers(config)
    text = "; traced as plain blocks: their memory and time are not planned, nor is the compiler's own host memory, some 0.1 GiB per rank"
    return f"{len(layers)} blocks{text}" if layers else ""


def announced(old: RunConfig, new: RunConfig) -> list[str]:
    """What a person is told who resumes a run with other blocks compiled."""
    if compiled_layers(old) == compiled_layers(new):
        return []
    return [f"train.compile {old.train.compile} -> {new.train.compile}: the same sums in another order, equal to rounding, not bit for bit"]


def check_compiler(config: RunConfig) -> None:
    """Raise UserError where blocks are to be compiled and this machine has nothing to do it with, before anything is started."""
    if not compiled_layers(config):
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"train.compile {config.train.compile} needs a C++ compiler, and there is no {compiler}: install one "
            "(Debian or Ubuntu: apt-get install g++), name it in CXX, or set train.compile=none"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise UserError(
            f"train.compile {config.train.compile} needs Python's headers, and {sysconfig.get_path('include')} has no Python.h: install "
            "them (Debian or Ubuntu: apt-get install python3-dev), or set train.compile=none"
        )
