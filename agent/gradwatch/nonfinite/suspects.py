"""A closer look at steps that seem non-finite. Runs on such steps only, so it may take its time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch.distributed as dist
from torch.optim import Optimizer

from gradwatch.gradients.norms import DeviceNorms, Reading, nonfinite_among
from gradwatch.loop.step_sink import StepSink
from gradwatch.loop.watched import Model, Steps, WatchedOptimizer, parameters_of
from gradwatch.nonfinite.birthplace import Origin, Witnesses, first_in_backward, origin
from gradwatch.nonfinite.forward_plan import NOWHERE, Map, Site, site
from gradwatch.nonfinite.forward_witness import DeviceWitness, ForwardVerdict, ForwardWitness, verdict
from gradwatch.nonfinite.graph_walk import Graph, suspects_behind
from gradwatch.telemetry import NonfiniteStep, StepRecord

if TYPE_CHECKING:
    from torch import Tensor


def is_finite(value: float | None) -> bool:
    """Whether a value is finite; one that is not known raises no suspicion."""
    return value is None or math.isfinite(value)


def _has_peers() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@dataclass(frozen=True, slots=True)
class _Parameters:
    """Parameters that were bad before the step.

    Attributes:
        bad: By the index of their optimizer.
        loose: Whether any that no watched optimizer steps are.
        only: Name of the bad one, if there is but one.
        by: What made them bad; None when not known.
    """

    bad: Mapping[int, Sequence[int]]
    loose: bool
    only: str | None
    by: Literal["optimizer", "parameters"] | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen before a backward pass from a bad loss; ``steps`` had begun by then."""

    steps: int
    parameters: _Parameters
    forward: ForwardVerdict | None
    site: Site


class Suspects:
    """Finds out about suspicious steps of the watched optimizers, and reports those that are guilty."""

    def __init__(
        self,
        sink: StepSink,
        watched: Mapping[int, WatchedOptimizer],
        models: Sequence[Model],
        forward: ForwardWitness,
    ) -> None:
        self._sink = sink
        self._watched = watched
        self._models = models
        self._forward = forward
        self.evidence: Evidence | None = None
        # Optimizers whose last step from a device was bad.
        self._arrived_bad: set[int] = set()

    # --- Before backward ---------------------------------------------------------------------------------

    def loss_seen(self, steps: int) -> None:
        """A backward pass begins after so many steps: what was found about an earlier one's loss is over."""
        if self.evidence is not None and self.evidence.steps != steps:
            self.evidence = None

    def loss_is_bad(self, root: Tensor, steps: int) -> None:
        """Backward is about to run from a bad loss on the CPU: parameters and graph are still as they were."""
        if self.evidence is not None or not self._sink.wants_nonfinite_detail():
            return
        self.evidence = self._gather(steps, suspects_behind(root), self._forward.progress.passes)

    def _gather(self, steps: int, graph: Graph | None, epoch: int) -> Evidence:
        parameters = self._poisoned()
        forward, graph = verdict(self._forward.readings, graph, epoch)
        if forward in ("good", None) and self._forward.has_habits:
            graph = None
        return Evidence(steps, parameters, forward, NOWHERE if graph is None else site(graph, self._maps()))

    def discard(self) -> None:
        """The batch was thrown away."""
        self.evidence = None
        self._forward.readings.clear()

    # --- The step ----------------------------------------------------------------------------------------

    def on_host(
        self, step: int, watched: WatchedOptimizer, reading: Reading, loss: float | None, *, before: bool
    ) -> None:
        """A step whose loss or CPU gradients look bad, while both are there; ``before`` its update or after.

        Norms that only overflowed are corrected in the reading.
        """
        norms = reading.norms
        # Indices on a device come after those on the host, and have no norm yet.
        pairs = list(zip(reading.indices, norms, strict=False))
        doubtful = [index for index, norm in pairs if not math.isfinite(norm)]
        bad = watched.reader.nonfinite(doubtful)
        if len(bad) < len(doubtful):
            fine = set(doubtful).difference(bad)
            norms[:] = [watched.reader.exact_norm(i) if i in fine else norm for i, norm in pairs]
        if not bad and is_finite(loss):
            return
        watched.nonfinite = True
        found, layer = self._origin(watched, reading.indices, bad, loss, before=before)
        self._sink.nonfinite(
            NonfiniteStep(
                step,
                layer=layer,
                born_in=found.born_in,
                layers=len(bad),
                elements=watched.reader.nonfinite_elements(bad),
                loss=loss,
            )
        )

    def gone(self, step: int, watched: WatchedOptimizer, reading: Reading, loss: float | None) -> bool:
        """A step whose gradients were read in backward's order and freed at once; whether it was non-finite."""
        bad = [i for i, norm in zip(reading.indices, reading.norms, strict=False) if not math.isfinite(norm)]
        if not bad and is_finite(loss):
            return False
        # The parameters have been stepped already, and say nothing about what they were before.
        forward, _ = verdict(self._forward.readings, None, self._forward.progress.passes - 1)
        found = origin(Witnesses(loss, reading.indices, bad, None, reading.indices, forward=forward))
        layer = found.module if found.layer is None else watched.layers[found.layer]
        self._sink.nonfinite(NonfiniteStep(step, layer, found.born_in, len(bad), None, loss))
        return True

    def skipped(self, step: int, watched: WatchedOptimizer, loss: float) -> None:
        """A step that the scaler skipped, whose loss was bad before it was scaled."""
        found, layer = self._origin(watched, (), (), loss, before=False)
        self._sink.nonfinite(NonfiniteStep(step, layer, found.born_in, loss=loss))

    def _origin(
        self,
        watched: WatchedOptimizer,
        read: Sequence[int],
        bad: Sequence[int],
        loss: float | None,
        *,
        before: bool,
    ) -> tuple[Origin, str | None]:
        """Where the value was born, and the name of the layer."""
        order = watched.order.indices()
        evidence = self.evidence
        if loss is None:
            loss = self._shared_loss()
        if evidence is None and not before:
            found = origin(Witnesses(loss, read, bad, None, order))
        else:
            if evidence is None:
                evidence = self._gather(0, None, self._forward.progress.passes - 1)
            parameters = evidence.parameters
            mine = parameters.bad.get(watched.index, ())
            elsewhere = parameters.loose or any(index != watched.index for index in parameters.bad)
            seen = Witnesses(
                loss, read, bad, mine, order, elsewhere, parameters.by, evidence.forward, evidence.site,
                _has_peers(),
            )  # fmt: skip
            found = origin(seen)
            if mine or elsewhere:
                return found, parameters.only
        return found, found.module if found.layer is None else watched.layers[found.layer]

    def _shared_loss(self) -> float | None:
        """The loss of this backward pass, where another optimizer has stepped after it already."""
        if self.evidence is not None:
            return math.nan
        passes = self._forward.progress.passes
        losses = [each.last_loss for each in self._watched.values() if each.last_epoch == passes]
        return next((loss for loss in losses if loss is not None), None)

    # --- After the step ----------------------------------------------------------------------------------

    def step_ended(
        self,
        step: int,
        optimizer: Steps,
        watched: WatchedOptimizer,
        gradient_norm: float | None,
    ) -> bool:
        """A step whose gradients were good has ended; whether it left anything bad.

        Parameters are looked at where the update itself may have spoilt them.
        """
        watched.settled = True
        if gradient_norm is None or not gradient_norm < watched.trust.norm(optimizer):
            bad = watched.reader.nonfinite_parameters()
            if bad:
                if not watched.poisoned:
                    self._report_update(step, watched, bad, "optimizer")
                watched.poisoned = True
                return True
            watched.settled = not watched.reader.devices
        watched.poisoned = False
        self._forward.note_habits(self._forward.readings)
        return False

    def check(self, step: int, watched: WatchedOptimizer) -> None:
        """Look for parameters on the host that turned bad without anybody having seen it; report them once."""
        bad = watched.reader.nonfinite_parameters()
        if bad and not watched.poisoned:
            self._report_update(step, watched, bad, None)
        watched.poisoned = bool(bad)

    def _report_update(
        self, step: int, watched: WatchedOptimizer, bad: Sequence[int], born_in: Literal["optimizer"] | None
    ) -> None:
        if born_in is None:
            layer = first_in_backward(bad, range(len(watched.reader.parameters)), watched.order.indices())
        else:
            layer = bad[0] if len(bad) == 1 else None
        self._sink.nonfinite(
            NonfiniteStep(
                step,
                layer=None if layer is None else watched.layers[layer],
                born_in=born_in,
                layers=len(bad),
                loss=watched.last_loss,
            )
        )

    # --- Values from a device ----------------------------------------------------------------------------

    def witness(self, watched: WatchedOptimizer, parameters: Sequence[DeviceNorms]) -> DeviceWitness:
        """What is to travel with the gradients of a step that is observed."""
        readings = tuple(self._forward.readings)
        return DeviceWitness(readings, parameters, self._forward.progress.passes - 1, watched.settled)

    def arrived(
        self,
        record: StepRecord,
        indices: Sequence[int],
        norms: Iterable[float],
        loss: float | None,
        witness: DeviceWitness | None = None,
        poisoned: Sequence[int] = (),
    ) -> bool:
        """A step whose values came from a device, long after its gradients went; whether it was non-finite.

        Nobody can be asked about overflow any more: an infinite norm counts.
        """
        bad = [index for index, norm in zip(indices, norms, strict=True) if not math.isfinite(norm)]
        readings = witness.readings if witness is not None else ()
        if not bad and is_finite(loss):
            self._forward.note_habits([reading for reading in readings if reading.on_device])
            self._arrived_bad.discard(record.optimizer)
            return False
        for reading in readings:
            self._forward.pardon(reading)
        order: Sequence[int] = ()
        for watched in self._watched.values():
            if watched.index == record.optimizer:
                order = watched.order.indices()
                watched.observe = True
        known = witness is not None and bool(witness.parameters)
        blamed = record.optimizer in self._arrived_bad or (witness is not None and witness.settled)
        self._arrived_bad.add(record.optimizer)
        seen = Witnesses(
            loss, indices, bad, poisoned if known else None, order,
            parameters_by="parameters" if blamed else None,
            forward=verdict(readings, None, witness.epoch)[0] if witness is not None else None,
            averaged=_has_peers(),
        )  # fmt: skip
        found = origin(seen)
        layer = None if found.layer is None else record.layers[found.layer]
        self._sink.nonfinite(NonfiniteStep(record.step, layer, found.born_in, len(bad), None, loss))
        return True

    # --- Parameters --------------------------------------------------------------------------------------

    def _poisoned(self) -> _Parameters:
        """Parameters that are bad now, before the step, and what made them so.

        Those that turned bad during a step nobody observed get their own report: the gradients are gone, but
        the update left their mask in the parameters.
        """
        bad: dict[int, Sequence[int]] = {}
        names: list[str] = []
        by: Literal["optimizer", "parameters"] | None = "parameters"
        owned: set[int] = set()
        for watched in self._watched.values():
            owned.update(map(id, watched.reader.parameters))
            found = watched.reader.nonfinite_parameters()
            if found:
                bad[watched.index] = found
                names += [watched.layers[index] for index in found]
                if not watched.poisoned and not self._settle(watched, found):
                    by = None
            watched.poisoned = bool(found)
        loose = False
        for model in self._models:
            module = model.reference()
            for name, parameter in module.named_parameters() if module is not None else ():
                if id(parameter) not in owned and nonfinite_among([parameter.detach()])[0]:
                    loose = True
                    names.append(model.qualified(name, prefixed=len(self._models) > 1))
                    if parameter.requires_grad:  # an optimizer that is not watched may have stepped it
                        by = None
        return _Parameters(bad, loose, names[0] if len(names) == 1 else None, by)

    def _settle(self, watched: WatchedOptimizer, bad: Sequence[int]) -> bool:
        """Report the last step if it may have left these parameters bad; whether that settles the question."""
        if watched.settled:
            if not self._has_bad_state(watched, bad):
                return True  # it left them good: somebody else has changed them since
            self._report_update(watched.last_step, watched, bad, "optimizer")
            return True
        if watched.last_loss is None:
            return False
        # The gradients, the update or the user may have done it: nobody looked.
        self._report_update(watched.last_step, watched, bad, None)
        return True

    def _has_bad_state(self, watched: WatchedOptimizer, bad: Sequence[int]) -> bool:
        """Whether the optimizer's own memory of these parameters is bad; its gradients were good."""
        optimizer = watched.reference()
        if not isinstance(optimizer, Optimizer) or not watched.previous_observed:
            return False
        parameters = parameters_of(optimizer)
        tensors = [
            value
            for index in bad
            for value in optimizer.state.get(parameters[index], {}).values()
            if hasattr(value, "is_floating_point") and value.is_floating_point() and value.device.type == "cpu"
        ]
        return any(nonfinite_among(tensors))

    def _maps(self) -> list[Map]:
        several = len(self._models) > 1
        return [
            Map(
                {key: name.rpartition(".")[0] for key, name in model.layer_names(prefixed=False).items()},
                self._forward.plans.get(index),
                model.name if several else "",
            )
            for index, model in enumerate(self._models)
        ]
