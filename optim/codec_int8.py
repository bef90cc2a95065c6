"""Eight-bit storage of Adam's moments by companding: a block's largest magnitude scales it, a root spreads small numbers over more codes.

first moment    code k of -127..127  ->  sign(k) (k / 127)^2 s      nearest in the root's scale
second moment   code k of 1..255     ->  (k / 255)^4 s              rounded up or down by chance

Why these roots: the update m / sqrt(v) needs small numbers to be right relative to themselves, since a block mixes columns whose gradients
differ by decades. On recorded gradients of a small language model no other code is better on all matrices, and these stay near the best on
each, where softsign or the square root of v err twice as much on heavy tails (``benchmarks/optimizer_codecs.md``).

Why chance for v: an average that moves by 0.1 percent a step never leaves a code whose neighbours are 1.6 percent away. Rounded to
nearest, it lags, and updates come out 3 to 10 percent too large where gradients grow rare; rounded up with the probability that leaves
the expectation alone, by 0.3 at most. The chance is a hash of the number's own bits: no generator, the same bits on every run and mesh.

Zero: v is never stored below code 1, so a number above 0 comes back above 0, as at least 2.4e-10 of its block's largest. What is smaller
grows to that, which makes an update smaller, not larger. (Only a block of nothing above 1e-28 may come back as zeros: roots below 1e-14,
far under Adam's eps.) A block of zeros comes back as zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optim.codec_blocks import TINY
from optim.rounding import add_dither_

_LARGEST_SIGNED = 127
_LARGEST_UNSIGNED = 255


class SignedInt8:
    """First moments: signed squares of 127 steps to each side. Scales hold s / 127^2."""

    scales = ("scales",)
    codes_dtype = torch.int8
    per_byte = 1

    def encode_(self, value_NB: Tensor, codes: Tensor, scales: list[Tensor], scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        root_NB, scaled_NB = scratch
        torch.abs(value_NB, out=root_NB)
        scales[0].copy_(root_NB.amax(-1).mul_(_LARGEST_SIGNED**-2))
        torch.div(value_NB, scales[0].clamp_min(TINY).unsqueeze(-1), out=scaled_NB)
        # The root with its sign is x / sqrt(|x|); what the floor is for rounds to 0. (On CPUs torch.sqrt is slow where there are zeros.)
        torch.abs(scaled_NB, out=root_NB).clamp_min_(1e-3).rsqrt_()
        codes.copy_(scaled_NB.mul_(root_NB).round_())

    def decode_(self, codes: Tensor, scales: list[Tensor], out_NB: Tensor, scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        out_NB.copy_(codes)
        out_NB.mul_(torch.abs(out_NB, out=scratch[0])).mul_(scales[0].unsqueeze(-1))


class UnsignedInt8:
    """Second moments: fourth powers of 1 to 255 steps. Scales hold s / 255^4."""

    scales = ("scales",)
    codes_dtype = torch.uint8
    per_byte = 1

    def encode_(self, value_NB: Tensor, codes: Tensor, scales: list[Tensor], scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        root_NB, hash_NB = scratch[0], scratch[1].view(torch.int32)
        scales[0].copy_(value_NB.amax(-1).mul_(_LARGEST_UNSIGNED**-4))
        torch.div(value_NB, scales[0].clamp_min(TINY).unsqueeze(-1), out=root_NB).rsqrt_().rsqrt_()  # its fourth root
        add_dither_(root_NB, value_NB, hash_NB).round_().clamp_(1, _LARGEST_UNSIGNED)
        codes.copy_(hash_NB.copy_(root_NB))  # by way of int32: torch converts float to uint8 one number at a time

    def decode_(self, codes: Tensor, scales: list[Tensor], out_NB: Tensor, scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        out_NB.copy_(codes)
        out_NB.square_().square_().mul_(scales[0].unsqueeze(-1))
