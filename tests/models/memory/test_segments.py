"""Segments of a token range: every token in one place, writings counted once, whatever the cuts; what cannot be split is refused."""

from itertools import pairwise

import pytest
import torch

from models.batch import Bounds
from models.memory.segments import plan_segments
from models.memory.sequential import in_flight
from tests.models.memory.conformance_cases import DOCUMENTS, T
from trainer.config import RunConfig

CUTS = [(0, T), (0, 5, T), (0, 1, 8, 9, 16, 24, 33, T), (0, 16, 32, T)]


def config(model, **parallel):
    """A run's settings."""
    return RunConfig.model_validate({"model": model, "parallel": parallel})


def places(bounds, span, size, lead=0):
    """The plan of a range, and the numbers of the tokens that it dealt, -1 for filling."""
    plan = plan_segments(bounds, span, size, torch.device("cpu"), lead)
    numbers = torch.arange(span[0] - plan.before, span[1]).expand(len(bounds.documents), -1).unsqueeze(-1)
    dealt = plan.deal(numbers)
    return plan, dealt.squeeze(-1).masked_fill(~plan.real_BNc, -1), plan.collect(dealt).squeeze(-1)


@pytest.mark.parametrize("size", [1, 3, 8, 64])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_cut_finds_the_same_segments(size, cuts, packed):
    bounds = Bounds(T, ((0, T),), DOCUMENTS if packed else ((0,), (0,)))
    written = [[] for _ in bounds.documents]
    for span in pairwise(cuts):
        plan, dealt, back = places(bounds, span, size)
        assert torch.equal(back, torch.arange(*span).expand_as(back))
        for row, (tokens, whole, fresh) in enumerate(zip(dealt, plan.whole_BN, plan.fresh_BN, strict=True)):
            written[row] += [(seg[seg >= 0].tolist(), bool(new)) for seg, end, new in zip(tokens, whole, fresh, strict=True) if end]
    for row, documents in enumerate(bounds.documents):
        ends = [*documents[1:], T]
        want = [
            (list(range(a, min(a + size, end))), a == start > 0)
            for start, end in zip(documents, ends, strict=True)
            for a in range(start, end, size)
        ]
        assert written[row] == want


def test_blocks_before_are_those_of_the_document():
    bounds = Bounds(T, ((0, T),), DOCUMENTS)
    plan, dealt, back = places(bounds, (24, T), 4, lead=2)
    assert plan.lead == 2 and not plan.whole_BN[:, :2].any()
    assert dealt[0, :4].tolist() == [[16, 17, 18, 19], [20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30, 31]]  # document 16 to 33
    assert dealt[1, :3].tolist() == [[-1] * 4, [-1] * 4, [22, 23, 24, 25]]  # document 22 on: what lies before is another's
    assert torch.equal(back, torch.arange(24, T).expand_as(back))


def test_a_cut_at_the_end_of_a_segment_repeats_nothing():
    bounds = Bounds(64, ((0, 64),), ((0,), (0,)))
    plan = plan_segments(bounds, (16, 64), 8, torch.device("cpu"))
    assert plan.before == 0 and plan.index_BNc is None and plan.at_BT is None


@pytest.mark.parametrize("kind", ["slots", "fam"])
def test_a_state_that_goes_from_rank_to_rank_needs_neighbours(kind):
    model = {"layers": ["memory", "full"], "memory": {"kind": kind}}
    assert config(model, cp=2).layout == "contiguous"
    with pytest.raises(ValueError, match=f"parallel.layout zigzag: the states of model.memory.kind {kind} .*parallel.layout=contiguous"):
        config(model, cp=2, layout="zigzag")


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"memory.head_dim 5 is odd; the rotary embedding of memory.kind infini needs an even size"):
        config({"memory": {"kind": "infini", "head_dim": 5}})
    with pytest.raises(ValueError, match=r"top_k 5 is larger than memory.mom.n_memories 4"):
        config({"memory": {"kind": "mom", "mom": {"top_k": 5}}})
    with pytest.raises(ValueError, match=r"memory.conv_kernel is not read by memory.kind slots"):
        config({"memory": {"kind": "slots", "conv_kernel": 2}})


def test_rows_of_a_plan_are_the_plan_of_these_rows():
    bounds = Bounds(41, ((0, 41),), ((0, 1, 7, 8, 16, 33), (0, 20, 21, 22), (0, 5)))
    plan = plan_segments(bounds, (9, 33), 8, torch.device("cpu"))
    x = torch.randn(3, plan.before + 24, 2)
    for first, end in in_flight(3, 2):
        rows = plan.of_rows(first, end)
        assert torch.equal(rows.deal(x[first:end]), plan.deal(x)[first:end])
        assert torch.equal(rows.collect(plan.deal(x)[first:end]), plan.collect(plan.deal(x))[first:end])
        for name in ("fresh_BN", "whole_BN", "real_BNc", "start_BN", "place_BN"):
            assert torch.equal(getattr(rows, name), getattr(plan, name)[first:end])


@pytest.mark.parametrize(("rows", "ranks"), [(1, 4), (3, 2), (7, 2), (8, 3), (100, 4)])
def test_every_row_goes_once_and_groups_are_even(rows, ranks):
    groups = in_flight(rows, ranks)
    assert [row for first, end in groups for row in range(first, end)] == list(range(rows))
    sizes = [end - first for first, end in groups]
    assert len(groups) == min(rows, 2 * ranks) and max(sizes) - min(sizes) <= 1
