"""Hierarchical memories against an oracle that goes token by token in float64: packed documents, ranges, readings, pieces, cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from models import hierarchical
from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.flops import model_flops_per_token, parameter_count
from models.hierarchical import HierarchicalMemory
from models.transformer import Transformer, init_weights

SETTINGS = {"branching": [3, 2], "units": [5, 4]}
CLUSTERS = (((0, 4), (6, 0), (7, 4), (17, -1)), ((0, 1), (11, 5)))
"""Of two rows of 20 tokens: a cluster that comes back, one document of one token, one of no cluster; rows that share upper clusters."""
DTYPE = torch.float64


def model_of(settings: dict = SETTINGS, dtype: torch.dtype = DTYPE, **changes: object) -> Transformer:
    config = ModelConfig.model_validate(
        {"d_model": 12, "n_heads": 2, "layers": ["swa"], "n_layers": 3, "window": 4, "feedforward": ["hierarchical", "dense"], "d_ff": 20}
        | {"hierarchical": settings, "init_std": 0.3, **changes}
    )
    model = Transformer(config, 32).to(dtype)
    init_weights(model, 0)
    return model


def layer_of(model: Transformer, i: int = 2) -> HierarchicalMemory:
    layer = model.blocks[i].ffn
    assert isinstance(layer, HierarchicalMemory)
    return layer


def bounds_of(ranges: tuple = ((0, 20),), clusters: tuple = CLUSTERS) -> Bounds:
    return Bounds(20, ranges, tuple(tuple(start for start, _ in row) for row in clusters), (), clusters)


def inputs(tokens: int = 20, seed: int = 1) -> Tensor:
    return torch.randn(2, tokens, 12, dtype=DTYPE, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def run(layer: HierarchicalMemory, x_BTC: Tensor, bounds: Bounds) -> Tensor:
    layer.table.begin(bounds)
    return layer(x_BTC, bounds)


@pytest.mark.parametrize("at_once", [(4096, 16_384), (6, 5), (1, 1)])
@pytest.mark.parametrize("ranges", [((0, 20),), ((2, 9), (13, 18))])
def test_the_layer_is_its_oracle(ranges: tuple, at_once: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and every gradient, in readings of one block or all, in pieces of some tokens or all, twice (the second adds up)."""
    monkeypatch.setattr(hierarchical, "ROWS_AT_ONCE", at_once[0])
    monkeypatch.setattr(hierarchical, "TOKENS_AT_ONCE", at_once[1])
    layer, bounds = layer_of(model_of()), bounds_of(ranges)
    x_BTC = inputs(bounds.local_len)
    values = layer.table.weight.detach().clone().requires_grad_()
    tensors = [x_BTC, *layer.parameters(), layer.table.weight]
    want = layer.oracle(x_BTC, bounds, values)
    expected = torch.autograd.grad((want * want.detach().cos()).sum(), [*tensors[:-1], values])
    for turn in (1, 2):
        got = run(layer, x_BTC, replace(bounds, _cache={}))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
        (got * got.detach().cos()).sum().backward()
        for tensor, wanted in zip(tensors, expected, strict=True):
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad.to_dense(), turn * wanted, rtol=0, atol=1e-12)
    gradient = layer.table.weight.grad
    assert gradient is not None and torch.equal(gradient._indices()[0], expected[-1].any(1).nonzero().view(-1)), "rows of other clusters"


def test_gradients_by_differences() -> None:
    layer, bounds = layer_of(model_of()), bounds_of()
    assert torch.autograd.gradcheck(lambda x: run(layer, x, replace(bounds, _cache={})), [inputs()])


def test_a_document_s_tokens_depend_on_its_own_clusters_alone() -> None:
    """Blocks of one document changed: its tokens change, and nobody else's but those that share a cluster with it."""
    layer, x_BTC, bounds = layer_of(model_of()), inputs(), bounds_of()
    before = run(layer, x_BTC, bounds)
    with torch.no_grad():  # the lowest block of cluster 4 in this layer: after three blocks of the top level
        first = layer.offset + 3 * 5 + 4 * 4
        layer.table.weight[first : first + 4] += 1
    changed = (run(layer, x_BTC, replace(bounds, _cache={})) != before).any(-1)
    assert changed.tolist() == [[t < 6 or 7 <= t < 17 for t in range(20)], [False] * 20]


def test_without_clusters_it_is_the_dense_part() -> None:
    layer, x_BTC = layer_of(model_of()), inputs()
    for bounds in (Bounds.whole(2, 20), bounds_of(clusters=(((0, -1),),) * 2)):
        y_BTC = run(layer, x_BTC, bounds)
        assert torch.equal(y_BTC, layer.dense(x_BTC))
        y_BTC.sum().backward()
        assert layer.table.weight.grad is None


def test_a_cluster_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clusters 6 to 6 are not in 0\.\.5"):
        run(layer_of(model_of()), inputs(), bounds_of(clusters=(((0, 6),), ((0, -1),))))


def test_recomputation_reads_the_same() -> None:
    layer, bounds = layer_of(model_of()), bounds_of()
    found = []
    for body in (layer.forward, lambda *args: checkpoint(layer.forward, *args, use_reentrant=False)):
        x_BTC, bounds = inputs(), replace(bounds, _cache={})
        layer.table.begin(bounds)
        body(x_BTC, bounds).sin().sum().backward()
        assert x_BTC.grad is not None and layer.table.weight.grad is not None
        found.append((x_BTC.grad, layer.table.weight.grad.to_dense()))
        layer.table.weight.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("feedforward", [["hierarchical"], ["product_keys", "hierarchical", "dense"]])
def test_counts_are_those_of_the_model(feedforward: list[str]) -> None:
    keys = {"n_keys": 5, "heads": 1, "top_k": 2, "key_dim": 4} if "product_keys" in feedforward else {}
    model = model_of(feedforward=feedforward, product_keys=keys)
    count, names = parameter_count(model.config, 32), dict(model.named_parameters())
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.tables == sum(p.numel() for p in model.value_tables.parameters())
    assert count.ffn == sum(p.numel() for name, p in names.items() if ".ffn." in name)
    layers = model.config.feedforward_kinds.count("hierarchical")
    assert names[f"value_tables.{len(model.value_tables) - 1}.weight"].shape == (layers * (3 * 5 + 6 * 4), 3 * 12)
    plain = {"feedforward": [kind.replace("hierarchical", "dense") for kind in feedforward], "hierarchical": {}}
    without = ModelConfig.model_validate(model.config.model_dump() | plain)
    fetched = 18 * 12 * (5 + 4) * layers
    assert model_flops_per_token(model.config, 32, 8) == pytest.approx(model_flops_per_token(without, 32, 8) + fetched)


def test_cost_is_what_is_saved_and_computed() -> None:
    layer, bounds = layer_of(model_of()), bounds_of(clusters=(((0, 4), (6, 0)), ((0, 1), (11, 5))))
    owned = {p.untyped_storage()._cdata for p in [*layer.parameters(), layer.table.weight]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in owned:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    x_BTC = inputs()
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(layer, x_BTC, bounds)
    cost = layer.cost(2, 20, 8)
    assert counter.get_total_flops() == pytest.approx(cost.flops_forward, rel=0.01)
    assert sum(saved.values()) == pytest.approx(cost.saved_bytes, rel=0.01)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == pytest.approx(cost.flops_backward, rel=0.01)


def test_under_bf16_the_whole_model_learns() -> None:
    model = model_of(dtype=torch.float32)
    tokens = torch.randint(32, (2, 20), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, tokens.roll(-1, 1), torch.arange(20).expand(2, 20), bounds_of())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch).sum().backward()
    assert all(p.grad is not None and p.grad.to_dense().any() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hierarchical": {"branching": [4], "units": [2, 2]}}, "branching has 1 levels and hierarchical.units 2"),
        ({"hierarchical": {"branching": [2**16, 2**15], "units": [1, 1]}}, "31 bits"),
        ({"hierarchical": {"branching": []}}, "at least 1"),
        ({"feedforward": ["dense"], "hierarchical": {"units": [2, 2]}}, "no layer has feedforward hierarchical"),
        ({"layers": ["full"], "memory": {"kind": "rmt"}}, "which feedforward hierarchical does not know"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({"feedforward": ["hierarchical"], **changes})
