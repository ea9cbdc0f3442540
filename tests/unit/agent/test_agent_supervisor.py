"""What the supervisor decides: what a death means, whether to try again, which run and attempt it is."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gradwatch.life.endings import Ending, after_sigterm, ending_of
from gradwatch.life.preemption import sigterm_reason
from gradwatch.settings import Settings, SettingsError
from gradwatch.supervisor import progress
from gradwatch.supervisor.child import Exit
from gradwatch.supervisor.deaths import Death, death_of
from gradwatch.supervisor.launch import ATTACH_FOLDER, Launch, attempt_of, job_of, will_be_restarted
from gradwatch.supervisor.oom_killer import OomKiller
from gradwatch.supervisor.progress import Progress, Told
from gradwatch.supervisor.retrying import Again, GiveUp, RetryPolicy

TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
COUNTED = "memory.events: oom_kill 0 -> 1"


@pytest.mark.parametrize(
    ("left", "counted", "status", "reason"),
    [
        pytest.param(Exit(0), None, "succeeded", None, id="return"),
        pytest.param(Exit(3), None, "failed", "exit 3", id="exit 3"),
        pytest.param(Exit(-9), None, "failed", "SIGKILL", id="SIGKILL"),
        pytest.param(Exit(-9), COUNTED, "failed", "oom_killed", id="SIGKILL that the kernel counted"),
        pytest.param(Exit(137), COUNTED, "failed", "oom_killed", id="the same under a shell"),
        pytest.param(Exit(137), None, "failed", "exit 137", id="a shell's 137"),
        pytest.param(Exit(1), COUNTED, "failed", "exit 1", id="only a process of its own was killed"),
        pytest.param(Exit(0), COUNTED, "succeeded", None, id="it went on all the same"),
        pytest.param(Exit(-11), None, "failed", "segfault", id="SIGSEGV"),
        pytest.param(Exit(-6), None, "failed", "SIGABRT", id="SIGABRT"),
        pytest.param(Exit(-40), None, "failed", "signal 40", id="a real-time signal"),
        pytest.param(Exit(-15), None, "cancelled", "SIGTERM", id="SIGTERM that went past us"),
        pytest.param(Exit(143), None, "cancelled", "SIGTERM", id="a shell's 143"),
        pytest.param(Exit(-2, INT), None, "cancelled", "interrupted", id="Ctrl-C"),
        pytest.param(Exit(1, INT, 1.0), None, "cancelled", "interrupted", id="torchrun's answer to Ctrl-C"),
        pytest.param(Exit(0, INT, 1.0), None, "succeeded", None, id="work done after Ctrl-C"),
        pytest.param(Exit(0, TERM, 1.0), None, "cancelled", "SIGTERM", id="a tidy end after SIGTERM"),
        pytest.param(Exit(-9, TERM, 30.0), None, "cancelled", "SIGTERM", id="SIGKILL after SIGTERM"),
        pytest.param(Exit(-9, TERM, 1.0), COUNTED, "failed", "oom_killed", id="OOM wins over SIGTERM"),
        pytest.param(Exit(1, TERM, 90.0), None, "failed", "exit 1", id="a failure long after SIGTERM"),
        pytest.param(Exit(0, TERM, 90.0), None, "succeeded", None, id="a success long after SIGTERM"),
        pytest.param(Exit(-1, HUP), None, "cancelled", "SIGHUP", id="a closed terminal"),
        pytest.param(Exit(200), None, "failed", "exit 200", id="an exit code that is no signal"),
    ],
)
def test_a_death_means(left: Exit, counted: str | None, status: str, reason: str | None) -> None:
    death = death_of(left, counted)
    assert (death.status, death.reason) == (status, reason)
    assert death.exit_code == (left.code if left.code >= 0 else 128 - left.code)
    assert "\n" not in death.evidence
    if counted and left.code:
        assert counted in death.evidence


def test_the_evidence_says_all_that_was_seen() -> None:
    assert death_of(Exit(-11, core_dumped=True)).evidence == "killed by SIGSEGV (core dumped)"
    assert death_of(Exit(-9, TERM, 30.04)).evidence == "killed by SIGKILL, 30.0 s after SIGTERM"
    assert death_of(Exit(137)).evidence == "exit code 137, by which shells mean SIGKILL"


def test_sigterm_is_preemption_only_if_somebody_says_so() -> None:
    slurm = {"SLURM_JOB_ID": "7"}
    assert sigterm_reason(False, environ={}) == "SIGTERM"
    assert sigterm_reason(True, environ={}) == "preempted"
    assert sigterm_reason(False, [signal.SIGCONT], slurm) == "SIGTERM"  # what scancel sends too
    assert sigterm_reason(False, [signal.SIGUSR1], slurm) == "preempted"
    assert sigterm_reason(False, [signal.SIGUSR1], {}) == "SIGTERM"
    assert death_of(Exit(-15, TERM), preemptible=True).reason == "preempted"


@pytest.mark.parametrize("ending", [ending_of(None), ending_of(SystemExit(3)), ending_of(ValueError("late"))])
def test_what_ends_within_a_minute_of_sigterm_is_the_answer_to_it_and_later_it_is_its_own(
    ending: Ending,
) -> None:
    answer = after_sigterm(ending, "SIGTERM", 59.0)
    assert (answer.status, answer.reason, answer.exit_code) == ("cancelled", "SIGTERM", ending.exit_code)
    assert answer.exception_message == ending.exception_message
    assert after_sigterm(ending, "SIGTERM", 61.0) == ending


def failed(code: int = 1, reason: str | None = None) -> Death:
    return Death("failed", reason or f"exit {code}", code, "")


def policy(retries: int) -> RetryPolicy:
    return RetryPolicy(retries, 10.0, chance=lambda: 1.0)


def test_pauses_double_up_to_ten_minutes_and_are_jittered() -> None:
    patient = policy(9)
    pauses = [patient.after(failed(), Progress(1, step)) for step in range(9)]
    assert pauses == [Again(s) for s in (10, 20, 40, 80, 160, 320, 600, 600, 600)]
    assert patient.after(failed(), Progress(1, 9)) == GiveUp()
    assert RetryPolicy(1, 10.0, chance=lambda: 0.0).after(failed(), Progress(1, 0)) == Again(5.0)


@pytest.mark.parametrize(
    "death",
    [
        Death("succeeded", None, 0, ""),
        Death("cancelled", "SIGTERM", 143, ""),
        Death("cancelled", "preempted", 143, ""),
        failed(2),
        failed(126),
        failed(127),
    ],
)
def test_not_worth_another_attempt(death: Death) -> None:
    assert isinstance(policy(5).after(death, Progress(1, 3)), GiveUp)


def test_nothing_is_tried_again_unless_asked() -> None:
    assert policy(0).after(failed(), Progress(1, 3)) == GiveUp()


@pytest.mark.parametrize("step", [None, 7])
def test_the_same_failure_twice_in_a_row_is_the_last(step: int | None) -> None:
    patient = policy(5)
    assert isinstance(patient.after(failed(), Progress(1, step)), Again)
    given_up = patient.after(failed(), Progress(1, step))
    assert isinstance(given_up, GiveUp)
    assert "twice in the same way (exit 1" in given_up.why


def test_another_step_reason_or_code_is_another_failure() -> None:
    patient = policy(9)
    failures = [(failed(), 7), (failed(), 8), (failed(3), 8), (failed(137, "oom_killed"), 8), (failed(), None)]
    assert all(isinstance(patient.after(death, Progress(1, step)), Again) for death, step in failures)


@pytest.mark.parametrize(
    ("command", "job"),
    [
        (["python", "src/train.py", "--lr", "1"], "train"),
        (["torchrun", "--nproc-per-node", "2", "pre.train.py"], "pre.train"),
        (["python", "-m", "torch.distributed.run", "-m", "package.fit"], "fit"),
        (["/opt/bin/trainer", "x"], "trainer"),
    ],
)
def test_a_job_is_called_after_its_script(command: list[str], job: str) -> None:
    assert job_of(command) == job


def test_a_child_is_told_who_it_is_and_where_the_hook_is() -> None:
    environ = {"PATH": "/bin", "PYTHONPATH": "/mine", "GRADWATCH_ATTEMPT": "3"}
    launch = Launch.resolve(["python", "train.py"], {"model_name": "net", "team": None}, environ)
    told = launch.child_environ(launch.first_attempt, Path("/folder"), "instance")
    assert told == {
        "PATH": "/bin",
        "PYTHONPATH": f"{ATTACH_FOLDER}{os.pathsep}/mine",
        "GRADWATCH_JOB": "train",
        "GRADWATCH_MODEL_NAME": "net",
        "GRADWATCH_RUN_ID": launch.run_id,
        "GRADWATCH_ATTEMPT": "3",
        progress.FOLDER_VARIABLE: "/folder",
        progress.INSTANCE_VARIABLE: "instance",
    }


def test_a_disabled_agent_is_not_attached() -> None:
    launch = Launch.resolve(["python"], {}, {"GRADWATCH_DISABLED": "1"})
    assert "PYTHONPATH" not in launch.child_environ(1, None)


@pytest.mark.parametrize(
    ("environ", "run_id"),
    [
        ({"GRADWATCH_RUN_ID": "mine", "WORLD_SIZE": "2"}, "mine"),
        ({"TORCHELASTIC_RUN_ID": "elastic", "WORLD_SIZE": "2"}, "elastic"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "slurm-7.0"),
    ],
)
def test_supervisors_of_several_ranks_know_the_same_run(environ: Mapping[str, str], run_id: str) -> None:
    assert Launch.resolve(["python"], {}, environ).run_id == run_id


def test_supervisors_that_would_make_a_run_each_ask_for_its_id() -> None:
    environ = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}
    with pytest.raises(SettingsError, match="--run-id"):
        Launch.resolve(["python"], {}, environ)
    assert Launch.resolve(["python"], {"run_id": "mine"}, environ).run_id == "mine"
    alone = Launch.resolve(["python"], {}, {"WORLD_SIZE": "1"})
    assert alone.run_id != Launch.resolve(["python"], {}, {}).run_id


@pytest.mark.parametrize(
    ("environ", "attempt"),
    [
        ({}, None),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, 3),
        ({"GRADWATCH_ATTEMPT": "5"}, 5),
        ({"GRADWATCH_ATTEMPT": "5", "TORCHELASTIC_RESTART_COUNT": "2"}, 5),
        ({"GRADWATCH_ATTEMPT": "5", "TORCHELASTIC_RESTART_COUNT": "2", progress.FOLDER_VARIABLE: "/x"}, 7),
        ({"GRADWATCH_ATTEMPT": "5", progress.FOLDER_VARIABLE: "/x"}, 5),
    ],
)
def test_a_worker_counts_its_launchers_restarts(environ: dict[str, str], attempt: int | None) -> None:
    assert attempt_of(Settings.resolve({}, environ), environ) == attempt


def test_a_supervisor_within_torchrun_counts_its_restarts_once() -> None:
    environ = {"TORCHELASTIC_RESTART_COUNT": "2", "GRADWATCH_RUN_ID": "mine"}
    launch = Launch.resolve(["python"], {}, environ)
    assert launch.first_attempt == 3
    told = launch.child_environ(3, Path("/folder"))
    assert attempt_of(Settings.resolve({}, told), told) == 3


@pytest.mark.parametrize(
    ("environ", "first"),
    [
        ({}, 1),
        ({"SLURM_RESTART_COUNT": "2"}, 3),
        ({"SLURM_RESTART_COUNT": "2", "GRADWATCH_ATTEMPT": "7"}, 7),
    ],
)
def test_a_job_that_slurm_put_back_into_the_queue_goes_on_counting(environ: dict[str, str], first: int) -> None:
    assert Launch.resolve(["python"], {}, environ).first_attempt == first


@pytest.mark.parametrize(
    ("restarts", "most", "again"), [("0", "1", True), ("1", "1", False), ("0", "0", False), ("", "", False)]
)
def test_torchrun_starts_failed_workers_again_as_long_as_it_may(restarts: str, most: str, again: bool) -> None:
    environ = {"TORCHELASTIC_RESTART_COUNT": restarts, "TORCHELASTIC_MAX_RESTARTS": most}
    assert will_be_restarted(environ) is again


def test_an_exception_of_another_kind_is_another_failure() -> None:
    patient = policy(5)
    assert isinstance(
        patient.after(failed(), Progress(1, None, failures=frozenset({"ConnectionError"}))), Again
    )
    other = frozenset({"FileNotFoundError"})
    assert isinstance(patient.after(failed(), Progress(2, None, failures=other)), Again)
    given_up = patient.after(failed(), Progress(3, None, failures=other | {"a peer's"}))
    assert isinstance(given_up, GiveUp)
    assert "FileNotFoundError" in given_up.why


def test_who_could_not_tell_its_last_step_failed_at_any_that_may_have_ended() -> None:
    patient = policy(5)
    assert isinstance(patient.after(failed(), Progress(1, 400, unseen=380)), Again)
    assert isinstance(patient.after(failed(), Progress(2, 100, unseen=200)), Again)
    assert isinstance(patient.after(failed(), Progress(3, 350, unseen=450)), Again)
    assert isinstance(patient.after(failed(), Progress(4, 700, unseen=110)), GiveUp)


def test_the_furthest_step_of_the_latest_attempt_counts(tmp_path: Path) -> None:
    environ = {progress.FOLDER_VARIABLE: str(tmp_path)}

    def tell(instance: str, *what: Any, **more: Any) -> None:
        progress.tell(Told(*what, **more), instance, environ)

    def read(attempt: int, age: float = 0.0) -> Progress:
        times = [file.stat().st_mtime for file in tmp_path.iterdir()]
        return progress.read(tmp_path, attempt, max(times, default=0.0) + age)

    assert read(1) == Progress(1)
    tell("a", "run", 1, 900, failure="ValueError")
    tell("b", "run", 2)
    assert read(1) == Progress(2, run_ids=frozenset({"run"}))
    tell("b", "run", 2, 10, 0.5)
    os.utime(tmp_path / "b", (1e9, 1e9))
    tell("c", "run", 2, 8, failure="OSError")
    os.utime(tmp_path / "c", (1e9, 1e9))
    os.utime(tmp_path / "a", (1e9, 1e9))
    assert read(1, 3.2) == Progress(2, 10, 6, frozenset({"OSError"}), frozenset({"run"}))
    tell("d", "another", 2, 3)
    assert read(1).run_ids == {"run", "another"}
    assert read(3) == Progress(3)
    (tmp_path / "e").write_text("half of")
    assert read(3) == Progress(3)
    progress.tell(Told("run", 1, 5), "f", {progress.FOLDER_VARIABLE: "/nowhere"})  # the supervisor is gone


def test_what_a_killed_supervisor_left_goes_and_what_a_living_one_has_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left, new = tmp_path / "gradwatch-run-left", tmp_path / "gradwatch-run-new"
    link = tmp_path / "gradwatch-run-link"
    for folder in (left, new, tmp_path / "elsewhere"):
        folder.mkdir()
        (folder / "a").touch()
    link.symlink_to(tmp_path / "elsewhere")
    os.utime(left, (1e9, 1e9))
    os.utime(link, (1e9, 1e9), follow_symlinks=False)
    with progress.private_folder() as living:
        assert living is not None
        os.utime(living, (1e9, 1e9))
        with progress.private_folder() as mine:
            assert mine is not None
            folders = {file.name for file in tmp_path.iterdir()}
    assert folders == {new.name, link.name, "elsewhere", living.name, mine.name}
    assert {file.name for file in tmp_path.iterdir()} == {new.name, link.name, "elsewhere"}
    assert (tmp_path / "elsewhere" / "a").exists()


MOUNTS = {
    "v2": "30 23 0:26 / {place} rw - cgroup2 cgroup2 rw",
    "v1": "30 23 0:26 /docker/x {place} rw - cgroup none rw,memory\n31 23 0:27 / /cpu rw - cgroup none rw,cpu",
}
GROUPS = {"v2": "0::/job", "v1": "4:memory:/docker/x/job\n1:cpu:/\n0::/"}
COUNTERS = {
    "v2": ("memory.events", "low 0\noom 5\noom_kill {}\n"),
    "v1": ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"),
}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_counter_of_the_childs_own_group_is_the_evidence(tmp_path: Path, version: str) -> None:
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "cgroup").write_text(GROUPS[version])
    (tmp_path / "42" / "mountinfo").write_text(MOUNTS[version].format(place=tmp_path))
    (tmp_path / "job").mkdir()
    name, text = COUNTERS[version]
    counter = tmp_path / "job" / name
    counter.write_text(text.format(3))
    killer = OomKiller(tmp_path, log=tmp_path / "none")
    killer.look(42)
    assert killer.evidence(42) is None
    counter.write_text(text.format(4))
    killer.look(42)  # a later look does not forget what was there before
    assert killer.evidence(42) == f"{counter}: oom_kill 3 -> 4"


def test_a_count_for_another_process_is_no_evidence_of_a_later_death(tmp_path: Path) -> None:
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "cgroup").write_text(GROUPS["v2"])
    (tmp_path / "42" / "mountinfo").write_text(MOUNTS["v2"].format(place=tmp_path))
    (tmp_path / "job").mkdir()
    counter = tmp_path / "job" / "memory.events"
    now = 0.0
    killer = OomKiller(tmp_path, tmp_path / "none", lambda: now)
    for second in range(20):
        now = float(second)
        counter.write_text(f"oom_kill {0 if second < 10 else 1}\n")  # a helper's, in the tenth second
        killer.look(42)
        assert (killer.evidence(42) is not None) == (10 <= second < 15)
    counter.write_text("oom_kill 2\n")
    assert killer.evidence(42) == f"{counter}: oom_kill 1 -> 2"


def test_without_control_groups_and_log_there_is_no_evidence(tmp_path: Path) -> None:
    killer = OomKiller(tmp_path, log=tmp_path / "none")
    killer.look(42)
    assert killer.evidence(42) is None
    killer.close()
