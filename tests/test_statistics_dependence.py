"""Dependence between rows: autocorrelation, block length and effective rows, against processes whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter
from simulation import BLOCK, THREE, TINY, batches, error_covariance, scaled_errors

from hfdtl_bayes.errors import StatisticsError
from hfdtl_bayes.features import feature_set, response
from hfdtl_bayes.statistics import (
    DEFAULT_BLOCK_LENGTH,
    choose_block_length,
    effective_rows,
    fit_row_scaling,
    residual_autocorrelation,
    statistics_from_rows,
)
from hfdtl_bayes.statistics.dependence import CANDIDATE_LENGTHS, block_faults
from hfdtl_bayes.statistics.effective import information_ratio
from hfdtl_bayes.traces import TraceStore, drop_warmup, time_blocks

ONE = THREE[0]
TRUTH = np.array([1.1, 0.8, 1.6])


def steps(count: int, regimes: int = 1) -> pd.DataFrame:
    return pd.DataFrame({"step_id": np.arange(count), "regime": np.repeat([f"r{i}" for i in range(regimes)], count // regimes)})


def independent(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal(count)


def autoregressive(phi: float, noise: float = 0.0) -> Callable[[np.random.Generator, int], np.ndarray]:
    """AR(1) of unit variance, plus white noise."""

    def made(rng: np.random.Generator, count: int) -> np.ndarray:
        slow = lfilter([1.0], [1.0, -phi], rng.standard_normal(count + 500))[500:] * np.sqrt(1 - phi**2)
        return slow + noise * rng.standard_normal(count)

    return made


def blocked(length: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """One drift per block, of the noise's size."""

    def made(rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.standard_normal(count) + np.repeat(rng.standard_normal(count // length + 1), length)[:count]

    return made


def flicker(rng: np.random.Generator, count: int) -> np.ndarray:
    """1/f noise."""
    frequency = np.fft.rfftfreq(count)
    frequency[0] = np.inf
    spectrum = (rng.standard_normal(len(frequency)) + 1j * rng.standard_normal(len(frequency))) / np.sqrt(frequency)
    made = np.fft.irfft(spectrum, count)
    return np.asarray(made / made.std())


def chosen(process: Callable[[np.random.Generator, int], np.ndarray], count: int = 4000, repeats: int = 15) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.array([choose_block_length(process(rng, count), steps(count)).length for _ in range(repeats)])


@pytest.mark.parametrize("phi", [0.3, 0.8, 0.95])
def test_the_autocorrelation_of_an_autoregression_is_its_power(phi: float) -> None:
    lags = (1, 2, 5, 10)
    found = residual_autocorrelation(autoregressive(phi)(np.random.default_rng(2), 200_000), np.full(200_000, "a"), lags)
    np.testing.assert_allclose(found.correlation, phi ** np.array(lags), atol=0.03)
    np.testing.assert_array_equal(found.pairs, 200_000 - np.array(lags))


def test_the_autocorrelation_of_independent_rows_has_the_sd_it_states() -> None:
    rng = np.random.default_rng(3)
    found = [residual_autocorrelation(rng.standard_normal(800), np.repeat(["a", "b"], 400), (1, 10, 50)) for _ in range(500)]
    z = np.array([f.correlation / f.independent_sd for f in found])
    np.testing.assert_allclose(z.std(axis=0), 1.0, atol=0.1)
    np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=0.15)


def test_pairs_do_not_span_regimes() -> None:
    """Two levels: across the change the product would be negative."""
    values, regimes = np.repeat([1.0, -1.0, 1.0], 50), np.repeat(["a", "b", "a"], 50)
    found = residual_autocorrelation(values, regimes, (1, 10, 49, 60))
    np.testing.assert_allclose(found.correlation[:3], 1.0)
    np.testing.assert_array_equal(found.pairs, [3 * 49, 3 * 40, 3, 0])
    assert np.isnan(found.correlation[3])


@pytest.mark.parametrize("length", [10, 20, 50, 100])
def test_true_blocks_are_found(length: int) -> None:
    assert np.mean(chosen(blocked(length)) == length) > 0.9


def test_independent_rows_keep_the_default() -> None:
    assert np.mean(np.abs(np.log(chosen(independent) / DEFAULT_BLOCK_LENGTH)) <= np.log(2.01)) > 0.9
    assert np.mean(chosen(independent) == DEFAULT_BLOCK_LENGTH) > 0.5


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_length_grows_with_the_memory_of_an_autoregression(noise: float) -> None:
    medians = [float(np.median(chosen(autoregressive(phi, noise)))) for phi in (0.5, 0.9, 0.98)]
    assert medians[0] < medians[1] < medians[2]


def test_for_an_autoregression_the_length_balances_both_faults() -> None:
    """Correlation 0.9 with neighbours: exact covariances, from the autocorrelation 0.9^lag, against the choice."""

    def faults(length: int, phi: float = 0.9) -> float:
        covariance = phi ** np.abs(np.subtract.outer(np.arange(2 * length), np.arange(2 * length)))
        means = np.kron(np.eye(2), np.full((1, length), 1 / length))
        of_means = means @ covariance @ means.T
        centre = np.eye(length) - 1 / length
        within = centre @ covariance[:length, :length] @ centre
        neighbours = np.diag(within, 1).mean() / np.diag(within).mean()
        return max(of_means[0, 1] / of_means[0, 0], neighbours + 1 / (length - 1))

    exact = {n: faults(n) for n in CANDIDATE_LENGTHS}
    found = choose_block_length(autoregressive(0.9)(np.random.default_rng(4), 60_000), steps(60_000))
    np.testing.assert_allclose([f.worst for f in found.candidates], list(exact.values()), atol=0.05)
    assert exact[found.length] < min(exact.values()) + 0.1


def test_flicker_noise_has_no_good_length_and_the_faults_say_so() -> None:
    """However long the block, some correlation is left: what real engines look like."""
    rng = np.random.default_rng(5)
    found = choose_block_length(flicker(rng, 4000), steps(4000))
    assert min(f.worst for f in found.candidates) > 0.4
    assert found.length in CANDIDATE_LENGTHS


def test_blocks_on_two_sides_of_a_gap_or_a_regime_are_no_neighbours() -> None:
    rng = np.random.default_rng(6)
    frame = steps(400)
    assert block_faults(rng.standard_normal(400), frame, 20).pairs == 19
    assert block_faults(rng.standard_normal(400), frame.assign(regime=np.repeat(["a", "b"], 200)), 20).pairs == 18
    gap = frame.assign(step_id=np.arange(400) + np.where(np.arange(400) >= 200, 1000, 0))
    assert block_faults(rng.standard_normal(400), gap, 20).pairs == 18
    # Every third step only: no block is whole.
    assert block_faults(rng.standard_normal(400), frame.assign(step_id=np.arange(400) * 3), 20).pairs == 0


@pytest.mark.parametrize("count", [1, 2, 30, 90])
def test_a_short_recording_keeps_the_default(count: int) -> None:
    found = choose_block_length(np.random.default_rng(7).standard_normal(count), steps(count))
    assert found.length == DEFAULT_BLOCK_LENGTH
    assert found.candidates == ()


@given(seed=st.integers(0, 2**31), count=st.integers(1, 300), scale=st.sampled_from([0.0, 1e-9, 1.0, 1e9]))
def test_any_residuals_give_a_length(seed: int, count: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    frame = steps(count).assign(step_id=np.cumsum(rng.integers(1, 3, count)))
    assert choose_block_length(scale * rng.standard_normal(count), frame).length in CANDIDATE_LENGTHS


def recording(seed: int, rows: int, length: int, sigma: float = 0.1, omega: float = 0.1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = batches(rng, rows)
    mean = TINY.design(frame, ONE) @ TRUTH
    return frame.assign(step_time_s=mean * np.maximum(1 + scaled_errors(rng, np.arange(rows) // length, sigma, omega), 0.05))


def test_auto_reduces_with_the_length_it_finds() -> None:
    frame = recording(8, 4000, 50)
    own = statistics_from_rows(frame, ONE, TINY, block_length="auto")
    assert own.block_length == 50
    fixed = statistics_from_rows(frame, ONE, TINY, block_length=50)
    for one, two in zip(own.strata, fixed.strata, strict=True):
        np.testing.assert_array_equal(one.triangle, two.triangle)
    with pytest.raises(StatisticsError, match='needs the block length of the batch it is to be merged with, not "auto"'):
        statistics_from_rows(frame, ONE, TINY, block_length="auto", scaling=own.scaling)


@cache
def real_residuals(store: Path) -> dict[str, tuple[np.ndarray, pd.DataFrame]]:
    features, opened, found = feature_set("roofline", "step_time"), TraceStore(store), {}
    for config_id in opened.config_ids:
        own = opened.configuration(config_id)
        frame = drop_warmup(opened.steps(config_id).frame)
        design, observed, blocks = features.design(frame, own), response(frame, "step_time"), time_blocks(frame, 20)
        scaling = fit_row_scaling(design, observed, blocks, features, own, 5.0)
        found[config_id] = (observed - design @ scaling.pilot) / scaling.rows(design, observed, blocks)[0], frame
    return found


def test_on_a_real_engine_neighbours_agree_and_the_length_is_near_the_default(shared_data: Path) -> None:
    found = real_residuals(shared_data / "vllm_cpu")
    lengths = []
    for residuals, frame in found.values():
        correlation = residual_autocorrelation(residuals, frame["regime"].to_numpy(), (1, 20))
        assert correlation.correlation[0] > 0.6
        assert correlation.correlation[1] > 3 * correlation.independent_sd[1]
        lengths.append(choose_block_length(residuals, frame).length)
    assert np.median(lengths) == DEFAULT_BLOCK_LENGTH
    assert 10 <= min(lengths) <= max(lengths) <= 50


def brute_force_worth(blocks: np.ndarray, sigma: float, omega: float) -> float:
    """Variance of one row over that of the best linear estimate of a common mean: 1' V^-1 1 with the n x n covariance."""
    covariance = error_covariance(blocks, sigma, omega)
    ones = np.ones(len(blocks))
    return float((sigma**2 + omega**2) * ones @ np.linalg.solve(covariance, ones))


@pytest.mark.parametrize("sizes", [(10,) * 8, (10, 3, 7, 1, 1, 10), (1,) * 12, (30,)], ids=str)
@pytest.mark.parametrize(("sigma", "omega"), [(0.1, 1e-9), (0.1, 0.05), (0.1, 0.3)])
def test_the_level_is_worth_what_the_best_linear_mean_says(sizes: tuple[int, ...], sigma: float, omega: float) -> None:
    blocks = np.repeat(np.arange(len(sizes)), sizes)
    position = np.concatenate([np.arange(s) for s in sizes])
    frame = recording(9, len(blocks), BLOCK).assign(step_id=blocks * 100 + position)
    own = statistics_from_rows(frame, ONE, TINY, block_length=100)
    worth = effective_rows(own, np.array([sigma]), np.array([omega]))
    assert worth.level == pytest.approx(brute_force_worth(blocks, sigma, omega), rel=1e-9)
    assert (worth.rows, worth.blocks) == (len(blocks), len(sizes))
    if len(set(sizes)) == 1:
        m = sizes[0]
        assert worth.level == pytest.approx(len(blocks) * (sigma**2 + omega**2) / (sigma**2 + m * omega**2), rel=1e-9)


def test_a_coefficient_is_worth_what_the_dense_information_says() -> None:
    frame = recording(10, 137, BLOCK)
    own = statistics_from_rows(frame, ONE, TINY, block_length=BLOCK)
    sigma, omega = np.array([0.1, 0.2]), np.array([0.15, 0.01])
    rows = TINY.design(frame, ONE) / own.scaling.mean_s(TINY.design(frame, ONE))[:, None]
    blocks = time_blocks(frame, BLOCK)
    found = information_ratio(own, np.eye(3), sigma, omega)
    for i in range(2):
        information = rows.T @ np.linalg.solve(error_covariance(blocks, sigma[i], omega[i]), rows)
        apart = rows.T @ rows / (sigma[i] ** 2 + omega[i] ** 2)
        np.testing.assert_allclose(found[i], np.diag(information) / np.diag(apart), rtol=1e-9)


def test_without_drift_every_row_counts_and_a_column_of_zeros_is_worth_nothing() -> None:
    frame = recording(11, 200, BLOCK).assign(prefill_tokens=0, decode_tokens=3)
    own = statistics_from_rows(frame, ONE, TINY, block_length=BLOCK)
    worth = effective_rows(own, np.full(50, 0.1), np.zeros(50))
    assert worth.level == pytest.approx(200)
    assert worth.level_low == pytest.approx(200)
    assert worth.coefficients == pytest.approx({"prefill": 0.0, "decode": 200, "constant": 200})


def test_the_worth_is_said_in_words_with_its_interval() -> None:
    own = statistics_from_rows(recording(12, 1200, BLOCK), ONE, TINY, block_length=BLOCK)
    rng = np.random.default_rng(13)
    worth = effective_rows(own, np.full(4000, 0.1), 0.1 * np.exp(0.1 * rng.standard_normal(4000)))
    assert worth.level_low < worth.level < worth.level_high
    assert str(worth).startswith(
        f"{ONE.config_id}: 1,200 rows in 120 time blocks are worth {worth.level:,.0f} independent ones ("
    )
