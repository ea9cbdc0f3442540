/** Objectives: the verdict in words, and how each error budget was spent. */

import { ApiError, read } from "./api.js";
import { Chart, colour } from "./charts.js";
import { facts, fill, h, table } from "./dom.js";
import { count, localTime, moment, percent } from "./format.js";
import { again, calmly, follow } from "./live.js";
import { verdict } from "./standing.js";

const SICKEST_FIRST = ["breached", "uncertain", "met", "insufficient data"];
const MEANING = {
  met: "The objective is met.",
  breached: "Too many failed for it to be chance: the objective is breached.",
  uncertain: "Below the target, but so few events may be chance.",
  "insufficient data": "Fewer than 5 events: nothing can be said yet.",
};
const DRAWN_AT_ONCE = 6;

export async function show(main) {
  document.title = "Objectives · gradwatch";
  const view = new ObjectivesView(main);
  await view.refresh();
  const reload = calmly(() => view.refresh(), 3_000);
  follow((told) => {
    if (told.missed || told.objectives) reload();
  });
}

class ObjectivesView {
  constructor(main) {
    this.problem = h("div", { role: "alert" });
    this.headline = h("p", { class: "soft", role: "status" });
    this.list = h("ul", { class: "plain-list" });
    this.uncounted = h("div");
    this.cards = new Map();
    fill(main, h("h1", {}, "Objectives"), this.headline, this.problem, this.list, this.uncounted);
  }

  async refresh() {
    again(null);
    try {
      const { objectives, warnings } = await read("/api/v1/slos");
      fill(this.problem, warnings.map((warning) => h("p", { class: "notice" }, warning)));
      this.draw(objectives.toSorted((a, b) => SICKEST_FIRST.indexOf(a.verdict) - SICKEST_FIRST.indexOf(b.verdict) || a.budget_remaining - b.budget_remaining));
      const shown = [...this.cards.values()].filter((card) => card.course.open);
      for (const name of new Set(shown.map((card) => card.objective.name))) await this.drawCourses(name);
    } catch (error) {
      fill(this.problem, h("p", { class: "notice bad" }, error.message));
      if (!(error instanceof ApiError)) throw error;
      again(() => this.refresh());
    }
  }

  draw(objectives) {
    const counts = SICKEST_FIRST.map((name) => [name, objectives.filter((each) => each.verdict === name).length]).filter(([, many]) => many);
    fill(this.headline, objectives.length ? counts.map(([name, many]) => `${many} ${name}`).join(", ") : null);
    if (!objectives.length) {
      fill(this.list, h("li", { class: "notice" }, "No objective has been evaluated yet. They are, within 15 seconds of the collector's start; ", h("code", {}, "gradwatch collector serve -f FILE"), " takes your own."));
      return;
    }
    const before = this.cards;
    this.cards = new Map();
    objectives.filter((objective) => objective.total > 0).forEach((objective, place) => {
      const key = keyOf(objective);
      const card = before.get(key) ?? this.card(objective, place);
      card.objective = objective;
      fill(card.words, wordsOf(objective));
      this.cards.set(key, card);
    });
    fill(this.list, [...this.cards.values()].map((card) => card.element));
    const rest = objectives.filter((objective) => objective.total === 0);
    fill(this.uncounted, rest.length ? uncounted(rest) : null);
  }

  card(objective, place) {
    const words = h("div", { class: "objective" });
    const chart = new Chart("Error budget left", { isTitled: false });
    chart.element.classList.remove("card");
    const course = h("details", { open: place < DRAWN_AT_ONCE }, h("summary", {}, "How the budget was spent"), chart.element);
    const card = { objective, words, chart, course };
    course.addEventListener("toggle", () => {
      if (course.open) this.drawCourses(card.objective.name);
    });
    card.element = h("li", { class: "card objective-card" }, words, course);
    return card;
  }

  async drawCourses(name) {
    const { courses } = await read("/api/v1/slo-courses", { objective: name });
    const told = new Map(courses.map((course) => [keyOf(course), course]));
    for (const [key, card] of this.cards) {
      if (card.objective.name !== name) continue;
      const course = told.get(key);
      if (course && card.course.open) await card.chart.draw(() => picture(course));
      else if (!course) fill(card.course, h("summary", {}, "How the budget was spent"), h("p", { class: "soft" }, "It is judged by slices of time: single events do not tell."));
    }
  }
}

function keyOf({ name, group }) {
  return JSON.stringify([name, Object.entries(group).sort()]);
}

/** Those of which nothing was counted, in few lines: their budgets are whole. */
function uncounted(objectives) {
  return h(
    "section", {},
    h("h2", {}, `Nothing counted yet (${objectives.length})`),
    h("p", { class: "soft small" }, "No run of their tier, or none that tells of this, has ended in the window: the budget is unspent."),
    table("Objectives of which nothing was counted", ["Objective", "Of", "Target", "Window"], objectives.map((each) => [
      each.name.replaceAll("-", " "), groupOf(each), percent(each.target), each.window.duration,
    ])),
  );
}

function groupOf(objective) {
  return Object.entries(objective.group).map(([name, value]) => `${name} ${value ?? "unknown"}`).join(", ");
}

function wordsOf(objective) {
  const group = groupOf(objective);
  const left = objective.budget_remaining;
  const [low, high] = objective.interval;
  return [
    h("div", { class: "headline" }, h("h2", { style: "margin:0" }, objective.name.replaceAll("-", " "), group ? h("span", { class: "soft" }, ` · ${group}`) : null), verdict(objective.verdict)),
    h("p", { style: "margin:0" }, h("strong", {}, `${capital(objective.summary)}.`), " ", h("span", { class: "soft" }, MEANING[objective.verdict])),
    h("div", { class: "meter", role: "meter", "aria-label": "Error budget left", "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": String(Math.round(100 * Math.max(0, Math.min(1, left)))), "aria-valuetext": percent(left) },
      h("span", { style: `width:${Math.max(0, Math.min(1, left)) * 100}%` })),
    facts([
      ["Budget left", left < 0 ? [percent(left), h("small", {}, "overspent")] : percent(left)],
      ["Good", `${count(objective.good)} of ${count(objective.total)}`],
      ["SLI", objective.total ? [percent(objective.sli), h("small", {}, `the true rate may be ${percent(low)} to ${percent(high)}`)] : null],
      ["Target", percent(objective.target)],
      ["Window", [objective.window.duration, h("small", {}, `from ${moment(objective.window.from)}`)]],
    ], "facts"),
  ];
}

function picture(course) {
  const times = course.times.map(localTime);
  const left = course.budget_remaining;
  const over = left.findIndex((value) => value < 0);
  return {
    data: [
      { type: "scatter", mode: "lines", name: "left", x: times, y: left, line: { shape: "hv", color: colour("line"), width: 2 }, hovertemplate: "%{y:.0%} left" },
      { type: "scatter", mode: "lines", name: "spent evenly", x: [times[0], localTime(course.window_end)], y: [1, 0], line: { dash: "dash", color: colour("soft"), width: 1 }, hoverinfo: "skip" },
    ],
    words: `${percent(left[0])} at the start of the window, ${percent(left.at(-1))} now${over > 0 ? `; overspent by ${moment(course.times[over])}` : ""}.`,
    spell: (place) => `${moment(course.times[place])}: ${percent(left[place])} left, ${course.bad[place]} bad events`,
    layout: {
      xaxis: { type: "date" },
      // How far it is overspent beyond twice the budget is told in words.
      yaxis: { tickformat: ".0%", title: "budget left", range: [Math.max(-1, Math.min(0, ...left)) - 0.06, 1.06] },
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 0, y1: 0, line: { color: colour("bad"), width: 1 } }],
    },
  };
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
