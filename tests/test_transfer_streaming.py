"""Rows of a target as they arrive: any chunks, parts removed and restored, are the same as all rows at once."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import BLOCK, PRIORS, THREE, TINY, batches, configuration, observe, simulate

from hfdtl_bayes.errors import HfdtlError, InputError, StatisticsError, UnknownNameError
from hfdtl_bayes.model import LatencyPosterior, SamplerSettings, fit
from hfdtl_bayes.statistics import ConfigStatistics, statistics_from_rows
from hfdtl_bayes.transfer import TargetStream, calibrate_statistics

TARGET = configuration("target", "L4", 2)


@cache
def donors() -> LatencyPosterior:
    data = simulate(91, THREE, TINY, PRIORS, (60, 40, 80))
    return fit(data.statistics, TINY, PRIORS, SamplerSettings(draws=500, tune=200, chains=8), seed=1, show_progress=False)


@cache
def recording(part: int = 0, count: int = 230) -> pd.DataFrame:
    """Steps with gaps and two regimes, not cut at the ends of blocks."""
    rng = np.random.default_rng([92, part])
    frame = (
        batches(rng, count + 40).drop(index=range(57, 97)).assign(regime=lambda f: np.where(f["step_id"] < 133, "calm", "busy"))
    )
    made = observe(rng, frame, TARGET, TINY, np.array([1.1, 0.8, 1.4]), 0.08, 0.1)
    return made.set_index(np.arange(len(made)) + 10_000 * part)


def scaling():
    return statistics_from_rows(recording().iloc[:100], TARGET, TINY, block_length=BLOCK).scaling


def stream() -> TargetStream:
    return TargetStream(donors(), TARGET, scaling(), block_length=BLOCK)


def fresh(*parts: pd.DataFrame) -> ConfigStatistics:
    made = [statistics_from_rows(p, TARGET, TINY, block_length=BLOCK, scaling=scaling()) for p in parts]
    total = made[0]
    for other in made[1:]:
        total = total.merge(other)
    return total


def assert_same(one: ConfigStatistics, other: ConfigStatistics) -> None:
    assert (one.rows, one.blocks, one.config_id) == (other.rows, other.blocks, other.config_id)
    assert one.log_scale_sum == pytest.approx(other.log_scale_sum, rel=1e-9)
    assert [(s.multiplier, s.count) for s in one.strata] == [(s.multiplier, s.count) for s in other.strata]
    for mine, theirs in zip(one.strata, other.strata, strict=True):
        # What a factor stands for: the order of its rows is nobody's business where there are few.
        a, b = (s.triangle.T @ s.triangle for s in (mine, theirs))
        size = np.sqrt(np.outer(np.diag(b), np.diag(b))) + 1e-300
        np.testing.assert_allclose(a / size, b / size, atol=1e-9)


def chunks(frame: pd.DataFrame, cuts: list[int]) -> list[pd.DataFrame]:
    edges = [0, *sorted(cuts), len(frame)]
    return [frame.iloc[a:b] for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, 230), max_size=25), st.booleans())
def test_any_chunks_are_the_whole(cuts: list[int], numbered: bool) -> None:
    """Chunks of no row and of one row too; blocks by step number and, without it, by position."""
    frame = recording() if numbered else recording().drop(columns="step_id")
    one = stream()
    for chunk in chunks(frame, cuts):
        one.add(chunk, "all")
    assert_same(one.statistics, fresh(frame))


@given(st.data())
def test_parts_may_come_interleaved_go_and_return(data: st.DataObject) -> None:
    """After any history, what counts is what a fresh start with the parts that are left gives."""
    one = stream()
    waiting = {f"part {i}": chunks(recording(i, 60), data.draw(st.lists(st.integers(0, 60), max_size=4))) for i in range(3)}
    came: dict[str, list[pd.DataFrame]] = {}
    counts: set[str] = set()
    for _ in range(data.draw(st.integers(1, 20))):
        label = data.draw(st.sampled_from(sorted(waiting)))
        if label in counts and data.draw(st.booleans()):
            one.remove(label)
            counts.discard(label)
        elif label in one.removed:
            one.restore(label)
            counts.add(label)
        elif waiting[label]:
            chunk = waiting[label].pop(0)
            one.add(chunk, label)
            came.setdefault(label, []).append(chunk)
            counts |= {label} if len(chunk) else set()
    assert set(one.labels) == counts
    if counts:
        assert_same(one.statistics, fresh(*(pd.concat(came[c]) for c in sorted(counts))))


def test_the_posterior_is_that_of_a_fresh_calibration() -> None:
    one = stream()
    for chunk in chunks(recording(), [1, 2, 77, 150, 151]):
        one.add(chunk, "monday")
    before = one.posterior(seed=3)
    again = calibrate_statistics(donors(), fresh(recording()), seed=3, show_progress=False)
    assert before.engine == again.engine == "conditional"
    for name in ("theta", "sigma", "omega", "beta", "tau", "hardware_effect"):
        np.testing.assert_allclose(before.draws_of(name), again.draws_of(name), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(before.calibration_rows, recording().index)
    assert before.target == "target"
    # More traffic moves it; taken away again, nothing of it stays, to the last bit.
    one.add(recording(1), "tuesday")
    more = one.posterior(seed=3)
    assert not np.array_equal(more.draws_of("theta"), before.draws_of("theta"))
    assert len(more.calibration_rows) == len(recording()) + len(recording(1))
    one.remove("tuesday")
    assert one.posterior(seed=3).tree.identical(before.tree)
    one.restore("tuesday")
    assert one.posterior(seed=3).tree.identical(more.tree)


def test_the_first_rows_fix_the_scale() -> None:
    first = recording().iloc[:100]
    one = TargetStream.start(donors(), TARGET, first, block_length=BLOCK, label="a")
    one.add(recording().iloc[100:], "a")
    # With the donors' cutoff, which is off.
    expected = statistics_from_rows(first, TARGET, TINY, block_length=BLOCK, outlier_cutoff=np.inf).scaling
    assert one.scaling.difference(expected) is None
    assert_same(one.statistics, statistics_from_rows(recording(), TARGET, TINY, block_length=BLOCK, scaling=expected))


def test_row_labels_that_several_chunks_have_are_not_kept() -> None:
    one = stream()
    one.add(recording().reset_index(drop=True), "a")
    one.add(recording(1).reset_index(drop=True), "b")
    assert len(one.posterior(seed=1).calibration_rows) == 0


# --- What is refused, and leaves everything as it was. ---


def damaged(column: str, value: float) -> pd.DataFrame:
    frame = recording().iloc[50:60].astype({column: float})
    frame.iloc[4, frame.columns.get_loc(column)] = value
    return frame


BAD: dict[str, tuple[pd.DataFrame, type[HfdtlError], str]] = {
    "a quantity that is no number": (damaged("step_time_s", np.nan), StatisticsError, "step_time is not finite"),
    "a feature that is no number": (damaged("decode_tokens", np.nan), InputError, "decode"),
    "no response": (recording().iloc[50:60].drop(columns="step_time_s"), InputError, "step_time_s"),
    "no feature's column": (recording().iloc[50:60].drop(columns="decode_tokens"), InputError, "decode_tokens"),
    "no regime": (recording().iloc[50:60].drop(columns="regime"), InputError, "no column regime"),
    "no step numbers": (recording().iloc[50:60].drop(columns="step_id"), InputError, "step_id is in some chunks"),
    "a step twice": (recording().iloc[49:60], InputError, "step 49 comes after step 49"),
    "steps backwards": (recording().iloc[59:49:-1], InputError, "step 98 comes after step 99|comes after step"),
}


@pytest.mark.parametrize("what", BAD)
def test_rows_that_cannot_be_taken_change_nothing(what: str) -> None:
    rows, kind, message = BAD[what]
    one = stream()
    one.add(recording().iloc[:50], "a")
    before = one.statistics
    with pytest.raises(kind, match=message):
        one.add(rows, "a")
    after = one.statistics
    assert after.rows == before.rows
    assert all(np.array_equal(a.triangle, b.triangle) for a, b in zip(after.strata, before.strata, strict=True))
    one.add(recording().iloc[50:], "a")
    assert_same(one.statistics, fresh(recording()))


def test_labels_must_be_there() -> None:
    one = stream()
    with pytest.raises(UnknownNameError, match="no part 'a' to remove; counting are none"):
        one.remove("a")
    with pytest.raises(UnknownNameError, match="no part 'a' to restore"):
        one.restore("a")
    one.add(recording(), "a")
    one.remove("a")
    with pytest.raises(InputError, match="no rows of 'target' yet"):
        _ = one.statistics
    one.add(recording(1), "a")
    with pytest.raises(InputError, match="rows came under 'a' since it was set aside"):
        one.restore("a")


def test_too_few_rows_and_a_donor_are_refused() -> None:
    one = stream()
    one.add(recording().iloc[:2], "a")
    with pytest.raises(InputError, match=r"2 row\(s\) of 'target' count, 3 are needed"):
        one.posterior()
    with pytest.raises(InputError, match="is also a donor"):
        TargetStream(donors(), THREE[0], scaling())
    with pytest.raises(InputError, match="block_length must be at least 1"):
        TargetStream(donors(), TARGET, scaling(), block_length=0)
