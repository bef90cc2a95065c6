"""Traces of a configuration's training step: made in other processes, kept for the next question. Imports no torch.

A trace depends on the model, the lengths, the degrees, the memory settings and the code, not on budgets or names; what is asked for
again with those unchanged is read from the user's cache directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from memory_mgmt.native import cache_dir
from memory_mgmt.policy import Policy
from memory_mgmt.trace import Trace
from models.memory.kernel_choice import installed_fla
from trainer import trace_workers
from trainer.compile_rules import compiled_layers
from trainer.config import RunConfig
from trainer.one_process import for_one_process

HOME = Path(__file__).resolve().parent.parent
CODE = ("models", "parallel", "optim", "memory_mgmt", "trainer")
KEPT_TRACES = 200
_UNRELATED_MEMORY = ("budget_gib", "host_gib", "offload_dir", "plan", "replan_on_oom", "arena")
_RELATED_TRAIN = (
    "carry_state",
    "precision",
    "residual",
    "micro_batch_size",
    "grad_accum",
    "deterministic",
    "segment_tokens",
    "bptt_segments",
    "diagonal_segments",
)

_ORDER_TO_CARRY: dict[str, dict[str, str]] = {"none": {}, "document": {"shuffle": "documents"}}
"""An order that carrying states allows; which one it is, changes no trace."""

_WITH_PREFIXES = {"source": "jsonl", "path": "any", "prefix_key": "any"}
_WITH_CLUSTERS = {"source": "jsonl", "path": "any", "cluster_key": "any cluster"}
"""Documents that have them, wherever those are: a trace reads none."""

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class TraceRequest:
    """One step to trace. ``policy`` overrides what the memory settings say; ``whole``: do not extend equal layers."""

    config: RunConfig
    vocab_size: int
    device_type: DeviceType
    policy: Policy | None = None
    threads: int = 1
    whole: bool = False
    capability: tuple[int, int] | None = None
    """Of a CUDA device, where it is known: kernels are chosen by it."""

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.config.parallel.ranks_asked

    def to_dict(self) -> dict[str, Any]:
        """Everything the trace depends on besides the code, and nothing else."""
        config = self.config.model_dump(mode="json")
        memory = {key: value for key, value in config["memory"].items() if key not in _UNRELATED_MEMORY}
        if self.policy is not None:  # it says all that the other settings would
            memory = {key: memory[key] for key in ("offload_optimizer", "offload_parameters")}
        return {
            "config": {
                "engine": config["engine"],
                "deepspeed": config["deepspeed"],
                "model": config["model"],
                "data": self._data(),
                "train": {key: config["train"][key] for key in _RELATED_TRAIN}
                | {"compile": "auto" if compiled_layers(self.config) else "none"},
                "optim": config["optim"],
                "parallel": config["parallel"],
                "memory": memory,
            },
            "vocab_size": self.vocab_size,
            "device_type": self.device_type,
            "world_size": self.world_size,
            "policy": self.policy.to_dict() if self.policy is not None else None,
            "threads": self.threads,
            "whole": self.whole,
            "capability": self.capability,
        }

    def _data(self) -> dict[str, Any]:
        """What a step's shapes and masks depend on: not where documents come from, but whether they have prefixes that are seen."""
        data = self.config.data
        found: dict[str, Any] = {"seq_len": data.seq_len} | _ORDER_TO_CARRY[self.config.train.carry_state]
        found |= _WITH_PREFIXES if data.bidirectional_prefixes else {}
        return found | (_WITH_CLUSTERS if data.cluster_key is not None else {})


def trace_step(request: TraceRequest) -> Trace:
    """The trace of one step; see ``trace_steps``."""
    return trace_steps([request])[0]


def trace_steps(requests: Sequence[TraceRequest]) -> list[Trace]:
    """The traces of several steps, those that are not kept from before made side by side. Of several processes that want the same
    trace at the same time, such as the ranks that torchrun starts, one makes it and the others wait for it.

    Raises UserError when a step cannot be traced, with the reason (most often settings that the model refuses), or when CUDA is
    asked for and there is no C++ compiler.
    """
    bodies = [request.to_dict() for request in requests]
    code = _code_digest()
    paths = [_path(body, code) for body in bodies]
    wanted = {path: {**body, "out": str(path)} for body, path in zip(bodies, paths, strict=True) if not path.exists()}
    if wanted:
        for_one_process(wanted, lambda missing: trace_workers.run([wanted[path] for path in missing]))
        _forget_oldest(paths[0].parent, set(paths))
    return [_load(path) or trace_step(request) for path, request in zip(paths, requests, strict=True)]


def kept(request: TraceRequest) -> Trace | None:
    """The trace of a step if it is kept from before; traces nothing."""
    path = _path(request.to_dict(), _code_digest())
    return _load(path) if path.exists() else None


def _load(path: Path) -> Trace | None:
    """A kept trace; one that is damaged (the machine went down, or its disk was full) is removed, to be made again."""
    try:
        return Trace.load(path)
    except ValueError:
        path.unlink(missing_ok=True)
        return None


def _path(body: dict[str, Any], code: str) -> Path:
    digest = hashlib.sha256(json.dumps([body, code], sort_keys=True).encode()).hexdigest()
    folder = cache_dir() / "traces"
    folder.mkdir(exist_ok=True)
    return folder / f"{digest[:24]}.json.gz"


def _code_digest() -> str:
    """A hash of the rooms' sources and of the versions of torch and fla: a change of any makes all traces anew."""
    digest = hashlib.sha256(f"{version('torch')} {installed_fla()}".encode())
    for room in CODE:
        for path in sorted((HOME / room).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _forget_oldest(folder: Path, needed: set[Path]) -> None:
    traces = sorted(folder.glob("*.json.gz"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in traces[KEPT_TRACES:]:
        if path not in needed:
            path.unlink(missing_ok=True)
