"""Environments that hold what an installation with given extras would have, and nothing else.

The requirements that pyproject.toml declares are followed through the metadata of what is installed here, and
the files of exactly those distributions are linked into an empty folder: no network, no guess.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def build_wheel(folder: Path) -> Path:
    """Build the wheel as `pip install` would, and return it."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def requirements(
    name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]
) -> Iterator[Distribution]:
    """Everything that installing ``name[extras]`` brings, itself included."""
    key = (re.sub(r"[-_.]+", "-", name).lower(), extras)
    if key in seen:
        return
    seen.add(key)
    found = distribution(name)
    yield found
    for line in found.requires or ():
        required = Requirement(line)
        marker = required.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield from requirements(required.name, frozenset(required.extras), seen)


def environment(folder: Path, *extras: str) -> Path:
    """Link what ``gradwatch[extras]`` depends on, file by file, into a folder, and return that."""
    for found in requirements("gradwatch", frozenset(extras), set()):
        if found.name == "gradwatch":
            continue
        for file in found.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                link = folder.joinpath(*file.parts)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(found.locate_file(file))
    return folder


def python(*paths: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code with the standard library, these folders and nothing else on the path."""
    start = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=paths[0],
    )
