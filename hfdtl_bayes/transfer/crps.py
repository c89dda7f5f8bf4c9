"""The continuous ranked probability score: how far a predictive distribution lies from what was observed, in the unit of the observation.

CRPS(F, y) = E|X - y| - E|X - X'| / 2 with X, X' independent draws of F: the absolute error of a point, and less where F is as wide
as it should be. Smaller is better; unlike a log score it forgives a far outlier. Gneiting & Raftery (2007),
doi:10.1198/016214506000001437.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import response
from hfdtl_bayes.model import LatencyPosterior

FloatArray = NDArray[np.float64]


def crps_of_draws(draws: FloatArray, observed: FloatArray) -> FloatArray:
    """Return the CRPS of each row from draws, without bias for any number of them.

    mean |x - y| - sum over pairs of |x_i - x_j| / (S (S - 1)), the "fair" estimator (Ferro 2014, doi:10.1002/qj.2270).

    Parameters
    ----------
    draws : ndarray, shape (S, n)
    observed : ndarray, shape (n,)

    Raises
    ------
    InputError
        If there are fewer than two draws.
    """
    count = len(draws)
    if count < 2:
        raise InputError(f"the CRPS needs at least two draws, found {count}")
    rank = 2 * np.arange(1, count + 1) - count - 1
    pairs = rank @ np.sort(draws, axis=0)
    return np.asarray(np.abs(draws - observed).mean(axis=0) - pairs / (count * (count - 1)))


def crps_of_normals(mean: FloatArray, sd: FloatArray, observed: FloatArray) -> FloatArray:
    """Return the CRPS of each row under an equal mixture of normals, in closed form.

    mean_i A(y - m_i, s_i) - mean_ij A(m_i - m_j, sqrt(s_i^2 + s_j^2)) / 2 with A(m, s) = E|Normal(m, s)| (Grimit et al. 2006,
    doi:10.1256/qj.05.235). Work grows with the square of the number of components.

    Parameters
    ----------
    mean, sd : ndarray, shape (S, n)
        Components; the mixture of posterior draws, so with one draw a normal.
    observed : ndarray, shape (n,)
    """

    def absolute(m: FloatArray, s: FloatArray) -> FloatArray:
        z = m / s
        return np.asarray(m * (2 * norm.cdf(z) - 1) + 2 * s * norm.pdf(z))

    pairs = np.zeros(len(observed))
    for m, s in zip(mean, sd, strict=True):
        pairs += absolute(m - mean, np.hypot(s, sd)).mean(axis=0)
    return np.asarray(absolute(observed - mean, sd).mean(axis=0) - 0.5 * pairs / len(mean))


def crps(
    posterior: LatencyPosterior, frame: pd.DataFrame, configuration: ServingConfiguration, *, seed: int = 0
) -> tuple[float, float]:
    """Return the mean CRPS of new observations in seconds, and relative to the mean observed.

    Parameters
    ----------
    posterior : LatencyPosterior
    frame : DataFrame
        Rows that were not fitted, with what was observed.
    configuration : ServingConfiguration
    seed : int

    Raises
    ------
    InputError
        If there are no rows.
    """
    if frame.empty:
        raise InputError(f"no rows of {configuration.config_id!r} to score; give some that were held out")
    observed = response(frame, posterior.feature_set.quantity)
    scores = [crps_of_draws(drawn, observed[part]) for part, drawn in posterior.predictive_draws(frame, configuration, seed=seed)]
    mean = float(np.concatenate(scores).mean())
    return mean, mean / float(observed.mean())
