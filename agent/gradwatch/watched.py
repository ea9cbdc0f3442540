"""One watched optimizer: its parameters, their names and order, and the step it is in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_not
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.budget import Budget
from gradwatch.gradients import GradientReader, Reading, is_distributed_tensor, layer_name, named_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from gradwatch.suspects import DeviceWitness


class Model:
    """A watched module, held weakly, and the name in front of its layers once there are two."""

    __slots__ = ("name", "reference")

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.reference = weakref.ref(module)

    def layer_names(self, prefixed: bool) -> dict[int, str]:
        """Layer names by ``id`` of the parameter."""
        module = self.reference()
        if module is None:
            return {}
        names = named_parameters(module)
        return {key: f"{self.name}.{name}" for key, name in names.items()} if prefixed else names

    def qualified(self, name: str, *, prefixed: bool) -> str:
        """Layer name of one parameter."""
        return f"{self.name}.{layer_name(name)}" if prefixed else layer_name(name)

    def is_compiled(self) -> bool:
        """Whether its backward is one compiled graph, which hands gradients out in no telling order."""
        module = self.reference()
        return module is not None and (
            hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        )


class BackwardOrder:
    """The order in which one backward pass reached the parameters, learned by hooks that remove themselves."""

    __slots__ = ("_handles", "_seen", "_size")

    def __init__(self, parameters: Sequence[Tensor], learn: bool) -> None:
        self._size = len(parameters)
        self._seen: dict[int, None] = {}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._note(index))  # type: ignore[no-untyped-call] # torch
            for index, parameter in enumerate(parameters)
            if learn and parameter.requires_grad and parameter.is_leaf and not is_distributed_tensor(parameter)
        ]

    def _note(self, index: int) -> Callable[[Tensor], None]:
        seen = self._seen
        return lambda _parameter: seen.setdefault(index)

    @property
    def learning(self) -> bool:
        """Whether hooks are still on the parameters."""
        return bool(self._handles)

    def settle(self) -> None:
        """Stop learning."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def indices(self) -> Sequence[int]:
        """All parameters: those seen, then the others, last registered first."""
        return [*self._seen, *(i for i in reversed(range(self._size)) if i not in self._seen)]


class WatchedOptimizer:
    """State of one optimizer between its hooks. Only the training thread touches it.

    The optimizer is held weakly: forgetting it, without ``close()``, frees its parameters too.
    """

    __slots__ = (
        "budget", "capturing", "clip_epoch", "clip_total", "depth", "frame", "index", "is_late", "last_end",
        "last_epoch", "last_loss", "last_step", "layers", "nonfinite", "observe", "order", "poisoned",
        "previous_observed", "reader", "reading", "reading_epoch", "reference", "settled", "spent", "stock",
        "witness",
    )  # fmt: skip

    def __init__(
        self,
        optimizer: Optimizer,
        index: int,
        models: Sequence[Model],
        budget: Budget,
        gone: Callable[[Any], None],
    ) -> None:
        self.reference = weakref.ref(optimizer, gone)
        self.index = index
        self.budget = budget
        self.frame: FrameType | None = None
        self.depth = 0
        self.is_late = False
        self.capturing = False
        self.observe = True
        self.previous_observed = True
        self.reading: Reading | None = None
        self.reading_epoch = 0
        self.clip_total: float | None = None
        self.clip_epoch = -1
        self.last_loss: float | None = None
        self.last_step = 0
        self.last_epoch = -1
        self.last_end: int | None = None
        self.nonfinite = False
        self.poisoned = False
        # Whether the parameters were good when this optimizer last let go of them.
        self.settled = True
        self.witness: DeviceWitness | None = None
        self.spent = 0
        self.order = BackwardOrder((), learn=False)
        self.rebuild(optimizer, models)

    def rebuild(self, optimizer: Optimizer, models: Sequence[Model]) -> None:
        """Take stock of the optimizer's parameters and their names again."""
        parameters = parameters_of(optimizer)
        self.stock = _stock(optimizer)
        self.reader = GradientReader(parameters)
        self.order.settle()
        self.order = BackwardOrder(parameters, learn=not any(model.is_compiled() for model in models))
        self.rename(optimizer, models)

    def is_stale(self, optimizer: Optimizer) -> bool:
        """Whether parameters were added, taken away or replaced since `rebuild`."""
        now = _stock(optimizer)
        return len(now) != len(self.stock) or any(map(is_not, now, self.stock))

    def rename(self, optimizer: Optimizer, models: Sequence[Model]) -> None:
        """Name the layers after the watched models; parameters of none are named by their place."""
        names: dict[int, str] = {}
        for model in models:
            for key, name in model.layer_names(prefixed=len(models) > 1).items():
                names.setdefault(key, name)
        self.layers = tuple(
            names.get(id(parameter), f"param_groups.{group}.{place}")
            for group, place, parameter in _places(optimizer)
        )

    def owns(self, grads: Sequence[Tensor]) -> bool:
        """Whether these gradients are (some of) this optimizer's."""
        first = grads[0] if grads else None
        return first is not None and any(p.grad is first for p in self.reader.parameters)

    def is_nested(self, frame: FrameType) -> bool:
        """Whether a hook fires inside this optimizer's own step (a subclass that calls ``super().step()``)."""
        if self.frame is None:
            return False
        caller: FrameType | None = frame.f_back
        while caller is not None:
            if caller is self.frame:
                return True
            caller = caller.f_back
        return False  # an earlier step raised before its post hook


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Accelerate's and similar wrappers.

    Raises:
        TypeError: There is none.
    """
    inner = optimizer
    for _ in range(8):
        if isinstance(inner, torch.optim.Optimizer):
            return inner
        inner = getattr(inner, "optimizer", None)
    raise TypeError(
        "gradwatch.watch: expected a torch.optim.Optimizer (or a wrapper with one in `.optimizer`), "
        f"got {type(optimizer).__name__}"
    )


def _places(optimizer: Optimizer) -> Iterable[tuple[int, int, Tensor]]:
    seen: set[int] = set()
    for group, options in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(options["params"]):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield group, place, parameter


def parameters_of(optimizer: Optimizer) -> tuple[Tensor, ...]:
    """All parameters of the optimizer, each once."""
    return tuple(parameter for _, _, parameter in _places(optimizer))


def _stock(optimizer: Optimizer) -> tuple[Tensor, ...]:
    return tuple(chain.from_iterable(group["params"] for group in optimizer.param_groups))
