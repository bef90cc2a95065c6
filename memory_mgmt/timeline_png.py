"""The memory timeline as a picture. Imports no torch, and matplotlib only when it draws."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from memory_mgmt.plan import GIB, MemoryPlan, gib
from memory_mgmt.timeline import KIND_COLORS, KIND_NAMES, OUTSIDE_COLOR, OUTSIDE_NAME, Timeline, timeline
from memory_mgmt.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
POINTS = 4000
"""More points than the picture has columns."""
INK, MUTED = "#22262b", "#6b7280"
MARK = "#c1121f"
NEAR = 2.5
"""A limit below this times the peak is drawn as a line."""


def timeline_png(trace: Trace, plan: MemoryPlan | None = None, *, title: str = "") -> bytes:
    """Live bytes over the step stacked by kind, with phases, the limit and the peak; below, host memory where it is used.

    Raises ValueError for a trace without device buffers.
    """
    from matplotlib.figure import Figure

    shown = timeline(trace, plan).thinned(POINTS)
    figure = Figure(figsize=(12, 6.4 if shown.uses_host else 5.4), layout="constrained", dpi=120)
    if shown.uses_host:
        device, host = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
        _draw_host(host, shown)
        host.set_xlabel("events of the step", color=MUTED)
    else:
        device = figure.subplots()
        device.set_xlabel("events of the step", color=MUTED)
    _draw_device(device, shown)
    _title(figure, device, shown, title)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _title(figure: Figure, axes: Axes, shown: Timeline, title: str) -> None:
    text = title or f"memory of one training step, {shown.device}: peak {gib(shown.peak_bytes + shown.outside_bytes)}"
    if shown.limit_bytes is not None and not _limit_is_near(shown):
        text += f"; {shown.limit_name} {gib(shown.limit_bytes)}"
    figure.suptitle(text, x=0.01, ha="left", color=INK, fontsize=12)
    handles, labels = axes.get_legend_handles_labels()
    columns = min(6, len(labels))
    figure.legend(handles[::-1], labels[::-1], loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5, labelcolor=INK)


def _draw_device(axes: Axes, shown: Timeline) -> None:
    scale, unit = _unit(int(shown.total.max()))
    times = np.append(shown.times, shown.end)
    layers = [np.append(row, row[-1]) / scale for row in shown.by_kind]
    names, colors = [KIND_NAMES[kind] for kind in shown.kinds], [KIND_COLORS[kind] for kind in shown.kinds]
    if shown.outside_bytes:
        layers.insert(0, np.full(len(times), shown.outside_bytes / scale))
        names.insert(0, OUTSIDE_NAME)
        colors.insert(0, OUTSIDE_COLOR)
    bottom = np.zeros(len(times))
    for values, name, color in zip(layers, names, colors, strict=True):
        axes.fill_between(times, bottom, bottom + values, step="post", color=color, linewidth=0, label=name)
        bottom = bottom + values
    axes.step(times, bottom, where="post", color=INK, linewidth=0.7)
    _draw_limit(axes, shown, scale)
    _draw_peak(axes, shown, scale)
    _draw_phases(axes, shown)
    axes.set_xlim(0, shown.end)
    axes.set_ylabel(f"{unit} on the device", color=MUTED)
    _plain_frame(axes)


def _limit_is_near(shown: Timeline) -> bool:
    """Whether the limit can be drawn to scale without flattening the rest; else the title names it."""
    return shown.limit_bytes is not None and shown.limit_bytes < NEAR * (shown.peak_bytes + shown.outside_bytes)


def _draw_limit(axes: Axes, shown: Timeline, scale: int) -> None:
    top = (shown.peak_bytes + shown.outside_bytes) / scale
    if shown.limit_bytes is None or not _limit_is_near(shown):
        axes.set_ylim(0, 1.18 * top)
        return
    limit = shown.limit_bytes / scale
    axes.set_ylim(0, 1.18 * max(top, limit))
    axes.axhline(limit, color=MARK, linestyle="--", linewidth=1.2)
    text = f"{shown.limit_name}: {gib(shown.limit_bytes)}"
    axes.annotate(text, (0, limit), (4, 3), textcoords="offset points", color=MARK, fontsize=8.5, va="bottom")


def _draw_peak(axes: Axes, shown: Timeline, scale: int) -> None:
    top = (shown.peak_bytes + shown.outside_bytes) / scale
    right = shown.peak_time > 0.6 * shown.end
    axes.plot([shown.peak_time], [top], marker="o", markersize=5, color=INK)
    axes.annotate(
        f"peak {gib(shown.peak_bytes + shown.outside_bytes)}\n{shown.peak_label}".strip(),
        (shown.peak_time, top),
        (-8 if right else 8, 5),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom",
        color=INK,
        fontsize=8.5,
    )


def _draw_phases(axes: Axes, shown: Timeline) -> None:
    """Bands with their names along the upper edge; names of narrow ones are left out."""
    for i, stretch in enumerate(shown.phases):
        if i % 2:
            axes.axvspan(stretch.start, stretch.end, color="#000000", alpha=0.045, linewidth=0, zorder=0)
        if i:
            axes.axvline(stretch.start, color=MUTED, linewidth=0.5, alpha=0.6)
        if stretch.end - stretch.start > 0.0085 * len(stretch.name) * shown.end:
            middle = (stretch.start + stretch.end) / 2
            axes.annotate(
                stretch.name, (middle, 1), (0, 3), xycoords=axes.get_xaxis_transform(), textcoords="offset points", ha="center", color=MUTED
            )


def _draw_host(axes: Axes, shown: Timeline) -> None:
    scale, unit = _unit(int(shown.host.max()))
    times, values = np.append(shown.host_times, shown.end), np.append(shown.host, shown.host[-1]) / scale
    axes.fill_between(times, 0, values, step="post", color="#8d99ae", linewidth=0)
    axes.annotate(
        f"at most {gib(int(shown.host.max()))}",
        (1, 1),
        (-4, -4),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="top",
    )
    axes.set_ylim(0, 1.35 * max(float(values.max()), 1e-9))
    axes.set_ylabel(f"{unit} on the host", color=MUTED)
    _plain_frame(axes)


def _plain_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _unit(most: int) -> tuple[int, str]:
    return (GIB, "GiB") if most >= GIB // 2 else (MIB, "MiB")
