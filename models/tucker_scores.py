"""UltraMem's scores of product keys (arXiv 2411.12364): each half has r sets of keys, and a small core joins the two halves.

    s1_a = K1_a q1,  s2_b = K2_b q2  for a, b < r;   score of value (i, j) = sum over a, b of s1_a[i] C_ab s2_b[j]

Unlike a sum, this has no largest values that can be found half by half. Candidates are the top_k of u s1 and of v s2, where u and v are the
leading singular vectors of C, and among the pairs of candidates the top_k of the exact scores are taken: an approximation that is as
good as C is near rank 1. Which values are read follows from it, gradients are those of the exact scores.

Legend: n tokens, t of a tile, H head, N keys of a half, D size of half a query, k rows per head, r sets.
Try alone: ``pytest tests/models/test_product_keys.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.repeat import turns

Tiles = list[tuple[int, int]]


def leading_vectors(core_Hrr: Tensor) -> tuple[Tensor, Tensor]:
    """u_Hr and v_Hr of the best approximation of rank 1 of each core. Singular vectors have no sign; u is taken with a sum that is not
    negative, so that a core that changes little keeps them."""
    u_Hrr, _, vt_Hrr = torch.linalg.svd(core_Hrr.detach().float())
    u_Hr, v_Hr = u_Hrr[..., 0], vt_Hrr[..., 0, :]
    sign_H1 = torch.where(u_Hr.sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return (u_Hr * sign_H1).to(core_Hrr.dtype), (v_Hr * sign_H1).to(core_Hrr.dtype)


def select(s1_rHtN: Tensor, s2_rHtN: Tensor, core_Hrr: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(score_Htk, i_Htk, j_Htk, s1_rHtk, s2_rHtk): exact scores of the chosen pairs, their indices, and their scores by set."""
    u_Hr, v_Hr = leading_vectors(core_Hrr)
    i_Htk = torch.einsum("hr,rhtn->htn", u_Hr, s1_rHtN).topk(k, dim=-1).indices
    j_Htk = torch.einsum("hr,rhtn->htn", v_Hr, s2_rHtN).topk(k, dim=-1).indices
    r = len(s1_rHtN)
    s1_rHtk, s2_rHtk = (s.gather(-1, index.expand(r, *index.shape)) for s, index in ((s1_rHtN, i_Htk), (s2_rHtN, j_Htk)))
    grid_Htkk = torch.einsum("ahti,hab,bhtj->htij", s1_rHtk, core_Hrr, s2_rHtk)
    score_Htk, place_Htk = grid_Htkk.flatten(-2).topk(k, dim=-1)
    rows, columns = place_Htk // k, place_Htk % k
    chosen = [s.gather(-1, index.expand(r, *index.shape)) for s, index in ((s1_rHtk, rows), (s2_rHtk, columns))]
    return score_Htk, i_Htk.gather(-1, rows), j_Htk.gather(-1, columns), chosen[0], chosen[1]


class TuckerSelect(torch.autograd.Function):
    """q_nH2D, keys_2rHND and core_Hrr -> index_nHk (int32, i * N + j) and score_nHk. Scores of all keys live for one tile of tokens."""

    @staticmethod
    def forward(ctx: Any, q_nH2D: Tensor, keys_2rHND: Tensor, core_Hrr: Tensor, k: int, tiles: Tiles) -> tuple[Tensor, Tensor]:
        n, (sets, heads, n_keys) = len(q_nH2D), keys_2rHND.shape[1:4]
        index_nHk = torch.empty(n, heads, k, dtype=torch.int32, device=q_nH2D.device)
        by_set_2rHnk = torch.empty(2, sets, heads, n, k, dtype=core_Hrr.dtype, device=q_nH2D.device)
        score_nHk = torch.empty(n, heads, k, dtype=core_Hrr.dtype, device=q_nH2D.device)
        for a, b in turns(tiles, q_nH2D, lambda tile: tile[1] - tile[0]):
            q_21HtD = q_nH2D[a:b].permute(2, 1, 0, 3)[:, None]
            s_2rHtN = torch.matmul(q_21HtD, keys_2rHND.transpose(-1, -2)).to(core_Hrr.dtype)
            score_Htk, i_Htk, j_Htk, *chosen = select(s_2rHtN[0], s_2rHtN[1], core_Hrr, k)
            index_nHk[a:b].copy_(i_Htk.mul_(n_keys).add_(j_Htk).transpose(0, 1))
            score_nHk[a:b].copy_(score_Htk.transpose(0, 1))
            for half in range(2):
                by_set_2rHnk[half, :, :, a:b].copy_(chosen[half])
        ctx.save_for_backward(q_nH2D, keys_2rHND, core_Hrr, index_nHk, by_set_2rHnk)
        ctx.tiles = tiles
        ctx.mark_non_differentiable(index_nHk)
        return index_nHk, score_nHk

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_nH2D, keys_2rHND, core_Hrr, index_nHk, by_set_2rHnk = ctx.saved_tensors
        sets, heads, n_keys = keys_2rHND.shape[1:4]
        dscore_Hnk = grads[1].transpose(0, 1)
        s1_rHnk, s2_rHnk = by_set_2rHnk
        dcore_Hrr = torch.einsum("hnk,ahnk,bhnk->hab", dscore_Hnk, s1_rHnk, s2_rHnk)
        dsets = (
            torch.einsum("hnk,hab,bhnk->ahnk", dscore_Hnk, core_Hrr, s2_rHnk),
            torch.einsum("hnk,hab,ahnk->bhnk", dscore_Hnk, core_Hrr, s1_rHnk),
        )
        dq_nH2D = torch.empty_like(q_nH2D)
        dkeys_2rHND = torch.zeros(keys_2rHND.shape, dtype=core_Hrr.dtype, device=q_nH2D.device)
        for a, b in turns(ctx.tiles, q_nH2D, lambda tile: tile[1] - tile[0]):
            index_Htk = index_nHk[a:b].transpose(0, 1).long()
            row = torch.arange(sets * heads * (b - a), device=index_Htk.device).view(sets, heads, b - a, 1) * n_keys
            for half, key_Htk in enumerate((index_Htk // n_keys, index_Htk % n_keys)):
                ds = core_Hrr.new_zeros(sets * heads * (b - a) * n_keys)  # sums in one dim are deterministic everywhere
                ds.index_add_(0, (row + key_Htk).reshape(-1), dsets[half][:, :, a:b].reshape(-1))
                ds_rHtN = ds.view(sets, heads, b - a, n_keys).to(keys_2rHND.dtype)
                dq_nH2D[a:b, :, half].copy_(torch.matmul(ds_rHtN, keys_2rHND[half]).sum(0).transpose(0, 1))
                dkeys_2rHND[half].add_(torch.matmul(ds_rHtN.transpose(-1, -2), q_nH2D[a:b, :, half].transpose(0, 1)))
        return dq_nH2D, dkeys_2rHND.to(keys_2rHND.dtype), dcore_Hrr, None, None
