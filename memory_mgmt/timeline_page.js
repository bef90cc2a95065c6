// Script of the memory timeline page (timeline_html.py puts it into the page; it loads nothing).
// First come pure functions, tested under node; then the page itself, which runs only where there is a document.
"use strict";

// --- reading the data

/** Numbers of a base64 string of little-endian base-128 varints. Sizes above 2^53 do not occur. */
function varints(text) {
  const bytes = typeof atob === "function" ? atob(text) : Buffer.from(text, "base64").toString("latin1");
  const numbers = [];
  let value = 0, scale = 1;
  for (let i = 0; i < bytes.length; i++) {
    const byte = bytes.charCodeAt(i);
    value += (byte & 127) * scale;
    if (byte & 128) scale *= 128;
    else { numbers.push(value); value = 0; scale = 1; }
  }
  return numbers;
}

/** Running sums of zigzag-coded differences. */
function undelta(numbers) {
  const out = new Float64Array(numbers.length);
  let value = 0;
  for (let i = 0; i < numbers.length; i++) {
    const n = numbers[i];
    value += n % 2 ? -(n + 1) / 2 : n / 2;
    out[i] = value;
  }
  return out;
}

/** The page's data with its columns decoded. Rows of `curve` are kinds, bottom to top. */
function decode(data) {
  const model = Object.assign({}, data);
  model.times = undelta(varints(data.times));
  model.curve = data.curve.map((row) => undelta(varints(row)));
  model.hostTimes = undelta(varints(data.hostTimes));
  model.host = undelta(varints(data.host));
  const b = data.buffers;
  model.buffers = { lower: undelta(varints(b.lower)), size: varints(b.size), module: varints(b.module), op: varints(b.op),
    kind: varints(b.kind), place: varints(b.place) };
  const lengths = varints(b.length);
  model.buffers.upper = model.buffers.lower.map((lower, i) => lower + lengths[i]);
  model.buffers.offset = b.offset ? varints(b.offset).map((n) => n - 1) : null; // -1: has no planned address
  return model;
}

// --- asking the data

/** Largest index with times[index] <= time, at least 0. */
function indexAt(times, time) {
  let low = 0, high = times.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (times[middle] <= time) low = middle; else high = middle - 1;
  }
  return low;
}

/** Total over the rows that are not hidden, at every point; `base` bytes are added. */
function totals(curve, hidden, base) {
  const sum = new Float64Array(curve.length ? curve[0].length : 0).fill(base);
  curve.forEach((row, k) => { if (!hidden.has(k)) for (let i = 0; i < sum.length; i++) sum[i] += row[i]; });
  return sum;
}

/** For each of `width` columns of [from, to): the index of the point in it with the largest total; so no peak is lost. */
function columns(times, total, from, to, width) {
  const picked = new Int32Array(width);
  let next = indexAt(times, from);
  for (let x = 0; x < width; x++) {
    const end = from + (to - from) * (x + 1) / width;
    let best = next;
    while (next + 1 < times.length && times[next + 1] < end) { next++; if (total[next] > total[best]) best = next; }
    picked[x] = best;
  }
  return picked;
}

/** Module paths without the number of their layer: `blocks.3.ffn` and `blocks.4.ffn` are both `blocks.*.ffn`. */
function withoutLayer(path) {
  return path.replace(/(^|\.)\d+(?=\.|$)/, "$1*");
}

/** Buffers that are live at `time`, summed by module (equal layers together), operation, kind and place, largest first. */
function ownersAt(model, time, hidden) {
  const b = model.buffers, groups = new Map();
  for (let i = 0; i < b.size.length && b.lower[i] <= time; i++) {
    if (b.upper[i] <= time && !(b.upper[i] >= model.end && time >= model.end)) continue;
    if (hidden.has(b.kind[i])) continue;
    const path = model.modules[b.module[i]], key = withoutLayer(path) + "|" + b.op[i] + "|" + b.kind[i] + "|" + b.place[i];
    let group = groups.get(key);
    if (!group) {
      group = { paths: new Set(), op: model.ops[b.op[i]], kind: b.kind[i], host: b.place[i] === 1, bytes: 0, count: 0 };
      groups.set(key, group);
    }
    group.paths.add(path);
    group.bytes += b.size[i];
    group.count++;
  }
  const owners = [...groups.values()].sort((a, c) => c.bytes - a.bytes);
  for (const owner of owners) {
    const [first] = owner.paths;
    owner.module = owner.paths.size === 1 ? first : withoutLayer(first) + ", " + owner.paths.size + " layers";
  }
  return owners;
}

/** Index of the smallest buffer whose rectangle holds (time, offset), or -1. */
function bufferAt(model, time, offset, hidden) {
  const b = model.buffers;
  let found = -1;
  for (let i = 0; b.offset && i < b.size.length && b.lower[i] <= time; i++) {
    const inside = b.offset[i] >= 0 && time < b.upper[i] && offset >= b.offset[i] && offset < b.offset[i] + b.size[i];
    if (inside && !hidden.has(b.kind[i]) && (found < 0 || b.size[i] < b.size[found])) found = i;
  }
  return found;
}

/** Bytes for people, as the rest of longstride writes them. */
function bytesText(n) {
  return n >= 2 ** 30 / 10 ? (n / 2 ** 30).toFixed(2) + " GiB" : n >= 2 ** 20 / 10 ? (n / 2 ** 20).toFixed(1) + " MiB"
    : n >= 1024 ? (n / 1024).toFixed(1) + " KiB" : n + " B";
}

/** Round values up to `most`, at most about `count`, in steps of 1, 2 or 5 times a power of ten of `unit`. */
function ticks(most, unit, count) {
  const rough = most / unit / count, power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough) || 1;
  const out = [];
  for (let v = 0; v * unit <= most * (1 + 1e-9); v = +(v + step).toPrecision(12)) out.push(v);
  return out;
}

/** [from, to) moved inside [0, end) and not narrower than `least`. */
function clampView(from, to, end, least) {
  const width = Math.min(end, Math.max(to - from, least));
  const start = Math.max(0, Math.min(from, end - width));
  return [start, start + width];
}

/** Name of the stretch that `time` is in. */
function nameAt(starts, time) {
  let name = "";
  for (const [start, label] of starts) { if (start > time) break; name = label; }
  return name;
}

if (typeof module !== "undefined") {
  module.exports = { varints, undelta, decode, indexAt, totals, columns, ownersAt, bufferAt, bytesText, ticks, clampView, nameAt, withoutLayer };
}

// --- the page

function start() {
  const model = decode(JSON.parse(document.getElementById("data").textContent));
  const $ = (id) => document.getElementById(id);
  const state = { view: [0, model.end], cursor: model.peakTime, hidden: new Set(), drag: null, tab: "live", offset: null };
  const margin = { left: 52, right: 10, top: 22, bottom: 22 };
  const OUTSIDE = -1; // in state.hidden beside the kinds
  const outside = () => (state.hidden.has(OUTSIDE) ? 0 : model.outside);
  let total = totals(model.curve, state.hidden, outside());
  const hostMost = model.host.reduce((a, c) => Math.max(a, c), 0);

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

  function fit(canvas) {
    const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
    canvas.width = Math.round(box.width * ratio);
    canvas.height = Math.round(box.height * ratio);
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, box.width, box.height);
    pen.font = "12px system-ui, sans-serif";
    return { pen, width: box.width, height: box.height, inner: Math.max(1, Math.floor(box.width - margin.left - margin.right)) };
  }

  const toX = (time, inner) => margin.left + (time - state.view[0]) / (state.view[1] - state.view[0]) * inner;
  const toTime = (x, inner) => state.view[0] + (x - margin.left) / inner * (state.view[1] - state.view[0]);

  function axis(at, most, toY, count) {
    const unit = most >= 2 ** 29 ? 2 ** 30 : 2 ** 20;
    at.pen.textAlign = "right";
    at.pen.textBaseline = "middle";
    for (const value of ticks(most, unit, count)) {
      const y = toY(value * unit);
      at.pen.fillStyle = color("line");
      at.pen.fillRect(margin.left, Math.round(y), at.inner, 1);
      at.pen.fillStyle = color("muted");
      at.pen.fillText(String(value), margin.left - 6, y);
    }
    at.pen.textAlign = "left";
    at.pen.fillText(unit === 2 ** 30 ? "GiB" : "MiB", 4, 10);
  }

  function bands(at, bottom) {
    at.pen.textAlign = "center";
    at.pen.textBaseline = "alphabetic";
    model.phases.forEach(([name, from, to], i) => {
      const x0 = Math.max(margin.left, toX(from, at.inner)), x1 = Math.min(margin.left + at.inner, toX(to, at.inner));
      if (x1 <= x0) return;
      if (i % 2) { at.pen.fillStyle = color("band"); at.pen.fillRect(x0, margin.top, x1 - x0, bottom - margin.top); }
      at.pen.fillStyle = color("muted");
      if (at.pen.measureText(name).width < x1 - x0 - 4) at.pen.fillText(name, (x0 + x1) / 2, 14);
    });
  }

  function cursorLine(at, bottom) {
    const x = toX(state.cursor, at.inner);
    if (x < margin.left - 1 || x > margin.left + at.inner + 1) return;
    at.pen.fillStyle = color("ink");
    at.pen.fillRect(Math.round(x), margin.top, 1, bottom - margin.top);
  }

  function dragged(at, bottom) {
    if (!state.drag || Math.abs(state.drag[1] - state.drag[0]) < 4) return;
    at.pen.fillStyle = color("select");
    at.pen.fillRect(Math.min(...state.drag), margin.top, Math.abs(state.drag[1] - state.drag[0]), bottom - margin.top);
  }

  function events(at) {
    at.pen.fillStyle = color("muted");
    at.pen.textBaseline = "alphabetic";
    const y = at.height - 6, [from, to] = state.view;
    at.pen.textAlign = "left";
    at.pen.fillText("event " + Math.round(from).toLocaleString("en"), margin.left, y);
    at.pen.textAlign = "right";
    at.pen.fillText(Math.round(to).toLocaleString("en"), margin.left + at.inner, y);
  }

  function drawLive() {
    const at = fit($("live")), bottom = at.height - margin.bottom;
    const picked = columns(model.times, total, state.view[0], state.view[1], at.inner);
    let most = 1;
    for (const i of picked) most = Math.max(most, total[i]);
    const near = model.limit !== null && model.limit < 2.5 * most;
    const top = 1.06 * Math.max(most, near ? model.limit : 0);
    const toY = (bytes) => bottom - bytes / top * (bottom - margin.top);
    axis(at, top, toY, at.height / 50);
    bands(at, bottom);
    const base = new Float64Array(at.inner);
    const layer = (fill, value) => {
      at.pen.fillStyle = fill;
      for (let x = 0; x < at.inner; x++) {
        const size = value(picked[x]);
        if (!size) continue;
        const y0 = toY(base[x]), y1 = toY(base[x] + size);
        at.pen.fillRect(margin.left + x, y1, 1.02, y0 - y1);
        base[x] += size;
      }
    };
    if (outside()) layer(model.outsideColor, outside);
    model.curve.forEach((row, k) => { if (!state.hidden.has(k)) layer(model.kinds[k][1], (i) => row[i]); });
    if (near) {
      const y = Math.round(toY(model.limit));
      at.pen.strokeStyle = at.pen.fillStyle = color("alarm");
      at.pen.setLineDash([6, 4]);
      at.pen.beginPath(); at.pen.moveTo(margin.left, y + 0.5); at.pen.lineTo(margin.left + at.inner, y + 0.5); at.pen.stroke();
      at.pen.setLineDash([]);
      at.pen.textAlign = "left"; at.pen.textBaseline = "bottom";
      at.pen.fillText(model.limitName + " " + bytesText(model.limit), margin.left + 4, y - 2);
    }
    const px = toX(model.peakTime, at.inner);
    if (!state.hidden.size && px >= margin.left && px <= margin.left + at.inner) {
      at.pen.fillStyle = color("ink");
      at.pen.beginPath(); at.pen.arc(px, toY(model.peak + model.outside), 4, 0, 7); at.pen.fill();
      at.pen.textAlign = px > at.width / 2 ? "right" : "left"; at.pen.textBaseline = "bottom";
      at.pen.fillText("peak", px + (px > at.width / 2 ? -7 : 7), toY(model.peak + model.outside) - 2);
    }
    cursorLine(at, bottom);
    dragged(at, bottom);
    events(at);
  }

  function drawHost() {
    if (!$("host")) return;
    const at = fit($("host")), bottom = at.height - 6;
    const picked = columns(model.hostTimes, model.host, state.view[0], state.view[1], at.inner);
    const toY = (bytes) => bottom - bytes / (1.1 * hostMost) * (bottom - margin.top);
    axis(at, 1.1 * hostMost, toY, 2);
    at.pen.fillStyle = color("host");
    for (let x = 0; x < at.inner; x++) {
      const y = toY(model.host[picked[x]]);
      at.pen.fillRect(margin.left + x, y, 1.02, bottom - y);
    }
    at.pen.fillStyle = color("muted");
    at.pen.textAlign = "left"; at.pen.textBaseline = "alphabetic";
    at.pen.fillText("host memory, at most " + bytesText(hostMost), margin.left, 14);
    cursorLine(at, bottom);
  }

  function drawAddresses() {
    const at = fit($("addresses")), bottom = at.height - margin.bottom, b = model.buffers;
    const toY = (offset) => bottom - offset / (1.04 * model.height) * (bottom - margin.top);
    axis(at, 1.04 * model.height, toY, at.height / 50);
    bands(at, bottom);
    const least = Math.max(0, indexAt(b.lower, state.view[1]));
    for (let i = 0; i <= least && i < b.size.length; i++) {
      if (b.offset[i] < 0 || b.upper[i] < state.view[0] || state.hidden.has(b.kind[i])) continue;
      const x0 = Math.max(margin.left, toX(b.lower[i], at.inner)), x1 = Math.min(margin.left + at.inner, toX(b.upper[i], at.inner));
      const y0 = toY(b.offset[i] + b.size[i]), y1 = toY(b.offset[i]);
      at.pen.fillStyle = model.kinds[b.kind[i]][1];
      at.pen.fillRect(x0, y0, Math.max(0.6, x1 - x0), Math.max(0.6, y1 - y0));
      if (x1 - x0 > 3 && y1 - y0 > 3) { at.pen.strokeStyle = color("paper"); at.pen.lineWidth = 0.6; at.pen.strokeRect(x0, y0, x1 - x0, y1 - y0); }
    }
    at.pen.fillStyle = color("alarm");
    at.pen.fillRect(margin.left, Math.round(toY(model.height)), at.inner, 1);
    cursorLine(at, bottom);
    dragged(at, bottom);
    events(at);
  }

  // --- what is live at the cursor

  function cell(row, text, className) {
    const element = document.createElement("td");
    element.textContent = text;
    if (className) element.className = className;
    row.append(element);
    return element;
  }

  function readout() {
    const time = state.cursor, point = indexAt(model.times, time);
    const owners = ownersAt(model, time, state.hidden);
    const device = owners.filter((o) => !o.host), host = owners.filter((o) => o.host);
    const listed = device.reduce((sum, o) => sum + o.bytes, 0);
    const shownTotal = total[point];
    const where = nameAt(model.marks, time) || "before the step";
    $("where").textContent = "event " + Math.round(time).toLocaleString("en") + ", " + where + ": " + bytesText(shownTotal) +
      (state.hidden.size ? " of the kinds shown" : "") + (hostMost ? "; host " + bytesText(model.host[indexAt(model.hostTimes, time)]) : "");
    const body = $("owners");
    body.textContent = "";
    const line = (owner) => {
      const row = document.createElement("tr");
      cell(row, bytesText(owner.bytes), "number");
      const kind = cell(row, "");
      const chip = document.createElement("span");
      chip.className = "chip";
      chip.style.background = owner.color || model.kinds[owner.kind][1];
      kind.append(chip, owner.name || model.kinds[owner.kind][0] + (owner.host ? " (host)" : ""));
      cell(row, owner.module || "-", "path");
      cell(row, (owner.op || "-") + (owner.count > 1 ? "  × " + owner.count : ""), "path");
      body.append(row);
    };
    const room = 14, shown = [...device.slice(0, room), ...host.slice(0, 4)];
    shown.forEach(line);
    const unlisted = device.slice(room).reduce((sum, o) => sum + o.bytes, 0) + Math.max(0, shownTotal - outside() - listed);
    if (unlisted > 0) line({ bytes: unlisted, name: "smaller ones", color: color("muted"), module: "", op: "", count: 1 });
    if (outside()) line({ bytes: model.outside, name: model.outsideName, color: model.outsideColor, module: model.outsideText, count: 1 });
    if (state.tab === "addresses" && state.offset !== null) {
      const i = bufferAt(model, time, state.offset, state.hidden), b = model.buffers;
      $("where").textContent = i < 0 ? "free at this address" : model.modules[b.module[i]] + " " + model.ops[b.op[i]] + ", " +
        model.kinds[b.kind[i]][0] + ": " + bytesText(b.size[i]) + " at offset " + bytesText(b.offset[i]) + ", events " +
        b.lower[i].toLocaleString("en") + " to " + b.upper[i].toLocaleString("en");
    }
  }

  let queued = false;
  function redraw() {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => {
      queued = false;
      if (state.tab === "live") { drawLive(); drawHost(); } else drawAddresses();
      readout();
    });
  }

  // --- mouse, touch and keys

  function look(from, to) {
    state.view = clampView(from, to, model.end, Math.min(model.end, 8));
    redraw();
  }

  function zoom(factor) {
    const half = (state.view[1] - state.view[0]) * factor / 2;
    look(state.cursor - half, state.cursor + half);
  }

  function pointAt(canvas, x) {
    const inner = Math.max(1, Math.floor(canvas.getBoundingClientRect().width - margin.left - margin.right));
    if (state.tab !== "live") return Math.max(0, Math.min(model.end - 1, Math.floor(toTime(x, inner))));
    const column = Math.max(0, Math.min(inner - 1, Math.floor(x - margin.left)));
    const point = columns(model.times, total, state.view[0], state.view[1], inner)[column];
    const left = toTime(margin.left + column, inner); // a point left of its column still holds there
    return Math.max(model.times[point], Math.floor(left));
  }

  function listen(canvas) {
    const xOf = (event) => event.clientX - canvas.getBoundingClientRect().left;
    canvas.addEventListener("pointerdown", (event) => {
      state.drag = [xOf(event), xOf(event)];
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (state.drag) state.drag[1] = xOf(event);
      point(event);
    });
    const point = (event) => {
      state.cursor = pointAt(canvas, xOf(event));
      if (canvas.id === "addresses") {
        const box = canvas.getBoundingClientRect(), bottom = box.height - margin.bottom;
        state.offset = (bottom - (event.clientY - box.top)) / (bottom - margin.top) * 1.04 * model.height;
      }
      redraw();
    };
    canvas.addEventListener("pointerup", (event) => {
      const inner = Math.max(1, Math.floor(canvas.getBoundingClientRect().width - margin.left - margin.right));
      const drag = state.drag;
      state.drag = null;
      if (drag && Math.abs(drag[1] - drag[0]) >= 8) look(toTime(Math.min(...drag), inner), toTime(Math.max(...drag), inner));
      else point(event);
    });
    canvas.addEventListener("pointercancel", () => { state.drag = null; redraw(); });
    canvas.addEventListener("dblclick", () => look(0, model.end));
    canvas.addEventListener("keydown", (event) => {
      const step = Math.max(1, (state.view[1] - state.view[0]) / (event.shiftKey ? 20 : 200));
      const move = (by) => {
        state.cursor = Math.max(0, Math.min(model.end - 1, Math.round(state.cursor + by)));
        state.offset = null;
        if (state.cursor < state.view[0] || state.cursor >= state.view[1]) {
          const half = (state.view[1] - state.view[0]) / 2;
          look(state.cursor - half, state.cursor + half);
        } else redraw();
      };
      const keys = { ArrowLeft: () => move(-step), ArrowRight: () => move(step), PageUp: () => move(-10 * step), PageDown: () => move(10 * step),
        Home: () => move(-model.end), End: () => move(model.end), "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2),
        Escape: () => look(0, model.end), "0": () => look(0, model.end), p: () => toPeak() };
      if (!event.ctrlKey && !event.metaKey && !event.altKey && keys[event.key]) { keys[event.key](); event.preventDefault(); }
    });
  }

  function toPeak() {
    state.cursor = model.peakTime;
    state.offset = null;
    const half = (state.view[1] - state.view[0]) / 2;
    if (state.cursor < state.view[0] || state.cursor >= state.view[1]) look(state.cursor - half, state.cursor + half);
    else redraw();
  }

  function legend() {
    const entries = model.kinds.map(([name, fill], k) => [name, fill, k]);
    if (model.outside) entries.unshift([model.outsideName, model.outsideColor, OUTSIDE]);
    for (const [name, fill, k] of entries) {
      const button = document.createElement("button"), chip = document.createElement("span");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      chip.className = "chip";
      chip.style.background = fill;
      button.append(chip, name);
      button.addEventListener("click", () => {
        if (!state.hidden.delete(k)) state.hidden.add(k);
        button.setAttribute("aria-pressed", String(!state.hidden.has(k)));
        total = totals(model.curve, state.hidden, outside());
        redraw();
      });
      $("legend").prepend(button);
    }
  }

  function tabs() {
    const names = model.buffers.offset ? ["live", "addresses"] : ["live"];
    for (const name of names) {
      const tab = $("tab-" + name);
      tab.addEventListener("click", () => {
        state.tab = name;
        state.offset = null;
        for (const other of names) {
          $("tab-" + other).setAttribute("aria-selected", String(other === name));
          $("tab-" + other).tabIndex = other === name ? 0 : -1;
          $("panel-" + other).hidden = other !== name;
        }
        redraw();
      });
      tab.addEventListener("keydown", (event) => {
        if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
        const other = names.find((n) => n !== name);
        if (!other) return;
        $("tab-" + other).focus();
        $("tab-" + other).click();
      });
    }
  }

  legend();
  tabs();
  ["live", "addresses"].forEach((id) => { if ($(id)) listen($(id)); });
  $("whole").addEventListener("click", () => look(0, model.end));
  $("to-peak").addEventListener("click", toPeak);
  $("in").addEventListener("click", () => zoom(0.5));
  $("out").addEventListener("click", () => zoom(2));
  window.addEventListener("resize", redraw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  redraw();
}

if (typeof document !== "undefined") start();
