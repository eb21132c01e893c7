"""`causalmix export` on a finished project: from stored assets, refreshing nothing."""

import json
import re
from pathlib import Path

import polars as pl
import pytest
import yaml

from causalmix_pipeline.adapters.trainer_formats import FORMATS
from causalmix_pipeline.cli_export import one_line
from causalmix_pipeline_tests.test_cli import call, in_a_folder_of_its_own  # noqa: F401


def state_of(folder: Path) -> dict[str, float]:
    """When each file below a folder was changed."""
    return {str(p): p.stat().st_mtime for p in folder.rglob("*") if p.is_file()}


def test_every_format_is_written_into_a_folder_of_its_name(finished):
    data = finished.parent / "data"
    before = state_of(data / "assets")

    for name in FORMATS:
        status, text = call("export", "--format", name, "--config", str(finished))
        assert status == 0, text
        assert f"data/export/{name}" in text

    assert {path.name for path in (data / "export").iterdir() if path.is_dir()} == set(FORMATS)
    assert state_of(data / "assets") == before


@pytest.mark.parametrize("tokens", [1500, 60_000], ids=["smaller", "larger than the pool"])
def test_a_sample_has_the_tokens_that_were_asked_for(finished, tokens):
    status, text = call(
        "export", "--tokens", str(tokens), "--sample", "parquet", "--out", "here", "-c",
        str(finished),
    )  # fmt: skip

    assert status == 0, text
    manifest = pl.read_parquet("here/manifest.parquet")
    index = json.loads(Path("here/sample/index.json").read_text())
    rows = pl.read_parquet("here/sample/part-*.parquet")
    assert rows.height == manifest["copies"].sum() == index["rows"]
    assert abs(index["tokens"] - tokens) <= 3 * max(manifest["n_tokens"].to_list())
    told = re.search(r"Sample: ([\d,]+) rows of ([\d,]+) documents, ([\d,]+) tokens", text)
    assert told is not None
    assert [int(n.replace(",", "")) for n in told.groups()] == [
        rows.height, manifest.height, index["tokens"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_budget_too_small_for_a_document_is_refused_in_every_format(finished, name):
    status, text = call("export", "--format", name, "--tokens", "1", "--out", "here", "-c",
                        str(finished))  # fmt: skip

    assert status == 2
    assert "must hold at least one document" in text and "got 1 tokens: raise --tokens" in text
    assert not Path("here").exists()


def test_a_label_is_one_short_line_on_the_screen():
    assert one_line("a\nb\u202ec") == "a?b?c"
    assert one_line("W" * 300) == "W" * 39 + "…"


def test_a_project_without_a_recommendation_is_told_to_refresh(project_file):
    status, text = call("export", "--config", str(project_file))

    assert status == 2
    assert "recommended_mixture was never made: run `causalmix refresh` first" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "nemo"], "--format must be one of json, datasets"),
        (["--sample", "csv"], "--sample must be one of jsonl, parquet, got 'csv'"),
        (["--tokens", "0"], "--tokens"),
        (["--pool", "web"], "must be one of pools.live"),
        (["--out", "causalmix.yaml"], "must be a folder, got a file"),
    ],
)
def test_what_cant_be_done_is_refused_before_any_work(project_file, arguments, message):
    status, text = call("export", *arguments, "--config", str(project_file))

    assert status == 2
    assert message in text


def test_each_of_several_pools_has_an_export_of_its_own(finished):
    """Stored values stand below the pool's name, as its own runs put them."""
    raw = yaml.safe_load(finished.read_text())
    raw["pools"]["live"] = {"web": "live"}
    finished.write_text(yaml.safe_dump(raw))
    assets = finished.parent / "data" / "assets"
    for name in ("recommended_mixture", "live_documents"):
        (assets / name).mkdir()
        (assets / f"{name}.parquet").rename(assets / name / "web.parquet")

    status, text = call("export", "--format", "trl", "--pool", "web", "-c", str(finished))

    assert status == 0, text
    assert (finished.parent / "data" / "export" / "web" / "trl" / "mixture.yaml").is_file()
    status, text = call("export", "--format", "trl", "-c", str(finished))
    assert status == 2 and "name one" in text
