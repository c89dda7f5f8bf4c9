"""`select_rows`: which rows of a pool to label, or to keep, so that a target's predictions are good where they are needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design.acquisition import Acquisition
from hfdtl_bayes.design.belief import Belief, belief_of
from hfdtl_bayes.design.candidates import BIN_COLUMNS, Candidates, candidates_of, coverage_bins, misfit_columns, relative_design
from hfdtl_bayes.design.greedy import MEAN_ABSOLUTE, DeploymentMix, Rules, choose, mix_weights, unmet
from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import response
from hfdtl_bayes.files import atomic
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH

FloatArray = NDArray[np.float64]

_NOTHING = 1e-12
"""Share of the largest information below which a direction is one that no row has anything of: rounding."""

_WITH_GAIN = tuple(a for a in Acquisition if not a.baseline)


@dataclass(frozen=True)
class SelectionSettings:
    """How gains are computed and what is asked of the rows besides."""

    draws: int = 16
    """Draws of the scales that gains are averaged over. On seven GPU targets the rows that 16 choose leave a mix, in
    expectation over 500 other draws, within 0.5 % of the error that the rows of 256 leave; so do those of 8."""
    mix_rows: int = 128
    """Rows of the deployment mix that EPIG and the expected errors are computed for, evenly spaced; the variance removed is of all."""
    per_bin: int = 0
    """Rows wanted of each occupied bin of queue depth and KV usage, where it holds so many; 0 asks for none."""
    block_length: int = DEFAULT_BLOCK_LENGTH
    """Steps that share a drift of the machine's speed."""
    misfit: float = 0.02
    """Relative sd of what the features get wrong, a smooth bend over the size of a step that rows of one size share: measured alike again and
    again, they say no more of others. 0.02 is about what the roofline leaves on GPUs. 0 trusts the features: faster, as good
    for the median target at 50 rows, and up to 1.5 times the error of random rows on the worst where 0.02 has 1.3."""
    max_unreachable: float = 0.99
    """Share of the deployment mix's variance that may be of what no row of the pool has anything of; above it no choice helps."""

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises
        ------
        InputError
            Names the setting and what is accepted.
        """
        for name, least in (("draws", 1), ("mix_rows", 1), ("per_bin", 0), ("block_length", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if not 0 <= self.misfit < float("inf"):
            raise InputError(f"misfit must be a relative sd of 0 or more, found {self.misfit}")
        if not 0 < self.max_unreachable <= 1:
            raise InputError(f"max_unreachable must be a share above 0 and up to 1, found {self.max_unreachable}")


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows chosen, in the order they were, and what they are expected to bring.

    Expectations are the model's: what the features get wrong is in them as far as `SelectionSettings.misfit` says.

    Attributes
    ----------
    config_id : str
    acquisition : Acquisition
    index : ndarray, shape (P,)
        Row labels in the pool.
    key : str
        Column that identifies a row: step_id, or request_id for delays.
    ids : ndarray, shape (P,)
        Its values; row labels where the pool has no such column.
    gain : ndarray, shape (P,)
        What each pick was expected to bring when it was made, in `unit`.
    unit : str
        "nats", or "relative sd": the decrease of `expected_sd`.
    expected_sd : ndarray, shape (P + 1,)
        Root mean square relative sd of the expected value over the deployment mix, before any pick and after each.
    expected_mape : ndarray, shape (P + 1,)
        Mean absolute relative error expected of the mix's expected values, E|error| = sqrt(2 / pi) sd.
    expected_median : ndarray, shape (P + 1,)
        The median over the mix of the same.
    cost_s : ndarray, shape (P,)
        Seconds of GPU time of each.
    pool_sd : float
        `expected_sd` were every row of the pool measured: nothing chosen from it can do better.
    unreachable : float
        Share of the mix's variance that no row of the pool can reduce, however often it were measured.
    """

    config_id: str
    acquisition: Acquisition
    index: NDArray[np.object_]
    key: str
    ids: NDArray[np.object_]
    gain: FloatArray
    unit: str
    expected_sd: FloatArray
    expected_mape: FloatArray
    expected_median: FloatArray
    cost_s: FloatArray
    pool_sd: float
    unreachable: float

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    def rows(self, pool: pd.DataFrame) -> pd.DataFrame:
        """Return the rows chosen, in the pool's order, which is that of time."""
        return pool[pool.index.isin(self.index)]

    def to_frame(self) -> pd.DataFrame:
        """Return a row per pick: `pick` from 1, the identifier, `gain`, the expected errors after it, `cost_s` and its running sum."""
        return pd.DataFrame(
            {
                "pick": np.arange(1, len(self) + 1),
                self.key: self.ids,
                "gain": self.gain,
                "expected_sd": self.expected_sd[1:],
                "expected_mape": self.expected_mape[1:],
                "expected_median": self.expected_median[1:],
                "cost_s": self.cost_s,
                "total_cost_s": np.cumsum(self.cost_s),
            }
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_frame` as CSV, whole or not at all, for `calibrate --rows`; returns its path."""
        path = Path(path)
        with atomic(path) as part:
            self.to_frame().to_csv(part, index=False)
        return path

    def __str__(self) -> str:
        """Return one sentence for a person."""
        return (
            f"{len(self)} rows of {self.config_id} chosen by {self.acquisition}, {self.cost_s.sum():.3g} s of GPU time: expected error "
            f"of the deployment mix {self.expected_mape[0]:.2%} before, {self.expected_mape[-1]:.2%} after (noise not counted); "
            f"sd {self.expected_sd[-1]:.2%}, {self.pool_sd:.2%} were all rows measured"
        )


def acquisition_named(name: str | Acquisition) -> Acquisition:
    """Return the acquisition of a name.

    Raises
    ------
    UnknownNameError
        Lists those there are.
    """
    try:
        return Acquisition(name)
    except ValueError:
        raise UnknownNameError(f"unknown acquisition {name!r}; known are {', '.join(Acquisition)}") from None


def select_rows(
    posterior: LatencyPosterior,
    pool: pd.DataFrame,
    configuration: ServingConfiguration,
    budget: int | None = None,
    *,
    acquisition: str | Acquisition = Acquisition.DEPLOYMENT,
    deployment: pd.DataFrame | None = None,
    weights: Sequence[float] | FloatArray | None = None,
    budget_s: float | None = None,
    cost: str | None = None,
    per_second: bool = False,
    lazy: bool = True,
    settings: SelectionSettings | None = None,
    seed: int = 0,
) -> Selection:
    """Choose rows of a pool to calibrate a target on; no label is read, but by the residual rule.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of donors, or with the target calibrated on some rows already: those of them that are in the pool are not chosen again.
    pool : DataFrame
        Usable rows (`usable_rows`) in time order: the columns the feature set reads, `regime`, and `step_id` if known.
    configuration : ServingConfiguration
        The target's.
    budget : int, optional
        Most rows; needed unless `budget_s` is given.
    acquisition : Acquisition or str
    deployment : DataFrame, optional
        Steps of the traffic whose predictions matter, times not needed; the pool itself by default.
    weights : array, shape (J,), optional
        Weight of each row of `deployment`; equal by default.
    budget_s : float, optional
        Most seconds of GPU time.
    cost : str, optional
        Column of the pool with the seconds that a row costs; its expected time by default.
    per_second : bool
        Choose by gain per second of cost.
    lazy : bool
        Skip rows that cannot be the best; the same picks, sooner.
    settings : SelectionSettings, optional
    seed : int
        For the random rules, and noise and drift of a configuration never seen.

    Returns
    -------
    Selection

    Raises
    ------
    InputError
        If the pool or mix is empty or holds what the features do not describe, a row stands twice in the pool, the budget is below one row or
        cannot meet the coverage asked for, the pool says nothing of the mix, or the residual rule has no labels or no calibrated target.
    UnknownNameError
        If there is no such acquisition or column.
    """
    settings = settings or SelectionSettings()
    rule = acquisition_named(acquisition)
    _check_budget(budget, budget_s, per_second=per_second, rule=rule, settings=settings)
    key = _key(posterior)
    wanted = pool if deployment is None else deployment
    belief, candidates, mix_design = believed(posterior, pool, configuration, wanted, cost=cost, settings=settings, seed=seed)
    mix = DeploymentMix.of(mix_design, mix_weights(weights, len(wanted)), settings.mix_rows)
    pool_sd, unreachable = _reach(belief, candidates, mix, settings)
    rules = _rules(candidates, pool, rule, budget, budget_s, settings, per_second=per_second, lazy=lazy)
    residuals = _residuals(posterior, pool, configuration) if rule is Acquisition.RESIDUAL else None
    path = choose(belief, candidates, mix, rules, residuals=residuals, seed=seed)
    root = np.sqrt(path.mean_square)
    nats = rule in (Acquisition.INFORMATION, Acquisition.EPIG)
    return Selection(
        configuration.config_id,
        rule,
        pool.index.to_numpy()[path.rows],
        key,
        (pool[key] if key in pool.columns else pool.index.to_series()).to_numpy()[path.rows],
        path.gains if nats else -np.diff(root),
        "nats" if nats else "relative sd",
        root,
        MEAN_ABSOLUTE * path.sds @ mix.weights,
        MEAN_ABSOLUTE * np.median(path.sds, axis=1),
        candidates.cost_s[path.rows],
        pool_sd,
        unreachable,
    )


def believed(
    posterior: LatencyPosterior,
    pool: pd.DataFrame,
    configuration: ServingConfiguration,
    deployment: pd.DataFrame,
    *,
    cost: str | None = None,
    settings: SelectionSettings,
    seed: int = 0,
) -> tuple[Belief, Candidates, FloatArray]:
    """Return what is known before any pick, misfit included, the rows of the pool, and the designs of the mix's rows, shape (J, K).

    Features that have a discrepancy of their own need no misfit beside it: the posterior has it.

    Parameters and errors are those of `select_rows`.
    """
    belief = belief_of(posterior, configuration, draws=settings.draws, seed=seed)
    candidates = candidates_of(
        posterior, pool, configuration, belief.scale, block_length=settings.block_length, cost=cost, key=_key(posterior)
    )
    design, expected = relative_design(posterior, deployment, configuration, belief.scale, "the deployment mix")
    if settings.misfit > 0 and not posterior.feature_set.discrepancy:
        own = misfit_columns(pool, posterior.expected_s(pool, configuration))
        theirs = misfit_columns(deployment, expected)
        # Knots that no row is near would cost time and change nothing.
        used = own.any(axis=0) | theirs.any(axis=0)
        belief = belief.with_misfit(int(used.sum()), settings.misfit)
        candidates = replace(candidates, design=np.column_stack([candidates.design, own[:, used]]))
        design = np.column_stack([design, theirs[:, used]])
    return belief, candidates, design


def _key(posterior: LatencyPosterior) -> str:
    """Return the column that identifies a row."""
    return "step_id" if posterior.feature_set.quantity == "step_time" else "request_id"


def _check_budget(
    budget: int | None, budget_s: float | None, rule: Acquisition, settings: SelectionSettings, *, per_second: bool
) -> None:
    """Refuse budgets of nothing and wishes that contradict each other."""
    if budget is None and budget_s is None:
        raise InputError("no budget given; say how many rows may be chosen (budget) or how many seconds they may take (budget_s)")
    if budget is not None and budget < 1:
        raise InputError(f"a budget of {budget} row(s) chooses nothing; give at least 1")
    if budget_s is not None and not budget_s > 0:
        raise InputError(f"a budget of {budget_s} seconds chooses nothing; give a positive number of seconds")
    if per_second and rule.baseline:
        raise InputError(
            f"{rule} knows no gain that could be divided by seconds; choose by one of {', '.join(_WITH_GAIN)}, or leave it out"
        )
    if settings.per_bin and budget is None:
        raise InputError(
            "rows of each bin can be promised within a number of rows only; give budget beside budget_s, or per_bin 0"
        )


def _reach(belief: Belief, candidates: Candidates, mix: DeploymentMix, settings: SelectionSettings) -> tuple[float, float]:
    """Return the mix's sd were the whole pool measured, and the share of its variance that no measurement of the pool can reduce.

    Raises
    ------
    InputError
        If next to all of the variance is out of the pool's reach.
    """
    factor = belief.factor

    def left(whitened: FloatArray) -> float:
        return mix.mean_square(factor @ whitened @ np.swapaxes(factor, 1, 2))

    before = left(np.eye(factor.shape[1]))
    if not before > 0:
        raise InputError(
            f"nothing of the deployment mix of {belief.config_id!r} is uncertain, so there is nothing to choose rows for"
        )
    # Measured without end, rows leave only the directions that none of them has anything of.
    seen = np.swapaxes(factor, 1, 2) @ (candidates.design.T @ candidates.design) @ factor
    values, vectors = np.linalg.eigh(0.5 * (seen + np.swapaxes(seen, 1, 2)))
    unseen = vectors * (values <= _NOTHING * values.max(axis=1, keepdims=True))[:, None, :]
    unreachable = left(unseen @ np.swapaxes(unseen, 1, 2)) / before
    if unreachable > settings.max_unreachable:
        raise InputError(
            f"the deployment mix lies outside what the pool of {belief.config_id!r} can measure: {unreachable:.1%} of the variance of its "
            f"expected times is of what none of the {len(candidates.design)} rows has anything of, and at most "
            f"{settings.max_unreachable:.1%} may be (max_unreachable). Give a pool with traffic more like the mix"
        )
    return float(np.sqrt(left(belief.after(candidates.design, candidates.blocks)))), unreachable


def _rules(
    candidates: Candidates,
    pool: pd.DataFrame,
    rule: Acquisition,
    budget: int | None,
    budget_s: float | None,
    settings: SelectionSettings,
    *,
    per_second: bool,
    lazy: bool,
) -> Rules:
    """Return what is chosen within which limits, checked against the pool."""
    left = len(candidates.design) - len(candidates.taken)
    if budget is not None and budget > left:
        raise InputError(f"a budget of {budget} rows exceeds the {left} rows of the pool that can be chosen; give at most {left}")
    free = np.delete(candidates.cost_s, candidates.taken)
    if budget_s is not None and free.min() > budget_s:
        raise InputError(
            f"a budget of {budget_s:g} s is smaller than one step: the shortest row of the pool takes {free.min():.3g} s; give more"
        )
    if (settings.per_bin or rule is Acquisition.STRATIFIED) and coverage_bins(pool) is None:
        raise InputError(
            f"rows are stratified over {' and '.join(BIN_COLUMNS)}, and the pool has neither without gaps; add one, or "
            f"{'leave per_bin at 0' if settings.per_bin else 'choose at random'}"
        )
    needed = int(unmet(candidates, settings.per_bin).sum())
    if settings.per_bin and budget is not None and needed > budget:
        raise InputError(
            f"{settings.per_bin} row(s) of each of {len(np.unique(candidates.bins))} occupied bins of {' and '.join(BIN_COLUMNS)} are more "
            f"than the budget of {budget} rows; give a budget of {needed} or more, or fewer per bin"
        )
    return Rules(
        rule,
        left if budget is None else budget,
        float("inf") if budget_s is None else budget_s,
        per_second,
        settings.per_bin,
        lazy,
    )


def _residuals(posterior: LatencyPosterior, pool: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Return observed less expected values in seconds, shape (n,)."""
    if posterior.target != configuration.config_id:
        raise InputError(
            f"the residual rule needs a first fit of {configuration.config_id!r}, and this posterior is calibrated for "
            f"{posterior.target or 'no target'}; calibrate it on some rows first"
        )
    observed = response(pool, posterior.feature_set.quantity)
    if not np.isfinite(observed).all():
        raise InputError(
            f"the residual rule needs the measured value of every row, and {int((~np.isfinite(observed)).sum())} of {len(pool)} have none; "
            "only the other rules choose without labels"
        )
    return observed - posterior.expected_s(pool, configuration)
