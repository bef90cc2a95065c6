"""Four-bit storage of eigenvector matrices and of inverse roots without their diagonal, for 4-bit Shampoo (arXiv 2405.18144, section 3.4).

"Linear square": with x_j = -1 + 2 j / 15, code j of 0..15 -> sign(x_j) x_j² s, but code 7 -> 0, and s the largest magnitude of a block
of 64. Of the two sides the positive one has one number more. Elements of an orthogonal matrix and the off-diagonal ones of an inverse
root crowd around 0, which squares serve; a block of nothing but zeros comes back as zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optim.codec_blocks import TINY, BlockCodec
from optim.codec_int4 import pack_, unpack_

EIGEN_BLOCK = 64
_STEPS = 15


class LinearSquare4:
    """See the module. Scales hold s / 15²: numbers of codes are (2j - 15)² of them."""

    scales = ("scales",)
    codes_dtype = torch.uint8
    per_byte = 2

    def encode_(self, value_NB: Tensor, codes: Tensor, scales: list[Tensor], scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``. The nearest number: between the squares of two odd numbers k and k + 2 lies (k + 1)² + 1; between 0
        and the least ones on its sides (-9 and 1 of the scale) lie -4.5 and 0.5."""
        scaled_NB, code_NB = scratch
        torch.abs(value_NB, out=code_NB)
        scales[0].copy_(code_NB.amax(-1).mul_(_STEPS**-2))
        torch.div(value_NB, scales[0].clamp_min(TINY).unsqueeze(-1), out=scaled_NB)
        torch.abs(scaled_NB, out=code_NB).sub_(1).clamp_min_(0).sqrt_().mul_(0.5).ceil_().clamp_min_(1)
        positive = scaled_NB > 0
        # Magnitudes (2i - 1)² for i >= 1: a positive number is code 7 + i, a negative one 8 - i; of the latter the first is 0 itself.
        code_NB.copy_(torch.where(positive, 7 + code_NB, 8 - code_NB))
        code_NB.masked_fill_((scaled_NB > -4.5) & (scaled_NB <= 0.5), 7)
        code_NB.masked_fill_((scaled_NB <= -4.5) & (code_NB == 7), 6).clamp_(0, _STEPS)
        pack_(code_NB, codes, scaled_NB)

    def decode_(self, codes: Tensor, scales: list[Tensor], out_NB: Tensor, scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        unpack_(codes, out_NB)
        out_NB.mul_(2).sub_(_STEPS)
        torch.eq(out_NB, -1, out=scratch[0])
        out_NB.add_(scratch[0])  # code 7
        out_NB.mul_(torch.abs(out_NB, out=scratch[0])).mul_(scales[0].unsqueeze(-1))


EIGEN4 = BlockCodec("eigen4", LinearSquare4(), EIGEN_BLOCK)
