"""`ingest`: recorded BLIS runs become the same store whatever the format; bad input is named, counted and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from blis_recordings import RUNS
from cli_runs import contents, done, run
from recording_writers import Run, open_run, write_itl, write_metrics, write_trace

from hfdtl_bayes.configuration import write_configuration
from hfdtl_bayes.traces import TraceStore

STEP_COLUMNS = [
    "step_id", "start_s", "step_time_s", "prefill_tokens", "decode_tokens", "prefill_requests", "decode_requests",
    "prefill_attention_tokens", "prompt_attention_tokens", "context_tokens", "waiting_requests", "running_requests", "regime",
]  # fmt: skip
REQUEST_COLUMNS = [
    "request_id", "arrival_s", "queued_s", "scheduled_s", "first_token_s", "finished_s", "prompt_tokens", "output_tokens",
    "cached_tokens", "waiting_requests", "running_requests", "regime",
]  # fmt: skip


@pytest.fixture(scope="module", params=RUNS)
def recorded(request: pytest.FixtureRequest, shared_data: Path) -> Run:
    return open_run(shared_data / "blis_runs" / request.param)


def configuration_file(own: Run, folder: Path) -> Path:
    write_configuration(own.configuration, folder / "configuration.yaml")
    return folder / "configuration.yaml"


def ingested(own: Run, folder: Path, name: str, *words: object) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """Ingest into a store of its own; steps and requests as every other command reads them, and what was printed."""
    out = folder / name
    ran = done("ingest", *words, "--configuration", configuration_file(own, folder), "--out", out, "--json")
    store = TraceStore(out)
    return store.steps(own.truth["config_id"]).frame, store.requests(own.truth["config_id"]).frame, ran.json


def same(one: pd.DataFrame, other: pd.DataFrame, columns: list[str]) -> None:
    pd.testing.assert_frame_equal(one[columns], other[columns], check_exact=True)


def test_every_format_of_a_run_gives_the_same_store(recorded: Run, tmp_path: Path):
    otlp = ingested(recorded, tmp_path, "otlp", recorded.folder / "noisy.traces.json.gz")
    table = ingested(
        recorded,
        tmp_path,
        "table",
        recorded.folder / "noisy.steps.csv.gz",
        write_metrics(recorded, tmp_path),
        *recorded.overhead_options,
    )
    trace = ingested(
        recorded, tmp_path, "trace", write_trace(recorded, tmp_path), write_itl(recorded, tmp_path), *recorded.overhead_options
    )
    for other in (table, trace):
        same(other[0], otlp[0], STEP_COLUMNS)
        same(other[1], otlp[1], REQUEST_COLUMNS)
    same(table[0], otlp[0], ["kv_usage"])
    same(table[1], otlp[1], ["kv_usage"])
    # BLIS's coefficient of prefill compute lies below what the hardware can do, so its largest prompts are set aside, in every format.
    assert len({found[2]["rejected_rows"] for found in (otlp, table, trace)}) == 1
    rejected = pd.concat([pd.DataFrame({"step_id": [0], "reason": ["none"]}), *map(pd.read_csv, otlp[2]["rejected_files"])]).iloc[
        1:
    ]
    assert all(r.startswith("prefill is faster than the peak") for r in rejected["reason"])
    # And it is what the run's own tables say, to the microsecond.
    raw = recorded.steps()
    raw = raw[~raw["step_id"].isin(rejected["step_id"])]
    steps = otlp[0]
    assert np.rint(steps["step_time_s"] * 1e6).astype(int).tolist() == raw["duration_us"].tolist()
    for ours, theirs in (
        ("prefill_tokens", "prefill_tokens"), ("decode_tokens", "decode_tokens"), ("prefill_requests", "num_prefill_reqs"),
        ("context_tokens", "sum_decode_ctx"), ("prompt_attention_tokens", "sum_prefill_ti_si"), ("kv_usage", "kv_usage_gpu_ratio"),
        ("waiting_requests", "queue_waiting_depth"),
    ):  # fmt: skip
        assert steps[ours].to_numpy() == pytest.approx(raw[theirs].to_numpy(float), abs=1e-9), ours
    requests, a2 = recorded.requests(), recorded.alpha[2]
    ours = otlp[1].set_index("request_id").loc[requests["requestID"]]
    ttft = np.rint((ours["first_token_s"] - ours["arrival_s"]) * 1e6).to_numpy()
    assert (ttft + a2).tolist() == np.rint(requests["ttft_ms"] * 1e3).tolist()
    wait = np.rint((ours["scheduled_s"] - ours["arrival_s"]) * 1e6).to_numpy()
    assert wait.tolist() == np.rint(requests["scheduling_delay_ms"] * 1e3).tolist()


# One run in the formats that hold less.


@pytest.fixture(scope="module")
def run_a(shared_data: Path) -> Run:
    return open_run(shared_data / "blis_runs" / RUNS[0])


def test_results_of_a_replay_take_the_arrivals_of_the_trace(run_a: Run, tmp_path: Path):
    out, trace = tmp_path / "store", write_trace(run_a, tmp_path)
    results = run_a.folder / "replay_true.results.json"
    report = run_a.folder / "calibration_true.json"
    words = ("--configuration", configuration_file(run_a, tmp_path), "--out", out, "--json")
    found = done("ingest", results, trace, report, *words).json
    assert found["rows"] == {"client_requests": 300}
    assert found["reports"]["calibration_true.json"]["metrics"]["e2e"]["mape"] == 0.01113786409325073
    frame = pd.read_parquet(out / "A" / "client_requests.parquet")
    clean = pd.read_csv(run_a.folder / "clean.requests.csv")
    assert np.rint((frame["first_token_s"] - frame["arrival_s"]) * 1e6).tolist() == np.rint(clean["ttft_ms"] * 1e3).tolist()
    assert np.rint((frame["finished_s"] - frame["arrival_s"]) * 1e6).tolist() == np.rint(clean["e2e_ms"] * 1e3).tolist()
    assert not (out / "A" / "requests.parquet").exists()
    assert any("when requests were queued and scheduled is not known" in n for n in found["notes"])


def test_chunks_without_the_lag_give_the_steps_of_a_busy_engine(run_a: Run, tmp_path: Path):
    _, a1, a2 = run_a.truth["alpha_true"]
    words = ("--after-last-us", a1, "--per-token-us", a2, "--out", tmp_path / "store", "--json")
    configuration = configuration_file(run_a, tmp_path)
    found = done(
        "ingest", write_trace(run_a, tmp_path), write_itl(run_a, tmp_path), "--configuration", configuration, *words
    ).json
    # Only the very first step, which an idle engine began at a moment nobody saw, has no time.
    assert found["rows"]["steps"] + found["rejected_rows"] == len(run_a.steps())
    steps = TraceStore(tmp_path / "store").steps("A").frame
    raw = run_a.steps().set_index("step_id").loc[steps["step_id"]]
    assert np.rint(steps["step_time_s"] * 1e6).tolist() == raw["duration_us"].tolist()
    assert steps["context_tokens"].tolist() == raw["sum_decode_ctx"].tolist()
    assert steps["prefill_tokens"].tolist() == raw["prefill_tokens"].tolist()


def test_provenance_is_kept_beside_the_tables(run_a: Run, tmp_path: Path):
    words = ("--configuration", configuration_file(run_a, tmp_path), "--config-id", "other name", "--out", tmp_path / "store")
    done("ingest", run_a.folder / "noisy.traces.json.gz", *words)
    record = json.loads((tmp_path / "store" / "other name" / "ingest.json").read_text())
    assert record["files"] == {str(run_a.folder / "noisy.traces.json.gz"): "otlp"}
    # The first arrival, 9,002 us on the run's clock, which its OTLP counts from 1,000 s.
    assert record["clock_origin_ns"] == 1_000_009_002_000
    assert TraceStore(tmp_path / "store").config_ids == ("other name",)


# Stores.


def test_a_store_is_not_overwritten_silently(run_a: Run, tmp_path: Path):
    out, trace = tmp_path / "store", write_trace(run_a, tmp_path)
    words = ("--configuration", configuration_file(run_a, tmp_path), "--out", out)
    done("ingest", run_a.folder / "noisy.traces.json.gz", *words)
    assert (out / "A.steps.rejected.csv").exists()
    before = contents(out)
    again = run("ingest", trace, *words)
    assert (again.code, contents(out)) == (2, before)
    assert "exists already" in again.err
    done("ingest", trace, *words, "--overwrite")
    assert sorted(p.name for p in (out / "A").iterdir()) == ["client_requests.parquet", "configuration.yaml", "ingest.json"]
    # Nothing is left over, not even what had been set aside of the recording that was replaced.
    assert [p.name for p in out.iterdir()] == ["A"]


def test_a_configuration_that_waits_in_the_store_is_filled(run_a: Run, tmp_path: Path):
    out = tmp_path / "store"
    write_configuration(run_a.configuration, out / "A" / "configuration.yaml")
    done("ingest", run_a.folder / "noisy.traces.json.gz", "--config-id", "A", "--out", out)
    assert len(TraceStore(out).requests("A").frame) == 300


# Bad input.


def lines_of(own: Run) -> list[str]:
    with gzip.open(own.folder / "noisy.traces.json.gz", "rt") as file:
        return file.read().splitlines()


def test_damaged_lines_are_counted_shown_and_kept_and_the_rest_is_stored(run_a: Run, tmp_path: Path):
    lines = lines_of(run_a)
    first_step = next(i for i, x in enumerate(lines) if "BATCH_SUMMARY" in x)
    lines[5] = lines[5][:300]
    lines[first_step + 100] = lines[first_step + 100].replace(
        '"step.duration_us", "value": {"intValue": "', '"step.duration_us", "value": {"intValue": "-'
    )
    (tmp_path / "spoilt.json").write_text("\n".join(lines))
    out = tmp_path / "store"
    ran = done("ingest", tmp_path / "spoilt.json", "--configuration", configuration_file(run_a, tmp_path), "--out", out, "--json")
    assert "1 set aside: not an OTLP object: cut short, or two lines written into each other (line 6)" in ran.err
    assert f"1 set aside: step.duration_us is negative (line {first_step + 101}, step 101)" in ran.err
    kept = pd.concat(pd.read_csv(f) for f in ran.json["rejected_files"])
    assert len(kept) == ran.json["rejected_rows"]
    assert {str(out / "A.ingest.rejected.csv"), str(out / "A.steps.rejected.csv")} == set(ran.json["rejected_files"])
    store = TraceStore(out)
    assert len(store.requests("A").frame) == 299
    # The steps of the request that was lost keep their times; what it computed in them is not known, so not made up either.
    assert len(store.steps("A").frame) + len(pd.read_csv(out / "A.steps.rejected.csv")) == 6017


def test_where_most_lines_are_damaged_nothing_is_stored(run_a: Run, tmp_path: Path):
    lines = lines_of(run_a)
    (tmp_path / "spoilt.json").write_text("\n".join(x[:-1] if i % 3 else x for i, x in enumerate(lines)))
    refused = run(
        "ingest", tmp_path / "spoilt.json", "--configuration", configuration_file(run_a, tmp_path), "--out", tmp_path / "store"
    )
    assert refused.code == 2
    assert "cannot be read, more than 50%" in refused.err
    assert "line 2" in refused.err
    assert not (tmp_path / "store").exists()


def test_scheduler_time_in_a_table_is_refused_with_the_reason(run_a: Run, tmp_path: Path):
    run_a.steps().iloc[::2].assign(duration_us=700).to_parquet(tmp_path / "steps.parquet")
    words = ("--configuration", configuration_file(run_a, tmp_path), "--out", tmp_path / "store")
    refused = run("ingest", tmp_path / "steps.parquet", *words)
    assert refused.code == 2
    assert "step.duration_us is not the step's time: it lies below the time to read the weights once" in refused.err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (
            {"model": "mistralai/mixtral-8x7b"},
            "the model is 'mistralai/mixtral-8x7b' but A serves 'meta-llama/llama-3.1-8b-instruct'",
        ),
        ({"tensor_parallel": 4}, "tensor_parallel is 4 but A has 1"),
        ({"max_num_seqs": 64}, "max_num_seqs is 64 but A has 256"),
    ],
)
def test_a_trace_of_another_configuration(run_a: Run, tmp_path: Path, server: dict, said: str):
    path = write_trace(run_a, tmp_path)
    header = path.with_suffix(".yaml")
    header.write_text(header.read_text() + "server: " + json.dumps(server) + "\n")
    words = ("ingest", path, "--configuration", configuration_file(run_a, tmp_path), "--out", tmp_path / "store")
    refused = run(*words)
    assert refused.code == 2
    assert said in refused.err
    assert "trace.yaml, server." in refused.err
    if "model" in server:
        done(*words, "--served-model-name", server["model"])


def refused_files(case: str, own: Run, folder: Path) -> tuple[list[Path], str]:
    trace, itl = write_trace(own, folder), write_itl(own, folder)
    otlp, results = own.folder / "noisy.traces.json.gz", own.folder / "replay_true.results.json"
    return {
        "two clocks": ([otlp, trace], "has the clock of the engine"),
        "results alone": ([results], "hold no arrivals; name the TraceV2"),
        "chunks alone": ([itl], "holds no prompts; name the TraceV2"),
        "report alone": ([own.folder / "calibration_true.json"], "calibration_true.json hold(s) aggregates only"),
        "twice": ([otlp, otlp], "is given twice"),
        "header alone": ([trace.with_suffix(".yaml")], "is the header of a TraceV2; name its CSV too"),
        "none": ([folder / "absent.json"], "no trace file at"),
        "folder": ([folder], "is a folder; name the files in it"),
    }[case]


CASES = ["two clocks", "results alone", "chunks alone", "report alone", "twice", "header alone", "none", "folder"]


@pytest.mark.parametrize("case", CASES)
def test_files_that_make_no_store(run_a: Run, tmp_path: Path, case: str):
    files, said = refused_files(case, run_a, tmp_path)
    refused = run("ingest", *files, "--configuration", configuration_file(run_a, tmp_path), "--out", tmp_path / "store")
    assert (refused.code, refused.out) == (2, "")
    assert said in refused.err
    assert not (tmp_path / "store").exists()


def test_options_that_cannot_be(run_a: Run, tmp_path: Path):
    otlp, out = run_a.folder / "noisy.traces.json.gz", tmp_path / "store"
    for words, said in (
        ((), "give --configuration FILE.yaml, or --config-id"),
        (("--config-id", "absent"), "no configuration at"),
        (("--configuration", configuration_file(run_a, tmp_path), "--per-token-us", -1), "accepted are microseconds from 0"),
        (("--configuration", configuration_file(run_a, tmp_path), "--format", "itl"), "an ITL file begins with"),
        (("--configuration", configuration_file(run_a, tmp_path), "--format", "otel"), "format 'otel' is not known"),
    ):
        refused = run("ingest", otlp, "--out", out, *words)
        assert refused.code == 2, words
        assert said in refused.err
    assert not out.exists()
