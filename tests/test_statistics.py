"""Sufficient statistics: the same whatever the order and the chunks, and exactly the likelihood of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chi2, multivariate_normal, norm
from simulation import BLOCK, THREE, TINY, batches, configuration, error_covariance, pilot_of, simulate, tiny_features

from hfdtl_bayes.errors import InputError, StatisticsError
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.statistics import (
    ConfigStatistics,
    PseudoRows,
    fit_row_scaling,
    pseudo_rows,
    row_scale,
    statistics_from_rows,
)
from hfdtl_bayes.statistics.sufficient import split_blocks, triangle_of

ONE = THREE[0]


def rows_of(seed: int, count: int) -> pd.DataFrame:
    return simulate(seed, (ONE,), rows=count).frames[0]


def reduce(frame: pd.DataFrame, pilot: Sequence[float] | None = None, block_length: int = BLOCK) -> ConfigStatistics:
    return statistics_from_rows(frame, ONE, TINY, block_length=block_length, pilot=pilot)


def blocks_of(rows: int, length: int = BLOCK) -> np.ndarray:
    return np.arange(rows) // length


def assert_equal(a: ConfigStatistics, b: ConfigStatistics, rtol: float = 1e-9) -> None:
    assert (a.rows, a.blocks) == (b.rows, b.blocks)
    assert [(s.multiplier, s.count) for s in a.strata] == [(s.multiplier, s.count) for s in b.strata]
    np.testing.assert_allclose(a.pilot, b.pilot, rtol=rtol)
    np.testing.assert_allclose(a.log_scale_sum, b.log_scale_sum, rtol=rtol)
    for one, two in zip(a.strata, b.strata, strict=True):
        np.testing.assert_allclose(one.triangle, two.triangle, rtol=rtol, atol=rtol * np.abs(one.triangle).max())


def test_the_order_of_rows_within_a_block_does_not_matter() -> None:
    frame = rows_of(1, 87)
    rng = np.random.default_rng(2)
    order = np.concatenate([rng.permutation(np.arange(s, min(s + BLOCK, 87))) for s in range(0, 87, BLOCK)])
    assert not np.array_equal(order, np.arange(87))
    assert_equal(reduce(frame), reduce(frame.iloc[order]))


def test_exchanging_rows_between_blocks_does_matter() -> None:
    """The check above could not fail if blocks were ignored."""
    frame = rows_of(1, 40)
    order = np.random.default_rng(2).permutation(40)
    mixed = frame.iloc[order].assign(step_id=np.arange(40))
    contrast = [s.strata[0].triangle[-1, -1] for s in (reduce(frame), reduce(mixed))]
    assert abs(contrast[0] / contrast[1] - 1) > 0.05


@pytest.mark.parametrize("cuts", [(40,), (10, 20, 30), (10, 80), tuple(range(10, 90, 10))])
def test_parts_merge_to_the_whole(cuts: tuple[int, ...]) -> None:
    frame = rows_of(3, 97)
    whole = reduce(frame)
    edges = [0, *cuts, 97]
    parts = [reduce(frame.iloc[a:b], whole.pilot) for a, b in pairwise(edges)]
    forward = parts[0]
    for part in parts[1:]:
        forward = forward.merge(part)
    backward = parts[-1]
    for part in reversed(parts[:-1]):
        backward = backward.merge(part)
    assert_equal(forward, whole)
    assert_equal(backward, whole)


def test_many_rows_in_chunks_merge_to_the_whole() -> None:
    frame = rows_of(4, 200_000)
    whole = reduce(frame, block_length=20)
    merged = None
    for start in range(0, len(frame), 20_000):
        part = reduce(frame.iloc[start : start + 20_000], whole.pilot, block_length=20)
        merged = part if merged is None else merged.merge(part)
    assert merged is not None
    assert_equal(merged, whole)


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1024.0, 1e6])
@pytest.mark.parametrize("which", [0, 1, 3])
def test_a_unit_rescales_its_coefficient_and_nothing_else(which: int, scale: float) -> None:
    """In physical units the pilot is the same, and the column of the factor is multiplied by the unit."""
    references = [2e-5, 1e-4, 2e-3, 5e-3]
    changed = list(references)
    changed[which] *= scale
    before, after = TINY, tiny_features(references=changed)
    frame = rows_of(5, 66)
    a = statistics_from_rows(frame, ONE, before, block_length=BLOCK)
    b = statistics_from_rows(frame, ONE, after, block_length=BLOCK)
    np.testing.assert_allclose(b.pilot * after.references, a.pilot * before.references, rtol=1e-6)
    np.testing.assert_allclose(b.config_row * b.constant_s, a.config_row * a.constant_s, rtol=1e-12)
    fixed = statistics_from_rows(frame, ONE, after, block_length=BLOCK, pilot=a.pilot * before.references / after.references)
    factor = np.append(after.references / before.references, 1.0)
    for one, two in zip(a.strata, fixed.strata, strict=True):
        np.testing.assert_allclose(two.triangle, one.triangle * factor, rtol=1e-9, atol=1e-12 * np.abs(two.triangle).max())


def log_likelihood(rows: PseudoRows, theta: np.ndarray, sigma: float, omega: float) -> float:
    """What a model of the pseudo-rows says: z ~ Normal(R theta, sd), rss ~ sd^2 chi-square(dof)."""
    sd = np.sqrt(sigma**2 + rows.multiplier * omega**2)
    variance = sigma**2 + rows.rss_multiplier * omega**2
    squares = chi2.logpdf(rows.rss / variance, rows.dof) - np.log(variance)
    return float(norm.logpdf(rows.z, rows.r @ theta, sd).sum() + squares.sum())


def dense_log_likelihood(frame: pd.DataFrame, theta: np.ndarray, sigma: float, omega: float, blocks: np.ndarray) -> float:
    design = TINY.design(frame, ONE)
    scale = np.maximum(design @ pilot_of(TINY, ONE), 1e-3)
    left = frame["step_time_s"].to_numpy() / scale - design @ theta / scale[:, None].ravel()
    return float(multivariate_normal.logpdf(left, np.zeros(len(left)), error_covariance(blocks, sigma, omega)))


SCALES = [(sigma, omega) for sigma in (0.02, 0.1, 0.4) for omega in (1e-4, 0.05, 0.5)]


@pytest.mark.parametrize(
    "sizes",
    [(10, 10, 10), (10, 3, 7, 1, 1, 10), (1,) * 12, (30,), (2,), (1,), (1, 1), (2, 1), (4, 4), (1, 5, 1, 9, 2, 2)],
    ids=str,
)
def test_pseudo_rows_are_the_likelihood_of_the_rows(sizes: tuple[int, ...]) -> None:
    """Against the n x n covariance with drift blocks, at random coefficients and nine pairs of noise and drift."""
    rng = np.random.default_rng(6)
    frame = rows_of(7, sum(sizes))
    number = np.repeat(np.arange(len(sizes)), sizes)
    position = np.concatenate([np.arange(s) for s in sizes])
    frame = frame.assign(step_id=number * 100 + position)
    statistics = reduce(frame, pilot_of(TINY, ONE), block_length=100)
    assert statistics.blocks == len(sizes)
    assert sum(s.count for s in statistics.strata) == sum(sizes) == statistics.rows
    rows = pseudo_rows([statistics])
    differences = []
    for sigma, omega in SCALES:
        for _ in range(3):
            theta = rng.normal(1.0, 0.5, 3)
            dense = dense_log_likelihood(frame, theta, sigma, omega, number)
            differences.append(log_likelihood(rows, theta, sigma, omega) - dense)
    np.testing.assert_allclose(differences, differences[0], rtol=0, atol=1e-6)


def test_the_scale_has_the_jacobian_that_is_kept() -> None:
    """Log density of seconds = log density of scaled rows - log_scale_sum."""
    frame = rows_of(8, 25)
    statistics = reduce(frame, pilot_of(TINY, ONE))
    design, theta = TINY.design(frame, ONE), np.array([1.0, 0.7, 1.4])
    scale = np.maximum(design @ pilot_of(TINY, ONE), 1e-3)
    covariance = error_covariance(frame["step_id"].to_numpy() // BLOCK, 0.1, 0.2)
    seconds = multivariate_normal.logpdf(frame["step_time_s"], design @ theta, covariance * np.outer(scale, scale))
    relative = dense_log_likelihood(frame, theta, 0.1, 0.2, frame["step_id"].to_numpy() // BLOCK)
    assert seconds == pytest.approx(relative - statistics.log_scale_sum, rel=1e-10)


def test_pseudo_rows_of_several_configurations_keep_them_apart() -> None:
    parts = simulate(9).statistics
    together = pseudo_rows(parts)
    for c, own in enumerate(parts):
        alone = pseudo_rows([own])
        np.testing.assert_array_equal(together.r[together.config == c], alone.r)
        np.testing.assert_array_equal(together.z[together.config == c], alone.z)
        np.testing.assert_array_equal(together.rss[together.rss_config == c], alone.rss)
        np.testing.assert_array_equal(together.dof[together.rss_config == c], alone.dof)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    seed=st.integers(0, 2**31),
    magnitude=st.sampled_from([1e-8, 1.0, 1e8]),
)
def test_the_rotation_of_blocks_is_orthogonal(sizes: list[int], seed: int, magnitude: float) -> None:
    rng = np.random.default_rng(seed)
    rows = magnitude * rng.normal(size=(sum(sizes), 3)) + rng.normal(size=3)
    parts = split_blocks(rows, np.repeat(np.arange(len(sizes)), sizes))
    assert sum(len(r) for _, r in parts) == len(rows)
    assert {m for m, _ in parts} - {0} == set(sizes)
    rotated = np.vstack([r for _, r in parts])
    np.testing.assert_allclose(rotated.T @ rotated, rows.T @ rows, rtol=1e-10, atol=1e-10 * np.abs(rows.T @ rows).max())
    # A shift common to a block is in its total alone.
    drift = np.repeat(rng.normal(size=len(sizes)), sizes)[:, None]
    for m, r in split_blocks(drift, np.repeat(np.arange(len(sizes)), sizes)):
        if m == 0:
            np.testing.assert_allclose(r, 0, atol=1e-12)


@given(n=st.integers(1, 12), p=st.integers(1, 6), rank=st.integers(0, 6), seed=st.integers(0, 2**31))
def test_a_factor_has_the_gram_matrix_of_its_rows(n: int, p: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, min(rank, n, p))) @ rng.normal(size=(min(rank, n, p), p))
    triangle = triangle_of(rows)
    assert triangle.shape == (min(n, p), p)
    assert (np.diag(triangle) >= 0).all()
    np.testing.assert_allclose(np.tril(triangle, -1), 0, atol=1e-12)
    np.testing.assert_allclose(triangle.T @ triangle, rows.T @ rows, atol=1e-10)


@given(seed=st.integers(0, 2**31), count=st.integers(2, 70), cut=st.integers(1, 6), length=st.integers(1, 12))
def test_any_cut_between_blocks_merges_to_the_whole(seed: int, count: int, cut: int, length: int) -> None:
    frame = rows_of(seed, count)
    assume(0 < cut * length < count)
    pilot = pilot_of(TINY, ONE)
    whole = reduce(frame, pilot, length)
    a, b = (reduce(part, pilot, length) for part in (frame.iloc[: cut * length], frame.iloc[cut * length :]))
    for merged in (a.merge(b), b.merge(a)):
        assert (merged.rows, merged.blocks) == (whole.rows, whole.blocks)
        for one, two in zip(merged.strata, whole.strata, strict=True):
            assert (one.multiplier, one.count) == (two.multiplier, two.count)
            gram = two.triangle.T @ two.triangle
            np.testing.assert_allclose(one.triangle.T @ one.triangle, gram, rtol=1e-9, atol=1e-10 * np.abs(gram).max())


def test_a_short_block_at_the_end_of_a_regime_is_a_block_of_its_own() -> None:
    frame = rows_of(10, 25)
    frame["regime"] = ["quiet"] * 13 + ["busy"] * 12
    statistics = reduce(frame)
    # 0-9, 10-12 | 13-19, 20-24
    assert {s.multiplier: s.count for s in statistics.strata} == {0: 21, 3: 1, 5: 1, 7: 1, 10: 1}


def test_different_things_do_not_merge() -> None:
    frame = rows_of(11, 30)
    pilot = pilot_of(TINY, ONE)
    own = reduce(frame, pilot)
    elsewhere = configuration("one", "H200")
    cases = {
        "different configuration": statistics_from_rows(frame, elsewhere, TINY, pilot=pilot),
        "different feature set": statistics_from_rows(frame, ONE, replace(TINY, name="other"), pilot=pilot),
        r"different row scale \(pilot\)": reduce(frame, pilot * 1.01),
        "different columns": replace(own, coef_names=("a", "b", "c")),
        "different scale floor": replace(own, scaling=replace(own.scaling, floor_s=2e-3)),
        "different outlier cutoff": replace(own, scaling=replace(own.scaling, cutoff=5.0)),
        "different robust sd of rows": replace(own, scaling=replace(own.scaling, row_sd=0.1)),
        "different robust sd of blocks": replace(own, scaling=replace(own.scaling, block_sd=0.1)),
        "different block length": reduce(frame, pilot, BLOCK + 1),
    }
    for message, other in cases.items():
        with pytest.raises(StatisticsError, match=message):
            own.merge(other)
    assert own.merge(reduce(frame, pilot)).rows == 60


def test_bad_rows_are_refused_by_name() -> None:
    frame = rows_of(12, 30)
    with pytest.raises(StatisticsError, match=r"'one': no rows to fit"):
        reduce(frame.iloc[:0])
    frame.loc[[7, 12], "step_time_s"] = [np.nan, np.inf]
    with pytest.raises(StatisticsError, match=r"'one': step_time is not finite in 2 of 30 rows, the first is row 7"):
        reduce(frame)
    frame = rows_of(12, 30).astype({"decode_tokens": float})
    frame.loc[4, "decode_tokens"] = np.nan
    with pytest.raises(InputError, match=r"'decode' of 'one' is not finite at row 4"):
        reduce(frame)
    with pytest.raises(InputError, match="prefill_tokens"):
        reduce(frame.drop(columns="prefill_tokens"))
    with pytest.raises(InputError, match="block_length"):
        reduce(rows_of(12, 30), block_length=0)


@pytest.mark.parametrize("pilot", [(1.0, 1.0), (1.0, np.nan, 1.0), (1.0, np.inf, 1.0), ((1.0, 1.0, 1.0),)], ids=str)
def test_a_pilot_that_fits_no_columns_is_refused(pilot: tuple[float, ...]) -> None:
    with pytest.raises(StatisticsError, match=r"'one': the pilot must be 3 finite coefficients \(prefill, decode, constant\)"):
        reduce(rows_of(13, 30), np.array(pilot))


def test_the_pilot_is_a_fixed_point_and_near_the_mean_of_good_data() -> None:
    frame = rows_of(14, 2000)
    truth = np.array([1.1, 0.8, 1.6])
    design = TINY.design(frame, ONE)
    rng = np.random.default_rng(15)
    observed = design @ truth * (1 + 0.05 * rng.standard_normal(len(frame)))
    found = fit_row_scaling(design, observed, blocks_of(len(frame)), TINY, ONE).pilot
    np.testing.assert_allclose(found, truth, rtol=0.02)
    np.testing.assert_allclose(row_scale(design, found, 1e-3), design @ truth, rtol=0.01)


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 40),
    factor=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    cutoff=st.sampled_from([2.0, 5.0, np.inf]),
)
def test_the_pilot_is_never_negative_and_the_scale_never_below_the_floor(
    seed: int, count: int, factor: float, cutoff: float
) -> None:
    rng = np.random.default_rng(seed)
    frame = batches(rng, count)
    design = TINY.design(frame, ONE)
    found = fit_row_scaling(design, factor * rng.exponential(0.01, count), blocks_of(count), TINY, ONE, cutoff).pilot
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert (row_scale(design, found, 1e-3) >= 1e-3).all()


def test_the_default_features_reduce_requests_whose_delay_is_zero() -> None:
    """Nothing waits on an idle server: a response of zeros has statistics like any other."""
    features = feature_set("hfdtl", "queue_delay")
    frame = pd.DataFrame(
        {
            "regime": "idle", "queued_s": [0.0, 1.0, 2.0], "scheduled_s": [0.0, 1.0, 2.0], "prompt_tokens": [10, 20, 30],
            "waiting_requests": [0, 0, 0], "kv_usage": [0.1, 0.2, 0.3],
        }
    )  # fmt: skip
    statistics = statistics_from_rows(frame, ONE, features)
    assert np.isfinite(np.vstack([s.triangle for s in statistics.strata])).all()
    assert statistics.quantity == "queue_delay"
