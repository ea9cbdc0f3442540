"""``capture="on_nonfinite"``: remembers how each step began, and writes it down when the step turns out bad.

It costs, and is asked for: inputs of the last two steps are held, and what backward hands to the model's
outputs; each forward pass copies the generators' states and the batch statistics. Parameters are not copied: at
a finding made before the update they are still there, and their version counters tell whether they are.
"""

from __future__ import annotations

import platform
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from gradwatch.local_files import file_name
from gradwatch.loop.module_hooks import ModuleHook, is_script
from gradwatch.reproduction.bundle import Bundle, BundleError, Call, ModelState, save
from gradwatch.reproduction.random_state import portable, random_state
from gradwatch.safety import internal_error, log, shielded
from gradwatch.telemetry import NonfiniteStep
from gradwatch.tensors.device_ring import is_capturing
from gradwatch.tensors.nested import mapped, tensors, version
from gradwatch.tensors.sharding import is_distributed_tensor

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from gradwatch.identity import Identity
    from gradwatch.loop.step_in_progress import StepInProgress

# A finding on a device arrives one step late. More passes in a step than this are accumulation without end.
_STEPS_KEPT: Final = 2
_CALLS_KEPT: Final = 64


@dataclass(slots=True)
class _Pass:
    """A forward pass under observation. ``versions`` are of its inputs, when it began."""

    call: Call
    versions: list[int]
    gradients: list[list[Tensor]] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    """What a step did so far. ``versions``: of each model's parameters when its first pass began."""

    number: int
    passes: list[_Pass] = field(default_factory=list)
    versions: dict[str, list[int]] = field(default_factory=dict)


class Capture:
    """Hooks on the watched models, and the bundle of the first non-finite step.

    Args:
        step: Index of the step in progress.
        progress: Tells what is not training's: evaluation, and other threads.
        optimizers: Those that are watched.
        saved: Told about the file.
    """

    def __init__(
        self,
        step: Callable[[], int],
        progress: StepInProgress,
        optimizers: Callable[[], Sequence[Optimizer]],
        saved: Callable[[int, Path], None],
        directory: Path,
        identity: Identity,
        replay: str | None,
    ) -> None:
        self._step = step
        self._progress = progress
        self._optimizers = optimizers
        self._saved = saved
        self._directory = directory
        self._identity = identity
        self._replay = replay
        self._models: dict[str, nn.Module] = {}
        self._copies: dict[tuple[str, str], tuple[weakref.ref[Tensor], int, Tensor]] = {}
        self._steps: list[_Step] = []
        self._handles: dict[str, list[Any]] = {}
        self._compiles = False
        self._done = False
        self._told = False

    @shielded(None)
    def add_model(self, model: nn.Module, name: str) -> None:
        """Remember this model's passes from now on."""
        if any(is_distributed_tensor(parameter) for parameter in model.parameters()):
            log.warning("capture: %s is sharded, and one rank alone cannot replay its step; not captured", name)
            return
        if is_script(model):
            log.warning("capture: TorchScript has no hooks that show its inputs; %s is not captured", name)
            return
        base, number = name, 1
        while name in self._models:
            number += 1
            name = f"{base}_{number}"
        if self._compiles and not hasattr(model, "_orig_mod"):
            log.warning("capture: hooks would break what torch.compile traces; %s is not captured", name)
            return
        self._models[name] = model
        self._handles[name] = [
            model.register_forward_pre_hook(
                ModuleHook(partial(self._before, name)), prepend=True, with_kwargs=True
            ),
            model.register_forward_hook(ModuleHook(partial(self._after, name))),
        ]

    def compiles(self) -> None:
        """``torch.compile`` is in use: only hooks outside its own wrapper of a model are not traced by it."""
        self._compiles = True
        for name, model in list(self._models.items()):
            if not hasattr(model, "_orig_mod"):
                log.warning("capture: hooks would break what torch.compile traces; %s is not captured", name)
                del self._models[name]
                for handle in self._handles.pop(name):
                    handle.remove()

    def remove(self) -> None:
        """Take the hooks off and let everything go."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()
        self._models.clear()
        self._copies.clear()
        self._steps.clear()

    def _before(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_training() or is_capturing():
            return
        step = self._current()
        step.versions.setdefault(name, [version(parameter) for parameter in model.parameters()])
        inner = unwrapped(model)
        call = Call(
            name,
            mapped(args, _detached),
            mapped(kwargs, _detached),
            random_state(),
            {each: self._copy(name, each, buffer, owner) for each, buffer, owner in _buffers(inner)},
            autocast={
                kind: torch.get_autocast_dtype(kind)
                for kind in ("cpu", "cuda")
                if torch.is_autocast_enabled(kind)
            },
        )
        step.passes.append(_Pass(call, [version(each) for each in tensors((args, kwargs))]))
        if len(step.passes) > _CALLS_KEPT:
            del step.passes[0]

    def _after(self, name: str, _model: nn.Module, _args: Any, output: Any) -> None:
        if not self._is_training() or not self._steps:
            return
        begun = [each for each in self._steps[-1].passes if each.call.model == name and not each.gradients]
        if not begun:
            return
        for tensor in tensors(output):
            if tensor.requires_grad:
                arrived: list[Tensor] = []
                begun[-1].gradients.append(arrived)
                tensor.register_hook(_keeper(arrived))  # type: ignore[no-untyped-call] # torch

    def _is_training(self) -> bool:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return not (self._progress.pauses or self._progress.is_elsewhere)

    def _current(self) -> _Step:
        number = self._step()
        if not self._steps or self._steps[-1].number != number:
            self._steps = [*self._steps[1 - _STEPS_KEPT :], _Step(number)]
        return self._steps[-1]

    def _copy(self, model: str, name: str, buffer: Tensor, owner: nn.Module) -> Tensor:
        """The buffer as it is now; unchanged ones (masks, tables) share one copy over all passes."""
        known = self._copies.get((model, name))
        # A module may put another tensor in its place, whose version says nothing of the one before.
        is_known = known is not None and known[0]() is buffer and known[1] == version(buffer)
        # The kernels that update running statistics do not count as in-place changes.
        if known is None or not is_known or getattr(owner, "track_running_stats", False):
            known = (weakref.ref(buffer), version(buffer), buffer.detach().clone())
            self._copies[model, name] = known
        return known[2]

    @shielded(None)
    def nonfinite(self, found: NonfiniteStep) -> None:
        """Write the bundle of this step, on the thread that trains and before its update: once a run."""
        # Of several in which it may have come the first that is kept: mostly its gradients went unseen.
        since = found.step if found.since is None else found.since
        step = next((each for each in self._steps if since <= each.number <= found.step), None)
        if self._done:
            return
        if step is None:
            if not self._told:
                self._told = True
                log.warning(
                    "capture: no bundle of step %d: no forward pass of a watched model was seen in it; "
                    "only model(...) is, not a method of the model's own", found.step,
                )  # fmt: skip
            return
        self._done = True
        who = self._identity
        name = file_name("bundle", who.run_id, who.attempt, who.rank, f"step{step.number}.pt")
        try:
            path = save(self._bundle(step, found), self._directory, name)
        except (OSError, BundleError) as error:
            log.warning("capture: no bundle of step %d: %s", step.number, error)
        else:
            self._saved(step.number, path)
        finally:
            self.remove()

    def _bundle(self, step: _Step, found: NonfiniteStep) -> Bundle:
        calls = []
        for one in step.passes:
            one.call.gradients = [
                torch.stack(parts).sum(0) if len(parts) > 1 else parts[0] if parts else None
                for parts in one.gradients
            ]
            now = [version(each) for each in tensors((one.call.args, one.call.kwargs))]
            one.call.random = portable(one.call.random)
            one.call.inputs_changed = now != one.versions
            calls.append(one.call)
        who = self._identity
        changed = [
            name
            for name, versions in step.versions.items()
            if versions != [version(parameter) for parameter in self._models[name].parameters()]
        ]
        return Bundle(
            run_id=who.run_id,
            attempt=who.attempt,
            rank=who.rank,
            step=step.number,
            loss=found.loss,
            exact=not changed,
            finding={
                "layer": found.layer,
                "born_in": found.born_in,
                "layers": found.layers,
                "elements": found.elements,
            },
            calls=calls,
            models={name: _state(unwrapped(model)) for name, model in self._models.items()},
            optimizers=[{"kind": kind_of(one), "state": one.state_dict()} for one in self._optimizers()],
            replay=self._replay,
            script=sys.argv[0] if sys.argv else None,
            versions={
                "torch": str(torch.__version__),
                "cuda": torch.version.cuda,
                "python": platform.python_version(),
            },
            changed=changed,
        )


def _keeper(arrived: list[Tensor]) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        try:
            arrived.append(_copied(gradient.detach()))
        except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
            internal_error(error, "capture")

    return keep


def _copied(gradient: Tensor) -> Tensor:
    """With memory of its own: autograd may make this memory a parameter's gradient and add to it."""
    if gradient.layout != torch.strided or gradient.is_nested:
        return gradient.clone()
    # What ``sum()`` sends back is one value, repeated: no more is copied than there is.
    once = tuple(slice(None) if stride else slice(1) for stride in gradient.stride())
    return gradient[once].clone().expand(gradient.shape)


def _detached(tensor: Tensor) -> Tensor:
    # Shares memory and version counter, not the graph. That a gradient was wanted is kept as a flag of its own.
    return tensor.detach().requires_grad_(tensor.requires_grad and tensor.is_floating_point())


def _buffers(module: nn.Module) -> list[tuple[str, Tensor, nn.Module]]:
    return [
        (f"{path}.{name}" if path else name, buffer, owner)
        for path, owner in module.named_modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]


def _state(module: nn.Module) -> ModelState:
    return ModelState(
        kind=kind_of(module),
        parameters={name: parameter.detach() for name, parameter in module.named_parameters()},
        frozen=[name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        evaluating=[name for name, part in module.named_modules() if not part.training],
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel's and compile's wrappers."""
    for attribute in ("module", "_orig_mod"):
        inner = getattr(module, attribute, None)
        if isinstance(inner, torch.nn.Module) and type(module).__module__.startswith("torch."):
            return unwrapped(inner)
    return module


def kind_of(thing: object) -> str:
    """Its class as ``module:qualname``."""
    return f"{type(thing).__module__}:{type(thing).__qualname__}"
