"""Whether an optimizer's update itself could have made parameters non-finite, with good gradients.

Looking at all parameters after every step would cost as much as reading all gradients. Common optimizers cannot
overflow as long as rate and gradients are of ordinary size, so the parameters are looked at only where that is
not so: an infinite or huge rate, no epsilon, or an optimizer whose arithmetic is not known.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final

import torch
from torch import optim
from torch.optim import Optimizer

_KNOWN: Final[frozenset[type]] = frozenset(
    {optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.RMSprop}
)  # fmt: skip
# An update a thousandth of the largest number can be added a thousand times.
_SHARE: Final = 1e-3
_OPTIONS: Final = ("lr", "weight_decay", "eps", "momentum", "centered")


class UpdateTrust:
    """What is known of one optimizer's updates, worked out again when its options change."""

    __slots__ = ("_known", "_options")

    def __init__(self) -> None:
        self._options: list[list[Any]] = []
        self._known = 0.0

    def norm(self, optimizer: object) -> float:
        """Below which (unclipped) norm of good gradients a step leaves good parameters good; 0 for none."""
        if type(optimizer) not in _KNOWN or not isinstance(optimizer, Optimizer):
            return 0.0
        options = [[group.get(name) for name in _OPTIONS] for group in optimizer.param_groups]
        # By identity: comparing a rate that is a tensor could synchronise, and it may change and stay the same.
        same = len(options) == len(self._options) and all(
            one is other and not isinstance(one, torch.Tensor)
            for now, before in zip(options, self._options, strict=True)
            for one, other in zip(now, before, strict=True)
        )
        if not same:
            self._options = options
            self._known = min((_trusted_norm(group) for group in optimizer.param_groups), default=math.inf)
        return self._known


def _trusted_norm(group: dict[str, Any]) -> float:
    rate, decay = group.get("lr"), group.get("weight_decay", 0.0)
    parameters = group["params"]
    if not parameters:
        return math.inf
    if isinstance(rate, torch.Tensor):
        rate = float(rate) if rate.device.type == "cpu" else None
    if rate is None:
        return 0.0
    largest, smallest = _range(frozenset(parameter.dtype for parameter in parameters))
    # NaN fails every comparison.
    moderate = (
        abs(rate) < _SHARE * largest
        and abs(rate * decay) < 1.0
        # The usual 1e-8 is zero in float16.
        and group.get("eps", 1.0) >= smallest
        and group.get("momentum", 0.0) < 1.0
        and not group.get("centered", False)
    )
    if not moderate:
        return 0.0
    return _SHARE * largest / abs(rate) if rate else math.inf


@lru_cache(maxsize=64)
def _range(dtypes: frozenset[torch.dtype]) -> tuple[float, float]:
    """Largest number that all of these types hold, and the smallest normal one."""
    numbers = [torch.finfo(dtype) for dtype in dtypes]
    return min(number.max for number in numbers), max(number.tiny for number in numbers)
