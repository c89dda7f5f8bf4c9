"""The scripts of models/: each runs on the embedded sample from a clone, writes what it says, and stays short."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.sample import DONORS, TARGET

MODELS = Path(__file__).resolve().parents[1] / "models"
SCRIPTS = sorted(p.name for p in MODELS.glob("*.py"))


def tell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, *words: object) -> str:
    """Run a script as a user would, in this process; returns what it prints."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    runpy.run_path(str(MODELS / script), run_name="__main__")
    return capsys.readouterr().out


def test_the_three_stories_are_there():
    assert {"donors.py", "target.py", "queue_delay.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_story_is_short_and_explains_itself(script: str):
    assert len((MODELS / script).read_text().splitlines()) < 100
    ran = subprocess.run([sys.executable, MODELS / script, "--help"], capture_output=True, text=True, check=True)
    for option in ("--donors", "--out", "--draws", "--seed"):
        assert option in ran.stdout
    assert f"python models/{script}" in ran.stdout


def test_donors_then_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    said = tell(monkeypatch, capsys, "donors.py", "--out", tmp_path / "donors", "--draws", 100)
    saved = LatencyPosterior.load(tmp_path / "donors" / "posterior.nc")
    assert saved.donors == DONORS
    for feature in saved.feature_set.features:
        assert feature.prior_sentence() in said
    table = pd.read_csv(tmp_path / "donors" / "coefficients.csv")
    assert set(table["config"]) == {"population", *DONORS}

    words = ("--posterior", tmp_path / "donors" / "posterior.nc", "--out", tmp_path / "target", "--draws", 100)
    said = tell(monkeypatch, capsys, "target.py", *words)
    target = LatencyPosterior.load(tmp_path / "target" / "posterior.nc")
    assert target.target == TARGET
    assert len(target.calibration_rows) == 300
    assert "zero-shot:" in said
    assert "calibrated on 300 rows" in said
    assert f"{TARGET}: " in said
    coefficients = yaml.safe_load((tmp_path / "target" / "blis.yaml").read_text())["trained_physics_coefficients"]
    assert ",".join(str(v) for v in coefficients["alpha_coeffs"]) in said


def test_queue_delay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    said = tell(monkeypatch, capsys, "queue_delay.py", "--out", tmp_path, "--draws", 50)
    for quantity in ("queue_delay", "api_delay"):
        saved = LatencyPosterior.load(tmp_path / f"{quantity}.nc")
        assert saved.feature_set.quantity == quantity
        assert saved.target == TARGET
    # 117 of the target's requests find no slot, 16 of them in the regime calibrated on.
    assert "35% of 331 requests find no free slot; that tells who waits longer than a step (28 ms) in 100.0% of cases" in said
    assert "zero-shot: queue_delay of c09_llama-m_base: who waits is told rightly for 100.0% of 283 requests" in said
    assert "48 journeys, 16 fitted: queue_delay of c09_llama-m_base" in said
    waiting = LatencyPosterior.load(tmp_path / "queue_delay.nc")
    depth = waiting.coefficient_table().query("config == @TARGET and feature == 'queue_depth'")
    assert (depth["q2.5"] > 0).all()


@pytest.mark.slow
def test_likelihoods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    words = ("--donors", DONORS[0], "--rows", 300, "--likelihoods", "gaussian,student_t", "--out", tmp_path, "--draws", 200)
    said = tell(monkeypatch, capsys, "likelihoods.py", *words)
    table = pd.read_csv(tmp_path / "likelihoods.csv", index_col="likelihood")
    assert set(table.index) == {"gaussian", "student_t"}
    best = table["elpd"].idxmax()
    assert table.loc[best, "behind"] == 0
    saved = LatencyPosterior.load(tmp_path / "posterior.nc")
    assert saved.likelihood == best
    # Steps on a shared CPU have heavy tails.
    assert best == "student_t"
    lost = table.loc["gaussian", "behind"]
    assert f"The Gaussian is {lost:.0f} nats behind student_t" in said
    (seen,) = saved.rows
    assert str(seen) in said
    assert len(seen.observed) <= 300 < seen.available_rows


def test_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    said = tell(monkeypatch, capsys, "stream.py", "--out", tmp_path, "--draws", 50, "--chunk", 200, "--every", 3)
    saved = LatencyPosterior.load(tmp_path / "posterior.nc")
    assert saved.target == TARGET
    own = saved.statistics[-1]
    assert own.rows == len(saved.calibration_rows)
    assert "zero-shot, the slowest step of the recording:" in said
    assert f"{own.rows:5d} steps, " in said
    assert "without " in said


def test_closed_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    words = ("--out", tmp_path, "--draws", 200, "--most", 2)
    said = tell(monkeypatch, capsys, "closed_loop.py", *words)
    saved = LatencyPosterior.load(tmp_path / "posterior.nc")
    assert saved.target == TARGET
    assert "vllm bench serve --host 127.0.0.1" in said
    assert "the deployment mix is expected to be off by" in said
    assert f"{TARGET}: " in said


def test_leave_one_donor_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    words = ("--donors", ",".join(DONORS[:2]), "--rows", "0,50", "--out", tmp_path, "--draws", 150)
    said = tell(monkeypatch, capsys, "leave_one_donor_out.py", *words)
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert list(scores["rows"]) == [0, 50] * 2
    assert list(scores["config"].unique()) == list(DONORS[:2])
    assert "leaving out configuration: zero-shot: MAPE of a new configuration" in said
    assert "from 2 left-out configurations" in said
    assert (tmp_path / "learning_curve.svg").read_text().count("<svg") == 1


def test_residual_discovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    words = ("--donors", TARGET, "--features", "blis-blackbox", "--max-terms", 1, "--out", tmp_path, "--draws", 100)
    said = tell(monkeypatch, capsys, "residual_discovery.py", *words)
    found = json.loads((tmp_path / "discovery.json").read_text())
    assert "prompts" in found["tested"]
    assert all(sentence in said for sentence in found["sentences"])
    # Three coefficients cannot describe these steps.
    (term,) = found["terms"]
    saved = LatencyPosterior.load(tmp_path / "posterior.nc")
    assert saved.feature_set.coef_names[-1] == term["name"]
    assert term["gain"]["points"] > 0
