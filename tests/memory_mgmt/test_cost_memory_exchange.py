"""What each exchange of memories costs by hand, and which one is taken where."""

from dataclasses import replace

import pytest

from memory_mgmt.cost_memory_exchange import MemoryProblem, choose_exchange, exchange_cost
from memory_mgmt.cost_rates import Topology, cpu_rates
from models.memory.exchange_shapes import ExchangeShapes
from parallel.state_blocks import column_blocks

LINK = replace(cpu_rates(2), link=1e9, link_latency=1e-5, network=1e8, network_latency=1e-4, shared=False, launch_seconds=1e-6)
DELTA = ExchangeShapes(8, 8, True, 64 * 64, 64 * 128, 128, 8 * 258, 8 * 128)
FAST = ExchangeShapes(8, 8, False, 0, 0, 1, 8 * 195, 8 * 64, per_chunk=8 * 2 * 32768, chunk=64)


def problem(shapes: ExchangeShapes = DELTA, ranks: int = 4, tokens: int = 4096, ranges: int = 1, per_node: int = 64) -> MemoryProblem:
    topology = Topology(min(ranks, per_node), ranks)
    return MemoryProblem(shapes, ranks, ranges, tokens, 1, 2, "bf16", topology, LINK, 6.0 * 512 * 8 * 258, 18.0 * 8 * 64 * 128)


@pytest.mark.parametrize("ranges", [1, 2])
def test_bytes_are_those_of_the_table(ranges: int) -> None:
    m, s = 4 * 8 * 64 * 64, 4 * 8 * 64 * 128
    gathered, ring, heads = (exchange_cost(problem(ranges=ranges), each) for each in ("states", "ring", "ulysses"))
    assert (gathered.forward_bytes, gathered.backward_bytes) == (ranges * (m + s), (ranges + 1) * s)
    assert (ring.forward_bytes, ring.backward_bytes) == (ranges * s, ranges * s)
    assert heads.forward_bytes == heads.backward_bytes == 4096 * 2 * 8 * (258 + 128)
    blocks = column_blocks(s, 128, 3 * ranges)
    assert ring.held == ranges * (m + s) + 2 * s // blocks
    assert gathered.held == 4 * ranges * m + ranges * s + 4 * max(ranges * (m + s), (ranges + 1) * s) > ring.held


def test_sums_of_fast_weights_are_counted_once_per_chunk_and_heads_share_their_states() -> None:
    there_and_back, sums = 4096 * 4 * 8 * (195 + 64), 4 * 8 * 2 * 32768
    reduced, heads = exchange_cost(problem(FAST), "states"), exchange_cost(problem(FAST), "ulysses")
    assert reduced.forward_bytes == there_and_back + 256 * sums
    assert heads.forward_bytes == there_and_back // 2
    assert reduced.held - 2 * 4096 * 4 * 8 * 195 == 4 * (heads.held - 2 * 4096 * 2 * 8 * 195) == 256 * sums
    with pytest.raises(ValueError, match="no columns"):
        exchange_cost(problem(FAST), "ring")


def test_each_exchange_wins_where_it_should() -> None:
    def chosen(*allowed: str, **settings: object) -> str:
        return choose_exchange(problem(**settings), allowed or ("states", "ring", "ulysses")).chosen.exchange  # type: ignore[arg-type]

    assert chosen(tokens=256) == "ulysses", "few tokens: cheaper than summaries"
    assert chosen(tokens=1 << 20, ranks=16, per_node=8) == "ring", "many tokens: one state, whatever their number"
    assert chosen("states", "ulysses", shapes=FAST) == "ulysses", "no sums per chunk"
    far = replace(problem(ranks=8), rates=replace(LINK, link_latency=1e-1))
    assert choose_exchange(far, ("states", "ring")).chosen.exchange == "states", "several blocks, each of which takes its time to begin"
    assert chosen("states") == "states"
    with pytest.raises(ValueError, match="allowed"):
        choose_exchange(problem(), ())


def test_heads_that_do_not_divide_wait_for_the_rank_with_most() -> None:
    even, uneven = (exchange_cost(problem(ranks=ranks, tokens=1 << 16), "ulysses").exposed for ranks in (4, 5))
    assert uneven > 1.2 * even


def test_reasons_name_every_exchange_and_why() -> None:
    lines = choose_exchange(problem(), ("states", "ring", "ulysses")).reasons
    assert lines[0].startswith("parallel.memory_exchange: ") and len(lines) == 5
    assert [line.split()[0] for line in lines[1:4]] == ["states", "ring", "ulysses"] and all("exposed" in line for line in lines[1:4])
