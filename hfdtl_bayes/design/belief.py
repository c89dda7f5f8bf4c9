"""What is known of a configuration's coefficients before a row is chosen, and how a row changes it.

Given the scales psi_s of one posterior draw (tau, rho, sigma, omega) everything is Gaussian (`ExactDensity`): theta ~ Normal(m_s, V_s),
and a row of relative design x (its features over its scale) in time block B is

    y = x' theta + d_B + eps,    d_B ~ Normal(0, omega_s^2),    eps ~ Normal(0, sigma_s^2).

Variances do not depend on what is observed, so all that picks change is known before anything is measured. With m rows of the block chosen
already, of designs x_1 ... x_m, and rho = omega^2 / (sigma^2 + m omega^2), a further row says of theta what an independent one would say
with

    design x - rho (x_1 + ... + x_m)    and noise variance e = sigma^2 + sigma^2 rho

(the conditional of a compound-symmetric block: its drift is predicted from the rows before and only the rest is news). Its information is
z = L'(x - rho sum) in coordinates where the prior V = L L' is the identity, and the covariance W there, starting from I, loses

    W <- W - (W z)(W z)' / (e + z'W z)          (Sherman & Morrison 1950, doi:10.1214/aoms/1177729893)

per row. W has eigenvalues between 0 and 1 whatever the units and however nearly collinear the features, so that a hundred updates keep
the digits of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import ExactDensity, LatencyPosterior, drawn_coordinates

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

DEFAULT_DRAWS = 32
"""Draws of the scales that gains are averaged over."""

SMALLEST_NOISE = 1e-6
"""Relative noise below which rows are taken to have this much, as the model itself does: without any, one row would be worth infinitely
many."""


@dataclass(frozen=True, eq=False)
class Belief:
    """A configuration's coefficients under S draws of the scales, given all rows fitted.

    Attributes
    ----------
    config_id : str
    scale : ndarray, shape (K,)
        Unit of each coefficient: designs are multiplied by it, so that none is large for its unit's sake.
    factor : ndarray, shape (S, K, K)
        L with L L' the covariance of the coefficients over `scale`.
    sigma, omega : ndarray, shape (S,)
        Relative sds of a row's noise and of a block's drift.
    """

    config_id: str
    scale: FloatArray
    factor: FloatArray
    sigma: FloatArray
    omega: FloatArray

    def __post_init__(self) -> None:
        """Refuse noise that is none.

        Raises
        ------
        InputError
            If a sd is not finite or negative.
        """
        for name in ("sigma", "omega"):
            values = getattr(self, name)
            if not (np.isfinite(values) & (values >= 0)).all():
                raise InputError(f"{self.config_id!r}: {name} must be relative sds of 0 or more, found {values.min()}")
        object.__setattr__(self, "sigma", np.maximum(self.sigma, SMALLEST_NOISE))

    @property
    def draws(self) -> int:
        """S."""
        return len(self.sigma)

    def with_misfit(self, columns: int, sd: float) -> Belief:
        """Return the belief with so many further coefficients, independent of all others and of each other, of prior sd `sd`.

        Rows' designs go on with `misfit_columns`. The variance of an expected value then has what the features get wrong of it.
        """
        k = len(self.scale)
        factor = np.zeros((self.draws, k + columns, k + columns))
        factor[:, :k, :k] = self.factor
        factor[:, range(k, k + columns), range(k, k + columns)] = sd
        return replace(self, scale=np.r_[self.scale, np.ones(columns)], factor=factor)

    def weight_on_block(self, chosen: IntArray | int) -> FloatArray:
        """Return rho for blocks with so many rows chosen, shape (..., S)."""
        m = np.asarray(chosen, dtype=float)[..., None]
        return np.asarray(self.omega**2 / (self.sigma**2 + m * self.omega**2))

    def noise_variance(self, chosen: IntArray | int) -> FloatArray:
        """Return e of a further row of blocks with so many rows chosen, shape (..., S)."""
        return np.asarray(self.sigma**2 * (1.0 + self.weight_on_block(chosen)))

    def information(self, design: FloatArray, blocks: IntArray) -> FloatArray:
        """Return what rows measured all at once tell of the coefficients over `scale`, shape (S, K, K).

        sum over blocks (sum x x' - rho_m (sum x)(sum x)') / sigma^2: no update is involved. That of rows in other blocks adds.

        Parameters
        ----------
        design : ndarray, shape (n, K)
            Relative, times `scale`.
        blocks : ndarray of int, shape (n,)
        """
        _, of, sizes = np.unique(blocks, return_inverse=True, return_counts=True)
        sums = np.zeros((len(sizes), design.shape[1]))
        np.add.at(sums, of, design)
        information = np.broadcast_to(design.T @ design, (self.draws, *(2 * design.shape[1:]))).copy()
        for m in np.unique(sizes):
            own = sums[sizes == m]
            information -= self.weight_on_block(int(m))[:, None, None] * (own.T @ own)
        return np.asarray(information / (self.sigma**2)[:, None, None])

    def given(self, information: FloatArray) -> FloatArray:
        """Return the covariance W, shape (..., S, K, K), in whitened coordinates, given information of the same shape."""
        whitened = np.swapaxes(self.factor, 1, 2) @ information @ self.factor
        return np.linalg.inv(np.eye(self.factor.shape[2]) + 0.5 * (whitened + np.swapaxes(whitened, -1, -2)))

    def after(self, design: FloatArray, blocks: IntArray) -> FloatArray:
        """Return the covariance W, shape (S, K, K), in whitened coordinates, after rows measured all at once."""
        return self.given(self.information(design, blocks))


def belief_of(
    posterior: LatencyPosterior, configuration: ServingConfiguration, *, draws: int = DEFAULT_DRAWS, seed: int = 0
) -> Belief:
    """Return what a posterior says of a configuration's coefficients: its own if it was fitted, else a new one's.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of donors, or with the target calibrated.
    configuration : ServingConfiguration
    draws : int
        Draws of the scales, evenly spaced among the posterior's.
    seed : int
        Noise and drift of a configuration never seen are drawn from their populations.

    Raises
    ------
    InputError
        If draws is below 1, the posterior is of rows, whose likelihood has no closed form, or a configuration of this name was fitted
        but differs.
    """
    if draws < 1:
        raise InputError(f"draws must be at least 1, found {draws}")
    if posterior.rows:
        raise InputError(
            f"what a row would tell is a closed form of Gaussian errors, and this posterior is of the engine rows ({posterior.likelihood}); "
            "fit the donors with the engine exact to select rows"
        )
    fitted = None
    if configuration.config_id in posterior.config_ids:
        fitted = posterior.config_ids.index(configuration.config_id)
        if posterior.configuration(configuration.config_id) != configuration:
            raise InputError(
                f"configuration {configuration.config_id!r} differs from the one of that name that was fitted; give the new one "
                "another config_id"
            )
    total = len(posterior.draws_of("tau"))
    chosen = np.unique(np.linspace(0, total - 1, draws).round().astype(np.int64))
    density = ExactDensity(posterior.statistics, posterior.feature_set, posterior.priors)
    x = drawn_coordinates(posterior, density, range(len(posterior.config_ids)), chosen)
    _, levels = density.levels(x, configuration, fitted)
    covariance = (levels.population + levels.hardware + levels.own) / (density.scale[:, None] * density.scale)
    if fitted is None:
        sigma, omega = (v[chosen] for v in posterior.new_errors(np.random.default_rng([seed, 21])))
    else:
        sigma, omega = (posterior.draws_of(n)[chosen, fitted] for n in ("sigma", "omega"))
    return Belief(configuration.config_id, density.scale, _root(covariance), sigma, omega)


def _root(covariance: FloatArray) -> FloatArray:
    """Return L with L L' = covariance, shape (S, K, K); from eigenvectors, which a direction known exactly does not upset."""
    values, vectors = np.linalg.eigh(0.5 * (covariance + np.swapaxes(covariance, 1, 2)))
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :])
