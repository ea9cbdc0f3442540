"""Everything that is measured beside gradients: weights, inputs, time by phase, data wait, collectives.

The observer calls in at hooks that exist anyway: at steps whose gradients it observes, and ten times a second,
when a look is due; else only for the data wait of loops that wait. What is found goes to the export thread
through a deque, which needs no lock, and what is on a device goes through the same ring as gradient norms.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

import torch

from gradwatch import conventions
from gradwatch.conventions import Metric
from gradwatch.loop.arrivals import Arrivals
from gradwatch.loop.module_hooks import is_compiled
from gradwatch.measures.cadence import Cadence
from gradwatch.measures.collectives import CollectiveCalls, CollectiveTimes, DdpTimes
from gradwatch.measures.data_wait import DataWait
from gradwatch.measures.inputs import InputProbe, input_statistics, statistics_vector
from gradwatch.measures.nvtx import NvtxRanges, nvtx_ranges
from gradwatch.measures.phases import PhaseTimer
from gradwatch.measures.stopwatch import Stopwatch, stopwatch_for
from gradwatch.measures.weights import WeightReading, WeightRounds
from gradwatch.safety import shielded
from gradwatch.telemetry import Attributes, AttributeValue, MetricPoints, MetricSeries, Point

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradwatch.loop.watched import Model, WatchedOptimizer

_WAITING: Final = 100_000
# DDP's figures change every hundred iterations, and reading them costs 50 microseconds.
_DDP_SECONDS: Final = 5.0
# Ten times a second is as often as anybody looks, and six clocks a step are too dear for a step of 1 ms.
_LOOK_NANOSECONDS: Final = 100_000_000
# A shift of the data is to be seen within an export interval or two, and to take a thousandth of the time.
_INPUT_NANOSECONDS: Final = 1_000_000_000
_INPUT_REST: Final = 1000


@dataclass(slots=True)
class _Weights:
    """The rounds through one optimizer's parameters, and what the step in progress found."""

    cadence: Cadence
    rounds: WeightRounds = field(default_factory=WeightRounds)
    reading: WeightReading | None = None

    def before_step(self, parameters: Sequence[Tensor]) -> None:
        self.reading = None
        if not self.rounds.active and self.cadence.due():
            self.rounds.begin_round(parameters)
        if self.rounds.active:
            self.rounds.before_step(parameters)


class Measures:
    """Owns the measurements of a run.

    Args:
        arrivals: The way of device values to the host.
        models: The watched models, kept up to date by their owner.
        start: When the run began, in Unix nanoseconds.
        inputs: Measure the models' inputs.
        collectives: Time ``torch.distributed``'s calls.
        nvtx: Make NVTX ranges: ``step``, ``layers``, or None.

    Attributes:
        waits: Data wait of the step in progress.
        phases: Phases of the step in progress, when it is looked at.
        nvtx: None unless asked for and available.
        look_at: When to call `step_ended` of the optimizer that leads, whether its step was observed or not, in
            Unix nanoseconds.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        models: Sequence[Model],
        *,
        start: int,
        inputs: bool = True,
        collectives: bool = False,
        nvtx: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arrivals = arrivals
        self._models = models
        self._monotonic = monotonic
        self._found: deque[tuple[Metric, int, float, Attributes]] = deque(maxlen=_WAITING)
        self._phase_times: dict[str, deque[tuple[int, float]]] = {}
        self.phases = PhaseTimer(self._phases_found)
        self.waits = DataWait(self.phases)
        self._started = False
        self._spent = 0
        self._looking = False
        self._next_look = 0
        self.look_at = 0
        self._weights: dict[int, _Weights] = {}
        self._inputs = inputs
        self._inputs_at = 0
        self._first_look = 0
        self._probes: list[InputProbe] = []
        self._input_vectors: list[tuple[str, Tensor]] = []
        self._times = CollectiveTimes(start)
        self._ddp = DdpTimes(self._times)
        self._ddp_cadence = Cadence(_DDP_SECONDS, monotonic)
        self._stopwatches: dict[torch.device | None, Stopwatch] = {}
        self._calls = CollectiveCalls(self._times, self._stopwatch) if collectives else None
        ranges = nvtx_ranges() if nvtx else None
        self.nvtx = NvtxRanges(ranges, nvtx == "layers") if ranges is not None else None

    def install(self, step: int) -> None:
        """Put wrappers in place; ``step`` is the index of the first."""
        self.waits.install()
        if self._calls is not None:
            self._calls.install()
        if self.nvtx is not None:
            self.nvtx.begin(step)

    def remove(self) -> None:
        """Take everything off again."""
        self.waits.remove()
        self._disarm()
        self.phases.drain()
        if self._calls is not None:
            self._calls.remove()
            self._calls.drain()
        if self.nvtx is not None:
            self.nvtx.remove()

    def remove_in_child(self) -> None:
        """After a fork: take everything off, and touch no device."""
        self.waits.remove()
        self._disarm()
        if self._calls is not None:
            self._calls.remove()
        if self.nvtx is not None:
            self.nvtx.remove()

    def suspend(self) -> None:
        """The loop evaluates from now on: no data wait, and no phase of the step."""
        self.waits.suspend()
        if self.phases.observed and not self.waits.waiting:  # a wait has stopped that clock already
            self.phases.pause()

    def resume(self) -> None:
        """It trains again."""
        self.waits.resume()
        if self.phases.observed and not self.waits.waiting:
            self.phases.resume()

    @shielded(None)
    def add_model(self, model: nn.Module, name: str) -> None:
        """A model is watched from now on."""
        if self.nvtx is not None:
            self.nvtx.add_model(model, name)

    # --- Hooks of the training thread ------------------------------------------------------------------

    def before_step(self, watched: WatchedOptimizer) -> None:
        """The optimizer is about to update in an observed step."""
        if watched.observe:
            weights = self._weights.get(watched.index)
            if weights is None:
                weights = self._weights[watched.index] = _Weights(Cadence(monotonic=self._monotonic))
            weights.before_step(watched.reader.parameters)
        if self.phases.observed:
            if watched.is_late:  # a closure: forward and backward run inside the optimizer
                self.phases.give_up()
            else:
                self.phases.before_optimizer()

    def after_step(self, watched: WatchedOptimizer) -> None:
        """It did, in an observed step."""
        if self.phases.observed:
            self.phases.after_optimizer()
        weights = self._weights.get(watched.index)
        if weights is not None:
            weights.reading = weights.rounds.after_step()

    def step_ended(
        self, watched: WatchedOptimizer, now: int, step: int, *, optimizers: int, skipped: bool
    ) -> int:
        """A step ended at ``now`` (Unix nanoseconds), and ``step`` is next.

        Returns:
            Nanoseconds spent here, and in hooks of our own since the last call.
        """
        start = perf_counter_ns()
        weights = self._weights.get(watched.index)
        if weights is not None and weights.reading is not None:
            reading, weights.reading = weights.reading, None
            if not skipped:
                self._weights_found(watched, reading, now, optimizers)
        if watched.leads:
            if self._looking:
                self._end_look(now)
            if now >= self.look_at:
                self._begin_look(watched, now)
            if self.nvtx is not None:
                self.nvtx.next_step(step)
        spent, self._spent = self._spent, 0
        return spent + perf_counter_ns() - start

    def _begin_look(self, watched: WatchedOptimizer, now: int) -> None:
        """Look at the step that begins."""
        # Steps may be taken by another thread than the one that called `watch()`.
        self.waits.thread = get_ident()
        if self._calls is not None:
            self._calls.thread = self.waits.thread
        if not self._started:
            self._started = True
            self._first_look = now
            self.phases.use(self._stopwatch(next(iter(watched.reader.devices), None)))
        if self._ddp_cadence.due():
            self._ddp.read(self._modules())
        if self._inputs and now >= self._inputs_at:
            self._arm()
            # More often at first: what comes later is compared with the beginning.
            self._inputs_at = now + min(now - self._first_look, _INPUT_NANOSECONDS)
        self.phases.drain()
        self.phases.begin()
        self._looking = True
        self.look_at, self._next_look = now, now + _LOOK_NANOSECONDS

    def _end_look(self, now: int) -> None:
        """The step that was looked at ended."""
        self._looking = False
        self.look_at = self._next_look
        if self.phases.observed:
            self.phases.end(now)
        if self._input_vectors:
            self._inputs_found(now)

    # --- What was found --------------------------------------------------------------------------------

    def points(self, now: int, pace: Callable[[], None] = lambda: None) -> list[MetricPoints | MetricSeries]:
        """Everything found since the last call, up to ``now`` (Unix nanoseconds). Export thread only.

        ``pace`` is called between small pieces of work, so that this thread holds Python's lock only briefly.
        """
        series: dict[str, tuple[Metric, list[Point]]] = {}
        while self._found:
            metric, at, value, attributes = self._found.popleft()
            series.setdefault(metric.name, (metric, []))[1].append(Point(at, value, attributes))
            pace()
        found: list[MetricPoints | MetricSeries] = [MetricPoints(*batch) for batch in series.values()]
        for phase, waiting in list(self._phase_times.items()):
            times, seconds = array("q"), array("d")
            while waiting:
                at, lasted = waiting.popleft()
                times.append(at)
                seconds.append(lasted)
            found.append(MetricSeries(conventions.PHASE_DURATION, {conventions.PHASE: phase}, times, seconds))
            pace()
        return [batch for batch in (*found, self._times.points(now, pace)) if len(batch)]

    def _phases_found(self, at: int, seconds: Mapping[str, float]) -> None:
        for phase, lasted in seconds.items():
            waiting = self._phase_times.get(phase)
            if waiting is None:
                waiting = self._phase_times[phase] = deque(maxlen=_WAITING)
            waiting.append((at, lasted))

    def _weights_found(
        self, watched: WatchedOptimizer, reading: WeightReading, now: int, optimizers: int
    ) -> None:
        layers = watched.layers
        index = watched.index

        def take(numbers: Sequence[float]) -> None:
            for weight in reading.weights(numbers):
                labels: dict[str, AttributeValue] = {conventions.LAYER_NAME: layers[weight.parameter]}
                if optimizers > 1:
                    labels[conventions.OPTIMIZER] = index
                self._found.append((conventions.WEIGHT_NORM, now, weight.norm, labels))
                if weight.ratio is not None:
                    self._found.append((conventions.UPDATE_RATIO, now, weight.ratio, labels))

        self._send(reading.vector, take)

    def _arm(self) -> None:
        """Look at the inputs of the next training forward of every model."""
        self._disarm()
        for model in self._models:
            module = model.reference()
            # Outside `torch.compile`'s wrapper a hook is not compiled; inside it would break the graph.
            if module is not None and (hasattr(module, "_orig_mod") or not is_compiled(module)):
                prefix = f"{model.name}." if len(self._models) > 1 else ""
                self._probes.append(InputProbe(module, self._taker(prefix), self._is_training))

    def leave_models_alone(self) -> None:
        """Put no hooks into models that somebody may compile, see ``CompileWatch``."""
        self._inputs = False
        self._disarm()

    def _disarm(self) -> None:
        for probe in self._probes:
            probe.remove()
        self._probes.clear()

    def _is_training(self) -> bool:
        return not self.waits.suspended and self.waits.thread == get_ident()

    def _taker(self, prefix: str) -> Callable[[list[tuple[str, Tensor]]], None]:
        def take_inputs(inputs: list[tuple[str, Tensor]]) -> None:
            start = perf_counter_ns()
            self._input_vectors += [(prefix + name, statistics_vector(tensor)) for name, tensor in inputs]
            spent = perf_counter_ns() - start
            self._spent += spent
            self._inputs_at = max(self._inputs_at, self.look_at + _INPUT_REST * spent)

        return take_inputs

    def _inputs_found(self, now: int) -> None:
        vectors, self._input_vectors = self._input_vectors, []

        def taker(name: str) -> Callable[[Sequence[float]], None]:
            def take(numbers: Sequence[float]) -> None:
                found = input_statistics(numbers)
                labels = {conventions.INPUT_NAME: name}
                if found.mean is not None and found.stddev is not None:
                    self._found.append((conventions.INPUT_MEAN, now, found.mean, labels))
                    self._found.append((conventions.INPUT_STDDEV, now, found.stddev, labels))
                self._found.append((conventions.INPUT_NONFINITE, now, found.nonfinite, labels))

            return take

        for name, vector in vectors:
            self._send(vector, taker(name))

    def _send(self, vector: Tensor, take: Callable[[list[float]], None]) -> None:
        if vector.device.type == "cpu":
            take(vector.tolist())
        else:
            self._arrivals.send_vector(vector, take)

    def _modules(self) -> list[nn.Module]:
        return [module for model in self._models if (module := model.reference()) is not None]

    def _stopwatch(self, device: Any) -> Stopwatch:
        stopwatch = self._stopwatches.get(device)
        if stopwatch is None:
            stopwatch = self._stopwatches[device] = stopwatch_for(device)
        return stopwatch
