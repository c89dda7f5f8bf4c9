"""The exact engine: coefficients integrated out in closed form, only the scales sampled.

Given the scales psi = (tau, rho, sigma, omega) the model of `pymc_model` is linear and Gaussian. In standard normal coordinates

    theta_c = A_c (m + S xi) + W omega_h(c) + D eta_c          xi, omega_h, eta_c ~ Normal(0, I)

with m, S the prior means and sds of (beta, gamma, delta), W = sqrt(rho) tau scale and D = sqrt(1 - rho) tau scale diagonal. With G_c and h_c
the information matrix and vector of configuration c's rows at (sigma_c, omega_c), eta, omega and xi are eliminated one after
the other:

    M_c = I + D G_c D               G1_c = G_c D M_c^-1 D^-1         g1_c = (D M_c^-1 D^-1)' g_c
    N_h = I + W (sum_c G1_c) W      Lambda = I + sum_c F_c' G1_c F_c - sum_h H_h' W N_h^-1 W H_h,    F_c = A_c S,  H_h = sum_c G1_c F_c

which gives log p(rows | psi). Its gradient is the posterior mean of the gradient of the complete-data log density (Fisher's
identity), so only second moments of eta, omega and theta are needed. Group sds are divided by each other only, never into a
number that does not shrink with them, so one near zero is harmless where samplers of the coefficients get stuck. NUTS moves in
psi alone (about two dozen smooth dimensions, no compilation); then (beta, gamma, delta, w, theta) are drawn from their exact
conditional.

The elimination is that of Gaussian hierarchical models in general: Lindley & Smith (1972), doi:10.1111/j.2517-6161.1972.tb00885.x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.special import expit, log_expit

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.layout import check_statistics, hardware_index, hardware_names, posterior_tree
from hfdtl_bayes.model.moments import reference_errors
from hfdtl_bayes.model.nuts import SamplerSettings, run_nuts
from hfdtl_bayes.model.priors import PriorSettings, deviation_scale, population_mean, population_sd
from hfdtl_bayes.statistics import ConfigStatistics, config_to_constant

FloatArray = NDArray[np.float64]

_SMALLEST_NOISE = 1e-6
"""Relative noise below which rows are taken to be free of it: a perfect fit would make the noise zero."""


def _t(matrix: FloatArray) -> FloatArray:
    return np.swapaxes(matrix, -1, -2)


@dataclass(frozen=True)
class Information:
    """The statistics of C configurations as Gram matrices per stratum, around a first fit of each.

    Attributes
    ----------
    gram : ndarray, shape (C, J, K, K)
        R'R of each stratum; strata padded with zeros to J.
    target : ndarray, shape (C, J, K)
        R'(z - R reference).
    square : ndarray, shape (C, J)
        Squared length of z - R reference, residual sum of squares included.
    count, multiplier : ndarray, shape (C, J)
        Rows of each stratum and their drift multiplier.
    reference : ndarray, shape (C, K)
        Coefficients that `target` and `square` are taken around, so that nothing cancels: a least-squares fit drawn to the prior
        as far as the rows are silent. Without the prior, nearly collinear columns get huge opposite coefficients, and the
        log density loses all its digits.
    """

    gram: FloatArray
    target: FloatArray
    square: FloatArray
    count: FloatArray
    multiplier: FloatArray
    reference: FloatArray


def information(
    statistics: Sequence[ConfigStatistics], centre: FloatArray, size: FloatArray, errors: Sequence[tuple[float, float]]
) -> Information:
    """Compute the Gram matrices of several configurations.

    Parameters
    ----------
    statistics : sequence of ConfigStatistics
    centre, size : ndarray, shape (C, K)
        Prior mean of each configuration's coefficients and how far they may lie from it.
    errors : sequence of (sigma, omega)
        Rough relative sds of noise and drift, to weigh rows against the prior.
    """
    k = len(statistics[0].coef_names)
    width = max(len(s.strata) for s in statistics)
    shape = (len(statistics), width)
    gram, target = np.zeros((*shape, k, k)), np.zeros((*shape, k))
    square, count, multiplier = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    reference = np.zeros((len(statistics), k))
    for c, own in enumerate(statistics):
        sigma, omega = errors[c]
        weighed = [s.triangle / np.sqrt(sigma**2 + s.multiplier * omega**2) for s in own.strata]
        stacked = np.vstack([*weighed, np.column_stack([np.diag(1 / size[c]), centre[c] / size[c]])])
        reference[c] = np.linalg.lstsq(stacked[:, :k], stacked[:, k])[0]
        for j, stratum in enumerate(own.strata):
            design = stratum.triangle[:, :k]
            left = stratum.triangle[:, k] - design @ reference[c]
            gram[c, j], target[c, j] = design.T @ design, design.T @ left
            square[c, j] = max(float(left @ left), stratum.count * _SMALLEST_NOISE**2)
            count[c, j], multiplier[c, j] = stratum.count, stratum.multiplier
    return Information(gram, target, square, count, multiplier, reference)


@dataclass(frozen=True)
class _Solved:
    """Everything the elimination leaves, for one or many values of the scales (leading dimensions)."""

    log_density: FloatArray
    variance: FloatArray
    own_inverse: FloatArray
    shrink: FloatArray
    own_target: FloatArray
    hardware_inverse: FloatArray
    hardware_map: FloatArray
    hardware_target: FloatArray
    population_inverse: FloatArray
    population_mean: FloatArray
    gram: FloatArray


def population_loading(feature_set: FeatureSet, config_row: FloatArray) -> FloatArray:
    """Return A, shape (K, B + G + D): what each of (beta, gamma, delta) contributes to a configuration's own coefficients.

    Base and residual coefficients stand for themselves; `config_row`, shape (G,), shifts the constant.
    """
    base, config, k = len(feature_set.base), len(feature_set.config), len(feature_set.coef_names)
    loading = np.zeros((k, k + config))
    loading[range(base), range(base)] = 1.0
    loading[range(base, k), range(base + config, k + config)] = 1.0
    loading[base, base : base + config] = config_row
    return loading


class ExactDensity:
    """The log posterior density of the scales, with gradient, and exact draws of the coefficients given them.

    Parameters
    ----------
    statistics : sequence of ConfigStatistics
    feature_set : FeatureSet
    priors : PriorSettings

    Notes
    -----
    Unconstrained coordinates, in order: log tau (K), logit rho, log sigma (C), log omega (C), log sigma_typical, log sigma_spread, log
    omega_typical, log omega_spread.
    """

    def __init__(self, statistics: Sequence[ConfigStatistics], feature_set: FeatureSet, priors: PriorSettings) -> None:
        self.priors = priors
        self.scale = deviation_scale(feature_set)
        self.mean, self.sd = population_mean(feature_set), population_sd(feature_set)
        self.count_config, self.count_coef = len(statistics), len(self.scale)
        self.feature_set = feature_set
        self.hardware = hardware_index(statistics)
        self.hardware_names = hardware_names(statistics)
        count_hardware = len(self.hardware_names)
        self.membership = np.zeros((count_hardware, self.count_config))
        self.membership[self.hardware, np.arange(self.count_config)] = 1.0
        loading = np.array([population_loading(feature_set, s.config_row) for s in statistics])
        self.loading = loading * self.sd
        centre = loading @ self.mean
        size = np.hypot(np.sqrt((self.loading**2).sum(axis=2)), np.exp(priors.deviation.log_mean) * self.scale)
        errors = [reference_errors(s, priors) for s in statistics]
        self.info = information(statistics, centre, size, errors)
        self.offset = centre - self.info.reference
        # Contractions over strata as plain matrix products: numpy's einsum costs more than the arithmetic here.
        self._flat_gram = self.info.gram.reshape(self.count_config, -1, self.count_coef**2)
        self._identity, self._population_identity = np.eye(self.count_coef), np.eye(len(self.mean))
        self.start = self._start(np.log(errors))

    def _start(self, errors: FloatArray) -> FloatArray:
        typical = errors.mean(axis=0)
        p = self.priors
        return np.concatenate(
            [
                np.full(self.count_coef, p.deviation.log_mean),
                [0.0],
                errors[:, 0],
                errors[:, 1],
                [typical[0], p.noise_spread.log_mean, typical[1], p.drift_spread.log_mean],
            ]
        )

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates."""
        return len(self.start)

    def split(self, x: FloatArray) -> tuple[FloatArray, ...]:
        """Split coordinates (..., size) into log tau, logit rho, log sigma, log omega and the four population scales."""
        k, c = self.count_coef, self.count_config
        rest = k + 1 + 2 * c
        scales = (x[..., :k], x[..., k], x[..., k + 1 : k + 1 + c], x[..., k + 1 + c : rest])
        return (*scales, x[..., rest], x[..., rest + 1], x[..., rest + 2], x[..., rest + 3])

    def join(
        self,
        tau: FloatArray,
        share: FloatArray,
        sigma: FloatArray,
        omega: FloatArray,
        populations: Sequence[FloatArray],
    ) -> FloatArray:
        """Return the unconstrained coordinates of scales, shape (S, size); the inverse of what `draw` reports."""
        columns = [np.log(tau), np.log(share / (1 - share))[:, None], np.log(sigma), np.log(omega)]
        return np.concatenate([*columns, *(np.log(p)[:, None] for p in populations)], axis=1)

    def _sds(self, log_tau: FloatArray, logit: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the sds of a configuration's own deviations and of those of its hardware, (..., K).

        The parts of the variance are taken from the log odds: 1 - share would be zero long before the own part is.
        """
        total = np.exp(log_tau) * self.scale
        own = np.exp(0.5 * log_expit(-logit))[..., None] * total
        return own, np.exp(0.5 * log_expit(logit))[..., None] * total

    def _solve(self, own_sd: FloatArray, shared_sd: FloatArray, sigma: FloatArray, omega: FloatArray) -> _Solved:
        k, identity = self.count_coef, self._identity
        variance = sigma[..., None] ** 2 + self.info.multiplier * omega[..., None] ** 2
        weight = 1.0 / variance
        gram = (weight[..., None, :] @ self._flat_gram)[..., 0, :].reshape(*weight.shape[:-1], k, k)
        target = (weight[..., None, :] @ self.info.target)[..., 0, :]
        square = (weight * self.info.square).sum(axis=-1)
        column, row = own_sd[..., None, :, None], own_sd[..., None, None, :]
        own = identity + column * gram * row
        own_inverse = np.linalg.inv(own)
        shrink = column * own_inverse / row
        reduced = gram @ shrink
        reduced = 0.5 * (reduced + _t(reduced))
        # The step from the reference to the prior's centre is made after eta is eliminated. Before, it would be of the size of
        # the information itself, and a log density of a few digits would be left of the difference.
        kept_target = (_t(shrink) @ target[..., None])[..., 0]
        moved = (reduced @ self.offset[..., None])[..., 0]
        reduced_target = kept_target - moved
        own_target = own_sd[..., None, :] * target
        explained = (own_target * (own_inverse @ own_target[..., None])[..., 0]).sum(axis=-1)
        explained = explained + (self.offset * (2 * kept_target - moved)).sum(axis=-1)
        scaled_target = own_sd[..., None, :] * (target - (gram @ self.offset[..., None])[..., 0])
        # Hardware: sums over its configurations.
        flat = reduced.reshape(*reduced.shape[:-2], k * k)
        summed = (self.membership @ flat).reshape(*flat.shape[:-2], len(self.membership), k, k)
        hardware_target = self.membership @ reduced_target
        loaded = reduced @ self.loading
        shape = loaded.shape
        hardware_map = (self.membership @ loaded.reshape(*shape[:-2], -1)).reshape(*shape[:-3], -1, *shape[-2:])
        hcolumn, hrow = shared_sd[..., None, :, None], shared_sd[..., None, None, :]
        hardware = identity + hcolumn * summed * hrow
        hardware_inverse = np.linalg.inv(hardware)
        scaled_map = hcolumn * hardware_map
        scaled_hardware = shared_sd[..., None, :] * hardware_target
        inner = hardware_inverse @ scaled_map
        inner_target = (hardware_inverse @ scaled_hardware[..., None])[..., 0]
        # Population.
        precision = self._population_identity + (_t(self.loading) @ loaded).sum(axis=-3) - (_t(scaled_map) @ inner).sum(axis=-3)
        vector = (_t(self.loading) @ reduced_target[..., None])[..., 0].sum(axis=-2)
        vector = vector - (_t(scaled_map) @ inner_target[..., None])[..., 0].sum(axis=-2)
        population_inverse = np.linalg.inv(precision)
        population = (population_inverse @ vector[..., None])[..., 0]
        log_density = -0.5 * (
            (self.info.count * np.log(variance)).sum(axis=(-1, -2))
            + (square - explained).sum(axis=-1)
            + np.linalg.slogdet(own)[1].sum(axis=-1)
            - (scaled_hardware * inner_target).sum(axis=(-1, -2))
            + np.linalg.slogdet(hardware)[1].sum(axis=-1)
            - (vector * population).sum(axis=-1)
            + np.linalg.slogdet(precision)[1]
        )
        return _Solved(
            log_density, variance, own_inverse, shrink, scaled_target, hardware_inverse, inner, inner_target,
            population_inverse, population, gram,
        )  # fmt: skip

    def log_density(self, x: FloatArray) -> tuple[float, FloatArray]:
        """Return the log density at unconstrained coordinates and its gradient.

        Parameters
        ----------
        x : ndarray, shape (size,)

        Returns
        -------
        value : float
        gradient : ndarray, shape (size,)
        """
        log_tau, logit, log_sigma, log_omega, *populations = self.split(x)
        sigma, omega = np.exp(log_sigma), np.exp(log_omega)
        own_sd, shared_sd = self._sds(log_tau, logit)
        s = self._solve(own_sd, shared_sd, sigma, omega)
        xi, omega_map = s.population_mean, s.hardware_map
        effect = s.hardware_target - omega_map @ xi
        effect_covariance = s.hardware_inverse + omega_map @ s.population_inverse @ _t(omega_map)
        # The part of a coefficient that is not its own: x_c = F_c xi + W omega_h.
        slope = self.loading - shared_sd[:, None] * omega_map[self.hardware]
        centre = self.loading @ xi + shared_sd * effect[self.hardware]
        centre_covariance = slope @ s.population_inverse @ _t(slope)
        centre_covariance = centre_covariance + shared_sd[:, None] * s.hardware_inverse[self.hardware] * shared_sd
        lever = s.own_inverse @ (own_sd[:, None] * s.gram)
        eta = (s.own_inverse @ s.own_target[..., None] - lever @ centre[..., None])[..., 0]
        eta_variance = np.diagonal(s.own_inverse, axis1=-2, axis2=-1) + ((lever @ centre_covariance) * lever).sum(axis=-1)
        theta = self.offset + centre + own_sd * eta
        covariance = s.shrink @ centre_covariance @ _t(s.shrink) + own_sd[:, None] * s.own_inverse * own_sd
        own_square = (eta**2 + eta_variance).sum(axis=0)
        shared_square = (effect**2 + np.diagonal(effect_covariance, axis1=-2, axis2=-1)).sum(axis=0)
        # Expected squared residual of each stratum; theta is relative to the reference, as target and square are.
        second = covariance + theta[:, :, None] * theta[:, None, :]
        expected = (self._flat_gram @ second.reshape(self.count_config, -1, 1))[..., 0]
        expected = expected + self.info.square - 2 * (self.info.target @ theta[..., None])[..., 0]
        by_variance = 0.5 * (expected / s.variance - self.info.count) / s.variance
        gradient_sigma = 2 * sigma**2 * by_variance.sum(axis=1)
        gradient_omega = 2 * omega**2 * (by_variance * self.info.multiplier).sum(axis=1)
        counts = self.count_config + len(self.membership)
        gradient_tau = own_square + shared_square - counts
        k = self.count_coef
        gradient_logit = 0.5 * expit(-logit) * (shared_square.sum() - k * len(self.membership))
        gradient_logit -= 0.5 * expit(logit) * (own_square.sum() - k * self.count_config)
        value, prior = self._log_prior(log_tau, logit, log_sigma, log_omega, populations)
        gradient = np.concatenate([gradient_tau, [gradient_logit], gradient_sigma, gradient_omega, np.zeros(4)])
        return float(s.log_density + value), gradient + prior

    def _log_prior(
        self, log_tau: FloatArray, logit: FloatArray, log_sigma: FloatArray, log_omega: FloatArray, populations: list[FloatArray]
    ) -> tuple[float, FloatArray]:
        """Return the log prior density of the unconstrained coordinates and its gradient."""
        p = self.priors
        z = (log_tau - p.deviation.log_mean) / p.deviation.log_sd
        value = -0.5 * float(z @ z) + p.hardware_share * float(log_expit(logit) + log_expit(-logit))
        parts = [-z / p.deviation.log_sd, [p.hardware_share * (1 - 2 * expit(logit))]]
        tails: list[float] = []
        for logs, typical, log_spread, prior, spread_prior in (
            (log_sigma, populations[0], populations[1], p.noise, p.noise_spread),
            (log_omega, populations[2], populations[3], p.drift, p.drift_spread),
        ):
            spread = np.exp(log_spread)
            r = (logs - typical) / spread
            a = (typical - prior.log_mean) / prior.log_sd
            b = (log_spread - spread_prior.log_mean) / spread_prior.log_sd
            value += float(-0.5 * (r @ r) - len(logs) * log_spread - 0.5 * a * a - 0.5 * b * b)
            parts.append(-r / spread)
            tails += [float(r.sum() / spread - a / prior.log_sd), float(r @ r - len(logs) - b / spread_prior.log_sd)]
        return value, np.concatenate([*parts, tails])

    def population(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and covariance of (beta, gamma, delta) given the scales.

        Parameters
        ----------
        x : ndarray, shape (S, size)

        Returns
        -------
        mean : ndarray, shape (S, P)
            In reference units.
        covariance : ndarray, shape (S, P, P)
        """
        log_tau, logit, log_sigma, log_omega, *_ = self.split(x)
        s = self._solve(*self._sds(log_tau, logit), np.exp(log_sigma), np.exp(log_omega))
        return self.mean + self.sd * s.population_mean, self.sd[:, None] * s.population_inverse * self.sd

    def predictive(self, x: FloatArray, configuration: ServingConfiguration) -> tuple[FloatArray, FloatArray]:
        """Return mean and covariance of the coefficients of a configuration that is not among those fitted, given the scales.

        Parameters
        ----------
        x : ndarray, shape (S, size)
        configuration : ServingConfiguration

        Returns
        -------
        mean : ndarray, shape (S, K)
            In reference units.
        covariance : ndarray, shape (S, K, K)
        """
        log_tau, logit, log_sigma, log_omega, *_ = self.split(x)
        own_sd, shared_sd = self._sds(log_tau, logit)
        s = self._solve(own_sd, shared_sd, np.exp(log_sigma), np.exp(log_omega))
        loading = population_loading(self.feature_set, config_to_constant(self.feature_set, configuration))
        mean = (self.mean + self.sd * s.population_mean) @ loading.T
        slope = np.broadcast_to(loading * self.sd, (len(x), *loading.shape))
        covariance = np.zeros((len(x), self.count_coef, self.count_coef))
        diagonal = np.arange(self.count_coef)
        name = configuration.hardware.name
        if name in self.hardware_names:
            h = self.hardware_names.index(name)
            mapped = s.hardware_map[:, h]
            effect = s.hardware_target[:, h] - (mapped @ s.population_mean[..., None])[..., 0]
            mean = mean + shared_sd * effect
            slope = slope - shared_sd[..., None] * mapped
            covariance = covariance + shared_sd[:, :, None] * s.hardware_inverse[:, h] * shared_sd[:, None, :]
        else:
            covariance[:, diagonal, diagonal] += shared_sd**2
        covariance[:, diagonal, diagonal] += own_sd**2
        return mean, covariance + slope @ s.population_inverse @ _t(slope)

    def covariance_with(self, x: FloatArray, configuration: ServingConfiguration) -> dict[str, FloatArray]:
        """Return how everything fitted varies with the coefficients of a configuration that is not, given the scales and the rows.

        Parameters
        ----------
        x : ndarray, shape (S, size)
        configuration : ServingConfiguration

        Returns
        -------
        dict
            Covariances with the coefficients `predictive` describes, in reference units: of `population`, shape (S, P, K), of
            `hardware_effect`, shape (S, H, K, K), of `theta`, shape (S, C, K, K).
        """
        log_tau, logit, log_sigma, log_omega, *_ = self.split(x)
        own_sd, shared_sd = self._sds(log_tau, logit)
        s = self._solve(own_sd, shared_sd, np.exp(log_sigma), np.exp(log_omega))
        slope = population_loading(self.feature_set, config_to_constant(self.feature_set, configuration)) * self.sd
        name = configuration.hardware.name
        shared = np.zeros((len(x), len(self.hardware_names), self.count_coef, self.count_coef))
        if name in self.hardware_names:
            h = self.hardware_names.index(name)
            slope = slope - shared_sd[..., None] * s.hardware_map[:, h]
            shared[:, h] = s.hardware_inverse[:, h] * shared_sd[:, None, :]
        # xi, then the standard normal effects given xi, then the centres the coefficients are shrunk to.
        population = s.population_inverse @ _t(np.broadcast_to(slope, (len(x), *slope.shape[-2:])))
        shared = shared_sd[:, None, :, None] * (shared - s.hardware_map @ population[:, None])
        centre = self.loading @ population[:, None] + shared[:, self.hardware]
        return {"population": self.sd[:, None] * population, "hardware_effect": shared, "theta": s.shrink @ centre}

    def draw(self, x: FloatArray, rng: np.random.Generator) -> dict[str, FloatArray]:
        """Draw the coefficients exactly, once for each value of the scales.

        Parameters
        ----------
        x : ndarray, shape (S, size)
        rng : Generator

        Returns
        -------
        dict
            Every variable of the PyMC model by name, leading dimension S; `population` is (beta, gamma, delta) concatenated.
        """
        log_tau, logit, log_sigma, log_omega, *populations = self.split(x)
        sigma, omega = np.exp(log_sigma), np.exp(log_omega)
        own_sd, shared_sd = self._sds(log_tau, logit)
        s = self._solve(own_sd, shared_sd, sigma, omega)

        def normal(covariance: FloatArray) -> FloatArray:
            factor = np.linalg.cholesky(0.5 * (covariance + _t(covariance)))
            return np.asarray((factor @ rng.standard_normal((*covariance.shape[:-1], 1)))[..., 0])

        xi = s.population_mean + normal(s.population_inverse)
        effect = s.hardware_target - (s.hardware_map @ xi[:, None, :, None])[..., 0] + normal(s.hardware_inverse)
        hardware = shared_sd[:, None, :] * effect
        centre = (self.loading @ xi[:, None, :, None])[..., 0] + hardware[:, self.hardware]
        left = s.own_target - own_sd[:, None, :] * (s.gram @ centre[..., None])[..., 0]
        eta = (s.own_inverse @ left[..., None])[..., 0] + normal(s.own_inverse)
        theta = self.info.reference + self.offset + centre + own_sd[:, None, :] * eta
        return {
            "population": self.mean + self.sd * xi,
            "tau": np.exp(log_tau),
            "hardware_share": expit(logit),
            "hardware_effect_z": effect,
            "hardware_effect": hardware,
            "theta": theta,
            "sigma": sigma,
            "omega": omega,
            "sigma_typical": np.exp(populations[0]),
            "sigma_spread": np.exp(populations[1]),
            "omega_typical": np.exp(populations[2]),
            "omega_spread": np.exp(populations[3]),
        }


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
        If the sampler cannot start or breaks down.
    """
    priors, settings = priors or PriorSettings(), settings or SamplerSettings()
    check_statistics(statistics, feature_set)
    density = ExactDensity(statistics, feature_set, priors)
    run = run_nuts(density.log_density, density.start, settings, seed=seed, label=label, show_progress=show_progress)
    variables = density.draw(run.x, np.random.default_rng([seed, 3]))
    base, config = len(feature_set.base), len(feature_set.config)
    beta, gamma, delta = np.split(variables.pop("population"), [base, base + config], axis=1)
    variables |= {"beta": beta, "gamma": gamma, "delta": delta}
    return posterior_tree(variables, run, statistics, feature_set, settings, "exact")
