"""Languages against py3langid itself, in twenty-eight languages and on text that is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causalmix_pipeline.adapters.language_scores import LanguageScorer
from causalmix_pipeline_tests.adapters.scored_frames import HARD_TEXTS, frame_of


def corpus() -> dict[str, list[str]]:
    """Conversations of the chatterbot corpus by language."""
    import chatterbot_corpus

    folder = Path(chatterbot_corpus.__file__).parent / "data"
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/*.yml"))[::6]:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        lines = [str(line) for talk in loaded["conversations"] for line in talk]
        found.setdefault(path.parent.name, []).extend([*lines[:15], " ".join(lines)])
    return found


def labels_of(texts: list[str]) -> list[str]:
    return LanguageScorer().score(frame_of(*texts))["language"].to_list()


def test_every_label_is_that_of_py3langid():
    import py3langid

    texts = [text for part in corpus().values() for text in part]
    texts += [text.upper() for text in texts[::5]]
    texts += [f"{a} {b}" for a, b in zip(texts[::7], texts[3::7], strict=False)]

    assert len(corpus()) > 15
    assert labels_of(texts) == [py3langid.classify(text)[0] for text in texts]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_documents_have_the_label_of_py3langid(text):
    import py3langid

    assert labels_of([text]) == [py3langid.classify(text)[0]]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_has_the_label_of_py3langid(text):
    import py3langid

    assert labels_of([text]) == [py3langid.classify(text)[0]]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The weather was fine and they walked along the river for hours.", "en"),
        ("Das Wetter war schön und sie gingen stundenlang am Fluss entlang.", "de"),
        ("今日は天気がよかったので、川沿いを何時間も歩きました。", "ja"),
        ("Погода была хорошая, и они часами гуляли вдоль реки.", "ru"),
        ("ŽIVOT JE LEP I SVE JE U REDU, REKAO JE ON MENI JUČE.", None),  # sr has two classes
    ],
)
def test_plain_sentences_are_named_by_their_language(text, language):
    import py3langid

    assert labels_of([text]) == [language or py3langid.classify(text)[0]]
