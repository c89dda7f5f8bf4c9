"""Priors as YAML: what is written is read back, what is wrong is named, and a posterior keeps what it was fitted under."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from posterior_fits import SAMPLER, traffic
from scipy.stats import beta
from simulation import BLOCK, PRIORS, THREE, TINY

from hfdtl_bayes.errors import InputError, MissingInputError, PosteriorFileError, UnknownNameError
from hfdtl_bayes.features import PriorRange, feature_set, fingerprint, fingerprint_differences, register_feature_set, registry
from hfdtl_bayes.model import LatencyPosterior, PositiveRange, PriorSettings, fit
from hfdtl_bayes.model.prior_files import priors_from_mapping, priors_yaml, read_priors
from hfdtl_bayes.statistics import statistics_from_rows

SETS = [feature_set("roofline"), feature_set("hfdtl"), feature_set("blis-physics"), feature_set("roofline", "queue_delay"), TINY]

digits = st.floats(1e-8, 1e8).map(lambda v: float(f"{v:.9g}"))
ranges = st.tuples(digits, st.floats(1.01, 100)).map(lambda v: PositiveRange(v[0], float(f"{v[0] * v[1]:.9g}")))


@pytest.mark.parametrize("features", SETS, ids=lambda f: f"{f.name}-{f.quantity}")
def test_the_template_says_the_defaults(features, tmp_path: Path) -> None:
    path = tmp_path / "priors.yaml"
    path.write_text(priors_yaml(features))
    settings, same = read_priors(path, features)
    assert settings == PriorSettings()
    assert same is features


discounts = st.dictionaries(st.text("aZ09-_.~ #:{,", min_size=1), st.floats(1e-6, 1.0)).map(lambda d: tuple(d.items()))


@given(st.builds(PriorSettings, deviation=ranges, hardware_share=digits, discounts=discounts, noise=ranges, noise_spread=ranges,
                 drift=st.none() | ranges, drift_spread=ranges))  # fmt: skip
def test_any_settings_come_back(settings: PriorSettings) -> None:
    found, same = priors_from_mapping(yaml.safe_load(priors_yaml(TINY, settings)), TINY)
    assert (found, same) == (settings, TINY)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.1, 5)), min_size=4, max_size=4))
def test_any_ranges_of_coefficients_come_back(bounds: list[tuple[float, float]]) -> None:
    given_ranges = {f.name: PriorRange(low, low + width) for f, (low, width) in zip(TINY.features, bounds, strict=True)}
    own = TINY.with_priors(given_ranges)
    _, found = priors_from_mapping(yaml.safe_load(priors_yaml(own)), TINY)
    for f in found.features:
        expected = given_ranges[f.name]
        np.testing.assert_allclose([f.prior.low, f.prior.high], [expected.low, expected.high], rtol=1e-11, atol=1e-15)


def test_a_file_says_what_differs_and_nothing_else() -> None:
    data = {
        "deviation": [0.2, 0.4], "hardware_share": 3, "drift": None,
        "population": {"prefill": {"range": ["1e-5", 6e-5], "unit": "s/token"}},
    }  # fmt: skip
    settings, features = priors_from_mapping(data, TINY)
    assert settings == replace(PriorSettings(), deviation=PositiveRange(0.2, 0.4), hardware_share=3.0, drift=None)
    assert features.own_priors == ("prefill",)
    assert (features["prefill"].prior.low, features["prefill"].prior.high) == pytest.approx((0.5, 3.0))
    assert features["decode"] == TINY["decode"]
    assert "90 % of the population coefficient of prefill lies between 1e-05 and 6e-05 s/token" in settings.sentences(features)


def test_a_share_may_be_a_range() -> None:
    settings, _ = priors_from_mapping({"hardware_share": [0.14, 0.86]}, TINY)
    np.testing.assert_allclose(beta(settings.hardware_share, settings.hardware_share).ppf([0.05, 0.95]), [0.14, 0.86], atol=1e-9)


BAD = {
    "deviations: [0.1, 0.6]": r"deviations: unknown key; did you mean deviation\?",
    "colour: blue": "colour: unknown key; accepted are features, quantity, deviation",
    "deviation: [0.6, 0.1]": r"deviation: the lower bound comes first and is smaller, found \[0.6, 0.1\]",
    "deviation: [0.1, 0.1]": "deviation: the lower bound comes first",
    "deviation: [-0.1, 0.6]": r"deviation: give two positive numbers, \[low, high\], found \[-0.1, 0.6\]",
    "deviation: 0.3": r"deviation: give two positive numbers, \[low, high\], found 0.3",
    "deviation: [0.1, 0.3, 0.6]": "deviation: give two positive numbers",
    "deviation: null": "deviation: give two positive numbers",
    "noise: [.nan, 0.6]": "noise: the lower bound must be finite, found nan",
    "noise: [0.1, .inf]": "noise: the upper bound must be finite, found inf",
    "noise: [true, 2]": "noise: the lower bound must be a number, found True",
    "noise: [0.1, 5 %]": "noise: the upper bound must be a number, found '5 %'",
    "hardware_share: 0": "hardware_share: the parameter of the Beta prior must be positive, found 0",
    "hardware_share: [0.2, 0.9]": r"hardware_share: a range of a share lies symmetrically around one half, .* found \[0.2, 0.9\]",
    "hardware_share: [1.0e-300, 1.0]": "hardware_share: a range of a share lies symmetrically",
    "hardware_share: [0.499999, 0.500001]": "hardware_share: no Beta prior of a share has 90 %",
    "discounts: 0.5": r"discounts: give a mapping of donor to a number in \(0, 1\], found 0.5",
    "discounts: {old: 0}": r"discounts: the discount of old must lie in \(0, 1\], found 0",
    "discounts: {old: 1.5}": r"discounts: the discount of old must lie in \(0, 1\], found 1.5",
    "discounts: {old: half}": "discounts: the discount of old must be a number, found 'half'",
    "features: hfdtl": "features: 'hfdtl', but the model uses tiny",
    "quantity: queue_delay": "quantity: 'queue_delay', but the model uses step_time",
    "population: [1, 2]": r"population: give a mapping of feature to range, found \[1, 2\]",
    "population: {prefil: [0, 1]}": r"population.prefil: unknown feature of tiny; did you mean prefill\?",
    "population: {prefill: [0, 1]}": r"population.prefill: this coefficient has a unit; give \{range: \[low, high\], unit: s/token\}",
    "population: {prefill: {range: [0, 1], unit: ms/token}}": "unit ms/token, but this coefficient is in s/token; convert",
    "population: {prefill: {range: [0, 1]}}": "unit not stated, but this coefficient is in s/token",
    "population: {prefill: {rnage: [0, 1], unit: s/token}}": "found the keys rnage, unit",
    "population: {prefill: {range: [1, 0], unit: s/token}}": "population.prefill: the lower bound comes first",
    "- 1": r"expected a mapping with some of features, .* found \[1\]",
    "deviation: [0.1": "is not valid YAML",
    "deviation: [0.1, 0.6]\ndeviation: [0.2, 0.6]": "key deviation is written twice",
    "population: {prefill: 1, prefill: 2}": "key prefill is written twice",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_what_is_wrong_is_said_with_file_and_field(text: str, tmp_path: Path) -> None:
    path = tmp_path / "my priors.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=BAD[text]) as caught:
        read_priors(path, TINY)
    assert str(path) in str(caught.value)


def test_every_problem_is_listed_at_once() -> None:
    data = {"deviation": [2, 1], "population": {"decode": [0, 1], "x": 1}, "y": 1}
    with pytest.raises(InputError) as caught:
        priors_from_mapping(data, TINY, "p.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "p.yaml does not hold valid priors:"
    assert [line.split(":")[0] for line in lines[1:]] == ["  - deviation", "  - population.decode", "  - population.x", "  - y"]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no priors at .*hfdtl-bayes priors --template"):
        read_priors(tmp_path / "none.yaml", TINY)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "priors.yaml"
    path.write_text("# nothing yet\n")
    assert read_priors(path, TINY) == (PriorSettings(), TINY)


# The feature set with a user's ranges


def test_ranges_replace_those_of_the_set() -> None:
    once = TINY.with_priors({"decode": PriorRange(0.5, 1.0)})
    twice = once.with_priors({"prefill": PriorRange(0.1, 0.2), "decode": PriorRange(0.5, 1.0)})
    assert twice.own_priors == ("prefill", "decode")
    assert twice.name == TINY.name
    assert TINY.own_priors == ()
    assert TINY.with_priors({"decode": TINY["decode"].prior}) is TINY
    with pytest.raises(UnknownNameError, match=r"'tiny' has no feature\(s\) other; it has prefill, decode"):
        TINY.with_priors({"other": PriorRange(0, 1)})


def test_the_fingerprint_says_what_differs() -> None:
    own = TINY.with_priors({"decode": PriorRange(0.5, 1.0)})
    assert fingerprint_differences(fingerprint(TINY), fingerprint(own)) == ["prior of decode"]
    other = TINY.with_priors({"decode": PriorRange(0.5, 1.1)})
    assert fingerprint_differences(fingerprint(other), fingerprint(own)) == ["prior of decode"]


@pytest.fixture
def _registered() -> Iterator[None]:
    register_feature_set(TINY)
    yield
    registry._SETS.pop((TINY.name, TINY.quantity), None)


@pytest.mark.usefixtures("_registered")
def test_a_posterior_keeps_the_priors_it_was_fitted_under(tmp_path: Path) -> None:
    features = TINY.with_priors({"decode": PriorRange(0.1, 0.3)})
    priors = replace(PRIORS, drift=None)
    statistics = [statistics_from_rows(traffic(own, 7, 100), own, features, block_length=BLOCK) for own in THREE[:2]]
    fitted = fit(statistics, features, priors, SAMPLER, show_progress=False)
    loaded = LatencyPosterior.load(fitted.save(tmp_path / "p.nc"))
    assert loaded.feature_set == features
    assert loaded.feature_set.own_priors == ("decode",)
    assert loaded.priors == priors
    # The set of that name has changed since: the user's own range does not hide it.
    changed = replace(
        TINY, features=tuple(replace(f, prior=PriorRange(0, 9)) if f.name == "prefill" else f for f in TINY.features)
    )
    register_feature_set(changed, replace=True)
    with pytest.raises(PosteriorFileError, match=r"feature\(s\) prefill of 'tiny' were defined otherwise"):
        LatencyPosterior.load(tmp_path / "p.nc")
