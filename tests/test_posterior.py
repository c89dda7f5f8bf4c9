"""The posterior: what it predicts, for configurations it was fitted to and for those never seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from posterior_fits import TRUTH, three_fitted, traffic
from scipy.stats import binom, kstest, norm
from simulation import BLOCK, PRIORS, THREE, TINY, batches, configuration, deviation_size, loading

from hfdtl_bayes.errors import InputError, StatisticsError, UnknownNameError
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings, fit

KNOWN = configuration("never seen", "H100", 4)
UNKNOWN = configuration("never seen", "B200", 4)
"""The same configuration on hardware that was fitted, and on hardware that was not."""


@pytest.fixture(scope="module")
def posterior() -> LatencyPosterior:
    return three_fitted()


def steps(count: int, seed: int = 1) -> pd.DataFrame:
    return batches(np.random.default_rng(seed), count)


def test_it_finds_what_made_the_rows(posterior: LatencyPosterior) -> None:
    """Within four posterior sds: one data set, so a sanity check only; calibration is tested over many."""
    theta, sigma, omega = (posterior.draws_of(n) for n in ("theta", "sigma", "omega"))
    for c, own in enumerate(THREE):
        true_theta, true_sigma, true_omega = TRUTH[own.config_id]
        assert (np.abs(theta[:, c].mean(axis=0) - true_theta) < 4 * theta[:, c].std(axis=0)).all()
        assert abs(np.log(sigma[:, c] / true_sigma).mean()) < 4 * np.log(sigma[:, c]).std()
        assert abs(np.log(omega[:, c] / true_omega).mean()) < 4 * np.log(omega[:, c]).std()
    assert posterior.config_ids == ("one", "two", "three")
    assert (posterior.donors, posterior.target) == (("one", "two"), "three")
    assert [s.config_id for s in posterior.donor_statistics] == ["one", "two"]


@pytest.mark.parametrize("own", [THREE[0], THREE[2], KNOWN, UNKNOWN], ids=lambda c: f"{c.config_id} {c.hardware.name}")
def test_a_prediction_is_the_mixture_over_its_draws(posterior: LatencyPosterior, own) -> None:
    """New observation = mixture over draws of Normal(x' theta, scale^2 (sigma^2 + omega^2)): its cdf at each quantile by hand."""
    frame = steps(400)
    predicted, draws = posterior.predict(frame, own, seed=3), posterior.draws(own, seed=3)
    mean = TINY.design(frame, own) @ draws.theta.T
    middle = mean.mean(axis=1) if draws.known else TINY.design(frame, own) @ draws.mean
    sd = np.maximum(middle, 1e-3)[:, None] * np.hypot(draws.sigma, draws.omega)
    np.testing.assert_allclose(predicted["mean_s"], middle, rtol=1e-9)
    np.testing.assert_allclose(predicted["sd_mean_s"], mean.std(axis=1), rtol=1e-9)
    np.testing.assert_allclose(predicted["sd_s"], np.sqrt(mean.var(axis=1) + (sd**2).mean(axis=1)), rtol=1e-9)
    for q in (2.5, 50, 97.5):
        np.testing.assert_allclose(predicted[f"q{q:g}_mean_s"], np.quantile(mean, q / 100, axis=1), rtol=1e-9)
        below = norm.cdf((predicted[f"q{q:g}_s"].to_numpy()[:, None] - mean) / sd).mean(axis=1)
        # Each quantile is of 600 draws, independent between rows.
        error = np.sqrt(q / 100 * (1 - q / 100) / 600)
        assert np.abs(below - q / 100).max() < 5.5 * error
        assert abs(below.mean() - q / 100) < 0.004


def test_a_configuration_never_seen_is_drawn_from_the_population(posterior: LatencyPosterior) -> None:
    """Given the other draws, theta - (A phi + w_h) has mean zero and the sd of the model."""
    phi = np.hstack([posterior.draws_of(n) for n in ("beta", "gamma", "delta")])
    total = posterior.draws_of("tau") * deviation_size(TINY)
    share = posterior.draws_of("hardware_share")[:, None]
    for own, part in ((KNOWN, 1 - share), (UNKNOWN, 1.0)):
        centre = phi @ loading(TINY, own).T
        if own is KNOWN:
            centre = centre + posterior.draws_of("hardware_effect")[:, 0]
        standard = np.concatenate([(posterior.draws(own, seed).theta - centre) / (np.sqrt(part) * total) for seed in range(5)])
        assert min(kstest(standard[:, k], "norm").pvalue for k in range(3)) > 1e-4
        assert np.abs(standard.mean(axis=0)).max() < 5 / np.sqrt(len(standard))
        assert np.abs(np.corrcoef(standard.T) - np.eye(3)).max() < 5 / np.sqrt(len(standard))
        np.testing.assert_allclose(standard.std(axis=0), 1, atol=5 / np.sqrt(2 * len(standard)))
        for name in ("sigma", "omega"):
            found = np.concatenate([getattr(posterior.draws(own, seed), name) for seed in range(5)])
            typical, spread = (np.tile(posterior.draws_of(f"{name}_{n}"), 5) for n in ("typical", "spread"))
            assert kstest(np.log(found / typical) / spread, "norm").pvalue > 1e-4


def test_the_less_is_known_the_wider_the_prediction(posterior: LatencyPosterior) -> None:
    frame = steps(50)
    fitted, known, unknown = (posterior.predict(frame, own)["sd_mean_s"].to_numpy() for own in (THREE[0], KNOWN, UNKNOWN))
    assert (known > 2 * fitted).all()
    assert unknown.mean() > 1.1 * known.mean()
    for own, is_known in ((THREE[0], True), (KNOWN, False), (UNKNOWN, False)):
        assert posterior.draws(own).known is is_known


def test_the_same_seed_gives_the_same_draws(posterior: LatencyPosterior) -> None:
    frame = steps(30)
    for own in (THREE[1], KNOWN, UNKNOWN):
        a, b, c = (posterior.predict(frame, own, seed=s) for s in (1, 1, 2))
        pd.testing.assert_frame_equal(a, b)
        assert not a["q2.5_s"].equals(c["q2.5_s"])
    np.testing.assert_array_equal(posterior.draws(THREE[0], 1).theta, posterior.draws(THREE[0], 2).theta)
    one, two = (posterior.draws(configuration(n, "B200"), 1).theta for n in ("new a", "new b"))
    assert abs(np.corrcoef((one - two)[:, 0], one[:, 0])[0, 1]) < 0.95


def test_predictions_do_not_depend_on_the_rows_beside_them(posterior: LatencyPosterior) -> None:
    """Ten thousand rows go in parts; means and sds are those of each row alone, and labels stay."""
    frame = steps(10_000)
    frame.index = frame.index[::-1]
    whole = posterior.predict(frame, THREE[0])
    assert whole.index.equals(frame.index)
    for i in (0, 4095, 4096, 9999):
        alone = posterior.predict(frame.iloc[[i]], THREE[0])
        for name in ("mean_s", "sd_s", "sd_mean_s", "q2.5_mean_s", "q97.5_mean_s"):
            assert alone[name].iloc[0] == pytest.approx(whole[name].iloc[i], rel=1e-9)
    empty = posterior.predict(frame.iloc[:0], KNOWN)
    assert len(empty) == 0
    assert list(empty.columns) == list(whole.columns)


@pytest.mark.parametrize("own", THREE, ids=lambda c: c.config_id)
def test_held_out_rows_are_uniform_in_their_predictions(posterior: LatencyPosterior, own) -> None:
    """Probability integral transform of one row of each of 400 new blocks; 95 % intervals hold 95 % of rows and of block means."""
    frame = traffic(own, 200 + THREE.index(own), 4000)
    blocks = frame["step_id"].to_numpy() // BLOCK
    first = frame.iloc[::BLOCK]
    draws = posterior.draws(own)
    mean = TINY.design(first, own) @ draws.theta.T
    sd = mean.mean(axis=1, keepdims=True) * np.hypot(draws.sigma, draws.omega)
    pit = norm.cdf((first["step_time_s"].to_numpy()[:, None] - mean) / sd).mean(axis=1)
    assert kstest(pit, "uniform").pvalue > 1e-3
    low, high = binom(400, 0.95).ppf([5e-4, 1 - 5e-4])
    rows = posterior.predict(first, own)
    assert low <= first["step_time_s"].between(rows["q2.5_s"], rows["q97.5_s"]).sum() <= high
    means = posterior.predict_block_means(frame, own, blocks)
    observed = frame.groupby(blocks)["step_time_s"].mean()
    assert low <= observed.between(means["q2.5_s"], means["q97.5_s"]).sum() <= high
    assert (means["rows"] == BLOCK).all()
    # Taken for independent rows, block means would be far outside their intervals: the check can fail.
    narrow = rows["sd_s"].to_numpy() / np.sqrt(BLOCK)
    assert (np.abs(observed.to_numpy() - means["mean_s"].to_numpy()) < 1.96 * narrow).sum() < low


def test_a_block_mean_has_one_drift_and_averaged_noise(posterior: LatencyPosterior) -> None:
    """Var = Var(mean of x' theta) + omega^2 (mean scale)^2 + sigma^2 sum scale^2 / m^2, for blocks of any sizes and order."""
    frame = steps(60)
    blocks = np.random.default_rng(4).choice([3, 8, 11], 60, p=[0.6, 0.35, 0.05])
    own = THREE[1]
    draws, design = posterior.draws(own), TINY.design(frame, own)
    found = posterior.predict_block_means(frame, own, blocks)
    assert list(found.index) == [3, 8, 11]
    scale = design @ draws.theta.mean(axis=0)
    for b in (3, 8, 11):
        inside = blocks == b
        m = inside.sum()
        mean = design[inside].mean(axis=0) @ draws.theta.T
        variance = mean.var() + (draws.omega**2).mean() * scale[inside].mean() ** 2
        variance += (draws.sigma**2).mean() * (scale[inside] ** 2).sum() / m**2
        assert found.loc[b, "rows"] == m
        assert found.loc[b, "mean_s"] == pytest.approx(mean.mean(), rel=1e-9)
        assert found.loc[b, "sd_s"] == pytest.approx(np.sqrt(variance), rel=5 / np.sqrt(2 * 600))


@given(seed=st.integers(0, 2**31), count=st.integers(1, 20))
@settings(max_examples=15)
def test_intervals_are_ordered(seed: int, count: int) -> None:
    for own in (THREE[0], UNKNOWN):
        table = three_fitted().predict(steps(count, seed), own, seed=seed)
        assert np.isfinite(table.to_numpy()).all()
        for suffix in ("_s", "_mean_s"):
            assert (table[f"q2.5{suffix}"] < table[f"q50{suffix}"]).all()
            assert (table[f"q50{suffix}"] < table[f"q97.5{suffix}"]).all()
        assert (table["sd_s"] > table["sd_mean_s"]).all()


def test_rows_outside_the_support_are_nil_everywhere(posterior: LatencyPosterior) -> None:
    """A set that describes half of the rows predicts zero, without error, for the other half; blocks average both."""
    halved = replace(TINY, name="halved", support=lambda frame, _: frame["decode_tokens"].to_numpy() > 100)
    half = replace(posterior, feature_set=halved)
    frame, own, blocks = steps(200), THREE[0], np.repeat(np.arange(4), 50)
    inside = frame["decode_tokens"].to_numpy() > 100
    assert 20 < inside.sum() < 180
    whole, predicted = posterior.predict(frame, own), half.predict(frame, own)
    pd.testing.assert_frame_equal(predicted[inside], whole[inside])
    assert (predicted[~inside] == 0).all(axis=None)
    np.testing.assert_allclose(half.expected_s(frame, own), np.where(inside, whole["mean_s"], 0.0))
    means = half.predict_block_means(frame, own, blocks)
    np.testing.assert_allclose(means["mean_s"], predicted["mean_s"].groupby(blocks).mean())
    assert (means["sd_s"] < posterior.predict_block_means(frame, own, blocks)["sd_s"]).all()
    nothing = half.predict_block_means(frame[~inside], own, np.zeros((~inside).sum(), dtype=int))
    assert (nothing.drop(columns="rows") == 0).all(axis=None)


def test_the_scale_of_errors_has_a_floor(posterior: LatencyPosterior) -> None:
    expected: NDArray[np.float64] = np.array([-1.0, 0.0, 5e-4, 2e-3])
    np.testing.assert_array_equal(posterior.scale_s(expected, THREE[0]), [1e-3, 1e-3, 1e-3, 2e-3])


def test_the_table_of_coefficients_is_in_physical_units(posterior: LatencyPosterior) -> None:
    table = posterior.coefficient_table().set_index(["config", "feature"])
    assert len(table) == 4 + 3 * 3
    theta = posterior.draws_of("theta")
    for c, own in enumerate(THREE):
        for k, feature in enumerate(TINY.varying):
            row = table.loc[(own.config_id, feature.name)]
            values = theta[:, c, k] * feature.reference
            assert row["mean"] == pytest.approx(values.mean())
            assert row["sd"] == pytest.approx(values.std())
            assert row["q97.5"] == pytest.approx(np.quantile(values, 0.975))
            assert row["p_negative"] == (values < 0).mean()
            assert row["unit"] == feature.coefficient_unit
    gamma = table.loc[("population", "inverse_tp")]
    assert gamma["mean"] == pytest.approx(posterior.draws_of("gamma").mean() * 2e-3)
    assert gamma["level"] == "config"


def test_names_that_mean_something_else_are_refused(posterior: LatencyPosterior) -> None:
    with pytest.raises(InputError, match=r"'four' was not fitted; this posterior holds one, two, three"):
        posterior.configuration("four")
    with pytest.raises(InputError, match=r"'one' differs from the one of that name that was fitted"):
        posterior.draws(configuration("one", "B200"))
    with pytest.raises(InputError, match="prefill_tokens"):
        posterior.predict(steps(3).drop(columns="prefill_tokens"), THREE[0])
    assert posterior.configuration("two") == THREE[1]


def test_a_fit_refuses_unknown_engines_and_foreign_statistics(posterior: LatencyPosterior) -> None:
    with pytest.raises(UnknownNameError, match="unknown engine 'stan'; known are exact, pymc"):
        fit(posterior.statistics, TINY, PRIORS, engine="stan")
    with pytest.raises(StatisticsError, match="build both with the same set"):
        fit(posterior.statistics, replace(TINY, name="other"), PRIORS)


def test_the_same_seed_gives_the_same_fit(posterior: LatencyPosterior) -> None:
    few = SamplerSettings(draws=50, tune=50, chains=2)
    a, b, c = (fit(posterior.statistics[:1], TINY, PRIORS, few, seed=s, show_progress=False) for s in (7, 7, 8))
    assert a.tree["posterior"].to_dataset().identical(b.tree["posterior"].to_dataset())
    assert not a.tree["posterior"].to_dataset().equals(c.tree["posterior"].to_dataset())
