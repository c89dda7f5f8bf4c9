"""Factors of whole blocks: those of the contrasts and totals of the scaled rows, by whichever way they are computed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfdtl_bayes.statistics import factors
from hfdtl_bayes.statistics.factors import Rows, block_factors
from hfdtl_bayes.statistics.sufficient import split_blocks


def rows_of(seed: int, count: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design, pilot and observations: three columns and a constant, or as `kind` says."""
    rng = np.random.default_rng(seed)
    design = np.column_stack([rng.gamma(2.0, 1e-3, count), rng.gamma(3.0, 2e-4, count), rng.random(count), np.full(count, 5e-3)])
    pilot = np.array([1.1, 0.9, 1e-3, 1.2])
    if kind == "dependent":
        design[:, 1] = 0.3 * design[:, 0]
    elif kind == "absent":
        design[:, 1] = 0.0
    elif kind == "hardly varies":
        design[:, 0] = 2e-3 * (1 + 1e-7 * rng.standard_normal(count))
    elif kind == "no constant in the pilot":
        pilot[3] = 0.0
    elif kind == "no constant":
        design[:, 3] = rng.gamma(2.0, 1e-3, count)
    noise = 0.0 if kind == "no noise" else 0.05
    return design, pilot, design @ pilot * (1 + noise * rng.standard_normal(count))


KINDS = ["plain", "dependent", "absent", "hardly varies", "no constant in the pilot", "no constant", "no noise"]


def grams(design: np.ndarray, observed: np.ndarray, scale: np.ndarray, sizes: list[int]) -> dict[int, tuple[int, np.ndarray]]:
    """Count and Gram matrix by multiplier, from the rotated rows."""
    scaled = np.column_stack([design, observed]) / scale[:, None]
    return {m: (len(own), own.T @ own) for m, own in split_blocks(scaled, np.repeat(np.arange(len(sizes)), sizes))}


def assert_factors(found: dict[int, tuple[int, tuple[np.ndarray, ...]]], expected: dict[int, tuple[int, np.ndarray]]) -> None:
    assert {m: count for m, (count, _) in found.items()} == {m: count for m, (count, _) in expected.items()}
    whole = np.sqrt(sum(gram.diagonal() for _, gram in expected.values()))
    for m, (_, parts) in found.items():
        stacked, gram = np.vstack(parts), expected[m][1]
        size = np.sqrt(gram.diagonal())
        # The rows themselves are known to some 1e-16, which is all there is where a column does not vary within blocks.
        allowed = 1e-9 * np.outer(size, size) + 1e-14 * np.outer(whole, whole)
        assert (np.abs(stacked.T @ stacked - gram) <= allowed).all()


@given(
    seed=st.integers(0, 2**31),
    sizes=st.one_of(
        st.lists(st.integers(1, 9), min_size=1, max_size=30),
        st.tuples(st.integers(1, 30), st.integers(1, 60)).map(lambda t: [t[0]] * t[1]),
    ),
    kind=st.sampled_from(KINDS),
    floor=st.sampled_from([0.0, 7e-3, 1.0]),
)
@settings(max_examples=150)
def test_factors_are_those_of_the_rotated_rows(seed: int, sizes: list[int], kind: str, floor: float) -> None:
    design, pilot, observed = rows_of(seed, sum(sizes), kind)
    fitted = design @ pilot
    scale = np.maximum(fitted, floor)
    rows = Rows.of(design, observed)
    np.testing.assert_array_equal(rows.design, design)
    found = block_factors(rows, pilot, rows.fitted(pilot), np.maximum(rows.fitted(pilot), floor), np.array(sizes))
    assert_factors(found, grams(design, observed, scale, sizes))


@pytest.mark.parametrize(
    ("kind", "by_qr"), [("plain", 0), ("no constant in the pilot", 0), ("dependent", 2), ("hardly varies", 2), ("no noise", 2)]
)
def test_rows_are_factored_themselves_where_squares_would_lose_digits(
    monkeypatch: pytest.MonkeyPatch, kind: str, by_qr: int
) -> None:
    """Both ways are taken by the property above, and the Gram matrix where it is accurate."""
    declined = []
    real = factors._cholesky

    def watched(gram: np.ndarray, squares: np.ndarray) -> np.ndarray | None:
        found = real(gram, squares)
        declined.append(found is None)
        return found

    monkeypatch.setattr(factors, "_cholesky", watched)
    monkeypatch.setattr(factors, "_QR_ROWS", 900)
    design, pilot, observed = rows_of(1, 4000, kind)
    fitted, sizes = design @ pilot, [20] * 200
    # The constant column as `FeatureSet.distinct_columns` gives it: a multiple of 1.
    columns = np.vstack([np.empty(4000), design[:, :3].T, np.empty(4000)])
    expansion = np.vstack([np.eye(4)[3] * 5e-3, np.eye(4)[:3]])
    rows = Rows(columns, expansion, observed)
    np.testing.assert_allclose(rows.design, design, rtol=1e-15)
    np.testing.assert_allclose(rows.fitted(pilot), fitted, rtol=1e-14)
    found = block_factors(rows, pilot, fitted, fitted, np.array(sizes))
    assert_factors(found, grams(design, observed, fitted, sizes))
    assert len(declined) == 2
    assert sum(declined) == by_qr


def test_a_factor_of_nearly_dependent_columns_keeps_what_is_left() -> None:
    """What the others leave of a column is 1e-6 of it: its square would be lost in the rounding of the Gram matrix."""
    design, pilot, observed = rows_of(3, 2000, "plain")
    design[:, 1] = 0.3 * design[:, 0] + 1e-6 * design[:, 1]
    fitted, sizes = design @ pilot, [20] * 100
    found = block_factors(Rows.of(design, observed), pilot, fitted, fitted, np.array(sizes))
    scaled = np.column_stack([design, observed]) / fitted[:, None]
    exact = dict(split_blocks(scaled, np.repeat(np.arange(100), sizes)))[0]

    def left(rows: np.ndarray) -> float:
        part = rows[:, 1] - rows[:, :1] @ np.linalg.lstsq(rows[:, :1], rows[:, 1], rcond=None)[0]
        return float(np.linalg.norm(part))

    assert left(np.vstack(found[0][1])) == pytest.approx(left(exact), rel=1e-8)
