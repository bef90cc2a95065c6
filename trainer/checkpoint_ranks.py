"""What the ranks of a checkpoint agree on: every rank does its part, and all succeed or all raise the same error.

A rank that raised alone would leave the others waiting in a collective. All exchanges here go over a gloo group that
nothing else uses, so that a save in the background cannot meet the collectives of training (measured: sharing the default
group hangs).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from models.errors import RunFailed, UserError

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(RunFailed):
    """A checkpoint could not be written because its file system, or the user's share of it, is full; nothing of it is left."""


class _DiskFullSomewhere(DiskFull):
    """The operating system's words on one rank, not yet a sentence."""


class CheckpointRanks:
    """The ranks that save and load together; one rank when torch.distributed is not initialised."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        """``process_group``: a gloo group of all ranks for checkpoints alone; None makes one (a collective call)."""
        self.group: dist.ProcessGroup | None = process_group
        if process_group is None and dist.is_available() and dist.is_initialized():
            self.group = dist.new_group(backend="gloo")  # pyright: ignore[reportAttributeAccessIssue]
        if self.group is not None and dist.get_backend(self.group) != "gloo":
            raise ValueError(f"checkpoints need a gloo process group of their own, not '{dist.get_backend(self.group)}'")
        self.rank = dist.get_rank(self.group) if self.group is not None else 0
        self.size = dist.get_world_size(self.group) if self.group is not None else 1

    def gather(self, value: T) -> list[T]:
        """Every rank's value on every rank, by rank."""
        if self.group is None or self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, what: str, action: Callable[[], T]) -> list[T]:
        """Run ``action`` on every rank; its results by rank.

        Raises the same error on all ranks if it failed on any: the UserError it raised, else RunFailed("cannot <what>: ...").
        """
        answers = self.gather(_attempt(action))
        self._raise_first(what, [error for _, error in answers])
        return [result for result, _ in answers]  # type: ignore[misc]

    def each(self, what: str, action: Callable[[], T]) -> T:
        """As ``together``, but each rank gets its own result only (nothing but errors is exchanged)."""
        result, error = _attempt(action)
        self._raise_first(what, self.gather(error))
        return result  # type: ignore[return-value]

    def _raise_first(self, what: str, errors: list[UserError | str | None]) -> None:
        for rank, error in enumerate(errors):
            if isinstance(error, UserError) and not isinstance(error, _DiskFullSomewhere):
                raise type(error)(str(error))
            if error is not None:
                text = str(error)
                where = f"rank {rank}: " if self.size > 1 and not text.startswith("rank ") else ""
                raise (DiskFull if isinstance(error, _DiskFullSomewhere) else RunFailed)(f"cannot {what}: {where}{text}")

    def first_does(self, what: str, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 only and give its result to all ranks; errors as in ``together``."""
        return self.together(what, action if self.rank == 0 else lambda: None)[0]  # type: ignore[return-value]


def _attempt(action: Callable[[], T]) -> tuple[T | None, UserError | str | None]:
    try:
        return action(), None
    except UserError as error:
        return None, error
    except CheckpointException as error:  # derives from BaseException; the reasons are only inside
        causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
        text = "; ".join(f"rank {rank}: {describe(cause)}" for rank, cause in causes.items())
        return None, _DiskFullSomewhere(text) if any(map(_is_full, causes.values())) else text
    except Exception as error:
        return None, _DiskFullSomewhere(describe(error)) if _is_full(error) else describe(error)


def _is_full(error: BaseException) -> bool:
    # torch's writer of zip files does not pass on what the system said when it could write only a part.
    return (isinstance(error, OSError) and error.errno in _FULL) or (isinstance(error, RuntimeError) and "unexpected pos" in str(error))


def describe(error: BaseException) -> str:
    """One line: the operating system's words where it is its error, else type and message."""
    if isinstance(error, OSError) and error.errno is not None:
        file = f" ({os.fspath(error.filename)})" if isinstance(error.filename, str | os.PathLike) else ""
        return f"{error.strerror or os.strerror(error.errno)}{file}"
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
