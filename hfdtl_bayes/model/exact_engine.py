"""The exact engine: the scales sampled, then every coefficient drawn exactly given them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.exact import ExactDensity
from hfdtl_bayes.model.hmc import run_hmc
from hfdtl_bayes.model.layout import check_statistics, posterior_tree
from hfdtl_bayes.model.nuts import SamplerSettings
from hfdtl_bayes.model.priors import PriorSettings
from hfdtl_bayes.model.scale_coordinates import scale_coordinates
from hfdtl_bayes.statistics import ConfigStatistics


def sample_exact(
    statistics: Sequence[ConfigStatistics],
    feature_set: FeatureSet,
    priors: PriorSettings | None = None,
    settings: SamplerSettings | None = None,
    *,
    seed: int = 0,
    show_progress: bool = True,
    label: str = "sampling",
) -> xr.DataTree:
    """Sample the posterior of several configurations with the exact engine.

    Parameters
    ----------
    statistics : sequence of ConfigStatistics
    feature_set : FeatureSet
    priors : PriorSettings, optional
    settings : SamplerSettings, optional
    seed : int
        The same seed gives the same draws.
    show_progress : bool
    label : str
        What the progress bar calls the work.

    Returns
    -------
    DataTree
        Groups `posterior` (chain, draw, ...), `sample_stats`, `observed_data`; names and dims of `VARIABLE_DIMS`.

    Raises
    ------
    StatisticsError
        If the statistics cannot be fitted together.
    ConvergenceError
        If the sampler cannot start.
    """
    priors, settings = priors or PriorSettings(), settings or SamplerSettings()
    check_statistics(statistics, feature_set)
    density = ExactDensity(statistics, feature_set, priors)
    scales, run = run_hmc(scale_coordinates(density), settings, seed=seed, label=label, show_progress=show_progress)
    variables = density.draw(scales, np.random.default_rng([seed, 3]))
    base, config = len(feature_set.base), len(feature_set.config)
    beta, gamma, delta = np.split(variables.pop("population"), [base, base + config], axis=1)
    variables |= {"beta": beta, "gamma": gamma, "delta": delta}
    if priors.drift is None:
        variables = {n: v for n, v in variables.items() if not n.startswith("omega")}
    return posterior_tree(variables, run, statistics, feature_set, settings, "exact")
