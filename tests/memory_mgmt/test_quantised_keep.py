"""Blocks that keep their feed-forward in eight bits: the same loss, gradients within the stated bound, the bytes that were promised,
and training that goes the same way."""

import json

import pytest
import torch
from pydantic import ValidationError

from memory_mgmt.apply import apply_policy
from memory_mgmt.changes import memory_options
from memory_mgmt.config import MemoryConfig
from memory_mgmt.offload import HostStore
from memory_mgmt.policy import KEEP, KEEP_ALL, QUANTISE, RECOMPUTE, SWAP, LayerPolicy, Policy, Split
from memory_mgmt.policy_settings import policy_of
from memory_mgmt.quantised_costs import packed_bytes
from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.transformer import Transformer, init_weights
from tests.memory_mgmt.test_execution import FFN, OUT, QKV, STREAM, kept_by

VOCAB, TOKENS, WIDTH = 64, 256, 128
OF_ONE, OF_ALL = 0.015, 0.0075
"""The bound: relative error of any parameter's gradient, and of all gradients together. bf16 changes them by as much."""
PACKED = LayerPolicy(feed_forward=QUANTISE)
PARTS = LayerPolicy(Split(0.5, 0.5), RECOMPUTE, KEEP, Split(0.25, 0.25, 0.25, 0.25))


def make(kinds, policy=None, store=None, n_layers=4):
    config = ModelConfig(d_model=WIDTH, n_heads=4, n_kv_heads=2, layers=kinds, n_layers=n_layers, window=64)
    model = Transformer(config, VOCAB)
    init_weights(model, 0)
    if policy is not None:
        apply_policy(model, policy, store)
    return model


def batch_of(seed):
    ids = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    ids[:, 1::2] = (5 * ids[:, ::2] + 3) % VOCAB  # every other token can be learned
    return Batch(ids, ids.roll(-1, 1), torch.arange(TOKENS).expand(2, TOKENS), Bounds(TOKENS, ((0, TOKENS),), ((0,), (0,))))


def loss_and_gradients(model, bf16=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        loss = model(batch_of(0)).sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def together(got, exact):
    """Relative error of all gradients as one vector."""
    flat = [torch.cat([gradients[name].flatten() for name in exact]) for gradients in (got, exact)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kinds", [("full",), ("swa", "memory")], ids=["full", "window and memory"])
def test_the_loss_is_the_same_and_gradients_are_within_the_bound(kinds, bf16):
    exact_loss, exact = loss_and_gradients(make(kinds), bf16)
    loss, got = loss_and_gradients(make(kinds, Policy((PACKED,) * 4)), bf16)
    assert torch.equal(loss, exact_loss)
    errors = {name: ((got[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}
    assert max(errors.values()) < OF_ONE, errors
    assert together(got, exact) < OF_ALL
    assert max(errors.values()) > 1e-3 and errors["head.weight"] == 0  # the copies were used, and above them nothing changes
    again_loss, again = loss_and_gradients(make(kinds, Policy((PACKED,) * 4)), bf16)
    assert torch.equal(again_loss, loss) and all(torch.equal(again[name], got[name]) for name in got)


@pytest.mark.parametrize("tile", [0, 24])
def test_all_four_ways_side_by_side(tile):
    exact_loss, exact = loss_and_gradients(make(("full", "memory")))
    with HostStore("cpu") as store:
        loss, got = loss_and_gradients(make(("full", "memory"), Policy((PARTS,) * 4, ffn_tile_tokens=tile), store))
        assert store.used_bytes == 0
    assert loss == pytest.approx(exact_loss.item(), rel=1e-6)
    assert 1e-4 < together(got, exact) < OF_ALL


@pytest.mark.parametrize(("share", "layer"), [(1.0, PACKED), (0.5, LayerPolicy(feed_forward=Split(0.0, 0.5, 0.0, 0.5)))])
def test_what_is_kept_is_what_was_promised(share, layer):
    rows = 2 * 1024
    packed = packed_bytes(rows, 16, 4) + 2 * packed_bytes(rows, 64, 4)
    assert packed < 0.35 * FFN  # one group of 16 and of 64 per row: with wider rows 0.26
    with HostStore("cpu") as store:
        kept = kept_by(layer, store=store, config={"d_ff": 64})
    assert kept == STREAM + QKV + OUT + share * packed


def test_training_goes_the_same_way():
    """Warm-up and clipping as in real runs: without them small differences, of any cause, decide when such a model begins to learn."""

    def losses(policy):
        model = make(("full",), policy, n_layers=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), fused=True)
        found = []
        for step in range(20):
            optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 10)
            loss = model(batch_of(step)).sum() / (2 * TOKENS)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found)

    exact, packed = losses(None), losses(Policy((PACKED,) * 2))
    assert exact[-3:].mean() < 0.85 * exact[0]  # it learns
    assert packed[0] == exact[0] and not torch.equal(packed, exact)
    assert (packed / exact - 1).abs().max() < 0.005


# --- settings and files --------------------------------------------------------------------------------------------------------


def test_settings_as_policies():
    one = policy_of(MemoryConfig(quantise="feed_forward"), 2)
    assert one.layers == (PACKED,) * 2 and policy_of(MemoryConfig(), 2).layers == (KEEP_ALL,) * 2
    tiled = policy_of(MemoryConfig(quantise="feed_forward", ffn_tile_tokens=64, offload="inputs"), 1)
    assert tiled.layers == (LayerPolicy(SWAP, KEEP, KEEP, QUANTISE),) and tiled.ffn_tile_tokens == 64


@pytest.mark.parametrize("other", [{"recompute": "block"}, {"recompute": "mixer"}, {"offload": "kept"}])
def test_settings_that_leave_nothing_to_quantise_are_refused(other):
    with pytest.raises(ValidationError, match="nothing to keep in eight bits.*quantise none"):
        MemoryConfig(quantise="feed_forward", **other)
    MemoryConfig(quantise="feed_forward", **{**other, "recompute": "auto"})


def test_changes_that_would_be_refused_are_not_suggested():
    memory = MemoryConfig(quantise="feed_forward")
    options = memory_options(ModelConfig(), memory, seq_len=65536, cp=1, vocab_size=320, cuda=False)
    assert ({"recompute": "block", "quantise": "none"}) in [settings for settings, _ in options]
    assert all(MemoryConfig.model_validate({**memory.model_dump(), **settings}) for settings, _ in options)


@pytest.mark.parametrize("name", ["input", "projections", "mixer"])
def test_no_policy_packs_what_attention_reads(name):
    with pytest.raises(ValueError, match=f"{name} cannot be kept in eight bits; only feed_forward can"):
        LayerPolicy(**{name: Split(0.5, 0.0, 0.0, 0.5)})


def test_plans_of_before_still_load():
    policy = Policy((PARTS, KEEP_ALL))
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    old = Policy((LayerPolicy(feed_forward=Split(0.5, 0.0, 0.5)), KEEP_ALL)).to_dict()
    for run in old["layers"]:
        for split in run["policy"].values():
            del split["quantise"]
    assert Policy.from_dict(old) == Policy((LayerPolicy(feed_forward=Split(0.5, 0.0, 0.5)), KEEP_ALL))


def test_tokens_of_a_split():
    split = Split(0.3, 0.2, 0.1, 0.4)
    assert split.tokens(100, 0) == (20, 30, 40, 10)
    assert split.tokens(100, 16) == (16, 32, 32, 20)
    assert QUANTISE.tokens(100, 16) == (0, 0, 100, 0) and Split(0.5, 0.0, 0.0, 0.5).tokens(100, 64) == (0, 0, 100, 0)
