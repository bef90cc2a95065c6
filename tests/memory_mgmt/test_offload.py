"""The offload store: what comes back is what went, nothing stays behind, the budget holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from memory_mgmt.offload import HostStore
from memory_mgmt.offload_hooks import offloading

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


def same(got, want):
    assert got.shape == want.shape and got.stride() == want.stride() and got.dtype == want.dtype and got.device == want.device
    assert not got.numel() or torch.equal(got.flatten().contiguous().view(torch.uint8), want.flatten().contiguous().view(torch.uint8))


def random_bytes(n, dtype=torch.float32, seed=0):
    data = torch.randint(
        0, 2 if dtype == torch.bool else 256, (n * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return data.view(dtype)


VIEWS = {
    "whole": lambda x: x.view(4, 6, 5),
    "transposed": lambda x: x.view(4, 6, 5).transpose(0, 2),
    "slice": lambda x: x.view(4, 30)[:, 3:11],
    "tail": lambda x: x.view(4, 30)[2:],
    "steps": lambda x: x[::7],
    "expanded": lambda x: x[:12].view(3, 1, 4).expand(3, 5, 4),
    "expanded slice": lambda x: x.view(4, 30)[:, None, 3:11].expand(4, 2, 8),
    "overlapping": lambda x: x.as_strided((5, 4), (2, 1), 3),
    "scalar": lambda x: x[7],
    "empty": lambda x: x.view(4, 30)[:, 4:4],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_every_layout_and_dtype_comes_back(view, dtype):
    x = VIEWS[view](random_bytes(120, dtype))
    with HostStore("cpu") as store:
        want = x.clone() if view == "scalar" else x.as_strided(x.size(), x.stride())
        same(store.park(x, 0).fetch(), want)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_views_of_one_storage(data):
    base = torch.arange(60.0)
    views = []
    for _ in range(data.draw(st.integers(1, 4))):
        dims = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=3))
        sizes, strides = [n for n, _ in dims], [s for _, s in dims]
        reach = sum(max(n - 1, 0) * s for n, s in dims)
        views.append(base.as_strided(sizes, strides, data.draw(st.integers(0, 59 - reach))))
    with HostStore("cpu") as store:
        parked = [store.park(view, i) for i, view in enumerate(views)]
        for p, view in zip(parked, views, strict=True):
            same(p.fetch(), view)
        del parked, p
        assert store.used_bytes == 0


def test_views_of_one_storage_are_stored_once_and_alias_again():
    x = random_bytes(64).view(8, 8)
    with HostStore("cpu") as store:
        parked = [store.park(view, 0) for view in (x, x.t(), x.view(4, 16), x[2:5], x[:, 1:3])]
        assert store.used_bytes == x.nbytes
        whole, turned, *others = (p.fetch() for p in parked)
        assert len({t.untyped_storage().data_ptr() for t in (whole, turned, *others)}) == 1
        same(turned, x.t())
        whole[0, 1] = 7.0
        assert turned[1, 0] == 7.0
        # What is fetched after somebody wrote is what was parked.
        same(parked[0].fetch(), x)


def test_same_address_and_dtype_but_other_strides_is_not_the_same_tensor():
    x = torch.arange(16.0).view(4, 4)
    with HostStore("cpu") as store:
        turned, plain = store.park(x.t(), 0), store.park(x, 0)
        assert torch.equal(plain.fetch(), x) and torch.equal(turned.fetch(), x.t())


def test_a_storage_that_was_written_to_or_replaced_is_stored_anew():
    with HostStore("cpu") as store:
        x = torch.ones(100)
        before = store.park(x, 0)
        x.add_(1)
        after = store.park(x, 0)
        assert before.fetch().sum() == 100 and after.fetch().sum() == 200
        handles = []
        for i in range(20):  # the allocator gives the same address again
            handles.append(store.park(torch.full((1000,), float(i)), 0))
        assert [h.fetch()[0].item() for h in handles] == [float(i) for i in range(20)]


def test_a_slice_may_come_back_compact():
    x = torch.arange(400.0).view(2, 20, 10)
    with HostStore("cpu") as store:
        parked = store.park(x[:, :3], 0, compact=True)
        got = parked.fetch()
        assert parked.nbytes == got.nbytes == got.untyped_storage().nbytes() == 2 * 3 * 10 * 4
        assert got.is_contiguous() and torch.equal(got, x[:, :3])
        del parked
        whole = store.park(x, 0)
        part = store.park(x[:, :3], 0, compact=True).fetch()
        assert part.is_contiguous() and torch.equal(part, x[:, :3]) and whole.nbytes == store.used_bytes


# --- autograd ---------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_plain_model(dtype):
    model, x = mlp().to(dtype), torch.randn(8, 16, dtype=dtype)
    want = gradients(model, x)
    with HostStore("cpu") as store:
        store.protect(model.parameters())
        for _ in range(3):
            equal_bits(gradients(model, x, store), want)
            assert store.used_bytes == 0
        assert store.copied_bytes.to_host == 3 * (store.copied_bytes.to_host // 3) > 0


def test_gradients_under_autocast_and_checkpoint():
    model, x, entered = mlp(), torch.randn(8, 16), []

    def recomputed(body, x):
        entered.append(x.nbytes)
        return checkpoint(body, x, use_reentrant=False)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = gradients(model, x, around=recomputed)
        with HostStore("cpu") as store:
            equal_bits(gradients(model, x, store), gradients(model, x))
            entered.clear()
            store.statistics(reset=True)
            equal_bits(gradients(model, x, store, around=recomputed), want)
            # Of a checkpointed layer only its input is saved.
            assert store.copied_bytes.to_host == sum(entered) > 0
            assert store.used_bytes == 0
