"""What BLIS's backends take: two vectors, their labels and units, and what may not be in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ExportError
from hfdtl_bayes.features import FeatureSet, feature_set

ALPHA_LABELS = ("a0", "a1", "a2")
"""BLIS's alphas, all in microseconds: per request from arrival to queue, per request after decoding, per output token."""

BETA_LABELS = ("b1a", "b2a", "b3", "b4", "b5", "b6", "b7", "b8", "b1b", "b2b", "b_EP")
"""BLIS's betas in the order of its list; ten or eleven values select the model with split prefill and decode terms."""

FEATURE_OF_BETA = {
    "b1a": "prefill_compute",
    "b2a": "decode_compute",
    "b3": "weight_loading",
    "b4": "tp_communication",
    "b5": "layers",
    "b6": "scheduled_requests",
    "b7": "constant",
    "b8": "moe_layers",
    "b1b": "prefill_kv_write",
    "b2b": "decode_kv_read",
    "b_EP": "expert_dispatch",
}
"""The feature of `blis-physics` that each beta multiplies."""

IN_MICROSECONDS = ("b5", "b6", "b7", "b8")
"""Betas in microseconds per layer, request, step and MoE layer; the others are factors on a time at peak."""

MICRO = 1e6


@dataclass(frozen=True)
class Backend:
    """A latency model of BLIS that is linear in two vectors.

    Attributes
    ----------
    name : str
        As `--latency-model` has it.
    basis : FeatureSet
        Its terms, in SI units.
    beta : tuple of str
        Labels of its betas in the order of its list.
    feature_of : dict of str to str
        The feature of `basis` that each beta multiplies.
    in_microseconds : tuple of str
        Betas that are times (per unit of their feature); the others are factors on a time at peak.
    lengths : tuple of int
        Numbers of betas that select this model.
    alpha_units : tuple of str
        Units of a0, a1, a2. The trap of them all: a1 is per input token in every backend but trained-physics, where it is once per
        request, after decoding.
    """

    name: str
    basis: FeatureSet
    beta: tuple[str, ...]
    feature_of: dict[str, str]
    in_microseconds: tuple[str, ...]
    lengths: tuple[int, ...]
    alpha_units: tuple[str, str, str]

    def length(self, configuration: ServingConfiguration) -> int:
        """Return how many betas a configuration needs: the last is for data parallelism where there is a choice."""
        return max(self.lengths) if configuration.engine.data_parallel > 1 else min(self.lengths)


TRAINED_PHYSICS = Backend(
    name="trained-physics",
    basis=feature_set("blis-physics"),
    beta=BETA_LABELS,
    feature_of=FEATURE_OF_BETA,
    in_microseconds=IN_MICROSECONDS,
    lengths=(10, 11),
    alpha_units=("us", "us", "us/output token"),
)
"""The only coefficient-based backend of today's BLIS."""


@dataclass(frozen=True)
class ExportSettings:
    """Limits and choices of the export, each with its reason."""

    max_projection_error: float = 0.10
    """Mean relative difference between the posterior mean and the exported vector: as much as BLIS promises in all."""
    largest_us: float = 60e6
    """A term of a minute per step or request is no latency; 1e300 makes BLIS overflow silently."""
    largest_factor: float = 1e3
    """A dimensionless beta is a slowdown against the hardware's peak; a thousandfold is a wrong unit."""
    outside_weight: float = 0.01
    """Weight of batches the engine can run but the given traffic lacks: a hundred per cent of error there counts as one here,
    so they decide only what the traffic leaves open."""
    tie_breaker: float = 1e-4
    """Relative error given up for one prior sd: coefficients that only their sum shows (prefill KV writing and prefill
    compute, say) are divided between them as the prior has it, not as an algorithm happens to."""
    told_apart: float = 0.002
    """Relative error of step times at which a coefficient is called told apart or not: what a thousand steps of 5 % noise leave."""


@dataclass(frozen=True)
class BlisVectors:
    """Coefficients as BLIS takes them.

    Attributes
    ----------
    configuration : ServingConfiguration
    alpha : tuple of float
        a0 (us per request, arrival to queue), a1 (us per request after decoding), a2 (us per output token).
    beta : tuple of float
        Ten values, eleven with data parallelism, in the order of `BETA_LABELS`.
    projection_error : float
        Mean relative difference from the posterior mean over the batches it was judged on.
    worst_projection_error : float
    clipped : tuple of str
        Labels whose unconstrained value was negative and is exported as zero.
    rows : int
        Batches judged on.
    posterior_sd : float
        Mean relative posterior sd of the expected step time over the same batches: how sure the mean itself is.
    notes : tuple of str
        Limits of use, for a person.
    not_told_apart : tuple of str
        Labels whose single value the batches do not show: only a sum with others counts.
    backend : Backend
    """

    configuration: ServingConfiguration
    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    projection_error: float
    worst_projection_error: float
    clipped: tuple[str, ...]
    rows: int
    posterior_sd: float = 0.0
    notes: tuple[str, ...] = ()
    not_told_apart: tuple[str, ...] = ()
    backend: Backend = field(default=TRAINED_PHYSICS, repr=False)

    def summary(self) -> str:
        """Return what was exported, what the projection changed and the limits of use."""
        pairs = ", ".join(f"{n}={v:.6g}" for n, v in zip(self.backend.beta, self.beta, strict=False))
        alpha = ", ".join(f"{n}={v:.6g} {u}" for n, v, u in zip(ALPHA_LABELS, self.alpha, self.backend.alpha_units, strict=True))
        together = (
            f"single values not told apart by these batches, only their sum with others: {', '.join(self.not_told_apart)}"
            if self.not_told_apart
            else ""
        )
        clipped = f"; set to zero because negative: {', '.join(self.clipped)}" if self.clipped else ""
        lines = [
            f"beta {pairs}",
            f"alpha {alpha}",
            f"judged on {self.rows} batches: mean difference from the posterior mean {self.projection_error:.2%} of the step "
            f"time, worst {self.worst_projection_error:.2%}{clipped}; the mean itself is known to {self.posterior_sd:.2%}",
        ]
        return "\n".join([*lines, *([together] if together else []), *(f"note: {n}" for n in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """Return the vectors with labels, units, uncertainty and limits of use as plain data for JSON."""
        return {
            "config_id": self.configuration.config_id,
            "backend": self.backend.name,
            "alpha": [
                {"label": n, "value": v, "unit": u}
                for n, v, u in zip(ALPHA_LABELS, self.alpha, self.backend.alpha_units, strict=True)
            ],
            "beta": [
                {
                    "label": n,
                    "value": v,
                    "unit": "us" if n in self.backend.in_microseconds else "1",
                    "multiplies": self.backend.feature_of[n],
                    "told_apart": n not in self.not_told_apart,
                }
                for n, v in zip(self.backend.beta, self.beta, strict=False)
            ],
            "projection": {
                "rows": self.rows,
                "mean_relative_difference": self.projection_error,
                "worst_relative_difference": self.worst_projection_error,
                "set_to_zero": list(self.clipped),
            },
            "posterior_relative_sd": self.posterior_sd,
            "notes": list(self.notes),
        }


def check_vectors(vectors: BlisVectors, settings: ExportSettings | None = None) -> None:
    """Refuse what BLIS would refuse, ignore silently or overflow on.

    Raises
    ------
    ExportError
        With every problem found.
    """
    settings = settings or ExportSettings()
    problems = coefficient_problems(vectors.alpha, vectors.beta, settings, vectors.backend)
    if not vectors.projection_error <= settings.max_projection_error:
        problems.append(
            f"BLIS's basis ({vectors.backend.name}) cannot express this posterior: the mean difference is "
            f"{vectors.projection_error:.1%}, accepted is {settings.max_projection_error:.0%}. Export for narrower traffic (--traffic), "
            f"or fit --features {vectors.backend.basis.name}"
        )
    if problems:
        raise ExportError(f"{vectors.configuration.config_id!r} cannot be exported:\n  - " + "\n  - ".join(problems))


def coefficient_problems(
    alpha: tuple[float, ...], beta: tuple[float, ...], settings: ExportSettings, backend: Backend = TRAINED_PHYSICS
) -> list[str]:
    """Return everything that is wrong with a pair of vectors: lengths, numbers that are not finite, negative or absurd."""
    problems = []
    if len(alpha) != len(ALPHA_LABELS):
        problems.append(f"alpha has {len(alpha)} values, BLIS takes exactly 3 (it ignores more in silence)")
    if len(beta) not in backend.lengths:
        why = ": fewer select another model in BLIS, more are ignored in silence" if len(backend.lengths) > 1 else ""
        problems.append(f"beta has {len(beta)} values; accepted are {' or '.join(map(str, backend.lengths))}{why}")
    named = [(n, v, True) for n, v in zip(ALPHA_LABELS, alpha, strict=False)]
    named += [(n, v, n in backend.in_microseconds) for n, v in zip(backend.beta, beta, strict=False)]
    for name, value, is_time in named:
        limit = settings.largest_us if is_time else settings.largest_factor
        if not np.isfinite(value):
            problems.append(f"{name} is {value}; BLIS takes finite numbers")
        elif value < 0:
            problems.append(f"{name} is {value:.6g}; BLIS takes numbers of at least 0")
        elif value > limit:
            problems.append(f"{name} is {value:.6g}, above {limit:.6g}{' us' if is_time else ''}: check the units")
    return problems
