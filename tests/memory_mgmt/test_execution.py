"""Models under every kind of memory policy against the plain model: the same losses and gradients, and the bytes that were promised."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import models.attention
from memory_mgmt.apply import apply_policy
from memory_mgmt.offload import HostStore
from memory_mgmt.policy import KEEP, KEEP_ALL, KEEP_MIXER, RECOMPUTE, RECOMPUTE_BLOCK, SWAP, LayerPolicy, Policy, Split
from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.transformer import Transformer, _assign, init_weights
from tests.memory_mgmt.measured import kept_bytes

VOCAB, TOKENS = 64, 96
PRECISIONS = {"64": (torch.float64, False), "32": (torch.float32, False), "bf16": (torch.float32, True)}
SWAP_ALL = LayerPolicy(SWAP, SWAP, SWAP, SWAP)
SWAP_KEPT = LayerPolicy(SWAP, RECOMPUTE, SWAP, RECOMPUTE)
PARTS = LayerPolicy(Split(0.5, 0.5, 0), Split(0.3, 0.3, 0.4), Split(0.6, 0.4, 0), Split(0.25, 0.25, 0.5))
NAMED = {"block": RECOMPUTE_BLOCK, "mixer": KEEP_MIXER, "swap all": SWAP_ALL, "swap kept": SWAP_KEPT, "parts": PARTS}


def config_of(*kinds, n_layers=2, **changes):
    extras = {"qkv_bias": "swa" in kinds, "qk_norm": "swa" in kinds}
    shapes = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "layers": kinds, "n_layers": n_layers, "window": 16}
    return ModelConfig(**{**shapes, **extras, **changes})


def fill(model):
    """Initial values, sharded or not; biases and the weights of head norms are none that could go unnoticed."""
    init_weights(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "_norm.weight")):
                _assign(parameter, torch.linspace(-0.5, 1.5, len(parameter)).to(parameter.dtype))


def make(config, dtype=torch.float64, policy=None, store=None):
    model = Transformer(config, VOCAB).to(dtype)
    fill(model)
    if policy is not None:
        apply_policy(model, policy, store)
    return model


def all_layers(config, layer, **changes):
    return Policy((layer,) * len(config.layer_kinds), **changes)


CLUSTERS = (((0, 2), (50, 5)), ((0, 1),))
"""For layers that fetch parameters by document."""


def make_batch(seed=0, tokens=TOKENS):
    ids = torch.randint(VOCAB, (2, tokens), generator=torch.Generator().manual_seed(seed))
    documents = ((0, tokens // 2 + 2), (0,))
    return Batch(ids, ids.roll(-1, 1), torch.arange(tokens).expand(2, tokens), Bounds(tokens, ((0, tokens),), documents, (), CLUSTERS))


def gradients(model, bf16=False, batches=1):
    losses = []
    for i in range(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            nll = model(make_batch(i))
        nll.sum().backward()
        losses.append(nll.detach())
    return [*losses, *(p.grad for p in model.parameters())]


def assert_same(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        if tolerance:
            assert (a - b).norm() <= tolerance * b.norm() + 1e-30
        else:
            assert torch.equal(a, b)


# --- numbers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bf16"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)], ids=["64", "32", "bf16"]
)
@pytest.mark.parametrize("kind", ["full", "swa", "memory"])
def test_whole_policies_give_the_same_bits(kind, dtype, bf16):
    config = config_of(kind)
    want = gradients(make(config, dtype), bf16)
    whole = [KEEP, SWAP, RECOMPUTE]
    with HostStore("cpu") as store:
        for choice in itertools.product([KEEP, SWAP], whole, whole, whole):
            policy = all_layers(config, LayerPolicy(*choice))
            assert_same(gradients(make(config, dtype, policy, store), bf16), want, 0)
        assert store.used_bytes == 0


@pytest.mark.parametrize("kind", ["full", "swa", "memory"])
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("precision, tolerance", [("64", 1e-13), ("32", 3e-6), ("bf16", 1e-2)])
def test_tiles_and_parts_differ_by_rounding_only(kind, name, precision, tolerance):
    config, (dtype, bf16) = config_of(kind), PRECISIONS[precision]
    with HostStore("cpu") as store:
        policy = all_layers(config, NAMED[name], ffn_tile_tokens=20, memory_tile_tokens=24)
        assert_same(gradients(make(config, dtype, policy, store), bf16), gradients(make(config, dtype), bf16), tolerance)


@pytest.mark.parametrize("kind", ["full", "memory"])
def test_a_stream_in_bf16_under_every_policy(kind):
    """Whole layers: the same bits as the plain model's, and the stream's bytes halve. Tiles: up to rounding."""
    config = config_of(kind)

    def run(policy=None, store=None):
        model = make(config, torch.float32, policy, store)
        model.residual_dtype, seen = torch.bfloat16, []
        hooks = [block.register_forward_hook(lambda m, a, out: seen.append(out.dtype)) for block in model.blocks]
        found = gradients(model, bf16=True)
        assert len(seen) >= len(hooks) and set(seen) == {torch.bfloat16}
        return found

    want = run()
    assert not torch.equal(want[0], gradients(make(config, torch.float32), bf16=True)[0])
    with HostStore("cpu") as store:
        for layer in (RECOMPUTE_BLOCK, KEEP_MIXER, SWAP_ALL, SWAP_KEPT):
            assert_same(run(all_layers(config, layer), store), want, 0)
        for layer in NAMED.values():
            assert_same(run(all_layers(config, layer, ffn_tile_tokens=20, memory_tile_tokens=24), store), want, 2e-2)
        assert_same(run(Policy((RECOMPUTE_BLOCK,) * 2, group_blocks=2), store), want, 0)


def splits(recompute=True):
    def normalised(parts):
        total = sum(parts)
        return Split(parts[0] / total, parts[1] / total, parts[2] / total) if total else KEEP

    share = st.integers(0, 7)
    return st.tuples(share, share, share if recompute else st.just(0)).map(normalised)


layer_policies = st.builds(LayerPolicy, splits(recompute=False), splits(), splits(), splits())
REFERENCE = {}


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.sampled_from([("full", "swa"), ("memory", "full"), ("swa", "memory")]),
    layers=st.tuples(layer_policies, layer_policies),
    tile=st.sampled_from([0, 7, 32]),
    memory_tile=st.sampled_from([0, 16]),
    group=st.sampled_from([1, 1, 2]),
)
def test_any_policy_differs_by_rounding_only(kinds, layers, tile, memory_tile, group):
    config = config_of(*kinds)
    if kinds not in REFERENCE:
        REFERENCE[kinds] = gradients(make(config))
    with HostStore("cpu") as store:
        model = make(config, policy=Policy(layers, group, 50, tile, memory_tile), store=store)
        assert_same(gradients(model), REFERENCE[kinds], 1e-12)
        assert store.used_bytes == 0


def another_attention(q_BHTD, k_BGTD, v_BGTD, bounds):
    """One that autograd takes apart: it saves q twice, copies, and tensors without tokens."""
    k_BHTD, v_BHTD = (x.repeat_interleave(2, dim=1) for x in (k_BGTD, v_BGTD))
    scores = (q_BHTD * q_BHTD.sigmoid()) @ k_BHTD.transpose(2, 3)
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -1e9).softmax(-1) @ v_BHTD * k_BGTD.exp().mean()


@pytest.mark.parametrize("layer", [*NAMED.values(), LayerPolicy(feed_forward=RECOMPUTE)])
def test_any_attention_may_fill_the_seam(layer):
    config = config_of("full")

    def run(policy, store=None):
        model = make(config, torch.float64, policy, store)
        for block in model.blocks:
            block.mixer.inner_attention = another_attention
        return gradients(model)

    with HostStore("cpu") as store:
        assert_same(run(all_layers(config, layer), store), run(None), 1e-12)


def test_several_passes_between_forward_and_backward():
    config = config_of("full", "memory")
    with HostStore("cpu") as store:
        model = make(config, policy=all_layers(config, PARTS), store=store)
        (model(make_batch(0)).sum() + model(make_batch(1)).sum()).backward()
        assert_same([p.grad for p in model.parameters()], gradients(make(config), batches=2)[2:], 1e-12)
    accumulated = gradients(make(config, policy=all_layers(config, KEEP_MIXER)), batches=2)
    assert_same(accumulated, gradients(make(config), batches=2), 1e-12)


def test_frozen_parameters_get_no_gradient_and_the_others_do():
    config = config_of("full", "memory")
    plain, model = make(config), make(config, policy=all_layers(config, RECOMPUTE_BLOCK))
    for m in (plain, model):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_("embed" not in name and "norm1" not in name and "w_up" not in name and "wk" not in name)
        m(make_batch()).sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_hooks_on_a_block_see_its_output_and_its_gradient():
    config, seen = config_of("full", "swa"), []
    model = make(config, policy=all_layers(config, RECOMPUTE_BLOCK))
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, a, out, i=i: (seen.append(i), out.register_hook(lambda g: seen.append(-1 - i)))[0])
    gradients(model)
    assert seen == [0, 1, -2, -1]


def test_deterministic_algorithms():
    config = config_of("full", "memory")
    torch.use_deterministic_algorithms(True)
    try:
        with HostStore("cpu") as store:
            runs = [gradients(make(config, torch.float32, all_layers(config, PARTS), store)) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(*runs, 0)


def dropping(policy):
    """A model whose memory layers drop out, its gradients, and the random number that follows them."""
    model = make(config_of("memory"))
    for block in model.blocks:
        mixer = block.mixer
        mixer.drop = torch.nn.Dropout(0.5)
        mixer._write_out = lambda *args, drop=mixer.drop, plain=mixer._write_out: drop(plain(*args))
    apply_policy(model, policy)
    torch.manual_seed(3)
    return gradients(model), torch.rand(1)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("tile", [0, 24])
def test_dropout_draws_the_same_numbers_again(group, tile):
    # Kept tiles draw tile by tile, as recomputed ones do.
    want, next_want = dropping(Policy((LayerPolicy(feed_forward=RECOMPUTE),) * 2, memory_tile_tokens=tile))
    got, next_got = dropping(Policy((RECOMPUTE_BLOCK,) * 2, group, memory_tile_tokens=tile))
    assert_same(got, want, 1e-12)
    assert torch.equal(next_got, next_want)
    unlike, _ = dropping(Policy((LayerPolicy(feed_forward=RECOMPUTE),) * 2, memory_tile_tokens=48))
    assert not torch.equal(unlike[0], want[0])


def test_a_second_backward_pass_is_refused():
    config = config_of("full")
    nll = make(config, policy=all_layers(config, RECOMPUTE_BLOCK))(make_batch())
    nll.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        nll.sum().backward()


# --- work --------------------------------------------------------------------------------------------------------------------


def test_evaluation_saves_nothing_and_parks_nothing():
    config = config_of("full", "swa", "memory", n_layers=3)
    with HostStore("cpu") as store, torch.no_grad():
        model = make(config, policy=all_layers(config, SWAP_ALL, ffn_tile_tokens=20, memory_tile_tokens=24), store=store)
        batch = make_batch()
        model(batch)  # tables of the batch
        assert kept_bytes(lambda: model(batch)) == 0
        torch.testing.assert_close(model(batch), make(config)(batch), rtol=0, atol=1e-13)
        assert store.copied_bytes.to_host == 0 and store.peak_bytes == 0


@pytest.mark.parametrize(("layer", "runs"), [(KEEP_MIXER, 1), (SWAP_KEPT, 1), (RECOMPUTE_BLOCK, 2)])
def test_attention_runs_again_only_when_its_output_is_recomputed(monkeypatch, layer, runs):
    config, calls = config_of("full", n_layers=1), []
    attend = models.attention.attend
    monkeypatch.setattr(models.attention, "attend", lambda *a: (calls.append(1), attend(*a))[1])
    with HostStore("cpu") as store:
        gradients(make(config, policy=all_layers(config, layer), store=store))
    assert len(calls) == runs


def test_tensors_come_back_one_layer_ahead():
    log = []

    class Parked:
        def __init__(self, tensor, layer):
            self.tensor, self.layer = tensor.clone(), layer

        def fetch(self):
            log.append(("fetch", self.layer))
            return self.tensor

        def prefetch(self):
            log.append(("prefetch", self.layer))

    class Store:
        def park(self, tensor, slot):
            log.append(("park", slot[0][0]))
            return Parked(tensor, slot[0][0])

        def begin_layer(self, slot):
            pass

    config = config_of("full", "memory", n_layers=3)
    gradients(make(config, policy=all_layers(config, SWAP_ALL), store=Store()))
    order = [log[0], *(b for a, b in itertools.pairwise(log) if a != b)]
    parks, backs = order[:3], order[3:]
    assert parks == [("park", 0), ("park", 1), ("park", 2)]
    assert backs == [("prefetch", 1), ("fetch", 2), ("prefetch", 0), ("fetch", 1), ("fetch", 0)]


# --- bytes -------------------------------------------------------------------------------------------------------------------


def kept_by(layer, kind="full", tokens=1024, n_layers=1, store=None, **changes):
    """Bytes that the blocks keep for the backward pass, their inputs included."""
    config = config_of(kind, n_layers=n_layers, **changes.pop("config", {}))
    model, batch = make(config, torch.float32, all_layers(config, layer, **changes), store), make_batch(tokens=tokens)
    x = torch.randn(2, tokens, 16, requires_grad=True)
    if kind != "memory":
        model.blocks[0].mixer.rope_table(batch.positions_BT, torch.float32, batch.bounds)
    for block in model.blocks:
        if kind != "memory":
            block.mixer.inner_attention(*(torch.zeros(2, h, tokens, 4) for h in (4, 2, 2)), batch.bounds)  # plans
    given = [x]  # freed with the last reference, as the model's own stream is

    def run():
        return model.run_blocks(model.blocks, given.pop().clone(), batch.positions_BT, batch.bounds)

    return kept_bytes(run)


STREAM, QKV, OUT = 2 * 1024 * 16 * 4, 2 * 1024 * (4 + 2 + 2) * 4 * 4, 2 * 1024 * (16 + 4) * 4
FFN = STREAM + 2 * 2 * 1024 * 64 * 4


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (RECOMPUTE_BLOCK, STREAM),
        (KEEP_MIXER, STREAM + OUT),
        (LayerPolicy(feed_forward=RECOMPUTE), STREAM + QKV + OUT),
        (LayerPolicy(projections=RECOMPUTE), STREAM + OUT + FFN),
        (SWAP_ALL, 0),
        (SWAP_KEPT, 0),
        (LayerPolicy(Split(0.25, 0.75, 0), RECOMPUTE, RECOMPUTE, RECOMPUTE), STREAM // 4),
        (LayerPolicy(SWAP, Split(0.5, 0.25, 0.25), Split(0.5, 0.5, 0), Split(0.5, 0.25, 0.25)), (QKV + OUT + FFN) // 2),
    ],
)
def test_attention_layers_keep_what_the_policy_says(layer, expected):
    with HostStore("cpu") as store:
        assert kept_by(layer, store=store, config={"d_ff": 64}) == expected


@pytest.mark.parametrize(("layer", "tile"), [(RECOMPUTE_BLOCK, 0), (RECOMPUTE_BLOCK, 128), (SWAP_ALL, 0), (SWAP_KEPT, 0), (SWAP_KEPT, 256)])
def test_memory_layers_keep_next_to_nothing_when_nothing_is_kept(layer, tile):
    with HostStore("cpu") as store:
        kept = kept_by(layer, "memory", store=store, memory_tile_tokens=tile)
        swapped = layer.input.swap
        assert kept <= (0 if swapped else STREAM) + 0.2 * STREAM
        assert (store.used_bytes == 0) or swapped


def test_half_of_a_memory_layer_is_kept_when_half_is_recomputed():
    whole, half, none = (kept_by(LayerPolicy(mixer=Split(k, 0, 1 - k)), "memory", memory_tile_tokens=64) for k in (1.0, 0.5, 0.0))
    assert none < 0.4 * whole and half == pytest.approx((whole + none) / 2, rel=0.05)


def test_groups_keep_the_input_of_their_first_block():
    assert kept_by(RECOMPUTE_BLOCK, n_layers=6) == 6 * STREAM
    assert kept_by(RECOMPUTE_BLOCK, n_layers=6, group_blocks=3) == 2 * STREAM
    assert kept_by(KEEP_ALL, n_layers=6, group_blocks=3) == 2 * STREAM
    with HostStore("cpu") as store:
        assert kept_by(LayerPolicy(input=SWAP), n_layers=6, group_blocks=2, store=store) == 0


@pytest.mark.parametrize("layer", [KEEP_ALL, KEEP_MIXER])
def test_no_copy_of_a_weight_is_kept_under_autocast(layer):
    config = config_of("full", d_model=64, n_layers=1, d_ff=2048)
    model, batch = make(config, torch.float32, all_layers(config, layer)), make_batch(tokens=4)

    def run():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return model.blocks[0](torch.randn(2, 4, 64, requires_grad=True), batch.positions_BT, batch.bounds)

    assert kept_bytes(run) < 0.5 * sum(p.numel() * 2 for p in model.blocks.parameters())


def test_a_pass_that_is_never_differentiated_leaves_nothing():
    config = config_of("full", "swa", "memory", n_layers=3)
    with HostStore("cpu") as store:
        model = make(config, policy=all_layers(config, PARTS, memory_tile_tokens=24), store=store)
        nll = model(make_batch())
        assert store.used_bytes > 0
        del nll
        assert store.used_bytes == 0


# --- without values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "swa", "memory"])
@pytest.mark.parametrize("group", [1, 2])
def test_fake_tensors_can_be_traced_through_every_policy(kind, group):
    config = config_of(kind, n_layers=len(NAMED))
    with FakeTensorMode(), HostStore("cpu") as store:
        model = Transformer(config, VOCAB)
        apply_policy(model, Policy(tuple(NAMED.values()), group, 50, 20, 24), store)
        ids = torch.zeros(2, TOKENS, dtype=torch.int64)
        model(Batch(ids, ids, ids, Bounds.whole(2, TOKENS))).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert store.copied_bytes.to_host > 0 and store.used_bytes == 0
