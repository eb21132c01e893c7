"""What people see of the checks of the effect model: what was found, and what to do."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from causalmix_pipeline.assets.pictures import by_domain_table

#: What to do where a check doesn't pass.
WAYS_OUT = {
    "above_the_noise_floor": "train longer or larger proxies",
    "randomised": "draw mixtures at random; declare sources",
    "beats_placebo": "make more runs, or train longer",
    "state_matters": "widen design.states; more covariates",
}


def check_rows(checks: Sequence[dg.AssetCheckResult]) -> list[dict]:
    """A row per check: whether it passed, what was found, what to do if it didn't."""
    return [
        {
            "check": (check.check_name or "").replace("_", " "),
            "passed": check.passed,
            "found": "; ".join(
                f"{name}: {entry.value:.3g}"
                if isinstance(entry.value, float)
                else f"{name}: {entry.value}"
                for name, entry in check.metadata.items()
                if name != "limit" and entry.value != "none"
            ),
            "what to do": "" if check.passed else WAYS_OUT[check.check_name or ""],
        }
        for check in checks
    ]


def trial_rows(trials: Sequence[Mapping]) -> list[dict]:
    """A row per test and task, names in words."""
    return [
        {
            "do they matter": row["check"].replace("_matter", ""),
            "for": row["task"],
            "correlation": row["estimate"],
            "± se": row["se"],
            "p": row["p_value"],
            "shown": row["passed"],
        }
        for row in trials
    ]


def power_metadata(power: Sequence[Mapping], n_runs: int) -> dict[str, Any]:
    """What the runs can tell: the table of `core.power`, tasks as columns, and its curve."""
    names = {
        "sd of mixtures": "mixture_sd",
        "sd of seeds": "seed_sd",
        "mixtures / seeds (variances)": "ratio",
        "smallest gain found": "smallest_gain",
        "gain in reach": "in_reach",
        "probability to find that": "detection",
        "runs needed for it": "runs_needed",
    }
    tasks = [row["task"] for row in power]
    curve = {
        f"{int(size):,} runs": [row["curve"][size] for row in power]
        for size in (power[0]["curve"] if power else ())
    }
    return {
        f"what {n_runs} runs can tell": by_domain_table(
            tasks,
            {word: [row[name] for row in power] for word, name in names.items()},
            "figure",
            "task",
        ),
        "smallest gain found, by runs": by_domain_table(tasks, curve, "runs", "task"),
    }
