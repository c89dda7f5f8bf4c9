"""Whether the draws may be used at all."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from hfdtl_bayes.model import ConvergenceSettings
from hfdtl_bayes.transfer.checks.check import Check, Status
from hfdtl_bayes.transfer.checks.evidence import Evidence

NAME = "convergence"


@dataclass(frozen=True)
class ConvergenceCheckSettings:
    """Limits of the sampler's diagnostics; those of `ConvergenceSettings` by default, with their reasons."""

    limits: ConvergenceSettings = field(default_factory=ConvergenceSettings)


def check_convergence(evidence: Evidence, settings: ConvergenceCheckSettings | None = None) -> Check:
    """Judge the sampler. Nothing else counts where this fails."""
    limits = (settings or ConvergenceCheckSettings()).limits
    found = evidence.posterior.convergence(limits)
    rows = [
        ("worst R-hat", found.rhat, limits.max_rhat, "at most"),
        ("worst bulk ESS", found.ess_bulk, limits.min_ess, "at least"),
        ("worst tail ESS", found.ess_tail, limits.min_ess, "at least"),
        ("share of divergent draws", found.divergences / max(found.draws, 1), limits.max_divergent_share, "at most"),
    ]
    if found.reweighting is not None:
        rows.append(("Pareto k of the weights", found.reweighting.pareto_k, limits.max_pareto_k, "at most"))
    table = pd.DataFrame(rows, columns=["diagnostic", "found", "limit", "accepted"])
    how = "--engine exact" if evidence.posterior.engine == "conditional" else "--draws 4000 --target-accept 0.99"
    advice = "" if found.passed else f"Nothing may be concluded from these draws: calibrate again, for example with {how}."
    return Check(NAME, Status.PASS if found.passed else Status.FAIL, str(found), advice, table)
