"""Go source: clean for gofmt and go vet, equal to Python to the microsecond, and honest about what it cannot write."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ExportError
from hfdtl_bayes.export import GoSource, go_source
from hfdtl_bayes.export.go_source import random_states
from hfdtl_bayes.export.go_terms import STEP_FIELDS, go_term
from hfdtl_bayes.features import (
    Feature,
    FeatureSet,
    Level,
    PriorRange,
    candidate,
    candidate_names,
    feature_set,
    feature_set_names,
)
from hfdtl_bayes.features.feature import rows
from hfdtl_bayes.features.fingerprint import reference_configurations
from hfdtl_bayes.model import LatencyPosterior, PriorSettings, SamplerSettings, fit
from hfdtl_bayes.sample import DONORS, sample_store_path
from hfdtl_bayes.statistics import statistics_from_rows
from hfdtl_bayes.traces import TraceStore

FEW = SamplerSettings(draws=60, tune=100, chains=2)
STEP_SETS = feature_set_names("step_time")


@pytest.fixture(scope="session")
def go() -> str:
    found = shutil.which("go")
    if found is None or shutil.which("gofmt") is None:
        pytest.skip("no Go on this machine (apt-get install golang-go); the Go source is not compiled here")
    return found


def simulated(features: FeatureSet, seed: int = 0) -> LatencyPosterior:
    """A posterior of the four unlike reference configurations, from rows made by the set's own prior means."""
    statistics = []
    for c in reference_configurations():
        frame = random_states(c, features.quantity == "step_time", 400, seed)
        theta = np.array([f.prior.mean for f in features.varying])
        own = features.design(frame, c) @ theta + float(features.config_row(c) @ [f.prior.mean for f in features.config])
        seconds = np.maximum(own, features.noise_floor(c)) * np.exp(
            0.05 * np.random.default_rng(seed).standard_normal(len(frame))
        )
        frame = frame.assign(regime="all", step_id=np.arange(len(frame)), request_id=np.arange(len(frame)).astype(str))
        if features.quantity == "step_time":
            frame = frame.assign(step_time_s=seconds)
        else:
            frame = frame.assign(queued_s=10.0, scheduled_s=10.0 + seconds, arrival_s=10.0 - seconds)
            frame = frame[features.supported(frame, c)]
        statistics.append(statistics_from_rows(frame, c, features))
    return fit(statistics, features, settings=FEW, show_progress=False, seed=seed)


def compiled(source: GoSource, folder: Path) -> Path:
    (folder / "latency.go").write_text(source.source)
    (folder / "latency_test.go").write_text(source.test)
    (folder / "go.mod").write_text("module example.com/latency\n\ngo 1.19\n")
    return folder


def ran(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


def proven(source: GoSource, folder: Path) -> None:
    compiled(source, folder)
    listed = ran(folder, "gofmt", "-l", ".")
    assert (listed.returncode, listed.stdout) == (0, ""), ran(folder, "gofmt", "-d", ".").stdout[:2000]
    vetted = ran(folder, "go", "vet", "./...")
    assert vetted.returncode == 0, vetted.stderr
    tested = ran(folder, "go", "test", "-count=1", "./...")
    assert tested.returncode == 0, tested.stdout[-3000:] + tested.stderr[-3000:]


@pytest.fixture(scope="session")
def roofline() -> LatencyPosterior:
    return simulated(feature_set("roofline"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STEP_SETS)
def test_every_step_set_equals_python_on_thousands_of_states(name: str, go: str, tmp_path: Path) -> None:
    posterior = simulated(feature_set(name))
    own = [posterior.configuration(c) for c in posterior.config_ids]
    # One never fitted beside them.
    new = own[1].model_copy(update={"config_id": 'new "one"', "engine": own[1].engine.model_copy(update={"data_parallel": 1})})
    source = go_source(posterior, [*own, new], cases=1500)
    assert source.cases >= 5 * 1500
    proven(source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantity"), [(n, q) for q in ("queue_delay", "api_delay") for n in feature_set_names(q)], ids=str
)
def test_every_delay_set_equals_python(name: str, quantity: str, go: str, tmp_path: Path, roofline: LatencyPosterior) -> None:
    delays = simulated(feature_set(name, quantity))
    source = go_source(roofline, [roofline.configuration(c) for c in roofline.config_ids], delays=delays, cases=1500)
    assert source.cases >= 8 * 1500
    proven(source, tmp_path)


@pytest.mark.slow
def test_all_gpu_configurations_in_one_file(go: str, tmp_path: Path, shared_data: Path) -> None:
    store = TraceStore(shared_data / "gpu_steps")
    features = feature_set("roofline")
    everything = [store.configuration(c) for c in store.config_ids]
    donors = [c for c in everything if c.engine.tensor_parallel <= 2][:3]
    posterior = fit(
        [statistics_from_rows(store.steps(c.config_id).frame.iloc[:1500], c, features) for c in donors],
        features, settings=FEW, show_progress=False, seed=1,
    )  # fmt: skip
    source = go_source(posterior, everything, cases=200)
    assert len(source.config_ids) >= 52
    assert source.cases >= 200 * len(everything)
    proven(source, tmp_path)


@pytest.mark.slow
def test_the_go_test_can_fail(go: str, tmp_path: Path, roofline: LatencyPosterior) -> None:
    source = go_source(roofline, [roofline.configuration("moe")])
    changed = re.sub(r"(var stepPopulation = \[10\]float64\{)([^,]+)", lambda m: f"{m[1]}{float(m[2]) * 1.001!r}", source.source)
    assert changed != source.source
    compiled(replace(source, source=changed), tmp_path)
    assert ran(tmp_path, "go", "test", "./...").returncode == 1


@pytest.mark.slow
def test_candidates_of_discovery(go: str, tmp_path: Path) -> None:
    """A set with everything that discovery may add and Go can say; the rest is named in the refusal."""
    cannot = {"expert_gemm_work", "expert_tile_padding", "distinct_experts", "kv_replication", "graph_padding"}
    base = feature_set("blis-blackbox")
    taken, refused = [], set()
    for name in candidate_names():
        feature = candidate(name).feature
        if feature.level is Level.CONFIG:
            continue
        try:
            go_term(feature, reference_configurations(), STEP_FIELDS)
        except ExportError as error:
            refused.add((name, name in str(error)))
            continue
        taken.append(feature)
    assert refused <= {(n, True) for n in cannot}
    assert len(taken) > 20
    first = [f for f in base.features if f.level is not Level.RESIDUAL]
    wide = FeatureSet("wide", "step_time", (*first, *base.residual, *taken), base.noise_floor)
    proven(go_source(simulated(wide), reference_configurations(), cases=1500), tmp_path)


# Without Go


def test_the_file_is_self_contained_and_says_where_it_comes_from(roofline: LatencyPosterior) -> None:
    source = go_source(roofline, [roofline.configuration("dense")], package="mine")
    imports = re.search(r"import \(([^)]*)\)", source.source)
    assert imports is not None
    assert set(imports[1].split()) == {'"math"', '"sort"'}
    assert source.source.startswith("// Code generated by hfdtl-bayes ")
    assert "package mine\n" in source.source
    assert roofline.input_hash in source.source
    assert "<<" not in source.source + source.test
    # A dense configuration needs no experts.
    assert "type experts struct" not in source.source


def test_levels_add_up_to_the_posterior_mean(roofline: LatencyPosterior) -> None:
    configuration = roofline.configuration("moe")
    source = go_source(roofline, [configuration]).source

    def numbers(name: str) -> np.ndarray:
        return np.array([float(v) for v in re.search(rf"{name} = \[\d+\]float64\{{([^}}]*)\}}", source)[1].split(",")])

    arrays = [np.array([float(v) for v in found.split(",")]) for found in re.findall(r"\t\t\[\d+\]float64\{([^}]*)\}", source)]
    deviation, config_row = arrays
    features = roofline.feature_set
    theta = numbers("stepPopulation") + deviation
    theta[len(features.base)] += numbers("stepConfigPopulation") @ config_row / 1e-3
    np.testing.assert_allclose(theta, roofline.draws(configuration).mean, rtol=1e-12, atol=1e-14)


def test_golden_values_are_pythons_own(roofline: LatencyPosterior) -> None:
    configuration = roofline.configuration("moe")
    test = go_source(roofline, [configuration], cases=30).test
    found = re.findall(r'\{"moe", StepState\{([^}]*)\}, (\d+)\},', test)
    assert len(found) == 30
    fields = {go: column for column, go in STEP_FIELDS.items()}
    frame = pd.DataFrame(
        [{fields[k]: float(v) for k, v in (pair.split(": ") for pair in state.split(", "))} for state, _ in found]
    )
    expected = np.trunc(roofline.expected_s(frame, configuration) * 1e6)
    np.testing.assert_array_equal(np.maximum(expected, 1), [float(us) for _, us in found])


def _with(feature: Feature) -> FeatureSet:
    base = feature_set("blis-blackbox")
    return FeatureSet("mine", "step_time", (*base.base, *base.residual, feature), base.noise_floor)


def _mine(formula: str, function: object, columns: tuple[str, ...] = ("decode_tokens",)) -> Feature:
    return Feature("mine", Level.RESIDUAL, "1", formula, rows(function), PriorRange(-1, 1), columns, 1e-3)


def test_a_users_polynomial_is_written_without_being_told() -> None:
    product = _mine(
        "decode * kv / 7",
        lambda f, _c: f["decode_tokens"].to_numpy() * f["kv_usage"].to_numpy() / 7,
        ("decode_tokens", "kv_usage"),
    )
    term = go_term(product, reference_configurations(), STEP_FIELDS)
    assert term.expression == "k.minePerDecodeTokensKvUsage * s.DecodeTokens * s.KVUsage"
    assert [float(v) for v in term.constants["minePerDecodeTokensKvUsage"]] == pytest.approx([1 / 7] * 4)


@pytest.mark.parametrize(
    ("formula", "function"),
    [
        ("sqrt(decode)", lambda f, _c: np.sqrt(f["decode_tokens"].to_numpy(float))),
        ("[decode > 50]", lambda f, _c: (f["decode_tokens"].to_numpy(float) > 50).astype(float)),
        ("decode^3", lambda f, _c: f["decode_tokens"].to_numpy(float) ** 3),
        ("max(decode - 1000, 0)", lambda f, _c: np.maximum(f["decode_tokens"].to_numpy(float) - 1000.0, 0.0)),
    ],
)
def test_a_users_other_formula_is_refused_by_name(formula: str, function: object) -> None:
    with pytest.raises(ExportError, match=r"feature 'mine' .* cannot be written as Go"):
        go_term(_mine(formula, function), reference_configurations(), STEP_FIELDS)


def test_a_column_no_state_has_is_refused() -> None:
    swapped = _mine("swapped", lambda f, _c: f["swapped_blocks"].to_numpy(float), ("swapped_blocks",))
    with pytest.raises(ExportError, match=r"'mine' reads the column\(s\) swapped_blocks"):
        go_term(swapped, reference_configurations(), STEP_FIELDS)


def test_what_makes_no_file_is_refused(roofline: LatencyPosterior) -> None:
    moe = roofline.configuration("moe")
    with pytest.raises(ExportError, match="twice: moe"):
        go_source(roofline, [moe, moe])
    with pytest.raises(ExportError, match="found none"):
        go_source(roofline, [])
    with pytest.raises(ExportError, match="needs a posterior of api_delay or queue_delay"):
        go_source(roofline, [moe], delays=roofline)
    with pytest.raises(ExportError, match="no name of a Go package"):
        go_source(roofline, [moe], package="9lives")
    delays = LatencyPosterior(roofline.tree, feature_set("roofline", "api_delay"), PriorSettings(), roofline.statistics, None, 0)
    with pytest.raises(ExportError, match="this posterior is of api_delay"):
        go_source(delays, [moe])
    unsupported = replace(roofline, feature_set=replace(roofline.feature_set, support=lambda f, _c: np.ones(len(f), dtype=bool)))
    with pytest.raises(ExportError, match=r"support of feature set 'roofline' cannot be written"):
        go_source(unsupported, [moe])


def test_sample_configurations_export(roofline: LatencyPosterior) -> None:
    store = TraceStore(sample_store_path())
    made: list[ServingConfiguration] = [store.configuration(c) for c in DONORS]
    assert go_source(roofline, made).config_ids == tuple(DONORS)


def _named(*names: str) -> FeatureSet:
    base = feature_set("blis-blackbox")
    made = [
        Feature(n, Level.RESIDUAL, "1", "kv_usage *\n7 // <<DATA>>", rows(lambda f, _c: f["kv_usage"].to_numpy(float)),
                PriorRange(-1, 1), ("kv_usage",), (i + 1) * 1e-3)
        for i, n in enumerate(names)
    ]  # fmt: skip
    return FeatureSet("with\nnewline", "step_time", (*base.base, *base.residual, *made), base.noise_floor)


@pytest.mark.slow
def test_names_that_are_none_in_go(go: str, tmp_path: Path) -> None:
    features = _named("range", "2nd try", "head", "\u00e9t\u00e9", "!!", "type")
    posterior = simulated(features)
    proven(go_source(posterior, [posterior.configuration("dense")]), tmp_path)


def test_names_that_become_one_share_a_field_only_if_they_are_one() -> None:
    base = feature_set("blis-blackbox")
    first, second = (
        Feature(
            n,
            Level.RESIDUAL,
            "1",
            n,
            rows(lambda f, _c, s=s: s * f["kv_usage"].to_numpy(float)),
            PriorRange(-1, 1),
            ("kv_usage",),
        )
        for n, s in (("kv_use", 1.0), ("kvUse", 2.0))
    )
    twice = FeatureSet("twice", "step_time", (*base.base, *base.residual, first, second), base.noise_floor)
    posterior = simulated(twice)
    with pytest.raises(ExportError, match="have one name in Go"):
        go_source(posterior, [posterior.configuration("dense")])
