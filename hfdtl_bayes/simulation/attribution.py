"""Which coefficient the spread of a simulated result comes from, and what to measure next.

The member means y_d are regressed on the seconds that each coefficient adds to the mean simulated step, x_dk = theta_dk * design_k,
and on the overheads of a request. The variance that the line explains is divided by covariance, share_k = b_k Cov(x_k, y) / Var(line),
which adds up to one whatever the correlation of the coefficients. A share below zero belongs to a coefficient whose uncertainty
makes up for that of another: the data know their sum better than either. First order only: `explained` says how much of the variance
between members a line holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.simulation.variance import Components

FloatArray = NDArray[np.float64]

OVERHEADS = "request overheads"
LEVEL = "drift during calibration"
"""Common factor of all coefficients: the speed the machine happened to have while it was measured."""
_RIDGE = 1e-3
"""Of the mean square of a column: directions that the draws hardly span are not followed."""
_LITTLE = 0.05
"""A result known to this, relative to its value, needs no measurement before all others."""

_SHOWN_BY: tuple[tuple[str, str], ...] = (
    ("prefill_attention_tokens", "long prompts"),
    ("prefill_tokens", "prompts of many lengths, alone and beside decodes"),
    ("context_tokens", "decodes at long contexts"),
    ("kv_usage", "decodes at long contexts"),
    ("decode_tokens", "decode batches of many sizes"),
    ("decode_requests", "decode batches of many sizes"),
    ("prefill_requests", "steps with many short prompts"),
)


@dataclass(frozen=True)
class Attribution:
    """What carries the coefficients' part of a metric's variance.

    Attributes
    ----------
    shares : dict of str to float
        By coefficient, largest first; of what is explained.
    explained : float
        Share of the variance between members that a line in the coefficients explains.
    """

    shares: Mapping[str, float]
    explained: float


def attribute(names: Sequence[str], seconds: FloatArray, means: FloatArray) -> Attribution:
    """Divide the variance between members by coefficient.

    Parameters
    ----------
    names : sequence of str, K
    seconds : ndarray, shape (D, K)
        What each coefficient adds to a step (or a request).
    means : ndarray, shape (D,)
        Of the metric.
    """
    x, y = seconds - seconds.mean(axis=0), means - means.mean()
    size = np.sqrt(np.square(x).mean(axis=0))
    used = size > 1e-12 * max(float(size.max(initial=0.0)), 1e-300)
    if not used.any() or not np.square(y).sum() > 0:
        return Attribution({}, 0.0)
    scaled = x[:, used] / size[used]
    rows = np.vstack([scaled, np.sqrt(_RIDGE * len(y)) * np.eye(scaled.shape[1])])
    slope = np.linalg.lstsq(rows, np.concatenate([y, np.zeros(scaled.shape[1])]), rcond=None)[0]
    line = scaled @ slope
    variance = float(line.var())
    covariance = scaled.T @ line / len(y) * slope
    found = dict(zip(np.array(names)[used].tolist(), (covariance / max(variance, 1e-300)).tolist(), strict=True))
    free = len(y) - scaled.shape[1] - 1
    left = float(np.square(y - line).sum())
    # Adjusted for the number of slopes: as many coefficients as members would explain anything.
    explained = 1.0 - (left / max(free, 1)) / (float(np.square(y).sum()) / (len(y) - 1)) if free > 0 else 0.0
    ordered = dict(sorted(found.items(), key=lambda pair: -pair[1]))
    return Attribution(ordered, float(np.clip(explained, 0.0, 1.0)))


def shown_by(features: FeatureSet, name: str) -> str:
    """Return in words the traffic that shows a coefficient."""
    if name == OVERHEADS:
        return "requests that find the engine idle"
    columns = {c for f in features.varying if f.name == name for c in f.columns}
    for column, words in _SHOWN_BY:
        if column in columns:
            return words
    return "small steps"


@dataclass(frozen=True)
class NextMeasurement:
    """What would shrink the intervals most, and the command for it."""

    source: str
    reason: str
    command: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dict(vars(self))

    def __str__(self) -> str:
        """Return a sentence or two."""
        return f"{self.reason}. Next: {self.command}" if self.command else f"{self.reason}."


def next_measurement(
    metric: str,
    mean: float,
    components: Components,
    attribution: Attribution,
    features: FeatureSet,
    *,
    posterior_file: str = "POSTERIOR.nc",
    config_id: str = "CONFIG",
    steps_file: str = "STEPS.parquet",
) -> NextMeasurement:
    """Say which measurement would shrink the interval of a metric most.

    Parameters
    ----------
    metric : str
    mean : float
    components : Components
    attribution : Attribution
    features : FeatureSet
    posterior_file, config_id, steps_file : str
        For the command: the posterior, its configuration, and the steps that were simulated (`--steps-out`).
    """
    shares = components.shares()
    relative = np.sqrt(components.total) / abs(mean) if mean else float("nan")
    if not components.total > 0:
        return NextMeasurement("nothing", f"{metric} does not vary between runs", "")
    source = max(("coefficients", "speed", "workload"), key=lambda name: shares[name])
    said = f"{shares[source]:.0%} of the variance of {metric} (sd {relative:.0%} of its mean) "
    if source == "workload":
        return NextMeasurement(source, f"{said}comes from which requests happen to come", "simulate longer traffic (duration_s)")
    if source == "speed":
        little = components.coefficients**0.5 <= _LITTLE * abs(mean)
        what = "the coefficients are known well enough" if little else f"coefficients {shares['coefficients']:.0%}"
        return NextMeasurement(
            source,
            f"{said}is the machine's drifting speed, which more rows of the same minutes do not tell; {what}",
            "a longer run averages it out; nothing measured beforehand does",
        )
    name = next(iter(attribution.shares), "")
    if name == OVERHEADS:
        return NextMeasurement(
            source, f"{said}comes from the coefficients, most of it from request overheads", "record requests at an idle engine"
        )
    if name == LEVEL:
        return NextMeasurement(
            source,
            f"{said}comes from the speed that the machine happened to have while it was calibrated, which is in all coefficients",
            "calibrate on as many rows from several other times; rows of the same minutes hardly help",
        )
    top = f", most of it from {name} ({attribution.shares[name]:.0%}), which {shown_by(features, name)} show" if name else ""
    return NextMeasurement(
        source,
        f"{said}comes from the coefficients{top}",
        f"hfdtl-bayes select {posterior_file} STORE --config {config_id} --deployment {steps_file} --budget 200 (rows at hand), or "
        f"hfdtl-bayes plan {posterior_file} STORE --config {config_id} --deployment {steps_file} (traffic to send)",
    )
