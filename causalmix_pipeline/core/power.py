"""What a number of proxy runs can tell: the smallest gain that they detect, and its power curve.

Standard power analysis of a regression (the F test of Fisher's analysis of variance, with the
noncentral F distribution of its statistic; Cohen, Statistical Power Analysis, 1988, chapter 9).

The model. Within a pool state the outcome is `f(t) + e`: `f` is linear in `p` features of the
mixture, `e` is seed noise of variance `s2`, the same everywhere. A state's mean is a nuisance, so
of N runs with m mixtures a state `n = N (1 - 1/m)` contrasts are left. Let the features be
whitened, so that over the design's mixtures each has variance 1 and no two are correlated. Then
`f = b . z`, the variance between mixtures within a state is `t2 = |b|^2`, and the estimate of `b`
has variance `s2 / n` in each direction.

The gain. A mixture at the distance `d` from the reference, in these units, gains `d |b|` at most,
in the direction of `b`. The mixtures of the design lie `sqrt(p)` from their mean, as a root mean
square; so far a recommended mixture is taken to lie. The gain in reach is `sqrt(p) t`.

The test. The recommended direction is chosen from the same runs, that of the estimate of `b`. Its
predicted gain over its standard error is then `|b| sqrt(n) / s`, which seeds alone make as large as
`sqrt(p)`: a bound for one mixture that was named beforehand (1.64 standard errors) would announce a
gain in most experiments without any. The bound that holds for a chosen direction is Scheffe's,
`sqrt(p F)` with F the 95% quantile of F(p, n - p). That is the F test of all features together: it
errs in 5% of the experiments without effect, always to the side of a gain. With an effect its
statistic is noncentral F with the noncentrality `n t2 / s2`. The smallest gain is the one at which
the test is passed with 80% probability.

Assumed, and what it means where it fails: effects that states share (those that differ by state
have more features and need more runs), seed noise alike everywhere, and no part of `f` beyond the
features (curvature counts as noise, and adds to the smallest gain).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from causalmix_pipeline.core.errors import EstimationError

#: Probability of an announced gain where there is none.
LEVEL = 0.05
#: Probability that a gain of the smallest size is found.
POWER = 0.8
#: Numbers of proxy runs of a power curve.
CURVE_SIZES = (16, 32, 64, 128, 256, 512, 1024)
#: Most runs that are named as enough; beyond, other proxies are the way.
MOST_RUNS = 65_536
#: Noncentrality beyond which every test of a hundred features or fewer is passed.
_MOST_NONCENTRALITY = 1e6


@dataclass(frozen=True)
class Experiment:
    """What of a design decides its power.

    Attributes:
        n_runs: distinct (pool state, mixture) pairs, N.
        mixtures_per_state: mixtures tried on each pool state, m >= 2.
        n_features: features of the mixture that outcomes are linear in, p; D - 1 for D domains.
    """

    n_runs: int
    mixtures_per_state: int
    n_features: int

    def __post_init__(self) -> None:
        """Check the counts."""
        for name, least in (("n_runs", 1), ("mixtures_per_state", 2), ("n_features", 1)):
            if getattr(self, name) < least:
                raise EstimationError(
                    f"{name} must be >= {least}, got {getattr(self, name)}: with one mixture a "
                    "state, or one domain, there is nothing to compare."
                )

    @property
    def n_contrasts(self) -> float:
        """Degrees of freedom between mixtures of one state, n."""
        return self.n_runs * (1 - 1 / self.mixtures_per_state)

    @property
    def error_df(self) -> float:
        """Degrees of freedom of the error, n - p; a test needs at least 1."""
        return self.n_contrasts - self.n_features

    def detection(self, ratio: float) -> float:
        """Probability that the effect of mixtures is found.

        Args:
            ratio: variance between mixtures of a state over that between seeds; >= 0.
        """
        from scipy.stats import ncf

        if self.error_df < 1:
            return 0.0
        noncentrality = min(self.n_contrasts * ratio, _MOST_NONCENTRALITY)
        if noncentrality == 0:
            return LEVEL
        with np.errstate(all="ignore"):  # its series may overflow on the way to a right value
            return float(ncf.sf(self._critical, self.n_features, self.error_df, noncentrality))

    @property
    def _critical(self) -> float:
        from scipy.stats import f

        return float(f.ppf(1 - LEVEL, self.n_features, self.error_df))

    def smallest_ratio(self) -> float | None:
        """The ratio of variances that is found with a probability of 80%; None with no test."""
        from scipy.optimize import brentq

        if self.error_df < 1:
            return None
        low, high = 1e-9, 1.0
        while self.detection(high) < POWER:
            high *= 2
        found = brentq(lambda ratio: self.detection(ratio) - POWER, low, high, xtol=1e-10)
        return float(found)  # pyright: ignore[reportArgumentType]

    def smallest_gain(self, seed_sd: float) -> float | None:
        """The smallest gain that is found with a probability of 80%, in units of the outcome."""
        ratio = self.smallest_ratio()
        return None if ratio is None else float(np.sqrt(self.n_features * ratio)) * seed_sd

    def runs_needed(self, ratio: float) -> int | None:
        """Fewest runs, in whole states, that find such an effect; None beyond `MOST_RUNS`."""

        def enough(states: int) -> bool:
            return self.of_size(states * self.mixtures_per_state).detection(ratio) >= POWER

        low, high = 0, 1
        while not enough(high):
            low, high = high, 2 * high
            if low * self.mixtures_per_state > MOST_RUNS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high * self.mixtures_per_state

    def of_size(self, n_runs: int) -> Experiment:
        """The same kind of experiment with another number of runs."""
        return Experiment(n_runs, self.mixtures_per_state, self.n_features)


def power_table(
    floor: pl.DataFrame, experiment: Experiment, sizes: Sequence[int] = CURVE_SIZES
) -> list[dict]:
    """What each task's runs can tell.

    Args:
        floor: what `core.belief.noise_floor` found of runs, all of the design or a pilot.
        experiment: the design whose power is asked for.
        sizes: numbers of runs of the power curve.

    Returns:
        One row per task: `task`; `seed_sd` and `mixture_sd`, standard deviations in units of the
        outcome, and `ratio`, of their squares; `in_reach`, the gain of the best mixture as far
        from the reference as the design's are from their mean; `smallest_gain` that the design
        sees; `detection`, the probability that it sees what is in reach; `runs_needed` for 80%
        (null where none are enough); `curve`, the smallest gain by number of runs; and `seed_df`,
        from how many repeated runs. All but the first are null without repeated runs.
    """
    ratios = {size: experiment.of_size(size).smallest_ratio() for size in sizes}
    own = experiment.smallest_ratio()
    root = float(np.sqrt(experiment.n_features))
    rows = []
    for row in floor.iter_rows(named=True):
        seed, mixture = row["seed_variance"], row["mixture_variance"]
        known = seed is not None and mixture is not None
        seed_sd = float(np.sqrt(seed)) if seed is not None and known else None
        mixture_sd = float(np.sqrt(mixture)) if mixture is not None and known else None
        rows.append(
            {
                "task": row["task"],
                "seed_sd": seed_sd,
                "mixture_sd": mixture_sd,
                "ratio": row["ratio"],
                "in_reach": None if mixture_sd is None else root * mixture_sd,
                "smallest_gain": _gain(own, seed_sd, root),
                "detection": None if not known else experiment.detection(row["ratio"]),
                "runs_needed": None if not known else experiment.runs_needed(row["ratio"]),
                "curve": {str(size): _gain(ratio, seed_sd, root) for size, ratio in ratios.items()},
                "seed_df": row["seed_df"],
            }
        )
    return rows


def _gain(ratio: float | None, seed_sd: float | None, root: float) -> float | None:
    return None if ratio is None or seed_sd is None else root * ratio**0.5 * seed_sd


def sd_interval(df: int) -> tuple[float, float]:
    """The 90% interval of a standard deviation over its estimate from so many repeats."""
    from scipy.stats import chi2

    low, high = chi2.ppf((0.95, 0.05), df)
    return float(np.sqrt(df / low)), float(np.sqrt(df / high))
