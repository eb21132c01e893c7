"""Names from data are shown as text: nothing of them runs, is fetched, or breaks the layout."""

import shutil

import dagster as dg
import pytest

from causalmix_pipeline_tests.browser.hostile_project import DOMAINS, write_hostile_project

pytest.importorskip("playwright", reason="the package playwright isn't installed")

from playwright.sync_api import expect

expect.set_options(timeout=30_000)

pytestmark = pytest.mark.timeout(900)

#: Pages of the assets whose metadata, columns or checks hold names from data.
ASSETS = (
    "tokenizer",
    "experiment_documents",
    "eval_tasks",
    "pool_states",
    "normaliser",
    "mixture_design",
    "proxy_runs",
    "run_table",
    "cate_interpretation",
    "live_documents",
    "live_covariates",
    "baseline_mixtures",
    "recommended_mixture",
    "training_export",
    "report",
)


def materialise(config, names: list[str] | None = None) -> dg.DagsterRun:
    """Make assets of a project in this process, and return the run."""
    from causalmix_pipeline.automation.jobs import COVARIATE_CHOICE, RIVALS, VALIDATION
    from causalmix_pipeline.definitions import build_definitions
    from causalmix_pipeline.resources.instance import ensure_instance
    from causalmix_pipeline.resources.observation import EXPERIMENT_POOL, LIVE_POOL, observe_pool
    from causalmix_pipeline.resources.settings_file import load_settings

    settings = load_settings(config)
    everything = dg.AssetSelection.all().materializable() - VALIDATION - COVARIATE_CHOICE - RIVALS
    selection = dg.AssetSelection.assets(*names) if names else everything
    job = dg.Definitions(jobs=[dg.define_asset_job("made_by_test", selection=selection)])
    definitions = dg.Definitions.merge(build_definitions(config), job)
    with ensure_instance(settings.data_path) as instance:
        for key in (EXPERIMENT_POOL, LIVE_POOL):
            observe_pool(instance, settings, key)
        result = definitions.resolve_job_def("made_by_test").execute_in_process(
            instance=instance, raise_on_error=False
        )
        return result.dagster_run


@pytest.fixture(scope="module")
def hostile(chromium, tmp_path_factory):
    """The UI of a project with hostile labels, and the run that a broken pool made fail."""
    from causalmix_pipeline_tests.browser.served import serve

    root = tmp_path_factory.mktemp("hostile")
    config = write_hostile_project(root)
    assert materialise(config).is_success
    aside = shutil.move(root / "hostile_live" / "code", root / "aside")
    failed = materialise(config, ["live_documents"])
    assert failed.is_failure
    shutil.move(aside, root / "hostile_live" / "code")
    with serve(config, root / "ui.log") as server:
        yield server, failed.run_id


def holds_as_text(watched) -> None:
    """Nothing of a label ran, became an element, or is wider than the window."""
    page = watched.page
    assert page.evaluate("window.hacked === undefined")
    for selector in (
        "img[src='x']",
        "img[src*='example.com']",
        "a[href*='example.com']",
        "a[href^='javascript']",
        "b",
    ):
        assert page.locator(selector).count() == 0, selector
    scripts = page.locator("script").all_inner_texts()
    assert not [text for text in scripts if "hacked" in text]
    assert watched.is_within_the_window()


def open_all_pictures(watched, asset: str) -> None:
    page = watched.page
    for number in range(page.get_by_text("[Show Markdown]").count()):
        page.get_by_text("[Show Markdown]").nth(number).click()
        picture = page.get_by_role("dialog").locator("img")
        if picture.count():
            assert picture.first.evaluate("image => image.decode().then(() => image.naturalWidth)")
        holds_as_text(watched)
        watched.shot(f"hostile_{asset}_{number}")
        page.get_by_role("button", name="Close", exact=True).click()


@pytest.mark.parametrize("asset", ASSETS)
def test_the_page_of_an_asset_shows_labels_as_text(hostile, watched, asset):
    server, _ = hostile
    page = watched.page
    page.goto(f"{server.url}/assets/{asset}")
    expect(page.get_by_text("Metadata", exact=True).first).to_be_visible()
    expect(page.get_by_text("path", exact=True).first).to_be_visible()

    page.get_by_text("path", exact=True).last.scroll_into_view_if_needed()
    broken = page.locator("img").evaluate_all(
        "images => Promise.all(images.map(image => image.decode().then(() => 0, () => 1)))"
    )
    assert sum(broken) == 0
    holds_as_text(watched)
    watched.shot(f"hostile_{asset}")
    open_all_pictures(watched, asset)


def test_a_label_can_be_read_in_a_table(hostile, watched):
    server, _ = hostile
    watched.page.goto(f"{server.url}/assets/live_documents")

    start = DOMAINS["math"][:20]
    expect(watched.page.get_by_role("cell", name=start).first).to_be_visible()


@pytest.mark.parametrize("asset", ["experiment_documents", "recommended_mixture"])
def test_checks_show_labels_as_text(hostile, watched, asset):
    server, _ = hostile
    watched.page.goto(f"{server.url}/assets/{asset}?view=checks")
    expect(watched.page.get_by_text("Passed").first).to_be_visible()

    holds_as_text(watched)
    watched.shot(f"hostile_checks_{asset}")


def test_an_error_and_the_log_of_its_run_show_labels_as_text(hostile, watched):
    server, run_id = hostile
    page = watched.page
    page.goto(f"{server.url}/runs/{run_id}")
    expect(page.get_by_text("STEP_FAILURE").first).to_be_visible()
    page.get_by_text("View full message").first.click()
    holds_as_text(watched)
    watched.shot("hostile_run")


def test_the_report_shows_labels_as_text(hostile, watched):
    server, _ = hostile
    watched.page.goto((server.config.parent / "data" / "reports" / "report.html").as_uri())
    expect(watched.page.get_by_role("heading").first).to_be_visible()

    assert watched.page.evaluate("window.hacked === undefined")
    assert watched.is_within_the_window()
    watched.shot("hostile_report")
