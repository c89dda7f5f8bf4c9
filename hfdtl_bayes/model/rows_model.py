"""The model in PyMC, on rows: the hierarchy of `pymc_model`, with any likelihood of `likelihoods`.

The Gaussian likelihood has the drift d of a block integrated out: with e the scaled errors of a block of m rows and T their sum,

    log p = -(m - 1) log sigma - sum (e - T / m)^2 / (2 sigma^2) - log(v) / 2 - T^2 / (2 m v)      v = sigma^2 + m omega^2

up to a constant, computed from the rows, so it is the other engines' posterior reached by another road. The other likelihoods
have no such form; the effect of each block is sampled, in coordinates that are nearly standard normal and independent of the
coefficients, whether the block's rows decide it or not:

    d = v sum(w e) / core^2 + sqrt(v) eta      1 / v = omega^-2 + sum(w) / core^2      e = y / s - x' theta / s

That is its conditional given everything else if errors were Gaussian with the weights w and the noise core, both fixed beforehand by a
robust fit (`reference_fit`). The coordinates of coefficients (`coordinates`) are those of rows with these weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pymc as pm
import pytensor.tensor as pt
from numpy.typing import NDArray

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.layout import check_statistics, coordinate_values
from hfdtl_bayes.model.likelihoods import (
    LEAST_NU,
    NU_PRIOR,
    RATIO_PRIOR,
    SHAPES_ON_CORE,
    SHARE_PRIOR,
    SMALLEST_MEAN,
    check_likelihood,
)
from hfdtl_bayes.model.moments import reference_errors
from hfdtl_bayes.model.priors import PriorSettings
from hfdtl_bayes.model.pymc_model import coefficients, hierarchy_data, pooled_scale
from hfdtl_bayes.statistics import ConfigStatistics, ScaledRows, Stratum
from hfdtl_bayes.statistics.sufficient import split_blocks, triangle_of

FloatArray = NDArray[np.float64]
Data = dict[str, pt.TensorVariable]

_REWEIGHTED = 8
"""Rounds of reweighting: the reference only has to be near."""

_REFERENCE_NU = 4.0


def rows_data(
    rows: Sequence[ScaledRows], feature_set: FeatureSet, priors: PriorSettings, likelihood: str
) -> dict[str, np.ndarray]:
    """Return the values of every `pm.Data` of the model, by name; replace them to refit without compiling again."""
    counts = [len(r.observed) for r in rows]
    blocks = [len(r.starts) for r in rows]
    sizes = np.concatenate([r.block_sizes for r in rows])
    values = {
        "x": np.vstack([r.design for r in rows]),
        "y_observed": np.concatenate([r.observed for r in rows]),
        "y_config": np.repeat(np.arange(len(rows), dtype=np.int32), counts),
        "y_block": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        "block_config": np.repeat(np.arange(len(rows), dtype=np.int32), blocks),
        "block_size": sizes.astype(float),
    }
    statistics = [r.statistics for r in rows]
    if likelihood != "gaussian":
        fits = [reference_fit(r, priors, robust=likelihood in SHAPES_ON_CORE) for r in rows]
        statistics = [f.statistics for f in fits]
        if priors.drift is not None:
            values["y_precision"] = np.concatenate([f.weights / f.core**2 for f in fits])
    return values | hierarchy_data(statistics, feature_set, priors)


@dataclass(frozen=True)
class ReferenceFit:
    """A rough fit of one configuration: where its sampler starts, and in what coordinates it moves.

    Attributes
    ----------
    core : float
        Relative noise of ordinary rows.
    weights : ndarray, shape (n,)
        Of the rows: 1, or those of a Student-t with four degrees of freedom.
    statistics : ConfigStatistics
        Of the rows with these weights.
    """

    core: float
    weights: FloatArray
    statistics: ConfigStatistics


def reference_fit(rows: ScaledRows, priors: PriorSettings, *, robust: bool) -> ReferenceFit:
    """Fit one configuration's rows by iteratively reweighted least squares, the drift of blocks included."""
    k, sizes = rows.design.shape[1], rows.block_sizes
    sigma, omega = reference_errors(rows.statistics, priors)
    weights, statistics, core = np.ones(len(rows.observed)), rows.statistics, sigma
    # The pilot where rows are silent.
    prior = np.column_stack([np.eye(k), statistics.pilot]) / np.maximum(np.abs(statistics.pilot), 0.1)[:, None]
    for _ in range(_REWEIGHTED if robust else 0):
        stacked = np.vstack([*(s.triangle / np.sqrt(sigma**2 + s.multiplier * omega**2) for s in statistics.strata), prior])
        residuals = rows.observed - rows.design @ np.linalg.lstsq(stacked[:, :k], stacked[:, k])[0]
        drift = np.add.reduceat(weights * residuals, rows.starts)
        drift *= omega**2 / (np.add.reduceat(weights, rows.starts) * omega**2 + sigma**2)
        residuals -= np.repeat(drift, sizes)
        # A few wild rows must not set the scale of all.
        core = max(float(np.median(np.abs(residuals)) / 0.6745), 1e-2 * sigma)
        weights = (_REFERENCE_NU + 1) / (_REFERENCE_NU + (residuals / core) ** 2)
        scaled = np.column_stack([rows.design, rows.observed]) * np.sqrt(weights)[:, None]
        strata = [Stratum(m, len(r), triangle_of(r)) for m, r in split_blocks(scaled, rows.block)]
        statistics = replace(statistics, strata=tuple(sorted(strata, key=lambda s: s.multiplier)))
        sigma, omega = reference_errors(statistics, priors)
    return ReferenceFit(core, weights, statistics)


def build_rows_model(
    rows: Sequence[ScaledRows], feature_set: FeatureSet, priors: PriorSettings | None = None, likelihood: str = "gaussian"
) -> pm.Model:
    """Build the PyMC model of several configurations on their rows.

    Parameters
    ----------
    rows : sequence of ScaledRows
        One per configuration, all of `feature_set`.
    feature_set : FeatureSet
    priors : PriorSettings, optional
    likelihood : {"gaussian", "student_t", "lognormal", "outliers"}

    Returns
    -------
    pm.Model
        The variables of `pymc_model.build_model`, and those of the likelihood's shape.

    Raises
    ------
    StatisticsError
        If a configuration is named twice or its rows have other columns.
    UnknownNameError
        If there is no such likelihood.
    """
    check_likelihood(likelihood)
    check_statistics([r.statistics for r in rows], feature_set)
    priors = priors or PriorSettings()
    values = rows_data(rows, feature_set, priors, likelihood)
    with pm.Model(coords=coordinate_values([r.statistics for r in rows], feature_set)) as model:
        data = {name: pm.Data(name, value) for name, value in values.items()}
        theta = coefficients(data, feature_set, priors).own
        mean = (data["x"] * theta[data["y_config"]]).sum(axis=1)
        shaped = likelihood in SHAPES_ON_CORE
        core = pooled_scale("core" if shaped else "sigma", priors.noise, priors.noise_spread)
        omega = None if priors.drift is None else pooled_scale("omega", priors.drift, priors.drift_spread)
        if likelihood == "gaussian":
            _gaussian(mean, core, omega, data)
        else:
            if omega is not None:
                mean = mean + _block_effects(omega[data["block_config"]], data["y_observed"] - mean, data)[data["y_block"]]
            factor = _observe(likelihood, mean, core[data["y_config"]], data["y_observed"])
            if shaped:
                pm.Deterministic("sigma", core * factor, dims="config")
                pm.Deterministic("sigma_typical", model["core_typical"] * factor)
                pm.Deterministic("sigma_spread", model["core_spread"])
    return model


def _gaussian(mean: pt.TensorVariable, sigma: pt.TensorVariable, omega: pt.TensorVariable | None, data: Data) -> None:
    """Add the likelihood of rows whose drift is integrated out."""
    error = data["y_observed"] - mean
    size, config = data["block_size"], data["block_config"]
    total = pt.zeros_like(size)[data["y_block"]].inc(error)
    within = (error - (total / size)[data["y_block"]]) ** 2
    square = pt.zeros_like(sigma)[data["y_config"]].inc(within)
    degrees = pt.zeros_like(sigma)[config].inc(size - 1)
    drift = 0.0 if omega is None else size * omega[config] ** 2
    pm.Potential("within_blocks", (-degrees * pt.log(sigma) - 0.5 * square / sigma**2).sum())
    pm.Potential("block_totals", pm.logp(pm.Normal.dist(0.0, pt.sqrt(sigma[config] ** 2 + drift)), total / pt.sqrt(size)).sum())


def _block_effects(omega: pt.TensorVariable, error: pt.TensorVariable, data: Data) -> pt.TensorVariable:
    """Return d ~ Normal(0, omega), shape (B,), sampled in the coordinates of the module's formula."""
    weight, block = data["y_precision"], data["y_block"]
    variance = 1.0 / (1.0 / omega**2 + pt.zeros_like(omega)[block].inc(weight))
    eta = pm.Flat("block_eta", shape=omega.shape)
    effect = variance * pt.zeros_like(omega)[block].inc(weight * error) + pt.sqrt(variance) * eta
    pm.Potential("block_effects", (pm.logp(pm.Normal.dist(0.0, omega), effect) + 0.5 * pt.log(variance)).sum())
    return effect


def _observe(likelihood: str, mean: pt.TensorVariable, core: pt.TensorVariable, observed: pt.TensorVariable) -> pt.TensorVariable:
    """Add the likelihood of rows given their means, with the priors of its shape; return sigma / core."""
    if likelihood == "student_t":
        excess = pm.Gamma("nu_excess", alpha=NU_PRIOR[0], beta=NU_PRIOR[1])
        nu = pm.Deterministic("nu", LEAST_NU + excess)
        pm.StudentT("y", nu=nu, mu=mean, sigma=core, observed=observed)
        return pt.sqrt(nu / excess)
    if likelihood == "outliers":
        share = pm.Beta("outlier_share", *SHARE_PRIOR)
        more = pm.LogNormal("outlier_ratio_excess", *RATIO_PRIOR)
        ratio = pm.Deterministic("outlier_ratio", 1.0 + more)
        ordinary = pt.log1p(-share) + pm.logp(pm.Normal.dist(mean, core), observed)
        wide = pt.log(share) + pm.logp(pm.Normal.dist(mean, ratio * core), observed)
        pm.Potential("y", pt.logaddexp(ordinary, wide).sum())
        return pt.sqrt(1 - share + share * ratio**2)
    positive = pt.maximum(mean, SMALLEST_MEAN)
    variance = pt.log1p((core / positive) ** 2)
    pm.LogNormal("y", pt.log(positive) - 0.5 * variance, pt.sqrt(variance), observed=observed)
    return pt.ones(())
