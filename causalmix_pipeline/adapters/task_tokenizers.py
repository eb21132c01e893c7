"""How tasks become token ids and generations become text: the pool's BPE, or a model's tokenizer.

Both answer the same questions, so that held-out windows and questions are built by one function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from causalmix_pipeline.adapters.model_tokens import find_model, load_tokenizer
from causalmix_pipeline.adapters.tokenizer import END_ID, encode_texts, token_bytes
from causalmix_pipeline.core.errors import ConfigError, PoolError
from causalmix_pipeline.core.tasks import Question, QuestionText

#: How a pretrained model's tokenizer reads text: a special token that it spells is only text.
_AS_TEXT: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}


@dataclass(frozen=True, eq=False)
class TaskTokenizer:
    """A tokenizer as tasks need it.

    Attributes:
        name: the JSON of the pool's BPE, or the model's folder, GGUF file or hub id.
        digest: names its content.
        end_id: token between documents.
        prefix: token ids that every prompt begins with.
        stop_ids: tokens that end an answer, `end_id` first.
        backend: what encodes and decodes.
    """

    name: str
    digest: str
    end_id: int
    prefix: tuple[int, ...]
    stop_ids: tuple[int, ...]
    backend: Any

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of texts, without special tokens; a uint32 array each."""
        if self.is_pool_bpe:
            return encode_texts(self.name, texts)
        return [
            np.array(self.backend(text, **_AS_TEXT)["input_ids"], dtype=np.uint32) for text in texts
        ]

    def encode_with_bytes(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Token ids of documents, and how many UTF-8 bytes each token stands for.

        A character that several tokens share counts for the first of them; the token that a
        pretrained model begins documents with stands for none.
        """
        if self.is_pool_bpe:
            encoded = self.encode(texts)
            n_bytes_V = np.array([len(token) for token in token_bytes(self.name)])
            return encoded, [n_bytes_V[ids] for ids in encoded]
        ids, sizes = [], []
        for text in texts:
            found = self.backend(text, **_AS_TEXT, return_offsets_mapping=True)
            # Where each character begins, in bytes.
            before = np.cumsum([0, *(len(character.encode()) for character in text)])
            ends = np.array([end for _, end in found["offset_mapping"]], dtype=np.int64)
            reached = before[np.maximum.accumulate(ends)] if len(ends) else np.zeros(0, np.int64)
            ids.append(np.array([*self.prefix, *found["input_ids"]], dtype=np.uint32))
            sizes.append(np.diff(reached, prepend=[0] * (len(self.prefix) + 1)))
        return ids, sizes

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids."""
        if self.is_pool_bpe:
            return b"".join(self.backend[i] for i in ids).decode("utf-8", "replace")
        return self.backend.decode(ids, skip_special_tokens=True)

    @property
    def is_pool_bpe(self) -> bool:
        """Whether this is the pool's BPE rather than a pretrained model's tokenizer."""
        return _is_json(self.name)

    def question(self, text: QuestionText) -> Question:
        """A question in token ids.

        White space that ends the prompt begins the option instead, and a blank is put between the
        two where there's none: tokens of words hold the blank before them.
        """
        prompt, options = text.prompt, [_continued(text.prompt, o) for o in text.options]
        if options:
            prompt = prompt.rstrip()
        encoded = self.encode([prompt, *options])
        return Question(
            kind=text.kind,
            prompt=(*self.prefix, *encoded[0].tolist()),
            options=tuple(tuple(ids.tolist()) for ids in encoded[1:]),
            option_bytes=tuple(len(option.encode()) for option in options),
            label=text.label,
            answer=text.answer,
            pattern=text.pattern,
            numeric=text.numeric,
            max_new_tokens=text.max_new_tokens,
            tolerance=text.tolerance,
            measure=text.measure,
        )


def _continued(prompt: str, option: str) -> str:
    blanks = prompt[len(prompt.rstrip()) :]
    if not blanks and not option[0].isspace():
        blanks = " "
    return blanks + option


def _is_json(name: str) -> bool:
    return name.lstrip().startswith("{")


@lru_cache(maxsize=4)
def open_task_tokenizer(name: str) -> TaskTokenizer:
    """The tokenizer of a name: the JSON of the pool's BPE, or where a pretrained model is.

    Raises:
        ConfigError: if the model can't be found, or its tokenizer isn't a fast one.
    """
    if _is_json(name):
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        return TaskTokenizer(name, digest, END_ID, (END_ID,), (END_ID,), token_bytes(name))
    backend = load_tokenizer(find_model(name))
    if not backend.is_fast:
        raise ConfigError(
            f"proxy.pretrained must hold a fast tokenizer (tokenizer.json), got {name!r} with "
            f"{type(backend).__name__}: held-out loss needs its character positions."
        )
    # Models that were trained with a first token of their own get it; others have none.
    prefix = [i for i in backend("")["input_ids"] if i == backend.bos_token_id]
    digest = hashlib.sha256(backend.backend_tokenizer.to_str().encode()).hexdigest()[:32]
    stops = dict.fromkeys([backend.eos_token_id, *_end_of_answer(backend)])
    return TaskTokenizer(name, digest, backend.eos_token_id, tuple(prefix), tuple(stops), backend)


def _end_of_answer(backend: Any) -> list[int]:
    """The special token that the chat template ends an answer with, which may not be the end's."""
    from jinja2 import TemplateError

    if not backend.chat_template:
        return []
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = backend.apply_chat_template(chat, tokenize=False)
    except TemplateError:
        return []
    ids = backend(text, add_special_tokens=False)["input_ids"]
    return [i for i in ids if i in backend.all_special_ids][-1:]


def check_questions(
    task: str, questions: Sequence[Question], *, context: int, field: str = "tasks"
) -> None:
    """Raise unless every question fits into a model's context with a token of its prompt.

    Args:
        task: its name.
        questions: encoded.
        context: tokens that the model can read.
        field: the setting to name.

    Raises:
        PoolError: if an option, or what may be generated, fills the context.
    """
    for number, question in enumerate(questions):
        longest = max(map(len, question.options), default=question.max_new_tokens)
        if longest >= context:
            what = "options" if question.options else "max_new_tokens"
            raise PoolError(
                f"{field}: {what} of {task!r} must be shorter than the model's context of "
                f"{context} tokens, got {longest} in question {number + 1}: shorten it, or raise "
                "the proxy's sequence_length."
            )
