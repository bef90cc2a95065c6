"""How an optimizer's states are stored: as they are, or in fewer bits. Tensors and shapes only: nothing here knows of meshes.

The parts of a tensor are tensors whose dim 0 is dim 0 of the tensor; the parts of some rows are those rows of the parts, bit for bit.
So a state is sharded, saved and loaded by sharding, saving and loading its parts, and a mesh changes neither numbers nor decisions.

Parts full of zeros are zeros. Not a number or infinity in a block comes back as not a number somewhere in it: it is never hidden.

  codec = codec_for("int8", weight.shape, signed=False)
  parts = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in codec.parts(local_shape).items()}
  codec.encode_(value, parts)
  value = codec.decode(parts, local_shape)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optim.codec_blocks import BlockCodec, part_bytes
from optim.codec_dynamic import Dynamic8
from optim.codec_int4 import AFFINE_GROUP, AffineInt4, SignedInt4, UnsignedInt4
from optim.codec_int8 import SignedInt8, UnsignedInt8
from optim.rounding import bf16_by_own_bits_

LEAST_ELEMENTS = 4096
"""A smaller tensor is stored as float32: it is next to nothing, and often a norm's or a bias's, where errors cost most."""
LEAST_ROW = 8
"""Elements behind dim 0 below which scales would take most of what codes save."""


class Codec(Protocol):
    """Storage of a float tensor. Immutable; shapes may be of the whole tensor or of some of its rows, 0 included."""

    @property
    def name(self) -> str: ...

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of what is stored. Dim 0 of every part is dim 0 of the tensor."""
        ...

    def bytes(self, shape: tuple[int, ...]) -> int:
        """That the parts take."""
        ...

    def encode_(self, value: Tensor, parts: Mapping[str, Tensor], scratch: Tensor | None = None) -> None:
        """Write ``value`` (float32, left as it is) into ``parts``, in place. ``scratch``: float32 [2, at least the elements of a piece] to
        write over, for a caller that encodes often: new memory is slow on CPUs."""
        ...

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], out: Tensor | None = None, scratch: Tensor | None = None
    ) -> Tensor:
        """The stored tensor as float32, in ``out`` (contiguous) where given."""
        ...


@dataclass(frozen=True)
class PlainCodec:
    """One float of ``dtype`` for each element. bfloat16 is the nearest, or with ``dithered`` rounded by chance as second moments need
    (``codec_int8`` says why); it keeps float32's range, so nothing that matters to Adam becomes 0. An average of nothing but zeros from
    some step on may stop shrinking: without new bits there is no new chance. (A block's scale would still shrink it.)"""

    name: str
    dtype: torch.dtype
    dithered: bool = False

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See ``Codec``."""
        return {"value": (shape, self.dtype)}

    def bytes(self, shape: tuple[int, ...]) -> int:
        """See ``Codec``."""
        return part_bytes(self.parts(shape))

    def encode_(self, value: Tensor, parts: Mapping[str, Tensor], scratch: Tensor | None = None) -> None:
        """See ``Codec``."""
        if self.dithered:
            bf16_by_own_bits_(value, parts["value"])
        else:
            parts["value"].copy_(value)

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], out: Tensor | None = None, scratch: Tensor | None = None
    ) -> Tensor:
        """See ``Codec``."""
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device=parts["value"].device)
        return out.copy_(parts["value"])


_SIGNED: dict[str, Codec] = {
    "fp32": PlainCodec("fp32", torch.float32),
    "bf16": PlainCodec("bf16", torch.bfloat16),
    "int8": BlockCodec("int8", SignedInt8(), 128),
    "int8_dynamic": BlockCodec("int8_dynamic", Dynamic8(signed=True), 256),
    "int4": BlockCodec("int4", SignedInt4(), 128),
    "int4_affine": BlockCodec("int4_affine", AffineInt4(), AFFINE_GROUP),
}
_UNSIGNED: dict[str, Codec] = {
    "fp32": _SIGNED["fp32"],
    "bf16": PlainCodec("bf16", torch.bfloat16, dithered=True),
    "int8": BlockCodec("int8", UnsignedInt8(), 128),
    "int8_dynamic": BlockCodec("int8_dynamic", Dynamic8(signed=False), 256),
    "int4": BlockCodec("int4", UnsignedInt4(), 128),
}


def codec_named(name: str, signed: bool = True) -> Codec:
    """The codec for numbers of both signs (first moments) or, not ``signed``, for numbers not below 0 (second moments), of which none
    above 0 comes back as 0. ``int4_affine`` is for projectors and has no such form.

    Raises ValueError for a name that is unknown, listing those known.
    """
    known = _SIGNED if signed else _UNSIGNED
    if name not in known:
        raise ValueError(f"codec {name!r} is unknown for {'signed' if signed else 'second'} moments; known: {', '.join(known)}")
    return known[name]


def codec_for(name: str, global_shape: tuple[int, ...], signed: bool = True) -> Codec:
    """The codec ``name`` where it pays for a tensor of this shape, else ``fp32``: a question of the whole tensor, not of a rank's rows,
    so every mesh answers alike. It pays from ``LEAST_ELEMENTS`` elements in at least two dims with rows of ``LEAST_ROW``.
    """
    codec = codec_named(name, signed)
    pays = len(global_shape) > 1 and math.prod(global_shape) >= LEAST_ELEMENTS and math.prod(global_shape[1:]) >= LEAST_ROW
    return codec if pays else codec_named("fp32", signed)
