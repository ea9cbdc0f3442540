/** Where the time of steps goes: parts stacked to the whole. Parts are measured in some steps only, each in its own. */

import { colour } from "./charts.js";
import { labelled } from "./curves.js";
import { duration, percent } from "./format.js";

const BINS = 100;
const PHASE = "training.phase";
const ORDER = ["data wait", "forward", "backward", "optimizer"];
const COLOURS = { "data wait": "line-2", forward: "line", backward: "line-4", optimizer: "line-3", "the rest": "cancelled" };
// So that they are told apart without colours, too.
const PATTERNS = { "data wait": "/", forward: "", backward: "\\", optimizer: "x", "the rest": "." };

/** The picture for `Chart.draw`; null if no step was timed. */
export function timeSplit(curves) {
  const whole = newest(curves.get("training.step.duration") ?? []);
  if (!whole) return null;
  const { attempt } = whole;
  const parts = new Map();
  const wait = (curves.get("training.data.wait") ?? []).find((curve) => curve.attempt === attempt);
  if (wait) parts.set("data wait", wait);
  for (const curve of curves.get("training.phase.duration") ?? []) {
    if (curve.attempt === attempt) parts.set(String(curve.labels[PHASE]), curve);
  }
  const [first, last] = [whole.steps[0], whole.steps.at(-1)];
  const bins = Math.min(BINS, whole.steps.length);
  const width = Math.max((last - first) / bins, 1e-9);
  const centres = Array.from({ length: bins }, (_, bin) => first + width * (bin + 0.5));
  const total = binned(whole, first, width, bins);
  const names = [...ORDER.filter((name) => parts.has(name)), ...[...parts.keys()].filter((name) => !ORDER.includes(name))];
  const columns = names.map((name) => binned(parts.get(name), first, width, bins));
  const rest = total.map((value, bin) => Math.max(0, (value ?? 0) - columns.reduce((sum, column) => sum + (column[bin] ?? 0), 0)));
  const shown = [...names, names.length ? "the rest" : "not split"];
  const all = [...columns, rest];
  const sums = all.map((column) => column.reduce((sum, value) => sum + (value ?? 0), 0));
  const sum = sums.reduce((one, other) => one + other, 0);
  return {
    data: all.map((column, place) => ({
      type: "scatter", mode: "lines", stackgroup: "time", x: centres, y: column.map((value) => value ?? 0), name: labelled(shown[place]),
      line: { width: 0.6, color: tone(shown[place]) }, fillcolor: `${tone(shown[place])}88`, fillpattern: { shape: PATTERNS[shown[place]] ?? "", fillmode: "overlay", fgopacity: 0.6, size: 6 },
      hovertemplate: "%{y:.3~s}s",
    })),
    words: `A step takes ${duration(mean(total))} on average: ${shown.map((name, place) => `${name} ${percent(sum ? sums[place] / sum : 0)}`).join(", ")}.`,
    spell: (bin) => `About step ${Math.round(centres[bin])}: ${shown.map((name, place) => `${name} ${duration(all[place][bin] ?? 0)}`).join(", ")}`,
    layout: { xaxis: { title: "step" }, yaxis: { title: "seconds", rangemode: "tozero", tickformat: ".2~s" } },
  };
}

function newest(curves) {
  return curves.reduce((best, curve) => (!best || curve.attempt > best.attempt ? curve : best), null);
}

/** The mean of a curve over equal stretches of steps; where none of its points is, what was before. */
function binned(curve, first, width, bins) {
  const sums = Array(bins).fill(0);
  const counts = Array(bins).fill(0);
  curve.steps.forEach((step, index) => {
    const value = curve.values[index];
    if (value === null || step === null) return;
    const bin = Math.min(bins - 1, Math.max(0, Math.floor((step - first) / width)));
    sums[bin] += value;
    counts[bin] += 1;
  });
  let before = null;
  return sums.map((sum, bin) => {
    if (counts[bin]) before = sum / counts[bin];
    return before;
  });
}

function mean(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function tone(name) {
  return colour(COLOURS[name] ?? "cancelled");
}
