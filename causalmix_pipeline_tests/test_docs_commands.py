"""What README and docs say to do works: each fenced block runs in a small finished project."""

import csv
import re
import shutil
from pathlib import Path

import pytest
from rich.table import Table

from causalmix_pipeline import console
from causalmix_pipeline.adapters.sealed_frames import read_value
from causalmix_pipeline.core.errors import ConfigError
from causalmix_pipeline.core.runs import RunTable
from causalmix_pipeline.histories import export_runs
from causalmix_pipeline.profiling import SHOWN
from causalmix_pipeline.reference_columns import PRINTED, WRITTEN, Column
from causalmix_pipeline.resources.study_settings import DEFAULT_COVARIATES
from causalmix_pipeline_tests.conftest import WORDS
from causalmix_pipeline_tests.doc_pages import (
    LANGUAGES,
    MAKE_TARGETS,
    PAGES,
    ROOT,
    RUN_ELSEWHERE,
    Block,
    Reader,
    blocks_of,
    check_command,
    inline_commands,
)

TO_DO = [page for page in PAGES if {b.language for b in blocks_of(page.read_text())} - {"text"}]

#: Pages whose settings are written into the project before the commands that follow. Those of the
#: others ask for what a small machine or a tiny project hasn't: clusters, GPUs, a database, files.
APPLIED = {"docs/howto/several-pools.md"}

#: Tables that a page's own Python makes.
GIVEN = {"ratios.csv", "metrics.csv", "covariates.csv", "pools.csv", "march-metrics.csv",
         "march-covariates.csv"}  # fmt: skip

#: Names from data in the tables that are printed here: those of the project, and of the tables.
NAMES = {
    "domain": [*WORDS, "web"],
    "task": ["math", "code"],
    "metric": ["code_loss", "math_loss"],
    "covariate": [*SHOWN, *DEFAULT_COVARIATES],
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def folder(finished, monkeypatch) -> Path:
    """A finished project in the places that the pages name, and where commands are called."""
    root = finished.parent
    monkeypatch.chdir(root)
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("pool", "web", "longcot"):
        shutil.copytree(root / "live", root / "data" / name)
    shutil.copytree(root / "experiment", root / "data" / "experiment")
    shutil.copy(root / "data/reports/report.html", root / "data/reports/demo_1.html")
    write_runs_of_others(root)
    return root


def write_runs_of_others(root: Path) -> None:
    """The project's own runs as another team would hand them over, math by a name of its own."""
    runs = RunTable.from_frame(read_value(root / "data" / "assets" / "run_table.parquet"))
    (root / "elsewhere").mkdir()
    export_runs(runs, dict.fromkeys(runs.tasks, "minimize"), root / "elsewhere")
    metrics = root / "elsewhere" / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("math", "math_bpb", 1))


@pytest.fixture
def tables_made(monkeypatch) -> dict[int, list[str]]:
    """The heads of the tables that are made, by table; filled as their columns are added."""
    found: dict[int, list[str]] = {}
    tables: list[Table] = []  # kept, so that no number is given twice
    add_column = Table.add_column

    def added(table: Table, header="", *args, **options) -> None:
        if table.show_header and header:
            tables.append(table)
            found.setdefault(id(table), []).append(str(header))
        add_column(table, header, *args, **options)

    monkeypatch.setattr(Table, "add_column", added)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_names_its_language(page):
    for block in blocks_of(page.read_text()):
        assert block.language in LANGUAGES, f"line {block.line}: {block.language!r}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_command_in_running_text_exists_with_its_options(page):
    for words in inline_commands(page.read_text()):
        check_command(words)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", TO_DO, ids=name_of)
def test_a_page_can_be_followed(page, folder, monkeypatch, tables_made):
    reader = Reader(folder, monkeypatch.setenv, applies=name_of(page) in APPLIED)

    for block in blocks_of(page.read_text()):
        reader.follow(block)

    assert [head for head in tables_made.values() if not is_documented(head, PRINTED)] == []
    written = [path for pattern in ("*.csv", "runs/*.csv") for path in folder.glob(pattern)]
    made = [path for path in written if path.name not in GIVEN or path.parent != folder]
    assert [path.name for path in made if not is_documented(head_of(path), WRITTEN)] == []


def head_of(path: Path) -> list[str]:
    with open(path) as lines:
        return next(csv.reader(lines))


def is_documented(head: list[str], tables: dict[str, tuple[Column, ...]]) -> bool:
    """Whether a table of the reference has all these columns."""
    return any(all(is_named(name, columns) for name in head) for columns in tables.values())


def is_named(name: str, columns: tuple[Column, ...]) -> bool:
    """Whether one of the columns is this; `<...>` stands for names from data."""

    def names(found: re.Match) -> str:
        if found[1] == "N":
            return r"[\d,]+"
        return "(" + "|".join(map(re.escape, NAMES[found[1]])) + ")"

    patterns = (re.sub(r"<(\w+)>", names, re.escape(column.name)) for column in columns)
    return any(re.fullmatch(pattern + r"( \(reference\))?", name) for pattern in patterns)


@pytest.mark.parametrize(
    ("where", "table"),
    [
        ("signal of the proxy runs (`causalmix demo`)",
         lambda: console.signal_table({"noise_floor": []}, {})),
        ("estimators (`causalmix demo`)", lambda: console.estimator_table({"scores": []}, [])),
        ("what moved (`causalmix demo`)", lambda: console.moved_table([])),
        ("before and after (`causalmix demo`)",
         lambda: console.before_after_table(
             {"domains": [], "mixtures": {"recommended": []}},
             {"domains": [], "mixtures": {"recommended": [], "natural": []}})),
        ("planned top-up runs (`causalmix demo`)",
         lambda: console.top_up_table({"top_up": [], "domains": ["math"]})),
        ("power (`causalmix plan`)", lambda: console.power_table([], 128, [64])),
        ("`causalmix covariates`", lambda: console.choice_table({"table": []})),
        ("`causalmix status` and `refresh`, several live pools", lambda: console.pools_table([])),
    ],
)  # fmt: skip
def test_the_columns_of_a_printed_table_are_those_of_the_reference(where, table):
    head = [str(column.header) for column in table().columns]

    assert len(head) <= len(PRINTED[where]) + 1
    for name in head:
        assert is_named(name, PRINTED[where]), name
    for column in PRINTED[where]:
        assert any(is_named(name, (column,)) for name in head), column.name


@pytest.mark.parametrize("named", sorted({*MAKE_TARGETS.values(), *RUN_ELSEWHERE.values()}))
def test_what_isnt_run_here_is_run_by_a_test_that_exists(named):
    file, _, function = named.partition("::")

    text = (ROOT / "causalmix_pipeline_tests" / file).read_text()

    assert f"def {function}(" in text if function else text


@pytest.mark.parametrize(
    "line",
    [
        "causalmix refrehs",
        "causalmix refresh --trian",
        "make demmo",
        "pip install 'causalmix_pipeline[postgress]'",
        "causalmix profile nowhere",
        "curl https://example.com",
    ],
)
def test_a_command_that_fails_is_found(line, folder, monkeypatch):
    reader = Reader(folder, monkeypatch.setenv, applies=False)

    with pytest.raises(AssertionError):
        reader.follow(Block("sh", line + "\n", 1))


@pytest.mark.parametrize("setting", ["polcy: {}", "policy: {trust_radius: far}"])
def test_a_setting_that_isnt_one_is_found(setting, folder, monkeypatch):
    reader = Reader(folder, monkeypatch.setenv, applies=False)

    with pytest.raises(ConfigError):
        reader.follow(Block("yaml", f"# causalmix.yaml\n{setting}\n", 1))


def test_a_block_without_end_is_found():
    with pytest.raises(AssertionError, match="line 0"):
        blocks_of("```sh\ncausalmix status\n")
