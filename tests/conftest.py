"""The order of the suite: files that take minutes first, so that no worker has one left at the end when the other has nothing to do."""

import pytest

LONG = (
    "slurm/test_on_a_cluster",
    "end_to_end/",
    "trainer/test_step_trace",
    "test_front_door",
    "trainer/test_compile",
    "trainer/test_guards",
    "trainer/test_settling",
    "trainer/test_choosing",
    "trainer/test_checkpoint",
    "trainer/test_deepspeed",
    "optim/test_zero",
    "optim/test_fused_backward",
    "optim/test_driver",
    "models/memory/test_conformance",
    "test_launcher",
)
"""Beginnings of paths under tests/."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable: within a file nothing moves."""
    items.sort(key=lambda item: not item.nodeid.removeprefix("tests/").startswith(LONG))
