"""Plans as files: vllm bench command lines, BLIS workloads, JSON; and traffic written by a person."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_design_plan import plan

from hfdtl_bayes.design.bench_commands import bench_command, bench_script, write_bench_script
from hfdtl_bayes.design.blis_workload import blis_workload, check_workload, write_blis_workloads
from hfdtl_bayes.design.traffic_files import read_traffic
from hfdtl_bayes.design.traffic_grid import TrafficPoint
from hfdtl_bayes.design.traffic_plan import PlannedSegment
from hfdtl_bayes.errors import InputError, MissingInputError
from hfdtl_bayes.replay import Lengths, generate_requests

CLOSED = TrafficPoint(512, 64, 30.0, concurrency=8, shared_prefix_tokens=128)
OPEN = TrafficPoint(100, 10, 20.0, request_rate_per_s=2.5, range_ratio=0.0)


def planned(point: TrafficPoint, seed: int = 4) -> PlannedSegment:
    return PlannedSegment(point, 120, 900, 31.5, 0.05, plan().segments[0].after, seed)


def options(words: list[str]) -> dict[str, str]:
    return dict(zip(words[3:-1:2], words[4:-1:2], strict=True))


# --- vllm bench serve --------------------------------------------------------------------------------------------------------


def test_a_closed_loop_is_a_limit_without_a_rate() -> None:
    words = bench_command(planned(CLOSED), "org/model")
    assert words[:3] == ["vllm", "bench", "serve"]
    assert words[-1] == "--ignore-eos"
    assert options(words) == {
        "--host": "127.0.0.1", "--port": "8000", "--model": "org/model", "--dataset-name": "random", "--random-input-len": "512",
        "--random-output-len": "64", "--random-range-ratio": "0.5", "--random-prefix-len": "128", "--request-rate": "inf",
        "--max-concurrency": "8", "--num-prompts": "120", "--seed": "4",
    }  # fmt: skip


def test_an_open_loop_is_a_rate() -> None:
    said = options(bench_command(planned(OPEN), "m"))
    assert (said["--request-rate"], said["--random-range-ratio"]) == ("2.5", "0")
    assert "--max-concurrency" not in said


def test_a_script_runs_every_segment_in_order(tmp_path: Path) -> None:
    # Names that a shell would make something of, and a client that says what it was told.
    found = replace(plan(), config_id="one\necho two", segments=(planned(CLOSED, 1), planned(OPEN, 2)))
    path = write_bench_script(found, tmp_path / "plan.sh", model="a b; exit 3")
    client = tmp_path / "vllm"
    client.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    client.chmod(0o755)
    ran = subprocess.run([path], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    expected = [bench_command(s, "a b; exit 3")[1:] for s in found.segments]
    assert ran.stdout.splitlines() == [w for words in expected for w in words]


def test_commands_take_the_name_of_the_model_unless_given_another() -> None:
    lines = [shlex.split(line) for line in bench_script(plan()).splitlines() if line.startswith("vllm ")]
    assert [options(w)["--model"] for w in lines] == ["toy"] * len(plan().segments)


@pytest.mark.parametrize(("words", "message"), [({"model": " "}, "name of the model"), ({"port": 0}, "port is 0")])
def test_commands_that_cannot_be(words: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench_command(planned(OPEN), **{"model": "m", **words})


# --- BLIS ----------------------------------------------------------------------------------------------------------------------


def test_a_rate_is_the_client_s_share_of_all() -> None:
    made = blis_workload(planned(OPEN))
    (client,) = made["clients"]
    assert (made["version"], made["aggregate_rate"], client["rate_fraction"], client["arrival"]) == (
        "2",
        2.5,
        1.0,
        {"process": "poisson"},
    )
    assert made["num_requests"] == 120
    assert client["input_distribution"] == {"type": "constant", "params": {"value": 100.0}}
    assert "concurrency" not in client
    assert "prefix_group" not in client


def test_a_closed_loop_has_a_concurrency_and_no_rate() -> None:
    made = blis_workload(planned(CLOSED))
    (client,) = made["clients"]
    assert "aggregate_rate" not in made
    assert "rate_fraction" not in client
    assert client["concurrency"] == 8
    assert client["prefix_length"] == 128
    assert client["prefix_group"]


@given(st.integers(1, 5000), st.floats(0, 0.99))
def test_lengths_of_the_table_are_those_of_the_replay(middle: int, ratio: float) -> None:
    made = blis_workload(planned(TrafficPoint(middle, 1, 1.0, concurrency=1, range_ratio=ratio)))["clients"][0][
        "input_distribution"
    ]
    drawn = Lengths.around(middle, ratio)
    if made["type"] == "constant":
        assert drawn.low == drawn.high == made["params"]["value"]
        return
    values = np.array([int(k) for k in made["params"]])
    shares = np.array(list(made["params"].values()))
    assert shares.sum() == pytest.approx(1.0)
    assert (values >= drawn.low).all()
    assert (values <= drawn.high).all()
    # Of a range cut into 64 parts, each stands for its middle.
    width = max((drawn.high - drawn.low + 1) / 64, 1.0)
    assert values @ shares == pytest.approx((drawn.low + drawn.high) / 2, abs=0.51 * width)


def test_files_are_read_back_as_blis_reads_them(tmp_path: Path) -> None:
    two = replace(plan(), segments=(planned(CLOSED), planned(OPEN)))
    paths = write_blis_workloads(two, tmp_path / "w.yaml")
    assert [p.name for p in paths] == ["w-1.yaml", "w-2.yaml"]
    for path, segment in zip(paths, two.segments, strict=True):
        assert check_workload(yaml.safe_load(path.read_text())) == blis_workload(segment)
    (single,) = write_blis_workloads(replace(plan(), segments=(planned(OPEN),)), tmp_path / "w.yaml")
    assert single.name == "w.yaml"


@pytest.mark.parametrize("run", ["A_llama-3.1-8b-instruct_H100_tp1", "C_mixtral-8x7b-v0.1_H100_tp2"])
def test_workloads_that_blis_ran_pass_the_check(shared_data: Path, run: str) -> None:
    spec = yaml.safe_load((shared_data / "blis_runs" / run / "workload.yaml").read_text())
    assert check_workload(spec) == spec


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("spec", {"horizonn": 5}, "unknown key.*horizonn"),
        ("spec", {"clients": []}, "clients is empty"),
        ("spec", {"num_requests": 0}, "num_requests is 0"),
        ("spec", {"aggregate_rate": -1}, "aggregate_rate is -1"),
        ("client", {"rate": 2}, "client 0 has unknown key.*rate"),
        ("client", {"concurrency": 3}, "needs one of concurrency and rate_fraction"),
        ("client", {"rate_fraction": float("nan")}, "rate_fraction is nan"),
        ("client", {"arrival": {"process": "posson"}}, "arrival"),
        ("client", {"prefix_length": 5}, "without the prefix_group"),
        ("client", {"input_distribution": {"type": "uniform", "params": {}}}, "type 'uniform'"),
        ("client", {"input_distribution": {"type": "gaussian", "params": {"mean": 3}}}, "gaussian takes"),
        ("client", {"output_distribution": {"type": "empirical", "params": {"0": 1.0}}}, "token counts from 1"),
        ("client", {"output_distribution": {"type": "empirical", "params": {"4": 0.0}}}, "share of 4 tokens"),
    ],
)
def test_workloads_that_blis_would_refuse_or_misread(where: str, change: dict[str, object], message: str) -> None:
    spec = blis_workload(planned(OPEN))
    client = spec["clients"][0]
    broken = {**spec, **change} if where == "spec" else {**spec, "clients": [{**client, **change}]}
    with pytest.raises(InputError, match=message):
        check_workload(broken)


def test_blis_knows_no_rate_with_a_limit() -> None:
    with pytest.raises(InputError, match="one of the two"):
        blis_workload(planned(TrafficPoint(5, 5, 1.0, 2.0, 3)))


# --- both, and JSON --------------------------------------------------------------------------------------------------------------


def test_a_plan_that_sends_nothing_has_no_commands(tmp_path: Path) -> None:
    nothing = replace(plan(), segments=())
    for write in (write_bench_script, write_blis_workloads):
        with pytest.raises(InputError, match="no segments to send"):
            write(nothing, tmp_path / "x.yaml")
    assert not list(tmp_path.iterdir())
    assert nothing.to_frame().empty


def test_the_json_says_what_the_plan_says(tmp_path: Path) -> None:
    said = json.loads(plan().write(tmp_path / "deep" / "plan.json").read_text())
    assert said == plan().as_dict() | {"segments": json.loads(json.dumps(plan().as_dict()["segments"]))}
    assert [s["traffic"]["prompt_tokens"] for s in said["segments"]] == plan().to_frame()["prompt_tokens"].tolist()


# --- traffic written by a person ---------------------------------------------------------------------------------------------------


def read(tmp_path: Path, text: str) -> list[object]:
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    return read_traffic(path)


def test_traffic_is_read_as_it_is_written(tmp_path: Path) -> None:
    (chat, weight), (batch, one) = read(
        tmp_path,
        "- {name: chat, weight: 3, concurrency: 64, prompt_tokens: {lognormal: {median: 600, log_sd: 0.9, high: 8000}}, "
        "output_tokens: {uniform: [50, 400]}, duration_s: 60}\n"
        "- {request_rate_per_s: 2.5, prompt_tokens: 100, output_tokens: 5, shared_prefix_tokens: 32, num_requests: 7}\n",
    )
    assert (weight, one) == (3.0, 1.0)
    assert chat.prompt_tokens == Lengths.lognormal(600, 0.9, high=8000)
    assert chat.output_tokens == Lengths.uniform(50, 400)
    assert (chat.concurrency, chat.duration_s, chat.name) == (64, 60.0, "chat")
    assert set(generate_requests(batch).prompt_tokens) == {132}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must hold a list of traffic"),
        ("[]", "must hold a list of traffic"),
        ("- [", "cannot be read as YAML"),
        ("- 5", "entry 1 is 5"),
        ("- {concurency: 5, prompt_tokens: 5, output_tokens: 5}", "entry 1 has unknown key.*concurency"),
        ("- {concurrency: 5, output_tokens: 5}", "entry 1: prompt_tokens is None; accepted is a number of tokens"),
        ("- {concurrency: 5, prompt_tokens: {normal: 5}, output_tokens: 5}", "prompt_tokens is"),
        ("- {concurrency: 5, prompt_tokens: {uniform: [9, 5]}, output_tokens: 5}", "prompt_tokens: uniform lengths from 9 to 5"),
        ("- {prompt_tokens: 5, output_tokens: 5}", "entry 1: traffic needs request_rate_per_s"),
        ("- {concurrency: many, prompt_tokens: 5, output_tokens: 5}", "concurrency is 'many'; accepted is a number"),
        ("- {concurrency: 1, prompt_tokens: 5, output_tokens: 5, weight: 0}", "weight is 0"),
    ],
)
def test_traffic_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)


def test_traffic_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no traffic file"):
        read_traffic(tmp_path / "none.yaml")
