"""A closer look at steps that seem non-finite. Runs on such steps only, so it may take its time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from gradwatch.gradients.norms import DeviceNorms, Reading, nonfinite_among
from gradwatch.loop.step_sink import StepSink
from gradwatch.loop.watched import Model, Steps, WatchedOptimizer, parameters_of
from gradwatch.nonfinite.birthplace import Origin, Witnesses, first_in_backward, is_of_backward, origin
from gradwatch.nonfinite.forward_plan import NOWHERE, Map, Site, site
from gradwatch.nonfinite.forward_witness import DeviceWitness, ForwardVerdict, ForwardWitness, verdict
from gradwatch.nonfinite.graph_walk import Graph, suspects_behind
from gradwatch.safety import shielded
from gradwatch.telemetry import NonfiniteStep, StepRecord
from gradwatch.tensors.sharding import is_distributed_tensor

if TYPE_CHECKING:
    from torch import Tensor

# Of a table only some rows are, and of a parameter of the user's nobody knows.
_READ_AS_A_WHOLE: Final = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d,
    nn.BatchNorm2d, nn.BatchNorm3d,
)  # fmt: skip
_ORDINARY_RATE: Final = 1e3


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
        # Parameters, by `id`, that held infinities before any training: masks, the bias of a forbidden class.
        self._meant: set[int] = set()
        # The same on devices, as optimizer and index: those of good steps.
        self._meant_on_device: set[tuple[int, int]] = set()
        # Optimizers whose last step from a device was bad.
        self._arrived_bad: set[int] = set()

    @shielded(None)
    def begin(self, step: int, watched: WatchedOptimizer) -> None:
        """Before the first update of these parameters: infinities that they hold are meant, and no evidence."""
        watched.begun = True
        if watched.reader.sharded:
            return
        mine = [watched.reader.parameters[index] for index in watched.reader.nonfinite_parameters()]
        others = [p for _, p in self._loose() if p.is_cpu and not is_distributed_tensor(p)]
        self._meant.update(id(p) for p in (*mine, *others) if bool(torch.isinf(p.detach()).any()))
        if all(map(self._is_meant, mine)):
            watched.found_good(step)

    def bad_parameters(self, watched: WatchedOptimizer) -> tuple[int, ...]:
        """Which of its parameters on the host are bad; infinities that were there from the start are not."""
        reader = watched.reader
        return tuple(i for i in reader.nonfinite_parameters() if not self._is_meant(reader.parameters[i]))

    def _is_meant(self, parameter: Tensor) -> bool:
        return id(parameter) in self._meant and not bool(torch.isnan(parameter.detach()).any())

    # --- Before backward ---------------------------------------------------------------------------------

    def loss_seen(self, steps: int) -> None:
        """A backward pass begins after so many steps: what was found about an earlier one's loss is over."""
        if self.evidence is not None and self.evidence.steps != steps:
            self.evidence = None

    def loss_is_bad(self, step: int, root: Tensor, steps: int) -> None:
        """Backward is about to run from a bad loss on the CPU: parameters and graph are still as they were."""
        if self.evidence is not None or not self._sink.wants_nonfinite_detail():
            return
        self.evidence = self._gather(step, steps, suspects_behind(root), self._forward.progress.passes)

    def _gather(self, step: int, steps: int, graph: Graph | None, epoch: int) -> Evidence:
        parameters = self._poisoned(step)
        forward, graph = verdict(self._forward.readings, graph, epoch)
        if forward in ("good", None) and self._forward.has_habits:
            graph = None
        place = NOWHERE if graph is None else site(graph, self._maps(), chained=self._forward.chained)
        return Evidence(steps, parameters, forward, place)

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
        found, layer = self._origin(step, watched, reading.indices, bad, loss, before=before)
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
        found, layer = self._origin(step, watched, (), (), loss, before=False)
        self._sink.nonfinite(NonfiniteStep(step, layer, found.born_in, loss=loss))

    def _origin(
        self,
        step: int,
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
                evidence = self._gather(step, 0, None, self._forward.progress.passes - 1)
            parameters = evidence.parameters
            mine = parameters.bad.get(watched.index, ())
            elsewhere = parameters.loose or any(index != watched.index for index in parameters.bad)
            seen = Witnesses(
                loss, read, bad, mine, order, elsewhere, parameters.by, evidence.forward, evidence.site,
                _has_peers(), self._matrices(watched), watched.layers,
            )  # fmt: skip
            found = origin(seen)
            if mine or elsewhere:
                return found, parameters.only
        return found, found.module if found.layer is None else watched.layers[found.layer]

    def _matrices(self, watched: WatchedOptimizer) -> Collection[int]:
        """Parameters that can speak for what a plain model's layers were given."""
        if not self._forward.is_plain:
            return ()
        return [index for index, parameter in enumerate(watched.reader.parameters) if parameter.ndim > 1]

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
            bad = self.bad_parameters(watched)
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
        bad = self.bad_parameters(watched)
        if bad and not watched.poisoned:
            self._report_update(step, watched, bad, None, watched.looked)
        elif not bad:
            watched.found_good(step + 1)
        watched.poisoned = bool(bad)

    def _report_update(
        self,
        step: int,
        watched: WatchedOptimizer,
        bad: Sequence[int],
        born_in: Literal["optimizer", "backward"] | None,
        since: int | None = None,
    ) -> None:
        if born_in != "optimizer":
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
                since=None if since is None or since >= step else since,
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
        poisoned: Mapping[int, float] = MappingProxyType({}),
    ) -> bool:
        """A step whose values came from a device, long after its gradients went; whether it was non-finite.

        ``poisoned``: norms of its parameters that are not finite, NaN where an element is. Nobody can be
        asked about overflow any more: an infinite norm counts.
        """
        bad = [index for index, norm in zip(indices, norms, strict=True) if not math.isfinite(norm)]
        readings = witness.readings if witness is not None else ()
        if not bad and is_finite(loss):
            self._forward.note_habits([reading for reading in readings if reading.on_device])
            self._meant_on_device.update(
                (record.optimizer, i) for i, norm in poisoned.items() if norm == math.inf
            )
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
        worse = [
            index
            for index, norm in poisoned.items()
            if math.isnan(norm) or (record.optimizer, index) not in self._meant_on_device
        ]
        blamed = record.optimizer in self._arrived_bad or (witness is not None and witness.settled)
        self._arrived_bad.add(record.optimizer)
        seen = Witnesses(
            loss, indices, bad, worse if known else None, order,
            parameters_by="parameters" if blamed else None,
            forward=verdict(readings, None, witness.epoch)[0] if witness is not None else None,
            averaged=_has_peers(),
        )  # fmt: skip
        found = origin(seen)
        layer = None if found.layer is None else record.layers[found.layer]
        self._sink.nonfinite(NonfiniteStep(record.step, layer, found.born_in, len(bad), None, loss))
        return True

    # --- Parameters --------------------------------------------------------------------------------------

    def _poisoned(self, step: int) -> _Parameters:
        """Parameters that are bad now, before the step, and what made them so.

        Those that turned bad during a step nobody observed get their own report: the gradients are gone, but
        the update left their mask in the parameters.
        """
        bad: dict[int, Sequence[int]] = {}
        names: list[str] = []
        by: Literal["optimizer", "parameters"] | None = "parameters"
        for watched in self._watched.values():
            found = self.bad_parameters(watched)
            if found:
                bad[watched.index] = found
                names += [watched.layers[index] for index in found]
                if not watched.poisoned and not self._settle(step, watched, found):
                    by = None
            watched.poisoned = bool(found)
        loose = False
        for name, parameter in self._loose():
            if nonfinite_among([parameter.detach()])[0] and not self._is_meant(parameter):
                loose = True
                names.append(name)
                if parameter.requires_grad:  # an optimizer that is not watched may have stepped it
                    by = None
        return _Parameters(bad, loose, names[0] if len(names) == 1 else None, by)

    def _loose(self) -> Iterator[tuple[str, Tensor]]:
        """Layer name and parameter of all that no watched optimizer steps."""
        owned = {id(parameter) for each in self._watched.values() for parameter in each.reader.parameters}
        for model in self._models:
            module = model.reference()
            for name, parameter in module.named_parameters() if module is not None else ():
                if id(parameter) not in owned:
                    yield model.qualified(name, prefixed=len(self._models) > 1), parameter

    def _settle(self, step: int, watched: WatchedOptimizer, bad: Sequence[int]) -> bool:
        """Report what came before this step if that may have left these parameters bad; whether all is told."""
        memory = self._memory_is_good(watched, bad)
        if watched.settled:
            if memory is False and watched.previous_observed:  # though its gradients were good
                self._report_update(watched.last_step, watched, bad, "optimizer")
            return True  # otherwise it left them good: somebody else has changed them since
        if watched.last_loss is None:
            return False
        if memory is True and self._is_ordinary(watched):
            return True  # so were all gradients, observed or not
        # The gradients, the update or the user may have done it: nobody looked.
        if not self._are_always_read(watched, bad):
            self._report_update(step, watched, bad, None, watched.looked)
        elif memory is False:
            # The update left the gradients' mask in the parameters.
            order = watched.order.indices()
            sure = (
                is_finite(watched.last_loss)
                and not _has_peers()
                and self._is_ordinary(watched)
                and watched.is_state_kept()
                and is_of_backward(bad, order, order, self._matrices(watched), watched.layers)
            )
            self._report_update(watched.last_step, watched, bad, "backward" if sure else None)
        else:
            self._report_update(step, watched, bad, None, watched.last_step)
        return True

    def _memory_is_good(self, watched: WatchedOptimizer, bad: Sequence[int]) -> bool | None:
        """Whether what the optimizer remembers of these parameters' gradients is good: a NaN among them stays.

        None where it remembers nothing of some of them.
        """
        optimizer = watched.reference()
        if not isinstance(optimizer, Optimizer):
            return None
        parameters = parameters_of(optimizer)
        memories = [
            [
                value
                for value in optimizer.state.get(parameters[index], {}).values()
                if isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type == "cpu"
            ]
            for index in bad
        ]
        if any(nonfinite_among([value for memory in memories for value in memory])):
            return False
        return True if all(memories) else None

    def _is_ordinary(self, watched: WatchedOptimizer) -> bool:
        """Whether good gradients leave good parameters good, at the last step's rates and now."""
        optimizer = watched.reference()
        rates = [rate for rate in watched.rates if rate is not None and abs(rate) < _ORDINARY_RATE]
        return optimizer is not None and len(rates) == len(watched.rates) and watched.trust.norm(optimizer) > 0

    def _are_always_read(self, watched: WatchedOptimizer, bad: Sequence[int]) -> bool:
        """Whether one of these is read as a whole in every step: then it was good when the last loss was."""
        whole = {
            id(parameter)
            for model in self._models
            if (watched_model := model.reference()) is not None
            for module in watched_model.modules()
            if isinstance(module, _READ_AS_A_WHOLE)
            for parameter in module.parameters(recurse=False)
        }
        return any(id(watched.reader.parameters[index]) in whole for index in bad)

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
