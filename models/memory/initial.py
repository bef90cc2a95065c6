"""Initial values that several recurrent mixers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DT_RANGE = (1e-3, 0.1)
_A_RANGE = (1.0, 16.0)


def initial_gate(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    """A ~ U(1, 16) and dt log-uniform in [1e-3, 0.1] (section 3.4 of the Mamba-2 paper), convolutions ~ U(+-kernel^-1/2), norms 1."""
    if name == "A_log":
        return torch.empty(shape).uniform_(*_A_RANGE, generator=generator).log_()
    if name == "dt_bias":
        dt = torch.empty(shape).uniform_(*map(math.log, _DT_RANGE), generator=generator).exp_()
        return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
    if name.startswith("conv_"):
        bound = shape[-1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if name == "norm_weight":
        return torch.ones(shape)
    return None
