"""The pilot fit: the scale errors are relative to, and what is an outlier.

Errors of step times grow with the mean, so rows are divided by a pilot estimate of their mean before anything else. The
pilot is a non-negative, prior-regularised relative least-squares fit with capped influence, iterated to a fixed point; the model
conditions on the scales and weights it gives. Only these depend on it: its coefficients are not used further.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import norm

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import StatisticsError
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.statistics.scaling import RowScaling, block_medians, block_starts, row_scale

FloatArray = NDArray[np.float64]

OUTLIER_CUTOFFS: Mapping[str, float] = {"step_time": 8.0, "queue_delay": math.inf, "api_delay": math.inf}
"""Robust sds beyond which a row is down-weighted, by quantity. Steps: only gross outliers. On eleven recordings of a real engine a
cutoff of 8 leaves out 0.01 % of the time (median; at most 0.6 %, of a mixture of experts), so means stay means; without one, a
single unlabelled compilation step of 37 times the expected makes the noise of 3,400 rows five times as large. Long delays are the
signal, not outliers: of api_delay a cutoff of 8 would leave out up to 14 % of the time."""

STARTUP_RATIO = 3.0
"""Times the expected duration from which the first steps of a recording count as start-up: compilation costs ten times a step and more,
the machine's drift some tens of per cent."""

# Relative error assumed of one row while the pilot weighs data against prior; it only has to be of the right order.
_PILOT_SIGMA = 0.1

_ROUNDS, _SETTLED, _TINY = 200, 1e-6, 1e-12

# Rows of a block below which its median is no measure of where the others are; quantile that gives the robust sds.
_SMALLEST_BLOCK, _QUANTILE = 4, 0.9


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


def check_scaling(scaling: RowScaling, feature_set: FeatureSet, configuration: ServingConfiguration) -> None:
    """Refuse a scaling that does not belong to a feature set.

    Raises
    ------
    StatisticsError
        If its pilot is not K finite coefficients.
    """
    names = feature_set.coef_names
    if scaling.pilot.shape != (len(names),) or not np.isfinite(scaling.pilot).all():
        raise StatisticsError(
            f"configuration {configuration.config_id!r}: the pilot must be {len(names)} finite coefficients "
            f"({', '.join(names)}), found {scaling.pilot}; take it from earlier statistics of this configuration"
        )


def fit_row_scaling(
    design: FloatArray,
    observed: FloatArray,
    blocks: NDArray[np.int64],
    feature_set: FeatureSet,
    configuration: ServingConfiguration,
    cutoff: float | None = None,
) -> RowScaling:
    """Fit the scaling of a configuration's rows: the pilot and, with a cutoff, the robust sds that say what is an outlier.

    Each round minimises sum w ((y - X p) / s)^2 / 0.1^2 + sum ((p - m) / sd)^2 over p >= 0 with m and sd the prior's, then takes s
    from the new fit, the robust sds from its residuals and the weights from both (`RowScaling.weights`). It stops where another round
    would change no scale and no sd by more than 1e-6 relative, or after 200 rounds. Rounds with the weights
    min(1, c / |u|) of Huber, whose problem is convex, come first: they lead the others, which have more than one fixed point, to
    the one near the bulk of the rows.

    Parameters
    ----------
    design : ndarray, shape (n, K)
        Seconds per unit coefficient.
    observed : ndarray, shape (n,)
        Seconds.
    blocks : ndarray of int, shape (n,)
        Drift block of each row, equal values adjacent.
    feature_set : FeatureSet
    configuration : ServingConfiguration
    cutoff : float, optional
        Robust sds beyond which a row is down-weighted; infinity for never, which is a plain weighted fit. That of
        `OUTLIER_CUTOFFS` by default.

    Returns
    -------
    RowScaling

    Raises
    ------
    StatisticsError
        If the cutoff is not a number above 1: rows within one sd are the bulk.
    """
    cutoff = OUTLIER_CUTOFFS[feature_set.quantity] if cutoff is None else cutoff
    if not cutoff > 1:
        raise StatisticsError(f"the outlier cutoff must be above 1 robust sd, found {cutoff}; 5 is usual, inf turns it off")
    floor = feature_set.noise_floor(configuration)
    mean, _ = own_prior(feature_set, configuration)
    sd = np.array([f.prior.sd for f in feature_set.varying])
    # A configuration's own coefficient is the population's plus a deviation of about its own size.
    sd = np.hypot(sd, 0.5 * np.abs(mean))
    scale = np.maximum(observed, max(floor, float(np.median(observed)) * 0.1))
    robust = np.isfinite(cutoff)
    root = np.ones(len(observed))
    scaling = RowScaling(mean, floor, cutoff)
    settled = not robust
    for _ in range(_ROUNDS):
        rows = design * (root / scale / _PILOT_SIGMA)[:, None]
        target = observed * root / scale / _PILOT_SIGMA
        normal = rows.T @ rows + np.diag(1.0 / sd**2)
        right = rows.T @ target + mean / sd**2
        factor = np.linalg.cholesky(normal)
        coefficients, _ = nnls(factor.T, np.linalg.solve(factor, right))
        new_scale = row_scale(design, coefficients, floor)
        change = float(np.max(np.abs(new_scale / scale - 1.0)))
        scale = new_scale
        if robust:
            residuals = (observed - design @ coefficients) / scale
            row_sd, block_sd = robust_sds(residuals, blocks)
            change = max(change, abs(row_sd - scaling.row_sd) / max(row_sd, _TINY))
            scaling = RowScaling(coefficients, floor, cutoff, row_sd, block_sd)
            weights = scaling.weights(residuals, blocks)
            # The weights are (c / |u|)^2; their fourth root is the root of Huber's.
            root = np.sqrt(weights) if settled else weights**0.25
        else:
            scaling = RowScaling(coefficients, floor)
        if change < _SETTLED:
            if settled:
                break
            settled, root = True, np.sqrt(weights)
    return scaling


def robust_sds(residuals: FloatArray, blocks: NDArray[np.int64]) -> tuple[float, float]:
    """Return robust sds of relative residuals: of a row around the median of its block, and of the medians around zero.

    Each is the 90 % quantile of the absolute value over that of a normal, 1.645. It bears one row in ten gone astray, and unlike the
    median absolute deviation it is not near zero where more than half the rows agree exactly (requests that do not wait). Rows of blocks
    of fewer than four, which say little of the spread around their own median, count only where there are no others; then
    they are taken around zero.

    Parameters
    ----------
    residuals : ndarray, shape (n,)
    blocks : ndarray of int, shape (n,)
    """
    _, sizes = block_starts(blocks)
    medians = block_medians(residuals, blocks)
    enough = np.repeat(sizes >= _SMALLEST_BLOCK, sizes)
    centred = (residuals - np.repeat(medians, sizes))[enough] if enough.any() else residuals
    return _spread(centred), _spread(medians)


def _spread(values: FloatArray) -> float:
    return float(np.quantile(np.abs(values), _QUANTILE) / norm.ppf(0.5 + _QUANTILE / 2))


def startup_rows(scaling: RowScaling, design: FloatArray, observed: FloatArray) -> int:
    """Return how many rows at the very start of a recording are a start-up transient.

    The largest h for which row h is slow, over `STARTUP_RATIO` times the pilot's mean, and nine in ten of the first h rows are; 0 if
    the first row is not slow, or if h is more than a tenth of all rows, which is no start-up.

    Parameters
    ----------
    scaling : RowScaling
    design : ndarray, shape (n, K)
    observed : ndarray, shape (n,)
        In time order, from the start of the recording.
    """
    slow = observed > STARTUP_RATIO * scaling.mean_s(design)
    if not slow[0]:
        return 0
    share = np.cumsum(slow) / np.arange(1, len(slow) + 1)
    rows = int(np.flatnonzero(slow & (share >= 0.9))[-1]) + 1
    return rows if rows <= 0.1 * len(slow) else 0
