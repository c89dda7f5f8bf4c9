"""`cross-validate` and `choose-donors` as a user runs them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from cli_runs import STORE, Ran, configuration_file, done, run, steps_of

from hfdtl_bayes.cli.cross_validation import ROWS
from hfdtl_bayes.sample import DONORS, TARGET
from hfdtl_bayes.transfer import CrossValidationSettings

TWO = ",".join(DONORS[:2])
THREE = ",".join(DONORS)


@cache
def validated(folder: Path) -> Ran:
    words = ("--donors", TWO, "--leave-out", "configuration,hardware", "--rows", "0", "--seed", 3)
    return done("cross-validate", STORE, *words, "--out", folder / "scores.csv", "--figure", folder / "curve.svg", "--json")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cross-validate")


def test_cross_validate_tells_the_expected_error_and_writes_table_and_figure(folder: Path):
    found = validated(folder)
    result = found.json
    table = pd.read_csv(folder / "scores.csv")
    assert list(table["config"]) == list(DONORS[:2])
    assert [line["mape"] for line in result["table"]] == pytest.approx(list(table["mape"]))
    (expected,) = result["expected_error"]
    assert (expected["leave_out"], expected["rows"], expected["configurations"]) == ("configuration", 0, 2)
    assert expected["new_low"] < expected["low"] < expected["typical"] < expected["high"] < expected["new_high"]
    assert "<svg" in (folder / "curve.svg").read_text()
    assert "zero-shot" in (folder / "curve.svg").read_text()
    assert (result["quantity"], result["features"], result["seed"]) == ("step_time", "roofline", 3)


def test_what_is_skipped_is_said(folder: Path):
    found = validated(folder)
    (skipped,) = found.json["skipped"]
    assert (skipped["leave_out"], skipped["value"]) == ("hardware", "cpu-zen4-1core")
    assert "skipped: leave out hardware cpu-zen4-1core: all 2 donors share it" in found.err


def test_rows_by_default_are_those_of_the_settings():
    assert tuple(int(n) for n in ROWS.split(",")) == CrossValidationSettings().rows


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--donors", DONORS[0]), "needs two donors at least"),
        (("--donors", f"{DONORS[0]},nobody"), "'nobody' is not in the trace store"),
        (("--donors", TWO, "--leave-out", "colour"), "cannot leave out colour; accepted are configuration, model"),
        (("--donors", TWO, "--leave-out", "tp"), "all 2 donors share it, so none is left to predict from"),
        (("--donors", TWO, "--rows", "0,ten"), "--rows takes whole numbers from 0"),
        (("--donors", TWO, "--rows", ""), "--rows takes whole numbers from 0"),
        (("--donors", TWO, "--rows", "99999"), "no configuration has 99999 rows to calibrate on"),
        (("--donors", TWO, "--held-out-fraction", "1"), "held_out_fraction must lie between 0 and 1"),
        (("--donors", TWO, "--out", "scores.txt"), "the format follows the suffix: .csv or .parquet"),
        (("--donors", TWO, "--figure", "curve.gif"), "the format follows the suffix: .svg or .png"),
        (("--donors", TWO, "--block-length", "0"), "--block-length takes auto or a whole number"),
    ],
)
def test_bad_input_of_cross_validate(words: tuple[str, ...], said: str):
    ran = run("cross-validate", STORE, *words)
    assert ran.code == 2
    assert said in ran.err
    assert ran.out == ""


def test_choose_donors_ranks_for_a_yaml_and_for_a_target_of_the_store(tmp_path: Path):
    yaml = configuration_file(tmp_path / "wanted.yaml", "wanted", max_num_seqs=8)
    words = ("--candidates", THREE, "--targets", f"{yaml},{TARGET}", "--size", "1..2", "--scales", "prior")
    found = done("choose-donors", STORE, *words, "--out", tmp_path / "subsets.csv", "--json")
    result = found.json
    assert result["targets"] == ["wanted", TARGET]
    table = pd.read_csv(tmp_path / "subsets.csv")
    assert len(table) == 3 + 3
    assert [line["donors"] for line in result["table"]] == list(table["donors"])
    assert (table.groupby("size")["expected_error"].is_monotonic_increasing).all()
    assert ",".join(result["best"]) == table.loc[table["expected_error"].idxmin(), "donors"]
    assert result["searched"] == {"1": "all 3 subsets", "2": "all 3 subsets"}
    assert 0 < result["floor"] < table["model_error"].min()
    said = done("choose-donors", STORE, *words).out
    assert all(reason in said for reason in result["reasons"])


def test_choose_donors_for_traffic_and_with_a_donor_not_yet_traced(tmp_path: Path):
    yaml = configuration_file(tmp_path / "next.yaml", "next", like=DONORS[1], max_num_seqs=8)
    traffic = steps_of(TARGET).drop(columns="step_time_s")
    traffic[traffic["prefill_tokens"] == 0].to_parquet(tmp_path / "decode.parquet")
    words = (
        "--candidates",
        THREE,
        "--targets",
        TARGET,
        "--size",
        2,
        "--keep",
        DONORS[0],
        "--hypothetical",
        yaml,
        "--scales",
        "prior",
    )
    grid = done("choose-donors", STORE, *words, "--json").json
    decode = done("choose-donors", STORE, *words, "--traffic", tmp_path / "decode.parquet", "--json").json
    assert all(DONORS[0] in line["donors"].split(",") for line in grid["table"])
    assert {line["donor"]: line["traced"] for line in grid["additional"]}["next"] is False
    assert grid["table"][0]["model_error"] != pytest.approx(decode["table"][0]["model_error"], rel=0.01)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--candidates", DONORS[0], "--targets", TARGET), "needs two candidates at least"),
        (("--candidates", TWO, "--targets", "nobody"), "'nobody' is not in the trace store"),
        (("--candidates", TWO, "--targets", "absent.yaml"), "no configuration at absent.yaml"),
        (("--candidates", TWO, "--targets", DONORS[0]), "is the candidate"),
        (("--candidates", TWO, "--targets", TARGET, "--size", "5..2"), "--size takes a number of donors or from..to"),
        (("--candidates", TWO, "--targets", TARGET, "--size", "many"), "--size takes a number of donors or from..to"),
        (("--candidates", TWO, "--targets", TARGET, "--size", "7"), "no subset of size 7 can be made of 2 candidates"),
        (("--candidates", TWO, "--targets", TARGET, "--scales", "guess"), "scales must be 'posterior' or 'prior'"),
        (("--candidates", TWO, "--targets", TARGET, "--keep", "nobody"), "not among the candidates: nobody"),
    ],
)
def test_bad_input_of_choose_donors(words: tuple[str, ...], said: str):
    ran = run("choose-donors", STORE, *words)
    assert ran.code == 2
    assert said in ran.err
    assert ran.out == ""


def test_json_is_all_there_is_on_stdout(folder: Path):
    assert json.loads(validated(folder).out)["donors"] == list(DONORS[:2])
