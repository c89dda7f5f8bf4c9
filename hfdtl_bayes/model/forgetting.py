"""A fit without one of its configurations, from its draws: importance weights of the scales, then the coefficients drawn exactly.

With psi the scales and x_d = (log sigma_d, log omega_d) those of the configuration that goes, draws of p(psi, x_d | all rows) become draws of
p(psi | the other rows) by weights

    w = p(psi | the other rows) q(x_d | psi) / p(psi, x_d | all rows)

for any density q of x_d: both posteriors are known up to a constant from the statistics (`exact`), no row is read. The weights are most
even where q is what the draws say of x_d given psi, here a normal regression on the populations of noise and drift. With the prior of x_d
in place of q they would be one over a likelihood, whose variance is infinite as a rule. Vehtari, Gelman & Gabry (2017),
doi:10.1007/s11222-016-9696-4, smooth such weights and judge them by Pareto k, as is done here. Taking rows away widens the posterior,
which draws of the narrower one can fail to cover: then Pareto k says so, and a refit is the answer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from hfdtl_bayes.model.conditional import ConditionalSettings, Conditioned, resampled, smoothed
from hfdtl_bayes.model.diagnostics import Reweighting, effective_share
from hfdtl_bayes.model.exact import POPULATIONS, ExactDensity
from hfdtl_bayes.model.layout import posterior_tree
from hfdtl_bayes.model.new_configuration import move_scales
from hfdtl_bayes.model.posterior import LatencyPosterior
from hfdtl_bayes.model.sampling import SamplerRun, SamplerSettings

FloatArray = NDArray[np.float64]


def reweighted_without(
    posterior: LatencyPosterior, config_id: str, settings: ConditionalSettings | None = None, *, seed: int = 0
) -> Conditioned:
    """Reweight the draws of a fit to those of a fit without one of its configurations.

    Parameters
    ----------
    posterior : LatencyPosterior
        With Gaussian errors, of two configurations at least.
    config_id : str
        Fitted; not its target.
    settings : ConditionalSettings, optional
        When the draws may be used.
    seed : int
        The same seed gives the same draws.
    """
    settings = settings or ConditionalSettings()
    gone = posterior.config_ids.index(config_id)
    kept = [c for c in range(len(posterior.config_ids)) if c != gone]
    statistics = [posterior.statistics[c] for c in kept]
    priors = posterior.priors.discounts_of([s.config_id for s in statistics])
    less = replace(posterior, priors=priors, statistics=tuple(statistics), seed=seed)
    density = ExactDensity(statistics, posterior.feature_set, priors)
    names = ("tau", "hardware_share", "sigma", "omega", *POPULATIONS)
    tau, share, sigma, omega, *populations = (posterior.draws_of(n) for n in names)
    x = ExactDensity(posterior.statistics, posterior.feature_set, posterior.priors)
    log_all = x.log_density(x.join(tau, share, sigma, omega, populations))[0]
    left = density.join(tau, share, sigma[:, kept], omega[:, kept], populations)
    has_drift = priors.drift is not None
    own = np.log(np.column_stack([sigma[:, gone], omega[:, gone]]) if has_drift else sigma[:, [gone]])
    around = np.log(np.column_stack(populations if has_drift else populations[:2]))
    log_weights = density.log_density(left)[0] + _log_regression(own, around) - log_all
    chains = posterior.tree["posterior"].sizes["chain"]
    weights, pareto_k, effective = smoothed(log_weights, chains, 1)
    rng = np.random.default_rng([seed, 21])
    chosen = resampled(weights, weights.shape[1], rng)
    converged = posterior.convergence()
    effective *= effective_share(posterior.tree)
    found = Reweighting(pareto_k, effective, len(log_weights), 1, str(converged), converged.passed)
    tree = _tree(_variables(density, left[chosen], less, rng), less, chains, found)
    return Conditioned(replace(less, tree=tree), found, found.reason(settings.max_pareto_k, settings.min_effective))


def _log_regression(values: FloatArray, given: FloatArray) -> FloatArray:
    """Return the log density of each of S values, shape (S, V), in their normal regression on `given`, shape (S, G)."""
    design = np.column_stack([np.ones(len(given)), given - given.mean(axis=0)])
    away = values - design @ np.linalg.lstsq(design, values)[0]
    covariance = np.atleast_2d(np.cov(away.T))
    square = np.vecdot(away, np.linalg.solve(covariance, away.T).T)
    logs = values.shape[1] * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1] + square
    return np.asarray(-0.5 * logs)


def _variables(
    density: ExactDensity, scales: FloatArray, less: LatencyPosterior, rng: np.random.Generator
) -> dict[str, FloatArray]:
    """Return draws of everything by name, one for each value of the scales; copies of a draw are parted by moving the scales."""
    own = density.draw(scales, rng)
    base, config = len(less.feature_set.base), len(less.feature_set.config)
    beta, gamma, delta = np.split(own.pop("population"), [base, base + config], axis=1)
    own = move_scales(own | {"beta": beta, "gamma": gamma, "delta": delta}, less.statistics, less, rng)
    shared_sd = np.sqrt(own["hardware_share"])[:, None] * own["tau"] * density.pooled_scale
    own["hardware_effect_z"] = own["hardware_effect"] / shared_sd[:, None]
    return {n: v for n, v in own.items() if less.priors.drift is not None or not n.startswith("omega")}


def _tree(variables: dict[str, FloatArray], less: LatencyPosterior, chains: int, found: Reweighting) -> xr.DataTree:
    draws = len(variables["tau"]) // chains
    stats = xr.Dataset({"diverging": (("chain", "draw"), np.zeros((chains, draws), dtype=bool))})
    run = SamplerRun(np.zeros((chains * draws, 0)), stats, "importance resampling of the draws of a fit with one donor more")
    tree = posterior_tree(variables, run, less.statistics, less.feature_set, SamplerSettings(draws, 50, chains), "reweighted")
    tree["sample_stats"].attrs = {
        "engine": "reweighted",
        "sampler": run.sampler,
        "draws": draws,
        "chains": chains,
        "reweighting": found.dump(),
    }
    return tree
