"""Checkpoints on disk: finding them, telling whether they are whole, and the newest one that is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gradwatch.checkpoints import manifest as manifests
from gradwatch.checkpoints.manifest import Fault, Manifest, ManifestError, Problem

# Files with these endings are taken for checkpoints when a folder is searched.
SUFFIXES: Final = frozenset({".pt", ".pth", ".ckpt", ".bin", ".safetensors"})
# torch.distributed.checkpoint's own list of what a folder holds: a pickle.
_DISTRIBUTED: Final = ".metadata"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of one checkpoint. Without a manifest, ``None``, only its format could be looked at."""

    path: Path
    manifest: Manifest | None
    problem: Problem | None

    @property
    def state(self) -> str:
        """``good``, ``bad``, or ``unsigned``: whole by its format, but nobody wrote down what it should be."""
        if self.problem is not None:
            return "bad"
        return "good" if self.manifest is not None else "unsigned"


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in a folder that is what it was when it was written; None if there is none.

    Looks at checkpoints with a manifest, also in folders within the folder: sizes first, then checksums, the
    newest first. Nothing is loaded. A checkpoint that cannot be read does not count, and raises nothing.
    """
    dated = []
    for path in find(Path(directory)):
        try:
            held = manifests.read(path)
        except ManifestError:
            continue
        if manifests.problem_of(path, held, sizes_only=True) is None:
            dated.append((held.saved_at, held.step or 0, path))
    for _, _, path in sorted(dated, reverse=True):
        try:
            if manifests.verified(path)[1] is None:
                return path
        except ManifestError:  # replaced a moment ago
            continue
    return None


def verify(path: Path) -> Verdict:
    """Read every byte of a checkpoint. Nothing of it is executed."""
    try:
        manifest, problem = manifests.verified(path)
    except ManifestError as error:
        if manifests.manifest_path(path).exists():
            return Verdict(path, None, Problem(Fault.UNLOADABLE, str(error)))
        return Verdict(path, None, _problem_of_format(path, as_written=False))
    return Verdict(path, manifest, problem or _problem_of_format(path, as_written=True))


def _problem_of_format(path: Path, *, as_written: bool) -> Problem | None:
    from gradwatch.checkpoints.formats import problem_of_file  # which training never needs

    files = [path]
    if path.is_dir():
        files = [
            file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES or file.name == _DISTRIBUTED
        ]
    problems = (problem_of_file(file, as_written=as_written) for file in files)
    return next(filter(None, problems), None)


def find(path: Path) -> Iterator[Path]:
    """The checkpoints at or below a path, by name."""
    if path.name.endswith(manifests.SUFFIX) and path.name != manifests.NAME:
        yield path.with_name(path.name.removesuffix(manifests.SUFFIX))
    elif not path.is_dir() or _is_checkpoint(path):
        yield path
    else:
        yield from _below(path)


def _below(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    named = {entry.name for entry in entries}
    for entry in entries:
        if entry.is_dir():
            if _is_checkpoint(entry):
                yield entry
            elif not entry.name.startswith(".") and not entry.is_symlink():  # links may go round in circles
                yield from _below(entry)
        elif entry.name.endswith(manifests.SUFFIX):
            described = entry.name.removesuffix(manifests.SUFFIX)
            # What is there is found by its own name; what is not is found by its manifest.
            if described and not (described in named and Path(described).suffix in SUFFIXES):
                yield entry.with_name(described)
        elif entry.suffix in SUFFIXES:
            yield entry


def _is_checkpoint(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (manifests.NAME, _DISTRIBUTED))


def find_all(paths: Iterable[Path]) -> list[Path]:
    """The checkpoints at or below several paths, each once."""
    return list(dict.fromkeys(found for path in paths for found in find(path)))
