"""The pilot fit: the scale errors are relative to.

Errors of step times grow with the mean, so rows are divided by a pilot estimate of their mean before anything else. The
pilot is a non-negative, prior-regularised relative least-squares fit, iterated to a fixed point; the model conditions on
the scale it gives. Only the scale depends on it: its coefficients are not used further.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import FeatureSet

FloatArray = NDArray[np.float64]

# Relative error assumed of one row while the pilot weighs data against prior; it only has to be of the right order.
_PILOT_SIGMA = 0.1


def own_prior(feature_set: FeatureSet, configuration: ServingConfiguration) -> tuple[FloatArray, FloatArray]:
    """Return prior mean and sd of a configuration's own coefficients, shapes (K,), config features folded into the constant."""
    mean = np.array([f.prior.mean for f in feature_set.varying])
    sd = np.array([f.prior.sd for f in feature_set.varying])
    if feature_set.config:
        row = config_to_constant(feature_set, configuration)
        constant = len(feature_set.base)
        mean[constant] += float(row @ [f.prior.mean for f in feature_set.config])
        sd[constant] = float(np.hypot(sd[constant], np.linalg.norm(row * [f.prior.sd for f in feature_set.config])))
    return mean, sd


def constant_s(feature_set: FeatureSet, configuration: ServingConfiguration) -> float:
    """Return the seconds that one unit of the constant's coefficient is worth in this configuration."""
    constant = feature_set.residual[0]
    value = np.asarray(constant.compute(pd.DataFrame(index=[0]), configuration), dtype=float)
    return float(value[0]) * constant.reference


def config_to_constant(feature_set: FeatureSet, configuration: ServingConfiguration) -> FloatArray:
    """Return the config features as multiples of the constant, shape (G,): they shift a configuration's constant."""
    return feature_set.config_row(configuration) / constant_s(feature_set, configuration)


def pilot_coefficients(
    design: FloatArray, response: FloatArray, feature_set: FeatureSet, configuration: ServingConfiguration
) -> FloatArray:
    """Fit the pilot coefficients.

    Minimises sum ((y - X w) / s)^2 / sigma^2 + sum ((w - m) / sd)^2 over w >= 0 with s the current fit, m and sd the
    prior's, until s changes by less than 1e-6 or fifty times.

    Parameters
    ----------
    design : ndarray, shape (n, K)
        Seconds per unit coefficient.
    response : ndarray, shape (n,)
        Seconds.

    Returns
    -------
    ndarray, shape (K,)
    """
    floor = feature_set.noise_floor(configuration)
    mean, _ = own_prior(feature_set, configuration)
    sd = np.array([f.prior.sd for f in feature_set.varying])
    # A configuration's own coefficient is the population's plus a deviation of about its own size.
    sd = np.hypot(sd, 0.5 * np.abs(mean))
    scale = np.maximum(response, max(floor, float(np.median(response)) * 0.1))
    coefficients = mean
    for _ in range(50):
        rows = design / scale[:, None] / _PILOT_SIGMA
        target = response / scale / _PILOT_SIGMA
        normal = rows.T @ rows + np.diag(1.0 / sd**2)
        right = rows.T @ target + mean / sd**2
        factor = np.linalg.cholesky(normal)
        coefficients, _ = nnls(factor.T, np.linalg.solve(factor, right))
        new_scale = row_scale(design, coefficients, floor)
        change = float(np.max(np.abs(new_scale / scale - 1.0)))
        scale = new_scale
        if change < 1e-6:
            break
    return np.asarray(coefficients, dtype=float)


def row_scale(design: FloatArray, coefficients: FloatArray, floor_s: float) -> FloatArray:
    """Return the scale of each row in seconds, shape (n,): the larger of the fitted mean and the floor."""
    return np.asarray(np.maximum(design @ coefficients, floor_s))
