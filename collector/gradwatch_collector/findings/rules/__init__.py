"""All rules, one module each."""

from gradwatch_collector.findings.rule import Rule, RunRule, SceneRule
from gradwatch_collector.findings.rules import (
    checkpoint_corrupt,
    checkpoint_failed,
    checkpoint_stale,
    collective_outage,
    data_starvation,
    memory_growth,
    memory_headroom,
    missing_instrumentation,
    nonfinite,
    out_of_memory,
    repeated_failure,
    run_endings,
    slow_collective,
    stalled,
    step_time_regression,
    straggler,
    sweep_cost,
    telemetry_outage,
)

SCENE_RULES: tuple[SceneRule, ...] = (
    telemetry_outage.RULE,
    run_endings.FAILED,
    run_endings.LOST,
    nonfinite.RULE,
    memory_headroom.RULE,
    checkpoint_corrupt.RULE,
    collective_outage.RULE,
    sweep_cost.RULE,
)
RUN_RULES: tuple[RunRule, ...] = (
    missing_instrumentation.RULE,
    stalled.RULE,
    slow_collective.RULE,
    straggler.RULE,
    data_starvation.RULE,
    out_of_memory.RULE,
    memory_growth.RULE,
    checkpoint_failed.RULE,
    checkpoint_stale.RULE,
    repeated_failure.RULE,
    step_time_regression.RULE,
)
RULES: dict[str, Rule] = {rule.name: rule for rule in (*SCENE_RULES, *RUN_RULES)}
