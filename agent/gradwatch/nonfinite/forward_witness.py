"""What went into a watched model and came out of it: two of the witnesses of a non-finite step.

One plain hook on the outermost module, and only while a step is observed: a hook costs every forward 1.1
microseconds (torch leaves its fast path), half of what an unobserved step may cost; putting it on and taking
it off costs 2. It reads one fused norm per type and keeps no tensor of the user's: CPU norms are judged at
once, and norms on a device wait for the ring.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor

from gradwatch.gradients.norms import HALF, DeviceNorms
from gradwatch.loop.module_hooks import ModuleHook, is_script
from gradwatch.loop.step_in_progress import StepInProgress
from gradwatch.nonfinite.forward_plan import ForwardPlan, PlanRecorder
from gradwatch.nonfinite.graph_walk import Graph, suspects_behind
from gradwatch.tensors.device_ring import is_capturing
from gradwatch.tensors.nested import walk

if TYPE_CHECKING:
    from torch import nn


ForwardVerdict = Literal["good", "input", "forward"]
# Where in the arguments or in the result a tensor is: number or name of the argument, and the way from there.
Place = tuple[Any, ...]
Tensors = Sequence[tuple[Place, Tensor]]

_MAX_DEPTH: Final = 5
_MAX_TENSORS: Final = 64
_MAX_VALUES: Final = 256
# Forward passes kept for one step: micro-batches of an accumulation; the oldest go first.
_MAX_READINGS: Final = 64
_NONE: Final[frozenset[int]] = frozenset()
_PLAIN: Final = frozenset({Tensor, torch.nn.Parameter})
_READABLE: Final = frozenset({torch.float32, torch.float64, *HALF, torch.complex64, torch.complex128})


@dataclass(slots=True, eq=False)
class ForwardReading:
    """One forward pass of a watched model.

    Attributes:
        model: Index of the model.
        epoch: Backward passes seen before it.
        steps: Optimizer steps begun before it.
        inputs: What is bad in each floating input, see ``_flaw``; a place is the same input in every pass.
        outputs: The same for the outputs.
        numbers: What autograd calls the operations that made the outputs; none without a graph.
        graph: The live graph behind a bad output on the CPU, as it was read at once.
        on_device: Norms still on a device: of the inputs, then of the outputs.
    """

    model: int
    epoch: int
    steps: int
    inputs: dict[Place, str]
    outputs: dict[Place, str]
    numbers: frozenset[int]
    graph: Graph | None = None
    on_device: tuple[Tensor, ...] = ()

    def settle(self, number: int, norm: float) -> None:
        """A norm has arrived from the device: of an input, or behind those of an output."""
        flaw = "" if math.isfinite(norm) else str(norm)
        count = len(self.inputs)
        if number < count:
            self.inputs[list(self.inputs)[number]] = flaw
        else:
            self.outputs[list(self.outputs)[number - count]] = flaw

    @property
    def is_bad(self) -> bool:
        """Whether anything in it is bad."""
        return any(self.inputs.values()) or any(self.outputs.values())


@dataclass(frozen=True, slots=True)
class DeviceWitness:
    """What travels with a step's gradients from a device.

    Attributes:
        readings: Its forward passes, whose norms may be on the device.
        parameters: Norms of the parameters before the step.
        epoch: Backward passes before that of the loss.
        settled: Whether the step before was observed and cannot have spoilt parameters with good gradients.
    """

    readings: Sequence[ForwardReading]
    parameters: Sequence[DeviceNorms]
    epoch: int
    settled: bool


class ForwardWitness:
    """Hooks on the watched models while a step is observed. Training thread only."""

    def __init__(self, progress: StepInProgress) -> None:
        self.progress = progress
        self.steps = 0
        self.readings: list[ForwardReading] = []
        self.plans: dict[int, ForwardPlan] = {}
        self._models: list[weakref.ref[nn.Module]] = []
        self._handles: dict[int, list[Any]] = {}
        self._recorders: dict[int, PlanRecorder] = {}
        # Masks of -inf and the like: bad in the same way in steps that turned out good, and so no evidence.
        self._habits: set[tuple[int, str, Place, str]] = set()
        self.armed = False
        # Whether models in training have run more than once before a backward: one may feed another.
        self.chained = False
        self._trained = -1
        self._outputs = 1
        self._compiles = False

    def add(self, model: nn.Module) -> None:
        """Watch this model too."""
        self._models.append(weakref.ref(model))
        if self.armed:
            self._attach(len(self._models) - 1, model)

    def arm(self, observe: bool) -> None:
        """Put the hooks on for a step that is observed, or take them off."""
        if observe == self.armed:
            return
        self.armed = observe
        if observe:
            for index, reference in enumerate(self._models):
                model = reference()
                if model is not None:
                    self._attach(index, model)
        else:
            self.remove()

    def remove(self) -> None:
        """Take everything off."""
        self.armed = False
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()
        for recorder in self._recorders.values():
            recorder.abandon()
        self._recorders.clear()

    def next_step(self, begun: int, optimizers: int, *, observed: bool) -> None:
        """A step has ended, ``begun`` ones in all: get ready for the next, and whether it is ``observed``.

        What a generator did counts for the step of its critic and for its own: readings live for as many steps
        as there are optimizers.
        """
        self.steps = begun
        oldest = begun - optimizers
        if self.readings and self.readings[0].steps <= oldest:
            epoch = self.progress.passes
            # A forward since the last backward is the next step's, even where steps are known late.
            self.readings = [
                reading for reading in self.readings if reading.steps > oldest or reading.epoch == epoch
            ]
        self.arm(observed)

    def note_habits(self, readings: Sequence[ForwardReading]) -> None:
        """The step was good, so whatever looks bad in its forward passes is meant to be.

        Of the passes before one backward only the last: an earlier one may have been of a batch thrown away.
        """
        for place, reading in enumerate(readings):
            if reading.is_bad and reading.epoch < self.progress.passes and _is_last(reading, readings[place:]):
                for kind, flaws in (("input", reading.inputs), ("output", reading.outputs)):
                    self._habits.update((reading.model, kind, *item) for item in flaws.items() if item[1])

    @property
    def is_plain(self) -> bool:
        """Whether a step, as far as any was seen, is one pass of one model to one output, meant to be good."""
        alone = len(self._models) == 1 and self._trained >= 0 and not self.chained
        return alone and self._outputs == 1 and not self.has_habits

    @property
    def has_habits(self) -> bool:
        """Whether some output holds infinities that are meant: then a graph may show them as a fault."""
        return any(kind == "output" for _, kind, *_ in self._habits)

    def leave_alone(self) -> None:
        """``torch.compile`` is in use: a hook could be traced, break a graph, and make it anew when it changes.

        Hooks outside of ``torch.compile``'s own wrapper of a model are not traced, and stay.
        ``torch.jit.script`` refuses modules with hooks that it cannot compile.
        """
        self._compiles = True
        if self.armed:
            self.arm(False)
            self.arm(True)

    def _attach(self, index: int, model: nn.Module) -> None:
        if is_script(model) or (self._compiles and not hasattr(model, "_orig_mod")):
            return
        hook = ModuleHook(partial(self.after, index))
        handles = [model.register_forward_hook(hook, with_kwargs=True)]
        if index not in self.plans and not _is_compiled(model):
            before = ModuleHook(partial(self.before, index))
            handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        self._handles[index] = handles

    def before(self, index: int, model: nn.Module, _args: object, _kwargs: object) -> None:
        """A watched model is about to run; learn its plan if that is still to do."""
        if not self.armed:
            return
        stale = self._recorders.pop(index, None)  # its forward raised
        if stale is not None:
            stale.abandon()
        if index not in self.plans and torch.is_grad_enabled() and not _is_tracing():
            self._recorders[index] = PlanRecorder(model)

    def after(
        self, index: int, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """A watched model has run."""
        if not self.armed:
            return
        if model.training:
            self.chained = self.chained or self._trained == self.progress.passes
            self._trained = self.progress.passes
        inputs, outputs = _arguments(args, kwargs), _readable(output)
        if self._recorders:
            recorder = self._recorders.pop(index, None)
            if recorder is not None:
                self.plans[index] = recorder.plan([t for _, t in inputs], [t for _, t in outputs])
        self._outputs = max(self._outputs, len(outputs))
        # A forward in evaluation, or of another thread, is not the step's.
        if self.progress.pauses or not torch.is_grad_enabled() or self.progress.is_elsewhere:
            return
        if torch._C._are_functorch_transforms_active() or _is_tracing():  # noqa: SLF001 - no public test
            return
        reading = self._read(index, inputs, outputs)
        if reading is not None:
            if len(self.readings) >= _MAX_READINGS:
                del self.readings[0]
            self.readings.append(reading)

    def _read(self, index: int, inputs: Tensors, outputs: Tensors) -> ForwardReading | None:
        for _, tensor in (*inputs, *outputs):
            if not tensor.is_cpu:
                return None if is_capturing() else self._read_on_device(index, inputs, outputs)
        reading = ForwardReading(
            index, self.progress.passes, self.steps,
            {place: _flaw(tensor) for place, tensor in inputs},
            {place: _flaw(tensor) for place, tensor in outputs},
            _NONE,
        )  # fmt: skip
        if not reading.is_bad:
            return reading
        reading.numbers = _numbers(outputs)
        self.pardon(reading)
        first = next((tensor for place, tensor in outputs if reading.outputs[place]), None)
        if first is not None:
            # Now the graph is there; behind a finite loss it would be gone by the time the gradients are read.
            reading.graph = suspects_behind(first)
        return reading

    def pardon(self, reading: ForwardReading) -> None:
        """Take back what is habitually bad, in the same way: a NaN among infinities that are meant is not."""
        for kind, flaws in (("input", reading.inputs), ("output", reading.outputs)):
            for place, flaw in flaws.items():
                if flaw and (reading.model, kind, place, flaw) in self._habits:
                    flaws[place] = ""

    def _read_on_device(self, index: int, inputs: Tensors, outputs: Tensors) -> ForwardReading:
        norms = tuple(
            torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32 if tensor.dtype in HALF else None)
            for _, tensor in (*inputs, *outputs)
        )
        return ForwardReading(
            index, self.progress.passes, self.steps,
            {place: "" for place, _ in inputs}, {place: "" for place, _ in outputs},
            _numbers(outputs), on_device=norms,
        )  # fmt: skip


def verdict(
    readings: Sequence[ForwardReading], graph: Graph | None, epoch: int
) -> tuple[ForwardVerdict | None, Graph | None]:
    """What the forward passes of a step say.

    ``graph`` is the one behind a bad loss, where it is alive; ``epoch`` counts the backward passes before that
    of the loss. Only passes since then can speak for a loss that nobody else speaks for.

    The first bad pass decides, if it is certain that the loss came from it: its operations are in the graph, or
    backward followed before the model ran again. A batch that was looked at and thrown away is neither. Also
    the graph that tells best where: the one behind its output, or else the loss's.
    """
    if not any(reading.epoch == epoch for reading in readings):
        return None, graph
    first = next((reading for reading in readings if reading.is_bad), None)
    if first is None:
        return "good", graph
    alive = frozenset(operation.number for operation in graph.operations) if graph is not None else _NONE
    is_last = _is_last(first, readings[readings.index(first) :])
    if not first.numbers or not (first.numbers & alive or is_last):
        return None, graph
    return "input" if any(first.inputs.values()) else "forward", first.graph or graph


def _is_last(reading: ForwardReading, readings: Sequence[ForwardReading]) -> bool:
    """Whether none of these is another pass of the same model before the same backward."""
    return not any(
        other is not reading and other.model == reading.model and other.epoch == reading.epoch
        for other in readings
    )


def _numbers(outputs: Tensors) -> frozenset[int]:
    return frozenset(o.grad_fn._sequence_nr() for _, o in outputs if o.grad_fn is not None)  # noqa: SLF001 - no other


def _flaw(tensor: Tensor) -> str:
    """What is bad in a CPU tensor: ``nan`` if it holds one, else its infinities; nothing if it is finite."""
    values = tensor.detach()
    # Either makes the sum of all one of them, and a sum is the cheapest read there is: 4 microseconds.
    total = (values.sum(dtype=torch.float32) if values.dtype in HALF else values.sum()).item()
    if total - total == 0:
        return ""
    # No NaN is behind an infinite sum; infinities of both signs are behind a NaN, and so may a NaN be.
    if total != total and bool(torch.isnan(values).any()):
        return "nan"
    if bool(torch.isfinite(values).all()):
        return ""
    return str(total) if total == total else "inf-inf"


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensors:
    if (
        not kwargs and len(args) == 1 and type(args[0]) is Tensor
    ):  # nearly always; the walk takes ten times longer
        return [((0,), args[0])] if _is_readable(args[0]) else []
    return _readable(dict[int | str, Any](enumerate(args)) | dict(kwargs))


def _readable(value: Any) -> Tensors:
    """Plain floating tensors in nested tuples, lists, dictionaries and dataclasses, in a fixed order."""
    if type(value) is Tensor:
        return [((), value)] if _is_readable(value) else []
    found = walk(value, deepest=_MAX_DEPTH, most=_MAX_VALUES)
    return list(islice(((place, tensor) for place, tensor in found if _is_readable(tensor)), _MAX_TENSORS))


def _is_readable(tensor: Tensor) -> bool:
    # Subclasses (shards, fake tensors) have norms of their own meaning.
    return (
        type(tensor) in _PLAIN
        and tensor.dtype in _READABLE
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and (tensor.is_cpu or tensor.is_cuda)
    )


def _is_tracing() -> bool:
    # What `torch.jit.is_tracing` asks; a traced `.item()` would become a constant of the trace.
    return torch._C._is_tracing()  # noqa: SLF001


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
