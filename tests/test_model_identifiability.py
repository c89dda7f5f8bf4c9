"""Who decided a direction: shares against a dense Gaussian, known answers, and no dependence on units."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from posterior_fits import three_fitted
from simulation import THREE, TINY, Dense, Simulated, configuration, dense, draw_parameters, loading, simulate, tiny_features

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.model.identifiability import (
    DirectionSettings,
    Moments,
    configuration_moments,
    directions,
    population_moments,
    prior_moments,
)

K = 3
WHOLE = DirectionSettings(named_within=0.0)
"""Nothing left out of a direction's name."""


def at_fixed_scales(data: Simulated, draws: int = 4) -> LatencyPosterior:
    """A posterior whose draws all have the scales that made the data, so that the joint Gaussian is its exact answer."""
    truth = data.truth
    values = {n: truth[n] for n in ("tau", "hardware_share", "sigma", "omega", "theta")}
    values |= {n: truth[n] for n in ("sigma_typical", "sigma_spread", "omega_typical", "omega_spread")}
    posterior = {}
    for name, value in values.items():
        tiled = np.tile(value, (2, draws, *([1] * np.ndim(value))))
        posterior[name] = (("chain", "draw", *(f"{name}_{i}" for i in range(np.ndim(value)))), tiled)
    tree = xr.DataTree.from_dict({"posterior": xr.Dataset(posterior), "sample_stats": xr.Dataset(attrs={"engine": "exact"})})
    return LatencyPosterior(tree, data.features, data.priors, data.statistics, None, 0)


def without(data: Simulated, c: int) -> Dense:
    """The joint Gaussian of everything, with the rows of configuration c silent."""
    full = dense(data, data.truth)
    lengths = [len(f) for f in data.frames]
    kept = np.concatenate([np.full(n, i != c) for i, n in enumerate(lengths)])
    error = full.error_covariance[np.ix_(kept, kept)]
    return Dense(full.make, full.latent_mean, full.latent_covariance, full.rows[kept], full.observed[kept], error)


@pytest.mark.parametrize("seed", range(5))
def test_moments_are_those_of_the_joint_gaussian(seed: int) -> None:
    data = simulate([91, seed])
    posterior = at_fixed_scales(data)
    mean, covariance = dense(data, data.truth).conditional()
    population = len(TINY.features)
    start = population + len({c.hardware.name for c in THREE}) * K
    found = population_moments(posterior)
    np.testing.assert_allclose(found.posterior, covariance[:population, :population], rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(found.posterior_mean, mean[:population], rtol=1e-6)
    for c, own in enumerate(data.configurations):
        at = slice(start + c * K, start + (c + 1) * K)
        moments = configuration_moments(posterior, own.config_id)
        np.testing.assert_allclose(moments.posterior, covariance[at, at], rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(moments.posterior_mean, mean[at], rtol=1e-6)
        np.testing.assert_allclose(moments.others, without(data, c).conditional()[1][at, at], rtol=1e-5, atol=1e-12)


def test_a_configuration_alone_has_no_others() -> None:
    data = simulate([92, 0], configurations=THREE[:1], rows=(50,))
    mean, covariance = dense(data, data.truth).conditional()
    moments = configuration_moments(at_fixed_scales(data), "one")
    np.testing.assert_allclose(moments.posterior, covariance[-K:, -K:], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(moments.posterior_mean, mean[-K:], rtol=1e-6)
    prior = dense(data, data.truth).latent_covariance[-K:, -K:]
    np.testing.assert_allclose(moments.others, prior, rtol=1e-9)


def test_the_prior_is_that_of_simulated_configurations() -> None:
    own = configuration("new", "A100", 4)
    data = simulate([93, 0])
    rng = np.random.default_rng(1)
    drawn = np.array([draw_parameters(rng, (own,), TINY, data.priors)["theta"][0] for _ in range(20_000)])
    mean, covariance = prior_moments(TINY, data.priors, own)
    sd = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=5 * sd.max() / np.sqrt(20_000))
    # tau is lognormal, so theta has heavier tails than a normal, and its sample covariance a larger error.
    np.testing.assert_allclose(np.cov(drawn.T) / np.outer(sd, sd), covariance / np.outer(sd, sd), atol=0.05)
    assert loading(TINY, own).shape == (K, len(TINY.features))


def known(information: float) -> Moments:
    """Prior identity; rows whose two columns are always alike tell a + b and nothing else; c not at all."""
    x = np.array([1.0, 1.0, 0.0])
    posterior = np.linalg.inv(np.eye(3) + information * np.outer(x, x))
    return Moments(("a", "b", "c"), np.zeros(3), np.eye(3), np.zeros(3), posterior, np.eye(3))


def test_of_two_columns_always_alike_the_sum_is_the_data_s_and_the_rest_the_prior_s() -> None:
    first, *rest = directions(known(4.0))
    assert (first.name, first.decided_by) == ("a + b", "mostly data")
    assert first.data == pytest.approx(8 / 9, rel=1e-12)  # 1 - 1 / (1 + 2 * 4)
    assert first.own_rows == pytest.approx(8 / 9)
    assert first.other_rows == pytest.approx(0.0, abs=1e-12)
    assert {d.name for d in rest} == {"a - b", "c"}
    for d in rest:
        assert d.data == pytest.approx(0.0, abs=1e-12)
        assert d.decided_by == "the prior"
        assert d.sentence().endswith("rows removed 0 % of the prior's variance")
    assert first.sentence() == (
        "a + b: decided by mostly data; rows removed 89 % of the prior's variance, 89 % its own and 0 % those of other configurations"
    )


@pytest.mark.parametrize(
    ("information", "word"), [(0.05, "the prior"), (0.2, "mostly the prior"), (2.0, "mostly data"), (100.0, "data")]
)
def test_words_follow_the_share(information: float, word: str) -> None:
    share = 2 * information / (1 + 2 * information)
    found = next(d for d in directions(known(information)) if d.name == "a + b")
    assert found.data == pytest.approx(share)
    assert found.decided_by == word


def test_loadings_count_in_prior_sds() -> None:
    """The same problem in other units: prior sds 1e-6, 1e3 and 1."""
    size = np.array([1e-6, 1e3, 1.0])
    plain = known(4.0)
    scaled = Moments(
        plain.names, np.zeros(3), np.diag(size**2), np.zeros(3), plain.posterior * np.outer(size, size), np.diag(size**2)
    )
    for a, b in zip(directions(plain), directions(scaled), strict=True):
        assert a.name == b.name
        assert (a.data, a.own_rows) == pytest.approx((b.data, b.own_rows), abs=1e-9)


def test_a_share_that_grew_is_no_share() -> None:
    found = directions(Moments(("a", "b"), np.zeros(2), np.eye(2), np.zeros(2), np.diag([1.5, 0.01]), None))
    assert [d.name for d in found] == ["b", "a"]
    assert found[1].data == pytest.approx(-0.5)
    assert found[1].own_rows is None
    assert found[1].sentence() == "a: decided by the prior; rows removed 0 % of the prior's variance"
    assert found[0].sentence() == "b: decided by data; rows removed 99 % of the prior's variance"


covariances = st.integers(0, 10_000)


@given(covariances)
def test_directions_share_out_what_the_data_decided(seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((5, 5))
    prior = root @ root.T + 0.1 * np.eye(5)
    x = rng.standard_normal((rng.integers(1, 7), 5)) * 10 ** rng.uniform(-2, 2)
    posterior = np.linalg.inv(np.linalg.inv(prior) + x.T @ x)
    moments = Moments(tuple("abcde"), np.zeros(5), prior, np.zeros(5), posterior, prior)
    found = directions(moments, WHOLE)
    total = 5 - np.trace(np.linalg.solve(prior, posterior))
    assert sum(d.data for d in found) == pytest.approx(total, rel=1e-6, abs=1e-6)
    vectors = np.array([[dict(d.loadings).get(n, 0.0) for n in "abcde"] for d in found]) / np.sqrt(np.diag(prior))
    for a, d in zip(vectors, found, strict=True):
        assert 1 - a @ posterior @ a / (a @ prior @ a) == pytest.approx(d.data, abs=1e-9)
        assert max(abs(v) for _, v in d.loadings) == d.loadings[0][1] == 1.0
    # No combination at all lies outside the extremes of the eigenproblem, and the bands keep theirs.
    lam = np.linalg.eigvals(np.linalg.solve(prior, posterior)).real
    assert min(d.data for d in found) >= 1 - lam.max() - 1e-9
    assert max(d.data for d in found) <= 1 - lam.min() + 1e-9
    for band, word in enumerate(WHOLE.words):
        count = sum(WHOLE.band(1 - v) == band for v in lam)
        assert sum(d.decided_by == word for d in found) == count


@given(covariances)
def test_what_a_name_leaves_out_hardly_changes_the_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 5)) * 10 ** rng.uniform(-2, 2)
    posterior = np.linalg.inv(np.eye(5) + x.T @ x)
    moments = Moments(tuple("abcde"), np.zeros(5), np.eye(5), np.zeros(5), posterior, None)
    whole = sorted(d.data for d in directions(moments, WHOLE))
    named = sorted(d.data for d in directions(moments))
    np.testing.assert_allclose(named, whole, atol=DirectionSettings().named_within + 1e-12)


def test_the_unit_of_a_reference_changes_nothing() -> None:
    """The same rows under references a thousand times larger and smaller, and other references for each coefficient."""
    told = []
    for references in ((2e-5, 1e-4, 2e-3, 5e-3), (2e-2, 1e-7, 3e-3, 5.0)):
        data = simulate([94, 1])
        features = tiny_features(references=references)
        factor = np.array([2e-5, 1e-4, 5e-3]) / np.array([references[0], references[1], references[3]])
        truth = data.truth | {"theta": data.truth["theta"] * factor}
        other = Simulated(data.configurations, features, data.priors, truth, data.frames, data.block)
        told.append([directions(configuration_moments(at_fixed_scales(other), c)) for c in ("one", "two", "three")])
    for a, b in zip(*told, strict=True):
        assert [d.name for d in a] == [d.name for d in b]
        for one, two in zip(a, b, strict=True):
            assert (one.data, one.own_rows) == pytest.approx((two.data, two.own_rows), abs=1e-6)


def test_exact_moments_are_those_of_the_draws() -> None:
    posterior = three_fitted()
    for c, config_id in enumerate(posterior.config_ids):
        moments = configuration_moments(posterior, config_id)
        theta = posterior.draws_of("theta")[:, c]
        # Five standard errors of 600 draws.
        sd = np.sqrt(np.diag(moments.posterior))
        np.testing.assert_allclose((theta.mean(axis=0) - moments.posterior_mean) / sd, 0.0, atol=5 / np.sqrt(600))
        np.testing.assert_allclose(theta.std(axis=0) / sd, 1.0, atol=5 / np.sqrt(1200))
        # Twelve thousand rows of varied traffic leave nothing to the prior.
        assert {d.decided_by for d in directions(moments)} == {"data"}
    population = directions(population_moments(posterior))
    assert {n for d in population for n, _ in d.loadings} <= {f.name for f in TINY.features}
    assert all(d.own_rows is None for d in population)


def test_a_configuration_that_was_not_fitted_is_refused() -> None:
    with pytest.raises(InputError, match="'elsewhere' was not fitted; this posterior holds one, two, three"):
        configuration_moments(three_fitted(), "elsewhere")
