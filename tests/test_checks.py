"""Each check against dense linear algebra, simulation with known truth, and input that leaves nothing to say."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from posterior_fits import TRUTH, three_fitted, traffic
from scipy.stats import binom, chi2, kstest, norm
from simulation import BLOCK, PRIORS, THREE, TINY, batches, error_covariance, observe

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings, fit
from hfdtl_bayes.statistics import statistics_from_rows
from hfdtl_bayes.transfer import Outcome, Status, Verdict, VerdictSettings, evaluate, population_conflict, verdict
from hfdtl_bayes.transfer.checks import (
    JUDGED,
    AccuracySettings,
    CoverageSettings,
    Evidence,
    Traffic,
    check_accuracy,
    check_coverage,
    check_errors,
    check_kinship,
    check_lack_of_fit,
    check_reach,
    check_rmse,
    check_slopes,
    common_shift_detectable,
    make_evidence,
    rows_needed,
)
from hfdtl_bayes.transfer.checks.accuracy import Ratio, expected_mape, left_out_errors, probability_ratio_below
from hfdtl_bayes.transfer.checks.coverage import block_errors, whitened_block_errors
from hfdtl_bayes.transfer.checks.evidence import ErrorForms
from hfdtl_bayes.transfer.checks.lack_of_fit import candidate_columns, score_tests
from hfdtl_bayes.transfer.conflict import EVERYTHING

TARGET = THREE[2]
THETA, SIGMA, OMEGA = (np.array(TRUTH["three"][0]), *TRUTH["three"][1:])
SAMPLER = SamplerSettings(draws=700, tune=200, chains=4)
"""Enough for the diagnostics of the verdict."""


@cache
def fitted() -> LatencyPosterior:
    """Posterior of 12,000 steps of each configuration, "three" as the target: its coefficients are all but known."""
    return fit(three_fitted().statistics, TINY, PRIORS, SAMPLER, target="three", seed=6, show_progress=False)


def evidence(
    seen: pd.DataFrame | None, held: pd.DataFrame | None, *, limit: float = 0.2, intended: pd.DataFrame | None = None
) -> Evidence:
    posterior = fitted()
    scores = None if held is None else evaluate(posterior, held, TARGET)
    return make_evidence(
        posterior, TARGET, calibration=seen, held_out=held, intended=intended, scores=scores, limit=limit, block_length=BLOCK
    )


@cache
def plain() -> Evidence:
    return evidence(traffic(TARGET, 1, 200), traffic(TARGET, 2, 200))


def wide(found: Evidence, size: float = 0.3) -> Evidence:
    """The same with coefficients that are known to `size` only, correlated, and noise and drift known."""
    k = len(found.mean)
    root = size * (np.eye(k) + 0.5 * np.tri(k, k=-1))
    sigma, omega = np.full(3, SIGMA), np.full(3, OMEGA)
    return replace(found, covariance=root @ root.T, sigma=sigma, omega=omega)


def with_residual(own: Traffic, residual: np.ndarray) -> Traffic:
    return replace(own, residual=residual, observed=own.expected + own.scale * residual)


def dense_error(own: Traffic) -> np.ndarray:
    return error_covariance(own.block, SIGMA, OMEGA)


# --- forms against dense matrices --------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 99))
def test_error_forms_are_those_of_the_dense_inverse(sizes: list[int], sigma: float, omega: float, seed: int) -> None:
    block = np.repeat(np.arange(len(sizes)), sizes)
    columns = np.random.default_rng(seed).standard_normal((len(block), 3))
    dense = columns.T @ np.linalg.solve(error_covariance(block, sigma, omega), columns)
    np.testing.assert_allclose(ErrorForms(columns, block).at(sigma, omega), dense, rtol=1e-8, atol=1e-8 * np.abs(dense).max())


def test_whitened_block_errors_are_those_of_the_cholesky_factor() -> None:
    found = wide(plain())
    held = found.held_out
    assert held is not None
    error, variance, z = block_errors(found, held)
    covariance = np.diag(variance) + z @ found.covariance @ z.T
    expected = np.linalg.solve(np.linalg.cholesky(covariance), error)
    np.testing.assert_allclose(whitened_block_errors(found, held), expected, rtol=1e-8)


def test_score_test_is_that_of_the_dense_marginal_likelihood() -> None:
    found = wide(plain())
    held = found.held_out
    assert held is not None
    names, (column,) = candidate_columns(found, [held])
    # Not clipped: residuals of simulated traffic have no outliers beyond eight robust sds.
    scores, update = score_tests(found, names, [(held, column)], 0)
    z, c, r = held.relative_design, column / held.scale[:, None], held.residual
    m = np.linalg.inv(dense_error(held) + z @ found.covariance @ z.T)
    np.testing.assert_allclose(scores.score, c.T @ m @ r, rtol=1e-5)
    np.testing.assert_allclose(scores.information, np.diag(c.T @ m @ c), rtol=1e-5)
    np.testing.assert_allclose(scores.p_value, chi2.sf((c.T @ m @ r) ** 2 / np.diag(c.T @ m @ c), 1), rtol=1e-4)
    np.testing.assert_allclose(update, found.covariance @ z.T @ m @ r, rtol=1e-6)


def test_score_test_of_rows_learnt_from_counts_the_prior_once() -> None:
    """Given the posterior after the rows it is the test of the prediction before them."""
    found = wide(plain())
    own = found.calibration
    assert own is not None
    z, error = own.relative_design, dense_error(own)
    m = np.linalg.inv(error + z @ found.covariance @ z.T)
    gain = found.covariance @ z.T @ m
    after = replace(found, covariance=found.covariance - gain @ z @ found.covariance)
    seen = with_residual(own, own.residual - z @ gain @ own.residual)
    names, (column,) = candidate_columns(found, [own])
    scores, _ = score_tests(after, names, [(seen, column)], 1)
    c = column / own.scale[:, None]
    np.testing.assert_allclose(scores.score, c.T @ m @ own.residual, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores.information, np.diag(c.T @ m @ c), rtol=1e-4)


def test_left_out_blocks_are_predicted_as_by_a_fit_without_them() -> None:
    found = wide(plain())
    own = found.calibration
    assert own is not None
    prior = found.covariance
    z, error = own.relative_design, dense_error(own)

    def update(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        precision = np.linalg.inv(prior) + z[rows].T @ np.linalg.solve(error[np.ix_(rows, rows)], z[rows])
        covariance = np.linalg.inv(precision)
        return covariance @ z[rows].T @ np.linalg.solve(error[np.ix_(rows, rows)], own.residual[rows]), covariance

    every = np.arange(len(z))
    mean, covariance = update(every)
    total, count, chosen = left_out_errors(replace(found, covariance=covariance), with_residual(own, own.residual - z @ mean))
    assert len(chosen) == len(own.sizes)
    observed = own.expected + own.scale * (own.residual - z @ mean)
    for b in (0, 7, len(chosen) - 1):
        rows = own.block == b
        without, _ = update(every[~rows])
        residual = own.residual[rows] - z[rows] @ without
        expected = np.abs(residual * own.scale[rows] / observed[rows]).sum()
        assert (total[b], count[b]) == (pytest.approx(expected, rel=1e-6), rows.sum())


# --- accuracy ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [3, 5, 10, 40])
@pytest.mark.parametrize(("bias", "between"), [(0.06, 0.10), (0.02, 0.08), (0.08, 0.03)])
def test_probability_is_calibrated_with_few_blocks(blocks: int, bias: float, between: float) -> None:
    """With the limit at the truth, nine in ten is reached in a tenth of cases; the percentile bootstrap of three blocks: in a third."""
    rng = np.random.default_rng([blocks, int(1000 * bias)])

    def errors(count: int, blocks: int) -> np.ndarray:
        shared = bias + between * rng.standard_normal((count, blocks, 1))
        return np.abs(shared + 0.05 * rng.standard_normal((count, blocks, 20)))

    truth, trials = float(errors(1, 50_000).mean()), 300
    stratum = np.full(blocks, "one", dtype=object)
    accepted = 0
    for e in errors(trials, blocks):
        ratio = Ratio(e.sum(axis=1), np.full(blocks, 20.0), stratum)
        accepted += probability_ratio_below(ratio, truth, 300, 0, float(e.std() / np.sqrt(e.size) / e.mean())) >= 0.9
    # A tenth, or half as much again for the skewness of so few; beyond what chance explains.
    assert binom.sf(accepted - 1, trials, 0.15) > 1e-3, accepted / trials


def test_percentile_bootstrap_would_be_too_confident() -> None:
    """Why it is not used: the same simulation catches it."""
    rng = np.random.default_rng(0)
    e = np.abs(0.06 + 0.1 * rng.standard_normal((300, 3, 1)) + 0.05 * rng.standard_normal((300, 3, 20))).mean(axis=2)
    truth = np.abs(0.06 + np.hypot(0.1, 0.05) * rng.standard_normal(10**6)).mean()
    index = rng.integers(0, 3, (300, 3))
    accepted = int(((e[:, index].mean(axis=2) < truth).mean(axis=1) >= 0.9).sum())
    assert binom.sf(accepted - 1, 300, 0.15) < 1e-6


def test_probability_knows_its_edges() -> None:
    one = Ratio(np.array([1.0]), np.array([20.0]), np.array(["a"], dtype=object))
    assert np.isnan(probability_ratio_below(one, 0.1, 100, 0))
    exact = Ratio(np.zeros(4), np.full(4, 20.0), np.full(4, "a", dtype=object))
    assert probability_ratio_below(exact, 0.1, 100, 0) == 1.0
    # Four blocks alike by chance are no certainty where their rows differ.
    alike = Ratio(np.full(4, 1.9), np.full(4, 20.0), np.full(4, "a", dtype=object))
    assert probability_ratio_below(alike, 0.1, 100, 0) == 1.0
    assert probability_ratio_below(alike, 0.1, 100, 0, 0.1) < 0.75


def test_expected_mape_is_that_of_simulated_rows() -> None:
    found = wide(plain(), 0.1)
    held = found.held_out
    assert held is not None
    forecast = expected_mape(found, held, found.covariance)
    rng = np.random.default_rng(0)
    d = rng.multivariate_normal(np.zeros(3), found.covariance, 3000)
    error_sd = np.sqrt(np.mean(found.sigma**2) + np.mean(found.omega**2))
    off = d @ held.relative_design.T + error_sd * rng.standard_normal((3000, len(held.scale)))
    simulated = np.abs(off).mean(axis=1)
    assert forecast.mean() == pytest.approx(simulated.mean(), rel=0.05)
    assert np.quantile(forecast, 0.9) == pytest.approx(np.quantile(simulated, 0.9), rel=0.1)


def test_accuracy_without_held_out_rows_cannot_say() -> None:
    found = check_accuracy(evidence(traffic(TARGET, 1, 200), None, intended=traffic(TARGET, 2, 100)))
    assert found.status is Status.CANNOT_SAY
    assert "left out in turn" in found.message
    assert "the posterior itself expects" in found.message
    hopeless = check_accuracy(evidence(traffic(TARGET, 1, 200), None, limit=0.01))
    assert hopeless.status is Status.FAIL


def test_rmse_needs_its_limit() -> None:
    with pytest.raises(InputError, match="rmse_limit_s is not set"):
        check_rmse(plain(), AccuracySettings())


# --- coverage ----------------------------------------------------------------------------------------------------------------


def test_coverage_is_right_under_the_model_whatever_blocks_share() -> None:
    """Blocks that miss together through the coefficients are announced; its p-values are uniform."""
    found = wide(plain())
    held = found.held_out
    assert held is not None
    rng = np.random.default_rng(0)
    root = np.linalg.cholesky(dense_error(held) + held.relative_design @ found.covariance @ held.relative_design.T)
    z = np.array([whitened_block_errors(found, with_residual(held, root @ rng.standard_normal(len(root)))) for _ in range(200)])
    assert kstest(norm.cdf(z).ravel(), "uniform").pvalue > 1e-3
    assert kstest(chi2.cdf((z**2).sum(axis=1), z.shape[1]), "uniform").pvalue > 1e-3


def test_coverage_of_good_slow_and_slightly_slow_rows() -> None:
    held = traffic(TARGET, 3, 400)
    assert check_coverage(evidence(None, held)).status is Status.PASS
    slow = check_coverage(evidence(None, held.assign(step_time_s=1.6 * held["step_time_s"])))
    assert slow.status is Status.FAIL
    assert "larger than announced" in slow.recommendation
    # Many blocks show a shift of 4 %, which nobody minds.
    many = traffic(TARGET, 4, 12_000)
    slight = check_coverage(evidence(None, many.assign(step_time_s=1.04 * many["step_time_s"])))
    assert slight.status is Status.WARN, slight.message
    assert list(slight.table.columns) == ["block", "regime", "rows", "error", "announced_sd", "pit"]


def test_few_rows_held_counts_once_blocks_show_it() -> None:
    """Three blocks of which one misses are no proof of narrow intervals; thirty are."""
    noisy = traffic(TARGET, 8, 30 * BLOCK)
    bad = (noisy["step_id"] // BLOCK % 3 == 0).to_numpy()
    held = noisy.assign(step_time_s=noisy["step_time_s"] * np.where(bad, 1.45, 1.0))
    few = check_coverage(evidence(None, held.iloc[: 3 * BLOCK]), CoverageSettings(min_coverage=0.9, level=1e-9))
    many = check_coverage(evidence(None, held), CoverageSettings(min_coverage=0.9, level=1e-9))
    assert (few.status, many.status) == (Status.WARN, Status.FAIL), (few.message, many.message)


def test_common_shift_is_detected_with_the_power_it_says() -> None:
    found = wide(plain(), 0.02)
    held = found.held_out
    assert held is not None
    level, power = 0.05, 0.8
    factor = common_shift_detectable(found, held, level, power)
    error, variance, z = block_errors(found, held)
    m = np.linalg.inv(np.diag(variance) + z @ found.covariance @ z.T)
    information = m.sum()
    rng = np.random.default_rng(0)
    root = np.linalg.cholesky(np.linalg.inv(m))
    made = factor - 1.0 + rng.standard_normal((4000, len(error))) @ root.T
    detected = np.abs(made @ m.sum(axis=0)) / np.sqrt(information) > norm.isf(level / 2)
    assert detected.mean() == pytest.approx(power, abs=0.03)


# --- reach -------------------------------------------------------------------------------------------------------------------


def test_reach_names_what_drives_the_uncertainty() -> None:
    light = traffic(TARGET, 1, 100).assign(prefill_tokens=0)
    found = evidence(light, traffic(TARGET, 2, 200))
    covariance = np.diag([3.0, 1e-4, 1e-4]) ** 2
    reach = check_reach(replace(found, covariance=covariance))
    assert reach.status is Status.FAIL
    assert "most of all prefill" in reach.message
    assert "more prefill than any calibrated one" in reach.message
    table = reach.table.set_index("coefficient")
    assert table.loc["prefill", "share_of_variance"] > 0.99
    assert table["share_of_variance"].sum() == pytest.approx(1.0)
    assert check_reach(found).status is Status.PASS
    assert check_reach(evidence(light, None)).status is Status.CANNOT_SAY


# --- lack of fit -------------------------------------------------------------------------------------------------------------


def test_a_missing_square_is_named_with_what_it_would_save() -> None:
    held = traffic(TARGET, 5, 2000)
    extra = 2.0 * held["prefill_tokens"] ** 2 / held["prefill_tokens"].max() * 2e-5
    bent = held.assign(step_time_s=held["step_time_s"] + extra)
    found = evidence(traffic(TARGET, 1, 200), bent)
    check = check_lack_of_fit(found)
    assert check.status is Status.FAIL
    assert check.message.startswith(("prefill^2", "prefill_tokens^2")), check.message
    assert "saves" in check.recommendation or "save about" in check.recommendation
    best = check.table.loc[check.table["gain"].idxmax()]
    before = evaluate(fitted(), bent, TARGET).mape
    attainable = evaluate(fitted(), held, TARGET).mape
    assert 0.0 < best["gain"] < 1.5 * (before - attainable)


def test_nothing_is_missed_where_nothing_is_missing() -> None:
    smallest = [
        check_lack_of_fit(evidence(traffic(TARGET, 1, 200), traffic(TARGET, 1000 + s, 400))).table["p_adjusted"].min()
        for s in range(25)
    ]
    assert binom.sf(sum(p < 0.05 for p in smallest) - 1, 25, 0.05) > 1e-3


def test_a_wrong_slope_is_told_from_noise_and_named() -> None:
    held = traffic(TARGET, 6, 600)
    none = check_slopes(evidence(None, held))
    assert none.status is Status.PASS
    more = 0.5 * THETA[1] * TINY.design(held, TARGET)[:, 1]
    wrong = check_slopes(evidence(None, held.assign(step_time_s=held["step_time_s"] + more)))
    assert wrong.status is Status.WARN
    table = wrong.table.set_index("coefficient")
    assert wrong.table["coefficient"].iloc[0] == "decode"
    assert table.loc["decode", "shift"] == pytest.approx(0.5, abs=0.2)
    assert (table["detectable_80"] < table["detectable_95"]).all()


def test_checks_without_rows_cannot_say() -> None:
    nothing = evidence(None, None)
    for check in (check_lack_of_fit, check_slopes, check_coverage, check_reach, check_accuracy):
        assert check(nothing).status is Status.CANNOT_SAY, check.__name__


# --- more rows ---------------------------------------------------------------------------------------------------------------


def test_rows_needed_suffice_and_fewer_do_not() -> None:
    found = replace(wide(plain(), 0.5), limit=0.15, scores=None)
    held = found.held_out
    assert held is not None
    exact = with_residual(held, np.zeros(len(held.scale)))
    found = replace(found, held_out=exact)
    more = rows_needed(found, exact, 0.9)
    assert more.rows is not None
    assert more.rows % BLOCK == 0
    information = exact.relative_design.T @ np.linalg.solve(dense_error(exact), exact.relative_design) / len(exact.scale)
    rng = np.random.default_rng(0)

    def probability(rows: float) -> float:
        covariance = np.linalg.inv(np.linalg.inv(found.covariance) + rows * information)
        off = rng.multivariate_normal(np.zeros(3), covariance, 4000) @ exact.relative_design.T
        spread = np.sqrt((off**2).mean(axis=1) + SIGMA**2 + OMEGA**2)
        return float(np.mean(np.sqrt(2 / np.pi) * spread < 0.15))

    assert probability(more.rows) > 0.87
    assert probability(more.rows - 2 * BLOCK) < 0.93 or more.rows <= 2 * BLOCK
    assert rows_needed(replace(found, limit=0.05), exact, 0.9).rows is None, "noise alone exceeds the limit"


# --- kinship -----------------------------------------------------------------------------------------------------------------


def test_conflict_has_directions_and_a_shift_it_can_see() -> None:
    conflict = population_conflict(fitted())
    assert len(conflict.by_direction) == pytest.approx(conflict.directions, abs=1)
    assert (conflict.by_direction["z"].diff().dropna() <= 0).all()
    assert conflict.by_direction["p_value"].between(0, 1).all()
    assert list(conflict.detectable.index) == [*TINY.coef_names, EVERYTHING]
    assert (conflict.detectable["shift_95"] > conflict.detectable["shift_80"]).all()
    assert (conflict.detectable["shift_80"] > 1).all()
    check = check_kinship(plain())
    assert check.status in (Status.PASS, Status.WARN)
    assert check_errors(plain()).status is not Status.CANNOT_SAY


# --- the verdict on what leaves nothing to say -------------------------------------------------------------------------------


def judged(held: pd.DataFrame | None, settings: VerdictSettings | None = None, **options: object) -> Verdict:
    return verdict(fitted(), held, TARGET, settings, calibration_rows=traffic(TARGET, 1, 200), **options)  # type: ignore[arg-type]


def test_verdict_holds_its_checks_as_plain_data_and_figures() -> None:
    found = judged(traffic(TARGET, 2, 300))
    assert found.outcome is not Outcome.CANNOT_SAY
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["checks"][0]["status"] in {"pass", "fail"}
    assert found.check("accuracy") is not None
    assert found.check("nobody") is None
    drawn = [c.name for c in found.checks if c.figure() is not None]
    assert {"accuracy", "coverage", "reach of the calibration", "lack of fit"} <= set(drawn)
    assert all(len(c.table) for c in found.checks)


def test_without_held_out_rows_nothing_is_accepted() -> None:
    found = judged(None, intended_rows=traffic(TARGET, 2, 300))
    assert found.outcome is Outcome.CANNOT_SAY, str(found)
    assert not found.accepted
    assert found.held_out is None
    assert found.as_dict()["held_out"] is None
    assert found.as_dict()["probability_below_limit"] is None
    with pytest.raises(InputError, match="no held-out rows"):
        judged(traffic(TARGET, 2, 300).iloc[:0])
    with pytest.raises(InputError, match="no intended rows"):
        judged(None, intended_rows=traffic(TARGET, 2, 300).iloc[:0])


def test_other_traffic_than_was_judged_is_not_accepted() -> None:
    held = traffic(TARGET, 2, 300)
    assert judged(held, intended_rows=traffic(TARGET, 3, 100)).check(JUDGED).passed  # type: ignore[union-attr]
    heavy = traffic(TARGET, 3, 100).assign(prefill_tokens=lambda f: 10 * held["prefill_tokens"].max() + f["prefill_tokens"])
    lenient = VerdictSettings(max_mean_uncertainty=10.0)
    assert judged(held, lenient).outcome is Outcome.ACCEPT
    found = judged(held, lenient, intended_rows=heavy)
    assert found.outcome is Outcome.CANNOT_SAY
    assert "most of all of prefill nothing like it was measured" in found.recommendation
    table = found.check(JUDGED).table.set_index("coefficient")  # type: ignore[union-attr]
    # The amount beyond what five rows have, over all the time: by hand.
    coefficient = fitted().draws(TARGET).mean[0] * TINY["prefill"].reference
    most = pd.concat([held, traffic(TARGET, 1, 200)])["prefill_tokens"].nlargest(5).min()
    beyond = coefficient * (heavy["prefill_tokens"] - most).clip(lower=0).sum()
    expected = fitted().expected_s(heavy, TARGET).sum()
    assert table.loc["prefill", "share_of_time_beyond"] == pytest.approx(beyond / expected, rel=1e-6)


def test_calibration_rows_alone_speak_against_what_they_miss() -> None:
    seen = traffic(TARGET, 7, 2000)
    extra = 3.0 * seen["prefill_tokens"] ** 2 / seen["prefill_tokens"].max() * 2e-5
    bent = seen.assign(step_time_s=seen["step_time_s"] + extra)
    found = verdict(fitted(), None, TARGET, calibration_rows=bent)
    assert found.outcome is Outcome.EXPAND_RESIDUAL, str(found)
    assert "prefill" in found.recommendation


def test_one_block_is_no_verdict() -> None:
    found = judged(traffic(TARGET, 2, BLOCK))
    assert found.outcome is Outcome.CANNOT_SAY
    assert "hold out at least three" in found.recommendation


def test_limits_that_noise_alone_exceeds_are_no_verdict() -> None:
    held = traffic(TARGET, 2, 300)
    below = judged(held, VerdictSettings(mape_limit=0.01, attainable_slack=0.1))
    assert below.outcome is Outcome.CANNOT_SAY
    assert "noise alone leaves" in below.recommendation
    rmse = judged(held, VerdictSettings(rmse_limit_s=1e-6))
    assert rmse.outcome is Outcome.CANNOT_SAY
    assert "Raise rmse_limit_s" in rmse.recommendation


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_coverage": 0.99}, "contradicts the intervals"),
        ({"min_probability": 0.3}, "more likely above mape_limit than below"),
        ({"block_tolerance": -0.1}, "block_tolerance"),
        ({"min_gain": 0}, "min_gain"),
        ({"fit_level": 2}, "fit_level"),
    ],
)
def test_thresholds_that_contradict_each_other_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        VerdictSettings(**settings)  # type: ignore[arg-type]


def test_a_feature_undefined_for_the_target_is_named() -> None:
    held = traffic(TARGET, 2, 300).assign(prefill_tokens=lambda f: f["prefill_tokens"].astype(float))
    held.loc[held.index[7], "prefill_tokens"] = np.nan
    with pytest.raises(InputError, match=r"feature 'prefill' of 'three' is not finite at row 7"):
        judged(held)
    with pytest.raises(InputError, match=r"needs the column\(s\) decode_tokens"):
        judged(traffic(TARGET, 2, 300).drop(columns="decode_tokens"))


@cache
def twin(rows_of_the_donor: bool) -> LatencyPosterior:
    """The donor "one" under another name, on its own rows or on others."""
    own = THREE[0].model_copy(update={"config_id": "twin"})
    statistics = [statistics_from_rows(traffic(c, 20 + i, 400), c, TINY, block_length=BLOCK) for i, c in enumerate(THREE[:2])]
    rows = traffic(THREE[0], 20 if rows_of_the_donor else 30, 400)
    return fit(
        [*statistics, statistics_from_rows(rows, own, TINY, block_length=BLOCK)],
        TINY,
        PRIORS,
        SAMPLER,
        target="twin",
        seed=5,
        show_progress=False,
    )


def test_a_donor_under_another_name_gets_no_verdict() -> None:
    held = traffic(THREE[0], 31, 300)
    own = twin(False).configuration("twin")
    found = verdict(twin(False), held, own)
    assert found.outcome is Outcome.CANNOT_SAY, str(found)
    assert "the configuration of the donor one under another name" in found.recommendation
    with pytest.raises(InputError, match="the rows of 'twin' are those of 'one', under another name"):
        verdict(twin(True), held, twin(True).configuration("twin"))


def test_checks_do_not_depend_on_the_order_of_regimes_or_the_index() -> None:
    rng = np.random.default_rng(0)
    frame = batches(rng, 300).assign(regime=lambda f: np.where(f["step_id"] < 150, "calm", "busy"))
    held = observe(rng, frame, TARGET, TINY, THETA, SIGMA, OMEGA)
    one, other = judged(held), judged(held.set_index(np.arange(len(held)) + 5000))
    assert str(one) == str(other)
