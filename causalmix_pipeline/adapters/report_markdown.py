"""The report in short as Markdown, for pull requests; names from data stay text.

A name of letters, digits, single spaces and `_ - .` stands as it is. Any other stands in a `<code>`
element with each letter that Markdown or HTML might act on as a numeric entity, and with letters
that can't be seen, such as marks of right-to-left text, spelled out. So tables can't break, nothing
is a link or an element, and nobody is mentioned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from causalmix_pipeline.adapters.page_parts import (
    Name,
    is_known,
    number_text,
    points_text,
    share_text,
    signed_text,
    tokens_text,
)
from causalmix_pipeline.adapters.report_answers import Sentence, answers_of, heading_of
from causalmix_pipeline.adapters.report_data import ReportData

#: Letters of a name; longer ones are cut.
MOST_LETTERS = 80

_PLAIN = re.compile(r"[A-Za-z0-9]+(?:(?:[_.-]|:? )[A-Za-z0-9]+)*")
_SAFE = re.compile(r"[A-Za-z0-9 \u00a1-\U0010ffff]")


def markdown_name(text: str) -> str:
    """A name from data as one line of Markdown that shows it and does nothing else."""
    text = text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"
    # "www." would become a link by itself.
    if _PLAIN.fullmatch(text) and not text.lower().startswith("www."):
        return text
    spelled = "".join(a if a.isprintable() else f"[U+{ord(a):04X}]" for a in text)
    inert = "".join(a if _SAFE.fullmatch(a) else f"&#{ord(a)};" for a in spelled)
    return f"<code>{inert}</code>"


def render_markdown(data: ReportData) -> str:
    """The five answers, then the tables behind them."""
    answers = answers_of(data)
    kept = data.verdict == "unsupported"
    budget = f", {tokens_text(data.budget_tokens)} tokens" if data.budget_tokens else ""
    parts = [
        f"# {heading_of(data)}",
        f"{len(data.domains)} domains, policy {markdown_name(data.policy)}, reference "
        f"{markdown_name(data.reference_name)}{budget}. The whole report is `report.html`.",
        "\n".join(
            f"- **{question}:** {_sentence(sentence)}"
            for question, sentence in (
                ("What to train on", answers.what),
                ("How much better", answers.better),
                ("How sure", answers.sure),
                ("Why", answers.why),
                ("What would change it", answers.change),
            )
        ),
        "## Mixture",
        _mixture_table(data),
    ]
    if not kept:
        parts += ["## Gain on each task", _task_table(data)]
        parts += ["## Limits", _limit_table(data)]
    parts += ["## Where this comes from", _origin_table(data)]
    return "\n\n".join(parts) + "\n"


def write_markdown(path: Path, data: ReportData) -> Path:
    """Write it whole or not at all, and return its path."""
    from causalmix_pipeline.adapters.run_store import write_atomically

    write_atomically(path, render_markdown(data).encode("utf-8"))
    return path


def _sentence(parts: Sentence) -> str:
    return "".join(markdown_name(part) if isinstance(part, Name) else part for part in parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and the others numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mixture_table(data: ReportData) -> str:
    mixtures = data.mixtures
    names = [n for n in ("recommended", "reference", "natural") if n in mixtures]
    best, reference = mixtures["recommended"], mixtures["reference"]
    order = sorted(range(len(best)), key=lambda d: (-best[d], data.domains[d]))
    return _table(
        ["domain", *names, "change, points"],
        [
            [
                markdown_name(data.domains[d]),
                *(share_text(mixtures[name][d]) for name in names),
                points_text(100 * (best[d] - reference[d])),
            ]
            for d in order
        ],
    )


def _task_table(data: ReportData) -> str:
    rows = data.task_gains.sort("weight", "task", descending=[True, False]).to_dicts()
    return _table(
        ["task", "weight", f"gain, {data.task_unit}", "90% from", "to"],
        [
            [
                markdown_name(row["task"]),
                share_text(row["weight"]) if row["weight"] else "only reported",
                *(signed_text(row[name]) for name in ("gain", "low", "high")),
            ]
            for row in rows
        ],
    )


def _limit_table(data: ReportData) -> str:
    rows = data.slack.sort("binds", descending=True, maintain_order=True).to_dicts()
    if not rows:
        return "None is set."
    free = ""
    if is_known(data.unconstrained_gain):
        free = f"\n\nWithout any limit: {signed_text(data.unconstrained_gain)}, in {data.unit}."
    return (
        _table(
            ["limit", "value", "at", "binds"],
            [
                [
                    markdown_name(row["constraint"]),
                    number_text(row["value"]),
                    number_text(row["limit"]),
                    "yes" if row["binds"] else "no",
                ]
                for row in rows
            ],
        )
        + free
    )


def _origin_table(data: ReportData) -> str:
    rows = {"verdict": data.verdict, **data.provenance}
    return _table(
        ["what", "value"],
        [[markdown_name(name), markdown_name(value)] for name, value in rows.items()],
    )
