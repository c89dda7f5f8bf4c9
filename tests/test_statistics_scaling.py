"""Outliers: down-weighted by a fixed rule that keeps sufficiency, at a fixed point, without loss on clean data."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from scipy.stats import multivariate_normal
from simulation import BLOCK, THREE, TINY, batches, scaled_errors, simulate
from test_statistics import log_likelihood

from hfdtl_bayes.errors import StatisticsError
from hfdtl_bayes.features import feature_set, response
from hfdtl_bayes.model import SamplerSettings, fit
from hfdtl_bayes.statistics import (
    ConfigStatistics,
    Downweighted,
    RowScaling,
    fit_row_scaling,
    own_prior,
    pseudo_rows,
    statistics_from_rows,
)
from hfdtl_bayes.statistics.pilot import robust_sds, startup_rows
from hfdtl_bayes.statistics.scaling import block_medians
from hfdtl_bayes.traces import TraceStore, drop_warmup, time_blocks

ONE = THREE[0]
TRUTH = np.array([1.1, 0.8, 1.6])
SETTINGS = SamplerSettings(draws=150, tune=150, chains=2)


def recording(
    seed: int, rows: int, outliers: float = 0.0, factor: float = 20.0, sigma: float = 0.1, omega: float = 0.08
) -> pd.DataFrame:
    """Steps with drift and noise; a share of them takes `factor` times as long."""
    rng = np.random.default_rng(seed)
    frame = batches(rng, rows)
    mean = TINY.design(frame, ONE) @ TRUTH
    seconds = mean * np.maximum(1 + scaled_errors(rng, np.arange(rows) // BLOCK, sigma, omega), 0.05)
    slow = rng.random(rows) < outliers
    return frame.assign(step_time_s=np.where(slow, factor * seconds, seconds))


def reduce(frame: pd.DataFrame, **options: object) -> ConfigStatistics:
    return statistics_from_rows(frame, ONE, TINY, **{"block_length": BLOCK, **options})


def scaling_of(frame: pd.DataFrame, cutoff: float) -> tuple[RowScaling, np.ndarray, np.ndarray, np.ndarray]:
    design, observed = TINY.design(frame, ONE), frame["step_time_s"].to_numpy()
    blocks = time_blocks(frame, BLOCK)
    return fit_row_scaling(design, observed, blocks, TINY, ONE, cutoff), design, observed, blocks


def another_round(scaling: RowScaling, design: np.ndarray, observed: np.ndarray, blocks: np.ndarray) -> RowScaling:
    """One round of the fixed point written again, with a general optimiser in place of the active set."""
    scale, _ = scaling.rows(design, observed, blocks)
    mean, _ = own_prior(TINY, ONE)
    sd = np.hypot([f.prior.sd for f in TINY.varying], 0.5 * np.abs(mean))
    rows = np.vstack([design / scale[:, None] / 0.1, np.diag(1 / sd)])
    right = np.concatenate([observed / scale / 0.1, mean / sd])
    pilot = lsq_linear(rows, right, (0, np.inf), method="bvls", tol=1e-14).x
    residuals = (observed - design @ pilot) / np.maximum(design @ pilot, scaling.floor_s)
    return RowScaling(pilot, scaling.floor_s, scaling.cutoff, *robust_sds(residuals, blocks))


@pytest.mark.parametrize("cutoff", [2.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("outliers", [0.0, 0.01, 0.05])
def test_the_scaling_is_a_fixed_point(cutoff: float, outliers: float) -> None:
    scaling, design, observed, blocks = scaling_of(recording(1, 1500, outliers), cutoff)
    again = another_round(scaling, design, observed, blocks)
    np.testing.assert_allclose(again.pilot, scaling.pilot, rtol=2e-5)
    assert again.row_sd == pytest.approx(scaling.row_sd, rel=2e-5)
    assert again.block_sd == pytest.approx(scaling.block_sd, rel=2e-5)


@pytest.mark.parametrize("cutoff", [3.0, 5.0])
def test_the_fixed_point_is_reached_on_real_recordings(shared_data: Path, cutoff: float) -> None:
    """Started from the scales found, a second fit of the same rows stays there."""
    features, store = feature_set("roofline", "step_time"), TraceStore(shared_data / "vllm_cpu")
    for config_id in store.config_ids:
        own = store.configuration(config_id)
        frame = drop_warmup(store.steps(config_id).frame)
        design, observed, blocks = features.design(frame, own), response(frame, "step_time"), time_blocks(frame, 20)
        scaling = fit_row_scaling(design, observed, blocks, features, own, cutoff)
        residuals = (observed - design @ scaling.pilot) / scaling.mean_s(design)
        found = robust_sds(residuals, blocks)
        assert (scaling.row_sd, scaling.block_sd) == pytest.approx(found, rel=1e-9)
        # Slightly other rows move it slightly: it is no accident of where the rounds stopped.
        fewer = slice(0, len(frame) - 20)
        near = fit_row_scaling(design[fewer], observed[fewer], blocks[fewer], features, own, cutoff)
        np.testing.assert_allclose(near.mean_s(design), scaling.mean_s(design), rtol=0.05)


def test_without_a_cutoff_it_is_the_plain_pilot() -> None:
    frame = recording(2, 500, 0.02)
    scaling, design, observed, blocks = scaling_of(frame, np.inf)
    scale, weight = scaling.rows(design, observed, blocks)
    assert (weight == 1).all()
    np.testing.assert_array_equal(scale, scaling.mean_s(design))
    assert reduce(frame, outlier_cutoff=np.inf).downweighted == Downweighted()


def test_no_scaled_row_lies_further_out_than_the_cutoff_and_the_scale_is_inflated_by_the_weight() -> None:
    scaling, design, observed, blocks = scaling_of(recording(3, 2000, 0.02), 4.0)
    scale, weight = scaling.rows(design, observed, blocks)
    mean = np.maximum(design @ scaling.pilot, scaling.floor_s)
    np.testing.assert_allclose(scale, mean / np.sqrt(weight), rtol=1e-12)
    residuals = (observed - design @ scaling.pilot) / mean
    location = np.clip(block_medians(residuals, blocks), -4 * scaling.block_sd, 4 * scaling.block_sd)[blocks]
    deviation = np.abs(residuals - location) / scaling.row_sd
    assert (deviation > 4).sum() > 20
    np.testing.assert_allclose(weight, np.where(deviation > 4, (4 / deviation) ** 2, 1.0), rtol=1e-9)
    assert (deviation * np.sqrt(weight)).max() <= 4 + 1e-9


@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), cutoff=st.floats(1.1, 8))
def test_the_weight_of_a_row_depends_on_its_own_block_alone(seed: int, sizes: list[int], cutoff: float) -> None:
    rng = np.random.default_rng(seed)
    blocks = np.repeat(np.arange(len(sizes)), sizes)
    residuals = rng.standard_t(1.5, len(blocks)) * 0.1
    scaling = RowScaling(TRUTH, 1e-3, cutoff, 0.1, 0.08)
    whole = scaling.weights(residuals, blocks)
    assert ((whole > 0) & (whole <= 1)).all()
    for b in range(len(sizes)):
        np.testing.assert_array_equal(scaling.weights(residuals[blocks == b], blocks[blocks == b]), whole[blocks == b])


@pytest.mark.parametrize("cuts", [(400,), (100, 110, 700), tuple(range(10, 990, 70))])
def test_batches_with_the_scaling_of_the_whole_merge_to_the_whole(cuts: tuple[int, ...]) -> None:
    frame = recording(4, 993, 0.02)
    frame["regime"] = np.repeat(["quiet", "busy"], [500, 493])
    whole = reduce(frame, outlier_cutoff=4.0)
    assert whole.downweighted.rows > 10
    edges = [0, *cuts, len(frame)]
    parts = [reduce(frame.iloc[a:b], scaling=whole.scaling) for a, b in pairwise(edges)]
    merged = parts[-1]
    for part in parts[:-1]:
        merged = merged.merge(part)
    assert (merged.rows, merged.blocks) == (whole.rows, whole.blocks)
    assert merged.log_scale_sum == pytest.approx(whole.log_scale_sum, rel=1e-12)
    assert merged.total_s == pytest.approx(whole.total_s, rel=1e-12)
    for field in ("rows", "by_regime", "startup_rows"):
        assert getattr(merged.downweighted, field) == getattr(whole.downweighted, field)
    for field in ("time_s", "excess_s", "largest_ratio"):
        assert getattr(merged.downweighted, field) == pytest.approx(getattr(whole.downweighted, field), rel=1e-9)
    for one, two in zip(merged.strata, whole.strata, strict=True):
        assert (one.multiplier, one.count) == (two.multiplier, two.count)
        np.testing.assert_allclose(one.triangle, two.triangle, rtol=1e-9, atol=1e-9 * np.abs(two.triangle).max())


def test_what_is_down_weighted_is_counted() -> None:
    frame = recording(5, 1000)
    frame["regime"] = np.repeat(["calib", "load"], 500)
    clean = frame["step_time_s"].to_numpy().copy()
    at = [33, 250, 700]
    frame.loc[at, "step_time_s"] *= [5.0, 8.0, 30.0]
    own = reduce(frame, outlier_cutoff=6.0)
    found = own.downweighted
    expected = TINY.design(frame, ONE) @ TRUTH
    seconds = frame["step_time_s"].to_numpy()[at]
    assert found.rows == 3
    assert found.by_regime == (("calib", 2), ("load", 1))
    assert found.time_s == pytest.approx(seconds.sum(), rel=1e-9)
    assert found.largest_ratio == pytest.approx(seconds[2] / expected[700], rel=0.05)
    assert found.excess_s == pytest.approx((seconds - clean[at]).sum(), rel=0.05)
    assert own.total_s == pytest.approx(frame["step_time_s"].sum(), rel=1e-12)
    assert found.startup_rows == 0


def test_one_percent_of_twentyfold_outliers_do_not_move_the_coefficients() -> None:
    """Within half a posterior sd of the fit to the same rows without outliers; without a cutoff the level is gone."""
    clean, dirty = recording(6, 3000), recording(6, 3000, 0.01)
    assert (clean["step_time_s"] < dirty["step_time_s"]).mean() == pytest.approx(0.01, abs=0.004)

    def posterior(frame: pd.DataFrame, cutoff: float) -> tuple[np.ndarray, np.ndarray, float]:
        fitted = fit([reduce(frame, outlier_cutoff=cutoff)], TINY, settings=SETTINGS, show_progress=False, seed=1)
        theta = fitted.draws_of("theta")[:, 0]
        return theta.mean(axis=0), theta.std(axis=0), float(fitted.draws_of("sigma").mean())

    mean, sd, sigma = posterior(clean, np.inf)
    robust, robust_sd, robust_sigma = posterior(dirty, 5.0)
    plain, _, plain_sigma = posterior(dirty, np.inf)
    assert np.abs((robust - mean) / sd).max() < 0.5
    assert np.abs((plain - mean) / sd).max() > 3.0
    np.testing.assert_allclose(robust_sd, sd, rtol=0.25)
    assert robust_sigma == pytest.approx(sigma, rel=0.2)
    assert plain_sigma > 5 * sigma


@cache
def coefficient_spread(cutoff: float) -> np.ndarray:
    """Sampling sds of weighted least squares coefficients over 60 clean recordings, noise and drift known."""
    sigma, omega, found = 0.1, 0.08, []
    for seed in range(60):
        own = reduce(recording(1000 + seed, 300, sigma=sigma, omega=omega), outlier_cutoff=cutoff)
        rows = pseudo_rows([own])
        weight = 1 / np.sqrt(sigma**2 + rows.multiplier * omega**2)
        found.append(np.linalg.lstsq(rows.r * weight[:, None], rows.z * weight, rcond=None)[0])
    assert np.abs(np.mean(found, axis=0) / TRUTH - 1).max() < 0.03
    return np.std(found, axis=0)


@pytest.mark.parametrize(("cutoff", "efficiency"), [(3.0, 0.93), (5.0, 0.99)])
def test_clean_normal_rows_lose_almost_nothing(cutoff: float, efficiency: float) -> None:
    """The same 60 recordings with and without: the ratio of variances is the efficiency."""
    assert ((coefficient_spread(np.inf) / coefficient_spread(cutoff)) ** 2).min() > efficiency


def test_a_slow_block_is_drift_unless_it_is_unlike_all_others() -> None:
    frame = recording(7, 1000, sigma=0.05, omega=0.1)
    usual = frame.copy()
    usual.loc[200:209, "step_time_s"] *= 1.2
    assert reduce(usual, outlier_cutoff=5.0).downweighted.rows == 0
    pause = frame.copy()
    pause.loc[200:209, "step_time_s"] *= 6.0
    assert reduce(pause, outlier_cutoff=5.0).downweighted.rows == 10


def test_rows_alone_in_their_block_are_judged_too() -> None:
    """A thinned recording has blocks of one row, whose median is the row itself."""
    frame = recording(8, 600)
    frame["step_id"] = np.arange(600) * BLOCK
    frame.loc[100, "step_time_s"] *= 20
    own = reduce(frame, outlier_cutoff=5.0)
    assert own.blocks == 600
    assert own.downweighted.rows == 1
    assert own.downweighted.largest_ratio > 15


@pytest.mark.parametrize("length", [1, 4, 30])
def test_a_start_up_is_counted_and_does_not_move_the_pilot(length: int) -> None:
    frame = recording(9, 1500)
    slow = frame.copy()
    slow.loc[: length - 1, "step_time_s"] *= np.linspace(12.0, 5.0, length)
    own, usual = reduce(slow, outlier_cutoff=5.0), reduce(frame, outlier_cutoff=5.0)
    assert own.downweighted.startup_rows == length
    assert usual.downweighted.startup_rows == 0
    assert own.downweighted.rows >= length
    np.testing.assert_allclose(own.pilot, usual.pilot, rtol=0.02)


def test_slowness_elsewhere_or_of_everything_is_no_start_up() -> None:
    frame = recording(10, 400)
    scaling, design, observed, _ = scaling_of(frame, 5.0)
    middle = observed.copy()
    middle[100:120] *= 10
    assert startup_rows(scaling, design, middle) == 0
    assert startup_rows(scaling, design, 10 * observed) == 0
    # A single slow step soon after the start-up belongs to it only if what lies between is slow as well.
    parted = observed.copy()
    parted[[0, 1, 2, 30]] *= 10
    assert startup_rows(scaling, design, parted) == 3


def test_responses_that_are_mostly_zero_do_not_make_the_others_outliers() -> None:
    """Most requests find room at once; those that wait are the signal."""
    rng = np.random.default_rng(11)
    residuals = np.where(rng.random(2000) < 0.7, 0.0, rng.normal(0, 0.3, 2000))
    row_sd, _ = robust_sds(residuals, np.arange(2000) // 20)
    assert np.median(np.abs(residuals)) == 0
    assert row_sd > 0.1


def test_by_default_gross_outliers_of_steps_count_for_less_and_long_delays_in_full() -> None:
    """One compilation step left in by mistake would otherwise be most of the noise."""
    frame = recording(18, 2000)
    frame.loc[0, "step_time_s"] *= 37
    noise = {}
    for cutoff in (None, np.inf):
        own = reduce(frame, outlier_cutoff=cutoff)
        k, within = len(own.coef_names), own.strata[0]
        noise[cutoff] = within.triangle[k, k] / np.sqrt(within.count - k)
    assert noise[None] == pytest.approx(0.1, rel=0.1)
    assert noise[np.inf] > 5 * noise[None]
    for quantity, expected in (("step_time", 8.0), ("queue_delay", np.inf), ("api_delay", np.inf)):
        observed, blocks = np.ones(40), np.arange(40) // BLOCK
        features = feature_set("hfdtl", quantity)
        design = np.ones((40, len(features.coef_names)))
        assert fit_row_scaling(design, observed, blocks, features, ONE).cutoff == expected


def test_rows_without_noise_have_no_outliers() -> None:
    frame = batches(np.random.default_rng(12), 200)
    frame = frame.assign(step_time_s=TINY.design(frame, ONE) @ TRUTH)
    own = reduce(frame, outlier_cutoff=5.0)
    assert own.downweighted.rows == 0


@pytest.mark.parametrize("cutoff", [1.0, 0.0, -3.0, np.nan])
def test_a_cutoff_within_the_bulk_is_refused(cutoff: float) -> None:
    with pytest.raises(StatisticsError, match="outlier cutoff must be above 1 robust sd, found"):
        reduce(recording(13, 50), outlier_cutoff=cutoff)


def test_a_scaling_that_does_not_fit_is_refused() -> None:
    frame = recording(14, 50)
    own = reduce(frame)
    with pytest.raises(StatisticsError, match="give a scaling or a pilot, not both"):
        reduce(frame, scaling=own.scaling, pilot=own.pilot)
    with pytest.raises(StatisticsError, match="the pilot must be 3 finite coefficients"):
        reduce(frame, scaling=replace(own.scaling, pilot=own.pilot[:2]))


def test_the_row_likelihood_with_weights_is_that_of_the_statistics() -> None:
    """Pseudo-rows of down-weighted rows against the dense normal of the rows in seconds, with the Jacobian kept."""
    frame = recording(15, 80, 0.05)
    own = reduce(frame, outlier_cutoff=3.0)
    assert own.downweighted.rows > 1
    design, observed, blocks = TINY.design(frame, ONE), frame["step_time_s"].to_numpy(), time_blocks(frame, BLOCK)
    mean, (_, weight) = own.scaling.mean_s(design), own.scaling.rows(design, observed, blocks)
    rng, differences = np.random.default_rng(16), []
    for sigma, omega in ((0.05, 0.02), (0.1, 0.2), (0.3, 1e-4)):
        theta = rng.normal(1, 0.3, 3)
        # The drift of a block is shared in full; its variance is that of a block whose weights add up to a whole number.
        total = np.bincount(blocks, weight)
        drift = omega * np.sqrt(np.rint(total) / total)
        covariance = np.diag(sigma**2 / weight) + (drift[blocks] ** 2)[:, None] * (blocks[:, None] == blocks[None, :])
        dense = multivariate_normal.logpdf(observed, design @ theta, covariance * np.outer(mean, mean))
        differences.append(log_likelihood(pseudo_rows([own]), theta, sigma, omega) - own.log_scale_sum - dense)
    np.testing.assert_allclose(differences, differences[0], atol=1e-6)
    assert np.abs(np.rint(total) / total - 1).max() < 0.06


def test_simulated_recordings_without_outliers_are_left_alone() -> None:
    for own, frame in zip(THREE, simulate(17).frames, strict=True):
        found = statistics_from_rows(frame, own, TINY, block_length=BLOCK, outlier_cutoff=8.0)
        assert found.downweighted.rows == 0
