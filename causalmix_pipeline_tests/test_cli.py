import contextlib
import io
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import yaml

from causalmix_pipeline.adapters.sealed_frames import read_value, write_value
from causalmix_pipeline.cli import app, main, ui_command
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline.workspace import find_config, hold_project, root_cause
from causalmix_pipeline_tests.conftest import write_documents

COMMANDS = [
    "demo", "plan", "refresh", "status", "init", "ui", "doctor", "profile", "covariates",
    "fetch-scorer", "fit", "predict", "recommend", "pareto", "baselines", "explain", "top-up",
    "condition", "compare", "export", "import", "runs",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Commands look for settings where they are called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")


def call(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; its exit status and what it printed, on one line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(list(arguments))
    return status, " ".join(out.getvalue().split())


def change_settings(path: Path, **sections) -> None:
    raw = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(raw | sections))


def test_the_commands_are_these():
    names = [
        command.name or getattr(command.callback, "__name__", "")
        for command in app.registered_commands
    ]
    assert sorted(names) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    status, text = call(command, "--help")

    assert status == 0
    assert "Usage: causalmix" in text


def test_help_loads_nothing_heavy():
    """A person who asks for help waits for no torch and no Dagster."""
    code = (
        "import sys; from causalmix_pipeline.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'dagster', 'econml', 'polars') if m in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_init_writes_settings_once(tmp_path):
    assert call("init")[0] == 0
    assert "pools:" in (tmp_path / "causalmix.yaml").read_text()

    status, text = call("init")

    assert status == 2
    assert "causalmix.yaml must not exist yet" in text


def test_a_missing_settings_file_is_a_message():
    status, text = call("refresh")

    assert status == 2
    assert "causalmix.yaml must be a settings file, got no file" in text
    assert "Traceback" not in text


def test_a_wrong_setting_is_named(project_file):
    change_settings(project_file, policy={"max_epochs": -1})

    status, text = call("status", "--config", str(project_file))

    assert status == 2
    assert "policy.max_epochs must be > 0, got -1" in text


def test_an_unknown_option_is_a_message():
    status, text = call("refresh", "--nonsense")

    assert status == 2
    assert "No such option" in text
    assert "Traceback" not in text


def test_an_unknown_preset_is_refused():
    status, text = call("demo", "--preset", "huge")

    assert status == 2
    assert "--preset must be tests, demo or study, got 'huge'" in text


def test_an_unexpected_error_leaves_its_trace_in_a_file(tmp_path, project_file):
    """Never a bare traceback on the screen: here `data` is a file where a folder should be."""
    change_settings(project_file, data_dir="causalmix.yaml/x")

    status, text = call("status", "--config", str(project_file))

    assert status == 1
    assert "an unexpected error, which is a bug: " in text
    assert 'File "' not in text
    assert "Traceback" in (tmp_path / "data" / "logs" / "error.txt").read_text()


def test_a_project_without_tasks_says_so(project_file):
    change_settings(project_file, tasks=[])

    status, text = call("plan", "--config", str(project_file))

    assert status == 2
    assert "tasks must hold at least one task" in text


def test_doctor_passes_a_sound_project(project_file):
    status, text = call("doctor", "--config", str(project_file))

    assert status == 0, text
    assert "180 documents in 3 domains, 0 rows refused" in text
    assert "20 documents, weight 0.7" in text
    assert "wrong" not in text


def test_doctor_finds_what_is_wrong(project_file):
    for path in (project_file.parent / "live").rglob("*.jsonl"):
        path.unlink()
    (project_file.parent / "eval" / "math.jsonl").unlink()

    status, text = call("doctor", "--config", str(project_file))

    assert status == 2
    assert "holds no .jsonl or .parquet file" in text
    assert "path must be a file with held-out text" in text


def test_doctor_works_without_settings():
    status, text = call("doctor")

    assert status == 2
    assert "Python ok" in text
    assert "settings wrong" in text


def test_plan_prices_the_runs_before_any_is_trained(project_file):
    status, text = call("plan", "--config", str(project_file))

    assert status == 0, text
    assert "proxy runs 18: 0 in the store, 18 to train" in text
    assert "a run 3,840 tokens, 25,024 parameters" in text
    assert re.search(r"time here \d+ s, in 2 workers of 4 runs each", text)
    assert "Of 16 runs is known so far: they see a task's effect" in text
    assert re.search(r"causalmix plan --pilot trains 6 of the runs, about \d+ s", text)
    assert "Train them: causalmix refresh --train" in text
    assert not list(project_file.parent.rglob("run_store/runs/*/*.json"))


def test_a_plan_of_finished_runs_has_nothing_to_train(finished):
    status, text = call("plan", "--config", str(finished))

    assert status == 0, text
    assert "18 in the store, 0 to train" in text
    assert re.search(r"task seed sd signal in reach 64 runs 128 runs 512 runs seen by 16", text)
    assert "From 2 repeated runs" in text
    assert "Nothing to train" in text


def test_a_pilot_trains_runs_of_the_design_and_tells_the_noise(finished):
    runs = finished.parent / "data" / "run_store" / "runs"
    names = {path.name for path in runs.rglob("*.json")}
    for path in runs.rglob("*.json"):
        path.unlink()

    status, text = call("plan", "--pilot", "--config", str(finished))

    assert status == 0, text
    assert "6 pilot runs trained." in text
    assert "6 in the store, 12 to train" in text
    assert "From 2 repeated runs" in text
    assert {path.name for path in runs.rglob("*.json")} < names


def test_a_budget_stops_training_until_a_person_agrees(finished):
    change_settings(
        finished,
        budget={"max_hours": 1e-6},
        design={"n_runs": 18, "mixtures_per_state": 2, "noise_panel": {"mixtures": 2, "seeds": 2}},
    )

    planned = call("plan", "--config", str(finished))
    stopped = call("refresh", "--train", "--config", str(finished))
    again = call("refresh", "--train", "--config", str(finished))
    agreed = call("refresh", "--train", "--over-budget", "--config", str(finished))

    assert planned[0] == 0 and "Over the budget. budget.max_hours allows 1e-06" in planned[1]
    for status, text in (stopped, again):
        assert status == 2
        assert "budget.max_hours allows 1e-06 hours on this hardware, and the 2 proxy" in text
        assert "causalmix refresh --train --over-budget" in text
    assert agreed[0] == 0, agreed[1]
    assert "proxy runs trained: 2" in agreed[1]


def test_a_refresh_of_an_unchanged_pool_does_nothing(finished):
    status, text = call("refresh", "--config", str(finished))

    assert status == 0, text
    assert "Re-materialised: nothing, all was up to date." in text
    assert "proxy runs trained: 0" in text


def test_a_refresh_of_a_changed_pool_makes_the_live_side_and_trains_nothing(finished):
    """The promise of the project, from a real command line; Dagster's log stays off the screen."""
    live = finished.parent / "live" / "math" / "added.jsonl"
    write_documents(live, "math", n=12, n_words=90, seed=9)

    command = [sys.executable, "-m", "causalmix_pipeline.cli", "refresh", "-c", str(finished)]
    done = subprocess.run(command, capture_output=True, text=True)

    text = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 0, text
    made = re.search(r"Re-materialised: (.*?)\. proxy", text)
    assert made and sorted(made[1].split(", ")) == [
        "baseline_mixtures", "live_changes", "live_covariates", "live_documents",
        "recommended_mixture", "report", "top_up_runs", "training_export",
    ]  # fmt: skip
    assert "proxy runs trained: 0" in text
    assert "Overlap verdict: " in text
    assert "RUN_START" not in text


def test_a_refresh_never_trains_unasked(project_file):
    status, text = call("refresh", "--config", str(project_file))

    assert status == 2
    assert "causalmix refresh --train" in text
    assert not list(project_file.parent.rglob("run_store/runs/*/*.json"))


def test_status_names_what_is_stale_and_why(finished):
    live = finished.parent / "live" / "math" / "added.jsonl"
    write_documents(live, "math", n=12, n_words=90, seed=9)

    status, text = call("status", "--config", str(finished))

    assert status == 0, text
    assert "live_documents live_pool changed" in text
    assert "recommended_mixture perhaps stale" in text
    assert "proxy_runs up to date" in text
    assert "validation_runs on request" in text
    assert "Finished proxy runs in the run store: 18" in text


def test_status_of_a_new_project_says_that_nothing_was_made(project_file):
    status, text = call("status", "--config", str(project_file))

    assert status == 0, text
    assert "tokenizer never made" in text
    assert "Nothing was recommended yet." in text


def _hold(folder: Path, ready, done) -> None:
    with hold_project(folder):
        ready.set()
        done.wait(30)


def test_two_commands_never_work_on_one_project(project_file):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    folder = project_file.parent / "data"
    holder = context.Process(target=_hold, args=(folder, ready, done))
    holder.start()
    try:
        assert ready.wait(30)
        status, text = call("status", "--config", str(project_file))
    finally:
        done.set()
        holder.join()

    assert status == 2
    assert f"another causalmix command works on it (process {holder.pid})" in text
    with hold_project(folder):
        pass


def test_the_demos_settings_are_used_where_there_are_no_others(tmp_path):
    assert find_config(None) == Path("causalmix.yaml")

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo.yaml").write_text("")
    assert find_config(None) == Path("data/demo.yaml")

    (tmp_path / "causalmix.yaml").write_text("")
    assert find_config(None) == Path("causalmix.yaml")
    assert find_config(Path("other.yaml")) == Path("other.yaml")


def test_an_error_of_ours_is_found_inside_dagsters():
    try:
        try:
            raise PoolError("the folder is empty")
        except PoolError as inner:
            raise dg.DagsterInvariantViolationError("step failed") from inner
    except dg.DagsterInvariantViolationError as outer:
        assert str(root_cause(outer)) == "the folder is empty"
    assert root_cause(ValueError("other")) is None
    assert isinstance(root_cause(ConfigError("own")), ConfigError)


def test_an_error_that_stands_in_its_own_chain_is_still_told():
    first, second = ValueError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first

    assert root_cause(first) is None


def test_the_ui_listens_on_this_machine_only():
    command = ui_command(3456)

    assert command[command.index("-h") + 1] == "127.0.0.1"
    assert command[command.index("-p") + 1] == "3456"
    assert "causalmix_pipeline.definitions" in command


# Profile


def test_a_pool_is_profiled_without_settings_into_a_folder(project_file):
    live = project_file.parent / "live"

    status, text = call("profile", str(live), "--out", "found")

    assert status == 0, text
    assert "144 rows read, 0 refused, 144 distinct documents, 144 scored now" in text
    covariates = read_value(Path("found") / "covariates.parquet")
    assert set(covariates["domain"]) == {"code", "math", "talk"}
    row = covariates.filter(domain="math", covariate="mtld").row(0, named=True)
    assert row["value"] > 0 and row["se"] > 0


def test_a_pool_is_compared_with_its_profile_before(project_file):
    live = project_file.parent / "live"
    call("profile", str(live), "--out", "before")
    write_documents(live / "math" / "added.jsonl", "math", n=12, n_words=900, seed=9)

    status, text = call("profile", str(live), "--out", "after", "--like", "before")

    assert status == 0, text
    assert "156 distinct documents, 12 scored now" in text
    assert re.search(r"math 12 0 48", text), text
    moves = read_value(Path("after") / "changes.parquet")
    assert moves["domain"][0] == "math"


def test_a_pool_on_another_scale_is_not_compared(project_file):
    live = project_file.parent / "live"
    call("profile", str(live), "--out", "before")
    frame = read_value(Path("before") / "documents.parquet")
    older = frame.with_columns(scorers=pl.lit("characters-v0;" + frame["scorers"][0]))
    write_value(Path("before") / "documents.parquet", older)

    status, text = call("profile", str(live), "--like", "before")

    assert status == 2
    assert "must be profiled as before was" in text and "characters-v0" in text


def test_a_folder_that_is_no_profile_is_refused(project_file):
    status, text = call("profile", str(project_file.parent / "live"), "--like", "nowhere")

    assert status == 2
    assert "--like must be the folder of an earlier `causalmix profile`" in text


def test_covariates_are_tried_on_the_runs_at_hand(finished):
    status, text = call("covariates", "--config", str(finished))

    assert status == 0, text
    assert "R2 within unseen states" in text
    assert "permuted" in text and "none: none" in text
    assert "Used now: log2_tokens" in text


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_refresh_says_that_nothing_is_lost(project_file, sent):
    overrides = {"vocab_size": 384, "sequence_length": 32, "steps": 2000}
    change_settings(project_file, proxy={"preset": "tests", "overrides": overrides})
    command = [sys.executable, "-m", "causalmix_pipeline.cli", "refresh", "--train"]
    records = project_file.parent / "data" / "run_store" / "runs"
    with subprocess.Popen(
        command, cwd=project_file.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not list(records.glob("*/*")):
            time.sleep(0.2)
        process.send_signal(sent)
        _, told = process.communicate(timeout=120)

    assert process.returncode == 130, told
    assert "Stopped. Finished proxy runs are kept" in " ".join(told.split())
    assert "Traceback" not in told
