"""Tensors inside the tuples, lists, mappings and dataclasses that models take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor

# More than any model takes or returns; a structure that holds itself has an end by them.
_DEEPEST: Final = 64
_MOST: Final = 1_000_000


def tensors(value: Any, *, deepest: int = _DEEPEST, most: int = _MOST) -> Iterator[Tensor]:
    """All tensors in it, always in the same order. For ``deepest`` and ``most`` see ``walk``."""
    return (tensor for _, tensor in walk(value, deepest=deepest, most=most))


def walk(value: Any, *, deepest: int = _DEEPEST, most: int = _MOST) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """All tensors in it and the path to each: keys, indices and names of fields. Always in the same order.

    Args:
        value: A tensor, or a structure that may hold some.
        deepest: Structures within structures that are looked into; 0 takes nothing but a tensor itself.
        most: Values looked at, structures included, so that a list of a million numbers costs no more.
    """
    stack: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    looked = 0
    while stack and looked < most:
        looked += 1
        path, one = stack.pop()
        if isinstance(one, Tensor):
            yield path, one
        elif len(path) < deepest:
            stack += [((*path, place), part) for place, part in _parts(one, most - looked)][::-1]


def _parts(value: Any, most: int) -> Iterable[tuple[Any, Any]]:
    """Its first ``most`` parts, by key, index or name of the field; none of what is no structure."""
    if isinstance(value, tuple | list):
        return enumerate(value[:most])
    if isinstance(value, Mapping):
        return islice(value.items(), most)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    return ()


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with each tensor changed; what holds none is handed through."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in {list, tuple}:
        return type(value)(mapped(part, change) for part in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, change) for part in value))
    if type(value) is dict:
        return {key: mapped(part, change) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: mapped(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changed)
    return value


def version(tensor: Tensor) -> int:
    """How often it was changed in place."""
    return tensor._version  # noqa: SLF001 - torch documents it, and has no public name for it


def is_number(tensor: Tensor) -> bool:
    """Whether its elements can be non-finite at all."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return not is_number(tensor) or bool(torch.isfinite(tensor.detach()).all())


def is_fine(tensor: Tensor) -> bool:
    """Finite, or an attention mask: nothing but -inf, where no gradient goes."""
    if is_finite(tensor):
        return True
    detached = tensor.detach()
    return (
        not tensor.requires_grad
        and tensor.is_floating_point()
        and bool((torch.isfinite(detached) | (detached == -torch.inf)).all())
    )
