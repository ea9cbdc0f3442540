"""Memory and load: of the process for real, of devices through NVML's interface (there is no device here)."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from gradwatch import conventions as names
from gradwatch.identity import Identity, resource_attributes
from gradwatch.measures.memory import (
    allocator_readings,
    cgroup_limits,
    memory_points,
    nvml_readings,
    process_peak,
)
from gradwatch.settings import Settings


class NVMLError(Exception):
    pass


class FakeNvml(ModuleType):
    """pynvml's functions over a table of devices; a reading that is missing raises, as NVML does."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, devices: dict[str, dict[str, Any]], starts: bool = True) -> None:
        super().__init__("pynvml")
        self._devices = devices
        self._starts = starts

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        if not self._starts:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, name: str) -> dict[str, Any]:  # noqa: N802
        if name not in self._devices:
            raise NVMLError("Not Found")
        return self._devices[name]

    def __getattr__(self, name: str) -> Any:
        def read(handle: dict[str, Any], *_which: int) -> Any:
            if name not in handle:
                raise NVMLError("Not Supported")
            return handle[name]

        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)
        return read


MEMORY = {"nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3 * 2**30, total=80 * 2**30)}
WHOLE = {
    **MEMORY,
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=73),
    "nvmlDeviceGetPowerUsage": 312_500,
    "nvmlDeviceGetTemperature": 61,
}


def readings(
    monkeypatch: pytest.MonkeyPatch, prefix: str, device: dict[str, Any], starts: bool = True
) -> dict[str, float | int]:
    name = str(uuid.uuid4())
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml({f"{prefix}-{name}": device}, starts))
    found = list(nvml_readings(name, "cuda:0"))
    assert all(device == "cuda:0" for _, _, device in found)
    return {metric.name: value for metric, value, _ in found}


def test_a_gpu_reports_load_memory_power_and_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    assert readings(monkeypatch, "GPU", WHOLE) == {
        "hw.gpu.utilization": 0.73,
        "hw.gpu.memory.usage": 3 * 2**30,
        "hw.gpu.memory.limit": 80 * 2**30,
        "hw.power": 312.5,
        "hw.temperature": 61,
    }


@pytest.mark.parametrize("missing", sorted(WHOLE))
def test_one_reading_that_is_missing_loses_no_other(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    lost = {"nvmlDeviceGetMemoryInfo": 2}.get(missing, 1)
    device = {name: value for name, value in WHOLE.items() if name != missing}
    assert len(readings(monkeypatch, "GPU", device)) == 5 - lost


def test_a_mig_slice_has_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(readings(monkeypatch, "MIG", MEMORY)) == {"hw.gpu.memory.usage", "hw.gpu.memory.limit"}


def test_without_a_driver_or_nvml_there_is_nothing_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    assert readings(monkeypatch, "GPU", WHOLE, starts=False) == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert list(nvml_readings("nobody", "cuda:0")) == []


GIB = 2**30


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/slice/job/step", {"slice/job/memory.max": 4 * GIB, "slice/memory.max": 8 * GIB}, 4 * GIB),
        ("0::/slice/job", {"slice/memory.max": 2 * GIB, "slice/job/memory.max": 8 * GIB}, 2 * GIB),
        ("0::/slice/job", {"slice/memory.max": "max", "slice/job/memory.max": "max"}, None),
        ("0::/", {"memory.max": 3 * GIB}, 3 * GIB),
        ("0::/host/path/of/container", {"memory.max": 3 * GIB}, 3 * GIB),
        ("0::/../../sibling", {"memory.max": 3 * GIB, "sibling/memory.max": 1}, 3 * GIB),
        ("0::/elsewhere", {"slice/memory.max": 1}, None),
        (
            "5:cpu,cpuacct:/a\n4:memory:/slurm/job\n0::/b",
            {"memory/slurm/memory.limit_in_bytes": GIB, "memory/memory.limit_in_bytes": 2**63 - 4096},
            GIB,
        ),
    ],
)
def test_the_lowest_limit_on_the_way_up_counts(
    tmp_path: Path, membership: str, limits: dict[str, object], expected: int | None
) -> None:
    (tmp_path / "membership").write_text(membership + "\n")
    for name, limit in limits.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    assert min(cgroup_limits(tmp_path / "membership", tmp_path / "cgroup"), default=None) == expected


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert list(cgroup_limits(tmp_path / "nothing", tmp_path)) == []


def test_fragmentation_and_headroom_are_shares_of_what_is_held_and_of_the_device() -> None:
    found = {
        metric.name: value
        for metric, value, _ in allocator_readings("cuda:1", allocated=6, reserved=8, peak=10, limit=16)
    }
    assert found[names.DEVICE_MEMORY_FRAGMENTATION.name] == 0.25
    assert found[names.DEVICE_MEMORY_HEADROOM.name] == 0.375
    assert (found[names.DEVICE_MEMORY_PEAK.name], found[names.DEVICE_MEMORY_LIMIT.name]) == (10, 16)
    assert allocator_readings("cuda:2", allocated=0, reserved=0, peak=0, limit=16) == ()


def test_the_peak_remembers_what_was_given_back() -> None:
    before = psutil.Process().memory_info().rss
    block = bytearray(b"x") * (128 * 2**20)
    del block
    peak = process_peak()
    assert peak is not None
    assert peak > before + 100 * 2**20


def test_on_the_cpu_headroom_is_the_host_s_limit_against_the_peak() -> None:
    points = {batch.metric.name: batch.points[0] for batch in memory_points(5)}
    headroom = points[names.DEVICE_MEMORY_HEADROOM.name]
    limit = points[names.HOST_MEMORY_LIMIT.name].value  # type: ignore[union-attr]
    peak = process_peak()
    assert peak is not None
    assert headroom.attributes == {names.DEVICE: "cpu"}
    assert headroom.time == 5
    assert headroom.value == pytest.approx((limit - peak) / limit, abs=0.01)  # type: ignore[union-attr]


@pytest.mark.parametrize(("is_started", "expected"), [(False, None), (True, "NVIDIA H200")])
def test_a_device_is_named_where_training_has_started_cuda_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, is_started: bool, expected: str | None
) -> None:
    # No machine without a GPU has these.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_started)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    identity = Identity(run_id="run", attempt=None, rank=0, world_size=1, instance="one")
    assert resource_attributes(Settings.resolve({}), identity, None).get(names.DEVICE_NAME) == expected
