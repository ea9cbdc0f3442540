"""Build the Grafana dashboards; every name comes from ``gradwatch.conventions``.

python dashboards/build.py            writes grafana/*.json beside this file
python dashboards/build.py --check    fails when a committed file is not what this builds

`gradwatch dashboards export` points their links at your own collector and runbooks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from debug import DEBUG_DASHBOARD
from executive import EXECUTIVE_DASHBOARD
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from oncall import ON_CALL_DASHBOARD
from panels import Dashboard, build
from run import RUN_DASHBOARD

FOLDER: Final = Path(__file__).parent / "grafana"
DASHBOARDS: Final = (EXECUTIVE_DASHBOARD, ON_CALL_DASHBOARD, DEBUG_DASHBOARD, RUN_DASHBOARD)


def render(spec: Dashboard) -> str:
    """The dashboard as Grafana's JSON."""
    return JSONEncoder(sort_keys=True, indent=2).encode(build(spec)) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the dashboards, or with ``--check`` compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the Grafana dashboards.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write or compare")
    parser.add_argument("--check", action="store_true", help="fail when a file differs, and write nothing")
    options = parser.parse_args(arguments)
    texts = {options.output / f"{spec.uid}.json": render(spec) for spec in DASHBOARDS}
    if options.check:
        stale = [path for path, text in texts.items() if not path.is_file() or path.read_text("utf-8") != text]
        for path in stale:
            print(f"{path} is out of date: run python dashboards/build.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
