"""What a set of outcomes is worth, from findings that are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gym import judging, outcome
from gym.outcome import Found, Injection, Outcome
from gym.page import tables
from gym.plan import PlannedRun

NAN = Injection(step=50, time=1000.0, born_in="forward", layer="2.1")


def planned(fault: str | None, strength: str | None = "strong", run_id: str = "run") -> PlannedRun:
    return PlannedRun(run_id, "report", "mlp", fault, strength if fault else None, 1, 0.5)


def found(rule: str, **known: Any) -> Found:
    told: dict[str, Any] = {
        "run_id": "run", "attempt": 1, "rule": rule, "severity": "ticket", "state": "open",
        "step": 52, "layer": None, "born_in": None, "seen": 1001.5, "evidence": {},
    }  # fmt: skip
    return Found(**(told | known))


def outcome_of(
    fault: str | None, *findings: Found, strength: str = "strong", injection: Injection | None = NAN
) -> Outcome:
    return Outcome(planned(fault, strength), (0,), injection if fault else None, findings)


def test_a_fault_is_found_by_any_rule_that_names_it() -> None:
    outcomes = [
        outcome_of("learning_rate_bomb", found("divergence")),
        outcome_of("learning_rate_bomb", found("gradient_explosion")),
        outcome_of("learning_rate_bomb", found("plateau")),
        outcome_of("learning_rate_bomb", strength="weak"),
    ]

    assert str(judging.recall(outcomes, "strong")) == "2 of 3 (67 %)"
    assert str(judging.recall(outcomes, "weak")) == "0 of 1 (0 %)"


def test_of_no_runs_no_share_is_claimed() -> None:
    assert judging.recall([], "strong").share is None


def test_a_true_consequence_of_a_fault_is_not_unexpected_and_anything_else_is() -> None:
    sick = outcome_of("input_shift", found("input_shift"), found("divergence"), found("stalled"))

    assert [each.rule for each in judging.unexpected(sick)] == ["stalled"]


def test_whatever_is_found_of_a_healthy_run_is_a_false_alarm() -> None:
    alarms = judging.false_alarms(
        [
            outcome_of(None, found("plateau"), found("run_lost", severity="page")),
            outcome_of(None, found("missing_seed", severity="info")),
            outcome_of("plateau", found("plateau")),
        ]
    )

    assert alarms.runs == 2
    assert alarms.by_severity == {"ticket": 1, "page": 1, "info": 1}


def test_a_birthplace_is_right_if_phase_and_layer_are() -> None:
    right = found("nonfinite", born_in="forward", layer="2.1")
    other_layer = found("nonfinite", born_in="forward", layer="4")
    other_phase = found("nonfinite", born_in="backward", layer="2.1.weight")
    outcomes = [outcome_of("division_in_forward", each) for each in (right, other_layer, other_phase)]
    outcomes.append(outcome_of("division_in_forward"))

    assert [judging.is_birthplace_right(each) for each in outcomes] == [True, False, False, False]
    assert str(judging.birthplaces(outcomes)) == "1 of 4 (25 %)"


def test_of_a_backward_pass_the_parameter_of_the_layer_is_named() -> None:
    born = Injection(step=50, time=1000.0, born_in="backward", layer="2.0")
    right = outcome_of(
        "division_in_backward", found("nonfinite", born_in="backward", layer="2.0.bias"), injection=born
    )
    wrong = outcome_of(
        "division_in_backward", found("nonfinite", born_in="backward", layer="2.1.bias"), injection=born
    )

    assert judging.is_birthplace_right(right)
    assert not judging.is_birthplace_right(wrong)


def test_a_delay_is_from_the_fault_to_the_first_finding_that_names_it() -> None:
    sick = outcome_of(
        "learning_rate_bomb",
        found("divergence", step=90, seen=1004.0),
        found("gradient_explosion", step=53, seen=1002.0),
    )

    assert list(judging.delays([sick])) == [judging.Delay(steps=3, seconds=2.0)]


def test_what_was_found_before_the_fault_came_is_a_false_alarm_and_no_recall() -> None:
    early = found("divergence", seen=999.0)
    missed = outcome_of("learning_rate_bomb", early)

    assert judging.finding_of(missed) is None
    assert judging.unexpected(missed) == [early]
    assert list(judging.delays([missed])) == []

    later = found("gradient_explosion", seen=1002.0)
    assert judging.finding_of(outcome_of("learning_rate_bomb", early, later)) == later


def test_what_is_there_from_the_start_has_no_delay() -> None:
    assert not list(judging.delays([outcome_of("plateau", found("plateau"))]))


def test_a_finding_that_was_never_seen_open_counts_as_found_without_a_delay() -> None:
    sick = outcome_of("corrupt_batch", found("nonfinite", seen=None))

    assert judging.recall([sick], "strong").found == 1
    assert not list(judging.delays([sick]))


def test_the_confusion_matrix_counts_runs_and_not_findings() -> None:
    twice = outcome_of("repeated_crash", found("run_failed"), found("run_failed", attempt=2))

    assert judging.confusion([twice, twice, outcome_of(None)]) == {
        "repeated_crash": {"run_failed": 2},
        "healthy": {},
    }


def test_runs_that_did_not_go_as_planned_are_told() -> None:
    never_came = outcome_of("corrupt_batch", injection=None)
    crashed = Outcome(planned(None), (1,), None, ())

    assert judging.untrue([never_came, crashed, outcome_of(None), outcome_of("corrupt_batch")]) == [
        never_came,
        crashed,
    ]


def test_the_tables_say_what_was_missed_and_what_was_said_wrongly() -> None:
    page = tables(
        [
            outcome_of("division_in_forward", found("nonfinite", born_in="loss")),
            outcome_of("plateau", found("stalled", severity="page")),
            outcome_of(None),
        ],
        interval=1.0,
    )

    assert "| strong faults found | 1 of 2 (50 %) |" in page
    assert "| found of 1 healthy runs | 0 pages, 0 tickets, 0 infos |" in page
    assert "says loss None, was forward 2.1" in page
    assert "missed; says stalled (page)" in page
    assert "| found within 3 export intervals of 1 s | 1 of 1 |" in page


def test_outcomes_can_be_kept_and_read_again(tmp_path: Path) -> None:
    outcomes = [outcome_of("corrupt_batch", found("nonfinite")), outcome_of(None)]
    outcome.save(outcomes, tmp_path / outcome.TRUTH)

    assert outcome.load(tmp_path / outcome.TRUTH) == outcomes
