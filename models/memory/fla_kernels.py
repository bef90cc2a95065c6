"""The recurrences of affine memories by the triton kernels of flash-linear-attention (0.6), on this package's chunks.

Those kernels take tokens [B, T, H, .] and divide them themselves; documents are lengths laid end to end in one row (``cu_seqlens``), each
with a state of its own. So chunks are laid out as tokens, rows too where documents start inside of them, and of the states only those of
the first document of a row come from outside. q, k and v go in as the run's products do (``dtype``), gates and states in float32.

Everything is linear in the columns of the values, so a range of a split sequence runs like a whole one: on the state [0 | I], its values
widened by zeros, the kernel gives the range's own outputs, its read-out of what comes in, and its summary (delta rule). Where the
transition only decays the summary is one product over the range (`total`), before the kernel runs on the state that really comes in.

On fake tensors (a plan) the kernels are followed: what they allocate, keep and multiply, without their values. Lists of those are read off
the released 0.6.0.

Legend: N chunk, B row, G row x head, H head, C token in chunk, T tokens of a row (N * C), K key, V value, W columns of the state, M slot,
S sequences (documents of all rows).
Try alone: ``pytest tests/models/memory/test_fla_kernels.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.errors import UserError
from models.memory.documents import DocumentPlan
from models.memory.fla_followed import followed_delta_rule, followed_gsa, followed_simple_gla


class Operators(NamedTuple):
    """Functions of fla."""

    gated_delta_rule: Callable[..., Any]
    simple_gla: Callable[..., Any]
    gsa: Callable[..., Any]


@lru_cache
def operators() -> Operators:
    """The installed ones. Raises UserError where the package cannot be imported."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]
        from fla.ops.gsa import chunk_gsa  # pyright: ignore[reportMissingImports]
        from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"model.memory.kernel: flash-linear-attention is installed and cannot be imported ({error}); mend it, or set "
            "model.memory.kernel=eager"
        ) from error
    return Operators(chunk_gated_delta_rule, chunk_simple_gla, chunk_gsa)


def gated_delta_rule(
    q_NGCK: Tensor,
    k_NGCK: Tensor,
    v_NGCV: Tensor,
    beta_NGC: Tensor,
    log_decay_NGC: Tensor,
    state_GKW: Tensor,
    plan: DocumentPlan,
    rows: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`models.memory.delta_rule.gated_delta_rule` of ``rows`` rows: o_NGCW and the state after the last chunk."""
    layout = _Layout(plan, q_NGCK, rows)
    extra = state_GKW.shape[-1] - v_NGCV.shape[-1]
    if extra:
        v_NGCV = torch.nn.functional.pad(v_NGCV, (0, extra))
    inputs = [layout.tokens(x.to(dtype)) for x in (q_NGCK, k_NGCK, v_NGCV)]
    gates = [layout.tokens(x.unsqueeze(-1)).squeeze(-1) for x in (log_decay_NGC, beta_NGC)]
    function: Callable[..., Any] = followed_delta_rule if layout.followed else operators().gated_delta_rule
    o_BTHW, after = function(*inputs, *gates, scale=1.0, initial_state=layout.before(state_GKW), output_final_state=True, **layout.lengths)
    return layout.chunks(o_BTHW, state_GKW.dtype), layout.after(after)


def decayed_sum(
    q_NQCK: Tensor | None,
    k_NQCK: Tensor,
    v_NGCV: Tensor,
    beta_NGC: Tensor,
    log_decay_NGC: Tensor,
    state_GKV: Tensor,
    plan: DocumentPlan,
    rows: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """`models.memory.decayed_sum.decayed_sum` of ``rows`` rows. The kernel has a key and a query for every head: groups are repeated."""
    heads = v_NGCV.shape[1]
    v_NGCV, k_NGCK = v_NGCV * beta_NGC.unsqueeze(-1), _per_head(k_NQCK, heads)
    if q_NQCK is None:
        log_NGC1 = log_decay_NGC.unsqueeze(-1)
        return None, _whole(log_NGC1, plan, rows) * state_GKV + total(k_NGCK, v_NGCV, log_NGC1, plan, rows)
    layout = _Layout(plan, v_NGCV, rows)
    inputs = [layout.tokens(x.to(dtype)) for x in (_per_head(q_NQCK, heads), k_NGCK, v_NGCV)]
    g_BTH = layout.tokens(log_decay_NGC.unsqueeze(-1)).squeeze(-1)
    function: Callable[..., Any] = followed_simple_gla if layout.followed else operators().simple_gla
    o_BTHV, after = function(*inputs, g_BTH, scale=1.0, initial_state=layout.before(state_GKV), output_final_state=True, **layout.lengths)
    return layout.chunks(o_BTHV, state_GKV.dtype), layout.after(after)


def gated_slots(
    q_NGCK: Tensor | None,
    k_NGCK: Tensor,
    v_NGCV: Tensor,
    log_decay_NGCM: Tensor,
    state_GMW: Tensor,
    plan: DocumentPlan,
    rows: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """`models.memory.gated_slots.gated_slots` of ``rows`` rows."""
    written_NGCM = -torch.expm1(log_decay_NGCM)
    if q_NGCK is None:
        kv_NGCW = torch.cat([k_NGCK, v_NGCV], -1)
        return None, _whole(log_decay_NGCM, plan, rows) * state_GMW + total(written_NGCM, kv_NGCW, log_decay_NGCM, plan, rows)
    layout = _Layout(plan, q_NGCK, rows)
    inputs = [layout.tokens(x.to(dtype)) for x in (q_NGCK, k_NGCK, v_NGCV, written_NGCM)]
    before_SHMW = layout.before(state_GMW)
    K = k_NGCK.shape[-1]
    states = (before_SHMW[..., :K].mT.contiguous(), before_SHMW[..., K:].contiguous())
    function: Callable[..., Any] = followed_gsa if layout.followed else operators().gsa
    g_BTHM = layout.tokens(log_decay_NGCM)
    o_BTHV, (keys_SHKM, values_SHMV) = function(*inputs, g_BTHM, scale=1.0, initial_state=states, output_final_state=True, **layout.lengths)
    return layout.chunks(o_BTHV, state_GMW.dtype), layout.after(torch.cat([keys_SHKM.mT, values_SHMV], -1))


def total(left_NGCL: Tensor, right_NGCR: Tensor, log_decay_NGCD: Tensor, plan: DocumentPlan, rows: int) -> Tensor:
    """What a range adds to a state, [G, L, R]: the sum of left_t right_t^T times all decays after t; decays are of a head (D = 1) or of
    each row of the state (D = L). Tokens of documents that end in the range add nothing."""
    left, right, log = (x.transpose(0, 1).flatten(1, 2) for x in (left_NGCL, right_NGCR, log_decay_NGCD))
    after_GTD = log.flip(1).cumsum(1).flip(1) - log  # summed from the end, where decays are near 1 and digits count
    if plan.starts:
        heads, tokens = after_GTD.shape[0] // rows, torch.arange(after_GTD.shape[1], device=log.device)
        last_B = torch.tensor([row[-1] if row else 0 for row in plan.starts], device=log.device)
        ended_BT = tokens < last_B.unsqueeze(-1)
        after_GTD = after_GTD.masked_fill(ended_BT.repeat_interleave(heads, 0).unsqueeze(-1), float("-inf"))
    with torch.autocast(left.device.type, enabled=False):  # what crosses ranks stays in float32
        return (left * after_GTD.exp()).mT @ right


def _whole(log_decay_NGCD: Tensor, plan: DocumentPlan, rows: int) -> Tensor:
    """Product of all decays of a range, [G, D, 1]; 0 for rows in which a document starts."""
    decay_GD = log_decay_NGCD.sum((0, 2)).exp()
    if plan.starts:
        cut_B = torch.tensor([bool(row) for row in plan.starts], device=decay_GD.device)
        decay_GD = decay_GD.masked_fill(cut_B.repeat_interleave(len(decay_GD) // rows).unsqueeze(-1), 0)
    return decay_GD.unsqueeze(-1)


def _per_head(x_NQCK: Tensor, heads: int) -> Tensor:
    return x_NQCK.repeat_interleave(heads // x_NQCK.shape[1], 1) if x_NQCK.shape[1] != heads else x_NQCK


class _Layout:
    """Chunks of one range as the tokens of sequences, and back."""

    def __init__(self, plan: DocumentPlan, like_NGCD: Tensor, rows: int) -> None:
        self.N, G, self.C, _ = like_NGCD.shape
        self.B, self.H, self.T = rows, G // rows, self.N * self.C
        self.followed = isinstance(like_NGCD, FakeTensor)
        self.packed = bool(plan.starts)
        self.lengths: dict[str, Tensor] = {}
        if self.packed:
            key = (self.T, like_NGCD.device)
            if key not in plan.kept:
                plan.kept[key] = _sequences(plan.starts, self.T, like_NGCD.device)
            self.lengths, self.firsts, self.fed, self.lasts = plan.kept[key]

    def tokens(self, x_NGCD: Tensor) -> Tensor:
        """[N, B*H, C, D] -> [B, T, H, D], or [1, B*T, H, D] where documents start."""
        x = x_NGCD.unflatten(1, (self.B, self.H)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        return (x.flatten(0, 1).unsqueeze(0) if self.packed else x).contiguous()

    def chunks(self, x_BTHD: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, D] -> [N, B*H, C, D]"""
        x = x_BTHD.reshape(self.B, self.N, self.C, self.H, -1).permute(1, 0, 3, 2, 4)
        return x.flatten(1, 2).to(dtype).contiguous()

    def before(self, state_GKW: Tensor) -> Tensor:
        """The state that every sequence begins with, [S, H, K, W]: a row's for its first, unless a document starts with the range."""
        state_BHKW = state_GKW.unflatten(0, (self.B, self.H))
        if not self.packed:
            return state_BHKW.contiguous()
        empty_SHKW = state_BHKW.new_zeros(len(self.lengths["cu_seqlens"]) - 1, *state_BHKW.shape[1:])
        return empty_SHKW.index_copy(0, self.firsts, state_BHKW[self.fed])

    def after(self, state_SHKW: Tensor) -> Tensor:
        """The state after every row's last sequence, [G, K, W]."""
        return (state_SHKW[self.lasts] if self.packed else state_SHKW).flatten(0, 1)


def _sequences(starts: tuple[tuple[int, ...], ...], tokens: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Lengths summed up, of all rows laid end to end, on the device and on the host; the sequences that go on from a row's state, these
    rows, and every row's last sequence."""
    bounds, firsts, fed, lasts = [0], [], [], []
    for row, places in enumerate(starts):
        if 0 not in places:
            firsts.append(len(bounds) - 1)
            fed.append(row)
        bounds += [row * tokens + place for place in places if place] + [(row + 1) * tokens]
        lasts.append(len(bounds) - 2)
    on_host = torch.tensor(bounds, dtype=torch.int64, device="cpu")
    first, from_row, last = (torch.tensor(x, dtype=torch.int64, device=device) for x in (firsts, fed, lasts))
    return {"cu_seqlens": on_host.to(device), "cu_seqlens_cpu": on_host}, first, from_row, last
