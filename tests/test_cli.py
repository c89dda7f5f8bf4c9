"""The command line end to end on the embedded sample: fit, calibrate, predict, verdict, export."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pandas as pd
import pytest
import yaml
from cli_runs import FEW_DRAWS, STORE, TARGET_STEPS, calibrate_target, chain, configuration_file, done, run, steps_of

import hfdtl_bayes
from hfdtl_bayes.cli import options
from hfdtl_bayes.cli.verdict import verdict as verdict_command
from hfdtl_bayes.features import response
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings
from hfdtl_bayes.sample import DONORS, TARGET
from hfdtl_bayes.statistics import DEFAULT_ROWS_PER_CONFIG
from hfdtl_bayes.traces import TraceStore, drop_warmup
from hfdtl_bayes.transfer import VerdictSettings, rows_with_ids

NEW_OBSERVATION = ["mean_s", "sd_s", "q2.5_s", "q50_s", "q97.5_s"]
EXPECTED_VALUE = ["sd_mean_s", "q2.5_mean_s", "q50_mean_s", "q97.5_mean_s"]


def python(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hfdtl_bayes", *map(str, words)], capture_output=True, text=True, check=False, timeout=300
    )


# fit and calibrate


def test_fit_reports_what_went_in_and_what_came_out():
    found = chain().fitted.json
    usable = {d: len(drop_warmup(steps_of(d))) for d in DONORS}
    assert found["rows"] == usable
    assert found["rejected_rows"] == 0
    assert found["target"] is None
    assert (found["quantity"], found["features"], found["seed"]) == ("step_time", "roofline", 0)
    saved = LatencyPosterior.load(chain().donors)
    assert saved.donors == DONORS
    assert found["input_hash"] == saved.input_hash
    names = [c["feature"] for c in found["coefficients"]]
    assert names == [f.name for f in (*saved.feature_set.base, *saved.feature_set.config, *saved.feature_set.residual)]
    first = saved.feature_set.base[0]
    assert found["coefficients"][0]["unit"] == first.coefficient_unit
    assert found["coefficients"][0]["mean"] == pytest.approx(float(saved.draws_of("beta")[:, 0].mean()) * first.reference)


def test_few_draws_are_called_not_converged():
    # 200 draws cannot hold 400 effective ones, so the warning must be there.
    assert not chain().fitted.json["convergence"]["passed"]
    assert "warning: NOT converged" in chain().fitted.err


def test_calibration_uses_the_first_rows_of_the_chosen_regimes():
    found = chain().calibrated.json
    assert found["target"] == TARGET
    assert found["rows"][TARGET] == 300
    posterior = LatencyPosterior.load(chain().target)
    regimes = steps_of(TARGET)["regime"]
    chosen = np.flatnonzero(regimes.isin(["calib", "load0.15", "load0.5"]))[:300]
    np.testing.assert_array_equal(posterior.calibration_rows, chosen)


def test_same_seed_same_result_and_another_seed_another(tmp_path: Path):
    again = calibrate_target(chain().donors, tmp_path / "again.nc").json
    other = calibrate_target(chain().donors, tmp_path / "other.nc", "--seed", 1).json
    first = chain().calibrated.json
    assert again["coefficients"] == first["coefficients"]
    assert again["convergence"] == first["convergence"]
    assert other["coefficients"] != first["coefficients"]
    assert other["seed"] == 1


def test_rows_of_a_selection_file_are_used(tmp_path: Path):
    frame = drop_warmup(TraceStore(STORE).steps(TARGET).frame)
    wanted = frame["step_id"].to_numpy()[100:180:2]
    selection = tmp_path / "selection.csv"
    pd.DataFrame({"step_id": wanted[::-1]}).to_csv(selection, index=False)
    calibrated = done(
        "calibrate",
        chain().donors,
        STORE,
        "--config",
        TARGET,
        "--rows",
        selection,
        "--out",
        tmp_path / "t.nc",
        "--json",
        *FEW_DRAWS,
    )
    assert calibrated.json["rows"][TARGET] == len(wanted)
    kept = LatencyPosterior.load(tmp_path / "t.nc").calibration_rows
    np.testing.assert_array_equal(kept, rows_with_ids(frame, wanted).index)


def test_rejected_rows_are_counted_and_written_beside_the_posterior(tmp_path: Path):
    steps = steps_of(DONORS[0])
    steps.loc[100, "step_time_s"] = np.nan
    steps.loc[200, "step_time_s"] = -1.0
    steps.loc[300, "step_time_s"] = 0.0
    steps.loc[400, "kv_usage"] = 1.5
    steps.loc[500, "step_id"] = steps.loc[499, "step_id"]
    folder = tmp_path / "store" / DONORS[0]
    folder.mkdir(parents=True)
    (folder / "configuration.yaml").write_bytes((STORE / DONORS[0] / "configuration.yaml").read_bytes())
    steps.to_parquet(folder / "steps.parquet")
    out = tmp_path / "out" / "donor.nc"
    fitted = done(
        "fit", tmp_path / "store", "--donors", DONORS[0], "--out", out, "--features", "blis-blackbox", "--json", *FEW_DRAWS
    )
    assert fitted.json["rejected_rows"] == 5
    assert "5 rejected" in fitted.err
    (written,) = fitted.json["rejected_files"]
    assert Path(written).parent == out.parent
    rejected = pd.read_csv(written)
    assert rejected["row"].tolist() == [100, 200, 300, 400, 500]
    for reason, words in zip(
        rejected["reason"], ("missing", "not above 0", "not above 0", "above 1", "occurs before"), strict=True
    ):
        assert words in reason
    assert fitted.json["rows"][DONORS[0]] == len(drop_warmup(steps)) - 5


# predict


def test_predictions_are_those_of_the_posterior(tmp_path: Path):
    out = tmp_path / "p.parquet"
    found = done("predict", chain().target, TARGET_STEPS, "--out", out, "--json").json
    written = pd.read_parquet(out)
    assert list(written.columns) == ["row", *NEW_OBSERVATION, *EXPECTED_VALUE]
    assert found["rows"] == len(written) == len(steps_of(TARGET))
    assert found["fitted"] is True
    posterior = LatencyPosterior.load(chain().target)
    table = TraceStore(STORE).steps(TARGET)
    expected = posterior.predict(table.frame, posterior.configuration(TARGET))
    pd.testing.assert_frame_equal(written.drop(columns="row"), expected)
    observed = response(table.frame, "step_time")
    inside = (observed >= written["q2.5_s"]) & (observed <= written["q97.5_s"])
    assert 0.8 < inside.mean() <= 1.0


def test_csv_and_parquet_hold_the_same(tmp_path: Path):
    for suffix in ("csv", "parquet"):
        done("predict", chain().target, TARGET_STEPS, "--out", tmp_path / f"p.{suffix}", "--seed", 3)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "p.csv"), pd.read_parquet(tmp_path / "p.parquet"))


def test_rejected_batches_are_skipped_counted_and_written(tmp_path: Path):
    steps = steps_of(TARGET).drop(columns="step_time_s").head(50)
    steps.loc[3, ["prefill_tokens", "decode_tokens"]] = 0
    steps.loc[7, "kv_usage"] = -0.2
    given, out = tmp_path / "batches" / "planned.csv", tmp_path / "out" / "p.csv"
    given.parent.mkdir()
    steps.to_csv(given, index=False)
    ran = done("predict", chain().target, given, "--out", out, "--json")
    assert ran.json["rejected_rows"] == 2
    assert "2 rejected" in ran.err
    (rejected,) = ran.json["rejected_files"]
    assert Path(rejected).parent == out.parent
    assert pd.read_csv(rejected)["row"].tolist() == [3, 7]
    assert pd.read_csv(out)["row"].tolist() == [r for r in range(50) if r not in (3, 7)]


def test_configuration_never_seen_is_predicted_from_its_yaml_alone(tmp_path: Path):
    new = configuration_file(tmp_path / "new.yaml", max_num_seqs=16)
    ran = done("predict", chain().donors, "--configuration", new, "--out", tmp_path / "p.parquet", "--json")
    found = pd.read_parquet(tmp_path / "p.parquet")
    assert ran.json["fitted"] is False
    assert ran.json["config_id"] == "never-seen"
    assert {"prefill_tokens", "decode_tokens", "context_tokens"} <= set(found.columns)
    assert found["decode_tokens"].max() == 16
    assert (found["mean_s"] > 0).all()
    assert (found["q2.5_s"] < found["q50_s"]).all()
    assert (found["q50_s"] < found["q97.5_s"]).all()
    assert (found["sd_s"] > found["sd_mean_s"]).all()
    # Four times the work of a batch takes longer, on any machine.
    prefill = found[found["decode_tokens"] == 0].sort_values("prefill_tokens")
    assert prefill["mean_s"].is_monotonic_increasing


def test_configuration_never_seen_is_less_certain_than_the_same_calibrated(tmp_path: Path):
    new = configuration_file(tmp_path / "new.yaml")
    done("predict", chain().donors, TARGET_STEPS, "--configuration", new, "--out", tmp_path / "unseen.parquet")
    done("predict", chain().target, TARGET_STEPS, "--out", tmp_path / "seen.parquet")
    unseen, seen = (pd.read_parquet(tmp_path / f"{n}.parquet") for n in ("unseen", "seen"))
    assert (unseen["sd_mean_s"] / unseen["mean_s"]).median() > 1.5 * (seen["sd_mean_s"] / seen["mean_s"]).median()


def test_never_seen_with_the_name_of_a_gpu(tmp_path: Path):
    data = yaml.safe_load((STORE / TARGET / "configuration.yaml").read_text()) | {"config_id": "on-h100", "hardware": "h100_sxm"}
    new = tmp_path / "new.yaml"
    new.write_text(yaml.safe_dump(data))
    done("predict", chain().donors, "--configuration", new, "--out", tmp_path / "gpu.csv")
    done("predict", chain().donors, "--configuration", configuration_file(tmp_path / "cpu.yaml"), "--out", tmp_path / "cpu.csv")
    gpu, cpu = (pd.read_csv(tmp_path / f"{n}.csv") for n in ("gpu", "cpu"))
    assert gpu["mean_s"].max() < 0.1 * cpu["mean_s"].max()


def test_seed_of_a_prediction(tmp_path: Path):
    new = configuration_file(tmp_path / "new.yaml")
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        done("predict", chain().donors, "--configuration", new, "--out", tmp_path / f"{name}.csv", "--seed", seed)
    a, b, c = ((tmp_path / f"{n}.csv").read_bytes() for n in "abc")
    assert a == b
    assert a != c


# verdict


def test_verdict_as_json():
    found = done("verdict", chain().target, STORE, "--config", TARGET, "--json").json
    assert found["config_id"] == TARGET
    assert found["outcome"] in {"accept", "collect_more", "expand_residual", "retrain_as_donor", "sample_again"}
    assert found["accepted"] is (found["outcome"] == "accept")
    assert found["settings"] == dataclasses.asdict(VerdictSettings())
    held = found["held_out"]
    regimes = {r["regime"] for r in held["by_regime"]}
    assert {"load0.85", "load1.2", "load2.0"} <= regimes
    assert sum(r["rows"] for r in held["by_regime"]) == held["rows"]
    assert 0.0 < held["mape"] < 1.0


def test_gate_says_no_with_exit_code_1_and_keeps_the_result():
    without = run("verdict", chain().target, STORE, "--json")
    gated = run("verdict", chain().target, STORE, "--json", "--gate")
    # Few draws never converge, so this verdict cannot be an accept.
    assert without.json["outcome"] == "sample_again"
    assert (without.code, gated.code) == (0, 1)
    assert gated.out == without.out
    assert "Traceback" not in gated.err


def test_gate_follows_the_thresholds(tmp_path: Path):
    # A model of three coefficients converges in a moment; whether it is good enough is the thresholds' to say.
    donors, target, priors = tmp_path / "donors.nc", tmp_path / "target.nc", tmp_path / "priors.yaml"
    sampler = ("--draws", 200, "--tune", 100)
    # Its coefficients are seconds per token of a GPU; those of a CPU differ from them by factors, not by tens of per cent.
    priors.write_text("deviation: [0.5, 30]\n")
    fitted = ("--features", "blis-blackbox", "--priors", priors, "--out", donors)
    done("fit", STORE, "--donors", ",".join(DONORS), *fitted, *sampler)
    done("calibrate", donors, STORE, "--config", TARGET, "--out", target, "--regimes", "calib,load0.15,load0.5", *sampler)
    unfussy = ("--min-coverage", 1e-6, "--coverage-level", 1e-12, "--max-mean-uncertainty", 10)
    lenient = run("verdict", target, STORE, "--gate", "--json", "--mape-limit", 5, *unfussy)
    assert lenient.json["outcome"] == "accept"
    assert lenient.json["limit"] == 5
    assert lenient.code == 0
    strict = run("verdict", target, STORE, "--gate", "--json", "--mape-limit", 0.001, "--attainable-slack", 1e-9)
    assert strict.json["outcome"] != "accept"
    assert strict.json["limit"] == pytest.approx(0.001)
    assert strict.code == 1


def test_verdict_of_calibration_rows_alone_never_accepts():
    found = run("verdict", chain().target, STORE, "--json", "--gate", "--calibration-only")
    assert found.json["held_out"] is None
    assert found.json["accepted"] is False
    assert found.code == 1
    statuses = {c["name"]: c["status"] for c in found.json["checks"]}
    assert statuses["accuracy"] in {"cannot_say", "fail"}


def test_every_threshold_is_an_option():
    words = ("posterior_file", "store", "config", "gate", "calibration_only", "seed", "as_json")
    assert {f.name for f in dataclasses.fields(VerdictSettings)} == set(inspect.signature(verdict_command).parameters) - set(
        words
    )


def test_help_states_the_defaults_of_the_thresholds():
    hints = get_type_hints(verdict_command, include_extras=True)
    for field in dataclasses.fields(VerdictSettings):
        default = "none" if field.default is None else f"{field.default:g}"
        assert hints[field.name].__metadata__[0].help.endswith(f"[{default}]."), field.name


def test_defaults_of_sampler_and_rows_are_those_of_the_package():
    assert options.ROWS_PER_CONFIG == DEFAULT_ROWS_PER_CONFIG
    settings = SamplerSettings()
    stated = (options.DRAWS, options.TUNE, options.CHAINS, options.TARGET_ACCEPT)
    assert (settings.draws, settings.tune, settings.chains, settings.target_accept) == stated


def test_predict_warns_of_draws_that_have_not_converged(tmp_path: Path):
    donors = tmp_path / "donors.nc"
    few = ("--draws", 50, "--tune", 50, "--chains", 2, "--target-accept", 0.95)
    done("fit", STORE, "--donors", DONORS[0], "--features", "blis-blackbox", "--out", donors, *few)
    predicted = run("predict", donors, "--config", DONORS[0], "--out", tmp_path / "p.csv")
    assert predicted.code == 0
    assert "NOT converged" in predicted.err
    assert "--target-accept 0.99" in predicted.err


# export


def test_export_yaml_holds_what_blis_accepts(tmp_path: Path):
    out = tmp_path / "blis.yaml"
    found = done("export", chain().target, "--format", "blis-yaml", "--store", STORE, "--out", out, "--json").json
    data = yaml.safe_load(out.read_text())
    assert list(data) == ["trained_physics_coefficients"]
    coefficients = data["trained_physics_coefficients"]
    assert sorted(coefficients) == ["alpha_coeffs", "beta_coeffs"]
    alpha, beta = coefficients["alpha_coeffs"], coefficients["beta_coeffs"]
    assert (len(alpha), len(beta)) == (3, 10)
    assert all(np.isfinite(v) and v >= 0 for v in (*alpha, *beta))
    requests = pd.read_parquet(STORE / TARGET / "requests.parquet")
    idle = requests[(requests["running_requests"] == 0) & (requests["waiting_requests"] == 0)]
    assert alpha[0] == pytest.approx(1e6 * (idle["queued_s"] - idle["arrival_s"]).median(), rel=1e-6)
    assert found["config_id"] == TARGET
    assert found["text"] == out.read_text()


def test_export_without_out_goes_to_stdout(tmp_path: Path):
    words = ("export", chain().target, "--format", "blis-flags", "--traffic", TARGET_STEPS)
    shown = done(*words)
    done(*words, "--out", tmp_path / "flags.txt")
    assert shown.out.strip() == (tmp_path / "flags.txt").read_text().strip()
    flags = dict(re.findall(r"--([a-z-]+) (\S+)", shown.out))
    assert flags["latency-model"] == "trained-physics"
    assert flags["max-num-seqs"] == "32"
    assert len(flags["alpha-coeffs"].split(",")) == 3
    assert len(flags["beta-coeffs"].split(",")) == 10
    assert float(flags["alpha-coeffs"].split(",")[0]) == 0.0


# stdout, stderr, processes


def test_text_for_people_names_what_was_written(tmp_path: Path):
    out = tmp_path / "p.csv"
    ran = done("predict", chain().target, TARGET_STEPS, "--out", out)
    assert f"wrote {out}" in ran.out
    assert "rows accepted" in ran.err
    assert "ok" in done("verdict", chain().target, STORE).out


def test_as_a_process_json_is_all_there_is_on_stdout(tmp_path: Path):
    ran = python("verdict", chain().target, STORE, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == done("verdict", chain().target, STORE, "--json").json
    assert "rows accepted" in ran.stderr


def test_as_a_process_bad_input_is_one_message():
    ran = python("fit", "no/such/store", "--donors", "a", "--out", "x.nc", "--json")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: no trace store at no/such/store")
    assert len(ran.stderr.splitlines()) == 1


def test_as_a_process_usage_errors_exit_2():
    ran = python("fit", STORE, "--out", "x.nc")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "--donors" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_installed_command_prints_the_version():
    command = Path(sys.executable).parent / "hfdtl-bayes"
    ran = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == hfdtl_bayes.__version__


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupted_while_sampling_exits_130_and_writes_nothing(tmp_path: Path):
    out = tmp_path / "donors.nc"
    words = ["fit", STORE, "--donors", ",".join(DONORS), "--features", "blis-blackbox", "--out", out, "--draws", "2000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hfdtl_bayes", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore interrupts, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    guard = threading.Timer(240, process.kill)
    guard.start()
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("sampling"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait() == 130, "".join(lines) + rest
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
