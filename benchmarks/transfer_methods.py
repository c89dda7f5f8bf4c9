"""What transfer is measured against: boosting, the floor of a feature set, and the best that a prior could do.

The floor: the features' coefficients fitted to ALL noise-free rows of the target, test rows included. Nothing that is linear in these
features goes below it by more than chance (least squares of relative errors is not least absolute error, but close).

The oracle: what is left when n noisy rows are added to a prior that no user could have. Every configuration of the store gets its
coefficients from all its noise-free rows; the prior of a target is Normal, independent by coefficient, at the median over
configurations of OTHER models with their robust sd (1.4826 times the median absolute deviation), after a regression of the
constant on the config features. The noise is known to be 5 %. A Bayesian fit with three donors has to learn all this from those three and
from n rows, so beating the oracle takes better features or luck.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from transfer_splits import observed_s

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import FeatureSet, feature_set
from hfdtl_bayes.statistics.pilot import config_to_constant, own_prior
from hfdtl_bayes.traces import TraceStore, drop_warmup

FloatArray = NDArray[np.float64]

NOISE = 0.05
"""Relative sd of the noise of composed steps."""
MISFIT = 0.02
"""Relative sd that stands for what the features cannot express, where noise-free rows are fitted."""
WIDE = 2.0
"""Prior sds of the package that the prior of a fit to all rows is widened by: it only has to hold directions no row speaks of."""

_COLUMNS = (
    "prefill_tokens",
    "decode_tokens",
    "prefill_requests",
    "decode_requests",
    "prefill_attention_tokens",
    "context_tokens",
)


def boosted_s(train: pd.DataFrame, test: pd.DataFrame) -> FloatArray:
    """Predict by gradient boosting of the log step time on what is known of a batch, target alone, shape (n,).

    Two hundred trees of depth three, rate 0.05, leaves of two rows: of five settings (depth two to four, subsampling, histogram
    trees) the best or near it from 10 to 500 rows, on five configurations of composed steps.
    """
    from sklearn.ensemble import GradientBoostingRegressor  # noqa: PLC0415

    columns = list(_COLUMNS)
    trees = GradientBoostingRegressor(n_estimators=200, max_depth=3, learning_rate=0.05, min_samples_leaf=2, random_state=0)
    trees.fit(train[columns], np.log(train["step_time_s"]))
    return np.asarray(np.exp(trees.predict(test[columns])))


def relative_fit(
    design: FloatArray, observed: FloatArray, mean: FloatArray, sd: FloatArray, noise: float, floor_s: float
) -> FloatArray:
    """Return the posterior mean of coefficients under an independent Normal prior and errors relative to the mean, shape (K,).

    The scale of a row is the prediction of the round before, at first the observation's.

    Parameters
    ----------
    design : ndarray, shape (n, K)
    observed : ndarray, shape (n,)
        Seconds.
    mean, sd : ndarray, shape (K,)
    noise : float
        Relative sd of a row.
    floor_s : float
        Least scale of a row.
    """
    scale = np.maximum(observed, floor_s)
    found = mean
    for _ in range(4):
        rows = design / (noise * scale)[:, None]
        left = (observed - design @ mean) / (noise * scale)
        precision = np.diag(sd**-2.0) + rows.T @ rows
        found = mean + np.linalg.solve(precision, rows.T @ left)
        scale = np.maximum(design @ found, floor_s)
    return np.asarray(found)


def full_fit(frame: pd.DataFrame, configuration: ServingConfiguration, features: FeatureSet) -> FloatArray:
    """Return the coefficients that all noise-free rows give, shape (K,)."""
    mean, sd = own_prior(features, configuration)
    design = features.design(frame, configuration)
    return relative_fit(design, observed_s(frame), mean, WIDE * sd, MISFIT, features.noise_floor(configuration))


@dataclass(frozen=True)
class Oracle:
    """Coefficients of every configuration of a store, and what they say of one that is left out.

    Attributes
    ----------
    features : FeatureSet
    models : tuple of str, length C
        Name of the LLM of each configuration.
    coefficients : ndarray, shape (C, K)
    config_rows : ndarray, shape (C, G)
        Config features in units of the constant's.
    """

    features: FeatureSet
    models: tuple[str, ...]
    coefficients: FloatArray
    config_rows: FloatArray

    def prior(self, configuration: ServingConfiguration) -> tuple[FloatArray, FloatArray]:
        """Return mean and sd of a configuration's coefficients from those of other models, shapes (K,)."""
        other = np.array([m != configuration.llm.name for m in self.models])
        theta = self.coefficients[other].copy()
        constant = len(self.features.base)
        regressors = np.column_stack([np.ones(other.sum()), self.config_rows[other]])
        effects, *_ = np.linalg.lstsq(regressors, theta[:, constant], rcond=None)
        theta[:, constant] -= regressors @ effects
        mean = np.median(theta, axis=0)
        sd = 1.4826 * np.median(np.abs(theta - mean), axis=0)
        sd[constant] = theta[:, constant].std()
        mean[constant] += float(np.r_[1.0, config_to_constant(self.features, configuration)] @ effects)
        return mean, np.maximum(sd, 1e-4)

    def predict_s(
        self, train: pd.DataFrame | None, test: pd.DataFrame, configuration: ServingConfiguration, widened: float = 1.0
    ) -> FloatArray:
        """Return the step times predicted after calibration on noisy rows, or on none, shape (n,); prior sds times `widened`."""
        mean, sd = self.prior(configuration)
        if train is not None:
            design, observed = self.features.design(train, configuration), train["step_time_s"].to_numpy()
            mean = relative_fit(design, observed, mean, widened * sd, NOISE, self.features.noise_floor(configuration))
        return np.asarray(self.features.design(test, configuration) @ mean)


@cache
def oracle(store: str, name: str = "roofline") -> Oracle:
    """Fit every configuration of a store of composed steps, once per process."""
    opened, features = TraceStore(store), feature_set(name)
    configurations = [opened.configuration(c) for c in opened.config_ids]
    theta = [full_fit(drop_warmup(opened.steps(c.config_id).frame), c, features) for c in configurations]
    rows = [config_to_constant(features, c) for c in configurations]
    return Oracle(features, tuple(c.llm.name for c in configurations), np.array(theta), np.array(rows))
