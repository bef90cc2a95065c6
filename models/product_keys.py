"""A memory layer in place of a feed-forward or beside it: each token reads a few rows of a large table of values, found by product keys.

    q_h = W_q x, two halves per head;  scores s1 = K1_h q_h1, s2 = K2_h q_h2;  value (i, j) has score s1_i + s2_j
    w = softmax over the top_k largest of all n_keys^2 scores;  y = sum over heads of w times the rows;  out = W_o (y * silu(W_s x))

The top_k of all sums are among the sums of the top_k of each half (arXiv 1907.05242), so they are found exactly without making all of them;
with ``tucker_rank`` scores are no sums (`models/tucker_scores.py`). Gate and output projection are Memory+'s (arXiv 2412.09764). Scores are
made tile by tile and never kept: n_keys times more than what a token reads. The table is the model's (`models/value_table.py`): many layers
may read one.

Legend: B row, T token, n tokens of all rows, t of a tile, C channel, H head, N keys of a
half, D size of half a query, k rows per head, E = H k.
Try alone: ``pytest tests/models/test_product_keys.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.batch import Bounds
from models.config import ModelConfig
from models.feedforward import RMSNorm, SwiGLU, _GatedProduct, compute_dtype
from models.linear import Linear
from models.repeat import turns
from models.tucker_scores import TuckerSelect, leading_vectors
from models.value_table import ReaderCost, TableReader, ValueTable

SCORES_AT_ONCE = 1 << 22
"""Of one half of the queries of a tile, or of its candidates: pairs of the best of both halves."""


def best_pairs(scores_1: Tensor, scores_2: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest sums of one score of each half, over all pairs: (sums, first's index, second's index), each [..., k]."""
    best_1, index_1 = scores_1.topk(k, dim=-1)
    best_2, index_2 = scores_2.topk(k, dim=-1)
    sums = (best_1[..., :, None] + best_2[..., None, :]).flatten(-2)
    best, place = sums.topk(k, dim=-1)
    return best, index_1.gather(-1, place // k), index_2.gather(-1, place % k)


def _tiles(n: int, per_token: int) -> list[tuple[int, int]]:
    step = max(1, SCORES_AT_ONCE // max(1, per_token))
    return [(a, min(a + step, n)) for a in range(0, n, step)]


class _Select(torch.autograd.Function):
    """q_nH2D and keys_2HND -> index_nHk (int32, i * N + j) and score_nHk. Scores of all keys live for one tile of tokens."""

    @staticmethod
    def forward(ctx: Any, q_nH2D: Tensor, keys_2HND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        n, heads, n_keys = len(q_nH2D), keys_2HND.shape[1], keys_2HND.shape[2]
        index_nHk = torch.empty(n, heads, k, dtype=torch.int32, device=q_nH2D.device)
        score_nHk = torch.empty(n, heads, k, dtype=_wide(q_nH2D.dtype), device=q_nH2D.device)
        for a, b in turns(_tiles(n, heads * max(n_keys, k * k)), q_nH2D, lambda tile: tile[1] - tile[0]):
            q_2HtD = q_nH2D[a:b].permute(2, 1, 0, 3)
            s_2HtN = torch.matmul(q_2HtD, keys_2HND.transpose(2, 3)).to(score_nHk.dtype)
            score_Htk, i_Htk, j_Htk = best_pairs(s_2HtN[0], s_2HtN[1], k)
            index_nHk[a:b].copy_(i_Htk.mul_(n_keys).add_(j_Htk).transpose(0, 1))
            score_nHk[a:b].copy_(score_Htk.transpose(0, 1))
        ctx.save_for_backward(q_nH2D, keys_2HND, index_nHk)
        ctx.mark_non_differentiable(index_nHk)
        return index_nHk, score_nHk

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_nH2D, keys_2HND, index_nHk = ctx.saved_tensors
        heads, n_keys = keys_2HND.shape[1:3]
        dq_nH2D = torch.empty_like(q_nH2D)
        dkeys_2HND = torch.zeros(keys_2HND.shape, dtype=_wide(keys_2HND.dtype), device=q_nH2D.device)
        for a, b in turns(_tiles(len(q_nH2D), heads * n_keys), q_nH2D, lambda tile: tile[1] - tile[0]):
            index_tHk = index_nHk[a:b].long()
            row = torch.arange((b - a) * heads, device=index_tHk.device).view(b - a, heads, 1) * n_keys
            for half, key_tHk in enumerate((index_tHk // n_keys, index_tHk % n_keys)):
                # The gradient of all scores of this half, most of them 0: sums in one dim are the ones that are deterministic everywhere.
                ds = grads[1].new_zeros((b - a) * heads * n_keys)
                ds.index_add_(0, (row + key_tHk).view(-1), grads[1][a:b].reshape(-1))
                ds_HtN = ds.view(b - a, heads, n_keys).transpose(0, 1).to(keys_2HND.dtype)
                dq_nH2D[a:b, :, half].copy_(torch.matmul(ds_HtN, keys_2HND[half]).transpose(0, 1))
                dkeys_2HND[half].add_(torch.matmul(ds_HtN.transpose(1, 2), q_nH2D[a:b, :, half].transpose(0, 1)))
        return dq_nH2D, dkeys_2HND.to(keys_2HND.dtype), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class ProductKeyMemory(TableReader):
    """See the module. ``table`` belongs to the model, not to this layer."""

    def __init__(self, config: ModelConfig, table: ValueTable) -> None:
        super().__init__(table)
        settings, width = config.product_keys, config.value_width
        self.heads, self.n_keys, self.top_k = settings.heads, settings.n_keys, settings.top_k
        self.key_dim, self.d_model, self.value_dim = config.query_dim, config.d_model, width
        self.query = Linear(config.d_model, self.heads * self.key_dim)
        self.sets = settings.tucker_rank
        self.keys = nn.Parameter(torch.empty(2 * self.sets * self.heads * self.n_keys, self.key_dim // 2))
        """Rows by half, set, head and key, so that ranks can share them evenly."""
        self.core = nn.Parameter(torch.empty(self.heads, self.sets, self.sets)) if self.sets > 1 else None
        norms = settings.qk_norm
        self.query_norm = RMSNorm(self.key_dim // 2, config.norm_eps) if norms else None
        self.key_norm = RMSNorm(self.key_dim // 2, config.norm_eps) if norms else None
        self.expansion, self.rows = settings.expansion, config.table_rows
        maps = self.expansion if self.expansion > 1 else 0
        self.expand = nn.ModuleList(Linear(width, width) for _ in range(maps))
        gated = settings.gate == "swish"
        self.w_gate = Linear(config.d_model, width) if gated else None
        self.w_out = Linear(width, config.d_model) if gated else None
        self.dense = SwiGLU(config.d_model, config.ff_width) if settings.attach == "beside" else None

    def init_parameter(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Keys: uniform between +-1 / sqrt(key_dim). Cores: 1 / sets, of rank 1 but for a tenth of noise."""
        bound = 1 / math.sqrt(self.key_dim)
        if name == "core":
            return torch.empty(shape).normal_(1 / self.sets, 0.1 / self.sets, generator=generator)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator) if name == "keys" else None

    def select(self, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """index_nE (int32) of the rows that each token reads and their weights_nE, float32 (float64)."""
        dtype = compute_dtype(x_BTC)
        q_nH2D, keys_2rHND = self._queries_and_keys(x_BTC)
        q_nH2D, keys_2rHND = q_nH2D.to(dtype), keys_2rHND.to(dtype)
        with torch.autocast(x_BTC.device.type, enabled=False):
            if self.core is None:
                index_nHk, score_nHk = _Select.apply(q_nH2D, keys_2rHND[:, 0], self.top_k)  # type: ignore[misc]
            else:
                tiles = _tiles(len(q_nH2D), self.sets * self.heads * self.n_keys)
                index_nHk, score_nHk = TuckerSelect.apply(q_nH2D, keys_2rHND, self.core, self.top_k, tiles)  # type: ignore[misc]
            return index_nHk.flatten(1), score_nHk.softmax(-1).flatten(1)

    def _queries_and_keys(self, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """q_nH2D and keys_2rHND; normed ones have products of variance 1 at first."""
        q_nH2D = self.query(x_BTC).view(-1, self.heads, 2, self.key_dim // 2)
        keys = self.keys
        if self.query_norm is not None and self.key_norm is not None:
            q_nH2D, keys = self.query_norm(q_nH2D), self.key_norm(keys) * (self.key_dim // 2) ** -0.5
        return q_nH2D, keys.view(2, self.sets, self.heads, self.n_keys, -1)

    def forward(self, x_BTC: Tensor, bounds: Bounds) -> Tensor:
        """Same shape, in the dtype of products."""
        read_BTC = self._looked_up(x_BTC, bounds)
        return read_BTC if self.dense is None else read_BTC + self.dense(x_BTC)

    def _looked_up(self, x_BTC: Tensor, bounds: Bounds) -> Tensor:
        index_nE, weight_nE = self.select(x_BTC)
        y_nD = self._read(index_nE, weight_nE, bounds, compute_dtype(x_BTC))
        y_BTD = y_nD.view(*x_BTC.shape[:-1], self.value_dim)
        if self.w_gate is None or self.w_out is None:
            return y_BTD
        return self.w_out(_GatedProduct.apply(self.w_gate(x_BTC), y_BTD))

    def _read(self, index_nE: Tensor, weight_nE: Tensor, bounds: Bounds, dtype: torch.dtype) -> Tensor:
        """y_nD. With expansion value v is row v % rows under map v // rows: each map is applied to the sum of what it is for."""
        if not self.expand:
            return self.table.read(index_nE, weight_nE, bounds, dtype)
        row_nE, block_nE = index_nE % self.rows, index_nE // self.rows
        y_nD = None
        for i, linear in enumerate(self.expand):
            own_nD = linear(self.table.read(row_nE, weight_nE.masked_fill(block_nE != i, 0), bounds, dtype))
            y_nD = own_nD if y_nD is None else y_nD + own_nD
        assert y_nD is not None
        return y_nD

    def oracle(self, x_BTC: Tensor, values_VD: Tensor) -> Tensor:
        """The same from the whole table, with all scores of all values, by plain operations that autograd knows: slow, for tests."""
        q_nH2D, keys_2rHND = self._queries_and_keys(x_BTC)
        first = torch.einsum("nhd,ahkd->nhak", q_nH2D[:, :, 0], keys_2rHND[0])
        second = torch.einsum("nhd,ahkd->nhak", q_nH2D[:, :, 1], keys_2rHND[1])
        if self.core is None:
            scores_nHV = (first[:, :, 0, :, None] + second[:, :, 0, None, :]).flatten(2)
        else:
            scores = torch.einsum("nhai,hab,nhbj->nhij", first, self.core, second)
            outside = ~(self._candidates(first, 0)[..., :, None] & self._candidates(second, 1)[..., None, :])
            scores_nHV = scores.masked_fill(outside, -torch.inf).flatten(2)
        lowest = scores_nHV.topk(self.top_k, dim=-1).values[..., -1:]
        weights_nHV = scores_nHV.masked_fill(scores_nHV < lowest, -torch.inf).softmax(-1)
        if self.expand:
            values_VD = torch.cat([linear(values_VD) for linear in self.expand])
        y_BTD = torch.einsum("nhv,vd->nd", weights_nHV, values_VD).view(*x_BTC.shape[:-1], self.value_dim)
        if self.w_gate is not None and self.w_out is not None:
            y_BTD = self.w_out(nn.functional.silu(self.w_gate(x_BTC)) * y_BTD)
        if self.dense is not None:
            beside = self.dense
            y_BTD = y_BTD + beside.w_down(nn.functional.silu(beside.w_gate(x_BTC)) * beside.w_up(x_BTC))
        return y_BTD

    def _candidates(self, scores_nHrN: Tensor, half: int) -> Tensor:
        """Which keys of a half are among the best by its core's leading vector."""
        assert self.core is not None
        lead_nHN = torch.einsum("hr,nhrk->nhk", leading_vectors(self.core)[half], scores_nHrN)
        return lead_nHN >= lead_nHN.topk(self.top_k, dim=-1).values[..., -1:]

    def cost(self, batch_size: int, tokens: int, itemsize: int, shards: int = 1) -> ReaderCost:
        """See `TableReader.cost`."""
        n, entries, wide = batch_size * tokens, self.heads * self.top_k, max(4, itemsize)
        gated = self.w_gate is not None
        products = self.d_model * self.heads * self.key_dim + self.sets * self.heads * self.n_keys * self.key_dim
        products += 2 * self.d_model * self.value_dim if gated else 0
        maps = len(self.expand)
        products += maps * self.value_dim**2
        hidden = 0 if self.dense is None else self.dense.w_up.out_features
        products += 3 * self.d_model * hidden
        selecting, chosen = 0, 0
        if self.core is not None:  # leading scores and the grid of candidates; gradients of chosen scores and of the core
            selecting = self.heads * self.sets * (2 * self.n_keys + self.top_k * (self.sets + self.top_k))
            chosen = 3 * entries * self.sets**2
        forward = 2.0 * n * (products + max(1, maps) * entries * self.value_dim)
        norms = 2 * n * self.heads * (self.key_dim * itemsize + 2 * wide) // 2 if self.query_norm is not None else 0
        saved = n * (self.d_model + self.heads * self.key_dim) * itemsize + norms
        saved += n * entries * (4 + 2 * wide)  # index, weight, and the softmax's own result, which is the weight
        saved -= n * entries * wide
        saved += 2 * self.sets * n * entries * wide if self.core is not None else 0
        saved += maps * n * (entries * (1 + wide) + self.value_dim * itemsize)
        saved += n * 3 * (self.value_dim if gated else 0) * itemsize + n * 3 * hidden * itemsize
        columns = -(-self.value_dim // shards)
        sent = n * entries * (4 + wide) + n * (shards - 1) * columns * itemsize if shards > 1 else 0
        return ReaderCost(forward + 2.0 * n * selecting, 2 * forward + 2.0 * n * chosen, saved, max(1, maps) * sent)
