"""What a reader has to know of a report: objectives that are stricter than their events allow. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal

from gradwatch_slo.lint import fewest_events, one_spends_all
from gradwatch_slo.problems import printable
from gradwatch_slo.report import ObjectiveReport
from gradwatch_slo.wording import counted, group, target_percent


def thin_budgets(reports: Sequence[ObjectiveReport]) -> Iterator[str]:
    """Yield a warning for each objective in whose window one bad event is more than the budget.

    Of an objective with many groups one warning tells in how many of them.
    """
    objectives: dict[tuple[str, Decimal, str], list[ObjectiveReport]] = {}
    for report in reports:
        if report.total:
            # Tiers share a name, and may share a target.
            key = (report.name, report.target, report.group.get("tier") or "")
            objectives.setdefault(key, []).append(report)
    for (name, target, tier), counting in objectives.items():
        thin = [report for report in counting if one_spends_all(report.events.total, target)]
        if not thin:
            continue
        if len(counting) == 1:
            about = group(thin[0].group)
            where = f"{counted(thin[0].events.total, 'event')} in the window, and"
        else:
            about = group({"tier": tier} if tier else {})
            where = f"in {len(thin)} of {len(counting)} groups"
        needed = f"with a target of {target_percent(target)} it takes {fewest_events(target)} to allow one"
        yield f"{printable(name)} ({about}): {where} one failure spends the budget; {needed}"
