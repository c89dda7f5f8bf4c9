"""`discover` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import STORE, contents, done, run

from hfdtl_bayes.sample import DONORS

FEW = ("--candidates", "has_prefill,prefill_decode,kv_read")


def test_discover_says_what_is_missing_and_writes_it(tmp_path: Path):
    out = tmp_path / "found.json"
    ran = done("discover", STORE, "--configs", DONORS[0], *FEW, "--out", out, "--json", "--seed", 3)
    found = ran.json
    assert json.loads(out.read_text()) == found
    assert found["config_ids"] == [DONORS[0]]
    assert found["seed"] == 3
    assert found["not_tested"] == {"kv_read": "a feature of roofline already"}
    assert set(found["tested"]) == {"has_prefill", "prefill_decode"}
    for t in found["terms"]:
        assert t["gain"]["points"] == pytest.approx(100 * (t["gain"]["mape_before"] - t["gain"]["mape"]))
        assert t["go"]
    said = done("discover", STORE, "--configs", DONORS[0], *FEW, "--seed", 3).out
    assert all(s in said for s in found["sentences"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--configs", "nobody"), "nobody"),
        (("--configs", ""), "no configuration to look at"),
        (("--configs", DONORS[0], "--candidates", "kv_raed"), "unknown candidate 'kv_raed'"),
        (("--configs", DONORS[0], "--max-terms", 0), "max_terms of a discovery must lie between 1 and 10"),
        (("--configs", DONORS[0], "--block-length", "auto"), "blocks of one length"),
        (("--configs", DONORS[0], "--out", "found.csv"), ".json"),
    ],
)
def test_bad_input(tmp_path: Path, words: tuple[object, ...], message: str):
    ran = run("discover", STORE, "--json", *words)
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err
    assert contents(tmp_path) == {}
