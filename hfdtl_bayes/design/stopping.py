"""What a verdict is expected to say after traffic that has not been sent yet (preposterior analysis: Raiffa & Schlaifer 1961).

Before a segment is measured, the errors that its judging blocks will show are already predicted. Given a draw of the scales, with C the
covariance that calibration will leave (which does not depend on what is observed), a judging row of relative design z in block B will be

    y = 1 + z'd + d_B + eps,    d ~ Normal(0, C),    d_B ~ Normal(0, omega^2),    eps ~ Normal(0, sigma^2)

relative to what will be predicted for it, and its absolute percentage error |1 - y| / y. d is the same for all rows, so blocks miss
together. Each simulated set of errors, with those of the blocks that judge already, goes the way of the verdict's check of accuracy to the
probability that the MAPE is below the limit. Its mean over simulations is what is expected of it; the share of simulations in which it is
as large as the verdict asks is the chance of passing.

What it approximates: Student's t stands for the verdict's bootstrap-t, which is Student's t where resamples are alike; errors of
blocks at hand stay what they are, though later calibration will move them; and the model is taken at its word, so a lack of fit that no
coefficient stands for is in it only as far as the noise and discrepancy fitted so far contain it. Coverage, kinship and
convergence, which a verdict also asks about, are taken to pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.transfer import VerdictSettings, attainable_mape, evaluate
from hfdtl_bayes.transfer.checks.accuracy import ratio_log_sd
from hfdtl_bayes.transfer.checks.reach import JudgedSettings
from hfdtl_bayes.transfer.evaluation import error_sd

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_MOST_ROWS = 4000
"""Judging rows simulated at most; of more, whole blocks evenly spaced."""
_SMALLEST_TIME = 0.05
"""Simulated times, relative to the predicted one, are not taken to be below this: a normal error could make them negative."""


@dataclass(frozen=True)
class AcceptanceSettings:
    """What a verdict is going to ask, of its own settings, and how its answer is simulated."""

    mape_limit: float = VerdictSettings.mape_limit
    """As in `VerdictSettings`."""
    attainable_slack: float = VerdictSettings.attainable_slack
    """As in `VerdictSettings`."""
    min_probability: float = VerdictSettings.min_probability
    """As in `VerdictSettings`."""
    max_mean_uncertainty: float = VerdictSettings.max_mean_uncertainty
    """As in `VerdictSettings`."""
    min_chance: float = 0.5
    """Share of the outcomes foreseen in which the verdict must accept for it to be expected to: more likely than not, since after each
    segment more is known and the plan is made anew."""
    max_unjudged_share: float = JudgedSettings.max_unjudged_share
    """As in `JudgedSettings`."""
    replicates: int = 8
    """Simulated sets of errors per draw of the scales: with 32 draws the Monte Carlo error of the expected probability is below 0.03."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be met or mean nothing.

        Raises
        ------
        InputError
            Names the setting and what is accepted.
        """
        for name in ("mape_limit", "attainable_slack", "max_mean_uncertainty", "max_unjudged_share"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be a positive number, found {getattr(self, name)}")
        if not 0.5 <= self.min_probability < 1:
            raise InputError(f"min_probability must be from 0.5 to below 1, found {self.min_probability}")
        if not 0 < self.min_chance < 1:
            raise InputError(f"min_chance must lie between 0 and 1, found {self.min_chance}")
        if self.replicates < 1:
            raise InputError(f"replicates must be at least 1, found {self.replicates}")

    @classmethod
    def of(cls, settings: VerdictSettings) -> AcceptanceSettings:
        """Return what a verdict with these settings will ask."""
        return cls(
            mape_limit=settings.mape_limit,
            attainable_slack=settings.attainable_slack,
            min_probability=settings.min_probability,
            max_mean_uncertainty=settings.max_mean_uncertainty,
        )

    def limits(self, posterior: LatencyPosterior, sigma: FloatArray, omega: FloatArray) -> FloatArray:
        """Return the MAPE to stay below as the verdict will set it if noise and drift are these, shape (S,).

        What noise leaves is taken at the noisiest donor's where the target's is larger.
        """
        donors = max((error_sd(posterior, posterior.configuration(d)) for d in posterior.donors), default=float("inf"))
        floors = np.array([attainable_mape(min(own, donors)) for own in np.hypot(sigma, omega)])
        return np.maximum(self.mape_limit, self.attainable_slack * floors)


@dataclass(frozen=True, eq=False)
class PlannedBlocks:
    """Rows that will judge.

    Attributes
    ----------
    design : ndarray, shape (n, K)
        Relative, times the unit of each coefficient.
    blocks : ndarray of int, shape (n,)
        Time block of each, adjacent.
    stratum : ndarray of str, shape (n,)
        What the verdict resamples within: the segment.
    """

    design: FloatArray
    blocks: IntArray
    stratum: NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class JudgedBlocks:
    """Blocks that judge already.

    Attributes
    ----------
    total, count : ndarray, shape (B,)
        Sum of absolute percentage errors and number of rows.
    stratum : ndarray of str, shape (B,)
        Regime.
    """

    total: FloatArray
    count: FloatArray
    stratum: NDArray[np.object_]

    @classmethod
    def none(cls) -> JudgedBlocks:
        """Return no blocks."""
        return cls(np.zeros(0), np.zeros(0), np.zeros(0, dtype=object))

    @classmethod
    def of(
        cls,
        posterior: LatencyPosterior,
        held_out: pd.DataFrame,
        configuration: ServingConfiguration,
        *,
        block_length: int,
        seed: int,
    ) -> JudgedBlocks:
        """Return the blocks of held-out rows under a posterior."""
        found = evaluate(posterior, held_out, configuration, block_length=block_length, seed=seed).block_errors
        return cls(found["error"].to_numpy(float), found["rows"].to_numpy(float), found["regime"].to_numpy(object))


def simulated_probabilities(
    covariance: FloatArray,
    sigma: FloatArray,
    omega: FloatArray,
    planned: Sequence[PlannedBlocks],
    judged: JudgedBlocks,
    limit: FloatArray,
    *,
    replicates: int,
    seed: int,
) -> FloatArray:
    """Return the probability, by the verdict, that the held-out MAPE is below the limit, in each simulation, shape (S * replicates,).

    0 where fewer than two blocks judge.

    Parameters
    ----------
    covariance : ndarray, shape (S, K, K)
        Of the coefficients once everything planned is measured.
    sigma, omega : ndarray, shape (S,)
    planned : sequence of PlannedBlocks
    judged : JudgedBlocks
    limit : ndarray, shape (S,)
        MAPE to stay below.
    replicates, seed : int
    """
    design, blocks, stratum = _joined(planned, covariance.shape[-1])
    sizes = np.bincount(blocks) if len(blocks) else np.zeros(0, dtype=np.int64)
    sims = len(sigma) * replicates
    if len(sizes) + len(judged.count) < 2:
        return np.zeros(sims)
    rng = np.random.default_rng([seed, 23])
    values, vectors = np.linalg.eigh(covariance)
    roots = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    total = np.empty((sims, len(sizes)))
    squares = np.empty(sims)
    for s in range(len(sigma)):
        own = slice(s * replicates, (s + 1) * replicates)
        off = rng.standard_normal((replicates, design.shape[1])) @ roots[s].T @ design.T
        drift = omega[s] * rng.standard_normal((replicates, len(sizes)))
        time = 1.0 + off + drift[:, blocks] + sigma[s] * rng.standard_normal(off.shape)
        error = np.abs(1.0 - 1.0 / np.maximum(time, _SMALLEST_TIME))
        total[own] = np.add.reduceat(error, np.r_[0, np.cumsum(sizes)[:-1]], axis=1) if len(sizes) else 0.0
        squares[own] = (error**2).sum(axis=1)
    firsts = np.r_[0, np.cumsum(sizes)[:-1]] if len(sizes) else np.zeros(0, dtype=np.int64)
    total = np.concatenate([np.broadcast_to(judged.total, (sims, len(judged.total))), total], axis=1)
    count = np.r_[judged.count, sizes.astype(float)]
    groups = _groups(np.r_[judged.stratum, stratum[firsts]])
    return _student_probability(total, count, groups, squares, int(sizes.sum()), np.repeat(limit, replicates))


def _joined(planned: Sequence[PlannedBlocks], coefficients: int) -> tuple[FloatArray, IntArray, NDArray[np.object_]]:
    """Return designs, blocks numbered from 0 without gaps, and strata of all planned rows, or of evenly spaced blocks of very many."""
    kept = [p for p in planned if len(p.blocks)]
    if not kept:
        return np.zeros((0, coefficients)), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=object)
    design = np.concatenate([p.design for p in kept])
    change = np.concatenate([np.r_[True, np.diff(p.blocks) != 0] for p in kept])
    blocks = np.cumsum(change) - 1
    stratum = np.concatenate([p.stratum for p in kept])
    if len(blocks) > _MOST_ROWS:
        some = np.unique(np.linspace(0, blocks[-1], max(int((blocks[-1] + 1) * _MOST_ROWS / len(blocks)), 2)).astype(np.int64))
        rows = np.isin(blocks, some)
        design, stratum = design[rows], stratum[rows]
        blocks = np.unique(blocks[rows], return_inverse=True)[1]
    return design, blocks.astype(np.int64), stratum


def _groups(stratum: NDArray[np.object_]) -> list[IntArray]:
    """Return the blocks of each stratum; all together where one has a single block, which tells nothing of its spread."""
    groups = [np.flatnonzero(stratum == s) for s in pd.unique(stratum)]
    return groups if min(map(len, groups)) > 1 else [np.arange(len(stratum))]


def _student_probability(
    total: FloatArray, count: FloatArray, groups: list[IntArray], squares: FloatArray, rows: int, limit: FloatArray
) -> FloatArray:
    """Return P(ratio below limit) by Student's t on the log scale, as the verdict's where its bootstrap knows no better, shape (sims,)."""
    ratio = total.sum(axis=1) / count.sum()
    sd = ratio_log_sd(total, np.broadcast_to(count, total.shape), groups)
    # Rows of a block are taken to tell no more than independent ones would.
    mean = total[:, total.shape[1] - _planned(count, rows) :].sum(axis=1) / max(rows, 1)
    spread = np.sqrt(np.maximum(squares / max(rows, 1) - mean**2, 0.0))
    sd = np.maximum(sd, np.where(rows > 0, spread / np.sqrt(count.sum()) / ratio, 0.0))
    degrees = len(count) - len(groups)
    degrees = max(degrees - 1, 1) if len(count) < 5 else degrees
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = (np.log(limit) - np.log(ratio)) / sd
    return np.asarray(np.where(np.isfinite(statistic), t.cdf(statistic, degrees), ratio < limit))


def _planned(count: FloatArray, rows: int) -> int:
    """Return how many of the last blocks hold so many rows."""
    return int(np.searchsorted(np.cumsum(count[::-1]), rows - 0.5)) + 1 if rows else 0
