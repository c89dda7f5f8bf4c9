"""Hamiltonian Monte Carlo for densities that are nearly standard normal, many chains in step.

In the coordinates of `scale_coordinates` the posterior is a standard normal times a smooth correction. The motion under the normal part is
a rotation of (q, p), which is exact for any step; only the correction needs steps:

    p += h/2 (gradient log p + q),    (q, p) <- rotation by h,    p += h/2 (gradient log p + q)

so steps are longer and errors smaller than the leapfrog's (split Hamiltonian Monte Carlo: Shahbaba, Lan, Johnson & Neal (2014),
doi:10.1007/s11222-012-9373-1). Rotations by a random angle around a quarter turn make draws nearly independent, with no
need to look for U-turns, and so all chains can move in step: one NumPy call evaluates the density for all of them, which costs a
fraction of one call each. In warm-up the step size follows the acceptance rate (Andrieu & Thoms (2008), doi:10.1007/s11222-008-9110-y)
and the coordinates are standardised once more by the pooled moments of the chains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from hfdtl_bayes.errors import ConvergenceError
from hfdtl_bayes.model.progress import progress
from hfdtl_bayes.model.sampling import SamplerRun, SamplerSettings

FloatArray = NDArray[np.float64]

_ANGLES = (1.0, 3.0)
"""Rotation per draw, drawn uniformly: a quarter turn (1.57) would make a normal's draws independent; the spread breaks resonance."""
_LONGEST_STEP = 1.5
_MOST_STEPS = 30
"""Steps of one transition at most: where the step size collapses, a long run must not take for ever to say that it does not converge."""
_START_SD = 1.5
"""Starts are spread more widely than the posterior, so that R-hat sees chains that have not met."""
_DIVERGENT = 1000.0
"""Energy error that counts as a divergence, as in Stan and nutpie."""


class Coordinates(Protocol):
    """What is sampled: a density in coordinates of which many points are evaluated at once; see `ScaleCoordinates`."""

    @property
    def size(self) -> int:
        """Number of coordinates."""

    def log_density(self, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return log density, shape (n,), and gradient, shape (n, size), at coordinates of shape (n, size)."""

    def scales(self, q: FloatArray) -> FloatArray:
        """Return what the coordinates stand for."""

    def whitened(self, mean: FloatArray, covariance: FloatArray) -> Self:
        """Return coordinates in which draws of this mean and covariance are standard."""


class _StepSize:
    """Robbins-Monro adaptation of the log step size to a target acceptance rate, with iterate averaging."""

    def __init__(self, target: float) -> None:
        self.target, self.log, self.averaged, self.count = target, 0.0, 0.0, 0

    def update(self, accepted: float) -> None:
        self.count += 1
        self.log = min(self.log + 1.5 * (self.count + 5) ** -0.6 * (accepted - self.target), float(np.log(_LONGEST_STEP)))
        weight = self.count**-0.6 if self.count > 5 else 1.0
        self.averaged += weight * (self.log - self.averaged)


def run_hmc(
    coordinates: Coordinates, settings: SamplerSettings, *, seed: int, label: str, show_progress: bool
) -> tuple[FloatArray, SamplerRun]:
    """Sample the scales.

    Parameters
    ----------
    coordinates : Coordinates
        In which the density is roughly standard normal.
    settings : SamplerSettings
    seed : int
        The same seed gives the same draws.
    label : str
        What the progress bar calls the work.
    show_progress : bool

    Returns
    -------
    scales : ndarray, shape (chains * draws, size of the density)
        Unconstrained scales, chain by chain.
    run : SamplerRun
        The sampler's own coordinates and statistics.

    Raises
    ------
    ConvergenceError
        If the density is not finite at any starting point.
    """
    rng = np.random.default_rng([seed, 7])
    chains, size = settings.chains, coordinates.size
    at = coordinates
    state = _State.at(at, _START_SD * rng.standard_normal((chains, size)))
    if not np.isfinite(state.value).any():
        raise ConvergenceError(
            "the sampler could not start: the density is not finite anywhere. Check the statistics and the priors"
        )
    step = _StepSize(settings.target_accept)
    warm: list[FloatArray] = []
    transitions = settings.draws * settings.thin
    kept = np.empty((chains, settings.draws, size))
    stats = {name: np.empty((chains, settings.draws)) for name in ("diverging", "energy", "lp", "n_steps", "acceptance_rate")}
    diverged = np.zeros(chains, dtype=bool)
    with progress(label, settings.tune + transitions, enabled=show_progress) as advance:
        for i in range(settings.tune):
            if i == settings.tune // 2:
                mean, covariance = _pooled(np.concatenate(warm[len(warm) // 3 :]))
                at = at.whitened(mean, covariance)
                state = _State.at(at, np.linalg.solve(np.linalg.cholesky(covariance), (state.q - mean).T).T)
                step = _StepSize(settings.target_accept)
            state, move = _transition(at, state, np.exp(step.log), rng)
            step.update(float(move.accepted.mean()))
            warm.append(state.q)
            advance()
        for i in range(transitions):
            state, move = _transition(at, state, np.exp(step.averaged), rng)
            # Of draws passed over a divergence is remembered all the same.
            diverged |= move.gain < -_DIVERGENT
            draw, passed_over = divmod(i, settings.thin)
            if passed_over == settings.thin - 1:
                kept[:, draw] = state.q
                found = (diverged, move.energy, state.value, np.full(chains, move.steps), move.accepted)
                for name, values in zip(stats, found, strict=True):
                    stats[name][:, draw] = values
                diverged = np.zeros(chains, dtype=bool)
            advance()
    stats["step_size"] = np.full((chains, settings.draws), np.exp(step.averaged))
    kinds = {"diverging": bool, "n_steps": int}
    dataset = xr.Dataset({name: (("chain", "draw"), v.astype(kinds.get(name, float))) for name, v in stats.items()})
    flat = kept.reshape(-1, size)
    return at.scales(flat), SamplerRun(flat, dataset, "split Hamiltonian Monte Carlo, chains in step")


@dataclass(frozen=True)
class _State:
    """Where the chains are, with log density and gradient there."""

    q: FloatArray
    value: FloatArray
    gradient: FloatArray

    @classmethod
    def at(cls, coordinates: Coordinates, q: FloatArray) -> _State:
        return cls(q, *_guarded(coordinates, q))


@dataclass(frozen=True)
class _Move:
    """What a transition did, per chain: energy before, log acceptance ratio, acceptance probability, steps."""

    energy: FloatArray
    gain: FloatArray
    accepted: FloatArray
    steps: int


def _transition(at: Coordinates, state: _State, longest: float, rng: np.random.Generator) -> tuple[_State, _Move]:
    """Move every chain once: fresh momentum, a rotation by a random angle in steps of at most `longest`, accept or stay."""
    angle = rng.uniform(*_ANGLES)
    steps = int(np.ceil(angle / longest))
    if steps > _MOST_STEPS:
        steps, angle = _MOST_STEPS, _MOST_STEPS * longest
    p = rng.standard_normal(state.q.shape)
    energy = 0.5 * np.vecdot(p, p) - state.value
    new, p = _rotate(at, state, p, angle / steps, steps)
    with np.errstate(invalid="ignore", over="ignore"):
        gain = np.nan_to_num(new.value - 0.5 * np.vecdot(p, p) + energy, nan=-np.inf)
    accepted = np.exp(np.minimum(gain, 0.0))
    moved = rng.random(len(p)) < accepted
    there = _State(
        np.where(moved[:, None], new.q, state.q),
        np.where(moved, new.value, state.value),
        np.where(moved[:, None], new.gradient, state.gradient),
    )
    return there, _Move(energy, gain, accepted, steps)


def _rotate(at: Coordinates, state: _State, p: FloatArray, h: float, steps: int) -> tuple[_State, FloatArray]:
    """Follow the motion for `steps` rotations by `h`; returns where it ends and the momentum there."""
    cos, sin = np.cos(h), np.sin(h)
    with np.errstate(invalid="ignore", over="ignore"):
        for _ in range(steps):
            p = p + 0.5 * h * (state.gradient + state.q)
            q, p = cos * state.q + sin * p, cos * p - sin * state.q
            state = _State.at(at, q)
            p = p + 0.5 * h * (state.gradient + state.q)
    return state, p


def _guarded(at: Coordinates, q: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the log density and gradient; minus infinity and zero where numbers overflow, so that the move is refused."""
    with np.errstate(all="ignore"):
        try:
            value, gradient = at.log_density(q)
        except np.linalg.LinAlgError:
            # One singular matrix stops the whole batch: find whose it is.
            if len(q) == 1:
                return np.array([-np.inf]), np.zeros_like(q)
            parts = [_guarded(at, row[None]) for row in q]
            value, gradient = np.concatenate([v for v, _ in parts]), np.concatenate([g for _, g in parts])
    good = np.isfinite(value) & np.isfinite(gradient).all(axis=-1)
    return np.where(good, value, -np.inf), np.where(good[:, None], gradient, 0.0)


def _pooled(draws: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return mean and covariance of draws, the covariance drawn to the identity by as much as that many draws can be trusted."""
    n, size = draws.shape
    trust = n / (n + 2 * size)
    return draws.mean(axis=0), trust * np.cov(draws.T).reshape(size, size) + (1 - trust) * np.eye(size)
