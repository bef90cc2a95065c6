"""Small tensors that are updated alike are stepped as one: a step of many small tensors is otherwise mostly the starting of operations.

Rows of elementwise tensors know nothing of each other (``codec_blocks``), so tensors whose rows are equally long are laid one below the
other for a step, states included, and dealt out again; the bits are the same. What lies in ``state`` stays apart.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def as_rows(tensor: Tensor) -> Tensor:
    """A number as a row of one."""
    return tensor if tensor.ndim else tensor.view(1)


def stacks(items: Sequence[Item], alike: Callable[[Item], Hashable], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """``items`` that are ``alike``, in their order, in lists whose sizes come to ``most`` or that have one member."""
    open_lists: dict[Hashable, tuple[list[Item], int]] = {}
    for item in items:
        kind, here = alike(item), size(item)
        some, taken = open_lists.get(kind, ([], 0))
        if some and taken + here > most:
            yield some
            some, taken = [], 0
        open_lists[kind] = ([*some, item], taken + here)
    yield from (some for some, _ in open_lists.values())


class Workspace:
    """Memory for one step's temporaries, used again and again: on CPUs, new memory costs more than what is computed in it.

    ``elements``: that elementwise work may take at a time; a request for more is served all the same.
    """

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self._buffers: dict[Hashable, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of ``shape`` with anything in it, on the device and in the dtype (or ``dtype``) of ``like``; taken again
        under the same name it is the same memory."""
        size, dtype = torch.Size(shape).numel(), dtype or like.dtype
        found = self._buffers.get((name, dtype, like.device))
        if found is None or found.shape[0] < size:
            found = torch.empty(size, dtype=dtype, device=like.device)
            self._buffers[name, dtype, like.device] = found
        return found[:size].view(shape)

    def buffers(self) -> list[Tensor]:
        """All that is held."""
        return list(self._buffers.values())

    def scratch(self, like: Tensor) -> Tensor:
        """For a codec (``codecs.Codec``)."""
        return self.take("scratch", (2, self.elements), like, torch.float32)


def rows_together(tensors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of each name one below the other; of one alone itself."""
    if len(tensors) == 1:
        return tensors[0]
    return {name: torch.cat([one[name] for one in tensors]) for name in tensors[0]}


def deal_rows(together: dict[str, Tensor], tensors: Sequence[dict[str, Tensor]]) -> None:
    """Write back what ``rows_together`` put together."""
    if len(tensors) > 1:
        for name, tensor in together.items():
            apart = [one[name] for one in tensors]
            torch._foreach_copy_(apart, tensor.split([one.shape[0] for one in apart]))  # pyright: ignore[reportPrivateImportUsage]
