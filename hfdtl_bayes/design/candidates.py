"""Rows that may be chosen and the traffic that matters, as arrays: relative designs, time blocks, bins, costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.traces import time_blocks

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

BIN_COLUMNS = ("waiting_requests", "kv_usage")
"""Columns that coverage is asked over, where a pool has them."""

MISFIT_KNOTS = 7
"""Knots of the bend, two octaves apart: 1, 4, ... 4,096 tokens. Twice as many choose no better rows and take twice as long."""

_KV_BINS = 4
"""Equal bins of the share of the KV cache in use."""

_STORED = 2**28
"""Bytes of products of features that are kept between picks; for more candidates they are formed again each time."""
_CHUNK = 4096
"""Candidates evaluated at once, so that their arrays stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Rows to choose from.

    Attributes
    ----------
    design : ndarray, shape (n, K)
        Features over the row's expected value (or the noise floor), times the unit of each coefficient: the relative derivative of a
        step's time by each coefficient.
    blocks : ndarray of int, shape (n,)
        Time block of each row; rows of one share a drift.
    cost_s : ndarray, shape (n,)
        Seconds of GPU time that a row takes.
    bins : ndarray of int, shape (n,)
        Bin of queue depth and KV usage; all 0 where neither is known.
    taken : ndarray of int
        Rows that the posterior was calibrated on already, which cannot be chosen again but share the drift of their blocks.
    """

    design: FloatArray
    blocks: IntArray
    cost_s: FloatArray
    bins: IntArray
    taken: IntArray

    @cached_property
    def _pairs(self) -> tuple[IntArray, IntArray]:
        """Indices of the upper triangle of a K by K matrix."""
        return np.triu_indices(self.design.shape[1])

    @cached_property
    def _products(self) -> FloatArray | None:
        i, j = self._pairs
        if len(self.design) * len(i) * 8 > _STORED:
            return None
        return np.asarray(self.design[:, i] * self.design[:, j])

    def quadratic_forms(self, matrices: FloatArray) -> Iterator[tuple[slice, FloatArray]]:
        """Yield x' A x of all rows for each of Q symmetric matrices part by part: which rows, and the forms, shape (rows, Q).

        Each part is one matrix product with the products of features, which runs at the processor's speed where other ways run at the
        memory's. The array is overwritten by the next part.

        Parameters
        ----------
        matrices : ndarray, shape (Q, K, K)
        """
        i, j = self._pairs
        flat = np.ascontiguousarray((matrices[:, i, j] * np.where(i == j, 1.0, 2.0)).T)
        kept, out = self._products, np.empty((_CHUNK, len(matrices)))
        for start in range(0, len(self.design), _CHUNK):
            part = slice(start, min(start + _CHUNK, len(self.design)))
            own = self.design[part]
            products = own[:, i] * own[:, j] if kept is None else kept[part]
            yield part, np.matmul(products, flat, out=out[: len(own)])


def relative_design(
    posterior: LatencyPosterior, frame: pd.DataFrame, configuration: ServingConfiguration, scale: FloatArray, what: str
) -> tuple[FloatArray, FloatArray]:
    """Return designs over the expected values of rows, shape (n, K), and those expected values, seconds, at least the noise floor.

    Raises
    ------
    InputError
        If there are no rows, a column is missing or not finite, or the feature set does not describe a row.
    """
    if frame.empty:
        raise InputError(f"{what} of {configuration.config_id!r} is empty; give at least one row")
    features = posterior.feature_set
    outside = ~features.supported(frame, configuration)
    if outside.any():
        raise InputError(
            f"{what} of {configuration.config_id!r}: feature set {features.name!r} does not describe {int(outside.sum())} of {len(frame)} "
            f"rows, the first is row {frame.index[int(np.argmax(outside))]}; pass them through usable_rows first"
        )
    design = features.design(frame, configuration)
    expected = posterior.scale_s(posterior.expected_s(frame, configuration), configuration)
    return design * scale / expected[:, None], expected


def misfit_columns(frame: pd.DataFrame, expected_s: FloatArray) -> FloatArray:
    """Return columns whose independent coefficients are a smooth bend of the relative error, shape (n, `MISFIT_KNOTS`).

    Hats over log2 of the tokens of a step, the coordinate of the features `roofline-discrepancy`; for rows that are no steps over
    log2 of the expected time in milliseconds. Rows alike share their misfit, however often they are measured.

    Parameters
    ----------
    frame : DataFrame, n rows
    expected_s : ndarray, shape (n,)
    """
    tokens = {"prefill_tokens", "decode_tokens"} <= set(frame.columns)
    size = (frame["prefill_tokens"] + frame["decode_tokens"]).to_numpy(dtype=float) if tokens else 1e3 * expected_s
    place = np.clip(0.5 * np.log2(np.maximum(size, 1.0)), 0.0, MISFIT_KNOTS - 1.0)
    return np.asarray(np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(MISFIT_KNOTS))))


def coverage_bins(frame: pd.DataFrame) -> IntArray | None:
    """Return the bin of each row, shape (n,): none, few or many waiting, by quarters of the KV cache in use; None if neither is known.

    Few is up to the median of the rows with requests waiting. Numbers of occupied bins are 0, 1, ... without gaps.
    """
    codes = np.zeros(len(frame), dtype=np.int64)
    known = False
    if "waiting_requests" in frame.columns and frame["waiting_requests"].notna().all():
        known = True
        waiting = frame["waiting_requests"].to_numpy(dtype=float)
        some = waiting[waiting > 0]
        codes = np.where(waiting > 0, 1 + (waiting > np.median(some)), 0) if len(some) else codes
    if "kv_usage" in frame.columns and frame["kv_usage"].notna().all():
        known = True
        usage = np.clip((frame["kv_usage"].to_numpy(dtype=float) * _KV_BINS).astype(np.int64), 0, _KV_BINS - 1)
        codes = codes * _KV_BINS + usage
    return np.unique(codes, return_inverse=True)[1].astype(np.int64) if known else None


def candidates_of(
    posterior: LatencyPosterior,
    pool: pd.DataFrame,
    configuration: ServingConfiguration,
    scale: FloatArray,
    *,
    block_length: int,
    cost: str | None,
    key: str,
) -> Candidates:
    """Return the rows of a pool as arrays.

    Parameters
    ----------
    posterior : LatencyPosterior
        Rows of the pool that its target was calibrated on are marked as taken.
    pool : DataFrame, n rows
        In time order; labels are not read.
    configuration : ServingConfiguration
    scale : ndarray, shape (K,)
        Unit of each coefficient.
    block_length : int
    cost : str, optional
        Column of seconds that a row costs; its expected time by default.
    key : str
        Column that identifies a row.

    Raises
    ------
    InputError
        If the pool is empty, an identifier or index label stands twice, or a cost is not a positive number.
    UnknownNameError
        If there is no such column of costs.
    """
    design, expected = relative_design(posterior, pool, configuration, scale, "the pool")
    for what, values in (("row label", pool.index.to_series()), *(((key, pool[key]),) if key in pool.columns else ())):
        twice = values.duplicated()
        if twice.any():
            raise InputError(
                f"the pool of {configuration.config_id!r} holds {int(twice.sum())} row(s) whose {what} stands there before, the first is "
                f"{values[twice].iloc[0]}: a row can be measured once. Drop the copies, or number the rows anew (reset_index)"
            )
    cost_s = expected
    if cost is not None:
        if cost not in pool.columns:
            raise UnknownNameError(f"no column {cost!r} of costs in the pool; it has {', '.join(map(str, pool.columns))}")
        cost_s = pd.to_numeric(pool[cost], errors="coerce").to_numpy(dtype=float)
        bad = ~(np.isfinite(cost_s) & (cost_s > 0))
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(
                f"column {cost!r} must hold positive seconds, found {pool[cost].iloc[row]} in row {pool.index[row]} "
                f"({int(bad.sum())} such row(s))"
            )
    bins = coverage_bins(pool)
    taken = np.zeros(0, dtype=np.int64)
    if posterior.target == configuration.config_id:
        taken = np.flatnonzero(pool.index.isin(posterior.calibration_rows)).astype(np.int64)
    if len(taken) == len(pool):
        raise InputError(
            f"every one of the {len(pool)} rows of the pool was calibrated on already, so none is left to choose; give other rows"
        )
    bins = np.zeros(len(pool), dtype=np.int64) if bins is None else bins
    return Candidates(design, time_blocks(pool, block_length), cost_s, bins, taken)
