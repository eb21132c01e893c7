import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest

from causalmix_pipeline.adapters.beliefs_html import QUESTIONS, Beliefs
from causalmix_pipeline.adapters.interpretation_html import Interpretation
from causalmix_pipeline.adapters.page_parts import (
    MINUS,
    UNKNOWN,
    Axis,
    number_text,
    share_text,
    signed_text,
    tokens_text,
)
from causalmix_pipeline.adapters.report_answers import answers_of, beyond, threshold_rows
from causalmix_pipeline.adapters.report_data import FRAME_COLUMNS, VERDICTS, ReportData
from causalmix_pipeline.adapters.report_html import (
    FIRST_DOMAINS,
    FIRST_ON_PHONE,
    page_policy,
    page_script,
    render_report,
    write_report,
)
from causalmix_pipeline.adapters.what_if_html import WhatIf
from causalmix_pipeline.core.falsification import OBJECTIVE

DOMAINS = ("math", "manuals", "prose")


def frame(name: str, rows: list[tuple]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=list(FRAME_COLUMNS[name]), orient="row")


def report_data(**changes) -> ReportData:
    """A small report: three domains, two tasks, two estimators."""
    data = ReportData(
        domains=DOMAINS,
        mixtures={
            "recommended": (0.5, 0.3, 0.2),
            "reference": (0.2, 0.2, 0.6),
            "natural": (0.2, 0.2, 0.6),
            "equal": (1 / 3, 1 / 3, 1 / 3),
            "regmix": (0.4, 0.5, 0.1),
        },
        reference_name="natural",
        verdict="supported",
        overlap_score=0.8,
        supported_limit=1.0,
        unsupported_limit=4.0,
        gains=frame(
            "gains",
            [
                ("recommended", 0.046, 0.031, 0.061),
                ("natural", 0.0, 0.0, 0.0),
                ("equal", -0.012, -0.02, -0.004),
                ("regmix", 0.021, None, None),
            ],
        ),
        task_gains=frame(
            "task_gains",
            [("solving", 0.75, 0.05, 0.03, 0.07, 2.4), ("talking", 0.0, -0.1, -0.2, 0.0, None)],
        ),
        slack=frame("slack", [("prose: least share", 0.2, 0.2, 0.0, True)]),
        covariates=frame(
            "covariates",
            [(d, "compress_ratio", 0.45, [0.4, 0.44, 0.5]) for d in DOMAINS],
        ),
        predictions=frame(
            "predictions", [("solving", -2.0 - i / 10, -2.05 - i / 10) for i in range(5)]
        ),
        estimators=frame(
            "estimators",
            [
                ("solving", "response_surface", True, 0.8, 0.04, 0.9, 0.02, 0.91),
                ("solving", "regmix", False, 0.5, 0.05, 0.7, 0.03, None),
            ],
        ),
        signal=frame("signal", [("solving", 0.04, 0.001, 40.0, 4.3, 5.9)]),
        losses=frozenset({"solving", "talking"}),
        provenance={"live pool": "9c1f3a7d"},
    )
    return dataclasses.replace(data, **changes)


BELIEFS = Beliefs(
    treatment_r2=0.01,
    observational_sources=(),
    trials=[
        {"check": check, "task": task, "estimate": 0.5, "se": 0.1, "p_value": 0.001,
         "passed": task != "talking", "reason": ""}
        for check in QUESTIONS
        for task in ("solving", "talking", OBJECTIVE)
    ],
    gain_of="the best mixtures of the runs",
    confounder=(0.31, 0.22),
    why_unknown="",
    more_runs="doubling the runs to 40 is expected to help",
)  # fmt: skip


WHAT_IF = WhatIf(
    tasks=("solving", "talking"),
    moved=(0, 1),
    weights_WT=np.array([[0.75, 0.25], [0.5, 0.5]]),
    mixture_WD=np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]),
    gain_WT3=np.array(
        [
            [[0.05, 0.03, 0.07], [-0.1, np.nan, np.nan]],
            [[0.02, 0.01, 0.03], [0.1, np.nan, np.nan]],
        ]
    ),
    total_W3=np.array([[0.046, 0.031, 0.061], [0.06, np.nan, np.nan]]),
)

HISTORY = pl.DataFrame(
    {
        "made_at": ["2026-01-01 09:00 UTC", "2026-01-02 09:00 UTC"],
        "verdict": ["supported", "unsupported"],
        "gain": [0.04, None],
        "low": [0.02, None],
        "high": [0.06, None],
        "realised": [0.05, None],
        "realised_se": [0.01, None],
    }
)

TOP_UP = pl.DataFrame(
    {"share__math": [0.7, 0.1], "share__manuals": [0.2, 0.1], "share__prose": [0.1, 0.8]}
)


class _Tags(HTMLParser):
    """Collects tags, attributes and text, and that every tag is closed in order."""

    VOID = ("meta", "rect", "circle", "line", "br", "wbr", "input")

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", _Tags(html).text)


def test_every_tag_is_closed_in_order():
    for verdict in VERDICTS:
        assert _Tags(render_report(report_data(verdict=verdict, top_up=TOP_UP))).open == []


def test_nothing_is_fetched_from_anywhere():
    """The report must work offline, and tell nobody that it was opened."""
    html = render_report(report_data())

    fetching = {"src", "href", "action", "poster", "data", "srcset", "xlink:href"}
    found = [value for _, name, value in _Tags(html).attributes if name in fetching]
    assert found and all(value and value.startswith("#") for value in found)
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|fetch\(|XMLHttp|import\(", html)
    policy = page_policy(page_script())
    assert policy.startswith("default-src 'none';")
    assert "base-uri 'none'" in policy and "form-action 'none'" in policy


def test_every_link_leads_to_a_place_in_the_page():
    for verdict in VERDICTS:
        attributes = _Tags(render_report(report_data(verdict=verdict, what_if=WHAT_IF))).attributes
        places = [value for _, name, value in attributes if name == "id"]

        assert len(places) == len(set(places))
        wanted = {value[1:] for _, name, value in attributes if name == "href" and value}
        assert wanted <= set(places)


def test_the_only_scripts_are_the_page_own_and_its_values():
    html = render_report(report_data(what_if=WHAT_IF))

    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [
        ' type="application/json" id="what-if"',
        "",
    ]
    assert json.loads(scripts[0][1])["weights"] == [[0.75, 0.25], [0.5, 0.5]]
    digest = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    assert f"&#39;sha256-{digest}&#39;" in html


def test_names_from_data_can_do_nothing_in_the_page():
    evil = '"><script>alert(1)</script>'
    data = report_data(
        domains=(evil, "manuals", "prose"),
        covariates=frame("covariates", [(evil, evil, 9.0, [0.1, 0.2])]),
        task_gains=frame("task_gains", [(evil, 1.0, 0.1, 0.0, 0.2, None)]),
        predictions=frame("predictions", [(evil, -2.0, -2.1)]),
        estimators=frame("estimators", [(evil, evil, True, 0.1, 0.1, 0.1, 0.1, None)]),
        signal=frame("signal", [(evil, 0.1, 0.1, 1.0, None, None)]),
        slack=frame("slack", [(evil, 0.1, 0.1, 0.0, True)]),
        provenance={evil: evil},
        beliefs=dataclasses.replace(
            BELIEFS,
            observational_sources=(evil,),
            trials=[
                {**row, "reason": evil, "passed": None}
                if row["task"] == OBJECTIVE
                else {**row, "task": evil, "passed": False}
                for row in BELIEFS.trials
            ],
            confounder=None,
            why_unknown=evil,
            more_runs=evil,
        ),
        reference_name=evil,
        made_at=evil,
        policy=evil,
        what_if=dataclasses.replace(WHAT_IF, tasks=(evil, "</script><!--")),
        history=HISTORY.with_columns(made_at=pl.lit(evil), verdict=pl.lit(evil)),
    )

    html = render_report(data)

    assert re.findall("<script[^>]*>", html) == [
        '<script type="application/json" id="what-if">',
        "<script>",
    ]
    assert html.count("</script") == 2 and "<!--" not in html
    assert "&lt;script&gt;" in html
    held = re.search(r'id="what-if">(.*?)</script>', html, re.DOTALL)
    assert held and json.loads(held[1])["tasks"] == [evil, "</script><!--"]


def test_the_answer_comes_first():
    text = text_of(render_report(report_data()))

    before = text[: text.index("All mixtures")]
    assert "Recommended mixture" in before and "50%" in before
    answers = text[: text.index("Shares as a table")]
    assert "+0.046 bits per byte over the reference mixture (natural)" in answers
    assert "proxy runs have seen pools like this one. 90% interval +0.031 to +0.061" in answers
    assert "math is raised from 20% to 50%, mostly at the cost of prose." in answers
    assert "Loosening the limit that binds: prose: least share (at 0.200)." in answers
    assert VERDICTS["supported"][:40] in text


def test_the_first_screen_draws_only_the_largest_shares():
    many = tuple(f"domain {i}" for i in range(15))
    mixtures = {"recommended": (1 / 15,) * 15, "reference": (0.5, *(0.5 / 14,) * 14)}

    html = render_report(report_data(domains=many, mixtures=mixtures))
    first = html[html.index('id="what"') : html.index('id="better"')]

    assert first.count('class="row') == FIRST_DOMAINS
    assert first.count("later") == FIRST_DOMAINS - FIRST_ON_PHONE
    assert "The largest shares of 15 domains." in first


def test_mixtures_for_other_task_weights_are_there_without_scripts_too():
    html = render_report(report_data(what_if=WHAT_IF))
    text = text_of(html)

    assert html.count('type="range"') == 2
    assert "2 mixtures were computed when this report was made" in text
    # Half of the weight to talking: prose takes over.
    assert re.search(r"talking ?50% ?prose 70%, manuals 20%, math 10%", text)
    assert "Other task weights" not in text_of(render_report(report_data()))


def test_recommendations_over_time_stand_beside_what_was_realised():
    text = text_of(render_report(report_data(history=HISTORY)))

    assert re.search(r"2026-01-01 09:00 UTC supported ?\+0.040 \+0.050", text)
    assert "No validation runs" not in text
    assert "No validation runs" in text_of(
        render_report(report_data(history=HISTORY.with_columns(realised=pl.lit(None, pl.Float64))))
    )
    assert "over time" not in text_of(render_report(report_data(history=HISTORY.clear())))


def test_the_worth_of_more_runs_is_a_table():
    rows = ({"n_runs": 40, "part": 1.0, "r2": 0.8, "r2_se": 0.02},
            {"n_runs": 80, "part": 2.0, "r2": 0.9, "r2_se": None})  # fmt: skip

    text = text_of(render_report(report_data(learning_curve=rows)))

    assert re.search(r"40 ?0.800 ?0.020 ?80 ?0.900 ?" + UNKNOWN, text)


def test_what_was_tried_and_what_cant_be_known_is_told():
    text = text_of(render_report(report_data(beliefs=BELIEFS)))

    assert "The covariates don't tell the mixtures (R² 0.010)." in text
    assert re.search(r"Do mixtures matter\? ?yes ?0.500 ± 0.100 ?0.001 ?talking", text)
    assert "it must explain 31% of what is left of both, and 22% for the lower bound" in text
    assert "Where mixtures were drawn at random there is none." in text
    assert "More runs: doubling the runs to 40 is expected to help." in text
    assert "When to believe it" not in text_of(render_report(report_data()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"observational_sources": ("team_b",)}, "Those of team_b weren't declared randomised."),
        ({"treatment_r2": 0.4}, "R² of the mixtures given the covariates is 0.400."),
    ],
)
def test_observational_runs_are_told_as_such(changes, words):
    found = dataclasses.replace(BELIEFS, **changes)

    text = text_of(render_report(report_data(beliefs=found)))

    assert f"Observational runs. {words}" in text
    assert "drawn at random" not in text


def test_a_mixture_without_average_gain_needs_no_hidden_cause():
    found = dataclasses.replace(BELIEFS, confounder=(0.0, 0.0))

    text = text_of(render_report(report_data(beliefs=found)))

    assert "there is no gain of the best mixtures of the runs over the equal mixture" in text
    assert "it must explain" not in text


def test_a_gain_without_interval_says_so():
    gains = frame("gains", [("recommended", 0.046, float("nan"), float("nan"))])

    text = text_of(render_report(report_data(gains=gains)))

    assert "This estimator gives no interval" in text
    assert "90% interval +" not in text


def test_an_unsupported_pool_keeps_the_reference_and_promises_nothing():
    mixtures = dict(report_data().mixtures)
    mixtures["recommended"] = mixtures["reference"]
    data = report_data(verdict="unsupported", overlap_score=5.9, mixtures=mixtures, top_up=TOP_UP)

    text = text_of(render_report(data))

    assert "Reference mixture kept" in text
    assert "no gain promised" in text
    assert "+0.046" not in text
    assert "The 2 proxy runs of the top-up plan, made on this very pool." in text
    assert "Gain on each task" not in text and "Loosening it" not in text


def test_where_limits_forbid_the_reference_the_nearest_allowed_mixture_is_shown():
    data = report_data(verdict="unsupported")

    html = render_report(data)
    text = text_of(html)

    assert "<h1>Nearest to the reference mixture that the limits allow</h1>" in html
    assert "Train on the mixture nearest to the reference that the limits allow: math 50%" in text
    assert "Reference mixture kept" not in text and ", kept" not in text
    assert "The limits forbid the reference mixture" in text
    first = html[html.index('id="what"') : html.index('id="better"')]
    assert first.count('class="s0"') == len(DOMAINS)  # its bars, those of the reference beside
    assert "+30.0" in first
    assert 'aria-label="math: nearest to the reference that the limits allow 50%' in html


def test_an_unsupported_pool_without_a_plan_blames_no_limit():
    assert answers_of(report_data(verdict="unsupported")).change == (
        "Proxy runs made on this very pool.",
    )


def test_only_losses_are_in_bits_per_byte():
    predictions = frame("predictions", [("solving", 0.1 * i, 0.1 * i) for i in range(5)])
    data = report_data(losses=frozenset({"talking"}), predictions=predictions)

    html = render_report(data)
    text = text_of(html)

    assert "+0.046 in the tasks' own units over the reference mixture" in text
    assert "Over the reference mixture, in the tasks' own units" in text
    assert "held-out text costs" not in text
    assert "bits per byte" not in text
    assert "2.40" not in text  # the loss with the reference of a task that has none
    assert ">0.4</text>" in html and ">-0.4</text>" not in html
    none = text_of(render_report(report_data(losses=frozenset())))
    assert "loss with reference" not in none


def test_a_task_only_reported_leaves_the_weighted_gain_in_bits_per_byte():
    text = text_of(render_report(report_data(losses=frozenset({"solving"}))))

    assert "+0.046 bits per byte over the reference mixture" in text
    assert "Of the recommended mixture over the reference, in the tasks' own units" in text


def test_losses_are_drawn_as_bits_per_byte_whatever_their_sign():
    predictions = frame("predictions", [("solving", -2.0, -2.5), ("solving", 0.5, -1.0)])

    html = render_report(report_data(predictions=predictions))

    assert ">-1</text>" in html and ">3</text>" in html


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((0.031, 0.061), "+0.031 to +0.061, all of it a gain."),
        ((-0.05, -0.01), f"{MINUS}0.050 to {MINUS}0.010, all of it a loss."),
        ((0.0004, 0.06), "+0.000 to +0.060: no gain at all is possible too."),
        ((-0.05, -0.0004), f"{MINUS}0.050 to {MINUS}0.000: no gain at all is possible too."),
    ],
)
def test_an_interval_is_judged_by_the_numbers_that_are_shown(ends, words):
    gains = frame("gains", [("recommended", sum(ends) / 2, *ends)])

    assert answers_of(report_data(gains=gains)).sure[0].endswith(f"90% interval {words}")


def test_the_interval_of_observational_runs_promises_nothing():
    observed = dataclasses.replace(BELIEFS, observational_sources=("team_b",))

    (sure,) = answers_of(report_data(beliefs=observed)).sure

    assert "it isn't calibrated, since the runs are observational" in sure
    assert "all of it a gain" not in sure
    assert "all of it a gain" in answers_of(report_data(beliefs=BELIEFS)).sure[0]


def test_the_reference_itself_has_no_interval():
    mixtures = dict(report_data().mixtures)
    mixtures["recommended"] = mixtures["reference"]
    data = report_data(mixtures=mixtures)

    answers = answers_of(data)

    assert "".join(answers.better) == "The reference mixture itself (natural)."
    assert "interval" not in answers.sure[0]
    assert "for certain enough (confidence_z)" in answers.why[0]
    assert "The reference mixture itself (natural)." in text_of(render_report(data))


def shown_with(importance_CD: list, covariate: str = "my__score") -> Interpretation:
    """An interpretation whose tree asks for a covariate of each domain."""
    columns = [f"{domain}__{covariate}" for domain in DOMAINS]
    leaves = [{"effects": [0.1, 0.0, 0.0]}, {"effects": [0.0, 0.1, 0.0]}]
    root = {"column": 0, "threshold": 0.5, "below": leaves[0], "above": leaves[1]}
    return Interpretation(
        DOMAINS, columns, "natural", {}, None, np.full(3, 1 / 3), np.full(3, 1 / 3),
        np.full((1, 3), 1 / 3), {"root": root}, np.array(importance_CD, dtype=float),
    )  # fmt: skip


def test_own_columns_with_underscores_keep_their_names():
    covariates = frame("covariates", [(d, "my__score", 0.45, [0.4, 0.5]) for d in DOMAINS])
    shown = shown_with([[0, 0, 0], [0, 0, 0], [1, 0, 0]])
    data = report_data(covariates=covariates, interpretation=shown)

    assert "depends most on my__score of prose." in "".join(answers_of(data).why)
    assert [(row["domain"], row["covariate"]) for row in threshold_rows(data)] == [
        ("math", "my__score")
    ]


def test_a_domain_whose_effect_depends_on_nothing_has_no_decider():
    covariates = frame("covariates", [(d, "my__score", 0.45, [0.4, 0.5]) for d in DOMAINS])
    shown = shown_with([[0, 0, 0], [0, 0, 0], [0, 1, 1]])  # math is raised

    why = "".join(answers_of(report_data(covariates=covariates, interpretation=shown)).why)

    assert "depends most" not in why


def test_a_report_that_knows_of_no_change_claims_none():
    data = report_data(slack=report_data().slack.clear())

    assert answers_of(data).change == (
        "No limit binds, and no threshold of the pool is known that would change it.",
    )


def test_sliders_tell_their_normalised_weight():
    uneven = dataclasses.replace(WHAT_IF, weights_WT=np.array([[200 / 201, 1 / 201], [0.5, 0.5]]))

    html = render_report(report_data(what_if=uneven))

    assert re.findall(r'aria-valuetext="([^"]+)"', html) == ["100%", "0.5%"]
    held = re.search(r'id="what-if">(.*?)</script>', html, re.DOTALL)
    assert held and json.loads(held[1])["weights"][0] == pytest.approx([200 / 201, 1 / 201], 1e-5)


def test_the_top_up_plan_lists_each_run():
    html = render_report(report_data(verdict="unsupported", top_up=TOP_UP))

    assert "Top-up plan" in html
    assert ">70%<" in html and ">80%<" in html


def test_a_supported_pool_shows_no_top_up_plan():
    assert "Top-up plan" not in render_report(report_data())


def test_the_reference_is_drawn_once_though_it_is_also_a_baseline():
    html = render_report(report_data())

    drawn = re.findall(r'<span class="key s\d"></span><bdi[^>]*>([^<]+)</bdi></li>', html)
    assert drawn[:2] == ["recommended", "reference (natural)"]  # on the first screen
    assert drawn[2:] == ["recommended", "reference (natural)", "equal", "RegMix"]


def test_what_binds_is_named_with_its_limit():
    text = text_of(render_report(report_data()))
    free = report_data(slack=report_data().slack.clear())

    assert "prose: least share: at 0.200, limit 0.200" in text
    assert "No constraint binds" in text_of(render_report(free))


def test_a_covariate_outside_the_states_is_named_at_the_top_where_it_decides():
    covariates = frame(
        "covariates",
        [("math", "compress_ratio", 0.45, [0.4, 0.5]), ("prose", "symbol_share", 0.9, [0.1, 0.2])],
    )

    text = text_of(render_report(report_data(covariates=covariates)))

    assert "Outside the states' range: prose symbol_share 0.900 (states 0.100 to 0.200)" in text
    kept = text_of(render_report(report_data(covariates=covariates, verdict="unsupported")))
    first = kept[: kept.index("Shares as a table")]
    assert (
        "symbol_share of prose is 0.900, and the pools of the proxy runs had 0.100 to 0.200"
        in first
    )


def test_the_estimator_that_answers_is_marked_and_regmix_stands_beside():
    html = render_report(report_data())

    assert html.count("answers</span>") == 1
    assert re.search(r"response_surface <span class=\"tag\">answers", html)
    assert "regmix" in html


def test_tasks_that_count_stand_before_those_only_reported():
    text = text_of(render_report(report_data()))

    assert text.index("solving weight 100%") < text.index("talking only reported")


def test_positions_stay_within_the_plot():
    html = render_report(report_data())

    positions = [float(x) for x in re.findall(r'(?:cx|x|x1|x2|width)="([-\d.]+)%"', html)]
    assert positions
    assert all(0 <= x <= 100 for x in positions)


def test_the_file_is_written_whole(tmp_path):
    path = write_report(tmp_path / "reports" / "report.html", report_data())

    assert path.read_text(encoding="utf-8") == render_report(report_data())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_the_same_data_gives_the_same_page():
    assert render_report(report_data()) == render_report(report_data())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "maybe"}, "maybe"),
        ({"mixtures": {"recommended": (0.5, 0.3, 0.2)}}, "recommended"),
        ({"mixtures": {"recommended": (1.0,), "reference": (1.0,)}}, "recommended"),
        ({"signal": pl.DataFrame({"task": ["solving"]})}, "ReportData.signal lacks"),
    ],
)
def test_incomplete_data_is_a_bug_of_the_caller(changes, message):
    with pytest.raises(AssertionError, match=message):
        report_data(**changes)


def test_a_task_without_finite_predictions_is_left_out():
    predictions = frame("predictions", [("solving", -2.0, float("nan"))])

    assert "<figure>" not in render_report(report_data(predictions=predictions))


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.31), (-0.02, 0.061), (1.2, 1.2), (-3e-7, 4e-7), (0.0, 1.0)]
)
def test_an_axis_holds_its_range_between_few_round_ticks(low, high):
    axis = Axis.around(low, high)

    assert axis.low <= low and axis.high >= high
    assert 2 <= len(axis.ticks) <= 8
    assert axis.at(axis.low) == 0 and axis.at(axis.high) == 100


def test_a_value_on_the_border_of_the_states_is_inside():
    row = {"live": 0.1 + 0.2, "states": [0.1, 0.3]}  # .1 + .2 is above .3 by rounding

    assert beyond(row) == 0
    assert beyond({"live": 0.4, "states": [0.1, 0.3]}) == pytest.approx(0.5)
    assert beyond({"live": 0.4, "states": []}) == 0
    assert beyond({"live": 0.4, "states": [0.3, 0.3]}) == 1


def test_numbers_read_as_people_write_them():
    assert [share_text(x) for x in (0.005, 0.072, 0.0996, 0.34)] == ["0.5%", "7.2%", "10%", "34%"]
    assert [signed_text(x) for x in (0.0461, -0.0123, None)] == [
        "+0.046",
        f"{MINUS}0.012",
        UNKNOWN,
    ]
    assert [number_text(x) for x in (0.0, 0.1234, 5.678, 12.34, 345.6)] == [
        "0.000", "0.123", "5.68", "12.3", "346",
    ]  # fmt: skip
    assert [number_text(x) for x in (None, float("nan"), float("inf"), 1.2e-5)] == [
        UNKNOWN, UNKNOWN, "∞", "1.2e-05",
    ]  # fmt: skip
    assert [tokens_text(x) for x in (900, 3_210_000, 2e9, 1.5e13)] == [
        "900", "3.21 million", "2 billion", "15 trillion",
    ]  # fmt: skip
