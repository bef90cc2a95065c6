"""Problems for the planner's tests: a GPT on GPUs, and random small ones."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from memory_mgmt.planner_problem import ClassCost, LayerCost, LossTile, Problem, Stage

GIB = 2**30
H200_LINK = 52e9


def gpt(
    seq_len: int,
    n_layers: int = 32,
    d: int = 4096,
    ranks: int = 8,
    budget: int = 78 * GIB,
    host: float = 2e12,
    bandwidth: float = H200_LINK,
) -> Problem:
    """MEMO's GPT (16 units of 2 n d bytes per layer) with the sequence split over ``ranks`` GPUs at 45 percent of 989 TFLOP/s."""
    rate, n = 0.45 * 989e12, seq_len // ranks
    unit = 2 * n * d

    def linear(parameters: float) -> float:
        return 2 * n * parameters / rate

    attention = 2 * n * seq_len * d / rate
    forward = linear(12 * d * d) + attention
    layer = LayerCost(
        "full",
        input=ClassCost(unit, may_recompute=False),
        projections=ClassCost(4 * unit, linear(3 * d * d)),
        mixer=ClassCost(unit, attention),
        feed_forward=ClassCost(10 * unit, linear(5 * d * d)),
        forward_seconds=forward,
        backward_seconds=2 * forward,
        mixer_stages=(Stage(2 * unit, 4 * unit),),
        ffn_stages=(Stage(2 * unit, 8 * unit),),
    )
    loss = LossTile(4096, 4096 * 50257 * 10, 6 * n * 50257 * d / rate)
    resident = (n_layers * 12 * d * d + 50257 * d) * 16 // ranks
    return Problem((layer,) * n_layers, (loss,), resident, 0, budget, int(host / ranks), bandwidth, bandwidth)


def classes(may_recompute: bool, tiled: bool = False) -> st.SearchStrategy[ClassCost]:
    """Costs of one class, in units of GiB and seconds."""
    size = st.integers(0, 8).map(lambda q: q * GIB)
    return st.builds(
        ClassCost,
        bytes=size,
        recompute_seconds=st.integers(0, 20).map(lambda t: t / 10),
        may_swap=st.booleans(),
        may_recompute=st.sampled_from([True, True, True, False]) if may_recompute else st.just(False),
        tiled_bytes=st.just(GIB // 8) if tiled else st.none(),
    ).map(lambda cost: cost if cost.tiled_bytes is None or cost.tiled_bytes <= cost.bytes else ClassCost(cost.bytes))


@st.composite
def packable(draw: st.DrawFn, tiled: bool) -> ClassCost:
    """Costs of a class that may or may not be kept in eight bits."""
    cost = draw(classes(True, tiled))
    share = draw(st.sampled_from([None, 0.25, 0.5]))
    if share is None or not cost.bytes:
        return cost
    seconds = st.sampled_from([0.0, 0.05, 0.4])
    return replace(cost, quantised_bytes=int(share * cost.bytes), quantise_seconds=draw(seconds), dequantise_seconds=draw(seconds))


def without_eight_bits(problem: Problem) -> Problem:
    """The same problem where they are not allowed."""

    def plain(layer: LayerCost) -> LayerCost:
        return replace(layer, feed_forward=replace(layer.feed_forward, quantised_bytes=None, quantise_seconds=0.0, dequantise_seconds=0.0))

    return replace(problem, layers=tuple(plain(layer) for layer in problem.layers))


def stages(count: int = 1) -> st.SearchStrategy[tuple[Stage, ...]]:
    """Working bytes of one half of a layer, per tile candidate."""
    size = st.integers(0, 3 * GIB)
    seconds = st.sampled_from([0.0, 0.25])
    return st.tuples(*[st.builds(Stage, size, size, seconds) for _ in range(count)])


@st.composite
def problems(draw: st.DrawFn, max_layers: int = 5, tiles: bool = True, groups: bool = False) -> Problem:
    """A few layers of two kinds, a budget anywhere between nothing and everything."""
    ffn_tiles = draw(st.sampled_from([(0,), (0, 512)])) if tiles else (0,)
    second = st.integers(1, 30).map(lambda t: t / 10)
    kinds = draw(
        st.lists(
            st.builds(
                LayerCost,
                kind=st.just("full"),
                input=classes(False),
                projections=classes(True),
                mixer=classes(True),
                feed_forward=packable(tiled=len(ffn_tiles) > 1),
                forward_seconds=second,
                backward_seconds=second,
                entrance_stages=stages(),
                mixer_stages=stages(),
                ffn_stages=stages(len(ffn_tiles)),
                fetch_seconds=st.sampled_from([0.0, 0.0, 0.3, 2.0]),
                gradient_bytes=st.sampled_from([0, GIB // 2]),
            ),
            min_size=1,
            max_size=2,
        )
    )
    layers = tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=max_layers)))
    everything = sum(layer.of(name).bytes for layer in layers for name in ("input", "projections", "mixer", "feed_forward"))
    resident = draw(st.integers(0, 2 * GIB))
    loss = st.builds(LossTile, tokens=st.just(1), working_bytes=st.integers(0, 4 * GIB), seconds=second)
    loss_tiles = [draw(loss)]
    if draw(st.booleans()):
        loss_tiles.append(LossTile(2, loss_tiles[0].working_bytes // 4, loss_tiles[0].seconds * 1.5))
    return Problem(
        layers,
        tuple(loss_tiles),
        resident,
        budget_bytes=resident + int(everything * draw(st.floats(0.2, 1.2))) + draw(st.integers(3, 20)) * GIB,
        host_bytes=int(everything * draw(st.sampled_from([0.0, 0.2, 1.0]))),
        bandwidth_out=draw(st.sampled_from([0.5, 3.0, 50.0])) * GIB,
        bandwidth_in=draw(st.sampled_from([0.5, 3.0, 50.0])) * GIB,
        overlap=draw(st.sampled_from([True, True, False])),
        swap_ratio=draw(st.sampled_from([1.0, 0.5])),
        fixed_seconds=0.5,
        unswapped_last=draw(st.integers(0, 2)),
        ffn_tiles=ffn_tiles,
        group_blocks=draw(st.sampled_from([(1,), (1, 2), (3,)])) if groups else (1,),
        group_inside=draw(st.sampled_from(["all", "one"])),
    )
