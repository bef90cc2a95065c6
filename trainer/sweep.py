"""A fit table: one memory plan for every combination of settings, devices and numbers of GPUs. Imports no torch.

An axis is ``key=value,value,...`` where the key is any setting, or

- ``device``: names of the device table;
- ``gpus``: numbers of ranks. With D = parallel.dp_replicate x parallel.dp_shard x parallel.tp of the combination, ``parallel.cp`` becomes
  gpus / D where D divides it; otherwise all ranks share one sequence: parallel.cp = gpus and the other degrees 1. Degrees that are auto
  are chosen for so many ranks instead. The table shows the degrees.

Whole numbers may end in k or m (1k = 1024, 1m = 1024k). Try alone: ``longstride plan million --sweep data.seq_len=256k,1m gpus=1,2``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memory_mgmt.devices import device_named
from memory_mgmt.plan import Change, MemoryPlan
from models.errors import UserError
from trainer import config_file
from trainer.config import RunConfig
from trainer.settling import degrees_of, settled

MAX_COMBINATIONS = 1000
FORMAT_VERSION = 1
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmM])")

PlanRun = Callable[[RunConfig, str | None], MemoryPlan]
Combination = tuple[RunConfig, str | None]
"""A configuration and the name of the device to plan it for."""


@dataclass(frozen=True)
class Axis:
    """One swept key and its values as typed."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One combination: the swept values as typed, in the order of the axes, and its plan or why there is none."""

    values: dict[str, str]
    device: str | None
    """Name given to the planner; None: this machine's."""
    degrees: str = ""
    """How the ranks are used, such as ``dp_shard 2 x cp 4``."""
    config: RunConfig | None = None
    """None where it refuses this combination."""
    plan: MemoryPlan | None = None
    refused: str = ""
    """Why there is no plan; empty where there is one."""

    @property
    def remedy(self) -> Change | None:
        """The cheapest change that makes a plan fit that does not, if its planner knows one."""
        if self.plan is None or self.plan.fits or self.plan.limit_bytes is None:
            return None
        return next((change for change in self.plan.changes if change.peak_bytes <= self.plan.limit_bytes), None)


def parse_axes(words: Sequence[str]) -> list[Axis]:
    """The axes that ``words`` describe.

    Raises UserError for an unknown key or device, a missing value, a key given twice, or too many combinations.
    """
    axes: list[Axis] = []
    for word in words:
        key, equals, text = word.partition("=")
        values = tuple(value.strip() for value in _split(text))
        if not equals or not key or not all(values):
            raise UserError(f"--sweep: '{word}' is not key=value,value,...; for example data.seq_len=64k,256k")
        _check_axis(key, values)
        axes.append(Axis(key, values))
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--sweep: {key} is given twice; put all its values in one list")
    if "gpus" in keys and "parallel.cp" in keys:
        raise UserError("--sweep: gpus sets parallel.cp; sweep one of them")
    combinations = 1
    for axis in axes:
        combinations *= len(axis.values)
    if combinations > MAX_COMBINATIONS:
        raise UserError(f"--sweep: {combinations:,} combinations; at most {MAX_COMBINATIONS:,}")
    return axes


def _split(text: str) -> list[str]:
    """``text`` cut at commas that are not inside brackets or quotes."""
    return [match.group() for match in re.finditer(r"""(?:\[[^\]]*\]|"[^"]*"|'[^']*'|[^,])+|(?<=,)(?=,|$)|^$""", text)]


def _check_axis(key: str, values: Sequence[str]) -> None:
    if key == "device":
        for value in values:
            try:
                device_named(value)
            except ValueError as error:
                raise UserError(f"--sweep: device: {error}") from None
    elif key == "gpus":
        for value in values:
            if not value.isdigit() or int(value) < 1:
                raise UserError(f"--sweep: gpus: '{value}' is not a whole number above 0")
    else:
        try:
            config_file.check_key(key)
        except UserError as error:
            text = str(error).removeprefix(f"{config_file.COMMAND_LINE}: ")
            raise UserError(f"--sweep: {text} (a sweep also knows device and gpus)") from None


def expanded(value: str) -> str:
    """``256k`` as ``262144``; anything else as it is. Raises UserError for a size that is not whole."""
    match = _SIZE.fullmatch(value)
    if match is None:
        return value
    number = float(match[1]) * (2**10 if match[2] in "kK" else 2**20)
    if not number.is_integer():
        raise UserError(f"--sweep: {value} is not a whole number (1k is 1024)")
    return str(int(number))


# --- planning


def sweep(
    path: Path,
    overrides: Sequence[str],
    axes: Sequence[Axis],
    device: str | None,
    plan_run: PlanRun,
    *,
    prepare: Callable[[Sequence[Combination]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Plan every combination of ``axes`` on top of the config file at ``path`` and ``overrides``; the last axis varies fastest.

    ``device``: where ``axes`` holds none; ``prepare`` gets all combinations that the configuration allows before the first is planned;
    ``progress(done, total)`` is called after each. Raises UserError when the configuration itself, without any axis, is the reason
    that every combination is refused.
    """
    rows = [_resolved(path, overrides, axes, values, device) for values in itertools.product(*(axis.values for axis in axes))]
    if prepare is not None:
        prepare([(row.config, row.device) for row in rows if row.config is not None])
    for i, row in enumerate(rows):
        rows[i] = _planned(row, plan_run)
        if progress is not None:
            progress(i + 1, len(rows))
    if all(row.plan is None for row in rows):
        plan_run(config_file.resolve(path, overrides), device)
    return rows


def _resolved(path: Path, overrides: Sequence[str], axes: Sequence[Axis], values: Sequence[str], device: str | None) -> Row:
    swept = {axis.key: value for axis, value in zip(axes, values, strict=True)}
    device = swept.get("device", device)
    try:
        settings = [f"{key}={expanded(value)}" for key, value in swept.items() if key not in ("device", "gpus")]
        config = _with_ranks(path, [*overrides, *settings], int(swept["gpus"]) if "gpus" in swept else None)
        config = settled(config, device).config
        return Row(swept, device, degrees_of(config), config)
    except UserError as error:
        return Row(swept, device, refused=_reason(error, path))


def _planned(row: Row, plan_run: PlanRun) -> Row:
    if row.config is None:
        return row
    try:
        return replace(row, plan=plan_run(row.config, row.device))
    except (UserError, ValueError) as error:
        return replace(row, refused=_reason(error, None))


def _with_ranks(path: Path, overrides: Sequence[str], gpus: int | None) -> RunConfig:
    """The configuration on ``gpus`` ranks (None: as many as it says)."""
    if gpus is not None and _leaves_degrees_open(path, overrides):
        overrides = [*overrides, f"parallel.ranks={gpus}"]
    elif gpus is not None:
        other = _other_degrees(path, overrides)
        fixed = ["parallel.dp_replicate=1", "parallel.dp_shard=1", "parallel.tp=1"] if gpus % other else []
        overrides = [*overrides, *fixed, f"parallel.cp={gpus if fixed else gpus // other}"]
    return config_file.resolve(path, overrides)


def _leaves_degrees_open(path: Path, overrides: Sequence[str]) -> bool:
    try:
        return bool(config_file.resolve(path, overrides).parallel.chosen_by_plan)
    except UserError:  # perhaps of the length that given degrees cannot split
        return False


def _other_degrees(path: Path, overrides: Sequence[str]) -> int:
    """dp_replicate x dp_shard x tp, read with ``parallel.cp=1`` so that a length that only more ranks refuse does not stand in the way."""
    parallel = config_file.resolve(path, [*overrides, "parallel.cp=1"]).parallel
    return parallel.dp_replicate * parallel.dp_shard * parallel.tp


def _reason(error: Exception, path: Path | None) -> str:
    """The error's lines in one, without the places they name: the row says where they come from."""
    place = re.compile(rf"(?:{re.escape(str(path))}(?::\d+)?|{config_file.COMMAND_LINE}): ")
    return "; ".join(place.sub("", line, count=1) for line in str(error).splitlines())


# --- for machines


def to_json(rows: Sequence[Row]) -> str:
    """The rows as JSON: bytes, seconds and shares as numbers, null where there is no plan or no prediction."""
    return json.dumps({"format_version": FORMAT_VERSION, "rows": [_record(row) for row in rows]}, indent=2) + "\n"


def _record(row: Row) -> dict[str, Any]:
    plan, prediction = row.plan, row.plan.prediction if row.plan is not None else None
    return {
        "values": row.values,
        "device": plan.device if plan is not None else row.device,
        "degrees": row.degrees,
        "ranks": plan.ranks if plan is not None else None,
        "refused": row.refused or None,
        "fits": plan.fits if plan is not None else None,
        "peak_bytes": plan.peak_bytes if plan is not None else None,
        "peak_moment": plan.peak_moment if plan is not None else None,
        "limit_bytes": plan.limit_bytes if plan is not None else None,
        "smallest_budget_gib": plan.smallest_budget_gib if plan is not None else None,
        "host_bytes": plan.host_bytes if plan is not None else None,
        "method": plan.method if plan is not None else None,
        "step_seconds": prediction.step_seconds if prediction is not None else None,
        "tokens_per_second": prediction.tokens_per_second if prediction is not None else None,
        "mfu": prediction.mfu if prediction is not None else None,
        "would_fit": row.remedy.settings if row.remedy is not None else None,
    }
