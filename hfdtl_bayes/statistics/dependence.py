"""How far rows depend on each other: autocorrelation of residuals, the block length drawn from it, and what rows are worth.

A machine's speed drifts on all time scales: residuals of real engines are correlated over hundreds of steps, much like 1/f noise, and
no block length makes blocks independent of each other and rows independent within them. The length chosen is where both
faults are smallest. Too short, and totals of neighbouring blocks count twice; too long, and something that changes slowly within a
block (batch size, context) takes drift for its own effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.statistics.scaling import block_starts
from hfdtl_bayes.traces import time_blocks

FloatArray = NDArray[np.float64]

DEFAULT_BLOCK_LENGTH = 20
"""Steps per drift block: long enough to tell drift from noise, short enough that errors within one are nearly independent. On eleven
configurations of a real engine the coefficients of two halves of a recording differ least, in posterior sds, with 20."""

CANDIDATE_LENGTHS = (5, 8, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200)
"""Block lengths `choose_block_length` chooses from."""

_FEWEST_PAIRS = 20
"""Pairs of neighbouring whole blocks below which a correlation between blocks is not estimated: its sd would exceed 0.2."""

_AS_GOOD = 0.05
"""Difference of correlations that is no reason to leave the default length."""

DEFAULT_LAGS = (1, 2, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True, eq=False)
class Autocorrelation:
    """Correlation of residuals at some lags.

    Attributes
    ----------
    lags : ndarray of int, shape (L,)
        Rows apart.
    correlation : ndarray, shape (L,)
        Mean product over mean square; the pilot's mean is taken as the mean. NaN without pairs.
    pairs : ndarray of int, shape (L,)
        Pairs of rows of one stretch of a regime.
    """

    lags: NDArray[np.int64]
    correlation: FloatArray
    pairs: NDArray[np.int64]

    @property
    def independent_sd(self) -> FloatArray:
        """Sd that each correlation would have around zero if rows were independent, 1 / sqrt(pairs), shape (L,)."""
        return np.asarray(1.0 / np.sqrt(np.maximum(self.pairs, 1)))


def residual_autocorrelation(
    residuals: FloatArray, regimes: NDArray[np.object_], lags: Sequence[int] = DEFAULT_LAGS
) -> Autocorrelation:
    """Return the autocorrelation of relative residuals, within stretches of one regime.

    Parameters
    ----------
    residuals : ndarray, shape (n,)
        (y - X pilot) / s, in time order.
    regimes : ndarray of str, shape (n,)
    lags : sequence of int
    """
    stretch = np.cumsum(np.r_[True, regimes[1:] != regimes[:-1]])
    square = float(np.mean(residuals**2))
    correlation, pairs = np.full(len(lags), np.nan), np.zeros(len(lags), dtype=np.int64)
    for i, lag in enumerate(lags):
        together = stretch[lag:] == stretch[:-lag]
        pairs[i] = together.sum()
        if pairs[i] and square > 0:
            correlation[i] = float(np.mean((residuals[lag:] * residuals[:-lag])[together])) / square
    return Autocorrelation(np.asarray(lags, dtype=np.int64), correlation, pairs)


@dataclass(frozen=True)
class BlockFaults:
    """What is wrong with blocks of one length.

    Attributes
    ----------
    length : int
    between : float
        Correlation of the means of neighbouring blocks; 0 if blocks are independent, as the model has it.
    within : float
        Correlation of neighbouring rows around the mean of their block, above the -1 / (length - 1) of independent rows.
    pairs : int
        Pairs of neighbouring whole blocks.
    """

    length: int
    between: float
    within: float
    pairs: int

    @property
    def worst(self) -> float:
        """The larger of the two."""
        return max(self.between, self.within)


@dataclass(frozen=True)
class BlockLength:
    """A block length and what it was chosen among.

    Attributes
    ----------
    length : int
    candidates : tuple of BlockFaults
        Those with pairs enough; empty if the recording is too short to choose, in which case `length` is the default.
    """

    length: int
    candidates: tuple[BlockFaults, ...]


def block_faults(residuals: FloatArray, frame: pd.DataFrame, length: int) -> BlockFaults:
    """Return how far residuals are from independent between and within blocks of a length.

    Parameters
    ----------
    residuals : ndarray, shape (n,)
        Relative residuals against the pilot, in time order.
    frame : DataFrame, n rows
        Their rows: regime, and step_id if known.
    length : int
        At least 2.
    """
    blocks = time_blocks(frame, length)
    starts, sizes = block_starts(blocks)
    whole = sizes == length
    # Only blocks that follow each other: same regime, no gap in the recording.
    first = frame["step_id"].to_numpy()[starts] if "step_id" in frame.columns else starts
    regime = frame["regime"].to_numpy()[starts]
    follows = whole[1:] & whole[:-1] & (regime[1:] == regime[:-1]) & (np.diff(first) == length)
    means = np.add.reduceat(residuals, starts) / sizes
    centred = (residuals - np.repeat(means, sizes))[np.repeat(whole, sizes)].reshape(-1, length)
    squares = [float(np.mean(v**2)) if v.size else 0.0 for v in (means[whole], centred)]
    between = float(np.mean((means[1:] * means[:-1])[follows])) / squares[0] if follows.any() and squares[0] else 0.0
    within = float(np.mean(centred[:, 1:] * centred[:, :-1])) / squares[1] + 1.0 / (length - 1) if squares[1] else 0.0
    return BlockFaults(length, between, within, int(follows.sum()))


def choose_block_length(
    residuals: FloatArray,
    frame: pd.DataFrame,
    candidates: Sequence[int] = CANDIDATE_LENGTHS,
    default: int = DEFAULT_BLOCK_LENGTH,
) -> BlockLength:
    """Choose the block length at which what the model neglects is smallest.

    For each candidate the larger of two correlations counts: between the means of neighbouring blocks, which falls with
    the length, and between neighbouring rows within blocks, which rises. The smallest wins; among lengths within 0.05 of it the one
    nearest to the default, in ratio. True blocks are found; for independent rows any length is right and the
    default stays; for an autoregressive process the length grows with its memory.

    Parameters
    ----------
    residuals : ndarray, shape (n,)
        Relative residuals against the pilot, in time order, outliers capped.
    frame : DataFrame, n rows
        Their rows.
    candidates : sequence of int
        Lengths, each at least 2.
    default : int
        Also the answer where no candidate has twenty pairs of neighbouring whole blocks.
    """
    found = tuple(f for f in (block_faults(residuals, frame, n) for n in candidates) if f.pairs >= _FEWEST_PAIRS)
    if not found:
        return BlockLength(default, ())
    limit = min(f.worst for f in found) + _AS_GOOD
    nearest = min((f for f in found if f.worst <= limit), key=lambda f: abs(np.log(f.length / default)))
    return BlockLength(nearest.length, found)
