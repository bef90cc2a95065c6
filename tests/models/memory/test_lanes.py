"""Memories that work on their own tokens against memories that work on all, in float64: any routing, packed documents, tiles, ranges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.batch import Bounds
from models.config import MemoryModuleConfig, ModelConfig
from models.memory.lanes import Lanes, combined, picked, plan_lanes, returned, spread
from models.memory.mom import MixtureOfMemories
from models.memory.protocol import build_memory

D, T, CHUNK = 12, 90, 4
DOCUMENTS = {"one": ((0,), (0,)), "packed": ((0, 1, 40, 41), (0, 30)), "at the start": ((0, 4, 63), (0,))}
RANGES = {"whole": ((0, T),), "two, the later one first": ((33, T), (10, 33)), "from a document's start": ((63, T),)}


def module_of(compute: str, n_memories: int = 6, top_k: int = 2, shared: bool = True) -> MixtureOfMemories:
    mixture = {"n_memories": n_memories, "top_k": top_k, "shared": shared, "compute": compute}
    memory = MemoryModuleConfig.model_validate({"kind": "mom", "chunk_size": CHUNK, "expand_v": 1.5, "mom": mixture})
    module = build_memory(ModelConfig(d_model=D, n_heads=2, layers=("memory",), memory=memory)).double()
    assert isinstance(module, MixtureOfMemories)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            value = module.init_parameter(name, p.shape, g)
            p.copy_(torch.randn(p.shape, generator=g) * 0.5 if value is None else value)
    return module


def everything(module: MixtureOfMemories, x_BTC: Tensor, bounds: Bounds) -> list[Tensor]:
    """Output, final state, and gradients of a number that depends on both."""
    x_BTC = x_BTC.clone().requires_grad_()
    g = torch.Generator().manual_seed(5)
    state = {k: torch.randn(v.shape, dtype=v.dtype, generator=g) for k, v in module.init_state(2, "cpu", torch.float64).items()}
    state = {k: v.requires_grad_() for k, v in state.items()}
    y, after = module(x_BTC, state, bounds)
    loss = (y * y.detach().cos()).sum() + after["state"].sin().sum()
    wanted = [x_BTC, *state.values(), *module.parameters()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [y, after["state"], *(torch.zeros_like(x) if one is None else one for x, one in zip(wanted, found, strict=True))]


@pytest.mark.parametrize("tile", [0, 28])
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("mixture", [(6, 2, True), (5, 1, False)])
def test_routed_is_dense(mixture: tuple[int, int, bool], documents: str, ranges: str, tile: int) -> None:
    bounds = Bounds(T, RANGES[ranges], DOCUMENTS[documents])
    x_BTC = torch.randn(2, bounds.local_len, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for compute in ("routed", "dense"):
        module = module_of(compute, *mixture)
        module.tile_tokens = tile
        assert module.in_lanes(bounds, bounds.ranges[-1]) == (compute == "routed")
        found.append(everything(module, x_BTC, replace(bounds, _cache={})))
    for routed, dense in zip(*found, strict=True):
        torch.testing.assert_close(routed, dense, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shared", [True, False])
def test_all_tokens_may_go_to_the_same_memories(shared: bool) -> None:
    """No token is dropped however many a memory gets; memories that get none hand on their state, and nothing where a document began."""
    x_BTC = torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x_BTC[..., 0] = 9.0
    found = []
    for compute in ("routed", "dense"):
        module = module_of(compute, shared=shared)
        with torch.no_grad():
            module.w_router.weight[:, 0] = -2.0 * torch.arange(6)
        assert set(module._chosen(x_BTC, module.w_router.weight)[0][..., :2].unique().tolist()) == {0, 1}
        found.append([everything(module, x_BTC, Bounds(T, ((0, T),), documents)) for documents in DOCUMENTS.values()])
    for routed, dense in zip(*found, strict=True):
        for one, other in zip(routed, dense, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_many_short_documents_are_computed_densely() -> None:
    module = module_of("routed")
    short, long = (Bounds(T, ((0, T),), (tuple(range(0, T, size)),) * 2) for size in (3, 45))
    assert not module.in_lanes(short, (0, T)) and module.in_lanes(long, (0, T))


def lanes_of(documents: str, k: int = 2) -> tuple[Lanes, Tensor]:
    chosen_BTk = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i))[:k] for i in range(2 * T)]).view(2, T, k)
    return plan_lanes(chosen_BTk, Bounds(T, ((0, T),), DOCUMENTS[documents]), (0, T), heads=3, memories=5, chunk=CHUNK), chosen_BTk


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_every_token_has_one_slot_with_each_of_its_memories_in_order(documents: str) -> None:
    lanes, chosen_BTk = lanes_of(documents)
    flat = lanes.row_nBc.transpose(0, 1).flatten(1)
    for row in range(2):
        held = [int(i) for i in flat[row] if i < -(-T // CHUNK) * 2 * 5 * 3 * CHUNK]
        chunk_row, place = [divmod(i, 5 * 3 * CHUNK) for i in held], []
        for outer, inner in chunk_row:
            assert outer % 2 == row and inner % (3 * CHUNK) < CHUNK, "of head 0"
            place.append((outer // 2 * CHUNK + inner % CHUNK, inner // (3 * CHUNK)))
        assert sorted(place) == sorted((t, int(m)) for t in range(T) for m in chosen_BTk[row, t])
    for n, chunk in enumerate(lanes.row_nBc[:, 0].tolist()):  # a chunk is of one memory and of one document, its tokens in order
        inside = [divmod(i, 5 * 3 * CHUNK) for i in chunk if i < -(-T // CHUNK) * 2 * 5 * 3 * CHUNK]
        tokens = [outer // 2 * CHUNK + inner % CHUNK for outer, inner in inside]
        starts = DOCUMENTS[documents][0]
        assert tokens == sorted(tokens) and len({inner // (3 * CHUNK) for _, inner in inside}) <= 1, n
        assert len({max(s for s in starts if s <= t) for t in tokens}) <= 1, n


def test_gradients_of_what_moves_tokens_by_differences() -> None:
    lanes, _ = lanes_of("packed")
    g = torch.Generator().manual_seed(3)
    once, all_memories = (torch.randn(-(-T // CHUNK), 2 * m * 3, CHUNK, 2, dtype=torch.float64, generator=g) for m in (1, 5))
    slots = torch.randn(lanes.chunks, 2 * 3, CHUNK, 2, dtype=torch.float64, generator=g)
    weight = torch.rand(lanes.slot_kNBc.shape, dtype=torch.float64, generator=g)
    filling = torch.zeros(T + (-T) % CHUNK, dtype=torch.bool)
    filling[T:] = True
    for x in (once, all_memories):
        x.view(len(x), -1, CHUNK, 2)[filling.view(-1, CHUNK).unsqueeze(1).expand(-1, x.shape[1], -1)] = 0
    weight.masked_fill_(filling.view(1, -1, 1, CHUNK), 0)
    for body, inputs in (
        (lambda x: spread(x, lanes), [once]),
        (lambda x: picked(x, lanes).masked_fill(lanes.empty_nGc.unsqueeze(-1), 0), [all_memories]),
        (lambda x: returned(x.masked_fill(lanes.empty_nGc.unsqueeze(-1), 0), lanes), [slots]),
        (lambda x, w: combined(x, w, lanes), [slots, weight]),
    ):
        given = [one.clone().requires_grad_() for one in inputs]
        y = body(*given)
        dy = torch.randn(y.shape, dtype=y.dtype, generator=g)
        dx = torch.autograd.grad(y, given, dy)
        for i, one in enumerate(inputs):  # they are linear in each input: the gradient is the adjoint
            step = torch.randn(one.shape, dtype=one.dtype, generator=g)
            step = step * (one != 0)
            moved = [other + step if j == i else other for j, other in enumerate(inputs)]
            assert float(((body(*moved) - y.detach()) * dy).sum()) == pytest.approx(float((dx[i] * step).sum()), rel=1e-9)
