"""Coordinates in which the exact engine samples the scales: nearly standard normal, whatever the data.

Two steps lead from the unconstrained scales x of `ExactDensity` to the sampler's coordinates q.

1. Each log sigma_c and log omega_c is partially non-centered. Its rows alone would say b_c with information h_c (both fixed, from
   moment estimates); its population says Normal(mu, s^2). With g_c^2 = 1 / (1 / s^2 + h_c),

       log sigma_c = g_c^2 (h_c b_c + mu / s^2) + g_c z_c

   z_c is nearly standard normal and independent of mu and s both where rows decide (h_c large: centered) and where they are
   silent, as about the drift of a machine that does not drift, or of a handful of blocks (h_c near 0: non-centered; centered, this is the
   funnel in which samplers diverge). After Papaspiliopoulos, Roberts & Skold (2007), doi:10.1214/088342307000000014.
2. All coordinates together are shifted by their mode and scaled by the curvature there: x = f(m + L q) with L L' the inverse Hessian.

Any smooth one-to-one map leaves the posterior the same, its Jacobian counted; only the sampler's path differs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from hfdtl_bayes.model.exact import ExactDensity

FloatArray = NDArray[np.float64]

_STEP = 1e-3
"""Step of the central differences of the gradient, in coordinates whose natural size is about one."""
_SMALLEST_CURVATURE = 0.05
"""Curvature below which a direction is taken to be as wide as this says: every coordinate has a proper prior of sd about one."""


@dataclass(frozen=True)
class ScaleCoordinates:
    """The map from the sampler's coordinates to the unconstrained scales of a density.

    Attributes
    ----------
    density : ExactDensity
    families : tuple of int
        Which of noise (0) and drift (1) are sampled.
    estimate, information : ndarray, shape (2, C)
        b and h of log sigma_c and log omega_c.
    centre : ndarray, shape (D,)
    factor : ndarray, shape (D, D)
        L; D is the number of coordinates sampled.
    """

    density: ExactDensity
    families: tuple[int, ...]
    estimate: FloatArray
    information: FloatArray
    centre: FloatArray
    factor: FloatArray

    @property
    def size(self) -> int:
        """Number of coordinates sampled."""
        return len(self.centre)

    def scales(self, q: FloatArray) -> FloatArray:
        """Return the unconstrained scales, shape (..., size of the density), at coordinates of shape (..., D)."""
        return self._scales(self.centre + q @ self.factor.T)

    def log_density(self, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the log density of the coordinates, shape (...), up to the constant log det L, and its gradient, shape (..., D)."""
        u = self.centre + q @ self.factor.T
        x = self._scales(u)
        value, by_scale = self.density.log_density(x)
        gradient = by_scale[..., self._sampled]
        for family in self.families:
            own, typical, spread = self._places(family)
            mu, precision = u[..., typical], np.exp(-2 * u[..., spread])
            variance = 1.0 / (precision[..., None] + self.information[family])
            width = np.sqrt(variance)
            along = width * u[..., own]
            pull = gradient[..., own] * variance
            # d log sigma / d mu = g^2 / s^2; d / d log s goes through 1 / s^2, which moves both the mean and g.
            by_precision = (pull * (mu[..., None] - (x[..., self._of(family)] - along) - 0.5 * along)).sum(axis=-1)
            gradient[..., own] *= width
            gradient[..., typical] += pull.sum(axis=-1) * precision
            gradient[..., spread] += precision * (variance.sum(axis=-1) - 2 * by_precision)
            value = value + np.log(width).sum(axis=-1)
        return value, gradient @ self.factor

    def whitened(self, mean: FloatArray, covariance: FloatArray) -> ScaleCoordinates:
        """Return coordinates in which draws of this mean, shape (D,), and covariance, shape (D, D), are standard."""
        root = np.linalg.cholesky(covariance)
        return replace(self, centre=self.centre + self.factor @ mean, factor=self.factor @ root)

    @property
    def _sampled(self) -> NDArray[np.int64] | slice:
        # Without drift its coordinates are left out.
        k, c = self.density.count_pooled, self.density.count_config
        return slice(None) if 1 in self.families else np.r_[0 : k + 1 + c, k + 1 + 2 * c, k + 2 + 2 * c]

    def _of(self, family: int) -> slice:
        """Return where log sigma (0) or log omega (1) stand among the scales."""
        start = self.density.count_pooled + 1 + family * self.density.count_config
        return slice(start, start + self.density.count_config)

    def _places(self, family: int) -> tuple[slice, int, int]:
        """Return where a family's own, typical and spread coordinates stand among those sampled."""
        at = self.density.count_pooled + 1 + len(self.families) * self.density.count_config + 2 * family
        return self._of(family), at, at + 1

    def _scales(self, u: FloatArray) -> FloatArray:
        x = np.full((*u.shape[:-1], self.density.size), -np.inf)
        x[..., self._sampled] = u
        for family in self.families:
            own, typical, spread = self._places(family)
            precision = np.exp(-2 * u[..., spread])[..., None]
            information = self.information[family]
            variance = 1.0 / (precision + information)
            mean = variance * (information * self.estimate[family] + precision * u[..., typical, None])
            x[..., self._of(family)] = mean + np.sqrt(variance) * u[..., own]
        return x


def scale_coordinates(density: ExactDensity) -> ScaleCoordinates:
    """Find coordinates for a density: partial non-centering at its moment estimates, then its mode and curvature."""
    families = (0,) if density.priors.drift is None else (0, 1)
    information, estimate = np.zeros((2, density.count_config)), np.zeros((2, density.count_config))
    square = density.errors[:, :, None] ** 2
    info = density.info
    variance = square[:, 0] + info.multiplier * square[:, 1]
    for family, share in ((0, square[:, 0] / variance), (1, info.multiplier * square[:, 1] / variance)):
        if family in families:
            # Fisher information about the log of one part's sd, of rows whose variance is the sum of both: 2 (share of the part)^2 each.
            information[family] = (2 * info.count * share**2).sum(axis=1)
            estimate[family] = np.log(density.errors[:, family])
    size = density.size if 1 in families else density.size - density.count_config - 2
    plain = ScaleCoordinates(density, families, estimate, information, np.zeros(size), np.eye(size))
    start = density.start[plain._sampled].copy()
    for family in families:
        start[plain._places(family)[0]] = 0.0
    plain = replace(plain, centre=start)

    def negative(q: FloatArray) -> tuple[float, FloatArray]:
        with np.errstate(all="ignore"):
            try:
                value, gradient = plain.log_density(q)
            except np.linalg.LinAlgError:
                return np.inf, np.zeros(size)
        # Where numbers overflow the trust region shrinks.
        return (-float(value), -gradient) if np.isfinite(value) and np.isfinite(gradient).all() else (np.inf, np.zeros(size))

    def curvature(q: FloatArray) -> FloatArray:
        steps = _STEP * np.eye(size)
        hessian = (plain.log_density(q - steps)[1] - plain.log_density(q + steps)[1]) / (2 * _STEP)
        return np.asarray(0.5 * (hessian + hessian.T))

    mode = minimize(negative, np.zeros(size), jac=True, hess=curvature, method="trust-exact", options={"maxiter": 200}).x
    values, vectors = np.linalg.eigh(curvature(mode))
    factor = vectors / np.sqrt(np.maximum(values, _SMALLEST_CURVATURE))
    return replace(plain, centre=start + mode, factor=factor)
