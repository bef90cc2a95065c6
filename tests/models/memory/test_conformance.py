"""What every memory architecture must satisfy, on one process and split over ranks. A new one gets all of it by being registered in
models/memory/protocol.py and given a small configuration in ``conformance_cases.py``.

Each item caught a bug in some published implementation: reading ahead inside a segment, state shared between rows,
state leaking into the next packed document (seen only with slow decay), segments that do not add up to the whole,
a truncation that does not truncate, gradients that are wrong on all ranks but the last.
"""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models.batch import Bounds
from models.errors import UserError
from models.memory.protocol import BUILDERS, LocalCarry, detached
from models.memory_config import AFFINE, HEADWISE
from parallel.memory_exchange import check_exchange, refused_exchange
from parallel.parallelize import check_layout
from tests.distributed import run_distributed
from tests.models.memory.conformance_cases import BY_HEADS, CASES, DOCUMENTS, SPLIT_T, B, D, T, make, make_state, make_x, whole
from tests.models.memory.conformance_ranks import (
    SCENARIOS,
    SIZES,
    CountFlops,
    OneOfMany,
    OneOfManyByHeads,
    gradients,
    on_ranks,
    split_run,
    total,
    ways,
)

WHOLE, PACKED = whole(), whole(packed=True)

cases = pytest.mark.parametrize("name", sorted(CASES))
bounds_cases = pytest.mark.parametrize("bounds", [WHOLE, PACKED], ids=["whole", "packed"])


def splits(module, tokens=T):
    """Places where a sequence may be cut: at, beside and far from bounds of chunks and documents."""
    return [t for t in (1, 2, 3, 4, 7, 8, 9, 16, 20, 33, 38, tokens - 1) if t % module.traits.granularity == 0]


def close(got, want, tolerance):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_every_registered_architecture_has_a_case():
    assert {case.settings["kind"] for case in CASES.values()} == set(BUILDERS)


# --- what a token may see ---------------------------------------------------------------------------------------------------


@cases
@bounds_cases
def test_causality_is_exact(name, bounds):
    module, x = make(name), make_x()
    y, _ = module(x, None, bounds)
    for t in (0, 3, 7, 8, 15, 16, 30, T - 1):
        changed = x.clone()
        changed[:, t] += 1.0
        other, _ = module(changed, None, bounds)
        assert torch.equal(y[:, :t], other[:, :t])
        assert not torch.equal(y[:, t], other[:, t])


@cases
def test_rows_do_not_see_each_other(name):
    module, x = make(name), make_x()
    y, after = module(x, None, WHOLE)
    changed = x.clone()
    changed[0] = 1e3
    other, other_after = module(changed, None, WHOLE)
    assert torch.equal(y[1], other[1])
    assert all(torch.equal(after[key][1], other_after[key][1]) for key in after)


@cases
def test_the_memory_lasts_as_long_as_the_tests_need(name):
    """Guards the other tests: an early token must matter at the end, or a leak could not be seen."""
    module, x = make(name), make_x()
    y, _ = module(x, None, WHOLE)
    changed = x.clone()
    changed[:, 0] += 1.0
    last = (module.traits.reset_every or T) - 1
    assert (y[:, last] - module(changed, None, WHOLE)[0][:, last]).abs().max() > 1e-4


@cases
def test_documents_do_not_see_earlier_ones(name):
    module, x = make(name), make_x()
    y, _ = module(x, None, PACKED)
    for row, start in [(0, 1), (0, 7), (0, 8), (0, 16), (0, 33), (1, 20), (1, 22)]:
        changed = x.clone()
        changed[row, :start] = 50.0 * torch.randn(start, D, dtype=x.dtype)
        other, _ = module(changed, None, PACKED)
        assert torch.equal(y[row, start:], other[row, start:])


@cases
def test_packed_equals_unpacked(name):
    module, x = make(name), make_x()
    y, _ = module(x, None, PACKED)
    for row, starts in enumerate(DOCUMENTS):
        for start, end in zip(starts, (*starts[1:], T), strict=True):
            alone, _ = module(x[row : row + 1, start:end], None, Bounds.whole(1, end - start))
            close(y[row : row + 1, start:end], alone, 1e-12)


# --- the state ---------------------------------------------------------------------------------------------------------------


@cases
@bounds_cases
def test_any_split_into_segments_equals_the_whole(name, bounds):
    module, x = make(name), make_x()
    y, final = module(x, None, bounds)
    for split in splits(module):
        first, state = module(x[:, :split], None, bounds.with_ranges(((0, split),)))
        second, state = module(x[:, split:], state, bounds.with_ranges(((split, T),)))
        close(torch.cat([first, second], 1), y, 1e-12)
        for key in final:
            close(state[key], final[key], 1e-12)


@cases
def test_a_given_state_continues_at_index_0_and_reset_drops_rows(name):
    module, x = make(name), make_x()
    state = make_state(name)
    fresh, _ = module(x, None, WHOLE)
    continued, _ = module(x, state, WHOLE)
    assert not torch.allclose(continued, fresh)
    mixed, _ = module(x, module.reset(state, torch.tensor([True, False])), WHOLE)
    assert torch.equal(mixed[0], fresh[0]) and torch.equal(mixed[1], continued[1])


@cases
def test_gradient_flows_through_the_state(name):
    module, x = make(name), make_x().requires_grad_()
    weight = torch.randn(B, T, D, dtype=x.dtype)
    (want,) = torch.autograd.grad((module(x, None, WHOLE)[0] * weight).sum(), x)
    split = splits(module)[-3]
    first, state = module(x[:, :split], None, WHOLE.with_ranges(((0, split),)))
    second, _ = module(x[:, split:], state, WHOLE.with_ranges(((split, T),)))
    (got,) = torch.autograd.grad((torch.cat([first, second], 1) * weight).sum(), x)
    close(got, want, 1e-12)


@cases
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_truncation_truncates(name, depth):
    """Four segments, the state cut loose ``depth`` segments before the end: no gradient before the cut, some in all after it."""
    module = make(name)
    if module.traits.reset_every:
        pytest.skip("the last segment sees its own reset period only")
    segments = [x.requires_grad_() for x in make_x(SPLIT_T).split(SPLIT_T // 4, 1)]
    state, bounds = None, whole(SPLIT_T)
    for i, x in enumerate(segments):
        if state is not None and i == len(segments) - depth:
            state = detached(state)
        y, state = module(x, state, bounds.with_ranges(((i * 12, i * 12 + 12),)))
    found = torch.autograd.grad(y.square().sum(), segments, allow_unused=True)
    cut = len(segments) - (1 if module.traits.transition == "append_detached" else depth)  # which claims that nothing goes back at all
    assert all(g is None for g in found[:cut])
    assert all(g is not None and g.abs().max() > 0 for g in found[cut:])


@cases
def test_state_survives_saving_and_nothing_hides_in_the_module(name):
    module, x = make(name), make_x()
    state = make_state(name)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    want = module(x, state, WHOLE)[0]
    assert torch.equal(module(x, torch.load(file, weights_only=True), WHOLE)[0], want)
    assert not list(module.buffers())  # a state is handed in and out, never part of the weights
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in module.init_state(B, "cpu", torch.float32).items()}


# --- arithmetic --------------------------------------------------------------------------------------------------------------


@cases
@bounds_cases
@pytest.mark.parametrize("slow", [True, False], ids=["slow", "as initialised"])
def test_equals_the_token_recurrence(name, bounds, slow):
    module, x = make(name, slow=slow), make_x().requires_grad_()
    state = make_state(name, slow)
    weight = torch.randn(B, T, D, dtype=x.dtype)
    results = []
    for forward in (module, module.oracle):
        y, after = forward(x, state, bounds)
        results.append([y, *(after[key] for key in sorted(state)), *gradients((y * weight).sum() + total(after), module, x)])
    for got, want in zip(*results, strict=True):
        close(got, want, 1e-10)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_close(name, dtype):
    """bf16: parameters float32, autocast on, as in training."""
    if CASES[name].chooses and dtype == torch.bfloat16:
        pytest.skip("rounding changes what is chosen; the case that chooses everything holds its arithmetic")
    module, x = make(name), make_x()
    want, _ = module(x, None, PACKED)
    module.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got, state = module(x.to(dtype), None, PACKED)
    assert got.dtype == dtype and {v.dtype for v in state.values() if v.is_floating_point()} <= {torch.float32, dtype}
    error = (got.double() - want).norm() / want.norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2), error


# --- recomputation, tiles, cost ----------------------------------------------------------------------------------------------


@cases
@bounds_cases
@pytest.mark.parametrize("tile_tokens", [1, 5, 8, 16, 64])
def test_tiles_change_nothing(name, bounds, tile_tokens):
    module, x = make(name), make_x().requires_grad_()
    if tile_tokens % module.traits.granularity:
        pytest.skip("tiles are whole segments")
    weight = torch.randn(B, T, D, dtype=x.dtype)
    results = []
    for tile in (0, tile_tokens):
        module.tile_tokens = tile
        y, state = module(x, None, bounds)
        results.append([y, *state.values(), *gradients((y * weight).sum() + total(state), module, x)])
    for got, want in zip(*results, strict=True):
        close(got, want, 1e-11)


@cases
@pytest.mark.parametrize("tile_tokens", [0, 16])
def test_works_under_checkpoint_and_save_on_cpu(name, tile_tokens):
    module, x = make(name), make_x().requires_grad_()
    module.tile_tokens = tile_tokens
    want = gradients(module(x, None, PACKED)[0].square().sum(), module, x)
    recomputed = checkpoint(lambda z: module(z, None, PACKED)[0], x, use_reentrant=False)
    got = gradients(recomputed.square().sum(), module, x)
    with torch.autograd.graph.save_on_cpu():
        y = module(x, None, PACKED)[0]
    offloaded = gradients(y.square().sum(), module, x)
    for a, b, c in zip(got, want, offloaded, strict=True):
        assert torch.equal(a, b) and torch.equal(c, b)


@cases
def test_a_layout_that_is_not_claimed_is_refused(name):
    module = make(name)
    for layout in module.traits.layouts:
        check_layout(module, layout, 2)
    module.traits = replace(module.traits, layouts=frozenset())
    with pytest.raises(UserError, match="parallel.layout zigzag, parallel.cp 2: .*parallel.cp=1"):
        check_layout(module, "zigzag", 2)


@pytest.mark.parametrize("name", sorted({**CASES, **BY_HEADS}))
def test_an_exchange_that_is_not_claimed_is_refused(name):
    """What the settings' names say (`models.memory_config`) is what the traits claim."""
    module, kind = make(name), {**CASES, **BY_HEADS}[name].settings
    as_context = kind.get("attach") == "mac"
    assert (refused_exchange("ring", module, 2) is None) == (kind["kind"] in AFFINE)
    assert (refused_exchange("ulysses", module, 2) is None) == (kind["kind"] in HEADWISE and not as_context)
    with pytest.raises(UserError, match=r"memory_exchange ulysses: \w+ has .* heads.*; set parallel\.memory_exchange=states"):
        check_exchange(module, "ulysses", 7)


@cases
@pytest.mark.parametrize("carry", [LocalCarry(), OneOfMany(), OneOfManyByHeads()], ids=["whole", "split", "by heads"])
@pytest.mark.parametrize("tile_tokens", [0, 256])
def test_cost_is_within_a_tenth_of_what_is_measured(name, tile_tokens, carry):
    module = make(name, torch.float32, d_model=64, **CASES[name].at_size)
    if not carry.local and not module.traits.layouts:
        pytest.skip("one rank only")
    if carry.heads is not None and module.traits.head_splittable == 1:
        pytest.skip("its heads meet")
    module.tile_tokens, module.carry = tile_tokens, carry
    x = torch.randn(2, 1024, 64, requires_grad=True)
    cost = module.cost(2, 1024, 4)
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    keep = []
    with (
        CountFlops() as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda z: (keep.append(z), pack(z))[1], lambda z: z),
    ):
        y, after = module(x, module.init_state(2, "cpu", torch.float32), Bounds.whole(2, 1024))
    with CountFlops() as backward:
        (y.sum() + total(after)).backward()  # what goes to the next rank or sequence counts as well
    recomputed = cost.flops_forward if tile_tokens else 0
    if tile_tokens and carry.heads is not None:  # projections and output are bodies of their own, whose last product is not made again
        recomputed -= 2 * 2048 * sum(getattr(module, w).weight.numel() for w in (module.projections[-1], "w_out"))
    assert forward.total == pytest.approx(cost.flops_forward, rel=0.1)
    assert backward.total == pytest.approx(cost.flops_backward + recomputed, rel=0.1)
    assert sum(saved.values()) == pytest.approx(cost.saved_bytes, rel=0.1)
    held = module.init_state(2, "cpu", torch.float32)
    assert cost.state_bytes == sum(v.nbytes for v in held.values())


# --- split over ranks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(request):
    """Of all ranks; they are started once, for the architectures whose tests were asked for."""
    asked = {i.callspec.params["name"] for i in request.session.items if getattr(i, "originalname", "") == SPLIT_TEST}
    some = [run_distributed(on_ranks, max(SIZES), sorted(asked & set(names))) for names in (CASES, BY_HEADS)]
    return [of_cases | by_heads for of_cases, by_heads in zip(*some, strict=True)]


SPLIT_TEST = "test_split_sequence_equals_one_process"


@pytest.mark.parametrize("name", sorted({**CASES, **BY_HEADS}))
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_split_sequence_equals_one_process(name, scenario, answers):
    """Forward, backward and the final state, float64, 2, 3 and 4 ranks, every layout and exchange the architecture claims."""
    module = make(name)
    want = split_run(name, module, scenario)
    compared = 0
    for size in SIZES:
        for how in ways(name, size, scenario):
            parts = [answers[rank][name, how, size, scenario] for rank in range(size)]
            for ranges, part in parts:
                for key in ("y", "dx"):
                    close(part[key], torch.cat([want[key][:, a:b] for a, b in ranges], 1), 1e-10)
                assert set(part["after"]) == set(want["after"])
                for key, value in want["after"].items():
                    close(part["after"][key], value, 1e-10)
            for i, value in enumerate(want["summed"]):
                close(sum(part["summed"][i] for _, part in parts), value, 1e-10)
            compared += 1
    assert compared >= len(SIZES) * len(module.traits.layouts)
