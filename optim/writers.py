"""How a parameter is kept and how an update gets into it: as float32, or in fewer bits that are rounded anew at every step.

name              bytes per element   what becomes of w (1 - lr decay) - lr update, computed in float32
exact             4 (8)               itself: parameters of float32 (float64)
bf16              2                   the nearest bfloat16. An update below 1/512 of its weight is lost, every time
bf16_stochastic   2                   one of the two bfloat16 beside it by chance, so that its expectation is right
bf16_24bit        3                   float32 without its last 8 bits: the model computes with the bfloat16, an int8 state corrects it
int8_stochastic   1.03                of matrices: one of the two of 256 steps beside it, in groups of a row (``models/int8_weight.py``)
                                      by chance (Q-GaLore, arXiv 2407.08296, section 3.3); everything else as bf16_stochastic

bf16_24bit errs by 2^-16 of the number at most in a step, where bfloat16 alone errs by 2^-8 (its 8 significant bits and 8 of the
correction's): FlashOptim's 24-bit master weights (arXiv 2602.23349). Chance is a hash of (seed, parameter, step, index of the
element in the whole parameter): replicas stay the same bits, and another mesh gets the same bits.

A writer is given rows of a parameter, the same rows of its states and of the update. Tensors only: nothing here knows of meshes.
Try alone: tests/optim/test_writers.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.int8_weight import Int8Weight
from optim.clip import local_part
from optim.config import Weights
from optim.methods import StateSpec
from optim.pieces import piece_elements, row_chunks
from optim.rounding import join_24bit, random_bits, split_24bit_, stochastic_bf16_
from optim.updates import Update, formed, move_


class Chance(NamedTuple):
    """What random bits depend on, and nothing else."""

    seed: int
    key: int
    """The parameter's own number, the same on every mesh."""
    step: int
    first: int
    """Index in the whole parameter, flattened, of the first element that is written."""


class Writer(Protocol):
    """Immutable; everything that changes is in the parameter and its states."""

    def states(self, shape: tuple[int, ...]) -> Mapping[str, StateSpec]:
        """What is kept beside a parameter of ``shape``, all zero at first."""
        ...

    def read(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """The weight as precisely as it is kept (float32 or float64); a new tensor or ``weight`` itself."""
        ...

    def write_(self, weight: Tensor, states: Mapping[str, Tensor], update: Update, lr: float, decay: float, chance: Chance) -> None:
        """weight <- weight (1 - lr decay) - lr update, in place. ``update``: of the weight's shape, float32 (float64)."""
        ...


@dataclass(frozen=True)
class Exact:
    """The parameter's own float32 or float64."""

    def states(self, shape: tuple[int, ...]) -> Mapping[str, StateSpec]:
        return {}

    def read(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        return weight

    def write_(self, weight: Tensor, states: Mapping[str, Tensor], update: Update, lr: float, decay: float, chance: Chance) -> None:
        move_(weight, update, lr, decay)


@dataclass(frozen=True)
class Bfloat16:
    """bfloat16, rounded to nearest or by chance."""

    stochastic: bool

    def states(self, shape: tuple[int, ...]) -> Mapping[str, StateSpec]:
        return {}

    def read(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        return weight.float()

    def write_(self, weight: Tensor, states: Mapping[str, Tensor], update: Update, lr: float, decay: float, chance: Chance) -> None:
        update = formed(update)
        for rows, first in _pieces(update, chance.first):
            value = move_(weight[rows].float(), update[rows], lr, decay)
            if self.stochastic:
                stochastic_bf16_(value, weight[rows], seed=chance.seed, key=chance.key, step=chance.step, first=first)
            else:
                weight[rows] = value


@dataclass(frozen=True)
class TwentyFourBits:
    """bfloat16 and an int8 that corrects it: the float32 without its last 8 bits."""

    def states(self, shape: tuple[int, ...]) -> Mapping[str, StateSpec]:
        return {"correction": StateSpec(shape, "rows", torch.int8)}

    def read(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        return join_24bit(weight, states["correction"])

    def write_(self, weight: Tensor, states: Mapping[str, Tensor], update: Update, lr: float, decay: float, chance: Chance) -> None:
        low = states["correction"]
        update = formed(update)
        for rows, _ in _pieces(update, 0):
            split_24bit_(move_(join_24bit(weight[rows], low[rows]), update[rows], lr, decay), weight[rows], low[rows])


@dataclass(frozen=True)
class EightBits:
    """``Int8Weight``, by chance. A group's steps are set anew by its least and largest number, which stay exact."""

    def states(self, shape: tuple[int, ...]) -> Mapping[str, StateSpec]:
        return {}

    def read(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        assert isinstance(weight, Int8Weight)
        return weight.dequantised(torch.float32)

    def write_(self, weight: Tensor, states: Mapping[str, Tensor], update: Update, lr: float, decay: float, chance: Chance) -> None:
        assert isinstance(weight, Int8Weight)
        update = formed(update)
        for rows, first in _pieces(update, chance.first):
            part = weight.rows(rows)
            value = move_(part.dequantised(torch.float32), update[rows], lr, decay)
            bits = random_bits(first, value.numel(), seed=chance.seed, key=chance.key, step=chance.step, device=value.device)
            part.quantise_(value, bits.int().bitwise_and_(0xFFFF).float().mul_(2.0**-16).view(value.shape))


EXACT = Exact()
EIGHT_BITS = EightBits()
WRITERS: dict[Weights, Writer] = {
    "fp32": EXACT,
    "bf16": Bfloat16(stochastic=False),
    "bf16_stochastic": Bfloat16(stochastic=True),
    "bf16_24bit": TwentyFourBits(),
    "int8_stochastic": Bfloat16(stochastic=True),
}
"""Of parameters that are not in eight bits already; ``int8_stochastic`` says so of the rest beside matrices that are."""


def writer_for(parameter: Tensor, weights: Weights | None, name: str) -> Writer:
    """Of a parameter: a float32 or float64 one is written exactly whatever ``weights`` says; it says how bfloat16 is written.

    Raises ValueError for bfloat16 parameters without such a word, for weights in eight bits under another one, and for other dtypes;
    ``name`` is the parameter's.
    """
    if isinstance(local_part(parameter.detach()), Int8Weight):
        if weights != "int8_stochastic":
            raise ValueError(f"{name} is kept in eight bits; set weights (optim.weights) int8_stochastic, not {weights}")
        return EIGHT_BITS
    if parameter.dtype in (torch.float32, torch.float64):
        return EXACT
    if parameter.dtype != torch.bfloat16:
        raise ValueError(f"{name} is {parameter.dtype}; optimizers take float32, float64 and bfloat16 parameters")
    if weights is None or weights == "fp32":
        known = ", ".join(name for name in WRITERS if name != "fp32")
        raise ValueError(f"{name} is bfloat16; say how it is rounded with weights (optim.weights): {known}")
    return WRITERS[weights]


def weights_of(writer: Writer) -> Weights | None:
    """Its name; None for ``EXACT``, whose dtype is the parameter's."""
    if writer is EIGHT_BITS:
        return "int8_stochastic"
    return None if writer is EXACT else next(name for name, one in WRITERS.items() if one == writer)


def _pieces(update: Tensor, first: int) -> Iterator[tuple[slice, int]]:
    """Rows whose float copies fit, with the index of their first element."""
    columns = update[:1].numel()
    for rows in row_chunks(update.shape[0], columns, piece_elements(update.device), update):
        yield rows, first + rows.start * columns
