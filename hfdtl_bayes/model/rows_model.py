"""The model in PyMC, on rows: the hierarchy of `pymc_model`, with any likelihood of `likelihoods`.

The Gaussian likelihood has the drift d of a block integrated out: with e the scaled errors of a block of m rows and T their sum,

    log p = -(m - 1) log sigma - sum (e - T / m)^2 / (2 sigma^2) - log(v) / 2 - T^2 / (2 m v)      v = sigma^2 + m omega^2

up to a constant, computed from the rows, so it is the other engines' posterior reached by another road. The other likelihoods
have no such form; the effect of each block is sampled, in coordinates that are nearly standard normal whether the block's
rows decide it or not: d = mean + sd eta with sd^-2 = omega^-2 + m / core^2 and mean = sd^2 sum(residuals) / core^2, core and residuals
at fixed reference values (as `coordinates` does for coefficients).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pymc as pm
import pytensor.tensor as pt

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.layout import check_statistics, coordinate_values
from hfdtl_bayes.model.likelihoods import (
    LEAST_NU,
    NU_PRIOR,
    RATIO_PRIOR,
    SHARE_PRIOR,
    SMALLEST_MEAN,
    check_likelihood,
)
from hfdtl_bayes.model.moments import reference_errors
from hfdtl_bayes.model.priors import PriorSettings
from hfdtl_bayes.model.pymc_model import coefficients, hierarchy_data, pooled_scale
from hfdtl_bayes.statistics import ScaledRows

Data = dict[str, pt.TensorVariable]


def rows_data(
    rows: Sequence[ScaledRows], feature_set: FeatureSet, priors: PriorSettings, likelihood: str
) -> dict[str, np.ndarray]:
    """Return the values of every `pm.Data` of the model, by name; replace them to refit without compiling again."""
    counts = [len(r.observed) for r in rows]
    blocks = [len(r.starts) for r in rows]
    statistics = [r.statistics for r in rows]
    sizes = np.concatenate([r.block_sizes for r in rows])
    values = {
        "x": np.vstack([r.design for r in rows]),
        "y_observed": np.concatenate([r.observed for r in rows]),
        "y_config": np.repeat(np.arange(len(rows), dtype=np.int32), counts),
        "y_block": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        "block_config": np.repeat(np.arange(len(rows), dtype=np.int32), blocks),
        "block_size": sizes.astype(float),
        **hierarchy_data(statistics, feature_set, priors),
    }
    if likelihood != "gaussian" and priors.drift is not None:
        precision, total = [], []
        for own in rows:
            fit, core = reference_fit(own, priors)
            residuals = np.clip(own.observed - own.design @ fit, -3 * core, 3 * core)
            precision.append(own.block_sizes / core**2)
            total.append(np.add.reduceat(residuals, own.starts) / core**2)
        values |= {"block_precision": np.concatenate(precision), "block_target": np.concatenate(total)}
    return values


def reference_fit(rows: ScaledRows, priors: PriorSettings) -> tuple[np.ndarray, float]:
    """Return rough coefficients and noise of one configuration: least squares within and between blocks, weighed by moments."""
    statistics = rows.statistics
    k = rows.design.shape[1]
    sigma, omega = reference_errors(statistics, priors)
    weighed = np.vstack([s.triangle / np.sqrt(sigma**2 + s.multiplier * omega**2) for s in statistics.strata])
    # The pilot where rows are silent.
    prior = np.column_stack([np.eye(k), statistics.pilot]) / np.maximum(np.abs(statistics.pilot), 0.1)[:, None]
    stacked = np.vstack([weighed, prior])
    fit = np.linalg.lstsq(stacked[:, :k], stacked[:, k])[0]
    # A few wild rows must not set the scale of all: the quartiles of what is left within blocks do.
    residuals = rows.observed - rows.design @ fit
    within = residuals - np.repeat(np.add.reduceat(residuals, rows.starts) / rows.block_sizes, rows.block_sizes)
    core = float(np.median(np.abs(within)) / 0.6745) if rows.block_sizes.max() > 1 else sigma
    return fit, max(core, 1e-2 * sigma)


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
        theta = coefficients(data, feature_set, priors)
        mean = (data["x"] * theta[data["y_config"]]).sum(axis=1)
        shaped = likelihood in ("student_t", "outliers")
        core = pooled_scale("core" if shaped else "sigma", priors.noise, priors.noise_spread)
        omega = None if priors.drift is None else pooled_scale("omega", priors.drift, priors.drift_spread)
        if likelihood == "gaussian":
            _gaussian(mean, core, omega, data)
        else:
            if omega is not None:
                mean = mean + _block_effects(omega[data["block_config"]], data)[data["y_block"]]
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


def _block_effects(omega: pt.TensorVariable, data: Data) -> pt.TensorVariable:
    """Return d ~ Normal(0, omega), shape (B,), sampled in the coordinates of the module's formula."""
    variance = 1.0 / (1.0 / omega**2 + data["block_precision"])
    eta = pm.Flat("block_eta", shape=omega.shape)
    effect = variance * data["block_target"] + pt.sqrt(variance) * eta
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
