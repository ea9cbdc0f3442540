"""The decision about one request, whatever protocol it came by."""

from __future__ import annotations

import asyncio

from sqlalchemy.exc import SQLAlchemyError

from gradwatch_collector.auth.limits import Limits
from gradwatch_collector.auth.tokens import Grant, Role, Tokens
from gradwatch_collector.otlp.errors import ForbiddenError, UnauthenticatedError, UnavailableError


class Guard:
    """Asks for a token with the right role, and counts what comes with it."""

    def __init__(self, tokens: Tokens, limits: Limits) -> None:
        self._tokens = tokens
        self._limits = limits

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
        """Do as :meth:`admit`; the event loop does not wait for the database."""
        if self._tokens.remembers(_token(authorization)):
            return self.admit(authorization, role)
        return await asyncio.to_thread(self.admit, authorization, role)

    def charge(self, grant: Grant, size: int) -> None:
        """Count ``size`` bytes of a request that was let in."""
        self._limits.charge(grant.name, grant.rates, size)


def _token(authorization: str | None) -> str:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
