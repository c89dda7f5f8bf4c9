"""What a simulated run is judged by: latencies of its requests by phase of the traffic, throughput, and objectives attained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.traces import drop_warmup

LATENCIES = ("ttft_s", "itl_s", "e2e_s")
"""Time to first token, time between tokens, time to last token, each in seconds."""
ALL = "all"
"""The phase that stands for the whole run, warm-up left out."""


@dataclass(frozen=True)
class Objectives:
    """Service-level objectives of a request, seconds; None for none.

    A request attains them if it keeps all that are set; `itl_s` is of its mean time between tokens.
    """

    ttft_s: float | None = None
    itl_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no objective can be.

        Raises
        ------
        InputError
            Naming the field.
        """
        for name, value in vars(self).items():
            if value is not None and not (np.isfinite(value) and value > 0):
                raise InputError(f"objective {name} is {value}; accepted are finite numbers of seconds above 0")

    @property
    def any(self) -> bool:
        """Whether one is set."""
        return any(v is not None for v in vars(self).values())


@dataclass(frozen=True)
class MetricSettings:
    """What is computed of each run.

    Attributes
    ----------
    percentiles : tuple of float
        Of each latency, from 0 to 100.
    objectives : Objectives
    """

    percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)
    objectives: Objectives = Objectives()

    def __post_init__(self) -> None:
        """Refuse percentiles outside 0 to 100.

        Raises
        ------
        InputError
            Naming it.
        """
        for p in self.percentiles:
            if not 0 <= p <= 100:
                raise InputError(f"percentile {p:g}; accepted are numbers from 0 to 100")


def request_latencies(requests: pd.DataFrame) -> pd.DataFrame:
    """Return `regime`, `output_tokens`, `ttft_s`, `itl_s`, `e2e_s` and `between_s` of finished requests.

    Parameters
    ----------
    requests : DataFrame
        `arrival_s`, `first_token_s`, `finished_s`, `output_tokens`; `regime` where there are phases. Requests without an end are left
        out.
    """
    done = requests[requests["finished_s"].notna() & requests["first_token_s"].notna()]
    between = done["finished_s"] - done["first_token_s"]
    tokens = done["output_tokens"] - 1
    return pd.DataFrame(
        {
            "regime": done["regime"].astype(str) if "regime" in done.columns else ALL,
            "arrival_s": done["arrival_s"],
            "finished_s": done["finished_s"],
            "output_tokens": done["output_tokens"],
            "between_s": between,
            "ttft_s": done["first_token_s"] - done["arrival_s"],
            "itl_s": (between / tokens.clip(lower=1)).where(tokens > 0),
            "e2e_s": done["finished_s"] - done["arrival_s"],
        }
    )


def run_metrics(requests: pd.DataFrame, settings: MetricSettings | None = None) -> dict[tuple[str, str], float]:
    """Return the metrics of one run by (phase, name).

    For each regime and for all requests outside warm-up: `ttft_mean_s`, `itl_mean_s`, `e2e_mean_s`, their percentiles
    (`ttft_p99_s`), `slo_attainment` where objectives are set; for all also `requests_per_s` and `output_tokens_per_s`, from the first
    arrival to the last end. `itl_mean_s` is per token: time between first and last tokens over all tokens but the first.
    """
    settings = settings or MetricSettings()
    latencies = request_latencies(drop_warmup(requests) if "regime" in requests.columns else requests)
    found: dict[tuple[str, str], float] = {}
    phases = [] if latencies["regime"].nunique() < 2 else list(latencies.groupby("regime", sort=False))
    for phase, own in [*phases, (ALL, latencies)]:
        for name, value in _phase(own, settings).items():
            found[str(phase), name] = value
    if len(latencies):
        span = float(latencies["finished_s"].max() - latencies["arrival_s"].min())
        found[ALL, "requests_per_s"] = len(latencies) / span
        found[ALL, "output_tokens_per_s"] = float(latencies["output_tokens"].sum()) / span
    return found


def _phase(own: pd.DataFrame, settings: MetricSettings) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in LATENCIES:
        short, values = name.removesuffix("_s"), own[name].dropna().to_numpy(dtype=float)
        if not len(values):
            continue
        found[f"{short}_mean_s"] = float(values.mean())
        for p, value in zip(settings.percentiles, np.percentile(values, settings.percentiles), strict=True):
            found[f"{short}_p{p:g}_s"] = float(value)
    tokens = float((own["output_tokens"] - 1).clip(lower=0).sum())
    if tokens:
        found["itl_mean_s"] = float(own["between_s"].sum()) / tokens
    if settings.objectives.any and len(own):
        kept = np.ones(len(own), dtype=bool)
        for name, limit in vars(settings.objectives).items():
            # A single token has no time between tokens, and keeps any objective on it.
            kept &= True if limit is None else ~(own[name].to_numpy(dtype=float) > limit)
        found["slo_attainment"] = float(kept.mean())
    return found
