"""Measures one model with one number of threads: long blocks, short blocks, and clipping.

Long blocks hold everything, exports and other tools included, but resolve a per cent at best. Short blocks
alternate so fast that the machine has no time to change, and compare lower-quartile steps: they resolve a
thousandth of a 1 ms step in a minute, but see the training thread only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch.nn.utils import clip_grad

import gradwatch
from overhead.blocks import Arm, Attach, Blocks, Tell, interleave, run
from overhead.contenders import BARE, CONTROL, DEFAULT, EVERY_STEP, NEVER, Peer, bare, watched
from overhead.machine import machine
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
# Attaching and detaching, seen: ours, and the dearest peer's.
_SWITCH_SECONDS = 0.2
_PEER_SWITCH_SECONDS = 1.0
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
        warm_seconds: Untimed run before each, of every contender: caches fill, and the default settings learn
            how often to observe.
        peer_seconds: Length of a peer's block.
        fine_seconds: Time for the short blocks.
        clip_seconds: Time for clipping.
        least_rounds: Of short blocks and of clipping, however slow the model.
        least_steps: Of a block, however slow the model.
        passes: Passes over the gradients that are timed.
    """

    rounds: int = 10
    peer_rounds: int = 4
    export_interval: float = 5.0
    warm_seconds: float = 1.0
    peer_seconds: float = 2.0
    fine_seconds: float = 60.0
    clip_seconds: float = 20.0
    least_rounds: int = 6
    least_steps: int = 3
    passes: int = 40

    def seconds(self, peers: int) -> float:
        """About how long one model takes with one number of threads, where steps are short."""
        long = 4 * self.rounds * (self.export_interval + self.warm_seconds + _SWITCH_SECONDS)
        others = peers * self.peer_rounds * (self.peer_seconds + self.warm_seconds + _PEER_SWITCH_SECONDS)
        return long + others + self.fine_seconds + self.clip_seconds


SHORT = Plan(
    rounds=1, peer_rounds=1, export_interval=0.4, warm_seconds=0.2, peer_seconds=0.1, fine_seconds=1.0,
    clip_seconds=0.5, least_rounds=1, least_steps=1, passes=4,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Everything measured for one model with one number of threads.

    Attributes:
        key: The model, as in ``MODELS``.
        model: What the report calls it.
        machine: Date, machine and versions.
        ill: What gradwatch warned about meanwhile: figures of an agent that is ill are worth nothing.
        clip: By the case of ``CLIP_CASES``.
        clips_identically: Whether our clipping leaves the same bits as torch's; None where there is none.
        one_pass: Seconds to read its gradients once.
        synchronises: What ``torch.cuda.set_sync_debug_mode("error")`` found, "" for nothing; None on a CPU.
    """

    key: str
    model: str
    device: str
    threads: int
    machine: str
    tensors: int
    parameters: int
    ill: tuple[str, ...]
    synchronises: str | None
    clips_identically: bool | None
    long: Blocks
    short: Blocks
    clip: dict[str, Blocks]
    one_pass: float


def measure(
    name: str, device: str, threads: int, plan: Plan, peers: Sequence[Peer], sink: Sink, tell: Tell
) -> Result:
    """Measure one model."""
    torch.set_num_threads(threads)
    where = machine(device)
    workload = build(name, device)
    synchronises = _synchronisation(workload, sink) if device == "cuda" else None
    arms = _long_arms(plan, peers, sink)
    # The first use of anything imports its packages and starts its processes.
    for arm in arms:
        tell(f"warming up: {arm.name}")
        with arm.attach(workload):
            run(workload, 0.0, 3)
    sink.take()
    long = interleave(workload, arms, sink, rounds=plan.rounds, tell=tell)
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
        name, workload.name, device, threads, where, workload.tensors, workload.parameters, (),
        synchronises, _clips_identically(workload, sink), long, short, clip, _one_pass(workload, plan.passes),
    )  # fmt: skip


def _long_arms(plan: Plan, peers: Sequence[Peer], sink: Sink) -> list[Arm]:
    interval = plan.export_interval

    def arm(name: str, attach: Attach, seconds: float = interval, rounds: int | None = None) -> Arm:
        return Arm(name, attach, seconds, plan.least_steps, warm_seconds=plan.warm_seconds, rounds=rounds)

    return [
        arm(BARE, bare),
        arm(CONTROL, bare),
        arm(EVERY_STEP, watched(sink.endpoint, 1, interval)),
        arm(DEFAULT, watched(sink.endpoint, None, interval)),
        *(arm(peer.name, peer.attach, plan.peer_seconds, plan.peer_rounds) for peer in peers),
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


def _one_pass(workload: Workload, calls: int) -> float:
    """Seconds to reduce all gradients at once, in one piece, where backward has just left them."""
    parameters = list(workload.model.parameters())
    flat = torch.zeros(workload.parameters, device=workload.device)
    bounds = list(accumulate(parameter.numel() for parameter in parameters))[:-1]
    for parameter, part in zip(parameters, flat.tensor_split(bounds), strict=True):
        parameter.grad = part.view_as(parameter)
    seconds = []
    for _ in range(calls):
        flat.zero_()
        workload.loss().backward()  # type: ignore[no-untyped-call] # torch
        workload.synchronize()
        start = time.perf_counter()
        torch.linalg.vector_norm(flat)
        workload.synchronize()
        seconds.append(time.perf_counter() - start)
        workload.optimizer.step()
    workload.optimizer.zero_grad()
    # The quarter that everything in short blocks is judged by.
    return float(np.quantile(seconds[calls // 4 :], 0.25))


def _clips_identically(workload: Workload, sink: Sink) -> bool | None:
    """Whether both ways to clip leave the bits that torch leaves, clipping or not."""
    if not HAS_OUR_CLIP:
        return None
    parameters = list(workload.model.parameters())
    workload.optimizer.zero_grad()
    workload.loss().backward()  # type: ignore[no-untyped-call] # torch
    raw = [p.grad.clone() for p in parameters if p.grad is not None]

    def clipped(attach: Attach, most: float, *, ours: bool) -> list[torch.Tensor]:
        for parameter, gradient in zip(parameters, raw, strict=True):
            parameter.grad = gradient.clone()
        with _clipping(attach, most, ours=ours)(workload):
            assert workload.clip is not None
            workload.clip()
        return [p.grad for p in parameters if p.grad is not None]

    watching = watched(sink.endpoint, 1, 1.0)
    return all(
        all(map(torch.equal, clipped(bare, most, ours=False), clipped(watching, most, ours=ours)))
        for most in CLIP_CASES.values()
        for ours in (False, True)
    )


def _synchronisation(workload: Workload, sink: Sink) -> str:
    """Train a little with the agent on and every synchronisation an error; the first error's first line."""
    run(workload, 0.0, 3)
    workload.synchronize()
    with watched(sink.endpoint, 1, 0.2)(workload):
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(workload, 0.5, 20)
        except RuntimeError as error:
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    workload.synchronize()
    sink.take()
    return ""
