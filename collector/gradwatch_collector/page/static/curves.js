/** Curves over steps: how traces, marks and words are made of what the API tells. */

import { colour } from "./charts.js";
import { count, counted, number } from "./format.js";

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const COLOURS = ["line", "line-2", "line-3", "line-4"];
const MOST_LABELLED = 6;
// More are a thick line.
const MOST_CROSSES = 60;
// A legend of longer names leaves a curve no room.
const LONGEST_NAME = 48;
const MOST_TOLD = 8;

/** Whether positive values need a logarithmic scale to be told apart. */
export function isWide(curves) {
  const known = present(curves.flatMap((curve) => curve.values));
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
    const told = name(curve);
    const label = told === null ? null : labelled(told);
    const common = { x: curve.steps, yaxis: axis, type: "scatter", mode: "lines", legendgroup: String(place) };
    const trace = {
      ...common, y: curve.values, line, name: label ?? "", showlegend: label !== null,
      hovertemplate: `%{y:${format}}${label === null ? "" : `<extra>${label}</extra>`}`,
    };
    if (curve.values.length <= 40) Object.assign(trace, { mode: "lines+markers", marker: { size: 4 } });
    if (!isThinned) return [trace];
    const edge = { ...common, line: { width: 0 }, hoverinfo: "skip", showlegend: false };
    return [trace, { ...edge, y: curve.least }, { ...edge, y: curve.most, fill: "tonexty", fillcolor: transparent(line.color) }];
  });
}

/** Crosses at the bottom where values were not finite. */
export function nonfiniteMarks(curves, { steps = [], name = "NaN or Inf", tone = colour("bad") } = {}) {
  const bad = [...new Set([...steps, ...nonfiniteSteps(curves)])].sort((a, b) => a - b);
  const known = present(curves.flatMap((curve) => curve.values));
  if (!bad.length) return [];
  const some = thinned(bad, MOST_CROSSES);
  return [{
    x: some, y: some.map(() => (known.length ? Math.min(...known) : 0)), type: "scatter", mode: "markers",
    name: labelled(name), marker: { symbol: "x", size: 8, color: tone, line: { width: 1, color: colour("card") } },
    hovertemplate: "step %{x}<extra>NaN or Inf</extra>",
  }];
}

/** Steps at which something was not finite, of stretches of steps the last. */
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

/**
 * What a look at curves tells: of each where it begins and ends, how far it goes, and when it was not finite. Several
 * are told apart by their names.
 */
export function words(curves, { name = () => null, format = number } = {}) {
  if (curves.length === 1) return wordsOf(curves[0], format);
  const told = curves.slice(0, MOST_TOLD).map((curve) => `${name(curve)}: ${wordsOf(curve, format)}`);
  return [...told, ...(curves.length > MOST_TOLD ? [`And ${counted(curves.length - MOST_TOLD, "more curve")}.`] : [])].join(" ");
}

function wordsOf(curve, format) {
  const known = present(curve.values);
  const since = nonfiniteWords(curve.nonfinite_steps);
  if (!known.length) return `Never finite.${since}`;
  const [least, most] = [Math.min(...present(curve.least)), Math.max(...present(curve.most))];
  const course = least === most ? `Always ${format(least)}.` : `First ${format(known[0])}, last ${format(known.at(-1))}, from ${format(least)} to ${format(most)}.`;
  return course + since;
}

/** When something was not finite, as a sentence after others; `told` is null for never. */
export function nonfiniteWords(told) {
  if (!told) return "";
  if (told.count === 1) return ` NaN or Inf in step ${told.first}.`;
  return ` NaN or Inf in ${count(told.count)} steps, the first ${told.first}, the last ${told.last}.`;
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

/** Plotly reads some HTML in labels, and names in braces in templates; what telemetry says is neither. */
export function escaped(text) {
  return String(text).replace(/[&<>%]/g, (character) => `&#${character.codePointAt(0)};`);
}

/** A name for a legend: as escaped, and so short that a chart has room beside it. */
export function labelled(name) {
  const characters = [...String(name)];
  return escaped(characters.length <= LONGEST_NAME ? name : `${characters.slice(0, LONGEST_NAME - 9).join("")}…${characters.slice(-8).join("")}`);
}

function present(values) {
  return values.filter((value) => value !== null);
}

function thinned(list, most) {
  return list.length <= most ? list : Array.from({ length: most }, (_, place) => list[Math.floor((place * list.length) / most)]);
}

function transparent(hex) {
  return `${hex}33`;
}
