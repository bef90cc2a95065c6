"""What a configuration's ``model.memory.kernel`` comes to on a device, for ``--explain``, plans and runs. Imports no torch.

Try alone: ``longstride plan samba --device h100 --explain train.precision=bf16 train.deterministic=false``.
"""

from __future__ import annotations

from memory_mgmt.devices import Device
from models.errors import UserError
from models.memory.kernel_choice import Recurrence, cannot_fla, choose, explain, missing_fla, recurrence_of, refusal
from trainer.config import RunConfig


def recurrence(config: RunConfig, device: Device) -> Recurrence | None:
    """The recurrence of the memory layers; None where they have none with a choice of kernels."""
    where = "cuda" if device.is_cuda else "cpu"
    return recurrence_of(config.model, where, config.train.precision, device.capability, config.train.deterministic)


def memory_lines(config: RunConfig, device: Device) -> list[str]:
    """For people: the kernel of the memory layers, and why others are passed over."""
    case = recurrence(config, device)
    if case is None:
        return []
    chosen, *passed_over = explain(case, config.model.memory.kernel, here=False).split("; ")
    return [f"memory layers, model.memory.kernel {config.model.memory.kernel}: {chosen}", *(f"      {reason}" for reason in passed_over)]


def check_memory_kernel(config: RunConfig, device: Device, here: bool) -> None:
    """Raise UserError where a kernel is named that cannot compute the memory layers on ``device``. ``here``: the run is about to begin on
    this machine, so that the package must be installed; a plan can be made without."""
    case, kernel = recurrence(config, device), config.model.memory.kernel
    if case is None:
        return
    reason = cannot_fla(case) or (missing_fla() if here else None)
    if kernel == "fla" and reason is not None:
        raise UserError(refusal(case, kernel, reason))
    if config.memory.plan == "estimate" and choose(case, kernel, here)[0] == "fla":
        raise UserError(
            f"model.memory.kernel: {kernel} takes fla's kernels, and memory.plan estimate knows eager ones only; "
            "set model.memory.kernel=eager, or leave memory.plan at trace"
        )
