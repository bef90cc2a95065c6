"""Hierarchical Memory Transformer (arXiv 2405.06067): a query from the text just before, a recall over a cache of memory embeddings.

    q  = top at the last T of layers([T | the text before the segment | T])
    p  = softmax(q W_q (M W_k)' / sqrt(C)) M                M: the memories of earlier segments, the newest ``cache`` of them
    H  = layers([p | sensory | x_1 .. x_s | p])             sensory: the last tokens before the segment
    M' = M, RMSNorm(H at the last p)                        the oldest leaves when the cache is full

As published the query comes from the first half of the very segment whose tokens then see p, which shows them tokens that follow. Here it
comes from as many tokens before the segment. A document begins with one learned entry in the cache, and zeros where there is no text
before it. Left unspecified: positions (rotary, from the first place of each run), the norm of what is remembered. The optional loss that
supervises the recall is not built, nor are quantised or offloaded caches.

The top of one segment feeds the bottom of the next, so ranks cannot share a sequence.

Legend: B row, C channel, s tokens of the segment, h tokens that the query is made of, k sensory tokens, n entries of the cache,
t = max(h, k).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.feedforward import RMSNorm
from models.linear import linear
from models.memory.protocol import MemoryTraits, State
from models.memory.rmt import placed
from models.memory.stack import Backbone, StackMemory
from models.segments import padded

TRAITS = MemoryTraits(carry="stack", transition="nonlinear", read_at="segment_start", layouts=frozenset(), attach="stack")


class HierarchicalMemory(StackMemory):
    """State: ``cache`` [B, n, C], oldest first; ``filled`` [B, n], 1 where there is an entry; ``before`` [B, t, C], the text before."""

    traits = TRAITS

    def __init__(self, segment: int, summary: int, sensory: int, entries: int, d_model: int, norm_eps: float) -> None:
        super().__init__(segment, d_model)
        self.summary, self.sensory, self.entries = summary, sensory, entries
        self.initial = nn.Parameter(torch.empty(1, d_model))
        self.prompt = nn.Parameter(torch.empty(1, d_model))
        self.w_q = nn.Parameter(torch.empty(d_model, d_model))
        self.w_k = nn.Parameter(torch.empty(d_model, d_model))
        self.norm = RMSNorm(d_model, norm_eps)

    def begin(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """The learned entry alone."""
        empty = torch.zeros(rows, self.entries - 1, self.width, device=device, dtype=dtype)
        filled = torch.zeros(rows, self.entries, device=device, dtype=dtype)
        filled[:, -1] = 1
        return {
            "cache": torch.cat([empty, self.initial.to(device=device, dtype=dtype).expand(rows, 1, -1)], 1),
            "filled": filled,
            "before": torch.zeros(rows, max(self.summary, self.sensory), self.width, device=device, dtype=dtype),
        }

    def read(self, backbone: Backbone, x_BsC: Tensor, lengths: Sequence[int], state: State, cache: dict) -> tuple[Tensor, State]:
        """See `StackMemory.read`."""
        before_BtC, s, k = state["before"].to(x_BsC.dtype), x_BsC.shape[1], self.sensory
        p_B1C = self._recall(self._query(backbone, before_BtC, cache), state).to(x_BsC.dtype)
        sensory_BkC = before_BtC[:, before_BtC.shape[1] - k :]
        even = all(length == s for length in lengths)
        if even:
            around_BXC = torch.cat([p_B1C, sensory_BkC, x_BsC, p_B1C], 1)
        else:
            rows = zip(p_B1C, sensory_BkC, x_BsC, lengths, strict=True)
            around_BXC = padded([torch.cat([p, own, x[:length], p]) for p, own, x, length in rows], s + k + 2)
        out_BXC = backbone(around_BXC, *placed([length + k + 2 for length in lengths], s + k + 2, x_BsC.device, cache))
        if even:
            last_B1C = out_BXC[:, -1:]
        else:
            last_B1C = torch.stack([out[1 + k + length : 2 + k + length] for out, length in zip(out_BXC, lengths, strict=True)])
        with torch.autocast(x_BsC.device.type, enabled=False):  # the state is not rounded to bf16
            entry_B1C = self.norm(last_B1C).to(state["cache"].dtype)
        text_BTC = torch.cat([state["before"], x_BsC.to(state["before"].dtype)], 1)  # only whole segments have a next one
        after = {
            "cache": torch.cat([state["cache"][:, 1:], entry_B1C], 1),
            "filled": torch.cat([state["filled"][:, 1:], torch.ones_like(state["filled"][:, :1])], 1),
            "before": text_BTC[:, text_BTC.shape[1] - before_BtC.shape[1] :].clone(),  # not a view that keeps all of it
        }
        return out_BXC[:, 1 + k : 1 + k + s], after

    def _query(self, backbone: Backbone, before_BtC: Tensor, cache: dict) -> Tensor:
        """[B, 1, C]: the text before a segment in one vector."""
        prompt = self.prompt.to(before_BtC.dtype).expand(len(before_BtC), 1, -1)
        run_BXC = torch.cat([prompt, before_BtC[:, before_BtC.shape[1] - self.summary :], prompt], 1)
        width = self.summary + 2
        return backbone(run_BXC, *placed([width] * len(run_BXC), width, run_BXC.device, cache))[:, -1:]

    def _recall(self, q_B1C: Tensor, state: State) -> Tensor:
        """[B, 1, C]: entries of the cache, weighted by how well they fit the query."""
        cache_BnC = state["cache"]
        q, k = linear(q_B1C, self.w_q).to(cache_BnC.dtype), linear(cache_BnC, self.w_k).to(cache_BnC.dtype)
        with torch.autocast(q.device.type, enabled=False):
            scores_B1n = (q @ k.mT) / self.width**0.5
            weights_B1n = torch.softmax(scores_B1n.masked_fill(state["filled"].unsqueeze(1) == 0, -torch.inf), -1)
            return weights_B1n @ cache_BnC


def build(config: ModelConfig) -> HierarchicalMemory:
    """The memory that ``config.memory`` describes."""
    own = config.memory.hmt
    return HierarchicalMemory(own.segment, own.summary_tokens, own.sensory, own.cache, config.d_model, config.norm_eps)
