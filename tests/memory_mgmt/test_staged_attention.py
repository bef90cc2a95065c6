"""Projections by stages of heads: the gradients of one process, and bytes that fall with the heads of a stage."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from memory_mgmt import staged_attention
from memory_mgmt.apply import apply_policy
from memory_mgmt.offload import HostStore
from memory_mgmt.policy import KEEP, KEEP_MIXER, RECOMPUTE, RECOMPUTE_BLOCK, SWAP, LayerPolicy, Policy, Split
from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.transformer import Transformer
from parallel.comm_dtypes import AS_COMPUTED, CommDtypes, comm_dtypes, round_where_alone
from parallel.hybrid import HybridAttention
from parallel.sequence import shard_batch
from parallel.ulysses import UlyssesAttention
from tests.memory_mgmt.measured import peak_allocated
from tests.memory_mgmt.test_execution import VOCAB, assert_same, fill, make
from tests.parallel.loopback import Lone, be_alone
from tests.parallel.simulated import Group, run_simulated

TOKENS = 96
SWAPPED = LayerPolicy(SWAP, RECOMPUTE, SWAP, RECOMPUTE)
CUT = LayerPolicy(Split(0.5, 0.5, 0), RECOMPUTE, Split(0.6, 0.4, 0), Split(0.25, 0.25, 0.5))
POLICIES = (RECOMPUTE_BLOCK, KEEP_MIXER, SWAPPED, CUT)


def _config(heads: tuple[int, int], **changes: Any) -> ModelConfig:
    shapes = {
        "d_model": 24,
        "n_heads": heads[0],
        "n_kv_heads": heads[1],
        "head_dim": 4,
        "memory": {"n_heads": 2},
        "layers": ("full",),
        "n_layers": 2,
    }
    return ModelConfig(**{**shapes, **changes})


def _batch() -> Batch:
    ids = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    return Batch(ids, ids.roll(-1, 1), torch.arange(TOKENS).expand(2, -1), Bounds(TOKENS, ((0, TOKENS),), ((0, 50), (0,))))


def _attention(dist: Any, case: dict[str, Any], window: int | None) -> Any:
    rank, size, comm = dist.get_rank(), case["cp"], case.get("comm", AS_COMPUTED)
    if case["degree"] == size:
        return UlyssesAttention(Group(range(size)), case["layout"], window, case["head_chunk"], comm=comm)  # type: ignore[arg-type]
    near = [rank // case["degree"] * case["degree"] + i for i in range(case["degree"])]
    far = range(rank % case["degree"], size, case["degree"])
    return HybridAttention(Group(near), Group(far), case["layout"], window, case["head_chunk"], comm=comm)  # type: ignore[arg-type]


def _on_a_rank(dist: Any, case: dict[str, Any], store: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(negative log likelihoods without gradients, gradients of this rank's tokens)"""
    model = Transformer(case["config"], VOCAB).to(torch.float32 if case["bf16"] else torch.float64)
    fill(model)
    apply_policy(model, case["policy"], store)
    for block in model.blocks:
        block.mixer.inner_attention = _attention(dist, case, block.mixer.window)  # type: ignore[union-attr]
    batch = shard_batch(_batch(), case["layout"], dist.get_rank(), case["cp"])
    with torch.autocast("cpu", torch.bfloat16, enabled=case["bf16"], cache_enabled=False):
        nll = model(batch)
        with torch.no_grad():
            again = model(batch)
    assert torch.equal(again, nll), "the same without gradients"
    nll.sum().backward()
    return nll.detach(), [p.grad for p in model.parameters()]  # type: ignore[misc]


def _cases() -> list[dict[str, Any]]:
    rng = random.Random(5)
    found = []
    for cp, degree, heads in [(2, 2, (4, 2)), (3, 3, (7, 1)), (4, 4, (28, 4)), (4, 2, (6, 3)), (4, 4, (9, 3)), (2, 2, (5, 5))]:
        for policy in rng.sample(POLICIES, 2):
            changes = rng.choice([{}, {"qkv_bias": True, "qk_norm": True}, {"layers": ("full", "swa"), "window": 60}])
            config = _config(heads, **changes)
            tile = rng.choice([0, 10])
            group = 2 if policy is RECOMPUTE_BLOCK and rng.random() < 0.5 else 1
            found.append({"cp": cp, "degree": degree, "config": config, "policy": Policy((policy,) * 2, group, ffn_tile_tokens=tile),
                          "layout": rng.choice(["zigzag", "contiguous"]), "head_chunk": rng.choice([1, 1, 2, 3]),
                          "bf16": False, "comm": comm_dtypes("bf16" if len(found) % 4 == 1 else "compute", "fp32")})  # fmt: skip
    return found


def _run(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]) -> list[torch.Tensor]:
    """Gradients, added up over ranks; every one of which has projected by stages."""
    counted: list[int] = []
    whole = staged_attention.StagedProjections.pieces
    monkeypatch.setattr(staged_attention.StagedProjections, "pieces", lambda self, stage: counted.append(1) or whole(self, stage))
    with HostStore("cpu") as store:
        results = run_simulated(monkeypatch, _on_a_rank, case["cp"], case, store)
        assert store.used_bytes == 0
    assert len(counted) >= case["cp"] * 2 * 2, "a stage or more per rank, layer and pass"
    return [torch.stack(parts).sum(0) for parts in zip(*(grads for _, grads in results), strict=True)]


@pytest.mark.parametrize("case", _cases(), ids=lambda case: f"{case['cp']}-{case['degree']}-{case['config'].n_heads}")
def test_gradients_of_one_process(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]) -> None:
    want = gradients_of_whole(case["config"], case["comm"])
    assert_same(_run(monkeypatch, case), want, 1e-12)


def gradients_of_whole(config: ModelConfig, comm: CommDtypes = AS_COMPUTED) -> list[torch.Tensor]:
    model = make(config)
    round_where_alone(model, comm)
    model(_batch()).sum().backward()
    return [p.grad for p in model.parameters()]  # type: ignore[misc]


def test_bf16_is_as_near_as_whole_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64: a stage's projections are the same bits, gradients of a key that several ranks read are rounded once more."""
    config = _config((28, 4))
    want = gradients_of_whole(config)
    case = {"cp": 4, "degree": 4, "config": config, "policy": Policy((RECOMPUTE_BLOCK,) * 2), "layout": "contiguous", "bf16": True}
    staged = _run(monkeypatch, {**case, "head_chunk": 2})
    kept = LayerPolicy(KEEP, KEEP, RECOMPUTE, RECOMPUTE)
    results = run_simulated(monkeypatch, _on_a_rank, 4, {**case, "head_chunk": 2, "policy": Policy((kept,) * 2)}, None)
    whole = [torch.stack(parts).sum(0) for parts in zip(*(grads for _, grads in results), strict=True)]
    errors = [[float((a.double() - b).norm() / b.norm()) for a, b in zip(found, want, strict=True)] for found in (staged, whole)]
    assert all(a < 1.2 * b + 1e-4 for a, b in zip(*errors, strict=True)), errors


def _peaks(head_chunk: int, projections: Split) -> tuple[int, int]:
    """(forward, backward) peak of one layer by the CPU allocator's log, in bytes, on a rank of four with 16 query heads of its own."""
    n, dim = 1024, 16
    config = ModelConfig(d_model=64, n_heads=64, n_kv_heads=64, head_dim=dim, layers=("full",), n_layers=1, d_ff=32)
    model = Transformer(config, VOCAB)
    fill(model)
    apply_policy(model, Policy((LayerPolicy(KEEP, projections, KEEP, RECOMPUTE),), ffn_tile_tokens=64))
    block = model.blocks[0]
    block.mixer.inner_attention = UlyssesAttention(Lone(4), "contiguous", 512, head_chunk)  # type: ignore[union-attr, arg-type]
    x_BTC = torch.randn(1, n, 64, requires_grad=True)
    bounds = Bounds.whole(1, 4 * n).with_ranges(((2 * n, 3 * n),))

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return block(x_BTC, torch.arange(n).expand(1, -1), bounds)

    forward().sum().backward()
    made: list[torch.Tensor] = []
    there = peak_allocated(lambda: made.append(forward()))
    return there, peak_allocated(lambda: made[0].backward(torch.ones_like(made[0])))


def test_what_a_stage_makes_falls_with_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    be_alone(monkeypatch)
    by_chunk = [_peaks(chunk, RECOMPUTE) for chunk in (1, 2, 4)]
    for (one, two, four), whole in zip(zip(*by_chunk, strict=True), _peaks(16, KEEP), strict=True):
        floor = 2 * one - two  # what is not of a stage: output, its gradient, the streams
        assert four - floor == pytest.approx(4 * (one - floor), rel=0.02), "equally much per head"
        assert floor < 0.2 * whole and one < 0.25 * whole
