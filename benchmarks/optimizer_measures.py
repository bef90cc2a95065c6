"""What is measured of an optimizer's step: processor time, bytes kept, bytes needed for a moment; and gradients to step on."""

from __future__ import annotations

import copy
import gc
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from optimizer_peers import NEVER, Stepper, System, Workload, ours
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.transformer import Transformer, init_weights
from optim.routing import route


class Running:
    """A system on a copy of a workload's weights. ``error``: why it does not run, empty where it does."""

    def __init__(self, system: System, workload: Workload, gap: int = NEVER) -> None:
        self.system, self.workload = system, workload
        self.model = copy.deepcopy(workload.model)
        self.steps, self.error, self.seconds = 0, "", list[float]()
        self.first_wall = 0.0
        try:
            self.stepper: Stepper | None = system.build(self.model, workload.rank, gap)
        except Exception as error:  # whatever a foreign package raises is reported, not hidden
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        lines = str(error).strip().splitlines() or ["no message"]
        self.error, self.stepper = f"{type(error).__name__}: {lines[0]}"[:160], None

    def _give_gradients(self) -> None:
        gradients = self.workload.gradients[self.steps % len(self.workload.gradients)]
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                parameter.grad = gradients[name].to(parameter.dtype, copy=True)
            else:
                parameter.grad.copy_(gradients[name])

    def step(self) -> float:
        """One step; its processor seconds, also kept. A system that fails in it stops running."""
        if self.stepper is None:
            return float("nan")
        self._give_gradients()
        self.stepper.prepare()
        wall, started = time.perf_counter(), time.process_time()
        try:
            self.stepper.step()
        except Exception as error:  # as above
            self._fail(error)
            return float("nan")
        self.seconds.append(time.process_time() - started)
        if not self.steps:
            self.first_wall = time.perf_counter() - wall
        self.steps += 1
        return self.seconds[-1]

    def state_bytes(self) -> int:
        """Of every tensor the optimizer keeps, by storage, without weights and gradients."""
        assert self.stepper is not None
        own = {t.untyped_storage().data_ptr() for p in self.model.parameters() for t in (p, p.grad) if t is not None}
        kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in reachable(self.stepper.held)}
        return sum(size for pointer, size in kept.items() if pointer not in own)

    def temporary_bytes(self) -> int:
        """The most that a step has allocated at one moment beyond what was there before it, by torch's allocator."""
        assert self.stepper is not None
        self._give_gradients()
        self.stepper.prepare()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.stepper.step()
        self.steps += 1
        results: Any = profiled.profiler
        events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most


def reachable(root: Any) -> list[Tensor]:
    """Every plain tensor reachable from ``root`` through containers, attributes and the parts of wrapped tensors."""
    found, seen, waiting = list[Tensor](), set[int](), [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, str | bytes | int | float | type | nn.Module):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            parts = getattr(thing, "__tensor_flatten__", None)
            if parts is not None and type(thing) not in (Tensor, nn.Parameter):
                waiting += [getattr(thing, name) for name in parts()[0]]
            elif not thing.is_meta:
                found.append(thing)
        elif isinstance(thing, dict):
            waiting += [*thing.values(), *thing.keys()]
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting += thing
        elif not callable(thing) or isinstance(thing, torch.optim.Optimizer):
            waiting += vars(thing).values() if hasattr(thing, "__dict__") else ()
    return found


def measured(systems: Sequence[System], workload: Workload, rounds: int, renewals: int) -> list[dict[str, Any]]:
    """One row per system: first step; least of ``rounds`` steps without a new projection, all systems in turns; what making every
    projection anew adds to a step (least of ``renewals`` such steps after the first, which may start from nothing); bytes."""
    steady = [Running(system, workload) for system in systems]
    for running in steady:
        gc.collect()
        for _ in range(1 + running.system.warm):
            running.step()
        print(f"{workload.name}: {running.system.package} {running.system.name} {running.error}", file=sys.stderr, flush=True)
    for _ in range(rounds):
        for running in steady:
            running.step()
    rows = []
    for running in steady:
        system = running.system
        row: dict[str, Any] = {"system": system.name, "package": system.package, "reference": system.reference, "note": system.note}
        rows.append(row)
        if running.error:
            row["error"] = running.error
            continue
        least = min(running.seconds[1 + system.warm :])
        row |= {"step_ms": 1e3 * least, "first_step_s": running.first_wall, "first_step_cpu_s": running.seconds[0]}
        row |= {"state_bytes": running.state_bytes(), "temporary_bytes": running.temporary_bytes()}
        if system.renews:
            other = Running(system, workload, gap=1)
            row["renewal_ms"] = 1e3 * (min([other.step() for _ in range(renewals + 1)][1:]) - least)
            row["renewal_temporary_bytes"] = other.temporary_bytes()
    return rows


def renewal(rows: Sequence[dict[str, Any]], workload: Workload, repeats: int) -> dict[str, Any]:
    """Making all of GaLore's projections anew against singular value decompositions of the same gradients: processor time of both, and of
    the energy that the decomposition's leading vectors capture the part that ours do, warm from the projection of the gradient before."""
    running = Running(ours("galore", "galore"), workload, gap=1)
    for _ in workload.gradients:
        running.step()
    weights, kept = dict(running.model.named_parameters()), []
    decompositions, gradients = 0.0, workload.gradients[-1]
    for one in route(workload.model):
        if one.part != "matrix":
            continue
        gradient = gradients[one.name]
        taken = []
        for _ in range(repeats):
            started = time.process_time()
            torch.linalg.svd(gradient, full_matrices=False)
            taken.append(time.process_time() - started)
        decompositions += min(taken)
        basis = running.stepper.held.state[weights[one.name]]["basis"].double()  # pyright: ignore[reportOptionalMemberAccess]
        ours_captured = (gradient.double() @ basis if len(gradient) >= gradient.shape[1] else gradient.double().T @ basis).square().sum()
        most = torch.linalg.svdvals(gradient.double())[: basis.shape[1]].square().sum()
        kept.append(float(ours_captured / most))
    mine = next(row["renewal_ms"] for row in rows if row["system"] == "galore")
    energy = {"least_captured": min(kept), "mean_captured": sum(kept) / len(kept)}
    return {"workload": workload.name, "ours_ms": mine, "svd_ms": 1e3 * decompositions, **energy}


def worst_step(system: System, workload: Workload, gap: int, cycles: int) -> dict[str, Any]:
    """The costliest step of a whole cycle of ``gap`` steps over the median one. Each step of the cycle counts with the least time it had
    in ``cycles`` cycles, so that what remains is the schedule's, not another process's."""
    running = Running(system, workload, gap)
    for _ in range(max(gap, system.warm)):
        running.step()
    times = torch.tensor([[running.step() for _ in range(gap)] for _ in range(cycles)]).amin(0)
    return {"system": system.name, "gap": gap, "median_ms": 1e3 * float(times.median()), "worst_ms": 1e3 * float(times.max())}


def recorded(model: Transformer, batch: int, seq_len: int, apart: int, count: int) -> list[dict[str, Tensor]]:
    """Gradients every ``apart`` steps of training on the source text of Python's own library, ``count`` times."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    generator, found = torch.Generator().manual_seed(0), []
    positions = torch.arange(seq_len).expand(batch, -1)
    for step in range(1, apart * count + 1):
        starts = torch.randint(len(text) - seq_len - 1, (batch,), generator=generator).tolist()
        windows = torch.stack([text[at : at + seq_len + 1] for at in starts]).long()
        model(Batch(windows[:, :-1], windows[:, 1:], positions, Bounds.whole(batch, seq_len))).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step % apart == 0:
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return found


def decoder(d_model: int, d_ff: int, layers: int, heads: int) -> Transformer:
    """Byte-level, with plain attention."""
    model = Transformer(ModelConfig(d_model=d_model, d_ff=d_ff, n_layers=layers, n_heads=heads, layers=("full",)), 256)
    init_weights(model, 0)
    return model
