"""How large the parameters are, and how far one step moved them: weight norms and update ratios.

The update is what the parameter was before the step less what it is after, so it is right for every optimizer,
weight decay and clipping included. That takes a copy, so parameters take turns: a round goes through all of
them in batches, one batch an observed step. Of a tensor that is larger than a batch its first part is compared
(its ratio is that part's); its norm is always that of the whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from gradwatch.tensors.sharding import is_distributed_tensor

if TYPE_CHECKING:
    from torch import Tensor

# With norms and their float64 copies this stays within the 1 MiB that the agent may take of a device.
COPY_BYTES: Final = 768 * 1024

# What norms and differences are computed in: halves lose their digits, and fp16 overflows at 65504.
_COMPUTED_IN: Final = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


class Weight(NamedTuple):
    """One parameter, by index: its L2 norm before the step, and its update's ratio, None without one."""

    parameter: int
    norm: float
    ratio: float | None


@dataclass(frozen=True, slots=True)
class WeightReading:
    """One batch. ``vector``: norms of all ``indices``, then of their copied parts, then of the updates."""

    indices: tuple[int, ...]
    updated: tuple[bool, ...]
    vector: Tensor

    def weights(self, numbers: Sequence[float]) -> Iterator[Weight]:
        """The batch, from the numbers in the vector."""
        width = len(self.indices)
        for i, (index, updated) in enumerate(zip(self.indices, self.updated, strict=True)):
            part = numbers[width + i]
            # Nothing can be said about a parameter that was zero: any update is infinitely large beside it.
            ratio = numbers[2 * width + i] / part if updated and part > 0 else None
            yield Weight(index, numbers[i], ratio)


@dataclass(slots=True)
class _Copied:
    """A batch between the hooks before and after the step."""

    indices: list[int]
    parameters: list[Tensor]
    updated: list[bool]
    copies: list[Tensor]
    norms: tuple[Tensor, ...]
    part_norms: tuple[Tensor, ...]


class WeightRounds:
    """Goes through the parameters of one optimizer. Holds none of them outside its step."""

    def __init__(self) -> None:
        self._left: deque[int] = deque()
        self._copied: _Copied | None = None

    @property
    def active(self) -> bool:
        """Whether a round is not finished."""
        return bool(self._left)

    def begin_round(self, parameters: Sequence[Tensor]) -> None:
        """Start over, grouped so that one fused call takes a batch."""
        readable = [index for index, parameter in enumerate(parameters) if _is_readable(parameter)]
        readable.sort(key=lambda index: (str(parameters[index].device), str(parameters[index].dtype)))
        self._left = deque(readable)

    def before_step(self, parameters: Sequence[Tensor]) -> None:
        """Copy the next batch."""
        self._copied = None
        indices, parts = self._next_batch(parameters)
        if not indices:
            return
        chosen = [parameters[index] for index in indices]
        computed_in = _COMPUTED_IN[chosen[0].dtype]
        buffer = torch.empty(sum(part.numel() for part in parts), dtype=computed_in, device=parts[0].device)
        copies, place = [], 0
        for part in parts:
            copies.append(buffer[place : place + part.numel()].view(part.shape))
            place += part.numel()
        torch._foreach_copy_(copies, parts)
        self._copied = _Copied(
            indices,
            chosen,
            [_has_gradient(parameter) for parameter in chosen],
            copies,
            _norms([_real(parameter) for parameter in chosen], computed_in),
            _norms(copies, computed_in),
        )

    def after_step(self) -> WeightReading | None:
        """Compare the batch with what it has become; None where nothing was copied."""
        copied, self._copied = self._copied, None
        if copied is None:
            return None
        now = [_part(parameter) for parameter in copied.parameters]
        if any(after.shape != before.shape for after, before in zip(now, copied.copies, strict=True)):
            return None  # resized in between, as sharding libraries do
        torch._foreach_sub_(copied.copies, now)  # in place: no second copy
        updates = _norms(copied.copies, copied.copies[0].dtype)
        # Gradients may be made within the step (closures) or given up in it.
        updated = tuple(
            known or _has_gradient(parameter)
            for known, parameter in zip(copied.updated, copied.parameters, strict=True)
        )
        vector = torch.stack([*copied.norms, *copied.part_norms, *updates])
        return WeightReading(tuple(copied.indices), updated, vector)

    def _next_batch(self, parameters: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
        indices: list[int] = []
        parts: list[Tensor] = []
        room = COPY_BYTES
        while self._left:
            index = self._left[0]
            # The optimizer's list may have changed since the round began.
            if index < len(parameters) and _is_readable(parameters[index]):
                part = _part(parameters[index])
                room -= part.numel() * _COMPUTED_IN[parameters[index].dtype].itemsize
                first = parameters[indices[0]] if indices else parameters[index]
                other = (first.device, first.dtype) != (parameters[index].device, parameters[index].dtype)
                if indices and (room < 0 or other):
                    break
                indices.append(index)
                parts.append(part)
            self._left.popleft()
        return indices, parts


def _is_readable(parameter: Tensor) -> bool:
    return (
        parameter.dtype in _COMPUTED_IN
        and parameter.device.type in {"cpu", "cuda"}
        and parameter.layout is torch.strided
        and parameter.numel() > 0
        and not is_distributed_tensor(parameter)
    )


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.grad is not None


def _real(parameter: Tensor) -> Tensor:
    values = parameter.detach()
    return torch.view_as_real(values) if values.is_complex() else values


def _part(parameter: Tensor) -> Tensor:
    """The first elements, as many as fit, as a view: of any layout, never a copy."""
    values = _real(parameter)
    most = COPY_BYTES // _COMPUTED_IN[parameter.dtype].itemsize
    for dimension, size in enumerate(values.shape):
        if values.numel() <= most:
            break
        values = values.narrow(dimension, 0, max(1, most // (values.numel() // size)))
    return values


def _norms(tensors: list[Tensor], computed_in: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch._foreach_norm(tensors, 2.0, dtype=computed_in))  # noqa: SLF001 - no public one exists
