"""Which blocks have to wait for which on another stream, against a look at every byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_mgmt.arena_streams import Tenant, Wait, needed_waits

STREAMS = (0, 7, 8)


@st.composite
def tenants(draw: st.DrawFn) -> list[Tenant]:
    """Blocks on ten units of address, put where nothing lives: time is counted in requests, as in a plan."""
    found: list[Tenant] = []
    for lower in range(draw(st.integers(1, 14))):
        offset, size, upper = draw(st.integers(0, 9)), draw(st.integers(1, 4)), lower + draw(st.integers(1, 5))
        new = Tenant(lower, upper, offset, size, draw(st.sampled_from(STREAMS)))
        if not any(t.upper > lower and t.offset < offset + size and offset < t.offset + t.size for t in found):
            found.append(new)
    return found


def by_byte(blocks: list[Tenant]) -> set[Wait]:
    """For every byte of every block the block that had it last; ties in time cannot be, as they would share the byte."""
    waits = set()
    for number, block in enumerate(blocks):
        for byte in range(block.offset, block.offset + block.size):
            before = [
                (other.upper, other.lower, i)
                for i, other in enumerate(blocks)
                if other.upper <= block.lower and other.offset <= byte < other.offset + other.size
            ]
            if before and blocks[max(before)[2]].stream != block.stream:
                waits.add(Wait(number, max(before)[2]))
    return waits


@given(tenants())
@settings(max_examples=300, deadline=None)
def test_waits_are_exactly_for_the_last_block_of_each_byte_on_another_stream(blocks: list[Tenant]) -> None:
    assert set(needed_waits(blocks)) == by_byte(blocks)


def test_blocks_that_share_bytes_while_they_live_are_refused() -> None:
    with pytest.raises(ValueError, match="0 and 1 share bytes"):
        needed_waits([Tenant(0, 3, 0, 64, 0), Tenant(2, 4, 0, 64, 7)])
    assert needed_waits([Tenant(0, 3, 0, 64, 0), Tenant(3, 4, 32, 64, 7)]) == [Wait(1, 0)]
    assert needed_waits([Tenant(0, 3, 0, 64, 0), Tenant(3, 4, 64, 64, 7)]) == []
