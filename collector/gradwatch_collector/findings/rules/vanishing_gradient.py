"""Layers that get next to no gradient while others do, in a run that does not learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import rounded
from gradwatch_collector.findings.losses import descent, first_step, only_loss
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Layers, RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Gradients vanish where ``share`` of the layers have below ``ratio`` times the largest layer's norm.

    That in each of the newest ``intervals`` exports, of at least two layers; and the loss has fallen by less
    than ``gain`` of what it was in ``steps`` steps or more: layers that wait for others to move, as LoRA's
    first matrices do, and those that a normalisation makes independent of their biases, are no fault.
    """

    ratio: float = limited(1e-3, most=1.0)
    share: float = limited(0.2, most=1.0)
    intervals: int = 2
    steps: int = 60
    gain: float = limited(0.1, most=1.0)


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See the layers with the smallest gradients, if there are enough of them and the loss is flat."""
    loss = descent(only_loss(view))
    if loss is None or loss.steps < parameters.steps or first_step(view) > 0:
        return None
    gain = loss.gain / abs(loss.start) if loss.start else 0.0
    if gain >= parameters.gain:
        return None
    for layers in view.layers.get(f"{c.LAYER_GRADIENT_NORM.name} mean", ()):
        if (found := _vanished(layers, parameters)) is not None:
            smallest, ratio, count = found
            return Sighting(
                step=view.step_at(int(layers.times[-1])),
                layer=layers.names[smallest],
                rank=layers.rank,
                evidence={
                    "layers": count,
                    "of_layers": len(layers.names),
                    "smallest_ratio": rounded(ratio),
                    "loss": rounded(loss.now),
                    "loss_at_start": rounded(loss.start),
                },
            )
    return None


def _vanished(layers: Layers, parameters: Parameters) -> tuple[int, float, int] | None:
    """Return the layer with the smallest gradient, its share of the largest, and how many are too small."""
    newest = layers.values[:, -parameters.intervals :]
    if newest.shape[1] < parameters.intervals or not np.all(np.isfinite(newest)):
        return None
    largest = np.max(newest, axis=0, initial=0.0)
    if len(layers.names) < 2 or not np.all(largest > 0):
        return None
    ratios = np.max(newest / largest, axis=1)
    low = ratios < parameters.ratio
    if np.sum(low) < max(1, parameters.share * len(ratios)):
        return None
    smallest = int(np.argmin(ratios))
    return smallest, float(ratios[smallest]), int(np.sum(low))


RULE = RunRule(
    name=c.RULE_VANISHING_GRADIENT,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="Next to no gradient reaches some layers, and the loss does not fall: saturated activations such "
    "as sigmoids one behind the other, weights that began too small or at zero, or dead units.",
    action="Use ReLU or GELU, residual connections, normalisation and the usual initialisation (He, Xavier); "
    "look at the heat map for the layer at which gradients get lost.",
)
