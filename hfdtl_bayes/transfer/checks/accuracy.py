"""P(MAPE < limit) and P(RMSE < limit) on rows not calibrated on, honest with few time blocks.

Rows of one block share the machine's speed, so blocks are the units: the error is a ratio estimate, sum of block errors over sum of
block rows, with regimes as strata. A percentile bootstrap of few blocks is too confident: with three it calls a limit met that
the true error touches in a third of cases where one in ten was asked for. Here the log of the ratio is studentised: with
five blocks or more against the bootstrap's own distribution of the studentised log ratio (Efron & Tibshirani 1993, ch. 12;
the bootstrap-t), with fewer against Student's t with one degree of freedom less than there are, for the skewness of a mean of
absolute errors. The variance is at least that of independent rows, so that blocks alike by chance do not pass for certainty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm, t

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.transfer.checks.check import Check, Status
from hfdtl_bayes.transfer.checks.evidence import Evidence, Traffic, block_sums
from hfdtl_bayes.transfer.evaluation import HeldOut

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FloatArray = NDArray[np.float64]

MAPE, RMSE = "accuracy", "rmse"

_BOOTSTRAP_FROM = 5
"""Blocks from which the bootstrap-t is used: fewer have too few distinct resamples."""

_LOO_BLOCKS = 400
_DRAWS, _ROWS = 400, 300


@dataclass(frozen=True)
class AccuracySettings:
    """Limits of the error, each with its reason."""

    mape_limit: float = 0.10
    """What BLIS's guide promises its users for requests."""
    attainable_slack: float = 1.3
    """Where noise alone exceeds the limit no model can meet it: then the error may be this many times the attainable. The
    attainable is taken at the noise of the noisiest donor where the target's is larger, since a fit that misses its own rows takes
    the misfit for noise."""
    rmse_limit_s: float | None = None
    """Limit of the root mean squared error in seconds; none by default, since it depends on the use."""
    min_probability: float = 0.9
    """Probability that the held-out error is below the limit for an accept."""
    bootstrap: int = 1000
    """Block bootstrap resamples: Monte Carlo error of a probability below 0.016."""


@dataclass(frozen=True, eq=False)
class Ratio:
    """A mean over rows, estimated from blocks.

    Attributes
    ----------
    total, count : ndarray, shape (B,)
        Sum of the errors and number of rows of each block.
    stratum : ndarray, shape (B,)
        Regime of each block.
    """

    total: FloatArray
    count: FloatArray
    stratum: NDArray[np.object_]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.total)

    @property
    def value(self) -> float:
        """The mean over all rows."""
        return float(self.total.sum() / self.count.sum())


def ratio_log_sd(total: FloatArray, count: FloatArray, groups: list[NDArray[np.int64]]) -> FloatArray:
    """Return the sd of the log of ratio estimates, by linearisation within strata, shape (resamples,); leading dimension resamples."""
    ratio = total.sum(axis=-1) / count.sum(axis=-1)
    residual = total - ratio[..., None] * count
    variance = np.zeros(ratio.shape)
    for own in groups:
        part = residual[..., own]
        variance += len(own) / max(len(own) - 1, 1) * ((part - part.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(variance) / total.sum(axis=-1))


def _strata(ratio: Ratio) -> list[NDArray[np.int64]]:
    """Return the blocks of each regime; all together where a regime has one block only, which tells nothing of its spread."""
    groups = [np.flatnonzero(ratio.stratum == r) for r in pd.unique(ratio.stratum)]
    return groups if min(map(len, groups)) > 1 else [np.arange(ratio.blocks)]


def probability_ratio_below(ratio: Ratio, limit: float, resamples: int, seed: int, least_log_sd: float = 0.0) -> float:
    """Return the probability that the mean is below `limit`, as a confidence distribution; not a number with one block.

    Parameters
    ----------
    ratio : Ratio
        Of non-negative errors.
    limit : float
    resamples, seed : int
        Of the bootstrap.
    least_log_sd : float
        The sd of the log is taken to be no less.
    """
    kept = ratio.count > 0
    ratio = Ratio(ratio.total[kept], ratio.count[kept], ratio.stratum[kept])
    blocks = ratio.blocks
    if blocks < 2:
        return float("nan")
    if not ratio.value > 0:
        return float(limit > 0)
    groups = _strata(ratio)
    sd = max(float(ratio_log_sd(ratio.total[None], ratio.count[None], groups)[0]), least_log_sd)
    if not sd > 0:
        return float(ratio.value < limit)
    statistic = (np.log(limit) - np.log(ratio.value)) / sd
    degrees = blocks - len(groups)
    if blocks < _BOOTSTRAP_FROM:
        return float(t.cdf(statistic, max(degrees - 1, 1)))
    rng = np.random.default_rng(seed)
    index = np.concatenate([own[rng.integers(0, len(own), (resamples, len(own)))] for own in groups], axis=1)
    places, at = [], 0
    for own in groups:
        places.append(np.arange(at, at + len(own)))
        at += len(own)
    total, count = ratio.total[index], ratio.count[index]
    spread = np.maximum(ratio_log_sd(total, count, places), least_log_sd)
    with np.errstate(divide="ignore", invalid="ignore"):
        pivot = (np.log(total.sum(axis=1) / count.sum(axis=1)) - np.log(ratio.value)) / spread
    # The estimate lies below the truth as resamples lie below the estimate: P(truth < limit) = P(-pivot* < statistic).
    below = float(np.mean(-pivot[np.isfinite(pivot)] < statistic))
    # Where resamples are all alike the bootstrap knows nothing; Student's t bounds it.
    return min(below, float(t.cdf(statistic, degrees))) if statistic > 0 else below


def probability_below(held_out: HeldOut, limit: float, resamples: int, seed: int, *, rmse: bool = False) -> float:
    """Return the probability that the MAPE (or the RMSE in seconds) is below `limit`; not a number with one block.

    Parameters
    ----------
    held_out : HeldOut
    limit : float
    resamples, seed : int
    rmse : bool
    """
    blocks = held_out.block_errors
    names = ("squared", "size") if rmse else ("error", "rows")
    total, count = (blocks[n].to_numpy(dtype=float) for n in names)
    ratio = Ratio(total, count, blocks["regime"].to_numpy())
    return probability_ratio_below(ratio, limit**2 if rmse else limit, resamples, seed)


def row_errors(traffic: Traffic) -> FloatArray:
    """Return the absolute percentage error of each row, 0 where it does not count, shape (n,)."""
    return np.where(traffic.scored, np.abs(traffic.observed - traffic.expected) / np.maximum(traffic.observed, 1e-300), 0.0)


def _block_ratio(traffic: Traffic) -> Ratio:
    return Ratio(
        block_sums(row_errors(traffic), traffic.block), block_sums(traffic.scored.astype(float), traffic.block), _first(traffic)
    )


def held_out_probability(evidence: Evidence, settings: AccuracySettings, *, seed: int = 0) -> float:
    """Return the probability that the MAPE is below the limit; not a number without held-out rows, or with one block of them."""
    held = evidence.held_out
    if held is None:
        return float("nan")
    own = row_errors(held)[held.scored]
    independent = float(own.std() / np.sqrt(len(own)) / own.mean()) if len(own) > 1 and own.mean() > 0 else 0.0
    return probability_ratio_below(_block_ratio(held), evidence.limit, settings.bootstrap, seed, independent)


def check_accuracy(evidence: Evidence, settings: AccuracySettings | None = None, *, seed: int = 0) -> Check:
    """Judge the MAPE on held-out rows; without them say what the posterior and left-out calibration blocks suggest, and no more."""
    settings = settings or AccuracySettings()
    held, scores = evidence.held_out, evidence.scores
    if held is None or scores is None:
        return _without_rows(evidence, settings, seed)
    ratio = _block_ratio(held)
    probability = held_out_probability(evidence, settings, seed=seed)
    table = scores.by_regime.reset_index()
    blocks = int((ratio.count > 0).sum())
    message = (
        f"held-out MAPE {scores.mape:.1%} on {scores.rows} rows in {blocks} time block{'s' if blocks != 1 else ''}, "
        f"P(below {evidence.limit:.1%}) = {probability:.3f}, needed {settings.min_probability:g}; "
        f"attainable {scores.attainable_mape:.1%}"
    )

    def draw(axes: Axes) -> None:
        axes.bar(np.arange(ratio.blocks), ratio.total / np.maximum(ratio.count, 1), color="#2a6ebb")
        axes.axhline(evidence.limit, color="#d1610a", label="limit")
        axes.axhline(scores.attainable_mape, color="#666d7a", linestyle="--", label="attainable")
        axes.set_xlabel("held-out time block")
        axes.set_ylabel("MAPE")
        axes.legend(fontsize=8)

    if not np.isfinite(probability):
        advice = "One time block says nothing of the next: hold out at least three."
        return Check(MAPE, Status.CANNOT_SAY, message, advice, table, draw)
    if probability >= settings.min_probability:
        return Check(MAPE, Status.PASS, message, "", table, draw)
    more = blocks_needed(ratio, evidence.limit, settings.min_probability)
    advice = (
        f"The error is below the limit, on too few blocks to be sure: record {more - blocks} more to judge by." if more else ""
    )
    return Check(MAPE, Status.FAIL, message, advice, table, draw)


def _first(traffic: Traffic) -> NDArray[np.object_]:
    """Return the regime of each block."""
    return np.asarray(traffic.regime[np.searchsorted(traffic.block, np.arange(len(traffic.sizes)))])


def blocks_needed(ratio: Ratio, limit: float, probability: float, most: int = 1000) -> int | None:
    """Return how many blocks like these would show the error to be below the limit; None if it is not, or within `most`."""
    if not 0 < ratio.value < limit:
        return None
    sd = float(ratio_log_sd(ratio.total[None], ratio.count[None], [np.arange(ratio.blocks)])[0]) * np.sqrt(ratio.blocks)
    gap = np.log(limit / ratio.value)
    for n in range(ratio.blocks + 1, most):
        if gap / (sd / np.sqrt(n)) >= t.ppf(probability, n - 2):
            return n
    return None


def check_rmse(evidence: Evidence, settings: AccuracySettings, *, seed: int = 0) -> Check:
    """Judge the RMSE in seconds on held-out rows.

    Raises
    ------
    InputError
        If no limit is set.
    """
    if settings.rmse_limit_s is None:
        raise InputError("rmse_limit_s is not set; give the limit of the RMSE in seconds")
    if evidence.scores is None:
        return Check(RMSE, Status.CANNOT_SAY, "there are no held-out rows to measure the RMSE on")
    below = probability_below(evidence.scores, settings.rmse_limit_s, settings.bootstrap, seed, rmse=True)
    message = (
        f"held-out RMSE {evidence.scores.rmse_s:.3g} s, P(below {settings.rmse_limit_s:.3g} s) = {below:.3f}, "
        f"needed {settings.min_probability:g}; attainable {attainable_rmse(evidence):.3g} s"
    )
    table = evidence.scores.by_regime[["rows", "rmse_s"]].reset_index()
    if not np.isfinite(below):
        return Check(RMSE, Status.CANNOT_SAY, message, "Hold out at least three time blocks.", table)
    return Check(RMSE, Status.PASS if below >= settings.min_probability else Status.FAIL, message, "", table)


def attainable_rmse(evidence: Evidence) -> float:
    """Return the RMSE in seconds that noise and drift leave on the held-out rows when the mean is known exactly."""
    assert evidence.held_out is not None
    return float(np.sqrt(sum(evidence.error_variance)) * np.sqrt(np.mean(evidence.held_out.scale**2)))


def expected_mape(evidence: Evidence, traffic: Traffic, covariance: FloatArray, seed: int = 0) -> FloatArray:
    """Return draws of the MAPE on some traffic that the posterior itself expects, shape (draws,).

    Given coefficients m + d the relative error of a row is Normal(z' d, sigma^2 + omega^2), whose mean absolute value is that of a folded
    normal; d ~ Normal(0, C), the same for all rows.

    Parameters
    ----------
    evidence : Evidence
    traffic : Traffic
    covariance : ndarray, shape (K, K)
        C.
    seed : int
    """
    rng = np.random.default_rng([seed, 6])
    rows = np.unique(np.linspace(0, len(traffic.scale) - 1, _ROWS).astype(int))
    off = rng.multivariate_normal(np.zeros(len(covariance)), covariance, _DRAWS, method="eigh") @ traffic.relative_design[rows].T
    sd = float(np.sqrt(sum(evidence.error_variance)))
    folded = sd * np.sqrt(2 / np.pi) * np.exp(-0.5 * (off / sd) ** 2) + off * (1 - 2 * norm.cdf(-off / sd))
    return np.asarray(folded.mean(axis=1))


def left_out_errors(evidence: Evidence, traffic: Traffic) -> tuple[FloatArray, FloatArray, NDArray[np.int64]]:
    """Return absolute percentage errors of calibration rows, each predicted without its own time block, in closed form.

    With S the covariance of a block's errors and Z its rows, the residuals without it are S (S - Z C Z')^-1 r: the update of a Gaussian
    taken back. Of more than 400 blocks evenly spaced ones are taken.

    Returns
    -------
    total, count : ndarray, shape (B,)
        Sum of errors and number of rows of each block.
    blocks : ndarray of int, shape (B,)
        Which blocks.
    """
    noise, drift = evidence.error_variance
    sizes = traffic.sizes
    chosen = np.unique(np.linspace(0, len(sizes) - 1, _LOO_BLOCKS).astype(int))
    starts = np.r_[0, np.cumsum(sizes)]
    total, count = np.zeros(len(chosen)), np.zeros(len(chosen))
    for i, b in enumerate(chosen):
        own = slice(starts[b], starts[b + 1])
        z = traffic.relative_design[own]
        error = noise * np.eye(len(z)) + drift
        left = error - z @ evidence.covariance @ z.T
        low, vectors = np.linalg.eigh(left)
        # A block cannot know the coefficients better than all rows together: rounding and Monte Carlo error could say so.
        inverse = (vectors / np.maximum(low, 1e-3 * noise)) @ vectors.T
        residual = error @ (inverse @ traffic.residual[own])
        scored = traffic.scored[own]
        total[i] = np.abs(residual * traffic.scale[own] / np.maximum(traffic.observed[own], 1e-300))[scored].sum()
        count[i] = scored.sum()
    return total, count, chosen


def _without_rows(evidence: Evidence, settings: AccuracySettings, seed: int) -> Check:
    """Say what can be said where nothing was measured on other traffic."""
    said, table = "nothing was measured on rows not calibrated on", pd.DataFrame()
    failing = False
    if evidence.calibration is not None:
        total, count, chosen = left_out_errors(evidence, evidence.calibration)
        ratio = Ratio(total, count, _first(evidence.calibration)[chosen])
        below = probability_ratio_below(ratio, evidence.limit, settings.bootstrap, seed)
        failing = below < 1 - settings.min_probability
        said += f"; calibration blocks, each left out in turn, have a MAPE of {ratio.value:.1%}, P(below {evidence.limit:.1%}) = {below:.3f}"
        table = pd.DataFrame({"regime": ratio.stratum, "rows": count, "mape": total / np.maximum(count, 1)})
    if evidence.intended is not None:
        forecast = expected_mape(evidence, evidence.intended, evidence.covariance, seed)
        share = float(np.mean(forecast < evidence.limit))
        said += f"; on the intended traffic the posterior itself expects {forecast.mean():.1%}, below the limit with probability {share:.3f}"
    advice = "Record some time blocks of the traffic to be predicted and hold them out."
    return Check(MAPE, Status.FAIL if failing else Status.CANNOT_SAY, said, advice, table)
