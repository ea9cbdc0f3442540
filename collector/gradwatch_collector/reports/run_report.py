"""The post-mortem of a run as Markdown and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from gradwatch_collector.reports import comparison_table, last_steps
from gradwatch_collector.reports.page import render_page
from gradwatch_collector.reports.post_mortem import FindingTold, PostMortem
from gradwatch_collector.reports.wording import UNKNOWN, clock_time
from gradwatch_slo.markdown import escaped, table
from gradwatch_slo.runs import Status

if TYPE_CHECKING:
    from gradwatch_collector.reports.pictures import Picture

_TONES: Final = {
    Status.SUCCEEDED: "good",
    Status.FAILED: "bad",
    Status.LOST: "bad",
    Status.CANCELLED: "doubt",
    Status.RUNNING: "soft",
}


def to_markdown(report: PostMortem, now: int) -> str:
    """Return it as Markdown. ``now``: of the report, in Unix nanoseconds."""
    return "\n".join(_lines(report, now)) + "\n"


def to_html(report: PostMortem, pictures: Sequence[Picture], now: int) -> str:
    """Return it as a page of one file."""
    return render_page(
        "run.html",
        report=report,
        pictures=pictures,
        tone=_TONES[report.run.status],
        last_steps_headings=last_steps.HEADINGS,
        last_steps=_last_steps(report),
        changes_headings=_headings(report),
        changes=_changes(report),
        now=now,
    )


def _last_steps(report: PostMortem) -> Sequence[Sequence[str]]:
    return [] if report.last_steps is None else last_steps.rows(report.last_steps.rows)


def _headings(report: PostMortem) -> Sequence[str]:
    return () if report.comparison is None else comparison_table.headings(report.comparison)


def _changes(report: PostMortem) -> Sequence[Sequence[str]]:
    if report.comparison is None:
        return ()
    return comparison_table.rows(report.comparison)


def _lines(report: PostMortem, now: int) -> Iterator[str]:
    yield f"# Run {escaped(report.run.run_id)}: {report.run.status.value}\n"
    yield f"{escaped(report.summary)}\n"
    if report.first_bad_step is not None:
        yield f"- First step with NaN or Inf: {escaped(report.first_bad_step)}"
    yield f"- Last good checkpoint: {escaped(report.checkpoint)}"
    yield f"- Effective training time: {escaped(report.effective_time)}"
    yield f"- Cost: {escaped(report.cost)}\n"
    yield "## Time line\n"
    yield table(
        ("Time (UTC)", "After", "What"),
        [(clock_time(each.at), report.after(each), each.what) for each in report.timeline],
    )
    yield "\n## Findings\n"
    if not report.findings:
        yield "None.\n"
    for finding in report.findings:
        yield from _finding_lines(finding)
    if report.last_steps is not None:
        box = report.last_steps
        yield "## Last steps in the black box\n"
        sender = f"rank {box.rank} in attempt {box.attempt}"
        yield f"Of {box.steps} steps, sent for {escaped(box.trigger or UNKNOWN)} by {sender}.\n"
        yield table(last_steps.HEADINGS, _last_steps(report)) + "\n"
    yield "## What changed since the last good run\n"
    if report.comparison is None:
        yield "No run of the same job, model and dataset had succeeded before this one started.\n"
    else:
        yield (
            "The last run of the same job, model and dataset that succeeded before this one started: "
            f"{escaped(report.comparison.runs[0].run_id)}.\n"
        )
        yield table(_headings(report), _changes(report)) + "\n"
    yield f"Report of {clock_time(now)} UTC, by gradwatch."


def _finding_lines(finding: FindingTold) -> Iterator[str]:
    yield f"### {escaped(finding.title)}\n"
    if finding.evidence:
        yield f"- Evidence: {escaped(finding.evidence)}"
    yield f"- Likely cause: {escaped(finding.cause)}"
    yield f"- What to do: {escaped(finding.action)} [Runbook]({finding.runbook_url})\n"
