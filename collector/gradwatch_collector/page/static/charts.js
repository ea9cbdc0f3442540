/** Charts by Plotly, in the page's colours: read by eye, by keyboard and by screen reader. */

import { fill, h } from "./dom.js";

let library = null;
const drawn = new Set();

/** Load the library, once. */
export function plotly() {
  library ??= new Promise((resolve, reject) => {
    const script = h("script", { src: new URL("plotly.min.js", import.meta.url).href });
    script.addEventListener("load", () => resolve(globalThis.Plotly));
    script.addEventListener("error", () => reject(new Error("the charts' library did not load; reload the page")));
    document.head.append(script);
  });
  return library;
}

/** The value of one of the page's colours. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/**
 * A figure with a title, a plot, what it says in words, and what is under the cursor. Arrow keys move the cursor.
 * `step` names what is along the x axis.
 */
export class Chart {
  constructor(title, { isTall = false, isWide = false, isTitled = true, id = null } = {}) {
    this.plot = h("div", { class: isTall ? "plot tall" : "plot", tabindex: "0", role: "img", "aria-label": title });
    this.plot.addEventListener("keydown", (event) => this.move(event));
    this.told = h("p", { class: "told" });
    this.cursor = h("span", { class: "hidden-label", "aria-live": "polite" });
    this.aside = h("span", { class: "soft small" });
    this.title = title;
    // Charts over steps share their x axis: `span` is its first and last step, `range` what it is zoomed to.
    this.sharesSteps = false;
    this.span = null;
    this.range = null;
    this.element = h(
      "figure", { class: isWide ? "card wide" : "card", id },
      h("figcaption", {}, h("h3", { class: isTitled ? null : "hidden-label" }, title), this.aside), this.plot, this.told, this.cursor,
    );
    this.place = null;
  }

  /**
   * Draw, or draw anew. `make` returns `{data, layout, words, spell}` and is called again when colours change;
   * `words` is what a look at it would tell, `spell(index)` what is at a place along the x axis.
   */
  async draw(make) {
    this.make = make;
    drawn.add(this);
    const Plotly = await plotly();
    const { data, layout, words, spell } = make();
    this.data = data;
    this.spell = spell;
    fill(this.told, words);
    this.plot.setAttribute("aria-label", `${this.title}. ${words} ${spell ? "Arrow keys read it out step by step." : ""}`);
    await Plotly.react(this.plot, data, themed(layout, this.range ?? (this.sharesSteps ? this.span : null)), {
      displayModeBar: false, responsive: true, doubleClick: "reset", scrollZoom: false, showTips: false,
    });
    this.listen();
  }

  /** Zooming one chart into some steps zooms all that have steps. */
  listen() {
    if (this.isListening) return;
    this.isListening = true;
    this.plot.on("plotly_relayout", (told) => {
      if (this.isFollowing || !this.sharesSteps || !("xaxis.range[0]" in told || told["xaxis.autorange"])) return;
      const range = [told["xaxis.range[0]"], told["xaxis.range[1]"]];
      const isWhole = told["xaxis.autorange"] || (this.span && range.every((end, place) => end === this.span[place]));
      for (const chart of drawn) if (chart.sharesSteps) chart.zoom(isWhole ? null : range, chart === this);
    });
  }

  async zoom(range, isDone) {
    this.range = range;
    if (isDone) return;
    this.isFollowing = true;
    const Plotly = await plotly();
    const shown = range ?? this.span;
    await Plotly.relayout(this.plot, shown ? { "xaxis.range": [...shown] } : { "xaxis.autorange": true });
    this.isFollowing = false;
  }

  async move(event) {
    if (!this.spell) return;
    const last = this.data[0].x.length - 1;
    const step = event.shiftKey ? 10 : 1;
    const places = {
      ArrowLeft: (this.place ?? last + 1) - step, ArrowRight: (this.place ?? -1) + step, Home: 0, End: last,
    };
    if (!(event.key in places) || last < 0) return;
    event.preventDefault();
    this.place = Math.min(last, Math.max(0, places[event.key]));
    fill(this.cursor, this.spell(this.place));
    const Plotly = await plotly();
    Plotly.Fx.hover(this.plot, [{ curveNumber: 0, pointNumber: this.place }], this.data[0].yaxis === "y2" ? "xy2" : "xy");
  }
}

function themed(layout, range) {
  const axis = {
    gridcolor: colour("rule"), zerolinecolor: colour("rule"), linecolor: colour("rule"), tickcolor: colour("rule"),
    automargin: true, exponentformat: "none", hoverformat: ".4~g",
  };
  const axes = Object.entries(layout).filter(([name]) => /^[xy]axis/.test(name));
  const isTouched = matchMedia("(pointer: coarse)").matches;
  return {
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("soft") },
    margin: { l: 52, r: 14, t: 10, b: 38 },
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("rule"), font: { color: colour("ink") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: colour("ink"), size: 11.5 }, itemwidth: 30 },
    // On a touch screen dragging scrolls the page.
    dragmode: isTouched ? false : "zoom",
    uirevision: "kept",
    ...layout,
    ...Object.fromEntries(axes.map(([name, told]) => [name, {
      ...axis, ...(told.type === "log" ? { tickformat: "~g", nticks: 5 } : {}), ...told,
      ...(name === "xaxis" && range ? { range: [...range], autorange: false } : {}),
      title: told.title ? { text: told.title, standoff: 8 } : undefined,
    }])),
  };
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of drawn) chart.draw(chart.make);
});
