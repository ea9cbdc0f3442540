"""Memory and import time: what watching adds to a process, and whether it grows.

    python benchmarks/agent_memory.py [--steps 100000] [--warm-up 100000] [--model mlp] [--device cuda]

Two child processes run the same loop, one of them watched with default settings and exporting to a receiver
in a third. Each warms up, and reads its memory 200 times in the steps that follow. It takes about 20 exports,
100 seconds, until the allocator holds room for the largest export there is and a few free pieces of every
size: what the warm-up added is printed, and growth is what comes after it. Growth is told of anonymous memory,
since the kernel takes pages of files away and brings them back as it likes: the difference between the medians
of the first and the last tenth of the readings, and the slope of Theil and Sen.

``import gradwatch`` is timed in fresh interpreters, in turn with ``pass``. With ``--device cuda`` also the
device memory taken for a model of 1000 tensors.
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
_TENTH = SAMPLES // 10
_FIRST, _LAST = slice(None, _TENTH), slice(-_TENTH, None)
IMPORTS = 20
# What was asked: MiB above the bare loop, seconds to import, MiB of a device for 1000 tensors.
RESIDENT_MIB, IMPORT_SECONDS, DEVICE_MIB = 40, 0.150, 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        steps: When it was read, in steps after the warm-up.
        resident: All that is in memory.
        anonymous: What of it is no part of a file: heaps, stacks, mappings.
        cold: Anonymous bytes after the first hundredth of the warm-up.
        peak: The most that was ever resident.
    """

    steps: list[int]
    resident: list[int]
    anonymous: list[int]
    cold: int
    peak: int

    @property
    def late(self) -> float:
        """Resident bytes, the median over the last tenth."""
        return statistics.median(self.resident[_LAST])

    @property
    def warmed(self) -> float:
        """Anonymous bytes that the warm-up added."""
        return statistics.median(self.anonymous[_FIRST]) - self.cold

    @property
    def rise(self) -> float:
        """Anonymous bytes a step, from the first tenth to the last."""
        early, late = (statistics.median(self.anonymous[part]) for part in (_FIRST, _LAST))
        return (late - early) / (statistics.median(self.steps[_LAST]) - statistics.median(self.steps[_FIRST]))

    @property
    def slope(self) -> float:
        """Anonymous bytes a step: the median slope between all pairs of readings."""
        points = zip(self.steps, self.anonymous, strict=True)
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
            _child(arguments, endpoint, f"{arguments.warm_up} + {arguments.steps} steps, {name}")
            for endpoint, name in (("", "no hook"), (sink.endpoint, "watched"))
        )
    bare_import, ours = _import_seconds()
    extra = (watched.late - bare.late) / MIB
    growth = (watched.rise - bare.rise) * 100_000
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
        (
            f"added by {arguments.warm_up} steps of warm-up, no hook and watched",
            f"{bare.warmed / MIB:.2f} and {watched.warmed / MIB:.2f} MiB",
            "",
            "",
        ),
        (
            f"slope over the {arguments.steps} steps after it, no hook and watched",
            f"{bare.slope * 1000 / 1024:+.3f} and {watched.slope * 1000 / 1024:+.3f} KiB in 1000 steps",
            "",
            "",
        ),
        (
            "rise in 100 000 of them, above the bare loop's",
            f"{growth / MIB:+.2f} MiB",
            "flat: 1 MiB or less",
            _verdict(growth <= MIB),
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
    print(
        f"\n{arguments.model}, {arguments.warm_up} + {arguments.steps} steps, one thread, {arguments.device}.\n"
    )
    print("| | measured | asked | |\n| --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if arguments.json is not None:
        raw = {"bare": dataclasses.asdict(bare), "watched": dataclasses.asdict(watched), "rows": rows}
        arguments.json.write_text(json.dumps(raw))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="steps that are measured (default 100000)")
    parser.add_argument("--warm-up", type=int, default=100_000, help="steps before (default 100000)")
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
        "--warm-up", str(arguments.warm_up), "--model", arguments.model, "--device", arguments.device,
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
    steps, resident, anonymous = [0] * SAMPLES, [0] * SAMPLES, [0] * SAMPLES
    stride, first = max(1, arguments.steps // SAMPLES), max(1, arguments.warm_up // 100)
    with watch:
        for _ in range(first):
            workload.step()
        _, cold = _memory()
        for _ in range(arguments.warm_up - first):
            workload.step()
        for sample in range(SAMPLES):
            for _ in range(stride):
                workload.step()
            steps[sample] = (sample + 1) * stride
            resident[sample], anonymous[sample] = _memory()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Memory(steps, resident, anonymous, cold, peak)


def _memory() -> tuple[int, int]:
    """Resident and anonymous bytes (proc(5), statm), without a package that the bare loop would not load."""
    _, resident, of_files, *_ = Path("/proc/self/statm").read_text().split()
    page = os.sysconf("SC_PAGE_SIZE")
    return int(resident) * page, (int(resident) - int(of_files)) * page


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
