"""What all checks look at: residuals of the rows at hand, and what the posterior says they should be.

Everything is relative, divided by the scale s that errors are relative to. With Z the design divided by s, the residual r = (y - X m)
/ s of rows that the posterior has not seen is Normal(0, Z C Z' + Sigma), m and C the mean and covariance of the target's
coefficients and Sigma block-diagonal, sigma^2 I + omega^2 1 1' in each time block: the rows of a block share its drift, and all
rows share the error of the coefficients. Forms a' Sigma^-1 b cost one pass over rows and then blocks only (Sherman-Morrison).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import response
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import ConfigStatistics
from hfdtl_bayes.traces import time_blocks
from hfdtl_bayes.transfer.evaluation import HeldOut, scored_rows

FloatArray = NDArray[np.float64]

_ERROR_DRAWS = 25
"""Draws of (sigma, omega) that tests are averaged over: their posterior is narrow beside what the tests ask."""


@dataclass(frozen=True, eq=False)
class Traffic:
    """Rows of the target as checks need them.

    Attributes
    ----------
    relative_design : ndarray, shape (n, K)
        Z.
    residual : ndarray, shape (n,)
        r.
    scale : ndarray, shape (n,)
        s, seconds.
    observed, expected : ndarray, shape (n,)
        Seconds.
    block : ndarray of int, shape (n,)
        From 0, increasing.
    regime : ndarray of str, shape (n,)
    scored : ndarray of bool, shape (n,)
        Rows that percentage errors are taken over.
    frame : DataFrame
    """

    relative_design: FloatArray
    residual: FloatArray
    scale: FloatArray
    observed: FloatArray
    expected: FloatArray
    block: NDArray[np.int64]
    regime: NDArray[np.object_]
    scored: NDArray[np.bool_]
    frame: pd.DataFrame

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each block, shape (B,)."""
        return np.bincount(self.block)

    def block_means(self, values: FloatArray) -> FloatArray:
        """Return means over blocks, shape (B,) or (B, q)."""
        return (block_sums(values, self.block).T / self.sizes).T


@dataclass(frozen=True, eq=False)
class Evidence:
    """A calibrated target and the rows there are of it.

    Attributes
    ----------
    posterior : LatencyPosterior
    configuration : ServingConfiguration
    mean, covariance : ndarray, shapes (K,) and (K, K)
        m and C.
    sigma, omega : ndarray, shape (J,)
        Draws of noise and drift, evenly spaced.
    calibration, held_out : Traffic or None
    intended : Traffic or None
        The traffic asked about, whose times need not be known; the held-out rows where nothing else is said.
    scores : HeldOut or None
        Accuracy on the held-out rows.
    limit : float
        MAPE to stay below.
    """

    posterior: LatencyPosterior
    configuration: ServingConfiguration
    mean: FloatArray
    covariance: FloatArray
    sigma: FloatArray
    omega: FloatArray
    calibration: Traffic | None
    held_out: Traffic | None
    intended: Traffic | None
    scores: HeldOut | None
    limit: float

    @property
    def own(self) -> ConfigStatistics:
        """Statistics of the target."""
        return next(s for s in self.posterior.statistics if s.config_id == self.configuration.config_id)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the coefficients."""
        return self.posterior.feature_set.coef_names

    @property
    def pooled_names(self) -> tuple[str, ...]:
        """Names of the pooled coefficients, the first: along the discrepancy nothing is looked for, as it is there to take up misfit."""
        return self.posterior.feature_set.pooled_names

    @property
    def error_variance(self) -> tuple[float, float]:
        """Posterior means of sigma^2 and omega^2."""
        return float(np.mean(self.sigma**2)), float(np.mean(self.omega**2))

    def mean_sd(self, traffic: Traffic) -> FloatArray:
        """Return the relative sd of the expected value of each row, shape (n,): the root of z' C z."""
        z = traffic.relative_design
        return np.sqrt(np.maximum(((z @ self.covariance) * z).sum(axis=1), 0.0))


def make_evidence(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    *,
    calibration: pd.DataFrame | None,
    held_out: pd.DataFrame | None,
    intended: pd.DataFrame | None,
    scores: HeldOut | None,
    limit: float,
    block_length: int,
) -> Evidence:
    """Prepare what all checks look at.

    Parameters
    ----------
    posterior : LatencyPosterior
    configuration : ServingConfiguration
        Of a fitted configuration.
    calibration, held_out : DataFrame, optional
        Rows calibrated on, and rows that judge.
    intended : DataFrame, optional
        Batches of the traffic to be predicted; times are not read. The held-out rows by default.
    scores, limit
        As in `Evidence`.
    block_length : int
        Steps per time block.

    Raises
    ------
    InputError
        If a column is missing, or a feature is not defined for some row.
    """
    draws = posterior.draws(configuration)
    chosen = np.unique(np.linspace(0, len(draws.sigma) - 1, _ERROR_DRAWS).astype(int))
    covariance = np.cov(draws.theta.T).reshape(len(draws.mean), -1)

    def traffic(frame: pd.DataFrame | None, *, times: bool = True) -> Traffic | None:
        if frame is None or frame.empty:
            return None
        supported = posterior.feature_set.supported(frame, configuration)
        design = np.where(supported[:, None], posterior.feature_set.design(frame, configuration), 0.0)
        expected = design @ draws.mean
        scale = posterior.scale_s(expected, configuration)
        observed = response(frame, posterior.feature_set.quantity) if times else expected
        if not (scale > 0).all():
            row = int(np.argmin(scale > 0))
            raise InputError(f"row {row} of {configuration.config_id!r} has no scale: its expected time is {expected[row]:.3g} s")
        return Traffic(
            design / scale[:, None],
            (observed - expected) / scale,
            scale,
            observed,
            expected,
            time_blocks(frame, block_length),
            frame["regime"].to_numpy(),
            scored_rows(observed, posterior.feature_set, configuration),
            frame,
        )

    judging = traffic(held_out)
    return Evidence(
        posterior,
        configuration,
        draws.mean,
        covariance,
        draws.sigma[chosen],
        draws.omega[chosen],
        traffic(calibration),
        judging,
        judging if intended is None else traffic(intended, times=False),
        scores,
        limit,
    )


def block_sums(values: FloatArray, block: NDArray[np.int64]) -> FloatArray:
    """Return sums over blocks of rows, shape (B,) or (B, q); equal block numbers are adjacent, from 0."""
    starts = np.flatnonzero(np.r_[True, block[1:] != block[:-1]])
    return np.asarray(np.add.reduceat(values, starts, axis=0))


class ErrorForms:
    """Products a' Sigma^-1 b of the columns of a matrix, for any noise and drift.

    Parameters
    ----------
    columns : ndarray, shape (n, q)
    block : ndarray of int, shape (n,)
    """

    def __init__(self, columns: FloatArray, block: NDArray[np.int64]) -> None:
        self._gram = columns.T @ columns
        self._sums = block_sums(columns, block)
        self._sizes = np.bincount(block)

    def at(self, sigma: float, omega: float) -> FloatArray:
        """Return the matrix of products, shape (q, q)."""
        shared = omega**2 / (sigma**2 + self._sizes * omega**2)
        return np.asarray((self._gram - self._sums.T @ (shared[:, None] * self._sums)) / sigma**2)
