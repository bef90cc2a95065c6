"""The recurrences of affine memories by the kernel that ``model.memory.kernel`` names or `models.memory.kernel_choice` chooses.

Each function is its eager twin's with three more arguments: the kernel asked for, the plan of the range's documents instead of their marks,
and the number of rows. Queries, keys and values arrive in float32 (float64); ``dtype`` is what the layer's projections ran in.

Legend: as in `models.memory.fla_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.kernels import circumstances
from models.memory.decayed_sum import decayed_sum as eager_decayed_sum
from models.memory.delta_rule import gated_delta_rule as eager_delta_rule
from models.memory.documents import DocumentPlan
from models.memory.fla_kernels import decayed_sum as fla_decayed_sum
from models.memory.fla_kernels import gated_delta_rule as fla_delta_rule
from models.memory.fla_kernels import gated_slots as fla_gated_slots
from models.memory.gated_slots import gated_slots as eager_gated_slots
from models.memory.kernel_choice import Recurrence, Rule, choose

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def by_fla(kernel: str, rule: Rule, dtype: torch.dtype, like: Tensor, key_dim: int, value_dim: int, n_slots: int = 0) -> bool:
    """Whether fla computes this recurrence. Raises UserError where it is named and cannot."""
    if kernel == "eager":
        return False
    where = circumstances(like.device)
    case = Recurrence(rule, like.device.type, _PRECISIONS[dtype], key_dim, value_dim, n_slots, *where)
    return choose(case, kernel, here=not isinstance(like, FakeTensor))[0] == "fla"


def gated_delta_rule(
    q_NGCK: Tensor,
    k_NGCK: Tensor,
    v_NGCV: Tensor,
    beta_NGC: Tensor,
    log_decay_NGC: Tensor,
    state_GKW: Tensor,
    plan: DocumentPlan,
    rows: int,
    kernel: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`models.memory.delta_rule.gated_delta_rule`."""
    inputs = (q_NGCK, k_NGCK, v_NGCV, beta_NGC, log_decay_NGC, state_GKW)
    if by_fla(kernel, "gated_delta_rule", dtype, v_NGCV, k_NGCK.shape[-1], v_NGCV.shape[-1]):
        return fla_delta_rule(*inputs, plan, rows, dtype)
    return eager_delta_rule(*inputs, plan.segment_NBC)


def decayed_sum(
    q_NQCK: Tensor | None,
    k_NQCK: Tensor,
    v_NGCV: Tensor,
    beta_NGC: Tensor,
    log_decay_NGC: Tensor,
    state_GKV: Tensor,
    plan: DocumentPlan,
    rows: int,
    kernel: str,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """`models.memory.decayed_sum.decayed_sum`."""
    inputs = (q_NQCK, k_NQCK, v_NGCV, beta_NGC, log_decay_NGC, state_GKV)
    if by_fla(kernel, "decayed_sum", dtype, v_NGCV, k_NQCK.shape[-1], v_NGCV.shape[-1]):
        return fla_decayed_sum(*inputs, plan, rows, dtype)
    return eager_decayed_sum(*inputs, plan.segment_NBC)


def gated_slots(
    q_NGCK: Tensor | None,
    k_NGCK: Tensor,
    v_NGCV: Tensor,
    log_decay_NGCM: Tensor,
    state_GMW: Tensor,
    plan: DocumentPlan,
    rows: int,
    kernel: str,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """`models.memory.gated_slots.gated_slots`."""
    inputs = (q_NGCK, k_NGCK, v_NGCV, log_decay_NGCM, state_GMW)
    if by_fla(kernel, "gated_slots", dtype, v_NGCV, k_NGCK.shape[-1], v_NGCV.shape[-1], log_decay_NGCM.shape[-1]):
        return fla_gated_slots(*inputs, plan, rows, dtype)
    return eager_gated_slots(*inputs, plan.segment_NBC)
