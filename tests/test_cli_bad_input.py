"""Bad input through the command line: exit code 2, one message, nothing on stdout, and not a byte of any output changed."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml
from cli_runs import FEW_DRAWS, STORE, TARGET_STEPS, chain, configuration_file, contents, run, steps_of

from hfdtl_bayes.sample import DONORS, TARGET

DONOR = DONORS[0]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A folder that holds the results of an earlier run, which must survive every failure."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    shutil.copy(chain().donors, folder / "fit.nc")
    shutil.copy(chain().target, folder / "target.nc")
    (folder / "predictions.csv").write_text("row,mean_s\n0,0.5\n")
    (folder / f"{DONOR}.steps.rejected.csv").write_text("row,reason\n0,an earlier run\n")
    (folder / "blis.yaml").write_text("earlier: true\n")
    return folder


def refused(outputs: Path, *words: object) -> str:
    """Run a command that must be refused; returns its message."""
    before = contents(outputs)
    ran = run(*words)
    assert ran.code == 2, f"exit code {ran.code}: {ran.out}{ran.err}"
    assert ran.out == ""
    assert ran.err.count("error: ") == 1
    assert "Traceback" not in ran.err
    assert contents(outputs) == before
    return ran.err[ran.err.index("error: ") :]


def donor_store(tmp_path: Path) -> Path:
    """A store that holds one donor, free to be spoilt."""
    store = tmp_path / "store"
    shutil.copytree(STORE / DONOR, store / DONOR)
    return store


def fit_refused(store: Path, outputs: Path, *words: object) -> str:
    return refused(outputs, "fit", store, "--donors", DONOR, "--out", outputs / "fit.nc", "--json", *FEW_DRAWS, *words)


# Traces that cannot be used as a whole


def _prefill_beyond_peak(steps: pd.DataFrame) -> pd.DataFrame:
    # 128 tokens of prefill need far longer than the weights take to be read, the floor that is checked first.
    heavy = steps["prefill_tokens"] >= 128
    assert heavy.sum() >= 5
    return steps.assign(step_time_s=steps["step_time_s"].where(~heavy, 0.004))


SPOILT: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "a missing column": (lambda s: s.drop(columns="step_time_s"), "missing required column(s) step_time_s [s]"),
    "a column by another name": (lambda s: s.rename(columns={"decode_tokens": "decode_token"}), "rename decode_token?"),
    "milliseconds": (lambda s: s.assign(step_time_s=1e3 * s["step_time_s"]), "divide by 1e3"),
    "microseconds": (lambda s: s.assign(step_time_s=1e6 * s["step_time_s"]), "divide by 1e3 or 1e6"),
    "the scheduler's own time": (lambda s: s.assign(step_time_s=0.03 * s["step_time_s"]), "below the time to read the weights"),
    "prefill faster than the peak": (_prefill_beyond_peak, "prefill is faster than the peak"),
    "only NaN": (lambda s: s.assign(step_time_s=np.nan), "every row was rejected"),
    "only zeros": (lambda s: s.assign(step_time_s=0.0), "every row was rejected"),
    "only negative times": (lambda s: s.assign(step_time_s=-s["step_time_s"]), "every row was rejected"),
    "KV usage in per cent": (lambda s: s.assign(kv_usage=100 * s["kv_usage"] + 2), "looks like per cent"),
    "no rows": (lambda s: s.head(0), "no rows"),
    "text for numbers": (lambda s: s.assign(prefill_tokens="many"), "prefill_tokens holds no numbers"),
    "fewer rows than features": (lambda s: s[s["regime"] == "load0.5"].head(4), "4 usable row(s)"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_unusable_traces(tmp_path: Path, outputs: Path, spoil: tuple[Callable[[pd.DataFrame], pd.DataFrame], str]):
    change, said = spoil
    store = donor_store(tmp_path)
    change(steps_of(DONOR)).to_parquet(store / DONOR / "steps.parquet")
    message = fit_refused(store, outputs)
    assert said in message
    assert DONOR in message


def test_only_the_first_step_of_a_constant_step_id_is_kept(tmp_path: Path, outputs: Path):
    store = donor_store(tmp_path)
    steps_of(DONOR).assign(step_id=1).to_parquet(store / DONOR / "steps.parquet")
    before = contents(outputs)
    ran = run("fit", store, "--donors", DONOR, "--out", outputs / "fit.nc", *FEW_DRAWS)
    assert ran.code == 2
    assert "step_id occurs before in the file" in ran.err
    assert contents(outputs) == before


def test_decreasing_step_ids_are_counted(tmp_path: Path, outputs: Path):
    store = donor_store(tmp_path)
    steps_of(DONOR).iloc[::-1].to_parquet(store / DONOR / "steps.parquet")
    ran = run("fit", store, "--donors", DONOR, "--out", outputs / "fit.nc", *FEW_DRAWS)
    assert ran.code == 2
    assert "step_id decreases" in ran.err


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_file_cut_short(tmp_path: Path, outputs: Path, share: float):
    store = donor_store(tmp_path)
    file = store / DONOR / "steps.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    message = fit_refused(store, outputs)
    assert ("is empty (0 bytes)" if share == 0 else "cannot be read as a table") in message
    assert "steps.parquet" in message


def test_no_trace_table(tmp_path: Path, outputs: Path):
    store = donor_store(tmp_path)
    (store / DONOR / "steps.parquet").unlink()
    assert "holds no steps.parquet" in fit_refused(store, outputs)


# Configurations

CONFIGURATIONS: dict[str, tuple[Callable[[dict], None], str]] = {
    "an unknown GPU": (lambda c: c.update(hardware="h1000_sxm"), "h100_sxm"),
    "TP that does not divide the heads": (lambda c: c["engine"].update(tensor_parallel=7), "tensor_parallel"),
    "a missing field": (lambda c: c["llm"].pop("hidden_size"), "llm.hidden_size: missing"),
    "an unknown field": (lambda c: c["llm"].update(hidden_sise=8), "hidden_sise: unknown key"),
    "a text for a number": (lambda c: c["engine"].update(max_num_seqs="all"), "max_num_seqs"),
    "another name than its folder": (lambda c: c.update(config_id="other"), "config_id is 'other'"),
}


@pytest.mark.parametrize("spoil", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_unusable_configurations(tmp_path: Path, outputs: Path, spoil: tuple[Callable[[dict], None], str]):
    change, said = spoil
    store = donor_store(tmp_path)
    file = store / DONOR / "configuration.yaml"
    data = yaml.safe_load(file.read_text())
    change(data)
    file.write_text(yaml.safe_dump(data))
    assert said in fit_refused(store, outputs)


def test_unusable_configuration_to_predict(tmp_path: Path, outputs: Path):
    words = ("predict", chain().donors, "--out", outputs / "predictions.csv", "--configuration")
    bad = configuration_file(tmp_path / "tp.yaml", tensor_parallel=7)
    assert "tensor_parallel" in refused(outputs, *words, bad)
    (tmp_path / "broken.yaml").write_text("config_id: [")
    assert "is not valid YAML" in refused(outputs, *words, tmp_path / "broken.yaml")
    assert "no configuration at" in refused(outputs, *words, tmp_path / "absent.yaml")
    other = configuration_file(tmp_path / "donor.yaml", DONOR, like=DONOR, max_num_seqs=8)
    assert "give the new one another config_id" in refused(outputs, *words, other)


# Names


def test_donors_and_target(outputs: Path):
    words = ("fit", STORE, "--out", outputs / "fit.nc", "--donors")
    assert f"listed twice: {DONOR}" in refused(outputs, *words, f"{DONOR},{DONORS[1]},{DONOR}")
    assert "no donor given" in refused(outputs, *words, " , ")
    assert TARGET in refused(outputs, *words, "c99_absent")
    words = ("calibrate", chain().donors, STORE, "--out", outputs / "target.nc", "--config")
    assert "is also a donor" in refused(outputs, *words, DONOR)
    assert DONOR in refused(outputs, *words, "c99_absent")


def test_unknown_feature_set_quantity_and_engine(outputs: Path):
    words = ("fit", STORE, "--donors", DONOR, "--out", outputs / "fit.nc")
    assert "known are roofline" in refused(outputs, *words, "--features", "rooflien")
    assert "step_time, queue_delay, api_delay" in refused(outputs, *words, "--quantity", "latency")
    assert "exact, pymc" in refused(outputs, *words, "--engine", "gibbs")


def test_which_configuration(tmp_path: Path, outputs: Path):
    words = ("predict", chain().donors, TARGET_STEPS, "--out", outputs / "predictions.csv")
    assert "no calibrated target" in refused(outputs, *words)
    assert "was not fitted" in refused(outputs, *words, "--config", TARGET)
    new = configuration_file(tmp_path / "new.yaml")
    assert "not both" in refused(outputs, *words, "--config", DONOR, "--configuration", new)


def test_calibration_rows(tmp_path: Path, outputs: Path):
    words = ("calibrate", chain().donors, STORE, "--config", TARGET, "--out", outputs / "target.nc")
    assert "load0.15" in refused(outputs, *words, "--regimes", "load9")
    assert "5 usable row(s)" in refused(outputs, *words, "--max-rows", 5)
    for table, said in (
        ({"step": [1, 2]}, "no column 'step_id'"),
        ({"step_id": [100, 9_999_999]}, "9999999"),
        ({"step_id": [100.5, 101]}, "whole number"),
        ({"step_id": [100, None]}, "empty"),
        ({"step_id": []}, "empty"),
    ):
        pd.DataFrame(table).to_csv(tmp_path / "rows.csv", index=False)
        assert said in refused(outputs, *words, "--rows", tmp_path / "rows.csv")
    assert "no trace table" in refused(outputs, *words, "--rows", tmp_path / "absent.csv")


def test_verdict_without_a_target_or_rows(tmp_path: Path, outputs: Path):
    assert "no calibrated target" in refused(outputs, "verdict", chain().donors, STORE, "--json")
    assert f"calibrated for {TARGET!r}" in refused(outputs, "verdict", chain().target, STORE, "--config", DONOR)
    store = tmp_path / "store"
    shutil.copytree(STORE / TARGET, store / TARGET)
    steps = steps_of(TARGET)
    # A recording that ends with the last row calibrated on leaves no row to judge with; one that ends before is another.
    last = int((steps["regime"] != "warmup").cumsum().searchsorted(300))
    steps.iloc[: last + 1].to_parquet(store / TARGET / "steps.parquet")
    assert "none is left to judge with" in refused(outputs, "verdict", chain().target, store)
    steps.iloc[:last].to_parquet(store / TARGET / "steps.parquet")
    assert "is not the one it was calibrated on: 299 of its 300" in refused(outputs, "verdict", chain().target, store)


def test_thresholds_that_mean_nothing(outputs: Path):
    words = ("verdict", chain().target, STORE, "--json")
    assert "mape_limit" in refused(outputs, *words, "--mape-limit", -0.1)
    assert "min_probability" in refused(outputs, *words, "--min-probability", 90)
    assert "bootstrap" in refused(outputs, *words, "--bootstrap", 0)


# Posterior files


def test_posterior_files(tmp_path: Path, outputs: Path):
    def predicting(file: Path) -> str:
        return refused(outputs, "predict", file, TARGET_STEPS, "--out", outputs / "predictions.csv")

    assert "no posterior at" in predicting(tmp_path / "absent.nc")
    cut = tmp_path / "cut.nc"
    whole = chain().target.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a posterior" in predicting(cut)
    foreign = tmp_path / "foreign.nc"
    xr.Dataset({"x": ("i", [1.0])}).to_netcdf(foreign, engine="h5netcdf")
    assert "not a posterior written by hfdtl_bayes" in predicting(foreign)
    assert "cannot be read as a posterior" in predicting(TARGET_STEPS)


# Outputs that cannot be written


def test_output_paths(tmp_path: Path, outputs: Path):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    predict = ("predict", chain().target, TARGET_STEPS, "--out")
    for words in (
        ("fit", STORE, "--donors", DONOR, "--out"),
        ("calibrate", chain().donors, STORE, "--config", TARGET, "--out"),
        ("export", chain().target, "--format", "blis-yaml", "--out"),
    ):
        assert "is a folder" in refused(outputs, *words, outputs)
        assert "is a file, not a folder" in refused(outputs, *words, taken / "x.nc")
    assert "is a folder" in refused(outputs, *predict, outputs)
    assert "is a file, not a folder" in refused(outputs, *predict, taken / "x.csv")
    assert ".parquet or .csv" in refused(outputs, *predict, outputs / "predictions.xlsx")
    assert "takes the name of a folder" in refused(outputs, "demo", "--out", taken)
    assert taken.read_text() == "a file"


def test_an_output_never_replaces_an_input(tmp_path: Path, outputs: Path):
    steps = tmp_path / "steps.parquet"
    shutil.copy(TARGET_STEPS, steps)
    donors = outputs / "fit.nc"
    assert "would replace the input" in refused(outputs, "predict", chain().target, steps, "--out", steps)
    assert "would replace the input" in refused(outputs, "calibrate", donors, STORE, "--config", TARGET, "--out", donors)
    assert steps.read_bytes() == TARGET_STEPS.read_bytes()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path, outputs: Path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "no permission" in refused(outputs, "predict", chain().target, TARGET_STEPS, "--out", locked / "p.csv")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let the system refuse to write files beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_that_is_full(outputs: Path):
    steps = ("predict", chain().target, TARGET_STEPS, "--out")
    export = ("export", chain().target, "--format", "blis-yaml", "--out", outputs / "blis.yaml")
    fit = ("fit", STORE, "--donors", DONOR, "--out", outputs / "fit.nc", *FEW_DRAWS)
    for words in ((*steps, outputs / "predictions.csv"), (*steps, outputs / "new.parquet"), export, fit):
        with files_up_to(100):
            message = refused(outputs, *words)
        assert "cannot be written" in message, message


# Delays


def test_delays_need_requests(tmp_path: Path, outputs: Path):
    store = donor_store(tmp_path)
    (store / DONOR / "requests.parquet").unlink()
    assert "holds no requests.parquet" in fit_refused(store, outputs, "--quantity", "queue_delay")


@pytest.mark.parametrize("column", ["waiting_requests", "kv_usage"])
def test_delays_need_the_columns_of_their_features(tmp_path: Path, outputs: Path, column: str):
    store = donor_store(tmp_path)
    requests = pd.read_parquet(store / DONOR / "requests.parquet")
    requests.drop(columns=column).to_parquet(store / DONOR / "requests.parquet")
    message = fit_refused(store, outputs, "--quantity", "queue_delay")
    assert f"needs the column(s) {column}" in message
    assert DONOR in message


def test_requests_with_clocks_that_disagree(tmp_path: Path, outputs: Path):
    store = donor_store(tmp_path)
    requests = pd.read_parquet(store / DONOR / "requests.parquet")
    requests.assign(scheduled_s=requests["queued_s"] - 1).to_parquet(store / DONOR / "requests.parquet")
    assert "scheduled_s is before queued_s" in fit_refused(store, outputs, "--quantity", "queue_delay")
