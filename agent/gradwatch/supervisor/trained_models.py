"""Which modules do these optimizers train? Looked up among all that are alive, once.

A look at everything that the garbage collector knows takes some 20 ms; hooks on the registration of modules
would be paid for by every module that is ever made.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from gradwatch.loop.watched import parameters_of

if TYPE_CHECKING:
    from torch.optim import Optimizer


def trained_models(optimizers: Iterable[Optimizer]) -> list[nn.Module]:
    """The smallest modules that own what is trained, one for each that belongs to no other.

    Smallest by the parameters that it has. Of several with the same ones, it is the outermost: that is the one
    with wrappers (DDP, ``torch.compile``) around it, and the one whose names are those of its checkpoints.
    """
    trained = {id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer)}
    alive = _modules()
    inner = {id(child) for module in alive for child in _children(module)}
    found: dict[int, nn.Module] = {}
    for module in alive:
        if id(module) not in inner:
            smallest = _smallest(module, trained)
            if smallest is not None:
                found[id(smallest)] = smallest
    within = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for key, module in found.items() if key not in within]


def are_apart(optimizers: Iterable[Optimizer]) -> bool:
    """Whether no parameter belongs to two of them."""
    everything = [id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer)]
    return len(everything) == len(set(everything))


def _smallest(module: nn.Module, trained: set[int]) -> nn.Module | None:
    smallest, owned = module, _parameters(module)
    mine = owned & trained
    if not mine:
        return None
    part: nn.Module | None = module
    while part is not None:
        if len(_parameters(part)) < len(owned):
            smallest, owned = part, _parameters(part)
        part = next((child for child in _children(part) if mine <= _parameters(child)), None)
    return smallest


def _modules() -> list[nn.Module]:
    kinds: set[type] = set()
    waiting: list[type] = [nn.Module]
    while waiting:
        kind = waiting.pop()
        if kind not in kinds:
            kinds.add(kind)
            waiting += type.__subclasses__(kind)
    # By its type: `isinstance` would ask proxies what they stand for, and they would go and make it.
    return [thing for thing in gc.get_objects() if type(thing) in kinds and "_modules" in vars(thing)]


def _children(module: nn.Module) -> list[nn.Module]:
    return list(module.children())


def _parameters(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}
