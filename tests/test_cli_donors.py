"""`promote`, `forget`, `combine` and `fit --discount`, as typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_runs import FEW_DRAWS, STORE, chain, contents, done, run

from hfdtl_bayes import LatencyPosterior
from hfdtl_bayes.sample import DONORS, TARGET
from hfdtl_bayes.transfer import donors as donors_room

FIRST, *OTHERS = DONORS


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("promoted") / "donors.nc"
    ran = done("promote", chain().target, "--out", path, "--json", *FEW_DRAWS)
    path.with_suffix(".json").write_text(ran.out)
    assert ran.json["donors"] == [*DONORS, TARGET]
    assert ran.json["target"] is None
    assert ran.json["rows"][TARGET] == 300
    assert ran.json["discounts"] == {}
    # So few draws have not converged, and are not promoted as they are.
    assert f"{TARGET} promoted to donor and refitted, since its draws have NOT converged" in ran.json["convergence"]["note"]
    return path


def test_a_promoted_target_is_a_donor_of_the_file(promoted: Path) -> None:
    found = LatencyPosterior.load(promoted)
    before = LatencyPosterior.load(chain().target)
    assert found.donors == (*DONORS, TARGET)
    assert found.target is None
    assert found.input_hash == before.input_hash
    assert not found.calibration_rows.size


def test_promotion_with_a_statistics_file(tmp_path: Path) -> None:
    done("statistics", STORE, "--config", TARGET, "--out", tmp_path / "own.nc")
    ran = done("promote", chain().target, "--statistics", tmp_path / "own.nc", "--out", tmp_path / "d.nc", "--json", *FEW_DRAWS)
    assert ran.json["rows"][TARGET] > 1000
    assert f"refitted with {ran.json['rows'][TARGET]} rows in place of 300" in ran.json["convergence"]["note"]
    assert ran.json["input_hash"] == LatencyPosterior.load(tmp_path / "d.nc").input_hash


@pytest.mark.slow
def test_a_donor_forgotten_and_combined_again(promoted: Path, tmp_path: Path) -> None:
    ran = done("forget", promoted, "--donor", FIRST, "--out", tmp_path / "less.nc", "--seed", 3, *FEW_DRAWS)
    assert f"donor {FIRST} forgotten" in ran.out
    less = LatencyPosterior.load(tmp_path / "less.nc")
    assert less.donors == (*OTHERS, TARGET)
    again = done("forget", promoted, "--donor", FIRST, "--out", tmp_path / "again.nc", "--seed", 3, *FEW_DRAWS)
    np.testing.assert_array_equal(less.draws_of("theta"), LatencyPosterior.load(tmp_path / "again.nc").draws_of("theta"))
    assert again.out.replace("again.nc", "less.nc") == ran.out
    alone = done("fit", STORE, "--donors", FIRST, "--out", tmp_path / "one.nc", "--json", *FEW_DRAWS)
    assert alone.json["donors"] == [FIRST]
    both = done("combine", tmp_path / "less.nc", tmp_path / "one.nc", "--out", tmp_path / "all.nc", "--json", "--discount",
                f"{FIRST}=0.25", *FEW_DRAWS)  # fmt: skip
    assert both.json["donors"] == [*OTHERS, TARGET, FIRST]
    assert both.json["discounts"] == {FIRST: 0.25}


def test_discounts_are_fitted_kept_and_said(tmp_path: Path) -> None:
    out = tmp_path / "d.nc"
    ran = done("fit", STORE, "--donors", ",".join(DONORS), "--out", out, "--discount", f"{FIRST}=0.5", "--discount",
               "version<0.33=0.75", *FEW_DRAWS)  # fmt: skip
    said = f"what the rows of {FIRST} say of the population counts for 0.5 of a donor"
    assert said in ran.out
    posterior = LatencyPosterior.load(out)
    assert dict(posterior.priors.discounts) == {FIRST: 0.5} | dict.fromkeys(OTHERS, 0.75)
    assert f"{FIRST} (counts for 0.5)" in repr(posterior)
    shown = done("inspect", out)
    assert said in shown.out
    (tmp_path / "priors.yaml").write_text(f"discounts: {{{FIRST}: 0.5}}\n")
    by_file = ("fit", STORE, "--donors", ",".join(DONORS), "--out", tmp_path / "e.nc", "--priors", tmp_path / "priors.yaml")
    assert done(*by_file, "--json", *FEW_DRAWS).json["discounts"] == {FIRST: 0.5}
    in_full = done(*by_file, "--json", "--discount", f"{FIRST}=1", *FEW_DRAWS).json
    assert in_full["discounts"] == {}
    # The same donors in full: the same fit as without a word on discounts.
    assert in_full["coefficients"] == chain().fitted.json["coefficients"]


def bad_inputs() -> dict[str, tuple[tuple[object, ...], str]]:
    donors, target = chain().donors, chain().target
    fitting = ("fit", STORE, "--donors", ",".join(DONORS))
    return {
        "donors without a target": (("promote", donors), "there is no target to promote; calibrate one first"),
        "no statistics": (("promote", target, "--statistics", "no.nc"), "no statistics at no.nc"),
        "no such donor": (
            ("forget", donors, "--donor", "x"),
            f"'x' is not fitted here, not a donor; donors are {', '.join(DONORS)}",
        ),
        "the target": (("forget", target, "--donor", TARGET), f"'{TARGET}' is the calibrated target, not a donor"),
        "a target among donors": (("combine", donors, target), f"holds the target '{TARGET}'; promote it first"),
        "the same donors": (("combine", donors, donors), "are in both posteriors, and their rows would count twice"),
        "no posterior": (("combine", donors, "no.nc"), "no posterior at no.nc"),
        "above 1": ((*fitting, "--discount", f"{FIRST}=2"), "the number must lie in (0, 1]"),
        "zero": ((*fitting, "--discount", f"{FIRST}=0"), "the number must lie in (0, 1]"),
        "no number": ((*fitting, "--discount", FIRST), "cannot be read; give DONOR=NUMBER or version<VERSION=NUMBER"),
        "of nobody": ((*fitting, "--discount", f"{TARGET}=0.5"), f"'{TARGET}' is not among the donors {', '.join(DONORS)}"),
        "nothing that old": ((*fitting, "--discount", "version<0.1=0.5"), "no donor has an engine that old"),
        "rows": ((*fitting, "--discount", f"{FIRST}=0.5", "--engine", "rows"), 'engine "rows" cannot discount donors'),
    }


BAD = ("donors without a target", "no statistics", "no such donor", "the target", "a target among donors", "the same donors",
       "no posterior", "above 1", "zero", "no number", "of nobody", "nothing that old", "rows")  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_and_leaves_the_previous_file(case: str, tmp_path: Path) -> None:
    words, message = bad_inputs()[case]
    (tmp_path / "out.nc").write_text("previous")
    ran = run(*words, "--out", tmp_path / "out.nc")
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("error: ") == 1
    assert ran.out == ""
    assert {p.name for p in tmp_path.iterdir()} == {"out.nc"}
    assert (tmp_path / "out.nc").read_text() == "previous"


def test_an_interruption_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.nc").write_text("previous")

    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(donors_room, "fit", interrupted)
    ran = run("forget", chain().donors, "--donor", FIRST, "--refit", "--out", tmp_path / "out.nc")
    assert ran.code == 130
    assert contents(tmp_path).keys() == {"out.nc"}
    assert (tmp_path / "out.nc").read_text() == "previous"


def test_an_output_never_replaces_an_input(tmp_path: Path) -> None:
    own = tmp_path / "target.nc"
    own.write_bytes(chain().target.read_bytes())
    for words in (("promote", own), ("forget", own, "--donor", FIRST), ("combine", chain().donors, own)):
        ran = run(*words, "--out", own)
        assert ran.code == 2
        assert "would replace the input" in ran.err
    assert own.read_bytes() == chain().target.read_bytes()
