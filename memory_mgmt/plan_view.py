"""How a memory plan is shown: aligned text in a pipe or log file, a coloured table on a terminal. Imports no torch.

Both hold the same facts in the same order: who holds what at the peak, what happens to each layer's activations, the predicted
step, host memory, addresses, what limits the run, and the verdict. What a plan does not hold is left out.
Try alone: ``longstride plan debug_cpu``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memory_mgmt.plan import MemoryPlan, Prediction, gib, verdict
from memory_mgmt.policy import CLASSES, LayerPolicy, Policy, Split

if TYPE_CHECKING:
    from rich.console import Group

CLASS_NAMES = {"input": "input", "projections": "q,k,v", "mixer": "mixer", "feed_forward": "feed-forward"}
"""What people call the classes of a layer's activations."""
COLORS = {
    "parameters": "#7e8aa2",
    "gradients": "#b07aa1",
    "optimizer": "#9c755f",
    "activations": "#4e79a7",
    "transient": "#f28e2b",
    "loss": "#e15759",
    "communication": "#76b7b2",
    "batch": "#59a14f",
    "overhead": "#bab0ac",
    "outside": "#d7d0c8",
}
"""One color per kind of a plan's terms; the memory timeline uses the same for the kinds that both know."""

HEADER = ("what one rank holds", "kind", "at the peak", "share", "how it is computed")
_SHARES = {"swap": "swap", "keep": "keep", "quantise": "eight bits", "recompute": "recompute"}
"""Shares of a split in the order of the tokens, and what people read."""
_NEGLIGIBLE = 0.005
_LABEL_WIDTH = 16


def table_rows(plan: MemoryPlan) -> list[tuple[str, str, str, str, str]]:
    """(term, kind, at the peak, share, formula) of what is held at the peak, largest first; the last row is the total."""
    terms = sorted((term for term in plan.terms if term.bytes), key=lambda term: -term.bytes)
    total = max(1, plan.peak_bytes)
    rows = [(term.name, term.kind, gib(term.bytes), percent(term.bytes / total), term.formula) for term in terms]
    return [*rows, ("total", "", gib(plan.peak_bytes), "", f"peak at '{plan.peak_moment}'")]


def plain(plan: MemoryPlan) -> str:
    """The plan as aligned text, for pipes and log files."""
    rows = [HEADER, *table_rows(plan)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    body = [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}".rstrip() for row in rows
    ]
    sections = [[label.ljust(_LABEL_WIDTH) + text for label, text in section] for section in _sections(plan)]
    return "\n\n".join("\n".join(lines) for lines in [[title(plan), *body], *sections] if lines)


def render(plan: MemoryPlan) -> Group:
    """The plan as a rich renderable, for a terminal."""
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title(plan), title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for name, align in zip(HEADER, ("left", "left", "right", "right", "left"), strict=True):
        table.add_column(name, justify=align, style="dim" if name == HEADER[-1] else "", no_wrap=name == HEADER[2])
    *body, total = table_rows(plan)
    for name, kind, size, share, formula in body:
        table.add_row(Text(name), Text("■ ", style=COLORS.get(kind, "")) + Text(kind), Text(size), Text(share), Text(formula))
    table.add_row(*(Text(cell, style="bold") for cell in total))
    parts: list[RenderableType] = [table]
    for section in _sections(plan):
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column()
        for label, text in section:
            grid.add_row(Text(label), Text(text, style=_verdict_style(plan) if label == "verdict" else ""))
        parts += [Text(""), grid]
    return Group(*parts)


def title(plan: MemoryPlan) -> str:
    """One line that says what was planned, and how."""
    return f"memory plan ({plan.method}; {plan.device}, {plan.ranks} rank{'s' * (plan.ranks != 1)})"


def percent(share: float) -> str:
    """A share for people: ``38 %``, one decimal below one percent."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else f"{100 * share:.1f} %"


def seconds(value: float) -> str:
    """A time for people, three digits: ``374 s``, ``12.3 s``, ``45.1 ms``."""
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _verdict_style(plan: MemoryPlan) -> str:
    return "bold green" if plan.fits else "bold red"


def _said(plan: MemoryPlan) -> list[tuple[str, str]]:
    return [(label, text) for label, text in (("one sequence", plan.sequence), ("compiled", plan.compiled)) if text]


def _sections(plan: MemoryPlan) -> list[list[tuple[str, str]]]:
    """(label, text) lines below the table, in groups; groups that would be empty are left out."""
    groups = [
        [("layers " if i == 0 else "", line) for i, line in enumerate(policy_lines(plan.policy))] if plan.policy else [],
        [*prediction_lines(plan.prediction), *_said(plan), *_host_lines(plan)],
        _address_lines(plan),
        [("binding", plan.binding)] * bool(plan.binding) + [("more would buy", text) for text in plan.worth],
        [
            ("verdict", verdict(plan)),
            *_budget_lines(plan),
            *(("would lower it", f"{change.settings} -> {gib(change.peak_bytes)} ({change.cost})") for change in plan.changes),
            *([("not counted", "; ".join(plan.not_counted))] if plan.not_counted else []),
        ],
    ]
    return [_once(group) for group in groups if group]


def _budget_lines(plan: MemoryPlan) -> list[tuple[str, str]]:
    """What would have to be allowed for this policy, where the device's memory is what it exceeds."""
    if plan.limit_bytes is None or plan.peak_bytes <= plan.limit_bytes:
        return []
    larger = " and a device that has it" if plan.device_bytes is not None and plan.peak_bytes > plan.device_bytes else ""
    return [("would be enough", f"memory.budget_gib={plan.smallest_budget_gib:.2f}{larger}")]


def _once(lines: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each label only on the first of the lines that share it."""
    return [("" if i and lines[i - 1][0] == label else label, text) for i, (label, text) in enumerate(lines)]


# --- policy


def policy_lines(policy: Policy) -> list[str]:
    """One line per set of equal layers, in columns, such as ``0-29  input swap  q,k,v recompute  mixer keep  feed-forward keep 40 %
    recompute 60 %``; then the settings that hold for all layers.
    """
    groups: dict[LayerPolicy, list[int]] = {}
    for layer, choice in enumerate(policy.layers):
        groups.setdefault(choice, []).append(layer)
    rows = [
        (ranges(layers), *(f"{CLASS_NAMES[name]} {split_text(choice.of(name))}" for name in CLASSES)) for choice, layers in groups.items()
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(len(CLASSES) + 1)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    tiles = {"loss": policy.loss_tile_tokens, "feed-forward": policy.ffn_tile_tokens, "memory layers": policy.memory_tile_tokens}
    shared = [f"{name} in tiles of {tokens:,} tokens" for name, tokens in tiles.items() if tokens]
    if policy.group_blocks > 1:
        shared.insert(0, f"only the input of every {ordinal(policy.group_blocks)} block is held")
    return lines + (["; ".join(shared)] if shared else [])


def split_text(split: Split) -> str:
    """``keep``, or ``keep 40 % recompute 60 %`` where several shares are above half a percent."""
    shares = {words: getattr(split, name) for name, words in _SHARES.items() if getattr(split, name) >= _NEGLIGIBLE}
    return next(iter(shares)) if len(shares) == 1 else " ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())


def ordinal(number: int) -> str:
    """``2nd``, ``3rd``, ``14th``."""
    last = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{last}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: ``0-29``, ``0, 3-5``, ``0-30 every 2nd``."""
    parts: list[str] = []
    start = 0
    while start < len(numbers):
        stop = start + 1
        step = numbers[stop] - numbers[start] if stop < len(numbers) else 1
        while stop < len(numbers) and numbers[stop] - numbers[stop - 1] == step:
            stop += 1
        if step > 1 and stop - start < 3:  # two numbers are no pattern
            stop = start + 1
        first, last = numbers[start], numbers[stop - 1]
        parts.append(f"{first}" if first == last else f"{first}-{last}" + (f" every {ordinal(step)}" if step > 1 else ""))
        start = stop
    return ", ".join(parts)


# --- prediction, host, addresses


def prediction_lines(prediction: Prediction | None) -> list[tuple[str, str]]:
    """Predicted step time, what it is made of, and rates."""
    if prediction is None:
        return []
    p = prediction
    parts = {
        "compute": p.compute_seconds - p.recompute_seconds,
        "recompute": p.recompute_seconds,
        "exposed communication": p.exposed_communication_seconds,
        "exposed copies": p.exposed_copy_seconds,
    }
    rest = p.step_seconds - sum(parts.values())
    if rest > _NEGLIGIBLE * p.step_seconds:
        parts["other"] = rest
    split = ", ".join(f"{name} {seconds(t)} ({percent(t / p.step_seconds)})" for name, t in parts.items() if t > 0)
    rate = f"{p.tokens_per_second:,.0f} tokens/s" + (f", MFU {100 * p.mfu:.1f} %" if p.mfu is not None else "")
    lines = [("predicted step", f"{seconds(p.step_seconds)}: {split}"), ("speed", rate)]
    if p.tensor_bytes:
        sent = f"{gib(p.tensor_bytes)} sent per rank and step in {seconds(p.tensor_seconds)}, waited for"
        lines.append(("tensor parallel", sent))
    return lines + ([("rates", p.source)] if p.source else [])


def uses_host(plan: MemoryPlan) -> bool:
    """Whether host memory is worth showing: a batch that waits there is not."""
    return plan.host_bytes >= _NEGLIGIBLE * plan.peak_bytes


def _host_lines(plan: MemoryPlan) -> list[tuple[str, str]]:
    if not uses_host(plan):
        return []
    lines = []
    p = plan.prediction
    if plan.host_bytes or (p is not None and p.host_bytes_per_node):
        per_node = f", {gib(p.host_bytes_per_node)} per node" if p is not None and p.host_bytes_per_node else ""
        allowed = f"; {gib(plan.host_budget_bytes)} per rank allowed" if plan.host_budget_bytes is not None else ""
        states = "; the optimizer's states live there" if plan.offload_optimizer == "host" else ""
        states = "; parameters and the optimizer's states live there" if plan.offload_parameters == "host" else states
        lines.append(("host memory", f"{gib(plan.host_bytes)} per rank{per_node}{allowed}{states}"))
    if p is not None and p.copied_bytes:
        rate = p.copied_bytes / p.step_seconds / 1e9
        lines.append(("host copies", f"{gib(p.copied_bytes)} per rank and step, {rate:.3g} GB/s over the whole step"))
    return lines


def _address_lines(plan: MemoryPlan) -> list[tuple[str, str]]:
    if plan.addresses is None:
        return []
    a = plan.addresses
    ratio = a.height_bytes / max(1, a.lower_bound_bytes)
    bound = f"{gib(a.height_bytes)} for at least {gib(a.lower_bound_bytes)} live at once, ratio {ratio:.4f}"
    return [("addresses", f"{bound}: {a.status} ({a.method}, {seconds(a.seconds)})")]
