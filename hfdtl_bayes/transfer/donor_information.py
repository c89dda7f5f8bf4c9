"""What any subset of donors says of targets, in closed form: the expected relative error of their expected step time.

Given the scales (tau, rho, sigma, omega) the population model is linear and Gaussian, and the covariance of a new configuration's
coefficients depends on which donors there are and on their batches, not on what was measured. In the notation of `model.exact`, with
G1_c what donor c says of its centre once its own deviation is integrated out (computed once for each donor),

    N_h = I + W (sum_c G1_c) W      H_h = sum_c G1_c F_c      Lambda = I + sum_c F_c' G1_c F_c - sum_h H_h' W N_h^-1 W H_h
    C_t = D^2 + W N_h^-1 W + B Lambda^-1 B'                   B = A_t S - W N_h^-1 W H_h,   h the hardware of target t

where sums run over the donors chosen: thousands of subsets are a few matrix products. For traffic rows x of mean m(x) the expected error is
E|error| / m = sqrt(2 / pi) sqrt(x' C_t x) / m(x), averaged over traffic, scales and targets. A donor more never makes it larger.

That is so if the model is right. Whether a subset misleads, its predictions of the candidates outside it tell: their means are in closed
form too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model import ExactDensity, PriorSettings
from hfdtl_bayes.model.exact import population_loading
from hfdtl_bayes.statistics import ConfigStatistics, config_to_constant

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_AT_ONCE = 2**27
"""Bytes that the matrices of the subsets computed together may take."""


@dataclass(frozen=True)
class DonorScales:
    """Values of the scales that donors are judged at; S of them.

    Attributes
    ----------
    tau : ndarray, shape (S, K0)
    share : ndarray, shape (S,)
    sigma, omega : ndarray, shape (S, C)
        Noise and drift of each candidate.
    """

    tau: FloatArray
    share: FloatArray
    sigma: FloatArray
    omega: FloatArray


@dataclass(frozen=True)
class TargetTraffic:
    """A target and what it is to be predicted on.

    Attributes
    ----------
    configuration : ServingConfiguration
    rows : ndarray, shape (n, K)
        Design of its traffic, each row divided by its expected step time.
    """

    configuration: ServingConfiguration
    rows: FloatArray


class DonorInformation:
    """What each candidate says of the population, so that any subset of them can be judged.

    Parameters
    ----------
    statistics : sequence of ConfigStatistics
        Of C candidates.
    features : FeatureSet
    priors : PriorSettings
    scales : DonorScales
    """

    def __init__(
        self, statistics: Sequence[ConfigStatistics], features: FeatureSet, priors: PriorSettings, scales: DonorScales
    ) -> None:
        density = ExactDensity(statistics, features, priors)
        self.features = features
        self.population_sd = density.sd
        self.hardware = density.hardware_names
        self.membership = density.membership.astype(bool)
        total = scales.tau * density.pooled_scale
        self.own_sd = np.sqrt(1.0 - scales.share)[:, None] * total
        self.shared_sd = np.sqrt(scales.share)[:, None] * total
        info, k = density.info, density.count_coef
        variance = scales.sigma[..., None] ** 2 + info.multiplier * scales.omega[..., None] ** 2
        gram = np.vecmat(1.0 / variance, info.gram.reshape(len(statistics), -1, k * k)).reshape(*variance.shape[:2], k, k)
        gram, own_target, _, discrepancy = density.without_discrepancy(gram, np.vecmat(1.0 / variance, info.target))
        k = density.count_pooled
        column, row = self.own_sd[:, None, :, None], self.own_sd[:, None, None, :]
        inverse = np.linalg.inv(column * gram * row + np.eye(k))
        shrink = column * inverse / row
        reduced = gram @ shrink
        reduced = 0.5 * (reduced + np.swapaxes(reduced, -1, -2))
        counts = np.array([priors.counts(s.config_id) for s in statistics])
        target = np.vecmat(own_target, shrink) - np.matvec(reduced, density.offset)
        self.reduced, self.target = counts[:, None, None] * reduced, counts[:, None] * target
        self.loaded_target = np.matvec(np.swapaxes(density.loading, -1, -2), self.target)
        self.population_mean = density.mean
        self.discrepancy_sd = density.discrepancy_sd
        self.own_coefficients = info.reference.copy()
        if discrepancy is not None:
            self.own_coefficients[:, k:] = discrepancy.mean.mean(axis=0)
        self.loaded = self.reduced @ density.loading
        self.squared = np.swapaxes(density.loading, -1, -2) @ self.loaded

    @property
    def count(self) -> int:
        """Number of candidates."""
        return self.membership.shape[1]

    def covariance(self, chosen: BoolArray, configuration: ServingConfiguration) -> FloatArray:
        """Return the covariance of a new configuration's coefficients, shape (S, M, K, K); see `predictive`."""
        return self.predictive(chosen, configuration)[1]

    def predictive(self, chosen: BoolArray, configuration: ServingConfiguration) -> tuple[FloatArray, FloatArray]:
        """Return mean and covariance of a new configuration's coefficients given each subset, in reference units.

        Parameters
        ----------
        chosen : ndarray of bool, shape (M, C)
            Subsets of the candidates.
        configuration : ServingConfiguration

        Returns
        -------
        mean : ndarray, shape (S, M, K)
        covariance : ndarray, shape (S, M, K, K)
        """
        mask = chosen.astype(float)
        shared_sd = self.shared_sd[:, None]
        shared = shared_sd[..., None]
        s, k, p = len(self.own_sd), self.own_sd.shape[1], self.squared.shape[-1]
        precision, vector = np.eye(p) + self._summed(mask, self.squared), self._summed(mask, self.loaded_target)
        slope = np.broadcast_to(self._loading(configuration), (s, len(mask), k, p))
        effect, moved = np.broadcast_to(np.eye(k), (s, len(mask), k, k)), np.zeros((s, len(mask), k))
        for name, inside in zip(self.hardware, self.membership, strict=True):
            own = mask * inside
            if not own.any():
                continue
            summed = shared * self._summed(own, self.reduced) * np.swapaxes(shared, -1, -2)
            inverse = np.linalg.inv(np.eye(k) + summed)
            mapped = shared * self._summed(own, self.loaded)
            explained = inverse @ mapped
            told = np.matvec(inverse, shared_sd * self._summed(own, self.target))
            precision = precision - np.swapaxes(mapped, -1, -2) @ explained
            vector = vector - np.vecmat(told, mapped)
            if name == configuration.hardware.name:
                slope, effect, moved = slope - shared * explained, inverse, shared_sd * told
        covariance = shared * effect * np.swapaxes(shared, -1, -2) + slope @ np.linalg.solve(
            precision, np.swapaxes(slope, -1, -2)
        )
        covariance[..., np.arange(k), np.arange(k)] += self.own_sd[:, None] ** 2
        xi = np.linalg.solve(precision, vector[..., None])[..., 0]
        loading = population_loading(self.features, config_to_constant(self.features, configuration))[:k]
        mean = loading @ self.population_mean + moved + np.matvec(slope, xi)
        more = len(self.discrepancy_sd)
        padded = np.zeros((*covariance.shape[:-2], k + more, k + more))
        padded[..., :k, :k] = covariance
        padded[..., range(k, k + more), range(k, k + more)] = self.discrepancy_sd**2
        return np.concatenate([mean, np.zeros((*mean.shape[:-1], more))], axis=-1), padded

    def errors(self, chosen: BoolArray, targets: Sequence[TargetTraffic]) -> FloatArray:
        """Return the expected relative error of each target given each subset, shape (M, T).

        Parameters
        ----------
        chosen : ndarray of bool, shape (M, C)
        targets : sequence of TargetTraffic
        """
        found = np.empty((len(chosen), len(targets)))
        for part in self._parts(len(chosen), targets):
            for t, target in enumerate(targets):
                found[part, t] = _expected(target, self.covariance(chosen[part], target.configuration))
        return found

    def observed(self, chosen: BoolArray, witnesses: Sequence[TargetTraffic]) -> tuple[FloatArray, FloatArray]:
        """Return how far predictions of candidates outside each subset are off, and how far they were expected to be, shapes (M, T).

        Parameters
        ----------
        chosen : ndarray of bool, shape (M, C)
        witnesses : sequence of TargetTraffic
            The first T candidates with their traffic. What is off is measured against the coefficients of a fit of their own.

        Returns
        -------
        observed, expected : ndarray
            Relative errors; NaN for candidates inside the subset.
        """
        observed = np.full((len(chosen), len(witnesses)), np.nan)
        expected = observed.copy()
        for part in self._parts(len(chosen), witnesses):
            for c, witness in enumerate(witnesses):
                outside = np.arange(len(chosen))[part][~chosen[part, c]]
                if not len(outside):
                    continue
                mean, covariance = self.predictive(chosen[outside], witness.configuration)
                observed[outside, c] = np.abs((mean - self.own_coefficients[c]) @ witness.rows.T).mean(axis=(0, -1))
                expected[outside, c] = _expected(witness, covariance)
        return observed, expected

    def _parts(self, count: int, targets: Sequence[TargetTraffic]) -> Iterator[slice]:
        """Yield slices of subsets that are computed at once."""
        size = 8 * len(self.own_sd) * (4 * self.squared.shape[-1] ** 2 + max((t.rows.size for t in targets), default=0))
        step = max(1, _AT_ONCE // size)
        for start in range(0, count, step):
            yield slice(start, start + step)

    def floor(self, targets: Sequence[TargetTraffic]) -> FloatArray:
        """Return the expected error of each target if population and hardware were known, shape (T,): its own deviation is left."""
        sd = np.concatenate(
            [self.own_sd, np.broadcast_to(self.discrepancy_sd, (len(self.own_sd), len(self.discrepancy_sd)))], axis=1
        )
        sds = [np.sqrt((target.rows**2) @ np.swapaxes(sd**2, 0, 1)).mean() for target in targets]
        return np.asarray(np.sqrt(2.0 / np.pi) * np.array(sds))

    def by_coefficient(self, chosen: BoolArray, target: TargetTraffic) -> FloatArray:
        """Return what each coefficient adds to the mean relative variance of a target, shape (M, K); a row adds up to it.

        With Q the mean of x x' / m(x)^2 over traffic, the mean variance is tr(C Q), and coefficient k adds (C Q)_kk.
        """
        moment = target.rows.T @ target.rows / len(target.rows)
        covariance = self.covariance(chosen, target.configuration)
        return np.asarray((covariance * moment).sum(axis=-1).mean(axis=0))

    def _summed(self, mask: FloatArray, values: FloatArray) -> FloatArray:
        """Return sums over the candidates chosen, shape (S, M, ...)."""
        flat = values.reshape(*values.shape[:2], -1)
        return np.asarray((mask @ flat).reshape(len(values), len(mask), *values.shape[2:]))

    def _loading(self, configuration: ServingConfiguration) -> FloatArray:
        loading = population_loading(self.features, config_to_constant(self.features, configuration))
        return loading[: len(self.features.pooled)] * self.population_sd


def _expected(target: TargetTraffic, covariance: FloatArray) -> FloatArray:
    """Return E|error| relative to the mean, averaged over traffic and scales, shape (M,), for covariances (S, M, K, K)."""
    variance = ((target.rows @ covariance) * target.rows).sum(axis=-1)
    return np.asarray(np.sqrt(2.0 / np.pi) * np.sqrt(variance).mean(axis=(0, -1)))
