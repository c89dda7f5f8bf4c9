"""What the rows of a configuration are worth: how many independent rows would say as much, and which count for less."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.statistics.sufficient import ConfigStatistics

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class EffectiveRows:
    """Rows of one configuration and what they are worth.

    Attributes
    ----------
    config_id : str
    rows, blocks, block_length : int
    level : float
        Independent rows worth as much for the level, a factor common to all coefficients; posterior mean.
    level_low, level_high : float
        Its 95 % interval.
    coefficients : dict of str to float
        The same for each coefficient, the others known; 0 for one whose column is zero. More than `rows` for a coefficient of
        something that changes within blocks, where drift cancels.
    """

    config_id: str
    rows: int
    blocks: int
    block_length: int
    level: float
    level_low: float
    level_high: float
    coefficients: dict[str, float]

    def __str__(self) -> str:
        """Return the worth for a person."""
        return (
            f"{self.config_id}: {self.rows:,} rows in {self.blocks:,} time blocks are worth {self.level:,.0f} independent ones "
            f"({self.level_low:,.0f} to {self.level_high:,.0f})"
        )


def outlier_sentence(statistics: ConfigStatistics) -> str:
    """Return what was down-weighted of a configuration, and a start-up transient, for a person; empty if there is neither."""
    found, name = statistics.downweighted, statistics.config_id
    said = []
    if found.rows:
        regimes = ", ".join(f"{regime} {count}" for regime, count in found.by_regime)
        said.append(
            f"{name}: {found.rows:,} of {statistics.rows:,} rows lie beyond {statistics.scaling.cutoff:g} robust sds and count for less "
            f"({regimes}): {found.time_s / statistics.total_s:.2%} of the time, the longest {found.largest_ratio:.1f} times the expected; "
            f"{found.excess_s / statistics.total_s:.2%} of all time is left out of the means"
        )
    if found.startup_rows:
        said.append(
            f"{name}: the first {found.startup_rows:,} row(s) take several times the expected, a start-up; give them the regime warmup to "
            "leave them out"
        )
    return "\n".join(said)


def information_ratio(statistics: ConfigStatistics, directions: FloatArray, sigma: FloatArray, omega: FloatArray) -> FloatArray:
    """Return the information on directions of coefficient space over that of as many independent rows, shape (S, D).

    With drift, a' (sum over strata of G_m / (sigma^2 + m omega^2)) a; had every row the same total variance and no fellow in its
    block, a' (sum of G_m) a / (sigma^2 + omega^2); G_m = R_m' R_m the Gram matrix of a stratum. For the level of equal
    blocks of m rows the ratio is (sigma^2 + omega^2) / (sigma^2 + m omega^2).

    Parameters
    ----------
    statistics : ConfigStatistics
    directions : ndarray, shape (D, K)
    sigma, omega : ndarray, shape (S,)
        Relative sds of a row's noise and a block's drift.

    Returns
    -------
    ndarray, shape (S, D)
        0 where the rows say nothing.
    """
    k = len(statistics.coef_names)
    lengths = np.stack([((s.triangle[:, :k] @ directions.T) ** 2).sum(axis=0) for s in statistics.strata])
    multiplier = np.array([s.multiplier for s in statistics.strata], dtype=float)
    share = (sigma**2 + omega**2)[:, None] / (sigma[:, None] ** 2 + multiplier * omega[:, None] ** 2)
    total = lengths.sum(axis=0)
    return np.asarray(np.divide(share @ lengths, total, out=np.zeros((len(sigma), len(directions))), where=total > 0))


def effective_rows(statistics: ConfigStatistics, sigma: FloatArray, omega: FloatArray) -> EffectiveRows:
    """Return what the rows of a configuration are worth, over posterior draws of its noise and drift.

    The level is the direction of the pilot, along which every row's scaled mean changes alike.

    Parameters
    ----------
    statistics : ConfigStatistics
    sigma, omega : ndarray, shape (S,)
        Posterior draws of the configuration's.
    """
    directions = np.vstack([statistics.pilot, np.eye(len(statistics.coef_names))])
    worth = statistics.rows * information_ratio(statistics, directions, sigma, omega)
    low, high = np.quantile(worth[:, 0], (0.025, 0.975))
    mean = worth.mean(axis=0)
    return EffectiveRows(
        config_id=statistics.config_id,
        rows=statistics.rows,
        blocks=statistics.blocks,
        block_length=statistics.block_length,
        level=float(mean[0]),
        level_low=float(low),
        level_high=float(high),
        coefficients={name: float(v) for name, v in zip(statistics.coef_names, mean[1:], strict=True)},
    )
