/** Curves over steps: how traces, marks and words are made of what the API tells. */

import { colour } from "./charts.js";
import { number } from "./format.js";

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const COLOURS = ["line", "line-2", "line-3", "line-4"];
const MOST_LABELLED = 6;
// More are a thick line.
const MOST_CROSSES = 60;

/** Whether positive values need a logarithmic scale to be told apart. */
export function isWide(curves) {
  const known = curves.flatMap((curve) => curve.values).filter((value) => value !== null);
  const least = Math.min(...known);
  return known.length > 0 && least > 0 && Math.max(...known) / least > 50;
}

/** What lines are told apart by, colour and dashes together. */
export function lineStyle(place) {
  return { color: colour(COLOURS[place % COLOURS.length]), dash: DASHES[place % DASHES.length], width: 1.8 };
}

/** Lines, and where a point stands for many steps a band from the least to the greatest. */
export function traces(curves, { name = () => null, style = lineStyle, axis = "y", format = ".4~g" } = {}) {
  return curves.flatMap((curve, place) => {
    const line = style(place, curve);
    const isThinned = curve.values.some((value, index) => value !== null && curve.most[index] > curve.least[index]);
    const label = name(curve);
    const common = { x: curve.steps, yaxis: axis, type: "scatter", mode: "lines", legendgroup: String(place) };
    const trace = {
      ...common, y: curve.values, line, name: label ?? "", showlegend: label !== null,
      hovertemplate: `%{y:${format}}${label === null ? "" : `<extra>${escaped(label)}</extra>`}`,
    };
    if (curve.values.length <= 40) Object.assign(trace, { mode: "lines+markers", marker: { size: 4 } });
    if (!isThinned) return [trace];
    const edge = { ...common, line: { width: 0 }, hoverinfo: "skip", showlegend: false };
    return [trace, { ...edge, y: curve.least }, { ...edge, y: curve.most, fill: "tonexty", fillcolor: transparent(line.color) }];
  });
}

/** Crosses at the bottom where values were not finite. */
export function nonfiniteMarks(curves, { axis = "y", steps = [], name = "NaN or Inf", tone = colour("bad") } = {}) {
  const bad = [...new Set([...steps, ...nonfiniteSteps(curves)])].sort((a, b) => a - b);
  const known = curves.flatMap((curve) => curve.values).filter((value) => value !== null);
  if (!bad.length) return [];
  const some = thinned(bad, MOST_CROSSES);
  return [{
    x: some, y: some.map(() => (known.length ? Math.min(...known) : 0)), yaxis: axis, type: "scatter", mode: "markers",
    name, marker: { symbol: "x", size: 8, color: tone, line: { width: 1, color: colour("card") } },
    hovertemplate: "step %{x}<extra>NaN or Inf</extra>",
  }];
}

/** Steps at which something was not finite. */
export function nonfiniteSteps(curves) {
  return curves.flatMap((curve) => curve.steps.filter((_, index) => curve.nonfinite[index] > 0));
}

/** A dashed line and a word where something was found. */
export function findingMarks(findings) {
  const known = [...Map.groupBy(findings.filter((finding) => finding.step !== null), (finding) => finding.step)].slice(0, MOST_LABELLED);
  return {
    shapes: known.map(([step]) => ({
      type: "line", x0: step, x1: step, y0: 0, y1: 1, yref: "paper", line: { color: colour("bad"), width: 1, dash: "dash" },
    })),
    annotations: known.map(([step, those], place) => ({
      x: step, y: 1, yref: "paper", yanchor: "top", xanchor: "left", yshift: -14 * (place % 3), showarrow: false,
      text: escaped(` ${those.map((finding) => finding.rule.replaceAll("_", " ")).join(", ")}`), font: { color: colour("bad"), size: 11 },
    })),
  };
}

/** The first and the last step of some curves, with a little room; null without any. */
export function spanOf(curves) {
  const steps = curves.flatMap((curve) => [curve.steps[0], curve.steps.at(-1)]);
  if (!steps.length) return null;
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const room = Math.max(0.5, (last - first) * 0.015);
  return [first - room, last + room];
}

/** What a look at curves tells: where they begin and end, how far they go, and since when they are not finite. */
export function words(curves, format = number) {
  const known = curves.flatMap((curve) => curve.values).filter((value) => value !== null);
  const bad = Math.min(...nonfiniteSteps(curves));
  const since = Number.isFinite(bad) ? ` NaN or Inf from step ${Math.round(bad)} on.` : "";
  if (!known.length) return `Never finite.${since}`;
  return `First ${format(known[0])}, last ${format(known.at(-1))}, from ${format(Math.min(...known))} to ${format(Math.max(...known))}.${since}`;
}

/** What the first of some curves says at a place. */
export function spelled(curves, names, format = number) {
  return (place) => {
    const step = curves[0]?.steps[place];
    const told = curves.map((curve, index) => {
      const at = curve.steps.indexOf(step);
      return at < 0 ? null : `${names[index]} ${curve.nonfinite[at] ? "NaN or Inf" : format(curve.values[at])}`;
    });
    return `Step ${Math.round(step)}: ${told.filter(Boolean).join(", ")}`;
  };
}

/** Plotly reads some HTML in labels; what telemetry says is none. */
export function escaped(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function thinned(list, most) {
  return list.length <= most ? list : Array.from({ length: most }, (_, place) => list[Math.floor((place * list.length) / most)]);
}

function transparent(hex) {
  return `${hex}33`;
}
