"""Noise and drift of one new configuration: a proposal for importance sampling that is right for any shape of their posterior.

The likelihood of (sigma, omega), its coefficients at the donors' average prediction, times their average prior (`error_population`)
is laid out on a grid that is narrowed down to where the mass is. The bilinear interpolation of that table is a density one can
draw from exactly and evaluate exactly. A share of the draws comes from the prior itself, each draw's own, so that the importance
weights stay bounded wherever the grid does not reach (a defensive mixture: Hesterberg 1995, doi:10.1080/00401706.1995.10484303).

The axes are a = log sqrt(sigma^2 + m omega^2), with the multiplier m of most rows, and r = log(omega / sigma), along which volume is that of
(log sigma, log omega). Where rows decide a and hardly r (blocks of one row: m = 1; many rows in few blocks: m = 0), the mass is a thin
ridge, bent in any other axes, that no grid could follow; and with few blocks omega is skewed towards zero, which in r is a
plain tail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.model.error_population import ErrorPopulation
from hfdtl_bayes.model.priors import PositiveRange, PriorSettings

FloatArray = NDArray[np.float64]

_ROUGH = 11
"""Points per axis while the grid is fitted to the mass."""
_FINE = (15, 15)
"""Points per axis of the table."""
_KEPT = 10.0
"""How far below its maximum a log density is worth a place in the grid: e^-10."""
_ROUNDS = 40
_FROM_PRIOR = 0.03
"""Share of draws from the prior itself."""
_NO_DRIFT = PositiveRange(0.2, 5.0), PositiveRange(0.2, 1.0)
"""Without drift omega is drawn from some prior, enters nothing and is dropped."""


@dataclass(frozen=True)
class ErrorPrior:
    """The prior of log sigma and log omega of a new configuration given those of others, one for each of S draws of theirs."""

    sigma: ErrorPopulation
    omega: ErrorPopulation

    @classmethod
    def given(cls, sigma: FloatArray, omega: FloatArray, priors: PriorSettings) -> ErrorPrior:
        """Return the prior given draws of noise and drift of C configurations, shapes (S, C)."""
        noise = ErrorPopulation.of(sigma, priors.noise, priors.noise_spread)
        if priors.drift is None:
            return cls(noise, ErrorPopulation.of(np.ones((len(sigma), 0)), *_NO_DRIFT))
        return cls(noise, ErrorPopulation.of(omega, priors.drift, priors.drift_spread))

    def __getitem__(self, chosen: slice | NDArray[np.int64]) -> ErrorPrior:
        """Return some of the draws."""
        return ErrorPrior(self.sigma[chosen], self.omega[chosen])

    def __len__(self) -> int:
        """Return the number of draws."""
        return len(self.sigma.total)

    def log_density(self, log_sigma: FloatArray, log_omega: FloatArray) -> FloatArray:
        """Return the log density of (log sigma, log omega) under each draw's prior, shapes (S,)."""
        return self.sigma.log_density(log_sigma) + self.omega.log_density(log_omega)

    def average(self, log_sigma: FloatArray, log_omega: FloatArray) -> FloatArray:
        """Return about the log density averaged over draws, shapes (G,)."""
        return self.sigma.average(log_sigma) + self.omega.average(log_omega)


@dataclass(frozen=True)
class _Axes:
    """The axes a = log sqrt(sigma^2 + multiplier omega^2) and r = log(omega / sigma)."""

    multiplier: float

    def errors(self, a: FloatArray, r: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return (log sigma, log omega)."""
        log_sigma = a - 0.5 * np.log1p(self.multiplier * np.exp(2 * r))
        return log_sigma, log_sigma + r

    def places(self, log_sigma: FloatArray, log_omega: FloatArray) -> FloatArray:
        """Return (a, r), shape (2, ...)."""
        r = log_omega - log_sigma
        return np.array([log_sigma + 0.5 * np.log1p(self.multiplier * np.exp(2 * r)), r])

    def mesh(self, box: FloatArray, points: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
        """Return (log sigma, log omega) at the points of a grid over (a low, a high), (r low, r high), flattened."""
        a, r = (np.linspace(low, high, n) for (low, high), n in zip(box, points, strict=True))
        return self.errors(np.repeat(a, len(r)), np.tile(r, len(a)))


def _box(density: Callable[[FloatArray, FloatArray], FloatArray], axes: _Axes, start: FloatArray) -> FloatArray:
    """Return the box (a low, a high), (r low, r high) that holds the mass of a log density of (log sigma, log omega)."""
    # The mode first: from points around the best so far to the best of them, or to points half as far apart.
    centre, step = start, np.array([0.4, 0.8])
    for _ in range(_ROUNDS):
        value = density(*axes.mesh(np.column_stack([centre - 2 * step, centre + 2 * step]), (5, 5)))
        best = np.array(np.unravel_index(value.argmax(), (5, 5))) - 2
        centre = centre + best * step
        drop = value.max() - np.delete(value.reshape(5, 5)[1:4, 1:4].ravel(), 4)
        if not best.any() and drop.max() < _KEPT:
            break
        step = np.where(best == 0, 0.5 * step, step)
    # Then as far as the mass reaches: a box grows by a cell where it holds mass at its edge, and shrinks to a cell beyond it.
    box = np.column_stack([centre - 4 * step, centre + 4 * step])
    for _ in range(_ROUNDS):
        value = density(*axes.mesh(box, (_ROUGH, _ROUGH)))
        kept = (value > value.max() - _KEPT).reshape(_ROUGH, _ROUGH)
        along = [np.flatnonzero(kept.any(axis=1 - axis)) for axis in (0, 1)]
        width = box[:, 1] - box[:, 0]
        cell = width / (_ROUGH - 1)
        edges = np.array([[a[0] - 1, a[-1] + 1] for a in along])
        # Where all of an edge's neighbours hold mass, by much: half the box more.
        edges = np.where(edges < 0, -_ROUGH // 2, np.where(edges > _ROUGH - 1, _ROUGH - 1 + _ROUGH // 2, edges))
        box = box[:, :1] + edges * cell[:, None]
        change = (box[:, 1] - box[:, 0]) / width
        if change.min() > 0.6 and change.max() <= 1.0:
            break
    return box


@dataclass(frozen=True)
class Proposed:
    """One (log sigma, log omega) per draw, its prior density there and the density it was drawn from, shapes (S,)."""

    log_sigma: FloatArray
    log_omega: FloatArray
    log_prior: FloatArray
    log_proposal: FloatArray


def propose(
    log_likelihood: Callable[[FloatArray, FloatArray], FloatArray],
    prior: ErrorPrior,
    start: tuple[float, float],
    multiplier: float,
    rng: np.random.Generator,
) -> Proposed:
    """Draw one (sigma, omega) for each draw of the scales.

    Parameters
    ----------
    log_likelihood : callable
        Of (log sigma, log omega), each shape (G,), up to a constant; for the proposal only, so it may be an average.
    prior : ErrorPrior
    start : (float, float)
        Rough log sigma and log omega of the configuration's rows.
    multiplier : float
        Of the drift in the variance sigma^2 + multiplier omega^2 that the rows know best.
    rng : Generator
    """
    axes = _Axes(multiplier)

    def average(log_sigma: FloatArray, log_omega: FloatArray) -> FloatArray:
        return log_likelihood(log_sigma, log_omega) + prior.average(log_sigma, log_omega)

    box = _box(average, axes, axes.places(*map(np.asarray, start)))
    step = (box[:, 1] - box[:, 0]) / (np.array(_FINE) - 1)
    logs = average(*axes.mesh(box, _FINE))
    # Zero all around: beyond its outermost points the interpolated density falls to nothing within one step.
    table = np.pad(np.exp(logs - logs.max()).reshape(_FINE), 1)
    summed, count = np.cumsum(table[1:-1, 1:-1]), len(prior)
    node = np.minimum(np.searchsorted(summed, rng.random(count) * summed[-1], side="right"), len(summed) - 1)
    # The sum of two uniforms is a triangle, which is what linear interpolation spreads around a point.
    nodes = np.array(np.unravel_index(node, _FINE), dtype=float)
    log_sigma, log_omega = axes.errors(
        *(box[:, :1] + step[:, None] * (nodes + rng.random((2, count)) + rng.random((2, count)) - 1.0))
    )
    aside = np.flatnonzero(rng.random(count) < _FROM_PRIOR)
    own = prior[aside]
    log_sigma[aside], log_omega[aside] = own.sigma.sample(rng), own.omega.sample(rng)
    place = (axes.places(log_sigma, log_omega) - box[:, :1]) / step[:, None] + 1.0
    inside = ((place >= 0) & (place < np.array(_FINE)[:, None] + 1)).all(axis=0)
    place = np.where(inside, place, 0.0)
    (i, j), (u, v) = place.astype(int), place % 1.0
    height = (1 - u) * ((1 - v) * table[i, j] + v * table[i, j + 1]) + u * ((1 - v) * table[i + 1, j] + v * table[i + 1, j + 1])
    log_prior = prior.log_density(log_sigma, log_omega)
    density = (1 - _FROM_PRIOR) * np.where(inside, height, 0.0) / (summed[-1] * step.prod()) + _FROM_PRIOR * np.exp(log_prior)
    return Proposed(log_sigma, log_omega, log_prior, np.log(density))
