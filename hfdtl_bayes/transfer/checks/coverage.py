"""Whether predictions announce their own error: coverage of intervals, and PIT of block means.

Under the model the block means e of relative errors are jointly Normal(0, D + Zbar C Zbar'), D diagonal with omega^2 + sigma^2 / m: blocks
share the error of the coefficients, so they miss together and are no independent trials. Whitened by the Cholesky factor, each
given those before it, they are independent standard normals, and their probability integral transforms uniform (Rosenblatt 1952;
Dawid 1984, prequential). Rows of one block share a drift, so their own PITs are not tested, only counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binom, chi2, norm

from hfdtl_bayes.transfer.checks.accuracy import Ratio, probability_ratio_below
from hfdtl_bayes.transfer.checks.check import Check, Status
from hfdtl_bayes.transfer.checks.evidence import Evidence, Traffic
from hfdtl_bayes.transfer.evaluation import HeldOut

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FloatArray = NDArray[np.float64]

NAME = "coverage"
_CLIP, _RESAMPLES = 1e-6, 1000


@dataclass(frozen=True)
class CoverageSettings:
    """When intervals are not to be trusted."""

    min_coverage: float = 0.85
    """Below this share of rows, 95 % intervals are not to be trusted: the error is not only large but unannounced."""
    level: float = 0.01
    """Of the test that block means miss no more than their predictions announce."""
    tolerance: float = 0.05
    """Relative error of a block mean that nobody minds: half the limit of the MAPE. Intervals that are too narrow by less are said to be
    so, but are no reason against use."""
    confidence: float = 0.9
    """Probability with which blocks must show the share of rows to lie below `min_coverage`: rows of one block miss together, so over a few
    blocks the share is a rough estimate."""


def block_errors(evidence: Evidence, traffic: Traffic) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return relative errors of block means, the variance of each from noise and drift, and block means of Z.

    Shapes (B,), (B,) and (B, K).
    """
    noise, drift = evidence.error_variance
    means = traffic.block_means(traffic.residual)
    return means, drift + noise / traffic.sizes, traffic.block_means(traffic.relative_design)


def whitened_block_errors(evidence: Evidence, traffic: Traffic) -> FloatArray:
    """Return the error of each block mean given those before, in sds of its prediction, shape (B,).

    Computed by conditioning the coefficients on one block after the other (the innovations of a Kalman filter), which is the Cholesky
    factor's work without a B x B matrix.
    """
    error, variance, z = block_errors(evidence, traffic)
    covariance, shift = evidence.covariance.copy(), np.zeros(len(evidence.covariance))
    found = np.empty(len(error))
    for b in range(len(error)):
        gain = covariance @ z[b]
        total = variance[b] + z[b] @ gain
        innovation = error[b] - z[b] @ shift
        found[b] = innovation / np.sqrt(total)
        shift += gain * innovation / total
        covariance -= np.outer(gain, gain) / total
    return found


def common_shift_detectable(evidence: Evidence, traffic: Traffic, level: float, power: float) -> float:
    """Return the smallest factor above 1 on all times of the traffic that the block means would show.

    A shift f of every row adds f to each e, so 1' M^-1 e is normal with mean f 1' M^-1 1 and variance 1' M^-1 1; two-sided at `level`.
    """
    _, variance, z = block_errors(evidence, traffic)
    weight = 1.0 / variance
    cross = z.T @ weight
    precision = np.linalg.pinv(evidence.covariance) + (z.T * weight) @ z
    information = float(weight.sum() - cross @ np.linalg.solve(precision, cross))
    return 1.0 + float((norm.isf(level / 2) + norm.ppf(power)) / np.sqrt(max(information, 1e-300)))


def _enough_rows_held(scores: HeldOut, settings: CoverageSettings) -> float:
    """Return the probability that intervals hold at least `min_coverage` of rows; 0 with one block, which is all there is to go by."""
    blocks = scores.block_errors
    size = blocks["size"].to_numpy(dtype=float)
    missed = Ratio(size - blocks["rows_inside"].to_numpy(dtype=float), size, blocks["regime"].to_numpy())
    found = probability_ratio_below(missed, 1.0 - settings.min_coverage, _RESAMPLES, 0)
    return found if np.isfinite(found) else 0.0


def check_coverage(evidence: Evidence, settings: CoverageSettings | None = None) -> Check:
    """Judge 95 % intervals of rows, and PITs of block means, on held-out rows."""
    settings = settings or CoverageSettings()
    held, scores = evidence.held_out, evidence.scores
    if held is None or scores is None:
        return Check(NAME, Status.CANNOT_SAY, "there are no held-out rows whose times could be compared with their intervals")
    z = whitened_block_errors(evidence, held)
    pit = norm.cdf(z)
    # Noise and drift are known from few blocks themselves: the test is averaged over what they may be.
    typical = np.sqrt(sum(evidence.error_variance))
    stretch = typical / np.hypot(evidence.sigma, evidence.omega)
    chance = float(np.mean(chi2.sf((z**2).sum() * stretch**2, len(z))))
    error, variance, design = block_errors(evidence, held)
    sd = np.sqrt(variance + ((design @ evidence.covariance) * design).sum(axis=1))
    beyond = np.maximum(np.abs(error) - settings.tolerance, 0.0) > norm.isf(0.025) * sd
    material = float(binom.sf(int(beyond.sum()) - 1, len(beyond), 0.05)) if beyond.any() else 1.0
    inside = int(scores.block_errors["inside"].sum())
    table = pd.DataFrame(
        {
            "block": np.arange(len(z)),
            "regime": scores.block_errors["regime"].to_numpy(),
            "rows": held.sizes,
            "error": error,
            "announced_sd": sd,
            "pit": pit,
        }
    )
    message = (
        f"95 % intervals hold {scores.coverage:.1%} of rows and {inside} of {scores.blocks} block means; "
        f"chance of block errors this large {chance:.2g}"
    )
    if scores.blocks > 1:
        message += f"; a common factor of {common_shift_detectable(evidence, held, settings.level, 0.8):.2f} would be seen in 80 % of cases"
    few = scores.coverage < settings.min_coverage
    if (few and _enough_rows_held(scores, settings) < 1.0 - settings.confidence) or (
        chance < settings.level and material < settings.level
    ):
        status = Status.FAIL
        advice = "The error is larger than announced: calibrate on traffic like this, or look for what the features miss."
    elif few:
        status, advice = Status.WARN, "Intervals hold few rows, on too few blocks to be sure: record more to judge by."
    elif chance < settings.level:
        status = Status.WARN
        advice = f"Intervals are too narrow by less than {settings.tolerance:.0%} of the time of a block: allow for that."
    else:
        status, advice = Status.PASS, ""

    def draw(axes: Axes) -> None:
        ordered = np.sort(np.clip(pit, _CLIP, 1 - _CLIP))
        axes.plot([0, 1], [0, 1], color="#666d7a", linewidth=0.8)
        axes.step(ordered, (np.arange(len(ordered)) + 1) / len(ordered), where="post", color="#2a6ebb")
        axes.set_xlabel("PIT of block means, each given those before")
        axes.set_ylabel("share of blocks")

    return Check(NAME, status, message, advice, table, draw)
