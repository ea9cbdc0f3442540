"""What a checkpoint is made of: the size and SHA-256 of each file, and which step of which run it holds.

A folder has its manifest in it, under a name that no saver uses; a file ``NAME`` has ``NAME.manifest.json``
beside it.
Two files cannot be renamed in one instant, so the manifest of a file that replaces another also describes the
one before: whichever of the two a crash leaves under the name, the manifest beside it knows it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, Final

from gradwatch.checkpoints.names import is_weights

FORMAT: Final = 1
NAME: Final = "gradwatch.manifest.json"
SUFFIX: Final = ".manifest.json"
_DIGITS: Final = frozenset("0123456789abcdef")


class ManifestError(ValueError):
    """There is no manifest, or it cannot be read; the message is one clear line."""


class Fault(StrEnum):
    """What is wrong with a checkpoint."""

    MISSING = "missing"
    TRUNCATED = "truncated"
    ALTERED = "altered"
    UNLOADABLE = "unloadable"


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault and the evidence for it, in one line."""

    fault: Fault
    evidence: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: its path within the checkpoint with ``/`` between parts, its bytes, their SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A checkpoint as it was written; what was not known then is None.

    Attributes:
        files: Its files, by name.
        saved_at: When it was complete, in UTC.
        step: Optimizer steps done, which is the index of the next one: where a resumed run goes on.
        previous: Of a single file, what its name held before.
        others: Of a folder, files of weights that were in it already and are no part of the checkpoint.
    """

    files: tuple[FileRecord, ...]
    saved_at: datetime
    step: int | None = None
    run_id: str | None = None
    attempt: int | None = None
    rank: int | None = None
    torch: str | None = None
    previous: Manifest | None = None
    others: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def dumps(self) -> str:
        """As JSON text."""
        return json.dumps(_tree(self), indent=1) + "\n"

    @classmethod
    def loads(cls, text: str | bytes) -> Manifest:
        """Read it back.

        Raises:
            ManifestError: It is none, or of a later version.
        """
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ManifestError("the manifest is no JSON") from error
        return cls._of(tree)

    @classmethod
    def _of(cls, tree: Any) -> Manifest:
        if not isinstance(tree, dict) or not isinstance(tree.get("format"), int):
            raise ManifestError("the manifest has no format number")
        if tree["format"] != FORMAT:
            raise ManifestError(f"the manifest has format {tree['format']}, this gradwatch reads {FORMAT}")
        try:
            saved_at = datetime.fromisoformat(tree["saved_at"]).astimezone(UTC)
            files = tuple(_file(each) for each in tree["files"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ManifestError(f"the manifest is not whole: {error}") from error
        held = _optional(tree, "previous", dict)
        return cls(
            files=files,
            saved_at=saved_at,
            step=_optional(tree, "step", int),
            run_id=_optional(tree, "run_id", str),
            attempt=_optional(tree, "attempt", int),
            rank=_optional(tree, "rank", int),
            torch=_optional(tree, "torch", str),
            previous=None if held is None else cls._of({**held, "previous": None}),
            others=tuple(map(str, _optional(tree, "others", list) or ())),
        )


def _tree(manifest: Manifest) -> dict[str, Any]:
    tree = {"format": FORMAT, **asdict(manifest), "saved_at": manifest.saved_at.isoformat()}
    before = manifest.previous
    tree["previous"] = None if before is None else _tree(replace(before, previous=None))
    return tree


def _file(tree: dict[str, Any]) -> FileRecord:
    name, size, sha256 = tree["name"], tree["size"], tree["sha256"]
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
        raise ValueError(f"{name!r} is outside of the checkpoint")
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r} is no name of a file") from error
    if type(size) is not int or size < 0:
        raise ValueError(f"{name!r} has the size {size!r}")
    if not isinstance(sha256, str) or len(sha256) != 64 or not set(sha256) <= _DIGITS:
        raise ValueError(f"{name!r} has no SHA-256")
    return FileRecord(name, size, sha256)


def _optional(tree: dict[str, Any], name: str, kind: type[Any]) -> Any:
    value = tree.get(name)
    if value is not None and type(value) is not kind:
        raise ManifestError(f"the manifest is not whole: {name} is {value!r}")
    return value


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint is."""
    real = Path(os.path.realpath(checkpoint))  # `latest.pt` may be a link
    return real / NAME if is_folder(real) else real.with_name(real.name + SUFFIX)


def is_folder(path: Path) -> bool:
    """As ``Path.is_dir``, which raises where the folder above may not be entered."""
    return os.path.isdir(path)  # noqa: PTH112


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading; a pipe would wait for its writer for ever.

    Raises:
        OSError: It cannot be read, or is no file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return os.fdopen(descriptor, "rb")


def describe(root: Path) -> tuple[FileRecord, ...]:
    """Read a file, or every file of a folder but its manifest.

    Raises:
        OSError: One cannot be read.
    """
    if not root.is_dir():
        return (_record(root, root.name),)
    named = {file.relative_to(root).as_posix(): file for file in root.rglob("*") if file.is_file()}
    return tuple(_record(file, name) for name, file in sorted(named.items()) if name != NAME)


def unlisted(folder: Path, manifest: Manifest) -> set[str]:
    """Files of weights beside those of a manifest, which a loader may take for its own."""
    if not is_folder(folder):
        return set()
    listed = {file.name for file in manifest.files}
    beside = {str(PurePosixPath(name).parent) for name in listed}
    named = ((folder / place, place) for place in beside)
    return {
        name
        for at, place in named
        if is_folder(at)
        for file in at.iterdir()
        if is_weights(file) and file.is_file() and (name := str(PurePosixPath(place, file.name))) not in listed
    }


def _record(file: Path, name: str) -> FileRecord:
    with open_file(file) as opened:
        digest = hashlib.file_digest(opened, "sha256")
        return FileRecord(name, opened.tell(), digest.hexdigest())


def read(checkpoint: Path) -> Manifest:
    """The manifest of what a path holds now; a single file may still be what its name held before.

    Raises:
        ManifestError: There is none that can be read.
    """
    manifest = _load(checkpoint)
    if manifest.previous is not None and problem_of(checkpoint, manifest, sizes_only=True) is not None:
        before = manifest.previous
        if problem_of(checkpoint, before, sizes_only=True) is None:
            return before
    return manifest


def verified(checkpoint: Path) -> tuple[Manifest, Problem | None]:
    """The manifest of what a path holds now, and what is wrong with it: every byte is read.

    Raises:
        ManifestError: There is none that can be read.
    """
    manifest = _load(checkpoint)
    problem = problem_of(checkpoint, manifest)
    before = manifest.previous
    if problem is not None and before is not None and problem_of(checkpoint, before) is None:
        return before, None
    return manifest, problem


def _load(checkpoint: Path) -> Manifest:
    path = manifest_path(checkpoint)
    try:
        with open_file(path) as opened:
            manifest = Manifest.loads(opened.read())
    except FileNotFoundError as error:
        raise ManifestError("there is no manifest") from error
    except OSError as error:
        raise ManifestError(f"cannot read {path.name}: {error.strerror or error}") from error
    if path.name != NAME and len(manifest.files) != 1:
        raise ManifestError(f"{path.name} does not describe one file")
    return manifest


def problem_of(checkpoint: Path, manifest: Manifest, *, sizes_only: bool = False) -> Problem | None:
    """The first difference between a checkpoint and a manifest."""
    folder = is_folder(checkpoint)
    for file in manifest.files:
        # A single file may have been renamed together with its manifest.
        problem = _difference(checkpoint / file.name if folder else checkpoint, file, sizes_only)
        if problem is not None:
            return problem
    return None


def _difference(path: Path, file: FileRecord, sizes_only: bool) -> Problem | None:
    try:
        size = path.stat().st_size
        if size < file.size:
            return Problem(Fault.TRUNCATED, f"{path.name} has {size} of {file.size} bytes")
        if size > file.size:
            return Problem(Fault.ALTERED, f"{path.name} has {size} bytes, {file.size} were written")
        if not sizes_only and _record(path, file.name).sha256 != file.sha256:
            return Problem(Fault.ALTERED, f"{path.name} has another SHA-256 than what was written")
    except FileNotFoundError:
        return Problem(Fault.MISSING, f"{path.name} is not there")
    except OSError as error:
        return Problem(Fault.UNLOADABLE, f"cannot read {path.name}: {error.strerror or error}")
    return None
