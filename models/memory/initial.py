"""Initial values that several recurrent mixers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DT_RANGE = (1e-3, 0.1)
_A_RANGE = (1.0, 16.0)


def initial_gate(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    """A ~ U(1, 16) and dt log-uniform in [1e-3, 0.1] (section 3.4 of the Mamba-2 paper), convolutions ~ U(+-kernel^-1/2), norms 1.

    A head forgets exp(-A dt) per token at first: a half life of half a token to 700. Drawn independently, both heads of a small layer are
    often both at the short end, where nothing that lies further back has a gradient to be learnt from. So A and dt are spread over heads.
    """
    if name == "A_log":
        return _spread(shape, *_A_RANGE, generator).log_()
    if name == "dt_bias":
        dt = _spread(shape, math.log(_DT_RANGE[0]), math.log(_DT_RANGE[1]), generator).exp_()
        return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
    if name.startswith("conv_"):
        bound = shape[-1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if name == "norm_weight":
        return torch.ones(shape)
    return None


def _spread(shape: torch.Size, low: float, high: float, generator: torch.Generator) -> Tensor:
    """One value per head from as many equal parts of the range as there are heads, in rising order: together as uniform as independent
    draws, and the first head is always in the lowest part."""
    heads = math.prod(shape)
    parts = torch.arange(heads) + torch.rand(heads, generator=generator)
    return (low + (high - low) * parts / heads).clamp(low, high).view(shape)
