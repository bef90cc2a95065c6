"""Reading a linear Titans memory token by token inside a chunk (``titans.read: token``), exactly and without weights per token.

With keep_t = 1 - alpha_t and momentum eta_t of a chunk's tokens, M and S its first weights and momentum, e_j the error of token j at its
gradient's weights (section 3.1 of the Titans paper, arXiv 2501.00663, unrolled for M_i):

    beta_il = prod keep over (l, i]        m_lj = prod eta over (j, l]        G_ij = sum over l in [j, i] of beta_il m_lj
    o_i = beta_i q_i M + f_i q_i S - sum_{j <= i} (q_i . k_j) G_ij theta_j e_j
    beta_i = beta_i0        f_i = sum over l in [1, i] of beta_il m_l0

so G is the product of two lower triangles, and no ratio is taken that could overflow. Without momentum G = beta and f = 0. Over ranks, each
of which has a slice of every chunk, keys, errors and gates of the whole chunk are gathered, and every rank reads for its own tokens.

Legend: N chunk, G memory (stream x head), p tokens of this rank, c tokens of all ranks' slots, K key, V value, L rows of gates.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from models.config import TitansConfig
from models.memory.chunk_plan import Share
from models.memory.chunks import running_sum
from models.memory.protocol import Carry
from models.recomputed import recomputed


def gates_inside(settings: TitansConfig, largest_rate: float, gates: dict[str, Tensor], share: Share, carry: Carry) -> Tensor:
    """[N, L, G, c]: of all ranks' tokens theta, log keep, 1 at a token and 0 at an empty slot, and with momentum log eta.

    ``gates``: raw, by name, [N, G, p] each. An empty slot changes nothing.
    """
    mask = share.mask_NSp.repeat_interleave(gates["theta"].shape[1] // share.mask_NSp.shape[1], dim=1)

    def rows(theta: Tensor, alpha: Tensor, *eta: Tensor) -> tuple[Tensor, ...]:
        theta = theta.sigmoid() * largest_rate
        for raw in eta:
            theta = theta * (-raw).sigmoid()  # 1 - eta
        logs = [F.logsigmoid(-alpha), *(F.logsigmoid(raw) for raw in eta)]
        log_keep, *log_eta = (log.masked_fill(~mask, 0) for log in logs)
        return (torch.stack([theta.masked_fill(~mask, 0), log_keep, mask.to(theta.dtype), *log_eta], 1),)

    momentum = (gates["eta"],) if settings.has_momentum else ()
    (own_NLGp,) = recomputed(rows, gates["theta"], gates["alpha"], *momentum)
    return _of_chunk(own_NLGp, carry)


def _of_chunk(own_NXGp: Tensor, carry: Carry) -> Tensor:
    """[N, X, G, c]: of the slots of all ranks, in their order."""
    return carry.stacked(own_NXGp).movedim(0, -2).flatten(-2)


def _decay(log_NGc: Tensor, first: int, end: int) -> Tensor:
    """[N, G, end - first, c]: the product of gates over (j, i] for i in [first, end), 0 where j > i."""
    sums = running_sum(log_NGc, None)
    pair = sums[..., first:end].unsqueeze(-1) - sums.unsqueeze(-2)
    later = torch.ones(pair.shape[-2:], dtype=torch.bool, device=pair.device).triu_(first + 1)
    return pair.masked_fill(later, float("-inf")).exp()


def from_start(q_NGpK: Tensor, gates_NLGc: Tensor, rank: int) -> Tensor:
    """[N, G, p, Z * K]: the queries that read M, beta q, and with momentum those that read S, f q."""
    p = q_NGpK.shape[2]
    return recomputed(partial(_from_start, rank * p, rank * p + p), q_NGpK, gates_NLGc)[0]


def _from_start(first: int, end: int, q_NGpK: Tensor, gates_NLGc: Tensor) -> tuple[Tensor]:
    _, log_keep, real, *log_eta = gates_NLGc.unbind(1)
    reads = [running_sum(log_keep, None)[..., first:end].exp()]
    for log in log_eta:
        so_far = running_sum(log, None).exp() * real
        reads.append((_decay(log_keep, first, end) @ so_far.unsqueeze(-1)).squeeze(-1))
    return (torch.cat([q_NGpK * read.unsqueeze(-1) for read in reads], -1),)


def written_inside(q_NGpK: Tensor, k_NGpK: Tensor, error_NGpV: Tensor, gates_NLGc: Tensor, carry: Carry, rank: int) -> Tensor:
    """[N, G, p, V]: what the chunk's tokens up to each one took from what it reads."""
    p = q_NGpK.shape[2]
    k_NGcK, error_NGcV = (carry.stacked(x).movedim(0, 2).flatten(2, 3) for x in (k_NGpK, error_NGpV))
    return recomputed(partial(_written_inside, rank * p, rank * p + p), q_NGpK, k_NGcK, error_NGcV, gates_NLGc)[0]


def _written_inside(first: int, end: int, q_NGpK: Tensor, k_NGcK: Tensor, error_NGcV: Tensor, gates_NLGc: Tensor) -> tuple[Tensor]:
    theta, log_keep, real, *log_eta = gates_NLGc.unbind(1)
    weight_NGpc = _decay(log_keep, first, end)
    for log in log_eta:  # an empty slot moves no momentum into the weights
        weight_NGpc = weight_NGpc @ (_decay(log, 0, log.shape[-1]) * real.unsqueeze(-1))
    scores_NGpc = (q_NGpK @ k_NGcK.mT) * weight_NGpc * theta.unsqueeze(-2)
    return (scores_NGpc @ error_NGcV,)
