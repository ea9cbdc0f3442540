"""Memory and import time: what watching adds to a process, and whether it grows.

    python benchmarks/agent_memory.py [--steps 100000] [--warm-up 100000] [--model mlp] [--device cuda]
    python benchmarks/agent_memory.py --short

Two child processes run the same loop, one of them watched with default settings and exporting to a receiver
in a third. Each warms up, and reads its memory 200 times in the steps that follow. It takes about 20 exports,
100 seconds, until the allocator holds room for the largest export there is and a few free pieces of every
size: what the warm-up added is printed, and growth is what comes after it. Growth is told of anonymous memory,
since the kernel takes pages of files away and brings them back as it likes: the difference between the medians
of the first and the last tenth of the readings, and the slope of Theil and Sen.

``import gradwatch`` is timed in fresh interpreters, in turn with ``pass``. With ``--device cuda`` also the
device memory taken for a model of 1000 tensors. Figures go where agent_overhead.py puts its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from overhead.memory import SAMPLES, DeviceMemory, Memory, MemoryResult

_IMPORTS = 20
# Of the MLP, for an estimate of how long it takes; 20 s go to start-ups and imports.
_STEP_SECONDS = 1e-3
# Norms, weights and inputs are read at cadences of up to 10 s.
_DEVICE_SECONDS = 30.0


def main() -> int:
    """Measure and write."""
    arguments = _arguments()
    if arguments.child is not None:
        print(json.dumps(dataclasses.asdict(_loop(arguments))))
        return 0
    from overhead.machine import machine
    from overhead.sink import running_sink

    where = machine(arguments.device)
    total = arguments.warm_up + arguments.steps
    print(f"this takes about {20 + 2 * total * _STEP_SECONDS:.0f} s", file=sys.stderr)
    with running_sink() as sink:
        bare, watched = (
            _child(arguments, endpoint, f"{arguments.warm_up} + {arguments.steps} steps, {name}")
            for endpoint, name in (("", "no hook"), (sink.endpoint, "watched"))
        )
    import_bare, import_ours = _import_seconds(arguments.imports)
    result = MemoryResult(
        where, arguments.device, arguments.model, arguments.warm_up, arguments.steps, bare, watched,
        import_bare, import_ours, _device_memory() if arguments.device == "cuda" else None,
    )  # fmt: skip
    _write(result, is_short=arguments.short)
    return 0


def _write(result: MemoryResult, *, is_short: bool) -> None:
    from overhead import report
    from overhead.results import RESULTS, Results, load
    from page import PAGE, write

    results = Results() if is_short else load(RESULTS)
    results.memory[result.device] = result
    if is_short:
        print("A short run: it shows that everything works, and no figure is worth keeping.\n")
        print(report.parts(results)["memory"])
    else:
        results.save(RESULTS)
        write(PAGE, report.parts(load(RESULTS)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="steps that are measured (default 100000)")
    parser.add_argument("--warm-up", type=int, default=100_000, help="steps before (default 100000)")
    parser.add_argument("--model", default="mlp", help="as in agent_overhead.py (default mlp)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--short", action="store_true", help="a few seconds: does it work at all")
    parser.add_argument("--child", metavar="ENDPOINT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.imports = _IMPORTS
    if arguments.short:
        arguments.steps = arguments.warm_up = 2 * SAMPLES
        arguments.imports = 3
    return arguments


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
        peak = _peak()
    return Memory(steps, resident, anonymous, cold, peak)


def _memory() -> tuple[int, int]:
    """Resident and anonymous bytes (proc(5), statm), without a package that the bare loop would not load."""
    _, resident, of_files, *_ = Path("/proc/self/statm").read_text().split()
    page = os.sysconf("SC_PAGE_SIZE")
    return int(resident) * page, (int(resident) - int(of_files)) * page


def _peak() -> int:
    """Most bytes this process ever had resident; ``ru_maxrss`` still knows its parent's."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _import_seconds(times: int) -> tuple[list[float], list[float]]:
    """Seconds of interpreters that do nothing, and of ones that import gradwatch, in turn."""
    nothing: list[float] = []
    ours: list[float] = []
    check = "import sys, gradwatch; assert 'torch' not in sys.modules"
    for _ in range(times):
        for code, seconds in (("pass", nothing), (check, ours)):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds.append(time.perf_counter() - start)
    return nothing, ours


def _device_memory() -> DeviceMemory:
    """What watching a model of 1000 tensors takes, for long enough that every slow cadence has its turn."""
    import torch

    import gradwatch
    from gradwatch.testing import InMemoryExporter

    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(500))).to("cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch = torch.randn(4, 8, device="cuda")

    def train(seconds: float) -> tuple[int, int, int]:
        """Most bytes allocated between steps, and while the optimizer steps; and what the driver has left."""
        held = peak = 0
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            optimizer.step()
            torch.cuda.synchronize()
            peak = max(peak, torch.cuda.max_memory_allocated())
            held = max(held, torch.cuda.memory_allocated())
        gc.collect()
        return held, peak, torch.cuda.mem_get_info()[0]

    train(3.0)
    bare = train(_DEVICE_SECONDS)
    with gradwatch.watch(model, optimizer, every=1, exporter=InMemoryExporter()):
        watched = train(_DEVICE_SECONDS)
    return DeviceMemory(watched[0] - bare[0], watched[1] - bare[1], bare[2] - watched[2])


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
