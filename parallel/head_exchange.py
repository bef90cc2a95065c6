"""All-to-alls that turn a few tokens of all heads into all tokens of a few heads, and back.

Before: a rank holds its own tokens (``parallel/sequence.py``) of every head. After: it holds the tokens of the whole group, in global
order, of its own heads (``parallel/head_plan.py``). Several tensors share one message. Messages are token after token, so that in the
contiguous layout what arrives is used where it lies. Not differentiable by autograd (parallel/ulysses.py is).

Every rank of the group must make the same exchanges in the same order.

Legend: B batch row, H heads of the model, h heads of one rank, n tokens of one rank, T tokens of the group, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.head_plan import Range
from parallel.sequence import Layout, ranges_for


@dataclass(frozen=True)
class Piece:
    """One tensor of a message. On the way to heads: ``parts`` is one x_BHnD, ``heads`` what of its heads each rank gets. On the way back:
    ``parts`` together are this rank's heads, x_BhTD, and ``heads`` what each rank holds of them. ``dtype``: in which it travels to heads;
    None: its own, in which it arrives anyway."""

    parts: Sequence[torch.Tensor]
    heads: Sequence[Range]
    dtype: torch.dtype | None = None

    @property
    def travels(self) -> torch.dtype:
        """The dtype on the way."""
        return self.dtype or self.parts[0].dtype


@dataclass
class ToHeads:
    """A message on its way; ``wait`` gives every piece as [B, h, T, D] in global order (views of one buffer, of which those that travel
    in another dtype have their own)."""

    exchange: HeadExchange
    sent: torch.Tensor | None
    """Held until it has gone."""
    arriving_TBhD: torch.Tensor | None
    heads: list[int]
    work: dist.Work | None
    dtype: torch.dtype
    """Of what ``wait`` gives."""
    rest: ToHeads | None = None
    """The pieces after these, in a message of another dtype."""

    def wait(self) -> list[torch.Tensor]:
        """The pieces; once."""
        if self.work is not None:
            self.work.wait()
        self.sent = self.work = None
        assert self.arriving_TBhD is not None
        x_TBhD = self.exchange.in_global_order(self.arriving_TBhD, self.dtype)
        self.arriving_TBhD = None
        pieces = [piece.permute(1, 2, 0, 3) for piece in x_TBhD.split(self.heads, dim=2)]
        return pieces if self.rest is None else [*pieces, *self.rest.wait()]


@dataclass
class ToTokens:
    """A message on its way back; ``wait`` gives for every piece the ranks it comes from, their heads and values for this rank's tokens."""

    sent: torch.Tensor | None
    arriving: torch.Tensor
    heads: list[Sequence[Range]]
    """Of every piece, by rank."""
    shape: tuple[int, int, int]
    work: dist.Work | None

    def wait(self) -> list[list[tuple[int, Range, torch.Tensor]]]:
        """By piece: (rank, heads, values_BhnD) from every rank that has some."""
        if self.work is not None:
            self.work.wait()
        self.sent = self.work = None
        n, rows, dim = self.shape
        found: list[list[tuple[int, Range, torch.Tensor]]] = [[] for _ in self.heads]
        counts = [sum(_len(heads[rank]) for heads in self.heads) for rank in range(len(self.heads[0]))]
        for rank, block in enumerate(self.arriving.split([count * n * rows * dim for count in counts])):
            x_nBhD, first = block.view(n, rows, counts[rank], dim), 0
            for i, by_rank in enumerate(self.heads):
                heads = by_rank[rank]
                if _len(heads):
                    found[i].append((rank, heads, x_nBhD[:, :, first : first + _len(heads)].permute(1, 2, 0, 3)))
                first += _len(heads)
        return found


class HeadExchange:
    """The exchanges of one group, whose ranks share T tokens in ``layout``."""

    def __init__(self, group: dist.ProcessGroup, layout: Layout) -> None:
        self.group = group
        self.layout: Layout = layout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def start_to_heads(self, pieces: Sequence[Piece]) -> ToHeads:
        """Send every rank its heads of this rank's tokens, of all ``pieces`` in one message; of pieces that travel in several dtypes,
        those that come one after the other in the same one."""
        like, travels = pieces[0].parts[0], pieces[0].travels
        alike = next((i for i, piece in enumerate(pieces) if piece.travels != travels), len(pieces))
        pieces, others = pieces[:alike], pieces[alike:]
        rows, _, n, dim = like.shape
        counts = [sum(_len(piece.heads[rank]) for piece in pieces) for rank in range(self.size)]
        sizes = [count * n * rows * dim for count in counts]
        message = like.new_empty(sum(sizes), dtype=travels)
        for rank, block in enumerate(message.split(sizes)):
            x_nBhD, first = block.view(n, rows, counts[rank], dim), 0
            for piece in pieces:
                low, high = piece.heads[rank]
                x_nBhD[:, :, first : first + high - low].copy_(piece.parts[0].permute(2, 0, 1, 3)[:, :, low:high])
                first += high - low
        mine = counts[self.rank]
        arriving_TBhD = like.new_empty(self.size * n, rows, mine, dim, dtype=travels)
        work = dist.all_to_all_single(
            arriving_TBhD.view(-1), message, [mine * n * rows * dim] * self.size, sizes, group=self.group, async_op=True
        )
        rest = self.start_to_heads(others) if others else None
        return ToHeads(self, message, arriving_TBhD, [_len(piece.heads[self.rank]) for piece in pieces], work, like.dtype, rest)

    def start_to_tokens(self, pieces: Sequence[Piece], n: int) -> ToTokens:
        """Send every rank its ``n`` tokens of this rank's heads, of all ``pieces`` in one message."""
        like = pieces[0].parts[0]
        rows, _, _, dim = like.shape
        message = self._by_rank(pieces)
        counts = [sum(_len(piece.heads[rank]) for piece in pieces) for rank in range(self.size)]
        sizes = [count * n * rows * dim for count in counts]
        arriving = like.new_empty(sum(sizes))
        work = dist.all_to_all_single(
            arriving, message, sizes, [counts[self.rank] * n * rows * dim] * self.size, group=self.group, async_op=True
        )
        return ToTokens(message, arriving, [piece.heads for piece in pieces], (n, rows, dim), work)

    def in_global_order(self, x_TBhD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Tokens that lie rank after rank, in the order of the sequence and in ``dtype``; a copy unless they are so already."""
        if self.layout == "contiguous":
            return x_TBhD.to(dtype)
        ordered = torch.empty_like(x_TBhD, dtype=dtype)
        for here, (start, end) in self._places(len(x_TBhD)):
            ordered[start:end].copy_(x_TBhD[here : here + end - start])
        return ordered

    def by_rank(self, x_TBhD: torch.Tensor) -> torch.Tensor:
        """The inverse of ``in_global_order``."""
        if self.layout == "contiguous":
            return x_TBhD
        ordered = torch.empty_like(x_TBhD)
        for here, (start, end) in self._places(len(x_TBhD)):
            ordered[here : here + end - start].copy_(x_TBhD[start:end])
        return ordered

    def _by_rank(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """One flat message: tokens rank after rank, of each token the heads of all parts."""
        parts = [part.permute(2, 0, 1, 3) for piece in pieces for part in piece.parts]
        if len(parts) == 1:
            return self.by_rank(parts[0]).contiguous().view(-1)
        tokens, rows, _, dim = parts[0].shape
        message = parts[0].new_empty(tokens, rows, sum(part.shape[2] for part in parts), dim)
        for here, (start, end) in self._places(tokens):
            first = 0
            for part in parts:
                message[here : here + end - start, :, first : first + part.shape[2]].copy_(part[start:end])
                first += part.shape[2]
        return message.view(-1)

    def _places(self, tokens: int) -> list[tuple[int, Range]]:
        """(start rank after rank, range in the order of the sequence) of every stretch of tokens."""
        if self.layout == "contiguous":
            return [(0, (0, tokens))]
        found, here = [], 0
        for rank in range(self.size):
            for start, end in ranges_for(self.layout, tokens, rank, self.size):
                found.append((here, (start, end)))
                here += end - start
        return found


def _len(heads: Range) -> int:
    return heads[1] - heads[0]
