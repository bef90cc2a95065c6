"""Tokens that go to some of many memories, sorted into lanes: one after the other what each memory gets of each document.

    tokens, each with its ``k`` memories   --pack-->   chunks of c slots, each of one memory and one document   --combine-->   tokens

A lane begins with a chunk of its own and is filled up to whole chunks, so that no token's chunk, and not even its rounding, depends on
another document, and no later token moves an earlier one. There are as many chunks as lanes can need at most, whatever the routing:
memory is that of the tokens that are routed, no token is dropped and plans hold. Where a lane begins, the scan over chunks takes up
another state: this the host must know, once per tile.

Legend: B row, T token, k memories of a token, R all memories, L lane (document x memory), N chunk of tokens, n chunk of lanes, c place in
it, H head, D channel.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.batch import Bounds, Range
from models.repeat import repeated


@dataclass(frozen=True)
class Switches:
    """At which chunk bounds the scan of a row changes its state, in plain integers: ``starts[n]`` holds (row, memory) whose incoming state
    chunk n of the row begins with (memory None: zero), ``ends[n]`` the (row, memory) that chunk n - 1 leaves the last state of;
    ``passed`` those that get no token and hand on what comes in."""

    rows: int
    memories: int
    starts: dict[int, list[tuple[int, int | None]]] = field(default_factory=dict)
    ends: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    passed: list[tuple[int, int]] = field(default_factory=list)

    def _apart(self, x_GKW: Tensor, memories: bool = True) -> Tensor:
        return x_GKW.view(self.rows, *([self.memories] if memories else []), -1, *x_GKW.shape[1:])

    def scan(self, w_nGcK: Tensor, k_end_nGcK: Tensor, whole_nG11: Tensor, u_nGcW: Tensor, state_GKW: Tensor) -> tuple[Tensor, Tensor]:
        """`models.memory.delta_rule._scan` with changes of state: the state before every chunk, [n + 1], and the last of every memory."""
        n_chunks, G, _, K = w_nGcK.shape
        s = u_nGcW.new_empty(n_chunks + 1, G, K, u_nGcW.shape[-1])
        s[0] = 0
        state_BRHKW = self._apart(state_GKW)
        final = torch.zeros_like(state_GKW)
        final_BRHKW = self._apart(final)
        for row, memory in self.passed:
            final_BRHKW[row, memory] = state_BRHKW[row, memory]
        k_T = k_end_nGcK.mT
        for n in repeated(n_chunks, s):
            self._start(n, s, state_BRHKW)
            u_nGcW[n].baddbmm_(w_nGcK[n], s[n], alpha=-1)
            torch.mul(s[n], whole_nG11[n], out=s[n + 1])
            s[n + 1].baddbmm_(k_T[n], u_nGcW[n])
            for row, memory in self.ends.get(n + 1, ()):
                final_BRHKW[row, memory] = self._apart(s[n + 1], False)[row]
        return s, final

    def _start(self, n: int, s: Tensor, state_BRHKW: Tensor) -> None:
        for row, memory in self.starts.get(n, ()):
            before_HKW = self._apart(s[n], False)[row]
            before_HKW.copy_(state_BRHKW[row, memory]) if memory is not None else before_HKW.zero_()

    def scan_reverse(
        self, w_nGcK: Tensor, k_end_nGcK: Tensor, whole_nG11: Tensor, du_nGcW: Tensor, ds_read_nGKW: Tensor, dfinal_GKW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of the states that chunks leave, [n + 1] (the first is none), and of those that come in; completes dU in place."""
        dfinal_BRHKW = self._apart(dfinal_GKW.contiguous())
        dstate = torch.zeros_like(dfinal_GKW, memory_format=torch.contiguous_format)
        dstate_BRHKW = self._apart(dstate)
        for row, memory in self.passed:
            dstate_BRHKW[row, memory] = dfinal_BRHKW[row, memory]
        n_chunks = len(w_nGcK)
        ds = torch.cat([ds_read_nGKW, torch.zeros_like(ds_read_nGKW[:1])])
        w_T = w_nGcK.mT
        for turn in repeated(n_chunks, ds):
            n = n_chunks - 1 - turn
            self._leave(n + 1, ds, dstate_BRHKW)
            for row, memory in self.ends.get(n + 1, ()):
                self._apart(ds[n + 1], False)[row] = dfinal_BRHKW[row, memory]
            du_nGcW[n].baddbmm_(k_end_nGcK[n], ds[n + 1])
            ds[n].addcmul_(ds[n + 1], whole_nG11[n])
            ds[n].baddbmm_(w_T[n], du_nGcW[n], alpha=-1)
        self._leave(0, ds, dstate_BRHKW)
        return ds, dstate

    def _leave(self, n: int, ds: Tensor, dstate_BRHKW: Tensor) -> None:
        """What reaches a lane's first state goes to what came in, not to the chunk before."""
        for row, memory in self.starts.get(n, ()):
            before_HKW = self._apart(ds[n], False)[row]
            if memory is not None:
                dstate_BRHKW[row, memory] = before_HKW
            before_HKW.zero_()


@dataclass(frozen=True)
class _Documents:
    """Of one token range: where the documents of every row begin in it (the first at 0, which came in), and end, as tensors too."""

    edges: tuple[tuple[int, ...], ...]
    number_BT: Tensor
    begin_BT: Tensor
    edges_BE: Tensor


def _documents(bounds: Bounds, span: Range, device: torch.device) -> _Documents:
    key = ("lanes", span, device)
    if key not in bounds._cache:
        start, end = span
        edges = []
        for row in bounds.documents:
            inside = row[bisect_left(row, max(start, 1)) : bisect_left(row, end)]
            edges.append((0, *(s - start for s in inside), end - start))
        most = max(len(one) for one in edges)
        filled = torch.tensor([[*one, *[end - start] * (most - len(one))] for one in edges])
        marks_BT = torch.zeros(len(edges), end - start + 1, dtype=torch.int64)
        for row, one in enumerate(edges):
            marks_BT[row, list(one[1:-1])] += 1
        number_BT = marks_BT[:, :-1].cumsum(1)
        found = number_BT, filled.gather(1, number_BT), filled
        bounds._cache[key] = _Documents(tuple(edges), *(x.to(device) for x in found))
    return bounds._cache[key]


def chunks_needed(bounds: Bounds, span: Range, k: int, memories: int, chunk: int) -> int:
    """Chunks per row that lanes can need at most."""
    documents = max(len(row[bisect_left(row, max(span[0], 1)) : bisect_left(row, span[1])]) for row in bounds.documents) + 1
    tokens = span[1] - span[0]
    return (tokens * k + documents * memories * (chunk - 1)) // chunk


@dataclass(frozen=True)
class Lanes:
    """Where the tokens of one range are. Indices are those of head 0 in tensors [chunk, row, (memory,) head, place] laid out flat."""

    batch: int
    tokens: int
    heads: int
    memories: int
    chunk: int
    chunks: int
    slot_kNBc: Tensor
    """Of every token and memory it goes to, its slot; past the end where there is no token."""
    row_nBc: Tensor
    """Of every slot, its row in tensors of all memories; past the end where it is empty."""
    switches: Switches

    @property
    def n_slots(self) -> int:
        """Rows of a tensor of slots."""
        return self.chunks * self.batch * self.heads * self.chunk

    def slots(self, i: int) -> Tensor:
        """Rows of every token's slot for the ``i``-th of its memories, [N, B, H, c] flat."""
        return self._of_heads(self.slot_kNBc[i], self.n_slots)

    def rows(self, limit: int) -> Tensor:
        """Of every slot its row among all memories' tokens, [n, B, H, c] flat; ``limit`` where it is empty."""
        return self._of_heads(self.row_nBc, limit)

    def _of_heads(self, base: Tensor, limit: int) -> Tensor:
        heads = torch.arange(0, self.heads * self.chunk, self.chunk, device=base.device).view(-1, 1)
        return (base.unsqueeze(2) + heads).clamp_(max=limit).flatten()

    @property
    def empty_nGc(self) -> Tensor:
        """Which slots have no token."""
        limit = -(-self.tokens // self.chunk) * self.batch * self.memories * self.heads * self.chunk
        return (self.row_nBc >= limit).unsqueeze(2).expand(-1, -1, self.heads, -1).flatten(1, 2)


def plan_lanes(chosen_BTk: Tensor, bounds: Bounds, span: Range, heads: int, memories: int, chunk: int) -> Lanes:
    """The lanes of the tokens ``span``, which go to the memories ``chosen``. Waits for how many each memory gets."""
    B, T, k = chosen_BTk.shape
    documents, device = _documents(bounds, span, chosen_BTk.device), chosen_BTk.device
    n_documents = documents.edges_BE.shape[1] - 1
    goes_BTR = torch.zeros(B, T + 1, memories, dtype=torch.int32, device=device)
    goes_BTR[:, 1:].scatter_(2, chosen_BTk, 1)
    before_BTR = goes_BTR.cumsum(1, dtype=torch.int32)  # tokens of each memory before place t
    at_edges_BER = before_BTR.gather(1, documents.edges_BE.unsqueeze(-1).expand(-1, -1, memories))
    counts_BL = at_edges_BER.diff(dim=1).flatten(1).long()
    used_BL = (counts_BL + chunk - 1) // chunk
    first_BL = used_BL.cumsum(1) - used_BL
    lane_BTk = documents.number_BT.unsqueeze(-1) * memories + chosen_BTk
    begin_BTR = before_BTR.gather(1, documents.begin_BT.unsqueeze(-1).expand(-1, -1, memories))
    place_BTk = (before_BTR[:, :-1] - begin_BTR).gather(2, chosen_BTk).long()
    slot_BTk = first_BL.gather(1, lane_BTk.flatten(1)).view(B, T, k) * chunk + place_BTk
    n = chunks_needed(bounds, span, k, memories, chunk)
    switches = _switches(_on_host(counts_BL, documents, k, memories), documents, n_documents, memories, chunk)
    n_tokens = -(-T // chunk)
    row = torch.arange(B, device=device).view(-1, 1, 1)
    flat_BTk = ((slot_BTk // chunk) * B + row) * (heads * chunk) + slot_BTk % chunk
    slot_kNBc = torch.nn.functional.pad(flat_BTk, (0, 0, 0, n_tokens * chunk - T), value=n * B * heads * chunk)
    slot_kNBc = slot_kNBc.view(B, n_tokens, chunk, k).permute(3, 1, 0, 2).contiguous()
    place = torch.arange(T, device=device).view(1, -1, 1)
    own_BTk = (((place // chunk) * B + row) * memories + chosen_BTk) * (heads * chunk) + place % chunk
    row_Bs = own_BTk.new_full((B, n * chunk), n_tokens * B * memories * heads * chunk)
    row_Bs.scatter_(1, slot_BTk.flatten(1), own_BTk.flatten(1))
    row_nBc = row_Bs.view(B, n, chunk).transpose(0, 1).contiguous()
    return Lanes(B, T, heads, memories, chunk, n, slot_kNBc, row_nBc, switches)


def _on_host(counts_BL: Tensor, documents: _Documents, k: int, memories: int) -> list[list[int]]:
    if not isinstance(counts_BL, FakeTensor):
        return counts_BL.tolist()
    lengths = [[b - a for a, b in pairwise(edges)] for edges in documents.edges]
    filled = max(len(row) for row in lengths)
    return [[n * k // memories for n in [*row, *[0] * (filled - len(row))] for _ in range(memories)] for row in lengths]


def _switches(counts: list[list[int]], documents: _Documents, n_documents: int, memories: int, chunk: int) -> Switches:
    found = Switches(len(counts), memories)
    for row, lanes in enumerate(counts):
        n, last = 0, len(documents.edges[row]) - 2
        for lane, count in enumerate(lanes[: (last + 1) * memories]):
            document, memory = divmod(lane, memories)
            if count:
                found.starts.setdefault(n, []).append((row, memory if document == 0 else None))
                n += -(-count // chunk)
                if document == last:
                    found.ends.setdefault(n, []).append((row, memory))
            elif document == last == 0:
                found.passed.append((row, memory))
    return found


class _Spread(torch.autograd.Function):
    """What every token has once, [N, B*H, c, D], in all of its slots, [n, B*H, c, D]; 0 in empty ones."""

    @staticmethod
    def forward(ctx: Any, x_NGcD: Tensor, lanes: Lanes) -> Tensor:
        ctx.lanes = lanes
        D, flat = x_NGcD.shape[-1], x_NGcD.reshape(-1, x_NGcD.shape[-1])
        out = x_NGcD.new_zeros(lanes.n_slots + 1, D)
        for i in range(len(lanes.slot_kNBc)):
            out.index_copy_(0, lanes.slots(i), flat)
        return out[:-1].view(lanes.chunks, -1, lanes.chunk, D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _collected(grads[0], ctx.lanes, None), None


def _collected(x_nGcD: Tensor, lanes: Lanes, weight_kNBc: Tensor | None) -> Tensor:
    """[N, B*H, c, D]: of every token the (weighted) sum over its slots."""
    D, total = x_nGcD.shape[-1], None
    flat = torch.cat([x_nGcD.reshape(-1, D), x_nGcD.new_zeros(1, D)])
    for i in range(len(lanes.slot_kNBc)):
        one = flat.index_select(0, lanes.slots(i)).view(-1, lanes.batch, lanes.heads, lanes.chunk, D)
        if weight_kNBc is not None:
            one = one * weight_kNBc[i].unsqueeze(2).unsqueeze(-1)
        total = one if total is None else total.add_(one)
    assert total is not None
    return total.flatten(1, 2)


class _Picked(torch.autograd.Function):
    """What every token has for every memory, [N, B*R*H, c, D], in the slots, [n, B*H, c, D]; anything finite in empty ones."""

    @staticmethod
    def forward(ctx: Any, x_NAcD: Tensor, lanes: Lanes) -> Tensor:
        ctx.lanes, ctx.shape = lanes, x_NAcD.shape
        flat = x_NAcD.reshape(-1, x_NAcD.shape[-1])
        return flat.index_select(0, lanes.rows(len(flat) - 1)).view(lanes.chunks, -1, lanes.chunk, flat.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _put_back(grads[0], ctx.lanes, ctx.shape), None


def _put_back(x_nGcD: Tensor, lanes: Lanes, shape: torch.Size) -> Tensor:
    D, limit = shape[-1], shape.numel() // shape[-1]
    out = x_nGcD.new_zeros(limit + 1, D)
    out.index_copy_(0, lanes.rows(limit), x_nGcD.reshape(-1, D))
    return out[:-1].view(shape)


class _Returned(torch.autograd.Function):
    """The way back of `_Picked`: zeros where a token does not go."""

    @staticmethod
    def forward(ctx: Any, x_nGcD: Tensor, lanes: Lanes) -> Tensor:
        ctx.lanes = lanes
        N = lanes.slot_kNBc.shape[1]
        return _put_back(x_nGcD, lanes, torch.Size((N, lanes.batch * lanes.memories * lanes.heads, lanes.chunk, x_nGcD.shape[-1])))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        lanes, D = ctx.lanes, grads[0].shape[-1]
        flat = grads[0].reshape(-1, D)
        picked = flat.index_select(0, lanes.rows(len(flat) - 1)).view(lanes.chunks, -1, lanes.chunk, D)
        return picked.masked_fill_(lanes.empty_nGc.unsqueeze(-1), 0), None


class _Combined(torch.autograd.Function):
    """Of every token the weighted sum of what its slots hold. Keeps both."""

    @staticmethod
    def forward(ctx: Any, x_nGcD: Tensor, weight_kNBc: Tensor, lanes: Lanes) -> Tensor:
        ctx.lanes = lanes
        ctx.save_for_backward(x_nGcD, weight_kNBc)
        return _collected(x_nGcD, lanes, weight_kNBc)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x_nGcD, weight_kNBc), lanes = ctx.saved_tensors, ctx.lanes
        D = x_nGcD.shape[-1]
        dy = grads[0].reshape(-1, lanes.batch, lanes.heads, lanes.chunk, D)
        flat, dweight_kNBc = x_nGcD.reshape(-1, D), torch.empty_like(weight_kNBc)
        dx = x_nGcD.new_zeros(lanes.n_slots + 1, D)
        for i, weight_NBc in enumerate(weight_kNBc):
            rows = lanes.slots(i)
            held = flat.index_select(0, rows.clamp(max=lanes.n_slots - 1)).view_as(dy)
            dweight_kNBc[i] = (held * dy).sum((2, 4))
            dx.index_copy_(0, rows, (dy * weight_NBc.unsqueeze(2).unsqueeze(-1)).view(-1, D))
        return dx[:-1].view_as(x_nGcD), dweight_kNBc, None


def spread(x_NGcD: Tensor, lanes: Lanes) -> Tensor:
    """See `_Spread`."""
    return _Spread.apply(x_NGcD, lanes)  # type: ignore[return-value]


def picked(x_NAcD: Tensor, lanes: Lanes) -> Tensor:
    """See `_Picked`."""
    return _Picked.apply(x_NAcD, lanes)  # type: ignore[return-value]


def returned(x_nGcD: Tensor, lanes: Lanes) -> Tensor:
    """See `_Returned`."""
    return _Returned.apply(x_nGcD, lanes)  # type: ignore[return-value]


def combined(x_nGcD: Tensor, weight_kNBc: Tensor, lanes: Lanes) -> Tensor:
    """See `_Combined`. ``weight`` is 0 where there is no token."""
    return _Combined.apply(x_nGcD, weight_kNBc, lanes)  # type: ignore[return-value]
