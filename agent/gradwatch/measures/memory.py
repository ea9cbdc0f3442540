"""Memory and load of the process and its devices, read in the export thread; absent where there is none."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

import psutil
import torch

from gradwatch import conventions
from gradwatch.conventions import Metric
from gradwatch.safety import shielded
from gradwatch.telemetry import MetricPoints, Point

_CGROUPS: Final = Path("/sys/fs/cgroup")
Reading = tuple[Metric, float | int, str | None]


def memory_points(time: int) -> list[MetricPoints]:
    """Everything known now, as gauges at ``time`` (Unix nanoseconds)."""
    readings: dict[str, tuple[Metric, list[Point]]] = {}
    for metric, value, device in (*_process(), *(_devices() or _host())):
        attributes = {conventions.DEVICE: device} if device else {}
        readings.setdefault(metric.name, (metric, []))[1].append(Point(time, value, attributes))
    return [MetricPoints(metric, points) for metric, points in readings.values()]


@shielded(())
def _process() -> tuple[Reading, ...]:
    return (
        (conventions.PROCESS_MEMORY, psutil.Process().memory_info().rss, None),
        (conventions.HOST_MEMORY_LIMIT, _host_limit(), None),
    )


@shielded(())
def _host() -> tuple[Reading, ...]:
    """Headroom where training runs on the CPU: the host's limit against the process's peak."""
    peak, limit = process_peak(), _host_limit()
    return () if peak is None else ((conventions.DEVICE_MEMORY_HEADROOM, (limit - peak) / limit, "cpu"),)


def process_peak() -> int | None:
    """Peak resident bytes of this process; None where the system does not say.

    ``getrusage`` also remembers what was resident before ``exec``, that is, the launcher's memory.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


@lru_cache(maxsize=1)
def _host_limit() -> int:
    return min([int(psutil.virtual_memory().total), *cgroup_limits(Path("/proc/self/cgroup"), _CGROUPS)])


def cgroup_limits(membership: Path, mount: Path) -> Iterator[int]:
    """Memory limits in bytes of the cgroup and of all above it, of both versions: the lowest counts.

    In a container the process's path may be the host's, of which nothing is there but the container's own root.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folder, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        below = itertools.takewhile(lambda part: part != "..", PurePosixPath(path).parts[1:])
        for place in itertools.accumulate(below, operator.truediv, initial=folder):
            try:
                yield int((place / name).read_text())
            except (OSError, ValueError):
                continue  # no such file, or "max"


@shielded(())
def _devices() -> tuple[Reading, ...]:
    # Asking a CUDA that training has not started would create a context, hundreds of megabytes, in our name.
    if not (torch.cuda.is_available() and is_cuda_started()):
        return ()
    found: list[Reading] = []
    names: dict[str, str] = {}
    for index in range(torch.cuda.device_count()):
        name, properties = f"cuda:{index}", torch.cuda.get_device_properties(index)
        names[str(properties.uuid)] = name
        found += allocator_readings(
            name,
            allocated=torch.cuda.memory_allocated(index),
            reserved=torch.cuda.memory_reserved(index),
            peak=torch.cuda.max_memory_reserved(index),
            limit=properties.total_memory,
        )
    return (*found, *_nvml.readings(names))


def is_cuda_started() -> bool:
    """Return whether training has started CUDA in this process."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call] # torch


def allocator_readings(
    device: str, *, allocated: int, reserved: int, peak: int, limit: int
) -> tuple[Reading, ...]:
    """What torch's caching allocator holds, in bytes; nothing of a device that this process does not use."""
    if not reserved:
        return ()
    return (
        (conventions.DEVICE_MEMORY_ALLOCATED, allocated, device),
        (conventions.DEVICE_MEMORY_RESERVED, reserved, device),
        (conventions.DEVICE_MEMORY_PEAK, peak, device),
        (conventions.DEVICE_MEMORY_LIMIT, limit, device),
        (conventions.DEVICE_MEMORY_FRAGMENTATION, (reserved - allocated) / reserved, device),
        (conventions.DEVICE_MEMORY_HEADROOM, (limit - peak) / limit, device),
    )


# Each is asked alone: a MIG slice has memory but no utilisation or power, and some cards refuse others.
_NVML_READINGS: Final[tuple[tuple[Metric, Callable[[Any, Any], float | int]], ...]] = (
    (conventions.HW_GPU_UTILIZATION, lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100),
    (conventions.HW_GPU_MEMORY_USAGE, lambda nvml, gpu: int(nvml.nvmlDeviceGetMemoryInfo(gpu).used)),
    (conventions.HW_GPU_MEMORY_LIMIT, lambda nvml, gpu: int(nvml.nvmlDeviceGetMemoryInfo(gpu).total)),
    (conventions.HW_POWER, lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
    (
        conventions.HW_TEMPERATURE,
        lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    ),
)


class NvmlThread:
    """Asks NVML on a thread of its own: a driver that hangs must not take the signs of life with it.

    What it tells is what the last round found, one export interval old, or nothing while a round hangs.
    """

    def __init__(self) -> None:
        self._names: Mapping[str, str] = {}
        self._found: tuple[Reading, ...] = ()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def readings(self, names: Mapping[str, str]) -> tuple[Reading, ...]:
        """What was found since the last call. ``names``: of the devices to ask about, by UUID."""
        self._names = names
        if self._thread is None or not self._thread.is_alive():  # the first call, or the first after a fork
            self._thread = threading.Thread(target=self._run, name="gradwatch-nvml", daemon=True)
            self._thread.start()
        found, self._found = self._found, ()
        self._wake.set()
        return found

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            self._found = self._round()

    @shielded(())
    def _round(self) -> tuple[Reading, ...]:
        return tuple(
            reading for uuid, name in dict(self._names).items() for reading in nvml_readings(uuid, name)
        )


_nvml: Final = NvmlThread()


def nvml_readings(uuid: str, device: str) -> Iterator[Reading]:
    """What NVML says about the GPU or MIG slice with this UUID, as far as it says anything."""
    handle = _nvml_handle(uuid)
    if handle is None:
        return
    import pynvml

    for metric, read in _NVML_READINGS:
        try:
            value = read(pynvml, handle)
        except pynvml.NVMLError:
            continue  # not supported on this device, or not permitted to this user
        yield metric, value, device


@lru_cache(maxsize=64)
def _nvml_handle(uuid: str) -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - NVML's errors share no base with a missing module; all mean "not here"
        return None
    # By UUID: CUDA's numbering follows CUDA_VISIBLE_DEVICES, NVML's does not.
    for prefix in ("GPU", "MIG"):
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(f"{prefix}-{uuid}")
        except pynvml.NVMLError:
            continue
    return None
