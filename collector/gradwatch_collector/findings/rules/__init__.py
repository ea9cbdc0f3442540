"""All rules, one module each."""

from gradwatch_collector.findings.rule import Rule, RunRule, SceneRule
from gradwatch_collector.findings.rules import (
    memory_headroom,
    missing_instrumentation,
    nonfinite,
    run_endings,
    telemetry_outage,
)

SCENE_RULES: tuple[SceneRule, ...] = (
    telemetry_outage.RULE,
    run_endings.FAILED,
    run_endings.LOST,
    nonfinite.RULE,
    memory_headroom.RULE,
)
RUN_RULES: tuple[RunRule, ...] = (missing_instrumentation.RULE,)
RULES: dict[str, Rule] = {rule.name: rule for rule in (*SCENE_RULES, *RUN_RULES)}
