"""Options that say where links lead."""

from __future__ import annotations

import re
from typing import Any, Final

import click


class _WebAddress(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """The absolute URL of something that links may lead to or below of, without a slash at its end."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Read it; the signs that no URL has would end a link, or begin a template."""
        if not re.fullmatch(r"https?://[\w\[][^\s\"<>\\^`{|}]*", value) or not value.isprintable():
            self.fail(f"found {value!r}, expected an address such as https://gradwatch.example.org", param, ctx)
        return str(value).rstrip("/")


WEB_ADDRESS: Final = _WebAddress()
