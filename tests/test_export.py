"""BLIS vectors: exact where BLIS's basis was fitted, projected with a stated loss elsewhere, refused where they would mislead."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from blis_recordings import RUNS, run_configuration, run_steps
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping
from hfdtl_bayes.errors import ExportError, InputError
from hfdtl_bayes.export import (
    BETA_LABELS,
    BlisVectors,
    ExportSettings,
    blis_step_time_us,
    blis_vectors,
    idle_api_delay_s,
)
from hfdtl_bayes.export.vectors import FEATURE_OF_BETA
from hfdtl_bayes.features import FeatureSet, feature_set, operating_points
from hfdtl_bayes.model import LatencyPosterior, PriorSettings, fit
from hfdtl_bayes.sample import sample_store_path
from hfdtl_bayes.statistics import config_to_constant, statistics_from_rows
from hfdtl_bayes.traces import TraceStore, drop_warmup

PHYSICS = feature_set("blis-physics")
BETA_TRUE = (0.15, 0.02, 1.3, 0.75, 31.0, 4.3, 125.0, 470.0, 0.05, 1.9, 0.6)


def _configuration(tensor_parallel: int = 1, data_parallel: int = 1, experts: int = 0) -> ServingConfiguration:
    llm = {
        "name": "llm", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "num_experts": experts,
        "num_experts_per_token": 2 if experts else 0, "max_context_tokens": 16384,
    }  # fmt: skip
    engine = {
        "tensor_parallel": tensor_parallel, "data_parallel": data_parallel, "max_num_seqs": 128,
        "max_num_batched_tokens": 2048, "kv_capacity_tokens": 400_000, "block_size": 16,
    }  # fmt: skip
    return configuration_from_mapping({"config_id": "t", "llm": llm, "hardware": "h100", "engine": engine})


def _posterior(features: FeatureSet, configuration: ServingConfiguration, theta: NDArray[np.float64]) -> LatencyPosterior:
    """A posterior of one configuration with the given draws of its coefficients, shape (S, K)."""
    frame = operating_points(configuration)
    statistics = statistics_from_rows(frame.assign(step_time_s=0.02), configuration, features)
    return _with_draws(statistics, features, theta)


def _with_draws(statistics: object, features: FeatureSet, theta: NDArray[np.float64]) -> LatencyPosterior:
    draws = theta.reshape(2, -1, 1, theta.shape[1])
    scales = np.full(draws.shape[:3], 0.05)
    posterior = xr.Dataset(
        {
            "theta": (("chain", "draw", "config", "coef"), draws),
            "sigma": (("chain", "draw", "config"), scales),
            "omega": (("chain", "draw", "config"), scales),
        }
    )
    tree = xr.DataTree.from_dict({"posterior": posterior})
    return LatencyPosterior(tree, features, PriorSettings(), (statistics,), None, 0)


def _antithetic(mean: NDArray[np.float64], covariance: NDArray[np.float64], half: int = 200) -> NDArray[np.float64]:
    """Draws whose mean is exactly the given one."""
    z = np.random.default_rng(3).multivariate_normal(np.zeros(len(mean)), covariance, size=half)
    return mean + np.concatenate([z, -z])


def _folded(beta: tuple[float, ...], configuration: ServingConfiguration) -> NDArray[np.float64]:
    """The coefficients, in reference units, that a fit of `blis-physics` has when BLIS's betas are the given ones."""
    seconds = {
        FEATURE_OF_BETA[n]: v * (1e-6 if n in ("b5", "b6", "b7", "b8") else 1.0) for n, v in zip(BETA_LABELS, beta, strict=True)
    }
    theta = np.array([seconds[n] for n in PHYSICS.coef_names]) / PHYSICS.references
    gamma = np.array([seconds[f.name] / f.reference for f in PHYSICS.config])
    theta[len(PHYSICS.base)] += config_to_constant(PHYSICS, configuration) @ gamma
    return theta


@pytest.mark.parametrize(("parallel", "length"), [((1, 1, 0), 10), ((4, 1, 0), 10), ((2, 1, 8), 10), ((2, 2, 8), 11)], ids=str)
def test_a_fit_of_blis_own_basis_is_exported_without_loss(parallel: tuple[int, int, int], length: int) -> None:
    configuration = _configuration(*parallel)
    theta = _antithetic(_folded(BETA_TRUE, configuration), np.eye(len(PHYSICS.coef_names)) * 1e-4)
    vectors = blis_vectors(_posterior(PHYSICS, configuration, theta), configuration)
    assert len(vectors.beta) == length
    assert vectors.projection_error < 1e-12
    assert vectors.clipped == ()
    grid = operating_points(configuration)
    truth = blis_step_time_us(BETA_TRUE, grid, configuration)
    exported = blis_step_time_us(vectors.beta, grid, configuration)
    # The same sum in another order may cross one whole microsecond.
    assert np.abs(exported - truth).max() <= 1
    by_label = dict(zip(BETA_LABELS, vectors.beta, strict=False))
    assert by_label["b3"] == by_label["b5"] == by_label["b8"] == 0.0
    assert by_label["b1a"] == pytest.approx(0.15)
    assert by_label["b6"] == pytest.approx(4.3)
    # Terms that are zero in every batch are not informed and not exported.
    assert (by_label["b4"] == 0.0) == (parallel[0] == 1)


def test_recorded_blis_steps_come_back_from_an_exported_vector(shared_data: Path) -> None:
    for name in RUNS:
        folder = shared_data / "blis_runs" / name
        truth = json.loads((folder / "truth.json").read_text())
        configuration = run_configuration(truth)
        raw, frame = run_steps(folder)
        theta = _antithetic(_folded(tuple(truth["beta_true"]), configuration), np.eye(len(PHYSICS.coef_names)) * 1e-4)
        vectors = blis_vectors(_posterior(PHYSICS, configuration, theta), configuration, frame)
        assert np.abs(blis_step_time_us(vectors.beta, frame, configuration) - raw["duration_us"]).max() <= 1


@pytest.mark.slow
def test_noisy_blis_runs_give_back_the_step_times_behind_them(shared_data: Path) -> None:
    """The whole way: BLIS with known coefficients and 5 % noise per step, three donors, a fit, three vectors, BLIS again."""
    recordings = []
    for name in RUNS:
        folder = shared_data / "blis_runs" / name
        configuration = run_configuration(json.loads((folder / "truth.json").read_text()))
        raw, frame = run_steps(folder, "noisy")
        frame = frame.assign(step_time_s=raw["duration_us"] * 1e-6, step_id=raw["step_id"], regime="all")
        recordings.append((configuration, frame, raw["duration_det_us"].to_numpy()))
    posterior = fit([statistics_from_rows(f, c, PHYSICS) for c, f, _ in recordings], PHYSICS, show_progress=False, seed=1)
    for configuration, frame, truth in recordings:
        vectors = blis_vectors(posterior, configuration, frame)
        error = blis_step_time_us(vectors.beta, frame, configuration) / truth - 1
        assert np.abs(error).mean() < 0.005, configuration.config_id
        assert np.abs(error).max() < 0.03, configuration.config_id


def test_a_negative_coefficient_becomes_zero_and_its_partner_makes_up_for_it() -> None:
    configuration = _configuration()
    names = list(PHYSICS.coef_names)
    compute, write = names.index("prefill_compute"), names.index("prefill_kv_write")
    mean = _folded(BETA_TRUE, configuration)
    mean[write] = -2.0
    # The data know the sum of the two terms at a prefill of 1024 tokens, and little of each.
    batch = operating_points(configuration).query("prefill_tokens == 1024 and decode_tokens == 0")
    ratio = PHYSICS.design(batch, configuration)[0]
    along = np.zeros(len(names))
    along[[compute, write]] = 1.0, -ratio[compute] / ratio[write]
    covariance = np.diag(np.full(len(names), 1e-6)) + np.outer(along, along) * 1e-4
    posterior = _posterior(PHYSICS, configuration, _antithetic(mean, covariance))
    vectors = blis_vectors(posterior, configuration, batch)
    assert vectors.clipped == ("b1b",)
    assert vectors.beta[BETA_LABELS.index("b1b")] == 0.0
    assert "b1b" in vectors.summary()
    naive = np.maximum(mean, 0)
    naive_error = np.abs(PHYSICS.design(batch, configuration) @ naive / posterior.expected_s(batch, configuration) - 1).mean()
    assert vectors.projection_error < 0.2 * naive_error


@pytest.fixture(scope="module")
def recorded() -> tuple[ServingConfiguration, pd.DataFrame, LatencyPosterior]:
    """Real vLLM steps of the embedded sample, and a roofline posterior around their least-squares fit."""
    store = TraceStore(sample_store_path())
    configuration = store.configuration("c09_llama-m_base")
    frame = drop_warmup(store.steps("c09_llama-m_base").frame)
    features = feature_set("roofline")
    statistics = statistics_from_rows(frame, configuration, features)
    spread = np.eye(len(features.coef_names)) * 1e-4
    return configuration, frame, _with_draws(statistics, features, _antithetic(np.asarray(statistics.pilot), spread))


def test_a_roofline_posterior_is_projected_with_the_loss_it_states(
    recorded: tuple[ServingConfiguration, pd.DataFrame, LatencyPosterior],
) -> None:
    configuration, frame, posterior = recorded
    vectors = blis_vectors(posterior, configuration, frame)
    expected = posterior.expected_s(frame, configuration)
    difference = np.abs(blis_step_time_us(vectors.beta, frame, configuration) * 1e-6 / expected - 1)
    # Truncation takes less than a microsecond off steps of tens of milliseconds.
    assert difference.mean() == pytest.approx(vectors.projection_error, abs=1e-4)
    assert difference.max() == pytest.approx(vectors.worst_projection_error, abs=1e-4)
    assert vectors.projection_error < 0.06
    assert vectors.rows == len(frame)
    assert 0 < vectors.posterior_sd < 0.1


def test_traffic_makes_the_vector_right_for_that_traffic(
    recorded: tuple[ServingConfiguration, pd.DataFrame, LatencyPosterior],
) -> None:
    configuration, frame, posterior = recorded
    expected = posterior.expected_s(frame, configuration)

    def error(vectors: BlisVectors) -> float:
        return float(np.abs(blis_step_time_us(vectors.beta, frame, configuration) * 1e-6 / expected - 1).mean())

    assert error(blis_vectors(posterior, configuration, frame)) < error(blis_vectors(posterior, configuration))


def test_what_the_traffic_leaves_open_comes_from_the_posterior(
    recorded: tuple[ServingConfiguration, pd.DataFrame, LatencyPosterior],
) -> None:
    configuration, frame, posterior = recorded
    decode_only = frame[frame["prefill_tokens"] == 0]
    vectors = blis_vectors(posterior, configuration, decode_only)
    prefill = operating_points(configuration).query("regime == 'prefill'")
    ratio = blis_step_time_us(vectors.beta, prefill, configuration) * 1e-6 / posterior.expected_s(prefill, configuration)
    assert np.abs(ratio - 1).max() < 0.3


def test_a_posterior_that_blis_cannot_express_is_refused() -> None:
    configuration = _configuration()
    features = feature_set("hfdtl")
    theta = np.full(len(features.coef_names), 0.01)
    theta[list(features.coef_names).index("kv_usage_squared")] = 50.0
    posterior = _posterior(features, configuration, _antithetic(theta, np.eye(len(theta)) * 1e-8))
    with pytest.raises(ExportError, match=r"cannot express this posterior.*accepted is 10%"):
        blis_vectors(posterior, configuration)
    lenient = blis_vectors(posterior, configuration, settings=ExportSettings(max_projection_error=5.0))
    assert lenient.projection_error > 0.10


def test_a_mean_that_is_not_positive_is_refused() -> None:
    configuration = _configuration()
    theta = _folded(BETA_TRUE, configuration)
    theta[len(PHYSICS.base)] = -100.0
    posterior = _posterior(PHYSICS, configuration, _antithetic(theta, np.eye(len(theta)) * 1e-8))
    with pytest.raises(ExportError, match="not positive in"):
        blis_vectors(posterior, configuration)


def test_delays_and_empty_traffic_are_refused() -> None:
    configuration = _configuration()
    posterior = _posterior(PHYSICS, configuration, np.tile(_folded(BETA_TRUE, configuration), (20, 1)))
    with pytest.raises(ExportError, match="no traffic"):
        blis_vectors(posterior, configuration, operating_points(configuration).iloc[:0])
    with pytest.raises(InputError, match="context_tokens"):
        blis_vectors(posterior, configuration, operating_points(configuration).drop(columns="context_tokens"))
    delays = LatencyPosterior(
        posterior.tree, feature_set("roofline", "queue_delay"), posterior.priors, posterior.statistics, None, 0
    )
    with pytest.raises(ExportError, match="queue_delay"):
        blis_vectors(delays, configuration)


@pytest.mark.parametrize("alpha0", [-1e-3, float("nan"), float("inf"), 1e300])
def test_an_absurd_alpha0_is_refused(alpha0: float) -> None:
    configuration = _configuration()
    posterior = _posterior(PHYSICS, configuration, np.tile(_folded(BETA_TRUE, configuration), (20, 1)))
    with pytest.raises(ExportError, match="a0 is"):
        blis_vectors(posterior, configuration, alpha0_s=alpha0)
    assert blis_vectors(posterior, configuration, alpha0_s=0.0015).alpha == (pytest.approx(1500.0), 0.0, 0.0)


def test_what_cannot_hold_elsewhere_is_said() -> None:
    configuration = _configuration(tensor_parallel=16)
    posterior = _posterior(PHYSICS, configuration, np.tile(_folded(BETA_TRUE, configuration), (20, 1)))
    notes = " ".join(blis_vectors(posterior, configuration).notes)
    assert "for this configuration only" in notes
    assert "8 KV heads are not divisible by tp 16" in notes
    assert "989 TFLOP/s and 3.35 TB/s" in notes


def _requests(rows: list[tuple[float, float, float, float, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["arrival_s", "queued_s", "finished_s", "running_requests", "waiting_requests"])


def test_alpha0_does_not_count_the_wait_for_the_running_step() -> None:
    idle = [(10.0 * i, 10.0 * i + 0.001 * (1 + i), 10.0 * i + 2, 0.0, 0.0) for i in range(5)]
    busy = [(10.0 * i + 1, 10.0 * i + 1.5, 10.0 * i + 3, 1.0, 0.0) for i in range(20)]
    requests = _requests(sorted(idle + busy))
    assert (requests["queued_s"] - requests["arrival_s"]).mean() > 0.3
    assert idle_api_delay_s(requests) == pytest.approx(0.003)
    # Where the trace does not say what ran, a request is idle if all earlier ones had finished.
    times = requests.drop(columns=["running_requests", "waiting_requests"]).sample(frac=1.0, random_state=1)
    assert idle_api_delay_s(times[times["arrival_s"] < 50]) == pytest.approx(0.003)


def test_alpha0_is_not_guessed() -> None:
    few = _requests([(10.0 * i, 10.0 * i + 0.002, 10.0 * i + 1, 0.0, 0.0) for i in range(4)])
    assert idle_api_delay_s(few) is None
    enough = _requests([(10.0 * i, 10.0 * i + 0.002, 10.0 * i + 1, 0.0, 0.0) for i in range(6)])
    assert idle_api_delay_s(enough) == pytest.approx(0.002)
    assert idle_api_delay_s(enough.drop(columns="arrival_s")) is None
    assert idle_api_delay_s(enough.drop(columns=["running_requests", "finished_s"])) is None
    unfinished = enough.drop(columns="running_requests").assign(finished_s=[1.0, np.nan, 21.0, 31.0, 41.0, 51.0])
    assert idle_api_delay_s(unfinished) is None


def test_alpha0_of_real_recordings_is_milliseconds() -> None:
    store = TraceStore(sample_store_path())
    for config_id in store.config_ids:
        requests = drop_warmup(store.requests(config_id).frame)
        lag = (requests["queued_s"] - requests["arrival_s"]).mean()
        idle = idle_api_delay_s(requests)
        assert idle is not None
        assert 0.0005 < idle < 0.006
        assert idle < 0.2 * lag


def test_step_time_needs_the_split_model_and_sane_numbers() -> None:
    configuration = _configuration()
    grid = operating_points(configuration)
    with pytest.raises(InputError, match="beta has 9 values"):
        blis_step_time_us(BETA_TRUE[:9], grid, configuration)
    with pytest.raises(InputError, match="64 bits"):
        blis_step_time_us((1e300, *BETA_TRUE[1:]), grid, configuration)
    with pytest.raises(InputError, match="context_tokens"):
        blis_step_time_us(BETA_TRUE, grid.drop(columns="context_tokens"), configuration)
    np.testing.assert_array_equal(blis_step_time_us((0.0,) * 10, grid, configuration), 1)


def test_ten_betas_dispatch_experts_at_the_rate_of_b4() -> None:
    configuration = _configuration(2, 2, 8)
    grid = operating_points(configuration)
    ten, b4 = BETA_TRUE[:10], BETA_TRUE[3]
    np.testing.assert_array_equal(blis_step_time_us(ten, grid, configuration), blis_step_time_us((*ten, b4), grid, configuration))
    assert (blis_step_time_us((*ten, 5.0), grid, configuration) > blis_step_time_us(ten, grid, configuration)).any()
