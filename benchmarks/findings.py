"""What the collector finds of real training runs, healthy and with faults planted in them.

    python benchmarks/findings.py [--set tuning|report] [--families A,B] [--faults C,D] [--runs N]
                                  [--keep DIR] [--short]
    python benchmarks/findings.py --judge DIR

Every run is a process that trains and is watched, beside a collector of its own; two processes at a time.
Of a whole report set the result takes its place between the marks of docs/findings-benchmark.md; whatever is
less is only printed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from gym import outcome as truth
from gym.data import REPORT
from gym.fault import EVERYWHERE
from gym.faults import KINDS
from gym.outcome import Outcome
from gym.page import tables
from gym.plan import HEALTHY, SETS, PlannedRun, plan, short_plan
from gym.playing import EXPORT_SECONDS, play
from page import write

PAGE: Final = Path(__file__).parents[1] / "docs" / "findings-benchmark.md"


def main() -> int:
    """Play, judge, print, write."""
    options = _options()
    if options.judge is not None:
        print(tables(truth.load(options.judge / truth.TRUTH), EXPORT_SECONDS))
        return 0
    planned = _planned(options)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = play(planned, folder, _teller(len(planned), folder))
        truth.save(outcomes, folder / truth.TRUTH)
    about = f"{datetime.now(UTC):%Y-%m-%d}: {len(planned)} runs of the {options.set} set."
    result = f"{about}\n\n{tables(outcomes, EXPORT_SECONDS)}"
    print(result)
    if options.set == REPORT and planned == plan(REPORT, runs=options.runs):
        write(PAGE, {"findings": result})
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default=REPORT, help="which data and seeds")
    parser.add_argument("--families", type=_names(EVERYWHERE), default=EVERYWHERE, metavar="A,B")
    parser.add_argument("--faults", type=_names((HEALTHY, *KINDS)), default=(HEALTHY, *KINDS), metavar="A,B")
    parser.add_argument("--runs", type=int, default=1, help="times that everything is played, with other seeds")
    parser.add_argument("--healthy", type=int, help="healthy runs a family (default: enough for fifty)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep database, logs and truth there")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="only judge again what was kept there")
    parser.add_argument("--short", action="store_true", help="two minutes in all: does it work at all")
    return parser.parse_args()


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def names(given: str) -> tuple[str, ...]:
        unknown = set(given.split(",")) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(known)}")
        return tuple(given.split(","))

    return names


def _planned(options: argparse.Namespace) -> list[PlannedRun]:
    if options.short:
        return short_plan(options.set)
    more = {} if options.healthy is None else {"healthy_seeds": options.healthy}
    return plan(options.set, runs=options.runs, families=options.families, faults=options.faults, **more)


def _teller(total: int, folder: Path) -> Callable[[Outcome, float], None]:
    """Tell of each run that has ended, and keep what is known so far for those who look meanwhile."""
    done: list[Outcome] = []

    def tell(outcome: Outcome, seconds: float) -> None:
        done.append(outcome)
        truth.save(done, folder / truth.TRUTH)
        rules = ", ".join(sorted({found.rule for found in outcome.findings})) or "nothing found"
        print(
            f"{len(done)}/{total} {outcome.planned.run_id}: {rules} in {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    return tell


if __name__ == "__main__":
    sys.exit(main())
