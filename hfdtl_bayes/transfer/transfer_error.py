"""How well transfer will do for a configuration yet to come, from how well it did for those left out.

Errors are compared on the log scale: configurations differ by factors, and a MAPE is positive. With J left-out configurations of log
MAPE x_j ~ Normal(mu, s^2), mu flat and s^2 scaled inverse chi-squared, worth nu_0 configurations at s_0,

    nu = nu_0 + J - 1       S^2 = (nu_0 s_0^2 + sum (x_j - mean)^2) / nu
    mu ~ mean + S / sqrt(J) t_nu          x_new ~ mean + S sqrt(1 + 1 / J) t_nu

(Gelman et al., Bayesian Data Analysis, 3rd ed., section 3.3); nu_0 = 0 gives the classical t intervals. The belief is there because two
or three configurations say next to nothing of s: t with one or two degrees of freedom reaches from a per mille to a thousand per
cent. It is about the error that transfer adds, s_0 = spread * (1 - attainable^2 / MAPE^2) by the delta method (a quarter of the spread
at least): where noise alone is left, configurations differ little.

What no such interval knows: the folds share donors, so their errors are not independent, and no estimate of that dependence is
unbiased (Bengio & Grandvalet 2004, JMLR 5); each fold has fewer donors than there will be, which errs on the careful side; and a
configuration unlike all of them is not exchangeable with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

_SMALLEST_MAPE = 1e-6
_LEAST_SHARE = 0.25


@dataclass(frozen=True)
class TransferError:
    """The expected transfer error for a new configuration, MAPE as fractions; intervals are NaN for a single configuration.

    Attributes
    ----------
    rows : int
        Calibration rows of the new configuration.
    configurations : int
        Left-out configurations that it rests on.
    typical : float
        Their geometric mean.
    low, high : float
        95 % interval of the geometric mean over configurations like these.
    new_low, new_high : float
        95 % interval of the MAPE of one new configuration.
    worst : float
        The largest found.
    worst_config : str
    attainable : float
        What noise alone leaves: geometric mean of the attainable MAPE.
    """

    rows: int
    configurations: int
    typical: float
    low: float
    high: float
    new_low: float
    new_high: float
    worst: float
    worst_config: str
    attainable: float

    def __str__(self) -> str:
        """Return one sentence for a person."""
        after = f"after {self.rows} rows" if self.rows else "zero-shot"
        if self.configurations < 2:
            return (
                f"{after}: MAPE {self.typical:.1%} for {self.worst_config}, the only one left out (attainable {self.attainable:.1%}); "
                "one configuration says nothing of how others differ, so there is no interval"
            )
        return (
            f"{after}: MAPE of a new configuration {self.typical:.1%} (95 % interval {self.new_low:.1%} to {self.new_high:.1%}; typical one "
            f"{self.low:.1%} to {self.high:.1%}; attainable {self.attainable:.1%}) from {self.configurations} left-out configurations, "
            f"worst {self.worst_config} {self.worst:.1%}"
        )


def transfer_error(
    mape: dict[str, float], attainable: NDArray[np.float64], rows: int, *, spread: float, worth: float
) -> TransferError:
    """Return the expected transfer error.

    Parameters
    ----------
    mape : dict
        By left-out configuration, as fractions; at least one.
    attainable : ndarray
        Attainable MAPE of each.
    rows : int
    spread, worth : float
        Sd between configurations of the log of the error that transfer adds, and nu_0, how many configurations that belief is worth.
    """
    count = len(mape)
    logs = np.log(np.maximum(list(mape.values()), _SMALLEST_MAPE))
    middle = float(logs.mean())
    level = float(np.exp(np.log(np.maximum(attainable, _SMALLEST_MAPE)).mean()))
    low, high, new_low, new_high = np.full(4, np.nan)
    if count > 1:
        believed = spread * max(_LEAST_SHARE, 1.0 - (level / np.exp(middle)) ** 2)
        degrees = worth + count - 1
        sd = np.sqrt((worth * believed**2 + ((logs - middle) ** 2).sum()) / degrees)
        reach = sd * student_t.ppf(0.975, degrees)
        of_mean, of_new = reach / np.sqrt(count), reach * np.sqrt(1 + 1 / count)
        low, high, new_low, new_high = np.exp(middle + np.array([-of_mean, of_mean, -of_new, of_new]))
    worst = max(mape, key=lambda c: mape[c])
    return TransferError(
        rows, count, float(np.exp(middle)), float(low), float(high), float(new_low), float(new_high), mape[worst], worst, level
    )
