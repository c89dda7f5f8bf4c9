"""How rows are scaled and weighed before anything else: one frozen object, fitted once per configuration and kept with it.

A row is divided by its scale, the pilot's mean or the floor, the larger. A row far from the others of its time block is
down-weighted: the sd of its own noise is taken as s_i sigma / sqrt(w_i) with w_i = min(1, (c / |u_i|)^2), u_i its deviation in robust
sds; the drift it shares with its block stays s_i d_B. So no row lies further out than c sds: neither the coefficients nor
the noise are taken over by a pause of the garbage collector, and what is fitted is still a Gaussian with known scales and weights,
which has sufficient statistics (`split_blocks`). The row is given the smallest noise that makes it unsurprising at c
sds; for large deviations that is the weight of a Student-t.
The weight (c / |u|) of Huber would cap the influence on coefficients only: the squared residual would still grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_SMALLEST_SD = 1e-6
"""Relative sd below which deviations are rounding error and no row is an outlier for them."""


@dataclass(frozen=True, eq=False)
class RowScaling:
    """The fixed rule that gives each row its scale and weight, from its own block alone.

    Attributes
    ----------
    pilot : ndarray, shape (K,)
        Coefficients of the pilot fit.
    floor_s : float
        Floor of the scale, seconds.
    cutoff : float
        c: deviations beyond this many robust sds are down-weighted; infinity for none.
    row_sd : float
        Robust relative sd of a row around the median of its block. 0 if never estimated; no row is down-weighted then.
    block_sd : float
        Robust relative sd of the medians of blocks around the pilot.
    """

    pilot: FloatArray
    floor_s: float
    cutoff: float = float("inf")
    row_sd: float = 0.0
    block_sd: float = 0.0

    def difference(self, other: RowScaling) -> str | None:
        """Return which part of two scalings differs; None if they are the same."""
        if not np.array_equal(self.pilot, other.pilot):
            return "row scale (pilot)"
        for name, what in (
            ("floor_s", "scale floor"),
            ("cutoff", "outlier cutoff"),
            ("row_sd", "robust sd of rows"),
            ("block_sd", "robust sd of blocks"),
        ):
            if getattr(self, name) != getattr(other, name):
                return what
        return None

    def mean_s(self, design: FloatArray) -> FloatArray:
        """Return the scale of each row before any is down-weighted, seconds, shape (n,)."""
        return row_scale(design, self.pilot, self.floor_s)

    def weights(self, residuals: FloatArray, blocks: NDArray[np.int64]) -> FloatArray:
        """Return the weight of each row, shape (n,), from relative residuals r against the pilot.

        u = (r - location) / row_sd, location = the median of the row's block, no further from zero than cutoff * block_sd:
        the drift of a block is no outlier, a block unlike all others is.

        Parameters
        ----------
        residuals : ndarray, shape (n,)
            (y - X pilot) / s.
        blocks : ndarray of int, shape (n,)
            Block numbers, equal values adjacent; blocks must be whole.
        """
        return self._weights(residuals, *block_starts(blocks))

    def _weights(self, residuals: FloatArray, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> FloatArray:
        weight = np.ones(len(residuals))
        if not np.isfinite(self.cutoff) or self.row_sd < _SMALLEST_SD or not len(residuals):
            return weight
        reach, limit = self.cutoff * self.row_sd, self.cutoff * self.block_sd
        # The location is no larger than the block's largest residual: where twice that is within reach, no row is out of it.
        large = np.flatnonzero(2.0 * np.abs(residuals) > reach)
        if not len(large):
            return weight
        far = np.unique(np.searchsorted(starts, large, side="right") - 1)
        for m in np.unique(sizes[far]):
            own = starts[far[sizes[far] == m]][:, None] + np.arange(m)
            location = np.clip(np.median(residuals[own], axis=1, keepdims=True), -limit, limit)
            deviation = np.abs(residuals[own] - location)
            weight[own] = np.minimum(1.0, (reach / np.maximum(deviation, reach)) ** 2)
        return weight

    def rows(self, design: FloatArray, observed: FloatArray, blocks: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Return scale and weight of rows.

        Parameters
        ----------
        design : ndarray, shape (n, K)
            Seconds per unit coefficient.
        observed : ndarray, shape (n,)
            Seconds.
        blocks : ndarray of int, shape (n,)
            Block numbers, equal values adjacent; every block whole, so that chunks give what the whole gives.

        Returns
        -------
        scale : ndarray, shape (n,)
            Seconds, what a row is divided by so that its noise has sd sigma: that of the pilot over the root of the weight.
        weight : ndarray, shape (n,)
            1, or less where a row is down-weighted.
        """
        return self.rows_of_blocks(design @ self.pilot, observed, *block_starts(blocks))

    def rows_of_blocks(
        self, fitted: FloatArray, observed: FloatArray, starts: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> tuple[FloatArray, FloatArray]:
        """Return scale and weight of the rows of whole blocks as `rows` does, from the pilot's fit.

        Parameters
        ----------
        fitted, observed : ndarray, shape (n,)
            Seconds.
        starts, sizes : ndarray of int, shape (B,)
            First row and number of rows of each block.
        """
        mean = np.maximum(fitted, self.floor_s)
        if not np.isfinite(self.cutoff):
            return mean, np.ones(len(mean))
        weight = self._weights((observed - fitted) / mean, starts, sizes)
        low = weight < 1
        if low.any():
            mean[low] /= np.sqrt(weight[low])
        return mean, weight


def row_scale(design: FloatArray, coefficients: FloatArray, floor_s: float) -> FloatArray:
    """Return the scale of each row in seconds, shape (n,): the larger of the fitted mean and the floor."""
    return np.asarray(np.maximum(design @ coefficients, floor_s))


def block_starts(blocks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return first row and number of rows of each block; equal block numbers are adjacent."""
    starts = np.flatnonzero(np.r_[True, blocks[1:] != blocks[:-1]])
    return starts, np.diff(np.r_[starts, len(blocks)])


def block_medians(values: FloatArray, blocks: NDArray[np.int64]) -> FloatArray:
    """Return the median of each block, shape (number of blocks,); equal block numbers are adjacent."""
    starts, sizes = block_starts(blocks)
    medians = np.empty(len(starts))
    for m in np.unique(sizes):
        own = sizes == m
        medians[own] = np.median(values[starts[own][:, None] + np.arange(m)], axis=1)
    return medians


@dataclass(frozen=True)
class Downweighted:
    """What was down-weighted among rows: counted, so that it can be shown.

    Attributes
    ----------
    rows : int
        Rows of weight below 1.
    time_s : float
        Seconds observed in them.
    excess_s : float
        Sum of (1 - w) (y - mean of the pilot): the seconds that the fit does not account for. Over all seconds observed it is about
        the share by which fitted means are low where the outliers are real time.
    largest_ratio : float
        Largest duration among them over what the pilot expects; 0 if there are none.
    by_regime : tuple of (str, int)
        Rows down-weighted of each regime that has any, sorted by name.
    startup_rows : int
        First rows of the recording that are a start-up transient, weighted down or not.
    """

    rows: int = 0
    time_s: float = 0.0
    excess_s: float = 0.0
    largest_ratio: float = 0.0
    by_regime: tuple[tuple[str, int], ...] = ()
    startup_rows: int = 0

    def merge(self, other: Downweighted) -> Downweighted:
        """Return the count over both sets of rows."""
        regimes = dict(self.by_regime)
        for name, count in other.by_regime:
            regimes[name] = regimes.get(name, 0) + count
        return Downweighted(
            self.rows + other.rows,
            self.time_s + other.time_s,
            self.excess_s + other.excess_s,
            max(self.largest_ratio, other.largest_ratio),
            tuple(sorted(regimes.items())),
            self.startup_rows + other.startup_rows,
        )


def count_downweighted(
    observed: FloatArray, mean_s: FloatArray, weight: FloatArray, regime: NDArray[np.object_], startup: int = 0
) -> Downweighted:
    """Count the rows of weight below 1.

    Parameters
    ----------
    observed, mean_s, weight : ndarray, shape (n,)
        Seconds observed and expected by the pilot, and the weight.
    regime : ndarray of str, shape (n,)
    startup : int
        Start-up rows among them, see `startup_rows`.
    """
    low = weight < 1
    if not low.any():
        return Downweighted(startup_rows=startup)
    names, counts = np.unique(regime[low].astype(str), return_counts=True)
    return Downweighted(
        rows=int(low.sum()),
        time_s=float(observed[low].sum()),
        excess_s=float(((1.0 - weight[low]) * (observed[low] - mean_s[low])).sum()),
        largest_ratio=float((observed[low] / mean_s[low]).max()),
        by_regime=tuple((str(n), int(c)) for n, c in zip(names, counts, strict=True)),
        startup_rows=startup,
    )
