"""Metrics of documents under a causal language model, any that `transformers` loads from a folder.

All metrics of `LMScorer` come from one forward pass, those of `IfdScorer` from two. Four things
make it faster than one document after the other: documents of like length share a batch; with right
padding a causal model needs no attention mask, which keeps the fast causal kernel; losses and
entropies are computed from hidden states in tiles of the vocabulary that fit a core's cache, so the
logits of a whole batch never exist; and on a CPU the weights are laid out for oneDNN once.

Sources: arXiv 2605.22389 (high-entropy sum); Li et al. 2023, arXiv 2308.12032 (instruction-
following difficulty).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from causalmix_pipeline.core.errors import ConfigError, ScoringError

#: Raise when a formula changes, so that kept scores aren't mixed with new ones.
LM_VERSION = 1
IFD_VERSION = 1
#: Share of a document's output tokens below the high-entropy ones.
HES_QUANTILE = 0.995
#: Characters of a document that are tokenised for each token kept: none longer is worth reading.
CHARS_PER_TOKEN = 32
#: Rows and vocabulary columns of one tile of logits: 1 MB on a CPU core, 512 MB on a GPU.
CPU_TILE = (512, 512)
CUDA_TILE = (2048, 65_536)
#: Tokens of one forward pass, padding included.
CPU_BATCH_TOKENS = 1024
CUDA_BATCH_TOKENS = 32_768
#: Files of a model folder that its values depend on.
MODEL_FILES = (".safetensors", ".json", ".txt", ".model")


@dataclass(frozen=True)
class LMScorer:
    """Loss, entropy and perplexity of documents under one causal LM.

    A document is cut after `max_tokens` tokens, the tokenizer's own special tokens included. Output
    tokens are those of the response where there is a prompt, else all that are predicted; a token
    that straddles the end of the prompt counts as prompt. The metrics:

    - `normalized_loss`: mean of -log2 p(token given before) over tokens 2..N, bits per token. The
      prompt counts: the paper defines it over the whole sequence.
    - `hes`: sum of the predictive entropies (bits) of the output tokens at or above the 99.5th
      percentile of the document's (linear interpolation), at least one token.
    - `perplexity`: exp of the mean loss (nats) of the output tokens.

    Null where there is nothing to average: a document of one token, a prompt that fills the cut.

    Attributes:
        model: folder of a causal LM on this machine.
        gguf_file: name of a GGUF file in it, or None for safetensors.
        content_hash: of the files, by `model_hash`.
        max_tokens: tokens after which a document is cut.
        device: `auto` (CUDA where there is some), `cpu`, `cuda`, `cuda:1`.
        dtype: `auto` (bfloat16 on CUDA devices that have it, else float32), `float32`, `bfloat16`.
        batch_tokens: tokens of one forward pass, padding included; None: 1,024 on a CPU, 32,768 on
            a GPU. Values don't depend on it.
    """

    model: str
    gguf_file: str | None
    content_hash: str
    max_tokens: int = 512
    device: str = "auto"
    dtype: str = "auto"
    batch_tokens: int | None = None

    @classmethod
    def open(cls, model: str | Path, gguf_file: str | None = None, **options: Any) -> LMScorer:
        """A scorer of the model in a folder, its files checked and hashed.

        Raises:
            ConfigError: if there is no causal LM in safetensors or GGUF there.
        """
        folder = model_folder(model, "profile.lm")
        if gguf_file is None:
            check_model(folder, "profile.lm", "a causal LM", ("ForCausalLM", "LMHeadModel"))
        elif not (folder / gguf_file).is_file():
            raise ConfigError(
                f"profile.lm_gguf_file must be a file in profile.lm ({folder}), got {gguf_file!r}: "
                f"there is none. Leave it out to load safetensors."
            )
        return cls(str(folder), gguf_file, model_hash(folder, gguf_file), **options)

    def __post_init__(self) -> None:
        """Refuse settings that no model could follow."""
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(
                f"profile.lm_dtype must be auto, float32 or bfloat16, got {self.dtype!r}."
            )
        if self.max_tokens < 2:
            raise ConfigError(
                f"profile.lm_max_tokens must be >= 2, got {self.max_tokens}: the first token has "
                f"no loss. Raise it."
            )

    @property
    def key(self) -> str:
        """`lm-v1-` and a hash of the model's files, the cut and the number format."""
        return f"lm-v{LM_VERSION}-{self._hash()}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return ("normalized_loss", "hes", "perplexity")

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Measure documents; see the class for what each metric is."""
        loaded = self.load()
        encoded = [
            encode(loaded.tokenizer, text, prompt_chars, self.max_tokens)
            for text, prompt_chars in documents.select("text", "prompt_chars").iter_rows()
        ]
        scored = token_scores(loaded, [e.ids for e in encoded], [1] * len(encoded), self)
        rows = []
        for document, (loss, entropy) in zip(encoded, scored, strict=True):
            output = slice(document.first_output - 1, None)
            rows.append(
                (
                    _mean(loss / np.log(2)),
                    _high_entropy_sum(entropy[output] / np.log(2)),
                    _perplexity(loss[output]),
                )
            )
        return _result(documents, self.metrics, rows)

    def load(self) -> LoadedLM:
        """The model and its tokenizer, loaded once in a process."""
        loaded = _load(self.model, self.gguf_file, self.content_hash, self.device, self.dtype)
        longest = getattr(loaded.model.config, "max_position_embeddings", None)
        if longest is not None and self.max_tokens > longest:
            raise ConfigError(
                f"profile.lm_max_tokens must be <= {longest}, the longest input of the model in "
                f"{self.model}, got {self.max_tokens}. Lower it."
            )
        return loaded

    def _hash(self) -> str:
        """Of everything that values depend on; slashes and paths don't count."""
        parts = [self.content_hash, self.max_tokens, self.dtype]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class IfdScorer:
    """Instruction-following difficulty: perplexity of the response given the prompt, over alone.

    `ifd` = perplexity(response | prompt) / perplexity(response alone); below 1 where the prompt
    helps. Alone, the response's first token has no loss. Both passes cover the same text: where the
    document is cut, the response alone is cut at the same character. Null where there is no prompt
    or no two tokens of response are left. The first pass is `LMScorer`'s, without the prompt's
    logits.

    Attributes:
        lm: the model and the cut.
    """

    lm: LMScorer

    @property
    def key(self) -> str:
        """`ifd-v1-` and the hash of the LM's key."""
        return f"ifd-v{IFD_VERSION}-{self.lm._hash()}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Columns of a result besides `document_id`."""
        return ("ifd",)

    def score(self, documents: pl.DataFrame) -> pl.DataFrame:
        """Measure documents; those without a prompt cost nothing."""
        lm = self.lm
        prompted = documents.with_row_index("_row").filter(pl.col("prompt_chars") > 0)
        rows: list[tuple[float | None]] = [(None,)] * documents.height
        if prompted.height:
            loaded = lm.load()
            given, alone = [], []
            for text, prompt_chars in prompted.select("text", "prompt_chars").iter_rows():
                whole = encode(loaded.tokenizer, text, prompt_chars, lm.max_tokens)
                response = text[prompt_chars : max(whole.end_char, prompt_chars)]
                given.append(whole)
                alone.append(encode(loaded.tokenizer, response, 0, lm.max_tokens))
            firsts = [d.first_output for d in given] + [1] * len(alone)
            scored = token_scores(loaded, [d.ids for d in given + alone], firsts, lm)
            for place, row in enumerate(prompted["_row"]):
                with_prompt = _perplexity(scored[place][0])
                without = _perplexity(scored[len(given) + place][0])
                if with_prompt is not None and without is not None:
                    rows[row] = (with_prompt / without,)
        return _result(documents, self.metrics, rows)


# --- model folders


def model_folder(model: str | Path, field: str) -> Path:
    """The folder of a model; a name on a hub is refused, since nothing is downloaded here."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"{field} must be a folder on this machine that holds a model, got {str(model)!r}: "
            f"there is no such folder, and models aren't downloaded by name. Download it first and "
            f"give its folder."
        )
    return folder.resolve()


def check_model(folder: Path, field: str, kind: str, endings: tuple[str, ...]) -> None:
    """Refuse a folder that holds another kind of model, or weights that aren't safetensors."""
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"{field} must be a model folder with a config.json, got {folder}.")
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    if not any(name.endswith(endings) for name in architectures):
        raise ConfigError(
            f"{field} must be {kind} (architecture {' or '.join('...' + e for e in endings)}), got "
            f"{', '.join(architectures) or 'none'} in {folder}. Give a folder of such a model."
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{field} must hold its weights as *.safetensors, got none in {folder}: other formats "
            f"can run code when they're read. Save the model again as safetensors."
        )


def model_hash(folder: Path, gguf_file: str | None = None) -> str:
    """SHA-256 of the files that a model's values depend on, names and contents.

    With a GGUF file that file alone: it holds weights, configuration and tokenizer.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES)
    digest = hashlib.sha256()
    for path in [folder / gguf_file] if gguf_file else files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class LoadedLM:
    """A model ready to score, on its device."""

    model: Any
    tokenizer: Any
    device: str
    #: Logits are a linear map of the hidden states; some models scale or cap them.
    plain_head: bool


def pick_device(device: str, dtype: str) -> tuple[str, Any]:
    """Device and torch dtype that `auto` stands for here; one thread where it's the CPU."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    has_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    use_bf16 = dtype == "bfloat16" or (dtype == "auto" and has_bf16)
    return device, torch.bfloat16 if use_bf16 else torch.float32


def load_pretrained(
    auto_class: Any, folder: str, field: str, torch_dtype: Any, gguf_file: str | None = None
) -> tuple[Any, Any]:
    """A model with all its weights, in evaluation mode, and its fast tokenizer; never from a net.

    Raises:
        ScoringError: if the files can't be loaded, or leave weights to chance.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model, report = auto_class.from_pretrained(
            folder, dtype=torch_dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ScoringError(f"{field}: the model in {folder} can't be loaded: {error}") from error
    if report["missing_keys"]:
        raise ScoringError(
            f"{field}: the weights in {folder} lack {', '.join(sorted(report['missing_keys'])[:3])}"
            f": a part of the model would be random. Give the whole model."
        )
    if not tokenizer.is_fast:
        raise ScoringError(
            f"{field}: the tokenizer in {folder} doesn't say which characters a token covers. Give "
            f"a model with a tokenizer.json."
        )
    return model.eval(), tokenizer


@functools.lru_cache(maxsize=2)
def _load(
    folder: str, gguf_file: str | None, content_hash: str, device: str, dtype: str
) -> LoadedLM:
    """Load once in a process; `content_hash` is there so that changed files are loaded again."""
    import torch
    import transformers

    device, torch_dtype = pick_device(device, dtype)
    model, tokenizer = load_pretrained(
        transformers.AutoModelForCausalLM, folder, "profile.lm", torch_dtype, gguf_file
    )
    model = model.to(device)
    if device == "cpu" and torch_dtype == torch.float32 and torch.backends.mkldnn.is_available():
        _pack_linears(model.get_decoder())
    with torch.inference_mode():
        probe = torch.arange(2, device=device)[None]
        hidden = model.get_decoder()(input_ids=probe, use_cache=False).last_hidden_state
        logits = model(input_ids=probe, use_cache=False).logits
        plain_head = torch.equal(model.get_output_embeddings()(hidden), logits)
    return LoadedLM(model, tokenizer, device, plain_head)


def _pack_linears(decoder: Any) -> None:
    """Replace linear layers by ones whose weights lie as oneDNN wants them.

    A sixth faster than MKL on an AMD core, and the same float32 products; the packed copy is the
    process's own memory, the size of the weights.
    """
    import torch

    operators = torch.ops.mkldnn

    class PackedLinear(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            weight = linear.weight.detach()
            self.weight = operators._reorder_linear_weight(weight, CPU_BATCH_TOKENS)
            self.bias = linear.bias

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return operators._linear_pointwise(rows, self.weight, self.bias, "none", [], "")

    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, PackedLinear(child))


# --- tokens


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids of a document, cut.

    Attributes:
        ids: with the tokenizer's special tokens.
        first_output: place of the first token that counts as output, >= 1; `len(ids)` if none does.
        end_char: characters of the text that the kept tokens cover.
    """

    ids: list[int]
    first_output: int
    end_char: int


def encode(tokenizer: Any, text: str, prompt_chars: int, max_tokens: int) -> EncodedDocument:
    """Token ids of a text, and where its output begins.

    No more than `CHARS_PER_TOKEN * max_tokens` characters are read.
    """
    tokens = tokenizer(
        text[: CHARS_PER_TOKEN * max_tokens],
        truncation=True,
        max_length=max_tokens,
        return_offsets_mapping=True,
    )
    offsets = tokens["offset_mapping"]
    n_prompt = sum(start < prompt_chars for start, _ in offsets)
    return EncodedDocument(
        tokens["input_ids"], max(n_prompt, 1), max((end for _, end in offsets), default=0)
    )


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of sequences that share a batch: of like length, padding at most an eighth.

    Args:
        lengths: tokens of each sequence.
        batch_tokens: most tokens of a batch, padding included; a longer sequence goes alone.
    """
    batch: list[int] = []
    filled = 0
    for place in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = lengths[place] * (len(batch) + 1)
        filled += lengths[place]
        if batch and (padded > batch_tokens or padded > 1.125 * filled):
            yield batch
            batch, filled = [], lengths[place]
        batch.append(place)
    if batch:
        yield batch


def token_scores(
    loaded: LoadedLM, ids: Sequence[list[int]], firsts: Sequence[int], lm: LMScorer
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Loss and entropy (nats) of the tokens of each sequence from place `first` on.

    Args:
        loaded: the model.
        ids: token ids of each sequence.
        firsts: place of the first token to score in each, >= 1.
        lm: gives the size of a batch.

    Returns:
        Two float64 arrays of `max(len(ids) - first, 0)` values for each sequence.
    """
    import torch

    nothing: tuple[np.ndarray, np.ndarray] = (np.empty(0), np.empty(0))
    scored = [nothing] * len(ids)
    lengths = [len(i) if len(i) > first else 0 for i, first in zip(ids, firsts, strict=True)]
    on_cuda = loaded.device.startswith("cuda")
    batch_tokens = lm.batch_tokens or (CUDA_BATCH_TOKENS if on_cuda else CPU_BATCH_TOKENS)
    with torch.inference_mode():
        for batch in length_batches(lengths, batch_tokens if loaded.plain_head else 1):
            width = lengths[batch[-1]]
            if width == 0:
                continue
            batch = [place for place in batch if lengths[place]]
            tokens_BL = torch.zeros(len(batch), width, dtype=torch.long)
            wanted_BL = torch.zeros(len(batch), width - 1, dtype=torch.bool)
            for row, place in enumerate(batch):
                tokens_BL[row, : lengths[place]] = torch.tensor(ids[place])
                wanted_BL[row, firsts[place] - 1 : lengths[place] - 1] = True
            loss, entropy = _batch_scores(loaded, tokens_BL, wanted_BL)
            ends = wanted_BL.sum(1).cumsum(0)[:-1].numpy()
            parts = zip(batch, np.split(loss, ends), np.split(entropy, ends), strict=True)
            for place, *values in parts:
                scored[place] = (values[0], values[1])
    return scored


def _batch_scores(
    loaded: LoadedLM, tokens_BL: Any, wanted_BL: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and entropy (nats) of the wanted next tokens of a batch padded on the right.

    No attention mask: a token of a causal model sees none of the padding after it.
    """
    import torch

    tokens_BL, wanted_BL = tokens_BL.to(loaded.device), wanted_BL.to(loaded.device)
    target_N = tokens_BL[:, 1:][wanted_BL]
    if loaded.plain_head:
        hidden_BLH = loaded.model.get_decoder()(
            input_ids=tokens_BL, use_cache=False
        ).last_hidden_state
        rows_N = hidden_BLH[:, :-1][wanted_BL]
        head = loaded.model.get_output_embeddings()
    else:
        rows_N = loaded.model(input_ids=tokens_BL, use_cache=False).logits[:, :-1][wanted_BL]
        head = None
    n_rows, n_columns = CUDA_TILE if loaded.device.startswith("cuda") else CPU_TILE
    parts = [
        head_scores(rows_N[at : at + n_rows], target_N[at : at + n_rows], head, n_columns)
        for at in range(0, len(rows_N), n_rows)
    ]
    loss_N, entropy_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return loss_N.double().cpu().numpy(), entropy_N.double().cpu().numpy()


def head_scores(rows_NH: Any, target_N: Any, head: Any, n_columns: int) -> tuple[Any, Any]:
    """Loss and entropy (nats) of predicted tokens, over the vocabulary tile by tile.

    With running maximum m, z = sum exp(logit - m) and u = sum logit * exp(logit - m): the log of
    the normaliser is m + log z, the loss that minus the target's logit, the entropy that minus u/z.

    Args:
        rows_NH: hidden states, or logits where `head` is None; shape (N, H) or (N, V).
        target_N: id of the token that came; shape (N,).
        head: linear layer from hidden states to logits, or None.
        n_columns: columns of a tile.

    Returns:
        Two float32 tensors of shape (N,).
    """
    import torch

    vocab_size = rows_NH.shape[1] if head is None else head.weight.shape[0]
    peak_N = torch.full((len(rows_NH),), -torch.inf, device=rows_NH.device)
    z_N, u_N, target_logit_N = (torch.zeros_like(peak_N) for _ in range(3))
    for at in range(0, vocab_size, n_columns):
        tile = slice(at, at + n_columns)
        if head is None:
            logit_NC = rows_NH[:, tile].float()
        else:
            bias = None if head.bias is None else head.bias[tile]
            logit_NC = torch.nn.functional.linear(rows_NH, head.weight[tile], bias).float()
        column_N = target_N - at
        inside_N = (column_N >= 0) & (column_N < logit_NC.shape[1])
        column_N = column_N.clamp(0, logit_NC.shape[1] - 1)
        target_logit_N = torch.where(
            inside_N, logit_NC.gather(1, column_N[:, None])[:, 0], target_logit_N
        )
        new_peak_N = torch.maximum(peak_N, logit_NC.amax(1))
        shrink_N = (peak_N - new_peak_N).exp()
        weight_NC = (logit_NC - new_peak_N[:, None]).exp_()
        z_N = z_N * shrink_N + weight_NC.sum(1)
        u_N = u_N * shrink_N + torch.linalg.vecdot(weight_NC, logit_NC)
        peak_N = new_peak_N
    log_sum_N = peak_N + z_N.log()
    return log_sum_N - target_logit_N, log_sum_N - u_N / z_N


# --- documents


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _perplexity(loss: np.ndarray) -> float | None:
    return float(np.exp(loss.mean())) if len(loss) else None


def _high_entropy_sum(entropy: np.ndarray) -> float | None:
    if not len(entropy):
        return None
    return float(entropy[entropy >= np.quantile(entropy, HES_QUANTILE)].sum())


def _result(documents: pl.DataFrame, metrics: tuple[str, ...], rows: list[Any]) -> pl.DataFrame:
    schema = dict.fromkeys(metrics, pl.Float64)
    values = pl.DataFrame(rows, schema=schema, orient="row")
    return documents.select("document_id").hstack(values)
