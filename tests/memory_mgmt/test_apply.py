"""Memory settings on a whole model: same loss and gradients, fewer bytes kept."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from memory_mgmt.apply import apply_policy
from memory_mgmt.config import MemoryConfig
from memory_mgmt.policy import KEEP, KEEP_ALL, KEEP_MIXER, RECOMPUTE, RECOMPUTE_BLOCK, SWAP, LayerPolicy, Policy
from memory_mgmt.policy_settings import policy_of
from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.transformer import Transformer, init_weights
from tests.distributed import run_distributed
from tests.memory_mgmt.measured import kept_bytes

CONFIG = ModelConfig(d_model=16, n_heads=2, layers=("full", "swa", "memory"), window=16)
SETTINGS = [
    MemoryConfig(recompute="block"),
    MemoryConfig(ffn_tile_tokens=24),
    MemoryConfig(memory_tile_tokens=24),
    MemoryConfig(loss_tile_tokens=7),
    MemoryConfig(recompute="block", ffn_tile_tokens=24, memory_tile_tokens=24, loss_tile_tokens=7),
]


def make(settings, dtype=torch.float64):
    model = Transformer(CONFIG, 64).to(dtype)
    apply_policy(model, policy_of(settings, CONFIG.layer_kinds))
    init_weights(model, 0)
    return model


def make_batch():
    tokens = torch.randint(64, (2, 96), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, tokens.roll(-1, 1), torch.arange(96).expand(2, 96), Bounds(96, ((0, 96),), ((0, 50), (0,))))


def run(model, batch):
    nll = model(batch)
    nll.sum().backward()
    return nll.detach(), {name: p.grad for name, p in model.named_parameters()}


def kept_by(settings):
    model, batch = make(settings), make_batch()
    return kept_bytes(lambda: model(batch))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(k for k in sorted(s.model_fields_set)))
def test_same_loss_and_gradients(settings):
    (nll, grads), (want_nll, want) = run(make(settings), make_batch()), run(make(MemoryConfig()), make_batch())
    torch.testing.assert_close(nll, want_nll, rtol=0, atol=1e-12)
    for name in want:
        torch.testing.assert_close(grads[name], want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("settings", "share"), [(SETTINGS[0], 0.4), (SETTINGS[1], 0.9), (SETTINGS[2], 0.9), (SETTINGS[4], 0.4)])
def test_less_is_kept(settings, share):
    assert kept_by(settings) < share * kept_by(MemoryConfig())


def test_settings_replace_earlier_ones():
    model = make(SETTINGS[4].model_copy(update={"group_blocks": 2}))
    apply_policy(model, policy_of(MemoryConfig(), CONFIG.layer_kinds))
    fresh = make(MemoryConfig())
    assert model.run_blocks is fresh.run_blocks
    for block, other in zip(model.blocks, fresh.blocks, strict=True):
        assert block.run is other.run
    assert model.blocks[2].mixer.tile_tokens == 0 and model.loss_tile_tokens == MemoryConfig().loss_tile_tokens


def test_settings_that_name_a_policy():
    kinds = ("full", "memory")
    assert policy_of(MemoryConfig(), kinds).layers == (KEEP_ALL, KEEP_ALL)
    assert policy_of(MemoryConfig(recompute="mixer"), 2).layers == (KEEP_MIXER, KEEP_MIXER)
    grouped = policy_of(MemoryConfig(recompute="block", group_blocks=3), 2)
    assert grouped.layers == (RECOMPUTE_BLOCK, RECOMPUTE_BLOCK) and grouped.group_blocks == 3
    tiles = policy_of(MemoryConfig(ffn_tile_tokens=8, memory_tile_tokens=16), kinds)
    assert [layer.feed_forward for layer in tiles.layers] == [RECOMPUTE, RECOMPUTE]
    assert [layer.mixer for layer in tiles.layers] == [KEEP, RECOMPUTE]
    assert (tiles.ffn_tile_tokens, tiles.memory_tile_tokens) == (8, 16)
    assert policy_of(MemoryConfig(recompute="block", offload="inputs"), 1).layers == (LayerPolicy(SWAP, RECOMPUTE, RECOMPUTE, RECOMPUTE),)
    assert policy_of(MemoryConfig(recompute="mixer", offload="kept"), 1).layers == (LayerPolicy(SWAP, RECOMPUTE, SWAP, RECOMPUTE),)
    with pytest.raises(ValueError, match="planner"):
        policy_of(MemoryConfig(recompute="auto"), 1)


def test_what_cannot_be_installed_is_refused():
    model = make(MemoryConfig())
    with pytest.raises(ValueError, match="for 2 layers; the model has 3"):
        apply_policy(model, Policy((KEEP_ALL,) * 2))
    with pytest.raises(ValueError, match="layer 1 swaps its mixer, but there is no host store"):
        apply_policy(model, Policy((KEEP_ALL, LayerPolicy(mixer=SWAP), KEEP_ALL)))
    with pytest.raises(ValueError, match="layer 0 is to recompute its input"):
        apply_policy(model, Policy((LayerPolicy(input=RECOMPUTE), KEEP_ALL, KEEP_ALL)))
    model.blocks[1].ffn = torch.nn.Identity()
    with pytest.raises(TypeError, match="SwiGLU as a block's ffn, not Identity"):
        apply_policy(model, Policy((RECOMPUTE_BLOCK,) * 3))


@pytest.mark.parametrize("settings", SETTINGS)
def test_bf16_autocast_works_with_every_setting(settings):
    def gradients(model):
        with torch.autocast("cpu", torch.bfloat16):
            nll = model(make_batch())
        nll.sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    got, want = gradients(make(settings, torch.float32)), gradients(make(MemoryConfig(), torch.float32))
    for name in want:
        assert got[name].dtype == torch.float32
        assert (got[name] - want[name]).norm() <= 0.03 * want[name].norm(), name


def fsdp_gradients(settings):
    model = make(settings)
    for unit in [*model.blocks, model]:
        fully_shard(unit, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), reshard_after_forward=unit is not model)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    whole, rank = make_batch(), dist.get_rank()
    mine = Batch(
        *(x[rank : rank + 1] for x in (whole.tokens_BT, whole.labels_BT, whole.positions_BT)),
        Bounds(96, ((0, 96),), (whole.bounds.documents[rank],)),
    )
    _, grads = run(model, mine)
    return {name: grad.full_tensor().detach() for name, grad in grads.items()}


def test_all_settings_under_fsdp():
    _, want = run(make(MemoryConfig()), make_batch())
    for got in run_distributed(fsdp_gradients, 2, SETTINGS[4]):
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)
