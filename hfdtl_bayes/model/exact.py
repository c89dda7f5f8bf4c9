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
number that does not shrink with them, so one near zero is harmless where samplers of the coefficients get stuck. HMC moves in
psi alone (about two dozen smooth dimensions, no compilation); then (beta, gamma, delta, w, theta) are drawn from their exact
conditional.

The elimination is that of Gaussian hierarchical models in general: Lindley & Smith (1972), doi:10.1111/j.2517-6161.1972.tb00885.x.

**Discrepancy** (`Level.DISCREPANCY`). Some of a configuration's coefficients, d_c ~ Normal(0, T^2) with T given, share nothing. With
their columns last, G_c and h_c in blocks of pooled (p) and discrepancy (d) coefficients, they are eliminated first, and what is
left of the rows is as if they had no such columns:

    Q_c = I + T G_dd T        B = T G_dp        G_pp <- G_pp - B' Q_c^-1 B        h_p <- h_p - B' Q_c^-1 T h_d

Everything above goes on with the pooled coefficients alone, and the coordinates do not grow.

**Discounted donors** (`PriorSettings.discounts`). A donor's rows speak of everything shared (beta, gamma, delta, w, tau, rho) through

    L_c = p(rows of c | everything shared, sigma_c, omega_c),        theta_c integrated out,

and a donor that counts for a_c of one enters as L_c^a_c: the power prior of Ibrahim & Chen (2000), doi:10.1214/ss/1009212673, with the
donor as the historical study. Where its rows pin theta_c, L_c is the density of one draw theta_c from the population, so its deviations
weigh a_c / tau^2 where others' weigh 1 / tau^2 and it is a_c of a degree of freedom of tau; of what its rows say nothing of, L_c is flat
and so is its power. a_c = 1 is the model itself, and as a_c falls to 0 the fit becomes the one without the donor, in every shared quantity.
Two other ways were not taken. The power inside the integral, on single rows, changes nothing: at half of ten thousand rows theta_c is
as well known, and one draw from the population as before. A larger deviation, tau^2 / a_c, is a claim that the donor is more
unlike the others; one that is not is then evidence for a small tau, and discounting it would narrow predictions of new configurations. Given
everything shared, theta_c follows all its rows, so predictions of the donor itself stay sharp; sigma_c and omega_c are seen by a_c of
their rows, still thousands as a rule, and noise and drift count nearly in full.

In the elimination G1_c, g1_c and the log of L_c are multiplied by a_c, and so is c's part of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model.layout import hardware_index, hardware_names
from hfdtl_bayes.model.moments import reference_errors
from hfdtl_bayes.model.priors import PriorSettings, coefficient_scale, deviation_scale, population_mean, population_sd
from hfdtl_bayes.statistics import ConfigStatistics, config_to_constant

FloatArray = NDArray[np.float64]

_SMALLEST_NOISE = 1e-6
"""Relative noise below which rows are taken to be free of it: a perfect fit would make the noise zero."""


def _t(matrix: FloatArray) -> FloatArray:
    return np.swapaxes(matrix, -1, -2)


POPULATIONS = ("sigma_typical", "sigma_spread", "omega_typical", "omega_spread")
"""Names of the populations of noise and drift, in the order in which `ExactDensity.join` takes them."""


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
        log density loses all its digits. Zero for those of the discrepancy, which are small by belief.
    """

    gram: FloatArray
    target: FloatArray
    square: FloatArray
    count: FloatArray
    multiplier: FloatArray
    reference: FloatArray


def information(
    statistics: Sequence[ConfigStatistics], centre: FloatArray, size: FloatArray, errors: FloatArray, pooled: int
) -> Information:
    """Compute the Gram matrices of several configurations.

    Parameters
    ----------
    statistics : sequence of ConfigStatistics
    centre, size : ndarray, shape (C, K)
        Prior mean of each configuration's coefficients and how far they may lie from it.
    errors : ndarray, shape (C, 2)
        Rough relative sds of noise and drift, to weigh rows against the prior.
    pooled : int
        How many coefficients are pooled, K0; the rest are discrepancy.
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
        reference[c, :pooled] = np.linalg.lstsq(stacked[:, :k], stacked[:, k])[0][:pooled]
        for j, stratum in enumerate(own.strata):
            design = stratum.triangle[:, :k]
            left = stratum.triangle[:, k] - design @ reference[c]
            gram[c, j], target[c, j] = design.T @ design, design.T @ left
            square[c, j] = max(float(left @ left), stratum.count * _SMALLEST_NOISE**2)
            count[c, j], multiplier[c, j] = stratum.count, stratum.multiplier
    return Information(gram, target, square, count, multiplier, reference)


@dataclass(frozen=True)
class Discrepancy:
    """The discrepancy given the pooled coefficients, for one or many values of the scales: Normal(mean - lever theta, covariance).

    theta is relative to the reference; shapes (..., C, J), (..., C, J, K0) and (..., C, J, J).
    """

    mean: FloatArray
    lever: FloatArray
    covariance: FloatArray

    def all_of(self, theta: FloatArray) -> FloatArray:
        """Return the mean of all coefficients, shape (..., C, K), at a mean of the pooled ones, (..., C, K0)."""
        return np.concatenate([theta, self.mean - np.matvec(self.lever, theta)], axis=-1)

    def covariance_of_all(self, covariance: FloatArray) -> FloatArray:
        """Return the covariance of all coefficients, shape (..., C, K, K), at a covariance of the pooled ones, (..., C, K0, K0)."""
        k = covariance.shape[-1]
        size = k + self.lever.shape[-2]
        out = np.empty((*covariance.shape[:-2], size, size))
        cross = -(self.lever @ covariance)
        out[..., :k, :k], out[..., k:, :k], out[..., :k, k:] = covariance, cross, _t(cross)
        out[..., k:, k:] = self.covariance - cross @ _t(self.lever)
        return out


@dataclass(frozen=True)
class _Solved:
    """Everything the elimination leaves, for one or many values of the scales (leading dimensions).

    `gram` is of the pooled coefficients, the discrepancy eliminated; `discrepancy` is None where there is none.
    """

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
    discrepancy: Discrepancy | None


@dataclass(frozen=True)
class Levels:
    """Parts of the covariance of a configuration's coefficients given the scales, shape (S, K, K) each, in reference units.

    Attributes
    ----------
    population : ndarray
        What (beta, gamma, delta) leave open, with all that moves with them.
    hardware : ndarray
        What the effect of its hardware leaves open once they are known.
    own : ndarray
        What its own deviation and its discrepancy leave open once both are.
    discrepancy : ndarray
        Of that, what its discrepancy leaves open once the pooled coefficients are known.
    """

    population: FloatArray
    hardware: FloatArray
    own: FloatArray
    discrepancy: FloatArray


def population_loading(feature_set: FeatureSet, config_row: FloatArray) -> FloatArray:
    """Return A, shape (K, B + G + D): what each of (beta, gamma, delta) contributes to a configuration's own coefficients.

    Base and residual coefficients stand for themselves; `config_row`, shape (G,), shifts the constant; the discrepancy has zeros.
    """
    base, config, k = len(feature_set.base), len(feature_set.config), len(feature_set.pooled)
    loading = np.zeros((len(feature_set.varying), k + config))
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
    Unconstrained coordinates, in order: log tau (K0, of the pooled coefficients), logit rho, log sigma (C), log omega (C), log
    sigma_typical, log sigma_spread, log omega_typical, log omega_spread. Without drift those of omega are minus infinity.
    """

    def __init__(self, statistics: Sequence[ConfigStatistics], feature_set: FeatureSet, priors: PriorSettings) -> None:
        self.priors = priors
        self.scale, self.pooled_scale = coefficient_scale(feature_set), deviation_scale(feature_set)
        self.mean, self.sd = population_mean(feature_set), population_sd(feature_set)
        self.count_config, self.count_coef, self.count_pooled = len(statistics), len(self.scale), len(self.pooled_scale)
        self.discrepancy_sd = feature_set.discrepancy_sd
        self.feature_set = feature_set
        self.hardware = hardware_index(statistics)
        self.hardware_names = hardware_names(statistics)
        self.counts = np.array([priors.counts(s.config_id) for s in statistics])
        count_hardware = len(self.hardware_names)
        self.membership = np.zeros((count_hardware, self.count_config))
        self.membership[self.hardware, np.arange(self.count_config)] = 1.0
        loading = np.array([population_loading(feature_set, s.config_row) for s in statistics])
        k = self.count_pooled
        self.loading = loading[:, :k] * self.sd
        centre = loading @ self.mean
        own = np.concatenate([priors.deviation.gamma_median * self.pooled_scale, self.discrepancy_sd])
        size = np.hypot(np.sqrt(((loading * self.sd) ** 2).sum(axis=2)), own)
        self.errors = np.array([reference_errors(s, priors) for s in statistics])
        self.info = information(statistics, centre, size, self.errors, k)
        self.offset = (centre - self.info.reference)[:, :k]
        # Contractions over strata as plain matrix products: numpy's einsum costs more than the arithmetic here.
        self._flat_gram = self.info.gram.reshape(self.count_config, -1, self.count_coef**2)
        self._stacked_loading = self.loading.reshape(-1, self.loading.shape[-1])
        self._identity, self._population_identity = np.eye(k), np.eye(len(self.mean))
        self._discrepancy_identity = np.eye(self.count_coef - k)
        with np.errstate(divide="ignore"):
            self.start = self._start(np.log(self.errors))

    def _start(self, errors: FloatArray) -> FloatArray:
        typical = errors.mean(axis=0)
        p = self.priors
        drift_spread = p.drift_spread.log_mean if p.drift else -np.inf
        tails = [typical[0], p.noise_spread.log_mean, typical[1], drift_spread]
        return np.concatenate(
            [np.full(self.count_pooled, np.log(p.deviation.gamma_median)), [0.0], errors[:, 0], errors[:, 1], tails]
        )

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates."""
        return len(self.start)

    def split(self, x: FloatArray) -> tuple[FloatArray, ...]:
        """Split coordinates (..., size) into log tau, logit rho, log sigma, log omega and the four population scales."""
        k, c = self.count_pooled, self.count_config
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
        with np.errstate(divide="ignore"):
            columns = [np.log(tau), np.log(share / (1 - share))[:, None], np.log(sigma), np.log(omega)]
            return np.concatenate([*columns, *(np.log(p)[:, None] for p in populations)], axis=1)

    def _sds(self, log_tau: FloatArray, logit: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the sds of a configuration's own deviations and of those of its hardware, (..., K0).

        The parts of the variance are taken from the log odds: 1 - share would be zero long before the own part is.
        """
        total = np.exp(log_tau) * self.pooled_scale
        own = np.exp(0.5 * log_expit(-logit))[..., None] * total
        return own, np.exp(0.5 * log_expit(logit))[..., None] * total

    def without_discrepancy(
        self, gram: FloatArray, target: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray | float, Discrepancy | None]:
        """Eliminate the discrepancy from the information of configurations, shapes (..., C, K, K) and (..., C, K).

        Returns
        -------
        gram, target : ndarray, shapes (..., C, K0, K0) and (..., C, K0)
            Information of the pooled coefficients, relative to the reference.
        gained : ndarray, shape (..., C), or float
            Twice what the elimination adds to the log density.
        discrepancy : Discrepancy or None
            Given the pooled coefficients; None if the feature set has none.
        """
        k, sd = self.count_pooled, self.discrepancy_sd
        if not len(sd):
            return gram, target, 0.0, None
        inner = sd[:, None] * gram[..., k:, k:] * sd + self._discrepancy_identity
        inverse = np.linalg.inv(inner)
        covariance = sd[:, None] * inverse * sd
        cross, left = gram[..., k:, :k], target[..., k:]
        lever = covariance @ cross
        mean = np.matvec(covariance, left)
        reduced = gram[..., :k, :k] - _t(cross) @ lever
        gained = np.vecdot(left, mean) - np.linalg.slogdet(inner)[1]
        return reduced, target[..., :k] - np.vecmat(mean, cross), gained, Discrepancy(mean, lever, covariance)

    def _solve(self, own_sd: FloatArray, shared_sd: FloatArray, sigma: FloatArray, omega: FloatArray) -> _Solved:
        k = self.count_coef
        variance = np.square(sigma)[..., None] + self.info.multiplier * np.square(omega)[..., None]
        weight = 1.0 / variance
        gram = np.vecmat(weight, self._flat_gram).reshape(*weight.shape[:-1], k, k)
        gram, target, gained, discrepancy = self.without_discrepancy(gram, np.vecmat(weight, self.info.target))
        k = self.count_pooled
        own_column = own_sd[..., None, :, None]
        own_row = own_sd[..., None, None, :]
        own = own_column * gram * own_row + self._identity
        own_inverse = np.linalg.inv(own)
        shrink = own_column * own_inverse / own_row
        reduced = gram @ shrink
        reduced = 0.5 * (reduced + _t(reduced))
        # The step from the reference to the prior's centre is made after eta is eliminated. Before, it would be of the size of
        # the information itself, and a log density of a few digits would be left of the difference.
        kept_target = np.vecmat(target, shrink)
        moved = np.matvec(reduced, self.offset)
        reduced_target = kept_target - moved
        own_target = own_sd[..., None, :] * target
        explained = np.vecdot(own_target, np.matvec(own_inverse, own_target)) + np.vecdot(
            self.offset, kept_target + reduced_target
        )
        scaled_target = own_target - own_sd[..., None, :] * np.matvec(gram, self.offset)
        # What a configuration says of everything shared counts for so much of one.
        reduced, reduced_target = self.counts[:, None, None] * reduced, self.counts[:, None] * reduced_target
        # Hardware: sums over its configurations.
        summed = (self.membership @ reduced.reshape(*reduced.shape[:-2], k * k)).reshape(*reduced.shape[:-3], -1, k, k)
        hardware_target = shared_sd[..., None, :] * (self.membership @ reduced_target)
        loaded = reduced @ self.loading
        hardware_map = (self.membership @ loaded.reshape(*loaded.shape[:-2], -1)).reshape(
            *loaded.shape[:-3], -1, *loaded.shape[-2:]
        )
        shared_column = shared_sd[..., None, :, None]
        hardware = shared_column * summed * shared_sd[..., None, None, :] + self._identity
        hardware_inverse = np.linalg.inv(hardware)
        hardware_map = shared_column * hardware_map
        inner = hardware_inverse @ hardware_map
        inner_target = np.matvec(hardware_inverse, hardware_target)
        # Population. Sums over configurations, and over hardware, are inner products of stacked rows.
        p = self.loading.shape[-1]
        stacked = loaded.reshape(*loaded.shape[:-3], -1, p)
        stacked_map = hardware_map.reshape(*hardware_map.shape[:-3], -1, p)
        precision = (
            self._population_identity + self._stacked_loading.T @ stacked - _t(stacked_map) @ inner.reshape(stacked_map.shape)
        )
        vector = np.matvec(self._stacked_loading.T, reduced_target.reshape(*stacked.shape[:-1]))
        vector = vector - np.vecmat(inner_target.reshape(stacked_map.shape[:-1]), stacked_map)
        population_inverse = np.linalg.inv(precision)
        population = np.matvec(population_inverse, vector)
        per_config = np.vecdot(self.info.count, np.log(variance)) + np.vecdot(weight, self.info.square) - explained - gained
        log_density = -0.5 * (
            np.vecdot(self.counts, per_config + np.linalg.slogdet(own)[1])
            + (np.linalg.slogdet(hardware)[1] - np.vecdot(hardware_target, inner_target)).sum(axis=-1)
            + np.linalg.slogdet(precision)[1]
            - np.vecdot(vector, population)
        )
        return _Solved(
            log_density, variance, own_inverse, shrink, scaled_target, hardware_inverse, inner, inner_target,
            population_inverse, population, gram, discrepancy,
        )  # fmt: skip

    def _solved_at(self, x: FloatArray) -> tuple[FloatArray, FloatArray, _Solved]:
        """Return the sds of own and of shared deviations at unconstrained coordinates, and what the elimination leaves there."""
        log_tau, logit, log_sigma, log_omega, *_ = self.split(x)
        own_sd, shared_sd = self._sds(log_tau, logit)
        return own_sd, shared_sd, self._solve(own_sd, shared_sd, np.exp(log_sigma), np.exp(log_omega))

    def log_density(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the log density at unconstrained coordinates and its gradient.

        Parameters
        ----------
        x : ndarray, shape (..., size)
            Any number of points at once: most of the cost of one is overhead that many share.

        Returns
        -------
        value : ndarray, shape (...)
        gradient : ndarray, shape (..., size)
            Zero for the drift's coordinates where the priors say that there is none.
        """
        log_tau, logit, log_sigma, log_omega, *populations = self.split(x)
        sigma, omega = np.exp(log_sigma), np.exp(log_omega)
        own_sd, shared_sd = self._sds(log_tau, logit)
        s = self._solve(own_sd, shared_sd, sigma, omega)
        xi = s.population_mean[..., None, :]
        population_inverse = s.population_inverse[..., None, :, :]
        effect = s.hardware_target - np.matvec(s.hardware_map, xi)
        effect_covariance = s.hardware_inverse + s.hardware_map @ population_inverse @ _t(s.hardware_map)
        shared_row, own_row = shared_sd[..., None, :], own_sd[..., None, :]
        shared_column, own_column = shared_row[..., None], own_row[..., None]
        # The part of a coefficient that is not its own: x_c = F_c xi + W omega_h.
        slope = self.loading - np.take(shared_column * s.hardware_map, self.hardware, axis=-3)
        centre = np.matvec(self.loading, xi) + np.take(shared_row * effect, self.hardware, axis=-2)
        shared_covariance = shared_column * s.hardware_inverse * shared_row[..., None, :]
        centre_covariance = slope @ population_inverse @ _t(slope) + np.take(shared_covariance, self.hardware, axis=-3)
        lever = s.own_inverse @ (own_column * s.gram)
        eta = np.matvec(s.own_inverse, s.own_target) - np.matvec(lever, centre)
        eta_variance = np.diagonal(s.own_inverse, axis1=-2, axis2=-1) + np.vecdot(lever @ centre_covariance, lever)
        theta = self.offset + centre + own_row * eta
        covariance = s.shrink @ centre_covariance @ _t(s.shrink) + own_column * s.own_inverse * own_row[..., None, :]
        if s.discrepancy is not None:
            theta, covariance = s.discrepancy.all_of(theta), s.discrepancy.covariance_of_all(covariance)
        own_square = np.vecmat(self.counts, eta * eta + eta_variance)
        shared_square = (effect * effect + np.diagonal(effect_covariance, axis1=-2, axis2=-1)).sum(axis=-2)
        # Expected squared residual of each stratum; theta is relative to the reference, as target and square are.
        second = covariance + theta[..., :, None] * theta[..., None, :]
        expected = np.matvec(self._flat_gram, second.reshape(*theta.shape[:-1], -1))
        expected = expected + self.info.square - 2 * np.matvec(self.info.target, theta)
        by_variance = self.counts[:, None] * (expected / s.variance - self.info.count) / s.variance
        k, c, h = self.count_pooled, self.count_config, len(self.membership)
        counted = self.counts.sum()
        value, gradient = self._log_prior(log_tau, logit, log_sigma, log_omega, populations)
        gradient[..., :k] += own_square + shared_square - (counted + h)
        gradient[..., k] += 0.5 * expit(-logit) * (shared_square.sum(axis=-1) - k * h)
        gradient[..., k] -= 0.5 * expit(logit) * (own_square.sum(axis=-1) - k * counted)
        gradient[..., k + 1 : k + 1 + c] += sigma**2 * by_variance.sum(axis=-1)
        gradient[..., k + 1 + c : k + 1 + 2 * c] += omega**2 * np.vecdot(by_variance, self.info.multiplier)
        return s.log_density + value, gradient

    def _log_prior(
        self, log_tau: FloatArray, logit: FloatArray, log_sigma: FloatArray, log_omega: FloatArray, populations: list[FloatArray]
    ) -> tuple[FloatArray, FloatArray]:
        """Return the log prior density of the unconstrained coordinates and its gradient."""
        p, k, c = self.priors, self.count_pooled, self.count_config
        gradient = np.zeros((*log_tau.shape[:-1], self.size))
        shape, mean = p.deviation.gamma_shape, p.deviation.gamma_rate * np.exp(log_tau)
        value = (shape * log_tau - mean).sum(axis=-1) + p.hardware_share * (log_expit(logit) + log_expit(-logit))
        gradient[..., :k] = shape - mean
        gradient[..., k] = p.hardware_share * (1 - 2 * expit(logit))
        for at, logs, typical, log_spread, prior, spread_prior in (
            (0, log_sigma, populations[0], populations[1], p.noise, p.noise_spread),
            (1, log_omega, populations[2], populations[3], p.drift, p.drift_spread),
        ):
            if prior is None:
                continue
            spread = np.exp(log_spread)
            r = (logs - typical[..., None]) / spread[..., None]
            square = np.vecdot(r, r)
            a = (typical - prior.log_mean) / prior.log_sd
            b = (log_spread - spread_prior.log_mean) / spread_prior.log_sd
            value = value - 0.5 * (square + a * a + b * b) - c * log_spread
            gradient[..., k + 1 + at * c : k + 1 + (at + 1) * c] = -r / spread[..., None]
            gradient[..., k + 1 + 2 * c + 2 * at] = r.sum(axis=-1) / spread - a / prior.log_sd
            gradient[..., k + 2 + 2 * c + 2 * at] = square - c - b / spread_prior.log_sd
        return value, gradient

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
        *_, s = self._solved_at(x)
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
        mean, levels = self.levels(x, configuration)
        return mean, levels.population + levels.hardware + levels.own

    def levels(self, x: FloatArray, configuration: ServingConfiguration, fitted: int | None = None) -> tuple[FloatArray, Levels]:
        """Return mean and covariance of a configuration's coefficients given the scales, the covariance by level of the hierarchy.

        With theta = A phi + w_h + e_c, the law of total variance from the top down, all given the scales and the rows:

            Cov(theta) = Cov(E[theta | phi]) + E[Cov(E[theta | phi, w_h] | phi)] + E[Cov(theta | phi, w_h)]

        The discrepancy of a new configuration is its own; of a fitted one the three levels of the others move it too.

        Parameters
        ----------
        x : ndarray, shape (S, size)
        configuration : ServingConfiguration
        fitted : int, optional
            Its index among the configurations fitted; by default it is a new one from the population, whatever its name.

        Returns
        -------
        mean : ndarray, shape (S, K)
            In reference units.
        levels : Levels
        """
        own_sd, shared_sd, s = self._solved_at(x)
        k = self.count_pooled
        loading = population_loading(self.feature_set, config_to_constant(self.feature_set, configuration))[:k]
        mean = (self.mean + self.sd * s.population_mean) @ loading.T
        slope = np.broadcast_to(loading * self.sd, (len(x), *loading.shape))
        name, diagonal = configuration.hardware.name, np.arange(k)
        hardware, own = np.zeros((2, len(x), k, k))
        if name in self.hardware_names:
            h = self.hardware_names.index(name)
            mapped = s.hardware_map[:, h]
            effect = s.hardware_target[:, h] - (mapped @ s.population_mean[..., None])[..., 0]
            mean = mean + shared_sd * effect
            slope = slope - shared_sd[..., None] * mapped
            hardware = shared_sd[:, :, None] * s.hardware_inverse[:, h] * shared_sd[:, None, :]
        else:
            hardware[:, diagonal, diagonal] = shared_sd**2
        if fitted is None:
            own[:, diagonal, diagonal] = own_sd**2
        else:
            # Its own rows pull the coefficients from the centre: I - D M^-1 D G = D M^-1 D^-1 of the centre is left.
            shrink, gram = s.shrink[:, fitted], s.gram[:, fitted]
            centre = mean - self.info.reference[fitted, :k] - self.offset[fitted]
            left = s.own_target[:, fitted] - own_sd * np.matvec(gram, centre)
            mean = mean + own_sd * np.matvec(s.own_inverse[:, fitted], left)
            slope, hardware = shrink @ slope, shrink @ hardware @ _t(shrink)
            own = own_sd[:, :, None] * s.own_inverse[:, fitted] * own_sd[:, None, :]
        population = slope @ s.population_inverse @ _t(slope)
        if s.discrepancy is None:
            return mean, Levels(population, hardware, own, np.zeros_like(own))
        # All coefficients are linear in the pooled ones, T = [I; -L], with an error of the discrepancy's own.
        sd, lever = self.discrepancy_sd, np.zeros((len(x), self.count_coef - k, k))
        left, error = np.zeros((len(x), len(sd))), np.broadcast_to(np.diag(sd**2), (len(x), len(sd), len(sd)))
        if fitted is not None:
            lever, error = s.discrepancy.lever[:, fitted], s.discrepancy.covariance[:, fitted]
            left = s.discrepancy.mean[:, fitted] - np.matvec(lever, mean - self.info.reference[fitted, :k])
        above, within = Discrepancy(left, lever, np.zeros_like(error)), Discrepancy(left, lever, error)
        levels = Levels(
            above.covariance_of_all(population),
            above.covariance_of_all(hardware),
            within.covariance_of_all(own),
            within.covariance_of_all(np.zeros_like(own)),
        )
        return np.concatenate([mean, left], axis=1), levels

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
            `hardware_effect`, shape (S, H, K0, K), of `theta`, shape (S, C, K, K). Nothing varies with a new discrepancy.
        """
        _, shared_sd, s = self._solved_at(x)
        k = self.count_pooled
        slope = population_loading(self.feature_set, config_to_constant(self.feature_set, configuration))[:k] * self.sd
        name = configuration.hardware.name
        shared = np.zeros((len(x), len(self.hardware_names), k, k))
        if name in self.hardware_names:
            h = self.hardware_names.index(name)
            slope = slope - shared_sd[..., None] * s.hardware_map[:, h]
            shared[:, h] = s.hardware_inverse[:, h] * shared_sd[:, None, :]
        # xi, then the standard normal effects given xi, then the centres the coefficients are shrunk to.
        population = s.population_inverse @ _t(np.broadcast_to(slope, (len(x), *slope.shape[-2:])))
        shared = shared_sd[:, None, :, None] * (shared - s.hardware_map @ population[:, None])
        centre = self.loading @ population[:, None] + shared[:, self.hardware]
        found = {"population": self.sd[:, None] * population, "hardware_effect": shared, "theta": s.shrink @ centre}
        if s.discrepancy is None:
            return found
        found["theta"] = np.concatenate([found["theta"], -(s.discrepancy.lever @ found["theta"])], axis=2)
        more = self.count_coef - k
        return {n: np.concatenate([v, np.zeros((*v.shape[:-1], more))], axis=-1) for n, v in found.items()}

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
        own_sd, shared_sd, s = self._solved_at(x)

        def normal(covariance: FloatArray) -> FloatArray:
            factor = np.linalg.cholesky(0.5 * (covariance + _t(covariance)))
            return np.asarray((factor @ rng.standard_normal((*covariance.shape[:-1], 1)))[..., 0])

        xi = s.population_mean + normal(s.population_inverse)
        effect = s.hardware_target - (s.hardware_map @ xi[:, None, :, None])[..., 0] + normal(s.hardware_inverse)
        hardware = shared_sd[:, None, :] * effect
        centre = (self.loading @ xi[:, None, :, None])[..., 0] + hardware[:, self.hardware]
        left = s.own_target - own_sd[:, None, :] * (s.gram @ centre[..., None])[..., 0]
        eta = (s.own_inverse @ left[..., None])[..., 0] + normal(s.own_inverse)
        theta = self.offset + centre + own_sd[:, None, :] * eta
        if s.discrepancy is not None:
            theta = s.discrepancy.all_of(theta)
            theta[..., self.count_pooled :] += normal(s.discrepancy.covariance)
        theta = self.info.reference + theta
        return {
            "population": self.mean + self.sd * xi,
            "tau": np.exp(log_tau),
            "hardware_share": expit(logit),
            "hardware_effect_z": effect,
            "hardware_effect": hardware,
            "theta": theta,
            "sigma": np.exp(log_sigma),
            "omega": np.exp(log_omega),
            "sigma_typical": np.exp(populations[0]),
            "sigma_spread": np.exp(populations[1]),
            "omega_typical": np.exp(populations[2]),
            "omega_spread": np.exp(populations[3]),
        }
