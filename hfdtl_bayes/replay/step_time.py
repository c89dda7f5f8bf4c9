"""A feature set's expected step time of one batch at a time, fast enough for a replay.

A feature is a formula over columns. Evaluated through a table of one row, the default set takes a tenth of a millisecond and more per
step, which is longer than all bookkeeping of the step. So each feature is looked at once, on thousands of batches that the engine can
run, and stated in the cheapest form that gives the same numbers there:

1. affine in the columns of a batch: all of these together are one dot product;
2. g(tokens) + h(requests) of the step's totals: a table of each, filled by the feature itself;
3. affine in the other columns for given tokens and requests of both phases: intercept and slopes are remembered by these four counts;
4. anything else: the feature itself on a table of one row, remembered by the values of the columns it reads.

Whether a form gives the same numbers is tested on those batches, and the time of every step that `replay` has made is compared
with the feature set's own, to a relative 1e-9 (`StepTimeFunction.check`). A formula that changes its form where it was not
probed is refused there; `exact=True` evaluates every feature in form 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, weight_loading_floor_s
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import Feature, FeatureSet
from hfdtl_bayes.features.sharing import shared_columns
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.replay.batch import Batch

FloatArray = NDArray[np.float64]

TOLERANCE = 1e-9
"""Relative to the step time: far below what any measurement resolves, far above rounding."""
FLOOR_SHARE = 0.5
"""Steps below this share of the time to read the weights are impossible; the validation of traces draws the same line. A draw of
coefficients may ask for them where its configuration has not been measured."""
_PROBES = 4096
_MOST_REMEMBERED = 200_000
_COLUMNS = Batch._fields
_COUNTS = 4
"""The first columns of a batch: tokens and requests of both phases."""


@dataclass(frozen=True)
class StepTimeFunction:
    """Seconds of a step, called with its `Batch`; made by `step_time_function` or `linear_step_time`.

    Attributes
    ----------
    feature_set : FeatureSet
    coefficients : ndarray, shape (K,)
        In reference units, config features folded into the constant, as `LatencyPosterior.draws(...).theta`.
    configuration : ServingConfiguration
    minimum_s : float
        Shortest step, seconds.
    factor : float
        Common factor of all steps: a machine slower or faster than the one measured.
    """

    feature_set: FeatureSet
    coefficients: FloatArray
    configuration: ServingConfiguration
    minimum_s: float
    factor: float
    _evaluate: Callable[[Batch], float]

    def __call__(self, batch: Batch) -> float:
        """Return the expected time of one step, seconds."""
        return max(self.factor * self._evaluate(batch), self.minimum_s)

    def scaled(self, factor: float) -> StepTimeFunction:
        """Return the function of a machine that takes `factor` times as long.

        Raises
        ------
        InputError
            If the factor is not finite and above 0.
        """
        if not (np.isfinite(factor) and factor > 0):
            raise InputError(f"speed factor is {factor}; accepted are finite numbers above 0")
        return StepTimeFunction(
            self.feature_set, self.coefficients, self.configuration, self.minimum_s, self.factor * factor, self._evaluate
        )

    def expected_s(self, frame: pd.DataFrame) -> FloatArray:
        """Return what the feature set itself gives for each row of a step trace, shape (n,), seconds.

        Raises
        ------
        InputError
            If a column is missing or a feature is not finite.
        """
        expected = self.feature_set.design(frame, self.configuration) @ self.coefficients
        return np.maximum(self.factor * expected, self.minimum_s)

    def check(self, steps: pd.DataFrame, used_s: FloatArray) -> None:
        """Compare the times that this function gave for steps with the feature set's own numbers.

        Parameters
        ----------
        steps : DataFrame, n rows
        used_s : ndarray, shape (n,)

        Raises
        ------
        InputError
            If one differs by more than a relative 1e-9.
        """
        own = self.expected_s(steps)
        wrong = np.flatnonzero(np.abs(used_s - own) > TOLERANCE * np.abs(own))
        if len(wrong):
            raise InputError(
                f"feature set {self.feature_set.name!r}: the fast form of a feature makes step {wrong[0]} {used_s[wrong[0]]:.9g} s long, "
                f"the feature itself {own[wrong[0]]:.9g} s: its formula changes where it was not probed. Make the function with exact=True"
            )


def step_time_function(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    *,
    draw: int | None = None,
    seed: int = 0,
    minimum_s: float | None = None,
    exact: bool = False,
) -> StepTimeFunction:
    """Return the expected step time of a configuration as a function of one batch.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of step_time.
    configuration : ServingConfiguration
        Fitted, or never seen.
    draw : int, optional
        Which posterior draw of the coefficients to take, modulo their number; by default their mean.
    seed : int
        For the draws of a configuration never seen.
    minimum_s : float, optional
        Shortest step; by default half the time to read the weights.
    exact : bool
        True to evaluate every feature through a table, which is slow and needs no probing.

    Raises
    ------
    InputError
        If the posterior is not of step_time.
    """
    if posterior.feature_set.quantity != "step_time":
        raise InputError(f"a replay needs a posterior of step_time, this one is of {posterior.feature_set.quantity}")
    draws = posterior.draws(configuration, seed)
    theta = draws.mean if draw is None else draws.theta[draw % len(draws.theta)]
    return linear_step_time(posterior.feature_set, theta, configuration, minimum_s=minimum_s, exact=exact)


def linear_step_time(
    feature_set: FeatureSet,
    coefficients: Sequence[float] | FloatArray,
    configuration: ServingConfiguration,
    *,
    minimum_s: float | None = None,
    exact: bool = False,
) -> StepTimeFunction:
    """Return the step time that coefficients of a feature set give, as a function of one batch.

    Parameters
    ----------
    feature_set : FeatureSet
        Of step_time.
    coefficients : array, shape (K,)
        Of the `coef_names`, in reference units, config features folded into the constant.
    configuration : ServingConfiguration
    minimum_s, exact
        As `step_time_function`.

    Raises
    ------
    InputError
        If the number of coefficients is not that of the features or one is not finite; if a feature reads a column that a replay
        does not make.
    """
    theta = np.array(coefficients, dtype=float)
    features = feature_set.varying
    if theta.shape != (len(features),) or not np.isfinite(theta).all():
        raise InputError(
            f"feature set {feature_set.name!r} needs {len(features)} finite coefficients ({', '.join(feature_set.coef_names)}); "
            f"found {theta.tolist()}"
        )
    foreign = sorted(set(feature_set.columns) - set(_COLUMNS))
    if foreign:
        raise InputError(
            f"feature set {feature_set.name!r} reads the column(s) {', '.join(foreign)}, which a replay does not make; it makes "
            f"{', '.join(_COLUMNS)}"
        )
    least = FLOOR_SHARE * weight_loading_floor_s(configuration) if minimum_s is None else float(minimum_s)
    if not (np.isfinite(least) and least > 0):
        raise InputError(f"minimum_s is {minimum_s}; accepted are finite numbers of seconds above 0")
    weights = theta * feature_set.references
    evaluate = _Compiled(features, weights, configuration, exact).evaluator()
    return StepTimeFunction(feature_set, theta, configuration, least, 1.0, evaluate)


def _frame(rows: FloatArray) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(_COLUMNS))


class _Compiled:
    """The features of one configuration, each in the cheapest form that gives its numbers."""

    def __init__(
        self, features: Sequence[Feature], weights: FloatArray, configuration: ServingConfiguration, exact: bool
    ) -> None:
        self.configuration = configuration
        self.constant = 0.0
        self.slopes = np.zeros(len(_COLUMNS))
        engine = configuration.engine
        self.most_tokens, self.most_requests = engine.max_num_batched_tokens, engine.max_num_seqs
        self.by_tokens = np.zeros(self.most_tokens + 1)
        self.by_requests = np.zeros(self.most_requests + 1)
        self.tabled = False
        self.by_counts: list[tuple[Feature, float]] = []
        self.others: list[tuple[Feature, float]] = []
        used = [(f, w) for f, w in zip(features, weights, strict=True) if w]
        if exact:
            self.others = used
            return
        rows = probe_batches(configuration)
        frame = _frame(rows)
        for feature, weight in used:
            values = np.array(feature.compute(frame, configuration), dtype=float)
            if self._affine(values, rows, weight) or self._tables(feature, values, rows, weight):
                continue
            given_counts = self._affine_given_counts(feature, values, rows)
            (self.by_counts if given_counts else self.others).append((feature, weight))

    def _affine(self, values: FloatArray, rows: FloatArray, weight: float) -> bool:
        scale = np.abs(rows).max(axis=0) + (rows == 0).all(axis=0)
        design = np.column_stack([np.ones(len(rows)), rows / scale])
        size = np.abs(values).max()
        if size == 0.0:
            return True
        # Columns may be multiples of each other in every batch; the minimum-norm solution is as good as any on them.
        solution = np.linalg.lstsq(design, values / size, rcond=1e-12)[0]
        solution[np.abs(solution) < 1e-13] = 0.0
        if not _same(design @ solution * size, values):
            return False
        self.constant += weight * size * solution[0]
        self.slopes += weight * size * solution[1:] / scale
        return True

    def _tables(self, feature: Feature, values: FloatArray, rows: FloatArray, weight: float) -> bool:
        """Fill tables from batches of one kind and see whether they tell the others."""
        tokens, requests = np.arange(self.most_tokens + 1.0), np.arange(self.most_requests + 1.0)
        of_tokens = np.asarray(feature.compute(_frame(_totals(tokens, np.minimum(tokens, 1.0))), self.configuration), dtype=float)
        most = np.full(len(requests), float(self.most_tokens))
        of_requests = np.asarray(feature.compute(_frame(_totals(most, requests)), self.configuration), dtype=float)
        of_requests = of_requests - of_requests[min(1, len(requests) - 1)]
        if not (np.isfinite(of_tokens).all() and np.isfinite(of_requests).all()):
            return False
        at = dict(zip(_COLUMNS, rows.T, strict=True))
        t = (at["prefill_tokens"] + at["decode_tokens"]).astype(int)
        b = (at["prefill_requests"] + at["decode_requests"]).astype(int)
        if not _same(of_tokens[t] + of_requests[b], values):
            return False
        self.by_tokens += weight * of_tokens
        self.by_requests += weight * of_requests
        self.tabled = True
        return True

    def _affine_given_counts(self, feature: Feature, values: FloatArray, rows: FloatArray) -> bool:
        """Return whether the other columns add up, and half of them all does half as much."""

        def computed(kept: FloatArray) -> FloatArray:
            changed = rows.copy()
            changed[:, _COUNTS:] *= kept
            return np.array(feature.compute(_frame(changed), self.configuration), dtype=float)

        others = len(_COLUMNS) - _COUNTS
        nothing = computed(np.zeros(others))
        added = sum((computed(alone) - nothing for alone in np.eye(others)), nothing)
        return _same(added, values) and _same(2.0 * computed(np.full(others, 0.5)) - nothing, values)

    def evaluator(self) -> Callable[[Batch], float]:
        constant, active = self.constant, [int(k) for k in np.flatnonzero(self.slopes)]
        slopes = [float(self.slopes[k]) for k in active]
        pairs = list(zip(active, slopes, strict=True))
        by_tokens, by_requests, tabled = self.by_tokens.tolist(), self.by_requests.tolist(), self.tabled
        others = [_remembered_by_counts(self.by_counts, self.configuration)] if self.by_counts else []
        others += [_remembered(f, w, self.configuration) for f, w in self.others]

        def evaluate(batch: Batch) -> float:
            total = constant
            for k, slope in pairs:
                total += slope * batch[k]
            if tabled:
                total += by_tokens[int(batch[0] + batch[1])] + by_requests[int(batch[2] + batch[3])]
            for other in others:
                total += other(batch)
            return total

        return evaluate


def _remembered_by_counts(
    features: Sequence[tuple[Feature, float]], configuration: ServingConfiguration
) -> Callable[[Batch], float]:
    """Return the sum of features that are affine in what is not a count, with its intercept and slopes remembered by the counts."""
    sizes = probe_batches(configuration)[:, _COUNTS:].max(axis=0)
    sizes[sizes == 0] = 1.0
    found: dict[tuple[float, ...], list[tuple[int, float]]] = {}
    intercepts: dict[tuple[float, ...], float] = {}

    def evaluate(batch: Batch) -> float:
        key = batch[:_COUNTS]
        slopes = found.get(key)
        if slopes is None:
            if len(found) >= _MOST_REMEMBERED:
                found.clear()
                intercepts.clear()
            rows = np.zeros((len(sizes) + 1, len(_COLUMNS)))
            rows[:, :_COUNTS] = key
            rows[1:, _COUNTS:] = np.diag(sizes)
            frame = _frame(rows)
            with shared_columns(frame):
                values = sum(w * np.asarray(f.compute(frame, configuration), dtype=float) for f, w in features) + np.zeros(
                    len(rows)
                )
            intercepts[key] = float(values[0])
            own = (values[1:] - values[0]) / sizes
            slopes = found[key] = [(_COUNTS + int(k), float(own[k])) for k in np.flatnonzero(own)]
        total = intercepts[key]
        for k, slope in slopes:
            total += slope * batch[k]
        return total

    return evaluate


def _remembered(feature: Feature, weight: float, configuration: ServingConfiguration) -> Callable[[Batch], float]:
    # `prompt_attention_tokens` is read where it is there, without being declared.
    reads = [k for k, c in enumerate(_COLUMNS) if c in feature.columns or c == "prompt_attention_tokens"]
    found: dict[tuple[float, ...], float] = {}

    def evaluate(batch: Batch) -> float:
        key = tuple(batch[k] for k in reads)
        value = found.get(key)
        if value is None:
            if len(found) >= _MOST_REMEMBERED:
                found.clear()
            row = _frame(np.array([batch], dtype=float))
            value = found[key] = weight * float(np.asarray(feature.compute(row, configuration)).reshape(-1)[0])
        return value

    return evaluate


def _same(found: FloatArray, values: FloatArray) -> bool:
    return bool((np.abs(found - values) <= TOLERANCE * 1e-2 * np.abs(values).max()).all())


def _totals(tokens: FloatArray, requests: FloatArray) -> FloatArray:
    """Return batches with these totals, all of it prefill."""
    rows = np.zeros((len(tokens), len(_COLUMNS)))
    rows[:, _COLUMNS.index("prefill_tokens")] = tokens
    rows[:, _COLUMNS.index("prefill_requests")] = requests
    return rows


def probe_batches(configuration: ServingConfiguration, seed: int = 0) -> FloatArray:
    """Return batches of every kind that the engine can run, shape (n, columns of `Batch`).

    Counts are spread over orders of magnitude; pure decode and pure prefill are a quarter each.
    """
    engine = configuration.engine
    budget, seqs = engine.max_num_batched_tokens, engine.max_num_seqs
    rng = np.random.default_rng(seed)

    def spread(most: FloatArray | float) -> FloatArray:
        top = np.broadcast_to(np.asarray(most, dtype=float), _PROBES)
        return np.where(
            top >= 1, np.floor(np.exp(rng.random(_PROBES) * np.log(np.maximum(top, 1.0) + 1.0))).clip(1, np.maximum(top, 1)), 0
        )

    kind = rng.random(_PROBES)
    decodes = np.where(kind < 0.25, 0.0, spread(min(seqs, budget)))
    room = np.minimum(seqs - decodes, budget - decodes)
    prefills = np.where((kind >= 0.25) & (kind < 0.5), 0.0, np.minimum(spread(np.minimum(room, 8.0)), room))
    tokens = np.where(prefills > 0, np.maximum(spread(np.maximum(budget - decodes, 0.0)), prefills), 0.0)
    before = np.where(prefills > 0, np.floor(rng.random(_PROBES) * 4 * budget) * (rng.random(_PROBES) < 0.5), 0.0)
    after = np.where(prefills > 0, np.floor(rng.random(_PROBES) * 4 * budget) * (rng.random(_PROBES) < 0.5), 0.0)
    pairs = tokens * before + tokens**2 / 2 / np.maximum(prefills, 1.0)
    whole = tokens * (before + after) + 1.5 * tokens**2 / np.maximum(prefills, 1.0)
    context = decodes * spread(float(configuration.llm.max_context_tokens))
    used = context + tokens
    rows = np.column_stack(
        [
            tokens, decodes, prefills, decodes, pairs, whole, context,
            np.floor(rng.random(_PROBES) * 3 * seqs) * (rng.random(_PROBES) < 0.5), decodes + prefills,
            np.minimum(used / engine.kv_capacity_tokens, 1.0) * rng.random(_PROBES),
        ]
    )  # fmt: skip
    return np.asarray(rows[decodes + prefills > 0])
