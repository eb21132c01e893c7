"""What a team does in the UI: look around, refresh by a click, read the mixture and its history."""

import re
import time
from pathlib import Path

import dagster as dg
import pytest

from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.assets.pictures import rounded
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.settings_file import load_settings

pytest.importorskip("playwright", reason="the package playwright isn't installed")

from playwright.sync_api import expect

expect.set_options(timeout=30_000)

pytestmark = pytest.mark.timeout(600)

GROUPS = ("experiment", "effects", "live", "recommendation")


def stored_runs(config: Path) -> list[Path]:
    return sorted((config.parent / "data" / "run_store" / "runs").rglob("*.json"))


def entry(page, key: str):
    """The row of the metadata table with a key."""
    return page.locator("tr").filter(has=page.get_by_text(key, exact=True)).first


def shown_row(page, key: str, head: str) -> list[str]:
    """The cells of a row of the table of a metadata entry."""
    row = entry(page, key).locator("table tr").filter(has_text=head).first
    return [text.strip() for text in row.locator("td").all_inner_texts()]


def test_the_lineage_shows_our_groups_and_their_assets(served, watched):
    page = watched.page
    page.goto(f"{served.url}/asset-groups")

    for group in GROUPS:
        expect(page.get_by_text(group, exact=True).first).to_be_visible()
    watched.shot("lineage")
    page.get_by_text("recommendation", exact=True).first.click()
    page.keyboard.press("ArrowRight")
    for asset in ("recommended_mixture", "training_export", "report"):
        expect(page.get_by_text(asset).first).to_be_visible()
    watched.shot("lineage_recommendation")
    assert watched.is_within_the_window()


def wait_for_end(config: Path, run_id: str) -> dg.DagsterRunStatus:
    ends = time.monotonic() + 300
    with ensure_instance(load_settings(config).data_path) as instance:
        while True:
            run = next(r for r in instance.get_runs(limit=5) if r.run_id.startswith(run_id))
            if run.is_finished:
                return run.status
            assert time.monotonic() < ends, run.status
            time.sleep(1)


def test_clicks_refresh_the_live_side_and_the_new_mixture_can_be_read_and_followed(served, watched):
    page, data = watched.page, served.config.parent / "data"
    before = read_value(data / "assets" / "recommended_mixture.parquet")
    trained = stored_runs(served.config)
    changed = served.config.parent / "live" / "math" / "long.jsonl"
    changed.write_text("\n".join(changed.read_text().splitlines()[:-14]) + "\n")

    page.goto(f"{served.url}/locations/causalmix_pipeline.definitions/jobs/refresh")
    page.get_by_role("button", name="Materialize all").click()
    launched = page.get_by_text(re.compile("Launched run"))
    expect(launched).to_be_visible()
    run_id = launched.inner_text().split()[2]
    page.get_by_text("View", exact=True).click()
    assert wait_for_end(served.config, run_id) is dg.DagsterRunStatus.SUCCESS
    expect(page.get_by_text("Success", exact=True).first).to_be_visible()
    expect(page.get_by_text("recommended_mixture").first).to_be_visible()
    watched.shot("run")

    after = read_value(data / "assets" / "recommended_mixture.parquet")
    assert after["mixtures"]["recommended"] != before["mixtures"]["recommended"]
    page.goto(f"{served.url}/assets/recommended_mixture")
    expect(page.get_by_text("beside the baselines")).to_be_visible()
    shares = [rounded(share) for share in after["mixtures"]["recommended"]]
    assert shown_row(page, "beside the baselines", "recommended") == ["recommended", *shares]
    assert page.get_by_role("img", name="weights").evaluate("image => image.naturalWidth") > 0
    expect(page.get_by_text(f"{after['verdict']}:").first).to_be_visible()
    watched.shot("mixture")

    page.get_by_role("button", name="Plots").click()
    expect(page.get_by_text("gain", exact=True).first).to_be_visible()
    assert page.locator("canvas").count() >= 4
    watched.shot("history_plots")
    page.get_by_text("Events", exact=True).first.click()
    events = page.get_by_text(re.compile(r"^\w{3} \d+, \d+:\d\d [AP]M$"))
    expect(events.nth(1)).to_be_visible()
    watched.shot("history_events")

    assert stored_runs(served.config) == trained  # no proxy was trained
    assert watched.is_within_the_window()


@pytest.mark.parametrize(
    ("asset", "pictures", "tables"),
    [
        ("live_documents", [], ["by tokens"]),
        ("live_covariates", [], ["covariate"]),
        ("pool_states", ["states beside the experiment pool"], ["least to largest"]),
        ("mixture_design", ["shares of all runs"], ["0 to 1"]),
        ("proxy_runs", ["loss of the last runs"], ["seed sd", "most epochs"]),
        ("run_table", [], ["least to largest", "source"]),
        ("cate_model", ["predicted (up) against observed (right) on unseen states"], ["R2 within"]),
        ("cate_checks", [], ["what to do", "correlation"]),
        ("baseline_mixtures", [], ["mixture"]),
        ("training_export", [], ["epochs"]),
        ("proxy_plan", [], []),
        ("top_up_runs", [], []),
    ],
)
def test_a_page_answers_its_question_inline(served, watched, asset, pictures, tables):
    page = watched.page
    page.goto(f"{served.url}/assets/{asset}")
    expect(page.get_by_text("Metadata", exact=True).first).to_be_visible()
    expect(page.get_by_text("Source code")).to_be_visible()
    expect(page.get_by_text("data@example.com").first).to_be_visible()

    for head in tables:
        cell = page.get_by_role("columnheader", name=head).first
        cell.scroll_into_view_if_needed()
        expect(cell).to_be_visible()
    for name in pictures:
        row = entry(page, name)
        expect(row).to_be_visible()
        opens = row.get_by_text("[Show Markdown]")
        if opens.count():
            opens.click()
            picture = page.get_by_role("dialog").locator("img")
        else:
            picture = row.locator("img")
        expect(picture).to_be_visible()
        assert picture.evaluate("image => image.naturalWidth") > 0
    watched.shot(f"asset_{asset}")
    assert watched.is_within_the_window()


def test_the_report_that_the_page_names_opens(served, watched):
    page = watched.page
    page.goto(f"{served.url}/assets/report")
    address = page.get_by_text(re.compile("^file:///")).first.inner_text()

    page.goto(address)

    expect(page.get_by_role("heading", name="Recommended mixture").first).to_be_visible()
    watched.shot("report")


def test_the_dark_theme_shows_the_same(served, browser, shots):
    from causalmix_pipeline_tests.browser.served import watched_page

    with watched_page(browser, shots, dark=True) as watched:
        watched.page.goto(f"{served.url}/assets/recommended_mixture")
        picture = watched.page.get_by_role("img", name="gains")
        picture.scroll_into_view_if_needed()
        expect(picture).to_be_visible()
        watched.shot("mixture_dark")
        watched.page.goto(f"{served.url}/assets/pool_states")
        watched.page.get_by_text("[Show Markdown]").first.click()
        expect(watched.page.get_by_role("dialog").locator("img")).to_be_visible()
        watched.shot("pool_states_dark")
    assert watched.problems == []
