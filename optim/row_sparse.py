"""Tables whose rows are updated only when they are touched (``models/tables.py``): what a step reads and writes is as much as the rows it
touches.

A row is touched in a step if its gradient has an element that is not zero, whether the gradient came dense or sparse; of a table that ranks
share by columns (`models.tables.columns_of`) if a token read it, which all of them know without asking. A touched row is
updated exactly as its rule would update a tensor of its own that saw the touching steps alone: moments, the correction of their bias
and weight decay count that row's steps (``touched``), the learning rate is the training step's. An untouched row keeps its value and
its states bit for bit. torch.optim.SparseAdam differs in the correction, which counts all steps: a row that is first touched late moves by
(1-β₁)/√(1-β₂), not by 1, times the rate.

Rows know nothing of each other and codecs' blocks lie inside them, so a table is sharded by rows without communication, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from optim.elementwise import ElementwiseAdam, Rule
from optim.methods import StateSpec
from optim.pieces import row_chunks

COUNTER = "touched"


@dataclass(frozen=True)
class RowSparse:
    """``rule`` on the rows that are touched."""

    rule: Rule

    @property
    def counts(self) -> bool:
        """Whether the rule needs each row's own step."""
        return isinstance(self.rule, ElementwiseAdam)

    def states(self, shape: tuple[int, ...]) -> Mapping[str, StateSpec]:
        """The rule's and, with Adam, how often each row was touched."""
        counter = {COUNTER: StateSpec((shape[0],), "rows", torch.int32)} if self.counts else {}
        return {**self.rule.states(shape), **counter}

    def update(self, gradient: Tensor, states: dict[str, Tensor], step: int) -> Tensor:
        """Of rows all of which are touched; their counters go on."""
        if not self.counts:
            return self.rule.update(gradient, states, step)
        own = states[COUNTER].add_(1).double().view(-1, *[1] * (gradient.ndim - 1))
        # The bias of each row: Adam's powers of a tensor of steps.
        return self.rule.update(gradient, {name: state for name, state in states.items() if name != COUNTER}, cast(int, own))


Update = Callable[[Tensor, dict[str, Tensor], Tensor], None]
"""(parameter, what is kept, gradient) of some rows, all touched: writes the first two in place."""


def update_touched(
    parameter: Tensor, stored: dict[str, Tensor], gradient: Tensor, update: Update, chunk_elements: int, *, by_columns: bool = False
) -> None:
    """``update`` on this rank's touched rows of all three. Of a sparse gradient only those rows are read. Of a dense one every row is, in
    chunks, and untouched ones are put back: which rows are touched then changes no shapes. ``by_columns``: of columns of a table, whose
    sparse gradient has a row for each that is touched."""
    per_row = max(1, parameter[:1].numel())
    if gradient.is_sparse:
        gradient = gradient if by_columns else gradient.coalesce()
        rows, values = gradient._indices()[0], gradient._values()
        if not by_columns:
            touched = values.flatten(1).any(dim=1)
            rows, values = rows[touched], values[touched]
        for some in row_chunks(len(rows), per_row, chunk_elements, values):
            index = rows[some]
            copies = {name: tensor[index] for name, tensor in stored.items()}
            weight = parameter[index]
            update(weight, copies, values[some])
            parameter[index] = weight
            for name, copy in copies.items():
                stored[name][index] = copy
        return
    for some in row_chunks(len(parameter), per_row, chunk_elements, gradient):
        mask = gradient[some].flatten(1).any(dim=1)
        copies = {name: tensor[some].clone() for name, tensor in stored.items()}
        weight = parameter[some].clone()
        update(weight, copies, gradient[some])
        for old, new in [(parameter[some], weight), *((stored[name][some], copy) for name, copy in copies.items())]:
            old.copy_(torch.where(mask.view(-1, *[1] * (old.ndim - 1)), new, old))
