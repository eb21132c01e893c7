"""Covariates: what is known of a pool before anything is mixed, per domain.

A covariate is the token-weighted mean of a document metric, a quantile of one, the share of
documents in a language, the size, or a measure of the domain as a whole. All are measured per
domain before mixing (measured on the mixed sample they would be a linear map of the mixture and
adjust the treatment away). The same code measures a drawn sub-pool and a live pool.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causalmix_pipeline.core.errors import PoolError

#: Model-free metrics of a document, in the order of tables; formulas where they are computed.
METRICS = (
    "compress_ratio",
    "token_entropy",
    "unique_bigram_ratio",
    "unigram_cross_entropy",
    "bigram_cross_entropy",
    "letter_share",
    "digit_share",
    "blank_share",
    "symbol_share",
    "logical_words",
    "mtld",
    "hdd",
    "vocd_d",
    "writing_style_composite",
    "unique_line_ratio",
    "bytes_per_token",
    "near_duplicate",
)
#: Metrics that need a causal language model, and the score of a trained rater.
MODEL_METRICS = ("normalized_loss", "hes", "perplexity", "ifd", "writing_style")

#: Covariates of a domain as a whole.
DOMAIN_COVARIATES = ("log2_tokens", "duplicate_share", "sample_compress_ratio")

#: Share of documents in a language, by its ISO 639-1 code: `language_share_de`.
LANGUAGE_PREFIX = "language_share_"

#: Metric of a document that is 1 where it is like the held-out text of a task, else 0; and the
#: covariate of a domain, log2 of `LEAST_LIKE` and the share of its tokens in such documents. A
#: share of .05 is worth much more than none, and one of .55 little more than .5.
TASK_LIKE_PREFIX = "task_like_"
LOG_TASK_LIKE_PREFIX = "log2_" + TASK_LIKE_PREFIX
LEAST_LIKE = 0.01

#: A token-weighted quantile of a metric: `mtld_p10`.
QUANTILES = {"_p10": 0.1, "_p50": 0.5, "_p90": 0.9}

#: Columns of a documents frame that aren't metrics.
DOCUMENT_COLUMNS = (
    "document_id",
    "domain",
    "source",
    "group",
    "file",
    "row",
    "copies",
    "augmented",
    "twin_of",
    "prompt_chars",
    "language",
    "n_bytes",
    "n_tokens",
    "tokens_hash",
    "scorers",
    "sample_compress_ratio",
)

#: Characters of a document that enter the sample whose compression is measured, and bytes of the
#: sample: a few hundred documents, read in a tenth of a second.
SAMPLE_CHARS, SAMPLE_BYTES = 4096, 128 * 1024


def metrics_of(documents: pl.DataFrame) -> tuple[str, ...]:
    """The metrics of a documents frame: known ones in their order, then the user's by name."""
    found = [
        name
        for name, kind in documents.schema.items()
        if name not in DOCUMENT_COLUMNS and kind.is_float()
    ]
    known = [name for name in (*METRICS, *MODEL_METRICS) if name in found]
    return (*known, *sorted(set(found) - set(known)))


def covariates_of(documents: pl.DataFrame, *, least_share: float = 0.01) -> tuple[str, ...]:
    """Every covariate that a documents frame offers, quantiles apart.

    Args:
        documents: the documents frame.
        least_share: languages with a smaller share of the documents of each domain have no
            covariate of their own; 0..1.
    """
    languages: list[str] = []
    if "language" in documents.columns:
        shares = (
            documents.group_by("domain", "language")
            .agg(n=pl.len())
            .with_columns(share=pl.col("n") / pl.col("n").sum().over("domain"))
            .filter(pl.col("share") >= least_share)
        )
        languages = shares["language"].unique().sort().to_list()
    return (
        *(f"log2_{m}" if m.startswith(TASK_LIKE_PREFIX) else m for m in metrics_of(documents)),
        *(LANGUAGE_PREFIX + language for language in languages),
        *DOMAIN_COVARIATES,
    )


def base_of(covariate: str) -> str:
    """The metric that a covariate is a mean or quantile of; itself for the others."""
    if covariate.startswith(LOG_TASK_LIKE_PREFIX):
        return covariate.removeprefix("log2_")
    for ending in QUANTILES:
        if covariate.endswith(ending):
            return covariate.removesuffix(ending)
    return covariate


def tasks_asked(covariates: Sequence[str]) -> list[str]:
    """Tasks that documents are held against for these covariates, each once."""
    asked = [c for c in covariates if c.startswith(LOG_TASK_LIKE_PREFIX)]
    return list(dict.fromkeys(c.removeprefix(LOG_TASK_LIKE_PREFIX) for c in asked))


def check_covariate_names(names: Sequence[str], numbers: Sequence[str] = ()) -> str | None:
    """The first name that no pool can have as a covariate, or None.

    Args:
        names: covariates that are asked for.
        numbers: the user's number columns.
    """
    known = {*METRICS, *MODEL_METRICS, *DOMAIN_COVARIATES, *numbers}
    for name in names:
        patterned = any(
            name.startswith(prefix) and len(name) > len(prefix)
            for prefix in (LANGUAGE_PREFIX, LOG_TASK_LIKE_PREFIX)
        )
        if not (patterned or name in known or base_of(name) in known - set(DOMAIN_COVARIATES)):
            return name
    return None


@dataclass(frozen=True, eq=False)
class CovariateMeter:
    """A documents frame as arrays, from which covariates of its sub-pools are measured.

    Attributes:
        domains: D domains, in the pool's order.
        covariates: P names.
        domain_N: number of each document's domain, -1 for another.
        n_tokens_N: tokens of each document.
        values_NB: columns that the covariates are means or quantiles of; NaN where a document has
            no value (metrics of a sample).
        column_P: column of each covariate in `values_NB`, -1 for those of a domain as a whole.
    """

    domains: tuple[str, ...]
    covariates: tuple[str, ...]
    domain_N: np.ndarray
    n_tokens_N: np.ndarray
    values_NB: np.ndarray
    column_P: np.ndarray

    @classmethod
    def of(
        cls, documents: pl.DataFrame, domains: Sequence[str], covariates: Sequence[str]
    ) -> CovariateMeter:
        """Prepare a documents frame.

        Raises:
            PoolError: if it lacks the metric of a covariate.
        """
        bases = list(dict.fromkeys(base_of(c) for c in covariates if c not in DOMAIN_COVARIATES))
        columns = []
        for base in bases:
            if base.startswith(LANGUAGE_PREFIX):
                code = base.removeprefix(LANGUAGE_PREFIX)
                columns.append((documents["language"] == code).cast(pl.Float64).to_numpy())
            elif base in documents.columns:
                values = documents[base].cast(pl.Float64)
                columns.append(values.fill_null(float("nan")).to_numpy())
            else:
                raise PoolError(
                    f"covariates must be measured in this pool, got {base!r}, which isn't; there "
                    f"are {', '.join(metrics_of(documents))}. Set what measures it (profile.lm, "
                    "profile.rater, columns.numbers), or take it off the list."
                )
        place = {domain: number for number, domain in enumerate(domains)}
        number_of = pl.DataFrame({"domain": list(place), "place": list(place.values())})
        joined = documents.select("domain").join(
            number_of, on="domain", how="left", maintain_order="left"
        )
        return cls(
            domains=tuple(domains),
            covariates=tuple(covariates),
            domain_N=joined["place"].fill_null(-1).to_numpy(),
            n_tokens_N=documents["n_tokens"].to_numpy().astype(float),
            values_NB=np.column_stack(columns) if columns else np.empty((documents.height, 0)),
            column_P=np.array(
                [-1 if c in DOMAIN_COVARIATES else bases.index(base_of(c)) for c in covariates]
            ),
        )

    def measure(
        self,
        rows: np.ndarray,
        copies: np.ndarray,
        sample_ratio_D: Sequence[float] | None = None,
    ) -> np.ndarray:
        """Measure a sub-pool.

        Args:
            rows: rows of the documents frame; shape (n,).
            copies: how often each occurs; shape (n,).
            sample_ratio_D: `sample_compress_ratio` of each domain, where it is asked for.

        Returns:
            Values in the order of `covariates`; shape (D, P). Metrics in their own units, size in
            log2 of the distinct tokens, shares in 0..1, or in log2 where their names say so. A
            metric of a sample that no document of the sub-pool is in has its mean over the whole
            domain.

        Raises:
            PoolError: if a domain has no document.
        """
        values_DP = np.empty((len(self.domains), len(self.covariates)))
        labels, n_tokens = self.domain_N[rows], self.n_tokens_N[rows]
        for d, domain in enumerate(self.domains):
            mask = labels == d
            weights = n_tokens[mask] * copies[mask]
            if weights.sum() == 0:
                raise PoolError(
                    f"domain {domain!r} has no usable document in this pool, so its covariates "
                    "can't be measured. Add documents, or remove the domain from `domains` in the "
                    "settings and adopt a new experiment pool."
                )
            values_nB = self.values_NB[rows[mask]]
            means_B = self._means(values_nB, weights, d)
            for p, name in enumerate(self.covariates):
                column = self.column_P[p]
                if name == "log2_tokens":
                    values_DP[d, p] = np.log2(n_tokens[mask].sum())
                elif name == "duplicate_share":
                    values_DP[d, p] = 1.0 - n_tokens[mask].sum() / weights.sum()
                elif name == "sample_compress_ratio":
                    values_DP[d, p] = np.nan if sample_ratio_D is None else sample_ratio_D[d]
                elif name.startswith(LOG_TASK_LIKE_PREFIX):
                    values_DP[d, p] = np.log2(LEAST_LIKE + means_B[column])
                elif name.endswith(tuple(QUANTILES)) and name != base_of(name):
                    values_DP[d, p] = weighted_quantile(
                        values_nB[:, column], weights, QUANTILES[name[-4:]]
                    )
                else:
                    values_DP[d, p] = means_B[column]
        return values_DP

    def _means(self, values_nB: np.ndarray, weights_n: np.ndarray, domain: int) -> np.ndarray:
        """Token-weighted means of the columns over the documents that have a value."""
        has_nB = ~np.isnan(values_nB)
        if has_nB.all():
            return weights_n @ values_nB / weights_n.sum()
        total_B = weights_n @ has_nB
        means_B = weights_n @ np.where(has_nB, values_nB, 0.0) / np.maximum(total_B, 1e-300)
        for b in np.flatnonzero(total_B == 0):
            of_domain = (self.domain_N == domain) & ~np.isnan(self.values_NB[:, b])
            weights = self.n_tokens_N[of_domain]
            known = weights.sum() > 0
            means_B[b] = weights @ self.values_NB[of_domain, b] / weights.sum() if known else np.nan
        return means_B


def weighted_quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """The smallest value that has at least `share` of the weight at or below it; NaNs left out."""
    known = ~np.isnan(values)
    if not known.any():
        return float("nan")
    order = np.argsort(values[known], kind="stable")
    running = np.cumsum(weights[known][order])
    place = np.searchsorted(running, share * running[-1])
    return float(values[known][order][min(int(place), len(order) - 1)])


def measure_covariates(
    documents: pl.DataFrame, domains: Sequence[str], covariates: Sequence[str]
) -> np.ndarray:
    """Measure a whole pool's covariates.

    Args:
        documents: the documents frame; augmented documents are left out, the others count as often
            as `copies` says.
        domains: D domains, in the pool's order.
        covariates: P names.

    Returns:
        Shape (D, P); see `CovariateMeter.measure`.

    Raises:
        PoolError: if a domain has no document, or a metric is missing.
    """
    originals = documents.filter(~pl.col("augmented"))
    meter = CovariateMeter.of(originals, domains, covariates)
    rows = np.arange(originals.height)
    return meter.measure(rows, originals["copies"].to_numpy(), sample_ratios(documents, domains))


def sample_ratios(documents: pl.DataFrame, domains: Sequence[str]) -> list[float] | None:
    """`sample_compress_ratio` of each domain of a profiled pool; None where it wasn't measured."""
    if "sample_compress_ratio" not in documents.columns:
        return None
    first = documents.group_by("domain").agg(pl.col("sample_compress_ratio").first())
    found = dict(first.iter_rows())
    return [found.get(domain, float("nan")) for domain in domains]


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Location and scale of each covariate of each domain over the experiment's reference states.

    A scaled value of 1 is one standard deviation of the states that the experiment pool can take,
    so a later pool is on the same scale.

    Attributes:
        domains: D domains.
        covariates: P names.
        mean_DP: mean over the reference states.
        scale_DP: standard deviation; 1 where a covariate never varies.
        scorers: keys of the scorers that the values come from.
    """

    domains: tuple[str, ...]
    covariates: tuple[str, ...]
    mean_DP: np.ndarray
    scale_DP: np.ndarray
    scorers: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls,
        values_MDP: np.ndarray,
        domains: Sequence[str],
        covariates: Sequence[str],
        scorers: Sequence[str] = (),
    ) -> Normaliser:
        """Fit on the covariates of the reference states, shape (M, D, P)."""
        scale_DP = values_MDP.std(axis=0)
        return cls(
            tuple(domains),
            tuple(covariates),
            values_MDP.mean(axis=0),
            np.where(scale_DP > 1e-9, scale_DP, 1.0),
            tuple(sorted(scorers)),
        )

    @property
    def version(self) -> str:
        """12 hex digits that change with any of its numbers, names or scorers."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def scale(self, values: np.ndarray) -> np.ndarray:
        """Scale raw covariates; shape (..., D, P)."""
        return (values - self.mean_DP) / self.scale_DP

    def to_dict(self) -> dict:
        """Plain values that JSON can hold."""
        return {
            "domains": list(self.domains),
            "covariates": list(self.covariates),
            "mean": self.mean_DP.tolist(),
            "scale": self.scale_DP.tolist(),
            "scorers": list(self.scorers),
        }

    @classmethod
    def from_dict(cls, values: Mapping) -> Normaliser:
        """Inverse of `to_dict`."""
        return cls(
            tuple(values["domains"]),
            tuple(values["covariates"]),
            np.array(values["mean"]),
            np.array(values["scale"]),
            tuple(values["scorers"]),
        )

    def check_scorers(self, scorers: Sequence[str], pool: str) -> None:
        """Refuse a pool that is scored otherwise than the experiment.

        Args:
            scorers: keys of the scorers of the pool at hand.
            pool: its name, for the message.

        Raises:
            PoolError: if they aren't those of this normaliser.
        """
        check_scorers(self.scorers, scorers, pool, f"the experiment (normaliser {self.version})")


def check_scorers(wanted: Sequence[str], found: Sequence[str], pool: str, reference: str) -> None:
    """Refuse a pool that is scored otherwise than the one it is held against.

    Args:
        wanted: keys of the scorers of the reference.
        found: keys of the scorers of the pool at hand.
        pool: its name, for the message.
        reference: the other's name.

    Raises:
        PoolError: if one of `wanted` is missing.
    """
    missing = sorted(set(wanted) - set(found))
    if missing:
        instead = ", ".join(sorted(set(found) - set(wanted))) or "nothing instead"
        raise PoolError(
            f"{pool} must be profiled as {reference} was, got other scorers: that has "
            f"{', '.join(missing)}, this {instead}. Values on two scales can't be compared: "
            "profile both again with the same settings and version."
        )
