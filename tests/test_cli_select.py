"""`select`, and `calibrate` on what it chose."""

from __future__ import annotations

import inspect as introspection
import sys
from pathlib import Path

import pandas as pd
import pytest
from cli_runs import STORE, TARGET_STEPS, Ran, chain, done, run

from hfdtl_bayes.cli import select as command
from hfdtl_bayes.design import Acquisition, SelectionSettings, select_rows
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.sample import TARGET
from hfdtl_bayes.traces import TraceStore
from hfdtl_bayes.transfer import usable_rows

LIGHT, HEAVY = ("calib", "load0.15", "load0.5"), ("load1.2", "load2.0")


def selected(*words: object, done_or_run=done) -> Ran:
    return done_or_run("select", chain().donors, STORE, "--config", TARGET, *words)


def test_chosen_rows_are_calibrated_on(tmp_path: Path) -> None:
    out = tmp_path / "selection.csv"
    words = ("--budget", 40, "--regimes", ",".join(LIGHT), "--deployment", ",".join(HEAVY), "--out", out)
    found = selected(*words, "--json").json
    posterior, store = LatencyPosterior.load(chain().donors), TraceStore(STORE)
    rows = usable_rows(store.steps(TARGET).frame, store.configuration(TARGET), posterior.feature_set)
    pool, mix = (rows[rows["regime"].isin(r)] for r in (LIGHT, HEAVY))
    same = select_rows(posterior, pool, store.configuration(TARGET), 40, deployment=mix)
    table = pd.read_csv(out)
    assert table["step_id"].tolist() == same.ids.tolist() == [s["step_id"] for s in found["selection"]]
    assert (found["rows"], found["pool_rows"], found["deployment_rows"]) == (40, len(pool), len(mix))
    assert found["acquisition"] == str(same.acquisition)
    assert found["expected_mape"] == pytest.approx(same.expected_mape[-1])
    assert found["expected_mape"] < found["expected_mape_before"]
    calibrated = done(
        "calibrate", chain().donors, STORE, "--config", TARGET, "--rows", out, "--out", tmp_path / "t.nc", "--json",
        "--engine", "conditional",
    )  # fmt: skip
    assert calibrated.json["rows"][TARGET] == 40
    # The calibrated target is told what to measure next, and does not name those rows again.
    again = done("select", tmp_path / "t.nc", STORE, "--config", TARGET, *words[:-1], tmp_path / "more.csv", "--json").json
    assert not {s["step_id"] for s in again["selection"]} & set(table["step_id"])
    assert again["expected_mape_before"] < found["expected_mape_before"]


def test_a_table_of_steps_is_a_deployment_mix(tmp_path: Path) -> None:
    steps = pd.read_parquet(TARGET_STEPS)
    mix = tmp_path / "mix.csv"
    steps[steps["regime"].isin(HEAVY)].drop(columns="step_time_s").to_csv(mix, index=False)
    words = ("--budget", 10, "--per-second", "--draws", 8, "--json")
    table = selected(*words, "--deployment", mix, "--out", tmp_path / "a.csv").json
    regimes = selected(*words, "--deployment", ",".join(HEAVY), "--out", tmp_path / "b.csv").json
    assert table["selection"] == regimes["selection"]


def test_a_pool_that_teaches_little_of_the_mix_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the light steps' own variance the pool leaves 9 %, of long prefills, of which it has next to none, 29 %.
    monkeypatch.setattr(sys.modules["hfdtl_bayes.cli.select"], "_OUT_OF_REACH", 0.2)
    steps = pd.read_parquet(TARGET_STEPS)
    few = steps[steps["regime"] == "load0.15"]
    for tokens, said in ((0, False), (1500, True)):
        few.assign(prefill_tokens=tokens, prefill_requests=int(tokens > 0)).to_csv(tmp_path / "mix.csv", index=False)
        words = ("--regimes", "load0.15", "--deployment", tmp_path / "mix.csv", "--out", tmp_path / "s.csv")
        ran = selected("--budget", 5, *words)
        assert ("this pool teaches little of that traffic" in ran.err) == said


def test_words_for_a_person(tmp_path: Path) -> None:
    ran = selected("--budget", 3, "--acquisition", "random", "--seed", 4, "--out", tmp_path / "s.csv")
    assert f"3 rows of {TARGET} chosen by random" in ran.out
    assert "total_cost_s" in ran.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no budget given"),
        (("--budget", 0), "a budget of 0 row(s)"),
        (("--budget-seconds", 1e-7), "smaller than one step"),
        (("--budget", 3, "--acquisition", "best"), "unknown acquisition 'best'"),
        (("--budget", 3, "--acquisition", "residual"), "needs a first fit"),
        (("--budget", 3, "--deployment", "load9"), "--deployment: unknown regime(s) load9"),
        (("--budget", 3, "--regimes", ","), "--regimes: unknown regime(s) (none given)"),
        (("--budget", 3, "--deployment", "nowhere.parquet"), "nowhere.parquet does not exist"),
        (("--budget", 3, "--block-length", "auto"), "--block-length auto is found from step times"),
        (("--budget", 3, "--cost", "price"), "no column 'price'"),
    ],
)
def test_bad_input_is_one_message_and_no_file(tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    ran = selected(*words, "--out", tmp_path / "s.csv", "--json", done_or_run=run)
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err
    assert list(tmp_path.iterdir()) == []


def test_defaults_are_those_of_python() -> None:
    offered = {n: p.default for n, p in introspection.signature(command.select).parameters.items()}
    settings = SelectionSettings()
    assert (offered["draws"], offered["misfit"], offered["per_bin"]) == (settings.draws, settings.misfit, settings.per_bin)
    assert offered["block_length"] == str(settings.block_length)
    assert introspection.signature(select_rows).parameters["acquisition"].default is Acquisition(offered["acquisition"])
