"""What the asset writes and tells, by the formats of the settings."""

import json
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import yaml

from causalmix_pipeline.adapters.sealed_frames import content_digest, read_value
from causalmix_pipeline.automation.staleness import last_made, refresh
from causalmix_pipeline.cli import main
from causalmix_pipeline.definitions import build_definitions
from causalmix_pipeline.resources.instance import ensure_instance
from causalmix_pipeline.resources.settings_file import load_settings


def make_again(config, **export):
    """Make the export of a finished project with other settings; its event, and what was made."""
    raw = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(raw | {"export": export}))
    settings = load_settings(config)
    with ensure_instance(settings.data_path) as instance:
        defs = build_definitions(config)
        made = refresh(defs, instance, dg.AssetSelection.assets("training_export", "report"))
        event = last_made(instance, dg.AssetKey("training_export"), None)
        assert event is not None
        entry = instance.get_latest_materialization_event(dg.AssetKey("training_export"))
        assert entry is not None and entry.asset_materialization is not None
        return entry.asset_materialization, [key.path[-1] for key in made], settings


def test_defaults_leave_the_export_as_it_was(finished):
    """The same data version as before there were formats: digest of the manifest and the JSON."""
    folder = finished.parent / "data" / "export"
    told = json.loads((folder / "mixture.json").read_text(encoding="utf-8"))

    event, made, settings = make_again(finished, formats=["json"], tokens=None)

    manifest = read_value(Path(settings.assets_root) / "training_export.parquet")
    versions = [content_digest(manifest), told]
    assert made == []
    assert event.tags is not None
    assert event.tags["dagster/data_version"] == content_digest(versions)
    assert {path.name for path in folder.iterdir()} == {"mixture.json", "manifest.parquet"}
    assert "shares of tokens by format" not in event.metadata


def test_formats_are_written_beside_and_their_shares_told(finished):
    event, made, _ = make_again(finished, formats=["trl", "json", "axolotl"], tokens=20_000)

    folder = finished.parent / "data" / "export"
    assert made == ["training_export"]
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"trl", "axolotl"}
    told = json.loads((folder / "mixture.json").read_text(encoding="utf-8"))
    assert told["budget_tokens"] == 20_000
    rows = (folder / "axolotl" / "sample" / "part-00000.jsonl").read_bytes().count(b"\n")
    manifest = pl.read_parquet(folder / "manifest.parquet")
    assert rows == manifest["copies"].sum()
    table = event.metadata["shares of tokens by format"].value
    assert "asked" in str(table) and "axolotl" in str(table)
    worst = event.metadata["largest deviation of a share"].value
    assert isinstance(worst, float) and 0 <= worst < 0.01


def test_a_sample_of_a_command_with_another_budget_is_never_named_by_the_asset(finished):
    folder = finished.parent / "data" / "export" / "trl"
    arguments = ["--format", "trl", "--sample", "parquet", "--tokens", "30000"]
    assert main(["export", *arguments, "--config", str(finished)]) == 0
    assert "domains/" in (folder / "mixture.yaml").read_text()

    make_again(finished, formats=["trl"], tokens=20_000)

    read = yaml.safe_load((folder / "mixture.yaml").read_text())
    assert all("fraction" in part for part in read["datasets"])
    assert not (folder / "domains").exists()


@pytest.mark.parametrize("formats", [["nemo"], "trl"])
def test_unknown_formats_are_refused_with_the_known_ones(project_file, formats):
    raw = yaml.safe_load(project_file.read_text())
    project_file.write_text(yaml.safe_dump(raw | {"export": {"formats": formats}}))

    with pytest.raises(ValueError, match=r"export\.formats"):
        load_settings(project_file)
