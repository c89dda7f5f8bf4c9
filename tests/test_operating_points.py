"""The grid of batches: within the engine's limits, of every kind, never empty."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping
from hfdtl_bayes.features import feature_set, feature_set_names, operating_points, typical_batches


def _configuration(seqs: int, budget: int, capacity: float, longest: int) -> ServingConfiguration:
    llm = {
        "name": "tiny", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 128, "vocab_size": 100, "max_context_tokens": longest,
    }  # fmt: skip
    engine = {"max_num_seqs": seqs, "max_num_batched_tokens": budget, "kv_capacity_tokens": capacity}
    return configuration_from_mapping({"config_id": "c", "llm": llm, "hardware": "l4", "engine": engine})


sizes = st.tuples(st.integers(1, 2000), st.integers(1, 20000), st.floats(0.5, 1e6) | st.floats(0.5, 400), st.integers(1, 200_000))


@given(sizes)
def test_every_batch_is_one_the_engine_can_run(size: tuple[int, int, float, int]) -> None:
    seqs, budget, capacity, longest = size
    grid = operating_points(_configuration(*size))
    tokens = grid["prefill_tokens"] + grid["decode_tokens"]
    assert (tokens >= 1).all()
    assert (tokens <= budget).all()
    assert (grid["running_requests"] <= seqs).all()
    assert (grid["prefill_tokens"] <= longest).all()
    used = grid["context_tokens"] + grid["prefill_tokens"]
    assert (used <= max(int(capacity), 1)).all()
    decoding = grid[grid["decode_tokens"] > 0]
    context = decoding["context_tokens"] / decoding["decode_tokens"]
    assert ((context >= 1) & (context <= longest)).all()
    assert grid["kv_usage"].between(0, 1).all()
    np.testing.assert_array_equal(grid["running_requests"], grid["prefill_requests"] + grid["decode_requests"])
    assert not grid.drop(columns="step_id").duplicated().any()


@given(sizes)
def test_every_kind_of_batch_the_engine_can_run_is_there(size: tuple[int, int, float, int]) -> None:
    seqs, budget, capacity, _ = size
    kinds = set(operating_points(_configuration(*size))["regime"])
    possible = {"decode", "prefill"} | ({"mixed"} if min(seqs, budget, int(capacity)) >= 2 else set())
    assert kinds == possible


def test_the_extremes_of_a_usual_engine_are_covered() -> None:
    grid = operating_points(_configuration(256, 2048, 140_000, 131_072))
    assert grid["decode_tokens"].max() == 256
    assert grid["prefill_tokens"].max() == 2048
    single = grid[(grid["decode_tokens"] == 1) & (grid["prefill_tokens"] == 0)]
    assert list(single["context_tokens"]) == [512, 2048, 8192]
    assert grid["kv_usage"].max() > 0.9


def test_every_step_time_feature_set_can_be_computed_on_the_grid() -> None:
    configuration = _configuration(1, 16, 20, 64)
    grid = operating_points(configuration)
    for name in feature_set_names("step_time"):
        assert feature_set(name).design(grid, configuration).shape[0] == len(grid)


def test_typical_batches_are_what_their_names_say() -> None:
    own = _configuration(64, 2048, 1e6, 8192)
    found, grid = typical_batches(own).set_index("batch"), operating_points(own)
    lone, decodes, chunk, mixed = found.itertuples()
    assert (lone.decode_tokens, lone.prefill_tokens, lone.context_tokens) == (1, 0, 2048)
    assert (decodes.decode_tokens, decodes.prefill_tokens, decodes.context_tokens) == (64, 0, 64 * 2048)
    assert (chunk.decode_tokens, chunk.prefill_tokens) == (0, 2048)
    # 63 decodes and one chunk are 64 requests; 32 is the largest decode batch of the grid that leaves room for a chunk.
    assert (mixed.decode_tokens, mixed.prefill_tokens) == (32, grid[grid["decode_tokens"] == 32]["prefill_tokens"].max())


@given(sizes)
def test_typical_batches_are_among_the_operating_points(size: tuple[int, int, float, int]) -> None:
    own = _configuration(*size)
    found = typical_batches(own)
    assert found["batch"].is_unique
    assert len(found) >= 1
    merged = found.drop(columns="batch").merge(operating_points(own), how="left", indicator=True)
    assert (merged["_merge"] == "both").all()
