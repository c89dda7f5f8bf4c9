"""Cross-validation over donors: the same as by hand, on rows nobody has seen, and silent about nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from scipy.stats import t as student_t
from simulation import PRIORS, THREE, TINY, batches, configuration, dense, observe, pilot_of, simulate

from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import register_feature_set
from hfdtl_bayes.model import SamplerSettings, fit
from hfdtl_bayes.model.conditional import ConditionalSettings
from hfdtl_bayes.report import learning_curve_figure
from hfdtl_bayes.sample import DONORS, sample_store_path
from hfdtl_bayes.statistics import statistics_from_rows, write_statistics
from hfdtl_bayes.traces import TraceStore, split_by_blocks, time_blocks, write_store
from hfdtl_bayes.transfer import (
    CrossValidation,
    CrossValidationSettings,
    calibrate_statistics,
    cross_validate,
    crps,
    evaluate,
    held_out_score,
    left_out_score,
)
from hfdtl_bayes.transfer.folds import drawing_order, plan_folds, whole_blocks
from hfdtl_bayes.transfer.held_out_score import thinned
from hfdtl_bayes.transfer.transfer_error import transfer_error

SAMPLER = SamplerSettings(draws=150, tune=50, chains=8)
SETTINGS = CrossValidationSettings(
    rows=(0, 20, 45), sampler=SAMPLER, joint=SAMPLER, weights=ConditionalSettings(min_effective=50), draws=400, held_out_rows=90
)
CLOSE = replace(PRIORS, deviation=replace(PRIORS.deviation, low=0.1, high=0.3))
"""Configurations alike enough that transfer works."""


def store_of(path: Path, configurations, frames) -> TraceStore:
    for c, f in zip(configurations, frames, strict=True):
        write_store(path, c, columns(f))
    return TraceStore(path)


def columns(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns every trace has."""
    decode = frame["decode_tokens"]
    return frame.assign(
        prefill_requests=(frame["prefill_tokens"] > 0).astype(float),
        decode_requests=decode.astype(float),
        context_tokens=100.0 * decode,
        waiting_requests=0,
        running_requests=decode,
        kv_usage=0.5,
    )


TINY_STORED = register_feature_set(replace(TINY, name="tiny-cross-validation"), replace=True)
FOUR = (*THREE, configuration("four", "L4", 2))


def two_regimes(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(regime=np.where(np.arange(len(frame)) < len(frame) // 2, "calm", "busy"))


@cache
def frames() -> tuple[pd.DataFrame, ...]:
    data = simulate(71, FOUR, TINY, CLOSE, rows=200)
    return tuple(two_regimes(f) for f in data.frames)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> TraceStore:
    return store_of(tmp_path_factory.mktemp("cross-validation"), FOUR, frames())


def run(store: TraceStore, donors=("one", "two", "three", "four"), **how) -> CrossValidation:
    how = {"settings": SETTINGS, "priors": CLOSE, "block_length": 10, "seed": 5, "show_progress": False} | how
    return cross_validate(store, donors, TINY_STORED, **how)


@pytest.fixture(scope="session")
def found(store: TraceStore) -> CrossValidation:
    return run(store, leave_out=("configuration", "model", "hardware"))


# --- the same as by hand -----------------------------------------------------------------------------------------------------


def test_zero_shot_and_calibrated_scores_are_those_of_a_fit_of_the_others(found: CrossValidation, store: TraceStore) -> None:
    """Every number again, through the public functions that a careful user would call."""
    frames = {c: store.steps(c).frame for c in store.config_ids}
    others = [statistics_from_rows(frames[c.config_id], c, TINY_STORED, block_length=10) for c in FOUR if c.config_id != "two"]
    donors = fit(others, TINY_STORED, CLOSE, SAMPLER, seed=5, show_progress=False)
    pool, held = split_by_blocks(frames["two"], 0.5, 10)
    held = whole_blocks(held, 10, 90)
    own = found.table.query("leave_out == 'configuration' and config == 'two'").set_index("rows")
    assert list(own.index) == [0, 20, 45]
    assert (own["donors"] == 3).all()
    drawn = pool.iloc[np.sort(drawing_order(pool, 10, "block", np.random.default_rng([5, 17, 0]))[:20])]
    statistics = statistics_from_rows(drawn, FOUR[1], TINY_STORED, block_length=10)
    target = calibrate_statistics(donors, statistics, limits=SETTINGS.weights, settings=SAMPLER, seed=5, show_progress=False)
    for n, posterior in ((0, donors), (20, target)):
        scaled = statistics_from_rows(held, FOUR[1], TINY_STORED, block_length=10, pilot=posterior.draws(FOUR[1], 5).mean)
        score = left_out_score(posterior, scaled, seed=5) if n == 0 else held_out_score(posterior, scaled, draws=400)
        assert own.loc[n, ["log_score", "log_score_error"]].tolist() == pytest.approx(list(score))
        judged = evaluate(thinned(posterior, 400), held, FOUR[1], block_length=10, seed=5)
        for name in ("mape", "rmse_s", "bias", "coverage", "block_coverage", "attainable_mape", "mean_uncertainty"):
            assert own.loc[n, name] == pytest.approx(getattr(judged, name)), name
        assert own.loc[n, "crps_s"] == pytest.approx(crps(thinned(posterior, 400), held, FOUR[1], seed=5)[0])
        assert own.loc[n, "held_out_rows"] == len(held)


def test_held_out_rows_are_the_same_for_every_n_and_never_calibrated_on() -> None:
    frame = frames()[0]
    pool, held = split_by_blocks(frame, 0.5, 10)
    blocks = pd.Series(time_blocks(frame, 10), index=frame.index)
    assert not set(blocks[pool.index]) & set(blocks[held.index])
    assert set(held["regime"]) == {"calm", "busy"}
    few = whole_blocks(held, 10, 45)
    assert len(few) == 40
    assert set(few.index) <= set(held.index)
    assert set(few["regime"]) == {"calm", "busy"}


@pytest.mark.parametrize("unit", ["block", "row"])
def test_rows_drawn_for_more_hold_those_drawn_for_fewer(unit: str) -> None:
    pool, _ = split_by_blocks(frames()[0], 0.5, 10)
    order = drawing_order(pool, 10, unit, np.random.default_rng(1))
    assert sorted(order) == list(range(len(pool)))
    again = drawing_order(pool, 10, unit, np.random.default_rng(2))
    assert list(order) != list(again)
    blocks = time_blocks(pool, 10)[order[:20]]
    assert (len(set(blocks)) == 2) == (unit == "block")


def test_more_rows_help_and_every_score_is_there(found: CrossValidation) -> None:
    assert not found.table.isna().any().any()
    own = found.table[found.table["leave_out"] == "configuration"]
    assert len(own) == 4 * 3
    by_rows = own.groupby("rows")[["crps_relative", "mean_uncertainty", "log_score_per_row"]].mean()
    assert by_rows["mean_uncertainty"].is_monotonic_decreasing
    assert by_rows.loc[45, "crps_relative"] < by_rows.loc[0, "crps_relative"]
    assert by_rows.loc[45, "log_score_per_row"] > by_rows.loc[0, "log_score_per_row"]
    assert own["held_out_rows"].unique().tolist() == [90]


def test_the_same_seed_gives_the_same_and_seeds_draw_other_rows(store: TraceStore, found: CrossValidation) -> None:
    twice = run(store, settings=replace(SETTINGS, rows=(20,), seeds=2))
    first = twice.table[twice.table["seed"] == 0].reset_index(drop=True)
    expected = found.table.query("leave_out == 'configuration' and rows == 20").reset_index(drop=True)
    pd.testing.assert_frame_equal(first, expected)
    assert len(twice.table) == 4 * 2
    pairs = twice.table.query("rows == 20").groupby("config")["mape"]
    assert (pairs.nunique() == 2).all()


# --- what is left out --------------------------------------------------------------------------------------------------------


def test_folds_leave_out_all_that_share_a_value(found: CrossValidation) -> None:
    folds = {(f.leave_out, f.value): (f.donors, f.left_out) for f in found.folds}
    assert folds["hardware", "L4"] == (("one", "two"), ("three", "four"))
    by_tp, _ = plan_folds("tp", FOUR, {})
    assert [(f.value, f.donors, f.left_out) for f in by_tp] == [
        ("tp1", ("two", "four"), ("one", "three")), ("tp2", ("one", "three"), ("two", "four")),
    ]  # fmt: skip
    assert folds["configuration", "three"] == (("one", "two", "four"), ("three",))
    by_hardware = found.table[found.table["leave_out"] == "hardware"]
    assert (by_hardware["donors"] == 2).all()
    assert set(by_hardware["config"]) == {"one", "two", "three", "four"}


def test_a_fold_without_donors_is_named_with_the_reason(found: CrossValidation) -> None:
    assert "model" not in set(found.table["leave_out"])
    (skipped,) = (s for s in found.skipped if s.leave_out == "model")
    assert skipped.value == "toy"
    assert "all 4 donors share it" in skipped.reason
    assert any("leave out model toy: all 4 donors share it" in line for line in found.sentences())


def test_nothing_left_at_all_is_an_error_with_the_reason_and_no_number(store: TraceStore) -> None:
    with pytest.raises(InputError, match=r"nothing could be predicted.*leave out model toy: all 4 donors share it"):
        run(store, leave_out="model")


def test_the_workload_fold_never_sees_the_regime(store: TraceStore, tmp_path: Path) -> None:
    """Busy rows a hundred times as slow change nothing that is predicted for them, while the others are predicted as ever."""
    spoilt = [f.assign(step_time_s=f["step_time_s"] * np.where(f["regime"] == "busy", 100.0, 1.0)) for f in frames()]
    other = store_of(tmp_path / "spoilt", FOUR, spoilt)
    settings = replace(SETTINGS, rows=(45,))
    before, after = (run(s, ("one", "two"), leave_out="workload", settings=settings) for s in (store, other))
    busy = [r.table.query("value == 'busy'").set_index(["config", "rows"]) for r in (before, after)]
    assert len(busy[0]) == 2
    # What a prediction is uncertain of depends on nothing observed in the regime.
    pd.testing.assert_series_equal(busy[0]["mean_uncertainty"], busy[1]["mean_uncertainty"])
    pd.testing.assert_series_equal(busy[0]["attainable_mape"], busy[1]["attainable_mape"])
    assert (busy[1]["mape"] > 0.9).all()
    calm = [r.table.query("value == 'calm'").set_index(["config", "rows"]) for r in (before, after)]
    # Calm rows are predicted from busy ones, which were spoilt.
    assert (calm[1]["mape"] != calm[0]["mape"]).all()
    assert (before.table["held_out_rows"] == 90).all()
    for fold in before.folds:
        assert fold.regime == fold.value
        assert fold.left_out[0] not in fold.donors


def test_plan_of_folds() -> None:
    folds, skipped = plan_folds("workload", FOUR[:2], {"one": ["a", "b"], "two": ["b"]})
    assert [(f.value, f.left_out, f.donors) for f in folds] == [
        ("a", ("one",), ("two",)), ("b", ("one",), ("two",)), ("b", ("two",), ("one",)),
    ]  # fmt: skip
    assert skipped == []


def test_a_donor_of_which_only_statistics_are_kept_helps_and_is_not_predicted(tmp_path: Path) -> None:
    made = store_of(tmp_path / "kept", FOUR[:3], frames()[:3])
    own = statistics_from_rows(made.steps("three").frame, FOUR[2], TINY_STORED, block_length=10)
    write_statistics(tmp_path / "kept" / "three" / "statistics.nc", own, TINY_STORED)
    whole = run(made, ("one", "two", "three"), settings=replace(SETTINGS, rows=(0,)))
    (tmp_path / "kept" / "three" / "steps.parquet").unlink()
    found = run(made, ("one", "two", "three"), settings=replace(SETTINGS, rows=(0,)))
    pd.testing.assert_frame_equal(found.table, whole.table[whole.table["config"] != "three"])
    (skipped,) = found.skipped
    assert (skipped.config, "only its statistics are kept" in skipped.reason) == ("three", True)


# --- the joint log score -----------------------------------------------------------------------------------------------------


def test_the_score_after_rows_is_the_ratio_of_dense_normals() -> None:
    """p(held out | calibrated on, donors), averaged over the draws of the scales, as multivariate normals of all rows."""
    data = simulate(72, rows=(40, 60, 50))
    keep = np.arange(60) < 30
    part = replace(data, frames=(data.frames[0], data.frames[1][keep], data.frames[2]))
    donors = [part.statistics[0], part.statistics[2]]
    posterior = fit([*donors, part.statistics[1]], TINY, PRIORS, SAMPLER, target="two", seed=1, show_progress=False)
    held = statistics_from_rows(data.frames[1][~keep], THREE[1], TINY, block_length=10, pilot=pilot_of(TINY, THREE[1]))
    score, error = held_out_score(posterior, held, draws=5)
    chosen = np.unique(np.linspace(0, 1199, 5).astype(int))
    logs = []
    for s in chosen:
        scales = {n: posterior.draws_of(n)[s] for n in ("tau", "hardware_share", "sigma", "omega")}
        # The posterior holds the donors first; the dense form has the configurations in the order simulated.
        order = [0, 2, 1]
        scales |= {n: scales[n][order] for n in ("sigma", "omega")}
        whole, rest = dense(data, scales), dense(part, scales)
        logs.append(
            multivariate_normal.logpdf(whole.observed, whole.mean, whole.covariance)
            - multivariate_normal.logpdf(rest.observed, rest.mean, rest.covariance)
        )
    expected = logsumexp(logs) - np.log(5) - held.log_scale_sum
    assert score == pytest.approx(expected, abs=1e-5)
    assert error > 0


def test_the_score_after_rows_is_refused_for_another_configuration() -> None:
    data = simulate(72, rows=(40, 60, 50))
    posterior = fit(data.statistics[:2], TINY, PRIORS, SAMPLER, target="two", seed=1, show_progress=False)
    with pytest.raises(InputError, match="calibrated for two, the held-out rows are of 'three'"):
        held_out_score(posterior, data.statistics[2])
    with pytest.raises(InputError, match="calibrated for no target"):
        held_out_score(replace(posterior, target=None), data.statistics[1])


# --- the expected transfer error ---------------------------------------------------------------------------------------------


def test_without_a_belief_intervals_are_those_of_the_t_distribution_on_log_mape() -> None:
    mape = {"a": 0.04, "b": 0.08, "c": 0.02}
    found = transfer_error(mape, np.array([0.02, 0.02, 0.02]), 0, spread=1.0, worth=0.0)
    logs = np.log([0.04, 0.08, 0.02])
    half = student_t(2).ppf(0.975) * logs.std(ddof=1)
    assert (found.typical, found.worst, found.worst_config) == (pytest.approx(0.04), 0.08, "b")
    assert (found.low, found.high) == pytest.approx(tuple(0.04 * np.exp([-half / 3**0.5, half / 3**0.5])))
    assert (found.new_low, found.new_high) == pytest.approx(tuple(0.04 * np.exp([-half * (4 / 3) ** 0.5, half * (4 / 3) ** 0.5])))
    assert "from 3 left-out configurations" in str(found)


def test_intervals_with_a_belief_are_those_of_draws_from_the_posterior() -> None:
    """Spread 0.5 of the error added, which is three quarters of the MAPE's square: s_0 = 0.5 * 0.75; mu and s drawn directly."""
    mape = {"a": 0.04 * np.exp(0.3), "b": 0.04 * np.exp(-0.3)}
    found = transfer_error(mape, np.array([0.02, 0.02]), 0, spread=0.5, worth=3.0)
    rng = np.random.default_rng(9)
    variance = (3 * 0.375**2 + 2 * 0.3**2) / rng.chisquare(4, 400_000)
    middle = np.log(0.04) + np.sqrt(variance / 2) * rng.standard_normal(400_000)
    new = middle + np.sqrt(variance) * rng.standard_normal(400_000)
    assert np.log([found.low, found.high]) == pytest.approx(np.quantile(middle, [0.025, 0.975]), abs=0.02)
    assert np.log([found.new_low, found.new_high]) == pytest.approx(np.quantile(new, [0.025, 0.975]), abs=0.02)


def test_where_noise_is_all_that_is_left_the_belief_is_narrow() -> None:
    mape = {"a": 0.04, "b": 0.041}
    narrow, wide = (transfer_error(mape, np.full(2, a), 0, spread=0.6, worth=4.0) for a in (0.0399, 0.001))
    assert narrow.new_high < 0.07 < 0.1 < wide.new_high


def test_one_left_out_configuration_has_no_interval() -> None:
    found = transfer_error({"a": 0.05}, np.array([0.01]), 25, spread=0.6, worth=4.0)
    assert np.isnan([found.low, found.high, found.new_low, found.new_high]).all()
    assert "one configuration says nothing of how others differ, so there is no interval" in str(found)


@pytest.mark.parametrize("worth", [0.0, 4.0])
def test_prediction_intervals_for_a_new_configuration_hold_as_often_as_they_say(worth: float) -> None:
    """Exactly so without a belief; with a right one a little more often, for it is not certain of it."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(2000):
        *seen, new = np.exp(rng.normal(-3, 0.7, 4))
        found = transfer_error({str(i): m for i, m in enumerate(seen)}, np.full(3, 1e-5), 0, spread=0.7, worth=worth)
        inside += found.new_low <= new <= found.new_high
    slack = 3 * (0.95 * 0.05 / 2000) ** 0.5
    assert 0.95 - slack < inside / 2000 < 0.95 + (slack if worth == 0 else 0.04)


def test_the_learning_curve_is_the_expected_error_by_rows(found: CrossValidation) -> None:
    curve = found.learning_curve()
    assert list(curve["rows"]) == [0, 20, 45] * 2
    line = curve.query("leave_out == 'hardware' and rows == 20").iloc[0]
    expected = found.error(20, "hardware")
    assert (line["typical"], line["new_high"], line["configurations"]) == (expected.typical, expected.new_high, 4)
    own = found.table.query("leave_out == 'configuration' and rows == 0")
    assert found.error().typical == pytest.approx(np.exp(np.log(own["mape"]).mean()))
    with pytest.raises(InputError, match="no configuration was predicted after 30 rows leaving out configuration"):
        found.error(30)


def test_the_figure_shows_every_number_of_the_curve(found: CrossValidation) -> None:
    curve = found.learning_curve()
    for narrow in (False, True):
        (axes,) = learning_curve_figure(curve, narrow=narrow).axes
        drawn = [np.asarray(line.get_ydata()) for line in axes.get_lines() if len(line.get_ydata())]
        for kind in ("configuration", "hardware"):
            own = curve[curve["leave_out"] == kind]
            for name in ("typical", "attainable"):
                assert any(np.allclose(y, 100 * own[name]) for y in drawn if len(y) == len(own)), (kind, name)
        assert [t.get_text() for t in axes.get_xticklabels()] == ["zero-shot", "20", "45"]


# --- what is refused ---------------------------------------------------------------------------------------------------------


def test_one_donor_no_donor_unknown_and_repeated_ones_are_refused(store: TraceStore) -> None:
    with pytest.raises(InputError, match="needs two donors at least, found one: with one there is nothing to predict it from"):
        run(store, ("one",))
    with pytest.raises(InputError, match="needs two donors at least, found none"):
        run(store, ())
    with pytest.raises(InputError, match="listed twice: one"):
        run(store, ("one", "one"))
    with pytest.raises(UnknownNameError, match="'nobody' is not in the trace store"):
        run(store, ("one", "nobody"))
    with pytest.raises(UnknownNameError, match="cannot leave out colour; accepted are configuration, model"):
        run(store, leave_out=("tp", "colour"))


def test_donors_that_are_one_configuration_under_two_names_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    twin = configuration("twin", "H100", 1)
    own = observe(rng, batches(rng, 60), twin, TINY, np.array([1.0, 1.0, 1.5]), 0.05, 0.02)
    made = store_of(tmp_path / "twins", (FOUR[0], twin), (frames()[0], own))
    with pytest.raises(InputError, match="donors 'one' and 'twin' are the same configuration but for their names"):
        run(made, ("one", "twin"))
    # Another configuration by its file, the same rows in the trace: a recording copied.
    copied = store_of(tmp_path / "copies", (FOUR[0], configuration("copy", "L4", 1)), (frames()[0], frames()[0]))
    with pytest.raises(InputError, match="donors 'one' and 'copy' are of the same rows"):
        run(copied, ("one", "copy"))


def test_more_rows_than_there_are_is_said(store: TraceStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no configuration has 101 rows to calibrate on.*one 100, two 100"):
        run(store, ("one", "two"), settings=replace(SETTINGS, rows=(101,)))
    short = store_of(tmp_path / "short", FOUR[:2], (frames()[0], frames()[1].iloc[:70]))
    found = run(short, ("one", "two"), settings=replace(SETTINGS, rows=(45,)))
    assert set(found.table.query("rows == 45")["config"]) == {"one"}
    (skipped,) = found.skipped
    assert skipped.config == "two"
    assert "45 calibration rows are asked for and 30 are left" in skipped.reason


def test_no_held_out_block_left_is_said(tmp_path: Path) -> None:
    frame = frames()[0].assign(regime="calm")
    made = store_of(tmp_path / "one-block", FOUR[:3], (frames()[0], frames()[1], frame.iloc[:10]))
    found = run(made, ("one", "two", "three"), settings=replace(SETTINGS, rows=(0,)))
    assert set(found.table["config"]) == {"one", "two"}
    assert (found.table["donors"] == 2).all()
    (skipped,) = found.skipped
    assert skipped.config == "three"
    assert "no held-out block is left" in skipped.reason


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rows": ()}, "rows must be"),
        ({"rows": (-1, 5)}, "rows must be"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must lie between 0 and 1"),
        ({"unit": "column"}, "unit must be 'block' or 'row'"),
        ({"spread": 0.0}, "spread must be positive"),
        ({"spread_worth": -1.0}, "spread must be positive and spread_worth not negative"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        CrossValidationSettings(**wrong)


# --- on real traces ----------------------------------------------------------------------------------------------------------


def test_on_the_embedded_sample_calibration_beats_zero_shot() -> None:
    settings = CrossValidationSettings(rows=(0, 100), sampler=SAMPLER, joint=SAMPLER, draws=400, held_out_rows=400)
    found = cross_validate(TraceStore(sample_store_path()), DONORS, settings=settings, show_progress=False)
    zero_shot, calibrated = found.error(0), found.error(100)
    assert zero_shot.configurations == 3
    assert calibrated.typical < zero_shot.typical
    assert zero_shot.new_low < zero_shot.typical < zero_shot.new_high
    assert found.table["block_coverage"].between(0, 1).all()
