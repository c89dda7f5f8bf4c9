"""Sufficient statistics of one configuration: orthogonal factors from which any row order, split or chunking gives the same.

With rows divided by their scale s, a step's error is eps_i + d_B: independent noise of sd
sigma plus a drift of sd omega shared by the steps of time block B. Within a block of m rows, the m - 1 Helmert contrasts have
variance sigma^2 and the block total divided by sqrt(m) has variance sigma^2 + m omega^2, all independent. So the triangular QR
factor of the contrasts, and one of the block totals for each block size m, are sufficient; everything right of here costs the
same for fifty thousand rows as for five billion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import StatisticsError
from hfdtl_bayes.features import FeatureSet, response
from hfdtl_bayes.statistics.dependence import DEFAULT_BLOCK_LENGTH, choose_block_length
from hfdtl_bayes.statistics.pilot import (
    check_scaling,
    config_to_constant,
    constant_s,
    fit_row_scaling,
    startup_rows,
)
from hfdtl_bayes.statistics.scaling import Downweighted, RowScaling, block_starts, count_downweighted
from hfdtl_bayes.traces import time_blocks

FloatArray = NDArray[np.float64]

_SMALLEST_NOISE = 1e-6
"""Relative noise below which rows are taken to be free of it."""

_DEPENDENT = 1e-9
"""Part of a column, relative to its length, below which it is rounding error: it would be worth nothing as information."""


@dataclass(frozen=True)
class Stratum:
    """The triangular factor of rows that share one error variance sigma^2 + multiplier * omega^2.

    Parameters
    ----------
    multiplier : int
        0 for the contrasts within blocks, m for the totals of blocks of m rows (of weight m, rounded, with down-weighted rows).
    count : int
        Number of independent rows the factor stands for.
    triangle : ndarray, shape (min(count, K + 1), K + 1)
        R of the QR factorisation of [X, y] scaled.
    """

    multiplier: int
    count: int
    triangle: FloatArray

    def merge(self, other: Stratum) -> Stratum:
        """Return the stratum of both sets of rows together."""
        stacked = np.vstack([self.triangle, other.triangle])
        return Stratum(self.multiplier, self.count + other.count, triangle_of(stacked))


def triangle_of(rows: FloatArray) -> FloatArray:
    """Return the R of the QR factorisation of `rows` that is unique: diagonal not negative, dependent columns without a row.

    The scaled columns times the pilot are 1 in every row, so within blocks one column always depends on the others. Its
    diagonal would be rounding error and its row arbitrary; here its row is zero and what else it held goes to the rows
    below, so that the same rows in any order or chunks give the same factor.

    Parameters
    ----------
    rows : ndarray, shape (n, p)

    Returns
    -------
    ndarray, shape (min(n, p), p)
        Row j belongs to column j; with fewer rows than columns, the rows of the independent columns come first.
    """
    left = np.linalg.qr(rows, mode="r")
    n, p = left.shape
    smallest = _DEPENDENT * np.linalg.norm(left, axis=0)
    triangle, at = np.zeros((n, p)), 0
    for j in range(p):
        if not len(left):
            break
        if abs(left[0, j]) > smallest[j]:
            triangle[at if n < p else j, j:] = left[0, j:] * np.sign(left[0, j])
            left, at = left[1:], at + 1
        elif j + 1 < p:
            rest = np.linalg.qr(left[:, j + 1 :], mode="r")
            left = np.hstack([np.zeros((len(rest), j + 1)), rest])
    return triangle


@dataclass(frozen=True)
class ConfigStatistics:
    """Everything inference needs to know of one configuration's rows.

    Attributes
    ----------
    configuration : ServingConfiguration
    feature_set : str
        Name of the feature set.
    quantity : str
    coef_names : tuple of str
        Names of the K columns, in order.
    scaling : RowScaling
        What gave the rows their scale and weight.
    block_length : int
        Steps per drift block; drift between blocks of another length is another quantity.
    constant_s : float
        Seconds that one unit of the constant is worth.
    config_row : ndarray, shape (G,)
        Config features as multiples of the constant.
    rows : int
        Number of observations.
    blocks : int
        Number of drift blocks.
    log_scale_sum : float
        Sum of log s_i, the Jacobian of the scaling: needed to compare models on the scale of seconds. The scale s_i of a
        down-weighted row is the larger one.
    total_s : float
        Sum of the observations, seconds.
    downweighted : Downweighted
        Outliers and start-up, counted.
    strata : tuple of Stratum
        Sorted by multiplier; the first is the one within blocks.
    """

    configuration: ServingConfiguration
    feature_set: str
    quantity: str
    coef_names: tuple[str, ...]
    scaling: RowScaling
    block_length: int
    constant_s: float
    config_row: FloatArray
    rows: int
    blocks: int
    log_scale_sum: float
    total_s: float
    downweighted: Downweighted
    strata: tuple[Stratum, ...]

    @property
    def config_id(self) -> str:
        """Identifier of the configuration."""
        return self.configuration.config_id

    @property
    def pilot(self) -> FloatArray:
        """Coefficients of the pilot that gave the row scale, shape (K,)."""
        return self.scaling.pilot

    @property
    def floor_s(self) -> float:
        """Floor of the row scale, seconds."""
        return self.scaling.floor_s

    def merge(self, other: ConfigStatistics) -> ConfigStatistics:
        """Return the statistics of both sets of rows together; no block may be in both.

        Raises
        ------
        StatisticsError
            If they are of different configurations, features, scales or block lengths; says which.
        """
        scaling = self.scaling.difference(other.scaling)
        for name, mine, theirs in (
            ("configuration", self.configuration, other.configuration),
            ("feature set", (self.feature_set, self.quantity), (other.feature_set, other.quantity)),
            ("columns", self.coef_names, other.coef_names),
            (scaling, None, scaling),
            ("block length", self.block_length, other.block_length),
        ):
            if mine != theirs:
                raise StatisticsError(
                    f"statistics of {self.config_id!r} and {other.config_id!r} cannot be merged: different {name}. Build both "
                    "with the same configuration, feature set, block length and scaling"
                )
        strata = {s.multiplier: s for s in self.strata}
        for stratum in other.strata:
            own = strata.get(stratum.multiplier)
            strata[stratum.multiplier] = own.merge(stratum) if own else stratum
        return replace(
            self,
            rows=self.rows + other.rows,
            blocks=self.blocks + other.blocks,
            log_scale_sum=self.log_scale_sum + other.log_scale_sum,
            total_s=self.total_s + other.total_s,
            downweighted=self.downweighted.merge(other.downweighted),
            strata=tuple(strata[m] for m in sorted(strata)),
        )


def split_blocks(rows: FloatArray, blocks: NDArray[np.int64], weight: FloatArray | None = None) -> list[tuple[int, FloatArray]]:
    """Rotate each block of rows into Helmert contrasts and a total.

    For the j-th row of a block (j from 1): contrast = (mean of the rows before it - row) * sqrt(j / (j + 1)); total =
    sum / sqrt(m). The rotation is orthogonal.

    Only the noise of a down-weighted row is larger, sigma / sqrt(w_i); the drift of its block is what it is. Divided by its scale, which
    the root of the weight has inflated, its drift is sqrt(w_i) d_B. So the rotation is along sqrt(w) in place of (1, ..., 1): with W_j
    the sum of the first j weights, contrast = (weighted mean of the rows before it - row) * sqrt(w_j W_(j - 1) / W_j), of variance
    sigma^2, and total = weighted sum / sqrt(W_m), of variance sigma^2 + W_m omega^2. W_m is rounded to a whole number, so that
    the number of strata stays bounded: the drift of such a block is given a variance wrong by less than 1 / (2 W_m) of itself.

    Parameters
    ----------
    rows : ndarray, shape (n, p)
        Divided by their scale, root of the weight included.
    blocks : ndarray of int, shape (n,)
        Block numbers, equal values adjacent.
    weight : ndarray, shape (n,), optional
        Of each row; 1 by default.

    Returns
    -------
    list of (multiplier, rows)
        The contrasts under multiplier 0 and the totals under their block size or rounded weight; empty ones left out.
    """
    starts, sizes = block_starts(blocks)
    weighted = np.zeros(len(starts), dtype=bool) if weight is None else np.minimum.reduceat(weight, starts) < 1
    parts: dict[int, list[FloatArray]] = {}
    # Sums run within blocks only: along a long recording they would lose digits.
    for m in np.unique(sizes):
        plain = rows[starts[(sizes == m) & ~weighted][:, None] + np.arange(m)]
        sums = np.cumsum(plain, axis=1)
        parts.setdefault(int(m), []).append(sums[:, -1] / np.sqrt(m))
        j = np.arange(1.0, m)[:, None]
        contrasts = (sums[:, :-1] / j - plain[:, 1:]) * np.sqrt(j / (j + 1))
        parts.setdefault(0, []).append(contrasts.reshape(-1, rows.shape[1]))
    for m in np.unique(sizes[weighted]):
        at = starts[(sizes == m) & weighted][:, None] + np.arange(m)
        own, w = rows[at], np.asarray(weight)[at][:, :, None]
        sums, total = np.cumsum(np.sqrt(w) * own, axis=1), np.cumsum(w, axis=1)
        contrasts = sums[:, :-1] * np.sqrt(w[:, 1:] / (total[:, :-1] * total[:, 1:])) - own[:, 1:] * np.sqrt(
            total[:, :-1] / total[:, 1:]
        )
        parts[0].append(contrasts.reshape(-1, rows.shape[1]))
        last = sums[:, -1] / np.sqrt(total[:, -1])
        multiplier = np.rint(total[:, -1, 0]).astype(int)
        for whole in np.unique(multiplier):
            parts.setdefault(int(whole), []).append(last[multiplier == whole])
    stacked = {m: np.vstack(found) for m, found in sorted(parts.items())}
    return [(m, found) for m, found in stacked.items() if len(found)]


def statistics_from_rows(
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    feature_set: FeatureSet,
    *,
    block_length: int | Literal["auto"] = DEFAULT_BLOCK_LENGTH,
    outlier_cutoff: float | None = None,
    scaling: RowScaling | None = None,
    pilot: Sequence[float] | FloatArray | None = None,
) -> ConfigStatistics:
    """Reduce trace rows to sufficient statistics.

    Parameters
    ----------
    frame : DataFrame
        Validated rows in time order.
    configuration : ServingConfiguration
    feature_set : FeatureSet
    block_length : int or "auto"
        Steps per drift block; "auto" chooses from the autocorrelation of these rows' residuals, see `choose_block_length`.
    outlier_cutoff : float, optional
        Robust sds beyond which a row is down-weighted, infinity for never; that of `OUTLIER_CUTOFFS` by default. Of no effect with
        `scaling` or `pilot`.
    scaling : RowScaling, optional
        That of an earlier batch of the same configuration, so that the two can be merged; fitted from these rows by default.
    pilot : array, shape (K,), optional
        Instead of `scaling`: pilot coefficients that give the scale, no row down-weighted.

    Returns
    -------
    ConfigStatistics

    Raises
    ------
    StatisticsError
        If there are no rows, a value is not finite, the pilot is not K finite numbers, both scaling and pilot are given, or one of
        them with block length "auto".
    InputError
        If a column is missing.
    """
    if frame.empty:
        raise StatisticsError(f"configuration {configuration.config_id!r}: no rows to fit; give at least one")
    design = feature_set.design(frame, configuration)
    observed = response(frame, feature_set.quantity)
    finite = np.isfinite(observed)
    if not finite.all():
        raise StatisticsError(
            f"configuration {configuration.config_id!r}: {feature_set.quantity} is not finite in {int((~finite).sum())} of "
            f"{len(frame)} rows, the first is row {int(np.argmin(finite))}; drop unfinished requests and damaged rows first"
        )
    given = _given_scaling(scaling, pilot, feature_set, configuration)
    if block_length == "auto":
        if given:
            raise StatisticsError(
                f"configuration {configuration.config_id!r}: a batch with a given scaling needs the block length of the batch it is to "
                'be merged with, not "auto"'
            )
        blocks = time_blocks(frame, DEFAULT_BLOCK_LENGTH)
        scaling = fit_row_scaling(design, observed, blocks, feature_set, configuration, outlier_cutoff)
        residuals = (observed - design @ scaling.pilot) / scaling.rows(design, observed, blocks)[0]
        block_length = choose_block_length(residuals, frame).length
    blocks = time_blocks(frame, block_length)
    scaling = given or fit_row_scaling(design, observed, blocks, feature_set, configuration, outlier_cutoff)
    scale, weight = scaling.rows(design, observed, blocks)
    # Rows with a given scaling are a batch from anywhere in a recording, whose start is not known here.
    startup = 0 if given else startup_rows(scaling, design, observed)
    scaled = np.column_stack([design, observed]) / scale[:, None]
    strata = [Stratum(m, len(r), triangle_of(r)) for m, r in split_blocks(scaled, blocks, weight)]
    return ConfigStatistics(
        configuration=configuration,
        feature_set=feature_set.name,
        quantity=feature_set.quantity,
        coef_names=feature_set.coef_names,
        scaling=scaling,
        block_length=block_length,
        constant_s=constant_s(feature_set, configuration),
        config_row=config_to_constant(feature_set, configuration),
        rows=len(frame),
        blocks=int(blocks[-1]) + 1,
        log_scale_sum=float(np.log(scale).sum()),
        total_s=float(observed.sum()),
        downweighted=count_downweighted(observed, scaling.mean_s(design), weight, frame["regime"].to_numpy(), startup),
        strata=tuple(strata),
    )


def _given_scaling(
    scaling: RowScaling | None,
    pilot: Sequence[float] | FloatArray | None,
    feature_set: FeatureSet,
    configuration: ServingConfiguration,
) -> RowScaling | None:
    """Return the scaling a caller gave, checked, or None if it is to be fitted."""
    if scaling is not None and pilot is not None:
        raise StatisticsError(f"configuration {configuration.config_id!r}: give a scaling or a pilot, not both")
    if pilot is not None:
        scaling = RowScaling(np.asarray(pilot, float), feature_set.noise_floor(configuration))
    if scaling is not None:
        check_scaling(scaling, feature_set, configuration)
    return scaling


@dataclass(frozen=True)
class PseudoRows:
    """The statistics of several configurations as flat arrays: what the model's likelihood reads.

    Attributes
    ----------
    r : ndarray, shape (P, K)
        Pseudo-row designs; with `z` they carry the whole Gaussian likelihood of the coefficients.
    z : ndarray, shape (P,)
    config, multiplier : ndarray of int, shape (P,)
        Configuration of each pseudo-row and its drift multiplier.
    rss, dof : ndarray, shape (Q,)
        Residual sums of squares and their degrees of freedom.
    rss_config, rss_multiplier : ndarray of int, shape (Q,)
    """

    r: FloatArray
    z: FloatArray
    config: NDArray[np.int64]
    multiplier: FloatArray
    rss: FloatArray
    dof: FloatArray
    rss_config: NDArray[np.int64]
    rss_multiplier: FloatArray


def pseudo_rows(statistics: Sequence[ConfigStatistics]) -> PseudoRows:
    """Flatten the statistics of several configurations.

    A factor of K + 1 rows gives K pseudo-rows z ~ Normal(R theta, sd) and one residual sum of squares with count - K
    degrees of freedom; a factor of fewer rows gives pseudo-rows only.
    """
    k = len(statistics[0].coef_names)
    r, config, multiplier = [], [], []
    rss, dof, rss_config, rss_multiplier = [], [], [], []
    for c, own in enumerate(statistics):
        for stratum in own.strata:
            rows = min(len(stratum.triangle), k)
            r.append(stratum.triangle[:rows])
            config += [c] * rows
            multiplier += [float(stratum.multiplier)] * rows
            if stratum.count > k:
                # Rows that fit to rounding error would make the noise exactly zero, which no density allows.
                dof.append(float(stratum.count - k))
                rss.append(max(float(stratum.triangle[k, k]) ** 2, dof[-1] * _SMALLEST_NOISE**2))
                rss_config.append(c)
                rss_multiplier.append(float(stratum.multiplier))
    stacked = np.vstack(r)
    return PseudoRows(
        r=np.ascontiguousarray(stacked[:, :k]),
        z=np.ascontiguousarray(stacked[:, k]),
        config=np.array(config, dtype=np.int64),
        multiplier=np.array(multiplier),
        rss=np.array(rss),
        dof=np.array(dof),
        rss_config=np.array(rss_config, dtype=np.int64),
        rss_multiplier=np.array(rss_multiplier),
    )
