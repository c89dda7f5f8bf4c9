"""Prior predictive in latency: against analytic moments, against the simulator of the tests, and what is called impossible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import gamma
from simulation import PRIORS, TINY, batches, configuration, deviation_size, draw_parameters, group_sd_prior, loading

from hfdtl_bayes.configuration import configuration_from_mapping
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import PriorRange, feature_set, operating_points, typical_batches
from hfdtl_bayes.model import PositiveRange
from hfdtl_bayes.model.prior_predictive import PriorCheckSettings, hardware_floor_s, prior_draws, prior_predictive

OWN = configuration("own", "L4", 2)
ROOFLINE = feature_set("roofline")
DRAWS = 20_000
ROWS = batches(np.random.default_rng(3), 6)


def llama(**engine: object):
    llm = {
        "name": "llm", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "max_context_tokens": 16384,
    }  # fmt: skip
    settings = {"max_num_seqs": 128, "max_num_batched_tokens": 2048, "kv_capacity_tokens": 400_000, **engine}
    return configuration_from_mapping({"config_id": "llama", "llm": llm, "hardware": "h100", "engine": settings})


def test_moments_are_the_analytic_ones() -> None:
    drawn = prior_draws(OWN, TINY, PRIORS, draws=DRAWS, seed=1)
    a = loading(TINY, OWN)
    ordered = TINY.base + TINY.config + TINY.residual
    mean = a @ [f.prior.mean for f in ordered]
    shape, rate = group_sd_prior(PRIORS.deviation)
    tau_square = gamma(shape, scale=1 / rate).moment(2)
    covariance = a @ np.diag([f.prior.sd**2 for f in ordered]) @ a.T + np.diag(tau_square * deviation_size(TINY) ** 2)
    design = TINY.design(ROWS, OWN)
    expected = drawn.theta @ design.T
    sd = np.sqrt(np.einsum("nk,kl,nl->n", design, covariance, design))
    np.testing.assert_allclose(drawn.mean, mean, rtol=1e-12)
    np.testing.assert_allclose((expected.mean(axis=0) - design @ mean) / sd, 0.0, atol=5 / np.sqrt(DRAWS))
    # Deviations are normals with a lognormal sd: their fourth moment is larger than a normal's.
    np.testing.assert_allclose(expected.std(axis=0) / sd, 1.0, atol=0.03)


def test_it_is_the_prior_of_the_simulator() -> None:
    """Quantiles of coefficients, noise and drift against configurations drawn by the tests' own simulator."""
    drawn = prior_draws(OWN, TINY, PRIORS, draws=DRAWS, seed=2)
    rng = np.random.default_rng(5)
    other = [draw_parameters(rng, (OWN,), TINY, PRIORS) for _ in range(DRAWS // 2)]
    levels = np.array([0.05, 0.25, 0.5, 0.75, 0.95])

    def alike(mine: np.ndarray, theirs: np.ndarray) -> None:
        # The share of their draws below my quantiles, within five standard errors of both samples.
        below = (theirs[:, None] < np.quantile(mine, levels)).mean(axis=0)
        np.testing.assert_allclose(below, levels, atol=5 * np.sqrt(0.25 * 3 / DRAWS))

    for k in range(drawn.theta.shape[1]):
        alike(drawn.theta[:, k], np.array([d["theta"][0, k] for d in other]))
    alike(drawn.sigma, np.array([d["sigma"][0] for d in other]))
    alike(drawn.omega, np.array([d["omega"][0] for d in other]))


def test_without_drift_there_is_none() -> None:
    assert not prior_draws(OWN, TINY, replace(PRIORS, drift=None), draws=50).omega.any()


def test_the_table_holds_quantiles_and_probabilities_of_the_draws() -> None:
    found = prior_predictive(OWN, TINY, PRIORS, batches=ROWS.assign(context_tokens=0.0), seed=4).table
    expected = prior_draws(OWN, TINY, PRIORS, seed=4).theta @ TINY.design(ROWS, OWN).T
    assert list(found["batch"]) == [f"row {i}" for i in range(6)]
    np.testing.assert_allclose(found[["q5_s", "q50_s", "q95_s"]].to_numpy().T, np.quantile(expected, (0.05, 0.5, 0.95), axis=0))
    np.testing.assert_allclose(found["p_negative"], (expected < 0).mean(axis=0))
    np.testing.assert_allclose(found["p_below_floor"], (expected < found["floor_s"].to_numpy()).mean(axis=0))
    assert (found["q95_row_s"] > found["q95_s"]).all()
    assert (found["q5_row_s"] < found["q5_s"]).all()


def test_the_floor_by_hand() -> None:
    own = llama(tensor_parallel=2)
    frame = pd.DataFrame({"prefill_tokens": [0, 2048], "decode_tokens": [1, 0], "context_tokens": [1000, 0]})
    memory = own.llm.always_active_params * 2 / 2 / own.hardware.memory_bandwidth
    kv = 1000 * (2 * 32 * 8 * 128 * 2) / 2 / own.hardware.memory_bandwidth
    compute = 2048 * 2 * (own.llm.active_matmul_params - own.llm.head_params) / 2 / own.hardware.peak_flops
    np.testing.assert_allclose(hardware_floor_s(frame, own), [memory + kv, max(memory, compute)], rtol=1e-12)


def test_the_default_features_flag_nothing_and_the_original_ones_do() -> None:
    own = llama()
    found = prior_predictive(own, ROOFLINE)
    assert found.flags == ()
    assert list(found.table["batch"]) == list(typical_batches(own)["batch"])
    assert (found.table["q5_s"] < found.table["q50_s"]).all()
    flags = prior_predictive(own, feature_set("hfdtl")).flags
    assert any(f.startswith("one request decoding: the prior allows a negative time with probability") for f in flags)


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        (
            {"weight_read": (0.1, 0.2), "constant": (0.0, 0.01), "layers": (-0.01, 0.01)},
            "one request decoding: faster than the hardware",
        ),
        ({"kv_read": (50.0, 90.0)}, "largest decode batch: over 30 times what the hardware needs"),
        ({"constant": (-40.0, 10.0)}, "one request decoding: the prior allows a negative time"),
    ],
)
def test_absurd_ranges_are_called_out(ranges: dict[str, tuple[float, float]], said: str) -> None:
    features = ROOFLINE.with_priors({n: PriorRange(*r) for n, r in ranges.items()})
    assert any(f.startswith(said) for f in prior_predictive(llama(), features).flags)


def test_observed_rows_are_held_against_their_own_prediction() -> None:
    own = llama()
    frame = operating_points(own)
    plausible = frame.assign(step_time_s=ROOFLINE.design(frame, own) @ prior_draws(own, ROOFLINE).mean)
    found = prior_predictive(own, ROOFLINE, observed=plausible)
    assert found.observed is not None
    assert (found.observed.rows, found.observed.inside_90, found.flags) == (len(frame), 1.0, ())
    assert found.observed.total == pytest.approx(0.5, abs=0.05)
    far = prior_predictive(own, ROOFLINE, observed=plausible.assign(step_time_s=plausible["step_time_s"] * 10))
    assert far.observed is not None
    assert (far.observed.total, far.observed.inside_90) == (1.0, 0.0)
    assert far.flags[0].startswith(f"the {len(frame)} observed rows together are slower than the prior expects: at most 0.0%")
    near = prior_predictive(own, ROOFLINE, observed=plausible.assign(step_time_s=plausible["step_time_s"] / 10))
    assert near.observed is not None
    assert near.observed.total < 0.005
    assert near.flags[0].startswith(f"the {len(frame)} observed rows together are faster than the prior expects")


def test_many_observed_rows_are_thinned() -> None:
    own = llama()
    frame = pd.concat([operating_points(own)] * 30, ignore_index=True).assign(step_time_s=0.02)
    found = prior_predictive(own, ROOFLINE, observed=frame, settings=PriorCheckSettings(draws=200, most_rows=70)).observed
    assert found is not None
    assert found.rows == 70


def test_the_same_seed_gives_the_same_and_another_another() -> None:
    one, two, three = (prior_predictive(llama(), ROOFLINE, seed=s).table for s in (1, 1, 2))
    pd.testing.assert_frame_equal(one, two)
    assert not one["q50_s"].equals(three["q50_s"])


def test_a_delay_needs_its_requests() -> None:
    queue = feature_set("roofline", "queue_delay")
    with pytest.raises(InputError, match="a queue_delay is predicted for requests; give rows with waiting_requests, kv_usage"):
        prior_predictive(llama(), queue)
    rows = pd.DataFrame({"waiting_requests": [0.0, 50.0], "kv_usage": [0.1, 0.9], "prompt_tokens": [100.0, 100.0]})
    found = prior_predictive(llama(), queue, batches=rows)
    assert found.table["q50_s"].is_monotonic_increasing
    assert not found.table["p_below_floor"].gt(found.table["p_negative"]).any()


def test_a_wider_range_widens_the_prediction() -> None:
    narrow, wide = (
        prior_predictive(llama(), ROOFLINE, replace(PRIORS, deviation=PositiveRange(low, high))).table
        for low, high in ((0.01, 0.02), (1.0, 2.0))
    )
    assert ((wide["q95_s"] - wide["q5_s"]) > 1.5 * (narrow["q95_s"] - narrow["q5_s"])).all()
