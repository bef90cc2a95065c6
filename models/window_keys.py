"""Sliding-window attention of a sequence that is read segment after segment: the last window of keys and values goes on to the next one.

Differentiable: what is handed on is part of the graph, so whoever runs the segments decides whether gradients go through.

Legend: B row, T token of the segment, t of its last tokens, S key, H query head, G key/value head, D head size, n tokens a query sees
before its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.attention import attended, check_shapes, tile_limits
from models.attention_plan import Pair, RowTiles, plan_rows
from models.batch import Bounds


class Keys(NamedTuple):
    """The last n rotated keys and values [B, G, n, D] before a segment; those before the sequence are zeros, which no query sees."""

    k_BGnD: Tensor
    v_BGnD: Tensor


class WindowKeys:
    """The seam of such a layer: ``(q_BHTD, k_BGTD, v_BGTD, bounds) -> out_BHTD`` of one segment. ``window``: tokens a query sees."""

    def __init__(self, window: int) -> None:
        self.window = window
        self._given: Keys | None = None
        self._left: Keys | None = None
        self._taken = False

    def begin(self, given: Keys | None) -> None:
        """Before a segment: what the one before left; None: nothing comes before it."""
        self._given, self._left, self._taken = given, None, False

    def take(self) -> Keys:
        """After its forward pass: what goes on. Work that is done again in its backward pass leaves nothing."""
        assert self._left is not None, "the layer has not run"
        left, self._left, self._taken = self._left, None, True
        return left

    def __call__(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, bounds: Bounds) -> Tensor:
        """Of one segment; they come in order, from the first token on."""
        check_shapes(q_BHTD, k_BGTD, bounds)
        n = self.window - 1
        k_BGSD, v_BGSD = (torch.cat(pair, 2) for pair in zip(self._before(k_BGTD, v_BGTD), (k_BGTD, v_BGTD), strict=True))
        if not self._taken:
            # Copies: a view would keep the whole segment's keys alive.
            self._left = Keys(*(x.narrow(2, x.shape[2] - n, n).clone() for x in (k_BGSD, v_BGSD)))
        return attended(q_BHTD, k_BGSD, v_BGSD, self._plan(q_BHTD, bounds))

    def hand_on(self, k_BGtD: Tensor, v_BGtD: Tensor) -> None:
        """In place of a call where nothing else is wanted of the segment: its last tokens (``window`` - 1 of them, or all)."""
        n, pairs = self.window - 1, zip(self._before(k_BGtD, v_BGtD), (k_BGtD, v_BGtD), strict=True)
        self._left = Keys(*(torch.cat(pair, 2)[:, :, -n:] if n else pair[0] for pair in pairs))

    def _before(self, k_BGTD: Tensor, v_BGTD: Tensor) -> Keys:
        if self._given is not None:
            return self._given
        rows, heads, _, size = k_BGTD.shape
        return Keys(*(x.new_zeros(rows, heads, self.window - 1, size) for x in (k_BGTD, v_BGTD)))

    def _plan(self, q_BHTD: Tensor, bounds: Bounds) -> tuple[RowTiles, ...]:
        limits = tile_limits(q_BHTD, self.window)
        key = ("keys before a segment", self.window, limits)
        if key not in bounds._cache:
            ((start, end),) = bounds.ranges
            n, own = self.window - 1, (start, end)
            seen = min(n, start)
            pairs = [Pair(own, 0, own, n), Pair(own, 0, (start - seen, start), n - seen)]
            bounds._cache[key] = plan_rows(bounds.documents, pairs[: 1 if seen == 0 else 2], self.window, limits)
        return bounds._cache[key]
