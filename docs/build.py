"""Writes docs/telemetry.md from ``gradwatch.conventions``, and docs/findings.md from the rules.

python docs/build.py [--check]
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, SceneRule
from gradwatch_collector.findings.rules import RUN_RULES, SCENE_RULES

FOLDER = Path(__file__).parent

INTRODUCTION = """\
# Telemetry

<!-- Written by docs/build.py from gradwatch.conventions; change that and run `make format`. -->

What a watched process sends over OTLP, and what the collector shows on `/metrics`. OpenTelemetry's own names
are used where they exist. Any OTLP backend can take this; any OTLP client can feed the collector.

Per-step scalars (loss, learning rate, step, step duration, global gradient norm) are gauges with the exact time
the step ended: the same time for all scalars of a step, so that they line up. Per-layer norms are delta
exponential histograms over an export interval. NaN and infinities are sent and stored as what they are.
"""


EVENTS_NOTE = f"""\
Log records with an event name. An event is stored once for each (run, attempt, rank, instance,
`{c.EVENT_SEQUENCE}`).
"""

FAMILIES_NOTE = """\
Per-run series exist while a run is live, and for one hour after it failed or was lost; at most 1000 runs, the
sickest first. So do at most 1000 open findings, the loudest first.
"""


FINDINGS_INTRODUCTION = """\
# Findings

<!-- Written by docs/build.py from gradwatch_collector.findings; change that and run `make format`. -->

What the collector finds by itself. A rule looks at the numbers and events of a run as they come in, and a run
has at most one finding of a rule: the step, layer and rank where it is known, numbers as evidence, a likely
cause and what to do. It is open while the rule still sees it, and resolved when it has not been seen for as
long as the rule says. Rules wait until chance can be told from change: they compare medians and not single
values, and what is above a threshold once is none. Their defaults were chosen on real training runs, healthy
ones and others with one fault each.

**Severity.** `page` wakes somebody, and only for runs of tier `production`; of an experiment it is a
`ticket`. `info` is stored and shown, and raises no alert.

**What rules need.** Rules about the loss look at `training.loss`, of runs with one optimizer: losses that two
models play against each other, as in a GAN, need not fall. `overfitting` needs a held-out loss, given to
`watch.log` by one of the names `val_loss`, `val/loss` and `loss/val`, where `val` may as well be
`validation`, `valid`, `eval`, `test` or `dev`. `slow_convergence` compares with at most five earlier runs of
the same job, model and data set that succeeded and had no finding about how they learned; `run_variance` with
those of the same configuration (`config=`) and the quality that their target's metric had at the end
(`target=`). `input_shift` needs `inputs=True`, the default, and `stale_gradients`
`watch.log(gradient_staleness=n)`.

**Other thresholds.** `gradwatch collector serve --findings FILE` sets parameters anew, or turns rules off,
for all runs or for those of some jobs and tiers. Of several entries that fit a run, later ones go before
earlier ones. What does not exist, or is no such number, ends the collector with one line that says where and
what is expected. Counts are whole numbers from 1, shares at most 1, multiples of what is usual at least 1:

```yaml
- rule: memory_headroom
  job: "llm-*"          # a shell pattern; without it every job
  tier: production      # without it every tier
  parameters: {minimum: 0.05}
- rule: plateau
  job: "rl-*"
  enabled: false
```
"""

SEVERITIES = {
    Severity.PAGE: "page in production, else a ticket",
    Severity.TICKET: "ticket",
    Severity.INFO: "info, no alert",
}


# Name and meaning, which may go on in further, deeper lines.
_LISTED = re.compile(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


def findings_page() -> str:
    """Return the page of all rules, in the order in which `conventions` names them."""
    rules = {rule.name: rule for rule in (*SCENE_RULES, *RUN_RULES)}
    listed = [rules[name] for name in c.RULE_ALERTS if name in rules]
    overview = table(
        ("rule", "severity", "what it is about"),
        ([f"[`{rule.name}`](#{rule.name})", SEVERITIES[rule.severity], about(rule)] for rule in listed),
    )
    return "\n".join([FINDINGS_INTRODUCTION, overview, *map(section, listed)])


def section(rule: RunRule | SceneRule) -> str:
    """Return what there is to say of a rule."""
    parts = [f"## {rule.name}\n", f"{about(rule)} Severity: {SEVERITIES[rule.severity]}."]
    if rule.severity is not Severity.INFO:
        parts[-1] += f" Alert: `{c.RULE_ALERTS[rule.name]}`."
    parts[-1] += "\n"
    if dataclasses.fields(rule.parameters):
        parts += parameters(rule.parameters)
    return "\n".join([*parts, f"**Likely cause.** {rule.cause}\n", f"**What to do.** {rule.action}\n"])


def parameters(of: Any) -> Iterator[str]:
    """Yield what a rule's parameters are, and their table: with the meaning of each where that is listed."""
    text, _, listed = words(type(of)).partition("\n\nAttributes:\n")
    meanings = {name: " ".join(told.split()) for name, told in _LISTED.findall(listed)}
    yield text + "\n"
    known = dataclasses.asdict(of).items()
    if meanings:
        rows = ([code(name), code(str(value)), meanings[name]] for name, value in known)
        yield table(("parameter", "default", "meaning"), rows)
    else:
        yield table(("parameter", "default"), ([code(name), code(str(value))] for name, value in known))


def about(rule: RunRule | SceneRule) -> str:
    """Return what a rule is about, in a sentence."""
    return words(inspect.getmodule(rule.detect)).split("\n")[0]


def words(documented: object) -> str:
    """Return a docstring as Markdown."""
    return re.sub("``", "`", inspect.getdoc(documented) or "")


def telemetry_page() -> str:
    """Return the page of everything that is sent and shown."""
    return "\n".join(
        [
            INTRODUCTION,
            "## Resource attributes\n",
            table(("attribute", "meaning"), ([code(n), text] for n, text in c.RESOURCE_ATTRIBUTES.items())),
            "## Metrics\n",
            table(
                ("metric", "kind", "unit", "attributes", "meaning"),
                ([code(m.name), m.kind, code(m.unit), codes(m.attributes), m.description] for m in c.METRICS),
            ),
            "## Events\n",
            EVENTS_NOTE,
            table(
                ("event", "attributes", "meaning"),
                ([code(e.name), codes(e.attributes), e.description] for e in c.EVENTS),
            ),
            "## Attributes of points and events\n",
            table(("attribute", "meaning"), ([code(n), text] for n, text in c.ATTRIBUTES.items())),
            "## The collector's /metrics\n",
            FAMILIES_NOTE,
            table(
                ("family", "kind", "labels", "meaning"),
                ([code(f.name), f.kind, codes(f.labels), f.description] for f in c.FAMILIES),
            ),
        ]
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines) + "\n"


def code(text: str) -> str:
    """Return text as code."""
    return f"`{text}`"


def codes(names: Iterable[str]) -> str:
    """Return names as code, separated by commas."""
    return ", ".join(map(code, names))


PAGES: dict[str, Callable[[], str]] = {"telemetry.md": telemetry_page, "findings.md": findings_page}


def main() -> int:
    """Write the pages, or with ``--check`` say whether they are up to date."""
    if "--check" not in sys.argv[1:]:
        for name, page in PAGES.items():
            (FOLDER / name).write_text(page())
        return 0
    old = [
        name
        for name, page in PAGES.items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text() != page()
    ]
    if old:
        print(f"{', '.join(old)} out of date: run `make format`", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    raise SystemExit(main())
