"""Bytes per number: data types and quantised weights, as `config.json` and vLLM's arguments name them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from hfdtl_bayes.errors import InputError

_DTYPES: Mapping[str, str] = {
    "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "half": "float16", "fp16": "float16",
    "float32": "float32", "float": "float32", "fp32": "float32",
}  # fmt: skip
_DTYPE_BYTES: Mapping[str, float] = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0}
_KV_BYTES: Mapping[str, float] = {"bfloat16": 2.0, "float16": 2.0, "half": 2.0, "float32": 4.0, "float": 4.0, "int8": 1.0}

_SCALE_BYTES = 2.0  # one 16-bit scale per group of a 4-bit format
_GROUP_SIZE = 128  # the usual group
# Bytes per parameter of a method that does not say its bits. The block formats carry a one-byte scale per 16 or 32.
_METHOD_BYTES: tuple[tuple[str, float], ...] = (
    ("nvfp4", 0.5 + 1 / 16), ("modelopt_fp4", 0.5 + 1 / 16), ("mxfp4", 0.5 + 1 / 32), ("modelopt_mxfp8", 1.0 + 1 / 32),
    ("mxfp8", 1.0 + 1 / 32), ("fp8", 1.0), ("fbgemm_fp8", 1.0), ("ptpc_fp8", 1.0), ("modelopt", 1.0), ("int8", 1.0),
    ("experts_int8", 1.0), ("compressed-tensors", 1.0), ("awq", 0.5 + _SCALE_BYTES / _GROUP_SIZE),
    ("gptq", 0.5 + _SCALE_BYTES / _GROUP_SIZE), ("bitsandbytes", 0.5 + _SCALE_BYTES / 64),
)  # fmt: skip


def dtype_name(config: Mapping[str, Any], flags: Mapping[str, Any], source: str) -> str:
    """Return the data type the engine computes in: bfloat16, float16 or float32.

    `--dtype` counts; `auto`, or none, is the checkpoint's own, except that vLLM serves float32 checkpoints in 16 bits
    unless it is told otherwise.

    Raises
    ------
    InputError
        If the type is unknown.
    """
    asked = str(flags.get("dtype", "auto")).lower()
    if asked != "auto":
        if asked not in _DTYPES:
            raise InputError(f"vLLM argument --dtype: unknown type {asked!r}; known are auto, {', '.join(_DTYPES)}")
        return _DTYPES[asked]
    found = config.get("torch_dtype", config.get("dtype", "bfloat16"))
    name = found.removeprefix("torch.") if isinstance(found, str) else ""
    if name.startswith("float8"):  # the matrices' type; the rest computes in 16 bits
        return "bfloat16"
    if name not in {*_DTYPES, "auto"}:
        raise InputError(f"{source}: torch_dtype: expected one of {', '.join(_DTYPES)}, found {reprlib.repr(found)}")
    return "bfloat16" if name == "auto" or _DTYPES[name] == "float32" else _DTYPES[name]


def kv_bytes_per_element(flags: Mapping[str, Any], dtype: str) -> float:
    """Return the bytes of one element of the KV cache: `--kv-cache-dtype`, or by default the engine's data type.

    Raises
    ------
    InputError
        If the type is unknown.
    """
    asked = str(flags.get("kv_cache_dtype", "auto")).lower()
    if asked == "auto":
        return _DTYPE_BYTES[dtype]
    if asked.startswith("fp8"):
        return 1.0
    if asked not in _KV_BYTES:
        raise InputError(f"vLLM argument --kv-cache-dtype: unknown type {asked!r}; known are auto, fp8, {', '.join(_KV_BYTES)}")
    return _KV_BYTES[asked]


def _positive(value: Any) -> float | None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6
    return float(value) if ok else None


def _weights_of_compressed_tensors(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how the first group of a compressed-tensors checkpoint stores weights: {num_bits, group_size, ...}."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            return weights
    return {}


def weight_bytes_per_param(config: Mapping[str, Any], flags: Mapping[str, Any], dtype: str, source: str) -> float:
    """Return the bytes of one parameter of the layers' matrices, scales of quantised groups included.

    bits / 8 + 2 / group_size for formats that say their bits; by method otherwise; the data type's without any.

    Raises
    ------
    InputError
        If the quantisation method is unknown or its settings are not an object.
    """
    settings = config.get("quantization_config", {})
    if not isinstance(settings, Mapping):
        raise InputError(f"{source}: quantization_config: expected an object, found {reprlib.repr(settings)}")
    own = str(settings.get("quant_method") or settings.get("quant_algo") or "").lower()
    method = str(flags.get("quantization") or own).lower()
    if method in {"", "none"}:
        return _DTYPE_BYTES[dtype]
    if own:  # a checkpoint that is quantised already cannot be served in another format
        stored = {**settings, **_weights_of_compressed_tensors(settings)}
        bits = next((b for key in ("bits", "num_bits", "w_bit") if (b := _positive(stored.get(key)))), None)
        if bits is not None and bits <= 32:
            given = stored.get("group_size", stored.get("q_group_size", _GROUP_SIZE))
            group = _positive(given if given is not None else -1)  # -1: one scale per channel, which weighs nothing
            return bits / 8 + (_SCALE_BYTES / group if group and bits < 8 else 0.0)
        if settings.get("load_in_8bit") is True:
            return 1.0
        if "fp4" in str(settings.get("quant_algo", "")).lower():
            method = "nvfp4"
    for name, size in _METHOD_BYTES:
        if method.startswith(name):
            return size
    known = ", ".join(name for name, _ in _METHOD_BYTES)
    raise InputError(
        f"{source}: unknown quantization method {method!r}; known are {known}. Or give weight_bytes_per_param in a "
        "configuration.yaml"
    )
