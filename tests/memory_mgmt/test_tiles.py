"""Tiled execution of token-wise modules: same gradients, fewer bytes, right sums, also inside FSDP2."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from memory_mgmt.tiles import tiled
from models.feedforward import SwiGLU
from tests.distributed import run_distributed


def make(d=8, f=32, dtype=torch.float64):
    torch.manual_seed(0)
    module = SwiGLU(d, f).to(dtype)
    return module, torch.randn(2, 13, d, dtype=dtype, requires_grad=True)


def grads_of(y, x, module):
    return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), [x, *module.parameters()])


@pytest.mark.parametrize("tile", [1, 4, 13, 50])
@pytest.mark.parametrize("outer", [False, True], ids=["plain", "in_checkpoint"])
def test_equals_the_module(tile, outer):
    module, x = make()
    y = checkpoint(lambda z: tiled(module, z, tile), x, use_reentrant=False) if outer else tiled(module, x, tile)
    torch.testing.assert_close(y, module(x), rtol=0, atol=1e-13)
    for a, b in zip(grads_of(y, x, module), grads_of(module(x), x, module), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_frozen_weights_and_inputs_get_no_gradient():
    module, x = make()
    module.w_up.weight.requires_grad_(False)
    tiled(module, x.detach(), 4).sum().backward()
    assert module.w_up.weight.grad is None and module.w_down.weight.grad is not None


def test_only_the_input_is_kept():
    module, x = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        tiled(module, x, 4)
    assert saved == [x.numel()]
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        module(x)
    assert sum(saved) > 10 * x.numel()


def test_bf16_weight_gradients_add_up_in_float32():
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 4, bias=False).bfloat16()
    x = torch.randn(1, 4096, 4, dtype=torch.bfloat16)
    dy = torch.ones(1, 4096, 4, dtype=torch.bfloat16) + 0.1 * torch.randn(1, 4096, 4).bfloat16()
    (grad,) = torch.autograd.grad(tiled(module, x, 4), module.weight, dy)
    want = dy.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    error = ((grad.double() - want).norm() / want.norm()).item()
    assert error < 5e-3, error  # in bf16, 1024 tiles: about 4e-2


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_is_restored_in_backward_and_weights_cast_in_forward_keep_their_gradient(backward_inside):
    module, x = make(dtype=torch.float32)
    dtypes = []
    module.w_up.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = tiled(module, x, 4)
        again = module(x)  # reads the same weights in the same autocast region
    with torch.autocast("cpu", torch.float16, enabled=backward_inside):
        grads = torch.autograd.grad((y + again).float().sum(), [x, *module.parameters()])
    assert set(dtypes) == {torch.bfloat16}
    want = torch.autograd.grad(2 * module(x).sum(), [x, *module.parameters()])
    for a, b in zip(grads, want, strict=True):
        assert (a - b).norm() / b.norm() < 2e-2


def fsdp_gradients(tile):
    class Unit(torch.nn.Module):
        def __init__(self, ffn):
            super().__init__()
            self.ffn = ffn

        def forward(self, x):
            return tiled(self.ffn, x, tile) if tile else self.ffn(x)

    module, x = make()
    model = Unit(module)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), reshard_after_forward=True)
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    x_mine = x[dist.get_rank() :: dist.get_world_size()].detach().requires_grad_()
    for _ in range(2):  # the second pass reuses buffers that FSDP has freed and filled again
        model.zero_grad()
        x_mine.grad = None
        model(x_mine).square().sum().backward()
    return [p.grad.full_tensor().detach() for p in model.parameters()], x_mine.grad


def test_works_inside_fsdp():
    module, x = make()
    module(x).square().sum().backward()
    for tile in (0, 4):
        for rank, (grads, dx) in enumerate(run_distributed(fsdp_gradients, 2, tile)):
            torch.testing.assert_close(dx, x.grad[rank : rank + 1], rtol=0, atol=1e-12)
            for a, p in zip(grads, module.parameters(), strict=True):
                torch.testing.assert_close(a, p.grad, rtol=0, atol=1e-12)


def test_a_tile_below_one_token_is_refused():
    module, x = make()
    with pytest.raises(ValueError, match="tile_tokens is 0"):
        tiled(module, x, 0)
