"""The exact engine: the scales sampled, then every coefficient drawn exactly given them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.diagnostics import ConvergenceSettings, convergence
from hfdtl_bayes.model.exact import ExactDensity
from hfdtl_bayes.model.hmc import run_hmc
from hfdtl_bayes.model.layout import check_statistics, posterior_tree
from hfdtl_bayes.model.priors import PriorSettings
from hfdtl_bayes.model.sampling import SamplerSettings
from hfdtl_bayes.model.scale_coordinates import ScaleCoordinates, scale_coordinates
from hfdtl_bayes.statistics import ConfigStatistics

_THIN = (1, 4, 16)
"""Draws made for each one kept, tried in turn until the chains agree: several modes, as of data far from their prior, need more."""
_WANTED = ConvergenceSettings(max_rhat=1.01, max_divergent_share=0.0)
"""Stricter than what a fit is refused for, so that a fit made without settings is seldom near that."""
_CLOSER = 5.0
"""By how much rejections are made rarer, with shorter steps, after a run with divergences."""


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
        By default the usual ones, and where they do not converge four and then sixteen times as many draws, thinned to as many kept,
        with shorter steps where there were divergences.
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
    priors = priors or PriorSettings()
    check_statistics(statistics, feature_set)
    coordinates = scale_coordinates(ExactDensity(statistics, feature_set, priors))
    if settings is not None:
        return _sample(coordinates, statistics, settings, seed=seed, show_progress=show_progress, label=label)
    target = SamplerSettings().target_accept
    for thin in _THIN:
        settings = SamplerSettings(thin=thin, target_accept=target)
        tree = _sample(coordinates, statistics, settings, seed=seed, show_progress=show_progress, label=label)
        found = convergence(tree, _WANTED)
        if found.passed:
            break
        if found.divergences:
            target = 1.0 - (1.0 - target) / _CLOSER
    return tree


def _sample(
    coordinates: ScaleCoordinates,
    statistics: Sequence[ConfigStatistics],
    settings: SamplerSettings,
    *,
    seed: int,
    show_progress: bool,
    label: str,
) -> xr.DataTree:
    density = coordinates.density
    feature_set = density.feature_set
    scales, run = run_hmc(coordinates, settings, seed=seed, label=label, show_progress=show_progress)
    variables = density.draw(scales, np.random.default_rng([seed, 3]))
    base, config = len(feature_set.base), len(feature_set.config)
    beta, gamma, delta = np.split(variables.pop("population"), [base, base + config], axis=1)
    variables |= {"beta": beta, "gamma": gamma, "delta": delta}
    if density.priors.drift is None:
        variables = {n: v for n, v in variables.items() if not n.startswith("omega")}
    return posterior_tree(variables, run, statistics, feature_set, settings, "exact")
