"""Four-bit storage, two codes to a byte: Adam's moments by companding, as in ``codec_int8``, and affine groups for projectors.

first moment    code k of -7..7  ->  sign(k) (k / 7)^2 s     nearest number: with so few codes, nearest in the root's scale inflates
second moment   code k of 1..16  ->  (k / 16)^2 s            rounded up or down by chance, never 0: as in ``codec_int8``, at least s / 256
affine          code k of 0..15  ->  low + k (high - low) / 15, with the group's least number ``low`` as a float

Codes are chosen by the same measurements. The affine form keeps the least number itself, not an integer zero point that must lie
among the codes: such a zero point makes one number of a group in [1, 2].
"""

from __future__ import annotations

import torch
from torch import Tensor

from optim.codec_blocks import TINY, BlockCodec
from optim.rounding import add_dither_

_LARGEST_SIGNED = 7
_LARGEST_UNSIGNED = 16
_LARGEST_AFFINE = 15
_MIDDLE = 8
"""Added to signed codes for storage."""
AFFINE_GROUP = 256
"""As Q-GaLore's (arXiv 2407.08296); a projector of a lower rank has a group per row."""


class SignedInt4:
    """First moments. Scales hold s / 7^2."""

    scales = ("scales",)
    codes_dtype = torch.uint8
    per_byte = 2

    def encode_(self, value_NB: Tensor, codes: Tensor, scales: list[Tensor], scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        root_NB, sign_NB = scratch
        torch.abs(value_NB, out=root_NB)
        scales[0].copy_(root_NB.amax(-1).mul_(_LARGEST_SIGNED**-2))
        root_NB.div_(scales[0].clamp_min(TINY).unsqueeze(-1))
        # The midpoint of k^2 and (k + 1)^2 is (k + 1/2)^2 + 1/4.
        root_NB.sub_(0.25).clamp_min_(1e-3).sqrt_().round_().mul_(torch.sgn(value_NB, out=sign_NB)).add_(_MIDDLE)
        pack_(root_NB, codes, sign_NB)

    def decode_(self, codes: Tensor, scales: list[Tensor], out_NB: Tensor, scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        unpack_(codes, out_NB)
        out_NB.sub_(_MIDDLE)
        out_NB.mul_(torch.abs(out_NB, out=scratch[0])).mul_(scales[0].unsqueeze(-1))


class UnsignedInt4:
    """Second moments, stored as k - 1. Scales hold s / 16^2."""

    scales = ("scales",)
    codes_dtype = torch.uint8
    per_byte = 2

    def encode_(self, value_NB: Tensor, codes: Tensor, scales: list[Tensor], scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        root_NB, hash_NB = scratch
        scales[0].copy_(value_NB.amax(-1).mul_(_LARGEST_UNSIGNED**-2))
        torch.div(value_NB, scales[0].clamp_min(TINY).unsqueeze(-1), out=root_NB).rsqrt_().reciprocal_()  # the root, quick for zeros too
        add_dither_(root_NB, value_NB, hash_NB.view(torch.int32)).round_().clamp_(1, _LARGEST_UNSIGNED).sub_(1)
        pack_(root_NB, codes, hash_NB)

    def decode_(self, codes: Tensor, scales: list[Tensor], out_NB: Tensor, scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        unpack_(codes, out_NB)
        out_NB.add_(1).square_().mul_(scales[0].unsqueeze(-1))


class AffineInt4:
    """Any numbers, as 16 equal steps from the least of a group to its largest. ``scales`` hold the step, ``lows`` the least."""

    scales = ("scales", "lows")
    codes_dtype = torch.uint8
    per_byte = 2

    def encode_(self, value_NB: Tensor, codes: Tensor, scales: list[Tensor], scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        steps_NB, (step, low) = scratch[0], scales
        low.copy_(value_NB.amin(-1))
        step.copy_(value_NB.amax(-1).sub_(low).div_(_LARGEST_AFFINE))
        torch.sub(value_NB, low.unsqueeze(-1), out=steps_NB).div_(step.clamp_min(TINY).unsqueeze(-1))
        pack_(steps_NB.round_().clamp_(0, _LARGEST_AFFINE), codes, scratch[1])

    def decode_(self, codes: Tensor, scales: list[Tensor], out_NB: Tensor, scratch: list[Tensor]) -> None:
        """See ``codec_blocks.Format``."""
        unpack_(codes, out_NB)
        out_NB.mul_(scales[0].unsqueeze(-1)).add_(scales[1].unsqueeze(-1))


def pack_affine_int4(matrix: Tensor, group: int = AFFINE_GROUP) -> dict[str, Tensor]:
    """The parts of a float matrix, such as a projector, in groups of ``group`` (even) elements of a row: 1/2 + 8 / group bytes each."""
    codec = _affine(group)
    parts = {
        name: torch.empty(shape, dtype=dtype, device=matrix.device) for name, (shape, dtype) in codec.parts(tuple(matrix.shape)).items()
    }
    codec.encode_(matrix.float(), parts)
    return parts


def unpack_affine_int4(parts: dict[str, Tensor], shape: tuple[int, ...], group: int = AFFINE_GROUP) -> Tensor:
    """The float32 tensor of ``shape`` that ``pack_affine_int4`` stored with the same ``group``."""
    return _affine(group).decode(parts, shape)


def _affine(group: int) -> BlockCodec:
    if group < 2 or group % 2:
        raise ValueError(f"groups of {group} elements cannot be packed two to a byte; use an even number")
    return BlockCodec("int4_affine", AffineInt4(), group)


def pack_(codes_NB: Tensor, out: Tensor, scratch_NB: Tensor) -> None:
    """Codes 0 to 15, as floats, into bytes: of a block, the second half behind the first. Writes over both inputs.

    Halves and not neighbours, so that both are runs of memory."""
    half = out.shape[-1]
    low, high = codes_NB[..., :half], codes_NB[..., half:]
    low[..., : high.shape[-1]].add_(high, alpha=16)
    whole = scratch_NB.view(torch.int32)[..., :half]
    out.copy_(whole.copy_(low))  # by way of int32: torch converts float to uint8 one number at a time


def unpack_(codes: Tensor, out_NB: Tensor) -> None:
    half = codes.shape[-1]
    out_NB[..., :half].copy_(codes & 15)
    out_NB[..., half:].copy_((codes >> 4)[..., : out_NB.shape[-1] - half])
