"""Steps and logged values whose numbers are still on a device: they wait here, in order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor

from gradwatch.gradients.clipping import clip_ratio
from gradwatch.gradients.norms import DeviceNorms
from gradwatch.loop.step_sink import StepSink
from gradwatch.loop.watched import LateClip
from gradwatch.nonfinite.forward_witness import DeviceWitness, ForwardReading
from gradwatch.nonfinite.suspects import Suspects
from gradwatch.telemetry import LoggedValue, NonfiniteStep, StepRecord
from gradwatch.tensors.device_ring import DeviceRing, Slot

# A model's vector fits from the start; longer accumulations make the ring grow.
_SPARE: Final = 256


@dataclass(frozen=True, slots=True)
class _Part:
    """One slot, in this order.

    Gradient norms of the parameters at ``indices``; ``losses`` losses; norms of the forward passes' inputs and
    outputs, as (pass, place) in ``forward``; norms of the ``parameters``; scalars by name.
    """

    ring: DeviceRing
    slot: Slot
    indices: tuple[int, ...]
    losses: int
    names: tuple[str, ...] = ()
    forward: tuple[tuple[ForwardReading, int], ...] = ()
    parameters: tuple[int, ...] = ()


@dataclass(slots=True)
class InFlight:
    """What of one step has left a device and not yet arrived."""

    parts: list[_Part] = field(default_factory=list)
    record: StepRecord | None = None
    witness: DeviceWitness | None = None
    clip: LateClip | None = None

    def arrived(self) -> bool:
        """Whether all of it is here; never waits."""
        return all(part.slot.arrived() for part in self.parts)


class Arrivals:
    """Sends vectors off, and hands steps on once their values have arrived. Training thread only."""

    def __init__(self, sink: StepSink, suspects: Suspects) -> None:
        self._sink = sink
        self._suspects = suspects
        # The step that ended last, while its loss can still be replaced.
        self._open: tuple[StepRecord, InFlight | None] | None = None
        self._steps: deque[InFlight] = deque()
        self._vectors: deque[tuple[DeviceRing, Slot, Callable[[list[float]], None]]] = deque()
        self._rings: dict[torch.device, DeviceRing] = {}

    def __bool__(self) -> bool:
        return bool(self._steps or self._vectors)

    def send(
        self,
        norms: Sequence[DeviceNorms],
        losses: Sequence[Tensor],
        scalars: Mapping[str, Tensor],
        witness: DeviceWitness | None = None,
    ) -> InFlight | None:
        """Start the copies of one step.

        ``scalars``, by name: ``grad_scale`` of gradients that are still scaled, ``found_inf`` of a scaler whose
        verdict is on the device, ``loss_scale``, ``local_norm``, ``clip_total``.

        None when a ring was full: then the step's device values are given up.
        """
        in_flight = InFlight(witness=witness)
        for device in {part.device for part in (*(each.vector for each in norms), *losses, *scalars.values())}:
            vectors = [vector for vector in norms if vector.vector.device == device]
            local = [loss for loss in losses if loss.device == device]
            named = {name: scalar for name, scalar in scalars.items() if scalar.device == device}
            parts = [vector.vector for vector in vectors] + local
            forward, parameters = _witnesses(witness, device, parts)
            parts += named.values()
            ring = self._ring(device, sum(part.numel() for part in parts))
            slot = ring.send(parts)
            if slot is None:
                return None
            indices = tuple(index for vector in vectors for index in vector.indices)
            in_flight.parts.append(_Part(ring, slot, indices, len(local), tuple(named), forward, parameters))
        return in_flight

    def send_logged(self, name: str, time: int, value: Tensor) -> None:
        """Start the copy of one logged number."""
        self.send_vector(value, lambda values: self._sink.logged(LoggedValue(name, time, values[0])))

    def send_vector(self, vector: Tensor, take: Callable[[list[float]], None]) -> None:
        """Start the copy of numbers that belong to no step; ``take`` gets them at a later hook."""
        ring = self._ring(vector.device, vector.numel())
        slot = ring.send([vector])
        if slot is not None:
            self._vectors.append((ring, slot, take))

    @property
    def holds_step(self) -> bool:
        """Whether the step that ended last is still here, so that its loss can be replaced."""
        return self._open is not None

    def hand_over(self, record: StepRecord, in_flight: InFlight | None) -> None:
        """Hand a host's step on at once; keep a device's open, so that its loss can still be replaced."""
        self.close_step()
        if in_flight is not None or self:
            self._open = (record, in_flight)
        else:
            self._sink.step(record)

    def close_step(self) -> None:
        """Nothing more can be said about the step that ended last."""
        if self._open is not None:
            self._add(*self._open)
            self._open = None

    def replace_loss(self, loss: float | Tensor) -> None:
        """The user says what the loss of the step was that is still open."""
        if self._open is None:
            return
        record, in_flight = self._open
        if isinstance(loss, float):
            if not math.isfinite(loss) and not record.nonfinite and in_flight is None and not record.skipped:
                self._sink.nonfinite(NonfiniteStep(record.step, loss=loss))
                record = record._replace(nonfinite=True)
            self._open = (record._replace(loss=loss), in_flight)
            return
        sent = self.send((), [loss], {})
        if sent is not None:
            # What was captured no longer counts: norms stay, losses are the new one's.
            kept = [replace(part, losses=0) for part in in_flight.parts] if in_flight is not None else []
            clip = None if in_flight is None else in_flight.clip
            self._open = (record._replace(loss=None), InFlight(kept + sent.parts, clip=clip))

    def _add(self, record: StepRecord, in_flight: InFlight | None) -> None:
        """Hand the step on, now or when it and all before it have arrived."""
        if in_flight is None and not self._steps:
            self._sink.step(record)
            return
        in_flight = in_flight or InFlight()
        in_flight.record = record
        self._steps.append(in_flight)

    def drain(self) -> None:
        """Hand on what has arrived."""
        while self._steps and self._steps[0].arrived():
            self._finish(self._steps.popleft())
        while self._vectors and self._vectors[0][1].arrived():
            ring, slot, take = self._vectors.popleft()
            values = slot.values()
            ring.recycle(slot)
            take(values)

    def _finish(self, in_flight: InFlight) -> None:
        record = in_flight.record
        if record is None:
            return
        loss, skipped, loss_scale = record.loss, record.skipped, record.loss_scale
        indices, norms = list(record.indices or ()), list(record.norms or ())
        arrived = [(part, part.slot.values()) for part in in_flight.parts]
        scalars = {
            name: value
            for part, values in arrived
            for name, value in zip(part.names, values[len(values) - len(part.names) :], strict=True)
        }
        skipped = skipped or scalars.get("found_inf", 0.0) != 0.0
        scale = scalars.get("grad_scale", 1.0)
        loss_scale = scalars.get("loss_scale", record.loss_scale)
        local_norm = record.local_norm
        if "local_norm" in scalars:
            local_norm = scalars["local_norm"] / (loss_scale or 1.0)
        poisoned: dict[int, float] = {}
        for part, values in arrived:
            part.ring.recycle(part.slot)
            width = len(part.indices)
            indices += part.indices
            norms += [value / scale for value in values[:width]]
            place = width + part.losses
            for (reading, item), value in zip(part.forward, values[place:], strict=False):
                reading.settle(item, value)
            place += len(part.forward)
            weights = zip(part.parameters, values[place:], strict=False)
            poisoned.update((index, value) for index, value in weights if not math.isfinite(value))
            if part.losses and record.loss is None:
                loss = math.fsum([loss or 0.0, *values[width : width + part.losses]])
        observed = record.indices is not None and not skipped
        total = record.gradient_norm
        if record.indices is not None and total is not None:
            total = math.hypot(*norms) if observed else None
        ratio = record.clip_ratio
        if in_flight.clip is not None and not skipped and math.isfinite(scalars["clip_total"]):
            if in_flight.clip.max_norm is not None:
                ratio = clip_ratio(in_flight.clip.max_norm, scalars["clip_total"])
            if in_flight.clip.is_norm and record.indices is None:
                total = scalars["clip_total"] / scale
        nonfinite = not skipped and (
            record.nonfinite
            or self._suspects.arrived(record, indices, norms, loss, in_flight.witness, poisoned)
        )  # fmt: skip
        self._sink.step(
            record._replace(
                loss=loss,
                indices=indices if observed else None,
                norms=norms if observed else None,
                gradient_norm=total,
                nonfinite=nonfinite,
                skipped=skipped,
                clip_ratio=None if skipped else ratio,
                loss_scale=loss_scale,
                local_norm=None if skipped else local_norm,
            )
        )

    def _ring(self, device: torch.device, width: int) -> DeviceRing:
        ring = self._rings.get(device)
        if ring is None:
            ring = self._rings[device] = DeviceRing(device, width + _SPARE)
        return ring


def _witnesses(
    witness: DeviceWitness | None, device: torch.device, parts: list[Tensor]
) -> tuple[tuple[tuple[ForwardReading, int], ...], tuple[int, ...]]:
    """Add the witnesses' norms on this device to the parts; where they are from."""
    if witness is None:
        return (), ()
    forward: list[tuple[ForwardReading, int]] = []
    for reading in witness.readings:
        for place, norm in enumerate(reading.on_device):
            if norm.device == device:
                forward.append((reading, place))
                parts.append(norm)
    parameters: list[int] = []
    for weights in witness.parameters:
        if weights.vector.device == device:
            parameters += weights.indices
            parts.append(weights.vector)
    return tuple(forward), tuple(parameters)
