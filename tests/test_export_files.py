"""What is written for BLIS: checked numbers, exact keys, the same digits in file and flags."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping
from hfdtl_bayes.errors import ExportError
from hfdtl_bayes.export import (
    BETA_LABELS,
    BlisVectors,
    ExportSettings,
    blis_flags,
    blis_hardware_config,
    blis_yaml,
    check_vectors,
    parse_blis_yaml,
    write_text,
)
from hfdtl_bayes.export.projection import closest_in_metric, closest_predictions

SETTINGS = ExportSettings()
ALPHA = (1500.0, 0.0, 0.0)
BETA = (0.152128, 0.0, 1.36252915, 0.752037, 32.09546717, 4.41684444, 126.024825, 481.8613888, 0.0, 1.94710771)


def _configuration(name: str = "x", **engine: object) -> ServingConfiguration:
    llm = {
        "name": "llm", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 128, "vocab_size": 100, "max_context_tokens": 1024,
    }  # fmt: skip
    knobs = {"max_num_seqs": 32, "max_num_batched_tokens": 2048, "kv_capacity_tokens": 12288, **engine}
    return configuration_from_mapping({"config_id": name, "llm": llm, "hardware": "l40s", "engine": knobs})


def _vectors(
    alpha: tuple[float, ...] = ALPHA, beta: tuple[float, ...] = BETA, error: float = 0.01, name: str = "x", **engine: object
) -> BlisVectors:
    return BlisVectors(_configuration(name, **engine), alpha, beta, error, 2 * error, (), 100)


microseconds = st.floats(0, SETTINGS.largest_us)
factors = st.floats(0, SETTINGS.largest_factor)
good_beta = st.tuples(*[microseconds if n in ("b5", "b6", "b7", "b8") else factors for n in BETA_LABELS[:10]]) | st.tuples(
    *[microseconds if n in ("b5", "b6", "b7", "b8") else factors for n in BETA_LABELS]
)
good_alpha = st.tuples(microseconds, microseconds, microseconds)
bad_number = st.sampled_from([math.nan, math.inf, -math.inf, 1e300, -1e-300]) | st.floats(max_value=-1e-9)


@given(good_alpha, good_beta, st.floats(0, SETTINGS.max_projection_error))
def test_what_blis_takes_passes_and_survives_the_file(alpha: tuple, beta: tuple, error: float) -> None:
    vectors = _vectors(alpha, beta, error)
    check_vectors(vectors)
    assert parse_blis_yaml(blis_yaml(vectors)) == (alpha, beta)


@given(good_alpha, good_beta, st.data())
def test_one_bad_number_anywhere_is_refused_by_name(alpha: tuple, beta: tuple, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, 2 + len(beta)))
    values = [*alpha, *beta]
    values[place] = data.draw(bad_number)
    label = ("a0", "a1", "a2", *BETA_LABELS)[place]
    vectors = _vectors(tuple(values[:3]), tuple(values[3:]))
    with pytest.raises(ExportError, match=f"- {label} is"):
        check_vectors(vectors)
    with pytest.raises(ExportError):
        parse_blis_yaml(blis_yaml(vectors))


@given(st.integers(0, 14), st.integers(0, 6))
def test_only_the_lengths_blis_means_are_accepted(betas: int, alphas: int) -> None:
    vectors = _vectors((1.0,) * alphas, (1.0,) * betas)
    if betas in (10, 11) and alphas == 3:
        check_vectors(vectors)
    else:
        with pytest.raises(ExportError, match="values"):
            check_vectors(vectors)


@pytest.mark.parametrize("error", [0.11, math.nan, math.inf])
def test_a_projection_that_loses_too_much_is_refused(error: float) -> None:
    with pytest.raises(ExportError, match="cannot express"):
        check_vectors(_vectors(error=error))


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ExportError) as caught:
        check_vectors(_vectors((-1.0, math.nan), (*BETA[:9], 1e9), error=0.5))
    for part in ("a0 is -1", "a1 is nan", "alpha has 2", "b2b is 1e+09", "50.0%", "'x' cannot be exported"):
        assert part in str(caught.value)


def test_the_yaml_holds_blis_keys_and_nothing_else() -> None:
    text = blis_yaml(_vectors())
    assert yaml.safe_load(text) == {"trained_physics_coefficients": {"alpha_coeffs": list(ALPHA), "beta_coeffs": list(BETA)}}


GOOD = {"alpha_coeffs": list(ALPHA), "beta_coeffs": list(BETA)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"trained_physics_coefficients": GOOD, "version": "1"}, "nothing else, found trained_physics_coefficients, version"),
        ({"trained_physics": GOOD}, "expected the key trained_physics_coefficients"),
        ([1, 2], "found list"),
        ({"trained_physics_coefficients": GOOD | {"gamma_coeffs": [1.0]}}, "accepted are exactly alpha_coeffs, beta_coeffs"),
        ({"trained_physics_coefficients": {"beta_coeffs": list(BETA)}}, "accepted are exactly"),
        ({"trained_physics_coefficients": GOOD | {"alpha_coeffs": ["a", 0, 0]}}, "list of numbers"),
        ({"trained_physics_coefficients": GOOD | {"alpha_coeffs": [True, 0, 0]}}, "list of numbers"),
        ({"trained_physics_coefficients": GOOD | {"alpha_coeffs": 3.0}}, "list of numbers"),
        ({"trained_physics_coefficients": GOOD | {"beta_coeffs": list(BETA[:9])}}, "beta has 9 values"),
        ({"trained_physics_coefficients": GOOD | {"alpha_coeffs": [1e300, 0, 0]}}, "check the units"),
    ],
)
def test_parsing_is_strict(data: object, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        parse_blis_yaml(yaml.safe_dump(data))


def test_text_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(ExportError, match="not valid YAML"):
        parse_blis_yaml("trained_physics_coefficients: [")


def _flags(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


@given(good_alpha, good_beta)
def test_flags_carry_the_digits_of_the_file(alpha: tuple, beta: tuple) -> None:
    flags = _flags(blis_flags(_vectors(alpha, beta)))
    assert tuple(float(v) for v in flags["--alpha-coeffs"].split(",")) == alpha
    assert tuple(float(v) for v in flags["--beta-coeffs"].split(",")) == beta


def test_flags_carry_the_limits_of_the_engine() -> None:
    flags = _flags(
        blis_flags(_vectors(tensor_parallel=2, block_size=32), hardware_config="hw.json", model_config_folder="models")
    )
    assert (
        flags.items()
        >= {
            "--latency-model": "trained-physics",
            "--tp": "2",
            "--max-num-seqs": "32",
            "--max-num-batched-tokens": "2048",
            "--block-size-in-tokens": "32",
            "--total-kv-blocks": "383",
            "--hardware-config": "hw.json",
            "--hardware": "l40s",
            "--model-config-folder": "models",
        }.items()
    )


def test_blocks_are_left_out_where_they_are_not_known() -> None:
    assert "--total-kv-blocks" not in blis_flags(_vectors())
    assert "--total-kv-blocks" not in blis_flags(_vectors(block_size=8000))


def test_the_hardware_entry_is_in_blis_units() -> None:
    assert json.loads(blis_hardware_config(_configuration()))["l40s"] == pytest.approx(
        {"TFlopsPeak": 362.05, "TFlopsFP8": 733.0, "BwPeakTBs": 0.864, "MemoryGiB": 45.0, "mfuPrefill": 0.5, "mfuDecode": 0.5}
    )


def test_the_card_names_every_number() -> None:
    card = _vectors().as_dict()
    assert json.loads(json.dumps(card)) == card
    assert [b["label"] for b in card["beta"]] == list(BETA_LABELS[:10])
    assert {b["label"]: b["unit"] for b in card["beta"]}["b6"] == "us"
    assert {b["label"]: b["multiplies"] for b in card["beta"]}["b2b"] == "decode_kv_read"


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_text("old\n", tmp_path / "deep" / "v.yaml")
    assert write_text("new\n", target).read_text() == "new\n"
    with pytest.raises(UnicodeEncodeError):
        write_text("half \ud800", target)
    assert target.read_text() == "new\n"
    assert [p.name for p in target.parent.iterdir()] == ["v.yaml"]


numbers = st.floats(-3, 3, allow_nan=False).map(lambda v: round(v, 3))


@given(arrays(float, (6, 4), elements=numbers), arrays(float, 6, elements=st.floats(0.5, 2)), arrays(float, 4, elements=numbers))
def test_projection_on_predictions_is_optimal(design: np.ndarray, mean: np.ndarray, prior: np.ndarray) -> None:
    tie = 1e-2
    weights, free = closest_predictions([(design, mean, 1.0)], prior, np.ones(4), tie)
    assert (weights >= 0).all()
    relative = design / mean[:, None]

    def gradient(w: np.ndarray) -> np.ndarray:
        return relative.T @ (relative @ w - 1) / 6 + tie**2 * (w - prior)

    # Karush-Kuhn-Tucker: no slope where a coefficient is free to move, none downhill where it is held at zero.
    scale = 1e-7 * (1 + np.abs(relative).max() ** 2 * (1 + np.abs(weights).max()))
    slope = gradient(weights)
    assert (np.abs(slope[weights > 1e-12]) < scale).all()
    assert (slope >= -scale).all()
    if (free >= 0).all():
        np.testing.assert_allclose(weights, free, atol=1e-6 * (1 + np.abs(free).max()))


@given(arrays(float, 3, elements=numbers), arrays(float, (3, 3), elements=numbers))
def test_projection_in_the_posterior_s_metric_is_optimal(mean: np.ndarray, root: np.ndarray) -> None:
    covariance = root @ root.T + 0.1 * np.eye(3)
    weights, _ = closest_in_metric(mean, covariance)
    assert (weights >= 0).all()
    precision = np.linalg.inv(covariance)
    slope = precision @ (weights - mean)
    tolerance = 1e-6 * (1 + np.abs(precision).max() * 10)
    assert (np.abs(slope[weights > 1e-12]) < tolerance).all()
    assert (slope >= -tolerance).all()
    if (mean >= 0).all():
        np.testing.assert_array_equal(weights, mean)


def test_projection_bears_a_posterior_without_spread() -> None:
    weights, _ = closest_in_metric(np.array([1.0, -0.5]), np.zeros((2, 2)))
    np.testing.assert_allclose(weights, [1.0, 0.0], atol=1e-6)
