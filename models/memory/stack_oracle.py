"""Memories around the stack by their definition: one row, one document, one segment after another, every score written out. For tests.

Legend: T token, s tokens of a segment, X places of a segment, C channel, H head, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.batch import Bounds
from models.memory.protocol import State
from models.memory.stack import COUNT, PENDING, StackMemory

ReadRow = Callable[[Tensor, State], tuple[Tensor, State]]
"""(x_sC, state of the row) -> (the stream after all layers at these tokens, the state if the segment ends here)"""


def by_segments(memory: StackMemory, read: ReadRow, x_BTC: Tensor, state: State | None, bounds: Bounds) -> tuple[Tensor, State]:
    """Every row by itself, its tokens cut at the starts of documents and then every ``memory.size`` tokens."""
    ((first, last),) = bounds.ranges
    state = memory.init_state(len(x_BTC), x_BTC.device, x_BTC.dtype) if state is None else state
    outputs, ends = [], []
    for b, x_TC in enumerate(x_BTC):
        row = {name: value[b] for name, value in state.items() if name not in (PENDING, COUNT)}
        waiting = state[PENDING][b, : int(state[COUNT][b])]
        found = []
        edges = [first, *(start for start in bounds.documents[b] if first < start < last), last]
        for start, end in pairwise(edges):
            if start > 0 and start in bounds.documents[b]:
                row = {name: value[0] for name, value in memory.begin(1, x_TC.device, x_TC.dtype).items()}
                waiting = waiting[:0]
            skip, text = len(waiting), torch.cat([waiting, x_TC[start - first : end - first]])
            for segment in text.split(memory.size):
                y_sC, after = read(segment, row)
                found.append(y_sC[skip:])
                waiting, row = (segment, row) if len(segment) < memory.size else (segment[:0], after)
                skip = 0
        outputs.append(torch.cat(found))
        rest = x_TC.new_zeros(memory.size - len(waiting), x_TC.shape[1])
        ends.append({**row, PENDING: torch.cat([waiting, rest]), COUNT: torch.tensor(len(waiting))})
    return torch.stack(outputs), {name: torch.stack([end[name] for end in ends]) for name in ends[0]}


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """x / rms(x) * weight"""
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight  # type: ignore[operator]


def rotated(x_XHD: Tensor, frequencies: list[float]) -> Tensor:
    """Pairs (i, i + D/2) as complex numbers, turned by place times frequency."""
    first, second = x_XHD.chunk(2, -1)
    angle = torch.arange(len(x_XHD), dtype=x_XHD.dtype)[:, None] * torch.tensor(frequencies, dtype=x_XHD.dtype)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def attended(attention: nn.Module, x_XC: Tensor) -> Tensor:
    """Causal attention with rotary positions, a window and shared keys, score by score."""
    q, k, v = ((x_XC @ w.weight.t()).unflatten(-1, (-1, attention.head_dim)) for w in (attention.wq, attention.wk, attention.wv))  # type: ignore[union-attr]
    q, k = (rotated(z, attention.rope.frequencies) for z in (q, k))  # type: ignore[union-attr]
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
    distance = torch.arange(len(x_XC))[:, None] - torch.arange(len(x_XC))
    hidden = (distance < 0) | (distance >= (attention.window or len(x_XC)))  # type: ignore[operator]
    scores = torch.einsum("qhd,khd->hqk", q, k) / attention.head_dim**0.5  # type: ignore[operator]
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ attention.wo.weight.t()  # type: ignore[union-attr]


def layer(block: nn.Module, x_XC: Tensor) -> Tensor:
    """One decoder layer."""
    x_XC = x_XC + attended(block.mixer, normed(x_XC, block.norm1))  # type: ignore[arg-type]
    h, ffn = normed(x_XC, block.norm2), block.ffn  # type: ignore[arg-type]
    gate, up = h @ ffn.w_gate.weight.t(), h @ ffn.w_up.weight.t()  # type: ignore[union-attr]
    return x_XC + (gate * torch.sigmoid(gate) * up) @ ffn.w_down.weight.t()  # type: ignore[union-attr]


def read_rmt(memory: StackMemory, blocks: nn.ModuleList) -> ReadRow:
    """Of a Recurrent Memory Transformer."""

    def read(x_sC: Tensor, state: State) -> tuple[Tensor, State]:
        own, m = state["memory"], memory.tokens
        h = torch.cat([own, x_sC, own])  # type: ignore[list-item]
        for block in blocks:
            h = layer(block, h)
        return h[m:-m], {"memory": normed(h[-m:], memory.norm)}  # type: ignore[arg-type, index, operator]

    return read


def read_armt(memory: StackMemory, blocks: nn.ModuleList) -> ReadRow:
    """Of an Associative Recurrent Memory Transformer, place by place."""

    def phi(x_k: Tensor, features: int) -> Tensor:
        r = torch.cat([x_k, -x_k]).clamp(min=0) / x_k.norm()
        n = len(r)
        return torch.stack([r[i] * r[(i - shift) % n] for shift in range(1, features + 1) for i in range(n)])

    def read(x_sC: Tensor, state: State) -> tuple[Tensor, State]:
        h, after = torch.cat([x_sC, memory.initial]), {}  # type: ignore[list-item]
        for i, (block, own) in enumerate(zip(blocks, memory.layers, strict=True)):  # type: ignore[arg-type]
            w, z, n = state[f"w{i}"], state[f"z{i}"], own.features
            places = []
            for place in h:
                f = phi(own.w_q @ place, n)
                places.append(place + f @ w / (f @ z + 1e-5))
            h = layer(block, torch.stack(places))
            new_w, new_z = w, z
            for place in h[len(x_sC) :]:
                t = place / (place.square().mean() + own.norm_eps).sqrt() * own.norm
                f = phi(own.w_k @ t, n)
                error = own.w_v @ t - f @ w / (f @ z + 1e-5)
                new_w = new_w + torch.outer(f, torch.sigmoid(own.w_beta @ t) * error)
                new_z = new_z + (1 - f @ z / (f @ f + 1e-5)).clamp(0, 1).detach() * f
            after |= {f"w{i}": new_w, f"z{i}": new_z}
        return h[: len(x_sC)], after

    return read


def read_hmt(memory: StackMemory, blocks: nn.ModuleList) -> ReadRow:
    """Of a Hierarchical Memory Transformer, its cache entry by entry."""

    def run(*parts: Tensor) -> Tensor:
        h = torch.cat(parts)
        for block in blocks:
            h = layer(block, h)
        return h

    def read(x_sC: Tensor, state: State) -> tuple[Tensor, State]:
        before, k = state["before"], memory.sensory
        prompt = memory.prompt
        query = memory.w_q @ run(prompt, before[len(before) - memory.summary :], prompt)[-1]  # type: ignore[arg-type, operator]
        entries = [entry for entry, there in zip(state["cache"], state["filled"], strict=True) if there]
        scores = torch.stack([query @ (memory.w_k @ entry) / len(query) ** 0.5 for entry in entries])  # type: ignore[operator]
        p = sum(weight * entry for weight, entry in zip(scores.softmax(0), entries, strict=True))[None]  # type: ignore[index]
        h = run(p, before[len(before) - k :], x_sC, p)  # type: ignore[operator]
        entry = normed(h[-1:], memory.norm)  # type: ignore[arg-type]
        full, one = torch.cat([state["cache"], entry])[1:], torch.ones_like(state["filled"][:1])
        after = {"cache": full, "filled": torch.cat([state["filled"], one])[1:], "before": torch.cat([before, x_sC])[-len(before) :]}
        return h[1 + k : -1], after  # type: ignore[operator]

    return read


ORACLES: dict[str, Callable[[StackMemory, nn.ModuleList], ReadRow]] = {
    "RecurrentMemory": read_rmt,
    "AssociativeMemory": read_armt,
    "HierarchicalMemory": read_hmt,
}
"""By class of the memory."""
