"""How many rows, of which traffic, until the error is below the limit: in closed form, from the posterior's own variance.

After n more rows of a regime whose rows carry the information G each, on average, the covariance of the coefficients is C_n =
(C^-1 + n G)^-1, and the relative error of means over the traffic asked about has the square q = d' Q d, d ~ Normal(0, C_n), Q the mean of
z z'. The MAPE of rows with an error of variance q + sigma^2 + omega^2 is sqrt(2 / pi) times its root, so it stays below the limit while
q stays below pi / 2 limit^2 - sigma^2 - omega^2. q is taken for a gamma variable with the mean tr(C_n Q) and the variance
2 tr(C_n Q C_n Q) (Satterthwaite 1946). Where the measured error is larger than announced, C is first stretched until it announces it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.stats import gamma

from hfdtl_bayes.transfer.checks.coverage import block_errors
from hfdtl_bayes.transfer.checks.evidence import ErrorForms, Evidence, Traffic

FloatArray = NDArray[np.float64]

MOST_ROWS = 20_000
"""More is no advice: a trace of this size would be a donor's."""


@dataclass(frozen=True)
class MoreRows:
    """What to record.

    Attributes
    ----------
    regime : str
    rows : int or None
        None if no number of rows below `MOST_ROWS` is expected to suffice.
    table : DataFrame
        The same for every regime there is.
    """

    regime: str
    rows: int | None
    table: pd.DataFrame


def rows_needed(evidence: Evidence, traffic: Traffic, probability: float) -> MoreRows:
    """Return how many more rows of which regime are expected to bring the MAPE on `traffic` below the limit with this probability."""
    noise, drift = evidence.error_variance
    allowed = np.pi / 2 * evidence.limit**2 - noise - drift
    covariance = evidence.covariance * _stretch(evidence)
    q = traffic.relative_design.T @ traffic.relative_design / len(traffic.scale)
    found = []
    for regime in pd.unique(traffic.regime):
        own = np.flatnonzero(traffic.regime == regime)
        _, block = np.unique(traffic.block[own], return_inverse=True)
        information = ErrorForms(traffic.relative_design[own], block).at(np.sqrt(noise), np.sqrt(drift)) / len(own)
        found.append((str(regime), _rows(covariance, information, q, allowed, probability, evidence.own.block_length)))
    table = pd.DataFrame(found, columns=["regime", "rows"])
    best = min(found, key=lambda r: np.inf if r[1] is None else r[1])
    return MoreRows(best[0], best[1], table)


def _stretch(evidence: Evidence) -> float:
    """Return by how much the variance of the coefficients must grow to announce the held-out block errors, at least 1."""
    if evidence.held_out is None:
        return 1.0
    error, variance, z = block_errors(evidence, evidence.held_out)
    announced = float(((z @ evidence.covariance) * z).sum(axis=1).mean())
    surplus = float(np.mean(error**2 - variance))
    return max(surplus / max(announced, 1e-300), 1.0)


def _rows(
    covariance: FloatArray, information: FloatArray, q: FloatArray, allowed: float, probability: float, block: int
) -> int | None:
    """Return the smallest number of rows, in whole blocks, or None."""
    if allowed <= 0:
        return None
    precision = np.linalg.pinv(covariance, hermitian=True)
    precision += 1e-12 * np.trace(precision) / len(precision) * np.eye(len(precision))
    # With W' C^-1 W = 1 and W' G W = diag(g): C_n = W diag(1 / (1 + n g)) W', so each n costs a sum.
    g, w = eigh(information, precision)
    rotated = w.T @ q @ w

    def enough(rows: int) -> bool:
        left = 1.0 / (1.0 + rows * np.maximum(g, 0.0))
        mean = float((left * np.diag(rotated)).sum())
        variance = 2.0 * float(left @ (rotated**2) @ left)
        return bool(gamma.cdf(allowed, mean**2 / variance, scale=variance / mean) >= probability) if mean > 0 else True

    high = block
    while not enough(high):
        high *= 2
        if high > MOST_ROWS:
            return None
    low = high // 2 if high > block else 0
    while high - low > block:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return -(-high // block) * block
