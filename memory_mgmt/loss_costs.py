"""The time of a loss in tiles of other sizes than the traced one. Imports no torch.

Every tile reads the head three times and adds to its gradient, whatever its size: what smaller tiles cost beside more launches and
smaller products. All other work of the loss (``models/loss.py``) is the same in all, in more or fewer pieces.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from memory_mgmt.cost_ops import op_class, op_seconds
from memory_mgmt.cost_rates import Rates, Topology
from memory_mgmt.trace import TracedOp


@dataclass(frozen=True)
class Head:
    """The matrix that makes logits: ``elements``, computed with in ``narrow`` bytes each, its gradient summed in ``wide``."""

    elements: int
    narrow: int
    wide: int

    def moved_by(self, op: TracedOp) -> int:
        """Bytes of the head or its gradient that one turn of ``op`` reads and writes."""
        moved = op.bytes // op.repeats
        if op_class(op) == "matmul":
            addition = op.name.partition("::")[2].startswith("addmm")  # reads and writes the sum, and its product is not made
            return min(moved, self.elements * (2 * self.wide if addition else self.narrow))
        return moved if moved == self.elements * (self.narrow + 2 * self.wide) else 0


def seconds_in_tiles(ops: Iterable[TracedOp], head: Head, turns: int, wanted: int, rates: Rates, topology: Topology) -> float:
    """Of the loss's ``ops``, traced in ``turns`` tiles, in ``wanted`` tiles."""
    factor = wanted / turns
    return sum(op.repeats * factor * op_seconds(_one_turn(op, head, factor), rates, topology) for op in ops)


def _one_turn(op: TracedOp, head: Head, factor: float) -> TracedOp:
    """Where there are ``factor`` times as many, of less work each."""
    parts, fixed = op.repeats * factor, head.moved_by(op)
    moved = fixed + round((op.bytes / op.repeats - fixed) / factor)
    return replace(op, repeats=1, bytes=moved, flops=round(op.flops / parts), message_bytes=round(op.message_bytes / parts))
