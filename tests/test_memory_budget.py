"""docs/memory_budget.md explains every setting of the memory section, with the default that it has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

from memory_mgmt.config import MemoryConfig

BUDGET = (Path(__file__).resolve().parents[1] / "docs" / "memory_budget.md").read_text()


def test_every_memory_setting_has_a_chapter_with_its_default() -> None:
    chapters = dict(re.findall(r"^### `memory\.(\w+)` \(default: `?(\w+)`?[^)]*\)$", BUDGET, re.MULTILINE))
    defaults = {name: field.get_default(call_default_factory=True) for name, field in MemoryConfig.model_fields.items()}
    assert chapters == {name: value if isinstance(value, str) else json.dumps(value) for name, value in defaults.items()}


def test_every_value_of_a_memory_setting_is_named_in_its_chapter() -> None:
    for name, field in MemoryConfig.model_fields.items():
        chapter = re.split(r"^##", BUDGET.split(f"### `memory.{name}`", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
        values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        missing = [value for value in values if f"`{value}`" not in chapter]
        assert not missing, f"memory.{name}: {missing}"
