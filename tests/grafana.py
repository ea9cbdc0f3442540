"""What Grafana does to a query before it sends it: variables of the browser, then macros of the data source."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

ALL: Final = ".*"  # the custom value of "All", which is inserted as it is, whatever the format
_VARIABLE: Final = re.compile(r"\$(\w+)|\$\{(\w+)(?::(\w+))?\}")
_MACRO: Final = re.compile(r"\$(__\w+)\(([^)]*)\)")
_SPECIAL: Final = re.compile(r"[\\^$*+?.()|\[\]{}/]")

_FORMATS: Final[Mapping[str, Callable[[str], str]]] = {
    "regex": lambda value: _SPECIAL.sub(r"\\\g<0>", value),
    "sqlstring": lambda value: "'" + value.replace("'", "''") + "'",
    "": lambda value: value,
}


@dataclass(frozen=True, slots=True)
class View:
    """What somebody looks at: a time in Unix seconds, and values of variables; all others are at "All"."""

    start: float
    end: float
    interval: int = 2
    chosen: Mapping[str, str] = field(default_factory=dict)

    def promql(self, expr: str) -> str:
        """Return a query of Prometheus as it is sent."""
        # Four scrape intervals.
        return self._variables(expr.replace("$__rate_interval", f"{4 * self.interval}s"))

    def sql(self, query: str) -> str:
        """Return a query of PostgreSQL as it is sent."""
        query = self._variables(query.replace("$__interval", f"{self.interval}s"))
        return _MACRO.sub(lambda macro: self._macro(macro[1], re.split(r",\s*", macro[2])), query)

    def _variables(self, text: str) -> str:
        def value(found: re.Match[str]) -> str:
            name = found[1] or found[2]
            if name.startswith("__"):
                return found[0]
            return _FORMATS[found[3] or ""](self.chosen[name]) if name in self.chosen else ALL

        return _VARIABLE.sub(value, text)

    def _macro(self, name: str, arguments: list[str]) -> str:
        start, end = round(self.start * 1e9), round(self.end * 1e9)
        match name:
            case "__unixEpochNanoFilter":
                return f"{arguments[0]} >= {start} AND {arguments[0]} <= {end}"
            case "__unixEpochNanoFrom":
                return str(start)
            case "__unixEpochNanoTo":
                return str(end)
            case "__timeGroupAlias":
                seconds = int(arguments[1].removesuffix("s"))
                return f'floor(extract(epoch from {arguments[0]})/{seconds})*{seconds} AS "time"'
        raise AssertionError(f"Grafana's PostgreSQL data source has no macro {name}")
