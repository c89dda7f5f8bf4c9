"""Moves of the scales given the coefficients, for many draws at once: what parts copies of one draw from each other.

Given (beta, gamma, delta, w, theta) the group sds and their common share have full conditionals of one dimension, which a few Metropolis
steps leave as they are. Each draw moves on its own; no row is read. After Gilks & Berzuini (2001), doi:10.1111/1467-9868.00280.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logit

from hfdtl_bayes.model.priors import PriorSettings

FloatArray = NDArray[np.float64]

_STEPS = 4
"""Metropolis steps per sweep: enough that little is left of where a draw came from."""


def _metropolis(
    log_density: Callable[[FloatArray], FloatArray], start: FloatArray, width: FloatArray | float, rng: np.random.Generator
) -> FloatArray:
    """Return where `_STEPS` steps of a random walk end, every entry of `start` on its own."""
    at, value = start, log_density(start)
    for _ in range(_STEPS):
        new = at + width * rng.standard_normal(at.shape)
        new_value = log_density(new)
        taken = -rng.standard_exponential(at.shape) < new_value - value
        at, value = np.where(taken, new, at), np.where(taken, new_value, value)
    return at


def move_group_sds(
    tau: FloatArray,
    share: FloatArray,
    deviations: FloatArray,
    effects: FloatArray,
    priors: PriorSettings,
    rng: np.random.Generator,
) -> tuple[FloatArray, FloatArray]:
    """Move tau and the share of hardware given what they are the sds of.

    With e the deviations of C configurations and w the effects of H kinds of hardware, both divided by the deviation scale,

        log p(u) = prior(u) - (C + H) u - exp(-2 u) (sum e^2 / (1 - rho) + sum w^2 / rho) / 2,     u = log tau
        log p(v) = prior(v) - K (C log(1 - rho) + H log rho) / 2 - (sum (e / tau)^2 / (1 - rho) + sum (w / tau)^2 / rho) / 2,  v = logit rho

    Parameters
    ----------
    tau : ndarray, shape (N, K)
    share : ndarray, shape (N,)
    deviations : ndarray, shape (N, C, K)
    effects : ndarray, shape (N, H, K)
    priors : PriorSettings
    rng : Generator

    Returns
    -------
    tau, share : ndarray
        As given, moved.
    """
    own, shared = (deviations**2).sum(axis=1), (effects**2).sum(axis=1)
    count, kinds, k = deviations.shape[1], effects.shape[1], tau.shape[1]
    prior = priors.deviation
    odds = logit(share)
    for _ in range(2):
        rho = expit(odds)[:, None]
        total = own / (1 - rho) + shared / rho

        def of_log_tau(u: FloatArray, total: FloatArray = total) -> FloatArray:
            return np.asarray(
                (prior.gamma_shape - count - kinds) * u - prior.gamma_rate * np.exp(u) - 0.5 * total * np.exp(-2 * u)
            )

        width = 2.4 / np.sqrt(prior.gamma_shape + 2 * (count + kinds))
        tau = np.exp(_metropolis(of_log_tau, np.log(tau), width, rng))
        own_square, shared_square = (own / tau**2).sum(axis=1), (shared / tau**2).sum(axis=1)

        def of_log_odds(v: FloatArray, own: FloatArray = own_square, shared: FloatArray = shared_square) -> FloatArray:
            in_common, apart = log_expit(v), log_expit(-v)
            logs = (priors.hardware_share - 0.5 * k * kinds) * in_common + (priors.hardware_share - 0.5 * k * count) * apart
            return np.asarray(logs - 0.5 * (own * np.exp(-apart) + shared * np.exp(-in_common)))

        odds = _metropolis(of_log_odds, odds, 2.4 / np.sqrt(1 + 0.25 * k * min(count, kinds)), rng)
    return tau, np.asarray(expit(odds))
