"""`priors`, `inspect`, `sensitivity` and `fit --priors` through the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from cli_runs import FEW_DRAWS, STORE, chain, configuration_file, contents, done, run

import hfdtl_bayes
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.model import LatencyPosterior, PriorSettings
from hfdtl_bayes.model.identifiability import configuration_moments, directions
from hfdtl_bayes.model.prior_files import priors_yaml
from hfdtl_bayes.sample import DONORS, TARGET

ROOFLINE = feature_set("roofline")
CONSTANT = ("weight_read", "constant")


def refused(*words: object) -> str:
    ran = run(*words)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("error: ") == 1
    return ran.err


# priors


def test_every_prior_is_a_sentence() -> None:
    ran = done("priors", "--json")
    assert tuple(ran.json["sentences"]) == PriorSettings().sentences(ROOFLINE)
    assert done("priors").out.splitlines() == ran.json["sentences"]


def test_the_template_is_written_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "priors.yaml"
    done("priors", "--features", "hfdtl", "--template", "--out", path)
    assert path.read_text() == priors_yaml(feature_set("hfdtl"))
    assert done("priors", "--features", "hfdtl", "--template").out == path.read_text()
    again = done("priors", "--features", "hfdtl", "--priors", path, "--json").json
    assert again["own_priors"] == []
    assert again["sentences"] == done("priors", "--features", "hfdtl", "--json").json["sentences"]
    assert [p.name for p in tmp_path.iterdir()] == ["priors.yaml"]


def test_what_the_priors_predict_for_a_configuration_never_seen(tmp_path: Path) -> None:
    own = configuration_file(tmp_path / "new.yaml")
    ran = done("priors", "--configuration", own, "--json", "--seed", 4)
    assert ran.json["config_id"] == "never-seen"
    assert ran.json["flags"] == []
    assert ran.json["observed"] is None
    batches = [row["batch"] for row in ran.json["predictive"]]
    assert batches[0] == "one request decoding"
    assert all(row["q5_s"] < row["q50_s"] < row["q95_s"] for row in ran.json["predictive"])
    assert done("priors", "--configuration", own, "--json", "--seed", 4).out == ran.out
    text = done("priors", "--configuration", own).out
    assert "nothing the priors say of these batches looks impossible" in text


def test_a_trace_is_held_against_the_priors(tmp_path: Path) -> None:
    ran = done("priors", "--store", STORE, "--config", TARGET, "--json")
    assert ran.json["observed"]["inside_90"] > 0.8
    assert ran.json["flags"] == []
    slow = tmp_path / "slow.yaml"
    slow.write_text("deviation: [0.01, 0.02]\npopulation: {kv_read: [300, 400], sequences: [300, 400]}\n")
    ran = done("priors", "--store", STORE, "--config", TARGET, "--priors", slow)
    assert "times what the hardware needs with probability" in ran.out
    assert "observed rows together are faster than the prior expects" in ran.out


def test_delays_are_predicted_for_observed_requests() -> None:
    ran = done("priors", "--quantity", "queue_delay", "--store", STORE, "--config", TARGET, "--json")
    assert all(row["batch"].endswith(" requests waiting") for row in ran.json["predictive"])
    assert ran.json["observed"]["rows"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "x.yaml"), "--out goes with --template"),
        (("--store", STORE), "give --store and --config together"),
        (("--config", TARGET), "give --store and --config together"),
        (("--features", "rooflin"), "unknown feature set 'rooflin'"),
        (("--priors", "none.yaml"), "no priors at none.yaml"),
        (("--store", STORE, "--config", "nobody"), "nobody"),
        (
            ("--quantity", "queue_delay", "--configuration", STORE / TARGET / "configuration.yaml"),
            "give rows with waiting_requests",
        ),
    ],
)
def test_what_cannot_be_printed_is_refused(words: tuple[object, ...], message: str) -> None:
    assert message in refused("priors", *words)


# fit --priors


def test_a_fit_under_own_priors_keeps_them(tmp_path: Path) -> None:
    path, out = tmp_path / "priors.yaml", tmp_path / "donors.nc"
    path.write_text("deviation: [0.05, 0.3]\ndrift_spread: [0.1, 0.5]\npopulation: {kv_read: [0.9, 1.1]}\n")
    done("fit", STORE, "--donors", DONORS[0], "--priors", path, "--out", out, "--json", *FEW_DRAWS)
    loaded = LatencyPosterior.load(out)
    assert loaded.feature_set.own_priors == ("kv_read",)
    assert loaded.priors.deviation.high == 0.3
    provenance = done("inspect", out, "--json").json
    assert provenance["provenance"]["own_priors"] == ["kv_read"]
    assert "90 % of the population coefficient of kv_read lies between 0.9 and 1.1" in provenance["priors"]["sentences"]
    # A target of these donors is calibrated under the same priors.
    target = tmp_path / "target.nc"
    done("calibrate", out, STORE, "--config", TARGET, "--max-rows", 100, "--out", target, "--json", *FEW_DRAWS)
    assert LatencyPosterior.load(target).feature_set == loaded.feature_set
    assert LatencyPosterior.load(target).priors == loaded.priors


def test_bad_priors_leave_the_previous_result(tmp_path: Path) -> None:
    path, out = tmp_path / "priors.yaml", tmp_path / "donors.nc"
    out.write_bytes(b"previous")
    path.write_text("deviation: [0.6, 0.1]\npopulation: {kv_reads: [0, 1]}\n")
    before = contents(tmp_path)
    said = refused("fit", STORE, "--donors", DONORS[0], "--priors", path, "--out", out, *FEW_DRAWS)
    assert f"{path} does not hold valid priors" in said
    assert "deviation: the lower bound comes first and is smaller, found [0.6, 0.1]" in said
    assert "population.kv_reads: unknown feature of roofline; did you mean kv_read?" in said
    assert contents(tmp_path) == before


# Rows that do not tell columns apart


def test_traffic_that_leaves_columns_out_is_warned_of(tmp_path: Path) -> None:
    donor = tmp_path / "store" / DONORS[0]
    shutil.copytree(STORE / DONORS[0], donor)
    steps = pd.read_parquet(donor / "steps.parquet")
    steps[steps["prefill_tokens"] == 0].to_parquet(donor / "steps.parquet", index=False)
    ran = done("fit", donor.parent, "--donors", DONORS[0], "--out", tmp_path / "donors.nc", "--json", *FEW_DRAWS)
    said = f"{DONORS[0]}: absent from these rows, so prior and other configurations decide: "
    (line,) = [line for line in ran.err.splitlines() if said in line]
    assert line.startswith("warning: ")
    assert "prefill_attention" in line
    assert ran.json["not_told_apart"][DONORS[0]][0] in line
    assert set(chain().fitted.json["not_told_apart"]) == set(DONORS)
    assert not any(chain().fitted.json["not_told_apart"].values())
    assert chain().calibrated.json["not_told_apart"] == {TARGET: []}


# inspect


def test_inspect_says_what_is_known_and_by_whom() -> None:
    made = chain()
    posterior = LatencyPosterior.load(made.target)
    found = done("inspect", made.target, "--json").json
    assert set(found["directions"]) == {"population", *posterior.config_ids}
    for config_id in posterior.config_ids:
        expected = directions(configuration_moments(posterior, config_id))
        assert [d["name"] for d in found["directions"][config_id]] == [d.name for d in expected]
        np.testing.assert_allclose([d["data"] for d in found["directions"][config_id]], [d.data for d in expected])
        # Weights are read in every step, and so is the constant there.
        dependencies = [tuple(d["columns"]) for d in found["design"][config_id]["dependencies"] if d["condition_index"] is None]
        assert CONSTANT in dependencies
        assert found["design"][config_id]["condition_number"] is None
        assert found["design"][config_id]["identified_condition_number"] > 1
    assert "all_reduce" in found["design"][TARGET]["not_applicable"]
    (all_reduce,) = [d for d in found["directions"][TARGET] if d["name"] == "all_reduce"]
    assert all_reduce["decided_by"] == "the prior"
    assert {row["p_negative"] >= 0 for row in found["coefficients"]} == {True}
    assert len(found["coefficients"]) == len(posterior.coefficient_table())
    assert found["provenance"]["seed"] == posterior.seed
    assert found["provenance"]["input_hash"] == posterior.input_hash
    assert found["provenance"]["package_version"] == hfdtl_bayes.__version__
    assert found["rows"][TARGET]["rows"] == 300
    assert 0 < found["rows"][TARGET]["level"] < 300
    assert found["convergence"]["draws"] == posterior.convergence().draws


def test_inspect_tells_it_in_words() -> None:
    text = done("inspect", chain().donors).out
    assert "the rows decide a combination of weight_read and constant but cannot tell them apart" in text
    assert "condition number of the scaled design" in text
    assert "all_reduce: decided by the prior; rows removed" in text
    assert f"target: {TARGET}" not in text
    assert f"donors: {', '.join(DONORS)}" in text


# sensitivity


def test_sensitivity_of_a_configuration_never_seen(tmp_path: Path) -> None:
    own = configuration_file(tmp_path / "new.yaml")
    found = done("sensitivity", chain().donors, "--configuration", own, "--json").json
    assert not found["fitted"]
    doubled = [r["width_ratio"] for r in found["predictions"] if (r["scale"], r["factor"]) == ("deviation", 2.0)]
    assert min(doubled) > 1.1
    assert any("doubling the range of the deviations" in s and " widen by " in s for s in found["sentences"])
    assert {r["prior"] for r in found["power_scaling"]} >= {"deviation", "population", "likelihood"}


def test_sensitivity_needs_somebody_to_predict() -> None:
    assert "this posterior has no calibrated target" in refused("sensitivity", chain().donors)


def test_the_file_of_priors_is_one_a_planner_can_read() -> None:
    lines = done("priors", "--template").out.splitlines()
    keys = [line.split(":")[0] for line in lines if line and not line.startswith((" ", "#"))]
    assert keys == list(yaml.safe_load("\n".join(lines)))
    assert sum(line.lstrip().startswith("# ") for line in lines) == 1 + 7 + len(ROOFLINE.features)
