"""The fit table of ``longstride plan --sweep``: aligned text in a pipe, coloured on a terminal. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memory_mgmt.plan import gib
from memory_mgmt.plan_view import seconds, uses_host
from trainer.sweep import Row

if TYPE_CHECKING:
    from rich.console import Group

NEEDS = "what it would need"
_RIGHT = {"planned peak", "host memory", "step time", "tokens/s", "MFU"}
_STYLES = {"yes": "green", "no": "red", "refused": "yellow"}

Table = tuple[list[str], list[list[str]], list[str]]
"""Header, rows, and one line for each column that was left out because it says the same everywhere."""


def table(rows: Sequence[Row]) -> Table:
    """The table without the columns whose values do not vary (all are kept where there is one row only)."""
    cells = [_cells(row) for row in rows]
    header = list(cells[0])
    kept, same = [], []
    for name in header:
        values = {row[name] for row in cells}
        if values <= {"", "-"}:
            continue
        if len(values) == 1 and len(rows) > 1:
            same.append(f"{name}: {next(iter(values))} in every row")
        else:
            kept.append(name)
    return kept, [[row[name] for name in kept] for row in cells], same


def plain(rows: Sequence[Row]) -> str:
    """The table as aligned text."""
    header, body, same = table(rows)
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = []
    for line in [header, *body]:
        padded = (text.rjust(w) if name in _RIGHT else text.ljust(w) for name, text, w in zip(header, line, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, *same])


def render(rows: Sequence[Row]) -> Group:
    """The table as a rich renderable, for a terminal."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    header, body, same = table(rows)
    shown = RichTable(box=None, pad_edge=False, header_style="dim")
    for name in header:
        shown.add_column(name, justify="right" if name in _RIGHT else "left", no_wrap=name != NEEDS, overflow="fold")
    for line in body:
        shown.add_row(*(Text(text, style=_STYLES.get(text, "") if name == "fits" else "") for name, text in zip(header, line, strict=True)))
    return Group(shown, *(Text(line, style="dim") for line in same))


def _cells(row: Row) -> dict[str, str]:
    plan = row.plan
    prediction = plan.prediction if plan is not None else None
    return {
        **row.values,
        "ranks": "-" if row.degrees == f"cp {row.values.get('gpus')}" else row.degrees or "-",
        "planned peak": gib(plan.peak_bytes) if plan is not None else "-",
        "host memory": gib(plan.host_bytes) if plan is not None and uses_host(plan) else "-",
        "fits": "refused" if plan is None else "yes" if plan.fits else "no",
        "step time": seconds(prediction.step_seconds) if prediction is not None else "-",
        "tokens/s": f"{prediction.tokens_per_second:,.0f}" if prediction is not None else "-",
        "MFU": f"{100 * prediction.mfu:.1f} %" if prediction is not None and prediction.mfu is not None else "-",
        NEEDS: _needs(row),
    }


def _needs(row: Row) -> str:
    plan = row.plan
    if plan is None:
        return row.refused
    if plan.fits or plan.limit_bytes is None:
        return ""
    if row.remedy is not None:
        return f"{row.remedy.settings} -> {gib(row.remedy.peak_bytes)} ({row.remedy.cost})"
    name = "memory.budget_gib" if plan.limit_bytes == plan.budget_bytes else plan.device
    least = f"{gib(plan.peak_bytes)} per rank where {name} allows {gib(plan.limit_bytes)}"
    nearest = min(plan.changes, key=lambda change: change.peak_bytes, default=None)
    return least if nearest is None else f"{least}; nearest: {nearest.settings} -> {gib(nearest.peak_bytes)}"
