"""Rivals are trained when a person asks, on states that nothing else saw, and a kill loses none."""

import contextlib
import io
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest
import yaml

from causalmix_pipeline.adapters.rivals import NewStates, describe_state
from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.assets.contest import Contest, flops_a_token, prepare_contest, sizes_of
from causalmix_pipeline.assets.design import specs_of
from causalmix_pipeline.assets.entrants import (
    entrants_of,
    fixed_shares,
    for_size,
    rounded,
    stand_ins,
)
from causalmix_pipeline.assets.pictures import INLINE_LIMIT
from causalmix_pipeline.assets.plan import price_runs
from causalmix_pipeline.assets.rivals import (
    SEEDS_TAG,
    STATES_TAG,
    count_of,
    read_kept,
    rivals_metadata,
    with_se,
)
from causalmix_pipeline.assets.sizes import at_sizes
from causalmix_pipeline.automation.staleness import materialise
from causalmix_pipeline.cli import main
from causalmix_pipeline.core.controller_tuning import make_controller, run_cost
from causalmix_pipeline.core.controllers import ControllerConfig, DoReMi, Schedule
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.pool_state import Membership
from causalmix_pipeline.core.proxy import ProxyConfig
from causalmix_pipeline.core.proxy_runs import ProxyRecord, ProxySpec
from causalmix_pipeline.core.rivals import Read, nothing_read
from causalmix_pipeline.core.runs import SIZE_COVARIATE, RunTable
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import close_dead_runs, ensure_instance
from causalmix_pipeline.resources.project import Project
from causalmix_pipeline.resources.settings import Settings
from causalmix_pipeline.resources.settings_file import load_settings

#: The first test makes the project that the others copy.
pytestmark = pytest.mark.timeout(800)

#: Two settings of the bandit are tried, one of each other controller: 24 runs beforehand.
COMPARE = {
    "controllers": {
        "online_bandit": {"blocks": 4},
        "doremi": {"blocks": 4, "probe_windows": 1},
        "rl_scheduler": {"blocks": 4, "probe_windows": 1, "updates": 2},
    },
    "tuning_runs": 16,
}
COMPARE_FIELDS = {kind: [*given] for kind, given in COMPARE["controllers"].items()}
COUNTS = {STATES_TAG: "2", SEEDS_TAG: "1"}
N_RUNS = 70

#: A larger size that half of the design's states are trained at.
SIZED = {"sizes": [{"hidden": 96, "share": 0.5}]}

#: Runs the job in a process of its own, which a test kills.
RUN_JOB = """
import sys
from pathlib import Path
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import PROCESS_TAG, ensure_instance, process_tag
from causalmix_pipeline.resources.settings_file import load_settings
config = Path(sys.argv[1])
if __name__ == "__main__":
    with ensure_instance(load_settings(config).data_path) as instance:
        build_definitions(config).resolve_job_def("compare").execute_in_process(
            instance=instance, tags={PROCESS_TAG: process_tag(), **dict(zip(sys.argv[2::2],
            sys.argv[3::2]))}
        )
"""


def value(config: Path, name: str = "rivals"):
    return read_value(config.parent / "data" / "assets" / f"{name}.parquet")


def n_records(config: Path) -> int:
    return Project(config_file=str(config)).run_store.n_records()


def call(*arguments: str) -> tuple[int, str]:
    """Run `causalmix` in this process; its exit status and what it printed, on one line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(list(arguments))
    return status, " ".join(out.getvalue().split())


def set_up(finished_project: Path, root: Path) -> Path:
    """A copy of the finished project with a small comparison in its settings."""
    shutil.copytree(finished_project, root)
    config = root / "causalmix.yaml"
    raw = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(raw | {"compare": COMPARE, "backend": {"workers": 1}}))
    return config


def materialise_again(config: Path) -> object:
    """Make the asset once more; how many runs were trained for it."""
    with ensure_instance(load_settings(config).data_path) as instance:
        close_dead_runs(instance)
        key = dg.AssetKey("rivals")
        materialise(build_definitions(config), instance, [key], tags=COUNTS)
        event = instance.get_latest_materialization_event(key)
    assert event is not None and event.asset_materialization is not None
    return event.asset_materialization.metadata["trained now"].value


def controlled(config: Path) -> list[tuple[ProxyRecord, dict]]:
    """The controlled runs in the store, each with what its controller did and cost."""
    project = Project(config_file=str(config))
    files = (config.parent / "data" / "run_store" / "runs").rglob("*.json")
    records = [project.run_store.get(path.stem) for path in sorted(files)]
    return [(record, record.control) for record in records if record and record.control]


def contest_of(config: Path, design: pl.DataFrame | None = None) -> Contest:
    """What there is to train, with stand-ins for the mixtures."""
    project = Project(config_file=str(config))
    return prepare_contest(
        project,
        value(config, "tokenizer"),
        value(config, "experiment_documents"),
        value(config, "mixture_design") if design is None else design,
        lambda states, sizes: stand_ins(project.settings, states, sizes),
        n_states=2,
        n_seeds=1,
    )


@pytest.fixture(scope="module")
def compared_project(finished_project, tmp_path_factory) -> Path:
    """The finished project after `causalmix compare`, and what this printed; copy it."""
    config = set_up(finished_project, tmp_path_factory.mktemp("compared") / "project")
    before = n_records(config)
    status, text = call("compare", "--config", str(config), "--states", "2", "--seeds", "1")
    assert status == 0, text
    (config.parent / "printed.txt").write_text(text)
    assert n_records(config) == before + N_RUNS
    return config.parent


@pytest.fixture
def compared(compared_project, tmp_path) -> Path:
    """The settings file of a copy of that project."""
    shutil.copytree(compared_project, tmp_path / "compared")
    return tmp_path / "compared" / "causalmix.yaml"


NAMES = [
    "recommended",
    "recommended_free",
    "equal",
    "natural",
    "fixed",
    "grid",
    "regmix",
    "log_linear",
]
CONTROLLED = ["doremi", "online_bandit", "rl_scheduler"]  # as the settings file has them


def test_the_command_tells_the_price_first_and_then_who_gains_what(compared_project):
    printed = (compared_project / "printed.txt").read_text()

    price = printed.index("Rivals on 2 new pool states, 1 seed, as 32x1 and 64x2")
    assert f"if nothing were trained yet, at most {N_RUNS} runs, about" in printed
    tables = printed.index("gain over equal")
    assert price < tables
    for name in [*NAMES, *CONTROLLED]:
        assert printed.count(f" {name} ") >= 2
    assert "Settings of controllers tried beforehand: 2." in printed


def test_every_rival_has_a_row_at_both_sizes_and_equal_gains_nothing(compared):
    found = value(compared)

    assert (found["sizes"], found["states"], found["seeds"]) == (["32x1", "64x2"], 2, 1)
    assert [(row["size"], row["entrant"]) for row in found["table"]] == [
        (size, name) for size in ("32x1", "64x2") for name in [*NAMES, *CONTROLLED]
    ]
    for row in found["table"]:
        assert row["states"] == 2 and row["diverged"] == 0
        if row["entrant"] == "equal":
            assert row["gain"] == row["se"] == 0.0
    assert len(found["outcomes"]) == 44


def test_people_see_gains_with_their_errors_and_a_picture_of_each_size_at_once(compared):
    found = value(compared)

    metadata = rivals_metadata(found)

    for size in found["sizes"]:
        picture = metadata[f"{size}: gain over equal (dot, 90% interval)"].md_str
        assert "log_linear" in picture and len(picture) < INLINE_LIMIT
        table = metadata[f"{size}: gains, bits per byte"].md_str
        assert table.count(" ± ") == 2 * len({*NAMES, *CONTROLLED}) - 1
        assert "diverged" not in table
    found["table"][0]["diverged"] = 3
    found = rivals_metadata(found)
    assert "diverged" in found["32x1: gains, bits per byte"].md_str
    assert "diverged" not in found["64x2: gains, bits per byte"].md_str
    assert with_se(0.1234, None) == "+0.123" and with_se(None, None) == ""


def test_no_state_and_no_seed_is_that_of_the_design_or_of_the_search(compared):
    contest, design = contest_of(compared), value(compared, "mixture_design")

    compared_on, tuned_on = set(contest.track.state_hashes), set(contest.tuned_track.state_hashes)
    assert (len(compared_on), len(tuned_on)) == (2, 4)
    assert not compared_on & tuned_on
    assert not (compared_on | tuned_on) & set(design["state_hash"])
    seeds = set(contest.track.seeds) | set(contest.tuned_track.seeds)
    assert len(seeds) == len(contest.track.seeds) + len(contest.tuned_track.seeds)
    assert not seeds & set(design["data_seed"])
    of_state = [(record.spec["state_hash"], did["kind"]) for record, did in controlled(compared)]
    assert {state for state, _ in of_state} == compared_on | tuned_on
    tried = [kind for state, kind in of_state if state in tuned_on]
    assert tried == ["online_bandit"] * 16


def test_the_search_of_each_rival_is_counted(compared):
    found = value(compared)
    rows = {row["entrant"]: row for row in found["table"] if row["size"] == "32x1"}
    totals = [did["total_tokens"] for _, did in controlled(compared) if did["kind"] == "doremi"]

    tokens = load_settings(compared).proxy.to_config().tokens
    assert len(totals) == 2
    assert rows["doremi"]["state_search_tokens"] == pytest.approx(np.mean(totals))
    assert min(totals) > 2 * tokens
    assert rows["doremi"]["run_tokens"] == tokens
    n_design = value(compared, "mixture_design").height
    for name in ("recommended", "recommended_free", "grid", "regmix", "log_linear"):
        assert rows[name]["search_tokens"] == n_design * tokens
    assert rows["online_bandit"]["search_tokens"] == 16 * tokens
    assert rows["natural"]["search_tokens"] == rows["rl_scheduler"]["search_tokens"] == 0


def test_a_controlled_run_costs_what_its_price_says(compared):
    config, checked = load_settings(compared).proxy.to_config(), set()
    for record, did in controlled(compared):
        settings = {name: record.spec["controller"][name] for name in COMPARE_FIELDS[did["kind"]]}
        if record.spec["config"] == config.to_dict():
            cost = run_cost(make_controller(did["kind"], settings), config, 3)
            assert did["total_tokens"] / config.tokens == pytest.approx(cost)
            checked.add(did["kind"])
    assert checked == set(CONTROLLED)


def test_what_is_trained_already_is_read_and_gives_the_same_table(compared):
    before, n_before = value(compared), n_records(compared)

    assert materialise_again(compared) == 0
    assert value(compared) == before
    assert n_records(compared) == n_before


def test_a_kill_loses_no_run_and_the_table_is_that_of_an_unbroken_comparison(
    finished_project, compared_project, tmp_path
):
    config = set_up(finished_project, tmp_path / "killed")
    before = n_records(config)
    tags = [part for tag in COUNTS.items() for part in tag]
    command = [sys.executable, "-W", "ignore", "-c", RUN_JOB, str(config), *tags]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 240
        while n_records(config) < before + 30 and process.poll() is None:
            assert time.monotonic() < ends
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    kept = n_records(config) - before

    trained = materialise_again(config)

    assert 30 <= kept < N_RUNS and trained == N_RUNS - kept
    assert value(config) == value(compared_project / "causalmix.yaml")


def test_a_comparison_over_the_budget_is_refused_with_the_way_out(compared):
    raw = yaml.safe_load(compared.read_text())
    compared.write_text(yaml.safe_dump(raw | {"budget": {"max_hours": 1e-6}}))
    before = n_records(compared)

    status, text = call("compare", "--config", str(compared), "--states", "2", "--seeds", "2")

    assert status == 2
    assert "budget.max_hours allows 1e-06 hours" in text
    assert "`causalmix compare --over-budget`" in text
    assert "(compare.states, compare.seeds, compare.tuning_runs, compare.controllers)" in text
    assert "design.n_runs" not in text and "refresh --train" not in text
    assert n_records(compared) == before


def test_a_finished_comparison_costs_nothing_more_whatever_the_budget(compared):
    raw = yaml.safe_load(compared.read_text())
    compared.write_text(yaml.safe_dump(raw | {"budget": {"max_hours": 1e-6}}))
    before = value(compared)

    assert materialise_again(compared) == 0
    assert value(compared) == before


def test_the_settings_that_were_chosen_are_priced_and_not_the_first(compared):
    project = Project(config_file=str(compared))
    contest = contest_of(compared)
    first, second = contest.drawn["online_bandit"]

    def bandits_priced(read: Read, best: ControllerConfig) -> set:
        def score(record: ProxyRecord) -> float:
            return float(record.spec.get("controller") == best.to_dict())

        priced = contest.to_price(read, score)
        on_compared = [spec for spec in priced if spec.state_hash in contest.track.state_hashes]
        return (
            {spec.controller for spec in on_compared}
            - {None}
            - {contest.drawn[kind][0] for kind in ("doremi", "rl_scheduler")}
        )

    def read(spec: ProxySpec) -> ProxyRecord | None:
        return read_kept(project, spec)

    assert bandits_priced(read, first) == {first}
    assert bandits_priced(read, second) == {second}
    assert bandits_priced(nothing_read, second) == {first}


def test_an_old_effect_model_is_refused(compared):
    raw = yaml.safe_load(compared.read_text())
    compared.write_text(yaml.safe_dump(raw | {"estimators": ["regmix"]}))

    status, text = call("compare", "--config", str(compared))

    assert status == 2
    assert "the effect model must be up to date before a comparison, and isn't" in text


def test_the_price_counts_probes_and_references(compared):
    """DoReMi's runs cost more than twice those of a static mixture."""
    project = Project(config_file=str(compared))
    contest, static = contest_of(compared), specs_of(project, value(compared, "mixture_design"))
    lanes = contest.lanes({"doremi": DoReMi(blocks=3)})
    finders = [lane.finder for lane in lanes if lane.finder is not None]

    alone, both = price_runs(project, finders), price_runs(project, [*static, *finders])

    cost = run_cost(DoReMi(blocks=3), finders[0].config, 3)
    assert cost > 2
    assert alone["to train"] == len({spec.key for spec in finders}) == 2
    tokens = finders[0].config.tokens
    assert alone["million tokens to train"] == pytest.approx(2e-6 * cost * tokens)
    assert both["proxy runs"] == 2 + len(static) and both["hours"] == pytest.approx(alone["hours"])


def live_state(config: Path) -> NewStates:
    """The live pool as a pool state."""
    names = ["domain", "tokens", "natural_share", *load_settings(config).covariates]
    return NewStates(("0" * 64,), (value(config, "live_covariates").select(names),))


def mixtures_of(config: Path, runs: RunTable | None = None, **changes) -> dict[str, dict]:
    """By size, the mixture of each rival on the live pool, with changed settings."""
    raw = yaml.safe_load(config.read_text())
    settings = Settings.model_validate(raw | changes)
    made = entrants_of(
        settings,
        runs or RunTable.from_frame(value(config, "run_table")),
        value(config, "cate_model"),
        live_state(config),
        sizes_of(settings, settings.proxy.to_config()),
        tell=lambda line: None,
    )
    return {
        size: {each.name: each.mixture_MD[0] for each in entrants}
        for size, entrants in made.items()
    }


def test_what_is_recommended_without_limits_keeps_to_none_of_them(compared):
    policy = load_settings(compared).policy.model_dump(exclude_unset=True)

    small, large = mixtures_of(compared, policy={**policy, "trust_radius": 0.01}).values()

    free = mixtures_of(compared, policy={**policy, "trust_radius": 100.0})["32x1"]
    assert small["recommended"] == pytest.approx(small["natural"], abs=0.1)
    assert np.abs(small["recommended_free"] - small["natural"]).max() > 0.1
    assert small["recommended_free"] == pytest.approx(free["recommended_free"], abs=1e-3)
    assert all((small[name] == large[name]).all() for name in small)


def test_the_budget_is_what_a_compared_run_reads_whatever_the_planned_one_does(compared):
    policy = load_settings(compared).policy.model_dump(exclude_unset=True)
    settings = Settings.model_validate({"policy": {**policy, "budget_tokens": 10**12}})

    sizes = sizes_of(settings, ProxyConfig(steps=7))

    budgets = [for_size(settings, size).policy.budget_tokens for size in sizes]
    assert budgets == [7 * 4 * 128] * 2
    assert for_size(settings, sizes[0]).policy.target_parameters is None


def test_each_size_is_asked_for_itself_where_proxies_have_several(compared):
    """Small models gain from the first domain, large ones from the second."""
    proxy = {**yaml.safe_load(compared.read_text())["proxy"], **SIZED}
    settings = Settings.model_validate({"proxy": proxy})
    configs = settings.proxy.size_configs()
    own = RunTable.from_frame(value(compared, "run_table"))
    size_N = np.array([math.log2(config.n_parameters) for config in configs])[own.state_ids % 2]
    better_N = own.mixture_ND[np.arange(len(size_N)), own.state_ids % 2]
    size_ND1 = np.broadcast_to(size_N[:, None, None], (*own.state_NDP.shape[:2], 1))
    runs = replace(
        own,
        covariates=(*own.covariates, SIZE_COVARIATE),
        state_NDP=np.concatenate([own.state_NDP, size_ND1], axis=2),
        outcome_NT=np.repeat(better_N[:, None], len(own.tasks), axis=1),
    )

    small, large = sizes_of(settings, configs[0])
    asked = [for_size(settings, size).target_size for size in (small, large)]
    found = mixtures_of(compared, runs, proxy=proxy)

    assert (small.name, large.name) == ("32x1", "96x1")
    assert [small.config, large.config] == configs
    assert asked == [math.log2(config.n_parameters) for config in configs]
    assert [*found] == ["32x1", "96x1"]
    assert (found["32x1"]["equal"] == found["96x1"]["equal"]).all()
    for name in ("recommended", "recommended_free"):
        assert [int(found[size][name].argmax()) for size in found] == [0, 1]


def test_shares_are_kept_to_six_digits_and_sum_to_one():
    shares_D = rounded([0.12345649, 0.4, 0.47654351])

    assert (rounded(np.array([0.12345649, 0.4, 0.47654351]) + 1e-14) == shares_D).all()
    assert (rounded(shares_D) == shares_D).all() and math.fsum(shares_D) == pytest.approx(1)
    assert shares_D == pytest.approx([0.123456, 0.4, 0.476544], abs=1e-12)


def test_the_price_counts_schedules_where_the_design_has_stages(compared):
    states, sizes = live_state(compared), sizes_of(Settings(), ProxyConfig())
    task = {"name": "math", "path": "x"}
    plain, staged = (
        Settings.model_validate({"tasks": [task], "design": {"stages": n}}) for n in (1, 3)
    )

    made = stand_ins(staged, states, sizes)

    assert [*made] == ["32x1", "64x2"]
    (planned,) = [each for each in made["64x2"] if each.name == "schedule"]
    assert isinstance(planned.controllers[0], Schedule) and len(planned.controllers[0].stages) == 3
    assert "schedule" not in {e.name for e in stand_ins(plain, states, sizes)["32x1"]}


def test_the_search_takes_the_compute_of_the_design_not_its_number_of_runs(finished):
    """Half of the design's states are trained at a larger size."""
    design = value(finished, "mixture_design")
    raw = yaml.safe_load(finished.read_text())
    plain = specs_of(Project(config_file=str(finished)), design)
    changes = {"proxy": {**raw["proxy"], **SIZED}, "compare": {**COMPARE, "tuning_runs": None}}
    finished.write_text(yaml.safe_dump(raw | changes))
    specs = at_sizes(load_settings(finished), plain, design["state_id"].to_numpy())
    sized = design.with_columns(proxy_run_id=pl.Series([spec.key for spec in specs]))

    contest = contest_of(finished, sized)

    assert [size.name for size in contest.sizes] == ["32x1", "96x1"]
    costs = [flops_a_token(spec.config) * spec.config.tokens for spec in specs]
    runs = sum(costs) / min(costs)
    assert runs > 1.5 * len(specs)
    assert len(contest.drawn["online_bandit"]) == runs // 8 > len(specs) // 8


def test_a_recommended_schedule_is_a_rival(compared):
    settings = load_settings(compared)
    runs = RunTable.from_frame(value(compared, "run_table"))
    plan = Schedule(stages=((0.5, (0.8, 0.1, 0.1)), (0.5, (0.1, 0.8, 0.1))))
    (size, *_) = sizes_of(settings, settings.proxy.to_config())
    made = entrants_of(
        settings,
        runs,
        value(compared, "cate_model"),
        live_state(compared),
        [size],
        tell=lambda line: None,
        schedule_of=lambda settings, state, baselines, choice: plan,
    )[size.name]

    assert [each.name for each in made] == [NAMES[0], "schedule", *NAMES[1:]]
    assert made[1].controllers == (plan,)
    best = value(compared, "recommended_mixture")["mixtures"]
    for each in made:
        assert (each.mixture_MD[0] == rounded(each.mixture_MD[0])).all(), each.name
        if each.name in best:
            assert each.mixture_MD[0] == pytest.approx(best[each.name], abs=1e-6), each.name


def test_a_pool_state_is_described_by_its_own_documents(compared):
    documents = value(compared, "experiment_documents").filter(domain="math")[:2]
    state = Membership(np.array([0, 1]), np.array([3, 1]))

    frame = describe_state(documents, ["code", "math"], state)

    assert frame["tokens"].to_list() == [0, documents["n_tokens"].sum()]
    assert frame["natural_share"].to_list() == [0.0, 1.0]


def test_the_larger_size_is_as_the_settings_say():
    def names(**compare) -> list[str]:
        settings = Settings.model_validate({"compare": compare})
        return [size.name for size in sizes_of(settings, ProxyConfig())]

    assert names() == ["32x1", "64x2"]
    assert names(larger={"hidden": 128, "layers": 2, "heads": 4}) == ["32x1", "128x2"]
    assert names(larger={"steps": 4000}) == ["32x1", "32x1, larger"]
    small, large = sizes_of(Settings(), ProxyConfig())
    assert large.flops_a_token > 2 * small.flops_a_token


def test_fixed_shares_are_the_users_or_the_weights_of_tasks_named_like_domains():
    tasks = [{"name": name, "path": "x", "weight": w} for name, w in (("a", 3.0), ("b", 1.0))]

    def shares(domains: list[str], **policy) -> list[float] | None:
        settings = Settings.model_validate({"tasks": tasks, "policy": policy})
        found = fixed_shares(settings, domains)
        return None if found is None else found.tolist()

    assert shares(["a", "b", "c"]) == [0.75, 0.25, 0.0]
    assert shares(["a", "c"]) is None
    own = {"reference": "fixed", "fixed_mixture": {"c": 0.5, "a": 0.5}}
    assert shares(["a", "c"], **own) == [0.5, 0.5]


def test_a_tag_that_is_no_count_is_refused():
    assert count_of({}, STATES_TAG, 16) == 16
    assert count_of({STATES_TAG: "4"}, STATES_TAG, 16) == 4
    for text in ("0", "-1", "many"):
        with pytest.raises(ConfigError, match=f"{STATES_TAG} must be a whole number >= 1, got"):
            count_of({STATES_TAG: text}, STATES_TAG, 16)
