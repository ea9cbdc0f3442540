"""Files, folders and the standard input, as commands take them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gradwatch.cli import main
from gradwatch_slo.files import read_files
from gradwatch_slo.problems import ObjectiveFileError

COMPLETE = Path(__file__).with_name("complete.yaml").read_text()


def service(name: str) -> str:
    return f"apiVersion: openslo/v1\nkind: Service\nmetadata: {{name: {name}}}\n"


def names(*paths: Path) -> list[str]:
    return [document.content.metadata.name for document in read_files(paths)]


def slo(*arguments: str | Path, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(main, ["slo", *map(str, arguments)], input=stdin)


def test_a_folder_stands_for_its_yaml_files_however_deep_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.yaml", "a.yml", "deep/er/c.yaml", "deep/d.yml"):
        (tmp_path / name).write_text(service(Path(name).stem))
    (tmp_path / "README.md").write_text("no objective")
    assert names(tmp_path) == ["a", "b", "d", "c"]


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))
    (tmp_path / "same.yaml").symlink_to(file)
    assert names(tmp_path, file) == ["a"]


def test_a_config_map_of_kubernetes_is_there_once(tmp_path: Path) -> None:
    hidden = tmp_path / "..2026_01_01"
    hidden.mkdir()
    (hidden / "a.yaml").write_text(service("a"))
    (tmp_path / "..data").symlink_to(hidden)
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    assert names(tmp_path) == ["a"]


def test_a_bad_file_of_a_folder_does_not_hide_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 1\n")
    (tmp_path / "b.yaml").write_bytes("ä".encode("latin-1"))
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ObjectiveFileError) as raised:
        read_files([tmp_path])
    assert str(raised.value).splitlines() == [
        f"{tmp_path}/a.yaml:1: found a list, expected an OpenSLO document: a mapping",
        f"{tmp_path}/b.yaml:1: found byte 0xe4, expected UTF-8 text",
        f"{tmp_path}/c.yaml:1: found no document, expected OpenSLO documents",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(ObjectiveFileError, match="locked:1: cannot be read: Permission denied"):
        read_files([tmp_path])


def test_validate_reads_the_standard_input_and_says_so() -> None:
    done = slo("validate", "-f", "-", stdin=COMPLETE)
    assert (done.exit_code, done.stdout) == (0, "valid: 3 objectives, 2 not evaluated here\n")
    assert done.stderr.startswith("warning: in-slices cannot be evaluated: ")
    wrong = slo("validate", "-", stdin=COMPLETE.replace("target: 0.9\n", "target: 1\n"))
    assert wrong.exit_code == 1
    assert wrong.stderr.splitlines()[0].startswith("<stdin>:")
    assert wrong.stderr.splitlines()[1:] == ["Error: 1 problem found"]


def test_validate_without_files_checks_what_is_shipped() -> None:
    assert slo("validate", "--strict").stdout == "valid: 21 objectives\n"


def test_what_others_evaluate_is_no_error_when_strict() -> None:
    assert slo("validate", "--strict", "-", stdin=COMPLETE).exit_code == 0


def test_what_is_useless_is_an_error_when_strict(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))
    useless = "found a Service 'a' that nothing refers to, expected one that is used"
    found = f"warning: {file}:3: metadata.name: {useless}\n"
    lenient, strict = slo("validate", file), slo("validate", "--strict", file)
    assert (lenient.exit_code, lenient.stderr) == (0, found)
    assert (strict.exit_code, strict.stderr) == (1, f"{found}Error: 1 warning found\n")


def test_rules_cannot_be_written_where_there_is_no_folder(tmp_path: Path) -> None:
    done = slo("rules", "-o", tmp_path / "none" / "rules.yaml")
    assert done.exit_code == 1
    assert done.stderr == f"Error: {tmp_path}/none/rules.yaml cannot be written: No such file or directory\n"
