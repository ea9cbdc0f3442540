"""docs/findings.md says of every rule what its module says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from gradwatch_collector.findings.losses import VALIDATION_LOSSES
from gradwatch_collector.findings.overrides import read_overrides
from gradwatch_collector.findings.rule import Rule
from gradwatch_collector.findings.rules import RULES

PAGE = (Path(__file__).parents[2] / "docs" / "findings.md").read_text()


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_every_rule_is_there_with_its_parameters_cause_and_action(rule: Rule) -> None:
    section = PAGE.split(f"\n## {rule.name}\n")[1].split("\n## ")[0]
    known = {} if rule.parameters is None else dataclasses.asdict(rule.parameters)
    assert dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE)) == {
        name: str(value) for name, value in known.items()
    }
    assert rule.cause in section
    assert rule.action in section


def test_the_names_of_held_out_losses_are_those_that_are_looked_for() -> None:
    paragraph = next(" ".join(each.split()) for each in PAGE.split("\n\n") if "held-out loss, given" in each)
    words = re.findall(r"`(\w+)`", paragraph.split("where `val` may as well be")[1].split(".")[0])
    assert {f"{word}_loss" for word in ["val", *words]} == {
        name for name in VALIDATION_LOSSES if name.endswith("_loss")
    }


def test_the_example_of_other_thresholds_is_one(tmp_path: Path) -> None:
    example = PAGE.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "findings.yaml").write_text(example)
    assert len(read_overrides(tmp_path / "findings.yaml", RULES.values())) == len(yaml.safe_load(example))
