"""Recorded engines replayed by an ensemble calibrated on low load only: the benchmark, on three of its nine targets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from hfdtl_bayes import sample
from hfdtl_bayes.traces import TraceStore
from hfdtl_bayes.transfer import fit_donors

FOLDER = Path(__file__).parents[1] / "benchmarks"
TARGETS = ("c04_llama-s_mbt256", "c05_llama-s_nochunk", "c07_llama-s_fp32")
DRAWS = 40


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield import_module("end_to_end")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def judged(script: ModuleType, shared_data: Path) -> pd.DataFrame:
    store = TraceStore(shared_data / "vllm_cpu")
    donors = fit_donors(store, sample.DONORS, show_progress=False)
    return pd.concat([script.judge(store, t, donors, DRAWS, False, 0) for t in TARGETS], ignore_index=True)


def median_error(rows: pd.DataFrame, column: str, phases: tuple[str, ...]) -> dict[str, float]:
    own = rows[rows["phase"].isin(phases)]
    return (own[column] / own["observed"] - 1).abs().groupby(own["metric"]).median().to_dict()


@pytest.mark.slow
def test_low_load_is_simulated_within_the_requirement(judged: pd.DataFrame) -> None:
    error = median_error(judged, "at_mean", ("load0.15", "load0.5"))
    assert error["ttft_mean_s"] <= 0.08
    assert error["itl_mean_s"] <= 0.07
    assert error["e2e_mean_s"] <= 0.07


@pytest.mark.slow
def test_what_is_wrong_at_high_load_is_the_speed_of_the_machine(judged: pd.DataFrame) -> None:
    # With the speed that each phase was recorded at, the scheduler and the shape of the step time are what is left.
    error = median_error(judged, "own_speed", ("load0.85", "load1.2"))
    assert error["ttft_mean_s"] <= 0.10
    assert error["itl_mean_s"] <= 0.06
    assert error["e2e_mean_s"] <= 0.06


@pytest.mark.slow
def test_intervals_cover_the_phase_means_saturation_included(judged: pd.DataFrame) -> None:
    inside = (judged["observed"] >= judged["q2.5"]) & (judged["observed"] <= judged["q97.5"])
    assert inside.mean() >= 0.90
    # And are no wider than they need to be: at low load less than the mean itself.
    low = judged[judged["phase"].isin(["load0.15", "load0.5"])]
    assert ((low["q97.5"] - low["q2.5"]) / low["q50"]).median() < 0.6
