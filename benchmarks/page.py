"""The page of benchmarks: what is measured is written between marks, and the rest is written by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def write(page: Path, generated: dict[str, str]) -> None:
    """Put the parts in their places; what stands between them is left as it is.

    Raises:
        ValueError: The page has no place for one.
    """
    text = page.read_text()
    for name, part in generated.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"{page} has no {begin} ... {end}")
        text = place.sub(lambda _, new=f"{begin}\n\n{part}\n\n{end}": new, text, count=1)  # type: ignore[misc]
    page.write_text(text)
