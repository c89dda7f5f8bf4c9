"""The replay against recorded runs: BLIS's own, and a real vLLM engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from blis_recordings import RUNS, run_configuration, run_steps

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.export.vectors import BETA_LABELS, FEATURE_OF_BETA, IN_MICROSECONDS
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.replay import Batch, ReplayedRun, ReplaySettings, RequestOverheads, Requests, StepTime, linear_step_time, replay
from hfdtl_bayes.replay.scheduler import Scheduler
from hfdtl_bayes.traces import TraceStore, drop_warmup

BLIS_COLUMNS = {
    "prefill_tokens": "prefill_tokens",
    "decode_tokens": "decode_tokens",
    "prefill_requests": "num_prefill_reqs",
    "decode_requests": "num_decode_reqs",
    "context_tokens": "sum_decode_ctx",
    "prompt_attention_tokens": "sum_prefill_ti_si",
    "running_requests": "queue_running_depth",
    "waiting_requests": "queue_waiting_depth",
    "kv_usage": "kv_usage_gpu_ratio",
}


def blis_step_time(truth: dict, own: ServingConfiguration) -> StepTime:
    """BLIS's true coefficients as coefficients of `blis-physics`, those of config features folded into the constant."""
    basis = feature_set("blis-physics")
    physical = {
        FEATURE_OF_BETA[label]: value * (1e-6 if label in IN_MICROSECONDS else 1.0)
        for label, value in zip(BETA_LABELS, truth["beta_true"], strict=True)
    }
    theta = np.array([physical[f.name] / f.reference for f in basis.varying])
    folded = sum(physical[f.name] * float(f.compute(None, own)) for f in basis.config)
    theta[basis.coef_names.index("constant")] += folded / basis["constant"].reference
    return linear_step_time(basis, theta, own, minimum_s=1e-6)


def blis_replay(folder: Path, table: str) -> tuple[ReplayedRun, pd.DataFrame]:
    """Replay the requests of a recorded BLIS run as BLIS would, and return what BLIS wrote of them."""
    truth = json.loads((folder / "truth.json").read_text())
    raw, _ = run_steps(folder)
    own = run_configuration(truth)
    capacity = float(raw["kv_blocks_total_gpu"].iloc[0]) * 16
    own = own.model_copy(update={"engine": own.engine.model_copy(update={"kv_capacity_tokens": capacity})})
    recorded = pd.read_csv(folder / f"{table}.requests.csv")
    requests = Requests(
        recorded["arrival_us"].to_numpy() / 1e6,
        recorded["num_prefill_tokens"].to_numpy(),
        recorded["num_decode_tokens"].to_numpy(),
        request_id=recorded["requestID"].to_numpy(),
    )
    a0, a1, a2 = (value * 1e-6 for value in truth["alpha_true"])
    settings = ReplaySettings(
        reserved_blocks=0, whole_microseconds=True, overheads=RequestOverheads(a0, after_finish_s=a1, per_output_token_s=a2)
    )
    return replay(requests, own, blis_step_time(truth, own), settings=settings), recorded


@pytest.mark.parametrize("run_name", RUNS)
def test_equals_blis_to_the_microsecond(run_name: str, shared_data: Path):
    folder = shared_data / "blis_runs" / run_name
    run, recorded = blis_replay(folder, "clean")
    raw, _ = run_steps(folder)
    assert len(run.steps) == len(raw)
    for own, theirs in BLIS_COLUMNS.items():
        assert run.steps[own].to_numpy() == pytest.approx(raw[theirs].to_numpy(float), abs=1e-9), own
    assert np.rint(run.steps["start_s"] * 1e6).astype(int).tolist() == raw["ts_start_us"].tolist()
    assert np.rint(run.steps["step_time_s"] * 1e6).astype(int).tolist() == raw["duration_us"].tolist()
    # None of the clean runs has overlapping steps, so no request is set apart.
    assert (raw["ts_start_us"].to_numpy()[1:] >= (raw["ts_start_us"] + raw["duration_us"]).to_numpy()[:-1]).all()
    for own, theirs in (("ttft_s", "ttft_ms"), ("e2e_s", "e2e_ms")):
        assert np.rint(getattr(run, own) * 1e6).tolist() == np.rint(recorded[theirs] * 1e3).tolist(), own


@pytest.mark.parametrize("run_name", RUNS)
def test_equals_what_blis_replays(run_name: str, shared_data: Path):
    """BLIS's `replay` of the noisy trace with the true coefficients: the same requests from another program path of BLIS."""
    folder = shared_data / "blis_runs" / run_name
    run, _ = blis_replay(folder, "noisy")
    results = pd.DataFrame(json.loads((folder / "replay_true.results.json").read_text())).sort_values("request_id")
    assert np.rint(run.ttft_s * 1e6).tolist() == results["ttft_us"].tolist()
    assert np.rint(run.e2e_s * 1e6).tolist() == results["e2e_us"].tolist()


@pytest.mark.parametrize("run_name", ["BB1_llama-3.1-8b-instruct_H100_tp2", "BB2_phi-4_H100_tp2"])
def test_equals_the_blackbox_backend_of_an_older_blis(run_name: str, shared_data: Path):
    """step = b0 + b1 * prefill tokens + b2 * decode tokens, queueing = a0 + a1 * prompt tokens; the KV cache is never short."""
    folder = shared_data / "blis_runs" / run_name
    truth = json.loads((folder / "truth.json").read_text())
    (b0, b1, b2), (a0, a1, a2) = truth["beta_true"], truth["alpha_true"]
    recorded, served = pd.read_csv(folder / "trace.csv"), pd.read_csv(folder / "requests.csv")
    own = run_configuration(json.loads((shared_data / "blis_runs" / RUNS[0] / "truth.json").read_text()))
    requests = Requests(
        recorded["arrival_time_us"].to_numpy() / 1e6, recorded["input_tokens"].to_numpy(), recorded["output_tokens"].to_numpy()
    )
    overheads = RequestOverheads(a0 * 1e-6, a1 * 1e-6, per_output_token_s=a2 * 1e-6)
    settings = ReplaySettings(whole_microseconds=True, overheads=overheads)

    def step_time(batch: Batch) -> float:
        return (b0 + b1 * batch.prefill_tokens + b2 * batch.decode_tokens) * 1e-6

    run = replay(requests, own, step_time, settings=settings)
    steps = pd.read_csv(folder / "steps_from_debug_log.csv")
    assert not steps["suspect_overlap"].any()
    assert np.rint(run.steps["start_s"] * 1e6).tolist() == steps["ts_start_us"].tolist()
    assert np.rint(run.steps["step_time_s"] * 1e6).tolist() == steps["duration_us"].tolist()
    for mine, theirs in (("ttft_s", "ttft_ms"), ("e2e_s", "e2e_ms")):
        assert np.rint(getattr(run, mine) * 1e6).tolist() == np.rint(served[theirs] * 1e3).tolist(), mine


def queued_as_recorded(store: TraceStore, config_id: str) -> tuple[Scheduler, pd.DataFrame, pd.DataFrame]:
    """Replay a recording with its own queue stamps and its own ends of steps: only the scheduling is left to the replay."""
    own = store.configuration(config_id)
    steps, requests = store.steps(config_id).frame, store.requests(config_id).frame
    ends = iter(steps["end_s"].tolist())

    def recorded(_batch: Batch) -> float:
        return max(next(ends, 0.0) - scheduler.now_s, 1e-6)

    given = Requests.from_frame(requests.assign(arrival_s=requests["queued_s"]))
    scheduler = Scheduler(given, own, recorded, ReplaySettings(block_tokens=32))
    scheduler.run()
    return scheduler, steps, requests


# Share of steps with the recorded composition. The rest are stamps: queued_s and the end of a step come from two processes, and where
# they tie within a millisecond a request may enter one step earlier or later; c14 also counts what a preempted request computes anew as
# decode tokens.
SAME_COMPOSITION = {
    "c01_llama-s_base": 0.98,
    "c02_llama-s_seqs8": 0.99,
    "c03_llama-s_seqs128": 0.98,
    "c04_llama-s_mbt256": 0.98,
    "c05_llama-s_nochunk": 1.0,
    "c06_llama-s_prefix": 0.98,
    "c09_llama-m_base": 0.95,
    "c11_moe_base": 0.97,
    "c13_qwen-s_base": 0.97,
    "c14_llama-s_tightkv": 0.97,
}


@pytest.mark.parametrize("config_id", SAME_COMPOSITION)
def test_schedules_as_vllm_did(config_id: str, shared_data: Path):
    scheduler, steps, requests = queued_as_recorded(TraceStore(shared_data / "vllm_cpu"), config_id)
    made = scheduler.steps()
    assert len(made) == len(steps)
    same = (made[["prefill_tokens", "decode_tokens"]].to_numpy() == steps[["prefill_tokens", "decode_tokens"]].to_numpy()).all(
        axis=1
    )
    assert same.mean() >= SAME_COMPOSITION[config_id]
    assert made[["prefill_tokens", "decode_tokens"]].sum().sum() == pytest.approx(
        steps[["prefill_tokens", "decode_tokens"]].sum().sum(), rel=1e-3
    )
    journeys = scheduler.journeys().set_index("request_id").loc[requests["request_id"]]
    assert journeys["preemptions"].sum() == requests["preemptions"].sum()
    late = np.abs(journeys["finished_s"].to_numpy() - requests["finished_s"].to_numpy())
    assert np.median(late) < 0.003


@pytest.mark.parametrize("config_id", ["c04_llama-s_mbt256", "c05_llama-s_nochunk"])
def test_batches_are_like_those_recorded(config_id: str, shared_data: Path):
    """With a step-time model fitted on the recording instead of its step times. The machine's drift is in the recording only."""
    store = TraceStore(shared_data / "vllm_cpu")
    own, features = store.configuration(config_id), feature_set("roofline")
    steps, requests = store.steps(config_id).frame, store.requests(config_id).frame
    rows = drop_warmup(steps)
    design, time = features.design(rows, own), rows["step_time_s"].to_numpy()
    pilot = design @ np.linalg.lstsq(design / time[:, None], np.ones(len(time)), rcond=None)[0]
    theta = np.linalg.lstsq(design / pilot[:, None], time / pilot, rcond=None)[0]
    idle = (requests["running_requests"] == 0) & (requests["waiting_requests"] == 0)
    lag = float((requests["queued_s"] - requests["arrival_s"])[idle].median())
    settings = ReplaySettings(block_tokens=32, overheads=RequestOverheads(before_queue_s=lag))
    run = replay(Requests.from_frame(requests), own, linear_step_time(features, theta, own), settings=settings)
    assert len(run.steps) == pytest.approx(len(steps), rel=0.1)
    for column in ("decode_tokens", "prefill_tokens", "context_tokens"):
        for quantile in (0.25, 0.5, 0.75, 0.95):
            found, there = run.steps[column].quantile(quantile), steps[column].quantile(quantile)
            assert found == pytest.approx(there, rel=0.25, abs=2), (column, quantile)
    served = run.requests.set_index("request_id").loc[requests["request_id"]]
    e2e = (served["finished_s"] - served["arrival_s"]).mean() / (requests["finished_s"] - requests["arrival_s"]).mean()
    assert 0.8 < e2e < 1.25
