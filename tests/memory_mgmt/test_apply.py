"""Memory settings on a whole model: same loss and gradients, fewer bytes kept."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from memory_mgmt.apply import apply_memory_settings
from memory_mgmt.config import MemoryConfig
from models.batch import Batch, Bounds
from models.config import ModelConfig
from models.transformer import Transformer, init_weights
from tests.distributed import run_distributed

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
    apply_memory_settings(model, settings)
    init_weights(model, 0)
    return model


def make_batch():
    tokens = torch.randint(64, (2, 96), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, tokens.roll(-1, 1), torch.arange(96).expand(2, 96), Bounds(96, ((0, 96),), ((0, 50), (0,))))


def run(model, batch):
    nll = model(batch)
    nll.sum().backward()
    return nll.detach(), {name: p.grad for name, p in model.named_parameters()}


def kept_bytes(settings):
    model, saved = make(settings), {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(make_batch())
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(k for k in sorted(s.model_fields_set)))
def test_same_loss_and_gradients(settings):
    (nll, grads), (want_nll, want) = run(make(settings), make_batch()), run(make(MemoryConfig()), make_batch())
    torch.testing.assert_close(nll, want_nll, rtol=0, atol=1e-12)
    for name in want:
        torch.testing.assert_close(grads[name], want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("settings", "share"), [(SETTINGS[0], 0.4), (SETTINGS[1], 0.9), (SETTINGS[2], 0.9), (SETTINGS[4], 0.4)])
def test_less_is_kept(settings, share):
    assert kept_bytes(settings) < share * kept_bytes(MemoryConfig())


def test_settings_replace_earlier_ones():
    model = make(SETTINGS[4])
    apply_memory_settings(model, MemoryConfig())
    fresh = make(MemoryConfig())
    for block, other in zip(model.blocks, fresh.blocks, strict=True):
        assert block.run is other.run and block.run_ffn is other.run_ffn
    assert model.blocks[2].mixer.tile_tokens == 0 and model.loss_tile_tokens == MemoryConfig().loss_tile_tokens


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
