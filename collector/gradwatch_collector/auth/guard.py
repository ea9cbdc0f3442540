"""The decision about one request, whatever protocol it came by."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from gradwatch_collector.auth.limits import Limits
from gradwatch_collector.auth.tokens import Grant, Role, Tokens
from gradwatch_collector.otlp.errors import ForbiddenError, UnauthenticatedError, UnavailableError

# Tokens that were never valid wait for one thread, so many at most: whoever makes them up takes one connection
# to the database, and the turn of nobody who is known.
_MOST_STRANGERS: Final = 100


class Guard:
    """Asks for a token with the right role, and counts what comes with it."""

    def __init__(self, tokens: Tokens, limits: Limits) -> None:
        self._tokens = tokens
        self._limits = limits
        self._known = ThreadPoolExecutor(2, "gradwatch-tokens")
        self._strangers = ThreadPoolExecutor(1, "gradwatch-strangers")
        self._waiting_strangers = 0

    def admit(self, authorization: str | None, role: Role) -> Grant:
        """Return what the value of an ``Authorization`` header (``Bearer TOKEN``) allows.

        Reads the database at most once in ten seconds a token.

        Raises:
            UnauthenticatedError: no valid token.
            ForbiddenError: a valid one, but not for this.
            LimitedError: it sends too much.
            UnavailableError: the database is away, and the token is not remembered.
        """
        try:
            grant = self._tokens.grant(_token(authorization))
        except SQLAlchemyError as error:
            raise UnavailableError("the database is not available") from error
        if grant is None:
            raise UnauthenticatedError(
                "a valid token is needed: Authorization: Bearer TOKEN (gradwatch token create)"
            )
        if not grant.allows(role):
            raise ForbiddenError(f"token {grant.name!r} is for {', '.join(sorted(grant.roles))}, not {role}")
        self._limits.admit(grant.name, grant.rates)
        return grant

    async def admit_async(self, authorization: str | None, role: Role) -> Grant:
        """Do as :meth:`admit`; the event loop does not wait for the database.

        Raises:
            UnavailableError: also where too many ask with tokens that were never valid.
        """
        token = _token(authorization)
        if self._tokens.remembers(token):
            return self.admit(authorization, role)
        loop = asyncio.get_running_loop()
        if self._tokens.was_valid(token):
            return await loop.run_in_executor(self._known, self.admit, authorization, role)
        if self._waiting_strangers >= _MOST_STRANGERS:
            raise UnavailableError("too many tokens that are not known are being looked up")
        self._waiting_strangers += 1
        try:
            return await loop.run_in_executor(self._strangers, self.admit, authorization, role)
        finally:
            self._waiting_strangers -= 1

    def charge(self, grant: Grant, size: int) -> None:
        """Count ``size`` bytes of a request that was let in."""
        self._limits.charge(grant.name, grant.rates, size)


def _token(authorization: str | None) -> str:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
