"""Work on whole matrices by one rank: who does what, and that rows come back as if every rank had done it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from optim.build import build_optimizer
from optim.methods import Dealt, Job, Rows
from optim.owners import done_by_owners, owners
from tests.distributed import run_on_kept_ranks as run_distributed
from tests.optim.test_driver import feed, make, sharded


def test_owners_are_balanced_by_cost() -> None:
    assert owners([1.0] * 8, 4) == [0, 1, 2, 3] * 2
    assert owners([1.0, 1.0, 4.0, 1.0, 1.0], 2) == [1, 1, 0, 1, 1]
    generator = torch.Generator().manual_seed(0)
    for ranks in (2, 3, 4):
        for _ in range(20):
            costs = torch.rand(7, generator=generator).tolist()
            load = [sum(cost for cost, owner in zip(costs, owners(costs, ranks), strict=True) if owner == rank) for rank in range(ranks)]
            best = min(
                max(sum(cost for cost, owner in zip(costs, deal, strict=True) if owner == rank) for rank in range(ranks))
                for deal in itertools.product(range(ranks), repeat=len(costs))
            )
            assert max(load) <= (4 / 3) * best + 1e-9


@dataclass(eq=False)
class Work:
    """Sums over rows, which need all of them, of two inputs; ``seen`` counts matrices."""

    seen: list[int]

    def __call__(self, matrix_Bmn: Tensor, codes_Bk: Tensor) -> Sequence[Tensor]:
        self.seen.append(len(matrix_Bmn))
        return matrix_Bmn - matrix_Bmn.mean(dim=1, keepdim=True), codes_Bk.flip(1)


def jobs_of_this_rank(ranks: int, rank: int, work: Work) -> list[Job]:
    """Matrices whose rows are dealt unevenly, with codes of one byte that are dealt otherwise."""
    jobs = []
    for index, (m, n, k) in enumerate(((7, 3, 5), (2, 6, 1), (7, 3, 5), (9, 1, 3))):
        generator = torch.Generator().manual_seed(index)
        matrix, codes = torch.randn(m, n, generator=generator), torch.randint(256, (k,), generator=generator, dtype=torch.uint8)
        rows, code_rows = Rows.chunk(m, rank, ranks), Rows.chunk(k, rank, ranks)
        dealt = (Dealt(rows.counts(), (n,)), Dealt(code_rows.counts(), (), torch.uint8))
        jobs.append(Job(work, (matrix[rows.slice], codes[code_rows.slice]), dealt, dealt, float(m * n)))
    return jobs


def on_ranks(ranks: int) -> tuple[list[list[Tensor]], list[int]]:
    work = Work([])
    return done_by_owners(jobs_of_this_rank(ranks, dist.get_rank(), work), dist.group.WORLD), work.seen


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_come_back_as_from_one_process(ranks: int) -> None:
    expected = done_by_owners(jobs_of_this_rank(1, 0, Work([])), None)
    results = run_distributed(on_ranks, ranks, ranks)
    for job, outputs in enumerate(expected):
        for place, output in enumerate(outputs):
            assert torch.equal(torch.cat([answers[job][place] for answers, _ in results]), output)
    assert sum(sum(seen) for _, seen in results) == 4, "every job is done once"
    assert max(sum(seen) for _, seen in results) == 4 // ranks


def test_work_that_returns_another_shape_is_refused() -> None:
    lie = Dealt((2,), (3,))
    with pytest.raises(ValueError, match=r"returned \[\(\(2, 2\), torch.float32\)\] where \[\(\(2, 3\)"):
        done_by_owners([Job(lambda matrix: (matrix[..., :2],), (torch.ones(2, 3),), (lie,), (lie,), 1.0)], None)


def test_rows_of_a_part() -> None:
    for ranks in (1, 2, 3, 5):
        dealt = [Rows.chunk(11, rank, ranks) for rank in range(ranks)]
        for start, stop in ((0, 11), (0, 4), (4, 8), (8, 11)):
            counts = dealt[0].counts(start, stop)
            assert sum(counts) == stop - start
            whole = torch.cat([torch.arange(rows.first, rows.first + rows.count)[rows.within(start, stop)] for rows in dealt])
            assert whole.tolist() == list(range(start, stop))
            for rows, count in zip(dealt, counts, strict=True):
                assert len(torch.arange(rows.count)[rows.within(start, stop)]) == count


def collectives(preset: str) -> dict[str, int]:
    model = sharded(2)
    settings: dict[str, Any] = {} if preset == "muon" else {"statistics_gap": 1, "root_gap": 1}
    optimizer = build_optimizer(model, preset=preset, **settings)
    feed(model, optimizer, 1)
    with CommDebugMode() as counted:
        feed(model, optimizer, 1, start=1)
    return {str(op): count for op, count in counted.get_comm_counts().items() if count}


@pytest.mark.parametrize(("preset", "messages"), [("muon", 2), ("shampoo_4bit", 3)])
def test_a_step_has_two_all_to_alls_for_all_matrices(preset: str, messages: int) -> None:
    """Two for the work of owners; shampoo's norms need a sum."""
    assert len([parameter for parameter in make().parameters() if parameter.ndim == 2]) > 3
    counts = run_distributed(collectives, 2, preset)[0]
    assert sum(counts.values()) == messages, counts
    assert sum(count for op, count in counts.items() if "all_to_all" in op or "alltoall" in op) == 2, counts
