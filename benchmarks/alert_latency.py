"""How long it takes from a fault in training to the page, with everything as it is shipped.

    PYTHONPATH=. python benchmarks/alert_latency.py [--times 10] [--short]

Agent, collector, Debian's Prometheus and Alertmanager, and a webhook, on loopback. What is measured takes its
place between the marks of docs/benchmarks.md; a short run brings each fault about once, and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from collection.figures import Figure, at_most, table
from collection.servers import collector
from gradwatch import conventions as c
from page import PAGE, write
from tests.collector_process import free_port
from tests.prometheus_servers import (
    Configuration,
    WebhookReceiver,
    alertmanager,
    prometheus,
    wait_for,
    webhook_receiver,
)

# What a notification may take, in seconds: of what is told, and after the limit of what is not.
_TOLD: Final = 6.0
_LOST_AFTER: Final = 30.0
_AFTER_LIMIT: Final = 10.0
_PATIENCE: Final = 120.0

# Prints the moment of its fault, and goes on until it is killed where the fault does not end it.
_TRAINING: Final = """
import sys, time
import torch
import gradwatch

fault = sys.argv[1]
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
gradwatch.watch(model, optimizer)
step = 0
while True:
    optimizer.zero_grad()
    loss = model(torch.ones(8, 4)).mean()
    if fault == "nan" and step >= 100:
        loss = loss * float("nan")
    loss.backward()
    optimizer.step()
    time.sleep(0.02)
    if fault == "nan" and step == 102:
        print(time.time(), flush=True)
    if fault != "nan" and step == 100:
        print(time.time(), flush=True)
        if fault == "raises":
            raise ValueError("planted")
    step += 1
"""


@dataclass(frozen=True, slots=True)
class Site:
    """A collector, and who is told in the end."""

    collector: str
    people: WebhookReceiver
    script: Path

    @contextmanager
    def train(self, run_id: str, fault: str) -> Iterator[subprocess.Popen[str]]:
        """Train until the block ends, or until the fault ends it."""
        clean = {name: v for name, v in os.environ.items() if not name.startswith(("GRADWATCH_", "OTEL_"))}
        told = {
            "GRADWATCH_RUN_ID": run_id,
            "GRADWATCH_TIER": c.TIER_PRODUCTION,
            "GRADWATCH_DIR": str(self.script.parent / "host"),
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.collector,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(self.script), fault]
        with subprocess.Popen(
            command, env={**clean, **told}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def paged_at(self, run_id: str, rule: str) -> float:
        """Wait for the page, and return when it came."""
        pages = wait_for(
            lambda: self.people.got("page", "firing", run_id=run_id, rule=rule), seconds=_PATIENCE, what=run_id
        )
        return pages[0].at


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="each fault is brought about")
    parser.add_argument("--short", action="store_true", help="once each, and nothing is written")
    options = parser.parse_args()
    times = 1 if options.short else options.times
    with tempfile.TemporaryDirectory() as folder, _site(Path(folder)) as site:
        found = [
            _figure("an error ends the run", _TOLD, _told(site, "raises", c.RULE_RUN_FAILED, times)),
            _figure("every step is bad", _TOLD, _told(site, "nan", c.RULE_NONFINITE, times)),
            _figure("the process is killed", _LOST_AFTER + _AFTER_LIMIT, _lost(site, times)),
        ]
    about = f"{datetime.now(UTC):%Y-%m-%d}: {_version('prometheus')}, {_version('prometheus-alertmanager')}."
    print(f"{about}\n\n{table(found)}")
    if not options.short:
        write(PAGE, {"alert latency": f"{about}\n\n{table(found)}"})
    return 0


@contextmanager
def _site(folder: Path) -> Iterator[Site]:
    script = folder / "train.py"
    script.write_text(_TRAINING, encoding="utf-8")
    listen = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        serving = stack.enter_context(collector(f"sqlite:///{folder}/gradwatch.db"))
        people = stack.enter_context(webhook_receiver())
        configuration = Configuration.shipped(
            folder,
            collector=serving.address.removeprefix("http://"),
            alertmanager=listen,
            webhook=people.url,
        )
        stack.enter_context(alertmanager(configuration, folder, listen))
        server = stack.enter_context(prometheus(configuration, folder))
        server.wait_for_alertmanager()
        yield Site(serving.address, people, script)


def _told(site: Site, fault: str, rule: str, times: int) -> list[float]:
    """Return the seconds from what the run tells of itself to the page, each run after the one before."""
    found = []
    for number in range(times):
        run_id = f"{fault}-{number}"
        with site.train(run_id, fault) as process:
            found.append(site.paged_at(run_id, rule) - _moment(process))
        print(f"{run_id}: {found[-1]:.1f} s", file=sys.stderr)
    return found


def _lost(site: Site, times: int) -> list[float]:
    """Return the seconds from a kill to the page.

    Five that fall silent within ten seconds are an outage, and each starts for longer than two.
    """
    killed = {}
    for number in range(times):
        run_id = f"killed-{number}"
        with site.train(run_id, "killed") as process:
            _moment(process)
            time.sleep(2)
            process.kill()
            killed[run_id] = time.time()
    return [site.paged_at(run_id, c.RULE_RUN_LOST) - at for run_id, at in killed.items()]


def _moment(process: subprocess.Popen[str]) -> float:
    assert process.stdout is not None
    return float(process.stdout.readline())


def _figure(what: str, most: float, seconds: Sequence[float]) -> Figure:
    note = f" (median of {len(seconds)}; longest {max(seconds):.1f} s)"
    return at_most(what, most, statistics.median(seconds), " s", note)


def _version(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return " ".join((said.stdout or said.stderr).split()[:3]).replace(",", "")


if __name__ == "__main__":
    sys.exit(main())
