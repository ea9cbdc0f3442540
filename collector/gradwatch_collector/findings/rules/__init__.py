"""All rules, one module each."""

from gradwatch_collector.findings.rule import Rule, RunRule, SceneRule
from gradwatch_collector.findings.rules import (
    divergence,
    gradient_explosion,
    input_shift,
    loss_scale_collapse,
    memory_headroom,
    missing_instrumentation,
    missing_seed,
    noisy_gradients,
    nonfinite,
    over_clipping,
    overfitting,
    plateau,
    run_endings,
    run_variance,
    slow_convergence,
    stale_gradients,
    telemetry_outage,
    vanishing_gradient,
)

SCENE_RULES: tuple[SceneRule, ...] = (
    telemetry_outage.RULE,
    run_endings.FAILED,
    run_endings.LOST,
    nonfinite.RULE,
    memory_headroom.RULE,
)
RUN_RULES: tuple[RunRule, ...] = (
    gradient_explosion.RULE,
    vanishing_gradient.RULE,
    loss_scale_collapse.RULE,
    over_clipping.RULE,
    noisy_gradients.RULE,
    stale_gradients.RULE,
    divergence.RULE,
    plateau.RULE,
    slow_convergence.RULE,
    overfitting.RULE,
    input_shift.RULE,
    run_variance.RULE,
    missing_seed.RULE,
    missing_instrumentation.RULE,
)
RULES: dict[str, Rule] = {rule.name: rule for rule in (*SCENE_RULES, *RUN_RULES)}
