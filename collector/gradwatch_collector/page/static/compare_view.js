/** Runs beside each other: what differs, and their curves over each other. */

import { ApiError, noRun, read, runPath } from "./api.js";
import { Chart } from "./charts.js";
import { isWide, lineStyle, nonfiniteMarks, spelled, traces, words } from "./curves.js";
import { fill, h, table } from "./dom.js";
import { bytes, counted, duration, number, percent } from "./format.js";
import { status } from "./standing.js";

const PICTURES = [["training.loss", "Loss"], ["training.gradient.norm", "Global gradient norm"], ["training.step.duration", "Step time, seconds"]];
// What fits beside each other.
const MOST_COMPARED = 8;

export async function show(main) {
  const told = new URLSearchParams(location.search);
  const named = [...new Set(told.getAll("run"))];
  const runIds = named.slice(0, MOST_COMPARED);
  const everything = told.get("facts") === "all";
  document.title = "Compare runs · gradwatch";
  fill(main, h("h1", {}, "Compare runs"));
  if (runIds.length < 2) {
    main.append(await choice(runIds[0]).catch((error) => nameUnknown(error, runIds)));
    return;
  }
  const [found, ...curves] = await Promise.all([
    read("/api/v1/comparison", { run: runIds, facts: everything ? "all" : "different" }),
    ...runIds.map((run) => read("/api/v1/curves", { run, metric: PICTURES.map(([metric]) => metric), points: 300 })),
  ]).catch((error) => nameUnknown(error, runIds));
  const charts = h("section", { class: "charts", "aria-label": "Charts" });
  main.append(
    named.length > runIds.length ? h("p", { class: "notice" }, `Up to ${MOST_COMPARED} runs are compared: these are the first of ${named.length}.`) : "",
    h("p", { class: "soft" }, "Changes are relative to the first run, ", h("a", { href: runPath(runIds[0]) }, runIds[0]), "."),
    h("h2", {}, "Charts"), charts,
    h("h2", {}, everything ? "All that is known" : "What differs"),
    factsTable(found),
    h("p", {}, h("a", { class: "button", href: `?${toggled(runIds, everything)}` }, everything ? "Only what differs" : "Also what is the same")),
  );
  for (const [metric, title] of PICTURES) await drawOver(charts, title, curves.flatMap((each) => newestOf(each, metric)));
}

function toggled(runIds, everything) {
  return new URLSearchParams([...runIds.map((run) => ["run", run]), ...(everything ? [] : [["facts", "all"]])]);
}

/** The API does not say which of several runs is not there. */
async function nameUnknown(error, runIds) {
  if (error.status !== 404) throw error;
  const asked = await Promise.allSettled(runIds.map((run) => read(`/api/v1/runs/${encodeURIComponent(run)}`, { section: ["attempts"] })));
  throw new ApiError(noRun(runIds.filter((_, place) => asked[place].reason?.status === 404)), 404);
}

/** Of each run the newest attempt's first curve; of a gradient norm with all that is known of bad gradients. */
function newestOf(told, metric) {
  const curves = told.curves.filter((curve) => curve.metric === metric);
  const attempt = Math.max(...curves.map((curve) => curve.attempt));
  const bad = metric === "training.gradient.norm" ? told.nonfinite_gradients.find((each) => each.attempt === attempt) : null;
  return curves.filter((curve) => curve.attempt === attempt).slice(0, 1).map((curve) => ({
    ...curve, run: told.run_id, nonfinite_steps: bad ?? curve.nonfinite_steps,
  }));
}

async function drawOver(charts, title, curves) {
  if (!curves.length) return;
  const chart = new Chart(title, { isTall: true });
  chart.sharesSteps = true;
  charts.append(chart.element);
  await chart.draw(() => ({
    data: [
      ...traces(curves, { name: (curve) => curve.run }),
      ...curves.flatMap((curve, place) => nonfiniteMarks([curve], { name: `${curve.run}: NaN or Inf`, tone: lineStyle(place).color })),
    ],
    words: curves.map((curve) => `${curve.run}: ${words([curve])}`).join(" "),
    spell: spelled(curves, curves.map((curve) => curve.run)),
    layout: { xaxis: { title: "step" }, yaxis: { type: isWide(curves) ? "log" : "linear" } },
  }));
}

function factsTable(found) {
  if (!found.facts.length) return h("p", { class: "notice" }, "Nothing that is known differs.");
  const headings = ["What", ...found.runs.map((run) => h("span", {}, h("a", { href: runPath(run.run_id) }, run.run_id), " ", status(run.status)))];
  const rows = found.facts.map((fact) => [
    h("span", { class: fact.differs ? "differs" : "soft" }, fact.name, h("small", { class: "soft" }, ` ${fact.section}`)),
    ...fact.values.map((value) => h("span", {}, spell(value, fact.unit), value.change === null ? null : h("small", { class: "soft" }, ` (${change(value.change)})`))),
  ]);
  return table("What differs between runs", headings, rows, "compared");
}

function spell({ value, nonfinite }, unit) {
  if (nonfinite) return "NaN or Inf";
  if (value === null) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return value;
  if (unit === "s") return duration(value);
  if (unit === "h") return `${number(value)} h`;
  if (unit === "1") return percent(value);
  if (unit === "By") return bytes(value);
  return unit && !unit.startsWith("{") ? `${number(value)} ${unit}` : number(value);
}

function change(relative) {
  if (relative >= 9) return `× ${Number((1 + relative).toPrecision(3))}`;
  return `${relative >= 0 ? "+" : ""}${Number((relative * 100).toPrecision(3))} %`;
}

/** With fewer than two: which run to compare with. */
async function choice(runId) {
  if (!runId) {
    return h("p", { class: "notice" }, "Choose two runs or more ", h("a", { href: "/" }, "in the list"), ", by their boxes.");
  }
  const run = await read(`/api/v1/runs/${encodeURIComponent(runId)}`, { section: ["attempts"] });
  const { runs } = await read("/api/v1/runs", { job: run.job, limit: 50 });
  const others = runs.filter((each) => each.run_id !== runId);
  if (!others.length) return h("p", { class: "notice" }, `${runId} is the only run of job ${run.job}. Choose others `, h("a", { href: "/" }, "in the list"), ".");
  return h(
    "section", {},
    h("p", {}, "Compare ", h("a", { href: runPath(runId) }, runId), ` with one of the ${counted(others.length, "other run")} of job ${run.job}:`),
    table("Runs of the same job", ["Run", "Status", "Model", "Last loss"], others.map((each) => [
      h("a", { href: `/compare?${new URLSearchParams([["run", each.run_id], ["run", runId]])}` }, each.run_id), status(each.status), each.model, each.last_loss_nonfinite ? "NaN" : number(each.last_loss),
    ])),
  );
}
