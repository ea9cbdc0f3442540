/** Gradient norms by layer over steps, dark where they are large; what was not finite is crossed. */

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
    fill(
      this.crosses,
      first.length
        ? h("details", { open: true },
          h("summary", {}, `✕ ${counted(map.nonfinite_count, "gradient")} not finite`),
          h("ul", { class: "small columns", "aria-label": "Where gradients were not finite" },
            first.map((mark) => h("li", {}, `step ${mark.step}: `, h("code", {}, mark.layer))),
            map.nonfinite_count > first.length ? h("li", { class: "soft" }, `and ${map.nonfinite_count - first.length} more`) : null))
        : null,
    );
  }
}

function picture(map) {
  const names = map.rows.map(rowName);
  const values = map.values.map((row) => row.map((value) => (value === null || value <= 0 ? null : Math.log10(value))));
  const known = values.flat().filter((value) => value !== null);
  const high = known.length ? Math.max(...known) : 1;
  const low = known.length ? Math.max(Math.min(...known), high - DECADES) : 0;
  const edges = [map.first_step - 0.5, ...map.ends.map((end) => end + 0.5)];
  const every = Math.max(1, Math.ceil(names.length / 24));
  const ticks = names.map((_, row) => row).filter((row) => row % every === 0);
  const data = [{
    type: "heatmap", z: values, x: edges, y: names.map((_, row) => row), zmin: low, zmax: high > low ? high : low + 1,
    colorscale: [[0, colour("heat-low")], [0.5, colour("heat-mid")], [1, colour("heat-high")]],
    customdata: map.values, text: names.map((name) => map.ends.map(() => escaped(name))),
    hovertemplate: "%{text}<br>to step %{x:.0f}<br>norm %{customdata:.4~g}<extra></extra>",
    hoverongaps: false,
    colorbar: { thickness: 10, outlinewidth: 0, tickvals: decades(low, high), ticktext: decades(low, high).map((value) => number(10 ** value)), title: { text: "norm", side: "right" } },
  }];
  const marks = map.nonfinite.slice(0, MOST_CROSSES);
  if (marks.length) {
    data.push({
      type: "scatter", mode: "markers", name: "NaN or Inf", x: marks.map((mark) => mark.step), y: marks.map((mark) => mark.row),
      text: marks.map((mark) => escaped(mark.layer)), showlegend: false,
      marker: { symbol: "x", size: Math.max(8, Math.min(11, 340 / names.length)), color: colour("bad"), line: { width: 1, color: colour("card") } },
      hovertemplate: "<b>NaN or Inf</b><br>%{text}<br>step %{x}<extra></extra>",
    });
  }
  const lines = marks.length ? [{ type: "line", x0: marks[0].step, x1: marks[0].step, y0: 0, y1: 1, yref: "paper", line: { color: colour("bad"), width: 1, dash: "dash" } }] : [];
  return {
    data,
    words: wordsOf(map, low, high, known.length > 0),
    layout: {
      hovermode: "closest", shapes: lines,
      xaxis: { title: map.is_timed ? "up to second" : "up to step", showgrid: false, zeroline: false },
      yaxis: { autorange: "reversed", tickvals: ticks, ticktext: ticks.map((row) => escaped(tick(map.rows[row]))), showgrid: false, zeroline: false, fixedrange: names.length < 20 },
      margin: { l: 60, r: 10, t: 8, b: 40 },
    },
  };
}

function wordsOf(map, low, high, isKnown) {
  const shared = map.rows.some((row) => row.layer_count > 1) ? `, several a row (${counted(map.rows.length, "row")})` : "";
  const range = isKnown ? ` Norms from ${number(10 ** low)} to ${number(10 ** high)}; blank: nothing finite was told.` : "";
  const first = map.nonfinite[0];
  const bad = first ? ` NaN or Inf first at step ${first.step} in ${first.layer}.` : " All finite.";
  const shown = map.rows.reduce((sum, row) => sum + row.layer_count, 0);
  const some = shown < map.layer_count ? `${count(shown)} of ` : "";
  return `${some}${counted(map.layer_count, "layer")}${shared}.${range}${bad}`;
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
