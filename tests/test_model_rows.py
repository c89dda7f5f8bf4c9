"""Row-level likelihoods: the Gaussian is the other engines' model, the others are what they say, and each finds its own parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pymc as pm
import pytensor
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pytensor.compile.mode import Mode
from scipy import stats
from scipy.stats import multivariate_normal
from simulation import PRIORS, THREE, TINY, Simulated, batches, error_covariance, pilot_of, simulate

from hfdtl_bayes.errors import StatisticsError, UnknownNameError
from hfdtl_bayes.features import register_feature_set, registry
from hfdtl_bayes.model import (
    LatencyPosterior,
    PriorSettings,
    SamplerSettings,
    build_model,
    build_rows_model,
    fit,
    rows_engine,
    sample_exact,
    sample_rows,
)
from hfdtl_bayes.model.layout import SHAPE_DIMS, VARIABLE_DIMS
from hfdtl_bayes.model.likelihoods import SHAPES, draw_observed, log_density, ordinary_weights, sd_over_core
from hfdtl_bayes.model.pymc_model import model_data
from hfdtl_bayes.model.rows_model import rows_data
from hfdtl_bayes.statistics import ScaledRows, rows_from_dataset, rows_to_dataset, scaled_rows
from hfdtl_bayes.statistics.scaled_rows import chosen_blocks

FloatArray = NDArray[np.float64]

PLAIN = Mode(linker="py", optimizer="fast_compile")
SHAPE = {"nu": np.array([5.0]), "outlier_share": np.array([0.05]), "outlier_ratio": np.array([6.0])}
NO_DRIFT = replace(PRIORS, drift=None)


def rows_of(data: Simulated, most: int | None = None) -> list[ScaledRows]:
    return [
        scaled_rows(f, c, data.features, block_length=data.block, pilot=pilot_of(data.features, c), rows=most)
        for f, c in zip(data.frames, data.configurations, strict=True)
    ]


PROBLEMS = {
    "three configurations": simulate(1),
    "one configuration of two rows": simulate(5, THREE[:1], rows=(2,)),
    "blocks of unequal size": simulate(7, rows=(33, 47, 25)),
    "blocks of one row": simulate(8, rows=20, block=1),
}


@cache
def both_densities(priors: PriorSettings) -> tuple[tuple[pm.Model, Callable[..., FloatArray]], ...]:
    """The models on pseudo-rows and on rows, compiled once: data are free in size."""
    data = PROBLEMS["three configurations"]
    models = build_model(data.statistics, TINY, priors), build_rows_model(rows_of(data), TINY, priors)
    return tuple((m, pytensor.function(m.value_vars, m.logp(), mode=PLAIN)) for m in models)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("priors", [PRIORS, NO_DRIFT], ids=["drift", "no drift"])
def test_gaussian_rows_are_the_pseudo_rows_up_to_a_constant(priors: PriorSettings, name: str) -> None:
    data = PROBLEMS[name]
    (pseudo, of_pseudo), (by_row, of_rows) = both_densities(priors)
    assert {v.name for v in pseudo.value_vars} == {v.name for v in by_row.value_vars}
    assert any(v.name.startswith("omega") for v in by_row.value_vars) == (priors is PRIORS)
    for model, values in (
        (pseudo, model_data(data.statistics, TINY, priors)),
        (by_row, rows_data(rows_of(data), TINY, priors, "gaussian")),
    ):
        for key, value in values.items():
            model[key].set_value(value)
    rng = np.random.default_rng(41)
    count, hardware = len(data.configurations), len({c.hardware.name for c in data.configurations})
    sizes = {"theta_eta__": (count, 3), "hardware_effect_z": (hardware, 3), "sigma_log__": count, "omega_log__": count}
    start = {n: np.broadcast_to(v.mean(axis=0), sizes[n]) if n in sizes else v for n, v in pseudo.initial_point().items()}
    differences, largest = [], []
    for width in (0.1, 0.3, 0.5, 1.0, 1.0):
        at = {n: np.asarray(v, float) + width * rng.standard_normal(np.shape(v)) for n, v in start.items()}
        a, b = (float(f(*(at[v.name] for v in m.value_vars))) for m, f in ((pseudo, of_pseudo), (by_row, of_rows)))
        differences.append(a - b)
        largest.append(abs(a))
    np.testing.assert_allclose(differences, differences[0], rtol=0, atol=1e-12 * max(largest) + 1e-6)


def test_gaussian_rows_are_the_dense_normal() -> None:
    """What the rows add to the prior is log Normal(y | X theta, sigma^2 I + omega^2 1 1') of every configuration."""
    data = PROBLEMS["blocks of unequal size"]
    rows = rows_of(data)
    model = build_rows_model(rows, TINY, PRIORS)
    values = model.value_vars
    likelihood = sum(p for p in model.potentials)
    theta, sigma, omega = model.replace_rvs_by_values([model["theta"], model["sigma"], model["omega"]])
    (potential,) = model.replace_rvs_by_values([likelihood])
    found = pytensor.function(values, [potential, theta, sigma, omega], mode=PLAIN, on_unused_input="ignore")
    rng = np.random.default_rng(42)
    differences = []
    for _ in range(4):
        at = {n: np.asarray(v, float) + 0.4 * rng.standard_normal(np.shape(v)) for n, v in model.initial_point().items()}
        density, coefficients, noise, drift = found(*(at[v.name] for v in values))
        dense = sum(
            multivariate_normal.logpdf(r.observed, r.design @ coefficients[c], error_covariance(r.block, noise[c], drift[c]))
            for c, r in enumerate(rows)
        )
        differences.append(density - dense)
    # sqrt(2 pi) of the contrasts is left out.
    np.testing.assert_allclose(differences, differences[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("likelihood", "priors"), [("student_t", PRIORS), ("lognormal", NO_DRIFT), ("outliers", PRIORS)], ids=lambda p: str(p)[:9]
)
def test_other_likelihoods_have_the_names_and_a_finite_true_gradient(likelihood: str, priors: PriorSettings) -> None:
    model = build_rows_model(rows_of(PROBLEMS["three configurations"]), TINY, priors, likelihood)
    found = {v.name for v in (*model.free_RVs, *model.deterministics)}
    expected = {n for n in (*VARIABLE_DIMS, *SHAPES[likelihood]) if priors is PRIORS or not n.startswith("omega")}
    assert expected <= found
    values = model.value_vars
    density = pytensor.function(values, [model.logp(), *pytensor.grad(model.logp(), values)], mode=PLAIN)
    rng = np.random.default_rng(43)
    at = {n: np.asarray(v, float) + 0.1 * rng.standard_normal(np.shape(v)) for n, v in model.initial_point().items()}
    direction = {n: rng.standard_normal(np.shape(v)) for n, v in at.items()}
    _, *slopes = density(*(at[v.name] for v in values))
    step = 1e-6
    high, low = (density(*(at[v.name] + sign * step * direction[v.name] for v in values))[0] for sign in (1, -1))
    along = sum(float((g * direction[v.name]).sum()) for g, v in zip(slopes, values, strict=True))
    assert np.isfinite(along)
    assert along == pytest.approx((high - low) / (2 * step), rel=1e-4, abs=1e-3)


def test_the_coordinates_of_block_effects_leave_the_model_alone() -> None:
    """log p = likelihood of rows + Normal(d; 0, omega) + the Jacobian of d in its coordinates, all else the hierarchy."""
    data = PROBLEMS["three configurations"]
    rows = rows_of(data)
    model = build_rows_model(rows, TINY, PRIORS, "student_t")
    effect = model.potentials[0]
    assert effect.name == "block_effects"
    inputs = model.value_vars
    # d is affine in eta, so at eta = 0 and eta = 1 its potential tells mean and sd of the coordinates.
    (potential,) = model.replace_rvs_by_values([effect])
    found = pytensor.function(inputs, potential, mode=PLAIN, on_unused_input="ignore")
    at = model.initial_point()
    blocks = sum(len(r.starts) for r in rows)
    rng = np.random.default_rng(44)
    at["block_eta"] = rng.standard_normal(blocks)
    theta, omega = (
        pytensor.function(inputs, model.replace_rvs_by_values([model[n]])[0], mode=PLAIN, on_unused_input="ignore")(
            *(at[v.name] for v in inputs)
        )
        for n in ("theta", "omega")
    )
    expected, done = 0.0, 0
    weight = model["y_precision"].get_value()
    first = 0
    for c, r in enumerate(rows):
        error = r.observed - r.design @ theta[c]
        for b in range(len(r.starts)):
            inside = r.block == b
            w = weight[first : first + len(error)][inside]
            variance = 1 / (1 / omega[c] ** 2 + w.sum())
            d = variance * (w * error[inside]).sum() + np.sqrt(variance) * at["block_eta"][done]
            expected += stats.norm(0, omega[c]).logpdf(d) + 0.5 * np.log(variance)
            done += 1
        first += len(error)
    assert float(found(*(at[v.name] for v in inputs))) == pytest.approx(expected, rel=1e-9)


# --- The likelihoods themselves. ---


@pytest.mark.parametrize("likelihood", SHAPES)
def test_a_likelihood_is_a_density_with_the_mean_and_sd_it_states(likelihood: str) -> None:
    shape = {n: SHAPE[n] for n in SHAPES[likelihood]}
    sigma, mean = np.array([0.2]), np.array([[1.1]])
    y = np.linspace(-60 if likelihood != "lognormal" else 1e-6, 60, 4_000_001)
    density = np.exp(log_density(likelihood, shape, y[None, :], mean, sigma))[0]
    total, first = np.trapezoid(density, y), np.trapezoid(density * y, y)
    second = np.trapezoid(density * (y - 1.1) ** 2, y)
    assert total == pytest.approx(1.0, abs=1e-6)
    assert first == pytest.approx(1.1, abs=1e-6)
    assert np.sqrt(second) == pytest.approx(0.2, rel=2e-3)


def test_densities_are_those_of_scipy() -> None:
    y, mean = np.array([[0.3, 0.9, 1.0, 4.0]]), np.array([[1.0, 1.1, 1.2, 0.9]])
    sigma = np.array([0.2])
    np.testing.assert_allclose(log_density("gaussian", {}, y, mean, sigma), stats.norm(mean, 0.2).logpdf(y))
    core = 0.2 * np.sqrt(3 / 5)
    np.testing.assert_allclose(log_density("student_t", SHAPE, y, mean, sigma), stats.t(5, mean, core).logpdf(y))
    log_sd = np.sqrt(np.log1p((0.2 / mean) ** 2))
    lognormal = stats.lognorm(log_sd, scale=mean * np.exp(-(log_sd**2) / 2))
    np.testing.assert_allclose(lognormal.std(), 0.2)
    np.testing.assert_allclose(log_density("lognormal", {}, y, mean, sigma), lognormal.logpdf(y))
    core = 0.2 / np.sqrt(0.95 + 0.05 * 36)
    mixed = 0.95 * stats.norm(mean, core).pdf(y) + 0.05 * stats.norm(mean, 6 * core).pdf(y)
    np.testing.assert_allclose(log_density("outliers", SHAPE, y, mean, sigma), np.log(mixed), rtol=1e-10)
    assert log_density("lognormal", {}, np.array([[0.0, -1.0]]), np.ones((1, 2)), sigma).tolist() == [[-np.inf, -np.inf]]


@pytest.mark.parametrize("likelihood", SHAPES)
def test_draws_are_from_the_density(likelihood: str) -> None:
    shape = {n: SHAPE[n] for n in SHAPES[likelihood]}
    rng = np.random.default_rng(45)
    drawn = draw_observed(likelihood, shape, np.full((1, 20_000), 1.1), np.array([0.2]), rng)[0]
    y = np.linspace(-30 if likelihood != "lognormal" else 1e-9, 30, 600_001)
    density = np.exp(log_density(likelihood, shape, y[None, :], np.array([[1.1]]), np.array([0.2])))[0]
    cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(y))])
    assert stats.kstest(np.interp(drawn, y, cumulative), "uniform").pvalue > 1e-3


@given(error=st.floats(-3, 3).filter(lambda e: abs(e) > 1e-3), likelihood=st.sampled_from(["gaussian", "student_t", "outliers"]))
def test_weights_are_the_slope_of_the_density_over_the_error(error: float, likelihood: str) -> None:
    at, step, sigma = np.array([[error]]), 1e-6, np.array([0.2])
    density = [log_density(likelihood, SHAPE, at + s, np.zeros((1, 1)), sigma) for s in (-step, step)]
    slope = (density[1] - density[0]) / (2 * step)
    np.testing.assert_allclose(ordinary_weights(likelihood, SHAPE, at, sigma), -slope / error, rtol=1e-4, atol=1e-4)


def test_sd_over_core_is_one_without_tails() -> None:
    assert sd_over_core("gaussian", {}) == 1
    assert sd_over_core("student_t", {"nu": np.array([1e9])}) == pytest.approx(1)
    assert sd_over_core("outliers", {"outlier_share": np.zeros(1), "outlier_ratio": np.array([5.0])}) == 1


# --- The subsample. ---


@given(count=st.integers(1, 300), size=st.integers(1, 40), rows=st.integers(1, 2000), seed=st.integers(0, 5))
def test_chosen_blocks_are_whole_even_and_within_the_bound(count: int, size: int, rows: int, seed: int) -> None:
    sizes = np.full(count, size)
    if rows < size:
        with pytest.raises(StatisticsError, match="allow more rows"):
            chosen_blocks(sizes, rows, seed)
        return
    chosen = chosen_blocks(sizes, rows, seed)
    assert sizes[chosen].sum() <= rows
    # No more than one block's worth is left unused.
    assert len(chosen) == min(count, rows // size)
    gaps = np.diff(chosen)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("numbered", [True, False])
def test_a_subsample_keeps_blocks_scale_and_statistics(numbered: bool) -> None:
    rng = np.random.default_rng(46)
    frame = batches(rng, 500).assign(step_time_s=lambda f: 0.01 + 1e-5 * f["prefill_tokens"] + 1e-4 * rng.random(len(f)))
    frame.index = pd.RangeIndex(1000, 1500)
    if not numbered:
        frame = frame.drop(columns="step_id")
    every = scaled_rows(frame, THREE[0], TINY, block_length=10, rows=None)
    some = scaled_rows(frame, THREE[0], TINY, block_length=10, rows=205, seed=3)
    assert (len(some.observed), len(some.starts), some.available_rows, some.available_blocks) == (200, 20, 500, 50)
    assert str(some) == "one: 200 of 500 rows, 20 of 50 time blocks, evenly spread"
    assert str(every) == "one: all 500 rows"
    at = some.index - 1000
    np.testing.assert_array_equal(some.design, every.design[at])
    np.testing.assert_array_equal(some.observed, every.observed[at])
    np.testing.assert_array_equal(np.unique(every.block[at], return_inverse=True)[1], some.block)
    np.testing.assert_allclose(some.observed * some.scale, frame["step_time_s"].loc[some.index])
    assert some.statistics.rows == 200
    assert some.statistics.blocks == 20
    np.testing.assert_array_equal(some.statistics.pilot, every.statistics.pilot)
    again = scaled_rows(frame, THREE[0], TINY, block_length=10, rows=205, seed=3)
    np.testing.assert_array_equal(again.index, some.index)
    stored = rows_from_dataset(rows_to_dataset(some), some.statistics)
    for name in ("design", "observed", "scale", "block", "index", "starts"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(some, name))
    with pytest.raises(StatisticsError, match="are not those its statistics were made from"):
        rows_from_dataset(rows_to_dataset(some), every.statistics)
    with pytest.raises(StatisticsError, match="cannot be read"):
        rows_from_dataset(rows_to_dataset(some).drop_vars("block"), some.statistics)


# --- What is refused. ---


def test_what_cannot_be_fitted_is_refused() -> None:
    data = PROBLEMS["three configurations"]
    rows = rows_of(data)
    for build in (build_rows_model, sample_rows):
        with pytest.raises(StatisticsError, match="named twice: one"):
            build([rows[0], rows[0]], TINY)
        with pytest.raises(
            UnknownNameError, match="unknown likelihood 'cauchy'; known are gaussian, student_t, lognormal, outliers"
        ):
            build(rows, TINY, likelihood="cauchy")
    low = replace(rows[0], observed=np.where(np.arange(len(rows[0].observed)) < 3, 0.0, rows[0].observed))
    with pytest.raises(StatisticsError, match="'one': 3 of 60 observations are not above zero"):
        sample_rows([low], TINY, PRIORS, likelihood="lognormal")
    with pytest.raises(StatisticsError, match="must be at least 1, found 0"):
        scaled_rows(data.frames[0], THREE[0], TINY, rows=0)
    statistics = [r.statistics for r in rows]
    for engine in ("exact", "pymc"):
        with pytest.raises(UnknownNameError, match=f"engine '{engine}' fits sufficient statistics, which only the gaussian"):
            fit(statistics, TINY, PRIORS, engine=engine, likelihood="student_t")
    with pytest.raises(StatisticsError, match=r'engine "rows" needs the rows .* found those of none'):
        fit(statistics, TINY, PRIORS, engine="rows")
    with pytest.raises(StatisticsError, match="found those of one, two;"):
        fit(statistics, TINY, PRIORS, engine="rows", rows=rows[:2])


# --- Sampling: compilation to machine code takes half a minute. ---

SAMPLER = SamplerSettings(draws=500, tune=400, chains=2)


THETA = np.array([[1.1, 0.9, 1.7], [1.3, 0.8, 1.4], [0.9, 1.2, 1.5]])
"""Coefficients of the three configurations, all positive: hardly a step takes less than no time, whatever its errors."""


def observed_with(likelihood: str, seed: int, count: int = 1500) -> tuple[Simulated, list[ScaledRows]]:
    """Rows of three configurations whose errors have the likelihood's distribution, with a drift."""
    rng = np.random.default_rng(seed)
    data = simulate(seed, rows=count, block=20)
    shape = {n: SHAPE[n] for n in SHAPES[likelihood]}
    frames = []
    for c, (own, frame) in enumerate(zip(data.configurations, data.frames, strict=True)):
        design = TINY.design(frame, own)
        scale = np.maximum(design @ pilot_of(TINY, own), TINY.noise_floor(own))
        drift = rng.normal(0, 0.05, count)[frame["step_id"].to_numpy() // data.block]
        drawn = draw_observed(likelihood, shape, (design @ THETA[c] / scale + drift)[None], np.array([0.08]), rng)[0]
        frames.append(frame.assign(step_time_s=drawn * scale))
    data = replace(data, frames=tuple(frames))
    return data, rows_of(data)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", SHAPES)
def test_a_likelihood_finds_the_parameters_its_data_were_made_with(likelihood: str) -> None:
    _, rows = observed_with(likelihood, 47)
    statistics = [r.statistics for r in rows]
    found = fit(statistics, TINY, PRIORS, SAMPLER, engine="rows", likelihood=likelihood, rows=rows, seed=1, show_progress=False)
    theta = found.draws_of("theta")
    z = (theta.mean(axis=0) - THETA) / theta.std(axis=0)
    assert np.abs(z).max() < 3.7
    truths = {"sigma": np.full(3, 0.08), "omega": np.full(3, 0.05)} | {n: SHAPE[n][0] for n in SHAPES[likelihood]}
    for name, truth in truths.items():
        logs = np.log(found.draws_of(name))
        assert (np.abs(logs.mean(axis=0) - np.log(truth)) / logs.std(axis=0)).max() < 3.7, name
    assert found.convergence().rhat < 1.05
    assert set(SHAPES[likelihood]) == {str(n) for n in found.tree["posterior"].data_vars} & set(SHAPE_DIMS)


@pytest.mark.slow
def test_gaussian_rows_give_the_posterior_of_the_exact_engine() -> None:
    data = simulate(48, rows=(200, 150, 250))
    rows = rows_of(data)
    settings = SamplerSettings(draws=1500, tune=500, chains=4)
    exact = sample_exact(data.statistics, TINY, PRIORS, settings, seed=3, show_progress=False)["posterior"].to_dataset()
    sampled = sample_rows(rows, TINY, PRIORS, settings, seed=3, show_progress=False)["posterior"].to_dataset()
    assert {n: v.dims for n, v in exact.data_vars.items()} == {n: v.dims for n, v in sampled.data_vars.items()}
    for name in exact.data_vars:
        positive = str(name).startswith(("tau", "sigma", "omega"))
        a, b = (np.log(d[name]) if positive else d[name] for d in (exact, sampled))
        sd = a.std(("chain", "draw"))
        # At least 400 effective draws each: five standard errors of the difference of two means.
        assert float((abs(a.mean(("chain", "draw")) - b.mean(("chain", "draw"))) / sd).max()) < 5 * np.sqrt(2 / 400), name
        assert float(abs(np.log(b.std(("chain", "draw")) / sd)).max()) < 5 / np.sqrt(400), name
    # One compilation serves other configurations and rows.
    before = len(rows_engine._COMPILED)
    few = SamplerSettings(draws=50, tune=100, chains=2)
    tree = sample_rows(rows_of(simulate(49, THREE[:2], rows=40)), TINY, PRIORS, few, show_progress=False)
    assert list(tree["posterior"]["config"].to_numpy()) == ["one", "two"]
    assert len(rows_engine._COMPILED) == before


@pytest.mark.slow
def test_a_student_t_withstands_outliers_that_the_gaussian_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row in a hundred takes ten times as long: a pause that is no property of the batch."""
    data, _ = observed_with("gaussian", 50)
    rng = np.random.default_rng(51)
    frames = tuple(f.assign(step_time_s=f["step_time_s"] * np.where(rng.random(len(f)) < 0.01, 10.0, 1.0)) for f in data.frames)
    rows = rows_of(replace(data, frames=frames))
    statistics = [r.statistics for r in rows]
    how = {"seed": 2, "show_progress": False}
    gaussian = fit(statistics, TINY, PRIORS, SAMPLER, **how)
    student = fit(statistics, TINY, PRIORS, SAMPLER, engine="rows", likelihood="student_t", rows=rows, **how)
    theta = student.draws_of("theta")
    assert np.abs((theta.mean(axis=0) - THETA) / theta.std(axis=0)).max() < 3.7
    assert np.abs(theta.mean(axis=0) / THETA - 1).max() < 0.05
    # The Gaussian spreads the pauses over all coefficients, a hundredth of the rows at ten times being 9 %, and its noise is theirs.
    assert (gaussian.draws_of("theta").mean(axis=0) / THETA).mean() > 1.05
    assert gaussian.draws_of("sigma").mean() > 5 * 0.08
    assert student.draws_of("nu").mean() < 4
    # It is saved with what it needs to predict, and predicts the same.
    # Forgotten after the test.
    monkeypatch.setattr(registry, "_SETS", dict(registry._SETS))
    monkeypatch.setattr(registry, "_OWN", set(registry._OWN))
    register_feature_set(TINY)
    path = student.save(tmp_path / "student.nc")
    loaded = LatencyPosterior.load(path)
    assert loaded.likelihood == "student_t"
    assert [str(r) for r in loaded.rows] == [str(r) for r in student.rows]
    frame = data.frames[0].iloc[:30]
    pd.testing.assert_frame_equal(loaded.predict(frame, THREE[0]), student.predict(frame, THREE[0]))
    assert "student_t" in repr(loaded)
