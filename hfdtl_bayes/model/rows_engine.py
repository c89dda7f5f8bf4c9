"""The rows engine: NUTS on the row-level PyMC model, compiled once per feature set, prior and likelihood.

It costs time in proportion to the rows and is there for what the other engines cannot say: whether errors are Gaussian. With the
Gaussian likelihood it is the third road to the same posterior.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import xarray as xr

from hfdtl_bayes.errors import StatisticsError
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.layout import check_statistics, posterior_tree
from hfdtl_bayes.model.likelihoods import NU_PRIOR, RATIO_PRIOR, SHARE_PRIOR, check_likelihood
from hfdtl_bayes.model.priors import PriorSettings
from hfdtl_bayes.model.progress import progress
from hfdtl_bayes.model.pymc_engine import CompiledModel, compile_model, run_compiled, starting_point
from hfdtl_bayes.model.rows_model import build_rows_model, reference_fit, rows_data
from hfdtl_bayes.model.sampling import SamplerSettings
from hfdtl_bayes.statistics import ScaledRows

_COMPILED: dict[tuple[FeatureSet, PriorSettings, str], CompiledModel] = {}
_LOCK = threading.Lock()


def _start(rows: Sequence[ScaledRows], feature_set: FeatureSet, priors: PriorSettings) -> dict[str, np.ndarray]:
    start = starting_point([r.statistics for r in rows], feature_set, priors)
    core = np.log([reference_fit(r, priors, robust=True).core for r in rows])
    share = SHARE_PRIOR[0] / sum(SHARE_PRIOR)
    return start | {
        "core_log__": core,
        "core_typical_log__": np.array(core.mean()),
        "core_spread_log__": np.array(priors.noise_spread.log_mean),
        "block_eta": np.zeros(sum(len(r.starts) for r in rows)),
        "nu_excess_log__": np.log(NU_PRIOR[0] / NU_PRIOR[1]),
        "outlier_share_logodds__": np.log(share / (1 - share)),
        "outlier_ratio_excess_log__": np.array(RATIO_PRIOR[0]),
    }


def sample_rows(
    rows: Sequence[ScaledRows],
    feature_set: FeatureSet,
    priors: PriorSettings | None = None,
    settings: SamplerSettings | None = None,
    *,
    likelihood: str = "gaussian",
    seed: int = 0,
    show_progress: bool = True,
    label: str = "sampling",
) -> xr.DataTree:
    """Sample the posterior of several configurations from their rows.

    Parameters
    ----------
    rows : sequence of ScaledRows
        One per configuration; see `scaled_rows`.
    feature_set : FeatureSet
    priors : PriorSettings, optional
    settings : SamplerSettings, optional
    likelihood : {"gaussian", "student_t", "lognormal", "outliers"}
    seed : int
        The same seed gives the same draws.
    show_progress : bool
    label : str
        What the progress bar calls the work.

    Returns
    -------
    DataTree
        Groups `posterior` (chain, draw, ...), `sample_stats`, `observed_data`, as those of the other engines; beside their
        variables those of the likelihood's shape.

    Raises
    ------
    StatisticsError
        If the rows cannot be fitted together, or the lognormal is asked to explain an observation that is not positive.
    UnknownNameError
        If there is no such likelihood.
    ConvergenceError
        If the sampler cannot start or breaks down.
    """
    priors, settings = priors or PriorSettings(), settings or SamplerSettings()
    check_likelihood(likelihood)
    statistics = [r.statistics for r in rows]
    check_statistics(statistics, feature_set)
    for own in rows:
        zero = int((own.observed <= 0).sum())
        if likelihood == "lognormal" and zero:
            raise StatisticsError(
                f"configuration {own.config_id!r}: {zero} of {len(own.observed)} observations are not above zero, which a lognormal "
                "cannot explain; take another likelihood"
            )
    data = rows_data(rows, feature_set, priors, likelihood)
    with _LOCK:
        key = (feature_set, priors, likelihood)
        if key not in _COMPILED:
            with progress(f"compiling the {likelihood} model of {feature_set.name}", 1, enabled=show_progress):
                _COMPILED[key] = compile_model(build_rows_model(rows, feature_set, priors, likelihood))
        start = _start(rows, feature_set, priors)
        run, variables = run_compiled(_COMPILED[key], data, start, settings, seed=seed, label=label, show_progress=show_progress)
    tree = posterior_tree(variables, run, statistics, feature_set, settings, "rows")
    tree["sample_stats"].attrs["likelihood"] = likelihood
    return tree
