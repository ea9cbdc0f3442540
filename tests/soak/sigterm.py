"""How much longer SIGTERM takes to kill what is watched, in the middle of a kernel that takes seconds.

A process trains, then multiplies large matrices; SIGTERM comes somewhere in there. Watched and bare ones take
turns, and a collector listens. What is asked for is no more than 0.2 s.

    python -m tests.soak.sigterm [--deaths 50]
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gradwatch_collector.storage import database as db
from tests.collector_process import Collector, collector, train

_LONGEST: float = 0.2
_SCRIPT: str = """
import sys
import torch
from torch import nn

torch.set_num_threads(1)
model = nn.Linear(8, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
if {watched}:
    import gradwatch
    gradwatch.watch(model, optimizer, job="sigterm")
for _ in range(20):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
large = torch.ones(8000, 8000)
print("ready", flush=True)
large @ large
print("finished", flush=True)
"""


def death(script: Path, running: Collector) -> float:
    """Seconds from SIGTERM in the middle of the kernel until the process is gone."""
    with train(script, running) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(random.uniform(0.5, 1.0))
            began = time.monotonic()
            process.terminate()
            code = process.wait(60)
            seconds = time.monotonic() - began
            assert (code, process.stdout.read()) == (-signal.SIGTERM, ""), "the kernel was over before"
        finally:
            process.kill()
    return seconds


def deaths(folder: Path, count: int) -> dict[bool, list[float]]:
    """So many of each kind, ``True`` for watched ones."""
    url = f"sqlite:///{folder}/gradwatch.db"
    engine = db.connect(url)
    db.upgrade(engine)
    engine.dispose()
    taken: dict[bool, list[float]] = {False: [], True: []}
    with collector(url) as running:
        for _ in range(count):
            for watched, seconds in taken.items():
                script = folder / f"{watched}.py"
                script.write_text(_SCRIPT.format(watched=watched))
                seconds.append(death(script, running))
        standing = [run["status"] for run in running.runs().values()]
    assert standing == ["cancelled"] * count, standing
    return taken


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the distribution; 1 if a death was delayed by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=int, default=50)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        taken = deaths(Path(folder), options.deaths)
    for watched, seconds in taken.items():
        quantiles = statistics.quantiles(seconds, n=20, method="inclusive")
        print(
            f"{'watched' if watched else 'bare   '}  median {statistics.median(seconds):.3f} s, "
            f"95 % {quantiles[-1]:.3f} s, longest {max(seconds):.3f} s"
        )
    delay = max(taken[True]) - statistics.median(taken[False])
    print(f"delayed by at most {delay:.3f} s, of {options.deaths}; {_LONGEST} s are allowed")
    return 0 if delay <= _LONGEST else 1


if __name__ == "__main__":
    sys.exit(main())
