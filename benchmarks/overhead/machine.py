"""Where figures come from: date, machine and versions."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import gradwatch


def machine(device: str) -> str:
    """Date, machine and versions, in one sentence."""
    load = f", load {os.getloadavg()[0]:.2f} at the start" if hasattr(os, "getloadavg") else ""
    card = f", {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if device == "cuda" else ""
    packages = [f"{name} {found}" for name in ("wandb", "tensorboard") if (found := _version(name))]
    return (
        f"{time.strftime('%Y-%m-%d')}: {_processor()}, {os.cpu_count()} cores, {platform.system()} "
        f"{platform.release()}{load}{card}; "
        + ", ".join(
            [
                f"gradwatch {_commit()}",
                f"Python {platform.python_version()}",
                f"torch {torch.__version__}",
                *packages,
            ]
        )
        + "."
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the gradwatch that is imported, else its version."""
    folder = Path(gradwatch.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return described.stdout.strip() or _version("gradwatch") or "of no version"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
