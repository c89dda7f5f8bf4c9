"""`predict --sources`: where the variance of predictions comes from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cli_runs import TARGET_STEPS, chain, configuration_file, done

from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.sample import TARGET
from hfdtl_bayes.transfer.variance import SOURCES


def test_sources_of_a_calibrated_target_are_columns_and_a_summary(tmp_path: Path) -> None:
    plain, out = tmp_path / "plain.parquet", tmp_path / "p.parquet"
    done("predict", chain().target, TARGET_STEPS, "--out", plain)
    found = done("predict", chain().target, TARGET_STEPS, "--out", out, "--sources", "--json").json
    written, posterior = pd.read_parquet(out), LatencyPosterior.load(chain().target)
    coefficients = [f"mean_share_{name}" for name in posterior.feature_set.coef_names]
    sources = [f"share_{name}" for name in SOURCES]
    pd.testing.assert_frame_equal(written.drop(columns=[*sources, *coefficients]), pd.read_parquet(plain))
    np.testing.assert_allclose(written[sources].sum(axis=1), 1)
    np.testing.assert_allclose(written[coefficients].sum(axis=1), 1)
    assert found["columns"] == list(written.columns)
    assert [s["source"] for s in found["sources"]] == list(SOURCES)
    assert sum(s["share"] for s in found["sources"]) == pytest.approx(1)
    assert {c["coefficient"] for c in found["coefficients"]} == set(posterior.feature_set.coef_names)
    # Both sds of the output file tell how much of the variance is of the expected value.
    ratio = (written["sd_mean_s"] / written["sd_s"]) ** 2
    assert np.abs(written[sources[:4]].sum(axis=1) - ratio).max() < 0.1


def test_sources_of_a_configuration_never_seen(tmp_path: Path) -> None:
    new = configuration_file(tmp_path / "new.yaml")
    words = ("predict", chain().donors, "--configuration", new, "--out", tmp_path / "p.csv", "--sources")
    found = {s["source"]: s["share"] for s in done(*words, "--json").json["sources"]}
    seen = done("predict", chain().target, "--config", TARGET, "--out", tmp_path / "q.csv", "--sources", "--json").json
    assert found["configuration"] > 0.1
    assert found["configuration"] > 2 * next(s["share"] for s in seen["sources"] if s["source"] == "configuration")
    text = done(*words).out
    assert "variance of a new observation" in text
    assert "removed_if_known" in text
    assert str(found["drift"])[:4] in text
