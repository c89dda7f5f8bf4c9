"""Does a term help on rows that nobody has seen: leave one configuration out, or time blocks of the only one.

For each configuration both models, with the term and without, are fitted to the others; what they say of its coefficients is updated
on a few of its time blocks, spread over the recording, and every other block is predicted. So the term's coefficient must
carry over from other configurations, or be told by some hundred rows: what transfer will ask of it. With one configuration there
are no others: half of the stretches of its recording predict the other half, from the prior, and the other way round.

The score is the log density of each held-out block's rows jointly, its drift integrated out. Absolute percentage errors, which are
reported beside it, ignore that the rows of a block share an error: on a drifting machine they hardly see a term of a few
per cent that the rows within blocks show plainly. Noise and drift are those the calibration rows and the other configurations
make most probable, the same for both models. Both scores are differences on the same rows, summed over stretches of consecutive
blocks, whose scatter gives their uncertainty; it is that of these configurations' rows, not of which configurations there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.model import PositiveRange, PriorSettings
from hfdtl_bayes.model.exact import population_loading
from hfdtl_bayes.model.priors import deviation_scale, population_mean, population_sd
from hfdtl_bayes.statistics import ConfigStatistics, RowScaling, config_to_constant, statistics_from_rows
from hfdtl_bayes.traces import time_blocks
from hfdtl_bayes.transfer.evaluation import scored_rows
from hfdtl_bayes.transfer.term_evidence import Problem, Traces, chosen_statistics, fit_model

FloatArray = NDArray[np.float64]

STRETCH = 5
"""Time blocks taken together for the uncertainty of a score: neighbours on a real machine are not independent."""
_GRID, _ZOOMS = 9, 4
_WORSE = 2.0
"""Standard errors by which one score may be worse while the other improves."""
_SPREAD = 0.7
"""Sd of the log of noise and of drift between configurations, when some are known."""


@dataclass(frozen=True)
class Gain:
    """What a term adds on held-out rows of one configuration, or of several together.

    Attributes
    ----------
    rows : int
        Held-out rows.
    nats, nats_se : float
        Log density of the held-out blocks with the term minus without, and its standard error.
    mape_before, mape : float
        Mean absolute percentage error without and with it, fractions.
    mape_se : float
        Standard error of the difference.
    """

    rows: int
    nats: float
    nats_se: float
    mape_before: float
    mape: float
    mape_se: float

    @property
    def points(self) -> float:
        """Gain in percentage points of MAPE; positive is better."""
        return 100 * (self.mape_before - self.mape)

    @property
    def points_se(self) -> float:
        """Standard error of `points`."""
        return 100 * self.mape_se

    def improves(self, factor: float) -> bool:
        """Whether log density or MAPE improves by more than `factor` standard errors and neither is worse by more than two."""
        nats, points = self.nats / max(self.nats_se, 1e-300), self.points / max(self.points_se, 1e-300)
        return max(nats, points) > factor and min(nats, points) > -_WORSE


def together(gains: Sequence[Gain]) -> Gain:
    """Return the gain over several configurations: nats added, MAPE averaged with each configuration counting the same."""
    nats = float(sum(g.nats for g in gains))
    return Gain(
        rows=sum(g.rows for g in gains),
        nats=nats,
        nats_se=float(np.sqrt(sum(g.nats_se**2 for g in gains))),
        mape_before=float(np.mean([g.mape_before for g in gains])),
        mape=float(np.mean([g.mape for g in gains])),
        mape_se=float(np.sqrt(sum(g.mape_se**2 for g in gains)) / len(gains)),
    )


@dataclass(frozen=True)
class _Fold:
    """Rows of one configuration to calibrate on and to predict."""

    place: int
    calibration: pd.DataFrame
    held_out: pd.DataFrame
    stretches: NDArray[np.int64]


def _folds(problem: Problem, calibration_rows: int) -> list[_Fold]:
    found = []
    for place, trace in enumerate(problem.traces):
        blocks = time_blocks(trace.frame, trace.block_length)
        count = int(blocks[-1]) + 1
        stretch = blocks // STRETCH
        if len(problem.traces) == 1:
            chosen = [np.isin(stretch % 2, [half]) for half in (0, 1)]
        else:
            wanted = min(max(1, round(calibration_rows / trace.block_length)), count // 2)
            at = np.unique(np.linspace(0, count - 1, wanted + 2)[1:-1].astype(int))
            chosen = [np.isin(blocks, at)]
        for inside in chosen:
            if inside.any() and not inside.all():
                found.append(_Fold(place, trace.frame[inside], trace.frame[~inside], stretch[~inside]))
    return found


def _prior_of_coefficients(
    problem: Problem, features: FeatureSet, others: Sequence[ConfigStatistics], trace: Traces
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return mean and covariance of a configuration's coefficients before its own rows, and the others' log noise and drift."""
    if others:
        found = fit_model([chosen_statistics(s, features) for s in others], features, problem.priors, ())
        mean, covariance = found.density.predictive(found.mode[None], trace.configuration)
        sigma, omega = found.errors
        return mean[0], covariance[0], np.log(sigma), np.log(np.maximum(omega, 1e-9))
    loading = population_loading(features, config_to_constant(features, trace.configuration))
    spread = np.concatenate([problem.priors.deviation.gamma_median * deviation_scale(features), features.discrepancy_sd])
    rooted = loading * population_sd(features)
    return loading @ population_mean(features), rooted @ rooted.T + np.diag(spread**2), np.array([]), np.array([])


def _error_axes(priors: PriorSettings, log_sigma: FloatArray, log_omega: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return mean and sd of the prior of log noise and log drift, shape (2,) each, the drift's NaN where there is none."""

    def of(known: FloatArray, range_: PositiveRange | None) -> tuple[float, float]:
        if range_ is None:
            return float("nan"), float("nan")
        return (float(known.mean()), float(np.hypot(_SPREAD, known.std()))) if len(known) else (range_.log_mean, range_.log_sd)

    centre, sd = zip(of(log_sigma, priors.noise), of(log_omega, priors.drift), strict=True)
    return np.array(centre), np.array(sd)


@dataclass(frozen=True)
class _Calibrated:
    """A model's coefficients of one configuration given its calibration rows, as a function of noise and drift.

    With r = z - R m, G = sum R'R / v_j, b = sum R'r / v_j and the prior covariance L L':
    -2 log p = sum n_j log v_j + sum r'r / v_j - b'L (I + L'GL)^-1 L'b + log |I + L'GL|.
    """

    mean: FloatArray
    root: FloatArray
    grams: FloatArray
    targets: FloatArray
    squares: FloatArray
    count: FloatArray
    multiplier: FloatArray

    @classmethod
    def of(cls, own: ConfigStatistics, mean: FloatArray, covariance: FloatArray) -> _Calibrated:
        k = len(mean)
        root = _root(covariance)
        design = [s.triangle[:, :k] @ root for s in own.strata]
        left = [s.triangle[:, k] - s.triangle[:, :k] @ mean for s in own.strata]
        return cls(
            mean,
            root,
            np.array([d.T @ d for d in design]),
            np.array([d.T @ r for d, r in zip(design, left, strict=True)]),
            np.array([r @ r for r in left]),
            np.array([s.count for s in own.strata], dtype=float),
            np.array([s.multiplier for s in own.strata], dtype=float),
        )

    def solved(self, sigma: FloatArray, omega: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return log density, L^-1 (coefficients' mean - m) and I + L'GL at noise and drift, shapes (N,), (N, K), (N, K, K)."""
        weight = 1.0 / (sigma[:, None] ** 2 + self.multiplier * omega[:, None] ** 2)
        gram = np.eye(len(self.mean)) + np.tensordot(weight, self.grams, axes=1)
        target = weight @ self.targets
        solved = np.linalg.solve(gram, target[..., None])[..., 0]
        logs = -np.log(weight) @ self.count + weight @ self.squares - (target * solved).sum(axis=1) + np.linalg.slogdet(gram)[1]
        return -0.5 * logs, solved, gram

    def coefficients(self, sigma: float, omega: float) -> tuple[FloatArray, FloatArray]:
        """Return mean and covariance of the coefficients."""
        _, solved, gram = self.solved(np.array([sigma]), np.array([omega]))
        return self.mean + self.root @ solved[0], self.root @ np.linalg.inv(gram[0]) @ self.root.T


def _root(covariance: FloatArray) -> FloatArray:
    return np.linalg.cholesky(covariance + 1e-12 * np.diag(np.diag(covariance)))


def _common_errors(models: Sequence[_Calibrated], centre: FloatArray, sd: FloatArray) -> tuple[float, float]:
    """Return the noise and drift most probable under all models together: what is compared are means, not guesses of the noise.

    The grid over +-3 prior sds is narrowed down around its best point until that is known to a few per cent.
    """
    drifts = bool(np.isfinite(centre[1]))
    at, half = centre.copy(), 3.0 * sd
    for _ in range(_ZOOMS):
        a = at[0] + half[0] * np.linspace(-1, 1, _GRID)
        b = at[1] + half[1] * np.linspace(-1, 1, _GRID) if drifts else np.array([-np.inf])
        sigma, omega = (v.ravel() for v in np.meshgrid(a, b, indexing="ij"))
        value = -0.5 * ((sigma - centre[0]) / sd[0]) ** 2
        if drifts:
            value = value - 0.5 * ((omega - centre[1]) / sd[1]) ** 2
        value = value + np.mean([m.solved(np.exp(sigma), np.exp(omega))[0] for m in models], axis=0)
        best = int(np.argmax(value))
        at, half = np.array([sigma[best], omega[best]]), half * 2.5 / _GRID
    return float(np.exp(at[0])), float(np.exp(at[1]))


def _block_scores(
    design: FloatArray,
    observed: FloatArray,
    scale: FloatArray,
    blocks: NDArray[np.int64],
    coefficients: tuple[FloatArray, FloatArray],
    errors: tuple[float, float],
) -> FloatArray:
    """Return the log density of each block's scaled rows, shape (B,), coefficients and drift integrated out.

    Given coefficients, the rows of a block of m have covariance s^2 I + o^2 11'; its inverse is (I - o^2 / (s^2 + m o^2) 11') / s^2.
    """
    mean, covariance = coefficients
    noise, drift = errors[0] ** 2, errors[1] ** 2
    starts = np.flatnonzero(np.r_[True, blocks[1:] != blocks[:-1]])
    size = np.diff(np.r_[starts, len(blocks)])
    rows, left = design / scale[:, None], (observed - design @ mean) / scale
    joined = np.column_stack([rows, left])
    outer = np.add.reduceat(joined[:, :, None] * joined[:, None, :], starts)
    total = np.add.reduceat(joined, starts)
    shared = (drift / (noise + size * drift))[:, None, None]
    weighed = (outer - shared * total[:, :, None] * total[:, None, :]) / noise
    gram, target, square = weighed[:, :-1, :-1], weighed[:, :-1, -1], weighed[:, -1, -1]
    root = _root(covariance)
    inner = np.eye(len(mean)) + root.T @ gram @ root
    moved = target @ root
    explained = (moved * np.linalg.solve(inner, moved[..., None])[..., 0]).sum(axis=1)
    logs = (size - 1) * np.log(noise) + np.log(noise + size * drift) + size * np.log(2 * np.pi)
    logs = logs + square - explained + np.linalg.slogdet(inner)[1]
    return np.asarray(-0.5 * logs - np.add.reduceat(np.log(scale), starts))


def _scored(
    problem: Problem, models: Sequence[FeatureSet], others: Sequence[ConfigStatistics], fold: _Fold, scaling: RowScaling
) -> list[tuple[FloatArray, FloatArray]]:
    """Return of each model log density per held-out block and absolute percentage error per held-out row, NaN where it does not count."""
    trace = problem.traces[fold.place]
    place = {n: i for i, n in enumerate(problem.features.coef_names)}
    observed = problem.observed(Traces(trace.configuration, fold.held_out, trace.block_length))
    blocks = time_blocks(fold.held_out, trace.block_length)
    counts = scored_rows(observed, problem.features, trace.configuration)
    fitted, scales = [], []
    for features in models:
        mean, covariance, log_sigma, log_omega = _prior_of_coefficients(problem, features, others, trace)
        pilot = np.array([scaling.pilot[place[n]] if n in place else 0.0 for n in features.coef_names])
        scales.append(replace(scaling, pilot=pilot))
        own = statistics_from_rows(
            fold.calibration, trace.configuration, features, block_length=trace.block_length, scaling=scales[-1]
        )
        fitted.append(_Calibrated.of(own, mean, covariance))
    # Noise and drift of the others are those of the last model, which has the more terms.
    sigma, omega = _common_errors(fitted, *_error_axes(problem.priors, log_sigma, log_omega))
    found = []
    for features, calibrated, own_scaling in zip(models, fitted, scales, strict=True):
        coefficients = calibrated.coefficients(sigma, omega)
        design = features.design(fold.held_out, trace.configuration)
        scale, _ = own_scaling.rows(design, observed, blocks)
        errors = np.full(len(observed), np.nan)
        errors[counts] = np.abs(design[counts] @ coefficients[0] - observed[counts]) / observed[counts]
        found.append((_block_scores(design, observed, scale, blocks, coefficients, (sigma, omega)), errors))
    return found


def held_out_gains(
    problem: Problem, full: Sequence[ConfigStatistics], before: Sequence[str], after: Sequence[str], calibration_rows: int
) -> dict[str, Gain]:
    """Return what terms add on held-out rows of each configuration.

    Parameters
    ----------
    problem : Problem
    full : sequence of ConfigStatistics
        Of all candidates, one per configuration.
    before, after : sequence of str
        Terms of the two models compared.
    calibration_rows : int
        Rows of the left-out configuration that it is calibrated on, in whole blocks spread over its recording.

    Returns
    -------
    dict of str to Gain
        By config_id; empty if no rows can be held out.
    """
    models = [problem.extended(t) for t in (before, after)]
    parts: dict[int, list[tuple[FloatArray, ...]]] = {}
    for fold in _folds(problem, calibration_rows):
        others = [s for i, s in enumerate(full) if i != fold.place]
        trace = problem.traces[fold.place]
        # The scale of both models is that of the features alone, fitted to what is calibrated on.
        calibration = Traces(trace.configuration, fold.calibration, trace.block_length)
        scaling = problem.scaling(calibration, problem.features, problem.features)
        (score, error), (new_score, new_error) = _scored(problem, models, others, fold, scaling)
        blocks = time_blocks(fold.held_out, trace.block_length)
        starts = np.flatnonzero(np.r_[True, blocks[1:] != blocks[:-1]])
        _, of_block = np.unique(fold.stretches[starts], return_inverse=True)
        _, of_row = np.unique(fold.stretches, return_inverse=True)
        counted = ~np.isnan(error)
        nats = np.bincount(of_block, new_score - score)
        sums = [np.bincount(of_row[counted], e[counted], minlength=len(nats)) for e in (error, new_error)]
        parts.setdefault(fold.place, []).append((nats, *sums, np.bincount(of_row[counted], minlength=len(nats)).astype(float)))
    return {problem.traces[i].configuration.config_id: _gain(own) for i, own in parts.items()}


def _gain(parts: Sequence[tuple[FloatArray, ...]]) -> Gain:
    nats, before, after, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    count, g = max(float(rows.sum()), 1.0), len(nats)

    def se(sums: FloatArray) -> float:
        # Of a sum of g stretches; unknown with one.
        return float(np.sqrt(g) * sums.std(ddof=1)) if g > 1 else float("inf")

    return Gain(
        rows=int(count),
        nats=float(nats.sum()),
        nats_se=se(nats),
        mape_before=float(before.sum() / count),
        mape=float(after.sum() / count),
        mape_se=se(before - after) / count,
    )
