"""Convergence: good chains pass, each kind of bad chain is flagged by the diagnostic made for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray
from posterior_fits import three_fitted
from simulation import TINY, simulate

from hfdtl_bayes.errors import ConvergenceError
from hfdtl_bayes.model import ConvergenceSettings, SamplerSettings, convergence, fit
from hfdtl_bayes.model.nuts import run_nuts

FloatArray = NDArray[np.float64]
CHAINS, DRAWS = 4, 500


def tree(values: FloatArray, divergent: int = 0) -> xr.DataTree:
    """Draws (chain, draw, entry) of one variable beside a good one."""
    good = np.random.default_rng(9).standard_normal(values.shape[:2])
    diverging = np.zeros(values.shape[:2], dtype=bool)
    diverging.flat[:divergent] = True
    dims = ("chain", "draw")
    return xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset({"good": (dims, good), "judged": ((*dims, "entry"), values)}),
            "sample_stats": xr.Dataset({"diverging": (dims, diverging)}),
        }
    )


def normals(seed: int = 1) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((CHAINS, DRAWS, 3))


def slow(values: FloatArray) -> FloatArray:
    """The last entry moves so slowly that neighbours are alike: autocorrelation 0.99."""
    out = values.copy()
    for i in range(1, DRAWS):
        out[:, i, 2] = 0.99 * out[:, i - 1, 2] + np.sqrt(1 - 0.99**2) * values[:, i, 2]
    return out


def shifted(values: FloatArray) -> FloatArray:
    out = values.copy()
    out[0, :, 1] += 1.0
    return out


def widened(values: FloatArray) -> FloatArray:
    out = values.copy()
    out[0, :, 1] *= 3.0
    return out


def test_independent_draws_pass() -> None:
    found = convergence(tree(normals()))
    assert found.passed
    assert found.rhat < 1.02
    assert found.ess_bulk > 1000
    assert found.draws == CHAINS * DRAWS
    assert str(found).startswith("converged: worst R-hat 1.0")


@pytest.mark.parametrize(
    ("damage", "what"),
    [(shifted, "rhat"), (widened, "rhat"), (slow, "ess_bulk")],
)
def test_a_bad_chain_is_flagged_by_its_diagnostic(damage: Callable[[FloatArray], FloatArray], what: str) -> None:
    found = convergence(tree(damage(normals())))
    limits = ConvergenceSettings()
    assert not found.passed
    assert {"rhat": found.rhat > limits.max_rhat, "ess_bulk": found.ess_bulk < limits.min_ess}[what]
    assert str(found).startswith("NOT converged")


def test_the_worst_entry_of_the_worst_variable_counts() -> None:
    values = normals()
    better = convergence(tree(values)).rhat
    values[3, :, 2] += 0.7
    assert convergence(tree(values)).rhat > max(better, 1.02)


def test_a_stuck_chain_is_flagged() -> None:
    values = normals()
    values[2, :, 0] = values[2, 0, 0]
    assert not convergence(tree(values)).passed


def test_draws_without_any_spread_are_not_called_converged() -> None:
    values = normals()
    values[:, :, 1] = 1.5
    assert not convergence(tree(values)).passed


@pytest.mark.parametrize("where", [(0, 0, 0), (slice(None), slice(None), 2)], ids=["one", "a whole entry"])
def test_draws_that_are_not_numbers_are_not_called_converged(where: tuple[int | slice, ...]) -> None:
    """Among many good entries, in the middle of the variables."""
    values = normals()
    values[where] = np.nan
    assert not convergence(tree(values)).passed


@pytest.mark.parametrize(("divergent", "passed"), [(0, True), (4, True), (5, False), (500, False)])
def test_divergences_count(divergent: int, passed: bool) -> None:
    found = convergence(tree(normals(), divergent))
    assert (found.divergences, found.passed) == (divergent, passed)
    assert f"{divergent} divergent" in str(found)


def test_limits_can_be_set() -> None:
    strict = ConvergenceSettings(min_ess=1e6)
    assert not convergence(tree(normals()), strict).passed
    lenient = ConvergenceSettings(max_rhat=10.0, min_ess=1.0, max_divergent_share=1.0)
    assert convergence(tree(shifted(normals()), 100), lenient).passed


def test_a_real_fit_is_judged() -> None:
    found = three_fitted().convergence()
    assert found.draws == 600
    assert found.rhat < 1.1
    assert 50 < found.ess_bulk < 2000


def test_few_draws_are_not_enough() -> None:
    few = SamplerSettings(draws=50, tune=50, chains=2)
    posterior = fit(simulate(1).statistics, TINY, None, few, show_progress=False)
    assert not posterior.convergence().passed


def test_a_density_that_is_never_finite_is_an_error() -> None:
    few = SamplerSettings(draws=50, tune=50, chains=2)
    with pytest.raises(ConvergenceError, match="could not run"):
        run_nuts(lambda x: (np.nan, np.full_like(x, np.nan)), np.zeros(3), few, seed=1, label="x", show_progress=False)


def test_nuts_samples_a_normal_with_its_covariance() -> None:
    """The one place that runs a sampler, on a density whose answer is known."""
    covariance = np.array([[1.0, 0.8, 0.0], [0.8, 1.0, 0.3], [0.0, 0.3, 4.0]])
    precision, mean = np.linalg.inv(covariance), np.array([1.0, -2.0, 0.5])

    def density(x: FloatArray) -> tuple[float, FloatArray]:
        left = x - mean
        return float(-0.5 * left @ precision @ left), -precision @ left

    settings = SamplerSettings(draws=2000, tune=300, chains=2)
    run = run_nuts(density, np.zeros(3), settings, seed=2, label="x", show_progress=False)
    assert run.x.shape == (4000, 3)
    sd = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((run.x.mean(axis=0) - mean) / sd, 0, atol=0.1)
    np.testing.assert_allclose(np.cov(run.x.T) / np.outer(sd, sd), covariance / np.outer(sd, sd), atol=0.15)
    assert set(run.sample_stats.data_vars) >= {"diverging", "energy", "lp", "n_steps", "step_size"}
    np.testing.assert_allclose(run.sample_stats["lp"].to_numpy().ravel()[:50], [density(x)[0] for x in run.x[:50]], rtol=1e-9)
