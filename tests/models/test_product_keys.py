"""The memory layer against all scores of all values in float64: selection, gradients, options, cost, and what the model makes of it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import product_keys
from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.flops import model_flops_per_token, parameter_count
from models.product_keys import ProductKeyMemory, best_pairs
from models.transformer import Transformer, init_weights

SETTINGS = [
    {"n_keys": 6, "heads": 2, "top_k": 3, "key_dim": 8, "value_dim": 12},
    {"n_keys": 5, "heads": 1, "top_k": 5, "key_dim": 6, "qk_norm": True},
    {"n_keys": 6, "heads": 2, "top_k": 4, "key_dim": 4, "value_dim": 8, "expansion": 4},
    {"n_keys": 7, "heads": 2, "top_k": 4, "key_dim": 8, "qk_norm": True, "tucker_rank": 2},
    {"n_keys": 6, "heads": 2, "top_k": 3, "key_dim": 4, "attach": "beside"},
    {"n_keys": 4, "heads": 3, "top_k": 2, "gate": "none", "qk_norm": True, "shared_table": False},
]


def model_of(settings: dict, dtype: torch.dtype = torch.float64, **changes: object) -> Transformer:
    config = ModelConfig.model_validate(
        {"d_model": 16, "n_heads": 2, "layers": ["swa"], "n_layers": 3, "window": 4, "feedforward": ["product_keys", "dense"]}
        | {"product_keys": settings, **changes}
    )
    model = Transformer(config, 32).to(dtype)
    init_weights(model, 0)
    return model


def layer_of(model: Transformer, i: int = 0) -> ProductKeyMemory:
    layer = model.blocks[i].ffn
    assert isinstance(layer, ProductKeyMemory)
    return layer


def run(layer: ProductKeyMemory, x_BTC: Tensor) -> Tensor:
    bounds = Bounds.whole(*x_BTC.shape[:2])
    layer.table.begin(bounds)
    return layer(x_BTC, bounds)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("at_once", [1 << 22, 40])
def test_the_layer_is_its_oracle(settings: dict, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and every gradient; scores in one tile or in tiles of some tokens."""
    monkeypatch.setattr(product_keys, "SCORES_AT_ONCE", at_once)
    layer = layer_of(model_of(settings))
    x_BTC = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    values = layer.table.weight.detach().clone().requires_grad_()
    got, want = run(layer, x_BTC), layer.oracle(x_BTC, values)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    tensors = [x_BTC, *layer.parameters(), layer.table.weight]
    expected = torch.autograd.grad((want * want.detach().cos()).sum(), [*tensors[:-1], values])
    (got * got.detach().cos()).sum().backward()
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad.to_dense(), wanted, rtol=0, atol=1e-12)


def test_gradients_by_differences() -> None:
    layer = layer_of(model_of(SETTINGS[0]))
    x_BTC = torch.randn(1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run(layer, x), [x_BTC])


def test_the_best_pairs_are_the_best_of_all() -> None:
    g = torch.Generator().manual_seed(0)
    first, second = (torch.randn(20, 9, generator=g) for _ in range(2))
    best, i, j = best_pairs(first, second, 4)
    sums = (first[:, :, None] + second[:, None, :]).flatten(1)
    want, place = sums.topk(4)
    assert torch.equal(best, want) and torch.equal(i * 9 + j, place)


def test_a_shared_table_is_one_parameter_and_layers_without_one_keep_their_names() -> None:
    shared, own = model_of(SETTINGS[0]), model_of(SETTINGS[-1])
    names = [name for name, _ in shared.named_parameters() if "value_tables" in name]
    assert names == ["value_tables.0.weight"] and layer_of(shared).table is layer_of(shared, 2).table
    assert layer_of(own).table is own.value_tables[0] and layer_of(own, 2).table is own.value_tables[1]
    plain = Transformer(ModelConfig(d_model=16, n_heads=2, layers=("swa",)), 32)
    assert not list(plain.value_tables) and "blocks.0.ffn.w_up.weight" in dict(plain.named_parameters())


@pytest.mark.parametrize("settings", SETTINGS)
def test_counts_are_the_model_s(settings: dict) -> None:
    model = model_of(settings)
    count = parameter_count(model.config, 32)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.tables == sum(p.numel() for p in model.value_tables.parameters())
    names = dict(model.named_parameters())
    assert count.ffn == sum(p.numel() for name, p in names.items() if ".ffn." in name)
    # What does not meet every token in a product: rows read, and norms.
    norms = sum(p.numel() for name, p in names.items() if "norm" in name or "core" in name)
    assert count.matmul == count.total - count.tables - norms - 32 * 16  # the embedding is looked up
    keys = model.config.product_keys
    without = 6 * count.matmul + 3 * 12 * 16 * 3.25
    read = 2 * 6 * keys.expansion * keys.heads * keys.top_k * model.config.value_width
    assert model_flops_per_token(model.config, 32, 8) == pytest.approx(without + read)


@pytest.mark.parametrize("settings", SETTINGS[:5])
def test_cost_is_what_is_saved_and_computed(settings: dict) -> None:
    layer = layer_of(model_of(settings))
    x_BTC = torch.randn(2, 24, 16, dtype=torch.float64, requires_grad=True)
    owned = {p.untyped_storage()._cdata for p in [*layer.parameters(), layer.table.weight]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in owned:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(layer, x_BTC)
    cost = layer.cost(2, 24, 8)
    entries = 2 * 24 * layer.heads * layer.top_k
    read = 2 * entries * layer.value_dim * layer.expansion  # an embedding bag, which torch does not count
    assert counter.get_total_flops() + read == pytest.approx(cost.flops_forward, rel=0.01)
    keys = layer.keys.numel() * 8 * (2 if layer.key_norm is not None else 0)
    assert sum(saved.values()) - keys == pytest.approx(cost.saved_bytes, rel=0.1)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() + 2 * read == pytest.approx(cost.flops_backward, rel=0.01)


def test_under_bf16_the_whole_model_learns_and_keys_are_found() -> None:
    model = model_of(SETTINGS[1], torch.float32)
    tokens = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, tokens.roll(-1, 1), torch.arange(12).expand(2, 12), Bounds.whole(2, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch).sum().backward()
    assert all(p.grad is not None and p.grad.to_dense().any() and p.grad.dtype == torch.float32 for p in model.parameters())
    gradient = layer_of(model).table.weight.grad
    assert gradient is not None and gradient.is_sparse


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"product_keys": {"top_k": 9, "n_keys": 8}}, "top_k 9 is larger than product_keys.n_keys 8"),
        ({"product_keys": {"n_keys": 46341}}, "31 bits"),
        ({"product_keys": {"gate": "none", "value_dim": 8, "top_k": 4}}, "value_dim 8 is not d_model"),
        ({"product_keys": {"expansion": 3, "n_keys": 8, "top_k": 4}}, "does not divide the 64 values"),
        ({"product_keys": {"key_dim": 7}}, "multiple of 2"),
        ({"feedforward": ["dense"], "product_keys": {"heads": 2}}, "no layer has feedforward product_keys"),
        ({"feedforward": ["moe"]}, "feedforward"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({"feedforward": ["product_keys"], **changes})
