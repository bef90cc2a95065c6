"""The assembled model: norms and feed-forward against autograd, seams, names, initial values whatever the sharding."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from models.batch import IGNORE_INDEX, Batch, Bounds
from models.config import ModelConfig
from models.feedforward import RMSNorm, SwiGLU
from models.flops import parameter_count
from models.transformer import Transformer, init_weights, run_in_order
from tests.distributed import run_distributed

VOCAB = 64
CONFIG = ModelConfig(d_model=16, n_heads=4, n_kv_heads=2, layers=("full", "swa", "memory"), window=5)


def make_model(config=CONFIG, dtype=torch.float64, seed=0):
    model = Transformer(config, VOCAB).to(dtype)
    init_weights(model, seed)
    return model


def make_batch(B=2, T=24, documents=((0, 9), (0,))):
    tokens = torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORE_INDEX
    starts = torch.tensor([[max(s for s in documents[b] if s <= t) for t in range(T)] for b in range(B)])
    return Batch(tokens, labels, torch.arange(T) - starts, Bounds(T, ((0, T),), documents))


@pytest.mark.parametrize(("module", "reference"), [(RMSNorm(6, 1e-5), lambda m, x: F.rms_norm(x, (6,), m.weight, 1e-5)),
    (SwiGLU(6, 10), lambda m, x: m.w_down(F.silu(m.w_gate(x)) * m.w_up(x)))])  # fmt: skip
def test_token_wise_parts_equal_autograd(module, reference):
    torch.manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    got, want = module(x), reference(module, x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    weight = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), [x, *module.parameters()]) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_loss_equals_cross_entropy_of_whole_logits():
    model, batch = make_model(), make_batch()
    want = F.cross_entropy((model.hidden(batch) @ model.head.weight.t()).flatten(0, 1), batch.labels_BT.flatten(), reduction="none")
    nll = model(batch)
    torch.testing.assert_close(nll.flatten(), want, rtol=0, atol=1e-12)
    assert nll.dtype == torch.float64 and not nll[:, -1].any()


def test_every_parameter_receives_a_gradient_and_names_are_the_agreed_ones():
    model = make_model()
    model(make_batch()).sum().backward()
    names = dict(model.named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names.values())
    agreed = {"embed.weight", "blocks.0.norm1.weight", "blocks.0.norm2.weight", "blocks.0.ffn.w_gate.weight", "norm.weight", "head.weight"}
    assert agreed <= set(names)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("conv_kernel", [1, 4])
def test_parameter_count_is_the_planned_one(tie, conv_kernel):
    memory = CONFIG.memory.model_copy(update={"conv_kernel": conv_kernel, "expand_v": 2.0})
    config = CONFIG.model_copy(update={"tie_embeddings": tie, "memory": memory})
    model = make_model(config)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config, VOCAB).total
    model(make_batch()).sum().backward()


def test_tied_output_projection_adds_both_gradients():
    tied, batch = make_model(CONFIG.model_copy(update={"tie_embeddings": True})), make_batch()
    free = make_model()
    with torch.no_grad():
        free.head.weight.copy_(free.embed.weight)
    assert torch.equal(tied(batch), free(batch))
    tied(batch).sum().backward()
    free(batch).sum().backward()
    torch.testing.assert_close(tied.embed.weight.grad, free.embed.weight.grad + free.head.weight.grad, rtol=0, atol=1e-12)


def test_bf16_autocast_keeps_a_float32_residual_stream_and_bf16_inside():
    model, batch = make_model(dtype=torch.float32), make_batch()
    want, seen = model(batch), []
    model.blocks[1].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    model.blocks[1].norm2.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        nll = model(batch)
    nll.sum().backward()
    assert seen == [torch.bfloat16, torch.float32] and nll.dtype == torch.float32
    torch.testing.assert_close(nll, want, rtol=0, atol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_run_blocks_and_run_are_the_only_ways_into_a_block():
    model, batch, calls = make_model(), make_batch(), []
    model.run_blocks = lambda *args: (calls.append("blocks"), run_in_order(*args))[1]
    for block in model.blocks:
        block.run = lambda body, *args: (calls.append("run"), body(*args))[1]
    assert torch.equal(model(batch), make_model()(batch))
    assert calls == ["blocks", "run", "run", "run"]


# --- initial values ----------------------------------------------------------------------------------------------------------


def test_initial_values_depend_on_seed_and_name_only():
    values = dict(make_model().named_parameters())
    deeper = dict(make_model(CONFIG.model_copy(update={"layers": ("full", "swa", "memory", "full")})).named_parameters())
    other = dict(make_model(seed=1).named_parameters())
    assert torch.equal(values["blocks.1.mixer.wq.weight"], deeper["blocks.1.mixer.wq.weight"])
    assert not torch.equal(values["embed.weight"], other["embed.weight"])
    assert not torch.equal(values["blocks.0.mixer.wq.weight"], values["blocks.1.mixer.wq.weight"])
    assert torch.equal(values["embed.weight"].float(), dict(make_model(dtype=torch.float32).named_parameters())["embed.weight"])


def test_initial_values_have_the_stated_distribution():
    model = make_model(CONFIG.model_copy(update={"d_model": 128, "n_kv_heads": None}))
    values = dict(model.named_parameters())
    assert values["blocks.0.ffn.w_up.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert values["blocks.0.ffn.w_down.weight"].std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert values["blocks.2.mixer.w_out.weight"].std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert torch.equal(values["norm.weight"], torch.ones(128, dtype=torch.float64))
    memory = model.blocks[2].mixer
    dt = F.softplus(memory.dt_bias)
    assert dt.min() >= 1e-3 and dt.max() <= 0.1 and memory.A_log.exp().min() >= 1 and memory.A_log.exp().max() <= 16


def sharded_values(mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    with torch.device("meta"):
        model = Transformer(CONFIG, VOCAB)
    for unit in [*model.blocks, model]:
        fully_shard(unit, mesh=mesh)
    model.to_empty(device="cpu")
    init_weights(model, 0)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2)])
def test_initial_values_are_the_same_whatever_the_sharding(mesh_shape):
    want = dict(make_model(dtype=torch.float32).named_parameters())
    for got in run_distributed(sharded_values, torch.Size(mesh_shape).numel(), mesh_shape):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_parameter_without_rule_is_refused_by_name():
    model = make_model()
    model.blocks[0].mixer.scale = torch.nn.Parameter(torch.empty(3))
    with pytest.raises(ValueError, match=r"blocks\.0\.mixer\.scale"):
        init_weights(model, 0)
