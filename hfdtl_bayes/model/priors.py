"""Priors as one frozen settings object, elicited as ranges and printable as sentences."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import gammaincinv
from scipy.stats import beta

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import FeatureSet, PriorRange

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class PositiveRange:
    """The prior of a positive number, elicited as a range: 90 % of the mass lies between `low` and `high`, 5 % to each side.

    Typical errors and their spreads have the lognormal with that range, group sds the Gamma distribution with it: see
    `PriorSettings.deviation`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        """Refuse an empty or non-positive range.

        Raises
        ------
        InputError
            Unless 0 < low < high, both finite.
        """
        if not (0 < self.low < self.high and np.isfinite(self.high)):
            raise InputError(f"range ({self.low}, {self.high}): give two positive numbers, the lower one first")

    @property
    def _logarithms(self) -> PriorRange:
        return PriorRange(np.log(self.low), np.log(self.high))

    @cached_property
    def log_mean(self) -> float:
        """Mean of the logarithm."""
        return float(self._logarithms.mean)

    @cached_property
    def log_sd(self) -> float:
        """Standard deviation of the logarithm."""
        return float(self._logarithms.sd)

    @cached_property
    def gamma_shape(self) -> float:
        """Shape of the Gamma distribution with this range."""

        def excess(log_shape: float) -> float:
            low, high = gammaincinv(np.exp(log_shape), [0.05, 0.95])
            return float(np.log(high) - np.log(low) - np.log(self.high / self.low))

        # The logarithm of a Gamma variable has an sd of about 1 / sqrt(shape), and 1 / shape where that is small.
        near = 1.0 / self.log_sd
        return float(np.exp(brentq(excess, 2 * np.log(min(near, 0.3)) - 1, 2 * np.log(near + 1) + 1, xtol=1e-13)))

    @cached_property
    def gamma_rate(self) -> float:
        """Rate of the Gamma distribution with this range."""
        return float(gammaincinv(self.gamma_shape, 0.95) / self.high)

    @cached_property
    def gamma_median(self) -> float:
        """Median of the Gamma distribution with this range."""
        return float(gammaincinv(self.gamma_shape, 0.5) / self.gamma_rate)


@dataclass(frozen=True)
class PriorSettings:
    """What is believed before any data, beside each feature's own population prior.

    The group sds have Gamma priors that keep away from zero (Chung et al. 2013, doi:10.1007/s11336-013-9328-2). With two to five
    donors the data cannot say how unlike the next configuration will be, so the prior must: equal coefficients in three donors are
    no evidence that a fourth, on other hardware, has the same. A range away from zero states that, and keeps zero-shot intervals
    honest. Upwards the Gamma falls exponentially. A heavier tail lets one coefficient of one configuration take up what is amiss with
    other features: with a lognormal, and three donors of composed GPU steps, a coefficient 40 times the ideal with a group sd of 17 was
    as probable as a sensible one, and the posterior had two modes.
    """

    deviation: PositiveRange = PositiveRange(0.1, 0.6)
    """Sd of a configuration's own slope around the population's, relative to the slope: efficiencies of GPUs,
    kernels and models differ by some tens of per cent. The Gamma distribution with this range."""
    hardware_share: float = 2.0
    """Both parameters of the Beta prior of the share of that variance which configurations on the same hardware have in common:
    2 says neither all nor nothing, 90 % between 0.14 and 0.86, because two or three donors cannot tell."""
    discounts: tuple[tuple[str, float], ...] = ()
    """Pairs of a donor's config_id and a number a in (0, 1]: what its rows say of the population counts for a of a donor. For old
    versions of an engine, or composed recordings, that may be unlike what is asked about. Other donors count in full (a = 1), and a
    near 0 is the fit without the donor; its own coefficients stay as its rows have them. See `hfdtl_bayes.model.exact`."""
    noise: PositiveRange = PositiveRange(0.01, 0.5)
    """Relative sd of one row around its mean, typical over configurations: 3 % on a quiet GPU, 30 % on a shared CPU."""
    noise_spread: PositiveRange = PositiveRange(0.2, 1.0)
    """Sd between configurations of the logarithm of the noise."""
    drift: PositiveRange | None = PositiveRange(0.003, 0.3)
    """Relative sd of the machine's speed between time blocks, typical over configurations: 10-20 % on shared CPUs. None: no drift
    at all, every row's error is independent. True of simulated steps; on real engines it makes posteriors several times too narrow."""
    drift_spread: PositiveRange = PositiveRange(0.2, 1.0)
    """Sd between configurations of the logarithm of the drift."""

    def __post_init__(self) -> None:
        """Refuse a share that is no Beta parameter, and discounts that are none; sort the discounts.

        Raises
        ------
        InputError
            Unless `hardware_share` is positive and finite, and each discount of one donor and in (0, 1].
        """
        if not 0 < self.hardware_share < float("inf"):
            raise InputError(f"hardware_share must be a positive number, found {self.hardware_share}")
        for config_id, share in self.discounts:
            if not 0 < share <= 1:
                raise InputError(
                    f"discount of {config_id!r} must lie in (0, 1], found {share}: 1 counts it in full, 0.5 as half a donor; to leave it out "
                    "altogether, fit without it or forget it"
                )
        names = [config_id for config_id, _ in self.discounts]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise InputError(f"discount of {', '.join(map(repr, repeated))} is given twice; give one number for each donor")
        # A donor that counts in full is not discounted, so that equal beliefs compare equal.
        kept = tuple(sorted((str(c), float(share)) for c, share in self.discounts if share != 1))
        object.__setattr__(self, "discounts", kept)

    def with_discounts(self, discounts: Mapping[str, float]) -> PriorSettings:
        """Return the same settings with these discounts in place of any others of the same donors."""
        return replace(self, discounts=tuple((dict(self.discounts) | dict(discounts)).items()))

    def discounts_of(self, config_ids: Collection[str]) -> PriorSettings:
        """Return the same settings with the discounts of some configurations only."""
        return replace(self, discounts=tuple(d for d in self.discounts if d[0] in config_ids))

    def counts(self, config_id: str) -> float:
        """Return for how much of a donor a configuration counts, in (0, 1]."""
        return dict(self.discounts).get(config_id, 1.0)

    def discount_sentences(self) -> tuple[str, ...]:
        """Return for how much each discounted donor counts as a sentence; none for donors that count in full."""
        return tuple(
            f"what the rows of {c} say of the population counts for {share:.3g} of a donor" for c, share in self.discounts
        )

    def sentences(self, feature_set: FeatureSet) -> tuple[str, ...]:
        """Return every prior as a sentence a planner can agree or disagree with."""

        def said(what: str, r: PositiveRange) -> str:
            return f"90 % of {what} lies between {r.low:.3g} and {r.high:.3g}"

        return (
            *feature_set.prior_sentences(),
            said("the sd of a configuration's own coefficient, relative to the coefficient's size,", self.deviation),
            said(
                "the share of that variance common to configurations on the same hardware",
                PositiveRange(*(float(beta(self.hardware_share, self.hardware_share).ppf(q)) for q in (0.05, 0.95))),
            ),
            "; ".join(self.discount_sentences()) or "what every donor's rows say of the population counts in full",
            said("the typical relative noise of one row", self.noise),
            said("the spread of log noise between configurations", self.noise_spread),
            *(
                ("there is no drift: the error of every row is independent of all others",)
                if self.drift is None
                else (
                    said("the typical relative drift between time blocks", self.drift),
                    said("the spread of log drift between configurations", self.drift_spread),
                )
            ),
        )


def population_mean(feature_set: FeatureSet) -> FloatArray:
    """Return the prior means of beta, gamma and delta, concatenated, shape (B + G + D,), in reference units."""
    ordered = feature_set.base + feature_set.config + feature_set.residual
    return np.array([f.prior.mean for f in ordered])


def population_sd(feature_set: FeatureSet) -> FloatArray:
    """Return the prior sds of beta, gamma and delta, concatenated, shape (B + G + D,), in reference units."""
    ordered = feature_set.base + feature_set.config + feature_set.residual
    return np.array([f.prior.sd for f in ordered])


def deviation_scale(feature_set: FeatureSet) -> FloatArray:
    """Return the size of each pooled coefficient that deviations are relative to, shape (K0,): the larger of prior mean and sd."""
    return np.array([max(abs(f.prior.mean), f.prior.sd) for f in feature_set.pooled])


def coefficient_scale(feature_set: FeatureSet) -> FloatArray:
    """Return the size of each coefficient, shape (K,): `deviation_scale`, and the sd of those of the discrepancy."""
    return np.concatenate([deviation_scale(feature_set), feature_set.discrepancy_sd])
