"""Language of a document, by the model inside the py3langid wheel, in compiled code.

Method: Lui & Baldwin 2012 (langid.py): naive Bayes over byte n-grams that an automaton finds. The
label is that of `py3langid.classify`, over all of the text.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

import numpy as np
import polars as pl


@lru_cache(maxsize=1)
def _model() -> tuple[list[str], tuple[np.ndarray, ...]]:
    """Labels of the classes, and the arrays that `likeliest_languages` takes."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE)
    labels = list(model.nb_classes)
    first_of = {label: labels.index(label) for label in labels}
    aliases = [(first_of[label], c) for c, label in enumerate(labels) if first_of[label] != c]
    return labels, (
        np.array(model.tk_nextmove, dtype=np.uint32),
        np.array(model.tk_row, dtype=np.int64) << 8,
        np.array(model.tk_output, dtype=np.int32),
        np.ascontiguousarray(model.nb_ptc, dtype=np.float32),
        np.ascontiguousarray(model.nb_pc, dtype=np.float32),
        np.array(aliases, dtype=np.int64).ravel(),
    )


@dataclass(frozen=True)
class LanguageScorer:
    """`language`: the likeliest of 140 languages as an ISO 639 code.

    Every text gets one, also a text that is no language. Code and formulas come out as whatever
    shares their letters; the shares of a domain are still comparable between pools.
    """

    @property
    def key(self) -> str:
        """Name and version, with the version of the wheel that holds the model."""
        return "language-v1-" + version("py3langid").lower().replace(".", "-")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return ("language",)

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Name the language of documents."""
        from causalmix_pipeline.adapters.compiled_scores import likeliest_languages

        labels, arrays = _model()
        raws = [
            unicodedata.normalize("NFC", text.lower() if text.isupper() else text).encode("utf-8")
            for text in documents["text"].to_list()
        ]
        offsets = np.zeros(len(raws) + 1, dtype=np.int64)
        np.cumsum([len(raw) for raw in raws], dtype=np.int64, out=offsets[1:])
        text_B = np.frombuffer(b"".join([*raws, b"\0"]), dtype=np.uint8)
        classes = likeliest_languages(text_B, offsets, *arrays)
        return documents.select(
            "document_id",
            pl.Series("language", [labels[c] for c in classes.tolist()], dtype=pl.String),
        )
