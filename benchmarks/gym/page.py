"""The gym's figures as tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gym import judging
from gym.fault import STRONG, WEAK
from gym.faults import KINDS
from gym.outcome import Outcome


def tables(outcomes: Sequence[Outcome], interval: float) -> str:
    """Return the figures, a row a fault, and every run that was judged wrongly."""
    parts = [
        _table(("figure", "value"), list(judging.summary(outcomes, interval).items())),
        _table(
            ("fault", "runs", "found, strong", "found, weak", "birthplace", "delay, s", "rules found"),
            list(_faults(outcomes)),
        ),
    ]
    wrong = list(_wrong(outcomes))
    if wrong:
        parts.append(_table(("run", "what is wrong"), wrong))
    return "\n\n".join(parts)


def _faults(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    """The confusion matrix, without its many zeros: of each fault, how often which rule was found."""
    matrix = judging.confusion(outcomes)
    for fault, rules in sorted(matrix.items(), key=lambda row: ["healthy", *KINDS].index(row[0])):
        own = [each for each in outcomes if (each.planned.fault or "healthy") == fault]
        counts = ", ".join(f"{rule} {count}" for rule, count in rules.most_common())
        seconds = judging.median(delay.seconds for delay in judging.delays(own))
        born = judging.birthplaces(own)
        yield (
            fault,
            str(len(own)),
            *(_of(judging.recall(own, strength)) for strength in (STRONG, WEAK)),
            _of(born),
            "" if seconds is None else f"{seconds:.1f}",
            counts,
        )


def _of(recall: judging.Recall) -> str:
    return f"{recall.found}/{recall.total}" if recall.total else ""


def _wrong(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str]]:
    spoiled = judging.untrue(outcomes)
    for outcome in outcomes:
        said = [f"says {found.rule} ({found.severity})" for found in judging.unexpected(outcome)]
        if outcome.planned.fault is not None and judging.finding_of(outcome) is None:
            said.insert(0, "missed")
        elif outcome.injection is not None and outcome.injection.born_in is not None:
            found = judging.finding_of(outcome)
            if found is not None and not judging.is_birthplace_right(outcome):
                truth = outcome.injection
                said.append(f"says {found.born_in} {found.layer}, was {truth.born_in} {truth.layer}")
        if outcome in spoiled:
            said.insert(0, f"did not go as planned, exit codes {outcome.exit_codes}")
        if said:
            yield outcome.planned.run_id, "; ".join(said)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
