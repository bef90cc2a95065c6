"""The order of copies on streams of their own, without a GPU: copies that happen as late as the waits allow, and on memory that they
do not keep alive. A missing wait shows as a wrong value or as a copy from or to freed memory."""

import ctypes
import gc
import os
import random
import threading
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from memory_mgmt.offload import HostStore
from memory_mgmt.offload_copies import pairs
from memory_mgmt.offload_hooks import offloading

RUNNING = threading.RLock()  # the disk tier waits for events in a thread of its own


@dataclass(eq=False)
class Event:
    stream: "LateStream"
    number: int


@dataclass
class LateStream:
    """Runs its jobs when somebody waits for them, not earlier."""

    queue: list = field(default_factory=list)
    done: int = 0

    def add(self, copies, after=None):
        # Like a real copy it knows addresses only.
        jobs = [(StorageWeakRef(a.untyped_storage()), StorageWeakRef(b.untyped_storage()), a.numpy(), b.numpy()) for a, b in copies]
        self.queue.append(([(ra, rb, a.ctypes.data, b.ctypes.data, a.size) for ra, rb, a, b in jobs], after))
        return Event(self, self.done + len(self.queue))

    def run_to(self, event):
        with RUNNING:
            self._run_to(event)

    def _run_to(self, event):
        while self.done < event.number:
            copies, after = self.queue.pop(0)
            if after is not None:
                after.stream._run_to(after)
            for target, source, to, start, size in copies:
                assert not target.expired() and not source.expired(), "a copy of freed memory"
                ctypes.memmove(to, start, size)
            self.done += 1


class LateCopies:
    """The Copies protocol of memory_mgmt/offload_copies.py on late streams."""

    def __init__(self):
        self.waited_seconds = 0.0
        self.out, self.back = LateStream(), LateStream()

    def to_host(self, source, pieces):
        return self.out.add([(piece, part) for part, piece in pairs(source, pieces)])

    def to_device(self, pieces, target, after):
        return self.back.add(pairs(target, pieces), after)

    def here(self):
        return None

    def hold(self, event, stream=None, timed=False):
        self.finish(event)

    def finish(self, event):
        if event is not None:
            event.stream.run_to(event)

    def finished(self, event):
        return event is None or event.stream.done >= event.number

    def settle_times(self):
        pass


def late_store(*args):
    store = HostStore("cpu", *args)
    store._plain = LateCopies()
    store._return.overlaps = True
    return store


def pattern(i, n=300):
    return torch.arange(n, dtype=torch.float32) + 1000 * i


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("budget", [None, 5000])
def test_layers_out_and_back(prefetch, budget, tmp_path):
    with late_store(budget, tmp_path if budget else None) as store:
        for step in range(3):
            parked = [[store.park(pattern(10 * i + j, 200 + 100 * j), (i, j)) for j in range(2)] for i in range(6)]
            if step:
                store.settle()
            for i in reversed(range(6)):
                for ahead in range(1, prefetch + 1):
                    if i - ahead >= 0:
                        store.prefetch((i - ahead, 0))
                for j in range(2):
                    got = parked[i][j].fetch()
                    assert torch.equal(got, pattern(10 * i + j, 200 + 100 * j)), (step, i, j)
                    parked[i][j].drop()
                    del got
            assert store.used_bytes == 0


def test_random_uses():
    random.seed(0)
    with late_store() as store:
        live, fetched = {}, {}
        for k in range(1500):
            what = random.choice(["park", "park", "fetch", "prefetch", "drop", "free", "settle"])
            if what == "park":
                live[k] = store.park(pattern(k, random.choice([64, 64, 128])), (k // 4, "x"))
            elif what == "settle":
                store.settle()
            elif what == "free" and fetched:
                del fetched[random.choice(list(fetched))]
            elif live and what != "free":
                key = random.choice(list(live))
                if what == "fetch":
                    fetched[key] = live[key].fetch()
                elif what == "prefetch":
                    live[key].prefetch()
                else:
                    del live[key]
            for key, got in fetched.items():
                assert torch.equal(got, pattern(key, got.numel())), (k, key, what)
        live.clear()
        fetched.clear()
        store.settle()
        assert store.used_bytes == 0


def test_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(6)))
    x = torch.randn(32, 16)

    def gradients(store):
        model.zero_grad()
        y = x
        for i, layer in enumerate(model):
            if store is None:
                y = layer(y)
            else:
                with offloading(store, (i, "saved"), min_bytes=1):
                    y = layer(y)
        y.sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients(None)
    with late_store() as store:
        for _ in range(3):
            for got, expected in zip(gradients(store), want, strict=True):
                assert torch.equal(got, expected)
        gc.collect()
        assert store.used_bytes == 0 and store.copied_bytes.to_host > store.copied_bytes.to_device > 0


def test_sources_are_let_go_two_layers_later():
    with late_store() as store:
        references, parked = [], []
        for i in range(4):
            x = pattern(i)
            references.append(StorageWeakRef(x.untyped_storage()))
            parked.append(store.park(x, (i, "x")))
            del x
        assert [r.expired() for r in references] == [True, True, False, False]
        store.begin_layer((4, "parks nothing"))
        assert [r.expired() for r in references] == [True, True, True, False]
        assert torch.equal(parked[3].fetch(), pattern(3)) and store.copied_bytes.to_device == 0  # it is still there
        del parked
        assert all(r.expired() for r in references) and store.used_bytes == 0


def test_writing_to_a_tensor_that_is_being_copied_is_an_error():
    with late_store() as store:
        x = pattern(0)
        parked = store.park(x, (0, "x"))
        x.add_(1)
        with pytest.raises(RuntimeError, match="written to"):
            parked.fetch()
        parked.drop()


def test_block_that_is_read_back_while_it_is_written_to_disk(tmp_path, monkeypatch):
    go, write = threading.Event(), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: go.wait(20) and write(*args))
    with late_store(4096, tmp_path) as store:
        parked = [store.park(pattern(i, 256), (i, "x")) for i in range(4)]  # the first is on its way to disk
        store.settle()
        assert parked[0]._entries()[0].job is not None
        parked[0].prefetch()  # its copy to the device has not happened yet
        go.set()
        parked[0]._entries()[0].job.result()
        parked.append(store.park(pattern(4, 256), (4, "x")))  # wants a block
        store.settle()
        for i in (0, 4, 3, 2, 1):
            assert torch.equal(parked[i].fetch(), pattern(i, 256)), i
