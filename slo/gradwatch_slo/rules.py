"""Prometheus rules generated from objectives: what `/metrics` tells becomes recordings and alerts.

Few events (unit ``run``) are judged by the exact binomial test, many (every other unit) by how fast they burn
the budget, over a long look-back and a short one (Site Reliability Workbook, chapter 5): the long one says that
it matters, the short one that it still goes on. Alert policies of the files become alerts as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any, Final

import yaml

from gradwatch import conventions as c
from gradwatch_slo.burn_rules import PAGE, TICKET, BurnRule, can_breach, fitting
from gradwatch_slo.durations import Duration
from gradwatch_slo.links import BurnRateAlert
from gradwatch_slo.objective import Objective
from gradwatch_slo.verdict import ALERT_P_VALUE, FEWEST_BAD

GRAFANA_URL: Final = "http://127.0.0.1:3000"

OBJECTIVE_MISSED: Final = "GradwatchObjectiveMissed"
BUDGET_BURN: Final = "GradwatchBudgetBurn"
ALERT_POLICY: Final = "GradwatchAlertPolicy"
BURN_RATE_MISSING: Final = "GradwatchBurnRateMissing"
# Each has a runbook of its name.
ALERT_NAMES: Final = (OBJECTIVE_MISSED, BUDGET_BURN, ALERT_POLICY, BURN_RATE_MISSING)

# As the shipped rules: a collector that restarts must not resolve what it will tell again.
_KEEP_FIRING_FOR: Final = "2m"
_OPERATORS: Final = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_LABELS: Final[Mapping[str, str]] = {"job": "training_job"} | {name: name for name in c.SLO_LABELS[2:]}


def burn_rules(objective: Objective) -> list[BurnRule]:
    """Return the rules that fit an objective that counts many events, none for one that counts runs."""
    if objective.unit == "run":
        return []
    return fitting(objective.target, objective.window.duration, objective.time_slice)


def look_backs(objective: Objective) -> list[str]:
    """Return the values of the label ``window`` that the rules of an objective read burn rates by."""
    standard = [_shorthand(length) for rule in burn_rules(objective) for length in (rule.short, rule.long)]
    return list(dict.fromkeys([*standard, *(str(alert.look_back) for alert in objective.alerts)]))


def render_rules(
    objectives: Iterable[Objective],
    *,
    runbook_url: str = c.RUNBOOK_BASE_URL,
    grafana_url: str = GRAFANA_URL,
) -> str:
    """Return a rule file as YAML text: a group for the objectives of each name, recordings before alerts.

    ``runbook_url`` and ``grafana_url``: what the links in the notifications begin with.
    """
    by_name = sorted(objectives, key=lambda each: each.name)
    groups = []
    for name, same in groupby(by_name, key=lambda each: each.name):
        named = list(same)
        alerts = dict.fromkeys(alert for objective in named for alert in _alerts(objective))
        rules = [*_recordings(name, named), *(_rule(alert, runbook_url, grafana_url) for alert in alerts)]
        groups.append({"name": f"gradwatch-slo-{name}", "rules": rules})
    header = "# Built by `gradwatch slo rules`: change the objectives, not this file.\n"
    return header + yaml.safe_dump({"groups": groups}, sort_keys=False, width=10_000, allow_unicode=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alert:
    name: str
    expr: str
    labels: tuple[tuple[str, str], ...]
    summary: str
    description: str
    hold: str | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """Series of an objective that are told of with one severity, by their matchers.

    ``labels`` are those of its alerts: what the matchers pin down is among them, though the series have it too,
    as rules of one name must differ by their labels.
    """

    matchers: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]

    def of(self, family: c.Family, *matchers: str) -> str:
        return f"{_recorded(family)}{{{', '.join((*self.matchers, *matchers))}}}"


def _recorded(family: c.Family) -> str:
    return f"slo:{family.name}:max"


def _recordings(name: str, objectives: Sequence[Objective]) -> Iterator[dict[str, Any]]:
    """Yield one series for what each replica of the collector tells."""
    families = [c.SLO_SLI, c.SLO_BUDGET_REMAINING, c.SLO_EVENTS]
    if any(objective.unit == "run" for objective in objectives):
        families.append(c.SLO_P_VALUE)
    if any(look_backs(objective) for objective in objectives):
        families.append(c.SLO_BURN_RATE)
    for family in families:
        series = f"{family.name}{{{_equal('slo', name)}}}"
        expr = f"max without ({', '.join(c.REPLICA_LABELS)}) ({series})"
        yield {"record": _recorded(family), "expr": expr, "labels": {"slo": name}}


def _alerts(objective: Objective) -> Iterator[_Alert]:
    if objective.unit == "run":
        # Nobody has to get up: each run that failed has had an alert of its own.
        yield from (_missed(part, objective) for part in _parts(objective, TICKET))
    for severity in (PAGE, TICKET):
        rules = [rule for rule in burn_rules(objective) if rule.severity == severity]
        if rules:
            yield from (_burning(part, rules, objective) for part in _parts(objective, severity))
    for alert in objective.alerts:
        for part in _parts(objective, alert.severity):
            yield from _of_policy(part, alert, objective)


def _parts(objective: Objective, severity: str) -> Iterator[_Part]:
    """Yield the objective's series: those in production apart, where a page is asked for, as only they page.

    ``severity``: what is asked for; it becomes the label ``slo_severity`` beside the ``severity`` that is told.
    """
    limits = dict(objective.selection.fields)
    tiers = limits.get("tier", (c.TIER_PRODUCTION, c.TIER_EXPERIMENT))
    apart = severity == PAGE and "tier" in objective.group_by
    for told in [(tier,) for tier in tiers] if apart else [tiers]:
        matchers = [_equal("slo", objective.name)]
        labels = {
            "severity": PAGE if severity == PAGE and told == (c.TIER_PRODUCTION,) else TICKET,
            "slo_severity": severity,
            "slo": objective.name,
        }
        if objective.team and "team" not in objective.group_by:
            labels["team"] = objective.team
        for field, label in _LABELS.items():
            values = told if field == "tier" and (apart or "tier" in limits) else limits.get(field, ())
            if values and field in objective.group_by:
                matchers.append(_among(label, values))
            if len(values) == 1:
                labels[label] = values[0]
        yield _Part(tuple(matchers), tuple(labels.items()))


def _missed(part: _Part, objective: Objective) -> _Alert:
    p_value = f"{part.of(c.SLO_P_VALUE)} < {ALERT_P_VALUE}"
    bad = f"{part.of(c.SLO_EVENTS, _equal('quality', 'bad'))} >= {FEWEST_BAD}"
    overspent = ""
    if objective.slicing is not None and objective.slicing.is_in_part:
        # Their events are tested, and many bad ones in one of many slices need not overspend the budget.
        overspent = f" and {part.of(c.SLO_BUDGET_REMAINING)} < 0"
    return _Alert(
        name=OBJECTIVE_MISSED,
        expr=f"{p_value} and ignoring (quality) {bad}{overspent}",
        labels=part.labels,
        summary=f"{_WHOSE} misses its target",
        description="With the target true, as many bad events as in its window would be seen with probability"
        ' {{ $value | printf "%.2g" }}. See `gradwatch slo report`.',
    )


def _burning(part: _Part, rules: Sequence[BurnRule], objective: Objective) -> _Alert:
    duration = objective.window.duration
    pairs = []
    for rule in rules:
        # Exact but for the nearest double: a rate that is rounded for show must not be compared with.
        rate = float(rule.rate(duration.nominal))
        long, short = (
            part.of(c.SLO_BURN_RATE, _equal("window", _shorthand(length))) for length in (rule.long, rule.short)
        )
        pairs.append(f"({long} > {rate!r} and ignoring (window) {short} > {rate!r})")
    spent = " or ".join(f"{float(rule.share):.0%} within {_shorthand(rule.long)}" for rule in rules)
    return _Alert(
        name=BUDGET_BURN,
        expr=f"max without (window) ({' or '.join(pairs)})",
        labels=part.labels,
        summary=f"{_WHOSE} {_AT_RATE}",
        description=f"It spent {spent.replace('%', ' %')} of the budget of {duration}, and goes on."
        " See `gradwatch slo report`.",
    )


def _of_policy(part: _Part, alert: BurnRateAlert, objective: Objective) -> Iterator[_Alert]:
    rate = part.of(c.SLO_BURN_RATE, _equal("window", str(alert.look_back)))
    hold = None if alert.alert_after is None else _shorthand(alert.alert_after.nominal)
    labels = (*part.labels, ("policy", alert.policy), ("notification_targets", ",".join(alert.targets)))
    # A burn rate that nothing can reach is no rule at all: promtool would take it, and nobody would notice.
    if can_breach(alert, objective.target, objective.time_slice):
        yield _Alert(
            name=ALERT_POLICY,
            expr=f"{rate} {_OPERATORS[alert.operator]} {alert.threshold:f}",
            labels=labels,
            summary=f"{_WHOSE} {_AT_RATE}",
            description=f"The policy {alert.policy} asks for an alert at {_OPERATORS[alert.operator]}"
            f" {alert.threshold} over {alert.look_back}. See `gradwatch slo report`.",
            hold=hold,
        )
    if alert.when_no_data:
        yield _Alert(
            name=BURN_RATE_MISSING,
            expr=f"absent({rate})",
            labels=labels,
            summary=f"Nobody knows how {_WHOSE} stands",
            description=f"There is no burn rate over {alert.look_back}, and the policy {alert.policy} is to"
            " tell of that.",
            hold=hold,
        )


_AT_RATE: Final = 'burns its error budget at {{ $value | printf "%.3g" }} times the rate it allows'
# By the labels of the series, which depend on what its objective is grouped by: a template sees no other.
_WHOSE: Final = (
    "{{ $labels.slo }}{{ with $labels.training_job }} of {{ . }}{{ end }}"
    "{{ with $labels.team }} of team {{ . }}{{ end }}{{ with $labels.tier }} in tier {{ . }}{{ end }}"
)


def _rule(alert: _Alert, runbook_url: str, grafana_url: str) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        **({"for": alert.hold} if alert.hold else {}),
        "keep_firing_for": _KEEP_FIRING_FOR,
        "labels": {name: _literal(value) for name, value in alert.labels},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description,
            "runbook_url": c.runbook_url(alert.name, runbook_url),
            "dashboard_url": f"{grafana_url.rstrip('/')}/d/gradwatch-executive",
        },
    }


def _literal(text: str) -> str:
    # Prometheus reads labels as templates, and anything may be the name of a job.
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if "{{" in text else text


def _equal(label: str, value: str) -> str:
    # Strings of PromQL are Go's, which know every escape of JSON's.
    return f"{label}={json.dumps(value, ensure_ascii=False)}"


def _among(label: str, values: Sequence[str]) -> str:
    if len(values) == 1:
        return _equal(label, values[0])
    pattern = "|".join(re.escape(value) for value in values)
    return f"{label}=~{json.dumps(pattern, ensure_ascii=False)}"


def _shorthand(length: timedelta) -> str:
    for unit, size in (("d", timedelta(days=1)), ("h", timedelta(hours=1)), ("m", timedelta(minutes=1))):
        if length % size == timedelta(0):
            return str(Duration(length // size, unit))
    raise ValueError(f"found {length}, expected whole minutes")
