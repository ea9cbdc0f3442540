"""Mean, spread and non-finite share of the model's floating inputs: what a shift of the data shows in first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.loop.module_hooks import ModuleHook
from gradwatch.redaction import redact_name
from gradwatch.tensors.device_ring import is_capturing
from gradwatch.tensors.nested import walk
from gradwatch.tensors.sharding import is_distributed_tensor

MOST_INPUTS: Final = 8
# The arguments, and two levels within one: a dictionary of lists. A longer search would hold up the step.
_DEEPEST: Final = 3
_MOST_LOOKED_AT: Final = 256
# Elements looked at of one input. Of a larger one an evenly spaced part is: the mean of 32 Ki elements is known
# to half a percent of their deviation, and float64 copies of that many keep within 1 MiB of a device.
_MOST_ON_HOST: Final = 2**18
_MOST_ON_DEVICE: Final = 2**15
_LEAST: Final = torch.finfo(torch.float64).tiny


class InputStatistics(NamedTuple):
    """Of one input. Mean and population standard deviation of the finite elements, None without any."""

    mean: float | None
    stddev: float | None
    nonfinite: float


def floating_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Floating tensors among a model's arguments, by place: ``0``, ``batch.image``, ``pixel_values``."""
    arguments = dict[int | str, Any](enumerate(args)) | dict(kwargs)
    found = (
        (redact_name(".".join(map(str, path))), tensor)
        for path, tensor in walk(arguments, deepest=_DEEPEST, most=_MOST_LOOKED_AT)
        if _is_measurable(tensor)
    )
    return list(islice(found, MOST_INPUTS))


def _is_measurable(tensor: Tensor) -> bool:
    return (
        tensor.is_floating_point()
        and tensor.layout is torch.strided
        and tensor.device.type in {"cpu", "cuda"}
        and tensor.numel() > 0
        and not is_distributed_tensor(tensor)
    )


def statistics_vector(tensor: Tensor) -> Tensor:
    """Mean, standard deviation and non-finite share as three float64 numbers, where the tensor is."""
    values = _sample(tensor.detach()).to(torch.float64, copy=True).reshape(-1)
    bad = ~torch.isfinite(values)
    count = bad.sum(dtype=torch.float64)
    finite = values.numel() - count
    # Between -1 and 1 neither a sum nor a square overflows, however large a finite input is.
    largest = values.masked_fill_(bad, 0.0).abs().amax().clamp_min(_LEAST)
    mean = values.div_(largest).sum() / finite
    # Deviations in a second pass: the difference of two large squares would lose a small spread.
    deviations = values.sub_(mean).masked_fill_(bad, 0.0)
    spread = (deviations.dot(deviations) / finite).sqrt()
    return torch.stack([mean * largest, spread * largest, count / values.numel()])


def input_statistics(numbers: Sequence[float]) -> InputStatistics:
    """What the numbers of a ``statistics_vector`` say."""
    mean, stddev, share = numbers
    if math.isnan(mean):  # zero by zero: nothing finite
        return InputStatistics(None, None, share)
    return InputStatistics(mean, stddev, share)


def _sample(tensor: Tensor) -> Tensor:
    """Evenly spaced elements, as a view of any layout.

    The distance has no factor in common with any size: else it could be that of the channels, flattened or not,
    and a single one be all that is looked at.
    """
    most = _MOST_ON_HOST if tensor.device.type == "cpu" else _MOST_ON_DEVICE
    whole = tensor.numel()
    while tensor.numel() > most:
        longest = max(range(tensor.dim()), key=lambda dimension: tensor.shape[dimension])
        stride = math.ceil(tensor.numel() / most)
        while math.gcd(stride, whole) > 1:
            stride += 1
        stride = min(stride, tensor.shape[longest])
        tensor = tensor[(slice(None),) * longest + (slice(None, None, stride),)]
    return tensor


class InputProbe:
    """Catches the floating inputs of the next training forward of a module, once, and leaves it.

    Calls with gradients disabled are evaluation and are let pass, and so are all while not ``is_training``.
    """

    def __init__(
        self,
        module: nn.Module,
        take: Callable[[list[tuple[str, Tensor]]], None],
        is_training: Callable[[], bool] = lambda: True,
    ) -> None:
        self._take = take
        self._is_training = is_training
        self._handle = module.register_forward_pre_hook(ModuleHook(self._look), with_kwargs=True)

    def _look(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or is_capturing():
            return
        if torch.is_grad_enabled() and self._is_training():
            self.remove()
            self._take(floating_inputs(args, kwargs))

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()
