"""The alert on the shipped objective of training success; `gradwatch slo rules` makes those of your own."""

from __future__ import annotations

from typing import Final

from alert import KEEP_FIRING_FOR, TICKET, Alert, Group, over_replicas

from gradwatch import conventions as names

# The contract's bar for an alert on few events: exact binomial test, and never on a single bad run.
BUDGET_P_VALUE: Final = 0.01
BUDGET_LEAST_BAD: Final = 2

_success_rate = f'slo="{names.SLO_TRAINING_SUCCESS_RATE}"'
_p_value = over_replicas(f"{names.SLO_P_VALUE.name}{{{_success_rate}}}")
_bad = over_replicas(f'{names.SLO_EVENTS.name}{{{_success_rate}, quality="bad"}}')

SUCCESS_RATE: Final = Group(
    "gradwatch-objectives",
    (
        Alert(
            name="GradwatchSuccessRateBudget",
            expr=f"{_p_value} < {BUDGET_P_VALUE} and ignoring (quality) {_bad} >= {BUDGET_LEAST_BAD}",
            summary="More training runs{{ with $labels.training_job }} of {{ . }}{{ end }}"
            "{{ with $labels.tier }} in tier {{ . }}{{ end }} fail than {{ $labels.slo }} allows",
            description="With the objective's target true, as many bad runs as in its window would be seen"
            ' with probability {{ $value | printf "%.2g" }}. See `gradwatch slo report`.',
            labels=(("severity", TICKET),),
            dashboard="gradwatch-executive",
            keep_firing_for=KEEP_FIRING_FOR,
        ),
    ),
)
