"""What the columns of our frames hold, in a line each, for the catalogue."""

#: A column's name to what it holds. One name means the same in every frame.
DESCRIPTIONS = {
    "augmented": "Whether the document is a noisy twin of another.",
    "bits_per_byte": "Weighted loss of the tasks on held-out text, mean over seeds.",
    "bytes_per_token": "UTF-8 bytes over tokens.",
    "bigram_cross_entropy": "Bits a token under pairs of tokens of the experiment pool.",
    "blank_share": "White space as a share of the characters.",
    "cell": "Number of the pair of pool state and mixture; repeated pairs tell the noise of seeds.",
    "compress_ratio": "Bytes after zlib over bytes; low where text repeats itself.",
    "config": "The proxy's recipe, as JSON.",
    "copies": "How often the text occurs; in the export, how often it is trained on.",
    "cpu_seconds": "CPU seconds that training and evaluation took.",
    "data_seed": "Seed of the documents' order and of the first weights.",
    "digit_share": "Digits as a share of the characters.",
    "diverged": "Whether training diverged; such a run has no outcome.",
    "document_id": "Hash of the document's text.",
    "documents": "Distinct documents.",
    "domain": "The part of the pool that the mixture gives a share.",
    "duplicate_share": "Share of the tokens read that are repeats of the same document.",
    "equal": "The same share for each domain.",
    "eval_hash": "Hash of the tasks' held-out text and questions.",
    "file": "File of the pool that the document stands in.",
    "fixed": "The mixture that the settings fix.",
    "grid": "The mixture with the best prediction among the points of a grid.",
    "group": "Documents of a group are kept together.",
    "hdd": "Share of distinct words among 42 drawn ones.",
    "hes": "Predictive entropies, in bits, of the 0.5% of output tokens with most, summed.",
    "ifd": "Perplexity of the response with its prompt over that without.",
    "language": "Language by its ISO 639-1 code.",
    "last_train_loss": "Loss at the end of training, nats a token.",
    "letter_share": "Letters as a share of the characters.",
    "log2_tokens": "Binary logarithm of the domain's tokens.",
    "log_linear": "The mixture with the best prediction by a law that is linear in log shares.",
    "logical_words": "Connectives such as because or then, per 100 words.",
    "mixture": "Name of the mixture.",
    "mtld": "Words until the share of distinct ones comes down to .72, mean of both directions.",
    "n_bytes": "UTF-8 bytes.",
    "n_tokens": "Tokens of the pool's tokenizer.",
    "natural": "The pool's own token shares.",
    "natural_share": "Share of the pool's tokens, repeats counted.",
    "near_duplicate": "1 where another document has nearly the same words.",
    "noise_share": "Share of the state's documents that are noisy twins.",
    "normalized_loss": "Loss of a language model, bits a token.",
    "perplexity": "Perplexity under a language model.",
    "predicted_gain": "Gain over the reference that was predicted, bits per byte.",
    "prompt_chars": "Characters before the response, which no loss counts.",
    "proxy_run_id": "Hash of all that decides the run: its record's name in the run store.",
    "randomised": "Whether the run's mixture was drawn at random.",
    "realised_gain": "Gain over the reference that larger models had, bits per byte.",
    "realised_se": "Its standard error over seeds.",
    "reference": "The mixture that gains are measured from.",
    "regmix": "The mixture with the best prediction by RegMix.",
    "repeat_of": "Runs of one number have the same state and mixture; they differ in the seed.",
    "row": "Row of the file.",
    "run_id": "Name of the run, after its source where it was imported.",
    "sample_compress_ratio": "As compress_ratio, of a sample of the whole domain.",
    "scorers": "Versions of what measured the document.",
    "size_share": "Share of the domain's documents that the state keeps.",
    "source": "Where the document or the run comes from.",
    "source_shares": "Share of each source in the state's domain.",
    "state_hash": "Hash of the documents of the pool state.",
    "state_id": "Number of the pool state.",
    "symbol_share": "Characters that are no letter, digit or white space, as a share.",
    "tilt": "How far the state prefers documents with a high value of a metric.",
    "token_entropy": "Bits of entropy of the document's own token frequencies.",
    "tokens": "Distinct documents' tokens.",
    "tokens_hash": "Hash of the store that proxies read tokens from.",
    "twin_of": "The document that this one is a noisy twin of.",
    "unigram_cross_entropy": "Bits a token under token frequencies of the experiment pool.",
    "unique_bigram_ratio": "Distinct pairs of tokens over all pairs.",
    "unique_line_ratio": "Distinct lines over all lines that aren't blank.",
    "unique_share": "Share of the state's documents that aren't repeats.",
    "vocd_d": "Diversity of words, of a sample of the documents.",
    "writing_style": "Score of a trained rater.",
    "writing_style_composite": "A composite of simple signs of edited text.",
}

#: The same of columns that are named after data: what comes before `__`.
PREFIXES = {
    "bits_per_byte": "Loss on the task's held-out text, bits per byte.",
    "nats_per_token": "Loss on the task's held-out text, nats a token.",
    "outcome": "What the run scored on the task; larger is better.",
    "score": "Score on the task's questions.",
    "share": "The domain's share of the mixture.",
    "state": "A covariate of the run's pool state, by domain.",
}

_LANGUAGE = "language_share_"
_TASK_LIKE = "task_like_"


def describe_column(name: str) -> str | None:
    """What a column holds; None for one that a user's own table brought."""
    if name.startswith(_LANGUAGE):
        return "Share of the documents in the language."
    if name.startswith(_TASK_LIKE):
        return "1 where the document is like the task's held-out text."
    if name.startswith(f"log2_{_TASK_LIKE}"):
        return "log2 of .01 and the share of tokens in documents like the task's held-out text."
    prefix, split, _ = name.partition("__")
    if split and prefix in PREFIXES:
        return PREFIXES[prefix]
    metric, _, percent = name.rpartition("_p")
    if metric in DESCRIPTIONS and percent in ("10", "50", "90"):
        return f"{percent}% quantile over tokens. {DESCRIPTIONS[metric]}"
    return DESCRIPTIONS.get(name)
