/** What happened to a run and when: attempts, findings, checkpoints on one time axis. */

import { Chart, colour } from "./charts.js";
import { escaped } from "./curves.js";
import { counted, localTime, moment } from "./format.js";
import { GLYPHS } from "./standing.js";

const MOST_FINDINGS = 20;
const MOST_CHECKPOINTS = 300;
const SYMBOLS = { page: "triangle-up", ticket: "diamond", info: "circle" };
const SAVES = { saved: ["diamond", "line-3"], verified: ["diamond-open", "line-3"], failed: ["x", "bad"], corrupt: ["x", "bad"] };

export class Timeline {
  constructor() {
    this.chart = new Chart("Time line", { isWide: true, id: "timeline" });
  }

  get element() {
    return this.chart.element;
  }

  async load(run) {
    const rows = 1 + Math.min(run.findings.length, MOST_FINDINGS) + (run.checkpoints.length ? 1 : 0);
    this.chart.plot.style.height = `${80 + 26 * rows}px`;
    await this.chart.draw(() => picture(run));
  }
}

function picture(run) {
  const until = run.ended_at ?? (run.status === "running" ? new Date().toISOString() : run.last_seen_at);
  const findings = run.findings.toSorted((a, b) => a.first_seen.localeCompare(b.first_seen)).slice(0, MOST_FINDINGS);
  const data = run.attempts.toReversed().map((attempt) => ({
    ...bar(attempt.started_at, attempt.ended_at ?? until, "attempts", colour(attempt.status), 10),
    text: `attempt ${attempt.attempt}: ${attempt.status}`,
    hovertemplate: escaped(`attempt ${attempt.attempt}: ${GLYPHS[attempt.status]} ${attempt.status} ${attempt.reason ?? ""}`) + "<extra></extra>",
  }));
  for (const finding of findings) {
    const name = rowOf(finding);
    // What is found of a run that has ended stays found: the axis is about the run.
    const stood = finding.resolved_at ?? (finding.state === "open" ? until : finding.last_seen);
    const end = stood < until ? stood : until;
    data.push({
      ...bar(finding.first_seen, end > finding.first_seen ? end : finding.first_seen, name, colour(finding.severity === "page" ? "failed" : finding.severity === "ticket" ? "lost" : "cancelled"), 4),
      mode: "lines+markers", marker: { symbol: [SYMBOLS[finding.severity], "line-ns-open"], size: 11 },
      hovertemplate: escaped(`${finding.rule}, ${finding.severity}, ${finding.state}${finding.step === null ? "" : `, step ${finding.step}`}`) + "<extra></extra>",
    });
  }
  const saves = run.checkpoints.slice(0, MOST_CHECKPOINTS);
  if (saves.length) {
    data.push({
      type: "scatter", mode: "markers", x: saves.map((each) => localTime(each.time)), y: saves.map(() => "checkpoints"), showlegend: false,
      marker: { symbol: saves.map((each) => SAVES[each.state][0]), color: saves.map((each) => colour(SAVES[each.state][1])), size: 9 },
      text: saves.map((each) => escaped(`${each.state}${each.step === null ? "" : ` at step ${each.step}`} ${each.name ?? ""}`)),
      hovertemplate: "%{text}<br>%{x}<extra></extra>",
    });
  }
  const order = ["attempts", ...new Set(findings.map(rowOf)), ...(saves.length ? ["checkpoints"] : [])];
  return {
    data,
    words: `${counted(run.attempts.length, "attempt")}, ${counted(run.findings.length, "finding")}, ${counted(run.checkpoints.length, "checkpoint")}, from ${moment(run.started_at)} to ${moment(until)}.`,
    layout: {
      hovermode: "closest", showlegend: false,
      xaxis: { type: "date" },
      yaxis: { type: "category", categoryarray: order.toReversed(), showgrid: true, fixedrange: true },
      margin: { l: 60, r: 14, t: 6, b: 30 },
    },
  };
}

function bar(from, to, row, tone, width) {
  return { type: "scatter", mode: "lines", x: [localTime(from), localTime(to)], y: [row, row], line: { color: tone, width }, showlegend: false };
}

function rowOf(finding) {
  return escaped(finding.rule.replaceAll("_", " "));
}
