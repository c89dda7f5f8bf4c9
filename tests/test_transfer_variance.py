"""The predictive variance by source and by coefficient: against dense matrices, draws, and arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from posterior_fits import three_fitted
from simulation import BLOCK, PRIORS, THREE, TINY, batches, configuration, dense, draw_parameters, loading, simulate

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import ExactDensity, LatencyPosterior, SamplerSettings, fit
from hfdtl_bayes.transfer import calibrate_statistics
from hfdtl_bayes.transfer.variance import (
    COEFFICIENT_SOURCES,
    SOURCES,
    VarianceSources,
    coefficient_covariances,
    variance_sources,
)

KNOWN, UNKNOWN = configuration("new on known hardware", "H100", 4), configuration("new on new hardware", "B200", 4)
EVERY = (*THREE, KNOWN, UNKNOWN)


@pytest.fixture(scope="module")
def posterior() -> LatencyPosterior:
    return three_fitted()


def steps(count: int, seed: int = 1) -> pd.DataFrame:
    return batches(np.random.default_rng(seed), count)


# --- what the parts are ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", EVERY, ids=lambda c: c.config_id)
@pytest.mark.parametrize("seed", [3, 4])
def test_levels_are_the_nested_conditionals_of_the_joint_gaussian(own, seed: int) -> None:
    """All coefficients and rows as one normal vector: condition on phi, then on w_h, and take what each step removes."""
    data = simulate(seed)
    density = ExactDensity(data.statistics, TINY, PRIORS)
    scales = draw_parameters(np.random.default_rng([seed, 1]), THREE, TINY, PRIORS)
    populations = [scales[n].reshape(1) for n in ("sigma_typical", "sigma_spread", "omega_typical", "omega_spread")]
    x = density.join(
        scales["tau"][None], scales["hardware_share"].reshape(1), scales["sigma"][None], scales["omega"][None], populations
    )
    fitted = THREE.index(own) if own in THREE else None
    mean, levels = density.levels(x, own, fitted)

    latent_mean, latent = dense(data, scales).conditional()
    k, p, names = 3, 4, ["H100", "L4"]
    sd = scales["tau"] * np.array([max(abs(f.prior.mean), f.prior.sd) for f in TINY.varying])
    share = float(scales["hardware_share"])
    # theta = M z + e for the latent vector z, w of new hardware appended to it.
    new = own.hardware.name not in names
    size = len(latent_mean)
    z_mean = np.concatenate([latent_mean, np.zeros(k * new)])
    z = np.zeros((len(z_mean), len(z_mean)))
    z[:size, :size] = latent
    z[size:, size:] = np.diag(share * sd**2) if new else 0.0
    at = size if new else p + names.index(own.hardware.name) * k
    m, independent = np.zeros((k, len(z_mean))), np.zeros((k, k))
    if fitted is None:
        m[:, :p], m[:, at : at + k] = loading(TINY, own), np.eye(k)
        independent = np.diag((1 - share) * sd**2)
    else:
        own_at = p + (len(names) + fitted) * k
        m[:, own_at : own_at + k] = np.eye(k)

    def explained(known: list[int]) -> np.ndarray:
        cross = m @ z[:, known]
        return cross @ np.linalg.solve(z[np.ix_(known, known)], cross.T)

    phi = list(range(p))
    by_population, by_both = explained(phi), explained([*phi, *range(at, at + k)])
    total = m @ z @ m.T + independent
    near = 1e-8 * np.abs(total).max()
    np.testing.assert_allclose(mean[0], m @ z_mean, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(levels.population[0], by_population, rtol=1e-7, atol=near)
    np.testing.assert_allclose(levels.hardware[0], by_both - by_population, rtol=1e-7, atol=near)
    np.testing.assert_allclose(levels.own[0], total - by_both, rtol=1e-7, atol=near)


def test_scales_are_what_their_draws_move_the_expected_value_by() -> None:
    """E[x'theta | psi] of every draw of the scales, from dense matrices: its variance is the part of the scales."""
    data = simulate(5)
    fitted = fit(data.statistics, TINY, PRIORS, SamplerSettings(draws=50, tune=50, chains=2), seed=2, show_progress=False)
    means, covariances = [], []
    for s in range(100):
        scales = {n: fitted.draws_of(n)[s] for n in ("tau", "hardware_share", "sigma", "omega")}
        mean, covariance = dense(data, scales).conditional()
        means.append(mean[-6:-3])
        covariances.append(covariance[-6:-3, -6:-3])
    found = coefficient_covariances(fitted, THREE[1])
    np.testing.assert_allclose(found["scales"], np.cov(np.array(means).T, bias=True), rtol=1e-6, atol=1e-10)
    # The law of total variance, with the total from elsewhere.
    total = np.cov(np.array(means).T, bias=True) + np.mean(covariances, axis=0)
    np.testing.assert_allclose(sum(found.values()), total, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("own", EVERY, ids=lambda c: c.config_id)
def test_the_parts_add_up_to_the_variance_of_a_prediction(posterior: LatencyPosterior, own) -> None:
    """The sd that `predict` reports has the Monte Carlo error of 600 draws of the coefficients, the parts have none."""
    frame = steps(40)
    found = variance_sources(posterior, frame, own, seed=3)
    predicted = posterior.predict(frame, own, seed=3)
    assert found.fitted is (own in THREE)
    assert (found.by_source >= 0).all(axis=None)
    expected_value = found.by_source[list(COEFFICIENT_SOURCES)].sum(axis=1)
    error = 5 / np.sqrt(2 * 600)
    np.testing.assert_allclose(np.sqrt(expected_value), predicted["sd_mean_s"], rtol=error)
    np.testing.assert_allclose(np.sqrt(found.total), predicted["sd_s"], rtol=error)
    # Noise and drift are the same number in both.
    draws, scale = posterior.draws(own, 3), posterior.scale_s(posterior.expected_s(frame, own, 3), own)
    np.testing.assert_allclose(found.by_source["noise"], np.mean(draws.sigma**2) * scale**2)
    np.testing.assert_allclose(found.by_source["drift"], np.mean(draws.omega**2) * scale**2)
    np.testing.assert_allclose(found.by_coefficient.sum(axis=1), expected_value, rtol=1e-10)
    np.testing.assert_allclose(found.shares().sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(found.coefficient_shares().sum(axis=1), 1.0, rtol=1e-12)


def test_new_hardware_is_a_group_effect_of_its_own(posterior: LatencyPosterior) -> None:
    """E[rho tau^2] scale^2 for new hardware, E[(1 - rho) tau^2] scale^2 for the configuration, by the model's definition."""
    total = (posterior.draws_of("tau") * [1.2, 1.0, 1.5]) ** 2
    share = posterior.draws_of("hardware_share")[:, None]
    found = coefficient_covariances(posterior, UNKNOWN)
    np.testing.assert_allclose(found["hardware"], np.diag((share * total).mean(axis=0)), atol=1e-12)
    np.testing.assert_allclose(found["configuration"], np.diag(((1 - share) * total).mean(axis=0)), atol=1e-12)
    known = coefficient_covariances(posterior, KNOWN)
    np.testing.assert_allclose(known["configuration"], found["configuration"], atol=1e-12)
    assert (np.diag(known["hardware"]) < np.diag(found["hardware"])).all()


def test_block_means_share_a_drift_and_average_their_noise(posterior: LatencyPosterior) -> None:
    frame, own = steps(60), THREE[1]
    blocks = np.random.default_rng(4).choice([3, 8, 11], 60, p=[0.6, 0.35, 0.05])
    found = variance_sources(posterior, frame, own, blocks=blocks)
    assert list(found.by_source.index) == [3, 8, 11]
    draws = posterior.draws(own)
    design, covariance = TINY.design(frame, own), sum(coefficient_covariances(posterior, own).values())
    scale = design @ draws.mean
    for b in (3, 8, 11):
        inside = blocks == b
        x = design[inside].mean(axis=0)
        row = found.by_source.loc[b]
        assert row[list(COEFFICIENT_SOURCES)].sum() == pytest.approx(x @ covariance @ x)
        assert row["drift"] == pytest.approx((draws.omega**2).mean() * scale[inside].mean() ** 2)
        assert row["noise"] == pytest.approx((draws.sigma**2).mean() * (scale[inside] ** 2).sum() / inside.sum() ** 2)
    predicted = posterior.predict_block_means(frame, own, blocks)
    np.testing.assert_allclose(np.sqrt(found.total), predicted["sd_s"], rtol=5 / np.sqrt(2 * 600))
    # Blocks of one row each are rows.
    alone = variance_sources(posterior, frame, own, blocks=np.arange(60))
    np.testing.assert_allclose(alone.by_source, variance_sources(posterior, frame, own).by_source)


@given(seed=st.integers(0, 2**31), count=st.integers(1, 20), which=st.integers(0, 4))
@settings(max_examples=20)
def test_rows_do_not_depend_on_their_company(seed: int, count: int, which: int) -> None:
    frame, own = steps(count, seed), EVERY[which]
    whole = variance_sources(three_fitted(), frame, own)
    alone = variance_sources(three_fitted(), frame.iloc[[-1]], own)
    for name in ("by_source", "by_coefficient", "removed_if_known"):
        np.testing.assert_allclose(getattr(alone, name), getattr(whole, name).iloc[[-1]], rtol=1e-9, atol=1e-18)
    assert whole.by_source.index.equals(frame.index)
    assert ((whole.removed_if_known >= 0) & (whole.removed_if_known <= 1 + 1e-9)).all(axis=None)
    assert whole.table()["share"].sum() == pytest.approx(1.0)
    assert whole.coefficient_table()["share"].sum() == pytest.approx(1.0)


def test_rows_outside_the_support_have_no_variance(posterior: LatencyPosterior) -> None:
    halved = replace(TINY, name="halved", support=lambda frame, _: frame["decode_tokens"].to_numpy() > 60)
    half, frame = replace(posterior, feature_set=halved), steps(40)
    inside = frame["decode_tokens"].to_numpy() > 60
    found, whole = variance_sources(half, frame, UNKNOWN), variance_sources(posterior, frame, UNKNOWN)
    assert (found.by_source[~inside] == 0).all(axis=None)
    assert (found.shares()[~inside] == 0).all(axis=None)
    pd.testing.assert_frame_equal(found.by_source[inside], whole.by_source[inside])
    # Rows without variance do not count in the summary.
    pd.testing.assert_frame_equal(found.table(), variance_sources(half, frame[inside], UNKNOWN).table())
    nothing = variance_sources(half, frame[~inside], UNKNOWN)
    assert (nothing.table()[["share", "sd"]] == 0).all(axis=None)
    assert (nothing.coefficient_table()[["share", "removed_if_known"]] == 0).all(axis=None)
    assert "nothing has a variance" in str(nothing)


# --- summaries, by hand ------------------------------------------------------------------------------------------------------


def test_the_summary_counts_rows_relative_to_their_size() -> None:
    """Two rows, one ten times as long: relative variances 0.01 + 0.03 and 0.03 + 0.01."""
    columns = {name: [0.0, 0.0] for name in SOURCES} | {"population": [0.01, 3.0], "noise": [0.03, 1.0]}
    coefficients = pd.DataFrame({"a": [0.02, 3.0], "b": [-0.01, 0.0]})
    known = pd.DataFrame({"a": [0.6, 1.0], "b": [0.25, 0.0]})
    found = VarianceSources("x", False, pd.DataFrame(columns), coefficients, known, np.array([1.0, 10.0]))
    table = found.table().set_index("source")
    assert table.loc["population", "share"] == pytest.approx(0.5)
    assert table.loc["noise", "share"] == pytest.approx(0.5)
    assert table.loc["noise", "sd"] == pytest.approx(np.sqrt(0.02))
    assert table.loc["drift", "share"] == 0
    by_coefficient = found.coefficient_table().set_index("coefficient")
    assert by_coefficient.loc["a", "share"] == pytest.approx((0.02 + 0.03) / (0.01 + 0.03))
    assert by_coefficient.loc["b", "share"] == pytest.approx(-0.01 / 0.04)
    assert by_coefficient.loc["a", "removed_if_known"] == pytest.approx((0.6 * 0.01 + 0.03) / 0.04)
    assert by_coefficient.loc["b", "removed_if_known"] == pytest.approx(0.25 * 0.01 / 0.04)
    assert str(found) == (
        "predictive variance of x (never seen): population 50%, noise 50%; knowing a exactly would remove 90% of what the "
        "coefficients leave open"
    )


def test_a_coefficient_that_is_known_leaves_the_rest(posterior: LatencyPosterior) -> None:
    """removed_if_known against the conditional variance of the others, x' (V - V_k V_k' / V_kk) x."""
    frame = steps(5)
    found = variance_sources(posterior, frame, THREE[2])
    covariance = sum(coefficient_covariances(posterior, THREE[2]).values())
    design = TINY.design(frame, THREE[2])
    for k, name in enumerate(TINY.coef_names):
        left = covariance - np.outer(covariance[k], covariance[k]) / covariance[k, k]
        shares = [1 - (x @ left @ x) / (x @ covariance @ x) for x in design]
        np.testing.assert_allclose(found.removed_if_known[name], shares, rtol=1e-9, atol=1e-12)


# --- calibration -------------------------------------------------------------------------------------------------------------


def test_rows_of_the_target_take_its_group_effects_away() -> None:
    """Zero-shot, 10 rows and 200: what each level of the hierarchy leaves open shrinks, drift and noise are what is left."""
    data = simulate(9, rows=(200, 200, 400))
    donors = fit(data.statistics[:2], TINY, PRIORS, SamplerSettings(draws=500, tune=200, chains=2), seed=1, show_progress=False)
    tables = []
    for n in (0, 10, 200):
        own = replace(data, frames=(*data.frames[:2], data.frames[2].iloc[: n or 10])).statistics[2]
        fitted = calibrate_statistics(donors, own, engine="conditional", seed=1) if n else donors
        found = variance_sources(fitted, data.frames[2], THREE[2])
        assert found.fitted is bool(n)
        tables.append(found.table().set_index("source"))
    groups = [t.loc[["population", "hardware", "configuration"], "sd"] for t in tables]
    assert (groups[1] < 0.7 * groups[0]).all()
    assert (groups[2] < 0.7 * groups[1]).all()
    assert tables[2].loc[["drift", "noise"], "share"].sum() > 0.9


# --- bad input ---------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_split_is_refused(posterior: LatencyPosterior) -> None:
    frame = steps(3)
    with pytest.raises(InputError, match="no rows of 'one' whose variance could be split"):
        variance_sources(posterior, frame.iloc[:0], THREE[0])
    with pytest.raises(InputError, match="2 block numbers were given for 3 rows"):
        variance_sources(posterior, frame, THREE[0], blocks=np.array([0, 1]))
    with pytest.raises(InputError, match="'one' differs from the one of that name that was fitted"):
        variance_sources(posterior, frame, configuration("one", "B200"))
    with pytest.raises(InputError, match="prefill_tokens"):
        variance_sources(posterior, frame.drop(columns="prefill_tokens"), THREE[0])
    from hfdtl_bayes.statistics import scaled_rows  # noqa: PLC0415

    rows = scaled_rows(simulate(1).frames[0], THREE[0], TINY, block_length=BLOCK)
    with pytest.raises(InputError, match="this posterior is of the engine rows"):
        variance_sources(replace(posterior, rows=(rows,)), frame, THREE[0])
