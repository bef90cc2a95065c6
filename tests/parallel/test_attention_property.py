"""The public attention functions on random shapes, masks and numbers of ranks, against dense float64 attention of the whole sequence."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from memory_mgmt.offload import HostStore
from models import attention
from models.attention import attention_reference
from models.attention_plan import TileLimits
from models.block import CAUSAL
from models.errors import UserError
from models.kernels import block_attention, block_attention_backward
from parallel import allgather_kv, host_keys, hybrid, ring_attention, ulysses
from parallel.sequence import shard_sequence, unshard_sequence
from parallel.sequence_mask import sequence_bounds
from tests.distributed import run_distributed
from tests.parallel.simulated import Group, run_simulated

TINY = TileLimits(block=3, keys_per_call=17, triangle=2, small=3, packed=7)
KV_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS = [(28, 4), (7, 1), (8, 8), (4, 2), (12, 4), (9, 3), (3, 1)]


@dataclass
class Case:
    """One call on the whole sequence."""

    scheme: str
    cp: int
    heads: tuple[int, int]
    layout: str
    window: int | None
    documents: list[tuple[int, ...]]
    prefixes: list[tuple[int, ...]]
    """Empty: none. With ``causal`` False: to the end of every document."""
    causal: bool
    length: int
    real: int
    """Tokens before the padding, which is a document of its own."""
    without_loss: int
    """Rows at the end of which no token counts."""
    degree: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    tiny: bool = False
    keep_bounds: bool = False
    dim: int = 8

    def tensors(self, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
        """q, k, v, dout [B, T, heads, D]"""
        generator = torch.Generator().manual_seed(seed)
        rows = len(self.documents)
        shapes = [(rows, self.length, n, self.dim) for n in (self.heads[0], self.heads[1], self.heads[1], self.heads[0])]
        tensors = [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]
        tensors[3][:, self.real :] = 0
        tensors[3][rows - self.without_loss :] = 0
        return tensors

    def ids(self) -> torch.Tensor:
        """Documents [B, T], numbered anyhow but upwards."""
        starts = [torch.tensor(row) for row in self.documents]
        return torch.stack([3 * (torch.arange(self.length)[:, None] >= row).sum(1) - 5 for row in starts])

    def in_prefix(self) -> torch.Tensor | None:
        """[B, T], where there are prefixes of the case's own."""
        if not self.causal or not self.prefixes:
            return None
        shown = torch.zeros(len(self.documents), self.length, dtype=torch.bool)
        for row, starts, ends in zip(shown, self.documents, self.prefixes, strict=True):
            for start, end in zip(starts, ends, strict=True):
                row[start:end] = True
        return shown


def _random_case(rng: random.Random, scheme: str, cp: int) -> Case:
    heads = rng.choice([h for h in HEADS if scheme in KEYS_TRAVEL or h[0] >= cp])
    length = 2 * cp * rng.randint(1, 9)
    real = length if rng.random() < 0.6 else rng.randint(max(1, length - 5), length)
    rows = rng.randint(1, 3)
    documents = []
    for _ in range(rows):
        count = rng.choice([0, 0, 1, 2, 4, length])
        starts = {0, *(rng.randrange(length) for _ in range(count))}
        documents.append(tuple(sorted({s for s in starts if s < real} | ({real} if real < length else set()))))
    prefixes, causal = [], rng.random() < 0.85
    if not causal or rng.random() < 0.5:
        for starts in documents:
            ends = [*starts[1:], length]
            whole = not causal
            prefixes.append(tuple(e if whole or rng.random() < 0.3 else rng.randint(s, e) for s, e in zip(starts, ends, strict=True)))
    window = rng.choice([None, None, 1, 2, rng.randint(1, length), rng.randint(1, length), length + 3])
    degree = rng.choice([d for d in range(1, cp + 1) if cp % d == 0 and d <= heads[0]]) if scheme == "hybrid" else 1
    if scheme == "double_ring":
        degree = rng.choice([d for d in range(1, cp + 1) if cp % d == 0])
    chunks = {
        "ring": {},
        "double_ring": {},
        "allgather_kv": {"head_chunk": rng.randint(1, 3)},
        "host": {"kv_chunk": rng.choice([1, 3, 4, 7, length])},
    }
    chunk = chunks.get(scheme, {"head_chunk": rng.choice([None, 1, 2])})
    options = {**chunk, **({"scale": 0.3} if rng.random() < 0.3 else {}), **({"kernel": "plain"} if rng.random() < 0.2 else {})}
    layout = rng.choice(["zigzag", "contiguous"])
    without_loss = rng.choice([0, 0, 1])
    case = Case(scheme, cp, heads, layout, window, documents, prefixes, causal, length, real, without_loss, degree, options)
    case.tiny, case.keep_bounds = rng.random() < 0.5, rng.random() < 0.3
    case.options |= {"kv_dtype": rng.choice(["bf16", "fp32"])} if rng.random() < 0.25 else {}
    return case


def _groups(case: Case, dist: Any) -> dict[str, Any]:
    if case.scheme not in ("hybrid", "double_ring"):
        return {"group": None}
    rank, size = dist.get_rank(), case.degree
    column = [rank // size * size + i for i in range(size)]
    if case.scheme == "double_ring":
        return {"group": None, "rings": (Group(column), Group(range(rank % size, case.cp, size)))}
    return {"ulysses_group": Group(column), "ring_group": Group(range(rank % size, case.cp, size))}


FUNCTIONS: dict[str, Any] = {
    "ring": ring_attention.ring_attention,
    "ulysses": ulysses.ulysses_attention,
    "allgather_kv": allgather_kv.allgather_kv_attention,
    "hybrid": hybrid.hybrid_attention,
    "host": host_keys.host_keys_attention,
    "double_ring": ring_attention.ring_attention,
}
KEYS_TRAVEL = ("ring", "allgather_kv", "host", "double_ring")
"""Schemes that any heads and any number of ranks go with."""


def _call(dist: Any, case: Case, tensors: list[torch.Tensor], groups: dict[str, Any] | None = None) -> list[torch.Tensor]:
    """This rank's out, dq, dk, dv."""
    rank = dist.get_rank()
    groups = _groups(case, dist) if groups is None else groups

    def shard(x: torch.Tensor) -> torch.Tensor:
        return shard_sequence(x, 1, rank, case.cp, case.layout)  # type: ignore[arg-type]

    q, k, v = (shard(x).detach().clone().requires_grad_() for x in tensors[:3])
    single = all(row == (0,) for row in case.documents)
    shown = case.in_prefix()
    mask: dict[str, Any] = {
        "causal": case.causal,
        "document_ids": None if single else shard(case.ids()),
        "prefix": None if shown is None else shard(shown),
    }
    if case.keep_bounds:
        group = groups.get("group") if case.scheme != "hybrid" else (groups["ulysses_group"], groups["ring_group"])
        mask = {"bounds": sequence_bounds(q.shape[0], q.shape[1], group=group, layout=case.layout, **mask)}  # type: ignore[arg-type]
    if case.scheme == "host":
        mask["store"] = HostStore("cpu")
    out = FUNCTIONS[case.scheme](q, k, v, window=case.window, layout=case.layout, **mask, **case.options, **groups)
    assert out.shape == q.shape and out.dtype == q.dtype
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), shard(tensors[3]))]


def _expected(case: Case, tensors: list[torch.Tensor], length: int) -> list[torch.Tensor]:
    """[out, dq, dk, dv] of the first ``length`` tokens, alone, in float64; of keys and values that were rounded at once to what they
    travel in."""
    kv = [x.to(KV_DTYPES.get(case.options.get("kv_dtype", ""), x.dtype)) for x in tensors[1:3]]
    leaves = [x[:, :length].double().transpose(1, 2).clone().requires_grad_() for x in (tensors[0], *kv)]
    documents = [tuple(s for s in row if s < length) for row in case.documents]
    prefixes = [tuple(min(e, length) for e in ends[: len(row)]) for ends, row in zip(case.prefixes, documents, strict=False)]
    out = attention_reference(*leaves, documents, case.window, prefixes, case.options.get("scale"))
    grads = torch.autograd.grad(out, leaves, tensors[3][:, :length].double().transpose(1, 2))
    return [x.detach().transpose(1, 2) for x in (out, *grads)]


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    # At least 1: with a window of 1, or documents of one token, the exact dq and dk are 0.
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1.0))


def _check(case: Case, shards: list[list[torch.Tensor]], tensors: list[torch.Tensor], limit: float) -> None:
    actual = [unshard_sequence(list(parts), 1, case.layout) for parts in zip(*shards, strict=True)]  # type: ignore[arg-type]
    for got, wanted in zip(actual, _expected(case, tensors, case.length), strict=True):
        assert _error(got, wanted) < limit, case
    for got, wanted in zip(actual, _expected(case, tensors, case.real), strict=True):
        assert _error(got[:, : case.real], wanted) < limit, f"padding changes what comes before it: {case}"
    silent = len(case.documents) - case.without_loss
    assert all((grad[silent:] == 0).all() for grad in actual[1:]), f"a row without a token that counts: {case}"


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scheme", list(FUNCTIONS))
def test_random_cases_equal_dense_float64(monkeypatch: pytest.MonkeyPatch, scheme: str, cp: int) -> None:
    rng = random.Random(f"{scheme} {cp}")
    for i in range(8):
        case = _random_case(rng, scheme, cp)
        limits = (lambda q, window, call: TINY._replace(kernel=call.kernel, scale=call.scale)) if case.tiny else attention.tile_limits
        with monkeypatch.context() as patch:
            for module in (attention, ring_attention, ulysses, allgather_kv, hybrid, host_keys):
                patch.setattr(module, "tile_limits", limits)
            for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5))[: 2 if i % 3 == 0 else 1]:
                tensors = case.tensors(dtype, i)
                _check(case, run_simulated(patch, _call, cp, case, tensors), tensors, limit)


def _on_real_ranks() -> list[list[list[torch.Tensor]]]:
    """Every scheme at every number of ranks up to 8 in one set of processes; ranks that take no part look on."""
    import torch.distributed as dist

    results = []
    for case in REAL:
        members = list(range(case.cp))
        world = dist.new_group(members)
        groups: dict[str, Any] = {"group": world}
        if case.scheme in ("hybrid", "double_ring"):
            size = case.degree
            columns = [dist.new_group([r * size + i for i in range(size)]) for r in range(case.cp // size)]
            rings = [dist.new_group(list(range(i, case.cp, size))) for i in range(size)]
            rank = dist.get_rank()
            near, far = columns[rank // size % len(columns)], rings[rank % size]
            groups = {"ulysses_group": near, "ring_group": far} if case.scheme == "hybrid" else {"group": world, "rings": (near, far)}
        taking_part = dist.get_rank() < case.cp
        results.append(_call(dist, case, case.tensors(torch.float64, 3), groups) if taking_part else [])
    return results


REAL = [_random_case(random.Random(f"real {scheme} {cp} {i}"), scheme, cp) for scheme in FUNCTIONS for cp, i in ((2, 0), (3, 1), (8, 0))]


def test_random_cases_on_real_ranks() -> None:
    by_rank = run_distributed(_on_real_ranks, 8)
    for i, case in enumerate(REAL):
        _check(case, [by_rank[rank][i] for rank in range(case.cp)], case.tensors(torch.float64, 3), 1e-10)


@pytest.mark.parametrize("scheme", ["ring", "hybrid", "allgather_kv", "ulysses", "host", "double_ring"])
def test_bf16_error_is_that_of_one_call_at_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    length, heads = (512, (32, 8)) if scheme == "ulysses" else (2048, (4, 2))
    options = {"kv_chunk": 150} if scheme == "host" else {}
    case = Case(scheme, 1, heads, "zigzag", None, [(0,)], [], True, length, length, 0, options=options, dim=64)
    tensors = case.tensors(torch.bfloat16, 5)
    exact = _expected(case, tensors, length)
    q, k, v, dout = (x.transpose(1, 2) for x in tensors)
    out, lse = block_attention(q, k, v, CAUSAL)
    single = [x.transpose(1, 2) for x in (out, *block_attention_backward(dout, q, k, v, out, lse, CAUSAL))]
    limits = [_error(one, truth) for one, truth in zip(single, exact, strict=True)]
    first: list[float] = []
    for cp in (2, 32):
        case.cp, case.degree = cp, min(cp // 2, 4) or 1
        shards = run_simulated(monkeypatch, _call, cp, case, tensors)
        errors = [_error(unshard_sequence(list(p), 1, "zigzag"), e) for p, e in zip(zip(*shards, strict=True), exact, strict=True)]
        first = first or errors
        assert all(error < 1.2 * limit for error, limit in zip(errors, limits, strict=True)), (cp, errors, limits)
        # Blocks are rounded to bf16 and merged in float32: a little at first, then no more. Merged in bf16 it is 2 times at 32 ranks.
        assert all(error < 1.15 * before for error, before in zip(errors, first, strict=True)), f"grows from 2 to {cp} ranks"


@pytest.mark.parametrize(("scheme", "heads", "window"), [("ring", (4, 2), None), ("ring", (4, 2), 9), ("ulysses", (4, 2), None),
                                                      ("hybrid", (4, 2), None), ("allgather_kv", (4, 2), None)])  # fmt: skip
def test_gradients_that_travel_in_bf16_are_rounded_and_no_more(monkeypatch, scheme, heads, window) -> None:
    case = Case(scheme, 4, heads, "zigzag", window, [(0,)], [], True, 256, 256, 0, degree=2, dim=32)
    tensors = case.tensors(torch.bfloat16, 5)
    exact = _expected(case, tensors, case.length)
    found = []
    for dtype in ("fp32", "compute"):
        case.options = {"kv_gradient_dtype": dtype}
        shards = run_simulated(monkeypatch, _call, 4, case, tensors)
        found.append([unshard_sequence(list(parts), 1, "zigzag") for parts in zip(*shards, strict=True)])
    wide, narrow = ([_error(x, e) for x, e in zip(results, exact, strict=True)] for results in found)
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True)), "out and dq stay here"
    assert all(n < 2.5 * w for w, n in zip(wide[2:], narrow[2:], strict=True)), (wide, narrow)
    if scheme == "ring" and window is None:  # elsewhere every part is one kernel's, which is rounded already
        assert all(w < n for w, n in zip(wide[2:], narrow[2:], strict=True))
    case.options, tensors = {"kv_gradient_dtype": "bf16"}, case.tensors(torch.float32, 5)
    shards = run_simulated(monkeypatch, _call, 4, case, tensors)
    wanted = _expected(case, tensors, case.length)
    errors = [_error(unshard_sequence(list(part), 1, "zigzag"), e) for part, e in zip(zip(*shards, strict=True), wanted, strict=True)]
    assert max(errors[:2]) < 1e-5 and all(1e-4 < error < 1e-2 for error in errors[2:]), errors


@pytest.mark.parametrize("scheme", list(FUNCTIONS))
def test_keys_that_travel_in_bf16_give_the_same_at_any_number_of_ranks(monkeypatch, scheme) -> None:
    found, length = {}, 96
    for cp, layout, window in ((1, "zigzag", None), (2, "zigzag", None), (4, "contiguous", None), (1, "zigzag", 9), (4, "zigzag", 9)):
        for kv_dtype in ("bf16", "compute") if cp == 4 else ("bf16",):
            degree = 2 if cp == 4 and scheme in ("hybrid", "double_ring") else 1
            case = Case(scheme, cp, (4, 2), layout, window, [(0, 50)], [], True, length, length, 0, degree, {"kv_dtype": kv_dtype})
            tensors = case.tensors(torch.float64, 3)
            if scheme in ("host", "ulysses", "hybrid"):
                case.options |= {"kv_chunk": 20} if scheme == "host" else {"head_chunk": 1}
            parts = zip(*run_simulated(monkeypatch, _call, cp, case, tensors), strict=True)
            found[cp, window, kv_dtype] = [unshard_sequence(list(part), 1, layout) for part in parts]
    for window in (None, 9):
        alone = found[1, window, "bf16"]
        for cp in (2, 4) if window is None else (4,):
            for got, wanted in zip(found[cp, window, "bf16"], alone, strict=True):
                assert _error(got, wanted) < 1e-14, (cp, window)
        away = [_error(got, wanted) for got, wanted in zip(found[4, window, "compute"], alone, strict=True)]
        assert all(1e-4 < error < 1e-2 for error in away), f"rounded to eight bits, and no more: {away}"


def _refused(dist: Any, function: Any, error: type[Exception], text: str, heads: tuple[int, int], mask: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "kv_dtype" in mask else torch.float32
    q, k = (torch.zeros(1, 4, n, 8, dtype=dtype) for n in heads)
    with pytest.raises(error, match=text):
        function(q, k, k, group=None, **mask)


IDS = torch.tensor([[0, 0, 1, 0]])
REFUSED = [
    ((12, 5), {}, UserError, "12 query heads are not a multiple of 5"),
    ((4, 2), {"document_ids": IDS}, ValueError, "decrease at token"),
    ((4, 2), {"document_ids": IDS[:, :3]}, ValueError, r"document_ids \(1, 3\) must be \[B, T/cp\]"),
    ((4, 2), {"document_ids": IDS.float()}, ValueError, "must be integers"),
    ((4, 2), {"prefix": IDS == 1}, ValueError, "must be its first ones"),
    ((4, 2), {"prefix": IDS == 0, "causal": False}, ValueError, "prefix goes with causal=True"),
    ((4, 2), {"window": 0}, ValueError, "window is 0"),
    ((4, 2), {"kernel": "flash"}, UserError, "use one of auto, flash_cpu"),
    ((4, 2), {"kernel": "cudnn"}, UserError, "'cudnn' cannot compute .* it runs on CUDA only; use 'auto'"),
    ((4, 2), {"kv_dtype": "fp32"}, ValueError, "no fewer bits than q, k and v, which are torch.bfloat16; use kv_dtype='compute'"),
    ((4, 2), {"kv_dtype": "fp8"}, ValueError, "kv_dtype is 'fp8'; use one of compute, fp32, bf16"),
    ((4, 2), {"kv_gradient_dtype": "fp8"}, ValueError, "kv_gradient_dtype is 'fp8'; use one of fp32, compute, bf16"),
    ((4, 2), {"layout": "striped"}, ValueError, "layout is 'striped'"),
]


@pytest.mark.parametrize(("heads", "mask", "error", "text"), REFUSED)
def test_what_makes_no_sense_is_refused_on_every_rank(monkeypatch, heads, mask, error, text) -> None:
    for scheme in ("ring", "ulysses", "allgather_kv"):
        run_simulated(monkeypatch, _refused, 2, FUNCTIONS[scheme], error, text, heads, mask)


def test_fewer_query_heads_than_ranks_are_refused_with_what_to_use(monkeypatch) -> None:
    text = "at least 4 query heads .* use parallel.sequence=ring"
    run_simulated(monkeypatch, _refused, 4, FUNCTIONS["ulysses"], UserError, text, (3, 1), {})
    with pytest.raises(UserError, match="multiple of 6"):
        shard_sequence(torch.zeros(1, 20), 1, 0, 3, "zigzag")


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_shards_come_together_again(layout) -> None:
    x = torch.randn(2, 24, 3)
    for size in (1, 2, 3, 4):
        assert torch.equal(unshard_sequence([shard_sequence(x, 1, r, size, layout) for r in range(size)], 1, layout), x)
    with pytest.raises(ValueError, match="equally long"):
        unshard_sequence([x, x[:, :8]], 1, layout)


def test_one_process_without_ranks_is_a_sequence_of_its_own() -> None:
    case = _random_case(random.Random(8), "ring", 1)
    tensors = case.tensors(torch.float64, 1)
    q, k, v = tensors[:3]
    out = ring_attention.ring_attention(q, k, v, group=None, window=case.window, document_ids=case.ids())
    wanted = attention_reference(*(x.transpose(1, 2) for x in (q, k, v)), case.documents, case.window).transpose(1, 2)
    assert _error(out, wanted) < 1e-10
