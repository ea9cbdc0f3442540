"""Every alert and every rule of findings has a runbook, and what it tells people to type exists."""

from __future__ import annotations

import re
import shlex

import click
import pytest

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_slo.rules import ALERT_NAMES as GENERATED_NAMES
from tests.unit.alerts.shipped import ALERT_NAMES, RUNBOOKS

# Those of `gradwatch slo rules` too, and of findings that raise no alert but have a link all the same.
NAMES = sorted({*ALERT_NAMES, *GENERATED_NAMES, *c.RULE_ALERTS.values()})
# About no alert in particular.
CHECKLISTS = ["IncidentChecklist"]
PAGES = [*NAMES, *CHECKLISTS]


def text_of(page: str) -> str:
    return (RUNBOOKS / f"{page}.md").read_text(encoding="utf-8")


def commands_in(text: str) -> list[str]:
    """What a page tells people to type, without prompts, pipes and what is not ours."""
    return re.findall(r"(?:^ *|`|\$ )(gradwatch [^`\n|]+)", text, re.MULTILINE)


def complaint(command: str) -> str | None:
    """Say what is wrong with a command line, by click's own tree of commands and their parsers."""
    _, *words = shlex.split(command)
    group: click.Command = main
    path = "gradwatch"
    with click.Context(main, info_name="gradwatch") as root:
        context = root
        while isinstance(group, click.Group):
            if not words:
                return None  # a group, named in a sentence
            found = group.get_command(context, words[0])
            if found is None:
                return f"{path} has no command {words[0]}"
            path += f" {words.pop(0)}"
            group, context = found, click.Context(found, info_name=path, parent=context)
        options = {name for parameter in group.params for name in parameter.opts + parameter.secondary_opts}
        for word in words:
            if word == "--":
                break
            if word.startswith("-") and word.partition("=")[0] not in options:
                return f"{path} has no option {word}"
        if words:
            # Names that stand for something (RUN, URL) are no files, and one that is left out is one that the
            # sentence has named: only what cannot be parsed is a mistake.
            try:
                group.make_parser(context).parse_args(words)
            except click.UsageError as error:
                return f"{path}: {error.message}"
    return None


def test_every_alert_and_every_rule_has_a_runbook_and_every_runbook_one_of_them() -> None:
    assert sorted(path.stem for path in RUNBOOKS.glob("*.md")) == sorted(PAGES)


@pytest.mark.parametrize("name", NAMES)
def test_a_runbook_has_meaning_impact_diagnosis_and_mitigation(name: str) -> None:
    text = text_of(name)
    assert re.findall(r"^# (.*)$", text, re.MULTILINE) == [name]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Meaning", "Impact", "Diagnosis", "Mitigation"]
    assert commands_in(text)


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_runbook_lead_somewhere(page: str) -> None:
    for linked in re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(page)):
        assert (RUNBOOKS / linked).is_file(), linked


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_runbook_exist_with_their_options(page: str) -> None:
    found = {command: complaint(command) for command in commands_in(text_of(page))}
    assert {command: what for command, what in found.items() if what is not None} == {}


@pytest.mark.parametrize("page", PAGES)
def test_the_metrics_and_rules_that_a_runbook_names_exist(page: str) -> None:
    commands = "\n".join(commands_in(text_of(page)))
    assert set(re.findall(r"metrics show (\S+)", commands)) <= {metric.name for metric in c.METRICS}
    assert set(re.findall(r"--rule (\S+)", commands)) <= c.RULE_ALERTS.keys()


@pytest.mark.parametrize("page", PAGES)
def test_what_a_runbook_says_of_a_loop_s_own_numbers_is_what_rules_read(page: str) -> None:
    text = text_of(page)
    told = set(re.findall(rf"{c.METRIC_NAME}=(\w+)", text)) | set(re.findall(r"watch\.log\((\w+)=", text))
    assert told <= {c.GRADIENT_STALENESS, "val_loss", "loss"}


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("gradwatch runs list --status failed", None),
        ("gradwatch runs dance", "gradwatch runs has no command dance"),
        ("gradwatch runs list --colour red", "gradwatch runs list has no option --colour"),
        ("gradwatch slo report --window", "gradwatch slo report: Option '--window' requires an argument."),
        ("gradwatch run --retries 3 -- python train.py --lr 0.1", None),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(command: str, what: str | None) -> None:
    assert complaint(command) == what
