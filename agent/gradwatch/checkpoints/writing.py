"""Writing a checkpoint so that a crash at any moment leaves the one before or the one after, never a part.

Any saver writes into a staging folder beside the target; then everything is put on disk and moved to its place
with one rename. The staging folder keeps the target's own name, because savers look at it. It is locked as long
as its process lives, so that the next save can tell what a killed one left behind.

What is not gradwatch's is never removed. A folder that holds other things than a checkpoint of ours stays that
folder: files are moved into it one by one, and a crash in the middle leaves what does not verify.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from gradwatch.checkpoints import formats
from gradwatch.checkpoints import manifest as manifests
from gradwatch.checkpoints.manifest import Manifest, ManifestError, is_folder
from gradwatch.safety import log

_STAGING: Final = ".gradwatch-{}.partial"
_ABANDONED_SECONDS: Final = 86_400
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
# Publishing takes milliseconds, and two processes that save to one place rarely meet.
_WAIT_SECONDS: Final = 5.0
_PAUSE_SECONDS: Final = 0.01
_LONGEST_NAME: Final = 240


class NothingWrittenError(Exception):
    """The block around a saver ended, and there is no new file, or none in a new folder."""


class NotWholeError(Exception):
    """What was written cannot be loaded: it was not put in place."""


class NotSignedError(Exception):
    """What was written is in place, but a manifest cannot be."""


@dataclass(slots=True)
class Staging:
    """Where a saver writes, and where that belongs.

    Attributes:
        target: Where the checkpoint will be.
        path: What the saver is given: the target itself where no staging folder can be made.
        shared: Other ranks write into it too.
    """

    target: Path
    path: Path
    shared: bool
    _lock: int | None
    _before: tuple[int, int, int] | None

    def publish(self, about: Manifest, *, whole: bool = True) -> Manifest:
        """Put what was written on disk, then in its place, with a manifest of its files.

        ``whole``: it can be loaded as it is, and is not one part of several.

        Raises:
            NothingWrittenError: There is nothing.
            NotWholeError: It cannot be loaded; the checkpoint before is still there.
            NotSignedError: It is in place without a manifest.
            OSError: It cannot be done; the checkpoint before is still there.
        """
        written = self.path
        if written == self.target or not _holds_anything(written):
            # The saver did not use the path it was given: no rename, but still a manifest.
            if _fingerprint(self.target) == self._before or not _holds_anything(self.target):
                raise NothingWrittenError(f"nothing was written to {self.path}")
            written = self.target
        problem = formats.problem_of(written, as_written=True, quick=True) if whole else None
        if problem is not None:
            raise NotWholeError(f"what was written cannot be loaded: {problem.evidence}")
        manifest = replace(about, files=manifests.describe(written), saved_at=datetime.now(UTC))
        _sync_tree(written)
        with _alone_at(self.target):
            _keep_mode(written, self.target)
            if written.is_dir():
                self._publish_folder(written, manifest)
            else:
                self._publish_file(written, manifest)
            _sync(self.target.parent)
        return manifest

    def _publish_folder(self, written: Path, manifest: Manifest) -> None:
        _refuse_to_remove(self.target, folder=True)
        if written != self.target and _holds_others(self.target):
            log.warning("%s holds more than a checkpoint: not replaced, but its files are", self.target)
            _move_into(written, self.target)
            manifest = replace(manifest, others=tuple(sorted(manifests.unlisted(self.target, manifest))))
            written = self.target
        self._move_manifest(manifest, written / manifests.NAME)
        if written != self.target:
            _exchange(written, self.target)
            _remove(_beside(self.target))  # the name was a file's before

    def _publish_file(self, written: Path, manifest: Manifest) -> None:
        _refuse_to_remove(self.target, folder=False)
        beside = _beside(self.target)
        if len(os.fsencode(beside.name)) > os.pathconf(self.target.parent, "PC_NAME_MAX"):
            written.replace(self.target)
            raise NotSignedError("its name is too long for a manifest beside it")
        before = None if written == self.target else _held(self.target)
        if before is not None:
            # Until the next rename the name holds what it held, and the manifest knows that one too.
            self._move_manifest(replace(manifest, previous=before), beside)
            written.replace(self.target)
            return
        beside.unlink(missing_ok=True)  # whatever it was, it does not speak of this file
        if written != self.target:
            if self.target.is_dir():
                _exchange(written, self.target)
            else:
                written.replace(self.target)
        _sync(self.target.parent)
        self._move_manifest(manifest, beside)

    def _move_manifest(self, manifest: Manifest, to: Path) -> None:
        folder = to.parent if self.path == self.target else self.path.parent
        temporary = folder / f".{_unique()}{manifests.SUFFIX}"
        _write(temporary, manifest)
        temporary.replace(to)
        _sync(to.parent)

    def discard(self, *, keep: bool = False) -> None:
        """Remove the staging folder and what is in it, or only let go of it."""
        if self.path != self.target and not keep:
            shutil.rmtree(self.path.parent, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def stage(target: Path, *, token: str | None = None) -> Staging | None:
    """Make a staging folder beside the target; None for what is no file or folder, such as ``/dev/null``.

    ``token``: what all ranks that write into the folder agree on.
    """
    target = Path(os.path.realpath(target))  # a link stays, and what it points to is replaced
    if os.path.lexists(target) and not target.is_file() and not target.is_dir():
        return None
    before = _fingerprint(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        folder, lock = _locked_folder(target.parent, token)
    except OSError:
        # The saver may have more luck with the target itself, or says best why not.
        return Staging(target, target, token is not None, None, before)
    return Staging(target, folder / target.name, token is not None, lock, before)


def _locked_folder(parent: Path, token: str | None) -> tuple[Path, int]:
    while True:
        # Not the process's number: containers count theirs apart, and may share this folder.
        name = f"{_machine()}-{_unique()}" if token is None else f"shared-{token}"
        folder = parent / _STAGING.format(name)
        folder.mkdir(exist_ok=token is not None)
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process swept it away before it was locked
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), folder.stat()):
                return folder, lock
        os.close(lock)


def shared_token(target: Path, *parts: object) -> str:
    """What ranks that save the same thing come to without talking to each other."""
    restart = [os.environ.get(f"TORCHELASTIC_{name}") for name in ("RUN_ID", "RESTART_COUNT")]
    return hashlib.sha256(repr((os.path.realpath(target), restart, parts)).encode()).hexdigest()[:16]


def _unique() -> str:
    return os.urandom(8).hex()


def _beside(target: Path) -> Path:
    return target.with_name(target.name + manifests.SUFFIX)


def _held(target: Path) -> Manifest | None:
    """The manifest of the file that is about to be replaced, if it fits."""
    if not target.is_file():
        return None
    try:
        held = manifests.read(target)
    except ManifestError:
        return None
    fits = manifests.problem_of(target, held, sizes_only=True) is None
    return replace(held, previous=None) if fits else None


def _write(path: Path, manifest: Manifest) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(manifest.dumps())
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _alone_at(target: Path) -> Iterator[None]:
    """Keep other processes of this machine from publishing to the same place; not for ever."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    folder = target.with_name(_STAGING.format(f"{_machine()}-turn-{digest}"))
    lock, given_up = None, time.monotonic() + _WAIT_SECONDS
    with contextlib.suppress(OSError):  # a folder that cannot be written to, a file system without locks
        while (lock := _turn(folder)) is None and time.monotonic() < given_up:
            time.sleep(_PAUSE_SECONDS)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                folder.rmdir()
            os.close(lock)


def _turn(folder: Path) -> int | None:
    """Lock a folder that is there for that alone; None while another process has it."""
    folder.mkdir(exist_ok=True)
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # who had it is done
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), folder.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(lock)
        folder.rmdir()
        raise
    os.close(lock)
    return None


def _holds_anything(path: Path) -> bool:
    """Whether there is a file, or one in a folder: some ranks only make the folder that another fills."""
    if path.is_dir():
        return any(file.name != manifests.NAME for file in _files(path))
    return os.path.lexists(path)


def _holds_others(target: Path) -> bool:
    """Whether a folder holds what no checkpoint of ours put there."""
    if not target.is_dir():
        return False
    ours = {target / manifests.NAME, *_listed(target)}
    return any(file not in ours for file in _files(target))


def _files(folder: Path) -> Iterator[Path]:
    """All that is no folder; a link to one is none."""
    return (entry for entry in folder.rglob("*") if entry.is_symlink() or not entry.is_dir())


def _refuse_to_remove(target: Path, *, folder: bool) -> None:
    """A file takes the place of a folder, or a folder that of a file, only if that is a checkpoint of ours.

    Raises:
        OSError: As the saver would have, without gradwatch.
    """
    if folder and target.is_file() and not os.path.lexists(_beside(target)):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if not folder and _holds_others(target):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))


def _move_into(new: Path, folder: Path) -> None:
    """Move each file to the same place in another folder, and remove what only the checkpoint before had."""
    before = _listed(folder)
    for file in list(_files(new)):
        place = folder / file.relative_to(new)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
        before.discard(place)
        _sync(place.parent)
    for file in before:
        file.unlink(missing_ok=True)


def _listed(folder: Path) -> set[Path]:
    """The files of a checkpoint of ours; none if it is not."""
    try:
        return {folder / file.name for file in manifests.read(folder).files}
    except ManifestError:
        return set()


def _keep_mode(new: Path, old: Path) -> None:
    """Who may read a checkpoint stays as it was, as where a saver writes over it."""
    if old.is_dir() if new.is_dir() else old.is_file():
        with contextlib.suppress(PermissionError):  # a file system without modes
            new.chmod(stat.S_IMODE(old.stat().st_mode))


def _exchange(new: Path, old: Path) -> None:
    """Put ``new`` in the place of ``old``; a folder with files in it cannot simply be renamed over."""
    short = os.fsdecode(os.fsencode(old.name)[:_LONGEST_NAME])
    aside = old.with_name(f".{short}.previous")
    if os.path.lexists(old):
        if _rename_exchange(new, old):
            return
        # For the blink of an eye there is nothing under the name, and what was there has another one.
        _remove(aside)
        old.rename(aside)
    new.rename(old)
    _sync(old.parent)
    _remove(aside)


def _remove(path: Path) -> None:
    if is_folder(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):  # False of a name that is too long to be one
        path.unlink(missing_ok=True)


def _rename_exchange(one: Path, other: Path) -> bool:
    # renameat2(2): Python has no call for it. Not every file system does (NFS), nor every C library.
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return int(call(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)) == 0


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for folder, _, files in os.walk(path, topdown=False):
            for file in (Path(folder, name) for name in files):
                if file.is_file():  # neither a link to nowhere nor a pipe
                    _sync(file)
            _sync(Path(folder))
    else:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    """What changes when something is written: size and time of a file, number and newest time of a folder's."""
    try:
        status = [entry.stat() for entry in (path, *(path.rglob("*") if path.is_dir() else ()))]
    except OSError:
        return None
    return len(status), sum(each.st_size for each in status), max(each.st_mtime_ns for each in status)


def _machine() -> str:
    """This running kernel: only its own processes' locks can be seen."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return "unknown"


def _sweep(folder: Path) -> None:
    """Remove what killed saves left behind."""
    for left in _left_behind(folder):
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def _left_behind(folder: Path) -> Iterator[Path]:
    ours = _STAGING.format(f"{_machine()}-*")
    yield from folder.glob(ours)
    for other in folder.glob(_STAGING.format("*")):
        with contextlib.suppress(OSError):
            if not other.match(ours) and time.time() - other.stat().st_mtime > _ABANDONED_SECONDS:
                yield other
