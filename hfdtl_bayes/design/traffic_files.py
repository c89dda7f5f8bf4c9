"""Traffic written down by a person: the deployment mix as a YAML file.

- name: chat
  weight: 3                                   # share of steps; 1 by default
  concurrency: 64                             # or request_rate_per_s, or both
  prompt_tokens: {lognormal: {median: 600, log_sd: 0.9, high: 8000}}
  output_tokens: {uniform: [50, 400]}         # or a number
  shared_prefix_tokens: 0
  duration_s: 60                              # or num_requests
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hfdtl_bayes.errors import InputError, MissingInputError
from hfdtl_bayes.replay import Lengths, Traffic

DEFAULT_DURATION_S = 30.0
"""How long traffic of a file is replayed that says neither duration nor number of requests."""

_KEYS = {
    "name", "weight", "request_rate_per_s", "concurrency", "prompt_tokens", "output_tokens", "shared_prefix_tokens", "duration_s",
    "num_requests",
}  # fmt: skip


def read_traffic(path: str | os.PathLike[str]) -> list[tuple[Traffic, float]]:
    """Read a deployment mix; returns traffic with its weight.

    Raises
    ------
    MissingInputError
        If there is no such file.
    InputError
        Naming the entry and field that is not accepted, what was found and what is accepted.
    """
    path = Path(path)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInputError(f"no traffic file at {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, list) or not found:
        raise InputError(f"{path} must hold a list of traffic, one entry at least; found {type(found).__name__}")
    return [_traffic(entry, f"{path}, entry {i}") for i, entry in enumerate(found, 1)]


def _traffic(entry: Any, where: str) -> tuple[Traffic, float]:
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} is {entry!r}; accepted are the keys {', '.join(sorted(_KEYS))}")
    unknown = sorted(str(k) for k in set(entry) - _KEYS)
    if unknown:
        raise InputError(f"{where} has unknown key(s) {', '.join(unknown)}; accepted are {', '.join(sorted(_KEYS))}")
    values = dict(entry)
    weight = _number(values.pop("weight", 1.0), f"{where}: weight")
    if not 0 < weight < float("inf"):
        raise InputError(f"{where}: weight is {weight:g}; accepted are finite numbers above 0")
    prompt, output = (_lengths(values.pop(name, None), f"{where}: {name}") for name in ("prompt_tokens", "output_tokens"))
    name = str(values.pop("name", "deployment"))
    numbers: dict[str, Any] = {k: _number(v, f"{where}: {k}") for k, v in values.items()}
    for key in ("concurrency", "num_requests", "shared_prefix_tokens"):
        if key in numbers and numbers[key] == int(numbers[key]):
            numbers[key] = int(numbers[key])
    if "duration_s" not in numbers and "num_requests" not in numbers:
        numbers["duration_s"] = DEFAULT_DURATION_S
    try:
        return Traffic(prompt, output, name=name, **numbers), weight
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where} is {value!r}; accepted is a number")
    return float(value)


def _lengths(found: Any, where: str) -> Lengths:
    forms = "a number of tokens, {uniform: [low, high]} or {lognormal: {median: ..., log_sd: ..., low: ..., high: ...}}"
    if isinstance(found, int | float) and not isinstance(found, bool):
        return _made(lambda: Lengths.fixed(found), where)
    if isinstance(found, Mapping) and len(found) == 1:
        (kind, values), *_ = found.items()
        if kind == "uniform" and isinstance(values, list) and len(values) == 2:
            low, high = (_number(v, where) for v in values)
            return _made(lambda: Lengths.uniform(low, high), where)
        if (
            kind == "lognormal"
            and isinstance(values, Mapping)
            and {"median", "log_sd"} <= set(values) <= {"median", "log_sd", "low", "high"}
        ):
            named = {str(k): _number(v, f"{where}: {k}") for k, v in values.items()}
            return _made(lambda: Lengths.lognormal(**named), where)
    raise InputError(f"{where} is {found!r}; accepted is {forms}")


def _made(make: Any, where: str) -> Lengths:
    try:
        made: Lengths = make()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return made
