"""Likelihoods of single rows: what the errors of a step look like, beside the Gaussian that has sufficient statistics.

All have the same mean and the same relative scale s, so they differ in shape alone. With m = x' theta / s + d, d ~ Normal(0, omega^2)
shared by a time block, an observation y / s is

    gaussian    Normal(m, sigma^2)
    student_t   m + core * t(nu)                              nu = 2 + Gamma(2, 0.1)
    lognormal   lognormal of mean m and sd sigma
    outliers    Normal(m, core^2) with probability 1 - p, Normal(m, (ratio core)^2) with probability p

`sigma` is the sd of a row's noise whatever the likelihood, so that noise, coverage and attainable errors mean the same everywhere;
`core` is the scale of ordinary rows, which their data decide: sigma = core sqrt(nu / (nu - 2)), or core sqrt(1 - p + p ratio^2).
The priors of noise are for the core. The shape (nu; p and ratio) is common to all configurations: tails are rare, and a new
configuration's have to be predicted.

The prior of nu is that of Juarez & Steel (2010), doi:10.1198/jbes.2009.07145, moved up by 2: step times add up, so their variance
exists. The mixture is that of Box & Tiao (1968), doi:10.1093/biomet/55.1.119.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from hfdtl_bayes.errors import UnknownNameError

FloatArray = NDArray[np.float64]
Shape = Mapping[str, FloatArray]

SHAPES: Mapping[str, tuple[str, ...]] = {
    "gaussian": (),
    "student_t": ("nu",),
    "lognormal": (),
    "outliers": ("outlier_share", "outlier_ratio"),
}
"""Likelihoods by name and the variables of the posterior that give their shape."""

SHAPES_ON_CORE = ("student_t", "outliers")
"""Likelihoods whose noise has a scale of ordinary rows, the core, beside its sd."""

LEAST_NU = 2.0
"""Degrees of freedom at which a Student-t loses its variance."""

NU_PRIOR = (2.0, 0.1)
"""Shape and rate of the gamma prior of nu - 2: 90 % between 3.6 and 47 above it, from heavy tails to nearly none."""

SHARE_PRIOR = (1.0, 30.0)
"""Beta prior of the share of outliers: 90 % below 7 %. More of them would be no outliers but a second mode."""

RATIO_PRIOR = (np.log(5.0), 0.5)
"""Lognormal prior of an outlier's scale over an ordinary row's, less 1: 90 % between 3.2 and 12.4 times."""

SMALLEST_MEAN = 1e-3
"""A lognormal's mean is kept above this part of the row scale: a mean of zero has no logarithm."""

_LOG_ROOT_TWO_PI = 0.5 * np.log(2 * np.pi)


def check_likelihood(likelihood: str, engine: str = "rows") -> None:
    """Refuse an unknown likelihood, or one that an engine on sufficient statistics cannot fit.

    Raises
    ------
    UnknownNameError
        Names what is accepted.
    """
    if likelihood not in SHAPES:
        raise UnknownNameError(f"unknown likelihood {likelihood!r}; known are {', '.join(SHAPES)}")
    if likelihood != "gaussian" and engine != "rows":
        raise UnknownNameError(
            f"engine {engine!r} fits sufficient statistics, which only the gaussian likelihood has; for {likelihood!r} take "
            'engine "rows"'
        )


def sd_over_core(likelihood: str, shape: Shape) -> FloatArray:
    """Return sigma / core for draws of the shape; 1 where they are the same."""
    if likelihood == "student_t":
        return np.asarray(np.sqrt(shape["nu"] / (shape["nu"] - LEAST_NU)))
    if likelihood == "outliers":
        share, ratio = shape["outlier_share"], shape["outlier_ratio"]
        return np.asarray(np.sqrt(1 - share + share * ratio**2))
    return np.asarray(1.0)


def _columns(likelihood: str, shape: Shape, sigma: FloatArray, dims: int) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Return core and shape, shape (S, 1, ...), to go with arrays of `dims` dimensions that have the draws first."""

    def column(values: FloatArray) -> FloatArray:
        values = np.asarray(values, dtype=float)
        return values.reshape(values.shape + (1,) * (dims - values.ndim))

    return column(sigma / sd_over_core(likelihood, shape)), {n: column(v) for n, v in shape.items()}


def log_density(likelihood: str, shape: Shape, observed: FloatArray, mean: FloatArray, sigma: FloatArray) -> FloatArray:
    """Return the log density of scaled observations given everything, block effect included in the mean.

    Parameters
    ----------
    likelihood : str
    shape : mapping
        Draws of the variables in `SHAPES`, shape (S,).
    observed : ndarray
        Broadcasts against `mean`.
    mean : ndarray, shape (S, ...)
    sigma : ndarray, shape (S,)

    Returns
    -------
    ndarray, shape (S, ...)
    """
    core, s = _columns(likelihood, shape, sigma, mean.ndim)
    if likelihood == "lognormal":
        mean = np.maximum(mean, SMALLEST_MEAN)
        variance = np.log1p((core / mean) ** 2)
        logs = np.log(np.where(observed > 0, observed, 1.0))
        z = (logs - np.log(mean) + 0.5 * variance) / np.sqrt(variance)
        return np.asarray(np.where(observed > 0, -0.5 * z**2 - logs - 0.5 * np.log(variance) - _LOG_ROOT_TWO_PI, -np.inf))
    z = (observed - mean) / core
    if likelihood == "student_t":
        nu = s["nu"]
        constant = gammaln((nu + 1) / 2) - gammaln(nu / 2) - 0.5 * np.log(np.pi * nu) - np.log(core)
        return np.asarray(constant - (nu + 1) / 2 * np.log1p(z**2 / nu))
    ordinary = -0.5 * z**2 - np.log(core) - _LOG_ROOT_TWO_PI
    if likelihood == "gaussian":
        return np.asarray(ordinary)
    ratio = s["outlier_ratio"]
    wide = -0.5 * (z / ratio) ** 2 - np.log(core * ratio) - _LOG_ROOT_TWO_PI
    return np.asarray(np.logaddexp(np.log1p(-s["outlier_share"]) + ordinary, np.log(s["outlier_share"]) + wide))


def ordinary_weights(likelihood: str, shape: Shape, error: FloatArray, sigma: FloatArray) -> FloatArray:
    """Return the weight of each scaled error in a weighted Gaussian fit that has the likelihood's mode, shape (S, ...).

    -(d log p / d e) / e: 1 / core^2 where rows are ordinary, less in the tails. For the lognormal 1 / sigma^2, which is near.
    """
    core, s = _columns(likelihood, shape, sigma, error.ndim)
    z = (error / core) ** 2
    if likelihood == "student_t":
        return np.asarray((s["nu"] + 1) / (s["nu"] + z) / core**2)
    if likelihood == "outliers":
        ratio = s["outlier_ratio"]
        odds = s["outlier_share"] / (1 - s["outlier_share"]) / ratio * np.exp(np.minimum(0.5 * z * (1 - ratio**-2), 700.0))
        return np.asarray((1 + odds / ratio**2) / (1 + odds) / core**2)
    return np.broadcast_to(core**-2, error.shape)


def draw_observed(likelihood: str, shape: Shape, mean: FloatArray, sigma: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Draw scaled observations, block effect included in the mean; parameters as in `log_density`.

    Returns
    -------
    ndarray, shape (S, ...)
    """
    core, s = _columns(likelihood, shape, sigma, mean.ndim)
    if likelihood == "lognormal":
        mean = np.maximum(mean, SMALLEST_MEAN)
        variance = np.log1p((core / mean) ** 2)
        return np.asarray(mean * np.exp(np.sqrt(variance) * rng.standard_normal(mean.shape) - 0.5 * variance))
    if likelihood == "student_t":
        return np.asarray(mean + core * rng.standard_t(np.broadcast_to(s["nu"], mean.shape)))
    scale = core
    if likelihood == "outliers":
        scale = core * np.where(rng.random(mean.shape) < s["outlier_share"], s["outlier_ratio"], 1.0)
    return np.asarray(mean + scale * rng.standard_normal(mean.shape))
