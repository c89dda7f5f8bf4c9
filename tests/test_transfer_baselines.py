"""The baselines: the ridge recipe against scikit-learn, the scratch fit, and the attainable error against simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path
from hfdtl_bayes.traces import TraceStore, drop_warmup
from hfdtl_bayes.transfer import attainable_mape, calibrate_ridge, fit_ridge_donors, ridge_cv, scratch_coefficients
from hfdtl_bayes.transfer.baselines import PENALTIES


@pytest.fixture(scope="module")
def traces() -> dict[str, tuple[pd.DataFrame, object]]:
    store = TraceStore(sample_store_path())
    return {c: (drop_warmup(store.steps(c).frame), store.configuration(c)) for c in (*DONORS, TARGET)}


@pytest.mark.parametrize("seed", range(5))
def test_ridge_cv_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(60, 4)) * [1, 10, 0.1, 1] + [0, 3, 0, 0]
    observed = design @ [0.5, 0.02, 3.0, 0.0] + 2 + rng.normal(0, 0.5, 60)
    ours = ridge_cv(design, observed)
    theirs = make_pipeline(StandardScaler(), RidgeCV(alphas=PENALTIES)).fit(design, observed)
    assert ours.penalty == pytest.approx(theirs[-1].alpha_)
    np.testing.assert_allclose(ours.intercept + design @ ours.coefficients, theirs.predict(design), rtol=1e-8)


def test_the_recipe_freezes_the_donors_and_fits_residuals_only(traces: dict) -> None:
    recipe = fit_ridge_donors([traces[d] for d in DONORS])
    frame, configuration = traces[TARGET]
    calibrated = calibrate_ridge(recipe, frame, configuration)
    np.testing.assert_array_equal(calibrated.donors.coefficients, recipe.donors.coefficients)
    before, after = recipe.predict_s(frame, configuration), calibrated.predict_s(frame, configuration)
    # What the second stage may add is a constant and a multiple of kv_usage^2.
    design = np.column_stack([np.ones(len(frame)), frame["kv_usage"] ** 2])
    added = after - before
    np.testing.assert_allclose(design @ np.linalg.lstsq(design, added, rcond=None)[0], added, atol=1e-12)


def test_the_recipe_needs_a_donor() -> None:
    with pytest.raises(InputError, match="at least one donor"):
        fit_ridge_donors([])


def test_scratch_finds_non_negative_coefficients_that_made_the_data(traces: dict) -> None:
    frame, configuration = traces[TARGET]
    roofline = feature_set("roofline")
    truth = np.linspace(0.5, 2.0, len(roofline.coef_names))
    design = roofline.design(frame, configuration)
    present = np.abs(design).max(axis=0) > 0
    made = frame.assign(step_time_s=design @ truth)
    found = scratch_coefficients(made, configuration, roofline)
    assert (found >= 0).all()
    np.testing.assert_allclose(design @ found, made["step_time_s"], rtol=1e-6)
    assert (found[~present] == 0).all()


@pytest.mark.parametrize("cv", [0.01, 0.05, 0.2, 0.5])
def test_attainable_mape_is_the_error_of_the_true_mean(cv: float) -> None:
    rng = np.random.default_rng(0)
    s = np.sqrt(np.log1p(cv**2))
    y = np.exp(rng.normal(-(s**2) / 2, s, 2_000_000))
    assert y.mean() == pytest.approx(1, rel=2e-3)
    assert attainable_mape(cv) == pytest.approx(np.mean(np.abs(1 / y - 1)), rel=5e-3)


def test_attainable_mape_of_small_noise_is_four_fifths_of_it() -> None:
    assert attainable_mape(0.001) == pytest.approx(np.sqrt(2 / np.pi) * 0.001, rel=1e-3)
