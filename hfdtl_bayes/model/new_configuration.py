"""What the draws of a fit say of one configuration it has not seen, before any of its rows: see `conditional`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model.diagnostics import Convergence
from hfdtl_bayes.model.error_grid import ErrorPrior
from hfdtl_bayes.model.error_population import ErrorPopulation
from hfdtl_bayes.model.exact import POPULATIONS, ExactDensity, Information, population_loading
from hfdtl_bayes.model.layout import hardware_index
from hfdtl_bayes.model.posterior import LatencyPosterior
from hfdtl_bayes.model.priors import deviation_scale
from hfdtl_bayes.model.scale_moves import move_group_sds
from hfdtl_bayes.statistics import ConfigStatistics

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

GAUSSIAN_ENGINES = ("exact", "pymc", "conditional", "reweighted")
"""What makes draws of the model with Gaussian errors, which the closed forms here are of: two engines, and reweighting of their draws."""

_AT_ONCE = 250
"""Draws eliminated at once: the arrays of more do not stay in the processor's cache, and each takes twice as long."""


def why_not_conditional(donors: LatencyPosterior) -> str | None:
    """Return why the draws of a fit cannot be conditioned on a target's rows; None if they can."""
    if donors.target is not None:
        return f"its draws already know the rows of {donors.target!r}, which a new target must not inherit"
    if donors.engine not in GAUSSIAN_ENGINES:
        return f"its draws are of engine {donors.engine!r}, whose errors are not Gaussian"
    return None


@dataclass(frozen=True)
class ScalePool:
    """Draws of the scales with what they say of the target, coefficients divided by their scale; leading dimension N.

    Of its pooled coefficients, that is: those of its discrepancy are standard normal before its rows, independent of all else.

    Attributes
    ----------
    parent : ndarray of int, shape (N,)
        The donors' draw each goes back to; copies lie side by side.
    scales : dict
        tau, hardware_share, sigma, omega and the populations of the last two, by the names of the posterior.
    x : ndarray, shape (N, size)
        The same in the coordinates of `ExactDensity`.
    precision : ndarray, shape (N, K0, K0)
        V^-1.
    vector : ndarray, shape (N, K0)
        V^-1 m.
    square, log_det : ndarray, shape (N,)
        m' V^-1 m and log |V^-1|.
    errors : ErrorPrior
    """

    parent: IntArray
    scales: dict[str, FloatArray]
    x: FloatArray
    precision: FloatArray
    vector: FloatArray
    square: FloatArray
    log_det: FloatArray
    errors: ErrorPrior

    def factor(self, rows: Information, log_sigma: FloatArray, log_omega: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the Cholesky factor of P bordered by V^-1 m + h, (N, K + 1, K + 1), and log L, (N,), both at (sigma, omega)."""
        n, k = max(len(self.precision), len(log_sigma)), rows.target.shape[-1]
        variance = np.exp(2 * log_sigma)[:, None] + rows.multiplier[0] * np.exp(2 * log_omega)[:, None]
        weight = 1.0 / variance
        # The information of rows as the bordered matrix is laid out, so that a product fills it; few draws at a time stay in the cache.
        told = np.zeros((1 + len(rows.count[0]), k + 1, k + 1))
        told[1:, :k, :k], told[1:, k, :k], told[1:, k, k] = rows.gram[0], rows.target[0], rows.square[0]
        pooled = self.vector.shape[-1]
        told[0, range(pooled, k), range(pooled, k)] = 1.0
        weighed = np.column_stack([np.ones(len(weight)), weight])
        left, diagonal = np.empty((n, k + 1, k + 1)), np.empty((n, k + 1))
        for start in range(0, n, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            # One draw may stand for all, or one noise.
            own, at = (part if len(v) > 1 else slice(None) for v in (self.precision, weight))
            bordered = (weighed[at] @ told.reshape(len(told), -1)).reshape(-1, k + 1, k + 1)
            bordered[:, :pooled, :pooled] += self.precision[own]
            bordered[:, k, :pooled] += self.vector[own]
            bordered[:, k, k] += self.square[own]
            factor = np.linalg.cholesky(bordered)
            left[part], diagonal[part] = factor, np.diagonal(factor, axis1=1, axis2=2)
        log_likelihood = 0.5 * self.log_det - np.log(diagonal[:, :k]).sum(axis=1) - 0.5 * diagonal[:, k] ** 2
        return left, log_likelihood - 0.5 * np.log(variance) @ rows.count[0]

    def around(self, reference: FloatArray) -> ScalePool:
        """Return the pool with means taken relative to `reference`, as the information of rows is, so that nothing cancels.

        That of the discrepancy is zero.
        """
        reference = reference[: self.vector.shape[-1]]
        shift = (self.precision.reshape(-1, len(reference)) @ reference).reshape(self.vector.shape)
        square = self.square - 2 * (self.vector @ reference) + shift @ reference
        return replace(self, vector=self.vector - shift, square=np.maximum(square, 0.0))

    def average(self) -> ScalePool:
        """Return one draw that stands for all: mean and covariance of the coefficients averaged over a hundred of them."""
        keep = np.unique(np.linspace(0, len(self.x) - 1, 100).astype(int))
        covariance = np.linalg.inv(self.precision[keep])
        means = (covariance @ self.vector[keep][..., None])[..., 0]
        mean = means.mean(axis=0)
        precision = np.linalg.inv(covariance.mean(axis=0) + np.cov(means.T, bias=True).reshape(len(mean), -1))
        vector = precision @ mean
        log_det = np.linalg.slogdet(precision)[1]
        return ScalePool(
            self.parent[:1], {}, self.x[:1], precision[None], vector[None], np.array([mean @ vector]), np.array([log_det]), self.errors
        )  # fmt: skip


def _in_parts(x: FloatArray) -> list[FloatArray]:
    return [x[i : i + _AT_ONCE] for i in range(0, len(x), _AT_ONCE)]


class NewConfiguration:
    """What a fit of donors says of one configuration it has not seen: everything of the update that no row enters.

    Parameters
    ----------
    donors : LatencyPosterior
    configuration : ServingConfiguration

    Raises
    ------
    InputError
        If the draws cannot be conditioned on a target's rows (see `why_not_conditional`), or the configuration is a donor.
    """

    def __init__(self, donors: LatencyPosterior, configuration: ServingConfiguration) -> None:
        reason = why_not_conditional(donors)
        if reason:
            raise InputError(f"this fit cannot be conditioned on a target's rows: {reason}. Calibrate with engine 'exact'")
        if configuration.config_id in donors.config_ids:
            raise InputError(f"{configuration.config_id!r} is a donor of this fit; its rows would count twice")
        self.donors, self.configuration = donors, configuration
        self.density = ExactDensity(donors.statistics, donors.feature_set, donors.priors)
        # Without drift its draws are zero, which the closed forms take as they are.
        names = {*map(str, donors.tree["posterior"].data_vars), "omega", "omega_typical", "omega_spread"}
        self.draws = {n: donors.draws_of(n) for n in sorted(names)}
        self.chains = donors.tree["posterior"].sizes["chain"]
        self.hardware = self._known_hardware()
        self._pools: dict[tuple[int, int], ScalePool] = {}
        self._kept_gains: dict[int, FloatArray] = {}

    def _known_hardware(self) -> int | None:
        name = self.configuration.hardware.name
        return self.density.hardware_names.index(name) if name in self.density.hardware_names else None

    @cached_property
    def convergence(self) -> Convergence:
        """Diagnostics of the donors' own draws, which reweighting cannot mend."""
        return self.donors.convergence()

    @cached_property
    def centre(self) -> FloatArray:
        """Draws of what the configuration's coefficients deviate from, shape (S, K): A phi, and its hardware's effect if known."""
        return self.donors.population_draws(self.configuration)

    def pool(self, stride: int, copies: int) -> ScalePool:
        """Return every stride-th of the donors' draws, or so many copies of each."""
        if (stride, copies) not in self._pools:
            # Of the pools of copies, which are large, only the last is worth keeping.
            kept = {key: p for key, p in self._pools.items() if key[1] == 1}
            self._pools = kept | {(stride, copies): self._make_pool(stride, copies)}
        return self._pools[stride, copies]

    def _make_pool(self, stride: int, copies: int) -> ScalePool:
        own = self.draws
        length = len(own["tau"]) // self.chains
        every = np.arange(len(own["tau"])).reshape(self.chains, length)[:, : length - length % stride : stride]
        parent = np.repeat(every.ravel(), copies)
        scales = {n: own[n][parent] for n in ("tau", "hardware_share", "sigma", "omega", *POPULATIONS)}
        if copies > 1:
            coefficients = {n: own[n][parent] for n in ("beta", "gamma", "delta", "hardware_effect", "theta") if n in own}
            rng = np.random.default_rng([self.donors.seed, 11, copies])
            moved = move_scales(scales | coefficients, self.donors.statistics, self.donors, rng)
            scales = {n: moved[n] for n in scales}
        populations = [scales[n] for n in POPULATIONS]
        x = self.density.join(scales["tau"], scales["hardware_share"], scales["sigma"], scales["omega"], populations)
        parts = [self.density.predictive(few, self.configuration) for few in _in_parts(x)]
        mean, covariance = (np.concatenate(each) for each in zip(*parts, strict=True))
        k, scale = self.density.count_pooled, self.density.pooled_scale
        mean = mean[:, :k] / scale
        precision = np.linalg.inv(covariance[:, :k, :k] / (scale[:, None] * scale))
        precision = 0.5 * (precision + np.swapaxes(precision, 1, 2))
        vector = (precision @ mean[..., None])[..., 0]
        errors = ErrorPrior.given(scales["sigma"], scales["omega"], self.donors.priors)
        return ScalePool(
            parent, scales, x, precision, vector, (mean * vector).sum(axis=1), np.linalg.slogdet(precision)[1], errors
        )  # fmt: skip

    @property
    def has_drift(self) -> bool:
        """Whether the priors allow for drift."""
        return self.donors.priors.drift is not None

    def _gains(self, x: FloatArray) -> FloatArray:
        """Return covariances of everything fitted with the pooled theta / scale, shape (N, rows, K0): population, hardware, donors."""
        k = self.density.count_pooled
        found = []
        for few in _in_parts(x):
            parts = [v[..., :k].reshape(len(few), -1, k) for v in self.density.covariance_with(few, self.configuration).values()]
            found.append(np.concatenate(parts, axis=1) / self.density.pooled_scale)
        return np.concatenate(found)

    def gains(self, stride: int, copies: int, chosen: IntArray) -> FloatArray:
        """Return `_gains` of chosen draws of a pool; of a pool without copies all are kept."""
        pool = self.pool(stride, copies)
        if copies > 1:
            once, back = np.unique(chosen, return_inverse=True)
            return np.asarray(self._gains(pool.x[once])[back])
        if stride not in self._kept_gains:
            self._kept_gains[stride] = self._gains(pool.x)
        return np.asarray(self._kept_gains[stride][chosen])


def move_scales(
    own: dict[str, FloatArray], statistics: Sequence[ConfigStatistics], donors: LatencyPosterior, rng: np.random.Generator
) -> dict[str, FloatArray]:
    """Return draws by name with tau and hardware_share moved and the populations of noise and drift drawn anew, given all the rest.

    With donors discounted tau and hardware_share stay: their conditional then depends on rows, and to stay is a move that leaves any
    posterior as it is.
    """
    priors, scale = donors.priors, deviation_scale(donors.feature_set)
    shared = np.concatenate([own[n] for n in ("beta", "gamma", "delta") if n in own], axis=1)
    loading = np.array([population_loading(donors.feature_set, s.config_row)[: len(scale)] for s in statistics])
    centre = (shared @ loading.reshape(-1, shared.shape[1]).T).reshape(len(shared), len(statistics), -1)
    deviations = own["theta"][..., : len(scale)] - centre - own["hardware_effect"][:, hardware_index(statistics)]
    if not priors.discounts:
        tau, share = move_group_sds(
            own["tau"], own["hardware_share"], deviations / scale, own["hardware_effect"] / scale, priors, rng
        )
        own = own | {"tau": tau, "hardware_share": share}
    for name, middle, spread in (("sigma", priors.noise, priors.noise_spread), ("omega", priors.drift, priors.drift_spread)):
        if middle is not None:
            population = ErrorPopulation.of(own[name], middle, spread)
            own[f"{name}_typical"], own[f"{name}_spread"] = population.draw(rng)
    return own
