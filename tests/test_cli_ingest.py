"""`ingest`: recorded BLIS runs become the same store whatever the format; bad input is named, counted and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from blis_recordings import RUNS
from cli_runs import done
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
