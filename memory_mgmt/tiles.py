"""Run a token-wise module a tile of tokens at a time, so that its inner width exists for one tile only.

Forward keeps nothing but the input; backward recomputes each tile and differentiates it at once. Weight gradients of the
tiles add up in float32 and are returned to autograd once: summed in bf16 over 256 tiles their error grows sevenfold, and
a ``backward()`` per tile would fire FSDP's and DDP's gradient hooks once per tile.

Legend: B row, T token, C channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: nn.Module, tile_tokens: int, x_BTC: Tensor, *parameters: Tensor) -> Tensor:
        ctx.module, ctx.tile_tokens = module, tile_tokens
        ctx.autocast = _autocast_now(x_BTC)
        ctx.save_for_backward(x_BTC)
        tiles = x_BTC.split(tile_tokens, dim=1)
        with torch.autocast(**ctx.autocast):
            out = None
            for i, x in enumerate(tiles):
                y = module(x)
                if out is None:
                    out = y.new_empty(*x_BTC.shape[:-1], y.shape[-1])
                out[:, i * tile_tokens : i * tile_tokens + x.shape[1]] = y
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_BTC,) = ctx.saved_tensors
        # Read anew: under FSDP2 the module holds its gathered parameters now, as it did in forward.
        parameters = list(ctx.module.parameters())
        needs_x, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        wanted = [p for p, need in zip(parameters, needs, strict=True) if need]
        totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in wanted]
        dx_BTC = torch.empty_like(x_BTC) if needs_x else None
        for i, dy in enumerate(grads[0].split(ctx.tile_tokens, dim=1)):
            span = slice(i * ctx.tile_tokens, i * ctx.tile_tokens + dy.shape[1])
            x = x_BTC[:, span].detach().requires_grad_(needs_x)
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                y = ctx.module(x)
            sources = [*wanted, x] if needs_x else wanted
            tile_grads = torch.autograd.grad(y, sources, dy, allow_unused=True)
            for total, grad in zip(totals, tile_grads, strict=False):
                if grad is not None:
                    total += grad
            if dx_BTC is not None:
                dx_BTC[:, span] = tile_grads[-1]
        rounded = iter(total.to(p.dtype) for total, p in zip(totals, wanted, strict=True))
        return None, None, dx_BTC, *(next(rounded) if need else None for need in needs)


def _autocast_now(x: Tensor) -> dict[str, Any]:
    """Arguments that restore the present autocast state. Its weight cache is off: a copy cached while gradients are off would be
    reused later in the same autocast region and silently cut the weight's gradient."""
    device = x.device.type
    enabled = torch.is_autocast_enabled(device)
    return {"device_type": device, "dtype": torch.get_autocast_dtype(device), "enabled": enabled, "cache_enabled": False}


def tiled(module: nn.Module, x_BTC: Tensor, tile_tokens: int) -> Tensor:
    """``module(x)`` for a token-wise, deterministic ``module``, ``tile_tokens`` tokens of every row at a time.

    Exact up to the order of sums. Works inside FSDP2 units, under autocast and inside torch.utils.checkpoint. Raises
    ValueError for a tile below 1 token.
    """
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens is {tile_tokens}; a tile holds at least 1 token")
    if x_BTC.shape[1] <= tile_tokens and not torch.is_grad_enabled():
        return module(x_BTC)
    return _Tiled.apply(module, tile_tokens, x_BTC, *module.parameters())  # type: ignore[return-value]
