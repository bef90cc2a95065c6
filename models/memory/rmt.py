"""Recurrent Memory Transformer (arXiv 2207.06881): memory tokens around every segment, read at its start and written at its end.

    H = layers([M | x_1 .. x_s | M])        causal: tokens see the first M, the last M sees everything
    y = H at x,  M' = RMSNorm(H at the last M)

The top of one segment feeds the bottom of the next, so ranks cannot share a sequence. Left unspecified by the paper: positions (here
rotary ones counted from the segment's first memory token) and the norm, which its GPT-2 has behind the last layer; without one the
residual stream would feed itself, and grow with every segment.

Legend: B row, C channel, m memory tokens, s tokens of the segment, X = m + s + m.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.batch import Bounds
from models.config import ModelConfig
from models.feedforward import RMSNorm
from models.memory.protocol import MemoryTraits, State
from models.memory.stack import Backbone, StackMemory
from models.segments import padded

TRAITS = MemoryTraits(carry="stack", transition="nonlinear", read_at="segment_start", layouts=frozenset(), attach="stack")


class RecurrentMemory(StackMemory):
    """The memory tokens of an RMT. State: ``memory`` [B, m, C]."""

    traits = TRAITS

    def __init__(self, segment: int, tokens: int, d_model: int, norm_eps: float) -> None:
        super().__init__(segment, d_model)
        self.tokens = tokens
        self.initial = nn.Parameter(torch.empty(tokens, d_model))
        self.norm = RMSNorm(d_model, norm_eps)

    def begin(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """The learned memory."""
        return {"memory": self.initial.to(device=device, dtype=dtype).repeat(rows, 1, 1)}

    def read(self, backbone: Backbone, x_BsC: Tensor, lengths: Sequence[int], state: State, cache: dict) -> tuple[Tensor, State]:
        """See `StackMemory.read`."""
        memory_BmC, m, s = state["memory"].to(x_BsC.dtype), self.tokens, x_BsC.shape[1]
        even = all(length == s for length in lengths)
        if even:
            around_BXC = torch.cat([memory_BmC, x_BsC, memory_BmC], 1)
        else:
            rows = zip(memory_BmC, x_BsC, lengths, strict=True)
            around_BXC = padded([torch.cat([own, x[:length], own]) for own, x, length in rows], s + 2 * m)
        out_BXC = backbone(around_BXC, *placed([length + 2 * m for length in lengths], s + 2 * m, x_BsC.device, cache))
        if even:
            last_BmC = out_BXC[:, m + s :]
        else:
            last_BmC = torch.stack([out[m + length : 2 * m + length] for out, length in zip(out_BXC, lengths, strict=True)])
        with torch.autocast(x_BsC.device.type, enabled=False):  # the state is not rounded to bf16
            written_BmC = self.norm(last_BmC).to(state["memory"].dtype)
        return out_BXC[:, m : m + s], {"memory": written_BmC}


def placed(used: Sequence[int], width: int, device: torch.device, cache: dict) -> tuple[Tensor, Bounds]:
    """Positions and bounds of a segment of which row b uses ``used[b]`` of ``width`` places; what follows is a document of its own."""
    key = (tuple(used), width, device)
    if key not in cache:
        documents = tuple((0,) if n == width else (0, n) for n in used)
        positions = torch.arange(width, device=device).expand(len(used), -1)
        cache[key] = positions, Bounds(width, ((0, width),), documents)
    return cache[key]


def build(config: ModelConfig) -> RecurrentMemory:
    """The memory that ``config.memory`` describes."""
    own = config.memory.rmt
    return RecurrentMemory(own.segment, own.tokens, config.d_model, config.norm_eps)
