"""Checkpoints on disk: finding them, telling whether they are whole, and the newest one that is."""

from __future__ import annotations

import heapq
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from gradwatch.checkpoints import manifest as manifests
from gradwatch.checkpoints import telling
from gradwatch.checkpoints.manifest import Fault, Manifest, ManifestError, Problem, is_folder
from gradwatch.checkpoints.names import DISTRIBUTED, SUFFIXES, is_index


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

    Looks at checkpoints with a manifest, also in folders within the folder, as `verify` does. Of one run, the
    newest is the one with the most steps of the last attempt, which no clock that was wrong can hide; of
    several runs, the newest is the one saved last. Nothing is loaded. A checkpoint that cannot be read does not
    count, and raises nothing. What is found of each that is looked at is told by the run of this process, or by
    the one that begins next.
    """
    runs: defaultdict[str | None, list[tuple[Manifest, Path]]] = defaultdict(list)
    for path in find(Path(directory)):
        with suppress(ManifestError):
            held = manifests.read(path)
            problem = manifests.problem_of(path, held, sizes_only=True)
            if problem is None:
                runs[held.run_id].append((held, path))
            else:
                telling.tell(Verdict(path, held, problem))
    for each in runs.values():
        each.sort(key=lambda dated: _progress(dated[0]), reverse=True)
    # Each list is taken from in its own order; between their heads the time decides.
    newest_first = heapq.merge(*runs.values(), key=lambda dated: dated[0].saved_at, reverse=True)
    return next((path for _, path in newest_first if _is_good(path)), None)


def _is_good(path: Path) -> bool:
    verdict = verify(path)
    telling.tell(verdict)
    return verdict.state == "good"


def _progress(held: Manifest) -> tuple[int, int, datetime]:
    unknown = -1
    return (
        unknown if held.attempt is None else held.attempt,
        unknown if held.step is None else held.step,
        held.saved_at,
    )


def verify(path: Path) -> Verdict:
    """Read every byte of a checkpoint. Nothing of it is executed."""
    from gradwatch.checkpoints import formats  # which `import gradwatch` has no need of

    try:
        manifest, problem = manifests.verified(path)
    except ManifestError as error:
        if os.path.lexists(manifests.manifest_path(path)):
            return Verdict(path, None, Problem(Fault.UNLOADABLE, str(error)))
        return Verdict(path, None, formats.problem_of(path))
    problem = problem or _added(path, manifest) or formats.problem_of(path, as_written=True)
    return Verdict(path, manifest, problem)


def _added(path: Path, manifest: Manifest) -> Problem | None:
    added = manifests.unlisted(path, manifest) - set(manifest.others)
    return Problem(Fault.ALTERED, f"{min(added)} was not there when it was written") if added else None


def find(path: Path) -> Iterator[Path]:
    """The checkpoints at or below a path, by name."""
    if path.name.endswith(manifests.SUFFIX) and path.name != manifests.NAME:
        yield path.with_name(path.name.removesuffix(manifests.SUFFIX))
    elif not is_folder(path) or _is_checkpoint(path):
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
        if is_folder(entry):
            if _is_checkpoint(entry):
                yield entry
            elif not entry.name.startswith(".") and not entry.is_symlink():  # links may go round in circles
                yield from _below(entry)
        elif entry.name.endswith(manifests.SUFFIX):
            described = entry.name.removesuffix(manifests.SUFFIX)
            # What is there is found by its own name; what is not is found by its manifest.
            if described and not (described in named and Path(described).suffix in SUFFIXES):
                yield entry.with_name(described)
        elif entry.suffix in SUFFIXES or is_index(entry):
            yield entry


def _is_checkpoint(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (manifests.NAME, DISTRIBUTED))


def find_all(paths: Iterable[Path]) -> list[Path]:
    """The checkpoints at or below several paths, each once."""
    return list(dict.fromkeys(found for path in paths for found in find(path)))
