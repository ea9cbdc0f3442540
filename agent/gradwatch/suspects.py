"""A closer look at steps that seem non-finite. Runs on such steps only, so it may take its time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from gradwatch.gradients import Reading
from gradwatch.nonfinite import Origin, Witnesses, first_in_backward, origin
from gradwatch.telemetry import NonfiniteStep, StepRecord, StepSink
from gradwatch.watched import WatchedOptimizer


def is_finite(value: float | None) -> bool:
    """Whether a value is finite; one that is not known raises no suspicion."""
    return value is None or math.isfinite(value)


class Suspects:
    """Finds out about suspicious steps of the watched optimizers, and reports those that are guilty."""

    def __init__(self, sink: StepSink, watched: Mapping[int, WatchedOptimizer]) -> None:
        self._sink = sink
        self._watched = watched

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
        poisoned, elsewhere = self._poisoned(watched) if before else (None, False)
        found = origin(Witnesses(loss, reading.indices, bad, poisoned, watched.order.indices()))
        if elsewhere and not poisoned:
            found = Origin("parameters", None)
        self._sink.nonfinite(
            NonfiniteStep(
                step,
                layer=None if found.layer is None else watched.layers[found.layer],
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
        found = origin(Witnesses(loss, reading.indices, bad, None, reading.indices))
        layer = None if found.layer is None else watched.layers[found.layer]
        self._sink.nonfinite(NonfiniteStep(step, layer, found.born_in, len(bad), None, loss))
        return True

    def arrived(
        self, record: StepRecord, indices: Sequence[int], norms: Iterable[float], loss: float | None
    ) -> bool:
        """A step whose values came from a device, long after its gradients went; whether it was non-finite.

        Nobody can be asked about overflow any more: an infinite norm counts.
        """
        bad = [index for index, norm in zip(indices, norms, strict=True) if not math.isfinite(norm)]
        if not bad and is_finite(loss):
            return False
        order: Sequence[int] = ()
        for watched in self._watched.values():
            if watched.index == record.optimizer:
                order = watched.order.indices()
                watched.observe = True
        found = origin(Witnesses(loss, indices, bad, None, order))
        layer = None if found.layer is None else record.layers[found.layer]
        self._sink.nonfinite(NonfiniteStep(record.step, layer, found.born_in, len(bad), None, loss))
        return True

    def _poisoned(self, watched: WatchedOptimizer) -> tuple[Sequence[int], bool]:
        """Parameters of this optimizer that are bad before its step, and whether another one's are.

        Those that turned bad during a step nobody observed get their own report: the gradients are gone, but
        the update left their mask in the parameters.
        """
        mine: Sequence[int] = ()
        elsewhere = False
        for other in self._watched.values():
            bad = other.reader.nonfinite_parameters()
            if bad and not (other.poisoned or other.previous_observed) and other.last_loss is not None:
                everything = range(len(other.reader.parameters))
                layer = first_in_backward(bad, everything, other.order.indices())
                self._sink.nonfinite(
                    NonfiniteStep(
                        other.last_step,
                        layer=None if layer is None else other.layers[layer],
                        # The gradients, the update or the user may have done it: nobody looked.
                        born_in=None,
                        layers=len(bad),
                        loss=other.last_loss,
                    )
                )
            other.poisoned = bool(bad)
            if other is watched:
                mine = bad
            else:
                elsewhere = elsewhere or bool(bad)
        return mine, elsewhere
