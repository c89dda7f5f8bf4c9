"""What ours is compared with: the design's own two-stage ridge recipe, and a fit of the target alone.

The recipe: RidgeCV on the pooled donors' base and config features, frozen; then RidgeCV of the target's residuals on the
residual features. It stands here as designed, absolute errors and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import nnls

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import FeatureSet, feature_set, response

FloatArray = NDArray[np.float64]

PENALTIES: tuple[float, ...] = tuple(float(p) for p in np.logspace(-6, 3, 19))


@dataclass(frozen=True)
class RidgeFit:
    """A ridge regression: prediction = intercept + design @ coefficients."""

    coefficients: FloatArray
    intercept: float
    penalty: float


def ridge_cv(
    design: FloatArray, observed: FloatArray, penalties: Sequence[float] = PENALTIES, *, intercept: bool = True
) -> RidgeFit:
    """Ridge regression with the penalty that minimises the exact leave-one-out squared error.

    Columns are divided by their standard deviation before they are penalised. With hat matrix H, the leave-one-out
    residual is e_i / (1 - H_ii) (Golub, Heath & Wahba 1979, doi:10.1080/00401706.1979.10489751).

    Parameters
    ----------
    design : ndarray, shape (n, p)
    observed : ndarray, shape (n,)
    penalties : sequence of float
    intercept : bool
        True centres columns and response and leaves the intercept unpenalised.
    """
    centre = design.mean(axis=0) if intercept else np.zeros(design.shape[1])
    level = float(observed.mean()) if intercept else 0.0
    spread = design.std(axis=0)
    spread = np.where(spread > 0, spread, np.where(np.abs(design).max(axis=0) > 0, np.abs(design).max(axis=0), 1.0))
    x, y = (design - centre) / spread, observed - level
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    along = u.T @ y
    best: tuple[float, float, FloatArray] | None = None
    for penalty in penalties:
        shrink = s**2 / (s**2 + penalty)
        leverage = (u**2) @ shrink + (1 / len(y) if intercept else 0.0)
        residual = y - u @ (shrink * along)
        score = float(np.mean((residual / np.maximum(1 - leverage, 1e-12)) ** 2))
        if best is None or score < best[0]:
            best = (score, penalty, vt.T @ (s / (s**2 + penalty) * along))
    assert best is not None
    coefficients = best[2] / spread
    return RidgeFit(coefficients, level - float(centre @ coefficients), best[1])


@dataclass(frozen=True)
class RidgeRecipe:
    """The design's recipe, fitted: frozen donors' part and the target's residual part."""

    features: FeatureSet
    donors: RidgeFit
    target: RidgeFit | None

    def predict_s(self, frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
        """Return the predicted quantity of each row, shape (n,), in seconds."""
        shared, residual = _recipe_columns(self.features, frame, configuration)
        out = self.donors.intercept + shared @ self.donors.coefficients
        if self.target is not None:
            out = out + self.target.intercept + residual @ self.target.coefficients
        return np.asarray(out)


def _recipe_columns(
    features: FeatureSet, frame: pd.DataFrame, configuration: ServingConfiguration
) -> tuple[FloatArray, FloatArray]:
    design = features.design(frame, configuration)
    n_base = len(features.base)
    config = np.tile(features.config_row(configuration), (len(frame), 1))
    # The constant is the intercept of both stages.
    return np.column_stack([design[:, :n_base], config]), design[:, n_base + 1 :]


def fit_ridge_donors(
    donors: Sequence[tuple[pd.DataFrame, ServingConfiguration]], quantity: str = "step_time", features: str = "hfdtl"
) -> RidgeRecipe:
    """Fit the recipe's first stage on the pooled rows of the donors.

    Parameters
    ----------
    donors : sequence of (DataFrame, ServingConfiguration)
    quantity : str
    features : str

    Raises
    ------
    InputError
        If there is no donor.
    """
    if not donors:
        raise InputError("the ridge recipe needs at least one donor")
    chosen = feature_set(features, quantity)
    design = np.vstack([_recipe_columns(chosen, frame, c)[0] for frame, c in donors])
    observed = np.concatenate([response(frame, chosen.quantity) for frame, _ in donors])
    return RidgeRecipe(chosen, ridge_cv(design, observed), None)


def calibrate_ridge(recipe: RidgeRecipe, frame: pd.DataFrame, configuration: ServingConfiguration) -> RidgeRecipe:
    """Fit the recipe's second stage on the residuals of a target's calibration rows."""
    frozen = RidgeRecipe(recipe.features, recipe.donors, None)
    left = response(frame, recipe.features.quantity) - frozen.predict_s(frame, configuration)
    _, residual = _recipe_columns(recipe.features, frame, configuration)
    return RidgeRecipe(recipe.features, recipe.donors, ridge_cv(residual, left))


def scratch_coefficients(frame: pd.DataFrame, configuration: ServingConfiguration, features: FeatureSet) -> FloatArray:
    """Fit a configuration alone: non-negative least squares of relative errors, no donors and no prior.

    Minimises sum ((y - X w) / max(X w, floor))^2 over w >= 0, with the scale from the iteration before, until it changes by
    less than 1e-6 or fifty times.

    Returns
    -------
    ndarray, shape (K,)
        Coefficients in reference units.
    """
    design = features.design(frame, configuration)
    observed = response(frame, features.quantity)
    floor = features.noise_floor(configuration)
    scale = np.maximum(observed, floor)
    coefficients = np.zeros(design.shape[1])
    for _ in range(50):
        coefficients, _ = nnls(design / scale[:, None], observed / scale)
        updated = np.maximum(design @ coefficients, floor)
        change = float(np.max(np.abs(updated / scale - 1)))
        scale = updated
        if change < 1e-6:
            break
    return np.asarray(coefficients)
