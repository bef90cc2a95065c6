"""What a method wants subtracted from a matrix, not yet multiplied out where the weight can take it up in one pass: the update is then
never in memory, and the gradient is read once less.

  move_(weight, Scaled(gradient, factors), lr, decay)      # weight (1 - lr decay) - lr gradient * factors
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optim.pieces import piece_elements, row_chunks


class Scaled(NamedTuple):
    """``matrix`` [i, n] times ``factors`` [1], [i, 1] or [1, n]."""

    matrix: Tensor
    factors: Tensor


class Product(NamedTuple):
    """``left`` [i, r] times ``right`` [r, n]."""

    left: Tensor
    right: Tensor


Update = Tensor | Scaled | Product


def formed(update: Update) -> Tensor:
    """The whole [i, n]."""
    if isinstance(update, Scaled):
        return update.matrix * update.factors
    return update.left @ update.right if isinstance(update, Product) else update


def move_(value: Tensor, update: Update, lr: float, decay: float) -> Tensor:
    """value (1 - lr decay) - lr update, in place."""
    if isinstance(update, Product) and update.left.dtype == value.dtype:
        return value.addmm_(update.left, update.right, beta=1 - lr * decay, alpha=-lr)
    if decay:
        value.mul_(1 - lr * decay)
    if isinstance(update, Scaled) and update.matrix.dtype == value.dtype:
        return value.addcmul_(update.matrix, update.factors, value=-lr)
    return value.sub_(formed(update), alpha=lr)


def channel_squares(matrix: Tensor, dim: int) -> Tensor:
    """Sums of the squares along ``dim``, without a copy of the matrix: of rows by norms; of columns, whose norms torch makes 15 times as
    slowly on CPUs, some rows at a time."""
    if dim != 0:
        return torch.linalg.vector_norm(matrix, dim=dim).square_()
    total = matrix.new_zeros(matrix.shape[1])
    for rows in row_chunks(len(matrix), matrix.shape[1], piece_elements(matrix.device), matrix):
        total += matrix[rows].square().sum(dim=0)
    return total
