"""Time limits as Slurm writes them. Imports no torch."""

from __future__ import annotations

import math
import re

from models.errors import UserError
from slurm.site import Site
from trainer.console import duration

_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_NO_LIMIT = ("infinite", "unlimited", "0", "-1")


def limit_seconds(text: str) -> float:
    """Seconds of ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours[:minutes[:seconds]]``; infinity for no limit.

    Raises ValueError for anything else.
    """
    if text.lower() in _NO_LIMIT:
        return math.inf
    found = _CLOCK.fullmatch(text)
    if found is None:
        raise ValueError(text)
    first, second, third = (int(found[name] or 0) for name in ("first", "second", "third"))
    if found["days"] is not None:
        return ((int(found["days"]) * 24 + first) * 60 + second) * 60 + third
    if found["third"] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def check_limit(text: str | None, site: Site) -> None:
    """Raise UserError for a time limit that is none, or in which a run would be asked to save before it can have begun."""
    if text is None:
        return
    try:
        seconds = limit_seconds(text)
    except ValueError:
        raise UserError(f"--time: {text!r} is no time limit; Slurm reads such as 24:00:00, 2-12 (days-hours) and 90 (minutes)") from None
    if seconds <= site.warn_seconds:
        raise UserError(
            f"--time: {text} is {duration(seconds)}, and warn_seconds is {site.warn_seconds}: the run would be saved and requeued as "
            "soon as it begins; give more time (hours:minutes:seconds), or lower warn_seconds in site.yaml"
        )
