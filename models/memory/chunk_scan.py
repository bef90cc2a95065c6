"""The scan of a fast-weight memory over chunks: read at the chunk's first weights, add up weighted gradients, move the weights.

One chunk, M and S the weights and momentum that come in, A the weights of its start, u_j the gradient of token j at A (unrolled in
section 3.1 of the Titans paper, arXiv 2501.00663):

    o_i = f_A(q_i)        M' = beta M + f S - sum_j wM_j u_j        S' = m S - sum_j wS_j u_j

The two sums over tokens are all that ranks must add up: ``total`` does, once per chunk, in forward and in backward. Weights and momentum
are replicated; their gradient is a sum over ranks that is complete where a sum over tokens asks for it.

Other reads (``Rule.read``): *shifted*, the last token of a full chunk reads at M' instead; *token*, finished in
`models/memory/token_reads.py`: M and S are read with two queries per token, o_i = qM_i M + qS_i S, and the errors at A beside them.

Kept for the backward pass: inputs, and weights and momentum before each chunk. The inside of a chunk is computed again, chunk by chunk.

Legend: N chunks, G memories (stream x head), p tokens of this rank, K key, V value, Z 2 with momentum else 1, F fast weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.memory.chunk_plan import Chunks, Share
from models.memory.fast_weights import FastNetwork, Loss, at_initial_norms, at_norm, error_of, outer_sums
from models.recomputed import gradients_of
from models.repeat import repeated


@dataclass(frozen=True)
class Rule:
    """How a memory learns: everything about it that is not a tensor."""

    network: FastNetwork
    loss: Loss
    momentum: bool
    at_norm: bool = False
    """Moneta: the weights that are read are the written ones at unit norm."""
    at_initial_norms: bool = False
    """LaCT: at a chunk start weights go back to their initial norms."""
    read: Literal["chunk_start", "token", "shifted"] = "chunk_start"
    """See `models.memory_config.TitansConfig.read`."""


@dataclass(frozen=True)
class Turns:
    """Flags of the chunks of one scan, per memory; host members say where a flag is set at all."""

    fresh_NG: Tensor
    begins_NG: Tensor
    open_G: Tensor
    """First chunk: reads at the anchor that came in."""
    last_NG: Tensor
    """The stream's last chunk: its anchor is handed out."""
    any_fresh: tuple[bool, ...]
    any_open: bool
    any_last: tuple[bool, ...]
    close_NGp: Tensor | None = None
    """Shifted reads: tokens of this rank that read what their chunk has written; at most one per chunk."""
    any_close: tuple[bool, ...] = ()

    def part(self, first: int, end: int) -> Turns:
        """Of the chunks [first, end)."""
        return Turns(
            self.fresh_NG[first:end],
            self.begins_NG[first:end],
            self.open_G,
            self.last_NG[first:end],
            self.any_fresh[first:end],
            self.any_open and first == 0,
            self.any_last[first:end],
            None if self.close_NGp is None else self.close_NGp[first:end],
            self.any_close[first:end],
        )


def turns_of(chunks: Chunks, n_heads: int, device: torch.device, shifted: Share | None = None) -> Turns:
    """The flags of all chunks, one per memory. ``shifted``: this rank's share, where chunks' last tokens read what was written."""
    last_NS = np.equal(chunks.last_S[None], np.arange(chunks.n_steps)[:, None])

    def flags(values: np.ndarray) -> Tensor:
        return torch.tensor(values).to(device).repeat_interleave(n_heads, dim=-1)

    return Turns(
        fresh_NG=flags(chunks.fresh_NS),
        begins_NG=flags(chunks.begins_NS),
        open_G=flags(chunks.open_S),
        last_NG=flags(last_NS),
        any_fresh=tuple(bool(row.any()) for row in chunks.fresh_NS),
        any_open=bool(chunks.open_S.any()),
        any_last=tuple(bool(row.any()) for row in last_NS),
        close_NGp=None if shifted is None else shifted.close_NSp.repeat_interleave(n_heads, dim=1),
        any_close=() if shifted is None else shifted.any_close,
    )


Total = Callable[[Tensor], Tensor]


def begun(rule: Rule, turns: Turns, n: int, state_ZGF: Tensor, initial_GF: Tensor, anchor_GF: Tensor) -> tuple[Tensor, Tensor]:
    """The state that chunk n begins with, and the weights that it reads and takes gradients at."""
    M_GF = state_ZGF[0]
    if turns.any_fresh[n]:
        fresh_G1 = turns.fresh_NG[n].unsqueeze(-1)
        M_GF = torch.where(fresh_G1, initial_GF, M_GF)
        state_ZGF = torch.cat([M_GF.unsqueeze(0), state_ZGF[1:].masked_fill(fresh_G1, 0)])
    if rule.at_initial_norms:
        M_GF = torch.where(turns.begins_NG[n].unsqueeze(-1), at_initial_norms(rule.network, M_GF, initial_GF), M_GF)
        state_ZGF = torch.cat([M_GF.unsqueeze(0), state_ZGF[1:]])
    A_GF = at_norm(rule.network, M_GF) if rule.at_norm else M_GF
    if n == 0 and turns.any_open:
        A_GF = torch.where(turns.open_G.unsqueeze(-1), anchor_GF, A_GF)
    return state_ZGF, A_GF


def _turn(
    rule: Rule,
    turns: Turns,
    n: int,
    state_ZGF: Tensor,
    initial_GF: Tensor,
    anchor_GF: Tensor,
    q_GpK: Tensor,
    k_GpK: Tensor,
    v_GpV: Tensor,
    write_ZGp: Tensor,
    delta_Gp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(outputs, this rank's sums [Z, G, F], the state that chunk n begins with, its anchor)"""
    state_ZGF, A_GF = begun(rule, turns, n, state_ZGF, initial_GF, anchor_GF)
    factors = rule.network.gradient(A_GF, k_GpK, error_of(rule.loss, v_GpV, None if delta_Gp is None else delta_Gp.unsqueeze(-1)))
    sums_ZGF = torch.stack([outer_sums(factors, weight_Gp) for weight_Gp in write_ZGp])
    if rule.read != "token":
        return rule.network(A_GF, q_GpK), sums_ZGF, state_ZGF, A_GF
    read = [rule.network(part_GF, q) for part_GF, q in zip(state_ZGF, q_GpK.chunk(len(state_ZGF), dim=-1), strict=True)]
    return torch.cat([read[0] if len(read) == 1 else read[0] + read[1], factors[-1][1]], -1), sums_ZGF, state_ZGF, A_GF


def _closing_read(rule: Rule, M_GF: Tensor, initial_GF: Tensor, q_G1K: Tensor) -> tuple[Tensor]:
    """[G, 1, V]: what is read after a chunk, at the weights that one which began now would read."""
    A_GF = at_initial_norms(rule.network, M_GF, initial_GF) if rule.at_initial_norms else M_GF
    return (rule.network(at_norm(rule.network, A_GF) if rule.at_norm else A_GF, q_G1K),)


def _only(close_Gp: Tensor, x_GpK: Tensor) -> Tensor:
    """[G, 1, K]: that of the closing token, 0 where there is none."""
    return x_GpK.masked_fill(~close_Gp.unsqueeze(-1), 0).sum(1, keepdim=True)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rule: Rule,
        turns: Turns,
        total: Total,
        state_ZGF: Tensor,
        initial_GF: Tensor,
        anchor_GF: Tensor,
        whole_N3G1: Tensor,
        q_NGpK: Tensor,
        k_NGpK: Tensor,
        v_NGpV: Tensor,
        write_NZGp: Tensor,
        delta_NGp: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        N, Z = len(q_NGpK), len(state_ZGF)
        states_NZGF = state_ZGF.new_empty(N + 1, *state_ZGF.shape)
        states_NZGF[0] = state_ZGF
        width = v_NGpV.shape[-1] * (2 if rule.read == "token" else 1)
        o_NGpV, anchor_out_GF = v_NGpV.new_empty(*v_NGpV.shape[:-1], width), anchor_GF.clone()
        inputs = (q_NGpK, k_NGpK, v_NGpV, write_NZGp, delta_NGp)
        for n in repeated(N, q_NGpK):
            tokens = (x if x is None else x[n] for x in inputs)
            o_NGpV[n], sums_ZGF, begun_ZGF, A_GF = _turn(rule, turns, n, states_NZGF[n], initial_GF, anchor_GF, *tokens)  # type: ignore[arg-type]
            _move(states_NZGF[n + 1], begun_ZGF, whole_N3G1[n], total(sums_ZGF), Z)
            if turns.close_NGp is not None and turns.any_close[n]:
                close_Gp = turns.close_NGp[n]
                (o_G1V,) = _closing_read(rule, states_NZGF[n + 1, 0], initial_GF, _only(close_Gp, q_NGpK[n]))
                o_NGpV[n] = torch.where(close_Gp.unsqueeze(-1), o_G1V, o_NGpV[n])
            if turns.any_last[n]:
                anchor_out_GF = torch.where(turns.last_NG[n].unsqueeze(-1), A_GF, anchor_out_GF)
        ctx.rule, ctx.turns, ctx.total = rule, turns, total
        ctx.save_for_backward(initial_GF, anchor_GF, whole_N3G1, *inputs, states_NZGF)
        return o_NGpV, states_NZGF[N].clone(), anchor_out_GF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        do_NGpV, dstate_ZGF, danchor_out_GF = grads
        initial_GF, anchor_GF, whole_N3G1, *inputs, states_NZGF = ctx.saved_tensors
        N, Z, turns = len(do_NGpV), len(dstate_ZGF), ctx.turns
        dinputs = [None if x is None else torch.empty_like(x) for x in inputs]
        dinitial_GF, danchor_GF, dwhole = torch.zeros_like(initial_GF), torch.zeros_like(anchor_GF), torch.empty_like(whole_N3G1)
        dstate_ZGF, danchor_out_GF = dstate_ZGF.clone(), danchor_out_GF.clone()
        has_delta = inputs[-1] is not None
        for turn in repeated(N, do_NGpV):
            n = N - 1 - turn
            beta, f, m = whole_N3G1[n].unbind(0)
            do_GpV, dq_GpK = do_NGpV[n], None
            if turns.close_NGp is not None and turns.any_close[n]:
                close_Gp1 = turns.close_NGp[n].unsqueeze(-1)
                at = (states_NZGF[n + 1, 0], initial_GF, _only(turns.close_NGp[n], inputs[0][n]))
                closing = partial(_closing_read, ctx.rule)
                dM_GF, dinit, dq_G1K = gradients_of(closing, at, (True,) * 3, (_only(turns.close_NGp[n], do_GpV),))
                assert dM_GF is not None and dq_G1K is not None  # every read depends on weights and query
                dstate_ZGF[0] += dM_GF
                if dinit is not None:
                    dinitial_GF += dinit
                do_GpV, dq_GpK = do_GpV.masked_fill(close_Gp1, 0), dq_G1K.masked_fill(~close_Gp1, 0)
            dsums_ZGF = ctx.total(dstate_ZGF.clone()).neg_()
            dbegun_ZGF = beta * dstate_ZGF if Z == 1 else torch.stack([beta * dstate_ZGF[0], f * dstate_ZGF[0] + m * dstate_ZGF[1]])
            dA_GF = torch.zeros_like(anchor_GF)
            if turns.any_last[n]:
                last_G1 = turns.last_NG[n].unsqueeze(-1)
                dA_GF = danchor_out_GF.masked_fill(~last_G1, 0)
                danchor_out_GF = danchor_out_GF.masked_fill(last_G1, 0)
            fn = partial(_turn, ctx.rule, turns, n)
            given = (states_NZGF[n], initial_GF, anchor_GF, *(x[n] for x in inputs if x is not None))
            found, begun_ZGF = _turn_backward(fn, given, (do_GpV, dsums_ZGF, dbegun_ZGF, dA_GF))
            dwhole[n, 0] = (begun_ZGF[0] * dstate_ZGF[0]).sum(-1, keepdim=True)
            if Z == 2:
                dwhole[n, 1] = (begun_ZGF[1] * dstate_ZGF[0]).sum(-1, keepdim=True)
                dwhole[n, 2] = (begun_ZGF[1] * dstate_ZGF[1]).sum(-1, keepdim=True)
            else:
                dwhole[n, 1:] = 0
            dnew_ZGF, dinit, danchor, *dtokens = found
            dstate_ZGF.copy_(dnew_ZGF)
            if dinit is not None:
                dinitial_GF += dinit
            if danchor is not None:
                danchor_GF += danchor
            for into, value in zip((d for d in dinputs if d is not None), dtokens, strict=True):
                into[n] = value
            if dq_GpK is not None:
                dinputs[0][n] += dq_GpK  # type: ignore[index]
        danchor_GF += danchor_out_GF
        if not has_delta:
            dinputs[-1] = None
        return None, None, None, dstate_ZGF, dinitial_GF, danchor_GF, dwhole, *dinputs


def _turn_backward(fn: Callable[..., tuple[Tensor, ...]], given: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Any:
    """Gradients of what a chunk is given, and the state that it began with."""
    begun: list[Tensor] = []

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        out = fn(*inputs)
        begun.append(out[2].detach())
        return out

    return gradients_of(run, given, (True,) * len(given), grads), begun[0]


def _move(into_ZGF: Tensor, begun_ZGF: Tensor, whole_3G1: Tensor, sums_ZGF: Tensor, Z: int) -> None:
    """The state after a chunk."""
    beta, f, m = whole_3G1.unbind(0)
    torch.mul(begun_ZGF[0], beta, out=into_ZGF[0])
    if Z == 2:
        into_ZGF[0].addcmul_(begun_ZGF[1], f)
        torch.mul(begun_ZGF[1], m, out=into_ZGF[1])
    into_ZGF.sub_(sums_ZGF)


def scan_chunks(
    rule: Rule,
    turns: Turns,
    total: Total,
    state_ZGF: Tensor,
    initial_GF: Tensor,
    anchor_GF: Tensor,
    whole_N3G1: Tensor,
    q_NGpK: Tensor,
    k_NGpK: Tensor,
    v_NGpV: Tensor,
    write_NZGp: Tensor,
    delta_NGp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [N, G, p, V], state [Z, G, F] after the last chunk, and the weights [G, F] at which its last chunk reads.

    Read token: queries [N, G, p, Z K], outputs [N, G, p, 2 V], what they read of M and S and then the errors.

    All tensors share one dtype (float32 or float64). ``whole``: (beta, f, m) of every chunk; ``write``: wM and, with momentum, wS of this
    rank's tokens, 0 at empty slots. ``total`` adds up a tensor over ranks, in place or not, and is called in the same order on all of them.
    """
    with torch.autocast(q_NGpK.device.type, enabled=False):
        return _Scan.apply(  # type: ignore[return-value]
            rule, turns, total, state_ZGF, initial_GF, anchor_GF, whole_N3G1, q_NGpK, k_NGpK, v_NGpV, write_NZGp, delta_NGp
        )
