"""Who may talk to the collector, and how much: tokens with roles and teams, over whatever protocol.

``tokens`` knows them, ``limits`` counts what each sends, ``teams`` keeps teams' runs apart, ``guard`` decides;
all of it without HTTP. ``gate`` asks the guard about every HTTP request.
"""

from gradwatch_collector.auth.gate import Gate, grant_of
from gradwatch_collector.auth.guard import Guard
from gradwatch_collector.auth.limits import UNLIMITED, Limits, Rates
from gradwatch_collector.auth.teams import Owners
from gradwatch_collector.auth.tokens import (
    Grant,
    Role,
    TokenExistsError,
    TokenRow,
    Tokens,
    UnknownTokenError,
    create_token,
    has_tokens,
    list_tokens,
    revoke_token,
)

__all__ = [
    "UNLIMITED",
    "Gate",
    "Grant",
    "Guard",
    "Limits",
    "Owners",
    "Rates",
    "Role",
    "TokenExistsError",
    "TokenRow",
    "Tokens",
    "UnknownTokenError",
    "create_token",
    "grant_of",
    "has_tokens",
    "list_tokens",
    "revoke_token",
]
