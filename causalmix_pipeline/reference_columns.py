"""What each column means of the tables that commands print and write.

Names are those in the table's head; `<...>` stands for names from the user's data. A test runs the
commands and compares.
"""

from typing import NamedTuple


class Column(NamedTuple):
    """A column of a table."""

    name: str
    means: str


_GAIN = "predicted outcome less that of the reference, weighted over tasks; above 0 is better"
_INTERVAL = "where the gain lies in 9 of 10 cases, seed noise of one training run not included"
_VERDICT = "`supported`, `extrapolating` or `unsupported`: how near the pool is to the runs' pools"
_POOL = Column("pool", "name of the live pool, or of the row of the file of pools")
_DOMAIN = Column("domain", "name of the domain")
_TASK = Column("task", "name of the task")
_SHARE = Column("<domain>", "share of training tokens of this domain")

#: Columns of the tables that commands print, by what prints them.
PRINTED: dict[str, tuple[Column, ...]] = {
    "`causalmix status`": (
        Column("asset", "name of the asset"),
        Column(
            "state",
            "up to date, never made, why it's stale, perhaps stale (one above is), or on request",
        ),
        Column("last made", "local time"),
    ),
    "`causalmix status` and `refresh`, several live pools": (
        _POOL,
        Column("state", "up to date, or what changed"),
        Column("recommended", "when, local time"),
        Column("gain, bits a byte", f"{_GAIN}; its 90% interval in brackets"),
        Column("verdict", _VERDICT),
    ),
    "mixtures (`causalmix demo` and `refresh`)": (
        _DOMAIN,
        Column(
            "recommended",
            "share of training tokens; the last row is the predicted gain with its 90% interval",
        ),
        Column("natural", "the live pool's own token shares"),
        Column("equal", "the same share for each domain"),
        Column("fixed", "your own mixture, `policy.fixed_mixture`"),
        Column("RegMix", "trees fitted on the same proxy runs, without the pool's state"),
        Column("grid", "the best point of a grid of mixtures, without the pool's state"),
        Column("log_linear", "data mixing laws, without the pool's state"),
        Column(
            "dmo", "laws of each domain's own loss; only where each domain has a task of its name"
        ),
    ),
    "signal of the proxy runs (`causalmix demo`)": (
        _TASK,
        Column(
            "mixtures / seeds",
            "variance of losses between mixtures over that between seeds; below 2 it tells nothing",
        ),
        Column("above noise", "whether that is more than chance (F test at 5%)"),
        Column("loss, nats a token", "median held-out loss of the proxy runs"),
        Column(
            "unigram entropy", "what a model that only counts tokens would have there, nats a token"
        ),
    ),
    "estimators (`causalmix demo`)": (
        _TASK,
        Column("estimator", "name; the one that answers is marked"),
        Column(
            "R2 within states",
            "share of variance between mixtures explained on pool states left out, ± s.e.",
        ),
        Column("Spearman", "how well the order of mixtures is predicted there; 1 is perfectly"),
        Column(
            "coverage of 90%",
            "how many outcomes left out lie in the 90% interval, before it is widened",
        ),
    ),
    "what moved (`causalmix demo`)": (
        _DOMAIN,
        Column("covariate", "name of the covariate"),
        Column("before", "value before the change"),
        Column("after", "value after it"),
        Column("moved", "in standard deviations over the experiment's pool states"),
    ),
    "before and after (`causalmix demo`)": (
        _DOMAIN,
        Column("before", "recommended share before the change"),
        Column("after", "recommended share after it"),
        Column("change", "in points of a hundred"),
        Column("natural, after", "the pool's own token share after it"),
    ),
    "planned top-up runs (`causalmix demo`)": (Column("run", "number of the run"), _SHARE),
    "power (`causalmix plan`)": (
        _TASK,
        Column("seed sd", "standard deviation of the outcome between runs equal but for the seed"),
        Column("signal", "variance between mixtures over that of seeds"),
        Column(
            "in reach",
            "gain of the best mixture as far off the reference as the design's are off their mean",
        ),
        Column("<N> runs", "smallest gain that so many runs see: 80% probability, 5% level"),
        Column("seen by <N>", "chance that the design sees what is in reach"),
        Column("needed", "runs for a chance of 80%"),
    ),
    "`causalmix covariates`": (
        Column("subset", "covariates that were tried together"),
        Column("size", "how many"),
        Column(
            "R2 within unseen states",
            "share of the variance between mixtures explained on states left out",
        ),
        Column("s.e.", "its standard error"),
        Column("below best", "how much less that is than the best subset's"),
        Column("s.e. of that", "standard error of the difference"),
    ),
    "`causalmix doctor`": (
        Column("check", "what was looked at"),
        Column("result", "ok, mended, warning or wrong"),
        Column("detail", "what was found, and what to do"),
    ),
    "`causalmix profile`": (
        _DOMAIN,
        Column("documents", "distinct documents"),
        Column("tokens", "of these, by the pool's own tokenizer"),
        Column("<covariate>", "its value in the domain"),
    ),
    "`causalmix profile --like`: documents": (
        _DOMAIN,
        Column("in", "documents that are new"),
        Column("out", "documents that are gone"),
        Column("kept", "documents in both"),
    ),
    "`causalmix profile --like`: covariates": (
        _DOMAIN,
        Column("covariate", "name of the covariate"),
        Column("before", "value in the earlier profile"),
        Column("after", "value in this one"),
        Column("effect", "difference in standard deviations of documents"),
        Column("z", "difference in its standard errors; shown from 3 on"),
    ),
    "`causalmix fit`": (
        Column("metric", "column of the table of metrics"),
        Column("estimator", "name; the one that answers is marked"),
        Column(
            "R2 within states",
            "share of the variance between mixtures explained on pool states left out",
        ),
        Column("R2", "share of all variance explained on runs left out"),
        Column("Spearman", "how well the order of runs left out is predicted; 1 is perfectly"),
        Column("in 90%", "how many outcomes left out lie in the 90% interval"),
    ),
    "`causalmix recommend`": (
        _POOL,
        _SHARE,
        Column("gain", f"{_GAIN}; in the metrics' units"),
        Column("90% interval", _INTERVAL),
        Column("verdict", _VERDICT),
    ),
    "`causalmix pareto`": (_SHARE, Column("<metric>", "gain in this metric over the reference")),
    "`causalmix baselines`": (
        _POOL,
        Column("baseline", "name of the simpler method"),
        _SHARE,
        Column("gain", f"{_GAIN}; in the metrics' units"),
        Column("90% interval", _INTERVAL),
    ),
    "`causalmix export`": (
        _DOMAIN,
        Column("asked", "share of training tokens in the recommended mixture"),
        Column("achieved", "share that the configuration or the sample gives"),
        Column("tokens", "of this domain in the training run"),
        Column("epochs", "how often its documents are read"),
    ),
    "`causalmix top-up`": (
        Column("pool out of reach", "name of the pool"),
        Column("runs to train", "how many; each is a row of the file written"),
    ),
}

_LOWER = Column("gain_lower", "lower end of the gain's 90% interval")
_UPPER = Column("gain_upper", "upper end of the gain's 90% interval")

#: Columns of the files that commands write, by what writes them.
WRITTEN: dict[str, tuple[Column, ...]] = {
    "`causalmix predict --out`": (
        Column("run", "name of the row of `--ratios`"),
        Column("<metric>", "predicted value, in the metric's own units"),
    ),
    "`causalmix recommend --out`": (
        _POOL,
        _SHARE,
        Column("gain", f"{_GAIN}; in the metrics' units"),
        _LOWER,
        _UPPER,
        Column("verdict", _VERDICT),
    ),
    "`causalmix recommend --slack`": (
        _POOL,
        Column("constraint", "which domain, share, task or radius is held"),
        Column("value", "what the recommended mixture has"),
        Column("limit", "what it may have"),
        Column("slack", "how far it is from the limit: shares, nats, or the task's units"),
        Column("binds", "whether it is at the limit"),
    ),
    "`causalmix pareto --out`": (
        _SHARE,
        Column("gain_first", "gain in the first metric"),
        Column("gain_first_se", "its standard error"),
        Column("gain_second", "gain in the second metric"),
        Column("gain_second_se", "its standard error"),
    ),
    "`causalmix baselines --out`": (
        _POOL,
        Column("baseline", "name of the simpler method"),
        _SHARE,
        Column("gain", f"{_GAIN}; in the metrics' units"),
        _LOWER,
        _UPPER,
    ),
    "`causalmix runs --out`, ratios.csv": (
        Column("run", "the run's own id; `name` is the same"),
        Column("name", "as `run`"),
        Column("index", "number of the row, from 0"),
        _SHARE,
    ),
    "`causalmix runs --out`, metrics.csv": (
        Column("run", "as above"),
        Column("name", "as above"),
        Column("index", "as above"),
        Column("<task>", "in the task's own unit and direction"),
    ),
    "`causalmix runs --out`, covariates.csv": (
        Column("run", "as above"),
        Column("name", "as above"),
        Column("index", "as above"),
        Column("<domain>__<covariate>", "of the pool state that the run was trained on"),
    ),
    "`causalmix top-up --out`": (
        _POOL,
        Column("run", "name of the run to train; train it on that pool"),
        _SHARE,
    ),
}
