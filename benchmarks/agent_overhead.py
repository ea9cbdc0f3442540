"""What watching costs: a GPT step of about 30 ms with and without gradwatch, interleaved in one process.

    python benchmarks/agent_overhead.py [--threads N] [--rounds N] [--model gpt|mlp]

Blocks of steps without a watch, observing every step, with default settings, and without a watch again (the
A/A control, which shows what the method itself cannot resolve) follow each other in shuffled order, so that a
noisy machine hits all alike. A ratio is the median over rounds of (block / bare block of the same round), with
a bootstrap 95 % interval. There is no collector: batches go to an in-memory exporter that drops them.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

import gradwatch
from gradwatch.telemetry import Attributes, Event, MetricPoints

CONTROL = "no hook (A/A control)"


class Discard:
    """An exporter that receives and forgets; remembers the last overhead the agent reported."""

    overhead = float("nan")

    def send_events(self, _resource: Attributes, _events: Sequence[Event]) -> bool:
        """Forget events."""
        return True

    def send_metrics(self, _resource: Attributes, metrics: Sequence[MetricPoints]) -> bool:
        """Forget points."""
        for batch in metrics:
            if batch.metric.name == "gradwatch.agent.overhead":
                self.overhead = float(batch.points[-1].value)  # type: ignore[union-attr]
            len(batch.points)
        return True

    def close(self) -> None:
        """Nothing to release."""


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, then transform: shape [batch, time, width] to the same."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """A small GPT."""

    def __init__(self, vocabulary: int = 256, width: int = 128, layers: int = 4, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token logits: shape [batch, time] to [batch, time, vocabulary]."""
        places = torch.arange(tokens.shape[1])
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))


def gpt_step() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """A 0.8 M parameter GPT on bytes."""
    torch.manual_seed(0)
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    data = torch.randint(256, (5, 65))

    def step() -> None:
        optimizer.zero_grad()
        logits = model(data[:, :-1])
        functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten()).backward()
        optimizer.step()

    return model, optimizer, step


def mlp_step() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """A 34 k parameter MLP of 18 tensors, about 1 ms a step: the hardest case for a fixed cost."""
    torch.manual_seed(0)
    widths = [64, *[64] * 8, 10]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(64, 64), torch.randint(10, (64,))

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return model, optimizer, step


def block_seconds(step: Callable[[], None], steps: int) -> float:
    """Seconds a step takes, averaged over a block; two steps settle caches and hooks first."""
    for _ in range(2):
        step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def interval(ratios: list[float], draws: int = 2000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    chooser = random.Random(0)  # noqa: S311 - statistics, not secrets
    medians = sorted(statistics.median(chooser.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=30, help="blocks of each kind (default 30)")
    parser.add_argument("--model", choices=("gpt", "mlp"), default="gpt")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, optimizer, step = {"gpt": gpt_step, "mlp": mlp_step}[arguments.model]()
    block_seconds(step, 10)
    steps = max(5, int(0.6 / block_seconds(step, 10)))
    exporter = Discard()
    overheads: dict[str, list[float]] = {}

    def bare() -> float:
        return block_seconds(step, steps)

    def watched(name: str, every: int | None) -> Callable[[], float]:
        def run() -> float:
            watch = gradwatch.watch(model, optimizer, every=every, exporter=exporter, export_interval=0.2)
            try:
                return block_seconds(step, steps)
            finally:
                watch.close()
                overheads.setdefault(name, []).append(exporter.overhead)

        return run

    cases: dict[str, Callable[[], float]] = {
        "no hook": bare,
        CONTROL: bare,
        "every step (every=1)": watched("every step (every=1)", 1),
        "default settings": watched("default settings", None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    shuffler = random.Random(1)  # noqa: S311
    for _ in range(arguments.rounds):
        shuffler.shuffle(order)
        for name in order:
            seconds[name].append(cases[name]())

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{platform.machine()}, {platform.platform()}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.rounds} x {steps} steps")
    print(f"{arguments.model}: {len(list(model.parameters()))} tensors, {parameters} parameters")
    print(f"step without a hook: {statistics.median(seconds['no hook']) * 1e3:.3f} ms (median)\n")
    for name in list(cases)[1:]:
        ratios = [a / b for a, b in zip(seconds[name], seconds["no hook"], strict=True)]
        low, high = interval(ratios)
        own = f", by its own clock {statistics.median(overheads[name]):.3%}" if name in overheads else ""
        print(f"{name:24} {statistics.median(ratios) - 1:+.2%}  [{low - 1:+.2%}, {high - 1:+.2%}]{own}")


if __name__ == "__main__":
    main()
