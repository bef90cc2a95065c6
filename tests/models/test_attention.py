"""The planner against a brute-force mask; tiled attention and the layer against dense float64 attention."""

from __future__ import annotations

import itertools

import pytest
import torch

from models import attention
from models.attention import Attention, LocalAttention, attention_reference
from models.attention_plan import DEFAULT_LIMITS, NATIVE_BAND_LIMITS, Pair, Tile, TileLimits, plan_rows, plan_tiles, sees
from models.batch import Bounds
from models.config import RopeConfig

TINY = TileLimits(block=3, keys_per_call=17, triangle=2, small=3, packed=7)
"""Limits at which a sequence of two dozen tokens already needs every kind of tile."""


def _covered(tile: Tile) -> list[tuple[int, int]]:
    """The (query, key) pairs that a tile computes, in tensor indices."""
    pairs = []
    for block, a, b in itertools.product(range(tile.count), range(tile.q_len), range(tile.k_len)):
        q, k = tile.q_start + block * tile.step + a, tile.k_start + block * tile.step + b
        if tile.kind == "packed":
            document = sum(s <= a for s in tile.starts)
            in_prefix = bool(tile.prefix_ends) and b < tile.prefix_ends[document - 1]
            shown = (
                document == sum(s <= b for s in tile.starts) and (b <= a or in_prefix) and (tile.high is None or abs(a - b) <= tile.high)
            )
        else:
            shown = {
                "none": True,
                "causal": b <= a,
                "band": tile.low <= b - a and (tile.high is None or b - a <= tile.high),
            }[tile.kind]
        if shown:
            pairs.append((q, k))
    return pairs


def _visible(q_range, k_range, starts, window, ends=()) -> set[tuple[int, int]]:
    document = [sum(s <= i for s in starts) for i in range(max(q_range[1], k_range[1]))]
    return {
        (i - q_range[0], j - k_range[0])
        for i in range(*q_range)
        for j in range(*k_range)
        if (j <= i or (ends and j < ends[document[j] - 1])) and document[i] == document[j] and (window is None or abs(i - j) < window)
    }


DOCUMENTS = [(0,), (0, 1), (0, 5), (0, 12), (0, 13, 21), (0, 3, 5, 6, 8, 9, 10, 14, 15), tuple(range(24)), (0, 2, 4, 18, 20, 22), (0, 23)]
WINDOWS = [None, 1, 2, 3, 5, 8, 13, 23, 24, 100]


@pytest.mark.parametrize(
    "limits", [TINY, DEFAULT_LIMITS, TINY._replace(block=None, small=1), NATIVE_BAND_LIMITS], ids=["tiny", "default", "unpacked", "native"]
)
def test_tiles_cover_every_visible_pair_once_and_nothing_else(limits: TileLimits) -> None:
    ranges = [((0, 24), (0, 24)), ((6, 18), (6, 18)), ((12, 24), (0, 12)), ((12, 24), (3, 9)), ((18, 24), (0, 18)), ((16, 17), (4, 16)),
              ((0, 12), (12, 24)), ((20, 24), (0, 3))]  # fmt: skip
    for (q_range, k_range), starts, window in itertools.product(ranges, DOCUMENTS, WINDOWS):
        tiles = plan_tiles(q_range, k_range, starts, window, limits)
        pairs = [pair for tile in tiles for pair in _covered(tile)]
        expected = _visible(q_range, k_range, starts, window)
        assert len(pairs) == len(set(pairs)) and set(pairs) == expected, (q_range, k_range, starts, window)
        assert sees(q_range, k_range, starts, window) == bool(tiles) == bool(expected)
        for tile in tiles:  # no call without work, no reach outside the tensors, own blocks complete
            assert _covered(tile) and tile.q_start + (tile.count - 1) * tile.step + tile.q_len <= q_range[1] - q_range[0]
            assert min(tile.q_start, tile.k_start) >= 0
            assert tile.k_start + (tile.count - 1) * tile.step + tile.k_len <= k_range[1] - k_range[0]
            assert tile.own == (q_range == k_range) and (tile.count == 1 or tile.step == tile.q_len)
        if q_range == k_range:
            queries = [t.q_start + b * t.step + a for t in tiles for b in range(t.count) for a in range(t.q_len)]
            assert sorted(queries) == list(range(q_range[1] - q_range[0]))


PREFIXES = [
    ((0,), (24,)),
    ((0,), (17,)),
    ((0, 5), (5, 24)),
    ((0, 12), (9, 20)),
    ((0, 13, 21), (3, 21, 23)),
    ((0, 3, 5, 9, 14), (3, 3, 8, 14, 15)),
]


@pytest.mark.parametrize("limits", [TINY, DEFAULT_LIMITS, NATIVE_BAND_LIMITS], ids=["tiny", "default", "native"])
def test_prefixes_are_covered_once_and_nothing_else(limits: TileLimits) -> None:
    ranges = [
        ((0, 24), (0, 24)),
        ((6, 18), (6, 18)),
        ((12, 24), (0, 12)),
        ((0, 12), (12, 24)),
        ((0, 6), (18, 24)),
        ((3, 9), (9, 20)),
        ((4, 5), (5, 6)),
    ]
    for (q_range, k_range), (starts, ends), window in itertools.product(ranges, PREFIXES, WINDOWS):
        tiles = plan_tiles(q_range, k_range, starts, window, limits, ends)
        pairs = [pair for tile in tiles for pair in _covered(tile)]
        expected = _visible(q_range, k_range, starts, window, ends)
        assert len(pairs) == len(set(pairs)) and set(pairs) == expected, (q_range, k_range, starts, ends, window)
        assert sees(q_range, k_range, starts, window, ends) == bool(tiles) == bool(expected)
        assert all(_covered(tile) for tile in tiles), "no call without work"
        if q_range == k_range:
            queries = [t.q_start + b * t.step + a for t in tiles if t.own for b in range(t.count) for a in range(t.q_len)]
            assert sorted(queries) == list(range(q_range[1] - q_range[0])), "blocks with a query's own token hold every query once"


@pytest.mark.parametrize("limits", [TINY, TileLimits()], ids=["tiny", "default"])
def test_zigzag_pairs_are_covered_in_local_indices(limits: TileLimits) -> None:
    for starts, window in itertools.product(DOCUMENTS, WINDOWS):
        ranges, offsets = ((4, 8), (16, 20)), (0, 4)
        pairs = [Pair(q, qo, k, ko) for q, qo in zip(ranges, offsets, strict=True) for k, ko in zip(ranges, offsets, strict=True)]
        plan = plan_rows([starts, starts], pairs, window, limits)
        assert len(plan) == 1 and (plan[0].first, plan[0].last) == (0, 2), "rows with equal documents share their calls"
        expected = [(a + p.q_offset, b + p.k_offset) for p in pairs for a, b in _visible(p.q_range, p.k_range, starts, window)]
        covered = [pair for tile in plan[0].tiles for pair in _covered(tile)]
        assert sorted(covered) == sorted(expected)
        own = [tile.own for tile in plan[0].tiles]
        assert own == sorted(own, reverse=True), "blocks with a query's own token come first"


def test_rows_with_different_documents_get_their_own_calls() -> None:
    plan = plan_rows([(0,), (0,), (0, 4), (0,)], [Pair((0, 8), 0, (0, 8), 0)], None)
    assert [(rows.first, rows.last, len(rows.tiles)) for rows in plan] == [(0, 2, 1), (2, 3, 1), (3, 4, 1)]


def test_number_of_calls_stays_small() -> None:
    whole = (0, 65536)
    assert len(plan_tiles(whole, whole, (0,), None)) == 1
    assert len(plan_tiles(whole, whole, (0, 20000, 40000), None)) == 3
    assert len(plan_tiles(whole, whole, tuple(range(0, 65536, 8)), None)) == 256, "tiny documents share blocks of 256"
    assert len(plan_tiles(whole, whole, (0,), 512)) < 30, "window blocks are stacked"
    assert len(plan_tiles(whole, whole, (0,), 512, NATIVE_BAND_LIMITS)) == 2
    zigzag = [Pair((0, 8), 0, (16, 24), 8), Pair((48, 56), 8, (0, 8), 0), Pair((48, 56), 8, (8, 16), 8)]
    assert sum(len(rows.tiles) for rows in plan_rows([(0,)], zigzag, None)) == 1, "adjacent rectangles become one"


def test_overlapping_ranges_and_empty_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        plan_tiles((4, 12), (0, 8), (0,), None)
    with pytest.raises(ValueError, match=r"model\.window is 0"):
        plan_tiles((0, 8), (0, 8), (0,), 0)


def _random(dtype: torch.dtype, batch: int, length: int, heads: tuple[int, int] = (4, 2), dim: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = [(batch, length, n, dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).transpose(1, 2) for s in shapes]


def _errors(dtype: torch.dtype, window: int | None, documents: list[tuple[int, ...]], length: int) -> list[float]:
    """Relative errors (2-norm) of out, dq, dk, dv against the dense float64 reference."""
    q, k, v, dout = _random(dtype, len(documents), length)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().clone().requires_grad_() for x in (q, k, v)]
    expected = attention_reference(exact[0], exact[1], exact[2], documents, window)
    expected.backward(dout.double())
    out = LocalAttention(window)(leaves[0], leaves[1], leaves[2], Bounds(length, ((0, length),), tuple(documents)))
    out.backward(dout)
    assert out.dtype == dtype and all(x.grad is not None and x.grad.dtype == dtype for x in leaves)
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
    # at least 10 (others are about 30 to 80): with window 1 the exact dq and dk are 0
    return [float(((a.double() - b).norm() / b.norm().clamp_min(10.0)).detach()) for a, b in pairs if a is not None and b is not None]


CASES = [
    (None, [(0,), (0,)]),
    (None, [(0, 30, 31, 60), (0,), (0,), (0, 5, 9, 12, 20, 90)]),
    (1, [(0, 40), (0,)]),
    (5, [(0,), (0,)]),
    (16, [(0,), (0, 3, 5, 50, 52), tuple(range(0, 96, 2))]),
    (40, [(0, 50)]),
    (200, [(0, 50)]),
]


@pytest.mark.parametrize("limits", [TINY, DEFAULT_LIMITS, NATIVE_BAND_LIMITS], ids=["tiny", "default", "native"])
@pytest.mark.parametrize(("window", "documents"), CASES)
def test_tiled_attention_equals_dense_float64(monkeypatch, window, documents, limits: TileLimits) -> None:
    monkeypatch.setattr(attention, "tile_limits", lambda q, window, call: limits)
    assert max(_errors(torch.float64, window, documents, 96)) < 1e-12
    assert max(_errors(torch.float32, window, documents, 96)) < 3e-6


def test_real_block_sizes_equal_dense_float64() -> None:
    documents = [(0, 130, 700, 702, 710, 800), (0,)]
    assert max(_errors(torch.float64, 100, documents, 1024)) < 1e-12
    assert max(_errors(torch.float64, None, documents, 1024)) < 1e-12


@pytest.mark.parametrize(("window", "documents"), CASES[1:5])
def test_bf16_is_as_good_as_one_kernel_call(monkeypatch, window, documents) -> None:
    monkeypatch.setattr(attention, "tile_limits", lambda q, window, call: TINY)
    single = _errors(torch.bfloat16, None, [(0,)], 96)
    tiled = _errors(torch.bfloat16, window, documents, 96)
    assert all(t < 1.3 * s for t, s in zip(tiled, single, strict=True)), (tiled, single)


def test_the_reference_is_softmax_attention() -> None:
    q, k, v, _ = _random(torch.float64, 1, 12, heads=(2, 2))
    assert torch.allclose(
        attention_reference(q, k, v, [(0,)], None), torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-14
    )
    split = attention_reference(q, k, v, [(0, 7)], None)
    alone = attention_reference(q[:, :, 7:], k[:, :, 7:], v[:, :, 7:], [(0,)], None)
    assert torch.allclose(split[:, :, 7:], alone, atol=1e-14)
    last = attention_reference(q[:, :, 9:], k[:, :, 9:], v[:, :, 9:], [(0,)], None)[:, :, -1]
    assert torch.allclose(attention_reference(q, k, v, [(0,)], 3)[:, :, -1], last, atol=1e-14)


def test_local_attention_refuses_a_shard() -> None:
    q, k, v, _ = _random(torch.float32, 1, 8)
    with pytest.raises(ValueError, match=r"parallel\.cp"):
        LocalAttention(None)(q, k, v, Bounds(16, ((0, 8),), ((0,),)))
    with pytest.raises(ValueError, match="2 rows"):
        LocalAttention(None)(q, k, v, Bounds.whole(2, 8))


def _layer(window: int | None) -> Attention:
    torch.manual_seed(5)
    return Attention(16, 4, 2, 8, window, RopeConfig()).double()


@pytest.mark.parametrize("window", [None, 4])
def test_layer_sees_no_future_and_no_other_document(window: int | None) -> None:
    layer, bounds = _layer(window), Bounds(20, ((0, 20),), ((0, 9),))
    positions = torch.cat((torch.arange(9), torch.arange(11)))[None]
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    y = layer(x, positions, bounds)
    for t in (0, 5, 8, 9, 14):
        changed = x.clone()
        changed[:, t] += 1.0
        moved = (layer(changed, positions, bounds) - y).abs().amax(-1)[0] > 0
        end = 9 if t < 9 else 20
        if window is not None:
            end = min(end, t + window)
        assert moved.nonzero().flatten().tolist() == list(range(t, end))


def test_layer_depends_on_relative_positions_only() -> None:
    layer = _layer(None)
    x = torch.randn(1, 10, 16, dtype=torch.float64)
    near = layer(x, torch.arange(10)[None], Bounds.whole(1, 10))
    far = layer(x, torch.arange(10)[None] + 1_000_000, Bounds.whole(1, 10))
    other = layer(x, 2 * torch.arange(10)[None], Bounds.whole(1, 10))
    assert torch.allclose(near, far, atol=1e-9) and not torch.allclose(near, other, atol=1e-3)


def test_layer_passes_the_seam_and_shares_therope_table(monkeypatch) -> None:
    layer, bounds = _layer(3), Bounds.whole(2, 6)
    seen = []
    layer.inner_attention = lambda q, k, v, b: (seen.append((q.shape, k.shape, v.shape, b)), q)[1]
    positions = torch.arange(6).expand(2, 6)
    layer(torch.randn(2, 6, 16, dtype=torch.float64), positions, bounds)
    assert seen == [((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8), bounds)] and layer.window == 3
    tables = []
    monkeypatch.setattr(type(layer.rope), "table", lambda *args: tables.append(args))
    layer.rope_table(positions, torch.float64, bounds)
    assert not tables, "the second layer of a micro-step reuses the table"
    layer.rope_table(positions + 1, torch.float64, bounds)
    assert len(tables) == 1, "other positions are not served from it"


def test_layer_gradient_is_exact() -> None:
    layer, bounds = _layer(4), Bounds(12, ((0, 12),), ((0, 5),))
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, positions, bounds), (x,))
