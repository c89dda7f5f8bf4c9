"""Whether the target's noise and drift are like the donors'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hfdtl_bayes.transfer.checks.check import Check, Status
from hfdtl_bayes.transfer.checks.evidence import Evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "noise like the donors'"


@dataclass(frozen=True)
class ErrorSettings:
    """How noisy a target may be before it is said."""

    quantile: float = 0.975
    """Of the relative error sd of a new configuration like the donors: above it stands one member in forty."""


def check_errors(evidence: Evidence, settings: ErrorSettings | None = None) -> Check:
    """Compare the target's noise and drift with those of a new configuration drawn from the donors' population.

    A fit that misses its own rows takes the misfit for noise, so this is where a missing feature first shows. It refuses nothing by
    itself: a noisy machine may still be predicted well on average.
    """
    settings = settings or ErrorSettings()
    posterior, configuration = evidence.posterior, evidence.configuration
    draws = posterior.draws(configuration)
    noise, drift = posterior.new_errors(np.random.default_rng([posterior.seed, 4]))
    own = {"noise": draws.sigma, "drift": draws.omega, "together": np.hypot(draws.sigma, draws.omega)}
    new = {"noise": noise, "drift": drift, "together": np.hypot(noise, drift)}
    table = pd.DataFrame(
        {
            "error": list(own),
            "target_sd": [float(np.median(v)) for v in own.values()],
            "new_like_donors_sd": [float(np.median(v)) for v in new.values()],
            "limit": [float(np.quantile(v, settings.quantile)) for v in new.values()],
        }
    )
    for donor in posterior.donors:
        known = posterior.draws(posterior.configuration(donor))
        parts = (known.sigma, known.omega, np.hypot(known.sigma, known.omega))
        table[f"sd of {donor}"] = [float(np.median(v)) for v in parts]
    above = [str(e) for e in table.loc[table["target_sd"] > table["limit"], "error"] if e != "together"]
    found, limit = float(table["target_sd"].iloc[-1]), float(table["limit"].iloc[-1])
    message = f"relative error sd {found:.1%}; {settings.quantile:.1%} of configurations like these lie below {limit:.1%}"
    message += f"; unusual: {', '.join(above)}" if above else ""
    unlike = found > limit
    advice = "Look for what the features miss, or for other work on the machine." if unlike else ""
    status = Status.FAIL if unlike else Status.WARN if above else Status.PASS

    def draw(axes: Axes) -> None:
        for name, colour in (("noise", "#2a6ebb"), ("drift", "#d1610a")):
            axes.hist(new[name], bins=40, density=True, histtype="step", color=colour, label=f"{name}, like the donors")
            axes.axvline(float(np.median(own[name])), color=colour, label=f"{name} of the target")
        axes.set_xlabel("relative sd")
        axes.legend(fontsize=8)

    return Check(NAME, status, message, advice, table, draw)
