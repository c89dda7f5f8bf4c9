"""Rows themselves, scaled as the statistics are: for likelihoods that have no sufficient statistics, and to score blocks of rows.

A row-level likelihood costs time in proportion to its rows, so it sees a bounded, stated subsample: whole time blocks, spread
evenly over the recording. Whole blocks keep what a block shares, and even spacing keeps every regime in its proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import StatisticsError
from hfdtl_bayes.features import FeatureSet, response
from hfdtl_bayes.statistics.dependence import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.statistics.scaling import row_scale
from hfdtl_bayes.statistics.sufficient import ConfigStatistics, statistics_from_rows
from hfdtl_bayes.traces import time_blocks

FloatArray = NDArray[np.float64]

DEFAULT_ROWS_PER_CONFIG = 2000
"""Rows of one configuration that a row-level fit sees: enough to tell the shape of its errors and most coefficients, few enough
that a fit of four configurations takes about a minute."""


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """Rows of one configuration divided by their scale s.

    Attributes
    ----------
    statistics : ConfigStatistics
        The statistics of exactly these rows, none down-weighted.
    design : ndarray, shape (n, K)
        Columns divided by s.
    observed : ndarray, shape (n,)
        Response divided by s.
    scale : ndarray, shape (n,)
        s in seconds.
    block : ndarray of int, shape (n,)
        Time block of each row, from 0, increasing.
    index : ndarray of int, shape (n,)
        Label of each row in the frame it came from.
    available_rows, available_blocks : int
        How many there were to choose from.
    """

    statistics: ConfigStatistics
    design: FloatArray
    observed: FloatArray
    scale: FloatArray
    block: NDArray[np.int64]
    index: NDArray[np.int64]
    available_rows: int
    available_blocks: int
    starts: NDArray[np.int64] = field(init=False, repr=False)
    """First row of each block, shape (B,)."""

    def __post_init__(self) -> None:
        """Locate the blocks."""
        starts = np.flatnonzero(np.r_[True, self.block[1:] != self.block[:-1]])
        object.__setattr__(self, "starts", starts.astype(np.int64))

    @property
    def config_id(self) -> str:
        """Identifier of the configuration."""
        return self.statistics.config_id

    @property
    def block_sizes(self) -> NDArray[np.int64]:
        """Rows of each block, shape (B,)."""
        return np.asarray(np.diff(np.r_[self.starts, len(self.block)]), dtype=np.int64)

    def __str__(self) -> str:
        """Return how many rows were chosen of how many, for a person."""
        if len(self.observed) == self.available_rows:
            return f"{self.config_id}: all {self.available_rows} rows"
        return (
            f"{self.config_id}: {len(self.observed)} of {self.available_rows} rows, {len(self.starts)} of "
            f"{self.available_blocks} time blocks, evenly spread"
        )


def chosen_blocks(sizes: NDArray[np.int64], rows: int, seed: int) -> NDArray[np.int64]:
    """Choose whole blocks, evenly spread with a random start, of at most `rows` rows together.

    Systematic sampling: with B blocks of which b are wanted, blocks floor((u + i) B / b) for i below b, u uniform.

    Parameters
    ----------
    sizes : ndarray of int, shape (B,)
        Rows of each block.
    rows : int
    seed : int

    Returns
    -------
    ndarray of int
        Numbers of the blocks, increasing.

    Raises
    ------
    StatisticsError
        If no block is small enough.
    """
    if sizes.sum() <= rows:
        return np.arange(len(sizes))
    start = float(np.random.default_rng(seed).random())
    for wanted in range(min(len(sizes), int(rows / sizes.mean()) + 1), 0, -1):
        chosen = np.floor((start + np.arange(wanted)) * len(sizes) / wanted).astype(np.int64)
        if sizes[chosen].sum() <= rows:
            return chosen
    raise StatisticsError(
        f"no time block fits into {rows} rows, the smallest has {sizes.min()}; allow more rows per configuration"
    )


def scaled_rows(
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    feature_set: FeatureSet,
    *,
    block_length: int | Literal["auto"] = DEFAULT_BLOCK_LENGTH,
    pilot: Sequence[float] | FloatArray | None = None,
    rows: int | None = DEFAULT_ROWS_PER_CONFIG,
    seed: int = 0,
) -> ScaledRows:
    """Scale trace rows by a pilot as `statistics_from_rows` does, and keep at most `rows` of them.

    No row is down-weighted: what to make of outliers is the likelihood's affair, and a scale that depends on the observation it
    scales would leave no density to compare.

    Parameters
    ----------
    frame : DataFrame
        Validated rows in time order.
    configuration : ServingConfiguration
    feature_set : FeatureSet
    block_length : int or "auto"
        Steps per drift block, as in `statistics_from_rows`.
    pilot : array, shape (K,), optional
        Coefficients that give the scale; by default those of the statistics of all rows, chosen or not.
    rows : int, optional
        Most rows to keep, in whole blocks; all if None.
    seed : int
        Of the choice of blocks.

    Returns
    -------
    ScaledRows

    Raises
    ------
    StatisticsError
        What `statistics_from_rows` refuses; if `rows` is below 1, or no block fits into it.
    """
    if rows is not None and rows < 1:
        raise StatisticsError(f"rows per configuration must be at least 1, found {rows}")
    full = statistics_from_rows(frame, configuration, feature_set, block_length=block_length, pilot=pilot)
    block_length = full.block_length
    available, blocks = len(frame), time_blocks(frame, block_length)
    sizes = np.bincount(blocks)
    if rows is not None and available > rows:
        keep = np.isin(blocks, chosen_blocks(sizes, rows, seed))
        # Without this, rows that have no step numbers would be cut into blocks anew, across the gaps.
        frame = frame[keep].assign(step_id=blocks[keep] * block_length)
        blocks = blocks[keep]
    own = statistics_from_rows(frame, configuration, feature_set, block_length=block_length, pilot=full.pilot)
    design = feature_set.design(frame, configuration)
    scale = row_scale(design, own.pilot, own.floor_s)
    return ScaledRows(
        statistics=own,
        design=np.ascontiguousarray(design / scale[:, None]),
        observed=response(frame, feature_set.quantity) / scale,
        scale=scale,
        block=np.unique(blocks, return_inverse=True)[1].astype(np.int64),
        index=frame.index.to_numpy(dtype=np.int64),
        available_rows=available,
        available_blocks=len(sizes),
    )


def rows_to_dataset(rows: ScaledRows) -> xr.Dataset:
    """Return the rows of one configuration as a dataset that netCDF can hold; its statistics are kept apart."""
    return xr.Dataset(
        {
            "design": (("row", "coef"), rows.design),
            "observed": ("row", rows.observed),
            "scale_s": ("row", rows.scale),
            "block": ("row", rows.block),
            "label": ("row", rows.index),
            "available_rows": ((), rows.available_rows),
            "available_blocks": ((), rows.available_blocks),
        },
        coords={"coef": list(rows.statistics.coef_names)},
    )


def rows_from_dataset(dataset: xr.Dataset, statistics: ConfigStatistics) -> ScaledRows:
    """Rebuild the rows of one configuration.

    Raises
    ------
    StatisticsError
        If a field is missing or the rows are not those of the statistics.
    """
    try:
        rows = ScaledRows(
            statistics,
            dataset["design"].to_numpy(),
            dataset["observed"].to_numpy(),
            dataset["scale_s"].to_numpy(),
            dataset["block"].to_numpy(),
            dataset["label"].to_numpy(),
            int(dataset["available_rows"]),
            int(dataset["available_blocks"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StatisticsError(f"stored rows of {statistics.config_id!r} cannot be read: {error}") from error
    stored = np.column_stack([rows.design, rows.observed])
    gram = sum(s.triangle.T @ s.triangle for s in statistics.strata)
    same = len(stored) == statistics.rows and len(rows.starts) == statistics.blocks
    if not (same and np.allclose(stored.T @ stored, gram, rtol=1e-8, atol=1e-8 * np.abs(gram).max())):
        raise StatisticsError(f"stored rows of {statistics.config_id!r} are not those its statistics were made from")
    return rows
