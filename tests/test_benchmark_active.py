"""The benchmark of active learning: pools and mixes that do not meet, rules that choose as they say, tables that count right."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from hfdtl_bayes.design import Acquisition, select_rows
from hfdtl_bayes.traces import TraceStore, drop_warmup, time_blocks
from hfdtl_bayes.transfer.calibration import calibrate_by_statistics

FOLDER = Path(__file__).parents[1] / "benchmarks"
GPU_TARGET, ENGINE_TARGET = "qwen3-8b_h100-sxm_tp1_vllm0.24.0", "c02_llama-s_seqs8"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """The benchmark and its tables, which import each other by name as scripts do."""
    sys.path.insert(0, str(FOLDER))
    yield import_module("active"), import_module("active_tables")
    sys.path.remove(str(FOLDER))


def scores(rows: list[tuple[object, ...]], **more: object) -> pd.DataFrame:
    """A table of scores: rule, target, seed, draw, n, mape; 0.1 s a row."""
    frame = pd.DataFrame(rows, columns=["rule", "target", "seed", "draw", "n", "mape"])
    common = {
        "store": "gpu_steps",
        "features": "roofline",
        "every_rule": True,
        "scenario": "shift",
        "reach": 0.9,
        "expected": 1.0,
    }
    return frame.assign(**{**common, "gpu_s": 0.1 * frame["n"], **more})


# --- what is chosen from what ------------------------------------------------------------------------------------------------


def test_no_row_of_a_mix_can_be_chosen(scripts: tuple[ModuleType, ModuleType], shared_data: Path):
    active, _ = scripts
    for name, target, names in (
        ("gpu_steps", GPU_TARGET, 5),
        ("vllm_cpu", ENGINE_TARGET, 3),
    ):
        frame = drop_warmup(TraceStore(shared_data / name).steps(target).frame)
        made = active.scenarios(name, frame, 1)
        assert len(made) == names
        for split in made:
            assert not set(split.pool.index) & set(split.test.index), split.name
            pools = [active.drawn_pool(split.pool, s, whole_blocks=name == "vllm_cpu") for s in (0, 1)]
            assert not pools[0].index.equals(pools[1].index), split.name
            for pool in pools:
                assert set(pool.index) <= set(split.pool.index)
                assert len(pool) >= active.MOST
                assert len(pool) == pytest.approx(max(0.7 * len(split.pool), active.MOST), abs=20)
                if name == "vllm_cpu":
                    blocks = pd.Series(time_blocks(split.pool, 20), index=split.pool.index)
                    kept = blocks[pool.index]
                    assert kept.value_counts().to_dict() == blocks[blocks.isin(kept)].value_counts().to_dict()
    heavy = made[-1]
    assert heavy.name == "all traffic to high load"
    assert heavy.test["regime"].map(active.load).min() >= active.HEAVY_LOAD


def test_rules_choose_what_the_package_chooses_and_scores_are_of_the_first_rows(
    scripts: tuple[ModuleType, ModuleType], shared_data: Path, monkeypatch: pytest.MonkeyPatch
):
    active, _ = scripts
    monkeypatch.setattr(active, "MOST", 30)
    monkeypatch.setattr(active, "COUNTS", (10, 30))
    store = TraceStore(shared_data / "vllm_cpu")
    donors, own = active.fitted_donors(str(shared_data / "vllm_cpu"), "roofline"), store.configuration(ENGINE_TARGET)
    split = active.scenarios("vllm_cpu", drop_warmup(store.steps(ENGINE_TARGET).frame), 0)[1]
    pool = split.pool.iloc[::4]
    goal = active.chosen(active.Rule(Acquisition.DEPLOYMENT), donors, pool, split.test, own, 0)
    same = select_rows(donors, pool, own, 30, deployment=split.test, settings=active.SETTINGS)
    assert pool.index[goal.rows].tolist() == same.index.tolist()
    curve = active.curve(goal, donors, pool, split.test, own, 0)
    assert [c["n"] for c in curve] == [10, 30]
    first = pool.iloc[np.sort(goal.rows[:10])]
    assert curve[0]["gpu_s"] == pytest.approx(first["step_time_s"].sum())
    assert curve[0]["expected"] == pytest.approx(100 * same.expected_mape[10])
    fit = calibrate_by_statistics(donors, first, own, engine="conditional")
    assert curve[0]["mape"] == pytest.approx(active.mape(fit.expected_s(split.test, own), split.test))
    # The residual rule: ten at random, then the largest residuals of a fit to these.
    naive = active.chosen(active.Rule(Acquisition.RESIDUAL), donors, pool, split.test, own, 0)
    assert len(set(naive.rows)) == 30
    assert np.isnan(naive.expected_mape).all()
    fit = calibrate_by_statistics(donors, pool.iloc[np.sort(naive.rows[:10])], own, engine="conditional")
    residuals = np.abs(pool["step_time_s"].to_numpy() - fit.expected_s(pool, own))
    left = np.delete(residuals, naive.rows)
    assert residuals[naive.rows[10:]].min() >= left.max()
    names = [r.name for r in active.RULES]
    assert len(set(names)) == len(names)
    assert [r.name for r in active.ASKED] == ["deployment", "random", "residual"]


def test_cases_come_seed_by_seed_and_none_is_run_twice(
    scripts: tuple[ModuleType, ModuleType], shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    active, _ = scripts
    cases = active.cases_of([shared_data / "vllm_cpu"], 3, 2, "roofline", quick=False)
    assert [(c.seed, c.every_rule) for c in cases] == [(0, True)] * 3 + [(1, False)] * 3
    assert not active.cases_of([shared_data / "vllm_cpu"], None, 2, "roofline", quick=True)[0].every_rule
    done = pd.DataFrame([{**dict(zip(active.KEY, c.key, strict=True)), "mape": 1.0} for c in cases])
    done.to_csv(tmp_path / "done.csv", index=False)
    monkeypatch.setattr(active, "fitted_donors", None)
    assert len(active.run(cases, 1, tmp_path / "done.csv")) == len(cases)


# --- tables ------------------------------------------------------------------------------------------------------------------


def test_typical_is_the_median_over_targets_of_means(scripts: tuple[ModuleType, ModuleType]):
    _, tables = scripts
    rows = [("random", t, s, d, 50, m + 0.1 * (2 * s - 1) + 0.01 * (2 * d - 1)) for t, m in (("a", 1), ("b", 2), ("c", 9))
            for s in (0, 1) for d in (0, 1)]  # fmt: skip
    values = tables.matrix(scores(rows)).copy()
    np.testing.assert_allclose(values, [[0.9, 1.1], [1.9, 2.1], [8.9, 9.1]])
    assert tables.typical(values) == pytest.approx(2)
    medians = tables.resampled(values)
    # Of three targets drawn with replacement the median is each with its chance: 7/27, 13/27, 7/27.
    for target, chance in ((1, 7), (2, 13), (9, 7)):
        assert np.mean(np.abs(medians - target) < 0.5) == pytest.approx(chance / 27, abs=0.08)
    values[2, 1] = np.nan
    assert tables.typical(values[2:]) == pytest.approx(8.9)
    assert np.isfinite(tables.resampled(values)).all()


def test_crossings_are_straight_in_logarithms(scripts: tuple[ModuleType, ModuleType]):
    _, tables = scripts
    n, errors = np.array([10, 40, 160]), np.array([4.0, 2.0, 1.0])
    assert tables.crossing(n, errors, 2.0) == pytest.approx(40)
    assert tables.crossing(n, errors, np.sqrt(2)) == pytest.approx(80)
    assert tables.crossing(n, errors, 5.0) == 10
    assert tables.crossing(n, errors, 0.9) == float("inf")


def curves(goal: float, residual: float, targets: int = 8) -> pd.DataFrame:
    """Random errors 10 / sqrt(n); those of the others by a factor; 5 % noise between draws."""
    rng = np.random.default_rng(1)
    rows = [
        (rule, f"t{t}", s, d, n, factor * 10 / np.sqrt(n) * np.exp(0.05 * rng.standard_normal()))
        for rule, factor in (("deployment", goal), ("random", 1.0), ("residual", residual))
        for t in range(targets)
        for s in (0, 1)
        for d in (range(4) if rule == "random" else (0,))
        for n in (10, 25, 50, 100, 200)
    ]
    return scores(rows)


def test_what_is_asked_is_met_or_not(scripts: tuple[ModuleType, ModuleType]):
    _, tables = scripts
    good, bad = (tables.asked(curves(f, 3.0)).set_index("pool to mix").loc["shift"] for f in (0.45, 0.6))
    assert (good["met"], bad["met"]) == ("yes", "no")
    assert (good["targets"], good["residual worse"], good["deployment worse"]) == (8, "8/8", "0/8")
    # Half of random's error at 200 rows is what 50 random rows have; f times the error needs f^2 times the rows.
    assert float(good["rows needed"]) == pytest.approx(200 * 0.45**2, rel=0.15)
    assert float(bad["rows needed"]) == pytest.approx(200 * 0.6**2, rel=0.15)
    assert tables.asked(curves(1.5, 3.0)).set_index("pool to mix").loc["shift", "rows needed"] == "> 200"
    far = tables.asked(curves(0.45, 3.0).assign(reach=0.2))
    assert far["pool to mix"].tolist() == ["shift", "all"]
    needed = tables.needed(curves(0.5, 3.0)).set_index("rule")
    assert float(needed.loc["deployment", "rows"]) == pytest.approx(50, rel=0.15)
    assert float(needed.loc["deployment", "seconds, % of random's"]) == pytest.approx(25, rel=0.15)
    assert needed.loc["residual", "rows"] == "> 200"


def test_worse_than_random_is_beyond_noise(scripts: tuple[ModuleType, ModuleType]):
    _, tables = scripts
    equal = tables.against_random(curves(1.0, 1.0, targets=400), "deployment", 50)
    assert len(equal) == 400
    assert (equal["z"] > tables.WORSE).mean() == pytest.approx(0.023, abs=0.02)
    assert equal["z"].std() == pytest.approx(1, abs=0.1)
    frame = curves(0.5, 3.0)
    worst = (frame["rule"] == "deployment") & (frame["target"] == "t3")
    frame.loc[worst, "mape"] *= 3
    found = tables.worse(frame)
    assert set(found["target"]) == {"t3"}
    assert found["n"].tolist() == [50, 200]
    assert found["ratio"].to_numpy() == pytest.approx(1.5, rel=0.1)
    # With one seed a rule is taken to vary as random rows do, so the same holds.
    one = tables.worse(frame[frame["seed"] == 0])
    assert set(one["target"]) == {"t3"}


def test_scores_at_the_seconds_of_random_rows(scripts: tuple[ModuleType, ModuleType]):
    _, tables = scripts
    rows = [("random", "a", 0, 0, n, 10 / np.sqrt(n)) for n in (10, 40, 160)]
    rows += [("deployment", "a", 0, 0, n, 10 / np.sqrt(n)) for n in (10, 40, 160)]
    frame = scores(rows)
    frame.loc[frame["rule"] == "deployment", "gpu_s"] *= 4
    found = tables.at_seconds(frame).set_index(["rule", "n"])["mape"]
    np.testing.assert_allclose(found["random"], [10 / np.sqrt(n) for n in (10, 40, 160)])
    # At four times the seconds a row, as many seconds are a quarter of the rows; below the first count, the error there.
    np.testing.assert_allclose(found["deployment"], [10 / np.sqrt(n) for n in (10, 10, 40)])


def test_the_report_has_every_table(scripts: tuple[ModuleType, ModuleType]):
    _, tables = scripts
    text = tables.report(curves(1.3, 3.0))
    assert text.count("\n## ") + 1 == 6
    assert "## gpu_steps, roofline: what is asked, MAPE on the deployment mix in %, 8 targets, 2 seed(s)" in text
