"""Token-wise parts on token ranges: the same numbers as the modules under autograd, sums of weight gradients in float32."""

import pytest
import torch

from memory_mgmt.pieces import Held, Parking, assemble, spans
from memory_mgmt.tiles import GradientSums, TokenWise, tokens_first
from models.batch import Bounds
from models.config import ModelConfig
from models.transformer import Block

B, T, D = 2, 13, 16


def make_block(kind="full", dtype=torch.float64):
    torch.manual_seed(0)
    block = Block(ModelConfig(d_model=D, n_heads=4, n_kv_heads=2, layers=(kind,)), kind).to(dtype)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return block


def by_autograd(block, x, mixed):
    """The block around a mixer whose output is given: y, and what the mixer reads."""
    stream = x + (block.mixer.wo(tokens_first(mixed)) if mixed.ndim == 4 else mixed)
    return stream + block.ffn(block.norm2(stream))


@pytest.mark.parametrize("kind", ["full", "memory"])
@pytest.mark.parametrize("tile", [0, 1, 5])
def test_leave_is_what_autograd_does(kind, tile):
    block, n_heads = make_block(kind), 4
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    shape = (B, n_heads, T, D // n_heads) if kind == "full" else (B, T, D)
    mixed = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    want = by_autograd(block, x, mixed)
    dy = torch.randn_like(want)
    parts = TokenWise(block, torch.float64)
    weights = parts.leave_weights()
    wanted = torch.autograd.grad(want, [x, mixed, *weights], dy)
    sums, dim = GradientSums([True] * len(weights)), parts.mixer_dim

    @torch.no_grad()
    def make(a, b):
        middle = parts.middle(x[:, a:b], mixed.narrow(dim, a, b - a), weights)
        y = parts.leave(middle, weights)
        return y, *parts.leave_backward(dy[:, a:b], middle, mixed.narrow(dim, a, b - a), weights, sums)

    y, dx, dmixed = assemble(spans(T, tile), make, (1, 1, dim), x)
    tolerance = {"rtol": 0, "atol": 1e-12 if tile else 0}
    torch.testing.assert_close(y, want, **tolerance)
    for got, expected in zip([dx, dmixed, *sums.results(weights)], wanted, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("tile", [0, 1, 5])
def test_enter_is_what_autograd_does(tile):
    block = make_block()
    mixer, bounds = block.mixer, Bounds.whole(B, T)
    positions = torch.arange(T).expand(B, T)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    seen = []
    mixer.inner_attention = lambda q, k, v, _: (seen.extend((q, k, v)), q)[1]
    mixer(block.norm1(x), positions, bounds)
    parts = TokenWise(block, torch.float64)
    weights, table = parts.enter_weights(), mixer.rope_table(positions, torch.float64, bounds)
    grads = [torch.randn_like(t) for t in seen]
    wanted = torch.autograd.grad(seen, [x, *weights], grads)
    sums = GradientSums([True] * len(weights))

    @torch.no_grad()
    def make(a, b):
        rows = tuple(t[:, :, a:b] for t in table)
        dx = parts.enter_backward(x[:, a:b], [g[:, :, a:b] for g in grads], weights, rows, sums)
        return *parts.enter(x[:, a:b], weights, rows), dx

    *qkv, dx = assemble(spans(T, tile), make, (2, 2, 2, 1), x)
    tolerance = {"rtol": 0, "atol": 1e-12 if tile else 0}
    for got, expected in zip(qkv, seen, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)
        assert tile or got.stride() == expected.stride()
    for got, expected in zip([dx, *sums.results(weights)], wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_enter_backward_makes_no_product_but_its_own():
    block, parts = make_block(), None
    parts = TokenWise(block, torch.float64)
    x, weights = torch.randn(1, 4, D, dtype=torch.float64), parts.enter_weights()
    table = block.mixer.rope_table(torch.arange(4)[None], torch.float64, Bounds.whole(1, 4))
    grads = [torch.randn(1, heads, 4, 4, dtype=torch.float64) for heads in (4, 2, 2)]

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += "mm" in str(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count() as count:
        count.n = 0
        parts.enter_backward(x, grads, weights, table, GradientSums([True] * 4))
    assert count.n == 6  # three for the input, three for the weights


def test_bf16_weight_gradients_add_up_in_float32():
    torch.manual_seed(0)
    x = torch.randn(1, 4096, 4, dtype=torch.bfloat16)
    dy = torch.ones(1, 4096, 4, dtype=torch.bfloat16) + 0.1 * torch.randn(1, 4096, 4).bfloat16()
    sums = GradientSums([True, False])
    for a, b in spans(4096, 4):
        for i in range(2):
            sums.add_product(i, dy[:, a:b], x[:, a:b])
    grad, unwanted = sums.results([torch.empty(0, dtype=torch.bfloat16)] * 2)
    want = dy.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    assert unwanted is None and grad.dtype == torch.bfloat16
    error = ((grad.double() - want).norm() / want.norm()).item()
    assert error < 5e-3, error  # in bf16, 1024 tiles: about 4e-2


def test_spans_do_not_cross_a_cut():
    assert spans(10, 4, (6, 0, 10)) == [(0, 4), (4, 6), (6, 8), (8, 10)]
    assert spans(10, 0, (3,)) == [(0, 3), (3, 10)] and spans(10, 0) == [(0, 10)]


class InHost:
    def __init__(self, tensor):
        self.tensor = tensor.clone()

    def fetch(self):
        return self.tensor.clone()

    def prefetch(self):
        pass


class HostDouble:
    def park(self, tensor, slot):
        return InHost(tensor)

    def begin_layer(self, slot):
        pass


@pytest.mark.parametrize(("swapped", "kept"), [(0, 7), (7, 0), (3, 4), (2, 3), (0, 4), (4, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_held_tensor_comes_back_by_ranges_and_whole(swapped, kept, transposed):
    tensor = torch.randn(2, 7, 3, 4)
    tensor, dim = (tensor.transpose(1, 2), 2) if transposed else (tensor, 1)
    held = Held(tensor, dim, swapped, kept, Parking(HostDouble(), 0), "x")
    held.trim()
    whole = held.whole()
    assert held.missing_from == swapped + kept and whole.stride() == tensor.stride()
    n = swapped + kept
    assert torch.equal(whole.narrow(dim, 0, n), tensor.narrow(dim, 0, n))


def test_a_held_tensor_frees_what_it_does_not_keep():
    tensor = torch.randn(1, 8, 4)
    held = Held(tensor, 1, 2, 3, Parking(HostDouble(), 0), "x")
    assert torch.equal(held.part(0, 2), tensor[:, :2]) and torch.equal(held.part(2, 5), tensor[:, 2:5])
    held.trim()
    assert torch.equal(held.part(3, 5), tensor[:, 3:5])
    assert held.part(2, 5).untyped_storage().nbytes() == 3 * 4 * 4
