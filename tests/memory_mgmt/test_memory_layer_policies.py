"""Layers that read a table, under memory policies: the same losses and gradients as the plain model."""

from __future__ import annotations

import pytest
import torch

from memory_mgmt.activations import Shapes
from memory_mgmt.apply import apply_policy
from memory_mgmt.offload import HostStore
from memory_mgmt.policy import KEEP, KEEP_MIXER, RECOMPUTE, RECOMPUTE_BLOCK, SWAP, LayerPolicy, Policy, Split
from models.transformer import Transformer
from tests.memory_mgmt.measured import kept_bytes
from tests.memory_mgmt.test_execution import PRECISIONS, all_layers, assert_same, config_of, gradients, make, make_batch

KEYS = {"n_keys": 6, "heads": 2, "top_k": 3, "key_dim": 8, "qk_norm": True}
BESIDE = {**KEYS, "attach": "beside"}
HIERARCHICAL = {"branching": (2, 3), "units": (5, 3)}
CONFIG = config_of(
    "swa", "memory", n_layers=4, feedforward=("product_keys", "hierarchical", "dense"), product_keys=BESIDE, hierarchical=HIERARCHICAL
)
PARTS = LayerPolicy(Split(0.5, 0.5, 0), Split(0.3, 0.3, 0.4), Split(0.6, 0.4, 0), Split(0.5, 0.0, 0.5))
POLICIES = {
    "block": all_layers(CONFIG, RECOMPUTE_BLOCK),
    "block in tiles": all_layers(CONFIG, RECOMPUTE_BLOCK, ffn_tile_tokens=32, memory_tile_tokens=32),
    "groups": all_layers(CONFIG, RECOMPUTE_BLOCK, group_blocks=2),
    "mixer": all_layers(CONFIG, KEEP_MIXER),
    "swap": all_layers(CONFIG, LayerPolicy(SWAP, RECOMPUTE, SWAP, RECOMPUTE)),
    "parts": all_layers(CONFIG, PARTS, ffn_tile_tokens=16),
    "feed-forward only": all_layers(CONFIG, LayerPolicy(KEEP, KEEP, KEEP, RECOMPUTE)),
    "kept, in tiles": all_layers(CONFIG, LayerPolicy(), ffn_tile_tokens=32),
}
WHOLE = ("block", "mixer", "swap", "feed-forward only")
"""Nothing is cut: the same bits. (A group of blocks adds what it read to the table before the others do: another order of sums.)"""


def results(model: Transformer, bf16: bool) -> list[torch.Tensor]:
    return [value.to_dense() for value in gradients(model, bf16)]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("precision", ["64", "bf16"])
def test_same_losses_and_gradients(name: str, precision: str) -> None:
    dtype, bf16 = PRECISIONS[precision]
    with HostStore("cpu") as store:
        got = results(make(CONFIG, dtype, POLICIES[name], store), bf16)
        assert store.used_bytes == 0
    tolerance = 0 if name in WHOLE else 1e-12 if precision == "64" else 5e-2  # a bias of keys: a sum that nearly cancels
    assert_same(got, results(make(CONFIG, dtype), bf16), tolerance)


@pytest.mark.parametrize(
    "settings",
    [{"product_keys": KEYS}, {"product_keys": BESIDE}, {"hierarchical": HIERARCHICAL}],
    ids=["in place", "beside", "hierarchical"],
)
def test_recomputing_the_feed_forward_keeps_only_the_stream(settings: dict) -> None:
    """Of a layer that reads a table: its share of what waits for backward is the formula's (``Shapes.reader_kept``)."""
    (kind,) = settings
    config = config_of("swa", n_layers=1, d_model=32, feedforward=(kind,), **settings)
    batch = make_batch()

    def kept(policy: LayerPolicy) -> int:
        model = make(config, torch.float64, all_layers(config, policy))
        return kept_bytes(lambda: model(batch))

    again, whole = (kept(LayerPolicy(KEEP, RECOMPUTE, KEEP, split)) for split in (RECOMPUTE, KEEP))
    shapes = Shapes(config, rows=2, tokens=96, precision="fp64")
    assert whole - again == pytest.approx(shapes.reader_kept(kind) - shapes.stream, rel=0.05)


@pytest.mark.parametrize("split", [SWAP, Split(0.0, 0.0, 0.0, 1.0)])
def test_what_cannot_be_done_is_refused(split: Split) -> None:
    policy = Policy((LayerPolicy(feed_forward=split),) * 4)
    with pytest.raises(ValueError, match="layer 0 reads a table: its feed-forward is kept or recomputed"):
        apply_policy(make(CONFIG), policy, HostStore(torch.device("cpu")))
