"""Checks of the offload store on fake cuda tensors, in a process of their own: ``python -m tests.memory_mgmt.offload_on_fake_cuda``."""

import tempfile
import weakref
from collections import Counter
from pathlib import Path

from memory_mgmt import fake_cuda

fake_cuda.preload()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

from memory_mgmt.offload import HostStore  # noqa: E402
from memory_mgmt.offload_hooks import offloading  # noqa: E402
from models.errors import UserError  # noqa: E402

MIB = 2**20


class Bytes(TorchDispatchMode):
    """Live bytes by device, of storages that operations make."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = Counter(), Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.seen:
                self.seen.add(key)
                device, size = t.device.type, t.untyped_storage().nbytes()
                self.live[device] += size
                self.peak[device] = max(self.peak[device], self.live[device])
                weakref.finalize(t.untyped_storage(), self.freed, key, device, size)
        return out

    def freed(self, key, device, size):
        self.seen.discard(key)
        self.live[device] -= size


def layers():
    # Six layers of 1 MB; two at most on the device in each direction.
    with FakeTensorMode(), Bytes() as mode, HostStore("cuda") as store:
        parked = []
        for i in range(6):
            x = torch.empty(2**18, device="cuda")
            parked.append(store.park(x.view(512, 512).t(), (i, "x")))
            del x
        assert (mode.live["cpu"], mode.live["cuda"], mode.peak["cuda"]) == (6 * 2**20, 2 * 2**20, 3 * 2**20)
        store.settle()
        assert mode.live["cuda"] == 0
        mode.peak.clear()
        while parked:
            handle = parked.pop()
            got = handle.fetch()
            for other in reversed(parked[-3:]):  # more than may be there
                other.prefetch()
            assert isinstance(got, FakeTensor) and got.device.type == "cuda" and (got.shape, got.stride()) == ((512, 512), (1, 512))
            del handle, got
        del other
        assert mode.peak["cuda"] == 2 * 2**20
        assert store.used_bytes == 0 and mode.live["cpu"] == 0 and mode.live["cuda"] == 0
        assert store.copied_bytes == (6 * 2**20, 6 * 2**20)


def budget():
    with tempfile.TemporaryDirectory() as directory, FakeTensorMode(), Bytes() as mode:
        with HostStore("cuda", 2500, Path(directory)) as store:
            parked = [store.park(torch.empty(250, device="cuda"), i) for i in range(6)]
            assert mode.live["cpu"] <= 2500
            while parked:
                assert parked.pop().fetch().shape == (250,)
            assert store.used_bytes == mode.live["cpu"] == 0
        assert not list(Path(directory).iterdir())
        with HostStore("cuda", 2500) as store:
            try:
                parked = [store.park(torch.empty(250, device="cuda"), i) for i in range(6)]
            except UserError as error:
                assert "memory.host_gib" in str(error)
            else:
                raise AssertionError("the budget was exceeded in silence")


def autograd():
    # Twelve layers, each saving one tensor of 1 MiB that nobody else holds.
    with FakeTensorMode(), Bytes() as mode, HostStore("cuda") as store:
        model = nn.Sequential(*(nn.Tanh() for _ in range(12)))
        x = torch.empty(2**18, device="cuda", requires_grad=True)
        before = mode.live["cuda"]
        for i, layer in enumerate(model):
            with offloading(store, (i, "out")):
                x = layer(x)
        store.settle()
        assert mode.live["cpu"] == 12 * MIB and mode.live["cuda"] - before == MIB, mode.live
        mode.peak.clear()
        loss = x.sum()
        del x
        loss.backward()
        # The layer that is differentiated, the one that is prefetched, the gradients before and after it.
        assert mode.peak["cuda"] - before <= 5 * MIB, mode.peak
        assert store.used_bytes == mode.live["cpu"] == 0


if __name__ == "__main__":
    fake_cuda.install(1)
    for check in (layers, budget, autograd):
        check()
        print(check.__name__)
    fake_cuda.leave(0)
