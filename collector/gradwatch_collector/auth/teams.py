"""Whose run it is: a token of one team must not write into the runs of another."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, select

from gradwatch import conventions as c
from gradwatch_collector.otlp.errors import ForbiddenError
from gradwatch_collector.records import Source
from gradwatch_collector.storage import schema

_MOST_KNOWN: Final = 10_000


class Owners:
    """Knows which runs are whose; asked by the writer, inside its transaction.

    A run belongs to the team that it is shown with; before it is one, to that of the process that was first to
    send anything under its id. A run without a team is anybody's: it may have begun before there were tokens.
    """

    def __init__(self) -> None:
        self._known: set[tuple[str, str]] = set()

    def require(self, connection: Connection, source: Source) -> None:
        """Check that what came with a team's token is not about another team's run.

        Raises:
            ForbiddenError: it is.
        """
        if source.owner is None or (source.run_id, source.owner) in self._known:
            return
        # It is the caller's turn: no other collector makes the run another team's meanwhile.
        team = _team_of(connection, source.run_id)
        if team == source.owner:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known.add((source.run_id, source.owner))
        elif team is not None:
            raise ForbiddenError(f"run {source.run_id!r} is another team's: the token may not write to it")


def _team_of(connection: Connection, run_id: str) -> str | None:
    run, process = schema.run.c, schema.process.c
    row = connection.execute(select(run.team).where(run.run_id == run_id)).one_or_none()
    if row is not None:
        team: str | None = row.team
        return team
    resource = connection.scalar(
        select(process.resource).where(process.run_id == run_id).order_by(process.started_at).limit(1)
    )
    return None if resource is None else resource.get(c.TEAM)
