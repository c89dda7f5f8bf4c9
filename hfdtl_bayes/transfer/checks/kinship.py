"""Whether the target looks like a member of the donors' population: prior-data conflict, direction by direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfdtl_bayes.transfer.checks.check import Check, Status
from hfdtl_bayes.transfer.checks.evidence import Evidence
from hfdtl_bayes.transfer.conflict import population_conflict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "kinship with the donors"


@dataclass(frozen=True)
class KinshipSettings:
    """When a target is called unlike the donors."""

    level: float = 0.001
    """Probability of so unusual a member of the population below which the target is called unlike the donors: it is asked of every
    target, so one in a thousand that are members is called so."""
    warn_level: float = 0.05
    """Below this it is worth a look."""


def check_kinship(evidence: Evidence, settings: KinshipSettings | None = None) -> Check:
    """Compare the target's statistics with what the donors alone predict for them: see `transfer.conflict`."""
    settings = settings or KinshipSettings()
    posterior = evidence.posterior
    if posterior.target != evidence.configuration.config_id or not posterior.donors:
        return Check(NAME, Status.CANNOT_SAY, "there are no donors to compare with, or the configuration is one of them")
    conflict = population_conflict(posterior, level=settings.level)
    table = conflict.by_direction
    message = (
        f"a member of the donors' population would look as unusual with probability {conflict.p_value:.2g}; "
        f"{conflict.coefficient} stands out most, by {conflict.z:.1f} sds"
    )
    status = Status.FAIL if conflict.p_value < settings.level else Status.PASS
    if status is Status.PASS and conflict.p_value < settings.warn_level:
        status = Status.WARN
    advice = "" if status is Status.PASS else "These donors would predict this configuration badly without its own rows."
    if status is Status.FAIL:
        advice += " Trace it richly and make it a donor itself."

    def draw(axes: Axes) -> None:
        axes.barh(np.arange(len(table))[::-1], table["z"], color="#2a6ebb")
        axes.set_yticks(np.arange(len(table))[::-1], [str(d)[:60] for d in table["direction"]], fontsize=7)
        axes.set_xlabel("distance from the donors' prediction, sds of prediction and data together")

    return Check(NAME, status, message, advice, table, draw if len(table) else None)
