"""One line of metrics.jsonl, written and read. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def encode_record(record: Mapping[str, Any]) -> bytes:
    """One line of metrics.jsonl."""
    return (json.dumps({key: _json_value(value) for key, value in record.items()}, allow_nan=False) + "\n").encode()


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    return value


def decode_record(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line; None for a torn or foreign one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
