"""vLLM's command line: what its arguments say about the engine, and the defaults of those left out."""

from __future__ import annotations

import re
import reprlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hfdtl_bayes.configuration.hardware import Hardware
from hfdtl_bayes.configuration.serving import VLLM_NAMES, EngineSettings
from hfdtl_bayes.errors import InputError

Arguments = str | Mapping[str, Any] | Sequence[Any]

_BOOLEAN = frozenset({"prefix_caching", "chunked_prefill", "expert_parallel", "cpu_offload"})
_COUNTS = frozenset({"tensor_parallel", "data_parallel", "max_num_seqs", "max_num_batched_tokens"})
_YES, _NO = frozenset({"true", "1", "yes", "on"}), frozenset({"false", "0", "no", "off"})
# vLLM's suffixes: a small letter counts in thousands, a capital in 1024s.
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_SHORT = {"q": "quantization", "pp": "pipeline_parallel_size"}

LARGE_MEMORY_BYTES = 70 * 2.0**30
"""vLLM gives GPUs with at least this much memory, the A100 excepted, the larger batch defaults."""


def parse_arguments(arguments: Arguments) -> dict[str, Any]:
    """Return vLLM's arguments by name, with underscores and without leading dashes.

    Parameters
    ----------
    arguments : str, sequence or mapping
        As typed after ``vllm serve`` (a model name in front becomes `model`), split or not; or a mapping, whose
        entries that are None count as not given. A flag without a value is True; one with several keeps them joined
        by spaces; one given twice keeps the last.

    Raises
    ------
    InputError
        If the text cannot be split or a value stands where a flag should.
    """
    if isinstance(arguments, Mapping):
        named = {str(k).lstrip("-").replace("-", "_"): v for k, v in arguments.items() if v is not None}
        return {_SHORT.get(k, k): v for k, v in named.items()}
    try:
        items = shlex.split(arguments) if isinstance(arguments, str) else [str(item) for item in arguments]
    except (TypeError, ValueError) as error:
        raise InputError(f"vLLM arguments cannot be split into words: {error}") from None
    flags: dict[str, Any] = {}
    if items and not _is_flag(items[0]):
        flags["model"] = items.pop(0)
    while items:
        item = items.pop(0)
        if not _is_flag(item):
            raise InputError(f"vLLM arguments: expected a flag beginning with '-', found {item!r}")
        name, assigned, value = item.lstrip("-").partition("=")
        values = [value] if assigned else []
        while not assigned and items and not _is_flag(items[0]):
            values.append(items.pop(0))
        key = name.replace("-", "_")
        flags[_SHORT.get(key, key)] = " ".join(values) if values else True
    return flags


def _is_flag(item: str) -> bool:
    return re.match(r"--?[A-Za-z]", item) is not None


def count(flags: Mapping[str, Any], name: str) -> int:
    """Return a positive whole number; text may end in vLLM's k, m, g (thousands) or K, M, G (1024s).

    Raises
    ------
    InputError
        Names the argument.
    """
    value = flags[name]
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([kKmMgG]?)", value.strip()) if isinstance(value, str) else None
    number = float(found[1]) * _SUFFIX[found[2]] if found else value
    if isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < 1e15 and number == int(number):
        return int(number)
    raise InputError(f"vLLM argument {_spell(name)}: expected a positive whole number, found {reprlib.repr(value)}")


def quantity(flags: Mapping[str, Any], name: str, *, maximum: float = float("inf"), unit: str = "") -> float:
    """Return a finite number >= 0 and <= `maximum`.

    Raises
    ------
    InputError
        Names the argument.
    """
    value = flags[name]
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if 0 <= number <= maximum and number != float("inf"):
        return number
    limit = f"from 0 to {maximum:g}" if maximum != float("inf") else "not below 0"
    raise InputError(f"vLLM argument {_spell(name)}: expected a number {limit}{unit and ' ' + unit}, found {reprlib.repr(value)}")


def _truth(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text in _YES | _NO:
        return text in _YES
    raise InputError(f"vLLM argument {_spell(name)}: expected true or false, found {reprlib.repr(value)}")


def _spell(name: str) -> str:
    return "--" + name.replace("_", "-")


def default_batch(device: Hardware) -> tuple[int, int]:
    """Return vLLM's server defaults (max_num_batched_tokens, max_num_seqs) on a GPU (V1 engine, 0.10 and later)."""
    large = device.memory_bytes >= LARGE_MEMORY_BYTES and "a100" not in device.name.lower()
    return (8192, 1024) if large else (2048, 256)


def engine_settings(flags: Mapping[str, Any], device: Hardware, max_context_tokens: int) -> dict[str, Any]:
    """Return the engine's fields from parsed arguments, without the KV capacity unless it is given.

    Arguments this package does not use are kept as given. `max_num_batched_tokens` and `max_num_seqs` default to what
    the vLLM server takes on the device; without chunked prefill the former is at least the context length.

    Raises
    ------
    InputError
        If a value does not fit its argument, or an argument asks for what is not modelled (pipeline parallelism).
    """
    if "pipeline_parallel_size" in flags and count(flags, "pipeline_parallel_size") > 1:
        raise InputError("vLLM argument --pipeline-parallel-size: pipeline parallelism is not modelled; use 1")
    engine: dict[str, Any] = {"name": "vllm", "prefix_caching": True, "chunked_prefill": True}
    for flag, value in flags.items():
        plain = flag.removeprefix("no_")
        field = VLLM_NAMES.get(plain, plain)
        if field in _BOOLEAN:
            engine[field] = _truth(flag, value) != flag.startswith("no_")
        elif field == "extra":
            raise InputError("vLLM has no argument --extra; give each argument by its own name")
        elif flag != plain:
            engine[flag] = value
        else:
            engine[field] = count(flags, flag) if field in _COUNTS else value
    if "cpu_offload_gb" in flags:
        engine["cpu_offload"] = quantity(flags, "cpu_offload_gb", unit="GiB") > 0
    batched, seqs = default_batch(device)
    if not engine["chunked_prefill"]:
        batched = max(batched, max_context_tokens)
    engine.setdefault("max_num_batched_tokens", batched)
    engine.setdefault("max_num_seqs", min(seqs, engine["max_num_batched_tokens"]))
    unknown = {k: v for k, v in engine.items() if k not in EngineSettings.model_fields}
    return {k: v for k, v in engine.items() if k not in unknown} | {"extra": unknown}
