"""The memory plan by arithmetic: what one rank holds at every moment of a training step, computed from shapes.

It is an estimate, not a trace: the formulas of ``activations.py`` for what layers keep and make, and the order in which a step
(forward, loss, backward block by block, clipping, update) holds parameters, gradients, activations and buffers. The peak is the
largest moment; every term says how it was computed, and what is left out is listed in the plan. Imports no torch.

Try alone: ``python -m memory_mgmt.estimate`` (the default model at 64K tokens on two ranks).
"""

from __future__ import annotations

from dataclasses import replace

from memory_mgmt.activations import ELEMENT
from memory_mgmt.changes import changes
from memory_mgmt.config import MemoryConfig
from memory_mgmt.devices import DEVICES, Device
from memory_mgmt.estimate_step import Step
from memory_mgmt.estimate_terms import LABELS, summed
from memory_mgmt.plan import GIB, MemoryPlan, Moment, Term
from models.config import ModelConfig
from optim.config import OptimConfig
from parallel.config import ParallelConfig

METHOD = "estimate from shapes"
NOT_COUNTED = (
    "writing a checkpoint (an asynchronous save copies parameters and optimizer states to host memory)",
    "rounding of the allocator",
    "tables of document bounds",
)

TIGHT_FACTOR = 2.0
"""Freed blocks are given back when the limit is below this times the peak; giving them back costs time (memory_mgmt/host_allocator.py)."""


def estimate(
    model: ModelConfig,
    parallel: ParallelConfig,
    memory: MemoryConfig,
    optim: OptimConfig,
    *,
    seq_len: int,
    micro_batch_size: int,
    precision: str,
    vocab_size: int,
    layout: str,
    grad_accum: int = 1,
    residual: str = "fp32",
    device: Device = DEVICES["cpu"],
    device_bytes: int | None = None,
    optimizer_bytes: int | None = None,
) -> MemoryPlan:
    """The plan of one rank.

    Args:
        seq_len: tokens of a whole sequence, before it is split over ``parallel.cp`` ranks.
        micro_batch_size: sequences per data-parallel rank in one forward and backward pass; grad_accum: passes per step.
        precision: bf16, fp32 or fp64 as in ``train.precision``.
        residual: fp32 or bf16 as in ``train.residual``.
        vocab_size: rows of the embedding.
        layout: contiguous or zigzag, resolved (``RunConfig.layout``).
        device: what the run is planned for; device_bytes: memory it has, default what the device table says.
        optimizer_bytes: of this rank's optimizer states, where the preset is not adamw (``optim.plan.planned`` knows them).
    Raises ValueError for a precision or layout that does not exist, or a sequence that the layout cannot split.
    """
    parts = parallel.cp * (2 if layout == "zigzag" else 1)
    if precision not in ELEMENT or layout not in ("contiguous", "zigzag"):
        raise ValueError(f"precision {precision!r} or layout {layout!r} is unknown")
    if seq_len % parts:
        raise ValueError(f"data.seq_len {seq_len} is not divisible by {parts} (parallel.cp {parallel.cp}, {layout} layout)")
    step = Step(model, parallel, memory, optim, seq_len, micro_batch_size, grad_accum, precision, vocab_size, layout == "zigzag", device)
    step = replace(step, optimizer_bytes=None if optimizer_bytes is None else optimizer_bytes * step.shards)
    step = replace(step, residual=residual)
    budget = None if memory.budget_gib is None else int(memory.budget_gib * GIB)
    available = device.memory_bytes if device_bytes is None else device_bytes
    plan, tight = _plan_within(step, budget, available)
    found = changes(
        model,
        parallel,
        memory,
        seq_len=seq_len,
        vocab_size=vocab_size,
        zigzag=layout == "zigzag",
        cuda=device.is_cuda,
        peak_bytes=plan.peak_bytes,
        peak_with=lambda m, p: _plan_within(replace(step, memory=m, parallel=p), budget, available)[0].peak_bytes,
    )
    return replace(plan, changes=tuple(found), return_freed_blocks=tight and not device.is_cuda)


def _plan_within(step: Step, budget: int | None, available: int | None) -> tuple[MemoryPlan, bool]:
    """The plan, and whether the limits are so tight that freed blocks are to be given back (then they leave no holes)."""
    plan = _plan(step, budget, available, holes=False)
    tight = plan.limit_bytes is not None and plan.peak_bytes * TIGHT_FACTOR > plan.limit_bytes
    if tight or step.device.is_cuda:
        return plan, tight
    return _plan(step, budget, available, holes=True), tight


def _plan(step: Step, budget_bytes: int | None, device_bytes: int | None, holes: bool) -> MemoryPlan:
    resident = step.resident()
    live_moments = list(step.moments())
    if holes:
        resident["heap holes"] = step.heap_holes(max(sum(live.values()) for _, live in live_moments))
    moments = [(name, summed(resident, live)) for name, live in live_moments]
    _, at_peak = max(moments, key=lambda moment: sum(moment[1].values()))
    terms = []
    for name, label in LABELS.items():
        most = max(live.get(name, 0) for _, live in moments)
        if most:
            terms.append(Term(name, label.kind, at_peak.get(name, 0), most, label.formula.format(w=step.wide)))
    return MemoryPlan(
        method=METHOD,
        device=step.device.name,
        ranks=step.ranks,
        terms=tuple(terms),
        moments=tuple(Moment(name, sum(live.values())) for name, live in moments),
        budget_bytes=budget_bytes,
        device_bytes=device_bytes,
        not_counted=NOT_COUNTED,
        host_bytes=step.host_bytes(),
    )


if __name__ == "__main__":
    from memory_mgmt.plan_view import plain

    sections = ModelConfig(), ParallelConfig(cp=2), MemoryConfig(budget_gib=1.0), OptimConfig()
    print(plain(estimate(*sections, seq_len=65_536, micro_batch_size=1, precision="fp32", vocab_size=256, layout="contiguous")))
