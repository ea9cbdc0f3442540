"""Optimizers that step inside ``backward()``, one for each parameter, seen as the one they are meant to be.

Memory-saving loops step a parameter as soon as its gradient is there (a hook of
``register_post_accumulate_grad_hook`` calls ``step`` and ``zero_grad``). Each gradient exists only for that
moment, and a step of training is a whole backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.gradients.norms import DeviceNorms, GradientReader, Reading

if TYPE_CHECKING:
    from torch.optim import Optimizer


def backward_in_progress() -> int | None:
    """Number of the backward this thread is in, None outside of one."""
    task = torch._C._current_graph_task_id()  # noqa: SLF001 - no public way to ask
    return None if task == -1 else task


class StepsInBackward:
    """The optimizers of one backward. Has ``param_groups`` as they have, so that it can be watched like one."""

    def __init__(self, ended: Callable[[], None], gone: Callable[[], None]) -> None:
        self._ended = ended
        self._gone = gone
        self._task: int | None = None
        self._members: dict[int, tuple[weakref.ref[Optimizer], GradientReader]] = {}
        self._readings: list[tuple[int, Reading]] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group for each learning rate of the members, parameters in the members' order."""
        groups: list[dict[str, Any]] = []
        for reference, _ in self._members.values():
            member = reference()
            for group in member.param_groups if member is not None else ():
                if groups and _same(groups[-1].get("lr"), group.get("lr")):
                    groups[-1]["params"] = [*groups[-1]["params"], *group["params"]]
                else:
                    groups.append({"params": group["params"], "lr": group.get("lr")})
        return groups

    def add(self, optimizer: Optimizer, parameters: Sequence[torch.Tensor]) -> None:
        """Take this one in, and forget it when it is freed."""
        key = id(optimizer)

        def forget(_reference: object) -> None:
            self._members.pop(key, None)
            if not self._members:
                self._gone()

        self._members[key] = (weakref.ref(optimizer, forget), GradientReader(parameters))

    def __contains__(self, optimizer: object) -> bool:
        member = self._members.get(id(optimizer))
        return member is not None and member[0]() is optimizer

    def before_step(self, optimizer: Optimizer, *, observe: bool) -> None:
        """A member is about to step: read its gradients, and see to it that the backward's end is heard."""
        task = backward_in_progress()
        if task != self._task:
            self._task = task
            self._readings.clear()
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)  # noqa: SLF001
        if observe:
            self._readings.append((id(optimizer), self._members[id(optimizer)][1].read()))

    def reading(self) -> Reading | None:
        """Everything read in the backward that ended, in the order backward reached it; None if nothing was."""
        self._task = None
        readings, self._readings = self._readings, []
        if not readings:
            return None
        first: dict[int, int] = {}
        total = 0
        for key, (_, reader) in self._members.items():
            first[key] = total
            total += len(reader.parameters)
        return Reading(
            tuple(first[key] + i for key, reading in readings for i in reading.indices),
            [norm for _, reading in readings for norm in reading.norms],
            tuple(
                DeviceNorms(tuple(first[key] + i for i in part.indices), part.vector)
                for key, reading in readings
                for part in reading.on_device
            ),
            all(reading.complete for _, reading in readings),
        )


def _same(rate: Any, other: Any) -> bool:
    # Tensors by identity: comparing their values could synchronise a device.
    return rate is other or (type(rate) is float and type(other) is float and rate == other)
