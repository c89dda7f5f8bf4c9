"""Greedy selection against dense Gaussian algebra, exhaustive search and a refit of the exact engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from posterior_fits import three_fitted
from simulation import BLOCK, PRIORS, THREE, TINY, batches, configuration

from hfdtl_bayes.design import Acquisition, greedy
from hfdtl_bayes.design.belief import SMALLEST_NOISE, Belief, belief_of
from hfdtl_bayes.design.candidates import Candidates, candidates_of
from hfdtl_bayes.design.greedy import DeploymentMix, Knowledge, Path, Rules, choose
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import ExactDensity, drawn_coordinates
from hfdtl_bayes.statistics import statistics_from_rows

K = 4
GAINS = [a for a in Acquisition if not a.baseline]
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def _few_looked_at() -> Iterator[None]:
    """Two rows are evaluated at once where bounds decide which; by default so many that no small pool would leave any out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "_LOOKED_AT", 2)
        yield


def belief(seed: int, draws: int = 3, drift: float = 0.1) -> Belief:
    rng = np.random.default_rng([seed, 1])
    factor = rng.standard_normal((draws, K, K)) * 10 ** rng.uniform(-2, 0.5, K)[:, None]
    return Belief("toy", np.ones(K), factor, rng.uniform(0.03, 0.2, draws), drift * rng.uniform(0.5, 2, draws))


def pool(seed: int, rows: int = 24, per_block: int = 3, taken: tuple[int, ...] = ()) -> Candidates:
    rng = np.random.default_rng([seed, 2])
    design = rng.standard_normal((rows, K)) * rng.choice([0.3, 1.0, 2.0], rows)[:, None]
    # Some rows stand twice, in one block or in two.
    design[rows // 2 : rows // 2 + 4] = design[:4]
    design[1] = design[0]
    blocks, cost = np.arange(rows) // per_block, rng.uniform(0.5, 2.0, rows)
    return Candidates(design, blocks, cost, np.arange(rows) % 4, np.array(taken, dtype=np.int64))


def mix(seed: int, rows: int = 6) -> DeploymentMix:
    rng = np.random.default_rng([seed, 3])
    return DeploymentMix.of(rng.standard_normal((rows, K)), rng.uniform(0.1, 1, rows), rows)


def picks(seed: int, rule: Acquisition, count: int, *, lazy: bool = True, drift: float = 0.1, **rules: float) -> Path:
    return choose(belief(seed, drift=drift), pool(seed), mix(seed), Rules(rule, count, lazy=lazy, **rules), seed=seed)


# --- the same in dense matrices, nothing updated -----------------------------------------------------------------------------


def row_covariance(own: Belief, s: int, blocks: np.ndarray) -> np.ndarray:
    shared = blocks[:, None] == blocks
    return own.sigma[s] ** 2 * np.eye(len(blocks)) + own.omega[s] ** 2 * shared


def dense_covariance(own: Belief, candidates: Candidates, rows: list[int]) -> np.ndarray:
    """Covariance of the coefficients given rows, for each draw: condition the joint normal of coefficients and rows."""
    found = []
    for s, factor in enumerate(own.factor):
        prior, x = factor @ factor.T, candidates.design[rows]
        observed = x @ prior @ x.T + row_covariance(own, s, candidates.blocks[rows])
        found.append(prior - prior @ x.T @ np.linalg.solve(observed, x @ prior))
    return np.array(found)


def dense_gain(own: Belief, candidates: Candidates, target: DeploymentMix, rule: Acquisition, rows: list[int], new: int) -> float:
    after, before = dense_covariance(own, candidates, [*rows, new]), dense_covariance(own, candidates, rows)
    if rule is Acquisition.DEPLOYMENT:
        return float(np.trace((before - after) @ target.moments, axis1=1, axis2=2).mean())
    if rule is Acquisition.INFORMATION:
        return float(0.5 * (np.linalg.slogdet(before)[1] - np.linalg.slogdet(after)[1]).mean())
    if rule is Acquisition.EPIG:
        noise = (own.sigma**2 + own.omega**2)[:, None]
        step_before, step_after = (noise + np.einsum("jk,skl,jl->sj", target.design, m, target.design) for m in (before, after))
        return float(0.5 * (np.log(step_before / step_after) @ target.weights).mean())
    raise AssertionError(rule)


def dense_greedy(seed: int, rule: Acquisition, count: int) -> list[int]:
    own, candidates, target, chosen = belief(seed), pool(seed), mix(seed), []
    for _ in range(count):
        left = [i for i in range(len(candidates.design)) if i not in chosen]
        gains = np.array([dense_gain(own, candidates, target, rule, chosen, i) for i in left])
        chosen.append(left[int(np.argmax(gains >= gains.max() * (1 - 1e-7)))])
    return chosen


@given(SEEDS, st.lists(st.integers(0, 23), min_size=1, max_size=20, unique=True), st.sampled_from([0.0, 0.1, 1.0]))
def test_updates_equal_conditioning_all_at_once(seed: int, rows: list[int], drift: float) -> None:
    own, candidates = belief(seed, drift=drift), pool(seed)
    known = Knowledge(own, candidates)
    for row in rows:
        known.take(row)
    dense = dense_covariance(own, candidates, rows)
    size = np.abs(own.factor @ np.swapaxes(own.factor, 1, 2)).max()
    np.testing.assert_allclose(known.covariance, dense, rtol=0, atol=1e-8 * size)
    at_once = own.factor @ own.after(candidates.design[rows], candidates.blocks[rows]) @ np.swapaxes(own.factor, 1, 2)
    np.testing.assert_allclose(at_once, known.covariance, rtol=0, atol=1e-8 * size)


@pytest.mark.parametrize("count", [5, 60])
def test_updates_equal_a_refit_of_the_exact_engine(count: int) -> None:
    """The rows' statistics added to the donors' at fixed scales, everything eliminated anew."""
    posterior, new = three_fitted(), configuration("new", "H100", 4)
    rng = np.random.default_rng(7)
    frame = batches(rng, 200)
    own = belief_of(posterior, new, draws=8, seed=3)
    candidates = candidates_of(posterior, frame, new, own.scale, block_length=BLOCK, cost=None, key="step_id")
    chosen = np.sort(rng.permutation(len(frame))[:count])
    known = Knowledge(own, candidates)
    for row in rng.permutation(chosen):
        known.take(int(row))
    pilot = posterior.draws(new).mean
    measured = frame.iloc[chosen].assign(step_time_s=lambda f: TINY.design(f, new) @ pilot)
    statistics = statistics_from_rows(measured, new, TINY, block_length=BLOCK, pilot=pilot)
    before = ExactDensity(posterior.statistics, TINY, PRIORS)
    draws = np.unique(np.linspace(0, len(posterior.draws_of("tau")) - 1, 8).round().astype(int))
    tau, share, sigma, omega, *rest = before.split(drawn_coordinates(posterior, before, range(3), draws))
    x = np.column_stack([tau, share, sigma, np.log(own.sigma), omega, np.log(own.omega), *rest])
    after = ExactDensity([*posterior.statistics, statistics], TINY, PRIORS)
    _, levels = after.levels(x, new, 3)
    refit = (levels.population + levels.hardware + levels.own) / (own.scale[:, None] * own.scale)
    assert np.abs(refit - own.factor @ np.swapaxes(own.factor, 1, 2)).max() > 1e-3
    np.testing.assert_allclose(known.covariance, refit, rtol=1e-8, atol=1e-8 * np.abs(refit).max())


@pytest.mark.parametrize("rule", [Acquisition.DEPLOYMENT, Acquisition.EPIG, Acquisition.INFORMATION])
@pytest.mark.parametrize("seed", range(5))
def test_picks_and_gains_are_those_of_exhaustive_steps(rule: Acquisition, seed: int) -> None:
    path = picks(seed, rule, 6)
    assert path.rows.tolist() == dense_greedy(seed, rule, 6)
    own, candidates, target = belief(seed), pool(seed), mix(seed)
    expected = [dense_gain(own, candidates, target, rule, path.rows[:i].tolist(), int(r)) for i, r in enumerate(path.rows)]
    np.testing.assert_allclose(path.gains, expected, rtol=1e-7)


@given(SEEDS, st.sampled_from(GAINS), st.sampled_from([0.0, 0.1, 2.0]), st.booleans())
def test_lazy_is_greedy(seed: int, rule: Acquisition, drift: float, per_second: bool) -> None:
    lazy = picks(seed, rule, 20, drift=drift, per_second=per_second)
    plain = picks(seed, rule, 20, lazy=False, drift=drift, per_second=per_second)
    np.testing.assert_array_equal(lazy.rows, plain.rows)
    np.testing.assert_allclose(lazy.gains, plain.gains, rtol=1e-6, atol=1e-15)


@given(SEEDS)
@settings(max_examples=20)
def test_greedy_information_is_near_the_best_set(seed: int) -> None:
    """Without shared drift information is submodular, so greedy reaches 1 - 1/e of the best of all sets, found by trying them."""
    candidates = pool(seed, rows=10, per_block=1)
    own, target = belief(seed), mix(seed)

    def told(rows: list[int]) -> float:
        before = np.linalg.slogdet(own.factor @ np.swapaxes(own.factor, 1, 2))[1]
        return float(0.5 * (before - np.linalg.slogdet(dense_covariance(own, candidates, rows))[1]).mean())

    path = choose(own, candidates, target, Rules(Acquisition.INFORMATION, 3))
    best = max(told(list(rows)) for rows in itertools.combinations(range(10), 3))
    found = told(path.rows.tolist())
    assert (1 - 1 / np.e) * best <= found <= best * (1 + 1e-9)
    assert path.gains.sum() == pytest.approx(found)


# --- drift -------------------------------------------------------------------------------------------------------------------


def test_a_fellow_of_the_same_time_block_is_worth_less() -> None:
    """Three equal rows, the second in the block of the first: the third is picked before it."""
    own = Belief("toy", np.ones(1), np.ones((1, 1, 1)), np.array([0.1]), np.array([0.3]))
    candidates = Candidates(np.ones((3, 1)), np.array([0, 0, 1]), np.ones(3), np.zeros(3, int), np.zeros(0, int))
    target = DeploymentMix.of(np.ones((1, 1)), np.ones(1), 1)
    for rule in GAINS:
        path = choose(own, candidates, target, Rules(rule, 3))
        assert path.rows.tolist() == [0, 2, 1], rule
    # By hand: the mean of rows of variances sigma^2 + omega^2 (two blocks), then sigma^2 / 2 + omega^2 for the block of two.
    precision = [1, 1 + 1 / 0.1, 1 + 2 / 0.1, 1 + 1 / 0.1 + 1 / 0.095]
    np.testing.assert_allclose(path.mean_square, 1 / np.array(precision))


def test_a_fellow_can_tell_by_the_difference() -> None:
    """Drift hides the level, not the difference of two rows that share it: gains rise within a block and lazy choice must see it."""
    own = Belief("toy", np.ones(2), np.diag([1e-3, 1.0])[None], np.array([0.01]), np.array([3.0]))
    design = np.array([[1.0, 1.0], [1.0, -1.0], [1.0, 0.6]])
    candidates = Candidates(design, np.array([0, 0, 1]), np.ones(3), np.zeros(3, int), np.zeros(0, int))
    target = DeploymentMix.of(design, np.ones(3), 3)
    path = choose(own, candidates, target, Rules(Acquisition.INFORMATION, 2))
    assert path.rows.tolist() == [0, 1]
    assert path.gains[1] > 10 * path.gains[0]


def test_rows_taken_before_count_for_the_drift_of_their_block() -> None:
    own = belief(3)
    known = Knowledge(own, pool(3, taken=(4,)))
    design, noise = known.effective(np.array([3, 9]))
    rho = own.omega**2 / (own.sigma**2 + own.omega**2)
    np.testing.assert_allclose(design[:, 0], pool(3).design[3] - rho[:, None] * pool(3).design[4])
    np.testing.assert_allclose(noise[0], own.sigma**2 * (1 + rho))
    np.testing.assert_allclose(noise[1], own.sigma**2 + own.omega**2)
    path = choose(own, pool(3, taken=(4,)), mix(3), Rules(Acquisition.INFORMATION, 23))
    assert sorted(path.rows) == [i for i in range(24) if i != 4]


# --- limits ------------------------------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from(list(Acquisition)[:-1]), st.integers(1, 3))
def test_every_bin_gets_its_rows(seed: int, rule: Acquisition, per_bin: int) -> None:
    path = picks(seed, rule, 4 * per_bin + 1, per_bin=per_bin)
    assert len(path.rows) == len(set(path.rows)) == 4 * per_bin + 1
    assert np.bincount(path.rows % 4, minlength=4).min() >= per_bin
    free = picks(seed, rule, 4 * per_bin + 1)
    # Quotas bind at the end only: what can be picked freely is.
    assert path.rows[0] == free.rows[0]


@given(SEEDS, st.sampled_from(list(Acquisition)[:-1]), st.floats(2.0, 10.0))
def test_seconds_are_not_exceeded_and_none_that_fit_are_left(seed: int, rule: Acquisition, budget_s: float) -> None:
    path, cost = picks(seed, rule, 24, budget_s=budget_s), pool(seed).cost_s
    spent = cost[path.rows].sum()
    assert spent <= budget_s
    left = np.delete(cost, path.rows)
    assert not len(left) or left.min() > budget_s - spent


def test_a_stratified_choice_takes_each_bin_in_turn() -> None:
    rows = picks(1, Acquisition.STRATIFIED, 12).rows
    for turn in rows.reshape(3, 4):
        assert set(turn % 4) == {0, 1, 2, 3}


def test_per_second_takes_the_best_ratio() -> None:
    path, candidates = picks(2, Acquisition.INFORMATION, 1, per_second=True), pool(2)
    gains = [dense_gain(belief(2), candidates, mix(2), Acquisition.INFORMATION, [], i) for i in range(24)]
    assert path.rows[0] == np.argmax(np.array(gains) / candidates.cost_s)


def test_noise_has_the_floor_of_the_model_and_must_be_a_number() -> None:
    own = belief(1)
    none = Belief("toy", own.scale, own.factor, np.zeros(3), np.zeros(3))
    np.testing.assert_array_equal(none.sigma, SMALLEST_NOISE)
    path = choose(none, pool(1), mix(1), Rules(Acquisition.INFORMATION, 8))
    assert np.isfinite(path.gains).all()
    assert (path.gains > 0).all()
    with pytest.raises(InputError, match="sigma must be relative sds"):
        Belief("toy", own.scale, own.factor, np.array([0.1, np.nan, 0.1]), own.omega)


@pytest.mark.parametrize("own", THREE, ids=lambda c: c.config_id)
def test_belief_of_a_fitted_configuration_is_its_own(own) -> None:
    posterior = three_fitted()
    found = belief_of(posterior, own, draws=10**6)
    c = posterior.config_ids.index(own.config_id)
    np.testing.assert_array_equal(found.sigma, posterior.draws_of("sigma")[:, c])
    covariance = (found.factor @ np.swapaxes(found.factor, 1, 2)).mean(axis=0) * found.scale[:, None] * found.scale
    drawn = pd.DataFrame(posterior.draws_of("theta")[:, c]).cov().to_numpy()
    # The draws' covariance holds what the scales move the mean by, next to nothing of a configuration with 12,000 rows.
    np.testing.assert_allclose(np.diag(covariance), np.diag(drawn), rtol=0.25)
