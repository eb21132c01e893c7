import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalmix_pipeline.adapters.exporter import (
    MANIFEST_COLUMNS,
    Export,
    Exporter,
    ManifestExporter,
    count_copies,
    make_export,
)
from causalmix_pipeline.core.errors import ConfigError, PoolError

lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=60)


def documents_of(n_tokens: dict[str, list[int]]) -> pl.DataFrame:
    """A documents frame with the columns that an export reads."""
    rows = [
        {
            "document_id": f"{d:02d}{i:030d}",
            "domain": domain,
            "source": "first",
            "file": f"{domain}/first.jsonl",
            "row": i,
            "augmented": False,
            "n_tokens": n,
            "copies": 1,
        }
        for d, (domain, tokens) in enumerate(n_tokens.items())
        for i, n in enumerate(tokens)
    ]
    return pl.DataFrame(rows)


POOL = documents_of({"math": [100] * 40, "prose": [250] * 30})


def export_of(mixture, budget, documents=POOL, seed=0) -> Export:
    return make_export(
        mixture, ["math", "prose"], documents, budget_tokens=budget, seed=seed,
        verdict="supported", fingerprints={},
    )  # fmt: skip


@given(lengths, st.floats(0, 50_000))
def test_a_domains_tokens_hit_their_target_within_one_document(n_tokens, target):
    copies = count_copies(np.array(n_tokens), target, rng_seed=[0])

    assert abs((copies * np.array(n_tokens)).sum() - target) <= max(n_tokens)


@given(lengths, st.floats(0, 50_000), st.integers(0, 5))
def test_no_document_is_read_two_times_more_than_another(n_tokens, target, seed):
    """Whole passes and one partial pass: copies differ by at most one."""
    copies = count_copies(np.array(n_tokens), target, rng_seed=[seed])

    assert copies.max() - copies.min() <= 1


@given(
    st.lists(lengths, min_size=2, max_size=4),
    st.integers(12_000, 200_000),  # a share of a quarter is a document of the longest
    st.integers(0, 3),
)
def test_every_domain_of_an_export_gets_its_share_of_the_budget(pool, budget, seed):
    names = [f"d{i}" for i in range(len(pool))]
    documents = documents_of(dict(zip(names, pool, strict=True)))
    mixture = np.random.default_rng(seed).dirichlet(np.ones(len(pool)))

    export = make_export(
        mixture, names, documents, budget_tokens=budget, seed=seed, verdict="supported",
        fingerprints={},
    )  # fmt: skip

    for d, domain in enumerate(names):
        got = export.to_dict()["tokens"][domain]
        assert abs(got - mixture[d] * budget) <= max(pool[d])


def test_the_same_seed_reads_the_same_documents_and_another_seed_others():
    first, again = export_of([0.5, 0.5], 3000), export_of([0.5, 0.5], 3000)
    other = export_of([0.5, 0.5], 3000, seed=1)

    assert first.manifest.equals(again.manifest)
    assert not first.manifest.equals(other.manifest)


def test_the_order_of_the_frame_doesnt_matter():
    shuffled = export_of([0.5, 0.5], 3000, POOL.sample(fraction=1.0, shuffle=True, seed=3))

    assert shuffled.manifest.equals(export_of([0.5, 0.5], 3000).manifest)


def test_noisy_twins_are_never_exported():
    twins = POOL.with_columns(augmented=pl.lit(True), document_id="t" + pl.col("document_id"))

    export = export_of([0.5, 0.5], 100_000, pl.concat([POOL, twins]))

    assert not export.manifest["document_id"].str.starts_with("t").any()


def test_files_hold_what_the_trainer_needs(tmp_path):
    export = make_export(
        [0.75, 0.25], ["math", "prose"], POOL, budget_tokens=8000, seed=4, verdict="extrapolating",
        fingerprints={"live pool": "abc"},
    )  # fmt: skip

    ManifestExporter().write(tmp_path / "export", export)

    decided = json.loads((tmp_path / "export" / "mixture.json").read_text())
    manifest = pl.read_parquet(tmp_path / "export" / "manifest.parquet")
    assert decided["weights"] == {"math": 0.75, "prose": 0.25}
    assert decided["unit"] == "share of training tokens"
    assert decided["tokens"] == {"math": 6000, "prose": 2000}
    assert decided["epochs"] == {"math": 1.5, "prose": pytest.approx(2000 / 7500)}
    assert (decided["seed"], decided["verdict"]) == (4, "extrapolating")
    assert decided["fingerprints"] == {"live pool": "abc"}
    assert manifest.columns == list(MANIFEST_COLUMNS)
    assert set(manifest.filter(pl.col("domain") == "math")["copies"]) == {1, 2}


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_else(tmp_path):
    export = export_of([0.5, 0.5], 3000)
    contents = []
    for _ in range(2):
        ManifestExporter().write(tmp_path, export)
        contents.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})

    assert contents[0] == contents[1]
    assert set(contents[0]) == {"mixture.json", "manifest.parquet"}


def test_another_format_needs_one_method(tmp_path):
    class Names:
        def write(self, folder, export):
            folder.mkdir(exist_ok=True)
            (folder / "names.txt").write_text("\n".join(export.domains))
            return [folder / "names.txt"]

    assert isinstance(Names(), Exporter)
    assert Names().write(tmp_path, export_of([0.5, 0.5], 1000)) == [tmp_path / "names.txt"]


def test_a_domain_without_share_may_be_empty():
    export = export_of([1.0, 0.0], 1000, documents_of({"math": [100] * 40}))

    assert export.to_dict()["tokens"] == {"math": 1000, "prose": 0}
    assert export.to_dict()["epochs"]["prose"] == 0.0


def test_a_share_of_an_empty_domain_is_refused():
    with pytest.raises(PoolError, match=r"'prose' must have documents for its share of 0\.5"):
        export_of([0.5, 0.5], 1000, documents_of({"math": [100] * 40}))


def test_a_mixture_off_the_simplex_is_refused():
    with pytest.raises(ConfigError, match=r"mixture must be shares.*sum 1\.2"):
        export_of([0.6, 0.6], 1000)


def test_a_budget_below_one_token_is_refused():
    with pytest.raises(ConfigError, match=r"budget_tokens must be >= 1, got 0"):
        export_of([0.5, 0.5], 0)


@pytest.mark.parametrize("budget", [1, 4, 80])
def test_a_budget_that_no_document_fits_is_refused_with_the_way_out(budget):
    """A document of 100 tokens is further from half of the budget than none."""
    with pytest.raises(ConfigError, match=rf"hold .* one document .*got {budget} tokens: raise"):
        export_of([0.5, 0.5], budget)
