"""The benchmark's own logic: splits that never leak, references that are what they say, tables that count right."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from hfdtl_bayes import sample
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.traces import TraceStore, drop_warmup, time_blocks

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType, ModuleType]]:
    """The benchmark and its two modules, which import each other by name as scripts do."""
    sys.path.insert(0, str(FOLDER))
    yield import_module("transfer_splits"), import_module("transfer_methods"), import_module("transfer")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def gpu_frame(shared_data: Path) -> pd.DataFrame:
    return drop_warmup(TraceStore(shared_data / "gpu_steps").steps("qwen3-8b_h100-sxm_tp1_vllm0.24.0").frame)


def engine_frame() -> pd.DataFrame:
    return drop_warmup(TraceStore(sample.sample_store_path()).steps(sample.TARGET).frame)


def test_no_row_both_calibrates_and_judges(scripts: tuple[ModuleType, ...], gpu_frame: pd.DataFrame):
    splits = scripts[0]
    made = splits.gpu_splits(gpu_frame, 3) + splits.engine_splits(engine_frame())
    assert len(made) == 7
    for split in made:
        assert len(split.test) > 100, split.name
        assert not set(split.pool.index) & set(split.test.index), split.name
        smaller, larger = split.drawn(25, 3), split.drawn(100, 3)
        assert (len(smaller), len(larger)) == (25, 100)
        assert set(smaller.index) < set(larger.index) <= set(split.pool.index)
        assert larger["step_id"].is_monotonic_increasing
        assert set(smaller.index) != set(split.drawn(25, 4).index)


def test_shifts_ask_about_traffic_that_was_not_seen(scripts: tuple[ModuleType, ...], gpu_frame: pd.DataFrame):
    splits = scripts[0]
    made = {s.name: s for s in splits.gpu_splits(gpu_frame, 0)}
    assert [s.shift for s in made.values()] == [False, True, True, True, True]
    concurrency = made["low to high concurrency"]
    assert concurrency.pool["target_concurrency"].max() < concurrency.test["target_concurrency"].min()
    workload = made["chat to summarisation"]
    assert (set(workload.pool["regime"]), set(workload.test["regime"])) == ({"conv"}, {"arxiv"})
    phase = made["decode-only to mixed"]
    assert phase.pool["prefill_tokens"].max() == 0 < phase.test["prefill_tokens"].min()
    both = made["light chat to heavy others"]
    assert both.pool["target_concurrency"].max() < both.test["target_concurrency"].min()
    assert not set(both.pool["regime"]) & set(both.test["regime"])


def test_recorded_steps_are_held_out_by_whole_blocks_and_by_load(scripts: tuple[ModuleType, ...]):
    splits, frame = scripts[0], engine_frame()
    blocks, loads = splits.engine_splits(frame)
    number = pd.Series(time_blocks(frame, 20), index=frame.index)
    assert not set(number[blocks.pool.index]) & set(number[blocks.test.index])
    assert loads.pool["regime"].map(splits.load).max() <= 0.5
    assert loads.test["regime"].map(splits.load).min() >= 0.85
    assert splits.load("load1.2") == 1.2
    assert np.isnan(splits.load("calib"))


def test_blocks_that_judge_are_whole_and_spread(scripts: tuple[ModuleType, ...]):
    splits, frame = scripts[0], engine_frame()
    kept = splits.spread_blocks(frame, 7)
    number = pd.Series(time_blocks(frame, 20), index=frame.index)
    chosen = number[kept.index].unique()
    assert len(chosen) == 7
    assert {number.iloc[0], number.iloc[-1]} <= set(chosen)
    assert len(kept) == number.isin(chosen).sum()
    assert splits.spread_blocks(frame, 10**6).equals(frame)


def test_what_is_unlike_the_donors(scripts: tuple[ModuleType, ...], shared_data: Path):
    splits = scripts[0]
    store = TraceStore(shared_data / "gpu_steps")
    donors = [store.configuration(d) for d in splits.DONORS]
    found = {
        c: splits.unlike(store.configuration(c), donors)
        for c in ("qwen3-14b_l40s_tp1_vllm0.24.0", "qwen3-30b-a3b_h100-sxm_tp4_vllm0.24.0", "qwen3-32b_a100-sxm_tp2_vllm0.14.0")
    }
    assert list(found.values()) == [store.configuration("qwen3-14b_l40s_tp1_vllm0.24.0").hardware.name, "fine-grained MoE", ""]
    every = [store.configuration(d) for d in splits.DONOR_SETS["gpu_steps"]["five"]]
    assert splits.unlike(store.configuration("qwen3-30b-a3b_h100-sxm_tp4_vllm0.24.0"), every) == ""


def test_donor_sets_exist(scripts: tuple[ModuleType, ...], shared_data: Path):
    for store, sets in scripts[0].DONOR_SETS.items():
        known = set(TraceStore(shared_data / store).config_ids)
        for name, ids in sets.items():
            assert set(ids) <= known, name
            assert len(ids) == len(set(ids)) >= 2, name


def test_relative_fit_is_the_normal_posterior(scripts: tuple[ModuleType, ...]):
    methods, rng = scripts[1], np.random.default_rng(1)
    design, w = rng.uniform(1, 2, (400, 3)), np.array([1.0, 2.0, 0.5])
    observed = (design @ w) * (1 + 0.05 * rng.standard_normal(400))
    mean, sd = np.array([1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1e-9])
    found = methods.relative_fit(design, observed, mean, sd, 0.05, 1e-6)
    assert found[2] == pytest.approx(1.0, abs=1e-6)  # the prior that leaves no room
    # At its own scale, it solves the normal equations of the penalised least squares.
    scale = 0.05 * (design @ found)
    gradient = design.T @ ((observed - design @ found) / scale**2) - (found - mean) / sd**2
    curvature = ((design / scale[:, None]) ** 2).sum(axis=0) + sd**-2.0
    assert np.abs(gradient / curvature).max() < 1e-3
    wide = methods.relative_fit(design, design @ w, mean, np.full(3, 1e3), 0.05, 1e-6)
    assert wide == pytest.approx(w, rel=1e-6)


def test_oracle_knows_nothing_of_its_own_model(scripts: tuple[ModuleType, ...], shared_data: Path):
    methods, store = scripts[1], TraceStore(shared_data / "gpu_steps")
    features = feature_set("roofline")
    k, constant = len(features.coef_names), len(features.base)
    names = ("qwen3-8b", "a", "b", "c", "d")
    rows = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    theta = np.ones((5, k)) + np.array([9.0, -0.1, 0.0, 0.1, 0.2])[:, None]
    theta[:, constant] = 2.0 + rows @ [0.5, 0.25, 1.0]
    configuration = store.configuration("qwen3-8b_h100-sxm_tp1_vllm0.24.0")
    oracle = methods.Oracle(features, names, theta, rows)
    mean, sd = oracle.prior(configuration)
    other = [i for i in range(k) if i != constant]
    assert mean[other] == pytest.approx(np.full(k - 1, 1.05))  # median of .9, 1, 1.1, 1.2
    assert sd[other] == pytest.approx(np.full(k - 1, 1.4826 * 0.1))
    folded = methods.config_to_constant(features, configuration)
    assert mean[constant] == pytest.approx(2.0 + folded @ [0.5, 0.25, 1.0])


def test_floor_is_no_worse_than_a_fit_to_some_rows(scripts: tuple[ModuleType, ...], shared_data: Path, gpu_frame: pd.DataFrame):
    splits, methods, _ = scripts
    configuration = TraceStore(shared_data / "gpu_steps").configuration("qwen3-8b_h100-sxm_tp1_vllm0.24.0")
    features = feature_set("roofline")
    split = splits.gpu_splits(gpu_frame, 0)[0]
    design = features.design(split.test, configuration)
    full = splits.mape(design @ methods.full_fit(gpu_frame, configuration, features), split.test)
    some = splits.mape(design @ methods.full_fit(split.drawn(25, 0), configuration, features), split.test)
    assert 0 < full < some
    assert splits.mape(splits.observed_s(split.test), split.test) == 0
    boosted = splits.mape(methods.boosted_s(split.drawn(500, 0), split.test), split.test)
    assert full < boosted < splits.mape(methods.boosted_s(split.drawn(10, 0), split.test), split.test)


def scores() -> pd.DataFrame:
    """Two targets, one split, ours and its rivals; made by hand."""
    rows = []
    errors = {
        ("a", 0): {"ours, roofline": 4.0},
        ("b", 0): {"ours, roofline": 30.0},
        ("a", 50): {"ours, roofline": 5.0, "scratch, roofline": 8.0, "scratch, hfdtl": 9.0, "boosting": 10.0},
        ("b", 50): {"ours, roofline": 11.0, "scratch, roofline": 20.0, "scratch, hfdtl": 50.0, "boosting": 10.0},
    }
    for (target, n), methods in errors.items():
        for method, error in methods.items():
            row = {"store": "gpu_steps", "donors": "standard", "target": target, "seed": 0, "split": "s", "shift": True}
            row |= {"unlike": "B200" if target == "b" else "", "n": n, "method": method, "mape": error, "attainable": 10.0}
            rows.append(row)
    return pd.DataFrame(rows)


def test_ratio_is_to_the_best_alternative_of_each_target(scripts: tuple[ModuleType, ...]):
    transfer = scripts[2]
    found = transfer.against_best(scores()).set_index("target")
    assert found.loc["a", "ratio"] == pytest.approx(5 / 4)  # zero-shot was better
    assert found.loc["a", "best"] == "zero-shot"
    assert found.loc["b", "ratio"] == pytest.approx(1.1)
    assert found.loc["b", "best"] == "boosting"
    summary = transfer.never_worse(scores()).loc[("s", 50)]
    assert summary["targets"] == 2
    assert summary["within 1.1"] == "50%"
    assert summary["worst target"] == "a"


def test_requirements_are_judged_by_median_and_worst(scripts: tuple[ModuleType, ...]):
    found = scripts[2].requirements(scores()).set_index("what")
    assert found.loc["50 rows, s", ["median", "worst", "met"]].tolist() == [8.0, 11.0, "no"]
    better = scores().assign(mape=1.0)
    assert scripts[2].requirements(better).set_index("what").loc["50 rows, s", "met"] == "yes"


def test_verdicts_are_counted_by_what_was_true(scripts: tuple[ModuleType, ...]):
    transfer = scripts[2]
    assert [transfer.truth(e) for e in (12.5, 12.0, 8.0, 7.9)] == ["> 12 %", "between", "between", "< 8 %"]
    results = scores()
    ours = (results["method"] == "ours, roofline") & (results["n"] == 50)
    results.loc[ours, "verdict_test"] = ["accept", "collect_more"]
    found = transfer.confusion(results, "test")
    assert found.loc[("shifts", "< 8 %"), ["accept", "not accepted"]].tolist() == [1, 0.0]
    assert found.loc[("shifts", "between"), ["accept", "not accepted"]].tolist() == [0, 100.0]
    assert transfer.confusion(results, "own").empty


def test_coverage_and_attainable_tables(scripts: tuple[ModuleType, ...]):
    transfer, results = scripts[2], scores()
    ours = (results["method"] == "ours, roofline") & (results["n"] == 50)
    results["coverage"] = results["block_coverage"] = results["uncertainty"] = np.nan
    results.loc[ours, ["coverage", "block_coverage", "uncertainty"]] = [[0.95, 1.0, 0.02], [0.85, 0.5, 0.04]]
    found = transfer.intervals(results).loc[("s", "ours, roofline", 50)]
    assert found.tolist() == [90.0, 75.0, 50.0, 50.0, 85.0, 3.0]
    cells = transfer.attained(results)
    assert cells.loc[("s", "ours, roofline"), 50] == "0.80 (1.10), 2/2"
    assert cells.loc[("s", "scratch, hfdtl"), 50] == "2.95 (5.00), 1/2"
    kinds = transfer.unlike_donors(results).loc[("s", 50)]
    assert kinds["ratio"] == pytest.approx(2.2)
    assert transfer.accuracy(results).loc[("s", "ours, roofline"), 50] == "8 (10, 11)"
