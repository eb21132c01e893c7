"""What holds for every format; what a trainer makes of its own is in `test_formats_by_*`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from causalmix_pipeline.adapters import export_sample
from causalmix_pipeline.adapters.exporter import Exporter
from causalmix_pipeline.adapters.trainer_formats import (
    FORMATS,
    TRAINERS,
    hand_over,
    markdown_label,
)
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline.resources.serving_settings import FormatName
from causalmix_pipeline_tests.adapters.exported_pool import (
    HOSTILE,
    export_of,
    mixture_of,
    write_pool,
)

#: Budget in tokens at which rounding to whole rows stays under a thousandth of a share.
BUDGET = 3_000_000


@pytest.fixture(scope="module", params=[5, 40])
def case(request, tmp_path_factory):
    """A pool and its export: 5 or 40 domains, some without share."""
    labels = [f"domain_{d}" for d in range(request.param)]
    pool = write_pool(tmp_path_factory.mktemp("formats") / "pool", labels, n=20)
    return pool, export_of(pool, labels, mixture_of(request.param), budget=BUDGET)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_each_domain_its_share_within_a_thousandth(tmp_path, case, name):
    """A whole sample of the budget for those that need one: the copies are in it."""
    pool, export = case
    if name == "axolotl":
        export = export_of(pool, export.domains, export.mixture_D.tolist(), budget=BUDGET // 30)

    handed = hand_over(tmp_path / name, export, name, pool)

    assert handed.achieved_D.sum() == pytest.approx(1.0)
    assert np.abs(handed.achieved_D - export.mixture_D).max() < 0.001
    assert (handed.achieved_D[export.mixture_D == 0] == 0).all()


@pytest.mark.parametrize("name", TRAINERS)
def test_the_numbers_beside_a_configuration_hold_the_exact_labels(tmp_path, name):
    labels = HOSTILE
    pool = write_pool(tmp_path / "pool", labels, apart=False)
    export = export_of(pool, labels, [1 / 7] * 7, budget=3000)

    hand_over(tmp_path / "out", export, name, pool)

    told = json.loads((tmp_path / "out" / "domains.json").read_text(encoding="utf-8"))
    assert [row["domain"] for row in told["domains"]] == labels
    assert told["trainer"] == TRAINERS[name].trainer
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in readme and "\u202e" not in readme
    assert readme.count("| domain-0") == 7
    for path in (tmp_path / "out").rglob("*"):
        assert path.name.isascii() and not set(path.name) & set("<>\"' \n|;")


@pytest.mark.parametrize("name", TRAINERS)
def test_writing_twice_gives_the_same_bytes(tmp_path, case, name):
    pool, export = case
    export = export_of(pool, export.domains, export.mixture_D.tolist(), budget=5000)
    contents = []
    for _ in range(2):
        handed = hand_over(tmp_path, export, name, pool)
        contents.append({path.name: path.read_bytes() for path in handed.paths})

    assert contents[0] == contents[1]
    assert {"README.md", "domains.json"} < set(contents[0])


@pytest.mark.parametrize("name", TRAINERS)
def test_a_sample_makes_the_shares_those_of_its_own_rows(tmp_path, case, name):
    pool, export = case
    export = export_of(pool, export.domains, export.mixture_D.tolist(), budget=5000)

    handed = hand_over(tmp_path, export, name, pool, sample="parquet")

    folder = tmp_path / ("domains" if TRAINERS[name].by_domain else "sample")
    index = json.loads((folder / "index.json").read_text())
    if TRAINERS[name].unit == "rows":
        assert handed.achieved_D == pytest.approx([row["achieved"] for row in index["domains"]])
    assert list(folder.rglob("*.parquet"))


def test_rows_are_weighed_by_their_mean_tokens(tmp_path):
    """Second way: half of the tokens from rows twice as long need a third of the rows."""
    pool = write_pool(tmp_path / "pool", ["a", "b"])
    export = export_of(pool, ["a", "b"], [0.5, 0.5], budget=3000)
    mean = [source.mean_tokens for source in export.sources]

    told = hand_over(tmp_path / "out", export, "datasets", pool)

    rows = json.loads((tmp_path / "out" / "domains.json").read_text())["domains"]
    assert rows[0]["weight"] == pytest.approx(mean[1] / (mean[0] + mean[1]))
    assert told.achieved_D == pytest.approx([0.5, 0.5])


def test_a_domain_too_scarce_for_a_document_is_left_out(tmp_path):
    """It has a share below one token and no document, which no trainer could draw from."""
    pool = write_pool(tmp_path / "pool", ["a", "b"])
    export = export_of(pool, ["a", "b", "empty"], [0.6, 0.4 - 1e-6, 1e-6], budget=3000)

    for name in FORMATS:
        handed = hand_over(tmp_path / name, export, name, pool)
        assert handed.achieved_D[2] <= 1e-6, name


#: Formats that may be written without a sample, and where one of theirs is.
SAMPLED = [(name, "domains" if name in TRAINERS and TRAINERS[name].by_domain else "sample")
           for name in FORMATS if name != "axolotl"]  # fmt: skip


def named_paths(folder: Path) -> str:
    """All that the configuration in a folder says."""
    return "".join(
        path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".yaml")
    )


@pytest.mark.parametrize("change", ["mixture", "budget", "seed", "fingerprints", "a lost file"])
def test_a_sample_of_another_export_is_removed_and_never_named(tmp_path, change):
    pool = write_pool(tmp_path / "pool", ["a", "b"])
    old = export_of(pool, ["a", "b"], [0.5, 0.5], budget=3000)
    hand_over(tmp_path / "out", old, "trl", pool, sample="parquet")
    new = {
        "mixture": export_of(pool, ["a", "b"], [0.4, 0.6], budget=3000),
        "budget": export_of(pool, ["a", "b"], [0.5, 0.5], budget=3001),
        "seed": export_of(pool, ["a", "b"], [0.5, 0.5], budget=3000, seed=1),
        "fingerprints": replace(old, fingerprints={"pool": "another"}),
    }.get(change, old)
    if change == "a lost file":
        (tmp_path / "out" / "domains" / "b" / "part-00000.parquet").unlink()

    handed = hand_over(tmp_path / "out", new, "trl", pool)

    assert handed.export.sample is None
    assert "/domains/" not in named_paths(tmp_path / "out")
    assert not (tmp_path / "out" / "domains").exists()
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(("name", "place"), SAMPLED)
def test_a_sample_of_this_very_export_is_kept_and_named(tmp_path, name, place):
    pool = write_pool(tmp_path / "pool", ["a", "b"], apart=False)
    export = export_of(pool, ["a", "b"], [0.5, 0.5], budget=3000)
    first = hand_over(tmp_path / "out", export, name, pool, sample="parquet")
    before = {path: path.read_bytes() for path in first.paths}

    again = hand_over(tmp_path / "out", export, name, pool)

    assert (tmp_path / "out" / place / "index.json").is_file()
    assert again.export.sample == "parquet"
    assert again.achieved_D.tolist() == first.achieved_D.tolist()
    assert {path: path.read_bytes() for path in again.paths} == before


def test_a_folder_of_a_users_own_stays(tmp_path):
    pool = write_pool(tmp_path / "pool", ["a", "b"])
    (tmp_path / "out" / "domains").mkdir(parents=True)
    (tmp_path / "out" / "domains" / "notes.txt").write_text("mine")

    hand_over(tmp_path / "out", export_of(pool, ["a", "b"], [0.5, 0.5], budget=900), "trl", pool)

    assert (tmp_path / "out" / "domains" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_swapped", [True, False])
def test_an_end_at_the_swap_leaves_no_configuration_of_another_sample(
    tmp_path, name, is_swapped, monkeypatch
):
    pool = write_pool(tmp_path / "pool", ["a", "b"])
    old = export_of(pool, ["a", "b"], [0.5, 0.5], budget=900)
    written = hand_over(tmp_path / "out", old, name, pool, sample="jsonl").paths
    swap = export_sample._put_in_place

    def end(whole, place):
        if is_swapped:
            swap(whole, place)
        raise KeyboardInterrupt

    monkeypatch.setattr(export_sample, "_put_in_place", end)
    with pytest.raises(KeyboardInterrupt):
        new = export_of(pool, ["a", "b"], [0.5, 0.5], budget=5000)
        hand_over(tmp_path / "out", new, name, pool, sample="jsonl")

    assert not any(path.exists() for path in written)


def test_a_sample_that_cant_be_written_leaves_the_old_one_and_its_configuration(tmp_path):
    pool = write_pool(tmp_path / "pool", ["a", "b"])
    export = export_of(pool, ["a", "b"], [0.5, 0.5], budget=5000)
    written = hand_over(tmp_path / "out", export, "trl", pool, sample="jsonl").paths
    (tmp_path / "pool" / "00-one.jsonl").unlink()

    with pytest.raises(PoolError):
        hand_over(tmp_path / "out", export, "trl", pool, sample="jsonl")

    assert all(path.is_file() for path in written)


def test_every_trainer_is_an_exporter_and_a_setting():
    assert all(isinstance(trainer, Exporter) for trainer in TRAINERS.values())
    assert get_args(FormatName) == FORMATS


def test_an_unknown_format_is_refused(tmp_path, case):
    pool, export = case

    with pytest.raises(ConfigError, match=r"format must be one of json, datasets.*got 'nemo'"):
        hand_over(tmp_path, export, "nemo", pool)


def test_a_label_is_one_line_of_text_in_markdown():
    assert markdown_label("a|b\n<c>\u202e é") == "a&#124;b&#92;n&#60;c&#62;&#92;u202e é"
    assert len(markdown_label("W" * 300)) == 60
