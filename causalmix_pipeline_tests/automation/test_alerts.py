"""Alerts: each told once, none lost, and a receiver that fails breaks nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import dagster as dg
import pytest
import yaml

from causalmix_pipeline.adapters.sealed_frames import content_digest
from causalmix_pipeline.automation.alerts import (
    alert_log,
    look_for_alerts,
    make_alert,
    make_alert_sensor,
    make_run_failure_sensor,
)
from causalmix_pipeline.automation.partitions import with_partitions
from causalmix_pipeline.automation.upkeep import FRESH_NAMES
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources import alert_channels
from causalmix_pipeline.resources.alert_channels import AlertLog, deliver_waiting, plain
from causalmix_pipeline.resources.frame_store import VALUES, FrameStore
from causalmix_pipeline.resources.instance import dagster_home, ensure_instance
from causalmix_pipeline.resources.live_pools import settle_partitions
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import load_settings
from causalmix_pipeline_tests.conftest import write_project

HOSTILE = "<script>alert(1)</script>\u202e\n\"'" + "x" * 300
VARIABLE = "TEAM_ALERTS_URL"
CANARY = "canary-5f2c"
CHECKS = [
    dg.AssetCheckKey(dg.AssetKey("recommended_mixture"), name)
    for name in ("within_reach", "mixture_sums_to_one")
]


class Receiver(BaseHTTPRequestHandler):
    """Answers with the status that is set, and keeps what it got."""

    status = 200
    delay = 0.0
    got: list[dict]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).got.append(json.loads(body))
        time.sleep(self.delay)
        self.send_response(self.status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self):
        type(self).got.append({"redirected": True})
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver(monkeypatch) -> Iterator[type[Receiver]]:
    """A real webhook on loopback; its URL, with a secret in it, is in the environment."""
    kind = type("OneReceiver", (Receiver,), {"got": []})
    with HTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{server.server_port}/hook?key={CANARY}")
        yield kind
        server.shutdown()
        thread.join()


def project(tmp_path, **alerts) -> Settings:
    path = tmp_path / "causalmix.yaml"
    path.write_text(yaml.safe_dump({"alerts": alerts}))
    return load_settings(path)


@dg.asset(
    name="recommended_mixture",
    dagster_type=VALUES,
    check_specs=[dg.AssetCheckSpec(key.name, asset="recommended_mixture") for key in CHECKS],
)
def mixture(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    """Whatever the run's tags say, stored as the real asset is."""
    verdict, failing = context.run.tags["verdict"], context.run.tags.get("failing", "")
    rows = [] if verdict == "supported" else [{"share__<b>": 0.25, "share__code": 0.75}] * 2
    value = {"verdict": verdict, "overlap_score": 1.5, "top_up": rows}
    severity = dg.AssetCheckSeverity(context.run.tags.get("severity", "WARN"))
    return dg.MaterializeResult(
        value=value,
        data_version=dg.DataVersion(content_digest(value)),
        metadata={"verdict": verdict},
        check_results=[
            dg.AssetCheckResult(
                passed=key.name not in failing,
                check_name=key.name,
                severity=severity,
                description=HOSTILE,
                metadata={"domain": HOSTILE, "score": float("nan")},
            )
            for key in CHECKS
        ],
    )


@dg.asset
def broken_asset() -> None:
    """Fails, and says so with a hostile text."""
    raise ValueError(HOSTILE)


class Life:
    """The sensors' life: materialisations, looks, and what is written down."""

    def __init__(self, settings: Settings, instance: dg.DagsterInstance):
        self.settings, self.instance = settings, instance
        self.cursor: str | None = None
        self.problems: list[str] = []

    def make(self, verdict: str, **tags: str) -> str:
        store = FrameStore(base_dir=self.settings.assets_root)
        result = dg.materialize(
            [mixture],
            instance=self.instance,
            resources={"io_manager": store},
            tags={"verdict": verdict, **tags},
        )
        return result.run_id

    def look(self) -> list[dict]:
        before = len(self.lines())
        self.cursor, _, self.problems = look_for_alerts(
            self.instance, self.settings, CHECKS, self.cursor
        )
        return self.lines()[before:]

    def lines(self) -> list[dict]:
        path = alert_log(self.settings).path
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def life(tmp_path) -> Iterator[Life]:
    with dg.DagsterInstance.ephemeral() as instance:
        life = Life(project(tmp_path), instance)
        life.make("supported")
        assert life.look() == []
        yield life


def restless(tmp_path, **alerts) -> tuple[Settings, AlertLog]:
    """A project with one alert that waits."""
    settings = project(tmp_path, **alerts)
    log = alert_log(settings)
    log.write(
        make_alert(settings, "verdict", "1", f"{HOSTILE}.", run_id="r", details={"top_up": []})
    )
    return settings, log


def test_a_verdict_that_turns_is_told_once_with_the_top_up_plan(life):
    run_id = life.make("extrapolating")

    (alert,) = life.look()

    assert alert["summary"].startswith(
        "The verdict of recommended_mixture turned from supported to extrapolating:"
    )
    assert "2 proxy runs" in alert["summary"]
    assert (alert["kind"], alert["run_id"]) == ("verdict", run_id)
    assert (alert["asset"], alert["check"]) == ("recommended_mixture", None)
    assert alert["details"]["before"] == "supported"
    assert alert["details"]["top_up"] == [{"share__<b>": 0.25, "share__code": 0.75}] * 2
    assert alert["time"].endswith("+00:00")
    assert alert["delivery"] == "off"
    life.make("extrapolating")
    assert life.look() == []


def test_a_verdict_that_gets_worse_or_comes_again_is_told_and_a_good_one_is_not(life):
    told = []
    for verdict in ("extrapolating", "unsupported", "supported", "unsupported"):
        life.make(verdict)
        told.append([line["details"]["before"] for line in life.look()])

    assert told == [["supported"], ["extrapolating"], [], ["supported"]]


def test_the_first_recommendation_of_all_is_told_if_it_is_bad(tmp_path):
    with ensure_instance(tmp_path / "data") as instance:
        life = Life(project(tmp_path), instance)
        life.look()
        life.make("unsupported")

        (alert,) = life.look()

    assert "turned from none to unsupported" in alert["summary"]


def test_the_verdict_and_the_checks_of_each_pool_are_told_with_its_name(tmp_path):
    path = tmp_path / "causalmix.yaml"
    path.write_text(yaml.safe_dump({"pools": {"live": {"web-2026w47": "a", "longcot": "b"}}}))
    settings = load_settings(path)
    asset = with_partitions(mixture, settings)
    with dg.DagsterInstance.ephemeral() as instance:
        settle_partitions(instance, settings)
        life = Life(settings, instance)

        def make(pool: str, verdict: str, **tags: str) -> None:
            dg.materialize(
                [asset],
                instance=instance,
                partition_key=pool,
                resources={"io_manager": FrameStore(base_dir=settings.assets_root)},
                tags={"verdict": verdict, **tags},
            )

        for pool in settings.live_pools:
            make(str(pool), "supported")
        assert life.look() == []
        make("longcot", "extrapolating", failing="within_reach")
        make("web-2026w47", "supported")

        check, verdict = life.look()

        assert (
            "within_reach of recommended_mixture failed for the live pool longcot"
            in (check["summary"])
        )
        assert check["details"]["live_pool"] == verdict["details"]["live_pool"] == "longcot"
        assert "for the live pool longcot turned from supported to extra" in verdict["summary"]
        assert len(verdict["details"]["top_up"]) == 2
        assert life.look() == []
        make("longcot", "extrapolating", failing="within_reach")
        make("web-2026w47", "unsupported", failing="within_reach")

        assert [line["details"]["live_pool"] for line in life.look()] == ["web-2026w47"] * 2


def test_a_plan_that_is_not_of_this_verdict_is_left_out_and_says_so(life):
    life.make("unsupported")
    stored = Path(life.settings.assets_root) / "recommended_mixture.parquet"
    FrameStore(base_dir=life.settings.assets_root).dump_to_path(
        dg.build_output_context(), {"top_up": ["of another"]}, stored
    )
    (alert,) = life.look()
    assert alert["details"]["top_up"] is None
    assert "newer recommendation" in alert["details"]["top_up_missing"]

    life.make("extrapolating")
    stored.write_bytes(b"damaged")
    (alert,) = life.look()
    assert "can't be read" in alert["details"]["top_up_missing"]


def test_a_check_that_turns_to_failed_is_told_once_with_all_it_said(life):
    run_id = life.make("supported", failing="within_reach")

    (alert,) = life.look()

    assert alert["summary"] == ("The check within_reach of recommended_mixture failed, a warning.")
    assert (alert["kind"], alert["run_id"]) == ("check_failure", run_id)
    assert (alert["asset"], alert["check"]) == ("recommended_mixture", "within_reach")
    assert alert["details"]["description"] == HOSTILE
    assert alert["details"]["metadata"] == {"domain": HOSTILE, "score": "nan"}
    assert life.look() == []


def test_a_check_that_goes_on_failing_is_not_told_again_until_it_is_worse_or_passed_between(life):
    told = []
    for tags in (
        {"failing": "within_reach"},
        {"failing": "within_reach"},
        {"failing": "within_reach", "severity": "ERROR"},
        {"failing": "within_reach", "severity": "WARN"},
        {},
        {"failing": "within_reach"},
    ):
        life.make("supported", **tags)
        told.append([line["details"]["severity"] for line in life.look()])

    assert told == [["WARN"], [], ["ERROR"], [], [], ["WARN"]]


def test_a_failure_that_passed_again_between_two_looks_is_told(life):
    failed = life.make("supported", failing="mixture_sums_to_one")
    life.make("supported")

    assert [line["run_id"] for line in life.look()] == [failed]


def test_the_first_look_tells_nothing_of_the_past(tmp_path):
    with ensure_instance(tmp_path / "data") as instance:
        life = Life(project(tmp_path), instance)
        life.make("unsupported", failing="within_reach")

        assert life.look() == []
        assert life.look() == []


def test_a_cursor_that_a_kill_kept_from_being_saved_tells_nothing_twice(life):
    saved = life.cursor
    life.make("unsupported", failing="within_reach")
    assert [line["kind"] for line in life.look()] == ["check_failure", "verdict"]

    life.cursor = saved

    assert life.look() == []


def test_a_file_that_is_moved_away_tells_nothing_twice(life):
    life.make("unsupported", failing="within_reach")
    life.look()
    alert_log(life.settings).path.unlink()

    assert life.look() == []
    life.make("unsupported", failing="within_reach")
    assert life.look() == []


def test_the_cursor_does_not_grow(life):
    sizes = []
    for verdict in ("unsupported", "extrapolating", "supported", "unsupported"):
        life.make(verdict, failing="within_reach")
        life.look()
        sizes.append(len(life.cursor))

    assert max(sizes) < 250
    assert set(json.loads(life.cursor)) == {"checks", "verdict", "offset"}


def test_each_line_of_the_file_is_ascii_and_one_alert(life):
    life.make("supported", failing="within_reach mixture_sums_to_one")
    life.look()

    raw = alert_log(life.settings).path.read_bytes()

    assert raw.isascii()
    assert raw.count(b"\n") == 2
    assert all(json.loads(line)["details"]["description"] == HOSTILE for line in raw.splitlines())


def fail_a_run(instance: dg.DagsterInstance) -> str:
    result = dg.materialize([broken_asset], instance=instance, raise_on_error=False)
    return result.run_id


def tick(sensor: dg.SensorDefinition, instance: dg.DagsterInstance, cursor: str | None, **kw):
    with dg.build_sensor_context(instance, cursor=cursor, **kw) as context:
        return sensor.evaluate_tick(context)


def test_a_failed_run_is_told_once_whoever_started_it(tmp_path):
    settings = project(tmp_path)
    sensor = make_run_failure_sensor(settings)
    defs = dg.Definitions(assets=[broken_asset])
    with ensure_instance(tmp_path / "data") as instance:
        fail_a_run(instance)  # of the past
        repository = {"definitions": defs}
        cursor = tick(sensor, instance, None, **repository).cursor
        run_id = fail_a_run(instance)
        after = tick(sensor, instance, cursor, **repository).cursor
        tick(sensor, instance, after, **repository)
        tick(sensor, instance, cursor, **repository)  # the cursor was lost in a crash

    (alert,) = Life(settings, instance).lines()
    assert alert["summary"] == f"Run {run_id} of a materialisation failed in broken_asset."
    assert (alert["kind"], alert["run_id"]) == ("run_failure", run_id)
    assert alert["details"]["errors"] == {"broken_asset": f"ValueError: {HOSTILE}"}


def test_the_sensor_delivers_what_the_other_wrote_and_says_in_its_tick_what_failed(
    tmp_path, receiver
):
    settings, _ = restless(tmp_path, webhook_env=VARIABLE)
    sensor = make_alert_sensor(settings, lambda: CHECKS)
    receiver.status = 500
    with ensure_instance(tmp_path / "data") as instance:
        first = tick(sensor, instance, None)
        receiver.status = 204
        second = tick(sensor, instance, first.cursor)
        third = tick(sensor, instance, second.cursor)

    assert "webhook: HTTP status 500" in first.skip_message
    assert second.skip_message == third.skip_message == "New alerts: 0."
    assert len(receiver.got) == 3 + 1
    assert not first.run_requests


def test_a_webhook_gets_the_alert_as_it_was_written(tmp_path, receiver):
    settings, log = restless(tmp_path, webhook_env=VARIABLE)
    written = json.loads(log.path.read_text())

    offset, problems = deliver_waiting(log, settings, 0)

    assert receiver.got == [{k: v for k, v in written.items() if k != "delivery"}]
    assert receiver.got[0]["summary"] == f"{HOSTILE}."
    assert problems == []
    last = json.loads(log.path.read_text().splitlines()[-1])
    assert (last["kind"], last["id"], last["delivery"]) == ("delivery", written["id"], "sent")
    assert deliver_waiting(log, settings, offset)[1] == []
    deliver_waiting(log, settings, 0)  # the cursor was lost
    assert len(receiver.got) == 1
    assert len(log.path.read_text().splitlines()) == 2


def test_a_failing_webhook_is_tried_again_at_each_look_and_then_given_up(tmp_path, receiver):
    settings, log = restless(tmp_path, webhook_env=VARIABLE, attempts=3)
    receiver.status = 503

    told, offset = [], 0
    for _ in range(5):
        offset, problems = deliver_waiting(log, settings, offset)
        told.append(problems)

    assert [len(problems) for problems in told] == [1, 1, 1, 0, 0]
    assert "attempt 3, given up" in told[2][0]
    assert len(receiver.got) == 3 * 3
    states = [json.loads(line)["delivery"] for line in log.path.read_text().splitlines()]
    assert states == ["waiting", "failed", "failed", "given up"]
    assert offset == len(log.path.read_bytes()) or deliver_waiting(log, settings, offset)[1] == []


def test_a_redirect_is_no_delivery(tmp_path, receiver):
    settings, log = restless(tmp_path, webhook_env=VARIABLE)
    receiver.status = 302

    _, (problem,) = deliver_waiting(log, settings, 0)

    assert "HTTP status 302" in problem
    assert {"redirected": True} not in receiver.got


def test_a_webhook_that_does_not_answer_is_left_after_its_time(tmp_path, receiver, monkeypatch):
    monkeypatch.setattr(alert_channels, "WEBHOOK_TIMEOUT_SECONDS", 0.2)
    settings, log = restless(tmp_path, webhook_env=VARIABLE)
    receiver.delay = 0.5
    begin = time.monotonic()

    _, (problem,) = deliver_waiting(log, settings, 0)

    assert "webhook: TimeoutError" in problem
    assert time.monotonic() - begin < 1.5


def test_a_look_stops_handing_over_in_time_and_goes_on_at_the_next(tmp_path, receiver, monkeypatch):
    """Dagster ends a look that takes a minute, and would forget what it saw."""
    settings, log = restless(tmp_path, webhook_env=VARIABLE)
    log.write(make_alert(settings, "verdict", "2", "Another.", run_id="r", details={}))
    monkeypatch.setattr(alert_channels, "DELIVERY_SECONDS", 0.1)
    receiver.delay = 0.2

    offset, _ = deliver_waiting(log, settings, 0)
    assert [got["id"] for got in receiver.got] == ["verdict:1"]
    deliver_waiting(log, settings, offset)

    assert [got["id"] for got in receiver.got] == ["verdict:1", "verdict:2"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (None, f"the environment variable {VARIABLE} isn't set"),
        (f"file:///etc/passwd?{CANARY}", "doesn't hold an http(s) URL"),
        (f"http://127.0.0.1:1/{CANARY}", "Connection refused"),
        (f"http://[{CANARY}", "webhook: ValueError"),
        (f"http://127.0.0.1:1/{CANARY} with a space", "doesn't hold an http(s) URL"),
        (f"http://user:{CANARY}@127.0.0.1:1/", "without user@"),
    ],
)
def test_a_webhook_that_cannot_be_reached_is_told_without_its_url(tmp_path, monkeypatch, url, said):
    monkeypatch.delenv(VARIABLE, raising=False)
    if url:
        monkeypatch.setenv(VARIABLE, url)
    settings, log = restless(tmp_path, webhook_env=VARIABLE)

    _, (problem,) = deliver_waiting(log, settings, 0)

    assert said in problem
    assert CANARY not in problem + log.path.read_text()


def test_the_url_is_in_no_settings_dump_log_or_record(tmp_path, receiver, caplog):
    settings, log = restless(tmp_path, webhook_env=VARIABLE)
    receiver.status = 500

    sensor = make_alert_sensor(settings, lambda: CHECKS)
    with ensure_instance(tmp_path / "data") as instance:
        data = tick(sensor, instance, None)

    assert CANARY not in settings.model_dump_json() + repr(settings)
    assert CANARY not in f"{data}{caplog.text}{log.path.read_text()}"


def command(tmp_path, code: str) -> list[str]:
    path = tmp_path / "receive.py"
    path.write_text(code)
    return [sys.executable, str(path), "two words; $(touch no)"]


def test_a_command_gets_the_alert_on_standard_input_without_a_shell(tmp_path):
    code = "import sys; open('got.json', 'w').write(sys.stdin.read() + '\\n' + sys.argv[1])"
    settings, log = restless(tmp_path, command=command(tmp_path, code))

    _, problems = deliver_waiting(log, settings, 0)

    assert problems == []
    text, argument = (tmp_path / "got.json").read_text().split("\n")
    assert json.loads(text)["summary"] == f"{HOSTILE}."
    assert argument == "two words; $(touch no)"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(3)", "command: exit status 3"),
        ("import time; time.sleep(60)", "command: killed after 1 s"),
    ],
)
def test_a_command_that_fails_is_told_in_time(tmp_path, code, said):
    settings, log = restless(tmp_path, command=command(tmp_path, code), command_timeout_seconds=1)
    begin = time.monotonic()

    assert said in deliver_waiting(log, settings, 0)[1][0]
    assert time.monotonic() - begin < 15


def test_a_command_that_is_not_there_is_told(tmp_path):
    settings, log = restless(tmp_path, command=["/nowhere/notify"])

    assert "command: No such file" in deliver_waiting(log, settings, 0)[1][0]


def test_who_has_got_an_alert_gets_it_no_second_time_while_the_other_fails(tmp_path, receiver):
    code = "import os; raise SystemExit(not os.path.exists('mended'))"
    settings, log = restless(tmp_path, webhook_env=VARIABLE, command=command(tmp_path, code))

    offset, (problem,) = deliver_waiting(log, settings, 0)
    assert "command" in problem and "webhook" not in problem
    (tmp_path / "mended").touch()

    assert deliver_waiting(log, settings, offset)[1] == []
    assert len(receiver.got) == 1
    last = json.loads(log.path.read_text().splitlines()[-1])
    assert last["channels"] == {"webhook": "sent", "command": "sent"}


def test_what_was_written_while_nobody_was_told_is_not_sent_later(tmp_path, receiver):
    restless(tmp_path)
    settings = project(tmp_path, webhook_env=VARIABLE)

    deliver_waiting(alert_log(settings), settings, 0)

    assert receiver.got == []


def test_what_waits_when_the_channels_are_taken_away_is_closed(tmp_path):
    _, log = restless(tmp_path, webhook_env=VARIABLE)
    settings = project(tmp_path)

    deliver_waiting(log, settings, 0)

    assert json.loads(log.path.read_text().splitlines()[-1])["delivery"] == "off"


def test_a_line_that_a_crash_broke_loses_no_other(tmp_path, receiver):
    settings, log = restless(tmp_path, webhook_env=VARIABLE)
    with open(log.path, "ab") as file:
        file.write(b'{"id": "half')
    log.write(make_alert(settings, "verdict", "2", "Another.", run_id="r", details={}))

    deliver_waiting(log, settings, 0)

    assert [got["id"] for got in receiver.got] == ["verdict:1", "verdict:2"]


def test_a_file_that_was_begun_anew_is_read_from_its_start(tmp_path, receiver):
    settings, log = restless(tmp_path, webhook_env=VARIABLE)

    deliver_waiting(log, settings, 10**6)

    assert len(receiver.got) == 1


def test_a_long_text_is_cut_and_an_odd_number_becomes_text():
    assert plain({"a": ["x" * 3000, float("inf"), None, True]}) == {
        "a": [f"{'x' * 2000}...", "inf", None, True]
    }


def test_both_sensors_run_from_the_start_and_as_often_as_the_settings_say(tmp_path):
    settings = project(tmp_path, interval_seconds=45)

    for sensor in (
        make_run_failure_sensor(settings),
        make_alert_sensor(settings, lambda: CHECKS),
    ):
        assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
        assert sensor.minimum_interval_seconds == 45


def specs(tmp_path, **automation) -> dict[str, dg.AssetSpec]:
    path = tmp_path / "causalmix.yaml"
    path.write_text(yaml.safe_dump({"automation": automation}))
    graph = build_definitions(path).resolve_asset_graph()
    nodes = [graph.get(key) for key in graph.get_all_asset_keys()]
    return {node.key.to_user_string(): node for node in nodes}


def test_what_people_read_warns_when_it_is_old_and_nothing_else_does(tmp_path):
    found = {name: node.freshness_policy for name, node in specs(tmp_path, fresh_days=3).items()}

    assert {name for name, policy in found.items() if policy} == set(FRESH_NAMES)
    assert found["report"].warn_window.to_timedelta().days == 3
    assert found["report"].fail_window.to_timedelta().days == 90
    assert not any(node.freshness_policy for node in specs(tmp_path, fresh_days=None).values())


def test_every_asset_has_the_owners_of_the_settings(tmp_path):
    owners = ["ann@example.com", "team:data mix"]

    assert all(node.owners == owners for node in specs(tmp_path, owners=owners).values())
    assert not any(node.owners for node in specs(tmp_path).values())


#: The project's definitions, their alert sensors 15 times as often as the settings allow.
FAST = """
from pathlib import Path
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.settings_file import load_settings
settings = load_settings({config!r})
often = settings.alerts.model_copy(update={{"interval_seconds": 2}})
defs = build_definitions(Path({config!r}), settings.model_copy(update={{"alerts": often}}))
"""


@contextmanager
def daemon(root: Path) -> Iterator[None]:
    """A real daemon, killed at the end without a warning."""
    environment = os.environ | {
        "DAGSTER_HOME": str(dagster_home(root / "data")),
        "FRESHNESS_DAEMON_INTERVAL_SECONDS": "2",
    }
    command = [sys.executable, "-m", "dagster._daemon", "run", "-f", str(root / "fast.py")]
    with (
        open(root / "daemon.log", "a") as sink,
        subprocess.Popen(
            command, cwd=root, env=environment, stdout=sink, stderr=sink, start_new_session=True
        ) as process,
    ):
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(what: Callable[[], bool], root: Path) -> None:
    ends = time.monotonic() + 90
    while not what():
        assert time.monotonic() < ends, (root / "daemon.log").read_text()[-3000:]
        time.sleep(0.3)


@pytest.mark.timeout(400)
def test_a_killed_daemon_loses_no_alert_and_tells_none_twice_and_knows_what_is_fresh(
    tmp_path, receiver
):
    config = write_project(tmp_path, alerts={"webhook_env": VARIABLE})
    (tmp_path / "fast.py").write_text(FAST.format(config=str(config)))
    made = dg.AssetMaterialization("report")
    with ensure_instance(tmp_path / "data") as instance:
        fail_a_run(instance)  # of the past
        instance.report_runless_asset_event(made)

        def ticks() -> int:
            states = [s for s in instance.all_instigator_state() if s.name.endswith("alerts")]
            found = [
                instance.get_ticks(s.instigator_origin_id, s.selector_id, limit=90) for s in states
            ]
            return min(map(len, found)) if len(found) == 2 else 0

        def told() -> list[str]:
            return [alert["run_id"] for alert in receiver.got]

        with daemon(tmp_path):
            wait_for(lambda: ticks() >= 1, tmp_path)
            runs = [fail_a_run(instance)]
            wait_for(lambda: told() == runs, tmp_path)
        runs.append(fail_a_run(instance))
        before = ticks()
        with daemon(tmp_path):
            wait_for(lambda: told() == runs and ticks() >= before + 4, tmp_path)
        (state,) = instance.get_freshness_state_records([made.asset_key]).values()

    assert told() == runs
    assert state.freshness_state.value == "PASS"
    assert CANARY not in (tmp_path / "daemon.log").read_text()
