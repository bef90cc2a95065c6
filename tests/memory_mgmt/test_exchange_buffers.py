"""Formulas of the buffers of every sequence scheme, against what its backward pass allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memory_mgmt.activations import Shapes
from memory_mgmt.config import MemoryConfig
from memory_mgmt.estimate import estimate
from models.attention import LocalAttention
from models.batch import Bounds
from models.config import ModelConfig
from optim.config import OptimConfig
from parallel.allgather_kv import AllGatherKVAttention
from parallel.comm_dtypes import CommDtypes, comm_dtypes
from parallel.config import ParallelConfig
from parallel.hybrid import HybridAttention
from parallel.ring_attention import RingAttention
from parallel.sequence import Layout, ranges_for
from parallel.ulysses import UlyssesAttention
from tests.memory_mgmt.measured import peak_allocated
from tests.parallel.loopback import Lone, be_alone

RANKS, TOKENS, DIM = 4, 512, 32
CASES: list[tuple[str, int | None, tuple[int, int], Layout]] = [
    ("ring", None, (16, 16), "zigzag"),
    ("alone", None, (16, 16), "contiguous"),
    ("double_ring", None, (16, 4), "zigzag"),
    ("allgather_kv", 1, (16, 4), "zigzag"),
    ("allgather_kv", 4, (16, 16), "zigzag"),
    ("ulysses", None, (16, 4), "zigzag"),
    ("ulysses", None, (16, 16), "contiguous"),
    ("ulysses", 1, (16, 16), "contiguous"),
    ("ulysses", 1, (16, 4), "zigzag"),
    ("ulysses", 2, (14, 2), "contiguous"),
    ("ring_x_ulysses", None, (16, 16), "zigzag"),
    ("ring_x_ulysses", 2, (16, 4), "zigzag"),
]


def _attention(scheme: str, head_chunk: int | None, layout: Layout, comm: CommDtypes) -> Any:
    whole, half = Lone(RANKS), Lone(2)
    if scheme == "alone":
        return LocalAttention(None, keys_dtype=comm.keys)
    if scheme == "allgather_kv":
        return AllGatherKVAttention(whole, layout, None, head_chunk or 1, comm=comm)  # type: ignore[arg-type]
    if scheme == "ulysses":
        return UlyssesAttention(whole, layout, None, head_chunk, comm=comm)  # type: ignore[arg-type]
    if scheme == "ring_x_ulysses":
        return HybridAttention(half, half, layout, None, head_chunk, comm=comm)  # type: ignore[arg-type]
    return RingAttention(whole, layout, None, comm=comm, rings=(half, half) if scheme == "double_ring" else None)  # type: ignore[arg-type]


def _measured(scheme: str, head_chunk: int | None, heads: tuple[int, int], layout: Layout, dtype: torch.dtype, comm: CommDtypes) -> int:
    """The peak of a backward pass above what forward kept, with the gradient that it is given."""
    rank = 3 if scheme == "ring_x_ulysses" else 2  # what two groups of two make of "in the middle"
    bounds = Bounds.whole(1, RANKS * TOKENS).with_ranges(ranges_for(layout, RANKS * TOKENS, rank, RANKS))
    q, k, v, dout = (torch.randn(1, TOKENS, n, DIM).to(dtype).transpose(1, 2) for n in (heads[0], heads[1], heads[1], heads[0]))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    bounds = Bounds.whole(1, TOKENS) if scheme == "alone" else bounds
    out = _attention(scheme, head_chunk, layout, comm)(*leaves, bounds)
    return peak_allocated(lambda: torch.autograd.grad(out, leaves, dout)) + dout.nbytes


@pytest.mark.parametrize(
    ("precision", "dtype", "kv_dtype"),
    [("fp32", torch.float32, "compute"), ("fp32", torch.float32, "bf16"), ("bf16", torch.bfloat16, "compute")],
)
def test_buffers_are_those_of_the_allocator(monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype, kv_dtype: Any) -> None:
    be_alone(monkeypatch)
    found = {}
    for scheme, head_chunk, heads, layout in CASES:
        config = ModelConfig(d_model=64, n_heads=heads[0], n_kv_heads=heads[1], head_dim=DIM, layers=("full",), memory={"n_heads": 1})  # type: ignore[arg-type]
        degree = 2 if scheme == "ring_x_ulysses" else 1
        sizes: dict[str, Any] = {"cp": 1} if scheme == "alone" else {"cp": RANKS, "ranges": 2, "scheme": scheme, "degree": degree}
        shapes = Shapes(config, 1, TOKENS, precision, head_chunk=head_chunk, kv_dtype=kv_dtype, **sizes)
        planned = shapes.attention_backward("full") + shapes.exchange("full")
        found[scheme, head_chunk, heads] = planned / _measured(scheme, head_chunk, heads, layout, dtype, comm_dtypes(kv_dtype, "fp32"))
    wrong = {case: ratio for case, ratio in found.items() if not 0.95 < ratio < 1.35}
    assert not wrong, wrong


def test_an_estimate_knows_the_scheme_and_its_stages() -> None:
    model = ModelConfig(d_model=256, n_heads=32, n_kv_heads=32, head_dim=64, layers=("full",), n_layers=2)

    def peak(recompute: str = "block", **parallel: Any) -> int:
        memory = MemoryConfig(recompute=recompute, ffn_tile_tokens=256, loss_tile_tokens=256)  # type: ignore[arg-type]
        sections = model, ParallelConfig(cp=4, **parallel), memory, OptimConfig()
        sizes: dict[str, Any] = {"seq_len": 65_536, "micro_batch_size": 1, "precision": "bf16", "vocab_size": 512, "layout": "zigzag"}
        return estimate(*sections, **sizes).peak_bytes

    ulysses = [peak(sequence="ulysses", head_chunk=chunk) for chunk in (None, 4, 2, 1)]
    assert ulysses == sorted(ulysses, reverse=True) and ulysses[-1] < 0.5 * ulysses[0]
    assert peak(sequence="allgather_kv", head_chunk=1) < peak(sequence="allgather_kv", head_chunk=4)
    assert peak(sequence="ring") < peak(sequence="double_ring", ring_inner=2)
    assert peak(sequence="ring_x_ulysses", ulysses=2, head_chunk=1) < peak(sequence="ring_x_ulysses", ulysses=2)


def test_gradients_that_arrive_are_where_a_hops_own_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """dq, its gradient and what the kernel makes, keys and values in hand and arriving, their gradients sent and arriving: no more."""
    be_alone(monkeypatch)
    shard = TOKENS * 16 * DIM * 4
    measured = _measured("ring", None, (16, 16), "zigzag", torch.float32, comm_dtypes("compute", "fp32"))
    assert measured < 13 * shard
