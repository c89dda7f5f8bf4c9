"""`select_rows`: what is reported of a choice, what a calibrated target changes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from posterior_fits import SAMPLER, three_fitted, traffic
from simulation import BENT, BLOCK, PRIORS, THREE, TINY, batches, configuration

from hfdtl_bayes.design import Acquisition, Selection, SelectionSettings, select_in_rounds, select_rows
from hfdtl_bayes.design.candidates import coverage_bins, misfit_columns
from hfdtl_bayes.errors import HfdtlError, InputError, UnknownNameError
from hfdtl_bayes.model import LatencyPosterior, fit
from hfdtl_bayes.statistics import statistics_from_rows
from hfdtl_bayes.transfer import variance_sources
from hfdtl_bayes.transfer.calibration import calibrate_by_statistics

NEW = configuration("new", "H100", 4)
EVERY = SelectionSettings(draws=10**6, mix_rows=10**6, misfit=0.0, block_length=BLOCK)
FEW = SelectionSettings(draws=8, misfit=0.0, block_length=BLOCK)


def steps(count: int, seed: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng([seed, 9])
    waiting, usage = rng.integers(0, 5, count) * (rng.random(count) < 0.5), rng.random(count) ** 2
    return batches(rng, count).assign(waiting_requests=waiting, kv_usage=usage)


def decode_only(count: int) -> pd.DataFrame:
    return steps(count, 2).assign(prefill_tokens=0)


def chosen(pool: pd.DataFrame, budget: int | None = 12, posterior: LatencyPosterior | None = None, **more: Any) -> Selection:
    return select_rows(posterior or three_fitted(), pool, more.pop("own", NEW), budget, **{"settings": FEW, **more})


# --- what is reported --------------------------------------------------------------------------------------------------------


def test_errors_expected_before_any_row_are_those_of_the_variance_by_source() -> None:
    mix = steps(50, 3)
    found = chosen(steps(80), 1, deployment=mix, settings=EVERY)
    sources = variance_sources(three_fitted(), mix, NEW)
    relative = sources.by_source[["population", "hardware", "configuration"]].div(sources.scale_s**2, axis=0).sum(axis=1)
    assert found.expected_sd[0] == pytest.approx(np.sqrt(relative.mean()))
    # E |error| of normals, averaged over draws of the scales: below that of their mean variance.
    assert 0.6 * found.expected_sd[0] < found.expected_mape[0] < np.sqrt(2 / np.pi) * found.expected_sd[0]


@pytest.mark.parametrize("rule", [a for a in Acquisition if a is not Acquisition.RESIDUAL])
def test_expected_errors_fall_with_every_row_and_stay_above_the_pool_s(rule: Acquisition) -> None:
    found = chosen(steps(60), 20, deployment=steps(40, 3), acquisition=rule)
    assert (np.diff(found.expected_sd) < 0).all()
    assert (np.diff(found.expected_mape) < 0).all()
    assert found.expected_sd[-1] > found.pool_sd
    everything = chosen(steps(60), 60, deployment=steps(40, 3), acquisition=rule)
    assert everything.expected_sd[-1] == pytest.approx(everything.pool_sd, rel=1e-8)
    if rule not in (Acquisition.INFORMATION, Acquisition.EPIG):
        np.testing.assert_allclose(found.gain, -np.diff(found.expected_sd))


def test_a_mix_is_served_better_by_rows_chosen_for_it() -> None:
    pool, mix = steps(300), decode_only(50)
    by = {a: chosen(pool, 6, deployment=mix, acquisition=a).expected_sd[-1] for a in ("deployment", "information", "random")}
    assert by["deployment"] < by["information"]
    assert by["deployment"] < by["random"]


def test_rows_come_back_in_time_order_and_the_table_in_the_order_picked(tmp_path: Path) -> None:
    pool = steps(50).iloc[::2]
    found = chosen(pool, 9)
    assert found.rows(pool).index.is_monotonic_increasing
    assert set(found.rows(pool).index) == set(found.index)
    table = found.to_frame()
    assert table["step_id"].tolist() == pool.loc[found.index, "step_id"].tolist()
    assert table["pick"].tolist() == list(range(1, 10))
    np.testing.assert_allclose(table["total_cost_s"].iloc[-1], found.cost_s.sum())
    pd.testing.assert_frame_equal(pd.read_csv(found.write(tmp_path / "deep" / "s.csv")), table)
    assert str(found).startswith("9 rows of new chosen by ")


def test_costs_are_expected_times_or_a_column() -> None:
    pool = steps(50).assign(price=np.linspace(1, 3, 50))
    expected = three_fitted().expected_s(pool, NEW)
    free, priced = chosen(pool, 50), chosen(pool, 50, cost="price")
    np.testing.assert_allclose(free.cost_s, np.maximum(expected[free.index.astype(int)], 1e-3))
    np.testing.assert_allclose(priced.cost_s, pool.loc[priced.index, "price"])
    cheap = chosen(pool, None, budget_s=10.0, cost="price", per_second=True, acquisition="information")
    assert len(cheap) >= len(chosen(pool, None, budget_s=10.0, cost="price", acquisition="information"))
    assert cheap.cost_s.sum() <= 10.0


def test_weights_are_rows_given_more_than_once() -> None:
    pool, mix = steps(60), steps(3, 4)
    twice = pd.concat([mix, mix.iloc[:1]])
    one, other = chosen(pool, deployment=twice), chosen(pool, deployment=mix, weights=[2, 1, 1])
    np.testing.assert_array_equal(one.index, other.index)
    np.testing.assert_allclose(one.expected_sd, other.expected_sd)


def test_a_large_mix_is_represented_by_few_rows_of_it() -> None:
    pool, mix = steps(60), steps(5000, 5)
    every, few = (chosen(pool, deployment=mix, settings=replace(FEW, mix_rows=n)) for n in (5000, 100))
    np.testing.assert_allclose(every.expected_sd, few.expected_sd)
    np.testing.assert_allclose(every.expected_mape, few.expected_mape, rtol=0.1)
    np.testing.assert_array_equal(every.index, few.index)


def test_misfit_is_shared_by_rows_of_one_size() -> None:
    """Equal rows of 64 tokens, measured without end, leave their own misfit nothing and that of 1,024 tokens all it is."""
    small = steps(40).assign(prefill_tokens=0, decode_tokens=64)
    large = small.iloc[:1].assign(prefill_tokens=964, decode_tokens=60)
    wary = replace(FEW, misfit=0.3)
    np.testing.assert_allclose(misfit_columns(large, np.ones(1)), np.eye(7)[[5]], atol=1e-15)
    own, other = (chosen(small, 40, deployment=m, settings=wary).expected_sd for m in (small, large))
    trusting = chosen(small, 40, deployment=large).expected_sd
    # A little more than its own: the small steps' misfit also hides some of the coefficients that both share.
    assert 0.3**2 < other[-1] ** 2 - trusting[-1] ** 2 < 1.1 * 0.3**2
    assert own[0] ** 2 > 0.3**2 > 10 * own[-1] ** 2
    # A pool of both sizes is asked for both.
    pool = pd.concat(
        [small, steps(40, 2).assign(prefill_tokens=964, decode_tokens=60, step_id=np.arange(40, 80))], ignore_index=True
    )
    picked = chosen(pool, 20, settings=wary).rows(pool)
    assert 8 <= (picked["prefill_tokens"] == 0).sum() <= 12


def test_features_with_a_discrepancy_need_no_misfit_beside_it() -> None:
    statistics = [statistics_from_rows(traffic(own, 100 + i, 600), own, BENT, block_length=BLOCK) for i, own in enumerate(THREE)]
    bent = fit(statistics, BENT, PRIORS, SAMPLER, seed=5, show_progress=False)
    one, other = (chosen(steps(60), posterior=bent, settings=replace(FEW, misfit=m)) for m in (0.0, 0.3))
    np.testing.assert_array_equal(one.index, other.index)
    np.testing.assert_array_equal(one.expected_sd, other.expected_sd)
    without = [chosen(steps(60), settings=replace(FEW, misfit=m)).expected_sd[-1] for m in (0.0, 0.3)]
    assert without[0] < without[1]


def test_no_label_is_read() -> None:
    assert "step_time_s" not in steps(5).columns
    labelled = traffic(THREE[0], 1, 60)
    one, other = (chosen(f) for f in (labelled, labelled.assign(step_time_s=np.nan)))
    np.testing.assert_array_equal(one.index, other.index)


# --- a calibrated target -----------------------------------------------------------------------------------------------------


def test_rows_calibrated_on_are_not_chosen_again() -> None:
    pool = traffic(THREE[2], 5, 60)
    done = replace(three_fitted(), calibration_rows=np.arange(0, 60, 2))
    found = chosen(pool, 30, done, own=THREE[2])
    assert sorted(found.index) == list(range(1, 60, 2))
    with pytest.raises(InputError, match="31 rows exceeds the 30 rows"):
        chosen(pool, 31, done, own=THREE[2])
    with pytest.raises(InputError, match="calibrated on already"):
        chosen(pool.iloc[::2], 1, done, own=THREE[2])


def test_the_residual_rule_takes_the_largest_residuals() -> None:
    pool = traffic(THREE[2], 5, 60)
    found = chosen(pool, 7, own=THREE[2], acquisition="residual")
    residual = np.abs(pool["step_time_s"] - three_fitted().expected_s(pool, THREE[2]))
    assert found.index.tolist() == residual.sort_values(ascending=False).index[:7].tolist()
    with pytest.raises(InputError, match="measured value of every row, and 60 of 60 have none"):
        chosen(pool.assign(step_time_s=np.nan), own=THREE[2], acquisition="residual")
    with pytest.raises(InputError, match="needs a first fit of 'new'"):
        chosen(pool, acquisition="residual")


# --- coverage ----------------------------------------------------------------------------------------------------------------


def test_bins_are_of_queue_depth_and_cache_in_use() -> None:
    frame = pd.DataFrame({"waiting_requests": [0, 0, 1, 1, 9], "kv_usage": [0.1, 0.9, 0.1, 0.2, 0.1]})
    assert coverage_bins(frame).tolist() == [0, 1, 2, 2, 3]
    assert coverage_bins(frame[["kv_usage"]]).tolist() == [0, 1, 0, 0, 0]
    assert coverage_bins(frame[[]]) is None
    assert coverage_bins(pd.DataFrame({"kv_usage": [1.0, 0.0]})).tolist() == [1, 0]


def test_rows_of_each_bin_are_among_the_choice() -> None:
    pool = steps(200)
    bins = coverage_bins(pool)
    found = chosen(pool, 40, settings=replace(FEW, per_bin=2), deployment=decode_only(20))
    held = np.bincount(bins)
    assert (np.bincount(bins[found.index.astype(int)], minlength=len(held)) >= np.minimum(2, held)).all()


# --- what is refused ---------------------------------------------------------------------------------------------------------


def refusal(error: type[HfdtlError] = InputError, pool: pd.DataFrame | None = None, budget: int | None = 5, **more: Any) -> str:
    with pytest.raises(error) as raised:
        chosen(steps(30) if pool is None else pool, budget, **more)
    return str(raised.value)


def test_bad_pools() -> None:
    assert "the pool of 'new' is empty" in refusal(pool=steps(0))
    twice = steps(30)
    assert "1 row(s) whose row label stands there before, the first is 3" in refusal(pool=twice.iloc[[0, 3, 5, 3]])
    message = refusal(pool=twice.iloc[[0, 3, 5, 3]].reset_index(drop=True))
    assert "whose step_id stands there before, the first is 3" in message
    assert "prefill_tokens" in refusal(HfdtlError, pool=steps(30).drop(columns="prefill_tokens"))


def test_bad_mixes() -> None:
    assert "the deployment mix of 'new' is empty" in refusal(deployment=steps(0))
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, np.nan]):
        assert "as many weights of 0 or more" in refusal(deployment=steps(2), weights=weights)


def test_a_mix_out_of_the_pool_s_reach() -> None:
    """Rows without prefill say nothing of the cost of prefill but through the population."""
    mix = steps(30, 3).assign(prefill_tokens=600, decode_tokens=60)
    found = chosen(decode_only(30), 5, deployment=mix)
    assert 0.5 < found.unreachable < 0.99
    message = refusal(pool=decode_only(30), deployment=mix, settings=replace(FEW, max_unreachable=0.5))
    assert "outside what the pool of 'new' can measure" in message
    assert f"{found.unreachable:.1%} of the variance" in message
    assert chosen(steps(30), 5, deployment=mix).unreachable < 1e-9
    assert found.pool_sd == pytest.approx(found.expected_sd[0], rel=0.2)


def test_bad_budgets() -> None:
    assert "no budget given" in refusal(budget=None)
    assert "a budget of 0 row(s) chooses nothing" in refusal(budget=0)
    assert "a budget of -1 seconds" in refusal(budget_s=-1)
    assert "31 rows exceeds the 30 rows" in refusal(budget=31)
    assert "smaller than one step: the shortest row of the pool takes" in refusal(budget=None, budget_s=1e-6)
    assert "give a budget of" in refusal(settings=replace(FEW, per_bin=4))
    assert "give budget beside budget_s" in refusal(budget=None, budget_s=1.0, settings=replace(FEW, per_bin=1))
    bare = steps(30).drop(columns=["waiting_requests", "kv_usage"])
    assert "leave per_bin at 0" in refusal(pool=bare, settings=replace(FEW, per_bin=1))
    assert "choose at random" in refusal(pool=bare, acquisition="stratified")


def test_bad_wishes() -> None:
    assert "known are deployment, epig" in refusal(UnknownNameError, acquisition="best")
    assert "random knows no gain" in refusal(acquisition="random", per_second=True)
    assert "no column 'price'" in refusal(UnknownNameError, cost="price")
    assert "positive seconds, found 0" in refusal(pool=steps(30).assign(price=0), cost="price")
    assert "differs from the one of that name" in refusal(own=configuration("one", "H100", 8))
    for name, value in (
        ("draws", 0),
        ("mix_rows", 0),
        ("per_bin", -1),
        ("block_length", 0),
        ("misfit", -1.0),
        ("max_unreachable", 0.0),
    ):
        with pytest.raises(InputError, match=name):
            SelectionSettings(**{name: value})


# --- rounds ------------------------------------------------------------------------------------------------------------------


@cache
def donors_and_target() -> tuple[LatencyPosterior, pd.DataFrame]:
    full = three_fitted()
    posterior = fit(full.statistics[:2], TINY, PRIORS, SAMPLER, seed=5, show_progress=False)
    return posterior, traffic(THREE[2], 5, 200)


@pytest.mark.parametrize("rule", [Acquisition.DEPLOYMENT, Acquisition.RESIDUAL])
def test_rounds_choose_each_batch_from_what_the_one_before_taught(rule: Acquisition) -> None:
    donors, pool = donors_and_target()
    asked: list[pd.DataFrame] = []

    def label(rows: pd.DataFrame) -> pd.DataFrame:
        asked.append(rows)
        return rows.assign(step_time_s=pool.loc[rows.index, "step_time_s"])

    hidden = pool if rule is Acquisition.RESIDUAL else pool.drop(columns="step_time_s")
    found = select_in_rounds(donors, hidden, THREE[2], label, 25, batch=10, acquisition=rule, engine="conditional", settings=FEW)
    assert [len(a) for a in asked] == [10, 10, 5]
    assert found.rows.index.is_monotonic_increasing
    assert sorted(found.rows.index) == sorted(i for s in found.selections for i in s.index)
    assert found.rows.index.is_unique
    pd.testing.assert_frame_equal(found.rows[pool.columns], pool.loc[found.rows.index])
    np.testing.assert_array_equal(found.posterior.calibration_rows, found.rows.index)
    whole = calibrate_by_statistics(
        donors, pool.loc[found.rows.index], THREE[2], block_length=BLOCK, engine="conditional", show_progress=False
    )
    np.testing.assert_array_equal(whole.draws_of("theta"), found.posterior.draws_of("theta"))
    # Measured, the mix is about as uncertain as the round before foresaw; noise and drift were guesses then.
    foreseen, is_so = found.selections[0].expected_sd[-1], found.selections[1].expected_sd[0]
    assert 0.4 < is_so / foreseen < 2.0


def test_bad_rounds() -> None:
    donors, pool = donors_and_target()

    def refused(budget: int = 10, batch: int = 5, posterior: LatencyPosterior = donors, label: Any = lambda r: r) -> str:
        with pytest.raises(InputError) as raised:
            select_in_rounds(posterior, pool, THREE[2], label, budget, batch=batch, settings=FEW)
        return str(raised.value)

    assert "budget of 4 row(s) is smaller than one batch of 5" in refused(4)
    assert "a batch of 0 row(s)" in refused(batch=0)
    assert "calibrated for 'three'" in refused(posterior=three_fitted())
    assert "each with a finite step_time" in refused(label=lambda r: r.assign(step_time_s=np.nan))
    assert "must return the 5 rows" in refused(label=lambda r: r.iloc[1:])
