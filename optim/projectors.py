"""Bases of small subspaces in which a method keeps the states of a matrix, and the way there and back.

Two sides. ``right`` (tall matrices, GaLore's ``std``): basis V [n, r], coordinates R = G V [m, r], local to each rank. ``left`` (wide):
basis U [m, r], of which a rank needs its own rows only, coordinates R = Gᵀ U [n, r], summed over ranks and dealt by chunks. So the
coordinates are always [long side, r] and lie dealt. "Basis" below is V, or this rank's rows of U.

Does not know what is done with the coordinates. Try alone: tests/optim/test_projectors.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from optim.counter_random import gaussian_rows
from optim.methods import GatherRows, Rows, StateSpec, Steps, Sum, SumRows

Side = Literal["right", "left"]


@dataclass(frozen=True)
class Refresh:
    """When a basis is renewed: in the first step and every ``gap`` steps after. ``stagger`` shifts each matrix by its key, so that no
    step renews all; without it all are renewed in steps 1, gap + 1, ... as the reference packages do."""

    gap: int = 200
    stagger: bool = True

    def __post_init__(self) -> None:
        if self.gap < 1:
            raise ValueError(f"gap {self.gap} must be at least 1")

    def shift(self, key: int) -> int:
        """By how many steps the renewals of the matrix of ``key`` come earlier than without stagger."""
        return key % self.gap if self.stagger else 0

    def epoch(self, step: int, key: int) -> int:
        """Renewals before this step's own basis: 0 for the first one."""
        return (step - 1 + self.shift(key)) // self.gap

    def due(self, step: int, key: int) -> bool:
        return self.since(step, key) == 1

    def since(self, step: int, key: int) -> int:
        """Steps with this step's basis, this one included: 1 in the step that renews it."""
        passed = step - 1 + self.shift(key)
        return step if passed < self.gap else passed % self.gap + 1


REFRESH = Refresh()
REMEMBERED = 1 << 20
"""Elements of random bases that a projector keeps to spare making them again: 4 MiB, enough for small models, whose steps it halves."""


class Projector(Protocol):
    """Finds the basis. Immutable, as methods are."""

    @property
    def rank(self) -> int: ...

    @property
    def refresh(self) -> Refresh: ...

    def side(self, shape: tuple[int, int]) -> Side: ...

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]: ...

    def basis(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        """The basis for this step [n, r] or [i, r], renewed if due; a stored one is written in place."""
        ...


def short_side(shape: tuple[int, int]) -> Side:
    """GaLore's ``std``: the shorter dimension is compressed, a square matrix from the right."""
    return "right" if shape[0] >= shape[1] else "left"


def usable_rank(rank: int, shape: tuple[int, int]) -> int:
    """No more directions than the matrix has. Raises ValueError below 1."""
    if rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")
    return min(rank, *shape)


def coordinates_spec(shape: tuple[int, int], side: Side, columns: int, codec: Literal["moment", "variance", "exact"]) -> StateSpec:
    """Of a state that lies as the coordinates do: [long side, columns]."""
    return StateSpec((shape[0], columns), "rows", codec=codec) if side == "right" else StateSpec((shape[1], columns), "chunk", codec=codec)


def project(gradient_in: Tensor, basis: Tensor, side: Side) -> Steps:
    """Coordinates: this rank's rows of G V [m, r], or its chunk of Gᵀ U [n, r]."""
    if side == "right":
        return gradient_in @ basis
    return (yield SumRows(gradient_in.T @ basis))


def lift(coordinates: Tensor, basis: Tensor, side: Side, columns: int) -> Steps:
    """Coordinates as ``project`` returns them -> this rank's rows [i, n] of the whole space."""
    if side == "right":
        return coordinates @ basis.T
    whole_nr = yield GatherRows(coordinates, columns)
    return basis @ whole_nr.T


@dataclass(frozen=True)
class SingularProjector:
    """The leading singular vectors of the gradient (GaLore, arXiv 2403.03507, section 3 and 4.1, where they come from a full SVD).

    ``how="exact"``: eigenvectors of the Gram matrix of the shorter side in float64. Their error is that of a float32 SVD or less,
    since what float64 squares away lies below float32. Tall matrices send Gram matrices [n, n], wide ones are gathered.

    ``how="subspace"``: block power iteration (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1; shifted as in Tropp et al. 2017,
    algorithm 3), warm from the last basis plus ``oversample`` random columns. No rank
    sees the whole matrix, all factorisations are of [r, r] matrices in float64. Directions in which the gradient vanishes keep their
    old basis vectors, so that they too are the same on every mesh.

    Signs are chosen by the previous basis (at first by fixed random vectors), singular vectors being free up to them.
    """

    rank: int
    refresh: Refresh = REFRESH
    how: Literal["exact", "subspace"] = "subspace"
    passes: int = 1
    """Of power iteration in a later refresh; the first, which starts from nothing, makes two more."""
    oversample: int = 8
    precise: bool = False
    """Take the products of the power iteration in float64 too. In float32 their rounding, a part of the largest singular value, turns the
    vectors of small ones by 1e-6 and more between meshes; in float64 it does not, for about twice the time of a refresh on CPU."""
    always_right: bool = False
    """Compress the columns of wide matrices too: no communication and smaller states, but fewer directions captured."""
    shard_basis: bool = False
    """Deal the right basis [n, r] to ranks and gather it in each step, rather than keep it whole on all."""

    def side(self, shape: tuple[int, int]) -> Side:
        return "right" if self.always_right else short_side(shape)

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        rank = usable_rank(self.rank, shape)
        if self.side(shape) == "left":
            return {"basis": StateSpec((shape[0], rank), "rows")}
        return {"basis": StateSpec((shape[1], rank), "chunk" if self.shard_basis else "whole")}

    def basis(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        stored, columns = states["basis"], gradient_in.shape[1]
        side = self.side((rows.total, columns))
        dealt = side == "right" and self.shard_basis
        basis = (yield GatherRows(stored, columns)) if dealt else stored
        if not self.refresh.due(step, key):
            return basis
        first, total = (0, columns) if side == "right" else (rows.first, rows.total)
        epoch = self.refresh.epoch(step, key)
        if step == 1:
            basis = gaussian_rows(key, epoch, first, len(basis), basis.shape[1], basis.device)
        if self.how == "exact":
            new = yield from _exact(gradient_in, basis, side, rows)
        else:
            more = min(self.oversample, total - basis.shape[1])
            extra = gaussian_rows(key, ~epoch, first, len(basis), more, basis.device)
            passes = self.passes + (2 if step == 1 else 0)
            used = gradient_in.double() if self.precise else gradient_in
            start = yield from (_orthonormal(torch.cat((basis, extra), dim=1), side) if step == 1 else _widened(basis, extra, side))
            new = yield from _subspace(used, start, basis.shape[1], side, passes)
        stored.copy_(new[Rows.chunk(columns, rows.rank, rows.ranks).slice] if dealt else new)
        return new


@dataclass(frozen=True)
class GaussianProjector:
    """Independent N(0, 1/r), so that lengths are kept on average (Johnson-Lindenstrauss; APOLLO, arXiv 2412.05270, section 4.2). A
    function of (key, epoch, element): made by each rank for its own rows, no state, nothing sent. Small ones are remembered until the
    next epoch, ``REMEMBERED`` elements in all; others are made anew in each step."""

    rank: int
    refresh: Refresh = REFRESH
    memory: dict[Any, tuple[Any, Tensor]] = field(default_factory=dict, compare=False, repr=False)
    """(key, place) -> (epoch, basis)"""

    def side(self, shape: tuple[int, int]) -> Side:
        return short_side(shape)

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        usable_rank(self.rank, shape)
        return {}

    def basis(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        shape = (rows.total, gradient_in.shape[1])
        first, count = (0, shape[1]) if self.side(shape) == "right" else (rows.first, rows.count)
        return self.rows_of(shape, first, count, step, key, gradient_in.device)
        yield  # pyright: ignore[reportUnreachable]  # a generator without requests

    def rows_of(self, shape: tuple[int, int], first: int, count: int, step: int, key: int, device: torch.device) -> Tensor:
        """Rows ``first`` to ``first + count`` of the basis of a matrix of ``shape``; not to be written to."""
        rank, epoch = usable_rank(self.rank, shape), self.refresh.epoch(step, key)
        place = (key, first, count, rank, device)
        known = self.memory.get(place)
        if known is not None and known[0] == epoch:
            return known[1]
        made = gaussian_rows(key, epoch, first, count, rank, device).mul_(rank**-0.5)
        taken = sum(basis.numel() for _, basis in self.memory.values()) if known is None else 0
        if known is not None or taken + made.numel() <= REMEMBERED:
            self.memory[place] = (epoch, made)
        return made


def _exact(gradient_in: Tensor, old: Tensor, side: Side, rows: Rows) -> Steps:
    if side == "right":
        precise = gradient_in.double()
        gram = yield Sum(precise.T @ precise)
        new = _leading(gram, old.shape[1])
        overlap = (old.double() * new).sum(dim=0)
    else:
        precise = (yield GatherRows(gradient_in, rows.total)).double()
        new = _leading(precise @ precise.T, old.shape[1])[rows.slice]
        overlap = yield Sum((old.double() * new).sum(dim=0))
    return (new * _signs(overlap)).float()


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors [d, rank] of the largest eigenvalues, largest first."""
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)


def _signs(overlap: Tensor) -> Tensor:
    return torch.where(overlap < 0, -1.0, 1.0).to(overlap.dtype)


def _orthonormal(block: Tensor, side: Side) -> Steps:
    """The block's span [d, k], in float64; d the short side (of the left: this rank's rows)."""
    block = block.double()
    gram = block.T @ block
    gram = (yield Sum(gram)) if side == "left" else gram
    return _divided(block, torch.linalg.cholesky(gram))


def _widened(basis: Tensor, extra: Tensor, side: Side) -> Steps:
    """``basis``, which is orthonormal but for float32's rounding, and what of ``extra`` is orthogonal to it, as ``_orthonormal``."""
    basis, extra = basis.double(), extra.double()
    small = torch.cat((basis, extra), dim=1).T @ extra
    small = (yield Sum(small)) if side == "left" else small
    inside, gram = small.split((basis.shape[1], extra.shape[1]))
    factor = torch.linalg.cholesky(gram - inside.T @ inside)
    return torch.cat((basis, _divided(extra - basis @ inside, factor)), dim=1)


def _subspace(gradient_in: Tensor, start: Tensor, rank: int, side: Side, passes: int) -> Steps:
    """Orthonormal ``start`` [d, k] -> orthonormal [d, rank], leading directions first."""
    block = start.to(gradient_in.dtype)
    for index in range(passes):
        block = yield from _pass(gradient_in, block, rank if index == passes - 1 else block.shape[1], side == "left")
    return block.float()


_SHIFT = 1e-10
"""Of a Gram matrix, as a part of it. Its root, 1e-5, is above float32's rounding and below what matters to captured energy."""
_SHIFTS = 10
"""Tries at most: the last shift is far above the matrix itself, so it has a factor whatever rounding left."""


def _pass(gradient_in: Tensor, block: Tensor, keep: int, dealt: bool) -> Steps:
    """One power iteration, B = Gᵀ orth(G block) (left: G orth(Gᵀ block)), and the leading ``keep`` left singular vectors of B, by the
    eigenvectors of BᵀB. Orthonormal factors between the products keep small singular values apart from the rounding of large ones."""
    outer, inner = (gradient_in, gradient_in.T) if dealt else (gradient_in.T, gradient_in)
    image = inner @ block
    image = ((yield Sum(image)) if dealt else image).double()
    gram = image.T @ image
    factor, shift = _shifted_factor(gram if dealt else (yield Sum(gram)))
    half = outer @ _divided(image, factor).to(gradient_in.dtype)
    half = (half if dealt else (yield Sum(half))).double() + _divided(block.double() * shift, factor)
    gram, overlap = half.T @ half, None
    if dealt:
        gram, overlap = (yield Sum(torch.cat((gram, block.double().T @ half)))).chunk(2)
    values, vectors = torch.linalg.eigh(gram)
    scaled = (vectors * values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt())[:, -keep:].flip(1)
    new = half @ scaled
    signs = (new * block[:, :keep]).sum(dim=0) if overlap is None else (overlap @ scaled).diagonal()
    return new.mul_(_signs(signs)).to(gradient_in.dtype)


def _shifted_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of ``gram`` + diag(shift), and the shift [k]: larger should rounding have left ``gram`` indefinite. It falls from
    column to column, so that where the gradient vanishes the old basis has an order too and is kept."""
    size = gram.norm()
    grades = torch.linspace(2, 1, len(gram), dtype=gram.dtype, device=gram.device)
    shift = torch.where(size > 0, size * _SHIFT, torch.ones_like(size)) * grades
    for _ in range(_SHIFTS):
        factor, failed = torch.linalg.cholesky_ex(gram + shift.diag())
        if not bool(failed) or not bool(torch.isfinite(size)):
            break
        shift = shift * 100
    return factor, shift


def _divided(block: Tensor, factor: Tensor) -> Tensor:
    """block · factor⁻ᵀ."""
    return torch.linalg.solve_triangular(factor, block.T, upper=False).T
