"""One recorded BLIS run in the formats it lacks, written from its tables by other means than the readers use."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from blis_recordings import run_configuration

from hfdtl_bayes.configuration import ServingConfiguration


@dataclass(frozen=True)
class Run:
    """A run of `blis_runs`: its folder, what is true of it, and its configuration with the KV cache it had."""

    folder: Path
    truth: dict
    configuration: ServingConfiguration

    @property
    def alpha(self) -> tuple[int, int, int]:
        """Whole microseconds: arrival to queue, after the last token, per output token."""
        return tuple(int(v) for v in self.truth["alpha_true"])

    @property
    def overhead_options(self) -> tuple[object, ...]:
        a0, a1, a2 = self.truth["alpha_true"]
        return ("--before-queue-us", a0, "--after-last-us", a1, "--per-token-us", a2)

    def steps(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "noisy.steps.csv.gz")

    def requests(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "noisy.requests.csv")


def open_run(folder: Path) -> Run:
    truth = json.loads((folder / "truth.json").read_text())
    own = run_configuration(truth)
    blocks = float(pd.read_csv(folder / "noisy.steps.csv.gz", nrows=1)["kv_blocks_total_gpu"].iloc[0])
    own = own.model_copy(update={"engine": own.engine.model_copy(update={"kv_capacity_tokens": blocks * 16})})
    return Run(folder, truth, own)


def write_trace(run: Run, folder: Path) -> Path:
    """The TraceV2 as BLIS wrote it."""
    for suffix in ("csv", "yaml"):
        shutil.copy(run.folder / f"noisy.trace.{suffix}", folder / f"trace.{suffix}")
    return folder / "trace.csv"


def write_itl(run: Run, folder: Path) -> Path:
    """When a client saw each token: the ends of the steps from that of the first token on, a2 for each token so far."""
    steps, a2 = run.steps(), run.alpha[2]
    ends = (steps["ts_start_us"] + steps["duration_us"]).tolist()
    row_of_end = {end: row for row, end in enumerate(ends)}
    with (folder / "trace.itl.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["request_id", "chunk_index", "timestamp_us"])
        with (run.folder / "noisy.trace.csv").open() as trace:
            for record in csv.DictReader(trace):
                first = row_of_end[int(record["first_chunk_time_us"]) - a2]
                for j in range(int(record["output_tokens"])):
                    out.writerow([record["request_id"], j, ends[first + j] + (j + 1) * a2])
    return folder / "trace.itl.csv"


def write_metrics(run: Run, folder: Path) -> Path:
    """What `blis run --metrics-path` writes, from its per-request table."""
    columns = [
        "arrived_at",
        "requestID",
        "num_prefill_tokens",
        "num_decode_tokens",
        "ttft_ms",
        "itl_ms",
        "e2e_ms",
        "scheduling_delay_ms",
    ]
    requests = run.requests()
    data = {
        "instance_id": "cluster",
        "completed_requests": len(requests),
        "injected_requests": len(requests),
        "requests": requests[columns].to_dict("records"),
    }
    (folder / "metrics.json").write_text(json.dumps(data))
    return folder / "metrics.json"


def attribute(key: str, value: object) -> dict:
    if isinstance(value, str):
        return {"key": key, "value": {"stringValue": value}}
    if isinstance(value, float):
        return {"key": key, "value": {"doubleValue": value}}
    return {"key": key, "value": {"intValue": str(value)}}


def otlp_line(scope: str, span: str, events: list[tuple[str, dict[str, object]]], **attributes: object) -> str:
    """One exported line: a span with its attributes and events."""
    body = {
        "name": span,
        "attributes": [attribute(k.replace("__", "."), v) for k, v in attributes.items()],
        "events": [{"name": name, "attributes": [attribute(k, v) for k, v in values.items()]} for name, values in events],
    }
    return json.dumps(
        {"resourceSpans": [{"resource": {"attributes": []}, "scopeSpans": [{"scope": {"name": scope}, "spans": [body]}]}]}
    )
