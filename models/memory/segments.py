"""Segments of a memory that is written once per segment: which tokens each has, in a token range and just before it.

Segments are counted from the start of a token's document, so that a document means the same wherever it was packed, and from global
index 0. A segment ends early where its document or the sequence does. A range that begins inside a segment makes it again from the tokens
before (a halo), so that its tokens see their segment whole; a segment's writing counts in the range in which it ends. Any split of a
sequence, by tiles, sequences or ranks, thus gives the same result. Plain integers on the host.

Legend: B row, N segments of the row with most, c tokens of a segment, T tokens of the range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.batch import Bounds, Range


@dataclass(frozen=True)
class Segments:
    """The segments of one range on one device. Where a row has fewer than N, the rest is filling: no tokens, nothing written."""

    before: int
    """Tokens before the range that its first segments need, over all rows."""
    lead: int
    """The first so many segments are whole ones before the range, there to be seen; empty in rows whose document begins later."""
    index_BNc: Tensor | None
    """Place of every token in [``before`` tokens | range]; None: they lie there in order, N x c of them, in every row."""
    real_BNc: Tensor
    """False for filling, which points at place 0."""
    at_BT: Tensor | None
    """Where a token of the range went, n c + place in the segment; None as for ``index_BNc``."""
    fresh_BN: Tensor
    """With this segment a document begins (other than at index 0): the memory starts anew."""
    whole_BN: Tensor
    """The segment ends in this range: what it writes counts."""
    start_BN: Tensor
    """Of a segment's first token in the sequence."""
    place_BN: Tensor
    """Of a segment's first token in its document: 0 for a document's first segment."""

    @property
    def n_segments(self) -> int:
        """Of the row with most."""
        return self.real_BNc.shape[1]

    def of_rows(self, first: int, end: int) -> Segments:
        """The same of rows [first, end)."""
        if (first, end) == (0, len(self.real_BNc)):
            return self
        rows = slice(first, end)
        return replace(
            self,
            index_BNc=None if self.index_BNc is None else self.index_BNc[rows],
            real_BNc=self.real_BNc[rows],
            at_BT=None if self.at_BT is None else self.at_BT[rows],
            fresh_BN=self.fresh_BN[rows],
            whole_BN=self.whole_BN[rows],
            start_BN=self.start_BN[rows],
            place_BN=self.place_BN[rows],
        )

    def deal(self, x_BTC: Tensor) -> Tensor:
        """[B, before + T, C] -> [B, N, c, C]."""
        B, N, c = self.real_BNc.shape
        if self.index_BNc is None:
            return x_BTC.unflatten(1, (N, c))
        return x_BTC.gather(1, self.index_BNc.view(B, N * c, 1).expand(-1, -1, x_BTC.shape[-1])).unflatten(1, (N, c))

    def collect(self, x_BNcC: Tensor) -> Tensor:
        """[B, N, c, C] -> [B, T, C], the tokens of the range."""
        if self.at_BT is None:
            return x_BNcC[:, self.lead :].flatten(1, 2)
        x_BnC = x_BNcC.flatten(1, 2)
        return x_BnC.gather(1, self.at_BT.unsqueeze(-1).expand(-1, -1, x_BnC.shape[-1]))


def plan_segments(bounds: Bounds, span: Range, size: int, device: torch.device, lead: int = 0) -> Segments:
    """The segments of ``size`` tokens of the global range ``span``, kept in ``bounds`` for all layers.

    ``lead``: how many whole segments of the same document before the first one are wanted too."""
    key = ("segments", span, size, device, lead)
    if key not in bounds._cache:
        bounds._cache[key] = _plan(bounds, span, size, device, lead)
    return bounds._cache[key]


def _plan(bounds: Bounds, span: Range, size: int, device: torch.device, lead: int) -> Segments:
    rows = [_of_row(np.asarray(documents), bounds.seq_len, span, size) for documents in bounds.documents]
    first, end = span
    lead = min(lead, max(int(start_n[0] - document_n[0]) // size for start_n, _, document_n in rows))
    rows = [_led(row, lead, size) for row in rows]
    before = max(int(first - start_n[start_n < stop_n][0]) for start_n, stop_n, _ in rows)
    B, N = len(rows), max(len(start_n) for start_n, _, _ in rows)
    start_BN, stop_BN, document_BN = (np.full((B, N), first - before, dtype=np.int64) for _ in range(3))
    for row, columns in enumerate(rows):
        for filled, values in zip((start_BN, stop_BN, document_BN), columns, strict=True):
            filled[row, : len(values)] = values
    index_BNc = start_BN[..., None] + np.arange(size)
    real_BNc = index_BNc < np.minimum(stop_BN, end)[..., None]
    index_BNc = np.where(real_BNc, index_BNc - (first - before), 0)
    in_order = bool(before == lead * size and before + end - first == N * size and real_BNc.all())
    at_BT = None
    if not in_order:
        at_BT = np.zeros((B, end - first), dtype=np.int64)
        for row in range(B):
            n_r, place_r = np.nonzero(real_BNc[row])
            local_r = index_BNc[row][n_r, place_r] - before
            at_BT[row, local_r[local_r >= 0]] = (n_r * size + place_r)[local_r >= 0]

    def there(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    used_BN = stop_BN > start_BN
    used_BN[:, :lead] = False
    return Segments(
        before=before,
        lead=lead,
        index_BNc=None if in_order else there(index_BNc),
        real_BNc=there(real_BNc),
        at_BT=None if at_BT is None else there(at_BT),
        fresh_BN=there(used_BN & (start_BN == document_BN) & (start_BN > 0)),
        whole_BN=there(used_BN & (stop_BN <= end)),
        start_BN=there(start_BN),
        place_BN=there(start_BN - document_BN),
    )


def _led(row: tuple[np.ndarray, np.ndarray, np.ndarray], lead: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row's segments with ``lead`` more in front; empty ones where the document of its first segment does not reach back so far."""
    start_n, stop_n, document_n = row
    ahead = start_n[0] - size * np.arange(lead, 0, -1)
    there = ahead >= document_n[0]
    starts, stops = np.where(there, ahead, start_n[0]), np.where(there, ahead + size, start_n[0])
    documents = np.full(lead, document_n[0])
    return np.concatenate([starts, start_n]), np.concatenate([stops, stop_n]), np.concatenate([documents, document_n])


def _of_row(start_D: np.ndarray, seq_len: int, span: Range, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, end and document start of every segment of a row that has a token in ``span``; ends may lie behind it."""
    first, end = span
    low, high = np.searchsorted(start_D, first, side="right") - 1, np.searchsorted(start_D, end, side="left")
    stop_D = np.append(start_D[1:], seq_len)
    starts, stops, documents = [], [], []
    for document, stop in zip(start_D[low:high].tolist(), stop_D[low:high].tolist(), strict=True):
        begin = document + (max(first - document, 0) // size) * size
        start_n = np.arange(begin, min(stop, end), size)
        starts.append(start_n)
        stops.append(np.minimum(start_n + size, stop))
        documents.append(np.full(len(start_n), document))
    return np.concatenate(starts), np.concatenate(stops), np.concatenate(documents)
