"""Projections to non-negative vectors against an independent solver of the same quadratic program."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from hfdtl_bayes.export.projection import closest_in_metric, closest_predictions


def solved(rows: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bounded least squares by scipy's BVLS (active sets of Stark & Parker), which shares no code with its NNLS."""
    return lsq_linear(rows, right, bounds=(0.0, np.inf), method="bvls", tol=1e-14).x


@given(st.integers(0, 10_000), st.integers(2, 12))
def test_in_the_posterior_s_metric(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((size, size)) * 10.0 ** rng.uniform(-3, 3, size)[:, None]
    covariance = root @ root.T + np.diag(np.diag(root @ root.T)) * 0.01
    sd = np.sqrt(np.diag(covariance))
    mean = sd * rng.normal(0.5, 1.5, size)
    found, free = closest_in_metric(mean, covariance)
    np.testing.assert_array_equal(free, mean)
    whiten = np.linalg.inv(np.linalg.cholesky(covariance / np.outer(sd, sd)))
    expected = solved(whiten, whiten @ (mean / sd))
    np.testing.assert_allclose(found / sd, expected, atol=1e-7 * (1 + np.abs(expected).max()))


@given(st.integers(0, 10_000), st.integers(2, 8))
def test_by_predictions(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    designs = [rng.exponential(size=(n, size)) for n in (20, 7)]
    means = [d @ rng.normal(0.3, 1.0, size) + 5.0 * size for d in designs]
    prior, sd, tie, weights = rng.normal(size=size), rng.uniform(0.5, 2, size), 1e-2, (1.0, 0.4)
    found, _ = closest_predictions(list(zip(designs, means, weights, strict=True)), prior, sd, tie)
    rows = [w / np.sqrt(len(m)) * d / m[:, None] for d, m, w in zip(designs, means, weights, strict=True)]
    right = [np.full(len(m), w / np.sqrt(len(m))) for m, w in zip(means, weights, strict=True)]
    stacked, target = np.vstack([*rows, np.diag(tie / sd)]), np.concatenate([*right, tie * prior / sd])
    expected = solved(stacked, target)
    np.testing.assert_allclose(found, expected, atol=1e-6 * (1 + np.abs(expected).max()))
