"""The benchmark's own logic: what it says of two samples, and what it makes of a store."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hfdtl_bayes.traces import TraceStore

FOLDER = Path(__file__).parents[1] / "benchmarks"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


inference, methods = loaded("inference"), loaded("inference_methods")


def sample(seed: int, mean: float = 0.0, sd: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"beta": mean + sd * rng.standard_normal((4, 1000, 3)), "theta": rng.standard_normal((4, 1000, 2, 5))}


def test_samples_of_one_distribution_differ_by_monte_carlo_error():
    found = inference.agreement(sample(1), sample(2))
    # 13 parameters; a normal exceeds 4 once in 16,000.
    assert 0.5 < found["z mean"] < 4
    assert 0.5 < found["z sd"] < 4
    assert found["mean coefficients"] < 0.1
    assert found["sd coefficients"] < 0.1


def test_a_shift_and_a_stretch_are_measured_in_posterior_sds():
    shifted = inference.agreement(sample(1, mean=6.0, sd=2.0), sample(2, mean=5.0, sd=2.0))
    assert shifted["mean population"] == pytest.approx(0.5, abs=0.1)
    assert shifted["z mean"] > 10
    stretched = inference.agreement(sample(1, sd=1.5), sample(2))
    assert stretched["sd population"] == pytest.approx(0.5, abs=0.1)
    assert stretched["z sd"] > 10


def test_point_estimates_have_a_distance_but_no_error():
    found = inference.agreement({"beta": np.array([0.0, 2.0, 0.0])}, sample(2))
    assert set(found) == {"mean population"}
    assert found["mean population"] == pytest.approx(2.0, abs=0.15)


def test_variables_that_one_side_lacks_are_left_out():
    found = inference.agreement({"theta": sample(1)["theta"]}, sample(2))
    assert not [name for name in found if "population" in name or "group" in name]


def test_nested_intervals_count_once():
    assert methods.covered([(0.0, 3.0), (1.0, 2.0), (5.0, 6.0), (2.5, 4.0)]) == pytest.approx(5.0)
    assert methods.covered([]) == 0.0


def test_a_process_is_measured_and_stopped_at_the_limit():
    busy = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    usage = inference.measured([sys.executable, "-c", busy], 60)
    assert usage.cpu >= 0.3
    assert usage.wall >= 0.3
    assert not usage.stopped
    stopped = inference.measured([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    assert stopped.stopped
    assert stopped.wall < 60
    failed = inference.measured([sys.executable, "-c", "raise SystemExit('no luck')"], 60)
    assert failed.code == 1
    assert "no luck" in failed.errors


def test_store_holds_resampled_batches_with_fresh_noise(shared_data: Path, tmp_path: Path):
    inference.make_store(shared_data / "gpu_steps", tmp_path / "a", 400, seed=1)
    inference.make_store(shared_data / "gpu_steps", tmp_path / "b", 400, seed=2)
    store = TraceStore(tmp_path / "a")
    assert sorted(store.config_ids) == sorted(inference.DONORS)
    source = TraceStore(shared_data / "gpu_steps")
    for c in inference.DONORS:
        table = store.steps(c)
        assert len(table.frame) == 400
        assert not len(table.rejected)
        known = set(source.steps(c).frame["context_tokens"])
        assert set(table.frame["context_tokens"]) <= known
    other = TraceStore(tmp_path / "b").steps(inference.DONORS[0]).frame
    assert not np.array_equal(other["step_time_s"], store.steps(inference.DONORS[0]).frame["step_time_s"])
