"""The offload store: what comes back is what went, gradients are exact, nothing stays behind."""

import contextlib
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from memory_mgmt.offload import HostStore
from memory_mgmt.offload_hooks import offloading
from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.transformer import Transformer, init_weights
from tests.distributed import run_distributed
from tests.memory_mgmt.offload_cases import equal_bits, gradients, mlp, random_bytes, same

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


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


def transformer():
    config = ModelConfig(d_model=16, n_heads=2, layers=("full", "swa", "memory"), window=16)
    model = Transformer(config, 64)
    init_weights(model, 0)
    tokens = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(0))
    return model, Batch(tokens, tokens.roll(-1, 1), torch.arange(48).expand(2, 48), Bounds(48, ((0, 48),), ((0, 20), (0,))))


def park_in_blocks(model, store, wrap=lambda body, *args: body(*args)):
    def runner(i):
        def run(body, *args):
            with offloading(store, (i, "saved"), min_bytes=1):
                return wrap(body, *args)

        return run

    for i, block in enumerate(model.blocks):
        block.run = runner(i)


@pytest.mark.parametrize("autocast", [False, True])
def test_transformer_is_bit_identical(autocast):
    (plain, batch), (model, _) = transformer(), transformer()
    with HostStore("cpu") as store, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        store.protect(model.parameters())
        park_in_blocks(model, store)
        for _ in range(2):  # gradients accumulate over two forward passes before one backward pass
            for m in (plain, model):
                m.zero_grad()
                (m(batch).sum() + 2 * m(batch).sum()).backward()
            for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad), name
            figures = store.statistics(reset=True)
            assert store.used_bytes == 0 and figures.peak_bytes > 0 and figures.copied.to_device >= figures.copied.to_host
            if autocast:  # the weights' casts are saved too, and none of them may travel
                assert figures.copied.to_host < 2 * sum(t.nbytes for t in saved_by(plain, batch))


def saved_by(model, batch):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(batch)
    return saved


def test_parameters_and_their_casts_never_travel():
    layer, x = nn.Linear(64, 64), torch.randn(1, 64)
    seen = []
    with HostStore("cpu") as store:
        for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
            with context, offloading(store, 0, min_bytes=1, keep=lambda t: seen.append(t.shape) or False):
                y = layer(x * x.requires_grad_())
            assert set(seen) <= {x.shape} and seen  # [1, 64] activations only, never [64, 64]
            del y
        weight = layer.weight
        for tensor in (weight, weight.t(), weight.view(-1)[3:], weight.to(torch.bfloat16), weight.data):
            store.protect([weight])
            with pytest.raises(ValueError, match="cannot be parked"):
                store.park(tensor, 0)
        with pytest.raises(ValueError, match="sparse"):
            store.park(torch.eye(3).to_sparse(), 0)


def test_retained_graphs_double_backward_and_in_place_errors():
    with HostStore("cpu") as store:
        x = torch.randn(50, dtype=torch.float64, requires_grad=True)
        with offloading(store, 0, min_bytes=1):
            y = (x.sin().exp() * x).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
        assert torch.equal(torch.autograd.grad(y, x, retain_graph=True)[0], first)
        want = x.sin().exp() * (2 * x.cos() + x * (x.cos() ** 2 - x.sin()))
        torch.testing.assert_close(second, want)
        del y, first, second
        gc.collect()
        assert store.used_bytes == 0
        with offloading(store, 0, min_bytes=10**9):  # everything stays
            kept = x.sin()
            out = kept.exp().sum() + kept.cos().sum()
        kept.detach().mul_(2)
        with pytest.raises(RuntimeError, match="in-place"):
            out.backward()


@pytest.mark.parametrize("end", ["no backward", "error in forward", "error in backward", "no grad"])
def test_nothing_stays_behind(end):
    model, x = mlp(), torch.randn(8, 16)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            if end == "error in forward":
                raise ArithmeticError
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError

    def forward(store):
        with offloading(store, 0, min_bytes=1):
            y = model[:3](x)
        with offloading(store, 1, min_bytes=1):
            return model[3:](Fails.apply(y)).sum()

    def attempt(store):
        with torch.set_grad_enabled(end != "no grad"):
            loss = forward(store)
        assert (store.used_bytes > 0) == (end != "no grad")
        if end == "error in backward":
            loss.backward()

    with HostStore("cpu") as store:
        with pytest.raises(ArithmeticError) if end.startswith("error") else contextlib.nullcontext():
            attempt(store)
        gc.collect()
        assert store.used_bytes == 0


def test_threads_share_a_store():
    with HostStore("cpu", 2**20) as store:

        def work(seed):
            for i in range(30):
                x = random_bytes(500 + seed, seed=seed * 100 + i)
                parked = [store.park(x, (seed, i)), store.park(x.view(-1)[1:], (seed, i))]
                same(parked[0].fetch(), x)
                same(parked[1].fetch(), x[1:])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        gc.collect()
        assert store.used_bytes == 0


# --- under FSDP2 ------------------------------------------------------------------------------------------------------------------


def sharded(mixed):
    plain, batch = transformer()
    model, _ = transformer()
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    travelled = []
    for m in (plain, model):
        for block in m.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(m, mesh=mesh, mp_policy=policy)
    shapes = {tuple(s) for p in plain.parameters() if p.ndim == 2 for s in (p.shape, p.shape[::-1])}
    with HostStore("cpu") as store:
        store.protect(model.parameters())
        park = store.park
        store.park = lambda tensor, slot: travelled.append(tuple(tensor.shape)) or park(tensor, slot)
        park_in_blocks(model, store)
        for _ in range(2):
            for m in (plain, model):
                m.zero_grad()
                m(batch).sum().backward()
            for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
                assert torch.equal(p.grad.to_local(), q[1].grad.to_local()), name
            assert store.used_bytes == 0
    assert travelled and not shapes & set(travelled)


@pytest.mark.parametrize("mixed", [False, True])
def test_gathered_parameters_never_travel(mixed):
    run_distributed(sharded, 2, mixed)
