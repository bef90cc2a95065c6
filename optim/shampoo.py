"""4-bit Shampoo: the gradient, preconditioned from both sides by inverse fourth roots that are kept in four bits, then Adam."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from optim.codec_eigen4 import EIGEN4
from optim.codecs import LEAST_ELEMENTS, Codec, codec_named
from optim.methods import Dealt, Job, OnOwner, Rows, StateSpec, Steps, Sum
from optim.projectors import Refresh
from optim.rules import TORCH_ADAM, Adam

TINY = torch.finfo(torch.float32).tiny
Sides = tuple[Literal["left", "right"], ...]
SIDES: Sides = ("left", "right")
SMALL = 150
"""Order of a matrix whose products take about as long as a renewal's other operations."""


@dataclass(frozen=True)
class Shampoo:
    """4-bit Shampoo (arXiv 2405.18144, algorithms 1 to 3; Shampoo itself: 1802.09568), for each block G of at most ``order`` rows and
    columns. Q and D store in four bits and read; V are eigenvectors, λ eigenvalues, L = V diag(λ) Vᵀ, at first ε1 with V = 1:

        every ``statistics_gap`` steps (T₁):  V ← 1.5 D(V) - 0.5 D(V) D(V)ᵀ D(V) (Björck, once),  A = βV diag(λ) Vᵀ + (1-β) G Gᵀ
            V ← the orthogonal factor of A V,  λ ← diag(Vᵀ A V),  kept as Q(V), λ;  the same for R and Gᵀ G
        every ``root_gap`` steps (T₂):  four times Björck,  L̂ = V (diag(λ) + max(λ) ε)^(-1/4) Vᵀ,  kept as its diagonal and Q of the others
        Ĝ = L̂ G R̂ (1 before the first root),  G̃ = Ĝ ‖G‖ / ‖Ĝ‖ (norms of the whole matrix),  update = Adam of G̃

    States lie by rows as the matrix does: row k of a block's V and L̂ with row k of the block, of R with its column. So every rank keeps
    its share; a block's owner, which preconditions and renews, gets the codes with the gradient. Renewal is in float64. Eigenvector
    matrices of fewer than ``least`` elements stay float32. Before the first root there are no requests, then one for the owners and a
    sum. ``stagger``: the first renewals are delayed, by up to ``statistics_gap`` - 1 steps, so that each matrix has its own, and roots are
    made of the statistics some half of ``statistics_gap`` steps after those, which is about as much work again.
    """

    order: int = 1200
    statistics_gap: int = 100
    root_gap: int = 500
    decay: float = 0.95
    """β"""
    ridge: float = 1e-6
    """ε"""
    rule: Adam = TORCH_ADAM
    stagger: bool = True
    least: int = LEAST_ELEMENTS

    def __post_init__(self) -> None:
        if self.order < 1 or self.statistics_gap < 1 or self.root_gap < 1:
            raise ValueError(f"order {self.order}, statistics_gap {self.statistics_gap} and root_gap {self.root_gap} must be at least 1")
        if self.root_gap % self.statistics_gap:
            raise ValueError(f"root_gap {self.root_gap} must be a multiple of statistics_gap {self.statistics_gap}")

    @property
    def gap(self) -> int:
        """See ``Method``."""
        return self.statistics_gap

    @property
    def late(self) -> int:
        """Steps from statistics to the roots that are made of them."""
        return min(self.statistics_gap // 2 + 1, self.statistics_gap - 1) if self.stagger else 0

    def renewal_cost(self, shape: tuple[int, int]) -> float:
        """Of a renewal, in products of order-p matrices; by it the steps between renewals are dealt out (``Lane.take_turn``)."""
        sizes = [[stop - start for start, stop in blocks_of(span, self.order)] for span in shape]
        return float(sum(p**3 + q**3 + SMALL**3 for p in sizes[0] for q in sizes[1]))

    def states(self, shape: tuple[int, int]) -> Mapping[str, StateSpec]:
        found = {"exp_avg": StateSpec(shape, "rows", codec="moment"), "exp_avg_sq": StateSpec(shape, "rows", codec="variance")}
        for name, span, across, placement in (("left", *shape, "rows"), ("right", *shape[::-1], "chunk")):
            blocks, order = len(blocks_of(across, self.order)), blocks_of(span, self.order)[0][1]
            for what in ("vectors", "roots"):
                for part, (part_shape, dtype) in self._codec(order).parts((order, order)).items():
                    found[f"{name}_{what}.{part}"] = StateSpec((span, blocks, part_shape[1]), placement, dtype)  # pyright: ignore[reportArgumentType]
            for what in ("values", "diagonal"):
                found[f"{name}_{what}"] = StateSpec((span, blocks), placement)  # pyright: ignore[reportArgumentType]
        return found

    def _codec(self, order: int) -> Codec:
        return EIGEN4 if order * order >= self.least else codec_named("fp32")

    def step(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, step: int, key: int) -> Steps:
        since = step - (Refresh(self.statistics_gap).shift(key) if self.stagger else 0)
        direction = gradient_in
        work = self._work((rows.total, gradient_in.shape[1]), since)
        if work.renew or work.preconditions:
            jobs = list(self._blocks(gradient_in, states, rows, work))
            answers = yield OnOwner(tuple(block.job() for block in jobs))
            preconditioned = torch.empty_like(gradient_in) if work.preconditions else None
            for block, answer in zip(jobs, answers, strict=True):
                block.take(answer, preconditioned)
            if preconditioned is not None:
                squares = yield Sum(torch.stack([part.square().sum() for part in (gradient_in, preconditioned)]))
                norm, other = squares.sqrt().unbind()
                # Roots of a schedule that a former release kept may still be zeros.
                direction = torch.where(other > 0, preconditioned.mul_(norm / other.clamp(min=TINY)), gradient_in)
        return self.rule.ratio(direction, states, step).mul_(self.rule.correction(step))

    def _work(self, shape: tuple[int, int], since: int) -> Work:
        """That is due in step ``since`` of a matrix's own count."""
        for_roots = since - self.late
        renew = since >= self.statistics_gap and since % self.statistics_gap == 0
        roots = for_roots >= self.root_gap and for_roots % self.root_gap == 0
        codecs = tuple(self._codec(blocks_of(span, self.order)[0][1]) for span in shape)
        return Work(codecs, self.decay, self.ridge, renew, roots, since == self.statistics_gap, for_roots > self.root_gap)

    def _blocks(self, gradient_in: Tensor, states: dict[str, Tensor], rows: Rows, work: Work) -> Iterator[_Block]:
        shape = (rows.total, gradient_in.shape[1])
        columns = Rows.chunk(shape[1], rows.rank, rows.ranks)
        for i, (top, bottom) in enumerate(blocks_of(shape[0], self.order)):
            for j, (left, right) in enumerate(blocks_of(shape[1], self.order)):
                mine = {"left": (rows.within(top, bottom), j), "right": (columns.within(left, right), i)}
                counts = (rows.counts(top, bottom), columns.counts(left, right))
                yield _Block(work, gradient_in[mine["left"][0], left:right], states, mine, counts, (mine["left"][0], slice(left, right)))


def blocks_of(span: int, order: int) -> list[tuple[int, int]]:
    """(start, stop) of equal parts of at most ``order``; the last may be a little shorter."""
    size = -(-span // -(-span // order))
    return [(start, min(start + size, span)) for start in range(0, span, size)]


@dataclass(frozen=True)
class Work:
    """What the owner does with blocks [B, p, q]; what it is given and returns, in order, is ``_Block``'s to know."""

    codecs: tuple[Codec, ...]
    """Of the left and the right matrices."""
    decay: float
    ridge: float
    renew: bool
    """Statistics; their vectors and values are given and returned."""
    roots: bool
    """Inverse roots, of statistics that are given, renewed or not; they are returned."""
    first: bool
    """No statistics yet."""
    given: bool
    """Roots are given; they are used unless they are renewed."""

    @property
    def preconditions(self) -> bool:
        """There are roots."""
        return self.given or self.roots

    def __call__(self, gradient_Bpq: Tensor, *others: Tensor) -> Sequence[Tensor]:
        given, made = iter(others), []
        precondition = []
        for side, codec in zip(SIDES, self.codecs, strict=True):
            order = gradient_Bpq.shape[1 if side == "left" else 2]
            names = codec.parts((order, order))
            if self.renew or self.roots:
                packed, values = {name: next(given) for name in names}, next(given)
                if self.renew:
                    vectors, new = self._statistics(gradient_Bpq, side, codec, packed, values)
                    packed, values = _packed(codec, vectors.mT.float()), new.float()
                    made += [*packed.values(), values]
                if self.roots:
                    root = self._root(_unpacked(codec, packed, order), values.double())
                    diagonal = root.diagonal(dim1=1, dim2=2).float()
                    parts = _packed(codec, (root - torch.diag_embed(root.diagonal(dim1=1, dim2=2))).float())
                    made += [*parts.values(), diagonal]
                    precondition.append((codec, parts, diagonal))
            if self.given and not self.roots:
                precondition.append((codec, {name: next(given) for name in names}, next(given)))
        if not precondition:
            return made
        (left, left_diagonal), (right, right_diagonal) = (
            (_unpacked(codec, parts, diagonal.shape[1]), diagonal) for codec, parts, diagonal in precondition
        )
        left.diagonal(dim1=1, dim2=2).add_(left_diagonal)
        right.diagonal(dim1=1, dim2=2).add_(right_diagonal)
        return [left @ gradient_Bpq @ right, *made]

    def _statistics(self, gradient: Tensor, side: str, codec: Codec, parts: dict[str, Tensor], values_Bp: Tensor) -> tuple[Tensor, Tensor]:
        """Renewed eigenvectors (columns) [B, p, p] and values [B, p], float64."""
        order = values_Bp.shape[1]
        used = gradient.double() if side == "left" else gradient.double().mT
        if self.first:
            vectors = torch.eye(order, dtype=torch.float64, device=gradient.device).expand(len(gradient), -1, -1)
            values = torch.full_like(values_Bp, self.ridge, dtype=torch.float64)
        else:
            vectors, values = _bjorck(_unpacked(codec, parts, order).double().mT, 1), values_Bp.double()
        statistic = self.decay * (vectors * values[:, None, :]) @ vectors.mT + (1 - self.decay) * used @ used.mT
        new = torch.linalg.qr(statistic @ vectors).Q
        return new, (new * (statistic @ new)).sum(dim=1)

    def _root(self, rows_Bpp: Tensor, values_Bp: Tensor) -> Tensor:
        """Of eigenvectors as they were stored."""
        vectors = _bjorck(rows_Bpp.double().mT, 4)
        values = values_Bp.clamp(min=0)
        powers = (values + values.amax(dim=1, keepdim=True) * self.ridge).clamp(min=TINY) ** -0.25
        return (vectors * powers[:, None, :]) @ vectors.mT


def _bjorck(vectors: Tensor, times: int) -> Tensor:
    """Nearer to orthogonal (Björck and Bowie 1971)."""
    for _ in range(times):
        vectors = 1.5 * vectors - 0.5 * vectors @ (vectors.mT @ vectors)
    return vectors


def _packed(codec: Codec, matrix_Bpp: Tensor) -> dict[str, Tensor]:
    batch, order, _ = matrix_Bpp.shape
    flat = matrix_Bpp.reshape(batch * order, order)
    parts = {name: flat.new_zeros(shape, dtype=dtype) for name, (shape, dtype) in codec.parts(tuple(flat.shape)).items()}
    codec.encode_(flat, parts)
    return {name: part.view(batch, order, -1) for name, part in parts.items()}


def _unpacked(codec: Codec, parts: Mapping[str, Tensor], order: int) -> Tensor:
    """[B, p, p], of its own."""
    return codec.decode({name: part.reshape(-1, part.shape[-1]) for name, part in parts.items()}, (_batch(parts) * order, order)).view(
        -1, order, order
    )


def _batch(parts: Mapping[str, Tensor]) -> int:
    return next(iter(parts.values())).shape[0]


@dataclass
class _Block:
    """One block of a matrix: which states go to its owner and come back."""

    work: Work
    gradient: Tensor
    states: dict[str, Tensor]
    mine: dict[str, tuple[slice, int]]
    """Of the states of a side: this rank's rows of the block, and which block across."""
    counts: tuple[tuple[int, ...], tuple[int, ...]]
    place: tuple[slice, slice]
    """Of the block in this rank's rows."""
    inputs: list[tuple[Tensor, Dealt]] = field(init=False)
    outputs: list[tuple[Tensor, Dealt]] = field(init=False)
    """States that are written."""

    def __post_init__(self) -> None:
        work, self.inputs, self.outputs = self.work, [], []
        for index, side in enumerate(SIDES):
            statistics = self._states_of(index, side, "vectors", "values")
            roots = self._states_of(index, side, "roots", "diagonal")
            if work.renew or work.roots:
                self.inputs += statistics
            if work.renew:
                self.outputs += statistics
            if work.roots:
                self.outputs += roots
            if work.given and not work.roots:
                self.inputs += roots

    def _states_of(self, index: int, side: Literal["left", "right"], matrix: str, vector: str) -> list[tuple[Tensor, Dealt]]:
        rows, across = self.mine[side]
        order = sum(self.counts[index])
        found = []
        for part, (shape, dtype) in self.work.codecs[index].parts((order, order)).items():
            local = self.states[f"{side}_{matrix}.{part}"][rows, across, : shape[1]]
            found.append((local, Dealt(self.counts[index], (shape[1],), dtype)))
        return [*found, (self.states[f"{side}_{vector}"][rows, across], Dealt(self.counts[index], ()))]

    def job(self) -> Job:
        lie = Dealt(self.counts[0], (self.gradient.shape[1],))
        p, q = lie.shape
        # Products of an order-p matrix with p x q; a renewal is some ten products of p x p in float64, a root some fifteen.
        cost = p * q * (p + q) + (p**3 + q**3) * (20 * self.work.renew + 30 * self.work.roots)
        outputs = ([lie] if self.work.preconditions else []) + [dealt for _, dealt in self.outputs]
        inputs = ((self.gradient, lie), *self.inputs)
        return Job(self.work, tuple(t for t, _ in inputs), tuple(d for _, d in inputs), tuple(outputs), float(cost))

    def take(self, answer: Sequence[Tensor], preconditioned: Tensor | None) -> None:
        """Write what came back."""
        rest = list(answer)
        if self.work.preconditions:
            assert preconditioned is not None
            preconditioned[self.place] = rest.pop(0)
        for (state, _), new in zip(self.outputs, rest, strict=True):
            state.copy_(new)
