"""Segments of a memory that is read as context: which tokens each has, which of them this rank works on, where a convolution reads on.

A range that begins inside a segment takes it from its first token on (from the inputs before), since a segment's tokens attend to each
other; what a segment writes counts in the range in which it ends. Over ranks every segment is sliced as chunks are
(`models/memory/chunk_plan.py`). Plain integers on the host, the same on every rank.

Legend: P ranks, N segments of the longest stream, S streams, p tokens of one rank per segment, k keys of a segment, n tokens of a
convolution's halo, G memories.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.batch import Bounds, Range
from models.memory.chunk_plan import Chunks, Share, plan_chunks
from models.memory.chunk_scan import Turns, turns_of
from models.memory.dealing import share_in
from models.memory.protocol import Carry


@dataclass(frozen=True)
class Segment:
    """One segment of every stream, as this rank sees it."""

    turns: Turns
    share: Share
    own_Sp: Tensor
    """The place of this rank's tokens in their segment, its size for empty slots; on one rank one row for all streams."""
    seen_Sk: Tensor
    """As ``own``, of all ranks' keys: rank by rank those of what the memory had, then those of the tokens."""
    tail_Sn: Tensor | None
    """Slots of this rank's last n tokens, -1 where it has fewer."""
    halo_Sn: Tensor | None
    """Of the n tokens before this rank's: their places among all ranks' tails [P * n], -1 where the segment begins."""
    unfinished_G: Tensor | None
    """The segment goes on behind the range: what it writes does not count. None: nowhere."""


@dataclass(frozen=True)
class Segments:
    """All segments of a range."""

    before: int
    """Tokens before the range that its first segments need, over all rows."""
    chunks: Chunks
    share: Share
    tail_NSn: Tensor | None
    halo_NSn: Tensor | None
    steps: tuple[Segment, ...]


def plan_context(
    bounds: Bounds, span: Range, segment: int, reset_every: int, n_heads: int, halo: int, carry: Carry, device: torch.device
) -> Segments:
    """The segments of ``span``, kept in ``bounds`` for all layers."""
    rank, held = carry.holders(bounds)
    key = ("context", span, segment, reset_every, n_heads, halo, tuple(held), rank, device)
    if key not in bounds._cache:
        bounds._cache[key] = _plan(bounds, span, segment, reset_every, n_heads, halo, carry, device)
    return bounds._cache[key]


def _plan(
    bounds: Bounds, span: Range, segment: int, reset_every: int, n_heads: int, halo: int, carry: Carry, device: torch.device
) -> Segments:
    chunks = plan_chunks(bounds, span, segment, reset_every, from_start=True)
    share = share_in(carry, bounds.with_ranges((chunks.span,)) if carry.local else bounds, chunks, device)
    turns = turns_of(chunks, n_heads, device)
    length_NS = np.zeros((chunks.n_steps, chunks.n_streams), dtype=np.int64)
    length_NS[chunks.step_c, chunks.stream_c] = chunks.length_c
    tail_NSn = halo_NSn = None
    place_PNSp = np.broadcast_to(np.arange(share.shape[2]), (1, chunks.n_steps, 1, share.shape[2]))
    if carry.ranks > 1:
        low_PNS = length_NS * np.arange(carry.ranks + 1)[:, None, None] // carry.ranks
        place_PNSp = _places(low_PNS, share.shape[2], segment)
        tail, before = _tails(low_PNS, share.rank, halo)
        tail_NSn, halo_NSn = torch.tensor(tail).to(device), torch.tensor(before).to(device)
    own_NSp = torch.tensor(place_PNSp[share.rank]).to(device)
    seen_NSk = torch.tensor(np.concatenate([place_PNSp, place_PNSp], -1)).to(device).permute(1, 2, 0, 3).flatten(2)
    goes_on_S = _goes_on(bounds, span, segment, chunks)
    steps = []
    for n in range(chunks.n_steps):
        cut_S = goes_on_S & (chunks.last_S == n)
        steps.append(
            Segment(
                turns.part(n, n + 1),
                replace(share, mask_NSp=share.mask_NSp[n : n + 1], first_NSp=share.first_NSp[n : n + 1]),
                own_NSp[n],
                seen_NSk[n],
                None if tail_NSn is None else tail_NSn[n],
                None if halo_NSn is None else halo_NSn[n],
                torch.tensor(cut_S).to(device).repeat_interleave(n_heads) if cut_S.any() else None,
            )
        )
    return Segments(span[0] - chunks.span[0], chunks, share, tail_NSn, halo_NSn, tuple(steps))


def _goes_on(bounds: Bounds, span: Range, segment: int, chunks: Chunks) -> np.ndarray:
    """Streams whose last segment ends neither with its tokens nor with its document or the sequence, but with the range."""
    goes_on_S = np.zeros(chunks.n_streams, dtype=bool)
    for stream, row in zip(chunks.last_stream_B, range(chunks.n_rows), strict=True):
        of_stream = (chunks.stream_c == stream) & (chunks.step_c == chunks.last_S[stream])
        length, end = int(chunks.length_c[of_stream][0]), span[1]
        ends = end == bounds.seq_len or end in bounds.documents[row]
        goes_on_S[stream] = not ends and length < segment
    return goes_on_S


def _places(low_PNS: np.ndarray, width: int, segment: int) -> np.ndarray:
    """[P, N, S, p]: the place of every rank's tokens in their segment."""
    place = low_PNS[:-1, ..., None] + np.arange(width)
    return np.where(place < low_PNS[1:, ..., None], place, segment)


def _tails(low_PNS: np.ndarray, rank: int, halo: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots of this rank's last tokens, and where among all ranks' last tokens those before its first one are; [N, S, n] each."""
    back_n = np.arange(halo, 0, -1)
    count_NS = low_PNS[rank + 1] - low_PNS[rank]
    tail_NSn = np.maximum(count_NS[..., None] - back_n, -1)
    place_NSn = low_PNS[rank][..., None] - back_n
    owner_NSn = (low_PNS[1:, ..., None] <= place_NSn).sum(0)
    end_NSn = np.take_along_axis(np.moveaxis(low_PNS, 0, -1), owner_NSn + 1, axis=-1)
    halo_NSn = owner_NSn * halo + halo - (end_NSn - place_NSn)
    return tail_NSn, np.where(place_NSn < 0, -1, halo_NSn)


def picked(x_pC: Tensor, index_n: Tensor) -> Tensor:
    """[..., n, C]: rows of x [..., p, C] by ``index`` [..., n], zeros where it is -1."""
    missing = (index_n < 0).unsqueeze(-1)
    index = index_n.clamp(min=0).unsqueeze(-1).expand(*index_n.shape, x_pC.shape[-1])
    return x_pC.gather(-2, index).masked_fill(missing, 0)
