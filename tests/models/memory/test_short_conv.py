"""The fused step against plain autograd, with documents that start anywhere."""

import pytest
import torch
from torch.nn import functional as F

from models.batch import Bounds
from models.memory.documents import plan_documents
from models.memory.short_conv import conv_silu_chunks, from_chunks, gated_norm, to_chunks

B, H, D, CHUNK = 2, 2, 3, 4


def plain(x, before, weight, bounds, norm_scale):
    """Per token and tap, by definition."""
    n = weight.shape[1] - 1
    (start, end) = bounds.ranges[0]
    padded = torch.cat([before, x], 1)
    rows = []
    for b in range(B):
        tokens = []
        for t in range(start, end):
            first = max([s for s in bounds.documents[b] if 0 < s <= t], default=start - n)
            tokens.append(sum(weight[:, n - j] * padded[b, t - start + n - j] for j in range(n + 1) if t - j >= first))
        rows.append(torch.stack(tokens))
    out = F.silu(torch.stack(rows)).view(B, end - start, H, D)
    if norm_scale:
        out = out * (out.square().sum(-1, keepdim=True) + 1e-6).rsqrt() * norm_scale
    return to_chunks(out, CHUNK)


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("norm_scale", [0.0, 0.5])
@pytest.mark.parametrize("span", [(0, 13), (5, 17), (2, 4), (3, 4)])
@pytest.mark.parametrize("documents", [((0,), (0,)), ((0, 3, 4, 6, 11), (0, 5, 12))])
def test_conv_equals_its_definition(kernel, norm_scale, span, documents):
    torch.manual_seed(0)
    bounds = Bounds(17, (span,), documents)
    T = span[1] - span[0]
    inputs = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in [(B, T, H * D), (B, kernel - 1, H * D), (H * D, kernel)]]
    plan = plan_documents(bounds, span, CHUNK, kernel - 1, torch.device("cpu"))
    got, want = conv_silu_chunks(*inputs, plan, H, CHUNK, norm_scale), plain(*inputs, bounds, norm_scale)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    weight = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=0, atol=1e-13)


def test_gated_norm_equals_its_definition():
    torch.manual_seed(0)
    T = 10
    o, gate, weight = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in [(3, B * H, CHUNK, D), (B, T, H * D), (D,)])
    got = gated_norm(o, gate, weight, 1e-5)
    tokens = from_chunks(o, B, T)
    want = tokens * (tokens.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    want = want.flatten(2) * F.silu(gate)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    dout = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * dout).sum(), (o, gate, weight)) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_projections_are_summed_in_float32(dtype):
    torch.manual_seed(0)
    x, before = torch.randn(B, 9, H * D).to(dtype), torch.randn(B, 3, H * D).to(dtype)
    weight = torch.randn(H * D, 4, requires_grad=True)
    plan = plan_documents(Bounds.whole(B, 9), (0, 9), CHUNK, 3, torch.device("cpu"))
    got = conv_silu_chunks(x, before, weight, plan, H, CHUNK)
    want = conv_silu_chunks(x.double(), before.double(), weight.double(), plan, H, CHUNK)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
