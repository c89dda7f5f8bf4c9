"""The model in PyMC, on the pseudo-rows of the sufficient statistics.

For configuration c, base features b, config features g (folded into the constant) and residual features r:

    y_ci  = b_ci' (beta + u_c) + g_c' gamma + r_ci' (delta + v_c) + s_ci (d_cB(i) + eps_ci)
    (u_c, v_c) = w_h(c) + e_c                 w_h ~ Normal(0, rho (tau * scale)^2)     e_c ~ Normal(0, (1 - rho) (tau * scale)^2)
    d ~ Normal(0, omega_c^2)                  eps ~ Normal(0, sigma_c^2)

The deviations of configurations on the same hardware h have the part w_h in common: how close its kernels come to peak is largely a
property of the GPU. With theta_c = (beta + u_c, delta + v_c) shifted by the config features, and [R, z] the orthogonal factors of
configuration c's scaled rows, the likelihood of all rows is, up to a constant,

    z ~ Normal(R theta_c, sd)      rss ~ sd^2 * chi-square(dof)      sd^2 = sigma_c^2 + multiplier * omega_c^2

so sampling costs the same whatever the number of rows. A donor that counts for a of one (`PriorSettings.discounts`) speaks of everything
shared with its marginal likelihood to the power a, in place of 1; see `hfdtl_bayes.model.exact`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pymc as pm
import pytensor.tensor as pt

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.coordinates import group_effects, reference_coordinates
from hfdtl_bayes.model.layout import check_statistics, coordinate_values, hardware_index
from hfdtl_bayes.model.priors import PositiveRange, PriorSettings, deviation_scale, population_mean, population_sd
from hfdtl_bayes.statistics import ConfigStatistics, PseudoRows, pseudo_rows


def hierarchy_data(
    statistics: Sequence[ConfigStatistics], feature_set: FeatureSet, priors: PriorSettings
) -> dict[str, np.ndarray]:
    """Return the values of every `pm.Data` that the hierarchy reads, by name; the same for every likelihood."""
    return {
        "hardware_index": hardware_index(statistics).astype(np.int32),
        "config_row": np.array([s.config_row for s in statistics]).reshape(len(statistics), -1),
        **reference_coordinates(statistics, feature_set, priors),
    }


def model_data(statistics: Sequence[ConfigStatistics], feature_set: FeatureSet, priors: PriorSettings) -> dict[str, np.ndarray]:
    """Return the values of every `pm.Data` of the model, by name; replace them to refit without compiling again."""
    rows: PseudoRows = pseudo_rows(statistics)
    discounted = [(c, priors.counts(s.config_id)) for c, s in enumerate(statistics) if priors.counts(s.config_id) < 1]
    of_discounts = {
        "discounted_config": np.array([c for c, _ in discounted], dtype=np.int32),
        "discounted_counts": np.array([a for _, a in discounted]),
    }
    return {
        **(of_discounts if discounted else {}),
        "r": rows.r,
        "z_observed": rows.z,
        "z_config": rows.config.astype(np.int32),
        "z_multiplier": rows.multiplier,
        "rss_observed": rows.rss,
        "rss_dof": rows.dof,
        "rss_config": rows.rss_config.astype(np.int32),
        "rss_multiplier": rows.rss_multiplier.astype(np.float64),
        **hierarchy_data(statistics, feature_set, priors),
    }


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of the configurations and what they deviate from.

    Attributes
    ----------
    own : tensor, shape (C, K)
        theta.
    centre : tensor, shape (C, K)
        A phi + w_h; zero for the discrepancy.
    sd : tensor, shape (K,)
        Of a configuration's own deviation, and of its discrepancy.
    """

    own: pt.TensorVariable
    centre: pt.TensorVariable
    sd: pt.TensorVariable


def coefficients(data: dict[str, pt.TensorVariable], feature_set: FeatureSet, priors: PriorSettings) -> Coefficients:
    """Add the coefficients, population to configurations, to the model under construction.

    Parameters
    ----------
    data : dict
        The variables of `hierarchy_data`.
    feature_set : FeatureSet
    priors : PriorSettings
    """
    mean, sd = population_mean(feature_set), population_sd(feature_set)
    n_base, n_config = len(feature_set.base), len(feature_set.config)
    base, config, residual = np.split(np.arange(len(mean)), [n_base, n_base + n_config])
    beta = pm.Normal("beta", mean[base], sd[base], dims="base")
    delta = pm.Normal("delta", mean[residual], sd[residual], dims="residual")
    tau = pm.Gamma("tau", priors.deviation.gamma_shape, priors.deviation.gamma_rate, dims="pooled_coef")
    population = pt.concatenate([beta, delta])
    # The number of configurations stays symbolic, so that one compilation serves donors with and without a target.
    centre = pt.broadcast_to(population, (data["eta_information"].shape[0], population.shape[0]))
    if n_config:
        gamma = pm.Normal("gamma", mean[config], sd[config], dims="config_feature")
        centre = pt.inc_subtensor(centre[:, n_base], data["config_row"] @ gamma)
    share = pm.Beta("hardware_share", priors.hardware_share, priors.hardware_share)
    deviation = tau * deviation_scale(feature_set)
    hardware_z = pm.Normal("hardware_effect_z", dims=("hardware", "pooled_coef"))
    hardware = pm.Deterministic("hardware_effect", pt.sqrt(share) * deviation * hardware_z, dims=("hardware", "pooled_coef"))
    centre = centre + hardware[data["hardware_index"]]
    sd = pt.sqrt(1 - share) * deviation
    if feature_set.discrepancy:
        own = feature_set.discrepancy_sd
        centre = pt.concatenate([centre, pt.zeros((centre.shape[0], len(own)))], axis=1)
        sd = pt.concatenate([sd, own])
    return Coefficients(group_effects("theta", centre, sd, data, ("config", "coef")), centre, sd)


def build_model(statistics: Sequence[ConfigStatistics], feature_set: FeatureSet, priors: PriorSettings | None = None) -> pm.Model:
    """Build the PyMC model of several configurations.

    Parameters
    ----------
    statistics : sequence of ConfigStatistics
        One per configuration, all of `feature_set`.
    feature_set : FeatureSet
    priors : PriorSettings, optional

    Returns
    -------
    pm.Model
        Variables beta (base), gamma (config_feature), delta (residual), tau (pooled_coef), hardware_share, hardware_effect
        (hardware, pooled_coef), theta (config, coef), sigma and omega (config) with their population medians and spreads, all in reference
        units. hardware_effect_z is hardware_effect in units of its sd.

    Raises
    ------
    StatisticsError
        If a configuration is named twice or its statistics have other columns.
    """
    check_statistics(statistics, feature_set)
    priors = priors or PriorSettings()
    coords = coordinate_values(statistics, feature_set)
    values = model_data(statistics, feature_set, priors)
    with pm.Model(coords=coords) as model:
        data = {name: pm.Data(name, value) for name, value in values.items()}
        theta = coefficients(data, feature_set, priors)
        sigma = pooled_scale("sigma", priors.noise, priors.noise_spread)
        omega = None if priors.drift is None else pooled_scale("omega", priors.drift, priors.drift_spread)

        def error_sd(config_index: pt.TensorVariable, multiplier: pt.TensorVariable) -> pt.TensorVariable:
            if omega is None:
                return sigma[config_index]
            return pt.sqrt(sigma[config_index] ** 2 + multiplier * omega[config_index] ** 2)

        pm.Normal(
            "z",
            (data["r"] * theta.own[data["z_config"]]).sum(axis=1),
            error_sd(data["z_config"], data["z_multiplier"]),
            observed=data["z_observed"],
        )
        variance = error_sd(data["rss_config"], data["rss_multiplier"]) ** 2
        pm.Gamma("rss", data["rss_dof"] / 2, 1 / (2 * variance), observed=data["rss_observed"])
        if "discounted_config" in data:
            row_variance = error_sd(data["z_config"], data["z_multiplier"]) ** 2
            for i in range(len(values["discounted_config"])):
                c = data["discounted_config"][i]
                marginal = _log_marginal(data, c, theta.centre[c], theta.sd, row_variance, variance)
                pm.Potential(f"discount_{i}", (data["discounted_counts"][i] - 1) * marginal)
    return model


def _log_marginal(
    data: dict[str, pt.TensorVariable],
    c: pt.TensorVariable,
    centre: pt.TensorVariable,
    sd: pt.TensorVariable,
    row_variance: pt.TensorVariable,
    rss_variance: pt.TensorVariable,
) -> pt.TensorVariable:
    """Return the log density of one configuration's rows with theta ~ Normal(centre, sd) integrated out, up to a constant.

    With weights w = 1 / variance, e = z - R centre, M = I + D R'wR D and b = D R'we: sum(log w) - e'we + b'M^-1 b - log |M|, halved.
    """
    own = pt.eq(data["z_config"], c)
    weight, error = own / row_variance, data["z_observed"] - data["r"] @ centre
    inner = pt.eye(sd.shape[0]) + sd[:, None] * ((data["r"].T * weight) @ data["r"]) * sd
    left = pt.linalg.cholesky(inner)
    scaled = pt.linalg.solve_triangular(left, sd * (data["r"].T @ (weight * error)), lower=True)
    logs = (own * pt.log(row_variance)).sum() + (weight * error**2).sum() - (scaled**2).sum() + 2 * pt.log(pt.diag(left)).sum()
    of_rss = pt.eq(data["rss_config"], c) * (data["rss_dof"] * pt.log(rss_variance) + data["rss_observed"] / rss_variance)
    return -0.5 * (logs + of_rss.sum())


def _lognormal(name: str, prior: PositiveRange, **kwargs: object) -> pt.TensorVariable:
    return pm.LogNormal(name, prior.log_mean, prior.log_sd, **kwargs)


def pooled_scale(name: str, typical: PositiveRange, spread: PositiveRange) -> pt.TensorVariable:
    """Return one positive scale per configuration, lognormal around the typical one."""
    median = _lognormal(f"{name}_typical", typical)
    between = _lognormal(f"{name}_spread", spread)
    return pm.LogNormal(name, pt.log(median), between, dims="config")
