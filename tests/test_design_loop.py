"""The closed loop: parts taken in, a folder followed, and a recording that stands in for the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from posterior_fits import TRUTH, traffic
from simulation import BLOCK, PRIORS, THREE, TINY, batches, configuration, scaled_errors

from hfdtl_bayes.design.closed_loop import ClosedLoop
from hfdtl_bayes.design.segments import SegmentSettings, judging_rows
from hfdtl_bayes.design.simulated_loop import recorded_segments, simulate_loop
from hfdtl_bayes.design.trace_folder import FollowSettings, LoopEnd, LoopEvent, PartFolder, follow
from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.model import LatencyPosterior, fit
from hfdtl_bayes.statistics import statistics_from_rows
from hfdtl_bayes.transfer import VerdictSettings, calibrate

TARGET = configuration("near", "H100", 4)
"""Like one of the donors, so that their draws need no refit."""
FEW = SegmentSettings(draws=8, block_length=BLOCK, misfit=0.0)
LAX = VerdictSettings(mape_limit=0.25)
NEVER = VerdictSettings(mape_limit=1e-6, attainable_slack=0.1)


@cache
def donors() -> LatencyPosterior:
    known = [statistics_from_rows(traffic(own, 100 + i, 4000), own, TINY, block_length=BLOCK) for i, own in enumerate(THREE[:2])]
    return fit(known, TINY, PRIORS, seed=5, show_progress=False)


def steps(count: int = 400, seed: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = batches(rng, count)
    theta, sigma, omega = TRUTH["one"]
    errors = scaled_errors(rng, frame["step_id"].to_numpy() // BLOCK, sigma, omega)
    frame["step_time_s"] = TINY.design(frame, TARGET) @ np.array(theta) * (1 + errors)
    return frame.assign(regime=np.where(np.arange(count) < count // 2, "early", "late"))


def loop(**changed: object) -> ClosedLoop:
    return ClosedLoop(donors(), TARGET, steps(60, 9), **{"settings": FEW, "thresholds": LAX, **changed})


# --- parts taken in ------------------------------------------------------------------------------------------------------------


def test_parts_are_calibrated_on_and_judged_by_as_one_recording() -> None:
    one = loop()
    first, second = steps(150, 1), steps(130, 2)
    one.take(first, "a")
    verdict = one.take(second, "b")
    assert one.parts == ["a", "b"]
    assert one.rows == 280
    judges = [judging_rows(p, FEW) for p in (first, second)]
    # The parts again, far enough apart that no block spans both.
    joined = pd.concat([first, second.assign(step_id=second["step_id"] + 10_000)], ignore_index=True)
    seen = joined[~np.concatenate(judges)]
    same = calibrate(donors(), seen, TARGET, block_length=BLOCK, show_progress=False)
    np.testing.assert_allclose(one.posterior.draws(TARGET).mean, same.draws(TARGET).mean, rtol=1e-9)
    assert len(one.held_out) == np.concatenate(judges).sum()
    assert not set(one.held_out.index) & set(one.calibration.index)
    assert verdict is one.verdict
    assert verdict.held_out.rows == len(one.held_out)


def test_too_few_rows_are_no_verdict() -> None:
    one = loop()
    assert one.take(steps(2), "tiny") is None
    assert one.posterior is one.donors
    assert not one.accepted
    assert one.take(steps(200, 3), "more") is not None


def test_parts_added_together_are_those_taken_one_by_one() -> None:
    apart, together = loop(), loop()
    for i in range(2):
        apart.take(steps(100, i), str(i))
        together.add(steps(100, i), str(i))
    assert together.verdict is None
    together.update()
    assert together.verdict.as_dict() == apart.verdict.as_dict()
    assert together.update() is together.verdict


def test_a_part_of_warm_up_alone_changes_nothing() -> None:
    one = loop()
    one.take(steps(20).assign(regime="warmup"), "warm")
    assert (one.rows, one.parts, one.verdict) == (0, ["warm"], None)


def test_a_plan_knows_what_was_measured() -> None:
    one = loop()
    candidates = recorded_segments(steps(), rows=40, by=("regime",))
    before = one.plan(candidates, stop=False)
    one.take(candidates[before.chosen[0]].steps, "first")
    after = one.plan(candidates, stop=False)
    assert after.standings[0].error < before.standings[0].error
    assert after.standings[0].unjudged < before.standings[0].unjudged == 1.0


def test_loops_that_cannot_start() -> None:
    with pytest.raises(InputError, match="also a donor"):
        ClosedLoop(donors(), THREE[0], steps(5))
    with pytest.raises(InputError, match="deployment mix of 'near' is empty"):
        ClosedLoop(donors(), TARGET, steps(5).iloc[:0])


# --- a recording stands in for the engine ----------------------------------------------------------------------------------------


def test_a_loop_ends_with_accept_and_costs_what_it_sent() -> None:
    segments = recorded_segments(steps(), rows=40, by=("regime",))
    found = simulate_loop(donors(), TARGET, segments, steps(60, 9), settings=FEW, thresholds=LAX)
    assert found.accepted
    cost = {s.name: s.cost_s for s in segments}
    assert found.gpu_s == pytest.approx(sum(cost[n] for n in found.segments))
    assert len(set(found.segments)) == len(found.segments)
    assert found.posterior.target == TARGET.config_id


def test_random_orders_differ_by_seed_and_a_budget_ends_them() -> None:
    segments = recorded_segments(steps(), rows=40, by=("regime",))
    orders = set()
    for seed in range(3):
        found = simulate_loop(
            donors(), TARGET, segments, steps(60, 9), rule="random", budget_s=3.0, settings=FEW, thresholds=NEVER, seed=seed
        )
        orders.add(found.segments)
        spent = np.cumsum([next(s.cost_s for s in segments if s.name == n) for n in found.segments])
        assert found.gpu_s == pytest.approx(spent[-1])
        assert len(spent) == 1 or spent[-2] < 3.0
    assert len(orders) == 3


def test_a_plan_sees_no_times_of_what_was_not_sent() -> None:
    # Times that no plan may see: they change what is measured, and so all but the first choice.
    segments = recorded_segments(steps(), rows=40, by=("regime",))
    hidden = [replace(s, steps=s.steps.assign(step_time_s=s.steps["step_time_s"] * (1 + i))) for i, s in enumerate(segments)]
    first = [
        simulate_loop(donors(), TARGET, own, steps(60, 9), budget_s=1e-9, settings=FEW, thresholds=LAX).segments
        for own in (segments, hidden)
    ]
    assert first[0] == first[1]
    assert len(first[0]) == 1


def test_segments_are_consecutive_rows_of_one_cell() -> None:
    frame = steps(130)
    made = recorded_segments(frame, rows=30, smallest=10, by=("regime", "not_there"))
    assert [len(s.steps) for s in made] == [30, 30, 30, 30]
    assert all(len(set(s.steps["regime"])) == 1 and (np.diff(s.steps["step_id"]) == 1).all() for s in made)
    assert sum(s.cost_s for s in made) == pytest.approx(sum(s.steps["step_time_s"].sum() for s in made))
    with pytest.raises(InputError, match="no cell of regime has 200 rows"):
        recorded_segments(frame, smallest=200, by=("regime",))


def test_simulations_that_cannot_run() -> None:
    segments = recorded_segments(steps(), by=("regime",))
    for changed, error, message in (
        ({"rule": "best"}, UnknownNameError, "known are planned and random"),
        ({"budget_s": 0.0}, InputError, "sends nothing"),
    ):
        with pytest.raises(error, match=message):
            simulate_loop(donors(), TARGET, segments, steps(9), **changed)
    with pytest.raises(InputError, match="no segments"):
        simulate_loop(donors(), TARGET, [], steps(9))


# --- a folder that fills up --------------------------------------------------------------------------------------------------------


class World:
    """Time that passes only while someone sleeps, and what happens at each moment."""

    def __init__(self, *happenings: Callable[[], object]) -> None:
        self.now, self.happenings = 0.0, list(happenings)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.happenings:
            self.happenings.pop(0)()


def followed(world: World, folder: Path, one: ClosedLoop | None = None, **changed: float) -> tuple[ClosedLoop, list[LoopEvent]]:
    own = one or loop()
    parts = PartFolder(folder, TARGET, settle_s=changed.pop("settle_s", 5.0), clock=world.clock)
    settings = FollowSettings(**{"poll_s": 1.0, "idle_s": 20.0, **changed})
    return own, list(follow(own, parts, settings, clock=world.clock, sleep=world.sleep))


def write(folder: Path, name: str, frame: pd.DataFrame) -> Path:
    folder.mkdir(exist_ok=True)
    frame.to_parquet(folder / name, index=False)
    return folder / name


def test_parts_are_taken_as_they_come_until_accept(tmp_path: Path) -> None:
    folder = tmp_path / "steps.parquet"
    whole = steps(900)
    moments = [lambda i=i: write(folder, f"part-{i}.parquet", whole.iloc[60 * i : 60 * i + 60]) for i in range(15)]
    own, events = followed(World(*moments), folder)
    assert own.accepted
    assert events[-1].end is LoopEnd.ACCEPTED
    assert all(e.end is None for e in events[:-1])
    assert own.parts == [f"part-{i}.parquet" for i in range(len(own.parts))]
    assert own.rows == 60 * len(own.parts)


def test_nothing_coming_ends_the_loop(tmp_path: Path) -> None:
    world = World()
    own, (event,) = followed(world, tmp_path / "not-there-yet")
    assert event.end is LoopEnd.NOTHING_CAME
    assert world.now == pytest.approx(20.0)
    assert own.rows == 0


def test_a_part_restarts_the_wait_but_not_the_limit(tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    late = [lambda: None] * 14 + [lambda: write(folder, "a.parquet", steps(3))]
    world = World(*late)
    _, events = followed(world, folder)
    assert events[-1].end is LoopEnd.NOTHING_CAME
    assert world.now == pytest.approx(35.0)
    world = World(lambda: write(folder, "b.parquet", steps(3)))
    _, events = followed(world, folder, limit_s=10.0)
    assert events[-1].end is LoopEnd.OUT_OF_TIME
    assert world.now == pytest.approx(10.0)


def test_a_part_being_written_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    whole = write(folder, "a.parquet", steps(50)).read_bytes()

    def grown(share: float) -> Callable[[], object]:
        return lambda: (folder / "a.parquet").write_bytes(whole[: int(share * len(whole))])

    grown(0.2)()
    own, events = followed(World(*(grown(s) for s in (0.4, 0.6, 0.8, 1.0))), folder, settle_s=3.0)
    assert own.parts == ["a.parquet"]
    assert not any(e.said for e in events)


def test_a_broken_part_is_set_aside_once_and_taken_when_mended(tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    whole = write(folder, "broken.parquet", steps(50)).read_bytes()
    (folder / "broken.parquet").write_bytes(whole[:100])
    write(folder, "no-times.parquet", steps(20).drop(columns="step_time_s"))
    write(folder, "sound.parquet", steps(30))
    (folder / ".hidden.parquet").write_bytes(b"")
    quiet = [lambda: None] * 8
    world = World(*quiet, lambda: (folder / "broken.parquet").write_bytes(whole))
    own, events = followed(world, folder, loop(thresholds=NEVER))
    assert own.parts == ["sound.parquet", "broken.parquet"]
    said = [line for e in events for line in e.said]
    assert len(said) == 2
    assert sum("broken.parquet cannot be read" in line for line in said) == 1
    assert sum("no-times.parquet" in line and "step_time_s" in line for line in said) == 1


def test_a_part_is_taken_once_whatever_becomes_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    write(folder, "a.parquet", steps(30))
    world = World(lambda: write(folder, "a.parquet", steps(90)), (folder / "a.parquet").unlink)
    own, _ = followed(world, folder, loop(thresholds=NEVER))
    assert own.rows == 30


def test_an_interruption_leaves_what_was_taken(tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    write(folder, "a.parquet", steps(100))

    def interrupted() -> None:
        raise KeyboardInterrupt

    one = loop(thresholds=NEVER)
    with pytest.raises(KeyboardInterrupt):
        followed(World(lambda: None, interrupted), folder, one)
    assert one.rows == 100
    assert one.verdict is not None


def test_folders_and_times_that_are_none(tmp_path: Path) -> None:
    file = write(tmp_path, "steps.parquet", steps(5))
    with pytest.raises(InputError, match="is a file, which is read once"):
        PartFolder(file, TARGET)
    with pytest.raises(InputError, match="settle_s"):
        PartFolder(tmp_path, TARGET, settle_s=-1.0)
    for name in ("poll_s", "idle_s", "limit_s"):
        with pytest.raises(InputError, match=name):
            FollowSettings(**{name: 0.0})
