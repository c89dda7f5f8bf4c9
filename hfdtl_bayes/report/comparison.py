"""A calibrated target beside what it is measured against: the donors alone, the design's ridge recipe, the target alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import FeatureSet, response
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.traces import time_blocks
from hfdtl_bayes.transfer import HeldOut, RidgeRecipe, evaluate, scratch_coefficients
from hfdtl_bayes.transfer.evaluation import percentage_errors, scored_rows

CALIBRATED, ZERO_SHOT, RIDGE, SCRATCH = "calibrated", "zero-shot", "ridge recipe", "scratch"
METHODS: dict[str, str] = {
    CALIBRATED: "donors' posterior updated with the target's calibration rows",
    ZERO_SHOT: "donors alone, the target never seen",
    RIDGE: "the design's two-stage ridge on the same donors and rows",
    SCRATCH: "the target's calibration rows alone, no donors",
}
"""What is compared, in the order of tables and figures, with a line on each."""

ALL = "all held out"
"""Name of the column over all held-out rows."""


@dataclass(frozen=True)
class Comparison:
    """Held-out errors of every method.

    Attributes
    ----------
    mape : DataFrame
        Methods x (regimes in time order, then `ALL`): mean absolute percentage error as a fraction.
    rows : Series
        Held-out rows of each of these columns.
    calibrated, zero_shot : HeldOut
        The two methods that have intervals, with their coverage.
    """

    mape: pd.DataFrame
    rows: pd.Series
    calibrated: HeldOut
    zero_shot: HeldOut

    @property
    def best(self) -> str:
        """Method of the smallest error over all held-out rows."""
        return str(self.mape[ALL].idxmin())

    def sentence(self) -> str:
        """Say in one sentence how the calibrated target compares, whichever way it came out."""
        own = float(self.mape[ALL][CALIBRATED])
        others = self.mape[ALL].drop(CALIBRATED).sort_values()
        listed = ", ".join(f"{name} {value:.1%}" for name, value in others.items())
        if own <= others.min():
            return f"Calibrated {own:.1%} is the smallest held-out error; {listed}."
        return f"Calibrated {own:.1%} is NOT the smallest held-out error; {listed}."

    def table(self) -> pd.DataFrame:
        """Return a row per regime and one over all: rows, attainable, MAPE per method, bias and coverage of the calibrated."""
        held = self.calibrated
        overall = {"bias": held.bias, "coverage": held.coverage, "block_coverage": held.block_coverage}
        judged = held.by_regime[list(overall)]
        judged = pd.concat([judged, pd.DataFrame(overall, index=pd.Index([ALL]))])
        out = pd.DataFrame({"rows": self.rows, "attainable": held.attainable_mape})
        return out.join(self.mape.T).join(judged).rename_axis("regime")


def mape_by_regime(
    frame: pd.DataFrame, predicted_s: NDArray[np.float64], features: FeatureSet, configuration: ServingConfiguration
) -> pd.Series:
    """Return the MAPE of predictions per regime, in order of appearance, then over all rows.

    As in `evaluate`: delays are scored over rows that waited longer than the feature set's floor only.
    """
    observed = response(frame, features.quantity)
    scored = scored_rows(observed, features, configuration)
    errors = pd.Series(percentage_errors(observed[scored], np.asarray(predicted_s)[scored]))
    regimes = frame["regime"].to_numpy()[scored]
    return pd.concat([errors.groupby(regimes, sort=False).mean(), pd.Series({ALL: errors.mean()})])


def compare(
    calibrated: LatencyPosterior,
    zero_shot: LatencyPosterior,
    ridge: RidgeRecipe,
    calibration: pd.DataFrame,
    held_out: pd.DataFrame,
    configuration: ServingConfiguration,
    *,
    block_length: int = DEFAULT_BLOCK_LENGTH,
    seed: int = 0,
) -> Comparison:
    """Score every method on the same held-out rows.

    Parameters
    ----------
    calibrated : LatencyPosterior
        Of donors and target.
    zero_shot : LatencyPosterior
        Of the donors alone.
    ridge : RidgeRecipe
        Calibrated on the same rows.
    calibration, held_out : DataFrame
        Rows of the target, in time order.
    configuration : ServingConfiguration
        The target's.
    block_length : int
    seed : int

    Raises
    ------
    InputError
        If there are no rows to judge.
    """
    features = calibrated.feature_set
    own = evaluate(calibrated, held_out, configuration, block_length=block_length, seed=seed)
    donors = evaluate(zero_shot, held_out, configuration, block_length=block_length, seed=seed)
    alone = scratch_coefficients(calibration, configuration, features)
    predicted = {
        CALIBRATED: calibrated.expected_s(held_out, configuration, seed),
        ZERO_SHOT: zero_shot.expected_s(held_out, configuration, seed),
        RIDGE: ridge.predict_s(held_out, configuration),
        SCRATCH: features.design(held_out, configuration) @ alone,
    }
    scores = {name: mape_by_regime(held_out, values, features, configuration) for name, values in predicted.items()}
    mape = pd.DataFrame(scores).T
    counts = held_out["regime"].value_counts()
    rows = pd.Series({c: len(held_out) if c == ALL else int(counts[c]) for c in mape.columns}, dtype=int)
    return Comparison(mape, rows, own, donors)


def block_means(
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    *posteriors: LatencyPosterior,
    block_length: int = DEFAULT_BLOCK_LENGTH,
    seed: int = 0,
) -> tuple[pd.DataFrame, ...]:
    """Return measured block means in time order, and each posterior's prediction of them.

    Returns
    -------
    measured : DataFrame
        `regime`, `rows`, `observed_s` per time block.
    *predictions : DataFrame
        As `LatencyPosterior.predict_block_means`, one per posterior.
    """
    blocks = time_blocks(frame, block_length)
    if frame.empty:
        measured = pd.DataFrame(
            {"regime": pd.Series(dtype=object), "rows": pd.Series(dtype=int), "observed_s": pd.Series(dtype=float)}
        )
        return (measured, *(measured for _ in posteriors))
    quantity = posteriors[0].feature_set.quantity if posteriors else "step_time"
    table = pd.DataFrame({"regime": frame["regime"].to_numpy(), "observed_s": response(frame, quantity)})
    measured = table.groupby(blocks).agg(
        regime=("regime", "first"), rows=("observed_s", "size"), observed_s=("observed_s", "mean")
    )
    predicted = (p.predict_block_means(frame, configuration, blocks, seed=seed) for p in posteriors)
    return (measured, *predicted)
