"""What could not be delivered, on disk: for this process once the collector is back, or for whoever comes next.

A process keeps its segments in a folder of its own, which it holds by a lock that dies with it. A folder that
nobody holds is a dead process's: who gets its lock moves the segments to a folder of its own, so that exactly
one adopts them. Needs neither torch nor a running agent: a supervisor calls ``drain``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from gradwatch.export.spool_records import Request, pack, unpack
from gradwatch.safety import log

DEFAULT_BYTES: Final = 256 << 20
_SEGMENT_BYTES: Final = 1 << 20
_LOCK: Final = "lock"
# Names sort by urgency, then by age.
_URGENT, _NORMAL = "0", "1"
_PATTERN: Final = "[01]-*.segment"
# Somebody may be looking into the folder just made, thinking it dead.
_TRIES: Final = 8


def places(directory: Path) -> list[Path]:
    """Where spools may lie, best first: with the other files of the host, or with the temporary ones."""
    found = [directory / "spool"]
    with contextlib.suppress(OSError):  # there is no place for temporary files
        found.append(Path(tempfile.gettempdir()) / f"gradwatch-spool-{os.getuid()}")
    return found


@dataclass
class _Segment:
    path: Path
    size: int
    items: int | None = None  # None: only the file knows


class Lane:
    """Requests that are delivered in order: segments, the oldest first, read one at a time."""

    def __init__(self, *, urgent: bool) -> None:
        self.segments: deque[_Segment] = deque()
        self.lost = 0
        self._urgent = urgent
        self._pending: deque[Request] | None = None
        self._file = -1

    def head(self) -> Request | None:
        """The oldest request."""
        while self.segments:
            if self._pending is None:
                self._pending = self._load(self.segments[0])
            if self._pending:
                return self._pending[0]
            self._remove_oldest()
        return None

    def pop(self, request: Request) -> None:
        """The request was delivered. Does nothing if it is not the oldest any more."""
        if self._pending and self._pending[0] is request:
            self._pending.popleft()
            if not self._pending:
                self._remove_oldest()

    def drop_oldest(self) -> None:
        """Give a segment up."""
        segment = self.segments[0]
        pending = self._load(segment) if self._pending is None else self._pending
        self.lost += sum(request.items for request in pending)
        self._remove_oldest()

    def append(self, folder: Path, name: str, record: bytes, items: int, most: int) -> None:
        """Write a record to the newest segment of ``folder``, or to a new one, called ``name``.

        Raises:
            OSError: Nothing of it is left behind.
        """
        newest = self.segments[-1] if self._file >= 0 else None
        if newest is None or newest.path.parent != folder or newest.size + len(record) > most:
            self.stop_writing()
            newest = _Segment(folder / name, 0, 0)
            self._file = os.open(newest.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self.segments.append(newest)
        elif os.fstat(self._file).st_nlink == 0:
            self.stop_writing()
            raise FileNotFoundError(f"{newest.path} was removed")
        try:
            rest = memoryview(record)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, newest.size)
            self.stop_writing()
            raise
        newest.size += len(record)
        newest.items = (newest.items or 0) + items

    def stop_writing(self) -> None:
        """What comes next goes to another segment."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = -1

    def _load(self, segment: _Segment) -> deque[Request]:
        if segment is self.segments[-1]:
            self.stop_writing()
        try:
            requests, damaged = unpack(segment.path.read_bytes())
        except OSError as error:
            log.warning("cannot read what was kept in %s (%s)", segment.path, error.strerror)
            self.lost += 1 if segment.items is None else segment.items
            return deque()
        known = segment.items
        # Of a segment of our own we know what should be in it, whatever is left to be read.
        self.lost += damaged if known is None else max(0, known - sum(request.items for request in requests))
        return deque(request._replace(urgent=self._urgent) for request in requests)

    def _remove_oldest(self) -> None:
        if len(self.segments) == 1:
            self.stop_writing()
        with contextlib.suppress(OSError):
            self.segments.popleft().path.unlink(missing_ok=True)
        self._pending = None


class _Folder:
    """A folder that this process holds."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make(cls, place: Path, endpoint: str) -> _Folder:
        """A new one.

        Raises:
            OSError: It cannot be made, or cannot be locked.
        """
        _make_private(place)
        for _ in range(_TRIES):
            path = place / f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
            path.mkdir(mode=0o700)
            file = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(file, endpoint.encode())
                if os.fstat(file).st_nlink:
                    return cls(path, file)
            except BlockingIOError:
                pass
            except BaseException:
                os.close(file)
                raise
            os.close(file)
        raise BlockingIOError(f"cannot lock a folder in {place}")

    @classmethod
    def take_over(cls, path: Path) -> _Folder | None:
        """One whose process is dead; None if it lives, or somebody else was faster."""
        try:
            file = os.open(path / _LOCK, os.O_RDWR)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            return None
        if os.fstat(file).st_nlink == 0:
            os.close(file)
            return None
        return cls(path, file)

    @property
    def endpoint(self) -> str:
        """Where what lies here was to go."""
        return os.pread(self._lock, 4096, 0).decode(errors="replace")

    def segments(self) -> list[Path]:
        """Urgent ones first, then by age."""
        return sorted(self.path.glob(_PATTERN))

    def release(self) -> None:
        """Let go; the folder goes too, if it is empty."""
        with contextlib.suppress(OSError):
            if not self.segments():
                (self.path / _LOCK).unlink(missing_ok=True)
                self.path.rmdir()
        self.forget_in_child()

    def forget_in_child(self) -> None:
        """After a fork: the lock is the parent's, and must not outlive it."""
        with contextlib.suppress(OSError):
            os.close(self._lock)


class Spool:
    """Requests kept on disk. Not for several threads at once.

    Args:
        places: Folders to try, best first.
        endpoint: Where the requests are to go; what others left for another one is not touched.
        most_bytes: Bound on all segments held; past it the oldest are dropped.

    Attributes:
        urgent: Requests of this process that go first.
        normal: The others of this process.
        adopted_urgent: Requests of dead processes that go first.
        adopted: The others of dead processes.
    """

    def __init__(self, places: Sequence[Path], endpoint: str, most_bytes: int = DEFAULT_BYTES) -> None:
        self.urgent, self.normal = Lane(urgent=True), Lane(urgent=False)
        self.adopted_urgent, self.adopted = Lane(urgent=True), Lane(urgent=False)
        self._lanes = (self.urgent, self.normal, self.adopted_urgent, self.adopted)
        self._places = tuple(places)
        self._endpoint = endpoint
        self._most_bytes = most_bytes
        self._segment_bytes = min(_SEGMENT_BYTES, max(1, most_bytes // 8))
        self._folders: dict[Path, _Folder] = {}
        self._names = 0
        self._lost = 0
        self._warned: set[Path] = set()

    def append(self, request: Request) -> bool:
        """Keep a request. False: no place takes it."""
        record = pack(request)
        if len(record) > self._most_bytes:
            self._lost += request.items
            return True
        lane = self.urgent if request.urgent else self.normal
        for place in self._places:
            try:
                folder = self._folder(place)
                name = self._name(_URGENT if request.urgent else _NORMAL)
                lane.append(folder.path, name, record, request.items, self._segment_bytes)
            except OSError as error:
                self._cannot(place, error)
                continue
            self._make_room()
            return True
        return False

    def adopt(self, out_of_time: Callable[[], bool] = lambda: False) -> bool:
        """Take over what dead processes left for the same endpoint; bound what they left for others.

        False: ``out_of_time`` said so between two folders, and there are more of them.
        """
        foreign: list[tuple[int, int, Path]] = []
        for place in self._places:
            for path in _folders_by_age(place):
                dead = _Folder.take_over(path)
                if dead is None:
                    continue
                try:
                    if dead.endpoint == self._endpoint:
                        self._move_here(dead, place)
                    else:
                        sizes = [segment.stat().st_size for segment in dead.segments()]
                        foreign.append((path.stat().st_mtime_ns, sum(sizes), path))
                except OSError as error:
                    self._cannot(place, error)
                finally:
                    dead.release()
                if out_of_time():
                    self._make_room()
                    return False
        self._make_room()
        self._bound_foreign(foreign)
        return True

    def take_lost(self) -> int:
        """Items that were dropped or found damaged since the last call."""
        lost, self._lost = self._lost, 0
        for lane in self._lanes:
            lost, lane.lost = lost + lane.lost, 0
        return lost

    @property
    def size(self) -> int:
        """Bytes of all segments held."""
        return sum(segment.size for lane in self._lanes for segment in lane.segments)

    def close(self) -> None:
        """Let go of everything; what is left is for whoever comes next."""
        for lane in self._lanes:
            lane.stop_writing()
        for folder in self._folders.values():
            folder.release()
        self._folders.clear()

    def forget_in_child(self) -> None:
        """After a fork: everything is the parent's."""
        for lane in self._lanes:
            lane.stop_writing()
        for folder in self._folders.values():
            folder.forget_in_child()
        self._folders.clear()

    def _folder(self, place: Path) -> _Folder:
        folder = self._folders.get(place)
        if folder is not None and not folder.path.is_dir():
            folder.release()  # somebody tidied up
            folder = None
        if folder is None:
            folder = self._folders[place] = _Folder.make(place, self._endpoint)
        return folder

    def _name(self, urgency: str) -> str:
        self._names += 1
        return f"{urgency}-{self._names:08d}.segment"

    def _move_here(self, dead: _Folder, place: Path) -> None:
        for segment in dead.segments():
            urgency = segment.name[0]
            target = self._folder(place).path / self._name(urgency)
            segment.rename(target)
            lane = self.adopted_urgent if urgency == _URGENT else self.adopted
            lane.segments.append(_Segment(target, target.stat().st_size))

    def _make_room(self) -> None:
        too_much = self.size - self._most_bytes
        for lane in (self.adopted, self.normal, self.adopted_urgent, self.urgent):
            while too_much > 0 and lane.segments:
                too_much -= lane.segments[0].size
                lane.drop_oldest()

    def _bound_foreign(self, foreign: list[tuple[int, int, Path]]) -> None:
        """Spools for collectors that nobody talks to any more must not pile up for ever."""
        total = 0
        for _, size, path in sorted(foreign, reverse=True):
            total += size
            dead = _Folder.take_over(path) if total > self._most_bytes else None
            if dead is not None:
                for segment in dead.segments():
                    with contextlib.suppress(OSError):
                        requests, damaged = unpack(segment.read_bytes())
                        segment.unlink()
                        self._lost += damaged + sum(request.items for request in requests)
                dead.release()

    def _cannot(self, place: Path, error: OSError) -> None:
        if place not in self._warned:
            self._warned.add(place)
            log.warning(
                "cannot keep undelivered telemetry in %s (%s): %s; training goes on",
                place,
                error.strerror or error,
                "nothing but memory is left for it" if place == self._places[-1] else "trying elsewhere",
            )


class Drained(NamedTuple):
    """What ``drain`` did: requests delivered, items lost for good, and bytes that are still there."""

    delivered: int
    lost: int
    bytes_left: int


def drain(
    directory: Path,
    endpoint: str,
    headers: Mapping[str, str],
    seconds: float,
    most_bytes: int = DEFAULT_BYTES,
    clock: Callable[[], float] = time.monotonic,
) -> Drained:
    """Deliver what dead processes of this host left for a collector; what it does not take stays.

    Args:
        directory: The ``directory`` setting of the dead process.
        endpoint: Base URL of the collector.
        headers: Sent with each request.
        seconds: Bound on it all.
        most_bytes: Bound on what is kept.
        clock: Monotonic seconds.
    """
    from gradwatch.export.transport import REPLY_SECONDS, Away, Transport

    deadline = clock() + seconds
    spool = Spool(places(directory), endpoint, most_bytes)
    transport = Transport(endpoint, headers)
    delivered = lost = 0
    try:
        spool.adopt(lambda: clock() >= deadline)
        for lane, request in _heads(spool):
            left = deadline - clock()
            outcome = Away("out of time") if left <= 0 else transport.send(request, min(left, REPLY_SECONDS))
            if isinstance(outcome, Away):
                break
            lane.pop(request)
            delivered += 1
            lost += outcome.rejected
        return Drained(delivered, lost + spool.take_lost(), spool.size)
    finally:
        transport.close()
        spool.close()


def _heads(spool: Spool) -> Iterator[tuple[Lane, Request]]:
    for lane in (spool.adopted_urgent, spool.adopted):
        while (request := lane.head()) is not None:
            yield lane, request


def _folders_by_age(place: Path) -> list[Path]:
    aged = []
    with contextlib.suppress(OSError):
        _check_owner(place)
        for path in place.iterdir():
            with contextlib.suppress(OSError):
                aged.append(((path / _LOCK).stat().st_mtime_ns, path))
    return [path for _, path in sorted(aged)]


def _make_private(place: Path) -> None:
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    place.mkdir(mode=0o700, exist_ok=True)
    if _check_owner(place) & 0o077:
        place.chmod(0o700)


def _check_owner(place: Path) -> int:
    """The folder's mode. In a directory for temporary files anybody may have made it."""
    status = place.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(f"{place} is not a directory of this user")
    return status.st_mode
