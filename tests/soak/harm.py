"""How much longer training takes where its collector misbehaves: bare and watched blocks in turn.

For each receiver that misbehaves: the median ratio of the time of a watched block to that of the bare block
beside it, and how long `close()` took, which has its own bound.

    python -m tests.soak.harm [--rounds 12] [--seconds 1.0] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import gradwatch
from tests.faulty_servers import RECEIVERS

# Added wall time that counts as none, and the default bound of `close()` with some room to be scheduled.
_ALLOWED = 1.02
_EXIT_SECONDS = 2.5


@dataclass(frozen=True)
class Figures:
    """Ratio of watched to bare blocks, the same of bare to bare, and seconds that `close()` took at most."""

    ratio: float
    control: float
    exit_seconds: float

    @property
    def is_met(self) -> bool:
        """Whether training was not harmed, as far as the method can tell."""
        return self.ratio <= _ALLOWED + abs(self.control - 1) and self.exit_seconds <= _EXIT_SECONDS


class Loop:
    """Training of a network whose step takes some 5 ms."""

    def __init__(self) -> None:
        self.model = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(8)])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.inputs = torch.randn(128, 256)

    def block(self, steps: int) -> float:
        """Seconds that so many steps take."""
        start = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(self.inputs).square().mean().backward()
            self.optimizer.step()
        return time.perf_counter() - start


def harm(
    receiver: Callable[[], AbstractContextManager[str]], folder: Path, rounds: int, seconds: float
) -> Figures:
    """Measure one receiver. A watch lives for one block: it begins and ends outside of what is timed."""
    loop = Loop()
    loop.block(50)
    steps = max(1, round(seconds / (loop.block(50) / 50)))
    ratios, controls, exits = [], [], []
    with receiver() as endpoint:
        for _ in range(rounds):
            bare = loop.block(steps)
            watch = gradwatch.watch(
                loop.model, loop.optimizer, endpoint=endpoint, directory=folder, export_interval=seconds / 2
            )
            loop.block(20)  # the first steps are all looked at
            watched = loop.block(steps)
            start = time.perf_counter()
            watch.close()
            exits.append(time.perf_counter() - start)
            again = loop.block(steps)
            ratios.append(2 * watched / (bare + again))
            controls.append(again / bare)
    return Figures(statistics.median(ratios), statistics.median(controls), max(exits))


def main() -> None:
    """Print a line for each receiver; exit with 1 if one does harm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a block")
    parser.add_argument("--only", nargs="*", choices=list(RECEIVERS), metavar="NAME", default=list(RECEIVERS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    print(f"{'receiver':32} {'watched/bare':>12} {'bare/bare':>10} {'close()':>8}")
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            seen = harm(RECEIVERS[name], Path(folder), options.rounds, options.seconds)
        failed |= not seen.is_met
        verdict = "" if seen.is_met else "  TOO MUCH"
        print(
            f"{name:32} {seen.ratio:12.4f} {seen.control:10.4f} {seen.exit_seconds:6.2f} s{verdict}", flush=True
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
