"""The design's own features, against values worked out by hand from its formulas."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import FeatureSet, feature_set, feature_set_names
from hfdtl_bayes.features.feature import QUANTITIES

HARDWARE = {
    "name": "round",
    "peak_flops": 1e12,
    "memory_bandwidth": 1e11,
    "memory_bytes": 1e10,
    "interconnect_bandwidth": 1e10,
}


def _configuration(llm: dict, engine: dict) -> ServingConfiguration:
    shape = {
        "name": "x", "num_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
        "intermediate_size": 16, "vocab_size": 10, "max_context_tokens": 2000,
    }  # fmt: skip
    limits = {"max_num_seqs": 40, "max_num_batched_tokens": 512, "kv_capacity_tokens": 5000}
    return configuration_from_mapping({"config_id": "x", "llm": shape | llm, "hardware": HARDWARE, "engine": limits | engine})


# Per layer: attention 8*2*(2*4 + 2*2) = 192, FFN 3*8*16 = 384; head 8*10 = 80. FLOPs 2*(2*(192 + 384) + 80) = 2464 per
# token; KV 2*2 layers*2 heads*2*2 bytes = 32 byte per token.
DENSE = _configuration({}, {"tensor_parallel": 2, "prefix_caching": True, "chunked_prefill": False, "cpu_offload": True})
# 16 experts of width 16, 2 per token, routers 8*16 = 128: 2*(2*(192 + 128 + 2*384) + 80) = 4512 FLOP per token.
MOE = _configuration({"num_experts": 16, "num_experts_per_token": 2}, {"chunked_prefill": True})

STEPS = pd.DataFrame(
    {"prefill_tokens": [100.0, 0.0], "decode_tokens": [28.0, 4.0], "kv_usage": [0.5, 0.0]},
)
REQUESTS = pd.DataFrame({"waiting_requests": [10.0, 0.0], "kv_usage": [0.25, 1.0], "prompt_tokens": [500.0, 2000.0]})


def _physical(features: FeatureSet, frame: pd.DataFrame, configuration: ServingConfiguration) -> dict[str, np.ndarray]:
    """Columns in their own unit, through the design matrix that is fitted."""
    design = features.design(frame, configuration) / features.references
    return dict(zip(features.coef_names, design.T, strict=True))


@pytest.mark.parametrize(
    ("configuration", "flops", "experts", "inverse_tp", "offload"), [(DENSE, 2464, 0.0, 0.5, 1.0), (MOE, 4512, 2.0, 1.0, 0.0)]
)
def test_beta(configuration: ServingConfiguration, flops: float, experts: float, inverse_tp: float, offload: float) -> None:
    features = feature_set("hfdtl")
    columns = _physical(features, STEPS, configuration)
    expected = {
        "prefill_work": [100 * flops / 1e12, 0.0],
        "decode_work": [28 * 32 / 1e11, 4 * 32 / 1e11],
        "batch_share": [128 / 512, 4 / 512],
        "constant": [1.0, 1.0],
        "kv_usage_squared": [0.25, 0.0],
    }
    assert list(columns) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name], values, rtol=1e-12, err_msg=name)
    config = features.config_row(configuration) / [f.reference for f in features.config]
    assert [f.name for f in features.config] == ["inverse_tp", "moe_experts", "cpu_offload"]
    np.testing.assert_allclose(config, [inverse_tp, experts, offload])


@pytest.mark.parametrize("quantity", ["queue_delay", "api_delay"])
@pytest.mark.parametrize(("configuration", "config_row"), [(DENSE, [0.5, 1.0, 0.0]), (MOE, [1.0, 0.0, 1.0])])
def test_alpha(quantity: str, configuration: ServingConfiguration, config_row: list[float]) -> None:
    features = feature_set("hfdtl", quantity)
    columns = _physical(features, REQUESTS, configuration)
    expected = {
        "queue_depth": [0.25, 0.0],
        "kv_usage": [0.25, 1.0],
        "prompt_share": [0.25, 1.0],
        "constant": [1.0, 1.0],
        "queue_depth_squared": [0.0625, 0.0],
    }
    assert list(columns) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name], values, rtol=1e-12, err_msg=name)
    assert [f.name for f in features.config] == ["inverse_tp", "prefix_caching", "chunked_prefill"]
    np.testing.assert_allclose(features.config_row(configuration) / [f.reference for f in features.config], config_row)


def test_interactions_are_the_design_s_and_normalised() -> None:
    plain, wide = feature_set("hfdtl"), feature_set("hfdtl-interactions")
    assert set(wide.coef_names) - set(plain.coef_names) == {"prefill_share_kv_usage"}
    np.testing.assert_allclose(_physical(wide, STEPS, DENSE)["prefill_share_kv_usage"], [100 / 512 * 0.5, 0.0])
    plain, wide = feature_set("hfdtl", "queue_delay"), feature_set("hfdtl-interactions", "queue_delay")
    assert set(wide.coef_names) - set(plain.coef_names) == {"queue_depth_kv_usage"}
    np.testing.assert_allclose(_physical(wide, REQUESTS, MOE)["queue_depth_kv_usage"], [0.0625, 0.0])


def test_work_is_not_divided_by_tp_as_written() -> None:
    """The fault the design is known for, kept on purpose in this set and cured in the default one."""
    single = DENSE.model_copy(update={"engine": DENSE.engine.model_copy(update={"tensor_parallel": 1})})
    features = feature_set("hfdtl")
    np.testing.assert_array_equal(features.design(STEPS, DENSE), features.design(STEPS, single))


def test_a_missing_column_is_named() -> None:
    with pytest.raises(InputError, match="kv_usage"):
        feature_set("hfdtl").design(STEPS.drop(columns="kv_usage"), DENSE)


def test_a_column_that_is_not_finite_is_named_with_its_row() -> None:
    with pytest.raises(InputError, match=r"'kv_usage_squared'.*row 1"):
        feature_set("hfdtl").design(STEPS.assign(kv_usage=[0.1, np.nan]), DENSE)


@pytest.mark.parametrize(("name", "quantity"), [(n, q) for q in QUANTITIES for n in feature_set_names(q)], ids=str)
def test_every_feature_says_what_it_is(name: str, quantity: str) -> None:
    features = feature_set(name, quantity)
    units = features.units()
    for f in features.features:
        assert f.unit
        assert f.formula
        assert f.reference > 0
        # The coefficient times the column is in seconds.
        assert units[f.name] == {"s": "1", "1": "s"}.get(f.unit, f"s/{f.unit}")
        assert f.name in f.prior_sentence()
