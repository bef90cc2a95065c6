"""The seam at which a token-wise part of a block reaches tokens that other ranks hold.

Ranks of one tensor-parallel group hold some heads of every attention and some columns of every feed-forward, and of the residual stream
some tokens: all tokens of the group are gathered before the first product, and what the ranks' last products have for a token is summed
where it is held. One rank alone has all of both. ``parallel/tensor_parallel.py`` fills the seam.

Legend: B row, T token of the group, t of this rank, C channel.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Tokens(Protocol):
    """How a layer that reads all tokens of a group gets them, and gives up its part of their sums. Both are differentiable."""

    ranks: int
    """Of the group."""

    def gathered(self, x_BtC: Tensor) -> Tensor:
        """x_BTC, the tokens of all ranks in their order."""
        ...

    def summed(self, y_BTC: Tensor) -> Tensor:
        """y_BtC, the sum over ranks of what each has for this rank's tokens."""
        ...


class AllTokens:
    """Of one rank: every token is here."""

    ranks = 1

    def gathered(self, x_BtC: Tensor) -> Tensor:
        """``x``."""
        return x_BtC

    def summed(self, y_BTC: Tensor) -> Tensor:
        """``y``."""
        return y_BTC


ALL_TOKENS = AllTokens()
