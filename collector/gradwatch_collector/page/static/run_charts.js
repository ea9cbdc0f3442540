/** The charts of one run over its steps: each knows which metrics it needs and what it makes of them. */

import { Chart, colour } from "./charts.js";
import { findingMarks, isWide, lineStyle, nonfiniteMarks, nonfiniteSteps, nonfiniteWords, spelled, traces, words } from "./curves.js";
import { bytes, percent } from "./format.js";
import { timeSplit } from "./time_split.js";

const HEADROOM_WANTED = 0.1;
const MOST_LINES = 8;
const FAR = 4;
const DEVICE = "training.device";
const LOGGED_NAME = "training.metric.name";
const MEMORY = {
  "training.device.memory.allocated": "allocated",
  "training.device.memory.reserved": "reserved",
  "training.device.memory.limit": "limit",
  "process.memory.usage": "process",
  "training.host.memory.limit": "host limit",
};

export const METRICS = {
  lowest: [
    "training.loss", "training.learning_rate", "training.gradient.norm", "training.step.duration", "training.data.wait",
    "training.phase.duration", "training.metric", ...Object.keys(MEMORY),
  ],
  all: ["training.device.memory.headroom"],
};

/** The charts, in the order in which they are looked at; each shows itself once there is something to show. */
export function runCharts() {
  return [
    new StepChart("Loss and learning rate", lossPicture, { isTall: true }),
    new StepChart("Global gradient norm, before clipping", normPicture, { isTall: true }),
    new StepChart("Where the time of a step goes", timeSplit, {}),
    new StepChart("Memory and headroom", memoryPicture, {}),
    new StepChart("Logged metrics", loggedPicture, {}),
  ];
}

class StepChart {
  constructor(title, picture, options) {
    this.chart = new Chart(title, options);
    this.chart.sharesSteps = true;
    this.chart.element.hidden = true;
    this.picture = picture;
  }

  get element() {
    return this.chart.element;
  }

  /** `curves`: by metric. `findings`: of the run. `bad`: steps of bad gradients. `span`: the first and last step. */
  async load(curves, findings, bad, span) {
    this.chart.span = span;
    const isThere = this.picture(curves, findings, bad) !== null;
    this.element.hidden = !isThere;
    if (isThere) await this.chart.draw(() => this.picture(curves, findings, bad));
  }
}

function named(what, curves) {
  const several = new Set(curves.map((curve) => curve.attempt)).size > 1;
  return (curve) => [
    what, several ? `attempt ${curve.attempt}` : null,
    curve.labels["training.optimizer"] === undefined ? null : `optimizer ${curve.labels["training.optimizer"]}`,
    curve.labels["training.param_group"] === undefined ? null : `group ${curve.labels["training.param_group"]}`,
  ].filter(Boolean).join(", ");
}

function lossPicture(curves, findings) {
  const losses = curves.get("training.loss") ?? [];
  const rates = (curves.get("training.learning_rate") ?? []).slice(0, MOST_LINES);
  if (!losses.length) return null;
  const lossName = named("loss", losses);
  const rateName = named("learning rate", rates);
  const data = [
    ...traces(losses, { name: lossName }),
    ...nonfiniteMarks(losses),
    ...traces(rates, { name: rateName, axis: "y2", style: (place) => ({ ...lineStyle(place), color: colour("line-2") }) }),
  ];
  const marks = findingMarks(findings);
  return {
    data, words: [...told("Loss", losses, lossName), ...told("Learning rate", rates, rateName)].join(" "),
    spell: spelled([...losses, ...rates], [...losses.map(lossName), ...rates.map(rateName)]),
    layout: {
      ...marks,
      xaxis: { title: "step", anchor: rates.length ? "y2" : "y" },
      yaxis: { title: "loss", domain: rates.length ? [0.38, 1] : [0, 1], type: isWide(losses) ? "log" : "linear" },
      ...(rates.length ? { yaxis2: { title: "rate", domain: [0, 0.26], rangemode: "tozero" } } : {}),
    },
  };
}

/** One that stands alone needs no name but what it is. */
function told(what, curves, name) {
  if (!curves.length) return [];
  return [curves.length === 1 ? `${what}: ${words(curves)}` : words(curves, { name })];
}

function normPicture(curves, findings, bad) {
  const norms = curves.get("training.gradient.norm") ?? [];
  if (!norms.length) return null;
  const name = named("norm", norms);
  // A loss that is not finite has such gradients, seen or not; others are told of by events.
  const steps = [...nonfiniteSteps(curves.get("training.loss") ?? []), ...bad.flatMap(({ first, last }) => [first, last])];
  const isTriedAgain = new Set(norms.map((norm) => norm.attempt)).size > 1;
  const since = bad.map((each) => `${isTriedAgain ? ` Attempt ${each.attempt}:` : ""}${nonfiniteWords(each)}`);
  return {
    data: [...traces(norms, { name }), ...nonfiniteMarks(norms, { steps })],
    words: [words(norms.map((norm) => ({ ...norm, nonfinite_steps: null })), { name }), ...since].join(""), spell: spelled(norms, norms.map(name)),
    layout: { ...findingMarks(findings), xaxis: { title: "step" }, yaxis: { title: "L2 norm", type: isWide(norms) ? "log" : "linear" } },
  };
}

function memoryPicture(curves) {
  const told = ["training.device.memory.headroom", ...Object.keys(MEMORY)].flatMap((metric) => curves.get(metric) ?? []);
  // An attempt begins with empty memory: the newest tells.
  const newest = told.filter((curve) => curve.attempt === Math.max(...told.map((each) => each.attempt)));
  const headroom = newest.filter((curve) => !(curve.metric in MEMORY));
  const all = newest.filter((curve) => curve.metric in MEMORY).slice(0, MOST_LINES);
  const isLimit = (curve) => curve.metric.endsWith(".limit");
  const highest = Math.max(0, ...all.filter((curve) => !isLimit(curve)).flatMap((curve) => curve.most));
  // A limit that is far away would make flat lines of all others: words tell it.
  const used = all.filter((curve) => !isLimit(curve) || curve.values.at(-1) < FAR * highest);
  const far = all.filter((curve) => !used.includes(curve));
  if (!headroom.length && !used.length) return null;
  const tightest = headroom.toSorted((a, b) => least(a) - least(b)).slice(0, MOST_LINES);
  const usedName = (curve) => [MEMORY[curve.metric], curve.labels[DEVICE]].filter(Boolean).join(" ");
  const leftName = (curve) => `headroom of rank ${curve.rank ?? "?"}, ${curve.labels[DEVICE] ?? "host"}`;
  const hasBoth = headroom.length > 0 && used.length > 0;
  const leftAxis = hasBoth ? "y2" : "y";
  const percentAxis = { title: "headroom", range: [0, 1.02], tickformat: ".0%", domain: hasBoth ? [0, 0.36] : [0, 1] };
  const shapes = headroom.length
    ? [{ type: "line", xref: "paper", x0: 0, x1: 1, yref: leftAxis, y0: HEADROOM_WANTED, y1: HEADROOM_WANTED, line: { color: colour("bad"), width: 1, dash: "dot" } }]
    : [];
  return {
    data: [
      ...traces(used, { name: usedName, format: ".3~s" }),
      ...traces(tightest, { name: (curve) => (curve === tightest[0] ? "headroom" : null), axis: leftAxis, format: ".1%", style: (place) => ({ ...lineStyle(place), color: colour(place ? "rule" : "line-3") }) }),
    ],
    words: [
      tightest.length ? `Tightest: ${leftName(tightest[0])}, at least ${percent(least(tightest[0]))} never used; dotted: ${percent(HEADROOM_WANTED)}.` : null,
      ...used.filter((curve) => !isLimit(curve)).slice(0, 2).map((curve) => `${usedName(curve)}: at most ${bytes(Math.max(...curve.most))}.`),
      ...far.slice(0, 1).map((curve) => `${usedName(curve)}: ${bytes(curve.values.at(-1))}.`),
    ].filter(Boolean).join(" "),
    spell: used.length ? spelled(used, used.map(usedName), bytes) : spelled(tightest, tightest.map(leftName), percent),
    layout: {
      shapes, xaxis: { title: "step", anchor: hasBoth ? "y2" : "y" },
      yaxis: used.length ? { title: "bytes", domain: hasBoth ? [0.48, 1] : [0, 1], rangemode: "tozero", tickformat: ".2~s" } : percentAxis,
      ...(hasBoth ? { yaxis2: percentAxis } : {}),
    },
  };
}

function loggedPicture(curves) {
  const logged = (curves.get("training.metric") ?? []).slice(0, MOST_LINES);
  if (!logged.length) return null;
  const name = (curve) => named(curve.labels[LOGGED_NAME] ?? "metric", logged)(curve);
  return {
    data: [...traces(logged, { name }), ...nonfiniteMarks(logged)],
    words: logged.map((curve) => `${name(curve)}: ${words([curve])}`).join(" "), spell: spelled(logged, logged.map(name)),
    layout: { xaxis: { title: "step" }, yaxis: { type: isWide(logged) ? "log" : "linear" } },
  };
}

function least(curve) {
  return Math.min(...curve.least.filter((value) => value !== null));
}

