"""A GPU that is not there: ``fake_cudart.cpp``, and programs of several streams that take their memory from the CUDA arena over it.

Device memory is host memory, so what was written shows whether two tensors shared bytes; the fake runtime keeps the order that streams
and events make, so a use of bytes that some other tensor may still be in use on is a race.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from memory_mgmt.arena_cuda import CudaBackend, library

SOURCE = Path(__file__).with_name("fake_cudart.cpp")
STREAMS = (0, 0x7000, 0x7100)
_COUNTERS = ("races", "live_bytes", "peak_bytes", "mallocs", "waits", "records")


def build_fake_runtime(folder: Path, soname: str = "libfakecudart.so") -> Path:
    """The shared library; ``soname`` is what other libraries know it by."""
    made = folder / soname
    subprocess.run(["g++", "-O1", "-std=c++17", "-fPIC", "-shared", f"-Wl,-soname,{soname}", str(SOURCE), "-o", str(made)], check=True)
    return made


@dataclass
class Held:
    """A tensor of a fake program."""

    address: int
    size: int
    stream: int
    number: int

    @property
    def bytes(self) -> ctypes.Array[ctypes.c_uint8]:
        """Its memory."""
        return (ctypes.c_uint8 * self.size).from_address(self.address)


@dataclass
class FakeGpu:
    """Tensors by name, made and freed as torch does with a pluggable allocator, and used on streams."""

    runtime: ctypes.CDLL
    arena: ctypes.CDLL
    tensors: dict[str, Held] = field(default_factory=dict)
    made: int = 0
    damaged: int = 0

    @staticmethod
    def load(path: Path) -> FakeGpu:
        """The CUDA arena over the fake runtime at ``path``."""
        runtime = ctypes.CDLL(str(path))
        for name in _COUNTERS:
            getattr(runtime, f"fake_{name}").restype = ctypes.c_int64
        runtime.fake_use.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        runtime.fake_first_race.restype = ctypes.c_char_p
        runtime.fake_refuse.argtypes = [ctypes.c_int64]
        runtime.cudaEventCreateWithFlags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        runtime.cudaEventRecord.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        runtime.cudaStreamWaitEvent.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
        arena = library()
        assert arena.lsa_runtime(str(path).encode()) == 1
        return FakeGpu(runtime, arena)

    def backend(self) -> CudaBackend:
        """What an ``Arena`` takes."""
        return CudaBackend(self.arena, device=0, empty_cache=lambda: None)

    def count(self, name: str) -> int:
        """A counter of the runtime."""
        return getattr(self.runtime, f"fake_{name}")()

    def make(self, name: str, size: int, stream: int = 0) -> Held:
        """A tensor, written on its stream."""
        self.made += 1
        held = Held(self.arena.lsa_malloc(size, 0, stream), size, stream, self.made)
        assert held.address and held.address % 512 == 0
        self.tensors[name] = held
        ctypes.memset(held.address, held.number % 251, size)
        self.use(name)
        return held

    def use(self, name: str, stream: int | None = None) -> None:
        """Work on the tensor, on its own stream if not said otherwise."""
        held = self.tensors[name]
        self.runtime.fake_use(held.address, held.size, held.stream if stream is None else stream, held.number)

    def after(self, stream: int, source: int) -> None:
        """The program's own synchronisation: ``stream`` goes on after what ``source`` did so far."""
        event = ctypes.c_void_p()
        self.runtime.cudaEventCreateWithFlags(ctypes.byref(event), 2)
        self.runtime.cudaEventRecord(event, source)
        self.runtime.cudaStreamWaitEvent(stream, event, 0)

    def visit(self, name: str, stream: int, *, recorded: bool = False) -> None:
        """Use the tensor on another stream; then its own waits for that, or with ``recorded`` the allocator is told."""
        own = self.tensors[name].stream
        self.after(stream, own)
        self.use(name, stream)
        if recorded:
            self.arena.lsa_record_stream(self.tensors[name].address, stream)
        else:
            self.after(own, stream)

    def free(self, name: str) -> None:
        """Use the tensor once more and free it; counts what others wrote into it."""
        self.use(name)
        held = self.tensors.pop(name)
        value = held.number % 251
        if held.bytes[0] != value or held.bytes[held.size - 1] != value or bytes(held.bytes) != bytes([value]) * held.size:
            self.damaged += 1
        self.arena.lsa_free(held.address, held.size, 0, held.stream)

    def free_all(self) -> None:
        """Free what is left."""
        for name in list(self.tensors):
            self.free(name)

    def check(self) -> None:
        """Nothing shared bytes, nothing raced."""
        assert self.damaged == 0
        assert self.count("races") == 0, self.runtime.fake_first_race()


Program = Callable[[FakeGpu], None]
