"""BLIS vectors as text: the YAML file, the flags and the hardware entry that belongs to them, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ExportError
from hfdtl_bayes.export.vectors import BETA_LABELS, BlisVectors, ExportSettings, coefficient_problems
from hfdtl_bayes.files import atomic

_SECTION = "trained_physics_coefficients"
_KEYS = ("alpha_coeffs", "beta_coeffs")


def blis_yaml(vectors: BlisVectors) -> str:
    """Return the vectors as the YAML file that BLIS takes with --defaults-filepath (strict: these keys only)."""
    body = {_SECTION: {"alpha_coeffs": [float(v) for v in vectors.alpha], "beta_coeffs": [float(v) for v in vectors.beta]}}
    head = [
        f"BLIS trained-physics coefficients of {vectors.configuration.config_id}",
        "alpha: a0, a1, a2 in microseconds",
        f"beta: {', '.join(BETA_LABELS[: len(vectors.beta)])} (b5, b6, b7, b8 in microseconds)",
        f"mean difference from the posterior mean: {vectors.projection_error:.2%}",
        *vectors.notes,
    ]
    comment = "".join(f"# {line}\n" for line in head)
    return comment + yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=1000)


def parse_blis_yaml(text: str, source: str = "BLIS YAML") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return alpha and beta of a BLIS defaults file, as strictly as BLIS reads it, and more so where BLIS is silent.

    Raises
    ------
    ExportError
        If it is not YAML, a key is unknown or missing, a value is no number, or the vectors are not what BLIS takes; every
        problem is listed.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ExportError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(data, Mapping) or set(data) != {_SECTION} or not isinstance(data[_SECTION], Mapping):
        found = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise ExportError(f"{source}: expected the key {_SECTION} with {' and '.join(_KEYS)} and nothing else, found {found}")
    body = data[_SECTION]
    if set(body) != set(_KEYS):
        raise ExportError(f"{source}: {_SECTION} holds {', '.join(map(str, body))}; accepted are exactly {', '.join(_KEYS)}")
    for key in _KEYS:
        values = body[key]
        if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise ExportError(f"{source}: {key} must be a list of numbers, found {values!r}")
    alpha, beta = (tuple(float(v) for v in body[key]) for key in _KEYS)
    problems = coefficient_problems(alpha, beta, ExportSettings())
    if problems:
        raise ExportError(f"{source} is not what BLIS takes:\n  - " + "\n  - ".join(problems))
    return alpha, beta


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
        "--latency-model trained-physics",
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
