"""The model written a second time, for the tests: a simulator from the prior, and the joint Gaussian in dense matrices.

Nothing here calls the engines. The simulator draws every parameter and then rows one block at a time; the dense form lists all
coefficients (population, hardware, configurations) as one Gaussian vector and all rows as one multivariate normal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import bisect

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping
from hfdtl_bayes.features import Feature, FeatureSet, Level, PriorRange
from hfdtl_bayes.model import PositiveRange, PriorSettings
from hfdtl_bayes.statistics import ConfigStatistics, statistics_from_rows

FloatArray = NDArray[np.float64]
Parameters = dict[str, FloatArray]

BLOCK = 10


def column(name: str):
    return lambda frame, _configuration: frame[name].to_numpy(dtype=float)


def tiny_features(name: str = "tiny", *, references: Sequence[float] = (2e-5, 1e-4, 2e-3, 5e-3)) -> FeatureSet:
    """Three coefficients (two slopes and the constant) and one config feature; `references` in that order, config third."""
    prefill, decode, inverse_tp, constant = references
    # The ranges are stated for the references above; others change the unit only.
    stated = (2e-5, 1e-4, 2e-3, 5e-3)

    def believed(low: float, high: float, i: int) -> PriorRange:
        factor = stated[i] / references[i]
        return PriorRange(low * factor, high * factor)

    return FeatureSet(
        name=name,
        quantity="step_time",
        noise_floor=lambda _configuration: 1e-3,
        features=(
            Feature("prefill", Level.BASE, "token", "prefill_tokens", column("prefill_tokens"), believed(0.4, 2.0, 0),
                    ("prefill_tokens",), prefill),
            Feature("decode", Level.BASE, "token", "decode_tokens", column("decode_tokens"), believed(0.2, 1.8, 1),
                    ("decode_tokens",), decode),
            Feature("inverse_tp", Level.CONFIG, "1", "1 / tensor_parallel", lambda _f, c: 1 / c.engine.tensor_parallel,
                    believed(-1.0, 2.0, 2), (), inverse_tp),
            Feature("constant", Level.RESIDUAL, "1", "1", lambda f, _c: np.ones(len(f)), believed(0.5, 2.5, 3), (), constant),
        ),
    )  # fmt: skip


TINY = tiny_features()


def bent_features(sd: float = 0.2) -> FeatureSet:
    """The same with two discrepancies: of batches below 60 sequences, and beyond them in proportion."""

    def bend(place: int):
        weight = np.eye(2)[place]
        return lambda frame, _c: 0.01 * np.interp(frame["decode_tokens"].to_numpy(dtype=float), [30, 90], weight)

    believed = PriorRange(-1.6448536269514722 * sd, 1.6448536269514722 * sd)
    bends = tuple(
        Feature(f"bend_{at}", Level.DISCREPANCY, "s", "10 ms * part of the way to it", bend(i), believed, ("decode_tokens",))
        for i, at in enumerate((30, 90))
    )
    return replace(TINY, name=f"bent {sd}", features=(*TINY.features, *bends))


BENT = bent_features()

PRIORS = PriorSettings(
    deviation=PositiveRange(0.15, 0.7),
    hardware_share=2.0,
    noise=PositiveRange(0.02, 0.3),
    noise_spread=PositiveRange(0.2, 0.8),
    drift=PositiveRange(0.03, 0.4),
    drift_spread=PositiveRange(0.2, 0.8),
)
"""Priors under which noise and drift both matter; all stated, so that seeds keep their meaning when defaults change."""


def configuration(config_id: str, gpu: str = "H100", tensor_parallel: int = 1) -> ServingConfiguration:
    return configuration_from_mapping(
        {
            "config_id": config_id,
            "llm": {
                "name": "toy", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8,
                "head_dim": 8, "intermediate_size": 128, "vocab_size": 100, "max_context_tokens": 1024,
            },
            "hardware": {
                "name": gpu, "peak_flops": 1e15, "memory_bandwidth": 3e12, "memory_bytes": 8e10,
                "interconnect_bandwidth": 4e11,
            },
            "engine": {
                "tensor_parallel": tensor_parallel, "max_num_seqs": 64, "max_num_batched_tokens": 2048,
                "kv_capacity_tokens": 100_000,
            },
        }
    )  # fmt: skip


THREE = (configuration("one", "H100", 1), configuration("two", "H100", 2), configuration("three", "L4", 1))
"""Three configurations on two kinds of hardware."""


def batches(rng: np.random.Generator, count: int) -> pd.DataFrame:
    """Batch compositions of `count` steps of one regime."""
    return pd.DataFrame(
        {
            "step_id": np.arange(count),
            "regime": "steady",
            "prefill_tokens": rng.integers(0, 800, count) * (rng.random(count) < 0.6),
            "decode_tokens": rng.integers(1, 120, count),
        }
    )


def pilot_of(features: FeatureSet, own: ServingConfiguration) -> FloatArray:
    """A row scale that owes nothing to the response: the prior means, config features in the constant."""
    coefficients = np.array([f.prior.mean for f in features.varying])
    for f in features.config:
        shift = float(f.compute(None, own)) * f.reference / features["constant"].reference
        coefficients[len(features.base)] += shift * f.prior.mean
    return coefficients


def hardware_of(configurations: Sequence[ServingConfiguration]) -> tuple[list[str], list[int]]:
    names = sorted({c.hardware.name for c in configurations})
    return names, [names.index(c.hardware.name) for c in configurations]


def loading(features: FeatureSet, own: ServingConfiguration) -> FloatArray:
    """A_c: how (beta, gamma, delta) make up the centre of a configuration's coefficients, shape (K, B + G + D)."""
    base, config, residual = len(features.base), len(features.config), len(features.residual)
    a = np.zeros((len(features.varying), base + config + residual))
    a[:base, :base] = np.eye(base)
    a[base : base + residual, base + config :] = np.eye(residual)
    for g, f in enumerate(features.config):
        a[base, base + g] = float(f.compute(None, own)) * f.reference / features["constant"].reference
    return a


def deviation_size(features: FeatureSet) -> FloatArray:
    return np.array([max(abs(f.prior.mean), f.prior.sd) for f in features.base + features.residual])


def own_spread(own_sd: FloatArray, features: FeatureSet) -> FloatArray:
    """Sds of a configuration's coefficients around their centre: given for discrepancies."""
    return np.concatenate([own_sd, [f.prior.sd for f in features.discrepancy]])


@cache
def group_sd_prior(r: PositiveRange) -> tuple[float, float]:
    """Shape and rate of the Gamma distribution whose 5 % and 95 % points are the range."""

    def ratio(shape: float) -> float:
        return float(stats.gamma(shape).ppf(0.95) / stats.gamma(shape).ppf(0.05)) - r.high / r.low

    shape = bisect(ratio, 0.1, 1e4, xtol=1e-12)
    return shape, float(stats.gamma(shape).ppf(0.95)) / r.high


def draw_parameters(
    rng: np.random.Generator, configurations: Sequence[ServingConfiguration], features: FeatureSet, priors: PriorSettings
) -> Parameters:
    """Every parameter of the model, from its prior, by the names of the posterior."""

    def positive(r: PositiveRange, size: int | None = None) -> FloatArray:
        # A lognormal whose 5 % and 95 % points are the range.
        middle, width = np.log(r.low * r.high) / 2, np.log(r.high / r.low) / 2 / 1.6448536269514722
        return np.exp(middle + width * rng.standard_normal(size))

    def coefficients(own: Sequence[Feature]) -> FloatArray:
        return np.array([rng.normal(f.prior.mean, f.prior.sd) for f in own])

    beta, gamma, delta = coefficients(features.base), coefficients(features.config), coefficients(features.residual)
    k = len(features.base) + len(features.residual)
    shape, rate = group_sd_prior(priors.deviation)
    tau = stats.gamma(shape, scale=1 / rate).ppf(stats.norm.cdf(rng.standard_normal(k)))
    share = rng.beta(priors.hardware_share, priors.hardware_share)
    names, index = hardware_of(configurations)
    sd = tau * deviation_size(features)
    effect_z = rng.standard_normal((len(names), k))
    effect = np.sqrt(share) * sd * effect_z
    phi = np.concatenate([beta, gamma, delta])
    own_sd = own_spread(np.sqrt(1 - share) * sd, features)
    whole = np.pad(effect, ((0, 0), (0, len(own_sd) - k)))
    theta = [loading(features, c) @ phi + whole[h] + rng.normal(0, own_sd) for c, h in zip(configurations, index, strict=True)]
    out = {
        "beta": beta, "gamma": gamma, "delta": delta, "tau": tau, "hardware_share": np.array(share),
        "hardware_effect_z": effect_z, "hardware_effect": effect, "theta": np.array(theta),
    }  # fmt: skip
    for name, typical, spread in (("sigma", priors.noise, priors.noise_spread), ("omega", priors.drift, priors.drift_spread)):
        if typical is None:
            # No drift.
            out[name], out[f"{name}_typical"], out[f"{name}_spread"] = np.zeros(len(configurations)), np.zeros(()), np.zeros(())
            continue
        middle, between = positive(typical), positive(spread)
        out[f"{name}_typical"], out[f"{name}_spread"] = middle, between
        out[name] = middle * np.exp(between * rng.standard_normal(len(configurations)))
    return out


def draw_new(
    rng: np.random.Generator,
    truth: Parameters,
    own: ServingConfiguration,
    fitted: Sequence[ServingConfiguration],
    features: FeatureSet,
) -> tuple[FloatArray, float, float]:
    """Return theta, sigma and omega of a configuration that is not among those fitted."""
    names, _ = hardware_of(fitted)
    sd, share = truth["tau"] * deviation_size(features), truth["hardware_share"]
    if own.hardware.name in names:
        effect = truth["hardware_effect"][names.index(own.hardware.name)]
    else:
        effect = np.sqrt(share) * sd * rng.standard_normal(len(sd))
    phi = np.concatenate([truth["beta"], truth["gamma"], truth["delta"]])
    own_sd = own_spread(np.sqrt(1 - share) * sd, features)
    effect = np.pad(effect, (0, len(own_sd) - len(sd)))
    theta = loading(features, own) @ phi + effect + own_sd * rng.standard_normal(len(own_sd))
    sigma, omega = (
        float(truth[f"{n}_typical"] * np.exp(truth[f"{n}_spread"] * rng.standard_normal())) for n in ("sigma", "omega")
    )
    return theta, sigma, omega


def scaled_errors(rng: np.random.Generator, blocks: NDArray[np.int64], sigma: float, omega: float) -> FloatArray:
    """Noise plus one drift per block, relative."""
    drift = {b: rng.normal(0, omega) for b in np.unique(blocks)}
    return np.array([drift[b] + rng.normal(0, sigma) for b in blocks])


def observe(
    rng: np.random.Generator,
    frame: pd.DataFrame,
    own: ServingConfiguration,
    features: FeatureSet,
    theta: FloatArray,
    sigma: float,
    omega: float,
    block: int = BLOCK,
) -> pd.DataFrame:
    """Add simulated step times, their errors relative to the scale of `pilot_of`."""
    design = features.design(frame, own)
    scale = np.maximum(design @ pilot_of(features, own), features.noise_floor(own))
    errors = scaled_errors(rng, frame["step_id"].to_numpy() // block, sigma, omega)
    return frame.assign(step_time_s=design @ theta + scale * errors)


@dataclass(frozen=True)
class Simulated:
    """Configurations with their rows, the parameters that made them, and their statistics."""

    configurations: tuple[ServingConfiguration, ...]
    features: FeatureSet
    priors: PriorSettings
    truth: Parameters
    frames: tuple[pd.DataFrame, ...]
    block: int

    @property
    def statistics(self) -> tuple[ConfigStatistics, ...]:
        return tuple(
            statistics_from_rows(f, c, self.features, block_length=self.block, pilot=pilot_of(self.features, c))
            for f, c in zip(self.frames, self.configurations, strict=True)
        )


def simulate(
    seed: int | Sequence[int],
    configurations: Sequence[ServingConfiguration] = THREE,
    features: FeatureSet = TINY,
    priors: PriorSettings = PRIORS,
    rows: Sequence[int] | int = (60, 40, 80),
    block: int = BLOCK,
) -> Simulated:
    """Simulate a data set from the prior."""
    rng = np.random.default_rng(seed)
    truth = draw_parameters(rng, configurations, features, priors)
    counts = [rows] * len(configurations) if isinstance(rows, int) else rows
    frames = tuple(
        observe(rng, batches(rng, n), own, features, truth["theta"][c], truth["sigma"][c], truth["omega"][c], block)
        for c, (own, n) in enumerate(zip(configurations, counts, strict=True))
    )
    return Simulated(tuple(configurations), features, priors, truth, frames, block)


@dataclass(frozen=True)
class Dense:
    """All coefficients as one Gaussian vector and all rows as one multivariate normal, at given scales.

    Latent vector: population (beta, gamma, delta), then the effect of each hardware, then each configuration's own
    coefficients theta; `make` builds it from independent normals.
    """

    make: FloatArray
    latent_mean: FloatArray
    latent_covariance: FloatArray
    rows: FloatArray
    observed: FloatArray
    error_covariance: FloatArray

    @property
    def mean(self) -> FloatArray:
        return self.rows @ self.latent_mean

    @property
    def covariance(self) -> FloatArray:
        return self.rows @ self.latent_covariance @ self.rows.T + self.error_covariance

    def conditional(self) -> tuple[FloatArray, FloatArray]:
        """Mean and covariance of the latent vector given the rows."""
        gain = np.linalg.solve(self.covariance, self.rows @ self.latent_covariance).T
        mean = self.latent_mean + gain @ (self.observed - self.mean)
        return mean, self.latent_covariance - gain @ self.rows @ self.latent_covariance


def dense(data: Simulated, scales: Parameters) -> Dense:
    """Build the joint Gaussian of coefficients and scaled rows, given tau, hardware_share, sigma and omega."""
    features, configurations = data.features, data.configurations
    names, index = hardware_of(configurations)
    ordered = features.base + features.config + features.residual
    k, p, h, c = len(features.varying), len(ordered), len(names), len(configurations)
    pooled = len(features.base) + len(features.residual)
    sd, share = scales["tau"] * deviation_size(features), float(scales["hardware_share"])
    own_sd = own_spread(np.sqrt(1 - share) * sd, features)
    # Independent pieces: population, hardware effects, own deviations; `make` turns them into (population, hardware, theta).
    variance = np.concatenate([[f.prior.sd**2 for f in ordered], np.tile(share * sd**2, h), np.tile(own_sd**2, c)])
    mean = np.concatenate([[f.prior.mean for f in ordered], np.zeros(h * pooled + c * k)])
    make = np.eye(len(mean))
    for i, own in enumerate(configurations):
        rows = slice(p + h * pooled + i * k, p + h * pooled + (i + 1) * k)
        make[rows, :p] = loading(features, own)
        make[rows, p + index[i] * pooled : p + (index[i] + 1) * pooled] = np.eye(k, pooled)
    pieces, observed, errors = [], [], []
    for i, (own, frame) in enumerate(zip(configurations, data.frames, strict=True)):
        design = features.design(frame, own)
        scale = np.maximum(design @ pilot_of(features, own), features.noise_floor(own))
        block = np.zeros((len(frame), len(mean)))
        block[:, p + h * pooled + i * k : p + h * pooled + (i + 1) * k] = design / scale[:, None]
        pieces.append(block)
        observed.append(frame["step_time_s"].to_numpy() / scale)
        errors.append(error_covariance(frame["step_id"].to_numpy() // data.block, scales["sigma"][i], scales["omega"][i]))
    total = sum(len(e) for e in errors)
    covariance = np.zeros((total, total))
    at = 0
    for e in errors:
        covariance[at : at + len(e), at : at + len(e)] = e
        at += len(e)
    return Dense(make, make @ mean, make * variance @ make.T, np.vstack(pieces), np.concatenate(observed), covariance)


def error_covariance(blocks: NDArray[np.int64], sigma: float, omega: float) -> FloatArray:
    """sigma^2 on the diagonal plus omega^2 between rows of one block."""
    return sigma**2 * np.eye(len(blocks)) + omega**2 * (blocks[:, None] == blocks[None, :])
