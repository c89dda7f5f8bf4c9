"""Traffic plans: what segments tell, which are chosen, what a verdict is expected to say, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from posterior_fits import three_fitted, traffic
from simulation import BLOCK, THREE, batches, configuration, scaled_errors

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design.belief import belief_of
from hfdtl_bayes.design.closed_loop import ClosedLoop, expectations_of
from hfdtl_bayes.design.segments import (
    Segment,
    SegmentSettings,
    choose_segments,
    deployment_aim,
    feature_seconds,
    judging_rows,
    segment_effects,
)
from hfdtl_bayes.design.stopping import AcceptanceSettings, JudgedBlocks, PlannedBlocks, simulated_probabilities
from hfdtl_bayes.design.traffic_grid import TrafficGrid, TrafficPoint, replayed_points, why_not_served
from hfdtl_bayes.design.traffic_plan import TrafficPlan, plan_traffic
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.replay import Batch, Lengths, Traffic, replay
from hfdtl_bayes.traces import time_blocks
from hfdtl_bayes.transfer.checks import check_judged, known_amounts, make_evidence
from hfdtl_bayes.transfer.checks.accuracy import Ratio, probability_ratio_below

NEW = configuration("new", "H100", 4)
FEW = SegmentSettings(draws=8, block_length=BLOCK, misfit=0.0)
GRID = TrafficGrid(concurrencies=(1, 16), prompt_tokens=(20, 400), output_tokens=(8, 60), durations_s=(1.0, 3.0))


def segment(name: str, count: int, seed: int, *, prefill: bool = True, cost: float = 1.0) -> Segment:
    frame = batches(np.random.default_rng([seed, 4]), count)
    return Segment(name, frame if prefill else frame.assign(prefill_tokens=0), cost)


def three_segments() -> list[Segment]:
    return [segment("mixed", 60, 1), segment("decode", 60, 2, prefill=False, cost=0.2), segment("short", 30, 3, cost=0.7)]


@cache
def plan(**changed: object) -> TrafficPlan:
    deployment = Traffic(Lengths.around(300, 0.5), 40, concurrency=16, duration_s=2.0)
    return plan_traffic(three_fitted(), NEW, deployment, grid=GRID, settings=FEW, **changed)


# --- what segments tell ------------------------------------------------------------------------------------------------------


def test_segments_tell_together_what_their_rows_tell_at_once() -> None:
    belief = belief_of(three_fitted(), NEW, draws=8)
    segments = three_segments()
    effects = segment_effects(three_fitted(), segments, NEW, belief, FEW)
    kept = [s.steps[~judging_rows(s.steps, FEW)] for s in segments]
    joined = pd.concat(kept, ignore_index=True)
    blocks = np.concatenate([time_blocks(s.steps, BLOCK)[~judging_rows(s.steps, FEW)] + 1000 * i for i, s in enumerate(segments)])
    design = three_fitted().feature_set.design(joined, NEW) * belief.scale
    design /= three_fitted().expected_s(joined, NEW)[:, None]
    np.testing.assert_allclose(
        belief.given(sum(e.information for e in effects)), belief.after(design, blocks), rtol=1e-9, atol=1e-12
    )


def test_every_block_judges_or_calibrates_whole() -> None:
    frame = batches(np.random.default_rng(0), 200)
    judges, blocks = judging_rows(frame, FEW), time_blocks(frame, BLOCK)
    assert all(len(set(judges[blocks == b])) == 1 for b in np.unique(blocks))
    assert judges.mean() == pytest.approx(1 / FEW.judging_every)
    assert not judging_rows(frame.iloc[:0], FEW).any()


def test_each_segment_is_the_one_of_the_largest_gain_per_second_given_those_before() -> None:
    mix = batches(np.random.default_rng(9), 40)
    found = expectations_of(three_fitted(), NEW, mix, settings=FEW)
    segments = three_segments()
    effects = segment_effects(three_fitted(), segments, NEW, found.belief, FEW)
    path = choose_segments(found, effects, replace(FEW, most_segments=4), stop=False)
    design = three_fitted().feature_set.design(mix, NEW) * found.belief.scale / three_fitted().expected_s(mix, NEW)[:, None]
    slack = 0.5 * AcceptanceSettings.max_unjudged_share

    def open_share(chosen: list[int]) -> float:
        """The definition, without the arrays of the code: prior precision plus information, inverted."""
        square = []
        for s in range(found.belief.draws):
            prior = found.belief.factor[s] @ found.belief.factor[s].T
            precision = np.linalg.inv(prior) + sum((effects[i].information[s] for i in chosen), np.zeros_like(prior))
            square.append(np.einsum("jk,kl,jl->j", design, np.linalg.inv(precision), design).mean())
        seconds = feature_seconds(three_fitted(), mix, NEW)
        known = np.max([effects[i].known_s for i in chosen], axis=0) if chosen else np.zeros(seconds.shape[1])
        beyond = np.maximum(seconds - known, 0.0).sum() / three_fitted().expected_s(mix, NEW).sum()
        return float(np.sqrt(2 / np.pi * np.mean(square)) + max(min(beyond, 1.0) - slack, 0.0))

    for n, (chosen, gain) in enumerate(zip(path.chosen, path.gains, strict=True)):
        before = list(path.chosen[:n])
        gains = [open_share(before) - open_share([*before, i]) for i in range(len(segments))]
        assert gain == pytest.approx(gains[chosen], rel=1e-6)
        assert chosen == int(np.argmax(np.array(gains) / [e.cost_s for e in effects]))


def test_a_second_time_the_same_traffic_tells_less() -> None:
    found = expectations_of(three_fitted(), NEW, batches(np.random.default_rng(9), 40), settings=FEW)
    effects = segment_effects(three_fitted(), [segment("mixed", 60, 1)], NEW, found.belief, FEW)
    path = choose_segments(found, effects, replace(FEW, most_segments=5), stop=False)
    assert path.chosen == (0,) * 5
    assert (np.diff(path.gains) < 0).all()
    assert (np.diff([s.error for s in path.standings]) < 0).all()
    assert path.limits.error < path.standings[-1].error


def test_what_features_get_wrong_is_not_learned_from_steps_of_another_size() -> None:
    own, mix = THREE[2], batches(np.random.default_rng(9), 40).assign(prefill_tokens=700)
    small, alike = segment("small", 60, 1, prefill=False), Segment("alike", mix, 1.0)
    errors = []
    for misfit in (0.0, 0.1):
        trusting = replace(FEW, misfit=misfit)
        found = expectations_of(three_fitted(), own, mix, settings=trusting)
        effects = segment_effects(three_fitted(), [small, alike], own, found.belief, trusting)
        errors.append([float(found.aim.error(found.covariance(1e6 * e.information))) for e in effects])
    # Sent without end, steps of the mix's size leave nothing; others leave a bend of 10 % between two knots.
    assert errors[1][1] < 0.002
    assert errors[0][0] < 0.02
    assert 0.5 * 0.08 < errors[1][0] < 0.08


def test_recorded_segments_are_sent_once_and_within_the_budget() -> None:
    found = expectations_of(three_fitted(), NEW, batches(np.random.default_rng(9), 40), settings=FEW)
    effects = segment_effects(three_fitted(), three_segments(), NEW, found.belief, FEW)
    assert sorted(choose_segments(found, effects, FEW, repeat=False, stop=False).chosen) == [0, 1, 2]
    within = choose_segments(found, effects, FEW, repeat=False, stop=False, budget_s=0.95)
    assert within.chosen in ((1, 2), (2, 1))


def test_unjudged_time_is_what_the_verdict_will_call_so() -> None:
    posterior, own = three_fitted(), THREE[2]
    rows = traffic(own, 7, 120)
    little = rows[(rows["prefill_tokens"] < 300) & (rows["decode_tokens"] < 60)]
    seen, held = little.iloc[::2], little.iloc[1::2]
    asked = batches(np.random.default_rng(5), 80)
    evidence = make_evidence(
        posterior, own, calibration=seen, held_out=held, intended=asked, scores=None, limit=0.1, block_length=BLOCK
    )
    verdict_says = check_judged(evidence).table["share_of_time_beyond"].sum()
    aim = deployment_aim(posterior, asked, own, belief_of(posterior, own, draws=4), None, FEW)
    known = known_amounts(feature_seconds(posterior, pd.concat([seen, held]), own), 5)
    assert verdict_says > 0.01
    assert aim.unjudged(known) == pytest.approx(verdict_says, rel=1e-6)


# --- what a verdict is expected to say -----------------------------------------------------------------------------------------


def planned_blocks(blocks: int, name: str = "a") -> PlannedBlocks:
    rows = blocks * BLOCK
    return PlannedBlocks(np.ones((rows, 1)), np.repeat(np.arange(blocks), BLOCK), np.full(rows, name, dtype=object))


def simulated(blocks: list[PlannedBlocks], limit: float, *, judged: JudgedBlocks | None = None, sd: float = 0.02) -> np.ndarray:
    sigma, omega = np.array([0.05, 0.06]), np.array([0.04, 0.03])
    return simulated_probabilities(
        np.full((2, 1, 1), sd**2), sigma, omega, blocks, judged or JudgedBlocks.none(), np.full(2, limit), replicates=20, seed=3
    )


def test_blocks_at_hand_count_as_the_verdict_counts_them() -> None:
    # Of fewer than five blocks the verdict itself takes Student's t.
    total, count = np.array([0.9, 0.6, 1.1, 0.8]), np.array([10.0, 8.0, 12.0, 10.0])
    stratum = np.array(["a", "a", "b", "b"], dtype=object)
    expected = probability_ratio_below(Ratio(total, count, stratum), 0.1, 1000, 0)
    assert 0.5 < expected < 0.999
    np.testing.assert_allclose(simulated([], 0.1, judged=JudgedBlocks(total, count, stratum)), expected, rtol=1e-12)


def test_nothing_is_expected_of_fewer_than_two_blocks() -> None:
    assert not simulated([], 0.5).any()
    assert not simulated([planned_blocks(1)], 0.5).any()
    assert simulated([planned_blocks(2)], 0.5).all()


@given(st.integers(2, 12), st.floats(0.03, 0.12), st.floats(1.01, 2.0))
@settings(max_examples=20)
def test_a_laxer_limit_is_met_more_surely(blocks: int, limit: float, factor: float) -> None:
    strict, lax = simulated([planned_blocks(blocks)], limit), simulated([planned_blocks(blocks)], factor * limit)
    assert (lax >= strict).all()
    assert ((strict >= 0) & (lax <= 1)).all()


def test_more_blocks_and_fewer_doubts_make_surer() -> None:
    few, many = simulated([planned_blocks(3)], 0.08).mean(), simulated([planned_blocks(30)], 0.08).mean()
    assert few < many
    assert simulated([planned_blocks(30)], 0.08, sd=0.15).mean() < many


@pytest.mark.slow
def test_the_expected_probability_is_the_mean_of_what_verdicts_then_say() -> None:
    # Targets drawn from the donors' population, measured by one segment, calibrated and judged by the code that does so for users.
    posterior, part = three_fitted(), segment("part", 160, 1)
    loop = ClosedLoop(posterior, NEW, part.steps, settings=replace(FEW, draws=64))
    found = loop.expectations()
    (effect,) = segment_effects(posterior, [part], NEW, found.belief, loop.settings)
    expected = found.standing(effect.information, effect.known_s, [effect.judging])
    draws, rng = posterior.draws(NEW, 11), np.random.default_rng(12)
    blocks = time_blocks(part.steps, BLOCK)
    said = []
    for d in np.linspace(0, len(draws.sigma) - 1, 30).astype(int):
        mean = posterior.feature_set.design(part.steps, NEW) @ draws.theta[d]
        errors = scaled_errors(rng, blocks, draws.sigma[d], draws.omega[d])
        one = ClosedLoop(posterior, NEW, part.steps, settings=loop.settings)
        verdict = one.take(part.steps.assign(step_time_s=np.maximum(mean * (1 + errors), 0.1 * mean)), "part")
        said.append(verdict.probability_below_limit)
    assert 0.1 < expected.probability < 0.97
    spread = np.std(said) / np.sqrt(len(said))
    assert abs(np.mean(said) - expected.probability) < 3 * spread + 0.03
    assert abs(np.mean(np.array(said) >= 0.9) - expected.chance) < 3 * np.sqrt(0.25 / len(said))


# --- the grid ------------------------------------------------------------------------------------------------------------------


def knobs(own: ServingConfiguration, context: int | None = None, **engine: object) -> ServingConfiguration:
    llm = own.llm if context is None else own.llm.model_copy(update={"max_context_tokens": context})
    return own.model_copy(update={"engine": own.engine.model_copy(update=engine), "llm": llm})


def one_step(_batch: Batch) -> float:
    return 0.05


@given(st.integers(1, 128), st.integers(64, 40_000), st.sampled_from([64, 700, 1024, 5000, 131072]), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_an_engine_can_serve_the_grid_made_for_it(seqs: int, kv: int, context: int, chunked: bool, caching: bool) -> None:
    own = knobs(
        NEW, context, max_num_seqs=seqs, max_num_batched_tokens=max(seqs, 2048), kv_capacity_tokens=float(kv),
        chunked_prefill=chunked, prefix_caching=caching,
    )  # fmt: skip
    points, _ = TrafficGrid.for_engine(own, durations_s=(0.2,)).points(own)
    assert points
    for point in points[:: max(len(points) // 4, 1)]:
        served = replay(point.traffic(), own, one_step).requests
        assert (served["prompt_tokens"] <= point.longest_prompt).all()
        assert (served["prompt_tokens"] + served["output_tokens"] <= min(point.longest_request, context)).all()


def test_a_shorter_duration_is_the_beginning_of_a_longer_one() -> None:
    points = [TrafficPoint(50, 8, d, concurrency=4) for d in (1.0, 4.0)]
    points += [TrafficPoint(50, 8, d, request_rate_per_s=5.0) for d in (1.0, 4.0)]
    for short in replayed_points(points, NEW, one_step, seed=3):
        alone = replay(short.point.traffic(), NEW, one_step, seed=3)
        same = alone.steps[alone.steps["start_s"] < short.point.duration_s]
        pd.testing.assert_frame_equal(short.segment.steps, same)
        assert short.num_prompts == len(alone.requests)
        assert short.segment.cost_s >= short.point.duration_s


def test_rates_too_low_for_their_duration_are_left_out() -> None:
    points = [TrafficPoint(50, 8, 1.0, request_rate_per_s=r) for r in (0.01, 5.0)]
    assert {r.point for r in replayed_points(points, NEW, one_step)} == {points[1]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"concurrencies": ()}, "at least one of request_rates_per_s and concurrencies"),
        ({"prompt_tokens": ()}, "prompt_tokens lists no value"),
        ({"durations_s": (0.0,)}, "durations_s of the grid lists 0"),
        ({"output_tokens": (1.5,)}, "output_tokens of the grid lists 1.5"),
        ({"range_ratio": 1.0}, "from 0 to below 1"),
    ],
)
def test_grids_that_are_none(changed: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(GRID, **changed)


@pytest.mark.parametrize(
    ("own", "grid", "message"),
    [
        (NEW, {"prompt_tokens": (2000,)}, "prompt_tokens 2000 of the grid.*exceed the context of 1024 tokens"),
        (
            knobs(NEW, kv_capacity_tokens=320.0),
            {"prompt_tokens": (20, 900)},
            "prompt_tokens 900.*304 tokens that the KV cache holds",
        ),
        (
            knobs(NEW, chunked_prefill=False, max_num_batched_tokens=128),
            {"prompt_tokens": (20,), "output_tokens": (8, 200)},
            "output_tokens 200.*chunked prefill is off",
        ),
    ],
)
def test_traffic_that_an_engine_cannot_serve(own: ServingConfiguration, grid: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(GRID, range_ratio=0.0, **grid).points(own)


def test_combinations_that_cannot_be_served_are_left_out_and_said() -> None:
    grid = TrafficGrid(concurrencies=(1,), prompt_tokens=(100, 900), output_tokens=(10, 400), durations_s=(1.0,), range_ratio=0.0)
    points, left_out = grid.points(NEW)
    assert {(p.prompt_tokens, p.output_tokens) for p in points} == {(100, 10), (100, 400), (900, 10)}
    assert len(left_out) == 1
    assert "c1-p900-o400" in left_out[0]
    assert all(not why_not_served(p, NEW) for p in points)


# --- plans ---------------------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_to_send_and_what_it_brings() -> None:
    found = plan()
    table = found.to_frame()
    assert found.expected_to_accept
    assert found.minutes_needed == pytest.approx(found.minutes) == pytest.approx(table["total_minutes"].iloc[-1])
    assert (np.diff([found.before.error, *table["expected_error_after"]]) < 0).all()
    assert table["expected_gain"].gt(0).all()
    assert set(table["prompt_tokens"]) <= set(GRID.prompt_tokens)
    assert len({s.seed for s in found.segments}) == len(found.segments)
    assert f"{found.minutes:.1f}" in str(found)


def test_the_same_seed_plans_the_same() -> None:
    plan.cache_clear()
    first = plan().as_dict()
    plan.cache_clear()
    assert plan().as_dict() == first


def test_more_replays_change_costs_and_not_the_question() -> None:
    several = plan(replays=3)
    assert several.before == plan().before
    assert several.expected_to_accept


def test_a_budget_is_kept_and_what_is_needed_is_still_said() -> None:
    needed = plan().minutes_needed
    shortest = min(s.cost_s for s in plan().segments) / 60
    if needed > 1.5 * shortest:
        short = plan(budget_minutes=1.2 * shortest)
        assert short.minutes <= 1.2 * shortest
        assert not short.expected_to_accept
        assert short.minutes_needed > short.minutes
    strict = plan(budget_minutes=0.06, acceptance=AcceptanceSettings(min_chance=0.9))
    assert strict.minutes <= 0.06
    assert strict.minutes_needed is None or strict.minutes_needed >= strict.minutes


def test_what_no_traffic_of_the_grid_reaches_is_said() -> None:
    heavy = Traffic(700, 20, concurrency=64, duration_s=2.0)
    light = TrafficGrid(concurrencies=(1,), prompt_tokens=(20,), output_tokens=(8,), durations_s=(2.0,))
    found = plan_traffic(three_fitted(), NEW, heavy, grid=light, settings=FEW)
    assert found.minutes_needed is None
    assert "larger amounts of a feature than any traffic of the grid" in found.reason
    noisy = plan(acceptance=AcceptanceSettings(mape_limit=0.001, attainable_slack=0.5))
    assert noisy.minutes_needed is None
    assert "noise and drift alone are too large" in noisy.reason
    assert "No traffic of the grid" in str(noisy)


def test_a_target_measured_well_needs_nothing() -> None:
    own = THREE[2]
    rows = traffic(own, 3, 2000)
    held = rows[judging_rows(rows, FEW)]
    asked = rows.iloc[:200].drop(columns="step_time_s")
    lax = AcceptanceSettings(mape_limit=0.2)
    found = plan_traffic(three_fitted(), own, asked, grid=GRID, settings=FEW, measured=rows, held_out=held, acceptance=lax)
    assert found.minutes_needed == 0
    assert not found.segments
    assert "with what is at hand" in str(found)


def test_traffic_of_two_kinds_is_weighed() -> None:
    prefill, decode = (
        Traffic(600, 1, concurrency=4, duration_s=1.0, name="p"),
        Traffic(10, 90, concurrency=4, duration_s=2.0, name="d"),
    )
    by_weight = [
        plan_traffic(three_fitted(), NEW, [(prefill, w), (decode, 1.0)], grid=GRID, settings=FEW).before.error
        for w in (1e-6, 1e6)
    ]
    alone = [plan_traffic(three_fitted(), NEW, t, grid=GRID, settings=FEW).before.error for t in (decode, prefill)]
    np.testing.assert_allclose(by_weight, alone, rtol=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"budget_minutes": 0.001}, "smaller than one segment: the shortest of the grid takes"),
        ({"budget_minutes": -1.0}, "positive number of minutes"),
        ({"replays": 0}, "replays must be at least 1"),
        ({"settings": replace(FEW, smallest_reach=0.9999)}, "deployment mix lies outside what this traffic can measure"),
        ({"deployment": batches(np.random.default_rng(0), 0)}, "deployment mix of 'new' is empty"),
        ({"deployment": []}, "deployment mix of 'new' is empty"),
        ({"deployment": [(Traffic(10, 5, concurrency=1, num_requests=3), 0.0)]}, "weight 0"),
        ({"deployment": Traffic(200_000, 5, concurrency=1, num_requests=3)}, "can never be served"),
        ({"weights": [1.0]}, "weights are of the steps"),
    ],
)
def test_plans_that_cannot_be_made(changed: dict[str, object], message: str) -> None:
    asked = {"deployment": Traffic(100, 20, concurrency=4, duration_s=1.0), "grid": GRID, "settings": FEW, **changed}
    with pytest.raises(InputError, match=message):
        plan_traffic(three_fitted(), NEW, **asked)


def test_segments_that_are_none() -> None:
    with pytest.raises(InputError, match="costs 0"):
        Segment("free", batches(np.random.default_rng(0), 5), 0.0)
    belief = belief_of(three_fitted(), NEW, draws=2)
    with pytest.raises(InputError, match="no traffic to choose from"):
        segment_effects(three_fitted(), [], NEW, belief, FEW)
    with pytest.raises(InputError, match="'none' has no steps"):
        segment_effects(three_fitted(), [segment("none", 0, 1)], NEW, belief, FEW)


@pytest.mark.parametrize(
    ("name", "value"), [("draws", 0), ("judging_every", 1), ("most_segments", 0), ("smallest_reach", 1.0), ("misfit", -0.1)]
)
def test_settings_that_mean_nothing(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        replace(FEW, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("mape_limit", 0.0), ("min_probability", 0.4), ("min_chance", 1.0), ("replicates", 0)]
)
def test_acceptance_that_means_nothing(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        AcceptanceSettings(**{name: value})
