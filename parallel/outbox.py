"""Messages on their way to other ranks that this one need not wait for: it goes on, and their bytes stay until they have left.

gloo's sends end when the other side receives. A rank that waited for its sends would keep step with the next one, which in a chain of ranks
(`parallel/relay.py`) is behind by design.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist

_MOST = 16
"""Messages kept; beyond that the oldest is waited for, which in a chain has arrived long ago."""

_left: deque[tuple[dist.Work, torch.Tensor]] = deque()


def forget() -> None:
    """Before the ranks part: what was sent has been received, or nobody will."""
    _left.clear()


def leave(work: dist.Work, message: torch.Tensor) -> None:
    """Let ``message`` go by itself. Nobody may write to it any more."""
    _left.append((work, message))
    while len(_left) > _MOST:
        _left.popleft()[0].wait()
