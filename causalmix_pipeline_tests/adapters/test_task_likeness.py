"""Documents that are like a task's text are told from others, damaged ones, and other tasks'."""

import pickle
import random

import numpy as np
import pytest

from causalmix_pipeline.adapters.task_likeness import FEWEST_PIECES, TaskLikeScorer, mean_bits
from causalmix_pipeline.adapters.tokenizer import encode_texts, train_tokenizer, vocab_size_of
from causalmix_pipeline.core.errors import ScoringError
from causalmix_pipeline_tests.adapters.scored_frames import HARD_TEXTS, frame_of

SENTENCES = {
    "sums": "the sum of {} and {} is {} , so the answer is {}",
    "talk": "hello {} , how was the weather with {} and {} near {} today ?",
    "laws": "section {} : whoever breaks rule {} or rule {} pays {} crowns",
}


def write_text(kind: str, seed: int, n_sentences: int = 30) -> str:
    rng = random.Random(f"{kind}{seed}")
    numbers = [[rng.randint(2, 99) for _ in range(4)] for _ in range(n_sentences)]
    return " . ".join(SENTENCES[kind].format(*four) for four in numbers)


def damaged(text: str) -> str:
    letters = list(text)
    random.Random(0).shuffle(letters)
    return "".join(letters)


TEXTS = {kind: [write_text(kind, seed) for seed in range(12)] for kind in SENTENCES}
TOKENIZER = train_tokenizer([t for texts in TEXTS.values() for t in texts], vocab_size=400)
HELD_OUT = {kind: [write_text(kind, 100 + seed) for seed in range(12)] for kind in ("sums", "talk")}


@pytest.fixture
def scorer(tmp_path) -> TaskLikeScorer:
    return TaskLikeScorer.write(tmp_path, TOKENIZER, HELD_OUT)


def test_new_text_of_a_tasks_kind_is_like_it_and_nothing_else_is(scorer):
    kinds = [kind for kind in SENTENCES for _ in range(12)]
    found = scorer.score(frame_of(*(text for texts in TEXTS.values() for text in texts)))

    assert scorer.metrics == ("task_like_sums", "task_like_talk")
    for task in HELD_OUT:
        share = {
            kind: np.mean(
                [v for v, k in zip(found[f"task_like_{task}"], kinds, strict=True) if k == kind]
            )
            for kind in SENTENCES
        }
        assert share[task] > 0.8
        assert all(share[kind] == 0 for kind in SENTENCES if kind != task)


def test_damaged_text_is_like_nothing(scorer):
    found = scorer.score(frame_of(*(damaged(text) for text in TEXTS["sums"])))

    assert found.select("task_like_sums", "task_like_talk").sum().row(0) == (0, 0)


def test_bits_are_those_of_the_pairs_by_hand():
    table_VV = np.arange(9, dtype=np.float32).reshape(3, 3)

    found_T = mean_bits(np.array([0, 2, 1, 1], dtype=np.uint32), np.stack([table_VV, 2 * table_VV]))

    np.testing.assert_allclose(found_T, [(2 + 7 + 4) / 3, 2 * (2 + 7 + 4) / 3])
    assert mean_bits(np.array([1], dtype=np.uint32), table_VV[None]).tolist() == [np.inf]


def test_strange_texts_have_a_value_and_too_short_ones_are_like_nothing(scorer):
    found = scorer.score(frame_of(*HARD_TEXTS, "", "a"))

    assert found.null_count().sum_horizontal().item() == 0
    assert found["task_like_sums"].to_list()[-2:] == [0, 0]


def test_the_order_of_a_tasks_documents_and_their_repeats_change_nothing(tmp_path, scorer):
    turned = {task: [*texts[::-1], texts[3]] for task, texts in reversed(HELD_OUT.items())}

    assert TaskLikeScorer.write(tmp_path, TOKENIZER, turned) == scorer
    changed = HELD_OUT | {"talk": HELD_OUT["talk"][:-1]}
    assert TaskLikeScorer.write(tmp_path, TOKENIZER, changed).key != scorer.key


def test_a_single_long_text_is_divided_itself(tmp_path):
    one = {"sums": [" . ".join(HELD_OUT["sums"])]}

    found = TaskLikeScorer.write(tmp_path, TOKENIZER, one).score(frame_of(*TEXTS["sums"]))

    assert found["task_like_sums"].mean() > 0.7


def test_a_task_with_too_little_text_is_named_with_the_way_out(tmp_path):
    assert vocab_size_of(TOKENIZER) <= 400
    short = encode_texts(TOKENIZER, HELD_OUT["talk"][:1])[0]
    assert len(short) < FEWEST_PIECES * 128

    with pytest.raises(ScoringError, match=r"task talk needs 8 pieces .*log2_task_like_talk off"):
        TaskLikeScorer.write(tmp_path, TOKENIZER, {"talk": HELD_OUT["talk"][:1]})
    assert list(tmp_path.iterdir()) == []


def test_a_scorer_travels_to_other_processes_and_refuses_damaged_tables(scorer):
    again = pickle.loads(pickle.dumps(scorer))
    assert again == scorer

    path = scorer.folder / "bits.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(ScoringError, match="undamaged; it holds"):
        again.score(frame_of("the sum of 2 and 3"))
