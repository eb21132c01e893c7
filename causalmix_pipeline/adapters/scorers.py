"""Which scorers a profile runs."""

from __future__ import annotations

from pathlib import Path

from causalmix_pipeline.adapters.language_scores import LanguageScorer
from causalmix_pipeline.adapters.lexical_scores import LexicalScorer, VocdScorer
from causalmix_pipeline.adapters.near_duplicates import MinHashScorer
from causalmix_pipeline.adapters.profiler import ScorerPlan
from causalmix_pipeline.adapters.text_scores import (
    CharacterScorer,
    CompressionScorer,
    LogicalWordsScorer,
    StyleScorer,
)
from causalmix_pipeline.adapters.token_scores import TokenScorer
from causalmix_pipeline.adapters.transformers_lm import IfdScorer, LMScorer
from causalmix_pipeline.adapters.transformers_rater import RaterScorer


def model_free_plans(tokens: TokenScorer, *, vocd_budget_tokens: int) -> list[ScorerPlan]:
    """Scorers that need no model.

    Args:
        tokens: counts tokens by the experiment pool's tokenizer.
        vocd_budget_tokens: tokens of each domain whose `vocd_d` is fitted.
    """
    whole = [
        CharacterScorer(),
        CompressionScorer(),
        LogicalWordsScorer(),
        LexicalScorer(),
        StyleScorer(),
        LanguageScorer(),
        MinHashScorer(),
        tokens,
    ]
    return [*map(ScorerPlan, whole), ScorerPlan(VocdScorer(), vocd_budget_tokens)]


def model_plans(
    *,
    lm: Path | None,
    lm_budget_tokens: int,
    rater: Path | None,
    rater_budget_tokens: int,
    device: str,
) -> list[ScorerPlan]:
    """Scorers that need a model; each scores a sample of every domain.

    Args:
        lm: folder of a causal language model, or None.
        lm_budget_tokens: tokens of each domain that it scores.
        rater: folder of a sequence classifier or regressor, or None.
        rater_budget_tokens: tokens of each domain that it rates.
        device: torch device, or auto.
    """
    plans = []
    if lm is not None:
        scorer = LMScorer.open(lm, device=device)
        plans.append(ScorerPlan(scorer, lm_budget_tokens))
        plans.append(ScorerPlan(IfdScorer(scorer), lm_budget_tokens))
    if rater is not None:
        plans.append(ScorerPlan(RaterScorer.open(rater, device=device), rater_budget_tokens))
    return plans
