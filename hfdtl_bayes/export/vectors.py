"""What BLIS's trained-physics backend takes: two vectors, their labels and units, and what may not be in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ExportError

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

    def summary(self) -> str:
        """Return what was exported, what the projection changed and the limits of use."""
        pairs = ", ".join(f"{n}={v:.6g}" for n, v in zip(BETA_LABELS, self.beta, strict=False))
        clipped = f"; set to zero because negative: {', '.join(self.clipped)}" if self.clipped else ""
        lines = [
            f"beta {pairs}",
            f"alpha a0={self.alpha[0]:.6g} us, a1={self.alpha[1]:.6g} us, a2={self.alpha[2]:.6g} us",
            f"judged on {self.rows} batches: mean difference from the posterior mean {self.projection_error:.2%} of the step "
            f"time, worst {self.worst_projection_error:.2%}{clipped}; the mean itself is known to {self.posterior_sd:.2%}",
        ]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """Return the vectors with labels, units, uncertainty and limits of use as plain data for JSON."""
        return {
            "config_id": self.configuration.config_id,
            "backend": "trained-physics",
            "alpha": [{"label": n, "value": v, "unit": "us"} for n, v in zip(ALPHA_LABELS, self.alpha, strict=True)],
            "beta": [
                {"label": n, "value": v, "unit": "us" if n in IN_MICROSECONDS else "1", "multiplies": FEATURE_OF_BETA[n]}
                for n, v in zip(BETA_LABELS, self.beta, strict=False)
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
    problems = coefficient_problems(vectors.alpha, vectors.beta, settings)
    if not vectors.projection_error <= settings.max_projection_error:
        problems.append(
            f"BLIS's basis cannot express this posterior: the mean difference is {vectors.projection_error:.1%}, accepted is "
            f"{settings.max_projection_error:.0%}. Export for narrower traffic (--traffic), or fit --features blis-physics"
        )
    if problems:
        raise ExportError(f"{vectors.configuration.config_id!r} cannot be exported:\n  - " + "\n  - ".join(problems))


def coefficient_problems(alpha: tuple[float, ...], beta: tuple[float, ...], settings: ExportSettings) -> list[str]:
    """Return everything that is wrong with a pair of vectors: lengths, numbers that are not finite, negative or absurd."""
    problems = []
    if len(alpha) != len(ALPHA_LABELS):
        problems.append(f"alpha has {len(alpha)} values, BLIS takes exactly 3 (it ignores more in silence)")
    if len(beta) not in (10, 11):
        problems.append(
            f"beta has {len(beta)} values; accepted are 10 or 11: fewer select another model in BLIS, more are ignored in silence"
        )
    named = [(n, v, True) for n, v in zip(ALPHA_LABELS, alpha, strict=False)]
    named += [(n, v, n in IN_MICROSECONDS) for n, v in zip(BETA_LABELS, beta, strict=False)]
    for name, value, is_time in named:
        limit = settings.largest_us if is_time else settings.largest_factor
        if not np.isfinite(value):
            problems.append(f"{name} is {value}; BLIS takes finite numbers")
        elif value < 0:
            problems.append(f"{name} is {value:.6g}; BLIS takes numbers of at least 0")
        elif value > limit:
            problems.append(f"{name} is {value:.6g}, above {limit:.6g}{' us' if is_time else ''}: check the units")
    return problems
