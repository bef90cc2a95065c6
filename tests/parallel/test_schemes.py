"""Every sequence-parallel scheme equals dense float64 attention of the whole sequence, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from models import attention
from models.attention import LocalAttention, attention_reference
from models.attention_plan import TileLimits
from models.batch import Bounds
from parallel import allgather_kv, hybrid, ulysses
from parallel.allgather_kv import AllGatherKVAttention
from parallel.hybrid import HybridAttention
from parallel.sequence import ranges_for
from parallel.ulysses import UlyssesAttention
from tests.distributed import run_on_kept_ranks as run_distributed

SEQ_LEN = 48
DOCUMENTS = {
    "one": [(0,), (0,)],
    "longer_than_a_shard": [(0, 7, 43), (0, 7, 43)],
    "tiny": [tuple(range(0, 48, 3)), (0, 1, 2, 4, 7, 8, 30, 31, 33, 34, 36)],
    "rows_differ": [(0, 20), (0, 12, 24, 36)],
}
MASKS = [(None, "one"), (5, "one"), (None, "longer_than_a_shard"), (None, "tiny"), (40, "rows_differ"), (20, "longer_than_a_shard")]
TINY = TileLimits(block=3, keys_per_call=17, triangle=2, small=3, packed=7)


def _whole(dtype: torch.dtype, heads: tuple[int, int], dim: int = 8, length: int = SEQ_LEN) -> list[torch.Tensor]:
    """q, k, v, dout of two rows."""
    generator = torch.Generator().manual_seed(29)
    shapes = [(2, length, n, dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).transpose(1, 2) for s in shapes]


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual.double() - expected).norm() / expected.norm().clamp_min(1.0)).detach())


def _reference(tensors: list[torch.Tensor], documents: list[tuple[int, ...]], window: int | None) -> list[torch.Tensor]:
    """[out, dq, dk, dv] of the whole sequence in float64."""
    q, k, v = (x.double().clone().requires_grad_() for x in tensors[:3])
    out = attention_reference(q, k, v, documents, window)
    return [out, *torch.autograd.grad(out, (q, k, v), tensors[3].double())]


def _groups(n_ulysses: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's (Ulysses group, ring group)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    columns = [dist.new_group([r * n_ulysses + i for i in range(n_ulysses)]) for r in range(size // n_ulysses)]
    rings = [dist.new_group(list(range(i, size, n_ulysses))) for i in range(n_ulysses)]
    return columns[rank // n_ulysses], rings[rank % n_ulysses]  # type: ignore[return-value]


def _scheme(name: str, layout: str, window: int | None, chunk: int | None, groups: tuple | None):
    if name == "ulysses":
        return UlyssesAttention(dist.group.WORLD, layout, window, chunk)  # type: ignore[arg-type]
    if name == "allgather_kv":
        return AllGatherKVAttention(dist.group.WORLD, layout, window, chunk or 1)  # type: ignore[arg-type]
    assert groups is not None
    return HybridAttention(*groups, layout, window, chunk)  # type: ignore[arg-type]


def _split(scheme, tensors: list[torch.Tensor], documents: list[tuple[int, ...]], layout: str) -> tuple[list, list[int]]:
    """This rank's [out, dq, dk, dv] and the global indices of its tokens."""
    rank, size, length = dist.get_rank(), dist.get_world_size(), tensors[0].shape[2]
    bounds = Bounds(length, ranges_for(layout, length, rank, size), tuple(documents))  # type: ignore[arg-type]
    index = [i for start, end in bounds.ranges for i in range(start, end)]
    q, k, v = (x[:, :, index].clone().requires_grad_() for x in tensors[:3])
    out = scheme(q, k, v, bounds)
    assert out.dtype == q.dtype
    return [out, *torch.autograd.grad(out, (q, k, v), tensors[3][:, :, index])], index


def _compare(dtype: torch.dtype, name: str, n_ulysses: int, tiny: bool) -> dict[str, float]:
    """Largest relative error of this rank for heads, chunks, layouts, windows and documents."""
    if tiny:
        for module in (attention, ulysses, hybrid, allgather_kv):
            module.tile_limits = lambda q, window, call: TINY  # type: ignore[attr-defined]
    groups = _groups(n_ulysses) if name == "ring_x_ulysses" else None
    errors = {}
    for i, (heads, chunk) in enumerate(HEADS[name]):
        tensors = _whole(dtype, heads)
        for j, (window, which) in enumerate(MASKS):
            documents, layout = DOCUMENTS[which], ("contiguous", "zigzag")[(i + j) % 2]
            expected = _reference(tensors, documents, window)
            actual, index = _split(_scheme(name, layout, window, chunk, groups), tensors, documents, layout)
            key = f"heads {heads}, chunk {chunk}, window {window}, documents {which}, {layout}"
            errors[key] = max(_relative(a, e[:, :, index]) for a, e in zip(actual, expected, strict=True))
    return errors


HEADS = {
    # More key/value heads than ranks, as many, fewer (down to one), ragged ones; all at once and in stages that share keys.
    "ulysses": [((8, 8), None), ((8, 2), 1), ((7, 1), 2), ((12, 6), 2), ((5, 5), 1)],
    "ring_x_ulysses": [((4, 4), None), ((6, 2), 1), ((7, 1), None), ((9, 3), 2)],
    "allgather_kv": [((4, 2), None), ((6, 3), 2), ((3, 1), 5)],
}
CASES = [
    ("ulysses", 2, 2),
    ("ulysses", 3, 3),
    ("ulysses", 4, 4),
    ("ring_x_ulysses", 4, 2),
    ("ring_x_ulysses", 6, 3),
    ("allgather_kv", 3, 1),
    ("allgather_kv", 4, 1),
]


@pytest.mark.parametrize(("name", "cp", "n_ulysses"), CASES)
def test_float64_equals_dense(name: str, cp: int, n_ulysses: int) -> None:
    for rank, errors in enumerate(run_distributed(_compare, cp, torch.float64, name, n_ulysses, cp == 4)):
        for case, error in errors.items():
            assert error < 1e-10, f"rank {rank}, {case}: {error}"


@pytest.mark.parametrize(("name", "cp", "n_ulysses"), [("ulysses", 2, 2), ("ring_x_ulysses", 4, 2), ("allgather_kv", 2, 1)])
def test_float32_equals_dense(name: str, cp: int, n_ulysses: int) -> None:
    for errors in run_distributed(_compare, cp, torch.float32, name, n_ulysses, False):
        assert max(errors.values()) < 1e-5, errors


def _bf16(name: str, n_ulysses: int, heads: tuple[int, int], chunk: int | None) -> tuple[list[torch.Tensor], list[int]]:
    tensors = _whole(torch.bfloat16, heads, dim=32, length=256)
    groups = _groups(n_ulysses) if name == "ring_x_ulysses" else None
    actual, index = _split(_scheme(name, "zigzag", None, chunk, groups), tensors, [(0,), (0, 100)], "zigzag")
    return [x.detach().float() for x in actual], index


@pytest.mark.parametrize(("name", "n_ulysses", "chunk"), [("ulysses", 4, 1), ("ring_x_ulysses", 2, None), ("allgather_kv", 1, 1)])
def test_bf16_is_as_good_as_one_kernel_call(name: str, n_ulysses: int, chunk: int | None) -> None:
    heads, documents = (8, 2), [(0,), (0, 100)]
    tensors = _whole(torch.bfloat16, heads, dim=32, length=256)
    exact = _reference(tensors, documents, None)
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    out = LocalAttention(None)(q, k, v, Bounds(256, ((0, 256),), tuple(documents)))
    single = [out, *torch.autograd.grad(out, (q, k, v), tensors[3])]
    gathered = [torch.zeros(x.shape) for x in exact]
    for parts, index in run_distributed(_bf16, 4, name, n_ulysses, heads, chunk):
        for whole, part in zip(gathered, parts, strict=True):
            whole[:, :, index] = part
    for split, one, truth in zip(gathered, single, exact, strict=True):
        assert _relative(split, truth) < 1.2 * _relative(one, truth)
