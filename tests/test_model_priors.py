"""Priors: what a range means, how it is said, what is refused."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import beta, gamma, lognorm, norm
from simulation import THREE, TINY, deviation_size, draw_parameters

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import PriorRange, feature_set, feature_set_names
from hfdtl_bayes.model import PositiveRange, PriorSettings
from hfdtl_bayes.model.priors import deviation_scale, population_mean, population_sd

POSITIVE = st.floats(1e-12, 1e12)


@given(low=POSITIVE, high=POSITIVE)
def test_a_positive_range_holds_ninety_per_cent(low: float, high: float) -> None:
    assume(low * (1 + 1e-9) < high)
    r = PositiveRange(low, high)
    prior = lognorm(r.log_sd, scale=math.exp(r.log_mean))
    assert prior.ppf(0.05) == pytest.approx(low, rel=1e-6)
    assert prior.ppf(0.95) == pytest.approx(high, rel=1e-6)


@given(low=st.floats(1e-9, 1e6), ratio=st.floats(1.0001, 1e9))
def test_the_gamma_distribution_of_a_range_holds_ninety_per_cent(low: float, ratio: float) -> None:
    r = PositiveRange(low, low * ratio)
    prior = gamma(r.gamma_shape, scale=1 / r.gamma_rate)
    np.testing.assert_allclose(prior.cdf([r.low, r.gamma_median, r.high]), [0.05, 0.5, 0.95], rtol=1e-5)


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6))
def test_a_range_of_a_coefficient_holds_ninety_per_cent(low: float, width: float) -> None:
    prior = PriorRange(low, low + width)
    inside = norm.cdf([prior.low, prior.high], prior.mean, prior.sd)
    np.testing.assert_allclose(inside, [0.05, 0.95], atol=1e-6)


@pytest.mark.parametrize(
    "bounds",
    [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0), (1.0, math.nan), (math.inf, math.inf)],
)
def test_an_impossible_positive_range_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="give two positive numbers, the lower one first"):
        PositiveRange(*bounds)


@pytest.mark.parametrize("share", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="hardware_share must be a positive number, found"):
        PriorSettings(hardware_share=share)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.0001, math.inf, math.nan])
def test_an_impossible_discount_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"discount of 'old' must lie in \(0, 1\], found .*fit without it or forget it"):
        PriorSettings(discounts=(("old", share),))


def test_discounts() -> None:
    priors = PriorSettings(discounts=(("old", 0.5), ("new", 1.0), ("composed", 0.25)))
    assert priors.discounts == (("composed", 0.25), ("old", 0.5))
    assert [priors.counts(c) for c in ("old", "new", "another")] == [0.5, 1.0, 1.0]
    assert priors.sentences(TINY)[len(TINY.features) + 2] == (
        "what the rows of composed say of the population counts for 0.25 of a donor; what the rows of old say of the population counts "
        "for 0.5 of a donor"
    )
    assert priors.with_discounts({"old": 0.1, "composed": 1.0}) == PriorSettings(discounts=(("old", 0.1),))
    assert priors.discounts_of(("new", "old")) == PriorSettings(discounts=(("old", 0.5),))
    assert priors.with_discounts({"old": 1.0, "composed": 1.0}) == PriorSettings()
    with pytest.raises(InputError, match="discount of 'old' is given twice"):
        PriorSettings(discounts=(("old", 0.5), ("old", 0.4)))


def test_every_prior_is_said_in_numbers() -> None:
    priors = PriorSettings(deviation=PositiveRange(0.123, 0.456), noise=PositiveRange(0.0111, 0.222), hardware_share=3.0)
    said = priors.sentences(TINY)
    assert len(said) == len(TINY.features) + len(fields(PriorSettings))
    assert said[0] == "90 % of the population coefficient of prefill lies between 8e-06 and 4e-05 s/token"
    assert said[2] == "90 % of the population coefficient of inverse_tp lies between -0.002 and 0.004 s"
    assert "relative to the coefficient's size, lies between 0.123 and 0.456" in said[4]
    low, high = (f"{beta(3.0, 3.0).ppf(q):.3g}" for q in (0.05, 0.95))
    assert said[5].endswith(f"same hardware lies between {low} and {high}")
    assert said[6] == "what every donor's rows say of the population counts in full"
    assert said[7] == "90 % of the typical relative noise of one row lies between 0.0111 and 0.222"
    assert all(s.startswith("90 % of ") for s in said[:6] + said[7:])


def test_a_changed_setting_changes_one_sentence() -> None:
    before = PriorSettings()
    for i, field in enumerate(fields(PriorSettings)):
        value = getattr(before, field.name)
        other = {"hardware_share": 3.0, "discounts": (("old", 0.5),)}.get(field.name) or PositiveRange(
            value.low * 1.5, value.high * 2
        )
        after = replace(before, **{field.name: other})
        changed = [n for n, (a, b) in enumerate(zip(before.sentences(TINY), after.sentences(TINY), strict=True)) if a != b]
        assert changed == [len(TINY.features) + i]


def test_the_documented_share_is_that_of_the_default() -> None:
    low, high = (beta(*(2 * [PriorSettings().hardware_share])).ppf(q) for q in (0.05, 0.95))
    assert (round(low, 2), round(high, 2)) == (0.14, 0.86)


@pytest.mark.parametrize("name", feature_set_names())
def test_vectors_of_the_population_are_in_the_order_of_levels(name: str) -> None:
    features = feature_set(name)
    ordered = [*features.base, *features.config, *features.residual]
    np.testing.assert_allclose(population_mean(features), [(f.prior.low + f.prior.high) / 2 for f in ordered])
    np.testing.assert_allclose(population_sd(features), [f.prior.sd for f in ordered])
    np.testing.assert_allclose(deviation_scale(features), deviation_size(features))
    assert (deviation_scale(features) > 0).all()


def test_a_tenth_of_prior_draws_lies_outside_each_range() -> None:
    """The simulator of the tests and the sentences mean the same priors."""
    priors, rng = PriorSettings(), np.random.default_rng(1)
    draws = [draw_parameters(rng, THREE, TINY, priors) for _ in range(2000)]

    def outside(values: np.ndarray, low: float, high: float) -> float:
        return float(((values < low) | (values > high)).mean())

    found = [outside(np.array([d["beta"][0] for d in draws]), 0.4, 2.0)]
    found.append(outside(np.array([d["tau"] for d in draws]), priors.deviation.low, priors.deviation.high))
    for name, r in (
        ("sigma_typical", priors.noise), ("sigma_spread", priors.noise_spread),
        ("omega_typical", priors.drift), ("omega_spread", priors.drift_spread),
    ):  # fmt: skip
        found.append(outside(np.array([d[name] for d in draws]), r.low, r.high))
    np.testing.assert_allclose(found, 0.1, atol=5 * np.sqrt(0.09 / 2000))
