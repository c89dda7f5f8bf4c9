"""BLIS vectors as text: the YAML file, the flags and the hardware entry that belongs to them, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ExportError
from hfdtl_bayes.export.older_backends import BLACKBOX, CROSSMODEL, older_section
from hfdtl_bayes.export.vectors import TRAINED_PHYSICS, Backend, BlisVectors, ExportSettings, coefficient_problems
from hfdtl_bayes.files import atomic

_SECTION = "trained_physics_coefficients"
_KEYS = ("alpha_coeffs", "beta_coeffs")
_ENTRY_KEYS = ("id", "GPU", "tensor_parallelism", "vllm_version", *_KEYS, "best_loss")


def blis_yaml(*vectors: BlisVectors) -> str:
    """Return vectors as the YAML file that BLIS takes with --defaults-filepath (strict: its keys only).

    Parameters
    ----------
    *vectors : BlisVectors
        One; of the blackbox backend as many as there are, one entry each.

    Raises
    ------
    ExportError
        If the file has no room for all of them.
    """
    backend = vectors[0].backend
    if backend.name == TRAINED_PHYSICS.name:
        if len(vectors) > 1:
            raise ExportError(
                f"a file of {backend.name} holds one set of coefficients, found {len(vectors)}; write one file each"
            )
        body: dict[str, Any] = {
            _SECTION: {"alpha_coeffs": [float(v) for v in vectors[0].alpha], "beta_coeffs": [float(v) for v in vectors[0].beta]}
        }
    else:
        body = older_section(vectors)
    comment = "".join(f"# {line}\n" for v in vectors for line in _head(v))
    return comment + yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=1000)


def _head(vectors: BlisVectors) -> list[str]:
    backend = vectors.backend
    labels = backend.beta[: len(vectors.beta)]
    times = [n for n in labels if n in backend.in_microseconds]
    units = "in microseconds" if len(times) == len(labels) else f"({', '.join(times)} in microseconds)"
    apart = vectors.not_told_apart
    return [
        f"BLIS {backend.name} coefficients of {vectors.configuration.config_id}",
        f"alpha: a0, a1, a2 in {', '.join(backend.alpha_units)}",
        f"beta: {', '.join(labels)} {units}",
        f"mean difference from the posterior mean: {vectors.projection_error:.2%}",
        *([f"single values not told apart, only their sum with others counts: {', '.join(apart)}"] if apart else []),
        *vectors.notes,
    ]


@dataclass(frozen=True)
class FileVectors:
    """Two vectors read from a file of BLIS.

    Attributes
    ----------
    backend : Backend
    name : str
        The model an entry of blackbox is of; empty for a set that is of no configuration in particular.
    alpha, beta : tuple of float
        As BLIS has them.
    """

    backend: Backend
    name: str
    alpha: tuple[float, ...]
    beta: tuple[float, ...]


def parse_blis_file(text: str, source: str = "BLIS YAML") -> tuple[FileVectors, ...]:
    """Return the vectors of a BLIS defaults file of any backend, as strictly as BLIS reads it, and more so where BLIS is silent.

    Raises
    ------
    ExportError
        If it is not YAML, a key is unknown or missing, a value is no number, or the vectors are not what BLIS takes; every
        problem is listed.
    """
    try:
        data = yaml.safe_load(text)
    # PyYAML lets the errors of its constructors through.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        raise ExportError(f"{source} is not valid YAML: {error}") from None
    sections = {_SECTION: TRAINED_PHYSICS, "crossmodel_defaults": CROSSMODEL, "models": BLACKBOX}
    found = next((n for n in sections if isinstance(data, Mapping) and set(data) == {n}), None)
    if found is None:
        shown = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise ExportError(
            f"{source}: expected the key {_SECTION} with {' and '.join(_KEYS)} and nothing else, found {shown}; "
            "of older BLIS also models or crossmodel_defaults alone"
        )
    backend, body = sections[found], data[found]
    if found != "models":
        return (_entry(body, backend, source, found, _KEYS),)
    if not isinstance(body, list) or not body:
        raise ExportError(f"{source}: models must be a list of entries, found {type(body).__name__}")
    return tuple(_entry(e, backend, source, f"models[{i}]", _ENTRY_KEYS) for i, e in enumerate(body))


def _entry(body: Any, backend: Backend, source: str, where: str, keys: tuple[str, ...]) -> FileVectors:
    if not isinstance(body, Mapping):
        raise ExportError(f"{source}: {where} must hold {' and '.join(keys)}, found {type(body).__name__}")
    if set(body) != set(keys):
        raise ExportError(f"{source}: {where} holds {', '.join(map(str, body))}; accepted are exactly {', '.join(keys)}")
    for key in _KEYS:
        values = body[key]
        if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise ExportError(f"{source}: {where}: {key} must be a list of numbers, found {values!r}")
    # A whole number beyond any float is as absurd as an infinity.
    alpha, beta = (tuple(_real(v) for v in body[key]) for key in _KEYS)
    problems = coefficient_problems(alpha, beta, ExportSettings(), backend)
    if problems:
        raise ExportError(f"{source}: {where} is not what BLIS takes:\n  - " + "\n  - ".join(problems))
    return FileVectors(backend, str(body.get("id", "")), alpha, beta)


def _real(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def parse_blis_yaml(text: str, source: str = "BLIS YAML") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return alpha and beta of a trained-physics file; raises ExportError as `parse_blis_file`, and for another backend."""
    found = parse_blis_file(text, source)
    if found[0].backend.name != TRAINED_PHYSICS.name:
        raise ExportError(f"{source} holds coefficients of {found[0].backend.name}; expected the key {_SECTION}")
    return found[0].alpha, found[0].beta


def blis_flags(
    vectors: BlisVectors,
    *,
    hardware_config: str | os.PathLike[str] | None = None,
    model_config_folder: str | os.PathLike[str] | None = None,
) -> str:
    """Return the vectors and the engine's limits as flags of `blis run` or `blis replay`, on one line.

    Parameters
    ----------
    vectors : BlisVectors
    hardware_config : path, optional
        File with the text of `blis_hardware_config`, to be passed on.
    model_config_folder : path, optional
        BLIS's folder of Hugging Face configs, to be passed on.
    """
    engine = vectors.configuration.engine
    flags = [
        f"--latency-model {vectors.backend.name}",
        # repr keeps every digit: the flags and the YAML file are the same numbers.
        "--alpha-coeffs " + ",".join(repr(float(v)) for v in vectors.alpha),
        "--beta-coeffs " + ",".join(repr(float(v)) for v in vectors.beta),
        f"--tp {engine.tensor_parallel}",
        f"--max-num-seqs {engine.max_num_seqs}",
        f"--max-num-batched-tokens {engine.max_num_batched_tokens}",
    ]
    block = engine.extra.get("block_size")
    if isinstance(block, int) and not isinstance(block, bool) and block > 0 and engine.kv_capacity_tokens >= 2 * block:
        # vLLM keeps one block of the KV cache for itself.
        flags += [
            f"--total-kv-blocks {int(engine.kv_capacity_tokens // block) - 1}",
            f"--block-size-in-tokens {block}",
        ]
    if hardware_config is not None:
        flags += [f"--hardware-config {os.fspath(hardware_config)}", f"--hardware {vectors.configuration.hardware.name}"]
    if model_config_folder is not None:
        flags.append(f"--model-config-folder {os.fspath(model_config_folder)}")
    return " ".join(flags) + "\n"


def blis_hardware_config(configuration: ServingConfiguration) -> str:
    """Return BLIS's hardware file (JSON) with the figures the coefficients are relative to.

    BLIS's own figures may differ a little (989.5 TFLOP/s where a datasheet rounds to 989), and every factor with them. The
    MFU entries are not used by trained-physics.
    """
    hardware = configuration.hardware
    entry = {
        "TFlopsPeak": hardware.peak_flops / 1e12,
        "TFlopsFP8": hardware.peak_flops_fp8 / 1e12,
        "BwPeakTBs": hardware.memory_bandwidth / 1e12,
        "mfuPrefill": 0.5,
        "mfuDecode": 0.5,
        "MemoryGiB": hardware.memory_bytes / 2**30,
    }
    return json.dumps({hardware.name: entry}, indent=2) + "\n"


def write_text(text: str, path: str | os.PathLike[str]) -> Path:
    """Write a text file atomically; returns its path. A file that was there stays as it was if writing fails."""
    path = Path(path)
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
    return path
