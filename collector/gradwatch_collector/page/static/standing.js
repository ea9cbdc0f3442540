/** How runs, findings and objectives stand: a shape and a word, and a colour beside. */

import { h } from "./dom.js";

export const STATUSES = ["running", "failed", "lost", "cancelled", "succeeded"];
export const GLYPHS = { running: "●", failed: "✕", lost: "?", cancelled: "–", succeeded: "✓" };
const SEVERITIES = { page: "▲", ticket: "◆", info: "ℹ" };
const VERDICTS = { met: "✓", breached: "✕", uncertain: "?", "insufficient data": "…" };

/** A run's status. */
export function status(name) {
  return badge(`status ${name}`, GLYPHS[name] ?? "·", name);
}

/** An objective's verdict. */
export function verdict(name) {
  return badge(`status ${name.split(" ")[0]}`, VERDICTS[name] ?? "·", name);
}

/** A finding, short. */
export function findingChip(finding) {
  const isOpen = finding.state === "open";
  const words = isOpen ? `${finding.severity}, open` : `${finding.severity}, resolved`;
  return h(
    "span",
    { class: `chip ${finding.severity} ${isOpen ? "" : "resolved"}`, title: `${finding.rule}: ${words}` },
    h("span", { "aria-hidden": "true" }, isOpen ? SEVERITIES[finding.severity] : "✓"),
    finding.rule.replaceAll("_", " "),
    h("span", { class: "hidden-label" }, ` (${words})`),
  );
}

/** A finding's severity. */
export function severity(finding) {
  return badge(`status ${finding.severity}`, SEVERITIES[finding.severity] ?? "·", finding.severity);
}

function badge(className, glyph, words) {
  return h("span", { class: className }, h("span", { class: "glyph", "aria-hidden": "true" }, glyph), words);
}
