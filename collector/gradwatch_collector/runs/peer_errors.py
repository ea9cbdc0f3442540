"""Failures that only say that another rank is gone: what NCCL and gloo raise when a peer vanishes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gradwatch import conventions as c

_TYPES: Final = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError"})
# gloo raises plain RuntimeErrors: only their text tells them from a rank's own.
_GLOO_TYPES: Final = frozenset({"RuntimeError"})
_GLOO_WORDS: Final = ("closed by peer", "reset by peer", "gloo")


def told_of_a_peer(evidence: Mapping[str, Any]) -> bool:
    """Return whether an ending's evidence blames a broken connection to another rank."""
    name = str(evidence.get(c.EXCEPTION_TYPE) or "").rpartition(".")[2]
    message = str(evidence.get(c.EXCEPTION_MESSAGE) or "").lower()
    return name in _TYPES or (name in _GLOO_TYPES and any(word in message for word in _GLOO_WORDS))
