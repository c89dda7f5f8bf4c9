"""`simulate --engine blis`: processes started, watched and counted. A stand-in plays blis: it serves no requests, so only the handling of
processes, arguments and files is judged here; results are checked on recorded BLIS outputs in test_simulate.py and test_replay_recordings.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from blis_recordings import RUNS, run_configuration
from cli_runs import chain, run
from test_simulate import some_requests

from hfdtl_bayes.errors import InputError, MissingInputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.replay import RequestOverheads, Requests, Traffic
from hfdtl_bayes.sample import TARGET
from hfdtl_bayes.simulation import EnsembleSettings, OverheadDraws, Simulation, Workload
from hfdtl_bayes.simulation.blis_engine import BlisBinary, BlisSettings, simulate_with_blis
from hfdtl_bayes.simulation.blis_files import huggingface_config, replayed_requests, write_trace_v2

HELP = (
    "--alpha-coeffs --beta-coeffs --latency-model (roofline, trained-physics) --model-config-folder --hardware-config --hardware --tp "
    "--trace-header --trace-data --results-path --max-num-running-reqs --max-num-scheduled-tokens --total-kv-blocks "
    "--block-size-in-tokens --seed --horizon --model --metrics-path --workload-spec"
)

# Serves request i at once, in beta7 microseconds to the first token and twice that to the last.
BODY = """
import csv, json, sys
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
beta = [float(b) for b in arguments["--beta-coeffs"].split(",")]
assert len(beta) == 10 and len(arguments["--alpha-coeffs"].split(",")) == 3
with open(arguments["--trace-data"]) as file:
    rows = list(csv.DictReader(file))
TROUBLE
found = [{"request_id": int(r["request_id"]), "ttft_us": beta[6], "e2e_us": 2 * beta[6]} for r in rows]
with open(arguments["--results-path"], "w") as file:
    json.dump(found, file)
with open(__file__ + ".log", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


def stand_in(folder: Path, *, trouble: str = "", said: str = HELP) -> Path:
    path = folder / "blis"
    body = BODY.replace("TROUBLE", trouble)
    path.write_text(f"#!{sys.executable}\nimport sys\nif '--help' in sys.argv:\n    print({said!r})\n    sys.exit(0)\n{body}")
    path.chmod(0o755)
    return path


def posterior() -> LatencyPosterior:
    return LatencyPosterior.load(chain().target)


def simulated(binary: Path, *, members: int = 6, jobs: int = 2, timeout_s: float = 60.0, **more: object) -> Simulation:
    own = posterior()
    return simulate_with_blis(
        own,
        own.configuration(TARGET),
        more.pop("workload", Workload(requests=some_requests(10))),
        binary,
        settings=EnsembleSettings(members),
        blis=BlisSettings(jobs, timeout_s, 32),
        **more,
    )


def test_each_run_gets_its_draw_its_speed_and_the_server(tmp_path: Path) -> None:
    binary = stand_in(tmp_path)
    overheads = OverheadDraws.fixed(RequestOverheads(0.002, 0.0, 0.001, 0.0))
    found = simulated(binary, overheads=overheads)
    assert len(found.runs) == 12
    assert found.failed == ()
    calls = [json.loads(line) for line in Path(f"{binary}.log").read_text().splitlines()]
    given = [dict(zip(c[1::2], c[2::2], strict=True)) for c in calls]
    engine = posterior().configuration(TARGET).engine
    assert {g["--max-num-running-reqs"] for g in given} == {str(engine.max_num_seqs)}
    assert {g["--max-num-scheduled-tokens"] for g in given} == {str(engine.max_num_batched_tokens)}
    assert {g["--total-kv-blocks"] for g in given} == {str(int(engine.kv_capacity_tokens) // 32 - 1)}
    assert {g["--alpha-coeffs"] for g in given} == {"2000,1000,0"}
    assert len({g["--beta-coeffs"] for g in given}) == 12
    # What the stand-in made of the coefficients has come back: beta7, scaled by the machine's factor.
    values = found.runs[[("all", "ttft_mean_s")]].to_numpy()[:, 0]
    beta7 = [float(g["--beta-coeffs"].split(",")[6]) * 1e-6 for g in given]
    assert sorted(values) == pytest.approx(sorted(beta7))
    # Runs of a member differ by the speed alone.
    betas = np.array([[float(b) for b in g["--beta-coeffs"].split(",")] for g in given])
    direction = {tuple(np.round(b / np.linalg.norm(b), 6)) for b in betas}
    assert len(direction) == 6
    assert all(int(g["--horizon"]) > 1e6 * some_requests(10).arrival_s.max() for g in given)


def test_one_draw_that_fails_is_left_out_and_counted(tmp_path: Path) -> None:
    trouble = "if 'run-3-0-1' in arguments['--results-path']:\n    sys.exit('panic: no such thing as a free block')"
    found = simulated(stand_in(tmp_path, trouble=trouble))
    assert len(found.runs) == 11
    assert len(found.failed) == 1
    assert "panic: no such thing as a free block" in found.failed[0]
    assert "speed 1" in found.failed[0]
    # A member is judged whole or not at all.
    values, members = found.values("all", "ttft_mean_s")
    assert values.shape == (5, 1, 2)
    assert 3 not in members


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("sys.exit('level=fatal: bad')", r"12 of 12 runs failed, the first: draw \d+, .*blis exited with 1: level=fatal: bad"),
        ("rows = rows[:-1]", "blis finished 9 of 10 requests, without request 9"),
        ("sys.exit(0)", "ended well and wrote no results.json"),
        ("open(arguments['--results-path'], 'w').write('{'); sys.exit(0)", "cannot be read as JSON"),
        ("open(arguments['--results-path'], 'w').write('[{}]'); sys.exit(0)", "not a list of request_id, ttft_us and e2e_us"),
    ],
)
def test_when_all_fail_the_first_is_shown(tmp_path: Path, trouble: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulated(stand_in(tmp_path, trouble=trouble))


def test_a_run_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did not end within 1 s"):
        simulated(stand_in(tmp_path, trouble="import time; time.sleep(60)"), members=2, jobs=4, timeout_s=1.0)


def test_traffic_is_drawn_per_run(tmp_path: Path) -> None:
    binary = stand_in(tmp_path, trouble="open(__file__ + '.times', 'a').write(rows[1]['arrival_time_us'] + '\\n')")
    traffic = Traffic(20, 5, 2.0, num_requests=6, name="open")
    found = simulated(binary, members=3, workload=Workload(traffic=(traffic,)))
    assert found.runs.shape[0] == 3 * 2 * 2
    times = Path(f"{binary}.times").read_text().split()
    # Two drawings per member, each met by two courses of the speed.
    assert sorted(pd.Series(times).value_counts()) == [2] * 6
    with pytest.raises(InputError, match="limit of requests in flight cannot be written"):
        simulated(binary, members=2, workload=Workload(requests=Requests(np.zeros(3), [9] * 3, [4] * 3, concurrency=2)))


def test_binaries_that_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no blis at"):
        BlisBinary.of(tmp_path / "absent")
    plain = tmp_path / "plain"
    plain.write_text("not a program")
    with pytest.raises(InputError, match="may not be executed"):
        BlisBinary.of(plain)
    plain.chmod(0o755)
    with pytest.raises(InputError, match=r"cannot be run|has no command"):
        BlisBinary.of(plain)
    with pytest.raises(InputError, match="has no command 'replay': is it blis"):
        BlisBinary.of(stand_in(tmp_path, said="usage: something else"))
    with pytest.raises(InputError, match=r"too old.*knows no --results-path, --total-kv-blocks"):
        BlisBinary.of(stand_in(tmp_path, said=HELP.replace("--results-path", "").replace("--total-kv-blocks", "")))
    with pytest.raises(InputError, match="does not name trained-physics"):
        BlisBinary.of(stand_in(tmp_path, said=HELP.replace("trained-physics", "blackbox")))
    assert (
        BlisBinary.of(stand_in(tmp_path, said=HELP.replace("running-reqs", "x --max-num-seqs"))).flag("seqs") == "--max-num-seqs"
    )


def test_recorded_results_become_journeys(shared_data: Path) -> None:
    folder = shared_data / "blis_runs" / RUNS[0]
    recorded = pd.read_csv(folder / "clean.trace.csv")
    requests = Requests(
        recorded["arrival_time_us"].to_numpy() / 1e6, recorded["input_tokens"].to_numpy(), recorded["output_tokens"].to_numpy()
    )
    found = replayed_requests(folder / "replay_true.results.json", requests)
    theirs = pd.read_csv(folder / "clean.requests.csv")
    assert (found["first_token_s"] - found["arrival_s"]).to_numpy() == pytest.approx(theirs["ttft_ms"].to_numpy() / 1e3, abs=1e-9)
    assert (found["finished_s"] - found["arrival_s"]).to_numpy() == pytest.approx(theirs["e2e_ms"].to_numpy() / 1e3, abs=1e-9)


@pytest.mark.parametrize("run_name", RUNS)
def test_the_config_of_a_recorded_model_is_what_blis_reads(shared_data: Path, run_name: str) -> None:
    truth = json.loads((shared_data / "blis_runs" / run_name / "truth.json").read_text())
    arch, found = truth["arch"], huggingface_config(run_configuration(truth))
    assert (found["num_hidden_layers"], found["hidden_size"], found["num_attention_heads"]) == (arch["L"], arch["d"], arch["H"])
    assert found["num_key_value_heads"] * found["head_dim"] == arch["dkv"]
    assert found.get("num_local_experts", 0) == arch["E"]
    assert "torch_dtype" in found


def test_prefixes_are_written_apart_from_the_rest_of_the_prompt(tmp_path: Path) -> None:
    requests = Requests(np.array([5.0, 6.0]), [50, 30], [2, 3], shared_prefix_tokens=[20, 0], prefix_group=[1, 0])
    _, data = write_trace_v2(requests, tmp_path, 0)
    rows = pd.read_csv(data, keep_default_na=False)
    assert rows["input_tokens"].tolist() == [30, 30]
    assert rows["prefix_length"].tolist() == [20, 0]
    assert rows["prefix_group"].tolist() == ["prefix-1", ""]
    assert rows["arrival_time_us"].tolist() == [0, 1_000_000]


def test_the_command_needs_the_binary_and_says_what_failed(tmp_path: Path) -> None:
    table = tmp_path / "requests.csv"
    requests = some_requests(10)
    pd.DataFrame({n: getattr(requests, n) for n in ("arrival_s", "prompt_tokens", "output_tokens")}).to_csv(table, index=False)
    ran = run("simulate", chain().target, table, "--engine", "blis")
    assert (ran.code, ran.out) == (2, "")
    assert "--engine blis needs --blis PATH" in ran.err
    trouble = "if 'run-1-0-0' in arguments['--results-path']:\n    sys.exit('out of blocks')"
    binary = stand_in(tmp_path, trouble=trouble)
    ran = run("simulate", chain().target, table, "--engine", "blis", "--blis", binary, "--draws", 4, "--jobs", 2, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["engine"] == "blis"
    assert len(ran.json["failed"]) == 1
    assert "a run failed: draw" in ran.err
    assert "out of blocks" in ran.err
