"""Arithmetic and traffic of one operator, from its arguments: FLOPs (a multiplication and an addition are two) and bytes moved.

Attention counts the scores that its mask shows; torch.utils.flop_counter supplies what is not listed here.
Legend: T queries, S keys, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

_NO_WORK = frozenset(("aten::_local_scalar_dense", "aten::set_", "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh"))
_SPARSE = "aten::_sparse_coo_tensor_with_dims_and_tensors"
"""Takes its parts as they are."""
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""Matrix products per score: scores and output; in backward scores again, and the gradients of values, probabilities, keys and queries."""


def op_flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of calling ``func`` (an aten overload); 0 for everything that is neither a matrix product nor attention."""
    name = func._schema.name.removeprefix("aten::")
    own = _FLOPS.get(name)
    if own is not None:
        return own(args, kwargs)
    counter = flop_registry.get(func._overloadpacket)
    return int(counter(*args, **kwargs, out_val=out)) if counter is not None else 0


def op_bytes(func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Bytes read and written; 0 for views and for allocation alone."""
    if moves_nothing(func):
        return 0
    rows = _BY_ROWS.get(func._schema.name)
    if rows is not None:
        return rows(inputs, outputs)
    return sum(_extent(x) for x in inputs) + sum(_extent(x) for x in outputs)


def written(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """What ``func`` changes without returning it, as those of torch._foreach and the fused optimizers do. Gradients are not counted: they
    are changed only where a gradient scaler is given."""
    schema = func._schema
    if schema.returns:
        return []
    changed = [
        value
        for argument, value in zip(schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
    ]
    return [x for value in changed for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, Tensor)]


@cache
def moves_nothing(func: Any) -> bool:
    """Whether an operator only makes a view of its input or an uninitialised tensor."""
    schema = func._schema
    if schema.name.startswith(("aten::empty", "aten::new_empty")) or schema.name in (*_NO_WORK, _SPARSE):
        return True
    aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def work_dtype(tensors: Sequence[Tensor]) -> str:
    """The dtype an operator computes in: that of its first floating-point tensor, such as ``bfloat16``."""
    for x in tensors:
        if x.is_floating_point():
            return str(x.dtype).removeprefix("torch.")
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else ""


def _rows_read(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Of some rows of the first input: they and the others are read, the result is written."""
    return 2 * sum(_extent(x) for x in outputs) + sum(_extent(x) for x in inputs[1:])


def _rows_written(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Into some rows of the first input, which are read before: as many as the last input has."""
    return sum(_extent(x) for x in inputs[1:]) + 2 * _extent(inputs[-1])


def _bags(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Of a table, the only input with two dims beside a gradient of sums: a row for each index, the longest of the others."""
    matrices, rest = [x for x in inputs if x.ndim > 1], [x for x in inputs if x.ndim < 2]
    table = matrices[-1]
    rows = max(x.numel() for x in rest) * table.shape[1] * table.element_size()
    return rows + sum(_extent(x) for x in (*matrices[:-1], *rest, *outputs))


_BY_ROWS: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor]], int]] = {
    "aten::index": _rows_read,
    "aten::index_put_": _rows_written,
    "aten::_index_put_impl_": _rows_written,
    "aten::index_add_": _rows_written,
    "aten::index_copy_": _rows_written,
    "aten::_embedding_bag": _bags,
    "aten::_embedding_bag_forward_only": _bags,
    "aten::_embedding_bag_per_sample_weights_backward": _bags,
}
"""Operators that touch some rows of a tensor that may be much larger."""


def _extent(x: Tensor) -> int:
    """Bytes behind a tensor; an expanded one is no larger than its storage."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def visible_scores(n_queries: int, n_keys: int, causal: bool, low: int | None = None, high: int | None = None) -> int:
    """Scores that a mask shows: all, the causal triangle, or those with ``low <= key - query <= high`` (None: no limit)."""
    if causal:
        low, high = None, 0 if high is None else min(0, high)
    first = 0 if low is None else low
    total = 0
    if low is None and high is None:
        return n_queries * n_keys
    # Sums of clamped ranges over queries: keys from max(0, q + low) to min(n_keys - 1, q + high), bottom and top cut off.
    last = n_keys - 1 if high is None else high
    ends = _sum_clamped(n_queries, 1 if high is not None else 0, last, -1, n_keys - 1)
    starts = _sum_clamped(n_queries, 1 if low is not None else 0, first, 0, n_keys)
    total = ends - starts + n_queries
    return max(0, total)


def _sum_clamped(n: int, slope: int, offset: int, lowest: int, highest: int) -> int:
    """Sum over q < n of ``slope * q + offset`` clamped to [lowest, highest]; slope is 0 or 1."""
    if not slope:
        return n * min(max(offset, lowest), highest)
    below = min(n, max(0, lowest - offset))
    above = min(n, max(0, n - max(0, highest - offset)))
    middle = max(0, n - below - above)
    first = offset + below
    return below * lowest + above * highest + middle * first + middle * (middle - 1) // 2


def _product(a: Tensor, b: Tensor) -> int:
    return 2 * a.numel() * b.shape[-1]


def _attention_bhtd(products: int, first: int, causal_at: int) -> Callable[[Sequence[Any], dict[str, Any]], int]:
    """For kernels that take q, k, v as [B, H, T, D], q at ``args[first]``."""

    def count(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
        q, k = args[first], args[first + 1]
        causal = args[causal_at] if len(args) > causal_at else kwargs.get("is_causal", False)
        scores = visible_scores(q.shape[2], k.shape[2], bool(causal))
        return 2 * products * q.shape[0] * q.shape[1] * scores * q.shape[3]

    return count


def _attention_bthd(products: int, first: int, causal_at: int) -> Callable[[Sequence[Any], dict[str, Any]], int]:
    """For FlashAttention, [B, T, H, D]; its window is aligned at the bottom right, -1 for no limit."""

    def count(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
        q, k = args[first], args[first + 1]
        n_queries, n_keys = q.shape[1], k.shape[1]
        shift = n_keys - n_queries
        left, right = kwargs.get("window_size_left"), kwargs.get("window_size_right")
        low = None if left is None or left < 0 else shift - left
        high = None if right is None or right < 0 else shift + right
        scores = visible_scores(n_queries, n_keys, bool(args[causal_at]), low, high)
        return 2 * products * q.shape[0] * q.shape[2] * scores * q.shape[3]

    return count


_FLOPS: dict[str, Callable[[Sequence[Any], dict[str, Any]], int]] = {
    "mm": lambda args, kwargs: _product(args[0], args[1]),
    "bmm": lambda args, kwargs: _product(args[0], args[1]),
    "addmm": lambda args, kwargs: _product(args[1], args[2]),
    "addmm_": lambda args, kwargs: _product(args[1], args[2]),
    "baddbmm": lambda args, kwargs: _product(args[1], args[2]),
    "baddbmm_": lambda args, kwargs: _product(args[1], args[2]),
    "_scaled_dot_product_flash_attention_for_cpu": _attention_bhtd(FORWARD_PRODUCTS, 0, 4),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_bhtd(BACKWARD_PRODUCTS, 1, 7),
    "_scaled_dot_product_efficient_attention": _attention_bhtd(FORWARD_PRODUCTS, 0, 6),
    "_scaled_dot_product_efficient_attention_backward": _attention_bhtd(BACKWARD_PRODUCTS, 1, 11),
    "_scaled_dot_product_cudnn_attention": _attention_bhtd(FORWARD_PRODUCTS, 0, 6),
    "_scaled_dot_product_cudnn_attention_backward": _attention_bhtd(BACKWARD_PRODUCTS, 1, 14),
    "_flash_attention_forward": _attention_bthd(FORWARD_PRODUCTS, 0, 8),
    "_flash_attention_backward": _attention_bthd(BACKWARD_PRODUCTS, 1, 11),
}
