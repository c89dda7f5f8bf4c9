"""Non-negative coefficients closest to a posterior: by its predictions, or in its own metric.

Both are convex quadratic programs over w >= 0, solved by non-negative least squares, which refits the coefficients that
stay positive once others are held at zero. (Setting negative values to zero without a refit would shift the step time.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

FloatArray = NDArray[np.float64]


def closest_predictions(
    parts: list[tuple[FloatArray, FloatArray, float]], prior_mean: FloatArray, prior_sd: FloatArray, tie_breaker: float
) -> tuple[FloatArray, FloatArray]:
    """Return the coefficients whose predictions are closest in relative terms to given means, with w >= 0 and without.

    Minimises sum over parts (X, m, weight) of weight^2 mean(((X w - m) / m)^2) + tie_breaker^2 sum(((w - prior_mean) /
    prior_sd)^2), so the root mean square error exceeds its smallest possible value by at most about tie_breaker times the
    distance from the prior in sds.

    Parameters
    ----------
    parts : list of (ndarray (n, K), ndarray (n,), float)
        Design, means to meet, weight.
    prior_mean, prior_sd : ndarray, shape (K,)
    tie_breaker : float

    Returns
    -------
    constrained, free : ndarray, shape (K,)
    """
    rows = [weight / np.sqrt(len(m)) * x / m[:, None] for x, m, weight in parts if len(m)]
    right = [np.full(len(m), weight / np.sqrt(len(m))) for _, m, weight in parts if len(m)]
    stacked = np.vstack([*rows, np.diag(tie_breaker / prior_sd)])
    return _solve(stacked, np.concatenate([*right, tie_breaker * prior_mean / prior_sd]))


def closest_in_metric(mean: FloatArray, covariance: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the non-negative coefficients closest to a posterior mean in the posterior's metric, and the mean itself.

    Minimises (w - mean)' covariance^-1 (w - mean): what the data pinned down is kept and what they left open gives way.

    Parameters
    ----------
    mean : ndarray, shape (K,)
    covariance : ndarray, shape (K, K)
        May be singular; directions of no spread are held as tightly as numbers allow.
    """
    if (mean >= 0).all():
        return mean.copy(), mean
    sd = np.sqrt(np.diag(covariance))
    sd = np.where(sd > 0, sd, 1e-9 * np.maximum(np.abs(mean), 1.0))
    correlation = covariance / np.outer(sd, sd)
    np.fill_diagonal(correlation, 1.0)
    values, vectors = np.linalg.eigh(correlation)
    whiten = (vectors / np.sqrt(np.maximum(values, 1e-9))).T / sd
    return _solve(whiten, whiten @ mean)[0], mean


def _solve(rows: FloatArray, right: FloatArray) -> tuple[FloatArray, FloatArray]:
    size = np.linalg.norm(rows, axis=0)
    scaled = rows / size
    # A triangle of K + 1 rows has the same solution, whatever the number of batches.
    triangle = np.linalg.qr(np.column_stack([scaled, right]), mode="r")
    constrained, _ = nnls(triangle[:, :-1], triangle[:, -1])
    free = np.linalg.lstsq(triangle[:, :-1], triangle[:, -1], rcond=None)[0]
    return constrained / size, free / size
