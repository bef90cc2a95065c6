"""Tiled cross-entropy against torch's on whole logits."""

import pytest
import torch
from torch.nn import functional as F

from models.batch import IGNORE_INDEX
from models.feedforward import RMSNorm
from models.loss import chunked_cross_entropy


def make(B=2, T=11, C=8, V=37, dtype=torch.float64):
    torch.manual_seed(0)
    h, weight = torch.randn(B, T, C, dtype=dtype, requires_grad=True), torch.randn(V, C, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (B, T))
    labels[0, 3] = labels[1, 10] = IGNORE_INDEX
    return h, weight, labels


def reference(h, weight, labels):
    return F.cross_entropy((h @ weight.t()).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view(labels.shape)


def head_products(run):
    """How many matrix products ``run()`` makes."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
            return func(*args, **(kwargs or {}))

    with Count() as count:
        count.n = 0
        run()
    return count.n


def test_a_sum_or_mean_costs_three_products_per_tile_and_evaluation_one():
    h, weight, labels = make()
    assert head_products(lambda: chunked_cross_entropy(h, weight, labels, 11).sum().backward()) == 6
    assert head_products(lambda: (chunked_cross_entropy(h, weight, labels, 11).sum() / 7).backward()) == 6
    with torch.no_grad():
        assert head_products(lambda: chunked_cross_entropy(h, weight, labels, 11)) == 2


def test_a_second_backward_pass_over_the_same_graph_gives_the_same():
    h, weight, labels = make()
    nll = chunked_cross_entropy(h, weight, labels, 4)
    first = torch.autograd.grad(nll.sum() * 3, (h, weight), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(nll.sum() * 3, (h, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tile", [1, 4, 22, 100])
@pytest.mark.parametrize("upstream", ["per token", "one number"])
def test_equals_torch_forward_and_backward(tile, upstream):
    h, weight, labels = make()
    got, want = chunked_cross_entropy(h, weight, labels, tile), reference(h, weight, labels)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    dnll = torch.rand_like(got) if upstream == "per token" else torch.tensor(-0.3, dtype=got.dtype)
    for a, b in zip(*(torch.autograd.grad((x * dnll).sum(), (h, weight)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("upstream", ["per token", "one number"])
@pytest.mark.parametrize("tile", [3, 100])
def test_the_norm_inside_the_tiles_is_the_norm_before_them(tile, upstream):
    h, weight, labels = make()
    norm = RMSNorm(8, 1e-5).double()
    torch.nn.init.normal_(norm.weight, 1.0)
    got = chunked_cross_entropy(h, weight, labels, tile, (norm.weight, norm.eps))
    want = chunked_cross_entropy(norm(h), weight, labels, 100)
    torch.testing.assert_close(got, want, rtol=0, atol=0 if tile == 100 else 1e-13)
    dnll = torch.rand_like(got) if upstream == "per token" else torch.tensor(0.25, dtype=got.dtype)
    for a, b in zip(*(torch.autograd.grad((x * dnll).sum(), (h, weight, norm.weight)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_only_gradients_that_are_wanted_are_made():
    h, weight, labels = make()
    norm = torch.ones(8, dtype=torch.float64, requires_grad=True)
    chunked_cross_entropy(h.detach(), weight.detach(), labels, 4, (norm, 1e-5)).sum().backward()
    alone, norm.grad = norm.grad, None
    chunked_cross_entropy(h, weight, labels, 4, (norm, 1e-5)).sum().backward()
    assert torch.equal(alone, norm.grad) and norm.grad.any()


def test_no_valid_label_gives_zero_loss_and_zero_gradients():
    h, weight, labels = make()
    nll = chunked_cross_entropy(h, weight, torch.full_like(labels, IGNORE_INDEX), 4)
    nll.sum().backward()
    assert not nll.any() and not h.grad.any() and not weight.grad.any()


def test_ignored_tokens_cannot_poison_the_gradient():
    h, weight, labels = make()
    with torch.no_grad():
        h[0, 3] = 1e200  # its logits overflow
    chunked_cross_entropy(h, weight, labels, 4).sum().backward()
    assert torch.isfinite(h.grad).all() and not h.grad[0, 3].any()


def test_ids_of_a_large_vocabulary():
    h, weight, labels = make(V=140_000, C=2)
    labels[0, 0], labels[1, 2] = 139_999, 0
    torch.testing.assert_close(chunked_cross_entropy(h, weight, labels, 2), reference(h, weight, labels), rtol=0, atol=1e-12)


def test_autocast_matches_bf16_logits_and_sums_the_weight_gradient_in_float32():
    h, weight, labels = make(T=4096, C=16, V=8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = chunked_cross_entropy(h, weight, labels, 8)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, reference(h, weight, labels), rtol=0.02, atol=0.08)
    (grad,) = torch.autograd.grad(nll.sum(), weight)
    (want,) = torch.autograd.grad(reference(h.double(), weight.double(), labels).sum(), weight)
    error = (grad - want).norm() / want.norm()
    assert error < 5e-3, error  # bf16 sums over these 1024 tiles give about 4e-2


def test_logits_of_all_tokens_never_exist():
    h, weight, labels = make(T=64, V=500)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))])
            return out

    with Watch():
        chunked_cross_entropy(h, weight, labels, 8).sum().backward()
    assert largest == 8 * 500


def test_a_tile_below_one_token_is_refused():
    h, weight, labels = make()
    with pytest.raises(ValueError, match="loss_tile_tokens"):
        chunked_cross_entropy(h, weight, labels, 0)
