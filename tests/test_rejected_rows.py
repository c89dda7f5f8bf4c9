"""Rows that are set aside are seen and kept wherever traces are read: in Python, by the commands, the demo and the scripts."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cli_runs import FEW_DRAWS, STORE, chain, done

import hfdtl_bayes.sample
from hfdtl_bayes.cli.demo import run_demo
from hfdtl_bayes.errors import RejectedRowsWarning
from hfdtl_bayes.model import SamplerSettings
from hfdtl_bayes.sample import DONORS, TARGET
from hfdtl_bayes.traces import TraceStore
from hfdtl_bayes.transfer import fit_donors, read_trace

FEW = SamplerSettings(draws=100, tune=150, chains=2)
MODELS = Path(__file__).resolve().parents[1] / "models"


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample with three bad steps of a donor, two bad steps and one bad request of the target, all at the end."""
    store = tmp_path_factory.mktemp("spoilt") / "store"
    shutil.copytree(STORE, store)
    for config_id, table, column, rows in (
        (DONORS[0], "steps", "step_time_s", 3),
        (TARGET, "steps", "decode_tokens", 2),
        (TARGET, "requests", "queued_s", 1),
    ):
        path = store / config_id / f"{table}.parquet"
        frame = pd.read_parquet(path)
        frame.loc[frame.index[-rows:], column] = np.nan
        frame.to_parquet(path)
    return store


def kept(folder: Path) -> dict[str, int]:
    """Return the rows of each file of rejected rows."""
    return {p.name: len(pd.read_csv(p)) for p in folder.glob("*.rejected.csv")}


DONOR_STEPS, TARGET_STEPS = f"{DONORS[0]}.steps.rejected.csv", f"{TARGET}.steps.rejected.csv"
TARGET_REQUESTS = f"{TARGET}.requests.rejected.csv"


# In Python


def test_donors_with_rejected_rows_are_warned_of_once_each(spoilt: Path) -> None:
    store = TraceStore(spoilt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_donors(store, DONORS[:2], "blis-blackbox", settings=FEW, show_progress=False)
    (found,) = [w for w in caught if issubclass(w.category, RejectedRowsWarning)]
    assert str(found.message) == store.steps(DONORS[0]).summary()
    assert "3 row(s): step_time_s is missing" in str(found.message)
    assert found.filename == __file__, "the warning points into the package, not at its caller"


def test_each_quantity_warns_of_the_table_it_is_observed_in(spoilt: Path) -> None:
    store = TraceStore(spoilt)
    for quantity, table in (("step_time", store.steps(TARGET)), ("queue_delay", store.requests(TARGET))):
        with pytest.warns(RejectedRowsWarning) as caught:
            read_trace(store, TARGET, quantity)
        assert [str(w.message) for w in caught] == [table.summary()]


def test_clean_traces_give_no_warning() -> None:
    # pytest turns a warning into an error.
    assert read_trace(TraceStore(STORE), TARGET, "step_time").rejected.empty


# By the commands


def test_the_command_shows_them_once(spoilt: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        words = ("--features", "blis-blackbox", "--json", *FEW_DRAWS)
        fitted = done("fit", spoilt, "--donors", DONORS[0], "--out", tmp_path / "donor.nc", *words)
    assert not [w for w in caught if issubclass(w.category, RejectedRowsWarning)]
    assert fitted.err.count(TraceStore(spoilt).steps(DONORS[0]).summary()) == 1
    assert fitted.json["rejected_rows"] == 3
    assert kept(tmp_path) == {DONOR_STEPS: 3}


@pytest.mark.parametrize("given", ["store", "traffic"])
def test_an_export_counts_and_keeps_them(spoilt: Path, tmp_path: Path, given: str) -> None:
    traces = ("--store", spoilt) if given == "store" else ("--traffic", spoilt / TARGET / "steps.parquet")
    out = tmp_path / "flags.txt"
    exported = done("export", chain().target, "--format", "blis-flags", "--out", out, "--json", *traces)
    expected = {TARGET_STEPS: 2, TARGET_REQUESTS: 1} if given == "store" else {TARGET_STEPS: 2}
    assert exported.json["rejected_rows"] == sum(expected.values())
    assert sorted(exported.json["rejected_files"]) == sorted(str(tmp_path / name) for name in expected)
    assert kept(tmp_path) == expected


def test_an_export_without_traces_has_none(tmp_path: Path) -> None:
    exported = done("export", chain().target, "--format", "blis-flags", "--out", tmp_path / "flags.txt", "--json")
    assert (exported.json["rejected_rows"], exported.json["rejected_files"]) == (0, [])


@pytest.mark.parametrize(
    "words", [("export", "--format", "blis-flags", "--store"), ("verdict", "--bootstrap", "50")], ids=["export", "verdict"]
)
def test_a_command_without_an_output_file_says_that_it_keeps_none(
    spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *options = words
    ran = done(command, chain().target, *options, spoilt, "--json")
    assert ran.json["rejected_rows"] == (3 if command == "export" else 2)
    assert ran.json["rejected_files"] == []
    assert f"2 rejected row(s) of {spoilt / TARGET / 'steps.parquet'} are not written" in ran.err
    assert list(tmp_path.iterdir()) == []


# By the demo


def test_the_demo_shows_and_keeps_them(
    spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hfdtl_bayes.sample, "sample_store_path", lambda: spoilt)
    result = run_demo(tmp_path / "demo", settings=FEW, show_progress=False)
    shown = capsys.readouterr().err
    store = TraceStore(spoilt)
    for table in (store.steps(DONORS[0]), store.steps(TARGET), store.requests(TARGET)):
        assert shown.count(table.summary()) == 1
    assert kept(result.out) == {DONOR_STEPS: 3, TARGET_STEPS: 2, TARGET_REQUESTS: 1}
    found = json.loads((result.out / "results.json").read_text())
    assert found["rejected_rows"] == result.rejected_rows == 6
    assert {Path(p).name for p in found["rejected_files"]} == set(kept(result.out))
    assert "rows of the recordings that were set aside" in (result.out / "summary.html").read_text()


# By the scripts


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("donors.py", {DONOR_STEPS: 3}),
        ("target.py", {DONOR_STEPS: 3, TARGET_STEPS: 2, TARGET_REQUESTS: 1}),
        ("queue_delay.py", {TARGET_REQUESTS: 1}),
    ],
)
def test_a_script_shows_and_keeps_them(
    spoilt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    expected: dict[str, int],
) -> None:
    monkeypatch.setattr(sys, "argv", [script, str(spoilt), "--out", str(tmp_path), "--draws", "100"])
    runpy.run_path(str(MODELS / script), run_name="__main__")
    told = capsys.readouterr().out
    assert kept(tmp_path) == expected
    store = TraceStore(spoilt)
    for name in expected:
        config_id, table = name.split(".")[:2]
        summary = store.steps(config_id).summary() if table == "steps" else store.requests(config_id).summary()
        assert told.count(summary) == 1
