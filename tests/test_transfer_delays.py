"""Delays in their two parts: who waits, and how long those who wait wait."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, MissingInputError
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings
from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path
from hfdtl_bayes.traces import TraceStore
from hfdtl_bayes.transfer import DelayScores, calibrate, calibrate_delays, evaluate, fit_donors, score_delays, usable_rows

SETTINGS = SamplerSettings(draws=300, tune=200, chains=2)


@cache
def donors(quantity: str = "queue_delay") -> LatencyPosterior:
    return fit_donors(store(), DONORS, quantity=quantity, settings=SETTINGS, seed=1, show_progress=False)


@cache
def store() -> TraceStore:
    return TraceStore(sample_store_path())


@cache
def requests() -> pd.DataFrame:
    return store().requests(TARGET).frame


@pytest.fixture(scope="module")
def own() -> ServingConfiguration:
    return store().configuration(TARGET)


def known(theta: list[float], sigma: float, omega: float) -> LatencyPosterior:
    """The donors' posterior with every draw of the first donor's parameters set to given values."""
    fitted = donors()
    tree = fitted.tree.copy(deep=True)
    draws = tree["posterior"].dataset.copy(deep=True)
    draws["theta"][:, :, 0] = theta
    draws["sigma"][:, :, 0], draws["omega"][:, :, 0] = sigma, omega
    tree["posterior"] = tree["posterior"].copy()
    tree["posterior"].dataset = draws
    return replace(fitted, tree=tree)


def journeys(waits: list[float], depth: list[int], regime: list[str], own: ServingConfiguration) -> pd.DataFrame:
    """Requests of given delays that find `depth` others waiting and, if any, a full batch."""
    full = np.where(np.array(depth) > 0, own.engine.max_num_seqs, 0)
    queued = np.arange(len(waits), dtype=float)
    return pd.DataFrame(
        {
            "request_id": [f"r{i}" for i in range(len(waits))],
            "arrival_s": queued - 0.01,
            "queued_s": queued,
            "scheduled_s": queued + waits,
            "prompt_tokens": 100.0,
            "waiting_requests": np.array(depth, dtype=float),
            "running_requests": full.astype(float),
            "kv_usage": 0.0,
            "regime": regime,
        }
    )


# --- the scores, by hand -----------------------------------------------------------------------------------------------------


def test_both_parts_of_six_requests_by_hand() -> None:
    """Slope on the queue depth alone, hardly any error: every number can be worked out on paper."""
    own = store().configuration(DONORS[0])
    features = feature_set("roofline", "queue_delay")
    step, seqs = features.noise_floor(own), own.engine.max_num_seqs
    posterior = known([2.0, 0.0, 0.0, 0.0, 0.0], 1e-9, 1e-9)
    unit = 2.0 / seqs * 30 * step
    # Two wait as predicted and half as long again; one told to wait does not; one waits though told not to; two do not wait.
    waits = [4 * unit, 8 * 1.5 * unit, 0.1 * step, 5 * step, 0.0, 0.5 * step]
    frame = journeys(waits, [4, 8, 2, 0, 0, 0], ["a", "b", "b", "b", "c", "c"], own)
    found = score_delays(posterior, frame, own)
    assert found.rule is not None
    assert (found.rule.requests, found.rule.waited, found.rule.false_waits, found.rule.missed_waits) == (6, 3, 1, 1)
    assert found.rule.right == pytest.approx(4 / 6)
    assert found.rule.missed_s == pytest.approx(5 * step / sum(waits))
    assert found.waiting == 2
    assert found.mape == pytest.approx((0 + 1 / 3) / 2)
    assert found.median_ape == pytest.approx(1 / 6)
    assert found.crps_s == pytest.approx(4 * unit / 2, rel=1e-6)
    assert found.crps == pytest.approx(2 * unit / (8 * unit), rel=1e-6)
    assert found.coverage == 0.5
    loads = found.by_load
    assert list(loads.index) == ["a", "b", "c"]
    assert loads["requests"].tolist() == [1, 3, 2]
    assert loads["waited"].tolist() == [1, 2, 0]
    assert loads["told"].tolist() == [1, 2, 0]
    np.testing.assert_allclose(loads["observed_s"], [4 * unit, (12 * unit + 5.1 * step) / 3, 0.0])
    np.testing.assert_allclose(loads["predicted_s"], [4 * unit, 10 * unit / 3, 0.0])
    assert loads.loc["b", "inside"] == False  # noqa: E712  (a NumPy bool)
    assert loads.loc["c", "inside"] == True  # noqa: E712
    assert found.mean_error == pytest.approx((2 * unit + 5.1 * step) / 3 / (4 * unit + 4 * unit + 1.7 * step))
    # Nobody waits or is told to in c, so it says nothing of intervals.
    assert found.loads_covered == 0.5
    assert "66.7% of 6 requests (1 false, 1 missed)" in str(found)


def test_the_interval_of_a_mean_has_one_drift_per_block() -> None:
    """sd^2 = omega^2 sum over blocks (sum s)^2 / n^2 + sigma^2 sum s^2 / n^2, over all n requests of the regime."""
    own = store().configuration(DONORS[0])
    posterior = known([2.0, 0.0, 0.0, 0.0, 0.0], 0.3, 0.2)
    depth = [*range(1, 31), *([0] * 10)]
    frame = journeys([0.0] * 40, depth, ["a"] * 40, own)
    found = score_delays(posterior, frame, own, block_length=20).by_load.loc["a"]
    scale = posterior.predict(frame[:30], own)["mean_s"].to_numpy()
    drift = 0.2**2 * (scale[:20].sum() ** 2 + scale[20:].sum() ** 2) / 40**2
    noise = 0.3**2 * (scale**2).sum() / 40**2
    draws = posterior.draws_of("tau").shape[0]
    assert found["sd_s"] == pytest.approx(np.sqrt(drift + noise), rel=5 / np.sqrt(2 * draws))
    assert found["predicted_s"] == pytest.approx(scale.sum() / 40)


def test_waits_of_simulated_requests_lie_in_their_intervals() -> None:
    """Requests made by the model itself: coverage of rows is 95 %, and of the means of many loads."""
    own = store().configuration(DONORS[0])
    theta, sigma, omega = [1.5, 0.0, 0.0, 1.0, 0.0], 0.15, 0.1
    posterior = known(theta, sigma, omega)
    rng = np.random.default_rng(3)
    depth = rng.integers(1, 40, 4000)
    regimes = [f"load{i // 40:03d}" for i in range(4000)]
    frame = journeys([0.0] * 4000, depth.tolist(), regimes, own)
    mean = posterior.predict(frame, own)["mean_s"].to_numpy()
    errors = np.repeat(rng.normal(0, omega, 200), 20) + rng.normal(0, sigma, 4000)
    frame["scheduled_s"] = frame["queued_s"] + mean * (1 + errors)
    found = score_delays(posterior, frame, own, block_length=20)
    assert found.rule is not None
    assert found.rule.right == 1.0
    assert found.waiting == 4000
    assert found.mape == pytest.approx(np.abs(errors / (1 + errors)).mean())
    assert abs(found.coverage - 0.95) < 0.015
    low, high = binom(100, 0.95).ppf([1e-3, 1 - 1e-3]) / 100
    assert low <= found.loads_covered <= high


# --- calibration from few journeys -------------------------------------------------------------------------------------------


def test_one_waiting_request_moves_the_prediction_and_a_hundred_journeys_pin_it(own: ServingConfiguration) -> None:
    """The more journeys the narrower; with as many rows as `calibrate` takes, it is the same posterior."""
    fitted = donors()
    usable = usable_rows(requests(), own, fitted.feature_set)
    judged = requests()[requests()["regime"] == "load2.0"]
    sds = []
    for n in (1, 4, 16):
        target = calibrate_delays(fitted, usable.iloc[:n], own, engine="conditional", seed=1)
        assert target.target == TARGET
        assert target.calibration_rows.tolist() == usable.index[:n].tolist()
        sds.append(score_delays(target, judged, own).by_load.loc["load2.0", "sd_s"])
    zero_shot = score_delays(fitted, judged, own).by_load.loc["load2.0", "sd_s"]
    assert zero_shot > sds[0] > sds[2]
    by_rows = calibrate(fitted, usable.iloc[:16], own, engine="conditional", seed=1, show_progress=False)
    np.testing.assert_array_equal(by_rows.draws_of("theta"), target.draws_of("theta"))


def test_scores_of_real_requests_agree_with_evaluate(own: ServingConfiguration) -> None:
    """Over modelled requests alone, MAPE is that of `evaluate`; the rule is right for nearly all."""
    fitted, judged = donors(), requests()[requests()["regime"] == "load2.0"]
    found = score_delays(fitted, judged, own)
    assert isinstance(found, DelayScores)
    assert found.rule is not None
    assert found.rule.right > 0.95
    held_out = evaluate(fitted, usable_rows(judged, own, fitted.feature_set), own)
    assert found.mape == pytest.approx(held_out.mape)
    assert found.waiting == found.rule.waited - found.rule.missed_waits
    predicted = fitted.predict(judged, own)["mean_s"]
    assert found.by_load.loc["load2.0", "predicted_s"] == pytest.approx(predicted.mean())


def test_every_request_has_an_api_delay(own: ServingConfiguration) -> None:
    fitted = donors("api_delay")
    target = calibrate_delays(fitted, requests().iloc[:100], own, engine="conditional", seed=1)
    found = score_delays(target, requests().iloc[100:], own)
    assert found.rule is None
    assert (found.by_load["told"] == found.by_load["requests"]).all()
    assert found.quantity == "api_delay"
    assert "who waits" not in str(found)
    zero_shot = score_delays(fitted, requests().iloc[100:], own)
    assert found.by_load.loc["load2.0", "sd_s"] < 0.6 * zero_shot.by_load.loc["load2.0", "sd_s"]
    assert found.waiting == zero_shot.waiting > 20


# --- bad input ---------------------------------------------------------------------------------------------------------------


def test_a_target_whose_requests_never_waited(own: ServingConfiguration) -> None:
    quiet = requests()[requests()["regime"] == "load0.15"]
    with pytest.raises(InputError, match=rf"none of the {len(quiet)} requests of '{TARGET}' found all slots taken.*zero-shot"):
        calibrate_delays(donors(), quiet, own)
    found = score_delays(donors(), quiet, own)
    assert found.waiting == 0
    assert np.isnan(found.mape)
    assert np.isnan(found.loads_covered)
    assert "no request waited longer than a step where it was told to, so how long is not judged" in str(found)


def test_no_requests_and_no_request_table(own: ServingConfiguration, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no request of 'c09_llama-m_base' to judge"):
        score_delays(donors(), requests().iloc[:0], own)
    with pytest.raises(InputError, match="no request of 'c09_llama-m_base' to judge"):
        score_delays(donors(), requests()[requests()["regime"] == "warmup"], own)
    folder = tmp_path / TARGET
    folder.mkdir()
    (folder / "configuration.yaml").write_text((sample_store_path() / TARGET / "configuration.yaml").read_text())
    (folder / "steps.parquet").write_bytes((sample_store_path() / TARGET / "steps.parquet").read_bytes())
    with pytest.raises(MissingInputError, match="requests"):
        TraceStore(tmp_path).requests(TARGET)


def test_a_feature_that_is_not_defined_for_the_target(own: ServingConfiguration) -> None:
    without = requests().drop(columns="kv_usage")
    for act in (calibrate_delays, score_delays):
        with pytest.raises(InputError, match=r"needs the column\(s\) kv_usage"):
            act(donors(), without, own)
    holes = requests().assign(kv_usage=np.nan)
    with pytest.raises(InputError, match=r"feature 'kv_pressure' of 'c09_llama-m_base' is not finite"):
        score_delays(donors(), holes, own)


def test_steps_are_no_requests(own: ServingConfiguration) -> None:
    steps = replace(donors(), feature_set=feature_set("roofline", "step_time"))
    for act in (calibrate_delays, score_delays):
        with pytest.raises(
            InputError, match="this posterior is of step_time; delays are scored and calibrated on a fit of queue_delay"
        ):
            act(steps, requests(), own)
    with pytest.raises(InputError, match="is also a donor"):
        calibrate_delays(donors(), store().requests(DONORS[0]).frame, store().configuration(DONORS[0]))
