"""The report in a real browser: five answers, sliders, themes, paper, a phone, no script at all."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from causalmix_pipeline_tests.browser.hostile_project import DOMAINS

pytest.importorskip("playwright", reason="the package playwright isn't installed")

from causalmix_pipeline.adapters.report_html import write_report
from causalmix_pipeline.adapters.what_if_html import WhatIf
from causalmix_pipeline_tests.adapters.test_report_html import HISTORY, report_data
from causalmix_pipeline_tests.browser.pdf_text import pdf_pages
from causalmix_pipeline_tests.browser.served import Watched

pytestmark = pytest.mark.timeout(300)

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 800}

#: Where each of a stranger's questions is answered, and what the answer must hold.
QUESTIONS = {
    "what": r"math|code|talk",
    "better": r"[+\N{MINUS SIGN}]\d\.\d{3} bits per byte",
    "sure": r"(Supported|Extrapolating).*90% interval",
    "why": r"is raised from .* to .*%|No mixture",
    "change": r"Loosening|If |top-up plan|More proxy runs|No limit",
}


@contextmanager
def opened(browser, shots: Path, path: Path, **how) -> Iterator[Watched]:
    """A report opened from its file; whatever it asks for besides that file is a problem."""
    context = browser.new_context(**how)
    context.set_default_timeout(30_000)
    watched = Watched(context.new_page(), shots)
    page, problems = watched.page, watched.problems

    def on_dialog(dialog) -> None:
        problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"page: {error}"))
    page.on("dialog", on_dialog)
    page.on(
        "request",
        lambda request: (
            None if request.url.split("#")[0] == path.as_uri() else problems.append(request.url)
        ),
    )
    try:
        page.goto(path.as_uri())
        yield watched
        assert problems == []
    finally:
        context.close()


@pytest.fixture(scope="module")
def own(finished_project) -> Path:
    """The report of a finished project."""
    return finished_project / "data" / "reports" / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A report whose every name tries to be more than text."""
    names = tuple(DOMAINS.values())
    plain = report_data()

    def renamed(frame, column: str):
        known = dict(zip(frame[column].unique(maintain_order=True), names, strict=False))
        return frame.with_columns(frame[column].replace(known))

    what_if = WhatIf(
        tasks=names,
        moved=(0, 1, 2),
        weights_WT=np.vstack([np.full(3, 1 / 3), np.eye(3)]),
        mixture_WD=np.vstack([np.full(3, 1 / 3), np.eye(3)]),
        gain_WT3=np.full((4, 3, 3), 0.1),
        total_W3=np.full((4, 3), 0.1),
    )
    data = dataclasses.replace(
        plain,
        domains=names,
        reference_name=names[2],
        covariates=renamed(renamed(plain.covariates, "domain"), "covariate"),
        slack=renamed(plain.slack, "constraint"),
        **{
            field: renamed(getattr(plain, field), "task")
            for field in ("task_gains", "predictions", "estimators", "signal")
        },
        provenance={name: name for name in names},
        losses=frozenset(names),
        what_if=what_if,
        history=HISTORY,
    )
    return write_report(tmp_path_factory.mktemp("hostile") / "report.html", data)


def box_of(page, name: str) -> dict:
    box = page.locator(f"#{name}").bounding_box()
    assert box is not None, name
    return box


@pytest.mark.parametrize(("device", "window"), [("phone", PHONE), ("desk", DESK)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_five_questions_are_answered_on_the_first_screen_or_one_click_away(
    browser, own, shots, device, window, scheme
):
    with opened(browser, shots, own, viewport=window, color_scheme=scheme) as watched:
        page = watched.page
        for name, words in QUESTIONS.items():
            assert re.search(words, page.locator(f"#{name}").inner_text().replace("\n", " ")), name
            box = box_of(page, name)
            if box["y"] + box["height"] > window["height"]:
                page.locator(f"nav a[href='#{name}']").click()
                assert 0 <= box_of(page, name)["y"] < window["height"], name
                page.evaluate("window.scrollTo(0, 0)")
        assert watched.is_within_the_window()
        watched.shot(f"report_{device}_{scheme}")


def test_each_answer_leads_to_its_section(browser, own, shots):
    with opened(browser, shots, own, viewport=DESK) as watched:
        page = watched.page
        links = page.locator(".answer a")
        for i in range(links.count()):
            links.nth(i).click()
            target = (links.nth(i).get_attribute("href") or "")[1:]
            assert box_of(page, target)["y"] < DESK["height"], target
            page.evaluate("window.scrollTo(0, 0)")


def test_a_slider_shows_another_precomputed_mixture_and_the_way_back(browser, own, shots):
    with opened(browser, shots, own, viewport=DESK) as watched:
        page = watched.page

        def shown() -> list[str]:
            return page.locator(
                "#sliders [data-domain] b, #sliders [data-task] b"
            ).all_inner_texts()

        before = shown()
        assert "the recommended mixture" in page.locator("#picked").inner_text()
        page.locator("#sliders input").first.fill("0")
        watched.shot("report_slider")

        assert shown() != before
        assert "Shown: the precomputed mixture for" in page.locator("#picked").inner_text()
        shares = [float(text[:-1]) for text in shown() if text.endswith("%")]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        assert page.locator("#sliders output").all_inner_texts() == ["0.0%", "100%"]
        page.locator("#reset").click()
        assert shown() == before


@pytest.mark.parametrize("weights", [(200, 1), (0.9, 0.004, 0.004, 0.004, 0.004)])
def test_sliders_open_at_the_weights_of_the_settings_however_uneven(
    browser, shots, tmp_path, weights
):
    n = len(weights)
    weights_WT = np.vstack([np.array(weights) / sum(weights), np.eye(n)])
    gain_WT3 = np.full((n + 1, n, 3), 0.1)
    gain_WT3[0] = 0.0625  # a tie that browsers and the server round to different sides
    what_if = WhatIf(
        tasks=tuple(f"task {t}" for t in range(n)),
        moved=tuple(range(n)),
        weights_WT=weights_WT,
        mixture_WD=np.vstack([[0.5, 0.3, 0.2], *[[0.1, 0.2, 0.7]] * n]),
        gain_WT3=gain_WT3,
        total_W3=gain_WT3[:, 0],
    )
    path = write_report(tmp_path / "report.html", report_data(what_if=what_if))
    with opened(browser, shots, path, viewport=DESK) as watched:
        page = watched.page

        def shown() -> list[str]:
            return page.locator("#sliders b, #sliders output, #picked").all_inner_texts()

        with_script = shown()
        assert "the recommended mixture, for the weights" in page.locator("#picked").inner_text()
        assert "+0.062" in with_script and "+0.063" not in with_script
        last = page.locator("#sliders input").last
        assert last.get_attribute("aria-valuetext") == ("0.5%" if n == 2 else "0.4%")
        page.locator("#sliders input").first.fill("0")
        last.fill("100")
        assert last.get_attribute("aria-valuetext") == "100%"
        assert shown() != with_script
        page.locator("#reset").click()
        assert shown() == with_script


def test_the_theme_follows_the_system_until_the_button_is_pressed(browser, own, shots):
    def paper(page) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    with opened(browser, shots, own, viewport=DESK, color_scheme="light") as watched:
        page = watched.page
        light = paper(page)
        page.emulate_media(color_scheme="dark")
        dark = paper(page)
        assert dark != light

        page.get_by_role("button", name="Light").click()
        assert paper(page) == light
        page.reload()
        assert paper(page) == light  # remembered by the page
        page.get_by_role("button", name="Dark").click()
        assert paper(page) == dark


def test_on_paper_everything_is_unfolded_and_nothing_can_be_pressed(browser, own, shots, tmp_path):
    with opened(browser, shots, own, viewport=DESK, color_scheme="dark") as watched:
        watched.page.pdf(path=tmp_path / "report.pdf", format="A4", print_background=True)
        watched.page.emulate_media(media="print")
        assert watched.page.get_by_role("button").count() == 0
        assert watched.page.locator("input:visible").count() == 0
        paper = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(255, 255, 255)"

    pages = pdf_pages(tmp_path / "report.pdf")
    assert len(pages) >= 3 and all(pages)
    text = "".join(pages)
    for words in ("Recommendedmixture", "Howsure", "losswithreference", "Wherethiscomesfrom"):
        assert words in text, words  # the third stands in a table that is folded on a screen


def test_without_scripts_all_but_the_sliders_and_the_switch_is_there(browser, own, shots):
    with opened(browser, shots, own, viewport=PHONE, java_script_enabled=False) as watched:
        page = watched.page
        for name, words in QUESTIONS.items():
            assert re.search(words, page.locator(f"#{name}").inner_text().replace("\n", " ")), name
        assert page.locator("#theme, #sliders").first.is_hidden()
        assert page.locator("#weights table").count() == 1
        watched.shot("report_without_scripts")


@pytest.mark.parametrize(("device", "window"), [("phone", PHONE), ("desk", DESK)])
def test_hostile_names_are_text_that_breaks_no_layout(browser, hostile, shots, device, window):
    with opened(browser, shots, hostile, viewport=window) as watched:
        page = watched.page
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        page.locator("#sliders input").first.fill("100")
        page.locator("#sliders input").nth(1).fill("0")
        page.locator("#sliders input").nth(2).fill("0")

        assert page.evaluate("window.hacked === undefined")
        assert page.locator("img, a[href^='javascript'], a[href*='example.com']").count() == 0
        assert watched.is_within_the_window()
        assert DOMAINS["math"] in page.locator("#what").inner_text()
        # What stands after a name that turns the direction of text is still read from the left.
        assert page.evaluate("getComputedStyle(document.querySelector('bdi')).unicodeBidi") in (
            "isolate",
            "plaintext",
        )
        assert page.locator("bdi").count() > 20
        watched.shot(f"report_hostile_{device}")
        page.locator("#weights").scroll_into_view_if_needed()
        watched.shot(f"report_hostile_weights_{device}")


def test_the_page_itself_forbids_foreign_scripts_and_requests(browser, hostile, shots):
    """Were a name not escaped some day, the browser would still not act on it."""
    with opened(browser, shots, hostile, viewport=DESK) as watched:
        page = watched.page
        page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<p onclick=\"window.hacked=1\">x</p>');"
            "document.body.lastElementChild.click()"
        )
        assert page.evaluate("window.hacked === undefined")
        refused, watched.problems[:] = list(watched.problems), []
        assert refused and all("Content Security Policy" in text for text in refused)
