"""What the page's scripts and styles must not do, and the names that they share with everything else."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from gradwatch import conventions as c
from gradwatch_collector.api.curves import METRICS

FOLDER = files("gradwatch_collector.page").joinpath("static")
SOURCES = {each.name: each.read_text("utf-8") for each in FOLDER.iterdir()}
SCRIPTS = [name for name in SOURCES if name.endswith(".js")]


def test_scripts_name_metrics_and_attributes_as_all_others_do() -> None:
    text = "".join(SOURCES[name] for name in SCRIPTS)
    named = set(re.findall(r'"((?:training|process|hw)\.[a-z_.]+)"', text))
    assert {c.LOSS.name, c.GRADIENT_NORM.name, c.DEVICE_MEMORY_HEADROOM.name} <= named
    assert named <= METRICS.keys() | c.ATTRIBUTES.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_fetched_from_another_host(name: str) -> None:
    told = SOURCES[name].replace("http://www.w3.org/2000/svg", "")
    assert "//" not in re.sub(r"(?m)^\s*//.*$", "", told)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_telemetry_says_is_never_read_as_html(name: str) -> None:
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", SOURCES[name])
