"""Running a captured step again, and saying where its bad value was born."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.reproduction.bundle import Bundle, BundleError, Call
from gradwatch.reproduction.dense import DenseWatch, Visit
from gradwatch.reproduction.random_state import random_state, restore
from gradwatch.tensors.nested import is_fine, is_finite, mapped, tensors

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where it was born. ``born_in`` is None when the replay stayed finite; ``layer`` is not guessed."""

    born_in: str | None
    layer: str | None
    why: str


def resolve(reference: str) -> Callable[..., Any]:
    """The function or class that ``module:name`` names; modules next to the caller are found too.

    Raises:
        BundleError: There is none.
    """
    module, _, name = reference.partition(":")
    if not module or not name:
        raise BundleError(f"{reference!r}: expected module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise BundleError(f"{reference!r}: {error}") from error
    if not callable(found):
        raise BundleError(f"{reference!r} is no function")
    return found  # type: ignore[no-any-return]


def build(bundle: Bundle, reference: str | None, device: str) -> dict[str, nn.Module]:
    """The models of the step, in the state they were in.

    Raises:
        BundleError: They cannot be built, or are not those of the bundle.
    """
    reference = reference or bundle.replay
    if reference is not None:
        made = _call(reference)
        models = dict(made) if isinstance(made, Mapping) else dict.fromkeys(list(bundle.models)[:1], made)
    else:
        models = {name: _call(state.kind) for name, state in bundle.models.items()}
    for name, state in bundle.models.items():
        model = models.get(name)
        if not isinstance(model, nn.Module):
            raise BundleError(f"{reference or state.kind} gives no model {name!r}: --model module:function")
        _load(model.to(device), bundle, name)
    return models


def _call(reference: str) -> Any:
    if reference.startswith("__main__:"):
        raise BundleError(f"{reference} lived in a script: say how to build it with --model module:function")
    try:
        return resolve(reference)()
    except BundleError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BundleError(f"cannot build {reference}: {reason}; --model module:function says how") from error


def _load(model: nn.Module, bundle: Bundle, name: str) -> None:
    state = bundle.models[name]
    own = dict(model.named_parameters())
    if own.keys() != state.parameters.keys():
        odd = ", ".join(sorted(own.keys() ^ state.parameters.keys())[:3])
        raise BundleError(f"{type(model).__name__} is not the model of the bundle: parameters differ ({odd})")
    with torch.no_grad():
        for each, parameter in own.items():
            saved = state.parameters[each]
            if parameter.shape != saved.shape:
                raise BundleError(
                    f"{type(model).__name__} is not the model of the bundle: {each} is "
                    f"{tuple(parameter.shape)}, in the bundle {tuple(saved.shape)}"
                )
            parameter.data = saved.clone()
            parameter.requires_grad_(each not in state.frozen)
    for each, part in model.named_modules():
        part.training = each not in state.evaluating


def begin(model: nn.Module, call: Call) -> None:
    """Put buffers and generators where they were when this pass began."""
    owners = dict(model.named_modules())
    for name, saved in call.buffers.items():
        path, _, leaf = name.rpartition(".")
        owner = owners.get(path)
        if owner is not None and leaf in dict(owner.named_buffers(recurse=False)):
            setattr(owner, leaf, saved.clone())
    restore(call.random)


def run(model: nn.Module, call: Call) -> Any:
    """One forward pass as it was."""
    begin(model, call)
    with contextlib.ExitStack() as stack:
        for kind, dtype in call.autocast.items():
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        return model(*fresh(call.args), **fresh(call.kwargs))


def fresh(arguments: Any) -> Any:
    """Copies of arguments, so that a module which changes them in place does not change them for the next."""
    return mapped(arguments, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever the block draws, the caller's generators go on as if nothing had been."""
    before = random_state()
    try:
        yield
    finally:
        restore(before)


def replay(bundle: Bundle, models: dict[str, nn.Module], loss: Loss | None) -> tuple[Verdict, list[Visit]]:
    """Run the step under dense watch. With ``loss``, its own gradients are used, not the captured ones.

    Raises:
        BundleError: The model does not run.
    """
    first = _before_the_step(bundle)
    if first is not None:
        return first, []
    losses: list[Tensor] = []
    with generators_kept(), DenseWatch(models) as watch:
        try:
            ran = [(call, run(models[call.model], call)) for call in bundle.calls]
            if any(visit.output_fault for visit in watch.visits if visit.parent is None):
                return _forward(watch), watch.visits
            for call, output in ran:
                _backward(call, output, loss, losses)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BundleError(f"the step cannot be run again: {reason}") from error
        return _after_forward(bundle, watch, losses), watch.visits


def inputs_of(
    bundle: Bundle, models: dict[str, nn.Module], name: str
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """A module by its name, and copies of what its first call in the step gets; None when it is not called."""
    several = len(models) > 1
    for model_name, model in models.items():
        prefix = f"{model_name}." if several else ""
        for path, module in model.named_modules():
            if name in {f"{prefix}{path}", f"{prefix}{path}".rstrip(".")}:
                return _first_call(bundle, model_name, model, module)
    return None


def _first_call(
    bundle: Bundle, model_name: str, model: nn.Module, module: nn.Module
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    seen: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append((module, fresh(args), fresh(kwargs)))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with generators_kept(), torch.no_grad():
            for call in bundle.calls:
                if call.model == model_name and not seen:
                    run(model, call)
    finally:
        handle.remove()
    return seen[0] if seen else None


def _before_the_step(bundle: Bundle) -> Verdict | None:
    bad = [
        name
        for state in bundle.models.values()
        for name, parameter in state.parameters.items()
        if not is_finite(parameter)
    ]
    if bad:
        when = "before the step" if bundle.exact else "by the time the bundle was written, after the update"
        return Verdict(
            "parameters", bad[0] if len(bad) == 1 else None, f"{len(bad)} parameters were bad {when}"
        )
    for call in bundle.calls:
        for place, value in (*enumerate(call.args), *call.kwargs.items()):
            if not all(is_fine(tensor) for tensor in tensors(value)):
                return Verdict("input", None, f"input {place} of the model was bad")
    return None


def _forward(watch: DenseWatch) -> Verdict:
    born = watch.born_in_forward()
    if born is None:
        return Verdict("forward", None, "the model's output was bad, and no single module made it so")
    return Verdict("forward", born.name, f"good inputs, {born.output_fault} in the output of {born.kind}")


def _backward(call: Call, output: Any, loss: Loss | None, losses: list[Tensor]) -> None:
    if loss is not None:
        losses.append(loss(output))
        losses[-1].backward()  # type: ignore[no-untyped-call] # torch
        return
    graph = [tensor for tensor in tensors(output) if tensor.requires_grad]
    pairs = [(t, g) for t, g in zip(graph, call.gradients, strict=False) if g is not None]
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


def _after_forward(bundle: Bundle, watch: DenseWatch, losses: list[Tensor]) -> Verdict:
    recorded_bad = bundle.loss is not None and not math.isfinite(bundle.loss)
    if not all(is_finite(loss) for loss in losses) or (recorded_bad and not losses):
        return Verdict("loss", None, "the model's output was good, the loss was not")
    sent_back = [visit for visit in watch.visits if visit.parent is None]
    if not all(good for visit in sent_back for good in visit.gradients_in):
        return Verdict("backward", None, "the gradient that the loss sent back to the model was bad already")
    guilty = watch.born_in_backward()
    if guilty is not None:
        where = f"its parameter {guilty.bad_parameters[0]}" if guilty.bad_parameters else "its inputs"
        return Verdict("backward", guilty.name, f"good gradients in, bad ones to {where}, in {guilty.kind}")
    return Verdict(None, None, "nothing was non-finite: it depends on something the bundle does not hold")
