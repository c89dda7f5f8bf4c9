"""The coefficient card: levels that add up, a schema that is the contract, and strict reading; ensembles and older backends beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
import yaml

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ExportError, InputError, MissingInputError
from hfdtl_bayes.export import (
    BLACKBOX,
    CROSSMODEL,
    CoefficientCard,
    ExportSettings,
    blis_ensemble,
    blis_vectors,
    blis_yaml,
    card_schema,
    coefficient_card,
    parse_blis_file,
    parse_card,
    queueing_alpha_s,
    read_card,
    read_ensemble,
    write_ensemble,
    write_fleet,
)
from hfdtl_bayes.export.comparison import backend_step_time_us, card_set, compare_coefficients, folded, posterior_set
from hfdtl_bayes.export.schema import schema_problems
from hfdtl_bayes.features import feature_set, operating_points
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings, fit
from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path
from hfdtl_bayes.statistics import statistics_from_rows
from hfdtl_bayes.traces import TraceStore, drop_warmup

FEW = SamplerSettings(draws=80, tune=150, chains=2)
STORE = TraceStore(sample_store_path())


def fitted(name: str) -> LatencyPosterior:
    features = feature_set(name)
    statistics = [
        statistics_from_rows(drop_warmup(STORE.steps(c).frame).iloc[:800], STORE.configuration(c), features) for c in DONORS[:2]
    ]
    return fit(statistics, features, settings=FEW, show_progress=False, seed=1)


@pytest.fixture(scope="module")
def posterior() -> LatencyPosterior:
    return fitted("roofline")


@pytest.fixture(scope="module")
def traffic() -> pd.DataFrame:
    return drop_warmup(STORE.steps(DONORS[0]).frame)


@pytest.fixture(scope="module")
def own(posterior: LatencyPosterior) -> ServingConfiguration:
    return posterior.configuration(DONORS[0])


@pytest.fixture(scope="module")
def card(posterior: LatencyPosterior, own: ServingConfiguration, traffic: pd.DataFrame) -> CoefficientCard:
    return coefficient_card(posterior, own, traffic)


def test_reading_and_writing_again_is_the_same(card: CoefficientCard, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(card.text(), encoding="utf-8")
    assert read_card(path).text() == card.text()
    assert read_card(path) == card


def test_levels_add_up_to_the_expected_step_time(
    card: CoefficientCard, posterior: LatencyPosterior, own: ServingConfiguration, traffic: pd.DataFrame
) -> None:
    features = feature_set("roofline")
    total = sum(
        e["own"]["mean"] * np.asarray(features[e["name"]].compute(traffic, own))
        for level in ("base", "residual")
        for e in card.data[f"beta_{level}"]
    )
    total = total + sum(e["population"]["mean"] * e["feature_value"] for e in card.data["beta_config"])
    np.testing.assert_allclose(total, posterior.expected_s(traffic, own), rtol=1e-10)


def test_numbers_are_those_of_the_posterior(card: CoefficientCard, posterior: LatencyPosterior) -> None:
    table = posterior.coefficient_table().set_index(["config", "feature"])
    for level in ("base", "config", "residual"):
        for e in card.data[f"beta_{level}"]:
            row = table.loc[("population", e["name"])]
            for mine, theirs in (
                ("mean", "mean"),
                ("sd", "sd"),
                ("q2.5", "q2.5"),
                ("q97.5", "q97.5"),
                ("p_negative", "p_negative"),
            ):
                assert e["population"][mine] == pytest.approx(row[theirs], rel=1e-9, abs=1e-12)
    kv_read = next(e for e in card.data["beta_base"] if e["name"] == "kv_read")
    assert kv_read["own"]["mean"] == pytest.approx(table.loc[(DONORS[0], "kv_read"), "mean"])
    theta = posterior.draws_of("theta")[:, 0, :2]
    expected = np.corrcoef(theta, rowvar=False)[0, 1]
    assert card.data["beta_correlation"]["matrix"][0][1] == pytest.approx(expected)


def test_what_data_informed_is_said(card: CoefficientCard) -> None:
    by_name = {e["name"]: e["informed"] for e in card.data["beta_base"]}
    # No step communicates on one device: all of it is the prior's word.
    assert by_name["all_reduce"]["decided_by"] == "the prior"
    assert abs(by_name["all_reduce"]["own_rows"]) < 0.01
    assert by_name["gemm_excess"]["decided_by"] == "data"
    for share in by_name.values():
        assert share["data"] == pytest.approx(share["own_rows"] + share["other_rows"])
    assert card.data["directions"]


def test_the_regime_is_the_range_of_the_rows(card: CoefficientCard, traffic: pd.DataFrame) -> None:
    regime = card.data["regime_of_validity"]
    assert regime["rows"] == len(traffic)
    assert regime["ranges"]["decode_tokens"] == [traffic["decode_tokens"].min(), traffic["decode_tokens"].max()]
    assert regime["regimes"] == list(dict.fromkeys(traffic["regime"]))


def test_discrepancy_is_a_misfit_and_no_coefficient(traffic: pd.DataFrame) -> None:
    posterior = fitted("roofline-discrepancy")
    own = posterior.configuration(DONORS[0])
    made = coefficient_card(posterior, own, traffic)
    names = {e["name"] for level in ("base", "config", "residual") for e in made.data[f"beta_{level}"]}
    assert not any(n.startswith("discrepancy") for n in names)
    misfit = made.data["misfit"]
    theta = posterior.draws(own).theta[:, -12:]
    np.testing.assert_allclose(misfit["relative_error"], theta.mean(axis=0))
    assert misfit["size"] == pytest.approx(np.sqrt(np.mean(theta.mean(axis=0) ** 2 + theta.std(axis=0) ** 2)))
    # The card still predicts what the posterior does, and BLIS's vectors carry it by projection.
    np.testing.assert_allclose(card_set(made, "card").expected_s(traffic, own), posterior.expected_s(traffic, own), rtol=1e-9)
    assert parse_card(made.text()).vectors().projection_error < 0.1


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of the schema's own vocabulary in a card where something can go wrong: keys of strict objects."""
    found = [path] if path else []
    children = node.items() if isinstance(node, dict) else enumerate(node[:2]) if isinstance(node, list) else ()
    for key, value in children:
        found += _places(value, (*path, key))
    return found


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def _name(path: tuple[Any, ...]) -> str:
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


FREE = ("configuration", "ranges", "rows", "checks", "refused")
"""Keys under which a card may hold what it likes, or which have their own checks."""


def test_every_missing_key_is_named(card: CoefficientCard) -> None:
    keys = [p for p in _places(card.data) if isinstance(p[-1], str) and not any(k in FREE for k in p[:-1])]
    assert len(keys) > 100
    for path in keys:
        data = copy.deepcopy(dict(card.data))
        del _at(data, path[:-1])[path[-1]]
        with pytest.raises(ExportError) as caught:
            parse_card(json.dumps(data))
        assert f"{_name(path)}: missing" in str(caught.value)


def test_every_extra_key_is_named(card: CoefficientCard) -> None:
    objects = [(), *(p for p in _places(card.data) if isinstance(_at(card.data, p), dict) and not any(k in FREE for k in p))]
    assert len(objects) > 30
    for path in objects:
        data = copy.deepcopy(dict(card.data))
        _at(data, path)["surprise"] = 1
        with pytest.raises(ExportError, match="surprise: unknown key; accepted are"):
            parse_card(json.dumps(data))


def test_numbers_that_are_none_are_named(card: CoefficientCard) -> None:
    for bad, said in (
        (float("nan"), "no finite number"),
        (float("inf"), "no finite number"),
        ("1", "expected number"),
        (True, "expected"),
    ):
        data = copy.deepcopy(dict(card.data))
        data["beta_base"][0]["own"]["sd"] = bad
        with pytest.raises(ExportError) as caught:
            parse_card(json.dumps(data))
        assert "beta_base[0].own.sd: " in str(caught.value)
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["beta_base"][0]["own"].update(sd=-1.0), r"beta_base\[0\].own.sd: -1.0 is below 0"),
        (lambda d: d["beta_base"][0]["own"].update(p_negative=1.5), "is above 1"),
        (lambda d: d.update(version=2), "version: expected 1, found 2"),
        (lambda d: d.update(format="other"), "format: expected"),
        (lambda d: d.update(config_id="other"), "config_id is 'other'"),
        (lambda d: d["configuration"]["llm"].update(num_layers=-1), "num_layers"),
        (lambda d: d["beta_base"].append(d["beta_base"][0]), "weight_read come twice"),
        (lambda d: d["beta_base"][0].update(own=None), "weight_read must have its own moments"),
        (lambda d: d["beta_config"][0].update(feature_value=None), "layers must have a feature_value"),
        (lambda d: d["beta_correlation"]["matrix"].pop(), "beta_correlation: must be of"),
        (lambda d: d["beta_correlation"]["names"].reverse(), "beta_correlation: must be of"),
        (lambda d: d["blis"]["vectors"][0]["beta"].pop(), "beta has 9 values"),
        (lambda d: d["blis"]["vectors"][0]["beta"][0].update(value=-1.0), "is below 0"),
        (lambda d: d["blis"]["vectors"][0]["beta"][0].update(value=1e9), "b1a is 1e[+]09, above"),
        (lambda d: d["blis"]["vectors"][0]["beta"].reverse(), "in this order"),
        (lambda d: d["blis"]["vectors"][0]["alpha"].pop(), "expected 3 values, found 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(change: Any, message: str, card: CoefficientCard) -> None:
    data = copy.deepcopy(dict(card.data))
    change(data)
    with pytest.raises(ExportError, match=message):
        parse_card(json.dumps(data))


def test_text_that_is_no_card_is_refused(card: CoefficientCard, tmp_path: Path) -> None:
    for text, said in (
        ("{", "not valid JSON"),
        ("[]", "expected object"),
        ('{"format": 1, "format": 2}', "come twice"),
        ("", "not valid"),
    ):
        with pytest.raises(ExportError, match=said):
            parse_card(text)
    with pytest.raises(ExportError, match="not valid JSON"):
        parse_card(card.text()[:-100])
    with pytest.raises(MissingInputError, match="no coefficient card at"):
        read_card(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ExportError, match="cannot be read"):
        read_card(tmp_path / "b.json")


def test_the_schema_is_one(card: CoefficientCard) -> None:
    schema = card_schema()
    assert schema["$schema"].startswith("https://json-schema.org/draft/2020-12")
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(card.text()))


def test_the_check_knows_each_keyword() -> None:
    schema = {
        "type": "object", "required": ["a"], "additionalProperties": {"type": "integer"},
        "properties": {"a": {"$ref": "#/$defs/pair"}, "b": {"enum": [1, None]}, "c": {"const": "x"}},
        "$defs": {"pair": {"type": ["array", "null"], "items": {"type": "number", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 2}},
    }  # fmt: skip
    assert schema_problems({"a": [0, 9.0], "b": None, "c": "x", "d": 3}, schema) == []
    assert schema_problems({"a": None}, schema) == []
    bad = {"a": [-1, 10, "z"], "b": 2, "c": "y", "d": 1.5}
    assert [p.split(":")[0] for p in schema_problems(bad, schema)] == ["a", "a[0]", "a[1]", "a[2]", "b", "c", "d"]
    assert schema_problems({"a": True}, schema) == ["a: expected array or null, found True"]
    with pytest.raises(AssertionError, match="nothing checks"):
        schema_problems(1, {"pattern": "x"})


# Ensembles


def test_an_ensemble_is_the_projection_of_each_draw(
    posterior: LatencyPosterior, own: ServingConfiguration, traffic: pd.DataFrame, tmp_path: Path
) -> None:
    made = blis_ensemble(posterior, own, traffic, draws=20)
    theta = posterior.draws(own).theta
    for m in made.members[:3]:
        step = feature_set("roofline").design(traffic, own) @ theta[m.draw]
        error = np.abs(backend_step_time_us(m.vectors.backend, m.vectors.beta, traffic, own) * 1e-6 / step - 1).mean()
        assert error == pytest.approx(m.vectors.projection_error, abs=1e-4)
        assert m.sigma == posterior.draws(own).sigma[m.draw]
    assert made.mean.beta == blis_vectors(posterior, own, traffic).beta
    # Spread of what the draws predict is the posterior's.
    predicted = np.array([backend_step_time_us(m.vectors.backend, m.vectors.beta, traffic, own) for m in made.members]) * 1e-6
    own_draws = feature_set("roofline").design(traffic, own) @ theta[[m.draw for m in made.members]].T
    ratio = predicted.std(axis=0).mean() / own_draws.std(axis=1).mean()
    assert 0.7 < ratio < 1.4
    manifest = write_ensemble(made, tmp_path / "e")
    stored = read_ensemble(manifest.parent)
    np.testing.assert_array_equal(stored.beta, made.betas())
    assert stored.manifest["input_hash"] == posterior.input_hash


def test_draws_of_a_wide_posterior_are_floored_and_counted(posterior: LatencyPosterior) -> None:
    new = STORE.configuration(TARGET)
    made = blis_ensemble(posterior, new, draws=60, settings=ExportSettings(max_projection_error=5.0))
    theta = posterior.draws(new).theta
    design = feature_set("roofline").design(operating_points(new), new)
    negative = {m.draw for m in made.members if (design @ theta[m.draw] <= 0).any()}
    assert negative <= {m.draw for m in made.members if m.floored}
    assert all(v >= 0 for m in made.members for v in m.vectors.beta)


def test_a_changed_ensemble_is_refused(
    posterior: LatencyPosterior, own: ServingConfiguration, traffic: pd.DataFrame, tmp_path: Path
) -> None:
    made = blis_ensemble(posterior, own, traffic, draws=3)
    folder = write_ensemble(made, tmp_path / "e").parent
    draw = folder / "draw-0001.yaml"
    text = draw.read_text()
    draw.write_text(text.replace("1", "2", 1))
    with pytest.raises(ExportError, match=r"draw-0001.yaml was changed"):
        read_ensemble(folder)
    draw.unlink()
    with pytest.raises(MissingInputError, match=r"names draw-0001.yaml"):
        read_ensemble(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, said in (
        ({"draws": []}, "draws: expected 2 or more"),
        ({"extra": 1}, "extra: unknown key"),
        ({"seed": -1}, "below 0"),
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ExportError, match=said):
            read_ensemble(folder)
    manifest["draws"][0]["file"] = "../escape.yaml"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="no name of a file beside"):
        read_ensemble(folder)
    with pytest.raises(InputError, match="accepted are 2 to"):
        blis_ensemble(posterior, own, traffic, draws=1)


def test_a_fleet_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    write_fleet(tmp_path / "f", "blis-yaml", ".yaml", {"a": "1\n"}, {})
    with pytest.raises(UnicodeEncodeError):
        write_fleet(tmp_path / "f", "blis-yaml", ".yaml", {"a": "2\n", "b": "\ud800"}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]
    assert (tmp_path / "f" / "a.yaml").read_text() == "1\n"
    with pytest.raises(InputError, match=r"would be called index\.json"):
        write_fleet(tmp_path / "f", "json", ".json", {"index": "{}"}, {})
    write_fleet(tmp_path / "f", "blis-yaml", ".yaml", {"b": "2\n"}, {"a": "why"})
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["b.yaml", "index.json"]


# Older backends


@pytest.mark.parametrize("backend", [BLACKBOX, CROSSMODEL], ids=lambda b: b.name)
def test_older_backends_state_their_loss_and_read_back(
    backend: Any, posterior: LatencyPosterior, own: ServingConfiguration, traffic: pd.DataFrame
) -> None:
    lenient = ExportSettings(max_projection_error=0.9)
    vectors = blis_vectors(posterior, own, traffic, backend=backend, settings=lenient, alpha_us=(1.0, 2.0, 3.0))
    step = backend_step_time_us(backend, vectors.beta, traffic, own) * 1e-6
    error = np.abs(step / posterior.expected_s(traffic, own) - 1).mean()
    assert error == pytest.approx(vectors.projection_error, abs=1e-4)
    (found,) = parse_blis_file(blis_yaml(vectors))
    assert (found.backend.name, found.alpha, found.beta) == (backend.name, vectors.alpha, vectors.beta)
    assert "per input token" in vectors.summary()
    assert [a["unit"] for a in vectors.as_dict()["alpha"]] == ["us", "us/input token", "us/output token"]


def test_crossmodel_by_hand(own: ServingConfiguration) -> None:
    frame = pd.DataFrame({"prefill_tokens": [100.0, 0.0], "decode_tokens": [3.0, 7.0]})
    llm, tp = own.llm, own.engine.tensor_parallel
    width = llm.num_layers * llm.num_key_value_heads * (llm.hidden_size // llm.num_attention_heads) / tp * 1e-6
    expected = np.trunc(116.0 * llm.num_layers + 1226.0 * np.array([3.0, 7.0]) * width + 0.0 + 0.0)
    np.testing.assert_array_equal(
        backend_step_time_us(CROSSMODEL, (116.0, 1226.0, 19.0, 9000.0 * (tp > 1)), frame, own), expected
    )


def test_one_file_holds_what_blis_can_tell_apart(
    posterior: LatencyPosterior, own: ServingConfiguration, traffic: pd.DataFrame
) -> None:
    lenient = ExportSettings(max_projection_error=0.9)
    blackbox, crossmodel, now = (
        blis_vectors(posterior, own, traffic, settings=lenient, **({"backend": b} if b else {}))
        for b in (BLACKBOX, CROSSMODEL, None)
    )
    for several, said in (((now, now), "holds one set"), ((crossmodel, crossmodel), "one set of coefficients"),
                          ((blackbox, blackbox), "comes twice"), ((blackbox, crossmodel), "one older backend")):  # fmt: skip
        with pytest.raises(ExportError, match=said):
            blis_yaml(*several)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"models": []}, "must be a list of entries"),
        ({"models": [{"id": "x"}]}, r"models\[0\] holds id; accepted are exactly"),
        ({"models": {"id": "x"}}, "must be a list of entries"),
        ({"crossmodel_defaults": {"alpha_coeffs": [0, 0, 0], "beta_coeffs": [1, 2, 3]}}, "beta has 3 values; accepted are 4"),
        ({"crossmodel_defaults": {"alpha_coeffs": [0, 0, 0], "beta_coeffs": [1, 2, -3, 0]}}, "b2 is -3"),
        ({"crossmodel_defaults": {"alpha_coeffs": [0, 0, 0], "beta_coeffs": [1, 2, 10**400, 0]}}, "b2 is inf"),
        ({"crossmodel_defaults": None}, "must hold"),
    ],
)
def test_older_files_are_read_strictly(data: object, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        parse_blis_file(yaml.safe_dump(data))


def test_queueing_alphas_do_not_count_the_wait_for_a_step() -> None:
    rng = np.random.default_rng(0)
    n = 400
    prompt = rng.integers(10, 3000, n).astype(float)
    arrival = np.cumsum(rng.exponential(0.5, n))
    idle = rng.random(n) < 0.3
    delay = 0.002 + 4e-6 * prompt + np.where(idle, 0.0, rng.uniform(0, 0.03, n))
    requests = pd.DataFrame({"arrival_s": arrival, "queued_s": arrival + delay, "prompt_tokens": prompt})
    state = requests.assign(running_requests=np.where(idle, 0, 3), waiting_requests=0)
    np.testing.assert_allclose(queueing_alpha_s(state), (0.002, 4e-6), rtol=1e-6)
    # Where nothing says who found the engine idle, the lower envelope; the plain mean would be 12 ms.
    found = queueing_alpha_s(requests)
    assert found is not None
    assert found[0] == pytest.approx(0.002, abs=1e-3)
    assert queueing_alpha_s(requests.iloc[:10]) is None
    assert queueing_alpha_s(requests.drop(columns="arrival_s")) is None


# Comparison


def test_moves_are_counted_in_the_sds_of_the_reference(
    posterior: LatencyPosterior, card: CoefficientCard, own: ServingConfiguration, traffic: pd.DataFrame
) -> None:
    data = copy.deepcopy(dict(card.data))
    entry = data["beta_base"][0]
    entry["own"]["mean"] += 2.5 * entry["own"]["sd"]
    moved = card_set(parse_card(json.dumps(data)), "moved")
    found = compare_coefficients([posterior_set(posterior, "ours"), moved], traffic, own)
    row = found.moves[(found.moves["basis"] == "roofline")].set_index("coefficient")["moved_sds"]
    assert row[entry["name"]] == pytest.approx(2.5, rel=1e-6)
    assert row.drop(entry["name"]).abs().max() < 1e-6
    assert found.reference == "ours"
    assert f"{entry['name']} (roofline) of moved by +2.5" in found.sentence()


def test_what_is_constant_within_a_configuration_is_folded(own: ServingConfiguration) -> None:
    beta = (0.1, 0.2, 1.3, 0.4, 30.0, 4.0, 100.0, 50.0, 0.5, 1.5)
    once = folded(beta, own)
    assert once[6] == pytest.approx(
        100.0 + 30.0 * own.llm.num_layers + 1.3e6 * float(feature_set("blis-physics")["weight_loading"].compute(None, own))
    )
    np.testing.assert_array_equal(folded(once, own), once)
    assert once[10] == 0.4  # with ten values the dispatch takes b4


def test_a_card_of_other_formulas_or_configurations_is_refused(card: CoefficientCard, traffic: pd.DataFrame) -> None:
    data = copy.deepcopy(dict(card.data))
    data["beta_base"][0]["formula"] = "something else"
    with pytest.raises(ExportError, match="weight_read of 'roofline' are defined otherwise"):
        card_set(parse_card(json.dumps(data)), "old")
    with pytest.raises(InputError, match="whose configuration is not that of"):
        card_set(card, "card").expected_s(traffic, STORE.configuration(TARGET))
