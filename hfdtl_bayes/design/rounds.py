"""Selection in rounds: a batch is chosen, its labels come in, the posterior is conditioned on them, the next batch is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design.acquisition import Acquisition
from hfdtl_bayes.design.selection import Selection, SelectionSettings, acquisition_named, select_rows
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import response
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.transfer.calibration import calibrate_by_statistics


@dataclass(frozen=True, eq=False)
class Rounds:
    """What was chosen round by round, and what is known in the end.

    Attributes
    ----------
    selections : tuple of Selection
        Each with the expectations of the posterior of its round.
    rows : DataFrame
        All rows chosen with their labels, in the pool's order.
    posterior : LatencyPosterior
        Calibrated on them.
    """

    selections: tuple[Selection, ...]
    rows: pd.DataFrame
    posterior: LatencyPosterior


def select_in_rounds(
    donors: LatencyPosterior,
    pool: pd.DataFrame,
    configuration: ServingConfiguration,
    label: Callable[[pd.DataFrame], pd.DataFrame],
    budget: int,
    *,
    batch: int,
    acquisition: str | Acquisition = Acquisition.DEPLOYMENT,
    deployment: pd.DataFrame | None = None,
    cost: str | None = None,
    per_second: bool = False,
    engine: str = "auto",
    settings: SelectionSettings | None = None,
    seed: int = 0,
) -> Rounds:
    """Choose rows batch by batch, each with what the labels of the batches before have taught of coefficients, noise and drift.

    Coefficients alone would not change a choice, their variance does not depend on labels; noise, drift and group sds do.

    Parameters
    ----------
    donors : LatencyPosterior
        Without a target.
    pool : DataFrame
        As in `select_rows`, with whole numbers as row labels.
    configuration : ServingConfiguration
    label : callable
        Takes rows of the pool and returns them with what was measured of them, as `step_time_s`.
    budget : int
        Rows in all.
    batch : int
        Rows of a round; the last may have fewer.
    acquisition, deployment, cost, per_second, settings
        As in `select_rows`. By the residual rule the first batch is random, as there is no fit yet.
    engine : str
        As in `calibrate`.
    seed : int

    Raises
    ------
    InputError
        If a batch is below one row or above the budget, the donors already hold a target, labels are missing, and as in `select_rows`.
    """
    settings = settings or SelectionSettings()
    rule = acquisition_named(acquisition)
    if batch < 1:
        raise InputError(f"a batch of {batch} row(s) chooses nothing; give at least 1")
    if budget < batch:
        raise InputError(
            f"a budget of {budget} row(s) is smaller than one batch of {batch}; give a larger budget or a smaller batch"
        )
    if donors.target is not None:
        raise InputError(
            f"this posterior is calibrated for {donors.target!r}; rounds start from donors alone, so that no label counts twice"
        )
    posterior, rows, made = donors, pool.iloc[:0], list[Selection]()
    while len(rows) < budget:
        asked: dict[str, Any] = {"deployment": deployment, "cost": cost, "per_second": per_second, "settings": settings}
        first = rule is Acquisition.RESIDUAL and not made
        found = select_rows(
            posterior,
            pool,
            configuration,
            min(batch, budget - len(rows)),
            acquisition=Acquisition.RANDOM if first else rule,
            seed=seed + len(made),
            **asked,
        )
        labelled = label(found.rows(pool))
        if (
            not labelled.index.equals(found.rows(pool).index)
            or not np.isfinite(response(labelled, donors.feature_set.quantity)).all()
        ):
            raise InputError(
                f"label must return the {len(found)} rows it was given, in their order, each with a finite {donors.feature_set.quantity}"
            )
        rows = pd.concat([rows, labelled] if len(rows) else [labelled])
        # In the order of time, which blocks are made of.
        rows = rows.loc[pool.index[pool.index.isin(rows.index)]]
        posterior = calibrate_by_statistics(
            donors, rows, configuration, block_length=settings.block_length, engine=engine, seed=seed, show_progress=False
        )
        made.append(found)
    return Rounds(tuple(made), rows, posterior)
