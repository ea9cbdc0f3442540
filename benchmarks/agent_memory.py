"""Memory and import time: what watching adds to a process, and whether it grows.

    python benchmarks/agent_memory.py [--steps 100000] [--model mlp] [--device cuda] [--json FILE]

Two child processes run the same loop, one of them watched with default settings and exporting to a receiver
in a third; each reads its resident memory 200 times. The slope is Theil and Sen's over the second half of the
steps. ``import gradwatch`` is timed in fresh interpreters, in turn with ``pass``. With ``--device cuda`` also
the device memory taken for a model of 1000 tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

MIB = 2**20
SAMPLES = 200
IMPORTS = 20
# What was asked: MiB above the bare loop, seconds to import, MiB of a device for 1000 tensors.
RESIDENT_MIB, IMPORT_SECONDS, DEVICE_MIB = 40, 0.150, 1


@dataclass(frozen=True)
class Memory:
    """Resident bytes of one process at some steps, and the most it ever had."""

    steps: list[int]
    resident: list[int]
    peak: int

    @property
    def late(self) -> float:
        """Median over the last tenth, bytes."""
        return statistics.median(self.resident[-max(1, len(self.resident) // 10) :])

    @property
    def slope(self) -> float:
        """Bytes a step over the second half: the median slope between all pairs of readings."""
        points = list(zip(self.steps, self.resident, strict=True))[len(self.steps) // 2 :]
        return statistics.median((b - a) / (n - m) for (m, a), (n, b) in combinations(points, 2))


def main() -> int:
    """Measure and print."""
    arguments = _arguments()
    if arguments.child is not None:
        print(json.dumps(dataclasses.asdict(_loop(arguments))))
        return 0
    from overhead.report import machine
    from overhead.sink import running_sink

    with running_sink() as sink:
        bare, watched = (
            _child(arguments, endpoint, f"{arguments.steps} steps, {name}")
            for endpoint, name in (("", "no hook"), (sink.endpoint, "watched"))
        )
    bare_import, ours = _import_seconds()
    extra = (watched.late - bare.late) / MIB
    growth = watched.slope - bare.slope
    rows = [
        ("resident memory, no hook", f"{bare.late / MIB:.1f} MiB", "", ""),
        ("resident memory, watched", f"{watched.late / MIB:.1f} MiB", "", ""),
        (
            "above the bare loop",
            f"{extra:.1f} MiB",
            f"{RESIDENT_MIB} MiB or less",
            _verdict(extra <= RESIDENT_MIB),
        ),
        ("peaks, no hook and watched", f"{bare.peak / MIB:.1f} and {watched.peak / MIB:.1f} MiB", "", ""),
        ("slope over the second half, no hook", f"{bare.slope * 1000 / 1024:+.3f} KiB in 1000 steps", "", ""),
        (
            "slope over the second half, watched",
            f"{watched.slope * 1000 / 1024:+.3f} KiB in 1000 steps",
            "flat: 1 MiB or less above the bare loop's in 100 000 steps",
            _verdict(growth * 100_000 <= MIB),
        ),
        (
            f"`import gradwatch`, median of {IMPORTS}",
            f"{(ours - bare_import) * 1e3:.0f} ms above `pass` ({bare_import * 1e3:.0f} ms), no torch",
            f"{IMPORT_SECONDS * 1e3:.0f} ms or less",
            _verdict(ours - bare_import <= IMPORT_SECONDS),
        ),
    ]
    if arguments.device == "cuda":
        taken = _device_bytes() / MIB
        rows.append(
            (
                "device memory for 1000 tensors",
                f"{taken:.3f} MiB",
                f"{DEVICE_MIB} MiB or less",
                _verdict(taken <= DEVICE_MIB),
            )
        )
    print(machine(arguments.device))
    print(f"\n{arguments.model}, {arguments.steps} steps, one thread, {arguments.device}.\n")
    print("| | measured | asked | |\n| --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if arguments.json is not None:
        raw = {"bare": dataclasses.asdict(bare), "watched": dataclasses.asdict(watched), "rows": rows}
        arguments.json.write_text(json.dumps(raw))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="steps of each process (default 100000)")
    parser.add_argument("--model", default="mlp", help="as in agent_overhead.py (default mlp)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all readings to FILE")
    parser.add_argument("--child", metavar="ENDPOINT", help=argparse.SUPPRESS)
    return parser.parse_args()


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _child(arguments: argparse.Namespace, endpoint: str, label: str) -> Memory:
    """Run the loop in a process of its own; an empty endpoint means unwatched."""
    _tell(label)
    command = [
        sys.executable, __file__, "--child", endpoint, "--steps", str(arguments.steps),
        "--model", arguments.model, "--device", arguments.device,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    _tell("")
    return Memory(**json.loads(done.stdout))


def _loop(arguments: argparse.Namespace) -> Memory:
    """The loop, in the child."""
    import torch

    from overhead.models import build

    torch.set_num_threads(1)
    workload = build(arguments.model, arguments.device)
    watch: Any = contextlib.nullcontext()
    if arguments.child:
        import gradwatch

        watch = gradwatch.watch(workload.model, workload.optimizer, job="benchmark", endpoint=arguments.child)
    # Not a growing list: the readings must not be what grows.
    steps, resident = [0] * SAMPLES, [0] * SAMPLES
    with watch:
        for sample in range(SAMPLES):
            for _ in range(max(1, arguments.steps // SAMPLES)):
                workload.step()
            steps[sample] = (sample + 1) * max(1, arguments.steps // SAMPLES)
            resident[sample] = _resident()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Memory(steps, resident, peak)


def _resident() -> int:
    """Resident bytes (proc(5), statm), without a package that the bare loop would not load."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _import_seconds() -> tuple[float, float]:
    """Seconds of an interpreter that does nothing, and of one that imports gradwatch."""
    nothing: list[float] = []
    ours: list[float] = []
    check = "import sys, gradwatch; assert 'torch' not in sys.modules"
    for _ in range(IMPORTS):
        for code, seconds in (("pass", nothing), (check, ours)):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds.append(time.perf_counter() - start)
    return statistics.median(nothing), statistics.median(ours)


def _device_bytes() -> int:
    """Peak of torch's allocator while a loop over 1000 tensors is watched, above the same loop before."""
    import torch

    import gradwatch
    from gradwatch.testing import InMemoryExporter

    parameters = [torch.nn.Parameter(torch.randn(64, device="cuda")) for _ in range(1000)]
    optimizer = torch.optim.SGD(parameters, lr=0.01)

    def peak() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(20):
            optimizer.zero_grad()
            torch.stack(list(parameters)).square().sum().backward()  # type: ignore[no-untyped-call] # torch
            optimizer.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    peak()
    bare = peak()
    with gradwatch.watch(None, optimizer, every=1, exporter=InMemoryExporter()):
        peak()
        return peak() - bare


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
