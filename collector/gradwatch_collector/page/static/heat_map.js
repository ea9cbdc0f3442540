/**
 * Gradient norms by layer over steps, dark where they are large. What was not finite is crossed where its layer is
 * known, and hatched over all layers where only the step is.
 */

import { read } from "./api.js";
import { Chart, colour } from "./charts.js";
import { escaped } from "./curves.js";
import { fill, h } from "./dom.js";
import { count, counted, number } from "./format.js";

// More crosses than this are not told apart, and slow to draw.
const MOST_CROSSES = 400;
const LONGEST_NAME = 26;
// Some layers' norms are a billionth of others': what is below is as pale as it gets.
const DECADES = 8;

export class HeatMap {
  constructor(runId) {
    this.runId = runId;
    this.chart = new Chart("Gradient norms by layer", { isWide: true, isTall: true, id: "layers" });
    this.filter = h("input", { type: "search", placeholder: "Layers whose name has…", "aria-label": "Filter layers" });
    this.filter.addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.redraw(), 300);
    });
    this.attempts = h("select", { "aria-label": "Attempt", hidden: true, change: () => this.redraw() });
    this.crosses = h("div");
    this.chart.element.append(this.crosses);
    fill(this.chart.aside, this.attempts, " ", this.filter);
  }

  get element() {
    return this.chart.element;
  }

  /** `newest`: the run's newest attempt, which is shown unless another is chosen. */
  async load(newest, span) {
    this.chart.span = span;
    if (this.attempts.options.length !== newest) {
      fill(this.attempts, Array.from({ length: newest }, (_, place) => h("option", { value: newest - place }, `attempt ${newest - place}`)));
      this.attempts.hidden = newest === 1;
    }
    await this.draw();
  }

  async draw() {
    const map = await read("/api/v1/layer-map", { run: this.runId, attempt: this.attempts.value, text: this.filter.value });
    // Of another attempt there may be some.
    this.element.hidden = map.layer_count === 0 && this.attempts.options.length === 1;
    this.chart.plot.hidden = map.layer_count === 0;
    this.chart.sharesSteps = !map.is_timed;
    this.tell(map);
    if (!map.layer_count) {
      fill(this.chart.told, "No norms were told of in this attempt.");
      return;
    }
    this.chart.plot.style.height = `${Math.min(640, Math.max(170, 90 + 18 * map.rows.length))}px`;
    await this.chart.draw(() => picture(map));
  }

  redraw() {
    return this.draw().catch((error) => fill(this.chart.told, error.message));
  }

  /** Which layer was not finite, where: in words, for those who cannot hover. */
  tell(map) {
    const first = map.nonfinite.slice(0, 8);
    const steps = map.nonfinite_steps;
    // Of most steps in which all is NaN no layer is told.
    const many = map.nonfinite_count ? `At least ${counted(map.nonfinite_count, "gradient")} not finite` : "Not finite, of layers that are not known";
    fill(
      this.crosses,
      steps || first.length
        ? h("details", { open: true },
          h("summary", {}, `✕ ${many}${steps ? `, in ${stepsOf(steps)}` : ""}`),
          first.length
            ? h("ul", { class: "small columns", "aria-label": "Where gradients were not finite" },
              first.map((mark) => h("li", {}, `step ${mark.step}: `, h("code", {}, mark.layer))),
              map.nonfinite_count > first.length ? h("li", { class: "soft" }, `and ${count(map.nonfinite_count - first.length)} more that are told of`) : null)
            : null)
        : null,
    );
  }
}

function stepsOf({ first, last }) {
  return first === last ? `step ${first}` : `steps ${first} to ${last}`;
}

function picture(map) {
  const names = map.rows.map(rowName);
  const norms = normsOf(map);
  // A norm of exactly zero has no logarithm, and is as pale as it gets.
  const high = norms.known.length ? Math.log10(norms.most) : 1;
  const low = norms.known.length ? Math.max(Math.log10(norms.least), high - DECADES) : 0;
  const shade = (value) => (value > 0 ? Math.log10(value) : low);
  const edges = [map.first_step - 0.5, ...map.ends.map((end) => end + 0.5)];
  const every = Math.max(1, Math.ceil(names.length / 24));
  const ticks = names.map((_, row) => row).filter((row) => row % every === 0);
  const data = [{
    type: "heatmap", z: map.values.map((row) => row.map((value) => (value === null ? null : shade(value)))),
    x: edges, y: names.map((_, row) => row), zmin: low, zmax: high > low ? high : low + 1,
    colorscale: [[0, colour("heat-low")], [0.5, colour("heat-mid")], [1, colour("heat-high")]],
    customdata: map.values, text: names.map((name) => map.ends.map(() => escaped(name))),
    hovertemplate: "%{text}<br>to step %{x:.0f}<br>norm %{customdata:.4~g}<extra></extra>",
    hoverongaps: false, showscale: norms.known.length > 0,
    colorbar: { thickness: 10, outlinewidth: 0, tickvals: decades(low, high), ticktext: decades(low, high).map((value) => number(10 ** value)), title: { text: "norm", side: "right" } },
  }];
  if (map.nonfinite_spans.length && !map.is_timed) data.push(hatched(map.nonfinite_spans, names.length));
  const marks = map.nonfinite.slice(0, MOST_CROSSES);
  if (marks.length) {
    data.push({
      type: "scatter", mode: "markers", name: "NaN or Inf", x: marks.map((mark) => mark.step), y: marks.map((mark) => mark.row),
      text: marks.map((mark) => escaped(mark.layer)), showlegend: false,
      marker: { symbol: "x", size: Math.max(8, Math.min(11, 340 / names.length)), color: colour("bad"), line: { width: 1, color: colour("card") } },
      hovertemplate: "<b>NaN or Inf</b><br>%{text}<br>step %{x}<extra></extra>",
    });
  }
  const first = map.nonfinite_steps?.first ?? marks[0]?.step;
  const lines = first === undefined ? [] : [{ type: "line", x0: first, x1: first, y0: 0, y1: 1, yref: "paper", line: { color: colour("bad"), width: 1, dash: "dash" } }];
  return {
    data,
    words: wordsOf(map, norms),
    layout: {
      hovermode: "closest", shapes: lines,
      xaxis: { title: map.is_timed ? "up to second" : "up to step", showgrid: false, zeroline: false },
      yaxis: { range: [names.length - 0.5, -0.5], tickvals: ticks, ticktext: ticks.map((row) => escaped(tick(map.rows[row]))), showgrid: false, zeroline: false, fixedrange: names.length < 20 },
      margin: { l: 60, r: 10, t: 8, b: 40 },
    },
  };
}

/** What is told of norms: those that are `known`, `zeros` among them, whether some are `blank`, and the range. */
function normsOf(map) {
  const told = map.values.flat();
  const known = told.filter((value) => value > 0);
  return {
    known, zeros: told.filter((value) => value === 0).length, blank: told.includes(null),
    least: known.reduce((one, other) => Math.min(one, other), Infinity), most: known.reduce((one, other) => Math.max(one, other), 0),
  };
}

/** Steps that are known to be bad, over all layers; a pattern, so that it needs no colour. */
function hatched(spans, rows) {
  const [top, bottom] = [-0.5, rows - 0.5];
  return {
    type: "scatter", mode: "lines", name: "steps with NaN or Inf", showlegend: false, hoverinfo: "skip", fill: "toself",
    x: spans.flatMap(([first, last]) => [first - 0.5, last + 0.5, last + 0.5, first - 0.5, first - 0.5, null]),
    y: spans.flatMap(() => [top, top, bottom, bottom, top, null]),
    line: { color: colour("bad"), width: 1 }, fillcolor: "transparent",
    fillpattern: { shape: "/", fgcolor: colour("bad"), size: 8, solidity: 0.3 },
  };
}

function wordsOf(map, norms) {
  const shared = map.rows.some((row) => row.layer_count > 1) ? `, several a row (${counted(map.rows.length, "row")})` : "";
  const shown = map.rows.reduce((sum, row) => sum + row.layer_count, 0);
  const some = shown < map.layer_count ? `${count(shown)} of ` : "";
  return `${some}${counted(map.layer_count, "layer")}${shared}.${rangeOf(norms)}${badOf(map)}`;
}

function rangeOf({ known, zeros, blank, least, most }) {
  const palest = most * 10 ** -DECADES;
  const told = [
    known.length ? `Norms from ${number(least)} to ${number(most)}` : null,
    zeros ? `${counted(zeros, "cell")} exactly 0` : null,
    known.length && least < palest ? `the palest are below ${number(palest)}` : null,
    blank ? "blank: nothing finite was told" : null,
  ].filter(Boolean);
  return told.length ? ` ${told.join("; ")}.` : "";
}

function badOf({ nonfinite: [mark], nonfinite_steps: steps, is_timed: isTimed }) {
  if (!steps) return mark ? ` NaN or Inf first by step ${mark.step} in ${mark.layer}.` : " All finite.";
  const where = mark?.step === steps.first ? ` in ${mark.layer}` : "";
  const last = steps.last > steps.first ? `, last at step ${steps.last}` : "";
  return ` NaN or Inf first at step ${steps.first}${where}${last}.${isTimed ? "" : " Hatched: steps whose loss or a gradient was not finite."}`;
}

function rowName(row) {
  return row.layer_count === 1 ? row.layer : `${row.layer} … ${row.last_layer} (${row.layer_count})`;
}

function tick(row) {
  return row.layer_count === 1 ? short(row.layer) : `${short(row.layer)} +${row.layer_count - 1}`;
}

function short(name) {
  const most = matchMedia("(max-width: 760px)").matches ? 14 : LONGEST_NAME;
  return name.length <= most ? name : `…${name.slice(1 - most)}`;
}

function decades(low, high) {
  const whole = [];
  for (let value = Math.ceil(low); value <= high; value += 1) whole.push(value);
  return whole.length >= 2 ? whole.filter((_, place) => place % Math.ceil(whole.length / 6) === 0) : [low, (low + high) / 2, high];
}
