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
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from gradwatch import conventions as c
from gradwatch_collector.findings.rule import ParametersOf, Rule, limits_of
from gradwatch_collector.runs.facts import RunRow
from gradwatch_slo.problems import ObjectiveFileError
from gradwatch_slo.yaml_lines import FieldPath, YamlDocument, read_yaml

_EXPECTED: Final = "a list of entries, each with `rule`"
_KEYS: Final = ("rule", "job", "tier", "enabled", "parameters")
_TIERS: Final = (c.TIER_PRODUCTION, c.TIER_EXPERIMENT)
_VALUES: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "job": (lambda value: isinstance(value, str) and value != "", "a pattern such as 'llm-*'"),
    "tier": (lambda value: value in _TIERS, " or ".join(_TIERS)),
    "enabled": (lambda value: isinstance(value, bool), "true or false"),
}


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
    try:
        documents = read_yaml(path, expected=_EXPECTED, may_be_empty=True)
    except ObjectiveFileError as error:
        raise OverridesError(str(error.problems[0])) from error
    if not documents:
        return []
    document, *others = documents
    if others:
        raise _wrong(others[0], (), f"found another document, expected one of {_EXPECTED}")
    if document.problems:
        raise OverridesError(str(min(document.problems.values(), key=lambda problem: problem.line)))
    if not isinstance(document.value, list):
        raise _wrong(document, (), f"expected {_EXPECTED}")
    by_name = {rule.name: rule for rule in rules}
    return [_entry(document, number, by_name) for number in range(len(document.value))]


def _entry(document: YamlDocument, number: int, rules: Mapping[str, Rule]) -> Override:
    entry, at = document.value[number], (number,)
    if not isinstance(entry, dict):
        raise _wrong(document, at, f"found {_shown(entry)}, expected a mapping with `rule`")
    for key in entry:
        if key not in _KEYS:
            raise _wrong(document, (*at, key), f"there is no `{key}`{_instead(key, _KEYS)}")
    name = entry.get("rule")
    rule = rules.get(name) if isinstance(name, str) else None
    if rule is None:
        raise _wrong(document, (*at, "rule"), f"there is no rule {_shown(name)}{_instead(name, rules)}")
    for key, (is_right, expected) in _VALUES.items():
        if key in entry and not is_right(entry[key]):
            raise _wrong(document, (*at, key), f"found {_shown(entry[key])}, expected {expected}")
    told = entry.get("parameters", {})
    return Override(**{**entry, "parameters": _parameters(document, (*at, "parameters"), told, rule)})


def _parameters(document: YamlDocument, at: FieldPath, told: object, rule: Rule) -> Mapping[str, Any]:
    if not isinstance(told, dict):
        raise _wrong(document, at, f"found {_shown(told)}, expected a mapping of names to numbers")
    known = {field.name: field for field in dataclasses.fields(rule.parameters)}
    values = {}
    for name, value in told.items():
        if name not in known:
            raise _wrong(document, (*at, name), f"{rule.name} has no parameter {name!r}{_instead(name, known)}")
        of, limits = type(getattr(rule.parameters, name)), limits_of(known[name])
        is_number = isinstance(value, int if of is int else int | Decimal) and not isinstance(value, bool)
        if not is_number or not limits.least <= value <= limits.most:
            kind = "a whole number" if of is int else "a number"
            expected = f"expected {kind} from {limits.least:,.12g} to {limits.most:,.12g}"
            raise _wrong(document, (*at, name), f"found {_shown(value)}, {expected}")
        values[name] = of(value)
    return values


def _wrong(document: YamlDocument, at: FieldPath, message: str) -> OverridesError:
    return OverridesError(str(document.problem(at, message)))


def _shown(value: object) -> str:
    """Return it as it was written, as far as that is known, and not all of what is long."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    return textwrap.shorten(repr(value) if isinstance(value, str) else str(value), 60, placeholder="...")


def _instead(name: object, known: Iterable[str]) -> str:
    listed: Sequence[str] = sorted(known)
    near = difflib.get_close_matches(str(name), listed, 1)
    if near:
        return f": did you mean {near[0]!r}?"
    return f"; known are {', '.join(listed)}" if listed else ""
