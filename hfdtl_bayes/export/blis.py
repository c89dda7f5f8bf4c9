"""BLIS coefficient vectors for its trained-physics backend.

Within one configuration BLIS's eleven basis functions span six directions (weights, layers and the constant are all
constants there), so a posterior is exported by projection: the non-negative BLIS coefficients whose step times are closest,
in relative terms, to the posterior mean over the configuration's own traffic. What the projection loses is stated, and refused above a
limit. Every constant goes into the per-step term; vectors are therefore valid for this configuration only.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from scipy.optimize import nnls

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ExportError
from hfdtl_bayes.features import feature_set, operating_points
from hfdtl_bayes.model import LatencyPosterior

FloatArray = NDArray[np.float64]

BETA_LABELS = ("b1a", "b2a", "b3", "b4", "b5", "b6", "b7", "b8", "b1b", "b2b", "b_EP")
"""BLIS's betas in the order of its list; ten or eleven values select the model with split prefill and decode terms."""

_BETA_OF_FEATURE = {
    "prefill_compute": "b1a",
    "decode_compute": "b2a",
    "tp_communication": "b4",
    "scheduled_requests": "b6",
    "constant": "b7",
    "prefill_kv_write": "b1b",
    "decode_kv_read": "b2b",
    "expert_dispatch": "b_EP",
}
_IN_MICROSECONDS = ("b5", "b6", "b7", "b8")
_MICRO = 1e6


@dataclass(frozen=True)
class ExportSettings:
    """Limits of the export, each with its reason."""

    max_projection_error: float = 0.10
    """Mean relative difference between the posterior mean and the exported vector: as much as BLIS promises in all."""
    largest_us: float = 60e6
    """A term of a minute per step or request is no latency; 1e300 makes BLIS overflow silently."""
    largest_factor: float = 1e3
    """A dimensionless beta is a slowdown against the hardware's peak; a thousandfold is a wrong unit."""


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
        Mean relative difference from the posterior mean over the traffic projected on.
    worst_projection_error : float
    clipped : tuple of str
        Labels whose unconstrained value was negative and is exported as zero.
    rows : int
        Batches projected on.
    """

    configuration: ServingConfiguration
    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    projection_error: float
    worst_projection_error: float
    clipped: tuple[str, ...]
    rows: int

    def summary(self) -> str:
        """Return what was exported and what the projection changed."""
        pairs = ", ".join(f"{n}={v:.6g}" for n, v in zip(BETA_LABELS, self.beta, strict=False))
        clipped = f"; set to zero because negative: {', '.join(self.clipped)}" if self.clipped else ""
        return (
            f"beta {pairs}\nalpha a0={self.alpha[0]:.6g} us, a1={self.alpha[1]:.6g} us, a2={self.alpha[2]:.6g} us\n"
            f"projected on {self.rows} batches: mean difference {self.projection_error:.2%} of the step time, worst "
            f"{self.worst_projection_error:.2%}{clipped}"
        )


def idle_api_delay_s(requests: pd.DataFrame) -> float | None:
    """Return the median of queued - arrival over requests that found the engine idle, in seconds.

    This is BLIS's alpha0. The plain mean of queued - arrival contains the wait for the running step, which BLIS simulates
    itself, and would count it twice. None if fewer than five requests arrived at an idle engine.
    """
    needed = {"arrival_s", "queued_s", "running_requests", "waiting_requests"}
    if not needed <= set(requests.columns):
        return None
    idle = requests[(requests["running_requests"] == 0) & (requests["waiting_requests"] == 0)]
    delay = (idle["queued_s"] - idle["arrival_s"]).dropna()
    return float(max(delay.median(), 0.0)) if len(delay) >= 5 else None


def blis_vectors(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    traffic: pd.DataFrame | None = None,
    *,
    alpha0_s: float = 0.0,
    settings: ExportSettings | None = None,
    seed: int = 0,
) -> BlisVectors:
    """Express the posterior mean of one configuration as BLIS coefficients.

    Minimises sum ((X w - m) / m)^2 over w >= 0, with m the posterior mean of each batch and X BLIS's basis.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of step_time.
    configuration : ServingConfiguration
        Fitted, or never seen.
    traffic : DataFrame, optional
        Batches the vector is to be right for; by default a grid over all batches the engine can run.
    alpha0_s : float
        Idle delay from arrival to queue, seconds; see `idle_api_delay_s`.
    settings : ExportSettings, optional
    seed : int

    Raises
    ------
    ExportError
        If the posterior is not of step_time, the projection loses more than the limit, or a value is not finite, negative or beyond
        any sane magnitude.
    """
    settings = settings or ExportSettings()
    if posterior.feature_set.quantity != "step_time":
        raise ExportError(
            f"BLIS betas are step times, this posterior is of {posterior.feature_set.quantity}; fit --quantity step_time"
        )
    frame = operating_points(configuration) if traffic is None else traffic
    mean = posterior.expected_s(frame, configuration, seed)
    if not (np.isfinite(mean).all() and (mean > 0).all()):
        raise ExportError(
            f"the posterior mean of {configuration.config_id!r} is not positive in {int((~(mean > 0)).sum())} of {len(frame)} "
            "batches; calibrate on more rows, or export for traffic like that calibrated on (--traffic)"
        )
    basis = feature_set("blis-physics")
    design = basis.design(frame, configuration)
    relative = design / mean[:, None]
    size = np.linalg.norm(relative, axis=0)
    used = size > 0
    scaled = relative[:, used] / size[used]
    solved, _ = nnls(scaled, np.ones(len(frame)))
    free = np.linalg.lstsq(scaled, np.ones(len(frame)), rcond=1e-10)[0]
    weights = np.zeros(design.shape[1])
    weights[used] = solved / size[used]
    negative = np.zeros(design.shape[1], dtype=bool)
    negative[used] = (free < 0) & (solved == 0)
    difference = np.abs(design @ weights / mean - 1)
    physical = weights * basis.references
    by_label = dict.fromkeys(BETA_LABELS, 0.0)
    for name, value in zip(basis.coef_names, physical, strict=True):
        label = _BETA_OF_FEATURE[name]
        by_label[label] = float(value) * (_MICRO if label in _IN_MICROSECONDS else 1.0)
    length = 11 if configuration.engine.data_parallel > 1 else 10
    vectors = BlisVectors(
        configuration=configuration,
        alpha=(alpha0_s * _MICRO, 0.0, 0.0),
        beta=tuple(by_label[label] for label in BETA_LABELS[:length]),
        projection_error=float(difference.mean()),
        worst_projection_error=float(difference.max()),
        clipped=tuple(_BETA_OF_FEATURE[n] for n, bad in zip(basis.coef_names, negative, strict=True) if bad),
        rows=len(frame),
    )
    check_vectors(vectors, settings)
    return vectors


def check_vectors(vectors: BlisVectors, settings: ExportSettings | None = None) -> None:
    """Refuse what BLIS would refuse, ignore silently or overflow on.

    Raises
    ------
    ExportError
        With every problem found.
    """
    settings = settings or ExportSettings()
    problems = []
    if len(vectors.alpha) != 3:
        problems.append(f"alpha has {len(vectors.alpha)} values, BLIS takes exactly 3")
    if len(vectors.beta) not in (10, 11):
        problems.append(f"beta has {len(vectors.beta)} values; 10 or 11 are exported, fewer select another model in BLIS")
    named = [(f"a{i}", v, True) for i, v in enumerate(vectors.alpha)]
    named += [(n, v, n in _IN_MICROSECONDS) for n, v in zip(BETA_LABELS, vectors.beta, strict=False)]
    for name, value, is_time in named:
        limit = settings.largest_us if is_time else settings.largest_factor
        if not np.isfinite(value):
            problems.append(f"{name} is {value}; BLIS takes finite numbers")
        elif value < 0:
            problems.append(f"{name} is {value:.6g}; BLIS takes numbers of at least 0")
        elif value > limit:
            problems.append(f"{name} is {value:.6g}, above {limit:.6g}{' us' if is_time else ''}: check the units")
    if not vectors.projection_error <= settings.max_projection_error:
        problems.append(
            f"BLIS's basis cannot express this posterior: the mean difference is {vectors.projection_error:.1%}, accepted is "
            f"{settings.max_projection_error:.0%}. Export for narrower traffic (--traffic), or fit --features blis-physics"
        )
    if problems:
        raise ExportError(f"{vectors.configuration.config_id!r} cannot be exported:\n  - " + "\n  - ".join(problems))


def blis_yaml(vectors: BlisVectors) -> str:
    """Return the vectors as the YAML file that BLIS takes with --defaults-filepath (strict: these keys only)."""
    body = {
        "trained_physics_coefficients": {
            "alpha_coeffs": [float(v) for v in vectors.alpha],
            "beta_coeffs": [float(v) for v in vectors.beta],
        }
    }
    head = (
        f"# BLIS trained-physics coefficients of {vectors.configuration.config_id}, for this configuration only\n"
        "# alpha: microseconds; beta: "
        + ", ".join(BETA_LABELS[: len(vectors.beta)])
        + f" (b5, b6, b7, b8 in microseconds)\n# mean difference from the posterior mean: {vectors.projection_error:.2%}\n"
    )
    return head + yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=1000)


def blis_flags(vectors: BlisVectors) -> str:
    """Return the vectors and the engine's limits as flags of `blis run` or `blis replay`."""
    engine = vectors.configuration.engine
    flags = [
        "--latency-model trained-physics",
        "--alpha-coeffs " + ",".join(f"{v:.9g}" for v in vectors.alpha),
        "--beta-coeffs " + ",".join(f"{v:.9g}" for v in vectors.beta),
        f"--tp {engine.tensor_parallel}",
        f"--max-num-seqs {engine.max_num_seqs}",
        f"--max-num-batched-tokens {engine.max_num_batched_tokens}",
    ]
    block = engine.extra.get("block_size")
    if isinstance(block, int) and block > 0:
        # vLLM keeps one block of the KV cache for itself.
        flags += [
            f"--total-kv-blocks {int(engine.kv_capacity_tokens // block) - 1}",
            f"--block-size-in-tokens {block}",
        ]
    return " ".join(flags) + "\n"


def write_text(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a text file atomically; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}", suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
    umask = os.umask(0)
    os.umask(umask)
    Path(temporary).chmod(0o666 & ~umask)
    Path(temporary).replace(path)
    return path
