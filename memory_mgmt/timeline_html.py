"""The memory timeline as one HTML page that needs nothing else: no network, no library, a few hundred kilobytes.

The page is ``timeline_page.html`` with the script ``timeline_page.js`` and the data of one trace put in. Columns of numbers are
written as base-128 varints in base64, an eighth of the same as JSON. Imports no torch.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_mgmt.plan import MemoryPlan, gib, verdict
from memory_mgmt.timeline import KIND_COLORS, KIND_NAMES, OUTSIDE_COLOR, OUTSIDE_NAME, Timeline, kinds_of, timeline
from memory_mgmt.trace import Trace, TracedBuffer, TraceKind

HERE = Path(__file__).resolve().parent
POINTS = 16_000
"""Points of the curve at most; its peaks stay exact."""
BUFFERS = 40_000
"""Buffers written at most: all that are live at the peak, then the largest. The page says when it does not know them all."""
PEAK_ROWS = 15


def timeline_html(trace: Trace, plan: MemoryPlan | None = None, offsets: Mapping[int, int] | None = None, *, title: str = "") -> str:
    """The page.

    Args:
        plan: adds the verdict, the limit and what no trace sees.
        offsets: planned address in bytes by ``TracedBuffer.id``; adds the view of addresses. Buffers without one are not in it.
    Raises ValueError for a trace without device buffers.
    """
    exact = timeline(trace, plan)
    shown = exact.thinned(POINTS)
    kinds = kinds_of(trace.buffers)
    rows = dict(zip(shown.kinds, shown.by_kind.tolist(), strict=True))
    kept = _kept_buffers(trace, shown.peak_time)
    data = {
        "end": trace.end,
        "kinds": [[KIND_NAMES[kind], KIND_COLORS[kind]] for kind in kinds],
        "times": _deltas(shown.times.tolist()),
        "curve": [_deltas(rows.get(kind, [0] * len(shown.times))) for kind in kinds],
        "hostTimes": _deltas(shown.host_times.tolist()),
        "host": _deltas(shown.host.tolist()),
        "phases": [[stretch.name, stretch.start, stretch.end] for stretch in shown.phases],
        "marks": trace.marks,
        "peak": shown.peak_bytes,
        "peakTime": shown.peak_time,
        "outside": shown.outside_bytes,
        "outsideName": OUTSIDE_NAME,
        "outsideColor": OUTSIDE_COLOR,
        "outsideText": ", ".join(name for name, _ in shown.outside_terms),
        "limit": shown.limit_bytes,
        "limitName": shown.limit_name,
        "height": max((offset + b.size for b in kept if (offset := (offsets or {}).get(b.id)) is not None), default=0),
        **_buffers(kept, kinds, offsets),
    }
    parts = {
        "title": html.escape(title or f"memory of one training step, {shown.device}: peak {gib(shown.peak_bytes + shown.outside_bytes)}"),
        "facts": _facts(shown, plan),
        "tabs": _tab("live", "live memory", True) + (_tab("addresses", "addresses", False) if offsets else ""),
        "host": '<canvas id="host" aria-hidden="true"></canvas>' if shown.uses_host else "",
        "addresses": _ADDRESS_PANEL if offsets else "",
        "peak_rows": _peak_rows(trace, shown),
        "notes": html.escape(_notes(trace, exact, shown, kept)),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "script": (HERE / "timeline_page.js").read_text(),
    }
    page = (HERE / "timeline_page.html").read_text()
    pieces = page.split("{{")  # one pass: what is put in is never searched for names
    return pieces[0] + "".join(parts[name] + rest for name, _, rest in (piece.partition("}}") for piece in pieces[1:]))


# --- data


def _kept_buffers(trace: Trace, peak_time: int) -> list[TracedBuffer]:
    """Those the page knows, by time of birth; empty ones and ones that live no time are left out."""
    real = [b for b in trace.buffers if b.size and b.upper > b.lower]
    if len(real) > BUFFERS:
        real = sorted(real, key=lambda b: (not b.lower <= peak_time < b.upper, -b.size))[:BUFFERS]
    return sorted(real, key=lambda b: b.lower)


def _buffers(kept: Sequence[TracedBuffer], kinds: Sequence[TraceKind], offsets: Mapping[int, int] | None) -> dict[str, Any]:
    modules, ops = sorted({b.module for b in kept}), sorted({b.op for b in kept})
    module_index, op_index = {name: i for i, name in enumerate(modules)}, {name: i for i, name in enumerate(ops)}
    columns = {
        "lower": _deltas([b.lower for b in kept]),
        "length": _varints(b.upper - b.lower for b in kept),
        "size": _varints(b.size for b in kept),
        "module": _varints(module_index[b.module] for b in kept),
        "op": _varints(op_index[b.op] for b in kept),
        "kind": _varints(kinds.index(b.kind) for b in kept),
        "place": _varints(int(b.place == "host") for b in kept),
        "offset": _varints(offsets.get(b.id, -1) + 1 for b in kept) if offsets else None,
    }
    return {"modules": modules, "ops": ops, "buffers": columns}


def _varints(numbers: Iterable[int]) -> str:
    """Base64 of the numbers, each as base-128 digits, least significant first, all but the last with the high bit set."""
    out = bytearray()
    for number in numbers:
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        out.append(number)
    return base64.b64encode(out).decode()


def _deltas(numbers: Sequence[int]) -> str:
    """Varints of the differences (the first from 0), with the sign in the lowest bit."""
    steps = (number - before for number, before in zip(numbers, [0, *numbers], strict=False))
    return _varints(2 * step if step >= 0 else -2 * step - 1 for step in steps)


# --- text


def _tab(name: str, text: str, selected: bool) -> str:
    state = f'aria-selected="{str(selected).lower()}" tabindex="{0 if selected else -1}"'
    return f'<button type="button" role="tab" id="tab-{name}" aria-controls="panel-{name}" {state}>{text}</button>'


_ADDRESS_PANEL = """<div id="panel-addresses" role="tabpanel" aria-labelledby="tab-addresses" hidden>
<canvas id="addresses" tabindex="0" role="img" aria-describedby="where"
aria-label="Planned addresses over the step: one rectangle per buffer. Arrow keys move, plus and minus zoom."></canvas>
</div>"""


def _facts(shown: Timeline, plan: MemoryPlan | None) -> str:
    peak = f"peak of the traced step {gib(shown.peak_bytes)} in {shown.peak_label or 'the step'}"
    lines = [f"<p>{html.escape(peak)}</p>"]
    if plan is not None:
        lines.insert(0, f'<p class="verdict {"fits" if plan.fits else "not"}">{html.escape(verdict(plan))}</p>')
        if plan.addresses is not None:
            a = plan.addresses
            text = f"addresses: {gib(a.height_bytes)} for at least {gib(a.lower_bound_bytes)}, {a.status} ({a.method})"
            lines.append(f"<p>{html.escape(text)}</p>")
    return "\n".join(lines)


@dataclass
class Owner:
    """Buffers of one operation, kind and module; those of equal layers together."""

    kind: TraceKind
    op: str
    paths: set[str]
    bytes: int = 0
    count: int = 0

    @property
    def module(self) -> str:
        """``blocks.3.ffn``, or ``blocks.*.ffn, 32 layers``."""
        first = min(self.paths)
        return first if len(self.paths) == 1 else f"{_without_layer(first)}, {len(self.paths)} layers"


def owners(buffers: Iterable[TracedBuffer]) -> list[Owner]:
    """Who holds ``buffers``, largest first."""
    groups: dict[tuple[str, str, str], Owner] = {}
    for b in buffers:
        owner = groups.setdefault((b.kind, _without_layer(b.module), b.op), Owner(b.kind, b.op, set()))
        owner.paths.add(b.module)
        owner.bytes += b.size
        owner.count += 1
    return sorted(groups.values(), key=lambda owner: -owner.bytes)


def _without_layer(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path, count=1)


def _peak_rows(trace: Trace, shown: Timeline) -> str:
    """Owners at the peak as table rows that need no script."""
    rows = []
    for owner in owners(trace.live_at(shown.peak_time))[:PEAK_ROWS]:
        times = f"  × {owner.count}" if owner.count > 1 else ""
        chip = f'<span class="chip" style="background:{KIND_COLORS[owner.kind]}"></span>'
        rows.append(
            f'<tr><td class="number">{gib(owner.bytes)}</td><td>{chip}{KIND_NAMES[owner.kind]}</td>'
            f'<td class="path">{html.escape(owner.module or "-")}</td><td class="path">{html.escape(owner.op + times)}</td></tr>'
        )
    return "\n".join(rows)


def _notes(trace: Trace, exact: Timeline, shown: Timeline, kept: Sequence[TracedBuffer]) -> str:
    points = "all" if len(shown.times) == len(exact.times) else f"{len(shown.times):,} (peaks exact) of"
    real = sum(1 for b in trace.buffers if b.size and b.upper > b.lower)
    buffers = "all" if len(kept) == real else f"the {len(kept):,} largest of"
    hidden = [f"{name} {gib(size)}" for name, size in shown.outside_terms]
    outside = f" {OUTSIDE_NAME.capitalize()}, held at all times: {', '.join(hidden)}." if hidden else ""
    return f"This page holds {points} {len(exact.times):,} points of the curve and {buffers} {real:,} buffers.{outside}"
