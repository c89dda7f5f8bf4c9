"""From noisy traces of BLIS back to BLIS's coefficients: intervals cover what can be known, vectors give the step times behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from blis_recordings import BLACKBOX_RUNS, RUNS, blackbox_requests, blackbox_steps, run_configuration, run_steps
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.export import BETA_LABELS, BLACKBOX, blis_step_time_us, blis_vectors, queueing_alpha_s
from hfdtl_bayes.export.comparison import backend_step_time_us
from hfdtl_bayes.export.noise_free import noise_free_coefficients
from hfdtl_bayes.export.vectors import FEATURE_OF_BETA, IN_MICROSECONDS
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.features.blis import prefill_attended
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings, fit
from hfdtl_bayes.statistics import config_to_constant, statistics_from_rows

PHYSICS = feature_set("blis-physics")
FEW = SamplerSettings(draws=100, tune=150, chains=2)


class Recording(NamedTuple):
    configuration: ServingConfiguration
    frame: pd.DataFrame
    noise_free_us: NDArray[np.int64]
    truth: dict


@pytest.fixture(scope="module")
def recordings(shared_data: Path) -> dict[str, Recording]:
    found = {}
    for name in RUNS:
        folder = shared_data / "blis_runs" / name
        truth = json.loads((folder / "truth.json").read_text())
        raw, frame = run_steps(folder, "noisy")
        frame = frame.assign(step_time_s=raw["duration_us"] * 1e-6, step_id=raw["step_id"], regime="all")
        configuration = run_configuration(truth)
        found[configuration.config_id] = Recording(configuration, frame, raw["duration_det_us"].to_numpy(), truth)
    return found


@pytest.fixture(scope="module")
def joint(recordings: dict[str, Recording]) -> LatencyPosterior:
    statistics = [statistics_from_rows(r.frame, r.configuration, PHYSICS) for r in recordings.values()]
    return fit(statistics, PHYSICS, show_progress=False, seed=1)


def slopes(frame: pd.DataFrame, configuration: ServingConfiguration) -> NDArray[np.float64]:
    """The map from coefficients to the six numbers a configuration's step times consist of, shape (6, K).

    Step time = slopes of (1, scheduled requests, decode tokens, prefill tokens, attended pairs, context).
    """
    requests = frame["prefill_requests"] + frame["decode_requests"]
    own = [frame["decode_tokens"], frame["prefill_tokens"], prefill_attended(frame), frame["context_tokens"]]
    states = np.column_stack([np.ones(len(frame)), requests, *own])
    size = np.abs(states).max(axis=0)
    design = PHYSICS.design(frame, configuration)
    found = np.linalg.lstsq(states / size, design, rcond=None)[0]
    # The six span everything the basis can do here.
    np.testing.assert_allclose((states / size) @ found, design, rtol=1e-8, atol=1e-11 * np.abs(design).max())
    return found / size[:, None]


def true_mean(recording: Recording) -> NDArray[np.float64]:
    """The coefficients that the mean of the noisy steps has: noise is lognormal around BLIS's time, so its mean is above that."""
    seconds = {
        FEATURE_OF_BETA[n]: v * (1e-6 if n in IN_MICROSECONDS else 1.0)
        for n, v in zip(BETA_LABELS, recording.truth["beta_true"], strict=True)
    }
    theta = np.array([seconds[n] for n in PHYSICS.coef_names]) / PHYSICS.references
    gamma = np.array([seconds[f.name] / f.reference for f in PHYSICS.config])
    theta[len(PHYSICS.base)] += config_to_constant(PHYSICS, recording.configuration) @ gamma
    return theta * np.exp(recording.truth["step_noise_lognormal_sigma_noisy"] ** 2 / 2)


def within(posterior: LatencyPosterior, recording: Recording) -> tuple[NDArray[np.bool_], float]:
    """Which of the six identified combinations lie in their 95 % interval, and the probability of a joint distance beyond theirs."""
    configuration, frame = recording.configuration, recording.frame
    combine = slopes(frame, configuration)
    draws = posterior.draws(configuration).theta @ combine.T
    truth = combine @ true_mean(recording)
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    off = draws.mean(axis=0) - truth
    distance = float(off @ np.linalg.solve(np.cov(draws, rowvar=False), off))
    return (low <= truth) & (truth <= high), float(chi2.sf(distance, len(truth)))


@pytest.mark.slow
def test_intervals_of_identified_combinations_cover_the_truth(recordings: dict[str, Recording], joint: LatencyPosterior) -> None:
    inside = {name: within(joint, r) for name, r in recordings.items()}
    # Eighteen intervals of 95 %: fewer than 15 inside happens once in a thousand times.
    assert sum(int(i.sum()) for i, _ in inside.values()) >= 15
    assert all(p > 0.001 for _, p in inside.values())


@pytest.mark.slow
def test_intervals_can_miss(recordings: dict[str, Recording], joint: LatencyPosterior) -> None:
    """The check above sees a step time that is 1 % off."""
    recording = recordings["B"]
    altered = recording._replace(truth={**recording.truth, "beta_true": [1.01 * b for b in recording.truth["beta_true"]]})
    assert within(joint, altered)[1] < 1e-6


@pytest.mark.slow
def test_vectors_of_a_joint_fit_give_the_noise_free_step_times(recordings: dict[str, Recording], joint: LatencyPosterior) -> None:
    for configuration, frame, truth_us, _ in recordings.values():
        vectors = blis_vectors(joint, configuration, frame)
        error = np.abs(blis_step_time_us(vectors.beta, frame, configuration) / truth_us - 1)
        # Asked is 1 %. The lognormal mean alone is 0.13 % above.
        assert np.median(error) < 0.004, configuration.config_id
        assert vectors.projection_error < 1e-6 or vectors.clipped


@pytest.mark.slow
@pytest.mark.parametrize("config_id", ["A", "B", "C"])
def test_vectors_of_one_configuration_alone_do_too(recordings: dict[str, Recording], config_id: str) -> None:
    recording = recordings[config_id]
    configuration, frame, truth_us, _ = recording
    posterior = fit([statistics_from_rows(frame, configuration, PHYSICS)], PHYSICS, show_progress=False, seed=1)
    inside, probability = within(posterior, recording)
    assert inside.sum() >= 4
    assert probability > 0.001
    vectors = blis_vectors(posterior, configuration, frame)
    assert np.median(np.abs(blis_step_time_us(vectors.beta, frame, configuration) / truth_us - 1)) < 0.004


@pytest.mark.slow
def test_single_coefficients_that_cannot_be_known_are_marked(recordings: dict[str, Recording], joint: LatencyPosterior) -> None:
    marked = {name: blis_vectors(joint, r.configuration, r.frame).not_told_apart for name, r in recordings.items()}
    for name, labels in marked.items():
        # Constants of the configuration, and the writing of KV, which is in proportion to prefill compute.
        assert {"b3", "b5", "b7", "b8", "b1b"} <= set(labels), name
        assert "b1a" not in labels
    assert "b4" in marked["A"]  # no communication at tp = 1


@pytest.mark.parametrize("name", BLACKBOX_RUNS)
def test_blackbox_coefficients_come_back(name: str, shared_data: Path) -> None:
    """BB1, BB2: exported betas and alphas within 1 % of those the run was made with, or as near as whole microseconds allow.

    BB2 decodes one request or none in all but a few steps, so its b2 is only known to lie between 8.67 and 9.70 us (true: 8.69).
    """
    folder = shared_data / "blis_runs" / name
    truth = json.loads((folder / "truth.json").read_text())
    steps = blackbox_steps(folder)
    own = run_configuration(json.loads((shared_data / "blis_runs" / RUNS[0] / "truth.json").read_text()))
    frame = pd.DataFrame(
        {
            "step_id": np.arange(len(steps)),
            "step_time_s": steps["duration_us"] * 1e-6,
            "prefill_tokens": steps["prefill_tokens"],
            "decode_tokens": steps["decode_tokens"],
            "regime": "all",
        }
    )
    features = feature_set("blis-blackbox")
    posterior = fit([statistics_from_rows(frame, own, features)], features, settings=FEW, show_progress=False, seed=1)
    line = queueing_alpha_s(blackbox_requests(folder))
    assert line is not None
    alpha = (line[0] * 1e6, line[1] * 1e6, truth["alpha_true"][2])
    vectors = blis_vectors(posterior, own, frame, backend=BLACKBOX, alpha_us=alpha)
    np.testing.assert_array_equal(backend_step_time_us(BLACKBOX, vectors.beta, frame, own), steps["duration_us"])
    design = np.column_stack([np.ones(len(steps)), steps["prefill_tokens"], steps["decode_tokens"]])
    found = noise_free_coefficients(design, steps["duration_us"].to_numpy(float))
    assert found is not None
    assert ((found.low <= truth["beta_true"]) & (truth["beta_true"] <= found.high)).all()
    knowable = (found.high - found.low) / truth["beta_true"] < 0.01
    assert knowable.tolist() == [True, True, name.startswith("BB1")]
    error = np.abs(np.array(vectors.beta) / truth["beta_true"] - 1)
    assert (error[knowable] < 0.01).all()
    assert (error < 0.07).all()
    np.testing.assert_allclose(vectors.alpha, truth["alpha_true"], rtol=0.01)
    assert vectors.not_told_apart == (() if name.startswith("BB1") else ("b2",))


def test_a_noisy_recording_is_not_taken_for_one_without(shared_data: Path) -> None:
    raw, frame = run_steps(shared_data / "blis_runs" / RUNS[0], "noisy")
    design = np.column_stack([np.ones(len(frame)), frame["prefill_tokens"], frame["decode_tokens"]])
    assert noise_free_coefficients(design, raw["duration_us"].to_numpy(float)) is None
    # Without noise, but of another model.
    clean, frame = run_steps(shared_data / "blis_runs" / RUNS[0], "clean")
    design = np.column_stack([np.ones(len(frame)), frame["prefill_tokens"], frame["decode_tokens"]])
    assert noise_free_coefficients(design, clean["duration_us"].to_numpy(float)) is None


@given(st.tuples(st.floats(100, 9000), st.floats(0.5, 50), st.floats(0.5, 50)), st.integers(0, 1000))
def test_what_a_simulator_truncated_is_bounded(beta: tuple[float, float, float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    design = np.column_stack([np.ones(60), rng.integers(0, 2048, 60), rng.integers(0, 64, 60)]).astype(float)
    times = design @ beta
    found = noise_free_coefficients(design, np.trunc(times))
    if found is None:
        # Only where a time was whole but for rounding, which then decides what truncation leaves of it.
        assert np.abs(times - np.rint(times)).min() < 1e-9
        return
    assert ((found.low <= np.array(beta) + 1e-6) & (np.array(beta) <= found.high + 1e-6)).all()
    np.testing.assert_array_equal(np.trunc(design @ found.centre), np.trunc(design @ beta))
    assert noise_free_coefficients(design, np.trunc(design @ beta) + 0.5) is None
    assert noise_free_coefficients(design[:, [0, 1, 1]], np.trunc(design @ beta)) is None
