"""Is the calibrated model still right? A test of live traffic that may be looked at after every block, for ever.

The null hypothesis: given everything before, the relative error of a time block's mean is symmetric around a value within the
tolerance, |mu| <= delta. Nothing is assumed of its size: noise, drift and tails may be larger than the model says. With e the error of
a block's mean and v its announced sd, the bet of a block is bounded,

    g+ = 2 Phi((e - delta) / v) - 1,    g- = 2 Phi((-e - delta) / v) - 1,

whose expectation is at most 0 under the null, as Phi(x / v) - 1/2 is odd and increasing. So a capital that grows by the factor
1 + lambda g each block, 0 < lambda < 1, is a supermartingale, and an average of such capitals, over lambda, over both signs and over
the block from which one begins to bet, is an e-process: by Ville's inequality it ever exceeds 1 / alpha with a probability of at most
alpha, whenever and however often one looks, and stops (Ramdas, Gruenwald, Vovk & Shafer 2023, doi:10.1214/23-STS894; Waudby-Smith &
Ramdas 2024, doi:10.1093/jrsssb/qkad009, for betting on bounded variables). Those that begin to bet later, with the weights
1 / (k (k + 1)), have lost nothing while all was well, so a shift after a month is found about as soon as one after an hour.

What it does not promise: blocks whose errors are correlated beyond the tolerance (a machine slow for minutes) are a shift, as long as it
lasts; a change of spread alone goes unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.transfer.checks.coverage import block_errors
from hfdtl_bayes.transfer.checks.evidence import make_evidence
from hfdtl_bayes.transfer.evaluation import fitted_block_length

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class SequentialSettings:
    """What is tested, and how it is bet on."""

    alpha: float = 0.01
    """Probability of ever raising an alarm where there is none to raise."""
    tolerance: float = 0.05
    """Mean relative error of blocks that nobody minds: half the limit of the verdict."""
    bets: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.95)
    """Shares of the capital staked on each block, in equal parts: small ones find small shifts, large ones large shifts soon."""

    def __post_init__(self) -> None:
        """Refuse settings under which nothing would be guaranteed.

        Raises
        ------
        InputError
            Names the setting and what is accepted.
        """
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha must lie between 0 and 1, found {self.alpha}")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance must be at least 0 and below 1, found {self.tolerance}")
        if not self.bets or not all(0 < b < 1 for b in self.bets):
            raise InputError(f"bets must be shares between 0 and 1, found {self.bets}")


class EProcess:
    """Evidence against block means within the tolerance, updated block by block.

    Parameters
    ----------
    settings : SequentialSettings, optional
    """

    def __init__(self, settings: SequentialSettings | None = None) -> None:
        self.settings = settings or SequentialSettings()
        self._lambda = np.asarray(self.settings.bets)
        self._capital = np.zeros((2, len(self._lambda)))
        self.blocks = 0
        self.largest = 1.0
        self.alarm_at: int | None = None

    @property
    def value(self) -> float:
        """The e-value now: capital of all bets, what has not begun to bet included; 1 at the start."""
        return float(self._capital.mean()) + 1.0 / (self.blocks + 1)

    @property
    def alarm(self) -> bool:
        """Whether the e-value has ever reached 1 / alpha."""
        return self.alarm_at is not None

    @property
    def direction(self) -> str:
        """Which way the evidence points: "slower" or "faster" than predicted."""
        up, down = self._capital.mean(axis=1)
        return "slower" if up >= down else "faster"

    def update(self, error: float, sd: float) -> float:
        """Take one block.

        Parameters
        ----------
        error : float
            Relative error of its mean, observed less predicted.
        sd : float
            Its announced sd, fixed before the block was seen.

        Returns
        -------
        float
            The e-value.

        Raises
        ------
        InputError
            If the error is not finite or the sd not positive.
        """
        if not (np.isfinite(error) and np.isfinite(sd) and sd > 0):
            raise InputError(f"a block needs a finite error and a positive sd, found {error} and {sd}")
        k = self.blocks + 1
        started = self._capital + 1.0 / (k * (k + 1))
        bounded = 2 * norm.cdf((np.array([error, -error]) - self.settings.tolerance) / sd) - 1
        self._capital = started * (1.0 + bounded[:, None] * self._lambda)
        self.blocks = k
        found = self.value
        self.largest = max(self.largest, found)
        if self.alarm_at is None and found >= 1.0 / self.settings.alpha:
            self.alarm_at = k
        return found


class TrafficMonitor:
    """Watches live traffic of a calibrated target, chunk by chunk.

        monitor = TrafficMonitor(posterior, configuration)
        for chunk in traffic:                      # chunks of any size; blocks are closed as they fill
            if monitor.add(chunk).alarm:
                print(monitor)

    Parameters
    ----------
    posterior : LatencyPosterior
        It is not updated: what is tested is the model in use.
    configuration : ServingConfiguration
    settings : SequentialSettings, optional
    block_length : int, optional
        Steps per block; by default those the configuration was fitted with.
    """

    def __init__(
        self,
        posterior: LatencyPosterior,
        configuration: ServingConfiguration,
        settings: SequentialSettings | None = None,
        *,
        block_length: int | None = None,
    ) -> None:
        self.posterior, self.configuration = posterior, configuration
        self.block_length = block_length or fitted_block_length(posterior, configuration.config_id)
        self.process = EProcess(settings)
        self._open = pd.DataFrame()
        self._history: list[tuple[int, float, float, float]] = []

    @property
    def alarm(self) -> bool:
        """Whether there is evidence that the model does not predict this traffic."""
        return self.process.alarm

    @property
    def history(self) -> pd.DataFrame:
        """Per block: `rows`, relative `error` of its mean, its announced `sd`, the `e_value` after it."""
        return pd.DataFrame(self._history, columns=["rows", "error", "sd", "e_value"])

    def add(self, rows: pd.DataFrame) -> TrafficMonitor:
        """Take usable rows in time order; blocks of so many rows are judged as they fill. Returns itself.

        Raises
        ------
        InputError
            If columns are missing or not finite.
        """
        waiting = pd.concat([self._open, rows]) if len(self._open) else rows
        whole = len(waiting) - len(waiting) % self.block_length
        self._open = waiting.iloc[whole:]
        if whole:
            self._judge(waiting.iloc[:whole])
        return self

    def _judge(self, rows: pd.DataFrame) -> None:
        # Blocks are of rows as they come, whatever their step numbers and regimes: fixed before any time is seen.
        numbered = rows.drop(columns="step_id", errors="ignore").assign(regime="live")
        evidence = make_evidence(
            self.posterior,
            self.configuration,
            calibration=None,
            held_out=numbered,
            intended=None,
            scores=None,
            limit=1.0,
            block_length=self.block_length,
        )
        assert evidence.held_out is not None
        error, variance, z = block_errors(evidence, evidence.held_out)
        sd = np.sqrt(variance + ((z @ evidence.covariance) * z).sum(axis=1))
        for e, s, n in zip(error, sd, evidence.held_out.sizes, strict=True):
            self._history.append((int(n), float(e), float(s), self.process.update(float(e), float(s))))

    def __str__(self) -> str:
        """Return one line for a person."""
        p = self.process
        said = f"{p.blocks} blocks of {self.block_length} steps, e-value {p.value:.3g}, alarm at {1 / p.settings.alpha:g}"
        if p.alarm_at is None:
            return f"{said}: the model still predicts this traffic within {p.settings.tolerance:.0%}"
        return (
            f"{said}: ALARM since block {p.alarm_at}: the traffic is {p.direction} than predicted by more than "
            f"{p.settings.tolerance:.0%}. Calibrate again on rows of it"
        )
