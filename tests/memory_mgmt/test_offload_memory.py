"""The offload store's memory: budget, reuse, buffers, eight bits, disk, and the same on fake tensors."""

import contextlib
import errno
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from memory_mgmt.offload import HostStore
from models.errors import UserError
from tests.memory_mgmt.offload_cases import equal_bits, gradients, mlp, pattern, random_bytes, same

# --- memory -----------------------------------------------------------------------------------------------------------------------


def test_steady_state_maps_no_memory():
    model, x = mlp(), torch.randn(64, 16)
    with HostStore("cpu") as store:
        gradients(model, x, store)
        reserved, peak = store.reserved_bytes, store.statistics(reset=True).peak_bytes
        for _ in range(3):
            gradients(model, x, store)
            assert (store.reserved_bytes, store.statistics(reset=True).peak_bytes) == (reserved, peak)
    assert store.reserved_bytes == 0


def test_budget_error_names_the_setting_and_leaves_the_store_usable():
    with HostStore("cpu", 1000) as store:
        first = store.park(torch.ones(200), 0)
        with pytest.raises(UserError, match=r"memory.host_gib.*memory.offload_dir"):
            store.park(torch.ones(200), 1)
        assert store.used_bytes == 800
        assert first.fetch().sum() == 200
        first.drop()
        assert store.park(torch.ones(200), 1).fetch().sum() == 200
        with pytest.raises(RuntimeError, match="dropped"):
            first.fetch()
        with pytest.raises(UserError, match="memory.host_gib"):
            store.reserve(2000)
    with pytest.raises(RuntimeError, match="closed"):
        store.park(torch.ones(2), 0)


def test_fetched_tensors_outlive_handle_and_store():
    with HostStore("cpu") as store:
        parked = [store.park(torch.full((100,), float(i)), i) for i in range(4)]
        got = [p.fetch() for p in parked]
        del parked
        more = [store.park(torch.full((100,), -1.0), i).fetch() for i in range(4)]
    assert [t[0].item() for t in got] == [0, 1, 2, 3] and all((t == t[0]).all() for t in got + more)


def test_buffers_alternate_between_layers():
    with HostStore("cpu") as store:
        parked = [store.park(torch.full((1000,), float(i)), (i, "x")) for i in range(6)]
        buffers = []
        while parked:
            got = parked.pop().fetch()
            assert got.eq(len(parked)).all()
            buffers.append(StorageWeakRef(got.untyped_storage()))
            del got
            assert sum(not buffer.expired() for buffer in buffers) <= 2


def test_buffers_that_nothing_waits_for_are_freed():
    with HostStore("cpu") as store:
        parked = [store.park(torch.ones(1000), i) for i in range(3)]
        last = parked.pop()
        got = last.fetch()
        buffer = StorageWeakRef(got.untyped_storage())
        del got, last
        assert store.used_bytes == 8000 and not buffer.expired()  # kept for one of the two
        parked.clear()
        assert store.used_bytes == 0 and buffer.expired()


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 1 / 254), ("fp8", 1 / 16)])
def test_eight_bits(kind, tolerance):
    x = torch.randn(6, 32, dtype=torch.bfloat16) * torch.logspace(-3, 3, 6)[:, None]
    x[2] = 0
    with HostStore("cpu") as store:
        for tensor in (x, x.t().contiguous().t(), x[:, 3:9], x.view(6, 1, 32).expand(6, 2, 32), x[0, 0]):
            parked = store.park(tensor, 0, quantise=kind)
            got = parked.fetch()
            assert got.stride() == tensor.stride() and got.dtype == tensor.dtype
            limit = tensor.float().abs().amax(-1, keepdim=True) * (tolerance + 2**-8)
            assert ((got.float() - tensor.float()).abs() <= limit).all()
            distinct = tensor[:, :1] if tensor.ndim == 3 else tensor
            assert parked.nbytes == distinct.numel() + 4 * max(distinct.numel() // distinct.shape[-1] if distinct.ndim else 1, 1)
        with pytest.raises(ValueError, match="eight bits"):
            store.park(torch.ones(3, dtype=torch.int64), 0, quantise=kind)
        bad = torch.tensor([[1.0, float("inf")], [1.0, 2.0]])
        got = store.park(bad, 0, quantise=kind).fetch()
        assert got[0].isnan().all() and not got[1].isnan().any()


# --- disk -------------------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_goes_to_disk_and_comes_back(tmp_path):
    tensors = [random_bytes(250, seed=i) for i in range(20)]
    with HostStore("cpu", 3000, tmp_path) as store:
        for _ in range(2):
            parked = [store.park(x, (i, "x")) for i, x in enumerate(tensors)]
            assert store.used_bytes <= 3000 and store.disk_bytes >= 17_000
            assert not list(tmp_path.iterdir())  # unlinked: nothing to clean up after a crash
            for i in reversed(range(20)):
                if i:
                    parked[i - 1].prefetch()
                same(parked[i].fetch(), tensors[i])
                if i % 2:
                    parked[i].drop()
            same(parked[0].fetch(), tensors[0])
            del parked
            assert store.used_bytes == store.disk_bytes == 0
            figures = store.statistics(reset=True)
            assert figures.peak_bytes <= 3000 and figures.disk_bytes >= 17_000
        with pytest.raises(UserError, match="memory.host_gib"):
            store.park(torch.ones(1000), 0)


def test_gradients_through_the_disk(tmp_path):
    model, x = mlp(), torch.randn(32, 16)
    want = gradients(model, x)
    with HostStore("cpu", 9000, tmp_path) as store:
        for _ in range(3):
            equal_bits(gradients(model, x, store), want)
        assert store.statistics().disk_bytes > 0
        assert store.used_bytes == store.disk_bytes == 0


def test_full_disk_is_named_and_loses_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    tensors = [random_bytes(250, seed=i) for i in range(3)]
    with HostStore("cpu", 3000, tmp_path) as store:
        monkeypatch.setattr(os, "pwrite", full)
        parked = []
        with pytest.raises(UserError, match=r"memory.offload_dir.*full"):
            for x in [*tensors, *tensors]:
                parked.append(store.park(x.clone(), len(parked)))
        for p, x in zip(parked, tensors, strict=False):
            same(p.fetch(), x)


def test_handles_lost_while_they_are_written(tmp_path, monkeypatch):
    go, write = threading.Event(), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: go.wait(20) and write(*args))
    with HostStore("cpu", 4096, tmp_path) as store:
        parked = [store.park(pattern(i), i) for i in range(4)]
        del parked[0]
        threading.Timer(0.1, go.set).start()
        parked += [store.park(pattern(i), i) for i in range(4, 7)]  # has to wait for the block that is being written
        for p, i in zip(parked, range(1, 7), strict=True):
            same(p.fetch(), pattern(i))
        del parked, p
        assert store.used_bytes == store.disk_bytes == 0


def test_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with HostStore("cpu", 2000, tmp_path / "file" / "sub") as store, pytest.raises(UserError, match="memory.offload_dir"):
        for i in range(3):
            store.park(torch.ones(400), i)


# --- fake tensors -----------------------------------------------------------------------------------------------------------------


def test_fake_cpu_counts_the_bytes_of_a_real_step():
    peaks = []
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode, HostStore("cpu", fake_empty=lambda n: torch.empty(n, dtype=torch.uint8)) as store:
            model = mlp()
            gradients(model, torch.randn(8, 16), store)
            assert store.used_bytes == 0 and store.reserved_bytes == (0 if isinstance(mode, FakeTensorMode) else store.reserved_bytes)
            peaks.append((store.peak_bytes, store.copied_bytes))
    assert peaks[0] == peaks[1]


def test_fake_cuda():
    done = subprocess.run([sys.executable, "-m", "tests.memory_mgmt.offload_on_fake_cuda"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["layers", "budget", "autograd"]
