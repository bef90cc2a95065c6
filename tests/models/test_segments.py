"""Sequences cut into segments: every token once, counted from its document's start, wherever the sequence is cut."""

import pytest

from models.batch import Bounds
from models.segments import plan_segments

DOCUMENTS = ((0, 6, 7, 19), (0,))
T, SIZE = 23, 4


def cut(bounds: Bounds, before=(0, 0), whole=False):
    return plan_segments(bounds, SIZE, before, whole)


def row(steps, b):
    return [step.parts[b] for step in steps if step.parts[b].new]


def test_segments_are_counted_from_a_document_start():
    parts = row(cut(Bounds(T, ((0, T),), DOCUMENTS)), 0)
    assert [(p.start, p.end) for p in parts] == [(0, 4), (4, 6), (6, 7), (7, 11), (11, 15), (15, 19), (19, 23)]
    assert [p.begins for p in parts] == [False, False, True, True, False, False, True]
    assert all(p.closes for p in parts)
    unfinished = row(cut(Bounds(T, ((0, T),), DOCUMENTS)), 1)[-1]
    assert (unfinished.start, unfinished.end, unfinished.closes) == (20, 23, False)
    assert row(cut(Bounds(T, ((0, T),), DOCUMENTS), whole=True), 1)[-1].closes


@pytest.mark.parametrize("split", range(1, T))
def test_a_sequence_cut_anywhere_has_the_same_segments(split):
    """Borders of segments and beginnings of documents, of both halves together."""
    bounds = Bounds(T, ((0, T),), DOCUMENTS)
    first = cut(bounds.with_ranges(((0, split),)))
    waiting = [sum(p.length for p in row(first, b) if not p.closes) for b in (0, 1)]
    second = cut(bounds.with_ranges(((split, T),)), waiting)
    for b in (0, 1):
        whole, parts = row(cut(bounds), b), row(first, b) + row(second, b)
        assert [t for p in parts for t in range(p.start, p.end)] == list(range(T))
        unseen = set(DOCUMENTS[b])  # where one ends there, nobody reads what its last segment wrote
        assert {p.end for p in whole if p.closes} - unseen == {p.end for p in parts if p.closes} - unseen
        assert {p.start for p in whole if p.begins} == {p.start for p in parts if p.begins}
        assert all(p.length <= SIZE for p in parts)


def test_what_has_no_segments_is_refused():
    with pytest.raises(ValueError, match=r"parallel\.cp=1"):
        cut(Bounds(8, ((0, 2), (6, 8)), ((0,), (0,))))
    with pytest.raises(ValueError, match="prefix"):
        cut(Bounds(8, ((0, 8),), ((0,), (0,)), ((3,), (0,))))
