"""What several tests of the offload store share."""

import torch
from torch import nn

from memory_mgmt.offload_hooks import offloading


def same(got, want):
    assert got.shape == want.shape and got.stride() == want.stride() and got.dtype == want.dtype and got.device == want.device
    got, want = (torch.empty(t.shape, dtype=t.dtype).copy_(t).flatten() for t in (got, want))
    assert not got.numel() or torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def random_bytes(n, dtype=torch.float32, seed=0):
    data = torch.randint(
        0, 2 if dtype == torch.bool else 256, (n * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return data.view(dtype)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


def gradients(model, x, store=None, around=lambda body, x: body(x)):
    model.zero_grad()
    for i, layer in enumerate(model):
        if store is None:
            x = around(layer, x)
        else:
            with offloading(store, (i, "saved"), min_bytes=1):
                x = around(layer, x)
    x.square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def equal_bits(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def pattern(i):
    return torch.arange(256.0) + 1000 * i
