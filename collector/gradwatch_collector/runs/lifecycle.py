"""How a run stands, decided from how its processes stand. Pure: no SQL, and the clock is an argument.

The rules are the run-status contract: an attempt failed if any rank failed and the first to fail is the
cause, whatever its peers report after being terminated; it is lost only if all its ranks fell silent; a run
stands as the attempt does that began last, except that a run whose attempt will be retried goes on.

A supervisor is no rank, but sees from outside how its command ended:

- A rank speaks of the supervisor it was started under. Where it does not, that is the only one on its host.
- A rank that did not tell its ending, running or lost, has the one its supervisor saw; while the supervisor
  lives and has not seen any, the rank is running, however silent.
- What a supervisor saw end is its own child. A rank further down may have outlived that, or died before and
  been hidden by a shell: exit code 0 says nothing about it, and no failure does that it has survived. Until it
  had time to say so, it is not known.
- A rank that told its ending keeps it. While every rank said ``succeeded`` and a supervisor lives, its command
  goes on, and so does the attempt. Only when every rank said ``succeeded`` and the command failed all the
  same (``os._exit`` in an exit handler, a segmentation fault at shutdown) did the attempt fail.
- Of an attempt in which no rank ever spoke there is only the supervisor's word.

The first to fail: failures that a rank told come first, in the order of their moments. A rank that was silent
at its end, killed or gone, comes before those that only told that a peer was gone, and after any other: its
own moment is not known to better than a heartbeat. Of several that were silent within one, none is the cause:
nobody can say which was. Moments are by our clock. Where a sender's clock is not known
(:mod:`~gradwatch_collector.runs.clocks`) but a peer's is, the moment of receipt stands for the ending's own;
where none is known, the senders' moments are compared with each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from gradwatch_collector.runs.clocks import TOLERANCE
from gradwatch_collector.runs.peer_errors import told_of_a_peer
from gradwatch_slo.runs import Status

REASON_HEARTBEAT_TIMEOUT: Final = "heartbeat_timeout"
_OPEN: Final = (Status.RUNNING, Status.LOST)
# A supervisor says within seconds whether it tries again; torchrun, which does not say, starts again in less.
DECISION_NANOS: Final = 30 * 1_000_000_000
HEARTBEAT_NANOS: Final = 5 * 1_000_000_000


def heartbeat_of(lost_after: int) -> int:
    """Return how far apart signs of life are where silence counts after ``lost_after``; in nanoseconds.

    Agents are told to send six within it, and send one every 5 s unless they are told.
    """
    return max(HEARTBEAT_NANOS, lost_after // 6)


def survival(heartbeat: int) -> int:
    """Return the time after which whoever has outlived its supervisor's child has sent a heartbeat."""
    return 2 * heartbeat


@dataclass(frozen=True, slots=True)
class ProcessState:
    """One process of an attempt: a rank, or a supervisor (whose ``rank`` means nothing).

    Moments in Unix nanoseconds; ``ended_at`` is None while it runs. ``told_at``: when its ending was received,
    None where it told none. ``clock_known``: ``ended_at`` is by our clock. ``active_at``: the newest moment
    that it told of, by our clock. ``supervisor``: the instance of the one that it was started under.
    ``may_live``: its ending is only concluded from that of the command it belongs to.
    """

    rank: int
    status: Status
    reason: str | None
    started_at: int
    ended_at: int | None
    last_seen_at: int
    told_at: int | None = None
    clock_known: bool = True
    active_at: int | None = None
    host: str | None = None
    instance: str = ""
    supervisor: str | None = None
    pid: int | None = None
    parent_pid: int | None = None
    will_retry: bool = False
    evidence: Mapping[str, Any] = field(default_factory=dict)
    may_live: bool = False


@dataclass(frozen=True, slots=True)
class AttemptState:
    """How an attempt stands, and which rank decided that.

    ``cause_rank`` is None where no single rank did. ``undecided_until``: it is over by all that is known now,
    and until then a supervisor that lives may say that it tries again, or a rank that it lives.
    """

    status: Status
    reason: str | None
    cause_rank: int | None
    rank_count: int
    started_at: int
    ended_at: int | None
    last_seen_at: int
    will_retry: bool = False
    undecided_until: int | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A status, the process that decided it and the rank, if one did."""

    status: Status
    cause: ProcessState | None = None
    rank: int | None = None


def roll_up(
    ranks: Sequence[ProcessState],
    supervisors: Sequence[ProcessState] = (),
    *,
    heartbeat: int = HEARTBEAT_NANOS,
) -> AttemptState:
    """Decide how an attempt stands from its ranks and supervisors (together at least one process).

    A rank that was started again within the attempt stands as its newest process. ``heartbeat``: nanoseconds
    between two signs of life.
    """
    members = [_seen_from_outside(rank, supervisors) for rank in _newest(ranks)]
    verdict = _verdict(members, supervisors, heartbeat)
    if verdict.status is Status.SUCCEEDED:
        verdict = _overruled(members, supervisors) or _going_on(supervisors) or verdict
    everyone = [*ranks, *supervisors]
    cause = verdict.cause
    ended_at: int | None = None
    if verdict.status is Status.FAILED and cause is not None:
        ended_at = _end(cause)
    elif verdict.status is not Status.RUNNING:
        ended_at = max(_end(process) for process in members or supervisors)
    said = [each for each in supervisors if each.status not in _OPEN]
    patience = _patience(cause, supervisors, heartbeat)
    over = verdict.status not in (Status.RUNNING, Status.SUCCEEDED)
    return AttemptState(
        status=verdict.status,
        reason=None if cause is None else cause.reason,
        cause_rank=verdict.rank,
        rank_count=len(members),
        started_at=min(process.started_at for process in everyone),
        ended_at=ended_at,
        last_seen_at=max(process.last_seen_at for process in everyone),
        will_retry=over and any(each.will_retry for each in (*said, *((cause,) if cause else ()))),
        undecided_until=ended_at + patience if over and ended_at is not None and patience else None,
        evidence={} if cause is None else cause.evidence,
    )


def stands(latest: AttemptState, now: int) -> Status:
    """Return how a run stands whose latest attempt is this. ``now`` in Unix nanoseconds.

    It goes on while the attempt will be retried, and for a while where its end is not decided.
    """
    undecided = latest.undecided_until is not None and now <= latest.undecided_until
    if latest.will_retry or undecided:
        return Status.RUNNING
    return latest.status


def latest_of(started_at: Mapping[int, int], *, numbered: bool) -> int:
    """Return the attempt that began last, of those by number.

    Numbers that the senders knew are in that order, whatever their clocks say. What the collector numbered is
    in the order in which it heard of them, and a disk may tell of an older one later: then the starts decide.
    """
    return max(started_at, key=lambda number: (0 if numbered else started_at[number], number))


def spoken_for(attempts: Iterable[int], supervised: Mapping[int, bool]) -> dict[int, int]:
    """Return which attempt's supervisors speak for an attempt, of those that any speak for.

    What a command starts again by itself, as torchrun does, are later attempts under the same supervisor, and
    it speaks for the last of them: it knows how the command ended. One that promised a retry (``supervised`` is
    true for its attempt) speaks for its own alone: the later ones are the retry.
    """
    numbers = sorted({*attempts, *supervised})
    begun = sorted(supervised)
    found: dict[int, int] = {}
    for index, number in enumerate(begun):
        until = begun[index + 1] if index + 1 < len(begun) else numbers[-1] + 1
        covered = [each for each in numbers if number <= each < until]
        found[number if supervised[number] else covered[-1]] = number
    return found


def _newest(ranks: Iterable[ProcessState]) -> list[ProcessState]:
    in_order = sorted(ranks, key=lambda each: (each.started_at, each.last_seen_at))
    return list({process.rank: process for process in in_order}.values())


def _supervisor_of(rank: ProcessState, supervisors: Sequence[ProcessState]) -> ProcessState | None:
    if rank.supervisor is not None:
        return next((each for each in supervisors if each.instance == rank.supervisor), None)
    here = [each for each in supervisors if each.host == rank.host]
    return here[0] if len(here) == 1 else None


def _seen_from_outside(rank: ProcessState, supervisors: Sequence[ProcessState]) -> ProcessState:
    """Return the rank as its supervisor saw it, if it did not tell its ending itself."""
    seen = _supervisor_of(rank, supervisors) if rank.status in _OPEN else None
    if seen is None or seen.status is Status.LOST:
        return rank
    if seen.status is Status.RUNNING:
        return replace(rank, status=Status.RUNNING, reason=None, ended_at=None)
    is_child = _is_child(rank, seen)
    if _outlived(rank, seen) or (seen.status is Status.SUCCEEDED and not is_child):
        return rank
    return replace(
        rank,
        status=seen.status,
        reason=seen.reason,
        ended_at=max(rank.started_at, _end(seen)),
        evidence=seen.evidence,
        will_retry=seen.will_retry,
        may_live=rank.status is Status.RUNNING and not is_child,
    )


def _is_child(rank: ProcessState, supervisor: ProcessState) -> bool:
    return rank.parent_pid is not None and rank.parent_pid == supervisor.pid


def _outlived(rank: ProcessState, supervisor: ProcessState) -> bool:
    """Return whether the rank went on after the supervisor's child had ended."""
    return (
        not _is_child(rank, supervisor)
        and rank.active_at is not None
        and rank.active_at > _end(supervisor) + TOLERANCE
    )


def _patience(cause: ProcessState | None, supervisors: Sequence[ProcessState], heartbeat: int) -> int:
    """Return how long after its end an attempt may still turn out to go on."""
    if any(each.status is Status.RUNNING for each in supervisors):
        return DECISION_NANOS
    return survival(heartbeat) if cause is not None and cause.may_live else 0


def _verdict(ranks: Sequence[ProcessState], supervisors: Sequence[ProcessState], heartbeat: int) -> _Verdict:
    if not ranks:
        return _word(supervisors)
    by_status = {status: [rank for rank in ranks if rank.status is status] for status in Status}
    if by_status[Status.FAILED]:
        # A lost rank may be what its peers' failures are about.
        return _decided(Status.FAILED, [*by_status[Status.FAILED], *by_status[Status.LOST]], heartbeat)
    if by_status[Status.RUNNING]:
        return _Verdict(Status.RUNNING)
    if lost := by_status[Status.LOST]:
        # Some ranks told how they ended, so the machine did not vanish: the silent one died.
        return _decided(Status.LOST if len(lost) == len(ranks) else Status.FAILED, lost, heartbeat)
    if cancelled := by_status[Status.CANCELLED]:
        return _decided(Status.CANCELLED, cancelled, heartbeat)
    return _Verdict(Status.SUCCEEDED)


def _decided(status: Status, candidates: Sequence[ProcessState], heartbeat: int) -> _Verdict:
    cause = _first(candidates)
    others = [each for each in candidates if each is not cause]
    return _Verdict(status, cause, None if _as_early(cause, others, heartbeat) else cause.rank)


def _as_early(silent: ProcessState, others: Iterable[ProcessState], heartbeat: int) -> bool:
    """Return whether another rank fell silent in the same moment, as far as heartbeats can tell."""
    return silent.told_at is None and any(
        other.told_at is None
        and _end(other) - _end(silent) < heartbeat
        and other.last_seen_at - silent.last_seen_at < heartbeat
        for other in others
    )


def _word(supervisors: Sequence[ProcessState]) -> _Verdict:
    """Return what supervisors say of a command of which nobody else spoke."""
    for status in (Status.FAILED, Status.RUNNING, Status.LOST, Status.CANCELLED):
        if found := [each for each in supervisors if each.status is status]:
            return _Verdict(status, None if status is Status.RUNNING else _first(found))
    return _Verdict(Status.SUCCEEDED)


def _overruled(ranks: Sequence[ProcessState], supervisors: Sequence[ProcessState]) -> _Verdict | None:
    def below(supervisor: ProcessState) -> list[ProcessState]:
        return [rank for rank in ranks if _supervisor_of(rank, supervisors) is supervisor]

    failed = [
        each
        for each in supervisors
        if each.status is Status.FAILED and not any(_outlived(rank, each) for rank in below(each))
    ]
    if not failed:
        return None
    cause = _first(failed)
    theirs = below(cause)
    return _Verdict(Status.FAILED, cause, theirs[0].rank if len(theirs) == 1 else None)


def _going_on(supervisors: Sequence[ProcessState]) -> _Verdict | None:
    """Return that the attempt goes on if a command does whose ranks have all succeeded."""
    alive = any(each.status is Status.RUNNING for each in supervisors)
    return _Verdict(Status.RUNNING) if alive else None


def _first(processes: Sequence[ProcessState]) -> ProcessState:
    """Return the one that was first, by the module's rule.

    Equal moments, as those of ranks that one supervisor saw end, go to the last sign of life, then to the
    lowest rank.
    """
    some_clock_known = any(each.clock_known for each in processes if each.told_at is not None)

    def order(process: ProcessState) -> tuple[int, int, int, int, str]:
        moment, kind = _end(process), 1
        if process.told_at is not None:
            kind = 2 if told_of_a_peer(process.evidence) else 0
            if some_clock_known and not process.clock_known:
                moment = process.told_at
        return kind, moment, process.last_seen_at, process.rank, process.reason or ""

    return min(processes, key=order)


def _end(process: ProcessState) -> int:
    return process.last_seen_at if process.ended_at is None else process.ended_at
