"""Evidence for terms that a model lacks: marginal likelihoods of any subset of candidates from statistics computed once.

Every configuration's rows are reduced once with all candidates as further columns; choosing columns of the triangles gives the
statistics of any subset, on the same row scale and the same drift blocks, so that densities compare. Coefficients, of the population
and of each configuration, are integrated out in closed form (`ExactDensity`); the scales (group sds, noise, drift) by Laplace's
approximation at their mode, in the coordinates in which the exact engine samples because they are nearly normal there.

For screening, the scales stay at or near the mode of the model without the candidate, only its own group sd is integrated out. No mode
is sought, so it understates for one that explains much; those near the top are refined. Drift is part of the covariance
throughout: what varies only between blocks competes with the drift of the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import gammaincinv, gammaln

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import Feature, FeatureSet, Level, response
from hfdtl_bayes.features.candidates import Candidate
from hfdtl_bayes.features.feature import rows as of_rows
from hfdtl_bayes.model import ExactDensity, PriorSettings
from hfdtl_bayes.model.scale_coordinates import scale_coordinates
from hfdtl_bayes.statistics import (
    ConfigStatistics,
    RowScaling,
    Stratum,
    config_to_constant,
    fit_row_scaling,
    statistics_from_rows,
)
from hfdtl_bayes.traces import time_blocks

FloatArray = NDArray[np.float64]

_RIDGE = 1e-12
_NODES, _TAIL = 11, 1e-4
"""Points of the rule that integrates a candidate's group sd, and the quantiles of its prior between which they lie."""


def _key(name: str) -> str:
    return f"feature {name}"


def _looked_up(feature: Feature) -> Feature:
    """Return the feature read from a column computed before; what needs no rows as it is."""
    if feature.level is Level.CONFIG or feature.name == "constant":
        return feature
    key = _key(feature.name)
    return replace(feature, compute=of_rows(lambda frame, _c: frame[key].to_numpy(dtype=float)), columns=(key,))


@dataclass(frozen=True)
class Traces:
    """Rows of one configuration with every feature and candidate as a column, computed once.

    Attributes
    ----------
    configuration : ServingConfiguration
    frame : DataFrame
        The rows, and `feature NAME` for every feature that varies by row.
    block_length : int
    """

    configuration: ServingConfiguration
    frame: pd.DataFrame
    block_length: int

    @classmethod
    def of(
        cls, frame: pd.DataFrame, configuration: ServingConfiguration, features: Sequence[Feature], block_length: int
    ) -> Traces:
        """Compute the columns of features over usable rows."""
        columns = {
            _key(f.name): np.asarray(f.compute(frame, configuration), dtype=float)
            for f in features
            if f.level is not Level.CONFIG and f.name != "constant"
        }
        return cls(configuration, pd.concat([frame, pd.DataFrame(columns, index=frame.index)], axis=1), block_length)

    def column(self, feature: Feature) -> FloatArray:
        """Return the column of a feature or candidate in its unit, shape (n,)."""
        if feature.level is Level.CONFIG:
            return np.full(len(self.frame), float(feature.compute(None, self.configuration)))
        return np.asarray(_looked_up(feature).compute(self.frame, self.configuration), dtype=float)


@dataclass(frozen=True)
class Problem:
    """A feature set, candidates beside it, and configurations to tell.

    Attributes
    ----------
    features : FeatureSet
        Reads computed columns; named like the set it stands for.
    candidates : tuple of Candidate
        Their features read computed columns.
    traces : tuple of Traces
    priors : PriorSettings
    """

    features: FeatureSet
    candidates: tuple[Candidate, ...]
    traces: tuple[Traces, ...]
    priors: PriorSettings

    @classmethod
    def of(
        cls, features: FeatureSet, candidates: Sequence[Candidate], traces: Sequence[Traces], priors: PriorSettings | None = None
    ) -> Problem:
        """Return a problem whose features read the columns of `traces`."""
        read = replace(features, features=tuple(_looked_up(f) for f in features.features), support=None)
        return cls(
            read,
            tuple(replace(c, feature=_looked_up(c.feature)) for c in candidates),
            tuple(traces),
            priors or PriorSettings(),
        )

    def candidate(self, name: str) -> Candidate:
        """Return the candidate of that name."""
        return next(c for c in self.candidates if c.name == name)

    def extended(self, names: Sequence[str]) -> FeatureSet:
        """Return the feature set with candidates behind its own features."""
        return replace(self.features, features=self.features.features + tuple(self.candidate(n).feature for n in names))

    def observed(self, trace: Traces) -> FloatArray:
        """Return the response of a configuration's rows, seconds, shape (n,)."""
        return response(trace.frame, self.features.quantity)

    def statistics(self, terms: Sequence[str] = ()) -> tuple[ConfigStatistics, ...]:
        """Reduce every configuration with all candidates as columns, rows scaled by the pilot of the features and `terms`."""
        full = self.extended([c.name for c in self.candidates])
        own = self.extended(terms)
        found = []
        for t in self.traces:
            scaling = self.scaling(t, own, full)
            found.append(statistics_from_rows(t.frame, t.configuration, full, block_length=t.block_length, scaling=scaling))
        return tuple(found)

    def scaling(self, trace: Traces, own: FeatureSet, full: FeatureSet) -> RowScaling:
        """Return the row scaling of a set's pilot, told in the columns of a larger set."""
        blocks = time_blocks(trace.frame, trace.block_length)
        design = own.design(trace.frame, trace.configuration)
        scaling = fit_row_scaling(design, self.observed(trace), blocks, own, trace.configuration)
        pilot = dict(zip(own.coef_names, scaling.pilot, strict=True))
        return replace(scaling, pilot=np.array([pilot.get(n, 0.0) for n in full.coef_names]))


def chosen_statistics(full: ConfigStatistics, features: FeatureSet) -> ConfigStatistics:
    """Return the statistics of a feature set whose columns are among those of `full`."""
    place = {n: i for i, n in enumerate(full.coef_names)}
    columns = [place[n] for n in features.coef_names]
    # Only R'R is read of these factors, so signs and the order of rows do not matter.
    strata = tuple(Stratum(s.multiplier, s.count, np.linalg.qr(s.triangle[:, [*columns, -1]], mode="r")) for s in full.strata)
    return replace(
        full,
        coef_names=features.coef_names,
        scaling=replace(full.scaling, pilot=full.scaling.pilot[columns]),
        config_row=config_to_constant(features, full.configuration),
        strata=strata,
    )


@dataclass(frozen=True)
class Model:
    """One subset of candidates beside the features, its scales at their mode.

    Attributes
    ----------
    terms : tuple of str
    density : ExactDensity
    mode : ndarray, shape (size,)
        Unconstrained scales.
    log_evidence : float
        Log marginal density of the scaled rows, up to a constant common to all subsets on the same rows; scales by Laplace.
    """

    terms: tuple[str, ...]
    density: ExactDensity
    mode: FloatArray
    log_evidence: float

    @cached_property
    def errors(self) -> tuple[FloatArray, FloatArray]:
        """Noise and drift of each configuration at the mode, shapes (C,)."""
        drawn = self.density.draw(self.mode[None], np.random.default_rng(0))
        return drawn["sigma"][0], drawn["omega"][0]


def fit_model(statistics: Sequence[ConfigStatistics], features: FeatureSet, priors: PriorSettings, terms: Sequence[str]) -> Model:
    """Find the mode of the scales of a feature set and its evidence.

    With q the coordinates in which the posterior of the scales is nearly standard normal, x = f(m + L q), D of them,

        log p(rows) ~ log p(rows, q = 0) + log |L| + (D / 2) log 2 pi

    the normalisation of each group sd's prior, which `ExactDensity` leaves out, counted: subsets differ in how many there are.
    """
    density = ExactDensity(statistics, features, priors)
    coordinates = scale_coordinates(density)
    centre = np.zeros(coordinates.size)
    value = float(coordinates.log_density(centre)[0]) + float(np.linalg.slogdet(coordinates.factor)[1])
    value += 0.5 * coordinates.size * np.log(2 * np.pi) + density.count_pooled * _group_sd_constant(priors)
    return Model(tuple(terms), density, coordinates.scales(centre), value)


def _group_sd_constant(priors: PriorSettings) -> float:
    """Return what `ExactDensity` leaves out of the log prior of one group sd."""
    shape, rate = priors.deviation.gamma_shape, priors.deviation.gamma_rate
    return float(shape * np.log(rate) - gammaln(shape))


def model(problem: Problem, full: Sequence[ConfigStatistics], terms: Sequence[str]) -> Model:
    """Fit the features with some candidates to statistics that hold all of them."""
    features = problem.extended(terms)
    return fit_model([chosen_statistics(s, features) for s in full], features, problem.priors, terms)


def screen(problem: Problem, full: Sequence[ConfigStatistics], base: Model, names: Sequence[str]) -> FloatArray:
    """Return the log Bayes factor of each candidate beside a model, given scales near the mode of that model, shape (J,).

    log p(rows, scales | model and candidate) - log p(rows, scales | model), the candidate's group sd integrated out by the trapezoidal
    rule over its log; with noise and drift once as they are and once smaller by as much as the candidate lowers their moment
    estimates, the larger of the two.
    """
    without = float(base.density.log_density(base.mode)[0])
    k, c = base.density.count_pooled, base.density.count_config
    shape, rate = problem.priors.deviation.gamma_shape, problem.priors.deviation.gamma_rate
    lowest, highest = (float(np.log(gammaincinv(shape, q) / rate)) for q in (_TAIL, 1 - _TAIL))
    log_tau = np.linspace(lowest, highest, _NODES)
    constant = _group_sd_constant(problem.priors) + np.log(log_tau[1] - log_tau[0])
    found = []
    for name in names:
        features = problem.extended([*base.terms, name])
        density = ExactDensity([chosen_statistics(s, features) for s in full], features, problem.priors)
        with np.errstate(divide="ignore", invalid="ignore"):
            lower = np.nan_to_num(np.log(density.errors / base.density.errors), neginf=0.0, posinf=0.0).T.ravel()
        moved = base.mode.copy()
        moved[k + 1 : k + 1 + 2 * c] += np.minimum(lower, 0.0)
        at = np.array([base.mode, moved])
        if density.count_pooled == k:
            found.append(float(density.log_density(at)[0].max()) - without)
            continue
        at = np.insert(np.repeat(at, _NODES, axis=0), k, np.tile(log_tau, 2), axis=1)
        logs = density.log_density(at)[0].reshape(2, _NODES)
        found.append(float(np.logaddexp.reduce(logs, axis=1).max()) + constant - without)
    return np.array(found)


@dataclass(frozen=True)
class Overlap:
    """How candidates relate to the features of a model and to each other, in these rows.

    Attributes
    ----------
    names : tuple of str
    left : ndarray, shape (J,)
        Share of each candidate's square that the model's columns do not explain, each configuration with coefficients of its own.
    correlation : ndarray, shape (J, J)
        Between what is left of them, over all configurations.
    information : ndarray, shape (J,)
        Square of what is left in units of the error: one over the variance with which rows tell the coefficient.
    """

    names: tuple[str, ...]
    left: FloatArray
    correlation: FloatArray
    information: FloatArray


def weighed_rows(statistics: ConfigStatistics, features: FeatureSet, sigma: float, omega: float) -> FloatArray:
    """Return rows with the information of a configuration's, shape (n, K), in units of the error.

    What is believed of its discrepancy counts as rows too: columns that are small by belief do not explain what is large.
    """
    names = statistics.coef_names
    believed = np.zeros((len(features.discrepancy), len(names)))
    for row, f in zip(believed, features.discrepancy, strict=True):
        row[names.index(f.name)] = 1.0 / f.prior.sd
    triangles = (t.triangle[:, : len(names)] / np.sqrt(sigma**2 + t.multiplier * omega**2) for t in statistics.strata)
    return np.vstack([*triangles, believed])


def overlap(full: Sequence[ConfigStatistics], base: Model, names: Sequence[str]) -> Overlap:
    """Compute what the rows tell of candidates beyond a model; rows weighed by its noise and drift."""
    inside = base.density.feature_set.coef_names
    left, total = np.zeros((len(names), len(names))), np.zeros(len(names))
    sigma, omega = base.errors
    for c, s in enumerate(full):
        place = {n: i for i, n in enumerate(s.coef_names)}
        stacked = weighed_rows(s, base.density.feature_set, sigma[c], omega[c])
        own, others = stacked[:, [place[n] for n in inside]], stacked[:, [place[n] for n in names]]
        length = np.linalg.norm(own, axis=0)
        basis, values, _ = np.linalg.svd(own[:, length > 0] / length[length > 0], full_matrices=False)
        basis = basis[:, values > 1e-9 * values[0]]
        rest = others - basis @ (basis.T @ others)
        left += rest.T @ rest
        total += (others**2).sum(axis=0)
    information = np.diag(left).copy()
    size = np.sqrt(np.maximum(information, _RIDGE * np.maximum(total, _RIDGE)))
    return Overlap(tuple(names), information / np.maximum(total, 1e-300), left / np.outer(size, size), information)
