"""What a feature and a feature set are: names, units, levels, formulas, and the prior of each coefficient.

A feature set is a specification only. It knows nothing of PyMC; the rooms above turn it into a design
matrix, sufficient statistics and a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features.sharing import constant, shared_columns

Quantity = Literal["step_time", "queue_delay", "api_delay"]
QUANTITIES: tuple[Quantity, ...] = ("step_time", "queue_delay", "api_delay")

FloatArray = NDArray[np.float64]
_Rows = Callable[[pd.DataFrame, ServingConfiguration], FloatArray]
_One = Callable[[ServingConfiguration], float]

# 5 % and 95 % points of a standard normal: a range that is to hold 90 % of the mass is this many sds wide.
_Z90 = 1.6448536269514722


class Level(StrEnum):
    """The level of the hierarchy at which a coefficient lives."""

    BASE = "base"
    """Shared slope with a partially pooled deviation per configuration."""

    CONFIG = "config"
    """Shared coefficient of a quantity that is constant within a configuration."""

    RESIDUAL = "residual"
    """Shared mean and per-configuration group effect; the first residual feature is the constant 1."""

    DISCREPANCY = "discrepancy"
    """Each configuration's own, around zero with an sd that is given: nothing is shared and nothing is learned for others. What the
    other features leave of a configuration's misfit, as a belief about the model and not about the machine (Kennedy & O'Hagan 2001,
    doi:10.1111/1467-9868.00294; Brynjarsdottir & O'Hagan 2014, doi:10.1088/0266-5611/30/11/114007)."""


@dataclass(frozen=True)
class PriorRange:
    """A prior elicited as a range: 90 % of the coefficient lies between `low` and `high`.

    Both bounds are in the unit of the coefficient divided by the feature's `reference`, so a range of (0, 2)
    on a feature whose reference is 1 ms reads "between 0 and 2 ms".
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        """Refuse an empty or non-finite range.

        Raises
        ------
        InputError
            If a bound is not finite or `low >= high`.
        """
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low < self.high):
            raise InputError(
                f"prior range ({self.low}, {self.high}) is not a range; give two finite numbers, the lower one first"
            )

    @property
    def mean(self) -> float:
        """Mean of the normal prior: the middle of the range."""
        return 0.5 * (self.low + self.high)

    @property
    def sd(self) -> float:
        """Standard deviation of the normal prior whose central 90 % is the range."""
        return (self.high - self.low) / (2 * _Z90)


@dataclass(frozen=True)
class Feature:
    """One column of the design: a name, a unit, a level, a formula, and what is believed of its coefficient.

    Parameters
    ----------
    name : str
        Unique within the feature set.
    level : Level
    unit : str
        Unit of the column. The coefficient is in seconds per that unit (dimensionless where the unit is "s").
    formula : str
        The formula in plain text, over trace columns and configuration fields.
    columns : tuple of str
        Trace columns the formula reads; empty for config features.
    compute : callable
        ``compute(frame, configuration) -> array (n,)``, and ``compute(None, configuration) -> float`` for config features.
    prior : PriorRange
        Prior of the population coefficient, in multiples of `reference`. Of a discrepancy feature that of each configuration's own
        coefficient, the same distance to both sides of zero.
    reference : float
        A physical size of the coefficient, in its own unit: the scale on which the prior, the group deviations
        and the numerics live. A constant, never computed from data.
    """

    name: str
    level: Level
    unit: str
    formula: str
    compute: Callable[[pd.DataFrame | None, ServingConfiguration], FloatArray | float]
    prior: PriorRange
    columns: tuple[str, ...] = ()
    reference: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a discrepancy that is believed to have a sign.

        Raises
        ------
        InputError
            If the range of a discrepancy feature is not symmetric around zero.
        """
        low, high = self.prior.low, self.prior.high
        if self.level is Level.DISCREPANCY and abs(low + high) > 1e-9 * (high - low):
            raise InputError(
                f"discrepancy feature {self.name!r} has the prior range ({low}, {high}); what a model leaves has mean zero in the next "
                f"configuration, so give the same distance to both sides, such as ({-max(abs(low), abs(high))}, "
                f"{max(abs(low), abs(high))}), or make it a residual feature, whose mean is learned"
            )

    @property
    def coefficient_unit(self) -> str:
        """Unit of the coefficient: seconds per unit of the column."""
        return "1" if self.unit == "s" else ("s" if self.unit == "1" else f"s/{self.unit}")

    def prior_sentence(self) -> str:
        """Return the prior as a sentence a planner can agree or disagree with."""
        low, high = self.prior.low * self.reference, self.prior.high * self.reference
        unit = "" if self.coefficient_unit == "1" else f" {self.coefficient_unit}"
        if self.level is Level.DISCREPANCY:
            return (
                f"90 % of configurations have a coefficient of {self.name} between {low:.3g} and {high:.3g}{unit}, each its own"
            )
        return f"90 % of the population coefficient of {self.name} lies between {low:.3g} and {high:.3g}{unit}"


def rows(formula: _Rows) -> Callable[[pd.DataFrame | None, ServingConfiguration], FloatArray]:
    """Adapt a formula over rows to the signature of `Feature.compute`."""

    def compute(frame: pd.DataFrame | None, configuration: ServingConfiguration) -> FloatArray:
        assert frame is not None
        return formula(frame, configuration)

    return compute


def one(formula: _One) -> Callable[[pd.DataFrame | None, ServingConfiguration], float]:
    """Adapt a formula over the configuration alone to the signature of `Feature.compute`."""
    return lambda _frame, configuration: formula(configuration)


def constant_column(size: _One) -> Callable[[pd.DataFrame | None, ServingConfiguration], FloatArray]:
    """Return a formula that is `size(configuration)` in every row; one number is held in memory."""
    return rows(lambda frame, configuration: constant(size(configuration), len(frame)))


@dataclass(frozen=True)
class FeatureSet:
    """A named list of features for one quantity.

    Parameters
    ----------
    name : str
    quantity : {"step_time", "queue_delay", "api_delay"}
    features : tuple of Feature
        At least the constant residual feature, named ``constant``; names unique.
    noise_floor : callable
        ``noise_floor(configuration) -> float``: the smallest mean, in seconds, that errors are taken relative to.
        A step cannot be faster than its weights are read; a queue delay is not known better than one step.
    support : callable, optional
        ``support(frame, configuration) -> bool array (n,)``: the rows the linear model describes. Elsewhere the quantity is nil, and
        predicted as zero: a request that finds a free slot does not wait in the queue. All rows by default.
    """

    name: str
    quantity: Quantity
    features: tuple[Feature, ...]
    noise_floor: Callable[[ServingConfiguration], float]
    description: str = ""
    support: Callable[[pd.DataFrame, ServingConfiguration], NDArray[np.bool_]] | None = None
    own_priors: tuple[str, ...] = ()
    """Features whose prior range is a user's in the place of the set's own, in the order of `features`."""
    _by_name: Mapping[str, Feature] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check names and the constant.

        Raises
        ------
        InputError
            If names repeat, or the first residual feature is not called ``constant``.
        """
        names = [f.name for f in self.features]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise InputError(f"feature set {self.name!r}: names must be unique, repeated: {', '.join(repeated)}")
        if not self.residual or self.residual[0].name != "constant":
            raise InputError(f"feature set {self.name!r}: the first residual feature must be named 'constant'")
        object.__setattr__(self, "_by_name", {f.name: f for f in self.features})

    @property
    def base(self) -> tuple[Feature, ...]:
        """Base features, in order."""
        return tuple(f for f in self.features if f.level is Level.BASE)

    @property
    def config(self) -> tuple[Feature, ...]:
        """Config features, in order."""
        return tuple(f for f in self.features if f.level is Level.CONFIG)

    @property
    def residual(self) -> tuple[Feature, ...]:
        """Residual features, in order; the first is the constant."""
        return tuple(f for f in self.features if f.level is Level.RESIDUAL)

    @property
    def discrepancy(self) -> tuple[Feature, ...]:
        """Discrepancy features, in order."""
        return tuple(f for f in self.features if f.level is Level.DISCREPANCY)

    @property
    def pooled(self) -> tuple[Feature, ...]:
        """Base and residual features, whose coefficients have a population: the `pooled_coef` dimension, first of `coef`."""
        return self.base + self.residual

    @property
    def varying(self) -> tuple[Feature, ...]:
        """Base, residual and discrepancy features: the columns that vary by row, in the order of the `coef` dimension."""
        return self.pooled + self.discrepancy

    @property
    def coef_names(self) -> tuple[str, ...]:
        """Names of the `coef` dimension."""
        return tuple(f.name for f in self.varying)

    @property
    def pooled_names(self) -> tuple[str, ...]:
        """Names of the `pooled_coef` dimension."""
        return tuple(f.name for f in self.pooled)

    @property
    def discrepancy_sd(self) -> FloatArray:
        """Sd of each discrepancy coefficient, shape (J,), in reference units."""
        return np.array([f.prior.sd for f in self.discrepancy])

    @property
    def columns(self) -> tuple[str, ...]:
        """Trace columns the set reads."""
        return tuple(dict.fromkeys(c for f in self.features for c in f.columns))

    def __getitem__(self, name: str) -> Feature:
        """Return the feature called `name`."""
        return self._by_name[name]

    @property
    def references(self) -> FloatArray:
        """References of the `coef` features, shape (K,)."""
        return np.array([f.reference for f in self.varying])

    def design(self, frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
        """Build the design matrix in reference units.

        Column k is feature k times its `reference`, so that coefficients are of order one and the product
        is in seconds.

        Parameters
        ----------
        frame : DataFrame, n rows
            Trace rows holding at least `columns`.
        configuration : ServingConfiguration

        Returns
        -------
        ndarray, shape (n, K), columns contiguous
            Seconds per unit coefficient.

        Raises
        ------
        InputError
            If a trace column is missing or a feature is not finite somewhere; both are named.
        """
        self._require_columns(frame, configuration)
        columns = np.empty((len(self.varying), len(frame)))
        with shared_columns(frame):
            for feature, out in zip(self.varying, columns, strict=True):
                np.multiply(self._column(feature, frame, configuration), feature.reference, out=out)
        return columns.T

    def distinct_columns(self, frame: pd.DataFrame, configuration: ServingConfiguration, out: FloatArray) -> FloatArray:
        """Write the columns that vary to `out`, from which and the constant 1 the design follows.

        Features that are zero in a configuration (of experts in a dense model) or the same in all rows need not be computed with.

        Parameters
        ----------
        frame : DataFrame, n rows
        configuration : ServingConfiguration
        out : ndarray, shape (K or more, n)
            The first v rows are written to.

        Returns
        -------
        expansion : ndarray, shape (v + 1, K)
            ``design = [1, columns that vary] @ expansion``.

        Raises
        ------
        InputError
            As `design`.
        """
        self._require_columns(frame, configuration)
        features = self.varying
        constants = np.zeros(len(features))
        varies: list[int] = []
        with shared_columns(frame):
            for k, feature in enumerate(features):
                column = self._column(feature, frame, configuration)
                if _is_constant(column):
                    constants[k] = column[0] * feature.reference
                else:
                    np.multiply(column, feature.reference, out=out[len(varies)])
                    varies.append(k)
        return np.vstack([constants, np.eye(len(constants))[varies]])

    def _column(self, feature: Feature, frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
        """Return a column that is finite, in its own unit."""
        column = np.asarray(feature.compute(frame, configuration), dtype=float)
        if column.strides == (0,):
            total = column[0] if len(column) else 0.0
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                total = column.sum()
        # The sum of finite numbers is finite but for an overflow, and cheaper than looking at each.
        if not (np.isfinite(total) or np.isfinite(column).all()):
            row = int(np.flatnonzero(~np.isfinite(column))[0])
            raise InputError(
                f"feature {feature.name!r} of {configuration.config_id!r} is not finite at row {row}: "
                f"{feature.formula}; check the columns {', '.join(feature.columns)} of that row"
            )
        return column

    def _require_columns(self, frame: pd.DataFrame, configuration: ServingConfiguration) -> None:
        missing = [c for c in self.columns if c not in frame.columns]
        if missing:
            raise InputError(
                f"feature set {self.name!r} ({self.quantity}) needs the column(s) {', '.join(missing)}; the rows of "
                f"{configuration.config_id!r} have {', '.join(map(str, frame.columns))}. Add them, or choose a feature set that does without"
            )

    def supported(self, frame: pd.DataFrame, configuration: ServingConfiguration) -> NDArray[np.bool_]:
        """Return which rows the linear model describes, shape (n,).

        Raises
        ------
        InputError
            If there is a support and a trace column is missing.
        """
        if self.support is None:
            return np.ones(len(frame), dtype=bool)
        self._require_columns(frame, configuration)
        return np.asarray(self.support(frame, configuration), dtype=bool)

    def config_row(self, configuration: ServingConfiguration) -> FloatArray:
        """Return the config features of one configuration in reference units, shape (G,), in seconds per unit coefficient.

        Raises
        ------
        InputError
            If one is not finite.
        """
        row = np.array([float(f.compute(None, configuration)) * f.reference for f in self.config], dtype=float)
        if not np.isfinite(row).all():
            bad = self.config[int(np.flatnonzero(~np.isfinite(row))[0])]
            raise InputError(f"config feature {bad.name!r} of {configuration.config_id!r} is not finite: {bad.formula}")
        return row

    def with_priors(self, ranges: Mapping[str, PriorRange]) -> FeatureSet:
        """Return the set with other prior ranges of some population coefficients.

        Parameters
        ----------
        ranges : mapping of str to PriorRange
            By feature, in multiples of its `reference`. Those equal to the set's own change nothing.

        Raises
        ------
        UnknownNameError
            If a name is not a feature of this set.
        """
        unknown = sorted(set(ranges) - set(self._by_name))
        if unknown:
            raise UnknownNameError(
                f"feature set {self.name!r} has no feature(s) {', '.join(unknown)}; it has {', '.join(self._by_name)}"
            )
        changed = {name for name, r in ranges.items() if r != self[name].prior}
        if not changed:
            return self
        return replace(
            self,
            features=tuple(replace(f, prior=ranges[f.name]) if f.name in changed else f for f in self.features),
            own_priors=tuple(f.name for f in self.features if f.name in changed or f.name in self.own_priors),
        )

    def units(self) -> dict[str, str]:
        """Return the coefficient unit of every feature, by name."""
        return {f.name: f.coefficient_unit for f in self.features}

    def prior_sentences(self) -> tuple[str, ...]:
        """Return every population prior as a sentence."""
        return tuple(f.prior_sentence() for f in self.features)


def _is_constant(column: FloatArray) -> bool:
    """Return whether all rows of a column, one at least, are the same; the ends tell most that vary."""
    return column.strides == (0,) or bool(column[0] == column[-1] and (column == column[0]).all())
