"""`export` and `compare` on the command line: every format, fleets, cards converted, and what is refused before anything is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from cli_runs import STORE, TARGET, TARGET_STEPS, chain, configuration_file, contents, done, run

from hfdtl_bayes.export import parse_card, read_card, read_ensemble
from hfdtl_bayes.sample import DONORS


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "target.json"
    done("export", chain().target, "--format", "json", "--store", STORE, "--out", out)
    return out


def test_a_card_holds_verdict_accuracy_and_vectors(card: Path):
    data = read_card(card).data
    assert data["verdict"]["outcome"] in {"accept", "collect_more", "expand_residual", "retrain_as_donor", "sample_again"}
    assert data["accuracy"]["held_out_rows"] > 100
    assert 0 < data["accuracy"]["attainable_mape"] < data["accuracy"]["held_out_mape"] < 0.5
    assert data["provenance"]["target"] == TARGET
    assert data["regime_of_validity"]["regimes"]
    # Of the older backends those that cannot express the posterior are named with the reason.
    assert {v["backend"] for v in data["blis"]["vectors"]} | set(data["blis"]["refused"]) == {
        "trained-physics", "blackbox", "crossmodel",
    }  # fmt: skip


def test_json_is_read_back_and_written_the_same(card: Path, tmp_path: Path):
    again = tmp_path / "again.json"
    done("export", card, "--format", "json", "--out", again)
    assert again.read_bytes() == card.read_bytes()
    # The vectors in the card are those of a direct export, text for text.
    for kind, name in (("blis-yaml", "v.yaml"), ("blis-flags", "v.txt")):
        direct, converted = tmp_path / f"direct-{name}", tmp_path / f"card-{name}"
        done("export", chain().target, "--format", kind, "--store", STORE, "--out", direct)
        done("export", card, "--format", kind, "--out", converted)
        assert converted.read_bytes() == direct.read_bytes()


def test_a_card_without_a_store_judges_nothing(tmp_path: Path):
    ran = done(
        "export", chain().donors, "--format", "json", "--configuration", configuration_file(tmp_path / "n.yaml"), "--json"
    ).json
    data = parse_card(ran["text"]).data
    assert data == ran["card"]
    assert data["verdict"] is None
    assert data["regime_of_validity"] is None
    assert data["provenance"]["fitted"] is False


def test_go_is_written_with_its_test(tmp_path: Path):
    out = tmp_path / "latency.go"
    ran = done("export", chain().target, "--format", "go", "--configurations", "all", "--out", out, "--json").json
    assert ran["config_ids"] == [*DONORS, TARGET]
    assert out.read_text().count("DO NOT EDIT") == 1
    assert f'"{TARGET}"' in (tmp_path / "latency_test.go").read_text()


def test_an_ensemble_is_reproducible_and_replaces_the_one_before(tmp_path: Path):
    out = tmp_path / "draws"
    words = ("export", chain().target, "--format", "ensemble", "--store", STORE, "--out", out, "--json", "--draws")
    done(*words, 6)
    ran = done(*words, 4).json
    assert ran["draws"] == 4
    stored = read_ensemble(out)
    assert len(list(out.glob("draw-*.yaml"))) == len(stored.beta) == 4
    before = contents(out)
    done(*words, 4)
    assert contents(out) == before
    assert (np.ptp(stored.beta, axis=0) > 0).any()


def test_a_fleet_is_one_file_each_and_an_index(tmp_path: Path):
    out, new = tmp_path / "fleet", configuration_file(tmp_path / "new.yaml", "new-one")
    words = (
        "export",
        chain().target,
        "--format",
        "blis-yaml",
        "--configurations",
        f"{DONORS[0]},{TARGET},{new}",
        "--store",
        STORE,
    )
    ran = run(*words, "--out", out, "--json", "--max-projection-error", 0.5)
    assert ran.code == 0, ran.err
    assert "new-one" in ran.err  # the store does not hold it, which is said
    index = json.loads((out / "index.json").read_text())
    files = {e["config_id"]: out / e["file"] for e in index["configurations"]}
    assert list(files) == [DONORS[0], TARGET, "new-one"]
    for file in files.values():
        assert list(yaml.safe_load(file.read_text())) == ["trained_physics_coefficients"]
    assert sorted(p.name for p in out.iterdir()) == sorted(["index.json", *(f.name for f in files.values())])


def test_what_a_fleet_refuses_is_named_and_the_others_are_kept(tmp_path: Path):
    out = tmp_path / "fleet"
    words = ("export", chain().target, "--format", "blis-flags", "--configurations", f"{DONORS[0]},{TARGET}", "--store", STORE)
    # Between the losses of the two.
    loss = {
        c: done("export", chain().target, "--format", "blis-flags", "--config", c, "--store", STORE, "--json").json["projection"]
        for c in (DONORS[0], TARGET)
    }
    sizes = sorted((v["mean_relative_difference"], c) for c, v in loss.items())
    ran = run(*words, "--out", out, "--max-projection-error", np.mean([s for s, _ in sizes]))
    assert ran.code == 2
    assert f"1 of 2 configurations cannot be exported ({sizes[1][1]}" in ran.err
    index = json.loads((out / "index.json").read_text())
    assert [e["config_id"] for e in index["configurations"]] == [sizes[0][1]]
    assert list(index["refused"]) == [sizes[1][1]]


def test_a_fleet_for_blackbox_is_one_file_with_an_entry_each(tmp_path: Path):
    out = tmp_path / "defaults.yaml"
    words = (
        "export",
        chain().target,
        "--format",
        "blis-yaml",
        "--backend",
        "blackbox",
        "--configurations",
        "all",
        "--store",
        STORE,
    )
    done(*words, "--max-projection-error", 0.9, "--out", out)
    models = yaml.safe_load(out.read_text())["models"]
    assert len(models) == len(DONORS) + 1
    assert {tuple(sorted(m)) for m in models} == {
        ("GPU", "alpha_coeffs", "best_loss", "beta_coeffs", "id", "tensor_parallelism", "vllm_version")
    }
    assert all(v >= 0 for m in models for v in (*m["alpha_coeffs"], *m["beta_coeffs"]))


def test_alphas_of_ones_own(tmp_path: Path):
    words = ("export", chain().target, "--format", "blis-yaml", "--traffic", TARGET_STEPS, "--json", "--alpha")
    assert [a["value"] for a in done(*words, "1500,20,3.5").json["alpha"]] == [1500.0, 20.0, 3.5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "go"), "--format go writes a file; name it with --out"),
        (("--format", "ensemble"), "--format ensemble writes a folder"),
        (("--format", "json", "--configurations", "all"), "of a fleet writes a folder"),
        (("--format", "ensemble", "--configurations", "all", "--out", "{out}"), "of one configuration"),
        (("--format", "go", "--out", "{out}.txt"), "the format follows the suffix"),
        (("--format", "blis-yaml", "--configurations", "all", "--config", TARGET, "--out", "{out}"), "takes the place of --config"),
        (("--format", "blis-yaml", "--configurations", "all", "--traffic", TARGET_STEPS, "--out", "{out}"), "--traffic"),
        (("--format", "blis-yaml", "--configurations", ",", "--out", "{out}"), "names none"),
        (("--format", "blis-yaml", "--configurations", f"{TARGET},{TARGET}", "--out", "{out}"), "more than once"),
        (("--format", "blis-yaml", "--configurations", "nobody", "--out", "{out}"), "was not fitted"),
        (("--format", "blis-yaml", "--alpha", "1,2"), "three numbers"),
        (("--format", "blis-yaml", "--alpha", "1,x,2"), "three numbers"),
        (("--format", "blis-yaml", "--alpha", "1,nan,2", "--max-projection-error", "1"), "a1 is nan"),
        (("--format", "blis-yaml", "--alpha", "-1,0,2", "--max-projection-error", "1"), "a0 is -1"),
        (("--format", "blis-yaml", "--backend", "crossmodel", "--max-projection-error", "1e-6"), "crossmodel.*cannot express"),
        (("--format", "go", "--out", "{out}.go", "--package", "No-Name"), "no name of a Go package"),
        (("--format", "ensemble", "--out", "{out}", "--draws", "100000"), "accepted are 2 to"),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(map(str, v))[:50],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_and_nothing_written(words: tuple[object, ...], message: str, tmp_path: Path):
    out = tmp_path / "out"
    ran = run("export", chain().target, *(str(w).format(out=out) for w in words))
    assert ran.code == 2, ran.out
    assert re.search(message, ran.err.replace("\n", " ")), ran.err
    assert ran.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    before = contents(tmp_path)
    fleet = ("--format", "blis-yaml", "--configurations", "all", "--max-projection-error", 0.9)
    for words in (("--format", "ensemble", "--draws", 2, "--traffic", TARGET_STEPS), fleet):
        ran = run("export", chain().target, *words, "--out", tmp_path / "precious")
        assert ran.code == 2
        assert "whose place it would take" in ran.err or "takes the place of its folder" in ran.err
    assert contents(tmp_path) == before


def test_a_card_cannot_become_what_needs_draws(card: Path, tmp_path: Path):
    ran = run("export", card, "--format", "go", "--out", tmp_path / "x.go")
    assert ran.code == 2
    assert "needs the posterior" in ran.err


# compare


def test_compare_posterior_card_vectors_ensemble_and_shipped(card: Path, tmp_path: Path):
    vectors, draws, moved = tmp_path / "v.yaml", tmp_path / "draws", tmp_path / "moved.csv"
    done("export", chain().target, "--format", "blis-yaml", "--store", STORE, "--out", vectors)
    done("export", chain().target, "--format", "ensemble", "--draws", 5, "--store", STORE, "--out", draws)
    ran = done(
        "compare", chain().target, card, vectors, draws, "shipped", "--store", STORE, "--out", moved, "--json"
    ).json  # fmt: skip
    errors = pd.DataFrame(ran["errors"])
    over_all = errors[errors["regime"] == "all rows"].set_index("set")
    assert list(over_all.index) == [str(chain().target), str(card), str(vectors), str(draws), "shipped"]
    # A card predicts what its posterior does; rows are those the target was not calibrated on.
    assert over_all.loc[str(card), "mape"] == pytest.approx(over_all.loc[str(chain().target), "mape"], rel=1e-9)
    held_out = read_card(card).data["accuracy"]
    assert over_all.loc[str(card), "mape"] == pytest.approx(held_out["held_out_mape"], rel=1e-9)
    assert int(over_all["rows"].iloc[0]) == held_out["held_out_rows"]
    # A vector for H100s on a CPU is off by far.
    assert over_all.loc["shipped", "mape"] > 3 * over_all.loc[str(vectors), "mape"]
    moves = pd.DataFrame(ran["moves"])
    own = moves[(moves["set"] == str(card)) & (moves["basis"] == "roofline")]
    assert len(own) == 10
    assert own["moved_sds"].abs().max() < 1e-6
    assert ran["reference"] == str(chain().target)
    assert len(pd.read_csv(moved)) == len(moves)
    assert ran["calibrated_on_these_rows"] == []


def test_two_calibrations_are_judged_on_rows_neither_has_seen(tmp_path: Path):
    copy = tmp_path / "copy.nc"
    copy.write_bytes(chain().target.read_bytes())
    ran = done("compare", chain().target, copy, "--store", STORE, "--json").json
    assert ran["calibrated_on_these_rows"] == []
    assert {m["moved_sds"] for m in ran["moves"]} == {0.0}
    errors = pd.DataFrame(ran["errors"]).set_index(["set", "regime"])
    pd.testing.assert_frame_equal(errors.loc[str(copy)], errors.loc[str(chain().target)])


def test_donors_are_judged_on_rows_they_know_and_that_is_said():
    ran = done("compare", chain().donors, "shipped", "--store", STORE, "--config", DONORS[0], "--json")
    assert ran.json["calibrated_on_these_rows"] == [str(chain().donors)]
    assert "a donor is fitted to all of its rows" in ran.err


def test_compare_finds_what_a_calibration_moved():
    ran = done(
        "compare", chain().donors, chain().target, "--store", STORE, "--config", TARGET, "--regimes", "load0.85", "--json"
    ).json
    moves = pd.DataFrame(ran["moves"])
    moves = moves[moves["basis"] == "roofline"].set_index("coefficient")
    np.testing.assert_allclose(moves["moved_sds"], (moves["value"] - moves["reference"]) / moves["sd"])
    assert moves["moved_sds"].abs().max() > 0.5
    assert {e["regime"] for e in ran["errors"]} == {"load0.85", "all rows"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{target}",), "two sets of coefficients or more"),
        (("shipped", "shipped"), "of different names"),
        (("shipped", "nothing.yaml"), "no BLIS file at nothing.yaml"),
        (("shipped", "nothing.json"), "no coefficient card at"),
        (("shipped", "thing.txt"), "is no set of coefficients"),
        (("shipped", "{folder}"), "no ensemble at"),
        (("shipped", "{target}", "--regimes", "no-such"), "no-such"),
    ],
)
def test_compare_refuses(words: tuple[str, ...], message: str, tmp_path: Path):
    made = [w.format(target=chain().target, folder=tmp_path) for w in words]
    ran = run("compare", *made, "--store", STORE, "--config", TARGET)
    assert ran.code == 2
    assert message in ran.err


def test_compare_needs_a_configuration(tmp_path: Path):
    ran = run("compare", "shipped", chain().donors, "--store", STORE)
    assert ran.code == 2
    assert "--config" in ran.err
