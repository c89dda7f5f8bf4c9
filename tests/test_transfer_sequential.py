"""The test of live traffic: what it guarantees whoever looks when, and how soon it finds a shift."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from posterior_fits import three_fitted, traffic
from scipy.integrate import quad
from scipy.stats import binom, norm
from scipy.stats import t as student
from simulation import BLOCK, THREE

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.transfer.sequential import EProcess, SequentialSettings, TrafficMonitor

TARGET = THREE[2]
ALPHA, TOLERANCE, ANNOUNCED = 0.05, 0.05, 0.05


def first_alarm(errors: np.ndarray, sd: float = ANNOUNCED) -> int | None:
    process = EProcess(SequentialSettings(alpha=ALPHA, tolerance=TOLERANCE))
    for error in errors:
        process.update(float(error), sd)
        if process.alarm:
            return process.alarm_at
    return None


def test_the_process_starts_at_one_and_is_its_capital() -> None:
    process = EProcess(SequentialSettings(bets=(0.5,), tolerance=0.0))
    assert process.value == 1.0
    bounded = 2 * norm.cdf(1.0) - 1
    # Half of the weight has begun to bet, half on each sign.
    assert process.update(0.1, 0.1) == pytest.approx(0.25 * (1 + 0.5 * bounded) + 0.25 * (1 - 0.5 * bounded) + 0.5)
    up = 0.25 * (1 + 0.5 * bounded) + 1 / 12
    down = 0.25 * (1 - 0.5 * bounded) + 1 / 12
    assert process.update(0.1, 0.1) == pytest.approx(up * (1 + 0.5 * bounded) + down * (1 - 0.5 * bounded) + 1 / 3)
    assert process.direction == "slower"


@settings(max_examples=20)
@given(st.floats(-TOLERANCE, TOLERANCE), st.floats(0.01, 0.5), st.floats(1.5, 30.0), st.floats(0.02, 0.3))
def test_no_bet_gains_on_average_under_the_null(mu: float, spread: float, degrees: float, announced: float) -> None:
    """Symmetric errors around any mean within the tolerance, of any size and tail: the expected factor is at most 1."""

    def gain(error: float, sign: int) -> float:
        return float(2 * norm.cdf((sign * error - TOLERANCE) / announced) - 1)

    for sign in (1, -1):
        expected, _ = quad(
            lambda x, sign=sign: (gain(mu + spread * x, sign) + gain(mu - spread * x, sign)) * student.pdf(x, degrees), 0, 60
        )
        assert expected <= 1e-6


@pytest.mark.parametrize(
    ("mean", "spread", "correlation"),
    [(0.0, 0.05, 0.0), (TOLERANCE, 0.05, 0.0), (-TOLERANCE, 0.15, 0.0), (0.0, 0.08, 0.5)],
    ids=["as announced", "at the edge", "at the edge, three times as wide", "drift that lasts"],
)
def test_peeking_after_every_block_keeps_the_level(mean: float, spread: float, correlation: float) -> None:
    """Heavy-tailed errors (Student's t with 3 degrees), 150 blocks, one look after each."""
    rng = np.random.default_rng(0)
    shocks = spread * student.rvs(3, size=(150, 150), random_state=rng) / np.sqrt(3)
    errors = np.empty_like(shocks)
    errors[:, 0] = shocks[:, 0]
    for b in range(1, shocks.shape[1]):
        errors[:, b] = correlation * errors[:, b - 1] + np.sqrt(1 - correlation**2) * shocks[:, b]
    alarms = sum(first_alarm(mean + e) is not None for e in errors)
    assert binom.sf(alarms - 1, len(errors), ALPHA) > 1e-3, alarms / len(errors)


@pytest.mark.parametrize(("shift", "after", "within"), [(0.10, 0, 25), (0.30, 0, 10), (-0.30, 0, 10), (0.30, 100, 25)])
def test_a_shift_is_found_soon_however_long_all_was_well(shift: float, after: int, within: int) -> None:
    rng = np.random.default_rng(1)
    delays = []
    for _ in range(40):
        errors = ANNOUNCED * rng.standard_normal(after + 300)
        errors[after:] += shift
        alarm = first_alarm(errors)
        assert alarm is not None
        delays.append(alarm - after)
    assert np.median(delays) <= within


def test_the_monitor_judges_blocks_of_the_model_in_use_whatever_the_chunks() -> None:
    rows = traffic(TARGET, 50, 405)
    whole = TrafficMonitor(three_fitted(), TARGET).add(rows)
    pieces = TrafficMonitor(three_fitted(), TARGET)
    for start in range(0, len(rows), 7):
        pieces.add(rows.iloc[start : start + 7])
    assert len(whole.history) == 405 // BLOCK
    np.testing.assert_allclose(pieces.history.to_numpy(), whole.history.to_numpy(), rtol=1e-9)
    assert not whole.alarm
    assert "still predicts this traffic within 5%" in str(whole)
    shifted = whole.add(rows.assign(step_time_s=1.6 * rows["step_time_s"]))
    assert shifted.alarm
    assert "slower than predicted" in str(shifted)
    assert shifted.process.alarm_at is not None
    assert 405 // BLOCK < shifted.process.alarm_at <= len(shifted.history)


@pytest.mark.parametrize("wrong", [{"alpha": 0}, {"tolerance": -0.1}, {"bets": ()}, {"bets": (1.0,)}])
def test_settings_without_a_guarantee_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SequentialSettings(**wrong)  # type: ignore[arg-type]


def test_a_block_without_an_error_or_a_spread_is_refused() -> None:
    with pytest.raises(InputError, match="finite error and a positive sd"):
        EProcess().update(0.1, 0.0)
    with pytest.raises(InputError, match="finite error and a positive sd"):
        EProcess().update(float("nan"), 0.1)
