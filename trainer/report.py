"""One HTML page about a run that needs nothing else: no network, no script, no other file. Imports no torch.

Everything that comes from files is text to the page: names, reasons and settings may hold anything.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from memory_mgmt.plan import MemoryPlan
from memory_mgmt.plan_view import plain as plan_text
from trainer.console import GIB
from trainer.metrics_file import decode_record
from trainer.monitor_view import number, view
from trainer.run_dir import RunDir
from trainer.runs_table import RunRow

POINTS = 1_000
"""Most points of a curve: more than a page is wide."""
WIDTH, HEIGHT, LEFT, BOTTOM = 860, 220, 64, 22
_COLOURS = ("#1f6feb", "#d1242f", "#6e7781", "#1a7f37")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:940px;margin:2em auto;padding:0 1em;color:#1f2328}
td,th{padding:.1em 1em .1em 0;text-align:left;vertical-align:top} pre{background:#f6f8fa;padding:1em;overflow:auto;font-size:12px}
svg{width:100%;height:auto} svg text{font-size:12px;fill:#57606a} h2{font-size:1.1em;margin-top:2em}
"""
WIDE_RATIO = 30.0
Curve = list[tuple[int, float]]
"""Points (step, value)."""


def page(row: RunRow, attempts: Sequence[dict[str, Any]], *, now: float | None = None) -> str:
    """The page of a run. ``attempts``: records of its starts by Slurm, if any."""
    run_dir = RunDir(row.path)
    shown = view(row, now=now)
    records = _read(run_dir)
    parts = [f"<h1>{html.escape(row.name)}</h1>", _table(shown.facts)]
    train = [record for record in records if record.get("split") == "train"]
    valid = [record for record in records if record.get("split") == "valid"]
    parts.append(_figure("Loss, nats per token", {"training": _curve(train, "loss"), "held-out": _curve(valid, "loss")}))
    parts.append(_figure("Gradient norm", {"before clipping": _curve(train, "grad_norm")}, logarithmic=True))
    parts.append(_figure("Tokens per second", {"training": _curve(train, "tokens_per_second")}))
    memory = {name: _curve(train, f"memory_{key}_bytes", 1 / GIB) for name, key in _MEMORY.items()}
    parts.append(_figure("Memory of rank 0, GiB", memory))
    if attempts:
        parts.append("<h2>Attempts</h2>" + _attempts(attempts))
    if (plan := _plan(run_dir)) is not None:
        parts.append(f"<h2>Memory plan</h2><pre>{html.escape(plan_text(plan))}</pre>")
    if run_dir.config.is_file():
        parts.append(f"<h2>Settings</h2><pre>{html.escape(run_dir.config.read_text(errors='replace'))}</pre>")
    if shown.log_name:
        parts.append(f"<h2>{html.escape(shown.log_name)}</h2><pre>{html.escape(chr(10).join(shown.log))}</pre>")
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{policy}<title>{html.escape(row.name)}</title><style>{_STYLE}</style>'
    return "\n".join([head, *filter(None, parts), f"<p>Made {made} by longstride report.</p></html>\n"])


_MEMORY = {"measured peak": "peak", "budget": "budget", "planned": "planned"}


def _read(run_dir: RunDir) -> list[dict[str, Any]]:
    try:
        with run_dir.metrics.open("rb") as stream:
            return [record for line in stream if (record := decode_record(line)) is not None]
    except OSError:
        return []


def _plan(run_dir: RunDir) -> MemoryPlan | None:
    try:
        return MemoryPlan.from_json(run_dir.memory_plan.read_text())
    except (OSError, ValueError):
        return None


def _curve(records: Sequence[dict[str, Any]], name: str, scale: float = 1.0) -> Curve:
    points = [(record["step"], value * scale) for record in records if (value := number(record, name)) is not None]
    finite = [point for point in points if math.isfinite(point[1])]
    every = max(1, -(-len(finite) // POINTS))
    return [*finite[::every], *(finite[-1:] if (len(finite) - 1) % every else [])]


def _figure(title: str, curves: dict[str, Curve], *, logarithmic: bool = False) -> str:
    """A heading and a drawing, nothing where no curve has a point. ``logarithmic``: where values, all positive, differ by more than
    ``WIDE_RATIO``; one spike would flatten the rest."""
    drawn = {name: curve for name, curve in curves.items() if curve}
    if not drawn:
        return ""
    values = [value for curve in drawn.values() for _, value in curve]
    steps = [step for curve in drawn.values() for step, _ in curve]
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    wide = logarithmic and 0 < low * WIDE_RATIO < high < math.inf
    scaled: Callable[[float], float] = math.log10 if wide else float
    bottom, span = scaled(low), scaled(high) - scaled(low)

    def across(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 8) * (step - first) / max(1, last - first)

    def down(value: float) -> float:
        return 10 + (HEIGHT - BOTTOM - 10) * (1 - ((scaled(value) - bottom) / span if span > 0 else 0.5))

    lines, legend = [], []
    for (name, curve), colour in zip(drawn.items(), _COLOURS, strict=False):
        points = " ".join(f"{across(step):.1f},{down(value):.1f}" for step, value in curve)
        if len(curve) == 1:
            x, y = points.split(",")
            lines.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        else:
            lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        value = curve[-1][1]
        last_value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        legend.append(f'<span style="color:{colour}">&#9632;</span> {html.escape(name)} {last_value}')
    levels = [10.0**power for power in ticks(scaled(low), scaled(high)) if power == round(power)] if wide else ticks(low, high)
    grid = [
        f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{down(tick):.1f}" y2="{down(tick):.1f}" stroke="#d8dee4"/>'
        f'<text x="{LEFT - 8}" y="{down(tick) + 4:.1f}" text-anchor="end">{tick:,.6g}</text>'
        for tick in levels
    ]
    grid += [f'<text x="{LEFT}" y="{HEIGHT - 4}">step {first}</text>']
    for tick in ticks(first, last):
        if tick == round(tick) and across(tick) > LEFT + 60:
            anchor = "end" if across(tick) > WIDTH - 30 else "middle"
            grid.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{tick:,.0f}</text>')
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join([*grid, *lines])}</svg>'
    scale = ", logarithmic" if wide else ""
    return f"<h2>{html.escape(title)}{scale}</h2><p>{' &nbsp; '.join(legend)}</p>{drawing}"


def ticks(low: float, high: float) -> list[float]:
    """A few round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``; where there is nothing between them, ``low``."""
    span = high - low
    if not max(1e-300, 1e-9 * max(abs(low), abs(high))) < span < 1e300:
        return [low]
    unit = 10.0 ** math.floor(math.log10(span / 6))
    apart = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 6)
    found = [number * apart for number in range(math.ceil(low / apart), math.floor(high / apart) + 1)]
    return [tick for tick in found if low <= tick <= high]


def _table(facts: Sequence[tuple[str, str]]) -> str:
    rows = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in facts]
    return f"<table>{''.join(rows)}</table>"


def _attempts(records: Sequence[dict[str, Any]]) -> str:
    """One line for each start: when, where, how it ended."""
    ends = {record["attempt"]: record for record in records if "decision" in record}
    lines = []
    for record in records:
        if "started" not in record:
            continue
        end = ends.get(record["attempt"], {})
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(number(record, "started")))
        told = f"{end['decision']}: {end.get('reason', '')}" if end else "left no account of its end"
        lines.append((f"{record['attempt']}", f"{began}, job {record.get('job')} on {record.get('nodes')}; {told}"))
    return _table(lines)
