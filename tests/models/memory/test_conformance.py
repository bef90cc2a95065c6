"""What every memory architecture must satisfy. A new one is added by registering it in models/memory/protocol.py.

Each item caught a bug in some published implementation: reading ahead inside a segment, state shared between rows,
state leaking into the next packed document (seen only with slow decay), segments that do not add up to the whole.
"""

import io

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models.batch import Bounds
from models.config import MemoryModuleConfig, ModelConfig
from models.memory.protocol import BUILDERS, LocalCarry, build_memory

D, B, T = 12, 2, 41
DOCUMENTS = ((0, 1, 7, 8, 16, 33), (0, 20, 21, 22))
WHOLE = Bounds.whole(B, T)
PACKED = Bounds(T, ((0, T),), DOCUMENTS)

kinds = pytest.mark.parametrize("kind", sorted(BUILDERS))
bounds_cases = pytest.mark.parametrize("bounds", [WHOLE, PACKED], ids=["whole", "packed"])


def make(kind, dtype=torch.float64, slow_decay=True, chunk=8, d_model=D, heads=2, expand_v=1.5):
    """A small module whose memory lasts: with the usual fast decay a leak hides below rounding."""
    memory = MemoryModuleConfig(kind=kind, chunk_size=chunk, expand_v=expand_v)
    module = build_memory(ModelConfig(d_model=d_model, n_heads=heads, head_dim=d_model // heads * 2, memory=memory)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for owner in module.modules():
            for name, p in owner.named_parameters(recurse=False):
                value = module.init_parameter(name, p.shape, generator) if owner is module else None
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5 if value is None else value)
        if slow_decay and kind == "gated_deltanet":
            module.A_log.fill_(-4.0)
            module.dt_bias.fill_(-4.0)
    return module


def make_x(dtype=torch.float64):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(2)).to(dtype)


@kinds
@bounds_cases
def test_causality_is_exact(kind, bounds):
    module, x = make(kind), make_x()
    y, _ = module(x, None, bounds)
    for t in (0, 3, 7, 8, 15, 16, 30, T - 1):
        changed = x.clone()
        changed[:, t] += 1.0
        other, _ = module(changed, None, bounds)
        assert torch.equal(y[:, :t], other[:, :t])
        assert not torch.equal(y[:, t], other[:, t])


@kinds
def test_rows_do_not_see_each_other(kind):
    module, x = make(kind), make_x()
    y, _ = module(x, None, WHOLE)
    changed = x.clone()
    changed[0] = 1e3
    assert torch.equal(y[1], module(changed, None, WHOLE)[0][1])


@kinds
def test_the_memory_lasts_as_long_as_the_tests_need(kind):
    """Guards the other tests: an early token must matter at the end, or a leak could not be seen."""
    module, x = make(kind), make_x()
    y, _ = module(x, None, WHOLE)
    changed = x.clone()
    changed[:, 0] += 1.0
    assert (y[:, -1] - module(changed, None, WHOLE)[0][:, -1]).abs().max() > 1e-4


@kinds
def test_documents_do_not_see_earlier_ones(kind):
    module, x = make(kind), make_x()
    y, _ = module(x, None, PACKED)
    for row, start in [(0, 1), (0, 7), (0, 8), (0, 16), (0, 33), (1, 20), (1, 22)]:
        changed = x.clone()
        changed[row, :start] = 50.0 * torch.randn(start, D, dtype=x.dtype)
        other, _ = module(changed, None, PACKED)
        assert torch.equal(y[row, start:], other[row, start:])


@kinds
def test_packed_equals_unpacked(kind):
    module, x = make(kind), make_x()
    y, _ = module(x, None, PACKED)
    for row, starts in enumerate(DOCUMENTS):
        for start, end in zip(starts, (*starts[1:], T), strict=True):
            alone, _ = module(x[row : row + 1, start:end], None, Bounds.whole(1, end - start))
            torch.testing.assert_close(y[row : row + 1, start:end], alone, rtol=0, atol=1e-12)


@kinds
@bounds_cases
def test_any_split_into_segments_equals_the_whole(kind, bounds):
    module, x = make(kind), make_x()
    y, final = module(x, None, bounds)
    for split in (1, 2, 3, 4, 7, 8, 9, 16, 20, 33, 38, T - 1):
        first, state = module(x[:, :split], None, bounds.with_ranges(((0, split),)))
        second, state = module(x[:, split:], state, bounds.with_ranges(((split, T),)))
        torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=0, atol=1e-12)
        for name in final:
            torch.testing.assert_close(state[name], final[name], rtol=0, atol=1e-12)


@kinds
def test_gradient_flows_through_the_state(kind):
    module, x = make(kind), make_x().requires_grad_()
    weight = torch.randn(B, T, D, dtype=x.dtype)
    (want,) = torch.autograd.grad((module(x, None, WHOLE)[0] * weight).sum(), x)
    first, state = module(x[:, :13], None, WHOLE.with_ranges(((0, 13),)))
    second, _ = module(x[:, 13:], state, WHOLE.with_ranges(((13, T),)))
    (got,) = torch.autograd.grad((torch.cat([first, second], 1) * weight).sum(), x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@kinds
def test_a_given_state_continues_at_index_0_and_reset_drops_rows(kind):
    module, x = make(kind), make_x()
    _, state = module(x, None, WHOLE)
    fresh, _ = module(x, None, WHOLE)
    continued, _ = module(x, state, WHOLE)
    assert not torch.allclose(continued, fresh)
    mixed, _ = module(x, module.reset(state, torch.tensor([True, False])), WHOLE)
    assert torch.equal(mixed[0], fresh[0]) and torch.equal(mixed[1], continued[1])


@kinds
@bounds_cases
@pytest.mark.parametrize("slow_decay", [True, False])
def test_equals_the_token_recurrence(kind, bounds, slow_decay):
    module, x = make(kind, slow_decay=slow_decay), make_x().requires_grad_()
    state = {name: torch.randn_like(value) for name, value in module.init_state(B, "cpu", torch.float64).items()}
    weight = torch.randn(B, T, D, dtype=x.dtype)
    results = []
    for forward in (module, module.oracle):
        y, after = forward(x, state, bounds)
        grads = torch.autograd.grad((y * weight).sum() + after["state"].square().sum(), [x, *module.parameters()])
        results.append([y, *after.values(), *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_close(kind, dtype):
    """bf16: parameters float32, autocast on, as in training."""
    module, x = make(kind), make_x()
    want, _ = module(x, None, PACKED)
    module.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got, state = module(x.to(dtype), None, PACKED)
    assert got.dtype == dtype and state["state"].dtype == torch.float32
    error = (got.double() - want).norm() / want.norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2), error


@kinds
@bounds_cases
@pytest.mark.parametrize("tile_tokens", [1, 5, 8, 16, 64])
def test_tiles_change_nothing(kind, bounds, tile_tokens):
    module, x = make(kind), make_x().requires_grad_()
    weight = torch.randn(B, T, D, dtype=x.dtype)
    results = []
    for tile in (0, tile_tokens):
        module.tile_tokens = tile
        y, state = module(x, None, bounds)
        grads = torch.autograd.grad((y * weight).sum() + state["state"].square().sum(), [x, *module.parameters()])
        results.append([y, *state.values(), *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@kinds
@pytest.mark.parametrize("tile_tokens", [0, 16])
def test_works_under_checkpoint_and_save_on_cpu(kind, tile_tokens):
    module, x = make(kind), make_x().requires_grad_()
    module.tile_tokens = tile_tokens
    want = torch.autograd.grad(module(x, None, PACKED)[0].square().sum(), [x, *module.parameters()])
    recomputed = checkpoint(lambda z: module(z, None, PACKED)[0], x, use_reentrant=False)
    got = torch.autograd.grad(recomputed.square().sum(), [x, *module.parameters()])
    with torch.autograd.graph.save_on_cpu():
        y = module(x, None, PACKED)[0]
    offloaded = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    for a, b, c in zip(got, want, offloaded, strict=True):
        assert torch.equal(a, b) and torch.equal(c, b)


@kinds
def test_state_survives_saving(kind):
    module, x = make(kind), make_x()
    _, state = module(x, None, WHOLE)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(module(x, loaded, WHOLE)[0], module(x, state, WHOLE)[0])
    assert not list(module.buffers())  # a state is handed in and out, never part of the weights


class OneOfMany(LocalCarry):
    """Makes a module take the path of a split sequence while there is one rank only."""

    local = False


@kinds
@pytest.mark.parametrize("carry", [LocalCarry(), OneOfMany()], ids=["whole", "split"])
@pytest.mark.parametrize("tile_tokens", [0, 256])
def test_cost_is_within_a_fifth_of_what_is_measured(kind, tile_tokens, carry):
    module = make(kind, torch.float32, chunk=64, d_model=64, heads=2)
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
        FlopCounterMode(display=False) as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda z: (keep.append(z), pack(z))[1], lambda z: z),
    ):
        y, _ = module(x, None, Bounds.whole(2, 1024))
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    recomputed = cost.flops_forward if tile_tokens else 0
    assert forward.get_total_flops() == pytest.approx(cost.flops_forward, rel=0.2)
    assert backward.get_total_flops() == pytest.approx(cost.flops_backward + recomputed, rel=0.2)
    assert sum(saved.values()) == pytest.approx(cost.saved_bytes, rel=0.2)
