"""A target that is one of its donors under another name: nothing it shows would be evidence of transfer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.statistics import ConfigStatistics
from hfdtl_bayes.transfer.checks.check import Check, Status
from hfdtl_bayes.transfer.checks.evidence import Evidence

NAME = "the target is not a donor"


@dataclass(frozen=True)
class IdentitySettings:
    """When statistics are the same."""

    tolerance: float = 1e-9
    """Relative difference of sums over rows: what their order leaves of rounding."""


def check_identity(evidence: Evidence, settings: IdentitySettings | None = None) -> Check:
    """Look for a donor that has the target's configuration under another name.

    Raises
    ------
    InputError
        If a donor has the target's rows as well: they count twice, and the posterior is wrong.
    """
    settings = settings or IdentitySettings()
    posterior, own = evidence.posterior, evidence.own
    target = evidence.configuration
    rows = []
    for s in posterior.statistics:
        if s.config_id == own.config_id:
            continue
        if _same_rows(s, own, settings.tolerance):
            raise InputError(
                f"the rows of {own.config_id!r} are those of {s.config_id!r}, under another name: they count twice, and no verdict on "
                "this posterior would mean anything. Fit the donors without them, or judge on another recording"
            )
        same = s.configuration.model_copy(update={"config_id": own.config_id}) == target
        rows.append((s.config_id, same))
    table = pd.DataFrame(rows, columns=["donor", "same_configuration"])
    twins = [d for d, same in rows if same]
    if twins:
        message = f"{own.config_id!r} is the configuration of the donor {', '.join(twins)} under another name"
        advice = (
            f"Transfer to a configuration that is itself a donor cannot be judged. Predict it as {twins[0]!r}, or add the new rows to "
            "that donor's; for a verdict fit the donors without it."
        )
        return Check(NAME, Status.CANNOT_SAY, message, advice, table)
    return Check(NAME, Status.PASS, f"its configuration differs from all {len(rows)} others fitted", "", table)


def _same_rows(one: ConfigStatistics, other: ConfigStatistics, tolerance: float) -> bool:
    if one.rows != other.rows:
        return False
    return bool(np.isclose(one.total_s, other.total_s, rtol=tolerance) and one.blocks == other.blocks)
