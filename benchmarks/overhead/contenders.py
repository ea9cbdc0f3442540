"""Who is compared: gradwatch, and what people use today to see their gradients."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch

import gradwatch
from overhead.models import Workload

BARE: Final = "no hook"
CONTROL: Final = "no hook (A/A control)"
EVERY_STEP: Final = "gradwatch, every step"
DEFAULT: Final = "gradwatch, default settings"
WANDB: Final = "wandb.watch(log_freq=1)"
# No loop takes this many steps in a block: only the first is observed, and it is not timed.
NEVER: Final = 10**9


def bare(_workload: Workload) -> AbstractContextManager[None]:
    """Attach nothing."""
    return nullcontext()


def watched(endpoint: str, every: int | None, export_interval: float) -> Callable[[Workload], Any]:
    """Attach gradwatch, exporting to ``endpoint``; yields the watch."""

    @contextmanager
    def attach(workload: Workload) -> Iterator[gradwatch.Watch]:
        watch = gradwatch.watch(
            workload.model, workload.optimizer, job="benchmark", every=every, endpoint=endpoint,
            export_interval=export_interval,
        )  # fmt: skip
        try:
            yield watch
        finally:
            watch.close()

    return attach


@dataclass(frozen=True)
class Peer:
    """Another tool. ``needs``: the package that has to be there."""

    name: str
    attach: Callable[[Workload], AbstractContextManager[object]]
    needs: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether it can be measured."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


@contextmanager
def _wandb(workload: Workload) -> Iterator[None]:
    """Gradient histograms of every step, offline; its own `log` call sends them."""
    os.environ.update(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        # Without the sampling of the machine, which is not what is compared.
        settings = wandb.Settings(console="off", x_disable_stats=True, disable_git=True, disable_code=True)
        run = wandb.init(project="benchmark", mode="offline", dir=folder, settings=settings)
        run.watch(workload.model, log="gradients", log_freq=1)
        handle = workload.optimizer.register_step_post_hook(lambda *_: run.log({}))
        try:
            yield
        finally:
            handle.remove()
            run.unwatch(workload.model)
            run.finish()


@contextmanager
def _tensorboard(workload: Workload) -> Iterator[None]:
    """A histogram of every gradient at every step."""
    from torch.utils.tensorboard import SummaryWriter

    named = dict(workload.model.named_parameters())
    step = 0

    def write(*_: object) -> None:
        nonlocal step
        for name, parameter in named.items():
            if parameter.grad is not None:
                writer.add_histogram(name, parameter.grad, step)
        step += 1

    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        handle = workload.optimizer.register_step_pre_hook(write)
        try:
            yield
        finally:
            handle.remove()
            writer.close()


@contextmanager
def _one_norm_each(workload: Workload) -> Iterator[None]:
    """One norm call a parameter, a total, and all as Python numbers: what a Lightning user's hook does."""
    named = dict(workload.model.named_parameters())
    latest: dict[str, float] = {}

    def read(*_: object) -> None:
        norms = {name: p.grad.detach().norm(2) for name, p in named.items() if p.grad is not None}
        total = torch.stack(list(norms.values())).norm(2)
        latest.update({name: norm.item() for name, norm in norms.items()}, total=total.item())

    handle = workload.optimizer.register_step_pre_hook(read)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _anomaly(_workload: Workload) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.autograd.set_detect_anomaly(True)
        try:
            yield
        finally:
            torch.autograd.set_detect_anomaly(False)


PEERS: Final = (
    Peer(WANDB, _wandb, "wandb"),
    Peer("TensorBoard add_histogram", _tensorboard, "tensorboard"),
    Peer("one norm a parameter (Lightning-style)", _one_norm_each),
    Peer("torch.autograd.set_detect_anomaly", _anomaly),
)
