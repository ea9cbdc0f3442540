/** All runs: counted, filtered, sorted and paged by the collector; the page holds one page of them. */

import { ApiError, read, runPath } from "./api.js";
import { fill, h } from "./dom.js";
import { ago, count, counted, duration, moment, number, secondsBetween } from "./format.js";
import { again, calmly, follow } from "./live.js";
import { GLYPHS, STATUSES, findingChip, status } from "./standing.js";

const PAGE = 50;
const NEWEST_FIRST = "-started";
const CHIPS = 3;
// Key, heading, and whether the largest is of interest first.
const COLUMNS = [
  ["status", "Status", false],
  ["run", "Run", false],
  [null, "Findings", false],
  ["step", "Steps", true],
  ["loss", "Loss", false],
  ["duration", "Took", true],
  ["started", "Started", true],
];
// What of a run an order goes by that may change.
const SORTED_BY = {
  status: ["status"], step: ["last_step"], loss: ["last_loss", "last_loss_nonfinite"], duration: ["last_seen_at", "ended_at"], seen: ["last_seen_at"],
};
const NUMBERS = new Set(["step", "loss", "duration"]);
const EXAMPLE = "import gradwatch\nwatch = gradwatch.watch(model, optimizer)  # in the training script";

export async function show(main) {
  const view = new RunsView(main);
  await view.load();
  const reload = calmly(() => view.refresh());
  follow((told) => {
    if (told.missed || told.more || !view.update(told.runs) || told.findings.length) reload();
    else view.recount();
  });
  addEventListener("popstate", () => view.load());
  setInterval(() => view.tick(), 5_000);
}

class RunsView {
  constructor(main) {
    this.rows = new Map();
    this.chosen = new Set();
    this.recount = calmly(() => this.count().catch(() => {}), 3_000);
    this.statuses = h("div", { class: "toolbar", role: "group", "aria-label": "Filter by status" });
    this.search = h("input", {
      type: "search", placeholder: "Search run, job, model, team, reason ( / )", "aria-label": "Search runs",
      input: debounced(() => this.go({ text: this.search.value })),
    });
    this.tier = select("Tier", [["", "every tier"], ["production", "production"], ["experiment", "experiment"]], () =>
      this.go({ tier: this.tier.value }));
    const orders = COLUMNS.filter(([key]) => key).flatMap(([key, heading]) => [
      [`-${key}`, `${heading}, descending`], [key, `${heading}, ascending`],
    ]);
    this.sort = select("Sort by", orders, () => this.go({ sort: this.sort.value }));
    this.sort.classList.add("only-narrow");
    this.compare = h("span", { class: "push" });
    this.head = h("tr");
    this.body = h("tbody", { keydown: (event) => this.walk(event) });
    this.problem = h("div", { role: "alert" });
    this.told = h("p", { class: "soft small", role: "status" });
    this.pages = h("nav", { class: "toolbar", "aria-label": "Pages of runs" });
    this.table = h(
      "div", { class: "scroll" },
      h("table", { class: "runs" }, h("caption", { class: "hidden-label" }, "Runs"), h("thead", {}, this.head), this.body),
    );
    this.empty = h("div");
    fill(
      main, h("h1", {}, "Runs"), this.statuses,
      h("div", { class: "toolbar" }, this.search, this.tier, this.sort, this.compare),
      this.problem, this.table, this.empty, this.told, this.pages,
    );
  }

  /** What is asked for, as the address says. */
  get query() {
    const told = new URLSearchParams(location.search);
    return {
      status: told.getAll("status"),
      text: told.get("text") ?? "",
      tier: told.get("tier") ?? "",
      sort: told.get("sort") ?? NEWEST_FIRST,
      cursor: told.get("cursor") ?? "",
    };
  }

  /** Ask for something else: the address changes, so that it can be shared, and gone back from. */
  go(changed) {
    const query = { ...this.query, cursor: "", ...changed };
    const told = new URLSearchParams();
    for (const [name, value] of Object.entries(query)) {
      if (name === "sort" && value === NEWEST_FIRST) continue;
      for (const each of [value].flat()) if (each) told.append(name, each);
    }
    const before = changed.cursor ? [...(history.state?.before ?? []), this.query.cursor] : changed.before ?? [];
    history.pushState({ before }, "", told.size ? `?${told}` : location.pathname);
    return this.load();
  }

  async load() {
    const query = this.query;
    if (document.activeElement !== this.search) this.search.value = query.text;
    this.tier.value = query.tier;
    this.sort.value = query.sort;
    fill(this.head, h("th", { scope: "col" }, h("span", { class: "hidden-label" }, "Compare")), COLUMNS.map((each) => this.heading(...each)));
    await this.refresh();
  }

  async refresh() {
    again(null);
    this.asking?.abort();
    this.asking = new AbortController();
    const { signal } = this.asking;
    try {
      const [page] = await Promise.all([read("/api/v1/runs", { ...this.query, limit: PAGE }, signal), this.count(signal)]);
      const ids = page.runs.map((run) => run.run_id);
      const told = ids.length ? await read("/api/v1/findings", { run: ids, limit: 1000 }, signal) : { findings: [] };
      fill(this.problem);
      this.findings = Map.groupBy(told.findings, (finding) => finding.run_id);
      this.draw(page);
    } catch (error) {
      if (error.name === "AbortError") return;
      fill(this.problem, h("p", { class: "notice bad" }, error.message));
      if (!(error instanceof ApiError)) throw error;
      again(() => this.refresh());
    }
  }

  async count(signal) {
    const { cursor, sort, status: chosen, ...filters } = this.query;
    const counts = await read("/api/v1/run-counts", filters, signal);
    this.everyCount = counts;
    const toggles = STATUSES.map((name) =>
      h(
        "button",
        {
          type: "button", class: name, "aria-pressed": String(chosen.includes(name)), "data-status": name,
          click: () => this.go({ status: chosen.includes(name) ? chosen.filter((each) => each !== name) : [...chosen, name] }),
        },
        h("span", { class: "glyph", "aria-hidden": "true" }, GLYPHS[name]),
        `${count(counts.statuses[name])} ${name}`,
      ));
    const open = Object.entries(counts.open_findings).filter(([, many]) => many);
    const words = open.map(([severity, many]) => counted(many, severity === "info" ? "note" : severity)).join(", ");
    // A button that has the focus keeps it.
    const focused = document.activeElement?.dataset?.status;
    fill(this.statuses, toggles, h("span", { class: "soft small" }, words ? `Open findings: ${words}` : "No open findings"));
    if (focused) this.statuses.querySelector(`[data-status="${focused}"]`)?.focus();
  }

  draw(page) {
    this.nextCursor = page.next_cursor;
    const focused = document.activeElement?.closest?.("tr")?.dataset.run;
    this.rows = new Map(page.runs.map((run) => [run.run_id, { run, row: h("tr", { "data-run": run.run_id }) }]));
    for (const entry of this.rows.values()) this.drawRow(entry);
    fill(this.body, [...this.rows.values()].map(({ row }) => row));
    if (focused) this.rows.get(focused)?.row.querySelector("a")?.focus();
    const before = history.state?.before ?? [];
    const isEmpty = page.runs.length === 0;
    this.table.hidden = isEmpty;
    fill(this.empty, isEmpty ? this.emptyState() : null);
    const told = isEmpty ? "" : `${count(page.runs.length)} of ${counted(this.matching(), "run")} shown.`;
    // Said again by screen readers whenever it is set.
    if (this.told.textContent !== told) fill(this.told, told);
    fill(
      this.pages,
      this.query.cursor
        ? h("button", { type: "button", click: () => this.go({ cursor: "", before: [], ...this.back(before) }) }, "← Newer page")
        : null,
      page.next_cursor ? h("button", { type: "button", click: () => this.go({ cursor: page.next_cursor }) }, "Next page →") : null,
    );
    this.drawCompare();
  }

  /** Where the page before was. */
  back(before) {
    const cursor = before.at(-1) ?? "";
    return cursor ? { cursor, before: before.slice(0, -1) } : {};
  }

  matching() {
    const chosen = this.query.status;
    const { statuses, total } = this.everyCount;
    return chosen.length ? chosen.reduce((sum, name) => sum + (statuses[name] ?? 0), 0) : total;
  }

  emptyState() {
    const { status: chosen, text, tier } = this.query;
    if (chosen.length || text || tier) {
      return h("p", { class: "notice" }, "No run matches. ",
        h("button", { type: "button", click: () => this.go({ status: [], text: "", tier: "" }) }, "Show all runs"));
    }
    return h("div", { class: "notice" }, "No runs yet. Watch a training script, or let ", h("code", {}, "gradwatch demo --serve"),
      " show what this looks like:", h("pre", { class: "mono" }, EXAMPLE));
  }

  heading(key, words, isDescending) {
    const number = NUMBERS.has(key) ? "number" : null;
    if (!key) return h("th", { scope: "col", class: number }, words);
    const { sort } = this.query;
    const isSorted = sort.replace("-", "") === key;
    const isDown = sort.startsWith("-");
    const next = isSorted ? (isDown ? key : `-${key}`) : isDescending ? `-${key}` : key;
    return h(
      "th",
      { scope: "col", class: number, "aria-sort": isSorted ? (isDown ? "descending" : "ascending") : null },
      h("button", { type: "button", "data-sort": key, click: async () => {
        await this.go({ sort: next });
        this.head.querySelector(`[data-sort="${key}"]`)?.focus();
      } }, words, h("span", { "aria-hidden": "true" }, isSorted ? (isDown ? "↓" : "↑") : "")),
    );
  }

  drawRow({ run, row }) {
    const isBad = run.last_loss_nonfinite;
    const findings = (this.findings?.get(run.run_id) ?? []).toSorted((a, b) => (a.state > b.state) - (a.state < b.state));
    const about = [run.job, run.model, run.dataset, run.team, run.tier === "production" ? "production" : null];
    row.className = `row-${run.status}`;
    const box = h("input", {
      type: "checkbox", "aria-label": `Compare ${run.run_id}`, change: (event) => this.choose(run.run_id, event.target.checked),
    });
    box.checked = this.chosen.has(run.run_id);
    fill(
      row,
      h("td", {}, box),
      h("td", { class: "stands" }, status(run.status), run.reason ? h("small", {}, run.reason) : null),
      h("td", { class: "what" }, h("a", { href: runPath(run.run_id) }, run.run_id), h("small", {}, about.filter(Boolean).join(" · "))),
      h("td", { class: "found" }, findings.length
        ? h("span", { class: "chips" }, findings.slice(0, CHIPS).map(findingChip), findings.length > CHIPS ? `+${findings.length - CHIPS}` : null)
        : null),
      h("td", { class: "number", "data-label": "Steps" }, run.last_step === null ? "–" : count(run.last_step + 1)),
      h("td", { class: "number", "data-label": "Loss" }, isBad ? h("strong", { class: "bad" }, "NaN") : number(run.last_loss)),
      h("td", { class: "number", "data-label": "Took", "data-took": "" }, took(run)),
      h("td", { "data-label": "Started" }, h("time", { datetime: run.started_at, title: moment(run.started_at) }, ago(run.started_at))),
    );
  }

  /** Show newer facts of runs that are on the page; false if others may belong there, or in another order. */
  update(runs) {
    let areKnown = true;
    let areInOrder = true;
    const facts = SORTED_BY[this.query.sort.replace("-", "")] ?? [];
    for (const run of runs) {
      const entry = this.rows.get(run.run_id);
      if (!entry) {
        areKnown &&= !this.mayBelong(run);
        continue;
      }
      // What it stands by may no longer be what was asked for.
      if (entry.run.status !== run.status && this.query.status.length) areKnown = false;
      areInOrder &&= facts.every((fact) => entry.run[fact] === run[fact]);
      entry.run = run;
      if (entry.row.contains(document.activeElement)) this.keepingFocus(() => this.drawRow(entry), entry.row);
      else this.drawRow(entry);
    }
    return areInOrder && (areKnown || Boolean(this.query.cursor));
  }

  /** Of very many that train, nearly all are on other pages. */
  mayBelong(run) {
    const isFull = this.rows.size >= PAGE;
    return !isFull || this.query.sort !== NEWEST_FIRST || run.started_at > [...this.rows.values()].at(-1).run.started_at;
  }

  keepingFocus(draw, row) {
    const selector = document.activeElement.matches("input") ? "input" : "a";
    draw();
    row.querySelector(selector)?.focus();
  }

  /** Times go on by themselves. */
  tick() {
    for (const { run, row } of this.rows.values()) {
      const time = row.querySelector("time");
      if (time) time.textContent = ago(run.started_at);
      if (run.status === "running") row.querySelector("[data-took]").textContent = took(run);
    }
  }

  choose(runId, isChosen) {
    if (isChosen) this.chosen.add(runId);
    else this.chosen.delete(runId);
    this.drawCompare();
  }

  drawCompare() {
    const chosen = [...this.chosen];
    if (chosen.length < 2) {
      fill(this.compare, h("span", { class: "soft small" }, chosen.length ? "Choose another to compare" : ""));
      return;
    }
    const query = new URLSearchParams(chosen.slice(0, 8).map((runId) => ["run", runId]));
    fill(this.compare, h("a", { class: "button primary", href: `/compare?${query}` }, `Compare ${counted(Math.min(chosen.length, 8), "run")}`));
  }

  /** Up and down go from run to run. */
  walk(event) {
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    const row = event.target.closest("tr");
    const next = event.key === "ArrowDown" ? row?.nextElementSibling : row?.previousElementSibling;
    if (!next) return;
    event.preventDefault();
    next.querySelector(event.target.matches("input") ? "input" : "a").focus();
  }
}

function took(run) {
  return duration(secondsBetween(run.started_at, run.ended_at ?? (run.status === "running" ? null : run.last_seen_at)));
}

function select(label, options, change) {
  return h("select", { "aria-label": label, change }, options.map(([value, words]) => h("option", { value }, words)));
}

function debounced(action, ms = 250) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, ms);
  };
}
