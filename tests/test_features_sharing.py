"""Columns that formulas share: computed once while a design is built, anew everywhere else; and designs by their distinct columns."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hfdtl_bayes.features import feature_set, physics
from hfdtl_bayes.features.sharing import constant, once, shared_columns
from hfdtl_bayes.sample import TARGET, sample_store_path
from hfdtl_bayes.traces import TraceStore, validate_steps


def test_a_formula_is_remembered_for_its_frame_and_arguments_within_the_block_only() -> None:
    frame, other = pd.DataFrame({"x": [1.0, 2.0]}), pd.DataFrame({"x": [5.0]})
    calls = []

    @once
    def doubled(rows: pd.DataFrame, by: list[float]) -> np.ndarray:
        calls.append(len(rows))
        return rows["x"].to_numpy() * by[0]

    two, three = [2.0], [3.0]
    doubled(frame, two)
    doubled(frame, two)
    assert calls == [2, 2]
    with shared_columns(frame):
        assert doubled(frame, two) is doubled(frame, two)
        assert doubled(frame, three)[1] == 6.0
        assert doubled(other, two)[0] == doubled(other, two)[0] == 10.0
        with pytest.raises(ValueError, match="read-only"):
            doubled(frame, two)[0] = 7.0
    assert calls == [2, 2, 2, 2, 1, 1]
    frame["x"] = 4.0
    assert doubled(frame, two)[0] == 8.0


def test_a_formula_called_by_a_user_gives_an_array_of_the_user_s_own() -> None:
    frame = pd.DataFrame({"prefill_tokens": [3.0], "decode_tokens": [4.0]})
    with shared_columns(frame):
        own = physics.batch_tokens(frame)
        own *= 2
        assert physics.batch_tokens(frame)[0] == 7.0


def test_a_constant_is_held_once() -> None:
    found = constant(2.5, 4)
    np.testing.assert_array_equal(found, np.full(4, 2.5))
    assert found.strides == (0,)
    assert len(constant(1.0, 0)) == 0


@pytest.mark.parametrize("name", ["roofline", "hfdtl", "hfdtl-interactions", "blis-physics", "blis-blackbox"])
@pytest.mark.parametrize("count", [1, 3000])
def test_the_design_follows_from_its_distinct_columns(name: str, count: int) -> None:
    configuration = TraceStore(sample_store_path()).configuration(TARGET)
    frame = validate_steps(pd.read_parquet(sample_store_path() / TARGET / "steps.parquet"), configuration).frame.iloc[:count]
    features = feature_set(name)
    out = np.full((len(features.varying), len(frame)), np.nan)
    expansion = features.distinct_columns(frame, configuration, out)
    varying = out[: len(expansion) - 1]
    design = features.design(frame, configuration)
    np.testing.assert_allclose(np.column_stack([np.ones(len(frame)), varying.T]) @ expansion, design, rtol=1e-14)
    assert len(varying) == sum(len(np.unique(column)) > 1 for column in design.T)


@pytest.mark.parametrize("values", [[3.0] * 50, [2.5, *[3.0] * 50], [0.0, *range(40), *[7.0] * 20_000], [-1.0, 2.0], []])
def test_looking_a_count_up_is_evaluating_its_formula(values: list[float]) -> None:
    given = np.array(values, dtype=float)
    np.testing.assert_array_equal(physics.by_count(given, _formula, 2.0), _formula(given, 2.0))


def _formula(values: np.ndarray, power: float) -> np.ndarray:
    return np.abs(values) ** power + 1.0
