"""How far to believe an effect model, as a part of pages: `templates/beliefs.html.j2` draws it.

Both the page of `causalmix explain` and the pipeline's report show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from causalmix_pipeline.core.belief import OBSERVATIONAL_R2
from causalmix_pipeline.core.falsification import OBJECTIVE

#: What each test of `core.falsification` asks.
QUESTIONS = {"mixtures_matter": "Do mixtures matter?", "states_matter": "Do pool states matter?"}


@dataclass(frozen=True, eq=False)
class Beliefs:
    """What was tried to prove the model wrong, what can't be known, and what more runs are worth.

    Attributes:
        treatment_r2: R2 of the mixture given the covariates; None without covariates.
        observational_sources: sources of runs that weren't declared randomised.
        trials: rows of `core.falsification.frame_rows`.
        gain_of: what mixture `confounder` is about, in words.
        confounder: what part of mixture and outcome alike a hidden cause must explain to bring that
            mixture's gain over the equal one to zero, and its lower bound; None if unknown.
        why_unknown: why `confounder` is None.
        more_runs: what twice the runs would bring, or why that can't be told; no full stop.
    """

    treatment_r2: float | None
    observational_sources: Sequence[str]
    trials: Sequence[Mapping[str, Any]]
    gain_of: str
    confounder: tuple[float, float] | None
    why_unknown: str
    more_runs: str

    @property
    def is_observational(self) -> bool:
        """Whether something about the pools, or a person, may have decided the mixtures."""
        told = self.treatment_r2 is not None and self.treatment_r2 > OBSERVATIONAL_R2
        return told or bool(self.observational_sources)


def beliefs_view(beliefs: Beliefs) -> dict[str, Any]:
    """What the template draws: the tests of the weighted objective, and tasks that fail alone."""
    return {
        "beliefs": beliefs,
        "trials": [
            _trial(question, [row for row in beliefs.trials if row["check"] == check])
            for check, question in QUESTIONS.items()
        ],
    }


def _trial(question: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    whole = next(row for row in rows if row["task"] == OBJECTIVE)
    failed = [row["task"] for row in rows if row["passed"] is False and row is not whole]
    return {**whole, "question": question, "failed": failed}
