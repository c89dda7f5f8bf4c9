"""Draws of one configuration, fitted or new, and of what it would be observed to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.model.likelihoods import draw_observed

FloatArray = NDArray[np.float64]

_ROWS_AT_ONCE = 4096
_BLOCK_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Draws:
    """Posterior draws of everything one configuration's predictions need.

    Attributes
    ----------
    theta : ndarray, shape (S, K)
        Coefficients in reference units, config features folded into the constant.
    mean : ndarray, shape (K,)
        Their posterior mean; for a configuration drawn from the population that of the centre, which has no Monte Carlo error of
        the deviation.
    sigma, omega : ndarray, shape (S,)
        Relative sds of a row's noise and of a block's drift.
    known : bool
        True if the configuration was fitted, False if it was drawn from the population.
    likelihood : str
        How single rows are distributed around mean and drift; see `hfdtl_bayes.model.likelihoods`.
    shape : dict
        Draws, shape (S,), of what gives its shape; empty for the Gaussian.
    """

    theta: FloatArray
    mean: FloatArray
    sigma: FloatArray
    omega: FloatArray
    known: bool
    likelihood: str = "gaussian"
    shape: dict[str, FloatArray] = field(default_factory=dict)

    def observations(self, mean: FloatArray, scale: FloatArray, rng: np.random.Generator) -> FloatArray:
        """Draw new observations, each with a drift of its own, shape (S, n), seconds.

        Parameters
        ----------
        mean : ndarray, shape (S, n)
            Expected values, seconds.
        scale : ndarray, shape (n,)
            What errors are relative to, seconds; where it is 0, so is the error.
        rng : Generator
        """
        if self.likelihood == "gaussian":
            error_sd = np.hypot(self.sigma, self.omega)
            return np.asarray(mean + error_sd[:, None] * scale * rng.standard_normal(mean.shape))
        return self._given_drift(mean, scale, self.omega[:, None] * rng.standard_normal(mean.shape), rng)

    def predictive(self, design: FloatArray, scale: FloatArray, seed: int) -> Iterator[tuple[slice, FloatArray, FloatArray]]:
        """Yield, part by part, which rows, draws of their expected values and of new observations, shape (S, rows), seconds.

        Parameters
        ----------
        design : ndarray, shape (n, K)
            Seconds per unit coefficient.
        scale : ndarray, shape (n,)
            As in `observations`.
        seed : int
        """
        rng = np.random.default_rng([seed, 1])
        for start in range(0, len(design), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            mean = self.theta @ design[part].T
            yield part, mean, self.observations(mean, scale[part], rng)

    def _given_drift(self, mean: FloatArray, scale: FloatArray, drift: FloatArray, rng: np.random.Generator) -> FloatArray:
        safe = np.where(scale > 0, scale, 1.0)
        drawn = draw_observed(self.likelihood, self.shape, mean / safe + drift, self.sigma, rng)
        return np.where(scale > 0, safe * drawn, mean)

    def block_means(self, mean: FloatArray, scale: FloatArray, block: NDArray[np.int64], rng: np.random.Generator) -> FloatArray:
        """Draw means over blocks of new observations that share one drift, shape (S, B), seconds.

        Parameters
        ----------
        mean, scale
            As in `observations`.
        block : ndarray of int, shape (n,)
            Block of each row, from 0 to B - 1.
        """
        counts = np.bincount(block)
        drift = self.omega[:, None] * rng.standard_normal((len(mean), len(counts)))
        total = np.zeros((len(counts), len(mean)))
        for start in range(0, len(block), _BLOCK_ROWS_AT_ONCE):
            part = slice(start, start + _BLOCK_ROWS_AT_ONCE)
            np.add.at(total, block[part], self._given_drift(mean[:, part], scale[part], drift[:, block[part]], rng).T)
        return np.asarray((total / counts[:, None]).T)
