"""Whether an optimizer's update itself could have made parameters non-finite, with good gradients.

Looking at all parameters after every step would cost as much as reading all gradients. Common optimizers cannot
overflow as long as rate and gradients are of ordinary size, so the parameters are looked at only where that is
not so: an infinite or huge rate, no epsilon, or an optimizer whose arithmetic is not known.
"""

from __future__ import annotations

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


def is_trusted(optimizer: Optimizer, gradient_norm: float | None) -> bool:
    """Whether a step with finite gradients of this (unclipped) norm leaves finite parameters finite."""
    if type(optimizer) not in _KNOWN or gradient_norm is None:
        return False
    return all(_is_moderate(group, gradient_norm) for group in optimizer.param_groups)


def _is_moderate(group: dict[str, Any], gradient_norm: float) -> bool:
    rate, decay = group.get("lr"), group.get("weight_decay", 0.0)
    if isinstance(rate, torch.Tensor):
        if rate.device.type != "cpu":
            return False
        rate = float(rate)
    parameters = group["params"]
    if rate is None or not parameters:
        return not parameters
    largest, smallest = _range(frozenset(parameter.dtype for parameter in parameters))
    return bool(
        # NaN fails every comparison.
        abs(rate) * max(1.0, gradient_norm) < _SHARE * largest
        and abs(rate * decay) < 1.0
        # The usual 1e-8 is zero in float16.
        and group.get("eps", 1.0) >= smallest
        and group.get("momentum", 0.0) < 1.0
        and not group.get("centered", False)
    )


@lru_cache(maxsize=64)
def _range(dtypes: frozenset[torch.dtype]) -> tuple[float, float]:
    """Largest number that all of these types hold, and the smallest normal one."""
    numbers = [torch.finfo(dtype) for dtype in dtypes]
    return min(number.max for number in numbers), max(number.tiny for number in numbers)
