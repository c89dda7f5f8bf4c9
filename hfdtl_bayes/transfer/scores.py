"""Log scores that compare likelihoods and feature sets: left-out rows, time blocks and configurations.

All are log densities of seconds, the Jacobian of the row scale included, so that fits with different scales can be compared. What is
left out is a unit that tells nothing of itself through the others: a row where rows are independent, a time block where the
machine's speed drifts (its drift integrated out), a configuration where transfer is the question. Rows and blocks are left
out by importance sampling (PSIS: Vehtari, Gelman & Gabry 2017, doi:10.1007/s11222-016-9696-4), good where Pareto k stays below
its limit; that is not so for whole configurations, so donors are refitted without each, and the score is a closed form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy.special import logsumexp

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model import ExactDensity, LatencyPosterior, PriorSettings, SamplerSettings, drawn_coordinates, fit
from hfdtl_bayes.model.error_grid import ErrorPrior, propose
from hfdtl_bayes.model.exact import Information
from hfdtl_bayes.model.likelihoods import SHAPES, log_density, ordinary_weights
from hfdtl_bayes.model.moments import reference_errors
from hfdtl_bayes.statistics import ConfigStatistics, ScaledRows

FloatArray = NDArray[np.float64]

DEFAULT_DRAWS = 1000
"""Posterior draws that left-out densities are computed for: enough for the Pareto tail, few enough to keep rows times draws small."""

_NODES, _REACH = 27, 9.0
"""Points of the rule that integrates a block's drift, and how many sds to each side they reach."""

_ROUNDS = 8
_BYTES_AT_ONCE = 2**27


def row_log_density(posterior: LatencyPosterior, rows: ScaledRows, chosen: NDArray[np.int64] | None = None) -> FloatArray:
    """Return the log density of each row in seconds under a model without drift, shape (S, n).

    Parameters
    ----------
    posterior : LatencyPosterior
    rows : ScaledRows
        Of a fitted configuration.
    chosen : ndarray of int, optional
        Draws to use; all by default.

    Raises
    ------
    InputError
        If the model has drift, or the configuration was not fitted.
    """
    if posterior.priors.drift is not None:
        raise InputError(
            "rows of one time block share its drift, so a row left out is known from its neighbours and scores too well; leave out "
            "blocks (loo_blocks), or fit with drift=None"
        )
    theta, sigma, _, shape = _drawn(posterior, rows, chosen)
    return log_density(posterior.likelihood, shape, rows.observed, theta @ rows.design.T, sigma) - np.log(rows.scale)


def block_log_density(posterior: LatencyPosterior, rows: ScaledRows, chosen: NDArray[np.int64] | None = None) -> FloatArray:
    """Return the joint log density of each time block's rows in seconds, its drift integrated out, shape (S, B).

    For the Gaussian in closed form; otherwise by the trapezoidal rule around where the drift of the block lies, which for smooth
    peaked functions is exact to many digits.

    Parameters
    ----------
    posterior, rows, chosen
        As in `row_log_density`.

    Raises
    ------
    InputError
        If the configuration was not fitted.
    """
    theta, sigma, omega, shape = _drawn(posterior, rows, chosen)
    step = max(1, _BYTES_AT_ONCE // (8 * 4 * len(rows.observed)))
    parts = []
    for start in range(0, len(theta), step):
        p = slice(start, start + step)
        own = {n: v[p] for n, v in shape.items()}
        parts.append(_block_density(posterior.likelihood, own, rows, theta[p], sigma[p], omega[p]))
    return np.vstack(parts) - np.add.reduceat(np.log(rows.scale), rows.starts)


def _drawn(
    posterior: LatencyPosterior, rows: ScaledRows, chosen: NDArray[np.int64] | None
) -> tuple[FloatArray, FloatArray, FloatArray, dict[str, FloatArray]]:
    draws = posterior.draws(posterior.configuration(rows.config_id))
    keep = slice(None) if chosen is None else chosen
    return draws.theta[keep], draws.sigma[keep], draws.omega[keep], {n: v[keep] for n, v in draws.shape.items()}


def _block_density(
    likelihood: str, shape: dict[str, FloatArray], rows: ScaledRows, theta: FloatArray, sigma: FloatArray, omega: FloatArray
) -> FloatArray:
    mean, size = theta @ rows.design.T, rows.block_sizes

    def summed(values: FloatArray) -> FloatArray:
        return np.asarray(np.add.reduceat(values, rows.starts, axis=1))

    if not omega.any():
        return summed(log_density(likelihood, shape, rows.observed, mean, sigma))
    if likelihood == "gaussian":
        error = rows.observed - mean
        total = summed(error)
        within = summed((error - np.repeat(total / size, size, axis=1)) ** 2)
        noise = sigma[:, None] ** 2
        variance = noise + size * omega[:, None] ** 2
        logs = (size - 1) * np.log(noise) + within / noise + np.log(variance) + total**2 / size / variance
        return np.asarray(-0.5 * (logs + size * np.log(2 * np.pi)))
    drift, wide = np.zeros((len(theta), len(size))), omega[:, None] ** -2
    for _ in range(_ROUNDS):
        weight = ordinary_weights(likelihood, shape, rows.observed - mean - np.repeat(drift, size, axis=1), sigma)
        precision = summed(weight) + wide
        drift = summed(weight * (rows.observed - mean)) / precision
    # The weights make the curvature of a heavy-tailed density look larger than it is.
    width = 1.5 / np.sqrt(precision)
    nodes = np.linspace(-_REACH, _REACH, _NODES)
    logs = np.empty((_NODES, *drift.shape))
    for i, node in enumerate(nodes):
        at = drift + node * width
        logs[i] = summed(log_density(likelihood, shape, rows.observed, mean + np.repeat(at, size, axis=1), sigma))
        logs[i] -= 0.5 * at**2 * wide
    return np.asarray(logsumexp(logs, axis=0) + np.log((nodes[1] - nodes[0]) * width * np.sqrt(wide / (2 * np.pi))))


def loo_rows(posterior: LatencyPosterior, rows: Sequence[ScaledRows], *, draws: int = DEFAULT_DRAWS) -> Any:
    """Return the PSIS-LOO estimate of ArviZ over all rows; only for a model without drift.

    Parameters
    ----------
    posterior : LatencyPosterior
    rows : sequence of ScaledRows
        Those it was fitted to.
    draws : int
        Posterior draws to use, evenly spaced.

    Returns
    -------
    arviz_stats.ELPDData
        `elpd`, `se`, `p`, pointwise `elpd_i` and `pareto_k`, `good_k`.

    Raises
    ------
    InputError
        If the model has drift, or these are not the rows that were fitted.
    """
    return _loo(posterior, rows, row_log_density, draws)


def loo_blocks(posterior: LatencyPosterior, rows: Sequence[ScaledRows], *, draws: int = DEFAULT_DRAWS) -> Any:
    """Return the PSIS estimate of ArviZ with whole time blocks left out; parameters and result as of `loo_rows`."""
    return _loo(posterior, rows, block_log_density, draws)


def _loo(posterior: LatencyPosterior, rows: Sequence[ScaledRows], density: Any, draws: int) -> Any:
    import arviz as az  # noqa: PLC0415  (seconds to import)

    for own in rows:
        fitted = next((s for s in posterior.statistics if s.config_id == own.config_id), None)
        if fitted is None or fitted.rows != own.statistics.rows or fitted.blocks != own.statistics.blocks:
            raise InputError(
                f"rows of {own.config_id!r} are not those that were fitted, so none of them can be left out; fit the statistics of "
                "these rows (rows.statistics)"
            )
    chains, length = posterior.tree["posterior"]["tau"].shape[:2]
    per_chain = min(length, max(1, draws // chains))
    kept = np.unique(np.linspace(0, length - 1, per_chain).astype(int))
    chosen = (np.arange(chains)[:, None] * length + kept).ravel()
    values = np.concatenate([density(posterior, own, chosen) for own in rows], axis=1).reshape(chains, len(kept), -1)
    dims = ("chain", "draw", "unit")
    tree = xr.DataTree.from_dict({"log_likelihood": xr.Dataset({"y": (dims, values)})})
    # How far thinned draws are from independent ones; the noise is as typical as any.
    sigma = posterior.tree["posterior"]["sigma"].isel(draw=kept)
    relative = float(min(1.0, az.ess(sigma).min() / chosen.size)) if chains > 1 else 1.0
    import warnings  # noqa: PLC0415

    with warnings.catch_warnings():
        # High Pareto k is reported in the tables, by count.
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto distribution")
        return az.loo(tree, var_name="y", reff=relative, pointwise=True)


def compare_fits(fits: Mapping[str, LatencyPosterior], rows: Sequence[ScaledRows], *, draws: int = DEFAULT_DRAWS) -> pd.DataFrame:
    """Compare fits to the same rows by leaving out blocks.

    Parameters
    ----------
    fits : mapping
        By name; different likelihoods, priors or feature sets.
    rows : sequence of ScaledRows
    draws : int
        As in `loo_rows`.

    Returns
    -------
    DataFrame, one row per fit, best first
        `elpd`, the sum over blocks of the log density in seconds of a block given all others, and its standard error `se`;
        `behind`, how far behind the best, and the standard error `se_behind` of that difference, paired by block; `p`, the
        effective number of parameters; `bad_k`, blocks of Pareto k above its limit, whose score is not to be trusted; `blocks`.

    Raises
    ------
    InputError
        If there are no fits, or they were not fitted to these rows.
    """
    if not fits:
        raise InputError("no fit to compare; give at least one")
    found = {name: loo_blocks(posterior, rows, draws=draws) for name, posterior in fits.items()}
    best = max(found.values(), key=lambda e: e.elpd)
    table = {}
    for name, e in found.items():
        lost = best.elpd_i.to_numpy() - e.elpd_i.to_numpy()
        table[name] = {
            "elpd": float(e.elpd),
            "se": float(e.se),
            "behind": float(lost.sum()),
            "se_behind": float(np.sqrt(len(lost)) * lost.std(ddof=1)),
            "p": float(e.p),
            "bad_k": int((e.pareto_k.to_numpy() > e.good_k).sum()),
            "blocks": len(lost),
        }
    return pd.DataFrame(table).T.astype({"bad_k": int, "blocks": int}).sort_values("behind")


def compare_likelihoods(
    rows: Sequence[ScaledRows],
    features: FeatureSet,
    priors: PriorSettings | None = None,
    settings: SamplerSettings | None = None,
    *,
    likelihoods: Sequence[str] = tuple(SHAPES),
    draws: int = DEFAULT_DRAWS,
    seed: int = 0,
    show_progress: bool = True,
) -> tuple[pd.DataFrame, dict[str, LatencyPosterior]]:
    """Fit every likelihood to the same rows and compare them by leaving out blocks.

    Parameters
    ----------
    rows : sequence of ScaledRows
    features : FeatureSet
    priors, settings, seed, show_progress
        As in `fit`.
    likelihoods : sequence of str
        The Gaussian is fitted by the exact engine, the others by rows.
    draws : int
        As in `loo_rows`.

    Returns
    -------
    table : DataFrame
        As of `compare_fits`.
    fits : dict
        The posteriors by likelihood.

    Raises
    ------
    InputError, StatisticsError, UnknownNameError, ConvergenceError
        As in `fit` and `compare_fits`.
    """
    statistics = [r.statistics for r in rows]
    fits = {}
    for name in likelihoods:
        how: dict[str, Any] = {} if name == "gaussian" else {"engine": "rows", "likelihood": name, "rows": rows}
        fits[name] = fit(statistics, features, priors, settings, seed=seed, show_progress=show_progress, **how)
    return compare_fits(fits, rows, draws=draws), fits


def marginal_log_density(
    own: Information, mean: FloatArray, covariance: FloatArray, log_sigma: FloatArray, log_omega: FloatArray
) -> FloatArray:
    """Return the joint log density of a configuration's scaled rows, its coefficients integrated out, shape (S,).

    With G and t the rows' information, q their square, all around a reference r, the prior Normal(m, L L') and delta = m - r,

        -2 log p = n log 2 pi + sum n_j log v_j + q - 2 delta' t + delta' G delta - |M^(-1/2) L' (t - G delta)|^2 + log |M|

    where M = I + L' G L and v_j = sigma^2 + multiplier_j omega^2.

    Parameters
    ----------
    own : Information
        Of one configuration.
    mean : ndarray, shape (S, K)
    covariance : ndarray, shape (S, K, K)
        Of its coefficients before its rows.
    log_sigma, log_omega : ndarray, shape (S,)
    """
    variance = np.exp(2 * log_sigma)[:, None] + own.multiplier[0] * np.exp(2 * log_omega)[:, None]
    weight = 1.0 / variance
    gram = np.einsum("sj,jkl->skl", weight, own.gram[0])
    target, square = weight @ own.target[0], weight @ own.square[0]
    delta = mean - own.reference[0]
    moved = (gram @ delta[..., None])[..., 0]
    root = np.linalg.cholesky(covariance)
    inner = np.eye(mean.shape[1]) + np.swapaxes(root, 1, 2) @ gram @ root
    left = (np.swapaxes(root, 1, 2) @ (target - moved)[..., None])[..., 0]
    explained = (left * np.linalg.solve(inner, left[..., None])[..., 0]).sum(axis=1)
    count = own.count[0]
    quadratic = square + (delta * (moved - 2 * target)).sum(axis=1) - explained
    logs = count.sum() * np.log(2 * np.pi) + np.log(variance) @ count + quadratic + np.linalg.slogdet(inner)[1]
    return np.asarray(-0.5 * logs)


def log_mean(logs: FloatArray) -> tuple[float, float]:
    """Return the log of the mean of densities given by their logs, shape (S,), and its Monte Carlo standard error."""
    weights = np.exp(logs - logs.max())
    error = float(weights.std() / weights.mean() / np.sqrt(len(weights)))
    return float(logs.max() + np.log(weights.mean())), error


def left_out_score(donors: LatencyPosterior, left_out: ConfigStatistics, *, seed: int = 0) -> tuple[float, float]:
    """Return the joint log density in seconds of a configuration's rows given donors that do not know it.

    The average over posterior draws of the scales; its noise and drift are integrated by importance sampling from `error_grid`, its
    coefficients in closed form.

    Parameters
    ----------
    donors : LatencyPosterior
        Fitted without it, with Gaussian errors.
    left_out : ConfigStatistics
    seed : int

    Returns
    -------
    score : float
    error : float
        Monte Carlo standard error of the score.

    Raises
    ------
    InputError
        If the configuration was fitted, or errors are not Gaussian.
    """
    if left_out.config_id in donors.config_ids:
        raise InputError(f"configuration {left_out.config_id!r} was fitted, so its score would praise itself; fit without it")
    if donors.likelihood != "gaussian":
        raise InputError(f"errors are {donors.likelihood}; only Gaussian ones can be integrated out of a whole configuration")
    density = ExactDensity(donors.statistics, donors.feature_set, donors.priors)
    sigmas, omegas = (donors.draws_of(n) for n in ("sigma", "omega"))
    x = drawn_coordinates(donors, density, range(len(donors.config_ids)), np.arange(len(sigmas)))
    mean, covariance = density.predictive(x, left_out.configuration)
    drift = donors.priors.drift is not None
    own = ExactDensity([left_out], donors.feature_set, donors.priors).info
    if not drift:
        own = Information(own.gram, own.target, own.square, own.count, np.zeros_like(own.multiplier), own.reference)
    prior = ErrorPrior.given(sigmas, omegas, donors.priors)
    centre, wide = mean.mean(axis=0), covariance.mean(axis=0) + np.cov(mean.T)

    def likely(log_sigma: FloatArray, log_omega: FloatArray) -> FloatArray:
        shape = (len(log_sigma), len(centre))
        covariances = np.broadcast_to(wide, (*shape, shape[1]))
        return marginal_log_density(own, np.broadcast_to(centre, shape), covariances, log_sigma, log_omega)

    sigma, omega = reference_errors(left_out, donors.priors)
    start = (float(np.log(sigma)), float(np.log(omega)) if drift else 0.0)
    multiplier = float(own.multiplier[0, own.count[0].argmax()])
    at = propose(likely, prior, start, multiplier, np.random.default_rng([seed, 9]))
    logs = at.log_prior - at.log_proposal + marginal_log_density(own, mean, covariance, at.log_sigma, at.log_omega)
    score, error = log_mean(logs)
    return score - left_out.log_scale_sum, error


def leave_one_configuration_out(
    statistics: Sequence[ConfigStatistics],
    features: FeatureSet,
    priors: PriorSettings | None = None,
    settings: SamplerSettings | None = None,
    *,
    seed: int = 0,
    show_progress: bool = True,
) -> pd.DataFrame:
    """Score each configuration given a fit of all others.

    Parameters
    ----------
    statistics : sequence of ConfigStatistics
        At least two.
    features, priors, settings, seed, show_progress
        As in `fit`.

    Returns
    -------
    DataFrame, one row per configuration
        `rows`; `log_score`, the joint log density of all its rows in seconds, and its Monte Carlo standard error `error`;
        `per_row`, the score over the number of rows.

    Raises
    ------
    InputError
        If there are fewer than two configurations.
    """
    if len(statistics) < 2:
        raise InputError(f"leaving one configuration out needs two, found {len(statistics)}")
    found = {}
    for i, own in enumerate(statistics):
        others = [s for j, s in enumerate(statistics) if j != i]
        score, error = left_out_score(
            fit(others, features, priors, settings, seed=seed, show_progress=show_progress), own, seed=seed
        )
        found[own.config_id] = {"rows": own.rows, "log_score": score, "error": error, "per_row": score / own.rows}
    return pd.DataFrame(found).T.astype({"rows": int}).rename_axis("config")
