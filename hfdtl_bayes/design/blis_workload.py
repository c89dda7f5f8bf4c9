"""A traffic plan as workload files of BLIS (`--workload-spec`, version 2).

One file per segment: with several clients in one file, windows of activity share the rate between them differently from release to
release, and closed loops know no windows. BLIS reads strictly, an unknown key is fatal; `check_workload` does the same. Facts of its
reader that shape the files:

- a client has `rate_fraction` of `aggregate_rate` (requests/s), or a `concurrency` of its own, never both;
- lengths are gaussian, exponential, pareto_lognormal, constant or empirical; a uniform range is an empirical table, its keys token counts;
- `prefix_length` comes in front of what `input_distribution` draws;
- an open loop ends after `num_requests`. A horizon would drop requests in flight without a word, so none is given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hfdtl_bayes.design.traffic_plan import PlannedSegment, TrafficPlan
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.files import atomic
from hfdtl_bayes.replay import Lengths

_TABLE = 64
"""Lengths in an empirical table at most; of a wider range, evenly spaced quantiles."""

_SPEC_KEYS = {"version", "seed", "category", "aggregate_rate", "num_requests", "clients"}
_CLIENT_KEYS = {
    "id", "tenant_id", "slo_class", "rate_fraction", "concurrency", "streaming", "arrival", "input_distribution", "output_distribution",
    "prefix_group", "prefix_length",
}  # fmt: skip
_PARAMETERS = {
    "gaussian": {"mean", "std_dev", "min", "max"},
    "exponential": {"mean"},
    "pareto_lognormal": {"alpha", "xm", "mu", "sigma", "mix_weight"},
    "constant": {"value"},
}


def _lengths(middle: int, ratio: float) -> dict[str, Any]:
    drawn = Lengths.around(middle, ratio)
    low, high = int(drawn.low), int(drawn.high)
    if low == high:
        return {"type": "constant", "params": {"value": float(low)}}
    count = min(high - low + 1, _TABLE)
    values = np.floor(low + (np.arange(count) + 0.5) / count * (high - low + 1)).astype(int)
    return {"type": "empirical", "params": {str(v): 1.0 / count for v in values}}


def blis_workload(segment: PlannedSegment) -> dict[str, Any]:
    """Return the workload of one segment as BLIS takes it."""
    point = segment.traffic
    client: dict[str, Any] = {
        "id": point.name,
        "tenant_id": "plan",
        "slo_class": "standard",
        "streaming": True,
        "input_distribution": _lengths(point.prompt_tokens, point.range_ratio),
        "output_distribution": _lengths(point.output_tokens, point.range_ratio),
    }
    if point.shared_prefix_tokens:
        client |= {"prefix_group": point.name, "prefix_length": point.shared_prefix_tokens}
    spec: dict[str, Any] = {"version": "2", "seed": segment.seed, "category": "language", "num_requests": segment.num_prompts}
    if point.request_rate_per_s is None:
        client["concurrency"] = point.concurrency
    elif point.concurrency is None:
        client |= {"rate_fraction": 1.0, "arrival": {"process": "poisson"}}
        spec["aggregate_rate"] = point.request_rate_per_s
    else:
        raise InputError(
            f"traffic {point.name!r} has a rate and a limit of requests in flight; a client of BLIS has one of the two"
        )
    return check_workload({**spec, "clients": [client]})


def check_workload(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a workload that BLIS would, or would misread; returns it.

    Raises
    ------
    InputError
        Names the field, what it holds and what is accepted.
    """

    def refuse(where: str, what: str) -> InputError:
        return InputError(f"BLIS workload: {where} {what}")

    _known("the workload", spec, _SPEC_KEYS)
    clients = spec.get("clients") or []
    if not clients:
        raise refuse("clients", "is empty; give at least one")
    _positive("num_requests", spec.get("num_requests"), whole=True)
    for i, client in enumerate(clients):
        where = f"client {i}"
        _known(where, client, _CLIENT_KEYS)
        if ("concurrency" in client) == ("rate_fraction" in client):
            raise refuse(where, "needs one of concurrency and rate_fraction")
        if "concurrency" in client:
            _positive(f"{where}: concurrency", client["concurrency"], whole=True)
        else:
            _positive(f"{where}: rate_fraction", client["rate_fraction"])
            _positive("aggregate_rate", spec.get("aggregate_rate"))
            if client.get("arrival") != {"process": "poisson"}:
                raise refuse(where, f"has arrival {client.get('arrival')}; a plan's is {{process: poisson}}")
        if "prefix_length" in client:
            _positive(f"{where}: prefix_length", client["prefix_length"], whole=True)
            if not client.get("prefix_group"):
                raise refuse(where, "has a prefix_length without the prefix_group that shares it, which BLIS ignores")
        for name in ("input_distribution", "output_distribution"):
            _distribution(f"{where}: {name}", client.get(name))
    return dict(spec)


def _known(where: str, found: Mapping[str, Any], accepted: set[str]) -> None:
    unknown = sorted(set(found) - accepted)
    if unknown:
        raise InputError(
            f"BLIS workload: {where} has unknown key(s) {', '.join(unknown)}; BLIS knows {', '.join(sorted(accepted))}"
        )


def _positive(where: str, value: Any, *, whole: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value) and value > 0
    if not number or (whole and value != int(value)):
        kind = "a whole number from 1" if whole else "a finite number above 0"
        raise InputError(f"BLIS workload: {where} is {value!r}; accepted is {kind}")


def _distribution(where: str, found: Any) -> None:
    if not isinstance(found, Mapping) or set(found) != {"type", "params"}:
        raise InputError(f"BLIS workload: {where} is {found!r}; accepted are a type and its params")
    kind, params = found["type"], found["params"]
    if kind == "empirical":
        if not params or not all(isinstance(k, str) and k.isdecimal() and int(k) >= 1 for k in params):
            raise InputError(f"BLIS workload: {where}: the keys of an empirical table are token counts from 1, as text")
        for key, share in params.items():
            _positive(f"{where}: share of {key} tokens", share)
        return
    if kind not in _PARAMETERS:
        raise InputError(f"BLIS workload: {where} is of type {kind!r}; BLIS knows {', '.join([*_PARAMETERS, 'empirical'])}")
    if set(params) != _PARAMETERS[kind]:
        raise InputError(
            f"BLIS workload: {where}: {kind} takes {', '.join(sorted(_PARAMETERS[kind]))}, found {', '.join(sorted(params)) or 'nothing'}"
        )


def write_blis_workloads(plan: TrafficPlan, path: str | os.PathLike[str]) -> list[Path]:
    """Write a plan as BLIS workload files, each whole or not at all: `path` for one segment, numbered beside it for several.

    Raises
    ------
    InputError
        If the plan has no segments, or a segment is nothing that BLIS can send.
    """
    path = Path(path)
    if not plan.segments:
        raise InputError(
            f"the plan of {plan.config_id!r} has no segments to send: {plan.reason or 'a verdict is expected to accept as it is'}"
        )
    specs = [blis_workload(s) for s in plan.segments]
    paths = [path] if len(specs) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(1, len(specs) + 1)]
    for spec, own in zip(specs, paths, strict=True):
        with atomic(own) as part:
            part.write_text(yaml.safe_dump(spec, sort_keys=False, width=120), encoding="utf-8")
    return paths
