"""The fast step time of a replay equals the feature set's own numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from posterior_fits import three_fitted
from simulation import THREE

from hfdtl_bayes.configuration import ServingConfiguration, weight_loading_floor_s
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import (
    Feature,
    FeatureSet,
    Level,
    PriorRange,
    candidate,
    candidate_names,
    feature_set,
    feature_set_names,
)
from hfdtl_bayes.replay import Batch, Lengths, Requests, Traffic, linear_step_time, replay, step_time_function
from hfdtl_bayes.replay.step_time import probe_batches
from hfdtl_bayes.sample import sample_store_path
from hfdtl_bayes.traces import TraceStore

STORE = TraceStore(sample_store_path())
TRAFFIC = Traffic(Lengths.lognormal(300, 0.8, high=600), Lengths.around(40, 0.5), request_rate_per_s=4, num_requests=60)
COUNTS = ("prefill_tokens", "decode_tokens", "prefill_requests", "decode_requests")


def coefficients(features: FeatureSet, seed: int = 0) -> np.ndarray:
    """Around the prior means, positive so that steps take time; none is zero, so no feature is left out."""
    centre = np.array([max(f.prior.mean, 0.1 * f.prior.sd) for f in features.varying])
    return centre * np.random.default_rng(seed).uniform(0.5, 1.5, len(centre))


@pytest.mark.parametrize("config_id", STORE.config_ids)
@pytest.mark.parametrize("name", feature_set_names("step_time"))
def test_equals_every_feature_set_in_every_step_of_a_replay(name: str, config_id: str):
    own, features = STORE.configuration(config_id), feature_set(name)
    theta = coefficients(features)
    function = linear_step_time(features, theta, own)
    run = replay(TRAFFIC, own, function)
    expected = np.maximum(features.design(run.steps, own) @ theta, 0.5 * weight_loading_floor_s(own))
    assert run.steps["step_time_s"].to_numpy() == pytest.approx(expected, rel=1e-8)  # end less start: rounding of the clock
    used = np.array([function(Batch(*row)) for row in run.steps[list(Batch._fields)].to_numpy(float)])
    assert used == pytest.approx(expected, rel=1e-10)
    assert (run.steps["prefill_tokens"] > 0).any()


def test_equals_features_that_bend_in_any_column():
    """Every candidate term of discovery as one feature set: hinges, padding, products."""
    own = STORE.configuration(STORE.config_ids[0])
    base = feature_set("roofline")
    every = [candidate(n).feature for n in candidate_names("step_time")]
    terms = [f for f in every if f.level is not Level.CONFIG and f.name not in {b.name for b in base.features}]
    features = replace(base, name="all-candidates", features=(*base.features, *terms))
    assert len(terms) > 10
    theta = np.abs(coefficients(features))
    run = replay(replace(TRAFFIC, num_requests=15), own, linear_step_time(features, theta, own))
    expected = features.design(run.steps, own) @ theta
    assert run.steps["step_time_s"].to_numpy() == pytest.approx(expected, rel=1e-8)


def test_exact_evaluation_gives_the_same_run():
    own = STORE.configuration(STORE.config_ids[1])
    features = feature_set("roofline")
    theta = coefficients(features)
    small = replace(TRAFFIC, num_requests=8)
    fast = replay(small, own, linear_step_time(features, theta, own))
    exact = replay(small, own, linear_step_time(features, theta, own, exact=True))
    pd.testing.assert_frame_equal(fast.steps, exact.steps, rtol=1e-9)


def bent(at: float) -> FeatureSet:
    """A feature that is linear but for one number of prefill tokens, which no probing can be sure to find."""

    def compute(frame: pd.DataFrame | None, _configuration: ServingConfiguration) -> np.ndarray:
        assert frame is not None
        tokens = frame["prefill_tokens"].to_numpy(float)
        return tokens + 1e3 * (tokens == at)

    base = feature_set("roofline")
    odd = Feature("odd", Level.BASE, "token", "a bend", compute, PriorRange(0, 1), ("prefill_tokens",), 1e-6)
    return replace(base, name="odd", features=(*base.features, odd))


def test_a_bend_that_was_not_probed_is_refused():
    own = STORE.configuration(STORE.config_ids[0])
    probed = set(probe_batches(own)[:, Batch._fields.index("prefill_tokens")])
    at = next(t for t in range(1000, own.engine.max_num_batched_tokens) if t not in probed)
    features, made = bent(at), Requests(np.zeros(1), np.array([at]), np.array([2]))
    theta = np.ones(len(features.varying))
    with pytest.raises(
        InputError, match=r"'odd'.* its formula changes where it was not probed\. Make the function with exact=True"
    ):
        replay(made, own, linear_step_time(features, theta, own))
    run = replay(made, own, linear_step_time(features, theta, own, exact=True))
    assert run.steps["step_time_s"].to_numpy() == pytest.approx(features.design(run.steps, own) @ theta, rel=1e-9)


def test_probes_are_batches_of_every_kind_the_engine_runs():
    own = STORE.configuration(STORE.config_ids[0])
    probes = pd.DataFrame(probe_batches(own), columns=list(Batch._fields))
    engine = own.engine
    tokens = probes["prefill_tokens"] + probes["decode_tokens"]
    assert tokens.between(1, engine.max_num_batched_tokens).all()
    assert (probes["prefill_requests"] + probes["decode_requests"] <= engine.max_num_seqs).all()
    assert (probes["prefill_tokens"] >= probes["prefill_requests"]).all()
    assert ((probes["prefill_tokens"] > 0) == (probes["prefill_requests"] > 0)).all()
    kinds = (probes["prefill_tokens"] > 0).astype(str) + (probes["decode_tokens"] > 0).astype(str)
    assert kinds.value_counts().min() > 500
    assert len(kinds.unique()) == 3
    assert (tokens > 0.9 * engine.max_num_batched_tokens).any()


def test_posterior_gives_its_mean_or_one_draw():
    posterior, own = three_fitted(), THREE[2]
    theta = posterior.draws(own).theta
    batch = Batch(100, 8, 1, 8, 5000, 15000, 4000, 0, 9, 0.3)
    design = posterior.feature_set.design(pd.DataFrame([batch]), own)[0]
    assert step_time_function(posterior, own)(batch) == pytest.approx(design @ theta.mean(axis=0), rel=1e-9)
    drawn = [step_time_function(posterior, own, draw=s)(batch) for s in (0, 5, len(theta) + 5)]
    assert drawn == pytest.approx([design @ theta[0], design @ theta[5], design @ theta[5]], rel=1e-9)


def test_configuration_never_seen_is_drawn_from_the_population():
    posterior = three_fitted()
    own = THREE[0].model_copy(update={"config_id": "new"})
    batch = Batch(100, 8, 1, 8, 5000, 15000, 4000, 0, 9, 0.3)
    design = posterior.feature_set.design(pd.DataFrame([batch]), own)[0]
    draws = posterior.draws(own, 3)
    assert step_time_function(posterior, own, seed=3)(batch) == pytest.approx(design @ draws.mean, rel=1e-9)
    assert step_time_function(posterior, own, seed=3, draw=7)(batch) == pytest.approx(design @ draws.theta[7], rel=1e-9)


def test_speed_factor_and_floor():
    own = STORE.configuration(STORE.config_ids[0])
    features = feature_set("roofline")
    function = linear_step_time(features, coefficients(features), own)
    batch = Batch(100, 8, 1, 8, 5000, 15000, 4000, 0, 9, 0.3)
    assert function.scaled(1.1).scaled(2)(batch) == pytest.approx(2.2 * function(batch))
    negative = linear_step_time(features, -coefficients(features), own)
    assert negative(batch) == 0.5 * weight_loading_floor_s(own)
    assert linear_step_time(features, -coefficients(features), own, minimum_s=1e-6)(batch) == 1e-6
    run = replay(replace(TRAFFIC, num_requests=5), own, negative)
    assert run.steps["step_time_s"].to_numpy() == pytest.approx(
        np.full(len(run.steps), 0.5 * weight_loading_floor_s(own)), rel=1e-6
    )


def test_bad_input_is_named():
    own, features = STORE.configuration(STORE.config_ids[0]), feature_set("roofline")
    theta = coefficients(features)
    with pytest.raises(InputError, match=r"'roofline' needs \d+ finite coefficients \(weight_read, .*; found \[1.0\]"):
        linear_step_time(features, [1.0], own)
    with pytest.raises(InputError, match="finite coefficients"):
        linear_step_time(features, np.full(len(theta), np.nan), own)
    with pytest.raises(InputError, match="minimum_s is 0"):
        linear_step_time(features, theta, own, minimum_s=0)
    with pytest.raises(InputError, match="speed factor is -1"):
        linear_step_time(features, theta, own).scaled(-1)
    foreign = replace(
        features, features=(*features.features, replace(features.features[1], name="heat", columns=("temperature",)))
    )
    with pytest.raises(
        InputError, match=r"reads the column.s. temperature, which a replay does not make; it makes prefill_tokens"
    ):
        linear_step_time(foreign, np.ones(len(foreign.varying)), own)
    delays = replace(three_fitted(), feature_set=feature_set("roofline", "queue_delay"))
    with pytest.raises(InputError, match="needs a posterior of step_time, this one is of queue_delay"):
        step_time_function(delays, THREE[0])
