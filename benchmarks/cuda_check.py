"""Checks on a CUDA device what CPU tests cannot: no synchronisation, right norms, right losses.

    PYTHONPATH=agent python benchmarks/cuda_check.py

Trains with ``torch.cuda.set_sync_debug_mode("error")`` and compares what arrives with a dense computation.
Prints PASS or FAIL lines and exits with 1 after a FAIL. Needs torch and this repository only: telemetry
stays in memory.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["GRADWATCH_TESTING"] = "1"

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter

DEVICE = "cuda"
STEPS = 20
failures = 0


def report(name: str, passed: bool, detail: str = "") -> None:
    """Print one line."""
    global failures
    failures += not passed
    print(f"{'PASS' if passed else 'FAIL'}  {name}{'  ' + detail if detail else ''}", flush=True)


def network() -> nn.Sequential:
    """A small MLP on the device, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8)).to(
        DEVICE
    )


def close(got: list[Any], expected: list[float], tolerance: float = 1e-4) -> bool:
    """Whether two lists agree."""
    return len(got) == len(expected) and all(
        math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12) for a, b in zip(got, expected, strict=True)
    )


def dense_norm(model: nn.Module) -> torch.Tensor:
    """Global norm in float64, still on the device."""
    return (
        torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None])
        .sum()
        .sqrt()
    )


def train(
    exporter: InMemoryExporter, *, clip: bool = False, scaled: bool = False, every: int | None = 1,
    fused: bool = False, capturable: bool = False, spoil: Callable[[int, nn.Module], None] | None = None,
) -> tuple[list[float], list[float], nn.Module]:  # fmt: skip
    """Train with synchronisation forbidden; the true norms and losses."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused, capturable=capturable)
    # A skipped step's `.item()` is the scaler's own synchronisation: scaling is checked with fused optimizers.
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, enabled=scaled)
    inputs = torch.randn(STEPS, 32, 64, device=DEVICE)
    truth, losses = [], []
    watch = gradwatch.watch(model, optimizer, every=every, exporter=exporter)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = model(inputs[step]).square().mean()
            scaler.scale(loss).backward()
            if spoil is not None:
                spoil(step, model)
            truth.append(dense_norm(model) / (1024.0 if scaled else 1.0))
            losses.append(loss.detach())
            if clip:
                clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
            watch.log(train_loss=loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        watch.close()
    return [float(t) for t in truth], [float(t) for t in losses], model


def check(name: str, **options: Any) -> None:
    """One kind of loop: norms, losses and logged values against the truth."""
    exporter = InMemoryExporter()
    try:
        truth, losses, _ = train(exporter, **options)
    except RuntimeError as error:
        torch.cuda.set_sync_debug_mode("default")
        report(f"{name}: no synchronisation", False, str(error).splitlines()[0])
        return
    report(f"{name}: no synchronisation", True)
    report(f"{name}: global norms", close(exporter.values(names.GRADIENT_NORM), truth))
    report(f"{name}: losses", close(exporter.values(names.LOSS), losses))
    report(f"{name}: a device tensor logged", close(exporter.values(names.LOGGED), losses))
    report(f"{name}: every step", exporter.values(names.STEP_INDEX) == list(range(STEPS)))
    counts = {point.total for point in exporter.histograms(names.LAYER_GRADIENT_NORM)}
    report(f"{name}: every layer observed every step", counts == {STEPS}, str(counts))
    report(f"{name}: no false alarm", not exporter.find_events(names.NONFINITE_STEP.name))


def check_identical() -> None:
    """Weights with and without a watch."""
    finals = []
    for watched in (False, True):
        exporter = InMemoryExporter()
        os.environ["GRADWATCH_DISABLED"] = "" if watched else "1"
        _, _, model = train(exporter, clip=True)
        finals.append([p.detach().cpu() for p in model.parameters()])
    os.environ.pop("GRADWATCH_DISABLED")
    report("weights are bit-identical", all(torch.equal(a, b) for a, b in zip(*finals, strict=True)))


def check_nan(clip: bool) -> None:
    """A NaN in the gradients of one layer, then in everything."""

    def spoil(step: int, model: nn.Module) -> None:
        if step == 7:
            model[0].weight.grad[0].fill_(math.nan)  # type: ignore[index, union-attr]
            model[2].weight.grad[0].fill_(math.nan)  # type: ignore[index, union-attr]

    exporter = InMemoryExporter()
    train(exporter, clip=clip, spoil=spoil)
    events = exporter.find_events(names.NONFINITE_STEP.name)
    first = events[0].attributes if events else {}
    report(
        f"NaN at its step and layer, clip={clip}",
        (first.get(names.STEP), first.get(names.LAYER_NAME), first.get(names.BORN_IN))
        == (7, "2.weight", "backward"),
        str(dict(first)),
    )


def check_capture() -> None:
    """A CUDA graph captured while watching."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    data = torch.randn(32, 64, device=DEVICE)
    exporter = InMemoryExporter()
    with gradwatch.watch(model, optimizer, every=1, exporter=exporter):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.zero_grad(set_to_none=True)
                model(data).square().mean().backward()
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph):
                model(data).square().mean().backward()
                optimizer.step()
            graph.replay()
            torch.cuda.synchronize()
            report("CUDA graph captured and replayed", True)
        except RuntimeError as error:
            report("CUDA graph captured and replayed", False, str(error).splitlines()[0])
    report("steps outside the capture were seen", exporter.values(names.STEP_INDEX) == [0, 1, 2])


def check_memory() -> None:
    """Device gauges, and how much memory of the device we take."""
    exporter = InMemoryExporter()
    train(exporter)
    found = {batch.metric.name for batch in exporter.metrics}
    wanted = {names.DEVICE_MEMORY_ALLOCATED.name, names.DEVICE_MEMORY_PEAK.name, names.DEVICE_MEMORY_LIMIT.name}
    report("allocator gauges", wanted <= found)
    print(f"      NVML: {sorted(found & {names.HW_GPU_UTILIZATION.name, names.HW_POWER.name}) or 'not here'}")


def show_cost() -> None:
    """Time a step takes on the host, with and without: informative, never a failure."""
    for every in (None, 1):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        data = torch.randn(32, 64, device=DEVICE)

        def steps(count: int, model: nn.Module = model, optimizer: Any = optimizer, data: Any = data) -> float:
            start = time.perf_counter()
            for _ in range(count):
                optimizer.zero_grad()
                model(data).square().mean().backward()
                optimizer.step()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / count * 1e6

        steps(50)
        bare = steps(300)
        with gradwatch.watch(model, optimizer, every=every, exporter=InMemoryExporter()):
            steps(50)
            watched = steps(300)
        label = "default settings" if every is None else f"every={every}"
        print(f"      {label}: {bare:.0f} us a step without, {watched:.0f} us with a watch")


def main() -> int:
    """Run all checks."""
    if not torch.cuda.is_available():
        print("no CUDA device here")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    check("plain")
    check("clipped", clip=True)
    check("fused", fused=True)
    check("capturable", capturable=True)
    check("fused under a GradScaler", fused=True, scaled=True)
    check_identical()
    check_nan(clip=False)
    check_nan(clip=True)
    check_capture()
    check_memory()
    show_cost()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
