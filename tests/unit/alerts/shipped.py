"""What `alerts/` holds, and the tools that judge it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ALERTS = Path(__file__).parents[3] / "alerts"
RULES = ALERTS / "rules" / "gradwatch.rules.yaml"
ALERTMANAGER = ALERTS / "alertmanager.yaml"
RUNBOOKS = ALERTS / "runbooks"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def all_rules() -> list[dict[str, Any]]:
    return [rule for group in load(RULES)["groups"] for rule in group["rules"]]


ALERT_NAMES = sorted({rule["alert"] for rule in all_rules()})


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    tool = str(command[0])
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (Debian packages prometheus and prometheus-alertmanager)")
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)


def assert_passes(*command: str | Path) -> None:
    result = run(*command)
    assert result.returncode == 0, result.stdout + result.stderr


def build(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, ALERTS / "build.py", *arguments)
