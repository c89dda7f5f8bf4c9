"""Splits: every row on one side, no block on both, never across regimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces import TraceStore, drop_warmup, split_by_blocks, split_by_regime, time_blocks

stretches = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(1, 30)), min_size=1, max_size=6)


def frame_of(stretches: list[tuple[str, int]], gaps: list[int] | None = None, numbered: bool = True) -> pd.DataFrame:
    regime = [name for name, length in stretches for _ in range(length)]
    frame = pd.DataFrame({"regime": regime, "row": range(len(regime))})
    if numbered:
        steps_apart = np.resize(np.array(gaps or [1]), len(frame))
        frame.insert(0, "step_id", np.cumsum(steps_apart))
    return frame


@given(stretches=stretches, gaps=st.lists(st.integers(1, 40), max_size=5), numbered=st.booleans(), length=st.integers(1, 20))
def test_a_block_is_one_stretch_of_one_regime_of_bounded_length(
    stretches: list[tuple[str, int]], gaps: list[int], numbered: bool, length: int
) -> None:
    frame = frame_of(stretches, gaps, numbered)
    blocks = time_blocks(frame, length)
    assert set(np.diff(blocks)) <= {0, 1}
    for _, rows in frame.groupby(blocks):
        assert len(set(rows["regime"])) == 1
        assert len(rows) <= length
        if numbered:
            assert rows["step_id"].max() - rows["step_id"].min() < length


def test_unnumbered_blocks_are_full_but_for_the_last_of_a_stretch() -> None:
    blocks = time_blocks(frame_of([("a", 7), ("b", 3)], numbered=False), 3)
    assert list(blocks) == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3]


def test_a_thinned_selection_keeps_the_blocks_of_the_recording() -> None:
    frame = frame_of([("a", 100), ("b", 100)])
    full = pd.Series(time_blocks(frame, 10))
    thin = frame.iloc[::3]
    own = time_blocks(thin, 10)
    together = full.iloc[::3].to_numpy()
    assert [(own[i] == own[i - 1]) == (together[i] == together[i - 1]) for i in range(1, len(thin))] == [True] * (len(thin) - 1)


@given(
    stretches=stretches,
    numbered=st.booleans(),
    fraction=st.floats(0.01, 0.99),
    length=st.integers(1, 20),
)
def test_block_split(stretches: list[tuple[str, int]], numbered: bool, fraction: float, length: int) -> None:
    frame = frame_of(stretches, numbered=numbered)
    blocks = pd.Series(time_blocks(frame, length), index=frame.index)
    try:
        calibration, held = split_by_blocks(frame, fraction, length)
    except InputError as error:
        message = str(error)
    else:
        message = ""
        assert sorted([*calibration["row"], *held["row"]]) == list(frame["row"])
        assert not set(blocks[calibration.index]) & set(blocks[held.index])
        for regime, rows in frame.groupby("regime"):
            own = blocks[rows.index]
            out = own[own.index.isin(held.index)]
            assert out.nunique() == round(fraction * own.nunique()), regime
            # The last blocks of the regime are held out: calibration comes before what it predicts.
            inside = own[~own.index.isin(held.index)]
            assert out.empty or inside.empty or inside.max() < out.min()
    assert not message or "cannot be split" in message


@given(stretches=stretches, chosen=st.sets(st.sampled_from(["a", "b", "c", "d"]), min_size=1))
def test_regime_split(stretches: list[tuple[str, int]], chosen: set[str]) -> None:
    frame = frame_of(stretches)
    present = set(frame["regime"])
    if not chosen <= present or chosen == present:
        with pytest.raises(InputError, match="the trace has"):
            split_by_regime(frame, chosen)
        return
    calibration, held = split_by_regime(frame, sorted(chosen))
    assert sorted([*calibration["row"], *held["row"]]) == list(frame["row"])
    assert set(calibration["regime"]) == chosen
    assert not set(held["regime"]) & chosen


def test_one_regime_may_be_given_by_its_name() -> None:
    frame = frame_of([("low", 3), ("high", 4)])
    calibration, held = split_by_regime(frame, "low")
    assert (len(calibration), len(held)) == (3, 4)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_fractions_outside_zero_and_one_are_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="held_out_fraction must lie between 0 and 1"):
        split_by_blocks(frame_of([("a", 50)]), fraction, 5)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(InputError, match="block_length must be at least 1"):
        time_blocks(frame_of([("a", 5)]), 0)
    with pytest.raises(InputError, match="cannot be split"):
        split_by_blocks(frame_of([("a", 5)]), 0.5, 100)
    assert len(time_blocks(frame_of([("a", 5)]).iloc[:0], 3)) == 0


def test_warm_up_and_drain_are_left_out(shared_data: Path) -> None:
    frame = TraceStore(shared_data / "vllm_cpu").steps("c01_llama-s_base").frame
    kept = drop_warmup(frame)
    assert "warmup" in set(frame["regime"])
    assert not {"warmup", "drain"} & set(kept["regime"])
    assert len(kept) == (~frame["regime"].isin(["warmup", "drain"])).sum()


def test_recordings_split_into_calibration_and_what_comes_later(shared_data: Path) -> None:
    frame = drop_warmup(TraceStore(shared_data / "vllm_cpu").steps("c01_llama-s_base").frame)
    calibration, held = split_by_blocks(frame, 0.3, 50)
    assert len(calibration) + len(held) == len(frame)
    assert 0.2 < len(held) / len(frame) < 0.4
    for regime, rows in held.groupby("regime"):
        assert calibration.loc[calibration["regime"] == regime, "step_id"].max() < rows["step_id"].min()
