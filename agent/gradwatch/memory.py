"""Memory and load of the process and its devices, read in the export thread; absent where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from gradwatch import conventions
from gradwatch.conventions import Metric
from gradwatch.safety import shielded
from gradwatch.telemetry import MetricPoints, Point

Reading = tuple[Metric, float | int, str | None]


def memory_points(time: int) -> list[MetricPoints]:
    """Everything known now, as gauges at ``time`` (Unix nanoseconds)."""
    readings: dict[str, tuple[Metric, list[Point]]] = {}
    for metric, value, device in (*_process(), *_devices()):
        attributes = {conventions.DEVICE: device} if device else {}
        readings.setdefault(metric.name, (metric, []))[1].append(Point(time, value, attributes))
    return [MetricPoints(metric, points) for metric, points in readings.values()]


@shielded(())
def _process() -> tuple[Reading, ...]:
    return (
        (conventions.PROCESS_MEMORY, psutil.Process().memory_info().rss, None),
        (conventions.HOST_MEMORY_LIMIT, _host_limit(), None),
    )


@lru_cache(maxsize=1)
def _host_limit() -> int:
    total = int(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return total


@shielded(())
def _devices() -> tuple[Reading, ...]:
    # Asking a CUDA that training has not started would create a context, hundreds of megabytes, in our name.
    if not (torch.cuda.is_available() and _is_cuda_started()):
        return ()
    return tuple(reading for index in range(torch.cuda.device_count()) for reading in _device(index))


def _is_cuda_started() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call] # torch


def _device(index: int) -> Iterator[Reading]:
    name = f"cuda:{index}"
    reserved = torch.cuda.memory_reserved(index)
    if reserved:
        yield conventions.DEVICE_MEMORY_ALLOCATED, torch.cuda.memory_allocated(index), name
        yield conventions.DEVICE_MEMORY_RESERVED, reserved, name
        yield conventions.DEVICE_MEMORY_PEAK, torch.cuda.max_memory_reserved(index), name
        yield conventions.DEVICE_MEMORY_LIMIT, torch.cuda.get_device_properties(index).total_memory, name
    handle = _nvml_handle(index)
    if handle is not None:
        yield from _nvml(handle, name)


@lru_cache(maxsize=64)
def _nvml_handle(index: int) -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
        # By UUID: CUDA's numbering follows CUDA_VISIBLE_DEVICES, NVML's does not.
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    except Exception:  # noqa: BLE001 - NVML's errors share no base with a missing module; all mean "not here"
        return None


@shielded(())
def _nvml(handle: Any, name: str) -> tuple[Reading, ...]:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return (
        (conventions.HW_GPU_UTILIZATION, pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100, name),
        (conventions.HW_GPU_MEMORY_USAGE, int(memory.used), name),
        (conventions.HW_GPU_MEMORY_LIMIT, int(memory.total), name),
        (conventions.HW_POWER, pynvml.nvmlDeviceGetPowerUsage(handle) / 1000, name),
    )
