"""Statistics files: they come back exactly, say what they are of, and are added only to what they fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import xarray as xr
from cli_runs import FEW_DRAWS, STORE, done, run, steps_of
from simulation import THREE, tiny_features
from test_statistics_streaming import SCALING, assert_equal, recording

from hfdtl_bayes.errors import MissingInputError, StatisticsError
from hfdtl_bayes.features import register_feature_set
from hfdtl_bayes.sample import DONORS, TARGET
from hfdtl_bayes.statistics import (
    input_hash,
    merge_statistics,
    read_statistics,
    statistics_from_rows,
    write_statistics,
)

ONE = THREE[0]
FEATURES = register_feature_set(tiny_features("stored-tiny"), replace=True)


def make(path: Path, first: int = 0, last: int = 600, **options: object) -> Path:
    frame = recording(1, 600).iloc[first:last]
    options = {"scaling": SCALING, **options}
    write_statistics(path, statistics_from_rows(frame, ONE, FEATURES, **options), FEATURES)
    return path


def changed(path: Path, change: Callable[[dict], None]) -> Path:
    with xr.open_dataset(path, engine="h5netcdf") as opened:
        dataset = opened.load()
    header = json.loads(dataset.attrs["hfdtl_bayes_statistics"])
    change(header)
    dataset.attrs["hfdtl_bayes_statistics"] = json.dumps(header)
    dataset.to_netcdf(path, engine="h5netcdf")
    return path


def test_they_come_back_exactly_and_parts_add_up(tmp_path: Path) -> None:
    whole = statistics_from_rows(recording(1, 600), ONE, FEATURES, scaling=SCALING)
    parts = [make(tmp_path / f"{a}.nc", a, b) for a, b in ((0, 200), (200, 220), (220, 600))]
    read = [read_statistics(p) for p in parts]
    assert input_hash([read[1].statistics]) == input_hash(
        [statistics_from_rows(recording(1, 600).iloc[200:220], ONE, FEATURES, scaling=SCALING)]
    )
    assert read[0].units == {"prefill": "s/token", "decode": "s/token", "inverse_tp": "s", "constant": "s"}
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert_equal(merge_statistics([read[i] for i in order]), whole)
    write_statistics(tmp_path / "all.nc", merge_statistics(read), FEATURES)
    assert_equal(read_statistics(tmp_path / "all.nc").statistics, whole)


REFUSED = {
    "package versions": lambda h: h.update(package_version="0.0.9"),
    "units": lambda h: h["units"].update(decode="s/request"),
    "reference scales": lambda h: h["references"].update(decode=2e-4),
    "formula of decode": lambda h: h["fingerprint"].update(decode=[2 * v for v in h["fingerprint"]["decode"]]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_not_merged(tmp_path: Path, what: str) -> None:
    one, other = read_statistics(make(tmp_path / "a.nc", 0, 300)), read_statistics(make(tmp_path / "b.nc", 300, 600))
    header = {
        "package_version": other.package_version,
        "units": dict(other.units),
        "references": dict(other.references),
        "fingerprint": dict(other.fingerprint),
    }
    REFUSED[what](header)
    with pytest.raises(StatisticsError, match=rf"{what}.*[Mm]ake") as raised:
        merge_statistics([one, replace(other, **header)])
    assert "a.nc" in str(raised.value)
    assert "b.nc" in str(raised.value)


@pytest.mark.parametrize("what", [w for w in REFUSED if w != "package versions"])
def test_a_file_of_features_that_changed_since_is_refused(tmp_path: Path, what: str) -> None:
    path = changed(make(tmp_path / "a.nc"), REFUSED[what])
    with pytest.raises(StatisticsError, match=rf"a\.nc.*{what}.*again"):
        read_statistics(path)


def test_another_pilot_block_length_or_the_same_rows_are_refused(tmp_path: Path) -> None:
    one = read_statistics(make(tmp_path / "a.nc", 0, 300))
    for message, options in {
        r"row scale \(pilot\)": {"scaling": replace(SCALING, pilot=SCALING.pilot * 1.01)},
        "outlier cutoff": {"scaling": replace(SCALING, cutoff=5.0)},
        "block length": {"block_length": 10},
    }.items():
        other = read_statistics(make(tmp_path / "b.nc", 300, 600, **options))
        with pytest.raises(StatisticsError, match=rf"different {message}.*--pilot-from"):
            merge_statistics([one, other])
    with pytest.raises(StatisticsError, match="count twice"):
        merge_statistics([one, replace(one, source=tmp_path / "copy.nc")])
    with pytest.raises(StatisticsError, match="no statistics to merge"):
        merge_statistics([])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no statistics at"):
        read_statistics(tmp_path / "none.nc")
    path = make(tmp_path / "a.nc")
    content = path.read_bytes()
    for i, damage in enumerate((content[: len(content) // 2], b"", b"text")):
        (tmp_path / f"{i}.nc").write_bytes(damage)
        with pytest.raises(StatisticsError, match=r"cut short.*Make it again"):
            read_statistics(tmp_path / f"{i}.nc")
    with pytest.raises(StatisticsError, match="do not match their hash"):
        read_statistics(changed(make(tmp_path / "b.nc"), lambda h: h.update(hash="0")))
    with pytest.raises(StatisticsError, match="file format 99"):
        read_statistics(changed(make(tmp_path / "c.nc"), lambda h: h.update(format=99)))
    posterior = tmp_path / "other.nc"
    xr.Dataset({"x": 1.0}).to_netcdf(posterior, engine="h5netcdf")
    with pytest.raises(StatisticsError, match="another kind of file"):
        read_statistics(posterior)


def test_an_interruption_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a.nc", 0, 300)
    before = path.read_bytes()

    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(xr.Dataset, "to_netcdf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_traces_on_two_machines_reduce_merge_and_fit_without_them(tmp_path: Path) -> None:
    """Each half of a recording reduced where it lies, merged, and fitted from a store without traces: as from the traces."""
    config = DONORS[0]
    whole, store = steps_of(config), tmp_path / "store"
    half = len(whole) // 40 * 20
    for name, rows in (("first", whole.iloc[:half]), ("second", whole.iloc[half:])):
        shutil.copytree(STORE / config, tmp_path / name / config)
        rows.to_parquet(tmp_path / name / config / "steps.parquet", index=False)
    one, two, both = (tmp_path / f"{n}.nc" for n in ("one", "two", "both"))
    done("statistics", tmp_path / "first", "--config", config, "--out", one)
    made = done("statistics", tmp_path / "second", "--config", config, "--out", two, "--pilot-from", one, "--json").json
    merged = done("merge", one, two, "--out", both, "--json").json
    assert merged["rows"] == made["rows"] + read_statistics(one).statistics.rows
    assert merged["config"] == config
    for donor in DONORS:
        shutil.copytree(STORE / donor, store / donor, ignore=shutil.ignore_patterns("steps*") if donor == config else None)
    shutil.copy(both, store / config / "statistics.nc")
    fitted = done("fit", store, "--donors", ",".join(DONORS), "--out", tmp_path / "donors.nc", "--json", *FEW_DRAWS).json
    assert fitted["rows"][config] == merged["rows"]
    ran = run("fit", store, "--donors", ",".join(DONORS), "--features", "hfdtl", "--out", tmp_path / "x.nc")
    assert ran.code == 2
    assert "hfdtl" in ran.err
    ran = run("merge", one, one, "--out", tmp_path / "x.nc")
    assert ran.code == 2
    assert "count twice" in ran.err
    assert not (tmp_path / "x.nc").exists()
    ran = run("statistics", STORE, "--config", TARGET, "--out", tmp_path / "x.nc", "--pilot-from", one)
    assert ran.code == 2
    assert f"is of {config!r}" in ran.err


def test_arrow_and_memory_fit_and_calibrate_the_same(tmp_path: Path) -> None:
    """Small tables are sampled whole, so that even the pilot is the same."""
    results = {}
    for how in ("memory", "arrow"):
        out = tmp_path / f"{how}.nc"
        fitted = done("fit", STORE, "--donors", ",".join(DONORS), "--out", out, "--json", *FEW_DRAWS, "--engine-data", how).json
        words = ("--config", TARGET, "--out", tmp_path / f"t{how}.nc", "--json", *FEW_DRAWS, "--engine-data", how)
        calibrated = done("calibrate", out, STORE, *words).json
        results[how] = (fitted, calibrated)
    for one, other in zip(results["memory"], results["arrow"], strict=True):
        assert one["rows"] == other["rows"]
        assert one["rejected_rows"] == other["rejected_rows"]
        for a, b in zip(one["coefficients"], other["coefficients"], strict=True):
            assert a["mean"] == pytest.approx(b["mean"], rel=1e-4, abs=1e-12)
    ran = run("verdict", tmp_path / "tarrow.nc", STORE, "--config", TARGET)
    assert ran.code == 2
    assert "calibrated from statistics" in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine-data", "spark"), "known are memory, arrow, dask"),
        (("--engine-data", "dask"), "needs --scheduler"),
        (("--scheduler", "tcp://127.0.0.1:1"), "of no use"),
        (("--engine-data", "arrow", "--max-rows", "100"), "single rows"),
        (("--engine-data", "arrow", "--engine", "rows"), "single rows"),
        (("--engine-data", "arrow", "--quantity", "queue_delay"), "observed in requests"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    ran = run("fit", STORE, "--donors", ",".join(DONORS), "--out", tmp_path / "x.nc", *words)
    assert ran.code == 2
    assert message in ran.err
    assert not list(tmp_path.iterdir())
