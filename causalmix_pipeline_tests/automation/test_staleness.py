"""What is stale, in which order it's made, and where the work stops."""

import threading

import dagster as dg
import pytest

from causalmix_pipeline.automation.staleness import (
    Staleness,
    lineage,
    materialise,
    refresh,
    stale_assets,
)
from causalmix_pipeline.resources.instance import PROCESS_TAG, process_tag
from causalmix_pipeline.resources.observation import DATA_VERSION_TAG

#: What the assets below return; a test changes it like a user changes files.
CONTENT: dict[str, int] = {}


def build(code_version: str = "1") -> dg.Definitions:
    """pool -> profile -> numbers -> advice; side -> advice. `profile` has the pool's parity."""

    def make(name: str, deps: list[str], content) -> dg.AssetsDefinition:
        @dg.asset(name=name, deps=deps, code_version=code_version if name == "numbers" else "1")
        def made(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            context.log.info(f"making {name}")
            return dg.MaterializeResult(data_version=dg.DataVersion(str(content())))

        return made

    return dg.Definitions(
        [
            dg.AssetSpec("pool"),
            make("profile", ["pool"], lambda: CONTENT["pool"] % 10),
            make("numbers", ["profile"], lambda: CONTENT["pool"] % 10 // 2),
            make("side", [], lambda: 0),
            make("advice", ["numbers", "side"], lambda: CONTENT["pool"]),
        ]
    )


def observe(instance: dg.DagsterInstance, version: int) -> None:
    CONTENT["pool"] = version
    instance.report_runless_asset_event(
        dg.AssetObservation("pool", tags={DATA_VERSION_TAG: str(version)})
    )


def names(keys) -> list[str]:
    return [key.to_user_string() for key in keys]


def made(definitions, instance, selection=None) -> list[str]:
    return sorted(names(refresh(definitions, instance, selection or dg.AssetSelection.all())))


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        observe(instance, 2)
        yield instance


def test_at_first_everything_is_made_in_one_run(instance):
    assert made(build(), instance) == ["advice", "numbers", "profile", "side"]
    assert instance.get_runs_count() == 1


def test_nothing_is_made_twice(instance):
    made(build(), instance)

    assert made(build(), instance) == []
    assert instance.get_runs_count() == 1


def test_a_change_is_followed_as_far_as_the_content_changes(instance):
    made(build(), instance)

    observe(instance, 12)  # the profile stays 2
    assert made(build(), instance) == ["profile"]
    observe(instance, 13)  # the profile becomes 3, the numbers stay 1
    assert made(build(), instance) == ["numbers", "profile"]
    observe(instance, 14)  # 4, and 2
    assert made(build(), instance) == ["advice", "numbers", "profile"]


def test_changed_code_remakes_the_asset_and_what_follows_from_its_content(instance):
    made(build(), instance)

    found = stale_assets(build("2"), instance)

    assert {key.to_user_string(): why for key, why in found.reasons.items()} == {
        "numbers": "code or settings changed"
    }
    assert names(found.maybe) == ["advice"]
    assert made(build("2"), instance) == ["numbers"]


def test_the_reason_names_the_input_that_changed(instance):
    made(build(), instance)
    observe(instance, 3)

    assert list(stale_assets(build(), instance).reasons.values()) == ["pool changed"]


def test_an_asset_outside_of_the_selection_stays_as_it_is(instance):
    made(build(), instance)
    observe(instance, 14)

    assert made(build(), instance, dg.AssetSelection.assets("numbers", "advice")) == []
    assert made(build(), instance, dg.AssetSelection.assets("profile")) == ["profile"]
    assert made(build(), instance) == ["advice", "numbers"]


def test_an_asset_made_by_hand_meanwhile_is_not_made_again(instance):
    made(build(), instance)
    observe(instance, 14)
    materialise(build(), instance, [dg.AssetKey("profile"), dg.AssetKey("numbers")])

    assert made(build(), instance) == ["advice"]


def test_an_asset_waits_for_an_input_that_may_change():
    """`c` is stale by its own code, but `b` above it may change too: it's made once, after it."""
    a, b, c = (dg.AssetKey(name) for name in "abc")
    parents = {a: frozenset(), b: frozenset({a}), c: frozenset({b})}

    assert Staleness({a: "x", c: "x"}, frozenset({b})).wave(parents) == [a]
    assert Staleness({a: "x", b: "x", c: "x"}, frozenset()).wave(parents) == [a, b, c]


def test_a_pool_that_changes_while_it_is_read_is_told(instance):
    @dg.asset(deps=["pool"])
    def restless(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        observe(context.instance, CONTENT["pool"] + 1)
        return dg.MaterializeResult(data_version=dg.DataVersion("x"))

    definitions = dg.Definitions([dg.AssetSpec("pool"), restless])

    with pytest.raises(RuntimeError, match=r"restless .*\(pool changed\)"):
        refresh(definitions, instance, dg.AssetSelection.all())


def test_lineage_lists_inputs_before_what_uses_them():
    parents = lineage(build())

    order = names(parents)
    assert order.index("pool") < order.index("profile") < order.index("numbers")
    assert names(parents[dg.AssetKey("profile")]) == ["pool"]


def test_a_run_carries_its_process_and_the_tags_given(instance):
    result = materialise(build(), instance, [dg.AssetKey("side")], tags={"story": "demo"})

    run = instance.get_run_by_id(result.run_id)
    assert run.tags["story"] == "demo"
    assert run.tags[PROCESS_TAG] == process_tag()


def test_events_are_handed_on_in_order_to_their_end(instance):
    seen, before = [], threading.active_count()

    materialise(build(), instance, [dg.AssetKey("side")], on_event=seen.append)

    messages = [entry.user_message for entry in seen]
    assert "making side" in messages
    assert seen[-1].dagster_event.event_type == dg.DagsterEventType.RUN_SUCCESS
    assert threading.active_count() <= before


def test_a_failing_listener_is_told_after_the_run(instance):
    def fail(entry):
        raise KeyError("listener")

    with pytest.raises(KeyError, match="listener"):
        materialise(build(), instance, [dg.AssetKey("side")], on_event=fail)
    assert instance.get_latest_materialization_event(dg.AssetKey("side"))


def test_a_failing_asset_raises_its_own_error(instance):
    @dg.asset
    def broken() -> None:
        raise ValueError("no documents")

    definitions = dg.Definitions([broken])

    with pytest.raises(ValueError, match="no documents"):
        refresh(definitions, instance, dg.AssetSelection.all())
    result = materialise(definitions, instance, [dg.AssetKey("broken")], raise_on_error=False)
    assert not result.success


def test_waves_are_told_before_they_are_made(instance):
    made(build(), instance)
    observe(instance, 14)
    waves = []

    refresh(
        build(),
        instance,
        dg.AssetSelection.all(),
        on_wave=lambda wave: waves.append(names(wave)),
    )

    assert waves == [["profile"], ["numbers"], ["advice"]]
