"""Tensors inside the tuples, lists, mappings and dataclasses that models take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in it, always in the same order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


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
