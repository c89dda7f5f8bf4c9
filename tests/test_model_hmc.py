"""The exact engine's sampler and coordinates: right on densities whose moments are known, the map's Jacobian counted, no funnel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import arviz as az
import numpy as np
import pytest
import xarray as xr
from scipy.special import polygamma
from simulation import PRIORS, TINY, simulate

from hfdtl_bayes.errors import ConvergenceError
from hfdtl_bayes.model import (
    Convergence,
    ConvergenceSettings,
    ExactDensity,
    PositiveRange,
    SamplerSettings,
    convergence,
    exact_engine,
    sample_exact,
)
from hfdtl_bayes.model.hmc import run_hmc
from hfdtl_bayes.model.scale_coordinates import ScaleCoordinates, scale_coordinates

SETTINGS = SamplerSettings(draws=1000, tune=200, chains=4)
Density = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Affine:
    """A density with its affine coordinates; what they stand for is x."""

    density: Density
    centre: np.ndarray
    factor: np.ndarray

    @property
    def size(self) -> int:
        return len(self.centre)

    def scales(self, q: np.ndarray) -> np.ndarray:
        return self.centre + q @ self.factor.T

    def log_density(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, gradient = self.density(self.scales(q))
        return value, gradient @ self.factor

    def whitened(self, mean: np.ndarray, covariance: np.ndarray) -> Affine:
        return replace(self, centre=self.scales(mean), factor=self.factor @ np.linalg.cholesky(covariance))


COVARIANCE = np.array([[1.0, 1.6, 0.0], [1.6, 4.0, 0.2], [0.0, 0.2, 0.25]])


def normal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pull = np.linalg.solve(COVARIANCE, x[..., None])[..., 0]
    return -0.5 * (x * pull).sum(axis=-1), -pull


def log_gamma(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of independent gamma variables of shape 2: skewed, mean digamma(2), variance trigamma(2)."""
    return (2 * x - np.exp(x)).sum(axis=-1), 2 - np.exp(x)


def sampled(density: Density, size: int, settings: SamplerSettings = SETTINGS, seed: int = 1) -> np.ndarray:
    x, _ = run_hmc(Affine(density, np.zeros(size), np.eye(size)), settings, seed=seed, label="x", show_progress=False)
    return x.reshape(settings.chains, settings.draws, size)


def z_scores(x: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], expected: np.ndarray) -> np.ndarray:
    """Distance of a mean over draws from its expectation, in Monte Carlo standard errors."""
    values = statistic(x)
    found = [float(az.mcse(values[..., i], method="mean")) for i in range(values.shape[-1])]
    return (values.mean(axis=(0, 1)) - expected) / np.array(found)


def test_a_normal_with_the_wrong_first_coordinates_is_sampled_rightly() -> None:
    x = sampled(normal, 3)
    assert np.abs(z_scores(x, lambda v: v, np.zeros(3))).max() < 4
    pairs = lambda v: np.stack([v[..., i] * v[..., j] for i in range(3) for j in range(i, 3)], axis=-1)  # noqa: E731
    expected = np.array([COVARIANCE[i, j] for i in range(3) for j in range(i, 3)])
    assert np.abs(z_scores(x, pairs, expected)).max() < 4


def test_a_skewed_density_is_sampled_rightly() -> None:
    x = sampled(log_gamma, 6)
    mean = polygamma(0, 2)
    assert np.abs(z_scores(x, lambda v: v, np.full(6, mean))).max() < 4
    assert np.abs(z_scores(x, lambda v: (v - mean) ** 2, np.full(6, polygamma(1, 2)))).max() < 4
    assert np.abs(z_scores(x, lambda v: (v - mean) ** 3, np.full(6, polygamma(2, 2)))).max() < 4


def test_the_same_seed_gives_the_same_draws() -> None:
    few = SamplerSettings(draws=50, tune=50, chains=2)
    first, again, other = (sampled(normal, 3, few, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("beyond", ["nan", "singular"])
def test_where_numbers_break_down_the_density_is_zero(beyond: str) -> None:
    def cut(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        far = x[..., 0] > 1
        if beyond == "singular" and far.any():
            np.linalg.inv(np.zeros((2, 2)))
        value, gradient = -0.5 * (x * x).sum(axis=-1), -x
        return np.where(far, np.nan, value), gradient

    x = sampled(cut, 2)
    # A standard normal cut at 1: mean -phi(1) / Phi(1).
    assert x[..., 0].max() <= 1
    assert np.abs(z_scores(x, lambda v: v, np.array([-0.2876, 0.0]))).max() < 4


def test_a_density_that_is_finite_nowhere_is_refused() -> None:
    with pytest.raises(ConvergenceError, match="not finite anywhere"):
        sampled(lambda x: (np.full(len(x), np.nan), np.zeros_like(x)), 2)


@cache
def coordinates(drift: bool, rows: tuple[int, ...]) -> ScaleCoordinates:
    data = simulate(3, rows=rows, priors=PRIORS if drift else replace(PRIORS, drift=None))
    return scale_coordinates(ExactDensity(data.statistics, TINY, data.priors))


@pytest.mark.parametrize("rows", [(60, 40, 80), (2000, 10, 12)])
@pytest.mark.parametrize("drift", [True, False])
def test_gradient_is_that_of_the_density(drift: bool, rows: tuple[int, ...]) -> None:
    at = coordinates(drift, rows)
    q = np.random.default_rng(0).standard_normal((4, at.size))
    _, gradient = at.log_density(q)
    step = 1e-4
    for i, direction in enumerate(step * np.eye(at.size)):
        numeric = (at.log_density(q + direction)[0] - at.log_density(q - direction)[0]) / (2 * step)
        np.testing.assert_allclose(gradient[:, i], numeric, rtol=1e-4, atol=1e-4, err_msg=f"coordinate {i}")


@pytest.mark.parametrize("drift", [True, False])
def test_the_density_is_that_of_the_scales_times_the_jacobian_of_the_map(drift: bool) -> None:
    at = coordinates(drift, (60, 40, 80))
    rng = np.random.default_rng(1)
    step, differences = 1e-5, []
    for q in rng.standard_normal((5, at.size)):
        x = at.scales(q)
        there = np.isfinite(x)
        jacobian = np.array([(at.scales(q + d)[there] - at.scales(q - d)[there]) / (2 * step) for d in step * np.eye(at.size)])
        _, log_determinant = np.linalg.slogdet(jacobian)
        differences.append(at.log_density(q)[0] - at.density.log_density(x)[0] - log_determinant)
    assert there.sum() == at.size
    np.testing.assert_allclose(differences, differences[0], atol=1e-6)


def test_a_machine_that_does_not_drift_and_few_blocks_make_no_funnel() -> None:
    """A handful of blocks leave the drift's scale to the prior: centered, this case has divergences and few effective draws."""
    data = simulate(5, rows=(40, 40, 40), priors=replace(PRIORS, drift=PositiveRange(1e-4, 2e-4)))
    settings = SamplerSettings(draws=300, tune=150, chains=8)
    found = convergence(sample_exact(data.statistics, TINY, PRIORS, settings, show_progress=False))
    assert found.divergences == 0
    assert found.passed, str(found)


def test_without_drift_the_posterior_has_none() -> None:
    data = simulate(3, priors=replace(PRIORS, drift=None))
    few = SamplerSettings(draws=50, tune=50, chains=2)
    tree = sample_exact(data.statistics, TINY, data.priors, few, show_progress=False)
    assert not [n for n in tree["posterior"] if str(n).startswith("omega")]
    assert {"sigma", "sigma_typical", "theta"} <= set(tree["posterior"])


def test_thinning_keeps_every_nth_draw_of_the_same_chains() -> None:
    plain = sampled(normal, 3, SamplerSettings(draws=200, tune=50, chains=2))
    thinned = sampled(normal, 3, SamplerSettings(draws=50, tune=50, chains=2, thin=4))
    np.testing.assert_array_equal(thinned, plain[:, 3::4])


def test_chains_that_do_not_agree_are_continued_until_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    data = simulate(3)
    asked: list[SamplerSettings] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[1])
        return run_hmc(*args, **kwargs)

    monkeypatch.setattr(exact_engine, "run_hmc", run)
    monkeypatch.setattr(exact_engine, "_THIN", (1, 2, 3))
    # Convergence that no first run can show: more effective draws than there are draws.
    wanted = iter((ConvergenceSettings(min_ess=1e5), ConvergenceSettings()))
    monkeypatch.setattr(exact_engine, "convergence", lambda tree, _: convergence(tree, next(wanted)))
    tree = sample_exact(data.statistics, TINY, data.priors, show_progress=False)
    assert [(s.thin, s.target_accept) for s in asked] == [(1, 0.95), (2, 0.95)]
    assert tree["sample_stats"].attrs["thin"] == 2
    # With shorter steps after a divergence.
    asked.clear()
    diverged = iter((1, 1, 0))

    def found(tree: xr.DataTree, _: ConvergenceSettings) -> Convergence:
        divergences = next(diverged)
        return replace(convergence(tree), divergences=divergences, passed=not divergences)

    monkeypatch.setattr(exact_engine, "convergence", found)
    tree = sample_exact(data.statistics, TINY, data.priors, show_progress=False)
    assert [s.thin for s in asked] == [1, 2, 3]
    assert [s.target_accept for s in asked] == pytest.approx([0.95, 0.99, 0.998])
    assert tree["sample_stats"].attrs["target_accept"] == pytest.approx(0.998)
    # Settings that were given are kept to.
    asked.clear()
    sample_exact(data.statistics, TINY, data.priors, SamplerSettings(draws=50, tune=50), show_progress=False)
    assert [s.thin for s in asked] == [1]
