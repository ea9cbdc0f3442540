"""Secrets stay in the process: what looks like one is blotted out before anything is sent.

Applied once, where events and the resource are made, and where names of layers, inputs and logged metrics
are first met. Two kinds of evidence count: a name that announces a secret (``api_key=...``, an attribute called
``db.password``), and the published formats of keys and tokens. Doubt counts against the text: what stands
behind ``password=`` goes, secret or not. A count of tokens stays, up to five digits: six are a one-time code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from gradwatch.telemetry import AttributeValue

REDACTED: Final = "[redacted]"
_MOST_PASSES: Final = 8

# The end of a word within the name: `token`, `hf_token`, `authTokenId`, but neither `tokenizer` nor `tokens`.
_ANNOUNCEMENT: Final = (
    r"(?i:passwords?|passwd|pwd|passphrase|secrets?|token|api[_.\-]?keys?|access[_.\-]?keys?|private[_.\-]?keys?"
    r"|(?:account|encryption|signing|ssh)[_.\-]?keys?|credentials?|authorization|authentication|cookies?)"
    r"(?![a-z]|(?<=[A-Z])[A-Z])"
)
_NAME: Final = re.compile(_ANNOUNCEMENT)
# name=value, name: value, "name": "value", --name value. A bare value goes on behind a comma or a bracket that
# neither a space nor another name follows.
_NAMED_VALUE: Final = re.compile(
    rf"(?P<name>{_ANNOUNCEMENT}[\w.\-]*[\"']?\s*(?:=>|:=|[=:])\s*|--[\w\-]{{0,40}}?{_ANNOUNCEMENT}[\w\-]*\s+)"
    r"(?P<scheme>(?i:bearer|basic|token|digest)\s+)?"
    r"(?P<value>\"(?:\\.|[^\"\\])*\"?|'(?:\\.|[^'\\])*'?"
    r"|(?:[^\s\"',;&)\]}]|[\"',;&)\]}](?=\S)(?![\w.\-]+[\"']?\s*[=:]))+)"
)
_COUNT_OF_TOKENS: Final = re.compile(r"(?i:token)[\w.\-]*[\"']?\s*[=:]\s*[\"']?\d{1,5}[\"']?\Z")
_PRIVATE_KEY: Final = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\Z)"
)

# (?<!...) rather than \b: a key may stand right behind an underscore or a letter of a path.
_FORMATS: Final = re.compile(
    r"(?<![A-Za-z0-9])(?i:bearer|basic)\s+(?:(?=\S*\d)[\w.~+/\-]{8,}|[\w.~+/\-]{20,})=*"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS access key ids
    r"|gh[pousr]_[A-Za-z0-9]{20,}"  # GitHub
    r"|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_\-]{16,}"  # GitLab
    r"|hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|(?<![A-Za-z0-9])sk-[A-Za-z0-9_\-]{16,}"  # OpenAI, Anthropic
    r"|(?<![A-Za-z0-9])[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"  # Stripe
    r"|x(?:ox[a-z]|app)-[A-Za-z0-9\-]{8,}"  # Slack
    r"|hooks\.slack\.com/services/[A-Za-z0-9/]+"
    r"|AIza[A-Za-z0-9_\-]{35}"  # Google
    r"|GOCSPX-[A-Za-z0-9_\-]{16,}"
    r"|ya29\.[A-Za-z0-9_\-]{20,}"
    r"|(?<![A-Za-z0-9])gw_[A-Za-z0-9_\-]{16,}"  # gradwatch's own
    r"|eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}(?:\.[A-Za-z0-9_\-]*)?"  # JSON web tokens
)
# Weights & Biases: 40 hexadecimal digits, as git commits have, so only behind a name that says key.
_KEY_BEHIND_KEY: Final = re.compile(r"(?P<name>(?i:key)[\"']?\s*(?:=|:|\s)\s*[\"']?)[0-9a-fA-F]{32,}")
_USER_IN_URL: Final = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]{0,20}://)[^\s/?#\"'<>]+(?::[^\s/\"'<>]*)?@"
)


def redact_text(text: str) -> str:
    """The text with everything that looks like a secret replaced. Doing it twice changes nothing more."""
    for _ in range(_MOST_PASSES):
        cleaned = _redact_once(text)
        if cleaned == text:
            break
        # What stood right behind a secret may be taken for the rest of one now.
        text = cleaned
    return text


# A network has thousands of layers at most; what the user logs is a few names again and again.
@lru_cache(maxsize=8192)
def redact_name(name: str) -> str:
    """The same for a name that comes again with every point: worked out once."""
    return redact_text(name)


def _redact_once(text: str) -> str:
    text = _PRIVATE_KEY.sub(REDACTED, text)
    text = _USER_IN_URL.sub(rf"\g<scheme>{REDACTED}@", text)
    text = _NAMED_VALUE.sub(_without_value, text)
    text = _KEY_BEHIND_KEY.sub(rf"\g<name>{REDACTED}", text)
    return _FORMATS.sub(REDACTED, text)


def redact(attributes: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
    """The attributes as they may leave the process."""
    return {name: _value(name, value) for name, value in attributes.items()}


def _value(name: str, value: AttributeValue) -> AttributeValue:
    if not isinstance(value, str | bytes):
        return value
    if _NAME.search(name):
        return REDACTED
    return redact_text(value) if isinstance(value, str) else value


def _without_value(found: re.Match[str]) -> str:
    if _COUNT_OF_TOKENS.search(found[0]) or found["value"] == REDACTED[:-1]:
        return found[0]
    return found["name"] + (found["scheme"] or "") + REDACTED
