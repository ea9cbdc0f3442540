"""Whose run it is: a token of one team must not write into the runs of another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from sqlalchemy import Connection, literal, select

from gradwatch import conventions as c
from gradwatch_collector.otlp.errors import ForbiddenError
from gradwatch_collector.records import Source
from gradwatch_collector.runs.facts import team_of
from gradwatch_collector.storage.series import TRUSTED_SECONDS, seconds

_MOST_KNOWN: Final = 10_000


class Owners:
    """Knows which runs are whose; asked by the writer, inside its transaction.

    A run belongs to the team that it is shown with; before it is one, to that of the process that was first to
    send anything under its id. A run without a team is anybody's: it may have begun before there were tokens.
    """

    def __init__(self, now: Callable[[], float] = seconds) -> None:
        self._now = now
        self._since = now()
        self._known: set[tuple[str, str]] = set()

    def require(self, connection: Connection, sources: Iterable[Source]) -> None:
        """Check that nothing that came with a team's token is about another team's run.

        Of sources that come together the first to name a run counts as having been there before.

        Raises:
            ForbiddenError: something is.
        """
        # As with series: what was pruned may begin again, with another team.
        if len(self._known) >= _MOST_KNOWN or self._now() - self._since > TRUSTED_SECONDS:
            self._known.clear()
            self._since = self._now()
        claimed: dict[str, str] = {}
        for source in sources:
            if source.owner is not None and (source.run_id, source.owner) not in self._known:
                self._require(connection, source.run_id, source.owner, claimed.get(source.run_id))
            if (claim := source.resource.get(c.TEAM)) is not None:
                claimed.setdefault(source.run_id, claim)

    def _require(self, connection: Connection, run_id: str, owner: str, claim: str | None) -> None:
        # It is the caller's turn: no other collector makes the run another team's meanwhile.
        team = _team_of(connection, run_id)
        if team == owner:
            self._known.add((run_id, owner))
        elif (team or claim or owner) != owner:
            raise ForbiddenError(f"run {run_id!r} is another team's: the token may not write to it")


def _team_of(connection: Connection, run_id: str) -> str | None:
    team: str | None = connection.scalar(select(team_of(literal(run_id))))
    return team
