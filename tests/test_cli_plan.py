"""`plan` and `follow` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from cli_runs import STORE, TARGET_STEPS, Ran, chain, done, run

from hfdtl_bayes.cli import follow as follow_command
from hfdtl_bayes.configuration import write_configuration
from hfdtl_bayes.design.blis_workload import check_workload
from hfdtl_bayes.design.trace_folder import FollowSettings
from hfdtl_bayes.design.traffic_grid import TrafficGrid
from hfdtl_bayes.design.traffic_plan import plan_traffic
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.sample import TARGET
from hfdtl_bayes.traces import TraceStore
from hfdtl_bayes.transfer import usable_rows

GRID = ("--concurrency", "1,8", "--prompt-tokens", "60,300", "--output-tokens", "16", "--duration", "5")
HEAVY = ("load0.85", "load1.2")


def planned(*words: object, posterior: Path | None = None, ran: object = done) -> Ran:
    return ran("plan", posterior or chain().donors, STORE, "--config", TARGET, *words)


def test_a_plan_is_that_of_python_and_written_in_every_form(tmp_path: Path) -> None:
    out, script, workload = tmp_path / "plan.json", tmp_path / "plan.sh", tmp_path / "w.yaml"
    words = ("--deployment", ",".join(HEAVY), *GRID, "--out", out, "--bench-commands", script, "--blis-workload", workload)
    said = planned(*words, "--model", "served", "--port", 9000, "--seed", 3, "--json").json
    posterior, store = LatencyPosterior.load(chain().donors), TraceStore(STORE)
    configuration = store.configuration(TARGET)
    rows = usable_rows(store.steps(TARGET).frame, configuration, posterior.feature_set)
    grid = TrafficGrid(concurrencies=(1, 8), prompt_tokens=(60, 300), output_tokens=(16,), durations_s=(5.0,))
    same = plan_traffic(posterior, configuration, rows[rows["regime"].isin(HEAVY)], grid=grid, seed=3)
    assert json.loads(out.read_text())["segments"] == json.loads(json.dumps(same.as_dict()["segments"])) == said["segments"]
    assert len(said["segments"]) >= 1
    commands = [line for line in script.read_text().splitlines() if line.startswith("vllm bench serve ")]
    assert len(commands) == len(said["segments"])
    assert all("--model served" in c and "--port 9000" in c for c in commands)
    assert said["written"] == [
        str(out),
        str(script),
        *map(str, sorted(tmp_path.glob("w*.yaml"), key=lambda p: (len(p.name), p.name))),
    ]
    for path in tmp_path.glob("w*.yaml"):
        check_workload(yaml.safe_load(path.read_text()))


def test_a_calibrated_target_is_planned_from_where_it_stands(tmp_path: Path) -> None:
    mix = tmp_path / "mix.parquet"
    steps = pd.read_parquet(TARGET_STEPS)
    steps[steps["regime"].isin(HEAVY)].drop(columns="step_time_s").to_parquet(mix)
    by = [planned("--deployment", mix, *GRID, "--json", posterior=p).json for p in (chain().donors, chain().target)]
    assert by[1]["before"]["error"] < 0.5 * by[0]["before"]["error"]
    assert by[1]["before"]["probability"] > by[0]["before"]["probability"] == 0.0
    assert by[0]["before"]["unjudged"] > by[1]["before"]["unjudged"]


def test_a_configuration_never_seen_needs_its_yaml_alone(tmp_path: Path) -> None:
    own = TraceStore(STORE).configuration(TARGET)
    file, mix = tmp_path / "new.yaml", tmp_path / "mix.yaml"
    write_configuration(own.model_copy(update={"config_id": "new"}), file)
    mix.write_text("- {concurrency: 4, prompt_tokens: {uniform: [50, 200]}, output_tokens: 20, duration_s: 10}\n")
    found = done("plan", chain().donors, file, "--deployment", mix, *GRID, "--budget-minutes", 0.3)
    assert "new: the deployment mix is expected to be off by" in found.out
    assert "P(MAPE <" in found.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--deployment", "load9"), "unknown regime"),
        (("--deployment", "none.parquet"), "none.parquet does not exist"),
        (("--deployment", "none.yaml"), "no traffic file at none.yaml"),
        (("--deployment", "load1.2", "--concurrency", "few"), "--concurrency takes numbers"),
        (("--deployment", "load1.2", "--prompt-tokens", ","), "the grid of traffic is empty: --prompt-tokens"),
        (("--deployment", "load1.2", "--prompt-tokens", "60,4000"), "cannot serve prompt_tokens 4000"),
        (("--deployment", "load1.2", *GRID, "--budget-minutes", "0.01"), "smaller than one segment"),
        (("--deployment", "load1.2", *GRID, "--mape-limit", "0"), "mape_limit must be a positive number"),
        (("--deployment", "load1.2", *GRID, "--out", "plan.txt"), "plan.txt ends in '.txt'"),
        (("--deployment", "load1.2", *GRID, "--port", "0", "--bench-commands", "x.sh"), "port is 0"),
    ],
)
def test_plans_that_cannot_be_made(words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = planned(*words, ran=run)
    assert found.code == 2
    assert message in found.err
    assert found.out == ""
    assert not list(tmp_path.iterdir())


def test_a_posterior_of_donors_has_no_target_to_plan_for() -> None:
    found = run("plan", chain().donors, STORE, "--deployment", "load1.2")
    assert found.code == 2
    assert "give --config" in found.err


# --- follow ----------------------------------------------------------------------------------------------------------------------


def filling(folder: Path, *, rows: int = 200, count: int = 5) -> Path:
    """A store whose target has its trace in parts, one of them cut short."""
    own = folder / "store" / TARGET
    parts = own / "steps.parquet"
    parts.mkdir(parents=True)
    (own / "configuration.yaml").write_bytes((STORE / TARGET / "configuration.yaml").read_bytes())
    steps = pd.read_parquet(TARGET_STEPS)
    steps = steps[steps["regime"].str.startswith("load")]
    for i in range(count):
        steps.iloc[rows * i : rows * (i + 1)].to_parquet(parts / f"part-{i}.parquet")
    (parts / "part-9.parquet").write_bytes(TARGET_STEPS.read_bytes()[:500])
    return folder / "store"


def followed(store: Path, folder: Path, *words: object, ran: object = done) -> Ran:
    mix = folder / "mix.parquet"
    steps = pd.read_parquet(TARGET_STEPS)
    steps[steps["regime"].isin(HEAVY)].to_parquet(mix)
    times = ("--poll-seconds", 0.01, "--settle-seconds", 0)
    return ran(
        "follow",
        chain().donors,
        store,
        "--config",
        TARGET,
        "--deployment",
        mix,
        "--out",
        folder / "target.nc",
        *GRID,
        *times,
        *words,
    )


def test_parts_are_followed_until_the_verdict_accepts(tmp_path: Path) -> None:
    plan = tmp_path / "next.json"
    found = followed(filling(tmp_path), tmp_path, "--plan", plan, "--mape-limit", 0.3, "--idle-minutes", 0.02, "--json")
    assert found.json["end"] == "accepted"
    assert found.json["accepted"]
    assert found.json["verdict"]["outcome"] == "accept"
    assert found.json["parts"] == [f"part-{i}.parquet" for i in range(5)]
    assert "part set aside: " in found.err
    assert "part-9.parquet cannot be read" in found.err
    assert json.loads(plan.read_text())["config_id"] == TARGET
    saved = LatencyPosterior.load(tmp_path / "target.nc")
    assert saved.target == TARGET
    assert saved.statistics[-1].rows < found.json["rows"]


def test_what_does_not_come_is_not_waited_for_without_end(tmp_path: Path) -> None:
    store = filling(tmp_path, count=0)
    words = ("--idle-minutes", 0.001)
    assert "nothing came after 0 part(s), 0 rows; verdict none yet" in followed(store, tmp_path, *words).out
    gated = followed(store, tmp_path, *words, "--gate", "--json", ran=run)
    assert (gated.code, gated.json["end"], gated.json["verdict"]) == (1, "nothing came", None)
    assert not (tmp_path / "target.nc").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--poll-seconds", "0"), "poll_s must be a positive number"),
        (("--idle-minutes", "-1"), "idle_s must be a positive number"),
        (("--out", "posterior.csv"), "posterior.csv ends in '.csv'"),
    ],
)
def test_loops_that_cannot_be(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    found = followed(filling(tmp_path, count=0), tmp_path, *words, ran=run)
    assert found.code == 2
    assert message in found.err


def test_a_file_is_not_followed(tmp_path: Path) -> None:
    found = followed(STORE, tmp_path, ran=run)
    assert found.code == 2
    assert "is a file, which is read once" in found.err


def test_defaults_repeated_for_the_help_are_those_of_the_loop() -> None:
    assert FollowSettings.poll_s == follow_command.POLL_S
    assert FollowSettings.idle_s == 60 * follow_command.IDLE_MINUTES
