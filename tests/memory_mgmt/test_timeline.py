"""The memory timeline: curves against a count by hand, peaks through thinning, the picture, and the page with its own script."""

import dataclasses
import html.parser
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_mgmt.plan import GIB, MemoryPlan, Moment, Term
from memory_mgmt.timeline import STACK, extremes, phases, timeline
from memory_mgmt.timeline_html import BUFFERS, owners, timeline_html
from memory_mgmt.timeline_png import timeline_png
from memory_mgmt.trace import Trace, TracedBuffer, TracedOp

SCRIPT = Path(__file__).resolve().parents[2] / "memory_mgmt" / "timeline_page.js"
NODE = shutil.which("node")
MIB = 2**20


def buffer(number: int, lower: int, upper: int, size: int, kind="transient", module="blocks.0.ffn", place="device") -> TracedBuffer:
    return TracedBuffer(number, lower, upper, size, size, kind, "aten::mm", module, 0, "forward", None, "compute", place)


def step(layers: int = 6, unit: int = 64 * MIB) -> Trace:
    """A step in small: resident parameters, one kept tensor per layer, transients, a loss, one tensor per layer on the host."""
    buffers: list[TracedBuffer] = []
    marks = []
    end = 20 * layers + 20

    def add(*args, **kwargs) -> None:
        buffers.append(buffer(len(buffers), *args, **kwargs))

    for i in range(layers):
        add(0, end, unit, "parameter", f"blocks.{i}")
        marks.append((1 + 10 * i, f"forward blocks.{i}"))
        add(1 + 10 * i, end - 10 - 10 * i, 2 * unit, "skeletal", f"blocks.{i}.attention")
        add(3 + 10 * i, 6 + 10 * i, unit, "transient", f"blocks.{i}.ffn")
        add(4 + 10 * i, end - 10 - 10 * i, unit // 2, "skeletal", f"blocks.{i}", "host")
    marks.append((1 + 10 * layers, "loss head"))
    add(1 + 10 * layers, 5 + 10 * layers, 3 * unit, "loss", "head")
    marks += [(10 + 10 * layers + 10 * i, f"backward blocks.{layers - 1 - i}") for i in range(layers)]
    marks.append((end - 8, "update"))
    return Trace("cuda", buffers, [], marks, end)


def plan_of(trace: Trace, budget_bytes: int | None = None) -> MemoryPlan:
    terms = (Term("step", "activations", trace.peak()[0], trace.peak()[0]), Term("CUDA context", "outside", GIB // 2, GIB // 2))
    return MemoryPlan("trace", "h100", 1, terms, (Moment("backward", trace.peak()[0]),), budget_bytes, 79 * GIB)


def test_curves_are_what_is_live_at_every_event():
    trace = step()
    shown = timeline(trace)
    for time in range(trace.end):
        point = int(np.searchsorted(shown.times, time, side="right")) - 1
        for row, kind in enumerate(shown.kinds):
            live = sum(b.size for b in trace.buffers if b.place == "device" and b.kind == kind and b.lower <= time < b.upper)
            assert shown.by_kind[row, point] == live, (time, kind)
        host = int(np.searchsorted(shown.host_times, time, side="right")) - 1
        assert shown.host[host] == sum(b.size for b in trace.live_at(time, "host"))
    assert (shown.peak_bytes, shown.peak_time) == trace.peak()
    assert shown.peak_label == "loss head"
    assert list(shown.kinds) == [kind for kind in STACK if kind in ("parameter", "skeletal", "loss", "transient")]


def test_the_top_of_the_chart_is_the_planned_peak():
    trace = step()
    plan = plan_of(trace, 40 * GIB)
    shown = timeline(trace, plan)
    assert int(shown.total.max()) == plan.peak_bytes
    assert shown.outside_terms == (("CUDA context", GIB // 2),)
    assert (shown.limit_bytes, shown.limit_name) == (40 * GIB, "memory.budget_gib")
    assert timeline(trace, dataclasses.replace(plan, budget_bytes=None)).limit_name == "memory of h100"
    smaller = dataclasses.replace(plan, terms=plan.terms[1:])  # a plan below the trace adds nothing
    assert timeline(trace, smaller).outside_bytes == 0 and timeline(trace, smaller).outside_terms == ()


def test_a_trace_without_device_buffers_is_refused():
    with pytest.raises(ValueError, match="no device buffers"):
        timeline(Trace("cpu", [buffer(0, 0, 3, 5, place="host")], [], [], 3))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=400), st.integers(2, 60))
def test_thinning_keeps_the_extremes(values, points):
    array = np.array(values, np.int64)
    kept = extremes(array, points)
    assert len(kept) <= points + 4 and list(kept) == sorted(set(kept.tolist()))
    assert array[kept].max() == max(values) and array[kept].min() == min(values)
    assert int(array.argmax()) in kept  # the first highest: where the peak is marked
    assert kept[0] == 0 and kept[-1] == len(values) - 1


def test_phases_come_from_the_marks_or_from_what_ran():
    named = [(stretch.name, stretch.start, stretch.end) for stretch in phases(step(2))]
    assert named == [("forward", 1, 21), ("loss", 21, 30), ("backward", 30, 52), ("update", 52, 60)]
    ops = [TracedOp(t, "aten::mm", "", None, p, 1, 1, "bf16") for t, p in ((2, "forward"), (5, "forward"), (9, "backward"))]
    bare = Trace("cpu", [buffer(0, 1, 12, 4)], ops, [(3, "something else")], 12)
    assert [(s.name, s.start, s.end) for s in phases(bare)] == [("forward", 1, 9), ("backward", 9, 12)]


def test_picture_with_and_without_host_memory_and_limit():
    trace = step()
    without = Trace(trace.device, trace.of("device"), [], trace.marks, trace.end)
    for drawn in (timeline_png(trace, plan_of(trace, 3 * GIB)), timeline_png(without), timeline_png(trace, plan_of(trace))):
        assert drawn.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", drawn[16:24])
        assert width >= 1200 and height >= 500
    assert timeline_png(without) != timeline_png(trace)


def page_data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_page_is_self_contained_and_well_formed():
    trace = step()
    trace.buffers[0].module = "</script><b>&"
    page = timeline_html(trace, plan_of(trace), {b.id: 64 * MIB * i for i, b in enumerate(trace.of("device"))}, title="<plan> & co")
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|fetch\(|XMLHttpRequest|import\(", page)
    assert "default-src 'none'" in page and "{{" not in page
    assert "<title>&lt;plan&gt; &amp; co</title>" in page and page.count("</script>") == 2 and "<b>" not in page
    assert page_data(page)["modules"].count("</script><b>&") == 1
    seen: list[str] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.extend(value for key, value in attrs if key == "id")

    Reader().feed(page)
    assert len(seen) == len(set(seen)) and {"live", "host", "addresses", "tab-addresses", "legend", "owners", "data"} <= set(seen)
    bare = timeline_html(Trace("cpu", trace.of("device"), [], trace.marks, trace.end))
    assert 'id="tab-addresses"' not in bare and 'id="host"' not in bare


def test_owners_put_equal_layers_together():
    live = [buffer(i, 0, 9, 100, module=f"blocks.{i}.ffn") for i in range(3)] + [buffer(7, 0, 9, 500, module="head")]
    assert [(o.module, o.bytes, o.count) for o in owners(live)] == [("head", 500, 1), ("blocks.*.ffn, 3 layers", 300, 3)]


def test_page_of_a_hundred_thousand_events_stays_small_and_keeps_what_is_live_at_the_peak():
    generator = np.random.default_rng(0)
    buffers = []
    for i in range(52_000):
        lower = 2 * i
        buffers.append(
            buffer(i, lower, lower + int(generator.integers(1, 12)), int(generator.integers(1, 10**9)), module=f"blocks.{i % 80}.m")
        )
    buffers.append(buffer(52_000, 60_000, 60_009, 10**13))
    buffers.append(buffer(52_001, 60_000, 60_009, 1, module="the smallest of all"))
    trace = Trace("cuda", buffers, [], [(0, "forward blocks.0")], 104_020)
    page = timeline_html(trace)
    assert len(page) < 2 * 10**6
    data = page_data(page)
    assert (data["peak"], data["peakTime"]) == trace.peak() and 60_000 <= data["peakTime"] < 60_009
    assert data["modules"].count("the smallest of all") == 1
    assert f"the {BUFFERS:,} largest of 52,002 buffers" in page and "(peaks exact)" in page


# --- the page's own script, under node


def in_node(code: str, data: dict | None = None):
    done = subprocess.run(
        [NODE, "-e", f"const t = require({json.dumps(str(SCRIPT))}); const d = JSON.parse(require('fs').readFileSync(0)); {code}"],
        input=json.dumps(data),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")


@needs_node
def test_script_reads_the_curve_and_the_owners_back():
    trace = step()
    data = page_data(timeline_html(trace, plan_of(trace)))
    times = [0, 5, 33, trace.peak()[1], trace.end - 1]
    code = f"""
      const m = t.decode(d), total = t.totals(m.curve, new Set(), 0);
      console.log(JSON.stringify({json.dumps(times)}.map((time) => ({{
        total: total[t.indexAt(m.times, time)], host: m.host[t.indexAt(m.hostTimes, time)],
        mark: t.nameAt(m.marks, time), owners: t.ownersAt(m, time, new Set()) }}))));"""
    for time, read in zip(times, in_node(code, data), strict=True):
        assert read["total"] == sum(b.size for b in trace.live_at(time))
        assert read["host"] == sum(b.size for b in trace.live_at(time, "host"))
        assert read["mark"] == trace.mark_at(time)
        expected = owners(trace.live_at(time))
        device = [o for o in read["owners"] if not o["host"]]
        assert sorted((o["module"], o["bytes"], o["count"]) for o in device) == sorted((o.module, o.bytes, o.count) for o in expected)


@needs_node
def test_script_draws_every_peak_whatever_the_width():
    trace = step(layers=30)
    data = page_data(timeline_html(trace))
    code = """
      const m = t.decode(d), total = t.totals(m.curve, new Set(), 0), out = [];
      for (const width of [7, 100, 333]) out.push(Math.max(...[...t.columns(m.times, total, 0, m.end, width)].map((i) => total[i])));
      console.log(JSON.stringify(out));"""
    assert in_node(code, data) == [trace.peak()[0]] * 3


@needs_node
def test_script_finds_the_buffer_at_an_address():
    trace = Trace("cuda", [buffer(0, 0, 10, 100), buffer(1, 2, 6, 50, module="top"), buffer(2, 0, 10, 7, module="none")], [], [], 10)
    data = page_data(timeline_html(trace, None, {0: 0, 1: 100}))
    code = """
      const m = t.decode(d), at = (time, offset) => { const i = t.bufferAt(m, time, offset, new Set());
        return i < 0 ? null : m.modules[m.buffers.module[i]]; };
      console.log(JSON.stringify([m.height, at(3, 120), at(3, 20), at(7, 120), at(3, 150)]));"""
    assert in_node(code, data) == [150, "top", "blocks.0.ffn", None, None]


@needs_node
def test_script_small_functions():
    code = """console.log(JSON.stringify([t.bytesText(3 * 2 ** 30), t.bytesText(5 * 2 ** 20), t.bytesText(2048), t.bytesText(12),
      t.ticks(25 * 2 ** 30, 2 ** 30, 5), t.clampView(-5, 5, 100, 8), t.clampView(98, 99, 100, 8), t.withoutLayer("blocks.12.ffn"),
      [...t.undelta(t.varints("AgMC"))]]));"""
    got = in_node(code)
    assert got[:4] == ["3.00 GiB", "5.0 MiB", "2.0 KiB", "12 B"]
    assert got[4] == [0, 5, 10, 15, 20, 25] and got[5] == [0, 10] and got[6] == [92, 100] and got[7] == "blocks.*.ffn"
    assert got[8] == [1, -1, 0]


def test_needs_no_torch_and_no_matplotlib_until_it_draws():
    code = """
import sys, memory_mgmt.timeline, memory_mgmt.timeline_html, memory_mgmt.timeline_png
assert not {"torch", "matplotlib"} & set(sys.modules)"""
    subprocess.run(["python", "-c", code], check=True, executable=__import__("sys").executable)
