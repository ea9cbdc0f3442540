"""Tokens: who holds one, what it allows, and since when it no longer does.

Tokens are 256 random bits, shown once and stored as their SHA-256: there is nothing to brute-force, so a slow
password hash would only slow ingest down.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from gradwatch import conventions as c
from gradwatch_collector.auth.limits import UNLIMITED, Rates
from gradwatch_collector.otlp.attributes import run_id_of
from gradwatch_collector.records import Batch, Source
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction

logger = logging.getLogger(__name__)

TOKEN_PREFIX: Final = "gw_"  # noqa: S105 - a prefix that secret scanners can look for, not a secret
_NANOS: Final = 1_000_000_000
_REMEMBERED_NANOS: Final = 10 * _NANOS
_MOST_REMEMBERED: Final = 10_000
# A use is written down at most so often: a row for each request would be most of what is written.
_USE_NANOS: Final = 60 * _NANOS

_token = schema.token.c


class TokenExistsError(ValueError):
    """A token of that name is there already."""


class UnknownTokenError(ValueError):
    """No token of that name is valid."""


class Role(StrEnum):
    """What a token is for."""

    INGEST = "ingest"
    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a valid token allows: its roles, on one team's runs or, with ``team`` None, on all."""

    name: str
    team: str | None = None
    roles: frozenset[Role]
    rates: Rates = UNLIMITED
    expires_at: int | None = None

    def allows(self, role: Role) -> bool:
        """Return whether it is for this; an admin's is for everything."""
        return role in self.roles or Role.ADMIN in self.roles

    def stamp(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return what came with the token as the team's own: its team wins over what telemetry claims."""
        if self.team is None:
            return batches
        return [replace(batch, source=_owned(batch.source, self.team)) for batch in batches]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """What is known of a token, for those who administer them. Moments in Unix nanoseconds."""

    name: str
    team: str | None
    roles: Sequence[Role]
    rates: Rates
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    revoked_at: int | None

    def state(self, now: int) -> str:
        """Return ``valid``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "valid"


def create_token(
    connection: Connection,
    name: str,
    roles: Iterable[Role],
    *,
    team: str | None = None,
    expires_at: int | None = None,
    rates: Rates = UNLIMITED,
    now: int,
) -> str:
    """Store a new token and return it; it cannot be shown again. Moments in Unix nanoseconds.

    Raises:
        TokenExistsError: the name is taken, be it by a token that was revoked: the audit log names tokens.
    """
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    try:
        connection.execute(
            insert(schema.token).values(
                name=name,
                team=team,
                roles=_joined(roles),
                digest=_digest(token),
                requests_per_second=rates.requests,
                bytes_per_second=rates.bytes,
                created_at=now,
                expires_at=expires_at,
            )
        )
    except IntegrityError as error:
        raise TokenExistsError(f"a token named {name!r} exists already; choose another name") from error
    return token


def revoke_token(connection: Connection, name: str, now: int) -> None:
    """End a token; collectors stop taking it within ten seconds.

    Raises:
        UnknownTokenError: there is none of that name, or it was revoked before.
    """
    revoked = connection.execute(
        update(schema.token)
        .where(_token.name == name, _token.revoked_at.is_(None))
        .values(revoked_at=now)
        .returning(_token.token_id)
    ).all()
    if not revoked:
        raise UnknownTokenError(f"no token named {name!r} is valid; `gradwatch token list` names them")


def list_tokens(connection: Connection) -> list[TokenRow]:
    """Return every token that ever was, newest first."""
    rows = connection.execute(
        select(schema.token).order_by(_token.created_at.desc(), _token.token_id.desc())
    ).mappings()
    return [
        TokenRow(
            name=row["name"],
            team=row["team"],
            roles=_split(row["roles"]),
            rates=_rates(row),
            created_at=row["created_at"],
            expires_at=row["expires_at"],
            last_used_at=row["last_used_at"],
            revoked_at=row["revoked_at"],
        )
        for row in rows
    ]


def has_tokens(connection: Connection, now: int) -> bool:
    """Return whether any token is valid."""
    return connection.scalar(select(_token.token_id).where(_valid(now)).limit(1)) is not None


class Tokens:
    """Looks tokens up, remembering answers for ten seconds: a revoked token stops working soon enough.

    ``now`` in Unix nanoseconds. Thread-safe.
    """

    def __init__(self, engine: Engine, now: Callable[[], int] = time.time_ns) -> None:
        self._engine = engine
        self._now = now
        self._lock = threading.Lock()
        # Apart, so that whoever makes tokens up does not have the valid ones looked up again.
        self._granted: dict[bytes, tuple[int, Grant | None]] = {}
        self._unknown: dict[bytes, tuple[int, Grant | None]] = {}

    def remembers(self, token: str) -> bool:
        """Return whether :meth:`grant` would answer without the database."""
        return not token.startswith(TOKEN_PREFIX) or self._recall(_digest(token), self._now()) is not None

    def was_valid(self, token: str) -> bool:
        """Return whether it was, when it was last looked up."""
        with self._lock:
            return _digest(token) in self._granted

    def grant(self, token: str) -> Grant | None:
        """Return what the token allows, or None if it is not valid.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database had to be asked, and is away.
        """
        if not token.startswith(TOKEN_PREFIX):
            return None
        digest, now = _digest(token), self._now()
        known = self._recall(digest, now)
        if known is None:
            known = now, self._look_up(digest, now)
            with self._lock:
                self._granted.pop(digest, None)
                kept = self._unknown if known[1] is None else self._granted
                if len(kept) >= _MOST_REMEMBERED:
                    kept.clear()
                kept[digest] = known
        grant = known[1]
        if grant is not None and grant.expires_at is not None and grant.expires_at <= now:
            return None
        return grant

    def _recall(self, digest: bytes, now: int) -> tuple[int, Grant | None] | None:
        with self._lock:
            known = self._granted.get(digest) or self._unknown.get(digest)
        # A clock that was set back must not make an answer last.
        return known if known is not None and 0 <= now - known[0] < _REMEMBERED_NANOS else None

    def _look_up(self, digest: bytes, now: int) -> Grant | None:
        with self._engine.connect() as connection:
            row = (
                connection.execute(select(schema.token).where(_token.digest == digest, _valid(now)))
                .mappings()
                .one_or_none()
            )
        if row is None:
            return None
        if row["last_used_at"] is None or now - row["last_used_at"] >= _USE_NANOS:
            self._note_use(row["token_id"], now)
        return Grant(
            name=row["name"],
            team=row["team"],
            roles=frozenset(_split(row["roles"])),
            rates=_rates(row),
            expires_at=row["expires_at"],
        )

    def _note_use(self, token_id: int, now: int) -> None:
        try:
            with transaction(self._engine) as connection:
                connection.execute(
                    update(schema.token).where(_token.token_id == token_id).values(last_used_at=now)
                )
        except SQLAlchemyError as error:
            # A disk that is full says nothing about who is asking.
            logger.warning("cannot note that a token was used: %s", str(error).splitlines()[0])


def _owned(source: Source, team: str) -> Source:
    resource = {**source.resource, c.TEAM: team}
    run_id = source.run_id
    if run_id == run_id_of(source.resource):
        # Where no run is named, two teams' senders may describe themselves alike.
        run_id = run_id_of(resource)
    return replace(source, run_id=run_id, resource=resource, owner=team)


def _valid(now: int) -> ColumnElement[bool]:
    return _token.revoked_at.is_(None) & (_token.expires_at.is_(None) | (_token.expires_at > now))


def _rates(row: RowMapping) -> Rates:
    return Rates(row["requests_per_second"], row["bytes_per_second"])


def _joined(roles: Iterable[Role]) -> str:
    held = set(roles)
    return ",".join(role for role in Role if role in held)


def _split(roles: str) -> list[Role]:
    # A role that a later version made is not ours to grant.
    return [role for role in Role if role in roles.split(",")]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
