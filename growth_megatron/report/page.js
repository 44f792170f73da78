"use strict";
// Draws the curves of a run's page. Text from the run only ever becomes textContent, never markup.
const run = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const view = { axis: "tokens", smoothing: "light" };
const AXES = { tokens: "tokens", flops: "FLOPs", step: "steps" };
const SHARES = { off: 0, light: 0.008, strong: 0.03 }; // half width of the moving average, of all points
const SMALL = [
  ["learning_rate", "learning rate", false],
  ["tokens_per_s", "throughput (tokens/s)", false],
  ["grad_norm", "gradient norm", true],
];

function make(parent, tag, attributes = {}, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e15 || size < 1e-3) return value.toExponential(size >= 1e15 ? 2 : 1).replace("e+", "e");
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return +(value / unit).toPrecision(3) + letter;
  return String(+value.toPrecision(3));
}

const onAxis = (axis, value) => (axis === "flops" && value > 0 ? Number(value.toPrecision(3)).toExponential().replace("e+", "e") : number(value));
const loss = (value) => value.toFixed(Math.abs(value) < 10 ? 4 : 2);

// A mean with less weight away from a point, of fewer towards the ends, so that it neither lags nor bends them.
function smooth(values, half) {
  return values.map((value, index) => {
    if (value === null) return null;
    const reach = Math.min(2 * half, index, values.length - 1 - index);
    let sum = 0, weights = 0;
    for (let k = -reach; k <= reach; k++) {
      if (values[index + k] === null) continue;
      sum += (reach + 1 - Math.abs(k)) * values[index + k];
      weights += reach + 1 - Math.abs(k);
    }
    return sum / weights;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough) ?? 10 * power;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high * (1 + 1e-9); k++) found.push(k === 0 ? 0 : k * step);
  return found;
}

function quantile(values, share) {
  const sorted = values.filter((each) => each !== null).sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

function largestX() {
  return Math.max(...run.stages.map((stage) => stage[view.axis].at(-1)), ...run.validation.map((point) => point[view.axis]));
}

// Scales, grid and both axes; returns where a value is in pixels.
function frame(svg, height, low, high, margin) {
  const width = svg.clientWidth || svg.parentElement.clientWidth - 28;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  const end = largestX();
  const x = (value) => margin.left + (value / end) * (width - margin.left - margin.right);
  const y = (value) => height - margin.bottom - ((value - low) / (high - low)) * (height - margin.top - margin.bottom);
  for (const value of ticks(low, high, height > 250 ? 6 : 3)) {
    make(svg, "line", { x1: margin.left, x2: width - margin.right, y1: y(value), y2: y(value), stroke: "var(--line)" });
    make(svg, "text", { x: margin.left - 7, y: y(value) + 4, "text-anchor": "end" }, number(value));
  }
  const marks = ticks(0, end, width > 700 ? 7 : 3);
  for (const value of marks)
    make(svg, "text", { x: x(value), y: height - margin.bottom + 17, "text-anchor": "middle" }, onAxis(view.axis, value));
  const clip = `clip-${svg.id}`;
  const box = make(make(make(svg, "defs"), "clipPath", { id: clip }), "rect", {
    x: margin.left, y: margin.top - 2, width: width - margin.left - margin.right + 4, height: height - margin.top - margin.bottom + 4,
  });
  box.setAttribute("rx", 0);
  return { svg, width, height, low, high, margin, x, y, end, clip: `url(#${clip})` };
}

function path(plot, xs, ys, attributes) {
  let text = "", pen = "M";
  ys.forEach((value, index) => {
    if (value === null) { pen = "M"; return; }
    text += `${pen}${plot.x(xs[index]).toFixed(1)},${plot.y(value).toFixed(1)}`;
    pen = "L";
  });
  return make(plot.svg, "path", { d: text, fill: "none", "stroke-linejoin": "round", "clip-path": plot.clip, ...attributes });
}

function drawLoss() {
  const svg = document.getElementById("loss");
  const points = run.stages.reduce((sum, stage) => sum + stage.loss.length, 0);
  const half = Math.round(points * SHARES[view.smoothing]);
  const curves = run.stages.map((stage) => ({ stage, smoothed: smooth(stage.loss, half) }));
  // The fall from the random start runs off the top, so that the rest has the height.
  const first = run.stages[0].loss, early = Math.floor(first.length / 12);
  const later = [...first.slice(early), ...run.stages.slice(1).flatMap((stage) => stage.loss)];
  const shown = [...run.validation.filter((point) => point.step >= run.stages[0].step[early]).map((point) => point.loss)];
  let high = Math.max(quantile(later, 0.995), ...shown), low = Math.min(quantile(later, 0.002), ...shown);
  const spare = 0.06 * (high - low || 1);
  const height = window.innerWidth < 600 ? 320 : 430;
  const narrow = svg.parentElement.clientWidth < 600;
  const plot = frame(svg, height, low - spare, high + spare, { left: 40, right: narrow ? 76 : 122, top: 40, bottom: 40 });
  make(svg, "text", { x: plot.width - plot.margin.right, y: height - 4, "text-anchor": "end" }, AXES[view.axis]);
  drawStages(plot);
  for (const { stage, smoothed } of curves) {
    if (half) path(plot, stage[view.axis], stage.loss, { stroke: "var(--train)", "stroke-width": 1, opacity: 0.22 });
    path(plot, stage[view.axis], smoothed, { stroke: "var(--train)", "stroke-width": half ? 2 : 1.2 });
  }
  const held = run.validation;
  if (held.length) {
    path(plot, held.map((point) => point[view.axis]), held.map((point) => point.loss), { stroke: "var(--validation)", "stroke-width": 1.6 });
    if (held.length < 80)
      for (const point of held)
        make(svg, "circle", { cx: plot.x(point[view.axis]), cy: plot.y(point.loss), r: 2.6, fill: "var(--validation)", "clip-path": plot.clip });
  }
  drawEnds(plot, curves, held, narrow);
  drawMarks(plot);
  hover(plot, (value) => tipOfLoss(curves, held, value));
}

function drawStages(plot) {
  const top = plot.margin.top, bottom = plot.height - plot.margin.bottom;
  let before = 0;
  run.stages.forEach((stage, index) => {
    const end = Math.max(stage[view.axis].at(-1), before), left = plot.x(before), width = plot.x(end) - left;
    if (index % 2 === 1) {
      const band = make(plot.svg, "rect", { x: left, y: top, width, height: bottom - top, fill: "var(--faint)" });
      plot.svg.insertBefore(band, plot.svg.firstChild);
    }
    if (width > 7 * stage.name.length) make(plot.svg, "text", { x: left + width / 2, y: 13, "text-anchor": "middle" }, stage.name);
    before = end;
  });
  run.growths.forEach((growth, index) => {
    const x = plot.x(growth[view.axis]), late = x > plot.width * 0.6;
    const whole = `${growth.operator}: ${growth.change}`, next = run.growths[index + (late ? -1 : 1)];
    const room = Math.abs((next ? plot.x(next[view.axis]) : late ? plot.margin.left : plot.width) - x) / (next ? 2 : 1);
    make(plot.svg, "line", { x1: x, x2: x, y1: top - 8, y2: bottom, stroke: "var(--growth)", "stroke-width": 1.4, "stroke-dasharray": "5 4" });
    make(plot.svg, "text", { x: x + (late ? -6 : 6), y: top - 4, "text-anchor": late ? "end" : "start", style: "fill:var(--growth)" },
      6.6 * whole.length < room ? whole : growth.operator);
    if (growth.recovered) {
      const back = plot.x(growth.recovered[view.axis]);
      const mark = make(plot.svg, "path", { d: `M${back},${bottom - 9}l4.5,9h-9z`, fill: "var(--growth)" });
      make(mark, "title", {}, "training loss back where it was before the growth");
    }
  });
}

function drawEnds(plot, curves, held, narrow) {
  const last = curves.at(-1), ends = [];
  const end = last.smoothed.findLast((value) => value !== null);
  if (end !== undefined) ends.push(["training", end, "var(--train)", last.stage[view.axis].at(-1)]);
  if (held.length) ends.push(["validation", held.at(-1).loss, "var(--validation)", held.at(-1)[view.axis]]);
  ends.sort((a, b) => b[1] - a[1]);
  let lowest = -Infinity;
  for (const [name, value, color, at] of ends) {
    const y = Math.max(plot.y(value), lowest + (narrow ? 27 : 15));
    lowest = y;
    const label = make(plot.svg, "text", { x: plot.x(at) + 7, y: y + 4, class: "strong", style: `fill:${color}` }, narrow ? name : `${name} ${loss(value)}`);
    if (narrow) make(label, "tspan", { x: plot.x(at) + 7, dy: 13 }, loss(value));
  }
}

function drawMarks(plot) {
  const y = plot.height - plot.margin.bottom;
  for (const mark of run.marks) {
    const x = plot.x(mark[view.axis]), calm = ["resumed", "stopped", "branched off"].includes(mark.what);
    const glyph = make(plot.svg, "path", {
      d: calm ? `M${x},${y - 4.5}l4.5,4.5l-4.5,4.5l-4.5,-4.5z` : `M${x - 4},${y - 4}l8,8m0,-8l-8,8`,
      fill: calm ? "var(--note)" : "none", stroke: calm ? "none" : "var(--bad)", "stroke-width": 2,
    });
    make(glyph, "title", {}, `${mark.what} (step ${mark.step}): ${mark.message}`);
  }
}

function drawSmall([quantity, , fromZero]) {
  const svg = document.getElementById(quantity);
  const all = run.stages.flatMap((stage) => stage[quantity]).filter((value) => value !== null);
  const high = fromZero ? quantile(all, 0.99) : Math.max(...all);
  const plot = frame(svg, 150, 0, high * 1.08 || 1, { left: 46, right: 12, top: 8, bottom: 24 });
  const half = quantity === "learning_rate" ? 0 : Math.round(all.length * SHARES[view.smoothing]);
  for (const stage of run.stages) {
    if (half) path(plot, stage[view.axis], stage[quantity], { stroke: "var(--train)", "stroke-width": 1, opacity: 0.2 });
    path(plot, stage[view.axis], smooth(stage[quantity], half), { stroke: "var(--train)", "stroke-width": 1.5 });
  }
  for (const growth of run.growths) {
    const x = plot.x(growth[view.axis]);
    make(svg, "line", { x1: x, x2: x, y1: plot.margin.top, y2: 126, stroke: "var(--growth)", "stroke-dasharray": "4 4" });
  }
  hover(plot, (value) => {
    const [stage, index] = nearest(value);
    return stage[quantity][index] === null ? [] : [place(stage, index), number(stage[quantity][index])];
  });
}

function nearest(value) {
  let best = [run.stages[0], 0], distance = Infinity;
  for (const stage of run.stages)
    stage[view.axis].forEach((each, index) => {
      const here = Math.abs(each - value);
      if (here < distance) { distance = here; best = [stage, index]; }
    });
  return best;
}

const place = (stage, index) =>
  `${stage.name}, step ${stage.step[index]}, ${number(stage.tokens[index])} tokens, ${stage.flops[index].toExponential(2)} FLOPs`;

function tipOfLoss(curves, held, value) {
  const [stage, index] = nearest(value);
  const smoothed = curves.find((curve) => curve.stage === stage).smoothed[index];
  const lines = [place(stage, index)];
  if (smoothed !== null) lines.push(`training ${loss(smoothed)}` + (stage.loss[index] === null ? "" : ` (batch ${loss(stage.loss[index])})`));
  const near = held.filter((point) => Math.abs(point[view.axis] - value) < largestX() / 40);
  near.sort((a, b) => Math.abs(a[view.axis] - value) - Math.abs(b[view.axis] - value));
  if (near.length) lines.push(`validation ${loss(near[0].loss)} at step ${near[0].step}`);
  for (const mark of run.marks)
    if (Math.abs(mark[view.axis] - value) < largestX() / 90) lines.push(`${mark.what}: ${mark.message}`);
  return lines;
}

function hover(plot, lines) {
  const line = make(plot.svg, "line", { y1: plot.margin.top, y2: plot.height - plot.margin.bottom, stroke: "var(--soft)", visibility: "hidden" });
  const figure = plot.svg.parentElement;
  const leave = () => { line.setAttribute("visibility", "hidden"); figure.querySelector(".tip")?.remove(); };
  plot.svg.onpointerleave = leave;
  plot.svg.onpointermove = (event) => {
    const box = plot.svg.getBoundingClientRect(), x = event.clientX - box.left;
    leave();
    if (x < plot.margin.left || x > plot.width - plot.margin.right + 4) return;
    const found = lines(((x - plot.margin.left) / (plot.width - plot.margin.left - plot.margin.right)) * plot.end);
    if (!found.length) return;
    line.setAttribute("visibility", "visible");
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    const tip = document.createElement("div");
    tip.className = "tip";
    for (const text of found) tip.append(Object.assign(document.createElement("div"), { textContent: text }));
    figure.append(tip);
    const left = x > plot.width / 2 ? x - tip.offsetWidth - 4 : x + 26;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(30, event.clientY - box.top - 20)}px`;
  };
}

function choice(id, names) {
  const place = document.getElementById(id);
  for (const [value, name] of Object.entries(names)) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    const press = () => [...place.children].forEach((each) => each.setAttribute("aria-pressed", each === button));
    button.onclick = () => { view[id] = value; press(); draw(); };
    place.append(button);
    if (view[id] === value) press();
  }
}

function legend() {
  const parts = [["loss (nats per token)", "b"], ["; training smoothed, before smoothing in pale", "span"]];
  if (run.growths.some((growth) => growth.recovered)) parts.push(["; ▲ training loss back where it was before the growth", "span"]);
  const kinds = [...new Set(run.marks.map((mark) => mark.what))];
  const calm = kinds.filter((kind) => ["resumed", "stopped", "branched off"].includes(kind)), bad = kinds.filter((kind) => !calm.includes(kind));
  if (calm.length) parts.push([`; ◆ ${calm.join(", ")}`, "span"]);
  if (bad.length) parts.push([`; ✕ ${bad.join(", ")}`, "span"]);
  for (const [text, tag] of parts) document.getElementById("legend").append(Object.assign(document.createElement(tag), { textContent: text }));
}

function draw() {
  drawLoss();
  for (const small of SMALL) if (document.getElementById(small[0])) drawSmall(small);
}

function theme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  const button = document.getElementById("theme");
  button.hidden = false;
  button.textContent = dark ? "light" : "dark";
  button.onclick = () => theme(!dark);
}

theme(matchMedia("(prefers-color-scheme: dark)").matches);
if (run.stages.length) {
  document.querySelector(".controls").hidden = false;
  document.querySelector("figure").hidden = false;
  for (const [quantity, name] of SMALL) {
    if (!run.stages.some((stage) => stage[quantity].some((value) => value !== null))) continue;
    const figure = document.createElement("figure");
    figure.append(Object.assign(document.createElement("figcaption"), { textContent: name }));
    make(figure, "svg", { id: quantity, role: "img", "aria-label": name });
    document.getElementById("small").append(figure);
  }
  choice("axis", AXES);
  choice("smoothing", { off: "off", light: "light", strong: "strong" });
  legend();
  draw();
  addEventListener("resize", draw);
}
