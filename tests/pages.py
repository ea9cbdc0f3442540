"""Pages as a browser would read them, and Markdown as GitHub would."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from markdown_it import MarkdownIt

# What must be shown as it is.
HOSTILE = "<script>alert(1)</script>\x1b[31m$x_1$ |*a*|\u202e層"
HOSTILE += " https://evil.example www.evil.example a@b.c @acme/everyone #1"
# What GitHub makes links and mentions of, wherever it is within one text.
LIVE = re.compile(r"://|www\.|@[^\s]|#\d", re.IGNORECASE)


def live(markdown: str) -> list[str]:
    """Return the texts of Markdown that would become links or mentions; links that it makes itself are none."""
    page = Page(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))
    return [text for text in page.texts if LIVE.search(text)]


class Page(HTMLParser):
    """What a browser would make of a page: its tags, ids, texts, and all that it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            told = value or ""
            if name == "id":
                self.ids.append(told)
            elif name == "aria-labelledby":
                self.labels += told.split()
            elif tag == "a" and name == "href":
                self.links.append(told)
            elif name in ("src", "href", "xlink:href", "data", "srcset", "action", "poster"):
                self.fetched.append(told)
            assert not name.startswith("on")
            self.fetched += re.findall(r"url\(([^)]*)\)", told)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
