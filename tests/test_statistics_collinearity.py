"""What rows cannot tell apart is named: absent columns, dependent columns, nearly collinear groups, condition numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import column, configuration

from hfdtl_bayes.configuration import configuration_from_mapping
from hfdtl_bayes.errors import StatisticsError
from hfdtl_bayes.features import Feature, FeatureSet, Level, PriorRange, feature_set, operating_points
from hfdtl_bayes.statistics import ConfigStatistics, statistics_from_rows
from hfdtl_bayes.statistics.collinearity import design_condition, stacked_design

OWN = configuration("own")
ROOFLINE = feature_set("roofline")


def features_of(*names: str, sizes: tuple[float, ...] = (), quantity: str = "api_delay") -> FeatureSet:
    """A set of plain columns and the constant; a delay by default, so that no list of possible batches exists."""
    sizes = sizes or (1.0,) * len(names)
    plain = [
        Feature(n, Level.BASE, "1", n, column(n), PriorRange(0.0, 2.0), (n,), size) for n, size in zip(names, sizes, strict=True)
    ]
    constant = Feature("constant", Level.RESIDUAL, "1", "1", lambda f, _c: np.ones(len(f)), PriorRange(0.0, 2.0))
    return FeatureSet("plain", quantity, (*plain, constant), lambda _c: 1e-3)  # type: ignore[arg-type]


def statistics_of(columns: dict[str, np.ndarray], features: FeatureSet) -> ConfigStatistics:
    """Rows whose scale is 1: the pilot is the constant alone."""
    frame = pd.DataFrame({**columns, "step_id": np.arange(len(next(iter(columns.values()))))})
    frame = frame.assign(queued_s=1.0, arrival_s=0.0, step_time_s=1.0, regime="steady")
    pilot = np.r_[np.zeros(len(columns)), 1.0]
    return statistics_from_rows(frame, OWN, features, pilot=pilot, block_length=7)


def unit(columns: dict[str, np.ndarray]) -> np.ndarray:
    design = np.column_stack([*columns.values(), np.ones(len(next(iter(columns.values()))))])
    return design / np.linalg.norm(design, axis=0)


def noise(seed: int, rows: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(rows)


@given(st.integers(0, 10_000), st.floats(-12, 12))
def test_the_condition_number_is_that_of_the_rows_whatever_the_unit(seed: int, power: float) -> None:
    rng = np.random.default_rng(seed)
    columns = {"a": rng.exponential(size=90), "b": rng.exponential(size=90)}
    expected = np.linalg.cond(unit(columns))
    found = design_condition(statistics_of(columns, features_of("a", "b", sizes=(10.0**power, 1.0))), features_of("a", "b"))
    assert found.condition_number == pytest.approx(expected, rel=1e-6)
    assert found.identified_condition_number == found.condition_number
    assert (found.rank, found.columns) == (3, 3)


def test_the_stack_has_the_squares_of_the_rows() -> None:
    columns = {"a": noise(1), "b": noise(2)}
    found = stacked_design(statistics_of(columns, features_of("a", "b")))
    rows = np.column_stack([columns["a"], columns["b"], np.ones(90)])
    np.testing.assert_allclose(found.T @ found, rows.T @ rows, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("correlation", "reported"), [(0.999, True), (0.99, False)])
def test_two_columns_of_a_known_correlation(correlation: float, reported: bool) -> None:
    """Of two centred columns of correlation r the condition index is sqrt((1 + r) / (1 - r)): 44.7 and 14.1."""
    basis, _ = np.linalg.qr(np.column_stack([np.ones(90), noise(1), noise(2)]))
    columns = {"a": basis[:, 1], "b": correlation * basis[:, 1] + np.sqrt(1 - correlation**2) * basis[:, 2]}
    found = design_condition(statistics_of(columns, features_of("a", "b")), features_of("a", "b"))
    expected = np.sqrt((1 + correlation) / (1 - correlation))
    assert found.condition_number == pytest.approx(expected, rel=1e-8)
    groups = [(d.columns, round(d.condition_index, 4), d.exact) for d in found.dependencies]
    assert groups == ([(("a", "b"), round(expected, 4), False)] if reported else [])
    assert bool(found.sentences()) is reported


def test_two_near_dependencies_are_told_apart_where_their_indexes_are() -> None:
    """a and b, and c and d, each nearly the same, one pair a hundred times nearer than the other."""
    basis, _ = np.linalg.qr(np.column_stack([np.ones(90), *(noise(i) for i in range(4))]))
    columns = {
        "a": basis[:, 1], "b": basis[:, 1] + 1e-2 * basis[:, 2], "c": basis[:, 3], "d": basis[:, 3] + 1e-4 * basis[:, 4],
    }  # fmt: skip
    features = features_of("a", "b", "c", "d")
    found = design_condition(statistics_of(columns, features), features)
    assert [d.columns for d in found.dependencies] == [("a", "b"), ("c", "d")]
    # As strong as each other, variance may be spread over both: they are reported as one.
    columns["d"] = basis[:, 3] + 1e-2 * basis[:, 4]
    found = design_condition(statistics_of(columns, features), features)
    assert [d.columns for d in found.dependencies] == [("a", "b", "c", "d")]


def test_columns_that_depend_on_each_other_exactly_are_named() -> None:
    columns = {"a": noise(1), "b": noise(2), "c": 3e5 * noise(1), "d": noise(3)}
    features = features_of(*columns)
    found = design_condition(statistics_of(columns, features), features)
    assert (found.rank, found.columns) == (4, 5)
    assert found.condition_number == float("inf")
    assert found.identified_condition_number < 5
    (dependency,) = found.dependencies
    assert (dependency.columns, dependency.exact, dependency.by_structure) == (("a", "c"), True, None)
    assert dependency.sentence().startswith("the rows decide a combination of a and c but cannot tell them apart")


def test_separate_dependencies_are_separate_groups() -> None:
    columns = {"a": noise(1), "b": noise(2), "c": noise(1) * 2, "d": noise(2) + 1.0, "e": noise(4)}
    features = features_of(*columns)
    found = design_condition(statistics_of(columns, features), features)
    assert [d.columns for d in found.dependencies] == [("a", "c"), ("b", "d", "constant")]


def test_an_absent_column_of_a_delay_is_told() -> None:
    columns = {"a": np.zeros(90), "b": noise(2)}
    features = features_of("a", "b")
    found = design_condition(statistics_of(columns, features), features)
    assert (found.absent, found.not_applicable, found.rank) == (("a",), (), 2)
    assert "absent from these rows" in found.sentences()[0]
    assert found.by_traffic


def dense(config_id: str = "dense", experts: int = 0, tensor_parallel: int = 1):
    return configuration_from_mapping(
        {
            "config_id": config_id,
            "llm": {
                "name": "llm", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
                "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "max_context_tokens": 16384,
                "num_experts": experts, "num_experts_per_token": 2 if experts else 0,
            },
            "hardware": "h100",
            "engine": {"tensor_parallel": tensor_parallel, "max_num_seqs": 128, "max_num_batched_tokens": 2048,
                       "kv_capacity_tokens": 400_000},
        }
    )  # fmt: skip


def rows_of(own, regimes: tuple[str, ...] = ("decode", "prefill", "mixed")) -> ConfigStatistics:
    frame = operating_points(own)
    frame = frame[frame["regime"].isin(regimes)].reset_index(drop=True)
    return statistics_from_rows(frame.assign(step_time_s=0.02, regime="steady"), own, ROOFLINE)


def test_structure_and_traffic_are_told_apart() -> None:
    own = dense()
    everything, decodes = (design_condition(rows_of(own, r), ROOFLINE) for r in (("decode", "prefill", "mixed"), ("decode",)))
    experts = ("expert_weight_read", "expert_gemm_hidden", "all_reduce")
    # Weights are read in every step and so is the constant there: no traffic of one configuration tells them apart.
    assert [(d.columns, d.by_structure) for d in everything.dependencies if d.exact] == [(("weight_read", "constant"), True)]
    assert (everything.not_applicable, everything.absent, everything.by_traffic) == (experts, (), False)
    assert "prefill_attention" in decodes.absent
    assert decodes.not_applicable == experts
    assert decodes.by_traffic
    assert everything.warnings() == ()
    assert decodes.warnings()[0].startswith("absent from these rows")
    assert "no batch of this configuration could" not in " ".join(decodes.warnings())
    assert any("record steps that have them" in s and "prefill_attention" in s for s in decodes.sentences())


def test_columns_alike_in_these_rows_only_are_laid_to_the_traffic() -> None:
    """Decodes all of one context length: KV read and sequences in ratio."""
    own = dense()
    frame = operating_points(own)
    frame = frame[(frame["regime"] == "decode") & (frame["context_tokens"] == 512 * frame["decode_tokens"])].reset_index(
        drop=True
    )
    statistics = statistics_from_rows(frame.assign(step_time_s=0.02, regime="steady"), own, ROOFLINE)
    found = {d.columns: d.by_structure for d in design_condition(statistics, ROOFLINE).dependencies if d.exact}
    assert found[("weight_read", "constant")] is True
    (together,) = [c for c in found if {"kv_read", "sequences"} <= set(c)]
    assert found[together] is False


def test_a_column_that_is_not_finite_is_named() -> None:
    statistics = rows_of(dense())
    spoilt = statistics.strata[0].triangle.copy()
    spoilt[0, 3] = np.nan
    bad = replace(statistics, strata=(replace(statistics.strata[0], triangle=spoilt), *statistics.strata[1:]))
    with pytest.raises(StatisticsError, match=r"'dense' are not finite in column\(s\) expert_weight_read"):
        design_condition(bad, ROOFLINE)


def test_rows_that_say_nothing_are_refused() -> None:
    statistics = rows_of(dense())
    silent = replace(statistics, strata=tuple(replace(s, triangle=np.zeros_like(s.triangle)) for s in statistics.strata))
    with pytest.raises(StatisticsError, match="every column of feature set 'roofline' is zero in every row"):
        design_condition(silent, ROOFLINE)
