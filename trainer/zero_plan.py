"""What DeepSpeed's ZeRO holds otherwise than the traced step, for the plan of ``engine: deepspeed``. Imports no torch.

DeepSpeed cannot run on fake tensors. In its place FSDP2 is traced, which deals out the same shares and gathers the same blocks; under
ZeRO-1 and 2 without giving gathered parameters back. What differs is counted here by formula and shown as terms of their own; what is not
known is in the plan's ``not_counted``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from memory_mgmt.plan import Kind, MemoryPlan, Term
from trainer.engine_config import DeepSpeedSection

METHOD = "traced step of FSDP2 in ZeRO's place, ZeRO's own buffers by formula"
NOT_COUNTED = "DeepSpeed's scratch memory within a collective and an update; the time of its buckets (predicted as FSDP2's)"
_BYTES = 4
"""Of an element: weights, gradients and states are float32."""
CPU_MODULES = 50 * 2**20
"""What a CPU rank grows by when DeepSpeed sets itself up, whatever the model: what it imports then. 48 to 60 MiB were measured."""


class _Difference(NamedTuple):
    """Bytes that a rank holds throughout a step beside what was traced; ``host``: where they are in host memory."""

    name: str
    kind: Kind
    bytes: int
    host: bool
    formula: str


def with_zero(plan: MemoryPlan, asked: DeepSpeedSection, parameters: int, ranks: int, cuda: bool) -> MemoryPlan:
    """``plan`` of the step traced in ZeRO's place, corrected. ``parameters``: of the model; ``cuda``: host memory is not the device's."""
    terms, host = list(plan.terms), plan.host_bytes
    share = -(-parameters // ranks) * _BYTES
    moved: dict[Kind, int] = {}
    if cuda and asked.offload_optimizer == "cpu":
        moved["optimizer"] = 2 * share
    if cuda and asked.offload_parameters == "cpu":
        moved["parameters"] = share
    for kind, most in moved.items():
        for i, term in enumerate(terms):
            if term.kind == kind:
                left = max(0, term.bytes - most)
                host += term.bytes - left
                terms[i] = replace(term, bytes=left, max_bytes=min(term.max_bytes, left), formula="the rest is in host memory")
                most -= term.bytes - left
    for one in _differences(asked, parameters, share, sum(term.bytes for term in terms if term.kind == "gradients")):
        if one.host and cuda:
            host += one.bytes
        elif one.bytes:
            terms.append(Term(one.name, one.kind, one.bytes, one.bytes, one.formula))
    if not cuda:
        terms.append(Term("DeepSpeed", "overhead", CPU_MODULES, CPU_MODULES, "measured, not derived: what it imports when it starts"))
    more = sum(term.bytes for term in terms) - sum(term.bytes for term in plan.terms)
    return replace(
        plan,
        method=METHOD,
        terms=tuple(sorted(terms, key=lambda term: -term.bytes)),
        moments=tuple(replace(moment, bytes=moment.bytes + more) for moment in plan.moments),
        not_counted=(*plan.not_counted, NOT_COUNTED),
        host_bytes=host,
    )


def _differences(asked: DeepSpeedSection, parameters: int, share: int, gradients: int) -> Iterator[_Difference]:
    """``share``: bytes of this rank's part of all parameters; ``gradients``: bytes traced at the peak."""
    offloaded, whole = asked.offload_optimizer == "cpu", parameters * _BYTES
    bucket = asked.bucket_of(parameters) * _BYTES
    yield _Difference("reduction bucket", "communication", bucket, False, "deepspeed.bucket_elements, at most the model's")
    if asked.stage < 3 or offloaded:
        yield _Difference("weights that are updated", "parameters", share, offloaded, "this rank's share, beside the model's own")
    if asked.stage == 1:
        yield _Difference("gradients of all shares", "gradients", max(0, whole - gradients), False, "until they are reduced")
    elif asked.stage == 3:
        yield _Difference("gradients in every phase", "gradients", max(0, share - gradients), offloaded, "ZeRO-3 keeps their memory")
    if offloaded:
        yield _Difference("gradients of the update", "gradients", share, True, "this rank's share, where states are")
        if asked.stage < 3:
            yield _Difference("copies of updated weights", "communication", share, True, "on their way back to the device")
