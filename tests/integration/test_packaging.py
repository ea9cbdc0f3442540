"""What is in the wheel, and what each installation needs and does without."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.clean_environment import ROOT, build_wheel, environment, python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def agent_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def with_collector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("collector"), "collector")


def command(*arguments: str) -> str:
    """Code that runs the command line."""
    return f"import sys; from gradwatch.cli import main; sys.argv = {['gradwatch', *arguments]!r}; main()"


@pytest.mark.parametrize("folder", ["alerts", "dashboards", "migrations"])
def test_the_wheel_holds_every_file_of_the_shipped_folders(wheel: Path, folder: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    tracked = {
        f"gradwatch/_assets/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", ".mypy_cache"} & set(path.parts)
    }
    assert tracked
    assert tracked <= shipped
    assert not [name for name in shipped if "__pycache__" in name or name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.parametrize("package", ["agent/gradwatch", "collector/gradwatch_collector", "slo/gradwatch_slo"])
def test_the_wheel_holds_what_packages_read_at_run_time(wheel: Path, package: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    parent = (ROOT / package).parent
    read = {
        path.relative_to(parent).as_posix()
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".css", ".html", ".js", ".json", ".svg", ".yaml", ".typed"}
    }
    assert read
    assert read <= shipped


def test_the_agent_works_without_torch_sql_or_the_collector(installed: Path, agent_only: Path) -> None:
    done = python(
        installed,
        agent_only,
        code="""
import importlib.util, sys
for absent in ("torch", "sqlalchemy", "numpy", "starlette", "pydantic", "grpc"):
    assert importlib.util.find_spec(absent) is None, absent
import gradwatch, gradwatch.export.otlp
from gradwatch.assets import asset_dir
assert (asset_dir("migrations") / "env.py").is_file()
"""
        + command("--help"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "collector" in done.stdout


def test_a_command_that_needs_more_names_the_extra(installed: Path, agent_only: Path) -> None:
    done = python(installed, agent_only, code=command("runs"))
    assert done.returncode == 1
    assert "pip install 'gradwatch[collector]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_collector_works_without_torch(installed: Path, with_collector: Path, tmp_path: Path) -> None:
    done = python(
        installed,
        with_collector,
        code=f"""
import importlib.util
assert importlib.util.find_spec("torch") is None
import gradwatch_collector.service.server
{command("db", "upgrade", "--db", f"sqlite:///{tmp_path}/runs.db")}
""",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "applied" in done.stdout


@pytest.mark.parametrize("name", ["alerts", "dashboards"])
def test_alerts_and_dashboards_are_exported_from_an_installation(
    installed: Path, with_collector: Path, tmp_path: Path, name: str
) -> None:
    target = tmp_path / name
    done = python(installed, with_collector, code=command(name, "export", str(target)))
    assert (done.returncode, done.stderr) == (0, "")
    exported = {path.suffix for path in target.rglob("*") if path.is_file()}
    assert exported == ({".yaml", ".md", ".tmpl"} if name == "alerts" else {".json", ".sql", ".yaml"})
