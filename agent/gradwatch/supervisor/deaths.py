"""What the end of a child means: status, reason, and what speaks for it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Final

from gradwatch.life.endings import CANCELLED, FAILED, SUCCEEDED
from gradwatch.life.preemption import PATIENCE_SECONDS, sigterm_reason
from gradwatch.supervisor.child import Exit

_REASONS: Final[dict[int, str]] = {signal.SIGSEGV: "segfault", signal.SIGINT: "interrupted"}
_CANCELLING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class Death:
    """The end of one attempt, seen from outside.

    Attributes:
        exit_code: As a shell has it.
        evidence: One line.
    """

    status: str
    reason: str | None
    exit_code: int
    evidence: str


def death_of(left: Exit, out_of_memory: str | None = None, *, preemptible: bool = False) -> Death:
    """What the end of a child means.

    Args:
        left: How it left.
        out_of_memory: What speaks for the kernel's OOM killer, see ``OomKiller``.
        preemptible: SIGTERM means that the scheduler preempted the run.
    """
    killer = _killer(left)
    evidence = _seen(left, killer)
    if out_of_memory is not None and killer == signal.SIGKILL:
        return Death(FAILED, "oom_killed", left.shell_code, f"{evidence}; {out_of_memory}")
    if out_of_memory is not None and left.code:
        evidence += f"; meanwhile {out_of_memory}"
    ender = _asked(left) or killer
    if ender == signal.SIGTERM:
        reason = sigterm_reason(preemptible, left.signals)
        return Death(CANCELLED, reason, left.shell_code, evidence)
    if ender is not None and ender in _CANCELLING:
        return Death(CANCELLED, _name(ender), left.shell_code, evidence)
    if left.code:
        reason = _name(-left.code) if left.code < 0 else f"exit {left.code}"
        return Death(FAILED, reason, left.shell_code, evidence)
    return Death(SUCCEEDED, None, 0, evidence)


def _killer(left: Exit) -> int | None:
    """The signal that it died of, or that a shell says its own child died of."""
    number = -left.code if left.code < 0 else left.code - 128
    return number if left.code < 0 or number in signal.valid_signals() else None


def _asked(left: Exit) -> signal.Signals | None:
    """The signal in answer to which it ended. Who returns 0 after a Ctrl-C has done its work all the same."""
    is_answer = left.asked_before <= PATIENCE_SECONDS and (left.code or left.asked == signal.SIGTERM)
    return left.asked if is_answer else None


def _seen(left: Exit, killer: int | None) -> str:
    if left.code < 0:
        seen = f"killed by {_signal_name(-left.code)}" + (" (core dumped)" if left.core_dumped else "")
    else:
        seen = f"exit code {left.code}"
        if killer is not None:
            seen += f", by which shells mean {_signal_name(killer)}"
    if left.asked is not None:
        seen += f", {left.asked_before:.1f} s after {left.asked.name}"
    return seen


def _name(number: int) -> str:
    return _REASONS.get(number) or _signal_name(number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
