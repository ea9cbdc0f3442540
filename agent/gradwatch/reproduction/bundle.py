"""The reproduction bundle: all it takes to run one training step again, in one file of plain values.

Written with ``torch.save``, read with ``weights_only=True``: tensors, numbers, texts and containers of them.
Only inputs of a class of the user's own need more trust than that.
"""

from __future__ import annotations

import pickle
import shutil
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import torch

from gradwatch.local_files import keep
from gradwatch.tensors.nested import tensors

_FORMAT: Final = 1


class BundleError(Exception):
    """A bundle cannot be written, read or run; the message is one clear line."""


@dataclass(slots=True)
class Call:
    """One forward pass of a model within the step.

    Attributes:
        model: Name of the model.
        random: Generators at its start, see ``gradwatch.reproduction.random_state``.
        buffers: Buffers at its start; batch statistics are the model's memory of earlier steps.
        gradients: What backward handed to each output that took part in the graph; None where it did not come.
        autocast: Device types with autocast on, and its type there.
        inputs_changed: An input was modified in place after the pass began, so it is not what it was.
    """

    model: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: dict[str, Any]
    buffers: dict[str, torch.Tensor]
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    autocast: dict[str, torch.dtype] = field(default_factory=dict)
    inputs_changed: bool = False


@dataclass(slots=True)
class ModelState:
    """A model as it was: ``kind`` names its class as ``module:qualname``."""

    kind: str
    parameters: dict[str, torch.Tensor]
    frozen: list[str]
    evaluating: list[str]


@dataclass(slots=True)
class Bundle:
    """One step.

    Attributes:
        exact: The parameters are still those that the step's forward passes used.
        changed: Models of which they are not: an update came first, of the step itself or another optimizer's.
        finding: What the agent found: ``layer``, ``born_in``, ``layers``, ``elements``.
        optimizers: ``kind`` and ``state`` of each.
        replay: ``module:function`` that builds the model, or the models by name; None where nobody said.
        script: The program that trained.
    """

    run_id: str
    attempt: int | None
    rank: int
    step: int
    loss: float | None
    exact: bool
    finding: dict[str, Any]
    calls: list[Call]
    models: dict[str, ModelState]
    optimizers: list[dict[str, Any]]
    replay: str | None
    script: str | None
    versions: dict[str, str | None]
    changed: list[str] = field(default_factory=list)


def save(bundle: Bundle, directory: Path, name: str) -> Path:
    """Write it.

    Raises:
        BundleError: There is no room, or something in it cannot be pickled.
        OSError: The file cannot be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    size = sum(t.numel() * t.element_size() for t in tensors(_tree(bundle)))
    if 2 * size > shutil.disk_usage(directory).free:
        raise BundleError(f"a bundle of {size >> 20} MiB would take more than half of the room in {directory}")
    try:
        return keep(directory, name, lambda file: torch.save({"format": _FORMAT, **_tree(bundle)}, file))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise BundleError(f"an input of the model cannot be written: {error}") from error
    except RuntimeError as error:
        # torch closes its archive whatever happened, and then tells of that instead of why writing failed.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise BundleError(f"cannot write it: {str(cause).splitlines()[0]}") from error


def load(path: Path, device: str = "cpu", *, trusted: bool = False) -> Bundle:
    """Read it. ``trusted`` also takes objects of any class, which can run any code.

    Raises:
        BundleError: It is none, or holds more than plain values and is not trusted.
    """
    if not zipfile.is_zipfile(path):
        raise BundleError(f"{path} is no bundle")
    try:
        whole = torch.load(path, map_location=device, weights_only=not trusted)
    except pickle.UnpicklingError as error:
        raise BundleError(
            f"{path} holds objects of other classes; --trust loads them, if you know who wrote it"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, ImportError, AttributeError) as error:
        raise BundleError(
            f"cannot read {path}: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    if not isinstance(whole, dict) or whole.get("format") != _FORMAT:
        raise BundleError(f"{path} is no bundle of this version")
    try:
        known = {each.name: whole[each.name] for each in fields(Bundle) if each.name in whole}
        known["calls"] = [Call(**call) for call in known["calls"]]
        known["models"] = {name: ModelState(**state) for name, state in known["models"].items()}
        return Bundle(**known)
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is no whole bundle: {error}") from error


def _tree(bundle: Bundle) -> dict[str, Any]:
    # Not dataclasses.asdict: that would copy every tensor.
    tree = {each.name: getattr(bundle, each.name) for each in fields(bundle)}
    tree["calls"] = [{each.name: getattr(call, each.name) for each in fields(call)} for call in bundle.calls]
    tree["models"] = {
        name: {each.name: getattr(state, each.name) for each in fields(state)}
        for name, state in bundle.models.items()
    }
    return tree
