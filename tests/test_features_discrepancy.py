"""The roofline with a model discrepancy: its columns, and a bend that it finds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import hfdtl_bayes as hb
from hfdtl_bayes.configuration import configuration_from_mapping
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import PriorRange, feature_set
from hfdtl_bayes.model import SamplerSettings, fit
from hfdtl_bayes.sample import DONORS, sample_store_path
from hfdtl_bayes.statistics import statistics_from_rows

WITH, WITHOUT = feature_set("roofline-discrepancy"), feature_set("roofline")
HATS = slice(len(WITHOUT.coef_names), None)
OWN = hb.TraceStore(sample_store_path()).configuration(DONORS[0])


def decode(tokens: np.ndarray, context: float = 300.0) -> pd.DataFrame:
    """Steps of sequences that decode, without prefill."""
    zero = np.zeros(len(tokens))
    return pd.DataFrame(
        {
            "prefill_tokens": zero, "decode_tokens": tokens, "prefill_requests": zero, "decode_requests": tokens,
            "prefill_attention_tokens": zero, "context_tokens": context * tokens,
        }
    )  # fmt: skip


def test_columns_are_a_piecewise_linear_function_of_log2_tokens_times_the_step_time() -> None:
    tokens = np.array([1.0, 64.0, 48.0, 2048.0, 5000.0])
    frame = decode(tokens)
    columns = WITH.design(frame, OWN)[:, HATS]
    means = np.array([f.prior.mean for f in WITHOUT.varying])
    step_s = WITHOUT.design(frame, OWN) @ means
    # Config features are constants within a configuration, added apart from the columns.
    step_s += sum(f.prior.mean * float(f.compute(None, OWN)) for f in WITHOUT.config)
    np.testing.assert_allclose(columns.sum(axis=1), step_s)
    names = WITH.coef_names[HATS]
    share = columns / step_s[:, None]
    assert share[0, names.index("discrepancy_1")] == pytest.approx(1.0)
    assert share[1, names.index("discrepancy_64")] == pytest.approx(1.0)
    assert share[2, names.index("discrepancy_64")] == pytest.approx(np.log2(48) - 5)
    assert share[2, names.index("discrepancy_32")] == pytest.approx(6 - np.log2(48))
    assert share[3:, names.index("discrepancy_2048")] == pytest.approx([1.0, 1.0])


def test_physics_is_that_of_the_roofline() -> None:
    assert WITH.features[: len(WITHOUT.features)] == WITHOUT.features
    assert WITH.noise_floor is WITHOUT.noise_floor
    assert set(WITH.columns) == set(WITHOUT.columns)


def test_a_bend_is_found() -> None:
    """Steps of the roofline that take 6 % longer around 32 tokens."""
    rng = np.random.default_rng(3)
    own = configuration_from_mapping(
        {
            "config_id": "llama",
            "llm": {
                "name": "llama", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
                "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "max_context_tokens": 8192,
            },
            "hardware": "H100",
            "engine": {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "kv_capacity_tokens": 450_000},
        }
    )  # fmt: skip
    tokens = np.exp2(rng.uniform(0, 8, 3000)).round()
    frame = decode(tokens, 1000.0).assign(step_id=np.arange(3000), regime="all")
    truth = dict.fromkeys(WITHOUT.coef_names, 0.0) | {"weight_read": 1.3, "kv_read": 1.2, "sequences": 0.8, "constant": 2.0}
    mean = WITHOUT.design(frame, own) @ np.array([truth[n] for n in WITHOUT.coef_names])
    bend = 0.06 * np.maximum(0, 1 - np.abs(np.log2(tokens) - 5))
    frame["step_time_s"] = mean * (1 + bend) * (1 + 0.03 * rng.standard_normal(3000))
    found = {}
    for features in (WITHOUT, WITH):
        statistics = [statistics_from_rows(frame, own, features)]
        fitted = fit(statistics, features, settings=SamplerSettings(draws=100), seed=1, show_progress=False)
        error = fitted.expected_s(frame, own) / (mean * (1 + bend)) - 1
        found[features.name] = fitted.draws_of("theta")[:, 0], float(np.abs(error).mean())
    assert found["roofline-discrepancy"][1] < 0.5 * found["roofline"][1]
    theta = found["roofline-discrepancy"][0]
    at = WITH.coef_names.index("discrepancy_32")
    # All the others together may take up a part that is common to all sizes.
    others = theta[:, [at - 2, at + 2]].mean(axis=1)
    assert (theta[:, at] - others).mean() == pytest.approx(0.06, abs=0.02)


def test_a_discrepancy_has_no_sign_and_no_population() -> None:
    first = WITH.discrepancy[0]
    with pytest.raises(InputError, match=r"'discrepancy_1' has the prior range \(-0.05, 0.1\).*\(-0.1, 0.1\).*residual feature"):
        WITH.with_priors({first.name: PriorRange(-0.05, 0.1)})
    wider = WITH.with_priors({first.name: PriorRange(-0.1, 0.1)})
    assert wider.discrepancy_sd[0] == pytest.approx(0.1 / 1.6448536269514722)
    assert WITH.coef_names == (*WITH.pooled_names, *(f.name for f in WITH.discrepancy))
    assert WITH.pooled == WITHOUT.varying
    assert "each its own" in first.prior_sentence()
    assert "population" not in first.prior_sentence()
