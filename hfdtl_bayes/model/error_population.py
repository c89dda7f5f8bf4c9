"""The population of noise, or of drift, over configurations, with its typical value and spread integrated out.

Given the values of C configurations, x_c = log sigma_c ~ Normal(mu, e^(2 t)), mu ~ Normal(m, s^2), t ~ Normal: nothing else of the model
knows mu and t. mu is integrated out in closed form,

    log p(x, t) = prior(t) - C t - log(r) / 2 - (sum (x - m)^2 - s^2 e^(-2 t) (sum (x - m))^2 / r) e^(-2 t) / 2,   r = 1 + C s^2 e^(-2 t),

and t by the trapezoidal rule, whose error falls exponentially in the number of points per sd for smooth densities that vanish at
both ends (Trefethen & Weideman 2014, doi:10.1137/130932132). A draw of a fit of donors then says of a new configuration's noise
what its donors' noises say, not what one draw of (mu, t) does: importance weights lose the variance of the latter (Rao-Blackwell;
Doucet et al. 2000, arXiv:1301.3853).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.model.priors import PositiveRange

FloatArray = NDArray[np.float64]

_REACH = 6.0
"""Prior sds of the log spread to either side that are integrated over."""
_SUM_STEP, _DRAW_STEP = 0.7, 0.35
"""Step in units of the narrowest the log spread can be known: where sums of a normal density are exact to 1e-12, and where
interpolation is good."""
_WIDEST_STEP = 0.3
"""e^(-x^2 e^(-2 t)) is bounded in the complex plane for |Im t| < pi / 4, so that sums err by about e^(-pi^2 / (2 * 0.3)), 1e-7."""
_CURVE_DRAWS = 30
"""Draws whose densities are averaged for a proposal."""


@dataclass(frozen=True)
class ErrorPopulation:
    """S draws of the noises, or drifts, of C configurations, as far as another configuration's depends on them.

    Attributes
    ----------
    count : int
        C.
    total, square : ndarray, shape (S,)
        Sum and sum of squares over configurations of the logarithm, relative to the prior's median.
    typical, spread : PositiveRange
        Priors.
    """

    count: int
    total: FloatArray
    square: FloatArray
    typical: PositiveRange
    spread: PositiveRange

    @classmethod
    def of(cls, values: FloatArray, typical: PositiveRange, spread: PositiveRange) -> ErrorPopulation:
        """Return the population of values, shape (S, C), relative sds."""
        logs = np.log(values) - typical.log_mean
        return cls(values.shape[1], logs.sum(axis=1), np.square(logs).sum(axis=1), typical, spread)

    def __getitem__(self, chosen: slice | NDArray[np.int64]) -> ErrorPopulation:
        """Return some of the draws."""
        return ErrorPopulation(self.count, self.total[chosen], self.square[chosen], self.typical, self.spread)

    def with_value(self, log_value: FloatArray) -> ErrorPopulation:
        """Return the population with one configuration more, of which the logarithm is given, shape (S,)."""
        value = log_value - self.typical.log_mean
        return ErrorPopulation(self.count + 1, self.total + value, self.square + value * value, self.typical, self.spread)

    def _grid(self, step: float) -> FloatArray:
        narrowest = 1 / np.sqrt(1 / self.spread.log_sd**2 + 2 * (self.count + 1))
        width = min(step * narrowest, _WIDEST_STEP)
        half = int(np.ceil(_REACH * self.spread.log_sd / width))
        return np.asarray(self.spread.log_mean + width * np.arange(-half, half + 1))

    def _terms(self, log_spread: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return what `square` and `total` squared are multiplied by in log p(x, t), and the rest, each of the shape of t."""
        inverse = np.exp(-2 * log_spread)
        inflated = 1 + self.count * self.typical.log_sd**2 * inverse
        prior = -0.5 * ((log_spread - self.spread.log_mean) / self.spread.log_sd) ** 2
        of_total = 0.5 * (self.typical.log_sd * inverse) ** 2 / inflated
        return -0.5 * inverse, of_total, prior - self.count * log_spread - 0.5 * np.log(inflated)

    def _log_joint(self, points: FloatArray) -> FloatArray:
        """Return log p(x, t) of each draw at Q points, shape (S, Q), up to a constant: one matrix product."""
        of_draw = np.column_stack([self.square, self.total**2, np.ones_like(self.total)])
        return np.asarray(of_draw @ np.array(self._terms(points)))

    def _log_sum(self, points: FloatArray) -> FloatArray:
        """Return log p(x) up to the constant of C and the step between points, shape (S,)."""
        logs = self._log_joint(points)
        top = logs.max(axis=1)
        return np.asarray(top + np.log(np.exp(logs - top[:, None]).sum(axis=1)))

    @cached_property
    def _points(self) -> FloatArray:
        return self._grid(_SUM_STEP)

    @cached_property
    def _normaliser(self) -> FloatArray:
        return self._log_sum(self._points)

    def log_density(self, log_value: FloatArray) -> FloatArray:
        """Return the log density of another configuration's log value under each draw, both of shape (S,)."""
        # On the same points as the normaliser: then it is a density exactly, a mixture over the points.
        return np.asarray(self.with_value(log_value)._log_sum(self._points) - self._normaliser - 0.5 * np.log(2 * np.pi))

    def sample(self, rng: np.random.Generator) -> FloatArray:
        """Draw another configuration's log value from `log_density`, one for each draw, shape (S,)."""
        weights = np.cumsum(np.exp(self._log_joint(self._points) - self._normaliser[:, None]), axis=1)
        node = (weights < (rng.random(len(weights)) * weights[:, -1])[:, None]).sum(axis=1)
        spread = np.exp(self._points[np.minimum(node, len(self._points) - 1)])
        return self._middle(spread, rng) + spread * rng.standard_normal(len(spread))

    def _middle(self, spread: FloatArray, rng: np.random.Generator) -> FloatArray:
        """Draw the logarithm of the typical value given the spread."""
        precision = 1 / self.typical.log_sd**2 + self.count / spread**2
        mean = self.total / spread**2 / precision
        return np.asarray(self.typical.log_mean + mean + rng.standard_normal(len(mean)) / np.sqrt(precision))

    @cached_property
    def _curve(self) -> tuple[FloatArray, FloatArray, float]:
        """Log values evenly spaced, the log of their density averaged over draws, and the sd of which they reach six to either side."""
        sd = float(np.hypot(self.typical.log_sd, np.exp(self.spread.log_mean + self.spread.log_sd)))
        at = self.typical.log_mean + sd * np.linspace(-_REACH, _REACH, 400)
        few = self[np.unique(np.linspace(0, len(self.total) - 1, _CURVE_DRAWS).astype(int))]
        every = np.tile(np.arange(len(few.total)), len(at))
        logs = few[every].log_density(np.repeat(at, len(few.total))).reshape(len(at), -1)
        top = logs.max(axis=1)
        return at, top + np.log(np.exp(logs - top[:, None]).mean(axis=1)), sd

    def average(self, log_value: FloatArray) -> FloatArray:
        """Return about the log density averaged over draws at any log values: for a proposal."""
        at, logs, sd = self._curve
        # Beyond, as a normal density falls: whoever looks for its mode from out there must be led back.
        beyond = np.abs(log_value - np.clip(log_value, at[0], at[-1])) / sd
        return np.asarray(np.interp(log_value, at, logs) - beyond * (_REACH + 0.5 * beyond))

    def draw(self, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        """Draw the typical value and the spread given the values.

        The linear interpolation of the log spread's density on a grid proposes, and a Metropolis step removes what error that has.

        Returns
        -------
        typical, spread : ndarray, shape (S,)
        """
        points = self._grid(_DRAW_STEP)
        logs = self._log_joint(points)
        table = np.exp(logs - logs.max(axis=1, keepdims=True))
        edges = np.cumsum(table, axis=1)
        count, step, every = len(points), points[1] - points[0], np.arange(len(table))

        def proposed() -> tuple[FloatArray, FloatArray]:
            node = (edges < (rng.random(len(table)) * edges[:, -1])[:, None]).sum(axis=1)
            # The sum of two uniforms is a triangle; within the grid, whose ends weigh nothing.
            place = np.clip(node + rng.random(len(table)) + rng.random(len(table)) - 1.0, 0.0, count - 1.001)
            low = place.astype(int)
            part = place - low
            at = points[0] + step * place
            of_square, of_total, rest = self._terms(at)
            log_joint = of_square * self.square + of_total * self.total**2 + rest
            return at, log_joint - np.log((1 - part) * table[every, low] + part * table[every, low + 1])

        log_spread, excess = proposed()
        other, other_excess = proposed()
        log_spread = np.where(-rng.standard_exponential(len(table)) < other_excess - excess, other, log_spread)
        spread = np.exp(log_spread)
        return np.exp(self._middle(spread, rng)), spread
