"""Storage of a float tensor as codes of few bits and one scale for each block: which elements share a block, how parts are laid out, and
the loop that encodes and decodes in pieces that stay in a core's cache. What a code means is the business of a format (``codec_int8``,
``codec_dynamic``, ``codec_int4``).

A row is everything behind dim 0, flattened. Blocks lie inside a row, the last one is short: rows know nothing of each other, so the
parts of some rows are those rows of the parts, wherever a mesh cuts. Formats use only operations that IEEE 754 rounds one way
(multiply, divide, root, round, maximum), so the bits do not depend on the piece an element is in.

Legend: R rows, C columns of a row, N blocks in a piece of a row, B elements of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optim.pieces import piece_elements, row_chunks

TINY = torch.finfo(torch.float32).tiny
"""Least divisor: a block of zeros, or of numbers near float32's least, is divided by it and not by its own scale."""


class Format(Protocol):
    """What codes and scales mean. All tensors are views [R, N, ...]; ``scratch`` are two float32 tensors [R, N, B] to write over."""

    @property
    def scales(self) -> tuple[str, ...]:
        """Names of the parts that hold one float32 per block."""
        ...

    @property
    def codes_dtype(self) -> torch.dtype: ...

    @property
    def per_byte(self) -> int:
        """Codes in one element of the part ``codes``."""
        ...

    def encode_(self, value_RNB: Tensor, codes: Tensor, scales: list[Tensor], scratch: list[Tensor]) -> None:
        """Write the codes [R, N, B / per_byte, rounded up] and scales [R, N] of ``value_RNB``."""
        ...

    def decode_(self, codes: Tensor, scales: list[Tensor], out_RNB: Tensor, scratch: list[Tensor]) -> None:
        """The numbers of the codes, into ``out_RNB``."""
        ...


@dataclass(frozen=True)
class BlockCodec:
    """A format in blocks of ``block`` elements of a row (an even number); part ``codes`` and one part for each of the format's scales."""

    name: str
    format: Format
    block: int

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of the stored tensors of a tensor of ``shape``, global or local, of at least one dim."""
        rows, columns = _matrix(shape)
        codes = ((rows, -(-columns // self.format.per_byte)), self.format.codes_dtype)
        return {"codes": codes} | dict.fromkeys(self.format.scales, ((rows, -(-columns // self.block)), torch.float32))

    def bytes(self, shape: tuple[int, ...]) -> int:
        """That the parts take."""
        return part_bytes(self.parts(shape))

    def encode_(self, value: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Write ``value`` (float32, left as it is) into ``parts``."""
        matrix_RC = value.flatten(1) if value.dim() > 1 else value.unsqueeze(1)
        for piece in self._pieces(value.shape, value.device):
            codes, scales, scratch = piece.views(parts)
            self.format.encode_(piece.blocks(matrix_RC), codes, scales, scratch)

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], out: Tensor | None = None) -> Tensor:
        """The stored tensor of ``shape`` as float32; written into ``out`` (contiguous) where given."""
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device=parts["codes"].device)
        matrix_RC = out.view(_matrix(shape))  # raises where out is not contiguous: a copy would be written instead
        for piece in self._pieces(shape, out.device):
            codes, scales, scratch = piece.views(parts)
            self.format.decode_(codes, scales, piece.blocks(matrix_RC), scratch)
        return out

    def _pieces(self, shape: tuple[int, ...], device: torch.device) -> Iterator[_Piece]:
        rows, columns = _matrix(shape)
        limit = max(piece_elements(device), self.block)
        scratch = [torch.empty(min(limit, rows * columns), dtype=torch.float32, device=device) for _ in range(2)]
        whole = columns - columns % self.block
        for start, stop, width in ((0, whole, self.block), (whole, columns, columns - whole)):
            step = max(width, limit // max(width, 1) * width)
            for first in range(start, stop, max(step, 1)):
                count = min(step, stop - first)
                for rows_here in row_chunks(rows, count, limit):
                    yield _Piece(self, rows_here, first, count, width, scratch)


@dataclass(frozen=True)
class _Piece:
    """Some rows and columns that are blocks of ``width``."""

    codec: BlockCodec
    rows: slice
    first: int
    count: int
    width: int
    scratch: list[Tensor]

    def blocks(self, matrix_RC: Tensor) -> Tensor:
        return matrix_RC[self.rows, self.first : self.first + self.count].unflatten(1, (-1, self.width))

    def views(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Codes, scales and scratch of this piece."""
        per_byte, first_block, blocks = self.codec.format.per_byte, self.first // self.codec.block, self.count // self.width
        packed = -(-self.width // per_byte)
        codes = parts["codes"][self.rows, self.first // per_byte : self.first // per_byte + blocks * packed].unflatten(1, (-1, packed))
        scales = [parts[name][self.rows, first_block : first_block + blocks] for name in self.codec.format.scales]
        rows = self.rows.stop - self.rows.start
        return codes, scales, [work[: rows * self.count].view(rows, blocks, self.width) for work in self.scratch]


def part_bytes(parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Bytes of tensors of these shapes and dtypes."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts.values())


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])
