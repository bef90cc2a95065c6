"""A weight kept in eight bits: a tensor that products read as bfloat16, and whose gradient is a whole bfloat16 tensor.

Groups of a row have 256 equal steps from their least number to their largest: w = low + code (high - low) / 255, with ``low`` as a float32,
not an integer zero point that must lie among the codes (such a zero point makes one number of a group in [1, 2]: Q-GaLore's reference).
A row of C elements is stored as C codes, then a step and a least number per group, all bytes of one uint8 tensor [R, C + 8 groups]: rows
are rows, so it is sharded, gathered (1.03 bytes per element, by FSDP2's extension points) and saved like any tensor.

Only what a training step needs of it is defined; any other operation is refused by name.

Legend: R rows, C columns, G groups of a row, W ranks.
Try alone: tests/models/test_int8_weight.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

GROUP = 256
"""Elements of a row that share a step, at most."""
LEAST_GROUP = 16
_LARGEST = 255
_CPU_PIECE, _ACCELERATOR_PIECE = 1 << 18, 1 << 24
"""Elements that are float32 at a time."""
_TINY = 1e-30


def group_of(columns: int) -> int | None:
    """Elements of a group in rows of ``columns``: the most that divide them; None where rows cannot be stored so."""
    if columns % 4:  # the floats behind the codes begin at a multiple of four bytes
        return None
    group = next(size for size in range(min(GROUP, columns), 0, -1) if columns % size == 0)
    return group if group >= LEAST_GROUP else None


class Int8Weight(torch.Tensor):
    """See the module. ``packed``: uint8 [R, C + 8 G]. ``whole_rows``: of the parameter that these rows belong to."""

    packed: Tensor
    whole_rows: int

    @staticmethod
    def __new__(cls, packed: Tensor, columns: int, whole_rows: int) -> Int8Weight:
        shape = (packed.shape[0], columns)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, device=packed.device)  # pyright: ignore[reportAttributeAccessIssue]

    def __init__(self, packed: Tensor, columns: int, whole_rows: int) -> None:
        self.packed, self.whole_rows = packed, whole_rows

    @staticmethod
    def empty(rows: int, columns: int) -> Int8Weight:
        """Of undefined values, on the default device. Raises ValueError for rows that cannot be stored so."""
        return Int8Weight(torch.empty(packed_shape(rows, columns), dtype=torch.uint8), columns, rows)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the codes [R, C], the steps and the least numbers [R, G]."""
        columns = self.shape[1]
        steps, lows = self.packed[:, columns:].view(torch.float32).chunk(2, dim=1)
        return self.packed[:, :columns], steps, lows

    def rows(self, rows: slice) -> Int8Weight:
        """A view."""
        return self._of(self.packed[rows])

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The numbers [R, C] in ``dtype``, each rounded once."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for rows in self.pieces():
            codes, steps, lows = self.rows(rows).parts
            groups = codes.float().unflatten(1, (steps.shape[1], -1))
            out[rows] = torch.addcmul(lows.unsqueeze(-1), groups, steps.unsqueeze(-1)).flatten(1)
        return out

    def quantise_(self, value: Tensor, chance: Tensor | None = None) -> None:
        """Store ``value`` [R, C] (float32): the nearest codes or, with ``chance`` (of its shape, numbers in [0, 1) to write over), one of
        the two beside each number, so that its expectation is right."""
        codes, steps, lows = self.parts
        groups = value.unflatten(1, (steps.shape[1], -1))
        least = groups.amin(-1)
        step = groups.amax(-1).sub_(least).div_(_LARGEST)
        lows.copy_(least)
        steps.copy_(step)
        scaled = (groups - least.unsqueeze(-1)).div_(step.clamp_min(_TINY).unsqueeze(-1)).flatten(1)
        rounded = scaled.round_() if chance is None else scaled.add_(chance).floor_()
        # By way of int32: torch converts float to uint8 one number at a time.
        codes.copy_(rounded.clamp_(0, _LARGEST).int())

    def pieces(self) -> Iterator[slice]:
        """Rows in runs whose float32 copies fit a core's cache, or are worth an accelerator's launch."""
        size = max(1, (_CPU_PIECE if self.device.type == "cpu" else _ACCELERATOR_PIECE) // max(1, self.shape[1]))
        for first in range(0, self.shape[0], size):
            yield slice(first, min(first + size, self.shape[0]))

    def _of(self, packed: Tensor) -> Int8Weight:
        return Int8Weight(packed, self.shape[1], self.whole_rows)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, {self.device})"

    # --- FSDP2: what travels, and what becomes of it

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[Tensor, ...], Any]:
        """This rank's bytes, padded to as many rows as the others send."""
        most = -(-self.whole_rows // mesh.size())
        missing = most - self.shape[0]
        return (torch.cat([self.packed, self.packed.new_zeros(missing, self.packed.shape[1])]) if missing else self.packed,), None

    def fsdp_post_all_gather(
        self, all_gather_outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight, around the bytes that arrived; ``out`` is already around them."""
        (packed,) = all_gather_outputs
        if out is not None:
            assert cast(Int8Weight, out).packed.untyped_storage()._cdata == packed.untyped_storage()._cdata
            return None
        return self._of(packed[: self.whole_rows]), (packed,)

    # --- as torch sees it

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["packed"], (self.shape[1], self.whole_rows)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, outer_size: Any, outer_stride: Any) -> Int8Weight:
        return Int8Weight(inner["packed"], *meta)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = _OPERATIONS.get(func)
        if operation is None:
            raise NotImplementedError(f"{func} is not defined for weights in eight bits (models/int8_weight.py)")
        return operation(func, *args, **(kwargs or {}))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:  # of any nn.Linear; models/linear.py keeps no copy of the weight for backward, this does
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def packed_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the uint8 tensor that keeps a weight of this shape. Raises ValueError for rows that cannot be stored so."""
    group = group_of(columns)
    if group is None:
        raise ValueError(f"rows of {columns} elements cannot be kept in eight bits: a multiple of {LEAST_GROUP} can")
    return rows, columns + 8 * (columns // group)


_ATEN = torch.ops.aten


def _same(func: Any, x: Int8Weight, *_: Any, **__: Any) -> Int8Weight:
    """``detach``, and views that change nothing."""
    return x._of(x.packed)


def _made_like(func: Any, x: Int8Weight, *args: Any, **kwargs: Any) -> Int8Weight:
    """``empty_like``, ``zeros_like``, ``clone``: on the bytes. Zero bytes are zeros."""
    if func is _ATEN.clone.default:
        return x._of(x.packed.clone())
    kwargs = {"device": kwargs.get("device") or x.device}
    return x._of(torch.empty_like(x.packed, **kwargs) if func is _ATEN.empty_like.default else torch.zeros_like(x.packed, **kwargs))


def _new(func: Any, x: Int8Weight, size: Sequence[int], **kwargs: Any) -> Int8Weight:
    if len(size) != 2 or size[1] != x.shape[1]:
        raise NotImplementedError(f"{func} of shape {tuple(size)} from a weight in eight bits of shape {tuple(x.shape)}")
    return x._of(x.packed.new_zeros(size[0], x.packed.shape[1]))


def _split(func: Any, x: Int8Weight, size: int, dim: int = 0) -> list[Int8Weight]:
    _only_rows(func, dim)
    return [x._of(part) for part in x.packed.split(size)]


def _slice(func: Any, x: Int8Weight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Int8Weight:
    _only_rows(func, dim)
    return x._of(x.packed[start:end:step])


def _view(func: Any, x: Int8Weight, size: Sequence[int], *_: Any) -> Int8Weight:
    """Of the same shape; ``view(-1)``, as FSDP2 asks for what it then never reads, keeps its shape."""
    if math.prod(size) not in (-1, x.numel()) or (len(size) == 2 and tuple(size) != tuple(x.shape)):
        raise NotImplementedError(f"{func} of shape {tuple(size)} of a weight in eight bits of shape {tuple(x.shape)}")
    return x._of(x.packed)


def _copy(func: Any, x: Int8Weight, source: Tensor, non_blocking: bool = False) -> Int8Weight:
    if isinstance(source, Int8Weight):
        x.packed.copy_(source.packed, non_blocking)
    else:
        for rows in x.pieces():
            x.rows(rows).quantise_(source[rows].to(x.device, torch.float32))
    return x


def _to(func: Any, x: Int8Weight, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    """To another device as it is; to another dtype by its numbers."""
    moved = x if device is None else x._of(x.packed.to(device))
    return moved._of(moved.packed) if dtype in (None, x.dtype) else moved.dequantised(dtype)


def _only_rows(func: Any, dim: int) -> None:
    if dim:
        raise NotImplementedError(f"{func} along dim {dim}: a weight in eight bits is cut by rows only")


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.detach.default: _same,
    _ATEN.alias.default: _same,
    _ATEN.as_strided.default: _view,
    _ATEN.view.default: _view,
    _ATEN.empty_like.default: _made_like,
    _ATEN.zeros_like.default: _made_like,
    _ATEN.clone.default: _made_like,
    _ATEN.new_zeros.default: _new,
    _ATEN.split.Tensor: _split,
    _ATEN.slice.Tensor: _slice,
    _ATEN.copy_.default: _copy,
    _ATEN._to_copy.default: _to,
}


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
        return weight.dequantised(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(torch.bfloat16), None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return F.linear(x, in_dtype(weight, dtype), bias)


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight.to(dtype)``, also of one in eight bits; differentiable."""
    return _Read.apply(weight, dtype) if isinstance(weight, Int8Weight) else weight.to(dtype)  # type: ignore[return-value]


def dequantised(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The numbers [R, C] that the bytes of a weight in eight bits are (what `stored` gave)."""
    return Int8Weight(packed, columns, packed.shape[0]).dequantised(dtype)


def stored(parameter: Tensor) -> Tensor:
    """What a checkpoint holds of a parameter: its bytes where it is in eight bits (live, sharded as it is), else itself."""
    if isinstance(parameter, Int8Weight):
        return parameter.packed
    local = getattr(parameter, "_local_tensor", None)
    if not isinstance(local, Int8Weight):
        return parameter
    sharded = cast(DTensor, parameter)
    shape = torch.Size(packed_shape(*parameter.shape))
    return DTensor.from_local(local.packed, sharded.device_mesh, sharded.placements, run_check=False, shape=shape, stride=(shape[1], 1))


def quantise_weights_(modules: Iterable[nn.Linear]) -> None:
    """Make the weights of ``modules`` that can be (``group_of``) weights in eight bits, with the nearest values."""
    for module in modules:
        rows, columns = module.weight.shape
        if group_of(columns) is not None:
            with torch.device(module.weight.device):
                weight = Int8Weight.empty(rows, columns)
            if not module.weight.is_meta:
                with torch.no_grad():
                    weight.copy_(module.weight)
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
