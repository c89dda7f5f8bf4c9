"""Simulations with error bars: variance by source, drift over time scales, overheads, metrics, and the ensemble itself."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cli_runs import STORE, chain
from hypothesis import given
from hypothesis import strategies as st

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, MissingInputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.replay import Batch, Lengths, ReplaySettings, RequestOverheads, Requests, Traffic, replay, step_time_function
from hfdtl_bayes.sample import TARGET
from hfdtl_bayes.simulation import (
    EnsembleSettings,
    MetricSettings,
    Objectives,
    OverheadDraws,
    Simulation,
    SpeedDrift,
    SpeedSettings,
    Workload,
    overhead_draws,
    read_workload,
    run_metrics,
    simulate,
    speed_drift,
    variance_components,
)
from hfdtl_bayes.simulation.attribution import LEVEL, OVERHEADS, attribute
from hfdtl_bayes.simulation.blis_files import run_requests, write_trace_v2
from hfdtl_bayes.simulation.overheads import ObservedDelay, delays_after_engine, pooled_draws
from hfdtl_bayes.simulation.speed import DriftingStepTime
from hfdtl_bayes.simulation.variance import Components, expected_values
from hfdtl_bayes.traces import TraceStore, time_blocks

LONG_DRIFT = SpeedDrift(np.array([[0.4, 0.4]]), np.array([[1.0, 20.0]]), np.ones(1), np.array([0.5]))


@cache
def posterior() -> LatencyPosterior:
    return LatencyPosterior.load(chain().target)


def target() -> ServingConfiguration:
    return posterior().configuration(TARGET)


def some_requests(n: int = 40) -> Requests:
    rng = np.random.default_rng(3)
    return Requests(
        arrival_s=np.cumsum(rng.exponential(0.7, n)),
        prompt_tokens=rng.integers(10, 200, n),
        output_tokens=rng.integers(2, 20, n),
        regime=np.repeat(["first", "second"], n // 2),
    )


@cache
def simulated(members: int = 12, seed: int = 0) -> Simulation:
    traffic = Traffic(Lengths.uniform(20, 100), Lengths.uniform(5, 20), request_rate_per_s=1.0, num_requests=15, name="open")
    return simulate(
        posterior(), target(), Workload(traffic=(traffic,)), drift=LONG_DRIFT, settings=EnsembleSettings(members), seed=seed
    )


# Variance by source.


def test_variance_components_find_what_was_planted() -> None:
    rng = np.random.default_rng(0)
    d, w, z = 4000, 2, 3
    y = 7 + 2.0 * rng.standard_normal((d, 1, 1)) + 1.0 * rng.standard_normal((d, w, 1)) + 1.5 * rng.standard_normal((d, 1, z))
    y = y + 0.5 * rng.standard_normal((d, w, z))
    found = variance_components(y)
    assert np.sqrt(list(vars(found).values())) == pytest.approx([2.0, 1.5, 1.0, 0.5], rel=0.05)
    assert found.total == pytest.approx(y.var(), rel=0.02)
    given_requests = variance_components(y[:, :1])
    # With one workload all that is not the member's own is the speed's.
    assert given_requests.workload == given_requests.together == 0.0
    assert given_requests.speed == pytest.approx(1.5**2 + 0.5**2, rel=0.06)


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 3), st.integers(1, 3))
def test_variances_are_never_negative_and_shares_add_up(seed: int, d: int, w: int, z: int) -> None:
    values = np.random.default_rng(seed).standard_normal((d, w, z))
    found = variance_components(values)
    assert min(vars(found).values()) >= 0.0
    assert sum(found.shares().values()) == pytest.approx(1.0)
    expected = expected_values(values, found)
    assert expected.mean() == pytest.approx(values.mean(), abs=1e-12)
    assert expected.std() <= values.mean(axis=(1, 2)).std() + 1e-12


def test_expected_values_have_the_spread_of_the_coefficients() -> None:
    rng = np.random.default_rng(1)
    values = 3 + 0.8 * rng.standard_normal((3000, 1, 1)) + rng.standard_normal((3000, 1, 2))
    assert expected_values(values, variance_components(values)).std() == pytest.approx(0.8, rel=0.05)
    # An estimate of zero is not certainty: the mean of 3000 members is known to its Monte Carlo error.
    noise = rng.standard_normal((3000, 1, 2))
    assert expected_values(noise, Components(0.0, 1.0, 0.0, 0.0)).std() == pytest.approx(np.sqrt(0.5 / 3000), rel=0.1)


def test_attribution_names_the_coefficient_that_moves_the_result() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((200, 3)) * [0.1, 0.01, 0.05]
    found = attribute(["a", "b", "c"], x, 5 + 2 * x[:, 0] + x[:, 2] + 1e-3 * rng.standard_normal(200))
    # Cov(x_k, y) b_k / Var: (2 * 0.1)^2 and 0.05^2 of their sum.
    assert list(found.shares) == ["a", "c", "b"]
    assert found.shares["a"] == pytest.approx(0.04 / 0.0425, abs=0.02)
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert found.explained > 0.99
    nothing = attribute(["a", "b", "c"], x, rng.standard_normal(200))
    assert nothing.explained < 0.1


# Drift of the machine's speed.


def courses(drift: SpeedDrift, times: np.ndarray, n: int, omega: float = 0.1, sigma: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(4)
    found = []
    for _ in range(n):
        path = drift.path(omega, sigma, rng)
        found.append([path.factor(t) for t in times])
    return np.array(found)


def test_a_course_has_the_correlation_it_says() -> None:
    drift = SpeedDrift(np.array([[0.5, 0.3]]), np.array([[1.0, 20.0]]), np.ones(1), np.zeros(1), block_length=1)
    times = np.arange(0.0, 12.0, 2.0)
    found = courses(drift, times, 4000)
    assert found.mean() == pytest.approx(1.0, abs=0.005)
    assert found.std(axis=0) == pytest.approx(np.full(6, 0.1), rel=0.05)
    for k, lag in enumerate(times[1:], 1):
        expected = 0.5 * np.exp(-lag / 1.0) + 0.3 * np.exp(-lag / 20.0)
        assert np.corrcoef(found[:, 0], found[:, k])[0, 1] == pytest.approx(expected, abs=0.06)


def test_blocks_only_is_the_model_of_the_fit() -> None:
    found = courses(SpeedDrift.blocks_only(5), np.linspace(0, 1, 10), 3000)
    assert (found[:, :5] == found[:, :1]).all()
    assert abs(np.corrcoef(found[:, 0], found[:, 5])[0, 1]) < 0.06
    assert found[:, 0].std() == pytest.approx(0.1, rel=0.05)


def test_mean_factor_is_that_of_courses() -> None:
    times = np.linspace(0.0, 30.0, 600)
    drift = replace(LONG_DRIFT, unseen_level=np.zeros(1))
    means = courses(drift, times, 1500).mean(axis=1)
    assert drift.mean_factor_sd(0.1, 30.0, 600 / drift.block_length) == pytest.approx(means.std(), rel=0.08)
    with pytest.raises(InputError, match="both are to be above 0"):
        drift.mean_factor_sd(0.1, 0.0, 10)


def test_level_has_the_sd_that_was_left_unseen() -> None:
    rng = np.random.default_rng(0)
    assert np.std([LONG_DRIFT.level(0.1, rng) for _ in range(4000)]) == pytest.approx(0.05, rel=0.05)


def drifting_steps(shares: tuple[float, float], seed: int) -> pd.DataFrame:
    """The target's steps, one after the other, with planted drift in the place of what was recorded."""
    frame = TraceStore(STORE).steps(TARGET).frame
    frame = frame[~frame["regime"].isin(["warmup", "drain"])].reset_index(drop=True).assign(regime="one")
    expected = posterior().expected_s(frame, target())
    path = SpeedDrift(np.array([shares]), np.array([[1.5, 20.0]]), np.ones(1), np.zeros(1)).path(
        0.15, 0.05, np.random.default_rng(seed)
    )
    now, times = 0.0, []
    for seconds in expected:
        times.append(seconds * path.factor(now))
        now += times[-1]
    ends = np.cumsum(times)
    return frame.assign(step_id=np.arange(len(frame)), step_time_s=times, end_s=ends, start_s=ends - times)


def test_drift_that_was_planted_is_seen() -> None:
    grid = SpeedSettings(fast_shares=(0.0, 0.4), fast_s=(1.5,), slow_s=(10.0, 20.0, 40.0, 80.0))
    lasting = speed_drift(posterior(), [(target(), drifting_steps((0.0, 0.8), s)) for s in range(8)], settings=grid)
    independent = speed_drift(posterior(), [(target(), drifting_steps((0.0, 0.0), s)) for s in range(8)], settings=grid)
    assert lasting.mean()["slow_share"] > 0.3
    assert 8 < lasting.mean()["slow_s"] < 60
    assert independent.mean()["slow_share"] < 0.1
    assert independent.mean()["fast_share"] < 0.2
    assert lasting.weights.sum() == pytest.approx(1.0)
    assert TARGET in str(lasting)


def test_unseen_level_is_what_independent_blocks_leave_out() -> None:
    frame = drifting_steps((0.0, 0.8), 1).iloc[:400]
    found = speed_drift(posterior(), [(target(), drifting_steps((0.0, 0.8), 2))], calibrated_on=frame)
    g = int(np.argmax(found.weights))
    (f, s), (fast, slow) = found.shares[g], found.times_s[g]
    block = time_blocks(frame, found.block_length)
    weight = np.bincount(block) / len(frame)
    middle = np.bincount(block, frame["end_s"] - frame["step_time_s"] / 2) / np.bincount(block)
    lag = np.abs(middle[:, None] - middle)
    both = np.outer(weight, weight) * (f * np.exp(-lag / fast) + s * np.exp(-lag / slow))
    assert found.unseen_level[g] ** 2 == pytest.approx(both.sum() - np.diag(both).sum())


def test_too_few_steps_show_no_drift() -> None:
    with pytest.raises(InputError, match="twice as many blocks of 20"):
        speed_drift(posterior(), [(target(), drifting_steps((0.0, 0.0), 1).iloc[:100])])


def test_a_drifting_step_time_is_asked_with_the_clock() -> None:
    function = step_time_function(posterior(), target())
    drifting = DriftingStepTime(function, SpeedDrift.blocks_only(1).path(0.2, 0.0, np.random.default_rng(0)))
    still = replay(some_requests(), target(), function)
    moved = replay(some_requests(), target(), drifting)
    ratio = moved.steps["step_time_s"] / [drifting(b) for b in _batches(moved.steps)]
    assert ratio.std() == pytest.approx(0.2, rel=0.2)
    assert (still.steps["step_time_s"] / [drifting(b) for b in _batches(still.steps)]).std() < 1e-9


def _batches(steps: pd.DataFrame) -> list:
    return [Batch(*row) for row in steps[list(Batch._fields)].to_numpy(dtype=float)]


# Overheads of requests.


def test_overheads_behind_the_engine_are_found_exactly() -> None:
    n = np.array([2.0, 5, 11, 30, 7, 9])
    first = np.arange(6.0)
    requests = pd.DataFrame({"output_tokens": n, "first_token_s": first, "finished_s": first + 0.1 * n})
    requests["client_first_token_s"] = requests["first_token_s"] + 1e-3
    # Late by a2 after the first token and by n * a2 + a1 at the end, as BLIS has it.
    requests["client_finished_s"] = requests["finished_s"] + 1e-3 * n + 0.0
    per_token, fixed = delays_after_engine(requests)
    assert per_token.to_numpy() == pytest.approx(np.full(6, 1e-3))
    assert fixed.to_numpy() == pytest.approx(np.zeros(6), abs=1e-12)


def test_only_requests_that_found_the_engine_idle_say_alpha0() -> None:
    arrival = np.arange(20.0)
    idle = pd.DataFrame({"arrival_s": arrival, "queued_s": arrival + 0.002, "running_requests": 0.0, "waiting_requests": 0.0})
    idle["regime"] = "a"
    waited = idle.assign(queued_s=arrival + 0.3, running_requests=2.0)
    found = overhead_draws({"c": pd.concat([idle, waited])}, "c").mean()
    assert found.before_queue_s == pytest.approx(0.002, rel=0.05)
    assert (found.after_finish_s, found.per_output_token_s) == (0.0, 0.0)


def test_overheads_are_pooled_and_a_new_configuration_is_one_of_them() -> None:
    observed = {f"c{i}": ObservedDelay(m, 0.05 * m, 40) for i, m in enumerate((1e-3, 1.2e-3, 0.9e-3, 1.1e-3))}
    observed["vague"] = ObservedDelay(5e-3, 5e-3, 5)
    own, vague, new = (pooled_draws(observed, name, draws=4000) for name in ("c1", "vague", "new"))
    assert np.median(own) == pytest.approx(1.2e-3, rel=0.05)
    # Five requests say little against four configurations: the estimate moves most of the way to them.
    assert 1e-3 < np.median(vague) < 2.5e-3
    assert np.std(np.log(new)) > 2 * np.std(np.log(own))
    assert not pooled_draws({"c": None}, "c").any()


# Metrics.


def test_metrics_of_three_requests() -> None:
    requests = pd.DataFrame(
        {
            "arrival_s": [0.0, 1.0, 2.0],
            "first_token_s": [0.5, 1.25, 4.0],
            "finished_s": [1.5, 1.25, 7.0],
            "output_tokens": [5, 1, 4],
        }
    )
    found = run_metrics(requests, MetricSettings((50.0,), Objectives(ttft_s=1.0, itl_s=0.2)))
    assert found["all", "ttft_mean_s"] == pytest.approx((0.5 + 0.25 + 2.0) / 3)
    assert found["all", "itl_mean_s"] == pytest.approx((1.0 + 3.0) / (4 + 3))
    assert found["all", "e2e_p50_s"] == pytest.approx(1.5)
    assert found["all", "requests_per_s"] == pytest.approx(3 / 7)
    assert found["all", "output_tokens_per_s"] == pytest.approx(10 / 7)
    # The first is too slow between tokens, the third to its first; the second has no time between tokens.
    assert MetricSettings((50.0,), Objectives(ttft_s=1.0, itl_s=0.2)).objectives.any
    assert found["all", "slo_attainment"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objectives(ttft_s=0.0), "objective ttft_s is 0"),
        (lambda: MetricSettings((101.0,)), "percentile 101"),
        (lambda: EnsembleSettings(members=1), "members is 1"),
        (Workload, "either requests or traffic"),
        (lambda: Workload(traffic=(Traffic(1, 1, 1.0, num_requests=1),) * 2), "occurs more than once"),
    ],
)
def test_impossible_settings_are_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("run", ["BB1_llama-3.1-8b-instruct_H100_tp2", "BB2_phi-4_H100_tp2"])
def test_metrics_of_recorded_blis_runs_are_those_blis_printed(shared_data: Path, run: str) -> None:
    path = shared_data / "blis_runs" / run / "metrics.json"
    theirs = json.loads(path.read_text())
    found = run_metrics(run_requests(path), MetricSettings((90.0, 95.0, 99.0)))
    for name in ("ttft", "e2e"):
        for statistic in ("mean", "p90", "p95", "p99"):
            assert 1e3 * found["all", f"{name}_{statistic}_s"] == pytest.approx(theirs[f"{name}_{statistic}_ms"], rel=1e-6)


# Workloads.


def test_trace_v2_read_and_written_is_what_blis_wrote(shared_data: Path, tmp_path: Path) -> None:
    recorded = shared_data / "blis_runs" / "A_llama-3.1-8b-instruct_H100_tp1" / "clean.trace.csv"
    workload, _ = read_workload(recorded, target())
    assert workload.requests is not None
    header, data = write_trace_v2(workload.requests, tmp_path, 7)
    mine, theirs = pd.read_csv(data), pd.read_csv(recorded)
    assert list(mine.columns) == list(theirs.columns)
    same = ["request_id", "prefix_length", "streaming", "input_tokens", "output_tokens", "status"]
    pd.testing.assert_frame_equal(mine[same], theirs[same])
    assert (mine["arrival_time_us"] == theirs["arrival_time_us"] - theirs["arrival_time_us"].min()).all()
    again, _ = read_workload(data, target())
    assert again.requests is not None
    assert again.requests.arrival_s == pytest.approx(workload.requests.arrival_s, abs=1e-9)
    assert header.read_text().startswith("trace_version: 3")


def test_workloads_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no workload at"):
        read_workload(tmp_path / "absent.csv", target())
    table = tmp_path / "requests.csv"
    pd.DataFrame({"arrival_s": [0.0, np.nan], "prompt_tokens": [3, 4], "output_tokens": [2, 2]}).to_csv(table, index=False)
    with pytest.raises(InputError, match="some rows lack arrival_s"):
        read_workload(table, target())
    pd.DataFrame({"arrival_s": [0.0, 1.0], "prompt_tokens": [3, 4]}).to_csv(table, index=False)
    with pytest.raises(InputError, match="output_tokens are missing"):
        read_workload(table, target())


# The ensemble.


def test_the_run_at_the_mean_is_a_replay() -> None:
    overheads = OverheadDraws.fixed(RequestOverheads(before_queue_s=0.01))
    found = simulate(posterior(), target(), Workload(requests=some_requests()), overheads=overheads, settings=EnsembleSettings(3))
    settings = ReplaySettings(overheads=RequestOverheads(before_queue_s=0.01))
    alone = replay(some_requests(), target(), step_time_function(posterior(), target()), settings=settings)
    assert found.at_mean["all", "ttft_mean_s"] == pytest.approx(alone.ttft_s.mean())
    assert found.at_mean["second", "e2e_mean_s"] == pytest.approx(alone.e2e_s[20:].mean())
    pd.testing.assert_frame_equal(found.steps, alone.steps)
    assert set(found.runs["workload"]) == {0}
    assert found.components("all", "ttft_mean_s").workload == 0.0
    assert {LEVEL, OVERHEADS} < set(found.seconds.columns)


def test_a_simulation_is_repeated_by_its_seed() -> None:
    again = simulated.__wrapped__(12, 0)
    pd.testing.assert_frame_equal(again.runs, simulated().runs)
    assert not np.allclose(simulated.__wrapped__(12, 1).table["mean"], again.table["mean"])


def test_intervals_hold_together() -> None:
    found = simulated()
    table = found.table
    assert len(found.runs) == 12 * 2 * 2
    assert (table["q2.5"] <= table["q50"]).all()
    assert (table["q50"] <= table["q97.5"]).all()
    parts = table[["sd_coefficients", "sd_speed", "sd_workload", "sd_together"]]
    assert np.sqrt(np.square(parts).sum(axis=1)).to_numpy() == pytest.approx(table["sd"].to_numpy())
    assert ((table["q97.5_mean"] - table["q2.5_mean"]) <= (table["q97.5"] - table["q2.5"]) + 1e-12).all()
    # Which requests come is most of the time to the first of fifteen requests.
    assert found.components("open", "requests_per_s").shares()["workload"] > 0.5
    assert found.next_measurement("open", "requests_per_s").source == "workload"


def test_the_same_requests_meet_other_configurations() -> None:
    other = target().model_copy(update={"config_id": "other", "engine": target().engine.model_copy(update={"max_num_seqs": 4})})
    workload = Workload(traffic=(Traffic(50, Lengths.uniform(5, 20), 1.0, num_requests=12, name="open"),))
    runs = [simulate(posterior(), c, workload, settings=EnsembleSettings(4)).runs for c in (target(), other)]
    # Interarrival times are the same, so throughput of unsaturated traffic varies together.
    rates = [r[[("open", "requests_per_s")]].to_numpy()[:, 0] for r in runs]
    assert np.corrcoef(rates[0], rates[1])[0, 1] > 0.9


def test_lasting_drift_widens_the_mean_of_a_run_and_not_of_a_step() -> None:
    # One at a time, so that the time between tokens is in proportion to the speed.
    requests = Workload(requests=Requests(np.arange(0.0, 60.0, 3.0), np.full(20, 20), np.full(20, 30)))
    sd = {}
    for name, drift in (("blocks", SpeedDrift.blocks_only()), ("lasting", replace(LONG_DRIFT, unseen_level=np.zeros(1)))):
        found = simulate(posterior(), target(), requests, drift=drift, settings=EnsembleSettings(25))
        sd[name] = np.sqrt(found.components("all", "itl_mean_s").speed)
    assert sd["lasting"] > 1.5 * sd["blocks"]


def test_drift_during_calibration_is_named_where_it_carries_the_variance() -> None:
    drift = SpeedDrift(np.zeros((1, 2)), np.ones((1, 2)), np.ones(1), np.array([8.0]), sources=("c",))
    found = simulate(posterior(), target(), Workload(requests=some_requests()), drift=drift, settings=EnsembleSettings(40))
    assert next(iter(found.attribution("all", "itl_mean_s").shares)) == LEVEL
    advice = found.next_measurement("all", "itl_mean_s")
    assert advice.source == "coefficients"
    assert "several other times" in advice.command


def test_unknown_metrics_are_named_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"no metric open/latency; this simulation has open/e2e_mean_s"):
        simulated().components("open", "latency")
