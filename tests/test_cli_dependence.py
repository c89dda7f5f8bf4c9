"""Outliers, block length and what rows are worth, as `fit` and `calibrate` take and tell them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import FEW_DRAWS, STORE, chain, done, run

from hfdtl_bayes import LatencyPosterior, TraceStore, usable_rows
from hfdtl_bayes.cli import options
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.sample import DONORS, TARGET
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH, OUTLIER_CUTOFFS, statistics_from_rows


def statistics_of(config_id: str, **settings: Any):
    store, features = TraceStore(STORE), feature_set("roofline", "step_time")
    own = store.configuration(config_id)
    return statistics_from_rows(usable_rows(store.steps(config_id).frame, own, features), own, features, **settings)


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Donors fitted with a low cutoff and block length auto."""
    path = tmp_path_factory.mktemp("robust") / "donors.nc"
    chosen = ("--outlier-cutoff", 3, "--block-length", "auto", "--json", *FEW_DRAWS)
    ran = done("fit", STORE, "--donors", ",".join(DONORS), "--out", path, *chosen)
    path.with_suffix(".json").write_text(ran.out)
    return path


def test_cutoff_and_block_length_reach_the_statistics_and_the_result(robust: Path):
    result = json.loads(robust.with_suffix(".json").read_text())
    posterior = LatencyPosterior.load(robust)
    for own in posterior.statistics:
        expected = statistics_of(own.config_id, outlier_cutoff=3.0, block_length="auto")
        assert own.scaling.difference(expected.scaling) is None
        assert own.block_length == expected.block_length
        told = result["downweighted"][own.config_id]
        assert told["rows"] == expected.downweighted.rows > 0
        assert told["excess_s"] == pytest.approx(expected.downweighted.excess_s)
        assert told["total_s"] == pytest.approx(expected.total_s)
        assert [tuple(r) for r in told["by_regime"]] == list(expected.downweighted.by_regime)
        assert result["outlier_cutoff"][own.config_id] == 3.0
    worth = {e["config_id"]: e for e in result["effective_rows"]}
    for c, own in enumerate(posterior.statistics):
        sigma, omega = (posterior.draws_of(name)[:, c] for name in ("sigma", "omega"))
        # Blocks are nearly all whole, so the formula of equal blocks is near.
        m = own.rows / own.blocks
        near = own.rows * np.mean((sigma**2 + omega**2) / (sigma**2 + m * omega**2))
        assert worth[own.config_id]["level"] == pytest.approx(near, rel=0.15)
        assert worth[own.config_id]["block_length"] == own.block_length


def test_a_target_takes_the_cutoff_of_its_donors_and_says_what_counts_for_less(robust: Path, tmp_path: Path):
    ran = done("calibrate", robust, STORE, "--config", TARGET, "--out", tmp_path / "t.nc", *FEW_DRAWS)
    own = LatencyPosterior.load(tmp_path / "t.nc").statistics[-1]
    assert own.scaling.cutoff == 3.0
    assert own.block_length == DEFAULT_BLOCK_LENGTH
    assert own.downweighted.rows > 0
    assert f"{TARGET}: {own.downweighted.rows:,} of {own.rows:,} rows lie beyond 3 robust sds and count for less (" in ran.out
    assert f"{TARGET}: {own.rows:,} rows in {own.blocks:,} time blocks are worth " in ran.out


@cache
def default_fit() -> dict[str, Any]:
    return chain().fitted.json


def test_by_default_the_settings_are_those_of_the_package():
    assert int(options.BLOCK_LENGTH) == DEFAULT_BLOCK_LENGTH
    assert set(default_fit()["outlier_cutoff"].values()) == {OUTLIER_CUTOFFS["step_time"]} == {8.0}
    for config_id in DONORS:
        expected = statistics_of(config_id)
        assert default_fit()["downweighted"][config_id]["rows"] == expected.downweighted.rows
        assert {e["config_id"]: e["blocks"] for e in default_fit()["effective_rows"]}[config_id] == expected.blocks


@pytest.mark.parametrize("value", ["x", "0", "-5", "2.5", ""])
def test_a_block_length_that_is_none_is_refused(value: str, tmp_path: Path):
    ran = run("fit", STORE, "--donors", DONORS[0], "--out", tmp_path / "d.nc", "--block-length", value)
    assert ran.code == 2
    assert f"--block-length takes auto or a whole number of steps from 1, found {value!r}" in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["1", "0.5", "nan"])
def test_a_cutoff_within_the_bulk_is_refused(value: str, tmp_path: Path):
    ran = run("fit", STORE, "--donors", DONORS[0], "--out", tmp_path / "d.nc", "--outlier-cutoff", value)
    assert ran.code == 2
    assert "the outlier cutoff must be above 1 robust sd, found" in ran.err
