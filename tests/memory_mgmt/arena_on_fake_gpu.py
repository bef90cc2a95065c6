"""Run by ``test_arena_cuda_torch.py`` with the fake runtime in front of CUDA's: the arena behind torch's real CUDA allocator.

Kernels do nothing there, so numbers mean nothing; which tensors are asked for, on which streams, and by whom they are served is real.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from memory_mgmt.arena import Arena, build_arena
from memory_mgmt.arena_cuda import CudaBackend, use_expandable_segments
from memory_mgmt.config import MemoryConfig
from memory_mgmt.offload import HostStore
from models.batch import Batch, Bounds
from parallel.dims import ParallelDims
from parallel.mesh import build_mesh
from trainer.build import build_engine
from trainer.config import RunConfig

MIB = 1 << 20
ELEMENTS = MIB // 2  # of float32: 2 MiB


def step(weight: torch.Tensor, side: torch.cuda.Stream, *, recorded: bool = False) -> None:
    """Forward, a visit on another stream, backward, update."""
    x = weight
    for _ in range(6):
        x = torch.relu(torch.tanh(x * 2))
    main = torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        y = torch.empty(2 * ELEMENTS, device="cuda")
        z = y * 3
    main.wait_stream(side)
    if recorded:
        z.record_stream(main)
    del y, z
    x.sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        weight.add_(weight.grad)
    weight.grad = None


def settings() -> dict[str, Any]:
    """What the caching allocator goes by."""
    return dict(torch.cuda.memory._snapshot())["allocator_settings"]


def serves_a_step(arena: Arena, weight: torch.Tensor, side: torch.cuda.Stream) -> None:
    """All of it, the backward pass included, beside torch's own statistics."""
    for _ in range(2):
        with arena.step():
            step(weight, side)
    height, bound = arena.height_bytes() or (0, 1)
    assert height == bound > 0
    held = torch.cuda.memory_allocated()
    assert held == weight.nbytes + height, "the region is the caching allocator's"
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        with arena.step():
            step(weight, side)
        assert arena.last_step["served"] > 25 and arena.last_step["waits"] > 0, arena.last_step
        assert arena.last_step["missed"] == arena.last_step["conflicts"] == arena.last_step["passed"] == 0, arena.last_step
        assert torch.cuda.max_memory_allocated() < held + MIB and torch.cuda.memory_allocated() == held


def stays_right(arena: Arena, weight: torch.Tensor, side: torch.cuda.Stream) -> None:
    """Another thread, an announced use on another stream, a tensor that lives on, a private pool."""
    theirs: list[torch.Tensor] = []
    with arena.step():
        thread = threading.Thread(target=lambda: theirs.append(torch.empty(ELEMENTS, device="cuda")))
        thread.start()
        thread.join()
        step(weight, side, recorded=True)
        kept = torch.empty(ELEMENTS, device="cuda")
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            pooled = torch.empty(ELEMENTS, device="cuda")
    assert arena.last_step["served"] > 25 and arena.last_step["missed"] == 1, arena.last_step  # kept; not theirs, not the pool's
    del theirs[:], kept, pooled, pool
    assert arena.live_blocks() == 0
    with arena.step("other"):
        torch.empty(ELEMENTS, device="cuda").record_stream(side)  # while requests are logged
    torch.cuda.memory_snapshot()


ENGINES: dict[str, dict[str, Any]] = {
    "recomputed": {"memory": {"recompute": "block"}},
    "block inputs in host memory, on streams of their own": {"memory": {"recompute": "block", "offload": "inputs"}},
    "two shards under FSDP2": {"memory": {"recompute": "block"}, "parallel": {"dp_shard": 2}},
    "two shards, states in host memory": {
        "memory": {"recompute": "block", "offload": "inputs", "offload_optimizer": "host"},
        "parallel": {"dp_shard": 2},
        "optim": {"preset": "adamw_8bit"},
    },
    "two shards, parameters and states in host memory": {
        "memory": {"recompute": "block", "offload_optimizer": "host", "offload_parameters": "host"},
        "parallel": {"dp_shard": 2},
    },
}


def serves_the_engine(device: torch.device, name: str) -> None:
    """Every large request of longstride's own step, recomputation, gathered parameters, copies and update included, after the first ones
    are watched. Ranks that share parameters are pretended: messages carry nothing."""
    length, vocab, sections = 2048, 512, ENGINES[name]
    config = RunConfig.model_validate(
        {
            "model": {"d_model": 256, "n_heads": 4, "layers": ["full", "swa"], "n_layers": 4},
            "data": {"seq_len": length},
            "train": {"precision": "bf16", "device": "cuda"},
            **sections,
        }
    )
    ranks = config.parallel.ranks_asked
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = build_mesh(ParallelDims.from_config(config.parallel, ranks), "cuda") if ranks > 1 else None
    with closing(Arena(backend=CudaBackend(), smallest_bytes=MIB // 8)) as arena, HostStore(device) as store:
        engine = build_engine(config, vocab, mesh, device, store=store)
        tokens_BT = torch.zeros(1, length, dtype=torch.long)
        batch = Batch(tokens_BT, tokens_BT.clone(), torch.arange(length)[None], Bounds.whole(1, length))
        for _ in range(6):  # the first one differs: it makes the optimizer's states
            with arena.step():
                engine.forward_backward([batch])
                engine.step(1e-3, accept=lambda norm: True)
        said = arena.last_step
        assert said["served"] > 50 and said["position"] == said["served"] + said["passed"], (name, said)
        assert said["missed"] == said["conflicts"] == 0, (name, said)
        assert (said["waits"] > 0) == ("shards" in name), (name, said)  # gathered parameters leave their place to other streams
        assert said["passed"] <= 0.02 * said["served"], (name, said)
        height, bound = arena.height_bytes() or (0, 1)
        assert 0 < height <= 1.05 * bound, (name, height, bound)
        del engine
    if ranks > 1:
        dist.destroy_process_group()


def main() -> None:
    """Everything, in a process of its own."""
    torch.cuda.init()
    use_expandable_segments()
    said = settings()
    assert said["expandable_segments"] and said["max_split_size"] == 64 * MIB, said
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")  # they need a driver
    before = torch.empty(ELEMENTS, device="cuda")
    device = torch.device("cuda", 0)
    weight = torch.ones(ELEMENTS, device=device, requires_grad=True)
    arena = build_arena(MemoryConfig(arena=True), device)
    assert arena is not None
    side = torch.cuda.Stream()
    del before  # made before the arena, freed after
    serves_a_step(arena, weight, side)
    stays_right(arena, weight, side)
    arena.close()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == weight.nbytes
    del weight
    torch.cuda.empty_cache()
    runtime = ctypes.CDLL("libcuda.so.1")
    runtime.fake_live_bytes.restype = ctypes.c_int64
    assert runtime.fake_live_bytes() == 0
    torch.backends.cudnn.version = lambda: 0  # there is no cuDNN without a driver: attention takes torch's own kernel
    for name in ENGINES:
        serves_the_engine(device, name)
    print("served by the arena on torch", torch.__version__)


if __name__ == "__main__":
    main()
