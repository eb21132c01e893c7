"""The demo pool: the same everywhere, nothing leaks, and the live pool's story can be replayed."""

import importlib.metadata
import json
from collections import Counter
from pathlib import Path

import pytest

from causalmix_pipeline.adapters import demo_pool
from causalmix_pipeline.adapters.demo_pool import (
    EVAL_CHARS,
    MARKER,
    MIN_CHARS,
    POOL_SHA256,
    SOURCES,
    DemoPool,
    assemble_demo_pool,
    drop_into_live,
    pool_sha256,
    reset_live,
)
from causalmix_pipeline.adapters.demo_sources import MAX_CHARS, PINNED
from causalmix_pipeline.adapters.ngram_overlap import count_shared_ngrams
from causalmix_pipeline.core.errors import PoolError

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.fixture(scope="session")
def told():
    """What the first assembly told its caller."""
    return []


@pytest.fixture(scope="session")
def pool(tmp_path_factory, told) -> DemoPool:
    """The real pool, assembled once a session, about 20 s."""
    root = tmp_path_factory.mktemp("demo") / "pool"
    return assemble_demo_pool(root, progress=lambda fraction, what: told.append((fraction, what)))


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A pool of made-up items through the same assembly, in milliseconds."""
    items = {
        source: [
            (f"{source}-{group:02d}", _sentence(source, group, item))
            for group in range(20)
            for item in range(12)
        ]
        for sources in SOURCES.values()
        for source in sources
    }
    monkeypatch.setattr(demo_pool, "read_sources", lambda tell: items)
    monkeypatch.setattr(demo_pool, "other_languages", lambda: [("de", "Guten Tag. " * 40)])
    root = tmp_path / "small"
    assemble_demo_pool(root, check=False)
    return root


def _sentence(source: str, group: int, item: int) -> str:
    return " ".join(f"{source}{group}x{item}y{word}" for word in range(12))


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _texts(folder: Path) -> list[str]:
    return [row["text"] for path in sorted(folder.rglob("*.jsonl")) for row in _rows(path)]


def _content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------------------- the real pool


def test_the_pool_has_the_sha256_that_the_module_names(pool):
    """Counted again from the files on disk, not taken from the marker."""
    content = _content(pool.root)
    marker = json.loads(content.pop(MARKER))

    assert pool_sha256(content) == pool.sha256 == marker["sha256"] == POOL_SHA256
    assert marker["files"] == {name: len(data) for name, data in content.items()}
    assert marker["packages"] == PINNED


def test_evaluation_text_shares_no_13_gram_with_any_training_document(pool):
    training = [
        text for part in ("experiment", "live", "drops") for text in _texts(pool.root / part)
    ]
    evaluation = _texts(pool.eval_dir)

    assert count_shared_ngrams(training, evaluation) == 0
    assert count_shared_ngrams([*training, evaluation[7]], evaluation) > 100


def test_no_group_stands_in_both_training_and_evaluation(pool):
    for domain, sources in SOURCES.items():
        held_out = {row["group"] for row in _rows(pool.eval_dir / f"{domain}.jsonl")}
        for part in ("experiment", "live"):
            for source in sources:
                rows = _rows(pool.root / part / domain / f"{source}.jsonl")
                assert held_out.isdisjoint(row["group"] for row in rows)


def test_each_domain_has_two_sources_of_about_equal_size(pool):
    assert sorted(path.name for path in pool.experiment_dir.iterdir()) == sorted(SOURCES)
    assert pool.domains == tuple(SOURCES)
    for domain, sources in SOURCES.items():
        folder = pool.experiment_dir / domain
        sizes = [sum(map(len, _texts_of(folder / f"{source}.jsonl"))) for source in sources]
        assert sorted(path.stem for path in folder.iterdir()) == sorted(sources)
        assert max(sizes) < 1.5 * min(sizes)
        assert min(sizes) > (100_000 if domain == "dialogue" else 600_000)


def _texts_of(path: Path) -> list[str]:
    return [row["text"] for row in _rows(path)]


def test_the_experiment_pool_holds_no_exact_copy(pool):
    texts = _texts(pool.experiment_dir)

    assert len(set(texts)) == len(texts)


def test_every_document_has_text_and_group_and_a_length_within_bounds(pool):
    for path in sorted(pool.root.rglob("*.jsonl")):
        rows = _rows(path)
        assert rows
        for row in rows:
            assert set(row) == {"text", "group"}
            assert row["group"]
            assert MIN_CHARS <= len(row["text"]) <= MAX_CHARS


def test_evaluation_text_is_neither_too_short_to_measure_nor_much_of_the_pool(pool):
    for domain in SOURCES:
        assert 40_000 < sum(map(len, _texts_of(pool.eval_dir / f"{domain}.jsonl"))) < 170_000


def test_evaluation_text_comes_from_both_sources_half_and_half(small):
    for domain, (first, second) in SOURCES.items():
        sizes = Counter()
        for row in _rows(small / "eval" / f"{domain}.jsonl"):
            sizes[row["group"].rpartition("-")[0]] += len(row["text"])
        assert set(sizes) == {first, second}
        assert 0.5 < sizes[first] / sizes[second] < 2


def test_a_row_ends_at_a_line_feed_only(pool):
    """Other line ends inside a text would cut its row for readers that split at all of them."""
    for path in sorted(pool.root.rglob("*.jsonl")):
        text = path.read_bytes().decode("utf-8")
        assert text.splitlines() == text.removesuffix("\n").split("\n")


def test_two_sources_of_a_domain_use_different_words(pool):
    """Else a blend of them would be no state of its own: a third of the words' mass differs."""
    for domain, sources in SOURCES.items():
        shares = []
        for source in sources:
            words = Counter(
                " ".join(_texts_of(pool.experiment_dir / domain / f"{source}.jsonl")).split()
            )
            total = sum(words.values())
            shares.append({word: count / total for word, count in words.items()})
        overlap = sum(min(share, shares[1].get(word, 0.0)) for word, share in shares[0].items())
        assert overlap < 0.67, domain


def test_no_line_heads_every_document_of_a_source(pool):
    """Boilerplate would be what a proxy learns first."""
    for path in sorted(pool.experiment_dir.rglob("*.jsonl")):
        texts = _texts_of(path)
        heads = Counter(text.split("\n")[0] for text in texts)
        assert heads.most_common(1)[0][1] < 0.2 * len(texts), path


def test_the_live_pool_starts_smaller_and_mostly_from_the_first_source(pool):
    for domain, (first, second) in SOURCES.items():
        folder = pool.root / "live" / domain
        sizes = [sum(map(len, _texts_of(folder / f"{name}.jsonl"))) for name in (first, second)]
        assert 0.8 < sizes[0] / sum(sizes) < 0.92
        source = pool.experiment_dir / domain / f"{first}.jsonl"
        assert sum(sizes) < 0.75 * sum(map(len, _texts_of(source)))


def test_live_pool_and_drop_bring_documents_the_experiment_never_saw(pool):
    seen = set(_texts(pool.experiment_dir))
    live = set(_texts(pool.root / "live"))
    dropped = set(_texts(pool.root / "drops" / "within_reach"))

    assert 0.1 < len(live - seen) / len(live) < 0.7
    assert len(dropped - seen - live) > 300


def test_the_drop_within_reach_grows_second_sources_and_shrinks_a_domain(pool):
    drop, live = pool.root / "drops" / "within_reach", pool.root / "live"
    for domain in ("math", "code_reasoning", "manuals"):
        name = f"{domain}/{SOURCES[domain][1]}.jsonl"
        assert set(_texts_of(live / name)) < set(_texts_of(drop / name))
        assert len(_texts_of(drop / name)) > 2 * len(_texts_of(live / name))
    chat = _texts_of(drop / "dialogue/chat.jsonl")
    assert len(chat) < 0.7 * len(_texts_of(live / "dialogue/chat.jsonl"))
    articles = _texts_of(drop / "encyclopedia/articles.jsonl")
    assert 0 < len(articles) - len(set(articles)) < 0.06 * len(articles)


def test_the_drop_out_of_reach_is_noise_and_other_languages(pool):
    drop = pool.root / "drops" / "out_of_reach"
    clean = _texts_of(pool.root / "live/manuals/sympy_reference.jsonl")
    noisy = _texts_of(drop / "manuals/sympy_reference.jsonl")
    foreign = " ".join(_texts_of(drop / "dialogue/other_languages.jsonl"))

    assert [len(text) for text in noisy] == [len(text) for text in clean]
    kept = sum(a == b for x, y in zip(clean, noisy, strict=True) for a, b in zip(x, y, strict=True))
    assert 0.55 < kept / sum(map(len, clean)) < 0.65
    assert foreign.count("ich ") > 20
    assert sum("\u3040" <= letter <= "\u30ff" for letter in foreign) > 1000


def test_progress_rises_to_one_and_names_the_sources(pool, told):
    fractions = [fraction for fraction, _ in told]

    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert {f"reading {source}" for pair in SOURCES.values() for source in pair} <= {
        what for _, what in told
    }


def test_a_complete_pool_is_reused_without_being_read(pool, monkeypatch):
    monkeypatch.setattr(demo_pool, "read_sources", None)
    told = []

    again = assemble_demo_pool(pool.root, progress=lambda *step: told.append(step))

    assert again.reused
    assert not pool.reused
    assert (again.sha256, again.domains) == (pool.sha256, pool.domains)
    assert told == [(1.0, "demo pool is there")]


# ---------------------------------------------------------------------------- assembling


def test_the_same_items_give_the_same_bytes(small, tmp_path):
    again = assemble_demo_pool(tmp_path / "again", check=False)

    assert _content(again.root) == _content(small)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("{}\n")])
def test_a_pool_with_a_missing_or_cut_file_is_assembled_again(small, harm):
    before = _content(small)
    harm(small / "eval/math.jsonl")

    again = assemble_demo_pool(small, check=False)

    assert not again.reused
    assert _content(small) == before


def test_nothing_but_the_pool_is_left_beside_it(small):
    assert [path.name for path in small.parent.iterdir()] == ["small"]
    assert not [path for path in small.rglob("*") if path.name.endswith(".tmp")]


def test_a_failed_write_leaves_the_old_pool_and_no_rest(small, monkeypatch):
    """The folder is swapped as a whole, after every file is on disk."""
    before = _content(small)
    (small / MARKER).write_text("{}")
    write = demo_pool._write_file

    def fail_at_the_marker(path, content):
        if path.name == MARKER:
            raise OSError("disk full")
        write(path, content)

    monkeypatch.setattr(demo_pool, "_write_file", fail_at_the_marker)
    with pytest.raises(OSError, match="disk full"):
        assemble_demo_pool(small, check=False)

    assert [path.name for path in small.parent.iterdir()] == ["small"]
    assert _content(small) == {**before, MARKER: b"{}"}


def test_another_sha256_is_refused_with_both_values_and_the_versions(small, tmp_path):
    got = json.loads((small / MARKER).read_text())["sha256"]

    with pytest.raises(PoolError) as error:
        assemble_demo_pool(tmp_path / "checked")

    assert f"must be {POOL_SHA256}, got {got}" in str(error.value)
    assert "networkx 3.6.1 (pinned 3.6.1)" in str(error.value)
    assert not (tmp_path / "checked").exists()


def test_a_pool_of_another_sha256_is_not_reused(small):
    with pytest.raises(PoolError, match="sha256 must be"):
        assemble_demo_pool(small)


def test_a_wrong_or_missing_package_is_refused_with_the_way_out(tmp_path, monkeypatch):
    version = importlib.metadata.version

    def other_versions(name):
        if name == "randfacts":
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9" if name == "sympy" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", other_versions)

    with pytest.raises(PoolError, match=r"--no-deps randfacts==0.24.4 sympy==1.14.0") as error:
        assemble_demo_pool(tmp_path / "pool")

    assert "sympy 9.9 (pinned 1.14.0)" in str(error.value)
    assert "randfacts missing (pinned 0.24.4)" in str(error.value)


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")

    with pytest.raises(PoolError, match=r"must be empty or a demo pool.*Name another folder"):
        assemble_demo_pool(tmp_path)

    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_sha256_sees_names_contents_and_where_one_file_ends():
    one = pool_sha256({"a": b"xy", "b": b"z"})

    assert one == pool_sha256({"b": b"z", "a": b"xy"})
    assert (
        len({one, pool_sha256({"a": b"x", "b": b"yz"}), pool_sha256({"c": b"xy", "b": b"z"})}) == 3
    )


# ---------------------------------------------------------------------------- shared n-grams


def test_a_near_copy_costs_the_training_item_and_common_wording_the_evaluation_item():
    train = {"s": [("a", LONG), ("a", "kept"), *(("b", f"{n} {LONG[::-1]}") for n in range(5))]}
    held_out = {"s": [("e", f"{LONG} fourteen"), ("e", f"{LONG[::-1]} end")]}

    clean, kept = demo_pool._separate(train, held_out)

    assert kept == {"s": [("e", f"{LONG} fourteen")]}
    assert clean == {"s": train["s"][1:]}


def test_a_document_whose_items_join_to_a_held_out_ngram_is_dropped():
    halves = LONG.split(" seven ")
    documents = {"s": [("a", f"{halves[0]}\n\nseven {halves[1]}"), ("a", halves[0])]}

    assert demo_pool._drop_bridges(documents, {"s": [("e", LONG)]}) == {"s": [("a", halves[0])]}


# ---------------------------------------------------------------------------- arranging


def test_groups_get_their_roles_by_the_shares():
    roles = demo_pool._roles("s", [(f"g{n}", "text") for n in range(100)])

    assert Counter(roles.values()) == {"eval": 10, "live": 10, "drop": 15, "experiment": 65}
    assert demo_pool._roles("s", [(f"g{n}", "text") for n in reversed(range(100))]) == roles
    assert demo_pool._roles("t", [(f"g{n}", "text") for n in range(100)]) != roles


def test_few_groups_still_fill_every_role():
    roles = demo_pool._roles("s", [(f"g{n}", "text") for n in range(4)])

    assert sorted(roles.values()) == ["drop", "eval", "experiment", "live"]


def test_evaluation_takes_about_as_much_of_each_group():
    items = [("big", "x" * 1000)] * 200 + [("small", "y" * 1000)] * 50

    kept = Counter(group for group, _ in demo_pool._held_out("s", items))

    assert kept == {"big": EVAL_CHARS // 2000, "small": EVAL_CHARS // 2000}


def test_packing_keeps_groups_apart_and_order_within_them():
    items = [(group, f"{group}{n:03d} " * 30) for group in "ab" for n in range(40)]

    documents = demo_pool._pack("s", items)

    assert "\n\n".join(text for _, text in documents) == "\n\n".join(text for _, text in items)
    assert all(group in text and MIN_CHARS <= len(text) <= MAX_CHARS for group, text in documents)
    assert len(documents) >= 8


def test_packing_drops_short_rests_and_copies():
    assert demo_pool._pack("s", [("a", "short")]) == []
    assert demo_pool._pack("s", [("a", "x" * 400), ("b", "x" * 400)]) == [("a", "x" * 400)]


def test_noise_replaces_two_characters_in_five_by_visible_ones():
    noisy = demo_pool._noisy("\u00e4" * 10_000, demo_pool.Random(0))

    assert 0.58 < noisy.count("\u00e4") / 10_000 < 0.62
    assert all(33 <= ord(c) <= 126 for c in set(noisy) - {"\u00e4"})


# ---------------------------------------------------------------------------- the live pool


def test_reset_makes_the_start_and_removes_every_other_file(small, tmp_path):
    live = tmp_path / "live"
    reset_live(small, live)
    (live / "math/symbolic.jsonl").write_text("edited")
    (live / "new_domain").mkdir()
    (live / "new_domain/new.jsonl").write_text("{}")

    reset_live(small, live)

    assert _content(live) == _content(small / "live")
    assert not (live / "new_domain").exists()


def test_a_drop_replaces_and_adds_files_and_reset_takes_it_back(small, tmp_path):
    live = tmp_path / "live"
    reset_live(small, live)

    changed = drop_into_live(small, live, "within_reach")
    drop_into_live(small, live, "out_of_reach")

    assert live / "math/word_problems.jsonl" in changed
    expected = _content(small / "live")
    for name in ("within_reach", "out_of_reach"):
        expected |= _content(small / "drops" / name)
    expected.pop("drop.json")
    assert _content(live) == expected
    reset_live(small, live)
    assert _content(live) == _content(small / "live")


def test_a_drop_removes_the_files_it_lists(small, tmp_path):
    """Put into a made-up drop, which changes no size that the marker knows."""
    live = tmp_path / "live"
    reset_live(small, live)
    drop = small / "drops" / "smaller"
    drop.mkdir()
    (drop / "drop.json").write_text(json.dumps({"remove": ["python/text_processing.jsonl"]}))

    changed = drop_into_live(small, live, "smaller")

    assert changed == [live / "python/text_processing.jsonl"]
    assert not changed[0].exists()
    assert (live / "python/computer_algebra.jsonl").exists()
    assert drop_into_live(small, live, "smaller") == changed


def test_dropping_twice_changes_nothing_more(small, tmp_path):
    reset_live(small, tmp_path / "live")
    drop_into_live(small, tmp_path / "live", "within_reach")
    once = _content(tmp_path / "live")

    drop_into_live(small, tmp_path / "live", "within_reach")

    assert _content(tmp_path / "live") == once


def test_no_half_written_file_is_seen_in_the_live_pool(small, tmp_path, monkeypatch):
    """Files come in by a rename of a hidden one; a kill before it leaves the old file."""
    live = tmp_path / "live"
    reset_live(small, live)
    before = _content(live)

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_pool.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_into_live(small, live, "within_reach")

    seen = {name: data for name, data in _content(live).items() if "/." not in name}
    assert seen == before
    monkeypatch.undo()
    reset_live(small, live)
    assert _content(live) == before


@pytest.mark.parametrize("name", ["nowhere", "../live", ""])
def test_an_unknown_drop_is_refused_with_the_known_ones(small, tmp_path, name):
    with pytest.raises(PoolError, match="'out_of_reach', 'within_reach'") as error:
        drop_into_live(small, tmp_path / "live", name)

    assert repr(name) in str(error.value)


def test_no_live_pool_is_made_from_an_incomplete_pool(tmp_path):
    with pytest.raises(PoolError, match="must hold a complete demo pool"):
        reset_live(tmp_path, tmp_path / "live")
    with pytest.raises(PoolError, match="Assemble it first"):
        drop_into_live(tmp_path, tmp_path / "live", "within_reach")
