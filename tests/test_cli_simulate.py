"""`simulate` on the command line."""

from __future__ import annotations

import inspect as introspection
from pathlib import Path

import pandas as pd
import pytest
from cli_runs import STORE, Ran, chain, configuration_file, done, run

from hfdtl_bayes.cli import simulate as command
from hfdtl_bayes.replay import ReplaySettings
from hfdtl_bayes.sample import DONORS, TARGET
from hfdtl_bayes.simulation import EnsembleSettings, MetricSettings
from hfdtl_bayes.simulation.blis_engine import BlisSettings

REQUESTS = STORE / TARGET / "requests.parquet"
TRAFFIC = """
- name: chat
  request_rate_per_s: 0.5
  prompt_tokens: {uniform: [20, 100]}
  output_tokens: {uniform: [4, 12]}
  num_requests: 10
- name: closed
  concurrency: 2
  prompt_tokens: 30
  output_tokens: 5
  num_requests: 8
"""


def traffic_file(folder: Path, text: str = TRAFFIC) -> Path:
    path = folder / "traffic.yaml"
    path.write_text(text)
    return path


def first_requests(folder: Path, n: int = 60) -> Path:
    path = folder / "requests.csv"
    pd.read_parquet(REQUESTS).sort_values("arrival_s").iloc[:n].to_csv(path, index=False)
    return path


def simulated(*words: object, done_or_run=done) -> Ran:
    return done_or_run("simulate", chain().target, *words, "--draws", 5)


def test_traffic_with_a_store_and_what_to_measure_next(tmp_path: Path) -> None:
    steps, table = tmp_path / "steps.parquet", tmp_path / "metrics.csv"
    words = (traffic_file(tmp_path), "--store", STORE, "--slo-ttft-s", 2, "--percentiles", "50, 99")
    found = simulated(*words, "--out", table, "--steps-out", steps, "--json").json
    assert (found["config_id"], found["engine"], found["runs"]) == (TARGET, "builtin", 5 * 2 * 2)
    assert found["drift"]["sources"] == [*DONORS, TARGET]
    assert found["drift"]["slow_share"] > 0.05
    metrics = {(m["phase"], m["metric"]): m for m in found["metrics"]}
    assert {p for p, _ in metrics} == {"chat", "closed"}
    assert {"ttft_p50_s", "ttft_p99_s", "itl_mean_s", "e2e_mean_s", "requests_per_s", "slo_attainment"} <= {m for _, m in metrics}
    assert all(m["q2.5"] <= m["mean"] <= m["q97.5"] for m in metrics.values() if m["metric"].endswith("mean_s"))
    assert [(n["phase"], n["metric"]) for n in found["next"]][:3] == [("chat", f"{m}_mean_s") for m in ("ttft", "itl", "e2e")]
    assert pd.read_csv(table)["metric"].tolist() == [m["metric"] for m in found["metrics"]]
    # The steps are a deployment mix for select.
    chosen = done(
        "select",
        chain().target,
        STORE,
        "--config",
        TARGET,
        "--budget",
        3,
        "--deployment",
        steps,
        "--out",
        tmp_path / "s.csv",
        "--json",
    )
    assert chosen.json["rows"] == 3
    assert chosen.json["deployment_rows"] <= len(pd.read_parquet(steps))


def test_recorded_requests_are_served_in_their_phases(tmp_path: Path) -> None:
    table = first_requests(tmp_path)
    found = simulated(table, "--block-tokens", 32, "--json", "--seed", 3).json
    again = simulated(table, "--block-tokens", 32, "--json", "--seed", 3).json
    assert found == again
    assert found["drift"]["sources"] == []
    assert {m["phase"] for m in found["metrics"]} >= {"all"}
    assert all(m["sd_workload"] == 0 for m in found["metrics"])
    requests = pd.read_csv(table)
    kept = requests[~requests["regime"].isin(["warmup", "drain"])]
    observed = (kept["finished_s"] - kept["arrival_s"]).mean()
    simulated_mean = next(m for m in found["metrics"] if (m["phase"], m["metric"]) == ("all", "e2e_mean_s"))
    assert simulated_mean["mean"] == pytest.approx(observed, rel=0.3)


def test_a_configuration_never_seen_and_words_for_a_person(tmp_path: Path) -> None:
    new = configuration_file(tmp_path / "new.yaml", max_num_seqs=4)
    ran = simulated(traffic_file(tmp_path), "--configuration", new, "--speeds", 1)
    assert "never-seen on builtin" in ran.out
    assert "ttft_mean (ms)" in ran.out
    assert "Next: " in ran.out
    assert "independent blocks" in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "blis"), "--engine blis needs --blis PATH"),
        (("--blis", "blis"), "with --engine builtin there is none"),
        (("--engine", "blis", "--blis", "nowhere"), "no blis at"),
        (("--workload-spec",), "--workload-spec is a file of BLIS"),
        (("--percentiles", "50,all"), "--percentiles takes numbers"),
        (("--percentiles", "101"), "percentile 101"),
        (("--slo-e2e-s", -1), "objective e2e_s is -1"),
        (("--config", "c99"), "c99' was not fitted"),
        (("--out", "table.json"), "ends in '.json'"),
        (("--store", "nowhere"), "nowhere"),
    ],
)
def test_bad_options_are_one_message(tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    ran = simulated(first_requests(tmp_path, 10), *words, "--json", done_or_run=run)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a, request_rate_per_s: 1, prompt_tokens: 5, output_tokens: 5, pace: 3}", "unknown key"),
        ("{}", "must hold a list of traffic"),
        (
            "- {name: a, request_rate_per_s: 1, prompt_tokens: 999999, output_tokens: 5, num_requests: 2}",
            "2 request(s) can never be served",
        ),
    ],
)
def test_bad_traffic_is_named(tmp_path: Path, text: str, message: str) -> None:
    ran = simulated(traffic_file(tmp_path, text), done_or_run=run)
    assert ran.code == 2
    assert message in ran.err


def test_a_foreign_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store" / "other").mkdir(parents=True)
    configuration_file(tmp_path / "store" / "other" / "configuration.yaml", "other")
    ran = simulated(first_requests(tmp_path, 10), "--store", tmp_path / "store", done_or_run=run)
    assert ran.code == 2
    assert "holds none of the fitted configurations" in ran.err


def test_defaults_are_those_of_python() -> None:
    offered = {n: p.default for n, p in introspection.signature(command.simulate).parameters.items()}
    ensemble, blis = EnsembleSettings(), BlisSettings()
    assert (offered["draws"], offered["workloads"], offered["speeds"]) == (ensemble.members, ensemble.workloads, ensemble.speeds)
    assert tuple(float(p) for p in offered["percentiles"].split(",")) == MetricSettings().percentiles
    assert offered["block_tokens"] == ReplaySettings().block_tokens == blis.block_tokens
    assert (offered["jobs"], offered["timeout"]) == (blis.jobs, blis.timeout_s)
