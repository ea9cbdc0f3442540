"""How long collective operations take: DDP's own figures, and on request the calls of ``torch.distributed``."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from gradwatch import conventions
from gradwatch.export.aggregate import LayerAggregate
from gradwatch.measures.stopwatch import Stopwatch
from gradwatch.safety import internal_error
from gradwatch.telemetry import HistogramPoint, MetricPoints

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

# All of torch's that move tensors between all ranks of a group. `batch_isend_irecv` compares functions by
# identity, so point-to-point calls are left alone.
OPERATIONS: Final = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_reduce_coalesced",
    "all_to_all", "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather",
    "gather_object", "monitored_barrier", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
    "scatter_object_list",
)  # fmt: skip

# Durations waiting for the export thread, and marks waiting for a device.
_WAITING: Final = 100_000
_IN_FLIGHT: Final = 256


class CollectiveTimes:
    """Durations by operation: added on the training thread, aggregated on the export thread.

    Args:
        start: When the first interval began, in Unix nanoseconds.
    """

    def __init__(self, start: int) -> None:
        self._durations: deque[tuple[str, float]] = deque(maxlen=_WAITING)
        self._start = start

    def add(self, operation: str, seconds: float) -> None:
        """One operation took so long."""
        self._durations.append((operation, seconds))

    def points(self, now: int, pace: Callable[[], None] = lambda: None) -> MetricPoints:
        """Histograms of what was added since the last call, up to ``now`` (Unix nanoseconds)."""
        by_operation: dict[str, LayerAggregate] = {}
        while self._durations:
            operation, seconds = self._durations.popleft()
            by_operation.setdefault(operation, LayerAggregate()).add(seconds)
            pace()
        start, self._start = self._start, now
        points: list[HistogramPoint] = []
        for operation, aggregate in by_operation.items():
            point = aggregate.point(start, now, {conventions.COLLECTIVE: operation})
            if point is not None:
                points.append(point)
        return MetricPoints(conventions.COLLECTIVE_DURATION, points)


class DdpTimes:
    """Reads DDP's own figures: the communication of one backward, and its part that computation did not hide.

    DDP takes them in its first ten iterations and in every hundredth after. Read on the training thread between
    steps: during backward DDP holds their lock, and while a peer hangs it holds it for ever.
    """

    def __init__(self, times: CollectiveTimes) -> None:
        self._times = times
        self._last: dict[int, int] = {}

    def read(self, models: Sequence[nn.Module]) -> None:
        """Add what is new."""
        for ddp in (one for model in models for one in _ddp_inside(model)):
            data = ddp._get_ddp_logging_data()  # type: ignore[no-untyped-call] # noqa: SLF001 - documented, not public
            communication = int(data.get("backward_comm_time", 0))
            iteration = int(data.get("iteration", 0))
            if communication > 0 and self._last.get(id(ddp)) != iteration:
                self._last[id(ddp)] = iteration
                hidden = int(data.get("backward_compute_comm_overlap_time", 0))
                self._times.add(conventions.DDP_ALL_REDUCE, communication / 1e9)
                self._times.add(conventions.DDP_EXPOSED, max(0, communication - hidden) / 1e9)


def _ddp_inside(model: nn.Module) -> Iterator[DistributedDataParallel]:
    if torch.distributed.is_available():
        from torch.nn.parallel import DistributedDataParallel

        # DDP wraps whole models, perhaps below `torch.compile`'s wrapper; nobody searches a large one for it.
        for candidate in (model, getattr(model, "_orig_mod", None)):
            if isinstance(candidate, DistributedDataParallel):
                yield candidate


class CollectiveCalls:
    """Wraps the collective calls of ``torch.distributed`` while installed, where they are looked up.

    Time is what the caller's stream sees: on the CPU from the call to its return, or to the return of
    ``wait()`` of an asynchronous one; on a device the same between events in its current stream. Functions
    imported by name before are not seen; of calls inside calls the outermost counts.

    Attributes:
        thread: The one that trains; other threads' calls are their own business.
    """

    def __init__(self, times: CollectiveTimes, stopwatch: Callable[[Any], Stopwatch]) -> None:
        self._times = times
        self._stopwatch = stopwatch
        self.thread = get_ident()
        self._inside = False
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        # id of a handle -> (itself, operation, stopwatch, start). Weak: a handle may be dropped without a wait.
        self._handles: dict[int, tuple[weakref.ref[Any], str, Stopwatch, Any]] = {}
        self._in_flight: deque[tuple[str, Stopwatch, Any, Any]] = deque()

    def install(self) -> None:
        """Put the wrappers in place; nothing where torch has no distributed package."""
        if not torch.distributed.is_available():
            return
        from torch.distributed import distributed_c10d

        for name in OPERATIONS:
            original = getattr(distributed_c10d, name, None)
            if original is not None:
                wrapper = self._wrap(name, original)
                for owner in (distributed_c10d, torch.distributed):
                    if getattr(owner, name, None) is original:
                        self._replace(owner, name, original, wrapper)
        work = distributed_c10d.Work
        self._replace(work, "wait", work.wait, self._wrap_wait(work.wait))

    def remove(self) -> None:
        """Put torch's functions back, unless somebody wrapped ours."""
        for owner, name, original, wrapper in self._replaced:
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)
        self._replaced.clear()
        self._handles.clear()

    def drain(self) -> None:
        """Count what has passed. Training thread only."""
        while self._in_flight and self._in_flight[0][1].passed(self._in_flight[0][3]):
            operation, stopwatch, start, end = self._in_flight.popleft()
            self._times.add(operation, stopwatch.between(start, end))
            stopwatch.reuse((start, end))

    def _replace(self, owner: Any, name: str, original: Any, wrapper: Any) -> None:
        self._replaced.append((owner, name, original, wrapper))
        setattr(owner, name, wrapper)

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or self._inside or get_ident() != self.thread:
                return original(*args, **kwargs)
            self._inside = True
            begun = self._begin((*args, *kwargs.values()))
            try:
                result = original(*args, **kwargs)
            finally:
                self._inside = False
            if begun is not None:
                self._end(name, *begun, result)
            return result

        return collective

    def _wrap_wait(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(work, *args, **kwargs)
            known = self._handles.pop(id(work), None)
            if known is not None and known[0]() is work:
                self._end(known[1], known[2], known[3], None)
            return result

        return wait

    def _begin(self, args: tuple[Any, ...]) -> tuple[Stopwatch, Any] | None:
        try:
            stopwatch = self._stopwatch(_device_of(args))
            mark = stopwatch.mark()
        except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
            internal_error(error, "collective")
            return None
        return None if mark is None else (stopwatch, mark)

    def _end(self, name: str, stopwatch: Stopwatch, start: Any, result: Any) -> None:
        try:
            if isinstance(result, torch.distributed.Work):
                if len(self._handles) > _IN_FLIGHT:  # begun and never waited for
                    self._handles.clear()
                self._handles[id(result)] = (weakref.ref(result), name, stopwatch, start)
                return
            end = stopwatch.mark()
            if end is not None and len(self._in_flight) < _IN_FLIGHT:
                self._in_flight.append((name, stopwatch, start, end))
                self.drain()
        except Exception as error:  # noqa: BLE001
            internal_error(error, "collective")


def _device_of(args: Sequence[Any]) -> torch.device | None:
    for arg in args:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if isinstance(first, torch.Tensor):
            return first.device
    return None
