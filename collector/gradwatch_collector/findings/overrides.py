"""What a file sets anew of rules, for all runs or for those of some jobs and tiers.

A YAML list; of several entries that fit a run, later ones go before earlier ones::

    - rule: memory_headroom
      job: "llm-*"          # a shell pattern; without it every job
      tier: production      # without it every tier
      parameters: {minimum: 0.05}
    - rule: plateau
      job: "rl-*"
      enabled: false
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import yaml

from gradwatch import conventions as c
from gradwatch_collector.findings.rule import ParametersOf, Rule
from gradwatch_collector.runs.facts import RunRow

_KEYS: Final = ("rule", "job", "tier", "enabled", "parameters")
_TIERS: Final = (c.TIER_PRODUCTION, c.TIER_EXPERIMENT)


class OverridesError(ValueError):
    """The file cannot be used; the message is one line that says where and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """One entry of the file."""

    rule: str
    job: str = "*"
    tier: str | None = None
    enabled: bool = True
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, run: RunRow) -> bool:
        """Return whether it is about a run."""
        return self.tier in (None, run.tier) and fnmatchcase(run.job, self.job)


def parameters_of(rule: Rule, overrides: Iterable[Override]) -> ParametersOf:
    """Return the function that gives a rule's parameters for a run; None where it is off."""
    mine = [each for each in overrides if each.rule == rule.name]

    def of(run: RunRow) -> Any:
        fitting = [each for each in mine if each.fits(run)]
        if fitting and not fitting[-1].enabled:
            return None
        changes = {name: value for each in fitting for name, value in each.parameters.items()}
        return dataclasses.replace(rule.parameters, **changes) if changes else rule.parameters

    return of


def read_overrides(path: Path, rules: Iterable[Rule]) -> list[Override]:
    """Read and check a file.

    Raises:
        OverridesError: it cannot be read, or an entry names a rule, parameter or value that there is not.
    """
    by_name = {rule.name: rule for rule in rules}
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OverridesError(f"{path}: {' '.join(str(error).split())}") from error
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise OverridesError(f"{path}: a list of entries is expected, each with `rule`")
    return [_entry(entry, by_name, f"{path}, entry {number}") for number, entry in enumerate(entries, 1)]


def _entry(entry: object, rules: Mapping[str, Rule], where: str) -> Override:
    if not isinstance(entry, dict):
        raise OverridesError(f"{where}: a mapping with `rule` is expected")
    for key in entry:
        if key not in _KEYS:
            raise OverridesError(f"{where}: there is no `{key}`{_instead(key, _KEYS)}")
    rule = rules.get(str(entry.get("rule")))
    if rule is None:
        raise OverridesError(
            f"{where}: there is no rule {entry.get('rule')!r}{_instead(entry.get('rule'), rules)}"
        )
    job, tier, enabled = entry.get("job", "*"), entry.get("tier"), entry.get("enabled", True)
    if not isinstance(job, str):
        raise OverridesError(f"{where}: `job` is a pattern such as 'llm-*', not {job!r}")
    if tier is not None and tier not in _TIERS:
        raise OverridesError(f"{where}: `tier` is {' or '.join(_TIERS)}, not {tier!r}")
    if not isinstance(enabled, bool):
        raise OverridesError(f"{where}: `enabled` is true or false, not {enabled!r}")
    return Override(
        rule=rule.name,
        job=job,
        tier=tier,
        enabled=enabled,
        parameters=_parameters(entry.get("parameters") or {}, rule, where),
    )


def _parameters(told: object, rule: Rule, where: str) -> Mapping[str, Any]:
    if not isinstance(told, dict):
        raise OverridesError(f"{where}: `parameters` is a mapping of names to numbers")
    known = {} if rule.parameters is None else dataclasses.asdict(rule.parameters)
    for name, value in told.items():
        if name not in known:
            raise OverridesError(f"{where}: {rule.name} has no parameter {name!r}{_instead(name, known)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise OverridesError(f"{where}: {name} is a number, not {value!r}")
    return {name: type(known[name])(value) for name, value in told.items()}


def _instead(name: object, known: Iterable[str]) -> str:
    listed: Sequence[str] = sorted(known)
    near = difflib.get_close_matches(str(name), listed, 1)
    return f": did you mean {near[0]!r}?" if near else f"; known are {', '.join(listed)}"
