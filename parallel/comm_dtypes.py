"""In which dtypes keys, values and their gradients travel between ranks: ``parallel.kv_dtype`` and ``parallel.kv_gradient_dtype``.

Keys and values that travel in fewer bits are rounded once, where they are made, and every rank computes with the rounded ones, their owner
and a process without others too. So the result is attention of rounded keys and values, the same at any number of ranks and under every
scheme, and the only approximation is one that can be made without any ranks. The gradient is taken at the rounded keys and handed on as it
is (that of rounding counts as 1), without being rounded itself. What is kept for backward are the keys as they were made, as ever
(decision 0006): rounding them again gives the same. Decision 0042.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from models.attention import Attention, LocalAttention
from parallel.config import KVDtype, KVGradientDtype

_DTYPES: dict[KVDtype, torch.dtype | None] = {"compute": None, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CommDtypes:
    """Of one run's attention layers."""

    keys: torch.dtype | None = None
    """Of keys and values; None: as they are computed."""
    gradients: KVGradientDtype = "fp32"
    """Of their gradients, as the setting says."""

    def gradient(self, computed: torch.dtype) -> torch.dtype:
        """In what gradients of tensors in ``computed`` travel where parts of them are added up."""
        if self.gradients == "bf16":
            return torch.bfloat16
        return computed if self.gradients == "compute" else torch.promote_types(computed, torch.float32)

    def whole_gradient(self, computed: torch.dtype) -> torch.dtype:
        """The same where one rank has all of them: never wider than they are made."""
        return min(self.gradient(computed), computed, key=lambda dtype: dtype.itemsize)

    def sent(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values as they travel."""
        return x if self.keys is None else x.to(self.keys)

    def both(self, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor) -> torch.Tensor:
        """kv_2BGTD, contiguous, as they travel."""
        if self.keys is None:
            return torch.stack((k_BGTD, v_BGTD))
        kv_2BGTD = k_BGTD.new_empty((2, *k_BGTD.shape), dtype=self.keys)
        kv_2BGTD[0].copy_(k_BGTD)
        kv_2BGTD[1].copy_(v_BGTD)
        return kv_2BGTD

    def read(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Keys or values, own or arrived, as ``dtype`` computes with them."""
        return self.sent(x).to(dtype)


AS_COMPUTED = CommDtypes()


def comm_dtypes(kv_dtype: KVDtype, kv_gradient_dtype: KVGradientDtype) -> CommDtypes:
    """What two settings mean."""
    return CommDtypes(_DTYPES[kv_dtype], kv_gradient_dtype)


def checked_dtypes(kv_dtype: KVDtype, kv_gradient_dtype: KVGradientDtype, computed: torch.dtype) -> CommDtypes:
    """The same for tensors of dtype ``computed``. Raises ValueError for a name that is none, or a dtype that only sends more bytes."""
    if kv_dtype not in _DTYPES:
        raise ValueError(f"kv_dtype is {kv_dtype!r}; use one of {', '.join(_DTYPES)}")
    if kv_gradient_dtype not in get_args(KVGradientDtype):
        raise ValueError(f"kv_gradient_dtype is {kv_gradient_dtype!r}; use one of {', '.join(get_args(KVGradientDtype))}")
    comm = comm_dtypes(kv_dtype, kv_gradient_dtype)
    if comm.keys is None or comm.keys == computed:
        return CommDtypes(None, comm.gradients)
    if comm.keys.itemsize >= computed.itemsize:
        raise ValueError(f"kv_dtype {kv_dtype} has no fewer bits than q, k and v, which are {computed}; use kv_dtype='compute'")
    return comm


def round_where_alone(model: torch.nn.Module, comm: CommDtypes) -> None:
    """Attention layers that reach no other ranks round their keys and values as the others do."""
    for layer in model.modules():
        if comm.keys is not None and isinstance(layer, Attention) and isinstance(layer.inner_attention, LocalAttention):
            alone = layer.inner_attention
            layer.inner_attention = LocalAttention(alone.window, alone.call, comm.keys)
