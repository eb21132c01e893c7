"""How curves, tree, map and triangle are drawn, also with names and numbers of the worst kind."""

import re
from dataclasses import replace

import numpy as np
import pytest

from causalmix_pipeline.adapters.interpretation_html import (
    MOST_COVARIATES,
    MOST_DOMAINS,
    MOST_LETTERS,
    Interpretation,
    interpretation_view,
)
from causalmix_pipeline.adapters.page_parts import (
    MINUS,
    number_text,
    share_text,
    signed_text,
    template_environment,
)
from causalmix_pipeline.core.interpretation import EffectCurve, Triangle, _cells
from causalmix_pipeline_tests.adapters.test_report_html import _Tags

LEAVES = [
    {"n_states": 9, "effects": [0.2, -0.1, -0.05], "spread": [0.0] * 3},
    {"n_states": 11, "effects": [-0.02, -0.1, -0.3], "spread": [0.0] * 3},
]
TREE = {
    "explained": 0.7,
    "root": {"n_states": 20, "effects": [0.08, -0.1, -0.19], "spread": [0.1] * 3,
             "column": 4, "threshold": 12.5, "below": LEAVES[0], "above": LEAVES[1]},
}  # fmt: skip


def curves(domains, *, half: float = 0.1) -> list[EffectCurve]:
    share_M = np.linspace(0, 0.8, 5)
    gain_M = np.array([-0.2, 0.0, 0.1, 0.0, -0.3])
    return [EffectCurve(d, share_M, gain_M, gain_M - half, gain_M + half) for d in domains]


def shown(domains=("prose", "math", "code"), **changes) -> Interpretation:
    corners_M33 = _cells(4)
    gain_M = 1.0 - 4 * ((corners_M33.mean(axis=1) - [0.6, 0.2, 0.2]) ** 2).sum(axis=1)
    columns = [f"{d}__{name}" for d in domains for name in ("size", "noise")]
    return replace(
        Interpretation(
            domains=domains,
            columns=columns,
            reference_name="equal",
            curves={"the pool": curves(domains), "another": curves(domains)},
            triangle=Triangle((0, 1, 2), 1.0, corners_M33, gain_M),
            mixture_D=np.array([0.6, 0.2, 0.2]),
            reference_D=np.full(3, 1 / 3),
            run_mixture_ND=np.random.default_rng(0).dirichlet(np.ones(3), 7),
            tree=TREE,
            importance_CD=np.arange(18.0).reshape(6, 3),
        ),
        **changes,
    )


def drawn(interpretation: Interpretation) -> str:
    environment = template_environment()
    environment.filters.update(share=share_text, number=number_text, signed=signed_text)
    template = environment.from_string(
        '{% import "interpretation.html.j2" as parts %}{{ parts.sections(view) }}'
    )
    return template.render(view=interpretation_view(interpretation))


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", _Tags(page).text)


def test_everything_is_drawn_and_every_tag_closed():
    page = drawn(shown())

    assert _Tags(page).open == []
    assert page.count("<polyline") == page.count("<polygon") == 2 * 3
    assert page.count('class="dot"') == 7
    assert page.count('class="leaf"') == 2
    assert page.count("--heat") >= 18


def test_a_leaf_names_the_domain_to_add_or_says_that_none_gains():
    text = text_of(drawn(shown()))

    assert "Add prose9 states" in text
    assert "No domain gains11 states" in text
    assert "≤ 12.5" in text and "> 12.5" in text
    assert "code__size" in text
    assert "explains 70% of how effects differ" in text


def test_a_tree_without_split_says_that_effects_hold_for_all():
    text = text_of(drawn(shown(tree={"explained": 0.0, "root": LEAVES[0]})))

    assert "No covariate parts the 9 pool states" in text
    assert "explains" not in text


def test_bars_of_all_leaves_have_one_scale_and_start_in_the_middle():
    leaf = interpretation_view(shown())["tree"]["root"]["above"]

    bars = {bar["domain"]: bar for bar in leaf["bars"]}
    assert bars["code"]["width"] == pytest.approx(50)  # the largest of all
    assert bars["math"]["width"] == pytest.approx(50 / 3, abs=0.01)
    for bar in bars.values():
        assert bar["x"] + bar["width"] == pytest.approx(50)  # all negative
        assert bar["css"] == "down"


def test_the_map_lists_the_strongest_covariate_first_and_frames_the_domains_own():
    heat = interpretation_view(shown())["heat"]

    assert heat["rows"][0]["column"] == "code__noise"
    assert [cell["is_own"] for cell in heat["rows"][0]["cells"]] == [False, False, True]
    assert heat["rows"][0]["cells"][2]["heat"] == 1.0


def test_many_domains_and_covariates_are_cut_and_counted():
    domains = tuple(f"d{i}" for i in range(12))
    effect_D = np.linspace(-0.5, 0.6, 12)
    tree = {"explained": 0.0, "root": {"n_states": 9, "effects": effect_D.tolist()}}
    importance_CD = np.random.default_rng(1).random((24, 12))

    view = interpretation_view(
        shown(domains, tree=tree, importance_CD=importance_CD, triangle=None, curves={})
    )

    assert len(view["tree"]["root"]["bars"]) == MOST_DOMAINS
    assert view["tree"]["n_hidden"] == 12 - MOST_DOMAINS
    assert view["tree"]["root"]["bars"][0]["domain"] == "d11"
    assert view["heat"]["n_hidden"] == 24 - MOST_COVARIATES


def test_an_unknown_interval_is_said_and_never_nan():
    unknown = {"the pool": curves(("prose", "math", "code"), half=np.nan)}

    page = drawn(shown(curves=unknown))

    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    assert "This estimator gives no interval" in page
    assert "<polygon" not in page


def test_steps_of_gain_hold_every_cell_and_great_losses_share_one():
    corners_M33 = _cells(4)
    gain_M = np.linspace(-9, 1, len(corners_M33))
    view = interpretation_view(shown(triangle=Triangle((0, 1, 2), 1.0, corners_M33, gain_M)))

    bands = view["triangle"]["bands"]
    assert sum(band["path"].count("M") for band in bands) == len(corners_M33)
    assert bands[0]["text"].startswith(f"below {MINUS}1.")
    for band in bands:
        assert band["css"] == ("down" if MINUS in band["text"] else "up")


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_numbers_keep_three_digits_in_any_unit(scale):
    importance_CD = np.arange(18.0).reshape(6, 3) * scale / 10

    first = interpretation_view(shown(importance_CD=importance_CD))["heat"]["rows"][0]

    digits = [cell["text"].replace(".", "").lstrip("0") for cell in first["cells"]]
    assert [text[:2] for text in digits] == ["15", "16", "17"]


def test_without_covariates_tree_and_map_are_left_out():
    page = drawn(shown(tree=None, importance_CD=None, columns=()))

    assert "Which pools want what" not in page
    assert "Which covariates matter" not in page
    assert "Three domains at once" in page


def test_names_can_do_nothing_and_long_ones_are_cut_inside_drawings():
    evil, backwards, long = '"><script>alert(1)</script>', "\u202egnihtemos", "W" * 300

    page = drawn(shown((evil, backwards, long)))

    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert _Tags(page).open == []
    in_drawings = re.findall(r'<text x="[-\d]+" y="[-\d]+" text-anchor="\w+">(.*?)</text>', page)
    assert max(map(len, re.findall("W+", " ".join(in_drawings)))) == MOST_LETTERS - 1
    assert f"<bdi>{backwards}</bdi>__" in page  # what follows keeps its direction
