"""Loops whose gradients are not where torch puts them: told apart, so that nothing false is said of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

NO_GRADIENTS: Final = "an optimizer stepped and none of its parameters has a `.grad`"
STRANGERS: Final = "optimizers step, and none of them has a parameter of the watched models"
ELSEWHERE: Final = "an optimizer steps in another thread than the first one, whose thread alone is watched"
PENDING_SUMS: Final = "some gradients are sums over ranks that were not made yet; their norms are not reported"
_MAIN_GRAD: Final = "gradients are kept in `main_grad` (Megatron), and not in `.grad`"
_DEEPSPEED: Final = "gradients are kept in partitions (DeepSpeed ZeRO), and not in `.grad`"
_FLATTENED: Final = (
    "parameters are flattened and sharded by FullyShardedDataParallel; `fully_shard` can be seen"
)
_NOT_THE_MODELS: Final = (
    "the optimizer updates tensors that are not the watched models' parameters "
    "(master copies or partitions, as DeepSpeed and Megatron keep them)"
)


def why_unseen(
    parameters: Sequence[Tensor], trained: Iterable[Tensor], watched: Iterable[Tensor]
) -> str | None:
    """Why gradients of an optimizer's ``parameters`` would not tell the truth; None if they do.

    Args:
        parameters: Those of the optimizer.
        trained: Those of the watched models.
        watched: Those of all watched optimizers.
    """
    trained = [parameter for parameter in trained if parameter.requires_grad]
    for parameter in (*parameters, *trained):
        if parameter.grad is None and hasattr(parameter, "main_grad"):
            return _MAIN_GRAD
        if hasattr(parameter, "ds_id"):
            return _DEEPSPEED
        if hasattr(parameter, "_fsdp_flattened"):
            return _FLATTENED
    models = {id(parameter) for parameter in trained}
    strange = models and not any(id(parameter) in models for parameter in parameters)
    if strange and not any(id(parameter) in models for parameter in watched):
        return _NOT_THE_MODELS
    return None


def unreadable(count: int, of: int) -> str:
    """Some parameters live where their gradients cannot be read."""
    return f"{count} of {of} parameters are on a device whose gradients cannot be read"
