"""Measures one model with one number of threads: long blocks, short blocks, and clipping.

Long blocks hold everything, exports and other tools included, but resolve a per cent at best. Short blocks
alternate so fast that the machine has no time to change, and compare lower-quartile steps: they resolve a
thousandth of a 1 ms step in a minute, but see the training thread only.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad

import gradwatch
from overhead.blocks import Arm, Attach, Blocks, Tell, interleave, run
from overhead.contenders import BARE, CONTROL, DEFAULT, EVERY_STEP, NEVER, Peer, bare, watched
from overhead.models import Workload, build
from overhead.sink import Sink

UNSAMPLED = "gradwatch, no step"
TORCH_CLIP = "torch"
TORCH_CLIP_CONTROL = "torch (A/A control)"
TORCH_CLIP_WATCHED = "torch, watched, every step"
TORCH_CLIP_UNSAMPLED = "torch, watched, step not observed"
OUR_CLIP = "watch.clip_grad_norm_, every step"
OUR_CLIP_UNSAMPLED = "watch.clip_grad_norm_, step not observed"
HAS_OUR_CLIP = hasattr(gradwatch.Watch, "clip_grad_norm_")
# Largest norm allowed, with which every step is clipped, or none.
CLIP_CASES = {"norm above the limit": 1e-6, "norm below the limit": 1e6}


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: Rounds of long blocks.
        peer_rounds: In how many of them the slow peers take part.
        export_interval: Seconds between exports, and length of a long block: each holds one export of just
            that much.
        warm_seconds: Untimed run before it, in which the default settings learn how often to observe.
        peer_seconds: Least length of a peer's block.
        fine_seconds: Time for the short blocks.
        clip_seconds: Time for clipping.
        least_rounds: Of short blocks and of clipping, however slow the model.
        least_steps: Of a block, however slow the model.
    """

    rounds: int = 10
    peer_rounds: int = 4
    export_interval: float = 5.0
    warm_seconds: float = 1.0
    peer_seconds: float = 0.5
    fine_seconds: float = 60.0
    clip_seconds: float = 20.0
    least_rounds: int = 6
    least_steps: int = 3


SHORT = Plan(
    rounds=1, peer_rounds=1, export_interval=0.4, warm_seconds=0.2, peer_seconds=0.0, fine_seconds=1.0,
    clip_seconds=0.5, least_rounds=1, least_steps=1,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Everything measured for one model.

    ``clip`` is by the case of ``CLIP_CASES``. ``one_pass``: seconds to read as many bytes as its
    gradients once.
    """

    model: str
    tensors: int
    parameters: int
    threads: int
    long: Blocks
    short: Blocks
    clip: dict[str, Blocks]
    one_pass: float


def measure(
    name: str, device: str, threads: int, plan: Plan, peers: Sequence[Peer], sink: Sink, tell: Tell
) -> Result:
    """Measure one model."""
    torch.set_num_threads(threads)
    workload = build(name, device)
    tell("warming up")
    run(workload, min(1.0, plan.export_interval), 3)
    # The first watch of a process imports the SDK.
    with watched(sink.endpoint, 1, plan.export_interval)(workload):
        run(workload, 0.0, 3)
    sink.take()
    long = interleave(workload, _long_arms(plan, peers, sink), sink, rounds=plan.rounds, tell=tell)
    tell("short blocks")
    short = interleave(
        workload, _short_arms(plan, sink), sink, rounds=plan.least_rounds, seconds=plan.fine_seconds
    )
    tell("clipping")
    seconds = plan.clip_seconds / len(CLIP_CASES)
    clip = {
        case: interleave(
            workload, _clip_arms(plan, sink, most), sink, rounds=plan.least_rounds, seconds=seconds
        )
        for case, most in CLIP_CASES.items()
    }
    return Result(
        workload.name, workload.tensors, workload.parameters, threads, long, short, clip, _one_pass(workload)
    )


def _long_arms(plan: Plan, peers: Sequence[Peer], sink: Sink) -> list[Arm]:
    length, interval = plan.export_interval, plan.export_interval
    return [
        Arm(BARE, bare, length, plan.least_steps, warm_seconds=plan.warm_seconds / 4),
        Arm(CONTROL, bare, length, plan.least_steps, warm_seconds=plan.warm_seconds / 4),
        Arm(
            EVERY_STEP,
            watched(sink.endpoint, 1, interval),
            length,
            plan.least_steps,
            warm_seconds=plan.warm_seconds,
        ),
        Arm(
            DEFAULT,
            watched(sink.endpoint, None, interval),
            length,
            plan.least_steps,
            warm_seconds=plan.warm_seconds,
        ),
        *(
            Arm(p.name, p.attach, plan.peer_seconds, plan.least_steps, warm_steps=1, rounds=plan.peer_rounds)
            for p in peers
        ),
    ]


def _short_arms(plan: Plan, sink: Sink) -> list[Arm]:
    def arm(name: str, attach: Attach) -> Arm:
        return Arm(name, attach, 0.02, plan.least_steps, pause_seconds=0.02, warm_seconds=0.015)

    return [
        arm(BARE, bare),
        arm(CONTROL, bare),
        arm(EVERY_STEP, watched(sink.endpoint, 1, plan.export_interval)),
        arm(UNSAMPLED, watched(sink.endpoint, NEVER, plan.export_interval)),
    ]


def _clip_arms(plan: Plan, sink: Sink, most: float) -> list[Arm]:
    every = watched(sink.endpoint, 1, plan.export_interval)
    never = watched(sink.endpoint, NEVER, plan.export_interval)

    def arm(name: str, attach: Attach, *, ours: bool = False) -> Arm:
        return Arm(
            name,
            _clipping(attach, most, ours=ours),
            0.03,
            plan.least_steps,
            pause_seconds=0.02,
            warm_seconds=0.015,
        )

    arms = [
        arm(TORCH_CLIP, bare),
        arm(TORCH_CLIP_CONTROL, bare),
        arm(TORCH_CLIP_WATCHED, every),
        arm(TORCH_CLIP_UNSAMPLED, never),
    ]
    if HAS_OUR_CLIP:
        arms += [arm(OUR_CLIP, every, ours=True), arm(OUR_CLIP_UNSAMPLED, never, ours=True)]
    return arms


def _clipping(attach: Attach, most: float, *, ours: bool) -> Attach:
    """As ``attach``, in a loop that clips: by our method, else by torch's function."""

    @contextmanager
    def attach_clipping(workload: Workload) -> Iterator[None]:
        parameters = list(workload.model.parameters())
        with attach(workload) as watch:
            if ours:
                clip = watch.clip_grad_norm_  # type: ignore[attr-defined]
                workload.clip = lambda: clip(most)
            else:
                workload.clip = lambda: clip_grad.clip_grad_norm_(parameters, most)
            try:
                yield
            finally:
                workload.clip = None

    return attach_clipping


def _one_pass(workload: Workload, calls: int = 20) -> float:
    """Seconds to reduce one flat tensor as large as all gradients, as cold as a step leaves it."""
    if workload.device.type != "cpu":
        return math.nan
    flat = torch.randn(workload.parameters)
    seconds = []
    for _ in range(calls):
        workload.step()
        start = time.perf_counter()
        torch.linalg.vector_norm(flat)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
