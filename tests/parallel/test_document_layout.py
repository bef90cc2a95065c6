"""Packed documents dealt head to tail one by one: every token once, equally many per rank, equal work, exact attention."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from memory_mgmt.offload import HostStore
from models.attention import attention_reference
from models.attention_plan import DEFAULT_LIMITS
from models.batch import Batch, Bounds
from models.errors import UserError
from parallel import document_layout, host_keys, ring_attention
from parallel.document_layout import document_ranges
from parallel.ring_plan import plan_ring
from parallel.sequence import ranges_for, shard_batch, shard_sequence, unshard_sequence
from tests.parallel.simulated import Group, run_simulated
from trainer.config import RunConfig


def _starts(rng: random.Random, seq_len: int, longest: int) -> tuple[int, ...]:
    """Documents from 1 to ``longest`` tokens, equally likely on a logarithmic scale."""
    starts = [0]
    while starts[-1] < seq_len:
        starts.append(starts[-1] + max(1, round(longest ** rng.random())))
    return tuple(starts[:-1])


@pytest.mark.parametrize("cp", [1, 2, 3, 8])
def test_every_token_has_one_rank_and_all_ranks_have_equally_many(cp: int) -> None:
    rng = random.Random(cp)
    for _ in range(50):
        seq_len = cp * rng.randint(1, 2000)
        starts = _starts(rng, seq_len, 3000)
        held = [document_ranges(starts, seq_len, rank, cp) for rank in range(cp)]
        assert all(sum(end - start for start, end in ranges) == seq_len // cp for ranges in held)
        assert sorted(i for ranges in held for start, end in ranges for i in range(start, end)) == list(range(seq_len))
        assert all(a[1] < b[0] for ranges in held for a, b in pairwise(ranges)), "rising, apart"
    with pytest.raises(ValueError, match="shared equally"):
        document_ranges((0,), 8 * cp + 1, 0, 2 * cp)


def _work(layout: str, starts: tuple[int, ...], seq_len: int, cp: int) -> list[list[int]]:
    """Visible pairs by hop and rank."""
    held = [ranges_for(layout, seq_len, rank, cp, (starts,)) for rank in range(cp)]  # type: ignore[arg-type]
    plans = [plan_ring(held, rank, [starts], None, DEFAULT_LIMITS) for rank in range(cp)]

    def pairs(tile: Any) -> int:
        return tile.q_len * (tile.q_len + 1) // 2 if tile.kind in ("causal", "packed") else tile.q_len * tile.k_len

    return [[sum(pairs(t) for rows in plan.hops[hop] for t in rows.tiles) for plan in plans] for hop in range(len(plans[0].hops))]


def test_work_is_equal_where_zigzag_and_contiguous_ranks_wait() -> None:
    waits: dict[str, list[float]] = {"contiguous": [], "zigzag": [], "per_document": []}
    rng = random.Random(4)
    for _ in range(4):
        starts = _starts(rng, 65_536, 60_000)
        for layout, found in waits.items():
            hops = _work(layout, starts, 65_536, 8)
            found.append(sum(max(hop) for hop in hops) / (sum(map(sum, hops)) / 8))  # ranks wait for the slowest at every hop
    mean = {layout: sum(found) / len(found) for layout, found in waits.items()}
    assert max(waits["per_document"]) < 1.02 < 1.3 < mean["zigzag"] < mean["contiguous"], mean
    assert _work("per_document", (0,), 4096, 4) == _work("zigzag", (0,), 4096, 4), "one document: zigzag"


def _on_rank(dist: Any, cp: int, width: int | None, chunk: int | None, window: int | None, starts: tuple[int, ...], tensors: Any) -> Any:
    rank, length = dist.get_rank(), tensors[0].shape[1]
    bounds = Bounds(length, ranges_for("per_document", length, rank, cp, (starts,)), (starts,))
    q, k, v, dout = (shard_sequence(x, 1, rank, cp, "per_document", (starts,)).detach().requires_grad_() for x in tensors)
    options: dict[str, Any] = {"group": None, "window": window, "layout": "per_document", "bounds": bounds}
    if width is not None:
        near = Group([rank // width * width + i for i in range(width)])
        options["rings"] = (near, Group(range(rank % width, cp, width)))
    if chunk is None:
        out = ring_attention.ring_attention(q, k, v, **options)
    else:
        out = host_keys.host_keys_attention(q, k, v, store=HostStore("cpu"), kv_chunk=chunk, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize(("cp", "width", "chunk"), [(2, None, None), (3, None, None), (4, 2, None), (3, None, 17)])
def test_attention_equals_dense_float64(monkeypatch: pytest.MonkeyPatch, cp: int, width: int | None, chunk: int | None) -> None:
    monkeypatch.setattr(document_layout, "SHORTEST_CHUNK", 3)
    document_layout._dealt.cache_clear()
    rng = random.Random(cp)
    for window in (None, 9, None):
        length = cp * rng.randint(20, 40)
        starts = _starts(rng, length, length)
        tensors = [torch.randn(1, length, n, 8, dtype=torch.float64) for n in (4, 2, 2, 4)]
        shards = run_simulated(monkeypatch, _on_rank, cp, cp, width, chunk, window, starts, tensors)
        leaves = [x.transpose(1, 2).clone().requires_grad_() for x in tensors[:3]]
        out = attention_reference(leaves[0], leaves[1], leaves[2], (starts,), window)
        wanted = [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].transpose(1, 2))]
        for parts, whole in zip(zip(*shards, strict=True), wanted, strict=True):
            got = unshard_sequence(list(parts), 1, "per_document", (starts,))
            assert (got - whole.transpose(1, 2)).norm() < 1e-10 * max(1.0, float(whole.norm())), (starts, window)
    document_layout._dealt.cache_clear()


def test_a_batch_is_split_by_its_documents_and_rows_must_agree() -> None:
    ids = torch.arange(2048)[None]
    batch = Batch(ids, ids, ids, Bounds(2048, ((0, 2048),), ((0, 700),)))
    parts = [shard_batch(batch, "per_document", rank, 2) for rank in range(2)]
    assert all(part.tokens_BT.shape[1] == 1024 for part in parts)
    assert torch.equal(torch.cat([part.tokens_BT for part in parts], 1).sort().values, ids)
    rows = Batch(ids.expand(2, -1), ids, ids, Bounds(2048, ((0, 2048),), ((0, 700), (0,))))
    with pytest.raises(UserError, match=r"rows of a batch have different documents.*train\.micro_batch_size=1"):
        shard_batch(rows, "per_document", 0, 2)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"parallel": {"sequence": "ulysses", "cp": 2}}, "parallel.sequence=ring or double_ring"),
        ({"train": {"micro_batch_size": 2}}, "train.micro_batch_size=1"),
        ({"data": {"document_mask": False}}, "data.document_mask=true"),
        ({"model": {"layers": ["full", "memory"]}}, "layers without memory"),
    ],
)
def test_what_needs_ordered_ranges_is_refused(settings: dict, text: str) -> None:
    values = {"model": {"layers": ["full"]}, **settings}
    values["parallel"] = {"layout": "per_document", **settings.get("parallel", {})}
    with pytest.raises(ValueError, match=text):
        RunConfig.model_validate(values)
