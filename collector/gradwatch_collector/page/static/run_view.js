/** One run: how it stands, what was found, its charts, and all that is known of it. */

import { ApiError, noRun, read } from "./api.js";
import { spanOf } from "./curves.js";
import { facts, fill, h, table } from "./dom.js";
import { ago, bytes, count, counted, duration, moment, number, percent, secondsBetween } from "./format.js";
import { HeatMap } from "./heat_map.js";
import { again, calmly, follow } from "./live.js";
import { METRICS, runCharts } from "./run_charts.js";
import { severity, status } from "./standing.js";
import { Timeline } from "./timeline.js";

// Without layers and events, which are many and are shown as a map.
const SECTIONS = ["attempts", "history", "findings", "checkpoints", "checkpoint_record", "effective_time", "environment"];
const CHECKPOINTS_SHOWN = 30;
const CALM_MS = 2_000;

export async function show(main) {
  const runId = idOf(location.pathname);
  if (runId === null) throw new ApiError("This address is cut or mistyped: it names no run.");
  document.title = `${runId} · gradwatch`;
  const view = new RunView(main, runId);
  await view.refresh();
  // There is nothing to be told of.
  if (view.isMissing) return;
  const reload = calmly(() => view.refresh(), CALM_MS);
  follow(() => reload(), runId);
  setInterval(() => view.tick(), 5_000);
}

/** The run of a page's path; null where it is not as browsers write it. */
function idOf(path) {
  try {
    return decodeURIComponent(path.slice("/runs/".length)) || null;
  } catch (error) {
    if (error instanceof URIError) return null;
    throw error;
  }
}

class RunView {
  constructor(main, runId) {
    this.runId = runId;
    this.problem = h("div", { role: "alert" });
    this.head = h("header");
    this.findings = h("section", { "aria-labelledby": "findings" });
    this.charts = runCharts();
    this.layers = new HeatMap(runId);
    this.timeline = new Timeline();
    this.noCharts = h("p", { class: "notice", hidden: true }, "No step has been told of yet. Charts appear with the first export, a few seconds after training starts.");
    const [loss, norm, ...rest] = this.charts;
    this.plots = h(
      "section", { class: "charts", "aria-label": "Charts" },
      loss.element, norm.element, this.layers.element, this.timeline.element, rest.map((chart) => chart.element),
    );
    this.details = h("div");
    this.whole = h("div", {}, this.head, this.findings, h("h2", {}, "Charts"), this.noCharts, this.plots, this.details);
    this.isMissing = false;
    fill(main, this.problem, this.whole);
  }

  async refresh() {
    again(null);
    try {
      const [run, lowest, all, last] = await Promise.all([
        read(`/api/v1/runs/${encodeURIComponent(this.runId)}`, { section: SECTIONS }),
        read("/api/v1/curves", { run: this.runId, metric: METRICS.lowest }),
        read("/api/v1/curves", { run: this.runId, metric: METRICS.all, ranks: "all", points: 100 }),
        read("/api/v1/last-steps", { run: this.runId }),
      ]);
      fill(this.problem);
      this.isMissing = false;
      this.whole.hidden = false;
      this.run = run;
      this.drawHead();
      this.drawFindings();
      this.drawDetails(last);
      const curves = Map.groupBy([...lowest.curves, ...all.curves], (curve) => curve.metric);
      this.noCharts.hidden = curves.size > 0;
      const span = spanOf(lowest.curves);
      await Promise.all([
        ...this.charts.map((chart) => chart.load(curves, run.findings, lowest.nonfinite_gradients, span)), this.layers.load(run.attempt, span), this.timeline.load(run),
      ]);
      this.plots.dataset.step = String(run.last_step ?? "");
    } catch (error) {
      this.isMissing = error.status === 404;
      this.whole.hidden = this.isMissing || !this.run;
      fill(
        this.problem, this.run && !this.isMissing ? null : h("h1", {}, "This run cannot be shown"),
        h("p", { class: "notice bad" }, this.isMissing ? noRun([this.runId]) : error.message, " ", h("a", { href: "/" }, "All runs")),
      );
      if (!(error instanceof ApiError)) throw error;
      if (!this.isMissing) again(() => this.refresh());
    }
  }

  drawHead() {
    const { run } = this;
    const reference = h("a", { class: "button", href: `/compare?${new URLSearchParams({ run: run.run_id })}` }, "Compare with another run");
    const about = [
      ["job", run.job], ["model", run.model], ["data set", run.dataset], ["team", run.team], ["tier", run.tier],
      ["host", run.host], ["commit", run.commit?.slice(0, 10)], ["target", run.target],
    ].filter(([, value]) => value);
    this.took = h("span");
    this.seen = h("span");
    const record = run.checkpoint_record;
    fill(
      this.head,
      h("p", { class: "crumbs" }, h("a", { href: "/" }, "Runs"), " / ", h("a", { href: `/?${new URLSearchParams({ text: run.job })}` }, run.job)),
      h("div", { class: "headline" }, h("h1", { class: "mono" }, run.run_id), status(run.status), run.reason ? h("span", { class: "soft" }, run.reason) : null, h("span", { class: "push" }, reference)),
      h("p", { class: "soft" }, about.flatMap(([name, value]) => [`${name} `, h("strong", {}, value), " · "]).slice(0, -1)),
      facts(
        [
          ["Steps", run.last_step === null ? "–" : count(run.last_step + 1)],
          ["Last loss", run.last_loss_nonfinite ? h("span", { class: "bad" }, "NaN") : number(run.last_loss)],
          [run.status === "running" ? "Running for" : "Took", this.took],
          ["Started", [ago(run.started_at), h("small", {}, moment(run.started_at))]],
          ["Last sign of life", this.seen],
          ["Effective training time", [percent(run.effective_time.ratio), h("small", {}, run.effective_time.waiting_seconds ? `${duration(run.effective_time.waiting_seconds)} waiting for data` : "of the wall time")]],
          ["Last good checkpoint", record.last_good_at ? [record.last_good_step === null ? "saved" : `step ${count(record.last_good_step)}`, h("small", {}, ago(record.last_good_at))] : ["none", h("small", {}, "nothing to go on with")]],
          ["Attempt", run.attempt > 1 || run.rank_count > 1 ? `${run.attempt}, ${counted(run.rank_count, "rank")}` : null],
          ["Target", run.target ? [run.target_reached_at ? "reached" : "not reached", h("small", {}, run.target_reached_at ? `after ${duration(secondsBetween(run.started_at, run.target_reached_at))}` : run.target)] : null],
        ],
        "facts",
      ),
    );
    this.tick();
  }

  /** Times go on by themselves. */
  tick() {
    const { run } = this;
    if (!run) return;
    this.took.textContent = duration(secondsBetween(run.started_at, run.ended_at ?? (run.status === "running" ? null : run.last_seen_at)));
    fill(this.seen, ago(run.last_seen_at), h("small", {}, moment(run.last_seen_at)));
  }

  drawFindings() {
    const { findings } = this.run;
    fill(
      this.findings,
      h("h2", { id: "findings" }, `Findings (${findings.length})`),
      findings.length
        ? h("ul", { class: "plain-list" }, findings.map((finding) => this.finding(finding)))
        : h("p", { class: "soft" }, "Nothing was found wrong with this run."),
    );
  }

  finding(finding) {
    const evidence = Object.entries(finding.evidence).filter(([, value]) => value !== null && typeof value !== "object");
    const where = [
      stepOf(finding), finding.layer ? ["layer ", h("code", {}, finding.layer)] : null,
      finding.born_in ? `born in ${finding.born_in}` : null, finding.rank ? `rank ${finding.rank}` : null,
      this.run.attempt > 1 ? `attempt ${finding.attempt}` : null,
    ].filter(Boolean);
    return h(
      "li", { class: "card" },
      h("div", { class: "headline" }, severity(finding), h("h3", {}, finding.rule.replaceAll("_", " ")),
        h("span", {}, where.flatMap((each) => [each, ", "]).slice(0, -1)),
        h("span", { class: "soft small push" }, `${finding.state}, first seen ${moment(finding.first_seen)}`)),
      finding.acknowledged_by ? h("p", { class: "small" }, `Taken by ${finding.acknowledged_by}${finding.note ? `: ${finding.note}` : ""}`) : null,
      h("p", { class: "small" }, finding.cause),
      h("p", { class: "small" }, h("strong", {}, "What to do: "), finding.action, " ", h("a", { href: finding.runbook_url, rel: "noreferrer" }, "Runbook")),
      evidence.length ? h("details", {}, h("summary", { class: "small" }, "Evidence"), facts(evidence.map(([name, value]) => [name.replaceAll("_", " "), typeof value === "number" ? number(value) : String(value)]), "evidence small")) : null,
    );
  }

  drawDetails(last) {
    const { run } = this;
    const open = new Set([...this.details.querySelectorAll("details[open]")].map((each) => each.id));
    const sections = [
      last.steps.length ? lastSteps(last) : null, checkpoints(run), run.attempts.length > 1 || run.rank_count > 1 ? attempts(run) : null,
      h("details", { id: "configuration" }, h("summary", {}, "Configuration and environment"), facts(Object.entries(run.environment).map(([name, value]) => [name, String(value)]), "evidence card")),
      h("details", { id: "history" }, h("summary", {}, "How its status became known"),
        table("Status history", ["Time", "Attempt", "Status", "Reason"], run.history.map((each) => [moment(each.recorded_at), each.attempt, status(each.status), each.reason]))),
    ].filter(Boolean);
    for (const each of sections) if (each.id && open.has(each.id)) each.open = true;
    fill(this.details, sections);
  }
}

/** The step, or between which ones where that is all that is known. */
function stepOf({ step, evidence }) {
  if (step !== null) return `step ${step}`;
  const { earliest_step: earliest, latest_step: latest } = evidence;
  return typeof earliest === "number" && typeof latest === "number" ? `between steps ${earliest} and ${latest}` : null;
}

function lastSteps(last) {
  const odd = (step, name, shown) => (step.nonfinite[name] ? h("strong", { class: "bad" }, step.nonfinite[name]) : shown);
  return h(
    "section", {},
    h("h2", {}, "Last steps in the black box"),
    h("p", { class: "soft small" }, `The last of ${counted(last.step_count, "step")}, sent for ${last.trigger ?? "an unknown reason"} by rank ${last.rank} in attempt ${last.attempt}.`),
    table("Last steps", ["Step", "Loss", "Gradient norm", "Learning rate", "Took", "Largest layer", "Its norm"], last.steps.map((step) => [
      step.step, odd(step, "loss", number(step.loss)), odd(step, "gradient_norm", number(step.gradient_norm)), number(step.learning_rate),
      duration(step.duration), step.layer ? h("code", {}, step.layer) : "–", odd(step, "norm", number(step.norm)),
    ])),
  );
}

function checkpoints(run) {
  const shown = run.checkpoints.slice(0, CHECKPOINTS_SHOWN);
  const more = run.checkpoints.length - shown.length;
  return h(
    "section", {},
    h("h2", {}, `Checkpoints (${run.checkpoints.length})`),
    shown.length
      ? table("Checkpoints", ["Time", "State", "Step", "Name", "Size", "Took"], shown.map((each) => [
        moment(each.time), h("span", { class: each.state === "saved" || each.state === "verified" ? "good" : "bad" }, each.state, each.error ? `: ${each.error}` : ""),
        each.step, each.name ? h("code", {}, each.name) : null, bytes(each.bytes), duration(each.seconds),
      ]))
      : h("p", { class: "soft" }, "None was told of. Save with ", h("code", {}, "watch.save_checkpoint(state, path)"), " and they appear here."),
    more > 0 ? h("p", { class: "soft small" }, `and ${counted(more, "earlier one")}.`) : null,
  );
}

function attempts(run) {
  return h(
    "section", {},
    h("h2", {}, "Attempts and ranks"),
    table("Attempts and ranks", ["Attempt", "Rank", "Status", "Reason", "Steps", "Started", "Ended"], run.attempts.flatMap((attempt) =>
      attempt.processes.slice(0, 64).map((each) => [
        attempt.attempt, each.rank, status(each.status), each.reason, each.last_step === null ? "–" : count(each.last_step + 1), moment(each.started_at), moment(each.ended_at),
      ]))),
  );
}
