"""Counts from shapes against the real modules and against torch's own flop counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.batch import Batch, Bounds
from models.config import MemoryModuleConfig, ModelConfig, TitansConfig
from models.flops import mean_window_keys, mixing_flops_per_token, model_flops_per_token, parameter_count
from models.transformer import Transformer, init_weights

CONFIGS = {
    "plain": ModelConfig(d_model=64, n_heads=4, layers=("full",), n_layers=3),
    "gqa_and_wide_heads": ModelConfig(d_model=64, n_heads=4, n_kv_heads=2, head_dim=32, layers=("full", "swa")),
    "biases_and_normed_heads": ModelConfig(
        d_model=64, n_heads=4, n_kv_heads=2, head_dim=24, layers=("full", "swa"), qkv_bias=True, qk_norm=True
    ),
    "tied": ModelConfig(d_model=64, n_heads=2, layers=("swa", "memory"), tie_embeddings=True),
    "memory": ModelConfig(d_model=64, n_heads=4, layers=("memory",), n_layers=2),
    "memory_other_shapes": ModelConfig(
        d_model=64, n_heads=4, layers=("memory", "swa"), memory=MemoryModuleConfig(n_heads=2, head_dim=16, expand_v=2.0, conv_kernel=1)
    ),
    "gsa": ModelConfig(d_model=64, n_heads=4, layers=("memory",), memory={"kind": "gsa", "expand_v": 2.0, "gsa": {"n_slots": 24}}),
    "mamba2": ModelConfig(d_model=64, n_heads=4, layers=("memory",), memory={"kind": "mamba2", "mamba2": {"n_groups": 2}}),
    "mamba2_no_convolution": ModelConfig(
        d_model=64,
        n_heads=2,
        layers=("memory", "swa"),
        memory={"kind": "mamba2", "conv_kernel": 1, "mamba2": {"state_dim": 16, "expand": 1.0}},
    ),
    "titans": ModelConfig(
        d_model=64, n_heads=4, layers=("memory", "swa"), memory=MemoryModuleConfig(kind="titans", n_heads=2, expand_v=1.5)
    ),
    "infini": ModelConfig(d_model=64, n_heads=4, layers=("memory",), memory={"kind": "infini", "n_heads": 2, "head_dim": 24}),
    "mom": ModelConfig(d_model=64, n_heads=4, layers=("memory",), memory={"kind": "mom", "expand_v": 2.0, "mom": {"n_memories": 3}}),
    "slots": ModelConfig(d_model=64, n_heads=4, layers=("memory",), memory={"kind": "slots", "n_heads": 2, "head_dim": 24}),
    "lm2": ModelConfig(
        d_model=64, layers=("memory",), memory={"kind": "slots", "n_heads": 2, "head_dim": 24, "slots": {"variant": "lm2", "n_slots": 9}}
    ),
    "fam": ModelConfig(d_model=64, n_heads=4, layers=("memory",), memory={"kind": "fam", "n_heads": 2, "head_dim": 24}),
    "neurocache": ModelConfig(d_model=64, n_heads=4, layers=("memory",), memory={"kind": "neurocache", "n_heads": 2, "head_dim": 24}),
    "rmt": ModelConfig(d_model=64, n_heads=4, layers=("full", "swa"), memory={"kind": "rmt", "rmt": {"tokens": 5}}),
    "hmt": ModelConfig(d_model=64, n_heads=4, layers=("full", "swa"), memory={"kind": "hmt"}),
    "armt": ModelConfig(d_model=64, n_heads=4, layers=("full", "swa"), memory={"kind": "armt", "armt": {"tokens": 5, "key_dim": 8}}),
    "lact": ModelConfig(d_model=64, layers=("memory",), memory=MemoryModuleConfig(kind="titans", titans=TitansConfig(variant="lact"))),
}
OWNERS = {"stack": "memory", "embed": "embedding", "head": "head", "norm": "norms", "norm1": "norms", "norm2": "norms", "ffn": "ffn"}


def owner(name: str, config: ModelConfig) -> str:
    """Which field of ParameterCount a parameter's fully qualified name belongs to."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return OWNERS[parts[0]]
    if parts[2] == "mixer":
        return "memory" if config.layer_kinds[int(parts[1])] == "memory" else "attention"
    return OWNERS[parts[2]]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count_equals_the_real_model(name):
    config, vocab_size = CONFIGS[name], 320
    with torch.device("meta"):
        model = Transformer(config, vocab_size)
    real = dict.fromkeys(("embedding", "head", "attention", "memory", "ffn", "norms"), 0)
    for parameter_name, parameter in model.named_parameters():
        real[owner(parameter_name, config)] += parameter.numel()
    count = parameter_count(config, vocab_size)
    assert {key: getattr(count, key) for key in real} == real
    assert count.total == sum(p.numel() for p in model.parameters())


def test_a_known_model():
    llama_8b = ModelConfig(d_model=4096, n_heads=32, n_kv_heads=8, d_ff=14336, layers=("full",), n_layers=32)
    assert parameter_count(llama_8b, 128256).total == 8_030_261_248  # the published count of Llama-3.1-8B


@pytest.mark.parametrize("name", ["plain", "gqa_and_wide_heads", "memory_other_shapes", "mamba2_no_convolution"])
def test_projections_cost_six_flops_per_parameter_and_token(name):
    """torch counts the matrix products of forward and backward below the loss head: projections are plain ``mm``, the recurrence
    of a memory layer is batched ``bmm``, flash attention on CPU is not counted. No convolution: its halo is projected too."""
    config, vocab_size, tokens = CONFIGS[name], 320, 96
    model = Transformer(config, vocab_size)
    init_weights(model, 0)
    token_ids = torch.randint(vocab_size, (1, tokens))
    batch = Batch(token_ids, token_ids, torch.arange(tokens)[None], Bounds.whole(1, tokens))
    with FlopCounterMode(display=False) as counter:
        model.hidden(batch).sum().backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    expected = 6 * (parameter_count(config, vocab_size).matmul - vocab_size * config.d_model) * tokens
    # The recurrence has a few small products of its own that run as mm.
    assert counted == (pytest.approx(expected, rel=2e-3) if "memory" in config.layer_kinds else expected)


def test_mean_window_keys_by_enumeration():
    for seq_len, window in ((1, 1), (7, 3), (7, 7), (7, 100), (100, 1)):
        assert mean_window_keys(seq_len, window) == pytest.approx(sum(min(t + 1, window) for t in range(seq_len)) / seq_len)


def test_token_mixing_by_hand():
    config = ModelConfig(d_model=64, n_heads=4, n_kv_heads=1, layers=("full", "swa", "memory"), window=8)
    # two products of 2 flops, half the keys, once forward and twice backward
    assert mixing_flops_per_token(config, "full", 1000) == 3 * 2 * 2 * 500 * 64
    # a window as long as the sequence is causal attention with its diagonal
    wide = config.model_copy(update={"window": 1000})
    assert mixing_flops_per_token(wide, "swa", 1000) == 3 * 2 * 2 * 500.5 * 64
    # 4 heads of 16 x 16: three products per token; 4 taps on 3 x 64 channels
    assert mixing_flops_per_token(config, "memory", 1000) == 3 * 4 * (3 * 2 * 16 * 16) + 3 * 2 * 4 * 3 * 64
    total = model_flops_per_token(config, 256, 1000)
    layers = sum(mixing_flops_per_token(config, kind, 1000) for kind in ("full", "swa", "memory"))
    assert total == 6 * parameter_count(config, 256).matmul + layers


def test_a_tied_output_projection_still_costs_its_product():
    untied = ModelConfig(layers=("full",))
    tied = untied.model_copy(update={"tie_embeddings": True})
    assert model_flops_per_token(tied, 256, 64) == model_flops_per_token(untied, 256, 64)
    assert parameter_count(untied, 256).total - parameter_count(tied, 256).total == 256 * untied.d_model
