"""Eight-bit storage of Adam's moments by dynamic exponents (Dettmers et al., arXiv 2110.02861): the codes bitsandbytes and torchao use.

The 256 numbers of [-1, 1] or [0, 1]: 0, 1, and for each of seven decades below 1 the middles of equal intervals between a tenth of the
decade and the decade, twice as many in each decade as in the next smaller one; blocks of 256 are scaled by their largest magnitude.
Second moments use no code for 0 in a block that has other numbers: as in ``codec_int8``, a number above 0 comes back above 0.

The companded codes of ``codec_int8`` are more accurate and faster; these are for comparison with the other libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from optim.codec_blocks import TINY

_DECADES = 7


@dataclass(frozen=True)
class Dynamic8:
    """Dynamic exponents, for numbers of both signs or for numbers not below 0. Scales hold the largest magnitude."""

    signed: bool
    scales = ("scales",)
    codes_dtype = torch.uint8
    per_byte = 1

    def encode_(self, value_NB: Tensor, codes: Tensor, scales: list[Tensor], scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        tables = _tables(self.signed, value_NB.device)
        scaled_NB, cell_NB = scratch[0], scratch[1].view(torch.int32)
        torch.abs(value_NB, out=scaled_NB)
        scales[0].copy_(scaled_NB.amax(-1))
        torch.div(value_NB, scales[0].clamp_min(TINY).unsqueeze(-1), out=scaled_NB)
        torch.bitwise_right_shift(scaled_NB.view(torch.int32), 16, out=cell_NB)
        least = tables.code_of_cell.index_select(0, cell_NB.bitwise_and_(0xFFFF).view(-1))
        least.add_(scaled_NB.view(-1) > tables.border.index_select(0, least))
        codes.copy_((least if self.signed else least.clamp_min_(1)).view(codes.shape))

    def decode_(self, codes: Tensor, scales: list[Tensor], out_NB: Tensor, scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        numbers = _tables(self.signed, codes.device).numbers
        out_NB.copy_(numbers.index_select(0, codes.int().view(-1)).view(codes.shape)).mul_(scales[0].unsqueeze(-1))


def dynamic_numbers(signed: bool) -> Tensor:
    """The 256 numbers that codes 0 to 255 stand for, ascending (float32)."""
    numbers = [0.0, 1.0]
    for decade in range(_DECADES):
        intervals = 2 ** (decade if signed else decade + 1)
        for interval in range(intervals):
            number = (0.1 + 0.9 * (interval + 0.5) / intervals) * 10.0 ** (decade - _DECADES + 1)
            numbers += [number, -number] if signed else [number]
    return torch.tensor(sorted(numbers), dtype=torch.float32)


class _Tables(NamedTuple):
    """``numbers`` of the codes; ``border`` above a code, beyond which the next is nearer; ``code_of_cell``: the least code (int32) of the
    floats that share their first 16 bits. There are two at most, so one comparison finds the nearest: six times as fast on a CPU as a
    binary search."""

    numbers: Tensor
    border: Tensor
    code_of_cell: Tensor


@cache
def _tables(signed: bool, device: torch.device) -> _Tables:
    numbers = dynamic_numbers(signed)
    middles = (numbers[1:] + numbers[:-1]) / 2
    cells = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.stack([cells, cells | 0xFFFF]).view(torch.float32).nan_to_num(0.0)
    least = torch.bucketize(ends, middles, out_int32=True).amin(0).to(torch.int32)
    border = torch.cat([middles, torch.tensor([torch.inf])])
    return _Tables(numbers.to(device), border.to(device), least.to(device))
