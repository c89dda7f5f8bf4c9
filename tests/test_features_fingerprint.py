"""A constant that changes behind the same formula is told by what the formula comes to."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from hfdtl_bayes.features import (
    QUANTITIES,
    Feature,
    FeatureSet,
    Level,
    PriorRange,
    feature_set,
    feature_set_names,
    fingerprint,
    fingerprint_differences,
    physics,
    roofline,
)

STEP_TIME = feature_set("roofline")


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_formula_of_the_package_can_be_computed_and_is_nowhere_nil(quantity: str) -> None:
    for name in feature_set_names(quantity):
        features = feature_set(name, quantity)
        found = fingerprint(features)
        assert set(found) == {f.name for f in features.features} | {"noise floor", "support"}
        for key, values in found.items():
            assert np.isfinite(values).all(), (name, key)
            assert any(values), (name, key)
        assert fingerprint_differences(json.loads(json.dumps(found)), fingerprint(features)) == []


HIDDEN, EXPERTS = {"gemm_hidden"}, {"expert_gemm_hidden"}
CONSTANTS = {
    "compute_efficiency": HIDDEN | {"gemm_excess"},
    "memory_efficiency": HIDDEN | EXPERTS | {"gemm_excess"},
    "expert_compute_efficiency": EXPERTS | {"gemm_excess"},
    "sharpness": HIDDEN | EXPERTS | {"gemm_excess"},
    # The excess feels it as well, but below the tolerance where experts are as memory-bound as in the example.
    "routing_skew": {"expert_weight_read"},
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_of_the_roofline_names_the_features_it_is_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, delays = fingerprint(STEP_TIME), fingerprint(feature_set("roofline", "queue_delay"))
    changed = replace(physics.SETTINGS, **{name: getattr(physics.SETTINGS, name) * 1.05})
    monkeypatch.setattr(physics, "SETTINGS", changed)
    assert set(fingerprint_differences(before, fingerprint(STEP_TIME))) == CONSTANTS[name]
    assert fingerprint_differences(delays, fingerprint(feature_set("roofline", "queue_delay"))) == []


HOST = {
    "step_s": {"constant"}, "layer_s": {"layers", "moe_layers"}, "collective_s": {"all_reduce_latency"},
    "sequence_s": {"sequences"}, "attention_bandwidth_share": {"kv_read"},
}  # fmt: skip


@pytest.mark.parametrize("host", ["GPU_HOST", "CPU_HOST"])
@pytest.mark.parametrize("name", HOST)
def test_a_reference_time_of_the_host_names_its_feature(host: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, delays = fingerprint(STEP_TIME), fingerprint(feature_set("roofline", "queue_delay"))
    constants = getattr(physics, host)
    monkeypatch.setattr(physics, host, replace(constants, **{name: getattr(constants, name) * 1.05}))
    # The example on a CPU is dense and one device wide.
    expected = HOST[name] - ({"moe_layers", "all_reduce_latency"} if host == "CPU_HOST" else set())
    assert set(fingerprint_differences(before, fingerprint(STEP_TIME))) == expected
    # Delays count in reference steps, which hold the host's time per step and per layer; which requests wait stays.
    now = set(fingerprint_differences(delays, fingerprint(feature_set("roofline", "queue_delay"))))
    assert now == (set(delays) - {"support"} if name in {"step_s", "layer_s"} else set())


def test_links_and_the_rule_for_a_free_slot_are_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = feature_set("roofline", "queue_delay")
    before, delays = fingerprint(STEP_TIME), fingerprint(queue)
    monkeypatch.setattr(physics, "NVLINK_FLOOR", 1e9)
    monkeypatch.setattr(roofline, "_NEARLY_FULL", 0.85)
    assert fingerprint_differences(before, fingerprint(STEP_TIME)) == ["all_reduce"]
    assert fingerprint_differences(delays, fingerprint(queue)) == ["support"]


def test_a_user_s_formula_may_read_what_only_the_user_has() -> None:
    constant = Feature("constant", Level.RESIDUAL, "1", "1", lambda f, _c: np.ones(len(f)), PriorRange(0, 1))
    racks = Feature("rack", Level.CONFIG, "1", "rack", lambda _f, c: {"mine": 2.0}[c.config_id], PriorRange(0, 1))
    images = Feature(
        "images", Level.BASE, "1", "log(images - 1)", lambda f, _c: np.log(f["images"] - 1), PriorRange(0, 1), ("images",)
    )
    own = FeatureSet("own", "step_time", (racks, images, constant), lambda _c: 1e-3)
    found = fingerprint(own)
    assert np.isnan(found["rack"]).all()
    assert set(found["constant"]) == {1.0}
    assert fingerprint_differences(json.loads(json.dumps(found)), fingerprint(own)) == []


def test_differences_are_names_missing_or_beyond_rounding() -> None:
    one = {"a": [1.0, float("nan")], "b": [0.0], "c": [1.0]}
    assert fingerprint_differences(one, {"a": [1.0 + 1e-9, float("nan")], "b": [0.0], "c": [1.0]}) == []
    assert fingerprint_differences(one, {"a": [1.0, 1.0], "b": [1e-12], "d": [1.0]}) == ["a", "b", "c", "d"]
    assert fingerprint_differences({"a": [1.0]}, {"a": [1.0, 1.0]}) == ["a"]
