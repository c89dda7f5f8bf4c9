"""How the speed of a machine drifts while an engine runs, over the blocks of the model and beyond them.

The model of step times knows one drift: each block of a fixed number of steps has its own relative deviation, of sd omega, independent
of its neighbours (`hfdtl_bayes.model`). For one step or one block that is all that matters. The mean of a phase of many blocks is
another matter: under independence it hardly varies, while on recorded engines the deviation of a block is seen again in the blocks
around it, some of it for a second, some for half a minute (a neighbour on the same host, clocks, heat). So omega is kept, as the
sd of a block, and divided over time scales:

    d(t) = omega * (sqrt(1 - f - s) * white(block) + sqrt(f) * OU_f(t) + sqrt(s) * OU_s(t)),

with Ornstein-Uhlenbeck processes of unit variance and correlation exp(-|dt| / ell). The shares f, s and the times ell_f, ell_s have a
posterior on a grid, from the block means of recorded steps of one or several configurations: Gaussian, the coefficients of each
configuration and its scale integrated out (restricted likelihood), uniform over the grid. What is seen within a recording says nothing
of changes from day to day.

The same correlation makes what a configuration was calibrated on worth less: the mean of its drift over the calibration stays in the
level of its coefficients. The model counted independent blocks; the rest is `SpeedDrift.unseen_level`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.signal import lfilter

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.replay import Batch, StepTime
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.traces import drop_warmup, time_blocks

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class SpeedSettings:
    """The grid that correlation in time is looked for on, each with its reason."""

    fast_shares: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    slow_shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)
    """Down to none of either: a machine without drift beyond its blocks is on the grid."""
    fast_s: tuple[float, ...] = (0.7, 1.5, 3.0)
    """From the length of a block of decode steps to that of a burst."""
    slow_s: tuple[float, ...] = (10.0, 20.0, 40.0, 80.0)
    """Up to about the length of a recording: beyond, a drift is a constant of it and goes into the coefficients."""
    most_blocks: int = 400
    """Blocks of a configuration, its first: the likelihood takes the third power of their number."""
    slowest: float = 0.2
    """A step takes at least this share of its expected time, however fast the machine: noise is Gaussian and has no such bound."""


@dataclass(frozen=True)
class SpeedDrift:
    """A posterior over how drift is divided over time scales.

    Attributes
    ----------
    shares : ndarray, shape (G, 2)
        Of omega^2: that of the fast and of the slow process. The rest is each block's own.
    times_s : ndarray, shape (G, 2)
        Correlation times of both, seconds.
    weights : ndarray, shape (G,)
        Posterior probabilities, of sum 1.
    unseen_level : ndarray, shape (G,)
        Sd, in units of omega, that the drift has left in the level of the coefficients beyond what the model counted.
    block_length : int
        Steps per block.
    sources : tuple of str
        Configurations it was seen on; empty if none, then there are only blocks.
    """

    shares: FloatArray
    times_s: FloatArray
    weights: FloatArray
    unseen_level: FloatArray
    block_length: int = DEFAULT_BLOCK_LENGTH
    sources: tuple[str, ...] = ()

    @classmethod
    def blocks_only(cls, block_length: int = DEFAULT_BLOCK_LENGTH) -> SpeedDrift:
        """Return the drift as the model has it: independent blocks."""
        return cls(np.zeros((1, 2)), np.ones((1, 2)), np.ones(1), np.zeros(1), block_length)

    def mean(self) -> dict[str, float]:
        """Return posterior means: shares of both processes, their times (seconds, geometric), the unseen level (in omega)."""
        shares = self.weights @ self.shares
        times = [
            math.exp(float(np.average(np.log(self.times_s[:, k]), weights=self.weights * self.shares[:, k])))
            if shares[k] > 0
            else math.nan
            for k in (0, 1)
        ]
        unseen = math.sqrt(float(self.weights @ self.unseen_level**2))
        return {"fast_share": shares[0], "slow_share": shares[1], "fast_s": times[0], "slow_s": times[1], "unseen_level": unseen}

    def __str__(self) -> str:
        """Return one sentence for a person."""
        if not self.sources:
            return "drift of the machine's speed: independent blocks, as the model has it (no recorded steps to see more on)"
        m = self.mean()
        return (
            f"drift of the machine's speed, seen on {', '.join(self.sources)}: {m['slow_share']:.0%} of its variance lasts about "
            f"{m['slow_s']:.0f} s, {m['fast_share']:.0%} about {m['fast_s']:.1f} s, the rest a block of {self.block_length} steps"
        )

    def level(self, omega: float, rng: np.random.Generator) -> float:
        """Draw the relative error that the drift during calibration has left in the level of the coefficients."""
        g = int(rng.choice(len(self.weights), p=self.weights))
        return float(omega * self.unseen_level[g] * rng.standard_normal())

    def path(
        self, omega: float, sigma: float, rng: np.random.Generator, *, level: float = 0.0, settings: SpeedSettings | None = None
    ) -> SpeedPath:
        """Draw one course of the machine's speed around 1 + level, its time scales with it."""
        g = int(rng.choice(len(self.weights), p=self.weights))
        return SpeedPath(
            omega,
            sigma,
            tuple(float(x) for x in self.shares[g]),
            tuple(float(x) for x in self.times_s[g]),
            level,
            self.block_length,
            rng,
            (settings or SpeedSettings()).slowest,
        )

    def mean_factor_sd(self, omega: float, duration_s: float, blocks: float) -> float:
        """Return the sd of the mean factor of a run around 1 + level: of all its blocks, over so many seconds.

        For simulators that take one speed for a whole run. The mean over T of an Ornstein-Uhlenbeck process of unit variance has the
        variance 2 (ell / T)^2 (T / ell - 1 + exp(-T / ell)).

        Raises
        ------
        InputError
            If the duration or the number of blocks is not above 0.
        """
        if not (duration_s > 0 and blocks > 0):
            raise InputError(f"a run of {duration_s:g} s and {blocks:g} blocks has no mean speed; both are to be above 0")
        ratio = duration_s / self.times_s
        averaged = np.where(ratio > 1e-4, 2.0 * (ratio - 1.0 + np.exp(-ratio)) / ratio**2, 1.0)
        variance = (self.shares * averaged).sum(axis=1) + (1.0 - self.shares.sum(axis=1)) / blocks
        return float(omega * math.sqrt(float(self.weights @ variance)))


class SpeedPath:
    """One course of a machine's speed: the factor of a step that begins at a time, block by block, with the noise of each step.

    Stateful: to be asked in the order of the steps, once.
    """

    _CELLS_AT_ONCE = 1024

    def __init__(
        self,
        omega: float,
        sigma: float,
        shares: tuple[float, ...],
        times_s: tuple[float, ...],
        level: float,
        block_length: int,
        rng: np.random.Generator,
        slowest: float = SpeedSettings.slowest,
    ) -> None:
        self._omega, self._sigma, self._level, self._slowest = omega, sigma, level, slowest
        self._used = [(share, ell) for share, ell in zip(shares, times_s, strict=True) if share > 0]
        # Cells much shorter than what lasts least: within one the process hardly moves.
        self._cell_s = min((ell for _, ell in self._used), default=1.0) / 8.0
        self._own = math.sqrt(max(1.0 - sum(share for share, _ in self._used), 0.0))
        self._block_length, self._rng = block_length, rng
        self._course: list[float] = []
        self._last = [float(rng.standard_normal()) for _ in self._used]
        self._steps = 0
        self._block = 0.0
        self._noise: list[float] = []

    def factor(self, start_s: float) -> float:
        """Return the relative time of the next step, which begins at `start_s`."""
        if self._steps % self._block_length == 0:
            self._block = self._own * float(self._rng.standard_normal())
        if not self._noise:
            self._noise = (self._sigma * self._rng.standard_normal(self._CELLS_AT_ONCE)).tolist()
        self._steps += 1
        drift = self._block
        if self._used:
            cell = int(max(start_s, 0.0) / self._cell_s)
            while len(self._course) <= cell:
                self._extend()
            drift += self._course[cell]
        return max(1.0 + self._level + self._omega * drift + self._noise.pop(), self._slowest)

    def _extend(self) -> None:
        total = np.zeros(self._CELLS_AT_ONCE)
        for k, (share, ell) in enumerate(self._used):
            kept = math.exp(-self._cell_s / ell)
            shocks = math.sqrt(1.0 - kept**2) * self._rng.standard_normal(self._CELLS_AT_ONCE)
            course, _ = lfilter([1.0], [1.0, -kept], shocks, zi=[kept * self._last[k]])
            self._last[k] = float(course[-1])
            total += math.sqrt(share) * course
        self._course += total.tolist()


class DriftingStepTime:
    """Step times of a machine whose speed takes a course: the expected time of a batch times the factor of the moment.

    For one replay. Called without a time it returns the expected value.
    """

    def __init__(self, expected: StepTime, path: SpeedPath) -> None:
        self._expected, self._path = expected, path

    def __call__(self, batch: Batch) -> float:
        """Return the expected time of a step, seconds."""
        return self._expected(batch)

    def at(self, batch: Batch, start_s: float) -> float:
        """Return the time of the next step, which begins at `start_s`, seconds."""
        return self._expected(batch) * self._path.factor(start_s)


def step_clock(frame: pd.DataFrame) -> FloatArray:
    """Return the middle of each step on a clock, shape (n,), seconds: recorded, or the steps one after the other."""
    step = frame["step_time_s"].to_numpy(dtype=float)
    if "start_s" in frame.columns and frame["start_s"].notna().all():
        return np.asarray(frame["start_s"].to_numpy(dtype=float) + step / 2)
    if "end_s" in frame.columns and frame["end_s"].notna().all():
        return np.asarray(frame["end_s"].to_numpy(dtype=float) - step / 2)
    return np.asarray(np.cumsum(step) - step / 2)


@dataclass(frozen=True)
class _Blocks:
    """Block means of one configuration: when, relative step time, relative design, steps, noise of the mean in units of omega."""

    time_s: FloatArray
    observed: FloatArray
    design: FloatArray
    steps: FloatArray
    noise: FloatArray

    def log_likelihood(self, correlation: FloatArray) -> float:
        """Return the restricted log-likelihood, the scale integrated out under 1 / scale."""
        root = np.linalg.cholesky(correlation + np.diag(self.noise))
        y, x = np.linalg.solve(root, self.observed), np.linalg.solve(root, self.design)
        q, r = np.linalg.qr(x)
        left = float(y @ y - np.square(q.T @ y).sum())
        free = len(y) - x.shape[1]
        return float(-np.log(np.diag(root)).sum() - np.log(np.abs(np.diag(r))).sum() - free / 2 * math.log(left))


def speed_drift(
    posterior: LatencyPosterior,
    recorded: Sequence[tuple[ServingConfiguration, pd.DataFrame]],
    *,
    calibrated_on: pd.DataFrame | None = None,
    block_length: int = DEFAULT_BLOCK_LENGTH,
    settings: SpeedSettings | None = None,
) -> SpeedDrift:
    """Estimate how drift is divided over time scales from recorded steps.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of step_time; gives the scale of each configuration's errors.
    recorded : sequence of (ServingConfiguration, DataFrame)
        Steps of configurations on the machine (kind) that will be simulated, in time order: donors', and of the target those it was
        calibrated on. One of a new configuration is as good.
    calibrated_on : DataFrame, optional
        Steps the simulated configuration was calibrated on, for the level they leave unseen; without them, none is added.
    block_length : int
    settings : SpeedSettings, optional

    Raises
    ------
    InputError
        If no configuration has blocks enough, or a column is missing.
    """
    settings = settings or SpeedSettings()
    found, names = [], []
    for configuration, frame in recorded:
        blocks = _block_means(posterior, configuration, drop_warmup(frame), block_length, settings)
        if blocks is not None:
            found.append(blocks)
            names.append(configuration.config_id)
    if not found:
        raise InputError(
            f"none of {', '.join(c.config_id for c, _ in recorded) or 'no configurations'} has twice as many blocks of {block_length} "
            "steps as coefficients, which it takes to see how drift lasts; record longer, or simulate with independent blocks"
        )
    grid = [
        (f, s, fast, slow)
        for f, s in itertools.product(settings.fast_shares, settings.slow_shares)
        if f + s < 0.95
        for fast in (settings.fast_s if f else settings.fast_s[:1])
        for slow in (settings.slow_s if s else settings.slow_s[:1])
    ]
    log_weight = np.zeros(len(grid))
    for blocks in found:
        lags = np.abs(blocks.time_s[:, None] - blocks.time_s)
        log_weight += [blocks.log_likelihood(_correlation(lags, *point)) for point in grid]
    # Points of a share of none stand for all their times.
    multiplicity = np.array(
        [(1 if f else len(settings.fast_s)) * (1 if s else len(settings.slow_s)) for f, s, _, _ in grid], dtype=float
    )
    weights = multiplicity * np.exp(log_weight - log_weight.max())
    weights /= weights.sum()
    kept = weights > 1e-4 * weights.max()
    points = [p for p, k in zip(grid, kept, strict=True) if k]
    unseen = np.zeros(len(points))
    if calibrated_on is not None and len(calibrated_on):
        unseen = _unseen_level(drop_warmup(calibrated_on), points, block_length)
    return SpeedDrift(
        np.array([[f, s] for f, s, _, _ in points]),
        np.array([[fast, slow] for _, _, fast, slow in points]),
        weights[kept] / weights[kept].sum(),
        unseen,
        block_length,
        tuple(names),
    )


def _correlation(lags: FloatArray, fast_share: float, slow_share: float, fast_s: float, slow_s: float) -> FloatArray:
    matrix = fast_share * np.exp(-lags / fast_s) + slow_share * np.exp(-lags / slow_s)
    matrix[np.diag_indices(len(matrix))] = 1.0
    return np.asarray(matrix)


def _block_means(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    frame: pd.DataFrame,
    block_length: int,
    settings: SpeedSettings,
) -> _Blocks | None:
    """Return block means in units of the expected step time; None where there are too few to tell anything."""
    if frame.empty:
        return None
    draws = posterior.draws(configuration)
    block = time_blocks(frame, block_length)
    frame, block = frame[block < settings.most_blocks], block[block < settings.most_blocks]
    design = posterior.feature_set.design(frame, configuration)
    scale = posterior.scale_s(design @ draws.mean, configuration)
    steps = np.bincount(block).astype(float)

    def means(values: FloatArray) -> FloatArray:
        return np.asarray(np.bincount(block, values) / steps)

    columns = np.column_stack([means(column / scale) for column in design.T])
    # Directions that these blocks span, for some features are multiples of each other here.
    left, size, _ = np.linalg.svd(columns, full_matrices=False)
    basis = left[:, size > 1e-6 * size.max()]
    if len(steps) < 2 * basis.shape[1] + 2:
        return None
    observed = means(frame["step_time_s"].to_numpy(dtype=float) / scale)
    noise = float(np.mean(draws.sigma**2) / max(float(np.mean(draws.omega**2)), 1e-12))
    return _Blocks(means(step_clock(frame)), observed, basis, steps, noise / steps)


def _unseen_level(frame: pd.DataFrame, points: Sequence[tuple[float, float, float, float]], block_length: int) -> FloatArray:
    """Return the sd, in units of omega, of the mean drift of steps beyond that of independent blocks, shape (G,)."""
    block = time_blocks(frame, block_length)
    steps = np.bincount(block)
    middle = np.bincount(block, step_clock(frame)) / steps
    share = steps / steps.sum()
    lags = np.abs(middle[:, None] - middle)
    variance = [share @ _correlation(lags, *point) @ share for point in points]
    return np.asarray(np.sqrt(np.maximum(np.array(variance) - np.square(share).sum(), 0.0)))
