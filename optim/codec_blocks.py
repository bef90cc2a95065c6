"""Storage of a float tensor as codes of few bits and one scale for each block: which elements share a block, how parts are laid out, and
the loop that encodes and decodes in pieces that stay in a core's cache. What a code means is the business of a format (``codec_int8``,
``codec_dynamic``, ``codec_int4``).

A row is everything behind dim 0, flattened. Blocks lie inside a row, the last one is short: rows know nothing of each other, so the
parts of some rows are those rows of the parts, wherever a mesh cuts. Formats use only operations that IEEE 754 rounds one way
(multiply, divide, root, round, maximum), so the bits do not depend on the piece an element is in.

Legend: R rows, C columns of a row, N blocks (in one dim, or rows x blocks of a row), B elements of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.repeat import repeated
from optim.pieces import piece_elements, row_chunks

TINY = torch.finfo(torch.float32).tiny
"""Least divisor: a block of zeros, or of numbers near float32's least, is divided by it and not by its own scale."""


class Format(Protocol):
    """What codes and scales mean. ``scratch`` are two float32 tensors [N, B] to write over."""

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

    def encode_(self, value_NB: Tensor, codes: Tensor, scales: list[Tensor], scratch: list[Tensor]) -> None:
        """Write the codes [N, B / per_byte, rounded up] and scales [N] of ``value_NB``."""
        ...

    def decode_(self, codes: Tensor, scales: list[Tensor], out_NB: Tensor, scratch: list[Tensor]) -> None:
        """The numbers of the codes, into ``out_NB``."""
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

    def encode_(self, value: Tensor, parts: Mapping[str, Tensor], scratch: Tensor | None = None) -> None:
        """Write ``value`` (float32, left as it is) into ``parts``."""
        matrix_RC = value.flatten(1) if value.dim() > 1 else value.unsqueeze(1)
        for value_NB, codes, scales, work in self._pieces(matrix_RC, parts, scratch):
            self.format.encode_(value_NB, codes, scales, work)

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], out: Tensor | None = None, scratch: Tensor | None = None
    ) -> Tensor:
        """The stored tensor of ``shape`` as float32; written into ``out`` (contiguous) where given."""
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device=parts["codes"].device)
        matrix_RC = out.view(_matrix(shape))  # raises where out is not contiguous: a copy would be written instead
        for out_NB, codes, scales, work in self._pieces(matrix_RC, parts, scratch):
            self.format.decode_(codes, scales, out_NB, work)
        return out

    def _pieces(
        self, matrix_RC: Tensor, parts: Mapping[str, Tensor], given: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, list[Tensor], list[Tensor]]]:
        """The matrix and its parts, as the format takes them, a few blocks at a time; with scratch."""
        limit = max(piece_elements(matrix_RC.device), self.block)
        size = min(limit, matrix_RC.numel())
        if given is None or given.shape[1] < size:
            given = torch.empty((2, size), dtype=torch.float32, device=matrix_RC.device)
        scratch = given.unbind()
        for blocks in self._in_blocks(matrix_RC, [parts[name] for name in ("codes", *self.format.scales)]):
            for some in _runs(blocks[0], limit):
                value_NB, codes, *scales = blocks if some is None else [tensor[some] for tensor in blocks]
                yield value_NB, codes, scales, [work[: value_NB.numel()].view(value_NB.shape) for work in scratch]

    def _in_blocks(self, matrix_RC: Tensor, parts: list[Tensor]) -> Iterator[list[Tensor]]:
        """Views of the whole blocks, then of the short ones at the ends of rows: numbers, codes, scales."""
        codes, *scales = parts
        columns, per_byte = matrix_RC.shape[1], self.format.per_byte
        whole = columns - columns % self.block
        if whole == columns and all(tensor.is_contiguous() for tensor in (matrix_RC, *parts)):
            yield [matrix_RC.view(-1, self.block), codes.view(-1, self.block // per_byte), *(scale.view(-1) for scale in scales)]
            return
        if whole:
            yield [
                matrix_RC[:, :whole].unflatten(1, (-1, self.block)),
                codes[:, : whole // per_byte].unflatten(1, (-1, self.block // per_byte)),
                *(scale[:, : whole // self.block] for scale in scales),
            ]
        if columns > whole:
            yield [matrix_RC[:, whole:], codes[:, whole // per_byte :], *(scale[:, whole // self.block] for scale in scales)]


def _runs(x: Tensor, limit: int) -> Iterator[slice | tuple[slice, slice] | None]:
    """Cuts of the dims of ``x`` before the last, of at most ``limit`` elements or one block; None where all fits."""
    shape = x.shape
    if shape.numel() <= limit:
        yield None
    elif len(shape) == 2 or shape[1:].numel() <= limit:
        yield from row_chunks(shape[0], shape[1:].numel(), limit, x)
    else:
        for row in repeated(shape[0], x):
            for blocks in row_chunks(shape[1], shape[2], limit, x):
                yield slice(row, row + 1), blocks


def part_bytes(parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Bytes of tensors of these shapes and dtypes."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts.values())


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])
