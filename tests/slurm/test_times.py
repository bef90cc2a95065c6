"""Time limits in every form that sbatch reads, and those that would end a run before it begins."""

from __future__ import annotations

import math

import pytest

from models.errors import UserError
from slurm.site import Site
from slurm.times import check_limit, limit_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("24:00", 1440), ("24:00:00", 86400), ("2-12", 216_000), ("2-12:30", 217_800), ("1-00:00:01", 86401),
        ("0", math.inf), ("UNLIMITED", math.inf), ("infinite", math.inf),
    ],
)  # fmt: skip
def test_every_form(text: str, seconds: float) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "a day", "24h", "1:2:3:4", "-5", "1.5", "24:00:00 "])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--time: .* is no time limit"):
        check_limit(text, Site())


def test_a_limit_within_the_warning_is_refused() -> None:
    check_limit(None, Site())
    check_limit("2:01", Site(warn_seconds=120))
    with pytest.raises(UserError, match=r"--time: 2:00 is 2:00, and warn_seconds is 120: .* as soon as it begins"):
        check_limit("2:00", Site(warn_seconds=120))
