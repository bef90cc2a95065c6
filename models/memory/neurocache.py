"""Neurocache (arXiv 2407.02486): what a layer saw, compressed, in a cache of which every token reads its nearest neighbours.

    p = x W_down, divided by its root mean square            one entry per token, D numbers; x without gradient
    a segment's tokens choose among the ``cache_size`` entries before the segment: the ``top_k`` with the least |p_t - p_i|^2, each with
    the ``neighborhood`` - 1 entries after it
    y = W_o of heads of softmax(q(x_t) k(p_i)^T / sqrt K) v(p_i)        over these i, and the token's own entry

The choice has no gradient, entries none into what they were made of; W_down learns by what is read (the published code re-encodes what it
retrieves). Keys and values of entries are never made: q W_k is compared with entries, and W_v takes their weighted sum.
``writer: frozen`` keeps W_down as it was drawn, so that what is in a cache stays valid: LongMem's decoupled memory (arXiv 2306.07174).

Left out: the neighbours that the last tokens chose (a context of 1), replacement of the least recently used, one choice shared by layers.
Chosen here: the token's own entry, which is there also where the cache is empty.

Entries are appended and nothing else: over ranks each fetches the compressed entries before its tokens, in any layout.

Legend: B row, T token, C channel, H head, K head size, A = H K, D size of an entry, E = D + 1 with a last column of 1 (0: no entry here),
n entries before a range, L = n + T, N segment, c token in segment, k neighbours with those beside them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.batch import Bounds, Range
from models.config import ModelConfig
from models.feedforward import compute_dtype
from models.linear import Linear, linear
from models.memory.protocol import MemoryCost, MemoryTraits, State, last_tokens, local_offsets, ranges_in_order
from models.memory.recurrent import RecurrentMixer, state_dtype
from models.memory.segments import plan_segments
from models.recomputed import recomputed

_EPS = 1e-6


class _Weights(NamedTuple):
    """The parameters in the dtype in which their gradients add up over tiles; keys and values in that of states."""

    w_q: Tensor
    w_out: Tensor
    w_k: Tensor
    w_v: Tensor


class Neurocache(RecurrentMixer):
    """One mixer. Parameters: the compression, queries, keys and values of entries, the output."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_dim: int,
        entry_dim: int,
        cache_size: int,
        top_k: int,
        neighborhood: int,
        segment: int,
        frozen: bool,
    ) -> None:
        super().__init__(d_model, (1, 1, 1), cache_size + segment, segment)
        self.traits = MemoryTraits(
            carry="layer",
            transition="append_detached",
            read_at="segment_start",
            halo_tokens=self.halo,
            layouts=frozenset({"contiguous", "zigzag"}),
        )
        self.n_heads, self.head_dim, self.entry_dim, self.frozen = n_heads, head_dim, entry_dim, frozen
        self.cache_size, self.top_k, self.neighborhood, self.segment = cache_size, top_k, neighborhood, segment
        width = n_heads * head_dim
        self.w_down = Linear(d_model, entry_dim)
        self.w_q = Linear(d_model, width)
        self.w_k = nn.Parameter(torch.empty(width, entry_dim))
        self.w_v = nn.Parameter(torch.empty(width, entry_dim))
        self.w_out = Linear(width, d_model)
        self.w_down.weight.requires_grad_(not frozen)

    def init_state(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """``cache`` [B, n, E]: the last entries, of which the last column says whether there is one."""
        return {"cache": torch.zeros(batch_size, self.halo, self.entry_dim + 1, device=device, dtype=dtype)}

    def weights(self) -> _Weights:
        """See `RecurrentMixer.weights`."""
        return _Weights(*self.wide([self.w_q.weight, self.w_out.weight]), *self.widened([self.w_k, self.w_v]))

    # --- the walk -----------------------------------------------------------------------------------------------------------------

    def forward(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """See `MemoryModule.forward`."""
        start = self.init_state(len(x_BTC), x_BTC.device, state_dtype(x_BTC)) if state is None else state
        weights, entries_BTE = self.weights(), self.entries(x_BTC)
        befores, offsets = self._halos(entries_BTE, start["cache"], bounds), local_offsets(bounds)
        outputs = []
        for i, span in enumerate(bounds.ranges):
            seen_BLE = torch.cat([befores[i], entries_BTE[:, offsets[i] : offsets[i + 1]]], dim=1)
            for (a, b), x in self.tiles(x_BTC[:, offsets[i] : offsets[i + 1]], span):
                part_BLE = seen_BLE[:, a - span[0] : b - span[0] + self.halo]
                outputs.append(self.run(bounds, (a, b), partial(self._tile, bounds, (a, b)), weights, x, part_BLE))
        y_BTC = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return y_BTC, self._cache_after(entries_BTE, start if state is not None else None, befores, bounds)

    def entries(self, x_BTC: Tensor) -> Tensor:
        """[B, T, E]: what is cached of every token, in the dtype that products run in."""
        p_BTD = linear(x_BTC.detach(), self.w_down.weight)
        (entries,) = recomputed(_normed, p_BTD)
        return entries

    def _cache_after(self, entries_BTE: Tensor, given: State | None, befores: list[Tensor], bounds: Bounds) -> State:
        if self.carry.local:
            last, offsets = ranges_in_order(bounds)[-1], local_offsets(bounds)
            return {"cache": last_tokens(befores[last], entries_BTE[:, offsets[last] : offsets[last + 1]], self.halo)}
        if given is None:
            return {}
        tail_BnE, kept = self.carry.tail(entries_BTE, self.halo, bounds), min(self.halo, bounds.seq_len)
        before_BnE = given["cache"].to(tail_BnE.dtype)
        return {"cache": torch.cat([before_BnE[:, kept:], tail_BnE[:, self.halo - kept :]], dim=1)}

    def _tile(self, bounds: Bounds, span: Range, weights: _Weights, x_BTC: Tensor, seen_BLE: Tensor) -> Tensor:
        """The outputs of a tile from the entries of it and before it."""
        chosen_BTk = self._choose(bounds, span, seen_BLE.detach())
        q_BTHK = linear(x_BTC, weights.w_q).unflatten(-1, (self.n_heads, -1))
        (o_BTA,) = recomputed(partial(_read, compute_dtype(x_BTC)), q_BTHK, seen_BLE, chosen_BTk, weights.w_k, weights.w_v)
        return linear(o_BTA, weights.w_out)

    @torch.no_grad()
    def _choose(self, bounds: Bounds, span: Range, seen_BLE: Tensor) -> Tensor:
        """[B, T, k] int32: the entries that each token reads, as places in ``seen``; -1 where there are not so many."""
        plan = plan_segments(bounds, span, self.segment, seen_BLE.device)
        seen = seen_BLE.to(state_dtype(seen_BLE))
        own_BNcD = plan.deal(seen[:, self.halo - plan.before :, :-1])
        back = torch.arange(self.cache_size, 0, -1, device=seen.device)
        chosen = []
        for n in range(plan.n_segments):
            start_B1, place_B1 = plan.start_BN[:, n, None], plan.place_BN[:, n, None]
            at_Bw = start_B1 - back + (self.halo - span[0])
            window_BwE = seen.gather(1, at_Bw.unsqueeze(-1).expand(-1, -1, seen.shape[-1]))
            key_BwD = window_BwE[..., :-1]
            # A document from index 0 on may go on from an earlier sequence, whose entries came with the state.
            there_Bw = (window_BwE[..., -1] > 0) & ((back <= place_B1) | (start_B1 == place_B1))
            nearness_Bcw = 2 * own_BNcD[:, n] @ key_BwD.mT - key_BwD.square().sum(-1).unsqueeze(1)
            nearness_Bcw = nearness_Bcw.masked_fill(~there_Bw.unsqueeze(1), float("-inf"))
            nearest = nearness_Bcw.topk(min(self.top_k, self.cache_size), dim=-1)
            beside = nearest.indices.unsqueeze(-1) + torch.arange(self.neighborhood, device=seen.device)
            found = (nearest.values > float("-inf")).unsqueeze(-1) & (beside < self.cache_size)
            first_B11 = at_Bw[:, :1, None]
            chosen.append(torch.where(found.flatten(2), beside.flatten(2) + first_B11, -1))
        return plan.collect(torch.stack(chosen, 1)).to(torch.int32)

    # --- twin and arithmetic ------------------------------------------------------------------------------------------------------

    def oracle(self, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
        """Token by token."""
        state = state or self.init_state(len(x_BTC), x_BTC.device, x_BTC.dtype)
        p = self.w_down(x_BTC.detach())
        p = p * (p.square().mean(-1, keepdim=True) + _EPS).rsqrt()
        outputs = []
        for x_TC, p_TD, cache_nE, starts in zip(x_BTC, p, state["cache"], bounds.documents, strict=True):
            entries, begin, y = [entry[:-1] for entry in cache_nE if entry[-1] > 0], 0, []
            for t, x in enumerate(x_TC):
                if t > 0 and t in starts:
                    entries, begin = [], t
                if (t - begin) % self.segment == 0:
                    window = entries[-self.cache_size :]
                y.append(self._oracle_token(x, p_TD[t], window))
                entries = [*entries, p_TD[t]]
            outputs.append(torch.stack(y))
        kept = torch.cat([state["cache"], torch.cat([p, torch.ones_like(p[..., :1])], -1)], 1)
        return torch.stack(outputs), {"cache": kept[:, kept.shape[1] - self.halo :]}

    def _oracle_token(self, x_C: Tensor, own_D: Tensor, window: list[Tensor]) -> Tensor:
        distances = [float((own_D - entry).square().sum().detach()) for entry in window]
        nearest = sorted(range(len(window)), key=distances.__getitem__)[: self.top_k]
        read = [own_D, *(window[j] for i in nearest for j in range(i, min(i + self.neighborhood, len(window))))]
        k, v = (torch.stack([w @ entry for entry in read]).unflatten(-1, (self.n_heads, -1)) for w in (self.w_k, self.w_v))
        scores = torch.einsum("hk,nhk->hn", self.w_q(x_C).unflatten(-1, (self.n_heads, -1)), k) / self.head_dim**0.5
        return self.w_out(torch.einsum("hn,nhk->hk", scores.softmax(-1), v).flatten())

    def cost(self, batch_size: int, tokens: int, itemsize: int) -> MemoryCost:
        """See `MemoryModule.cost`. With tiles only one tile's inside is alive; recomputation is not in ``flops_backward``."""
        A, H, D, d, e = self.n_heads * self.head_dim, self.n_heads, self.entry_dim, self.d_model, itemsize
        n, wide, k = batch_size * tokens, max(itemsize, 4), min(self.top_k, self.cache_size) * self.neighborhood
        down, projections, absorbed = 2 * d * D, 4 * d * A, 4 * A * D
        choosing, reading = 2 * self.cache_size * D, 4 * H * D * (k + 1)
        seen = batch_size * (tokens + self.halo) * (D + 1) * e
        saved = n * e * (d if self.frozen else d + D) + seen
        if not 0 < self.tile_tokens < tokens:
            saved += n * (e * 2 * A + 4 * k)
        return MemoryCost(
            flops_forward=n * (down + projections + absorbed + choosing + reading),
            flops_backward=n * (2 * projections + 3 * absorbed + (2 * reading if self.frozen else down + 3 * reading)),
            saved_bytes=int(saved),
            state_bytes=batch_size * self.halo * (D + 1) * wide,
            exchange_bytes=0 if self.carry.local else batch_size * self.halo * (D + 1) * e,
        )


def _normed(p: Tensor) -> tuple[Tensor]:
    wide = p.to(state_dtype(p))
    wide = wide * (wide.square().mean(-1, keepdim=True) + _EPS).rsqrt()
    return (F.pad(wide, (0, 1), value=1.0).to(p.dtype),)


def _read(dtype: torch.dtype, q_BTHK: Tensor, seen_BLE: Tensor, chosen_BTk: Tensor, w_k_AD: Tensor, w_v_AD: Tensor) -> tuple[Tensor]:
    """What every token finds in its own entry and in those that it chose, [B, T, A]."""
    _, T, H, K = q_BTHK.shape
    seen_BLD = seen_BLE[..., :-1].to(w_k_AD.dtype)
    index = chosen_BTk.clamp(min=0).long().flatten(1).unsqueeze(-1).expand(-1, -1, seen_BLD.shape[-1])
    found_BTkD = seen_BLD.gather(1, index).unflatten(1, (T, -1))
    found_BTkD = torch.cat([seen_BLD[:, seen_BLD.shape[1] - T :].unsqueeze(2), found_BTkD], 2)
    hidden = F.pad(chosen_BTk < 0, (1, 0), value=False).unsqueeze(2)
    asked_BTHD = torch.einsum("bthk,hkd->bthd", q_BTHK.to(w_k_AD.dtype), w_k_AD.unflatten(0, (H, K))) / K**0.5
    scores_BTHk = asked_BTHD @ found_BTkD.mT
    p_BTHk = scores_BTHk.masked_fill(hidden, torch.finfo(scores_BTHk.dtype).min).softmax(-1)
    o = torch.einsum("bthd,hkd->bthk", p_BTHk @ found_BTkD, w_v_AD.unflatten(0, (H, K)))
    return (o.flatten(2).to(dtype),)


def build(config: ModelConfig) -> Neurocache:
    """The module that ``config.memory`` describes (see `models.memory.protocol.build_memory`)."""
    own = config.memory.neurocache
    heads = (config.memory_heads, config.memory_key_dim)
    entry_dim = max(1, config.d_model // own.compression)
    cache = (own.cache_size, own.top_k, own.neighborhood, own.segment)
    return Neurocache(config.d_model, *heads, entry_dim, *cache, own.writer == "frozen")
