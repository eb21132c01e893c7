"""A pretrained model's facts, and a pool's documents in the tokens of its tokenizer.

Weights are read from safetensors or GGUF only: other formats can run code when they're read. Code
that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.adapters.pool_door import SEPARATOR
from causalmix_pipeline.adapters.profiler import PoolSpec, document_batches
from causalmix_pipeline.adapters.run_store import RunStore
from causalmix_pipeline.core.errors import ConfigError

logger = logging.getLogger(__name__)

#: Raise when a document would be encoded otherwise, so that kept tokens aren't mixed with new ones.
ENCODING_VERSION = 2
#: Files of a model folder that its outcomes depend on.
MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")
#: What is fetched of a model on a hub.
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
#: Where a chat's messages begin in the text of a document; see `pool_door.conversation`.
_ROLE_LINE = re.compile(r"(?:\A|\n\n)(system|developer|user|assistant|tool|function)\n")


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without loading its weights.

    Attributes:
        model: as the user named it.
        weights_hash: names the content of its weights and tokenizer, 32 hex digits.
        n_parameters: weights, tied ones once.
        vocab_size: token ids stay below it.
        max_length: longest context, in tokens.
        layers: transformer layers.
        hidden: width of the residual stream.
    """

    model: str
    weights_hash: str
    n_parameters: int
    vocab_size: int
    max_length: int
    layers: int
    hidden: int


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are on this machine.

    Attributes:
        folder: holds config, tokenizer and weights.
        gguf_file: name of the file that holds all three, or None.
    """

    folder: Path
    gguf_file: str | None

    def options(self) -> dict[str, Any]:
        """How `from_pretrained` reads it: from this machine, running none of its code."""
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        return options if self.gguf_file is None else {**options, "gguf_file": self.gguf_file}

    @property
    def weights(self) -> list[Path]:
        """The files that hold the weights."""
        if self.gguf_file is not None:
            return [self.folder / self.gguf_file]
        return sorted(self.folder.glob("*.safetensors"))


def find_model(model: str) -> ModelFiles:
    """The files of a model, fetched from the hub if it's named by a hub id and not here yet.

    Raises:
        ConfigError: if there is none, or its weights aren't safetensors or GGUF.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return ModelFiles(path.parent.resolve(), path.name)
    folder = path.resolve() if path.is_dir() else _fetch(model)
    gguf = sorted(folder.glob("*.gguf"))
    if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file():
        return ModelFiles(folder, None)
    if len(gguf) == 1:
        return ModelFiles(folder, gguf[0].name)
    pickles = [file.name for ending in ("*.bin", "*.pt", "*.pth") for file in folder.glob(ending)]
    found = sorted(pickles) or [file.name for file in gguf] or ["neither"]
    raise ConfigError(
        "proxy.pretrained must have a config.json and *.safetensors, or one GGUF file, got "
        f"{', '.join(found[:3])} in {folder}: other weights can run code when they're read. Save "
        "the model again with save_pretrained, or name the GGUF file itself."
    )


def _fetch(model: str) -> Path:
    """The folder of a model of the hub, in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        try:
            found = snapshot_download(model, allow_patterns=HUB_FILES, local_files_only=True)
            if not any(Path(found).glob("*.safetensors")):
                raise LocalEntryNotFoundError("only a part of the model is here")
        except LocalEntryNotFoundError:
            found = snapshot_download(model, allow_patterns=HUB_FILES)
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            "proxy.pretrained must be a folder on this machine or the id of a model on the hub, "
            f"got {model!r}: {error}. Correct it, or download the model first."
        ) from error
    return Path(found)


def describe_model(model: str) -> ModelFacts:
    """What is known of a model from its files; their content is read once to name it.

    Args:
        model: folder, GGUF file or hub id.

    Raises:
        ConfigError: if it can't be found, isn't safe to read, or can't be fine-tuned.
    """
    files = find_model(model)
    counted = files.weights if files.gguf_file else _model_files(files.folder)
    stamps = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in counted)
    return _describe(model, files, stamps)


@lru_cache(maxsize=4)
def _describe(
    model: str, files: ModelFiles, stamps: tuple[tuple[str, int, int], ...]
) -> ModelFacts:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(files.folder, **files.options())
        tokenizer = load_tokenizer(files)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"proxy.pretrained must be a model that transformers knows, got {model!r}: {error}"
        ) from error
    if files.gguf_file is None and getattr(config, "quantization_config", None):
        raise ConfigError(
            f"proxy.pretrained must have weights that can be trained, got quantised ones in "
            f"{files.folder}. Give the model before quantisation."
        )
    text = config.get_text_config()
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"proxy.pretrained must have a tokenizer with an end-of-text token, got none in "
            f"{files.folder}. Set eos_token in its tokenizer_config.json."
        )
    return ModelFacts(
        model=model,
        weights_hash=_hash_files([Path(path) for path, _, _ in stamps]),
        n_parameters=_n_parameters(files),
        vocab_size=text.vocab_size,
        max_length=getattr(text, "max_position_embeddings", None) or 2**30,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
    )


def _model_files(folder: Path) -> list[Path]:
    """The files of a folder that a model's outcomes depend on."""
    return sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES)


def _hash_files(paths: Sequence[Path]) -> str:
    """32 hex digits for the names and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\0".encode())
    return digest.hexdigest()[:32]


def _n_parameters(files: ModelFiles) -> int:
    """Weights of a model, from the shapes that its files begin with."""
    if files.gguf_file is not None:
        from gguf import GGUFReader

        tensors = GGUFReader(files.weights[0]).tensors
        return int(sum(int(tensor.n_elements) for tensor in tensors))
    total = 0
    for path in files.weights:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(
            int(np.prod(tensor["shape"], dtype=np.int64))
            for name, tensor in header.items()
            if name != "__metadata__"
        )
    return total


def load_tokenizer(files: ModelFiles) -> Any:
    """The tokenizer of a model; it doesn't warn of long documents, which are packed later."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder, **files.options())
    tokenizer.model_max_length = 2**30
    return tokenizer


def write_model_tokens(
    store: RunStore, spec: PoolSpec, documents: pl.DataFrame, model: str, weights_hash: str
) -> str:
    """Keep a pool's documents in a model's tokens; the pool is read again, unless they are kept.

    A document whose response has no token is kept empty, so that pool states still find it.

    Args:
        store: where.
        spec: the pool.
        documents: has the `document_id` of its documents.
        model: folder, GGUF file or hub id.
        weights_hash: of the model.

    Returns:
        The name of the token store: the hash of the documents' ids and of the model.

    Raises:
        PoolError: if the pool's files lack a document of the frame.
        ConfigError: if the model can't be found, or has no embedding for a token.
    """
    ids = documents["document_id"].to_list()
    is_chat = spec.columns.messages is not None
    named = f"model-tokens-v{ENCODING_VERSION} {is_chat} {weights_hash}" + "\n".join(ids)
    name = hashlib.sha256(named.encode()).hexdigest()[:32]
    if store.has_tokens(name):
        return name
    tokenizer, vocab_size = load_tokenizer(find_model(model)), describe_model(model).vocab_size
    n_empty = 0

    def encoded() -> Iterator[tuple[list[str], list[np.ndarray], list[int]]]:
        nonlocal n_empty
        for batch in document_batches(spec, ids):
            tokens, prompts = encode_documents(
                tokenizer,
                batch["text"].to_list(),
                batch["prompt_chars"].to_list(),
                is_chat=is_chat,
            )
            n_empty += sum(not len(each) for each in tokens)
            highest = max((int(each.max()) for each in tokens if len(each)), default=0)
            if highest >= vocab_size:
                raise ConfigError(
                    f"proxy.pretrained must have an embedding for each token, got token "
                    f"{highest} and {vocab_size} embeddings in {model}. Give the model with "
                    "its own tokenizer."
                )
            yield batch["document_id"].to_list(), tokens, prompts

    store.put_tokens(name, encoded(), len(tokenizer))
    if n_empty:
        logger.warning("%d of %d documents have no token to learn: left out", n_empty, len(ids))
    return name


def encode_documents(
    tokenizer: Any, texts: Sequence[str], prompt_chars: Sequence[int], *, is_chat: bool
) -> tuple[list[np.ndarray], list[int]]:
    """Token ids of documents, and how many of them are the prompt's.

    Text without a prompt gets the tokenizer's own special tokens and an end of text; a special
    token that it spells is only text. A prompt and its response become a chat by the tokenizer's
    template, or stand apart by a blank line where there is no template.

    Args:
        tokenizer: of `load_tokenizer`.
        texts: documents.
        prompt_chars: characters of each before the response.
        is_chat: prompts were messages, each with its role in a line of its own.

    Returns:
        One array of ids a document, and the number of leading ids without loss; a document without
        any token to learn has no ids at all.
    """
    # What stands before the first token with loss, and the whole: encoded in one call.
    parts: list[tuple[str, str]] = []
    plain: list[bool] = []
    for text, n_chars in zip(texts, prompt_chars, strict=True):
        rendered = _render_chat(tokenizer, text, n_chars, is_chat) if n_chars else None
        parts.append(rendered or (text[:n_chars], text))
        plain.append(rendered is None)
    whole_ids = _encode(tokenizer, [whole for _, whole in parts], plain)
    prefix_ids = _encode(tokenizer, [prefix for prefix, _ in parts], plain)
    tokens, prompts = [], []
    for (prefix, whole), before, ids, is_plain in zip(
        parts, prefix_ids, whole_ids, plain, strict=True
    ):
        n_prompt = len(before) if prefix else 0
        if prefix and ids[:n_prompt] != before:
            # A token would straddle the end of the prompt: encode the response by itself.
            rest = whole[len(prefix) :]
            ids = [*before, *_ids(tokenizer, [rest], add_special=False, is_plain=is_plain)[0]]
        if is_plain:
            ids = [*ids, tokenizer.eos_token_id]
        n_learnt = len(ids) - max(n_prompt, 1)  # the first token has nothing before it
        tokens.append(np.array(ids if n_learnt > 0 else [], dtype=np.uint32))
        prompts.append(n_prompt if n_learnt > 0 else 0)
    return tokens, prompts


def _render_chat(
    tokenizer: Any, text: str, prompt_chars: int, is_chat: bool
) -> tuple[str, str] | None:
    """A prompt and the whole chat by the tokenizer's template; None if it has none for it."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    prompt, response = text[:prompt_chars], text[prompt_chars:]
    messages = _messages_of(prompt) if is_chat else []
    asked = {"role": "user", "content": prompt.removesuffix(SEPARATOR)}
    for before in (messages, [asked]):
        if not before:
            continue
        try:
            prefix = tokenizer.apply_chat_template(
                before, add_generation_prompt=True, tokenize=False
            )
            answer = {"role": "assistant", "content": response}
            whole = tokenizer.apply_chat_template([*before, answer], tokenize=False)
        except TemplateError:
            continue  # such as roles that must take turns
        # Some templates drop the reasoning of an answer, which is what there is to learn.
        thought = response.partition("</think>")[0].removeprefix("<think>").strip()
        if whole.startswith(prefix) and thought in whole:
            return prefix, whole
        # The template writes an answer otherwise than it asks for one.
        if prefix.rstrip().endswith("<think>"):
            response = response.lstrip().removeprefix("<think>").lstrip("\n")
        return prefix, prefix + response + tokenizer.eos_token
    return None


def _messages_of(prompt: str) -> list[dict[str, str]]:
    """The messages of a prompt that `pool_door.conversation` wrote; none if it begins otherwise."""
    heads = list(_ROLE_LINE.finditer(prompt))
    if not heads or heads[0].start() != 0:
        return []
    ends = [head.start() for head in heads[1:]] + [len(prompt)]
    return [
        {"role": head[1], "content": prompt[head.end() : end].removesuffix(SEPARATOR)}
        for head, end in zip(heads, ends, strict=True)
    ]


def _encode(tokenizer: Any, texts: Sequence[str], plain: Sequence[bool]) -> list[list[int]]:
    """Ids of texts: rendered chats, and plain ones with special tokens before them."""
    encoded: list[list[int]] = [[] for _ in texts]
    for kind in (True, False):
        places = [i for i, is_plain in enumerate(plain) if is_plain is kind]
        found = _ids(tokenizer, [texts[i] for i in places], add_special=kind, is_plain=kind)
        for i, ids in zip(places, found, strict=True):
            # Some tokenizers end a text by themselves.
            is_ended = kind and ids and ids[-1] == tokenizer.eos_token_id
            encoded[i] = ids[:-1] if is_ended else ids
    return encoded


def _ids(
    tokenizer: Any, texts: Sequence[str], *, add_special: bool, is_plain: bool
) -> list[list[int]]:
    """Ids of texts; a special token that plain text spells is only text."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=add_special, split_special_tokens=is_plain)[
        "input_ids"
    ]
