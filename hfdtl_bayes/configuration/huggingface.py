"""Serving configurations from what a vLLM user has: a Hugging Face `config.json`, a GPU name and vLLM's arguments."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfdtl_bayes.configuration.hardware import Hardware, gpu
from hfdtl_bayes.configuration.llm import LLMArchitecture
from hfdtl_bayes.configuration.serving import ServingConfiguration, configuration_from_mapping
from hfdtl_bayes.errors import InputError, MissingInputError

# vLLM flags that change latency, with the engine field they set. Any other flag is kept as text.
_FLAGS: Mapping[str, str] = {
    "tensor-parallel-size": "tensor_parallel",
    "tp": "tensor_parallel",
    "data-parallel-size": "data_parallel",
    "dp": "data_parallel",
    "max-num-seqs": "max_num_seqs",
    "max-num-batched-tokens": "max_num_batched_tokens",
    "dtype": "dtype",
    "enable-prefix-caching": "prefix_caching",
    "enable-chunked-prefill": "chunked_prefill",
    "enable-expert-parallel": "expert_parallel",
}
_BOOLEAN = {"prefix_caching", "chunked_prefill", "expert_parallel"}
_DTYPE_BYTES = {"bfloat16": 2.0, "float16": 2.0, "half": 2.0, "float32": 4.0, "float": 4.0, "auto": 2.0}
# Bytes per parameter of a quantised weight; 4-bit formats carry one 16-bit scale per group of 128.
_QUANTISED_BYTES = {"fp8": 1.0, "int8": 1.0, "compressed-tensors": 1.0, "modelopt": 1.0, "awq": 0.5 + 2 / 128, "gptq": 0.5 + 2 / 128, "mxfp4": 0.5 + 1 / 32, "bitsandbytes": 0.5 + 2 / 64}  # fmt: skip

# Defaults of the vLLM server (V1 engine, 0.10 and later) on a data-centre GPU.
_ENGINE_DEFAULTS: Mapping[str, Any] = {
    "name": "vllm", "tensor_parallel": 1, "data_parallel": 1, "expert_parallel": False, "max_num_seqs": 256,
    "max_num_batched_tokens": 8192, "prefix_caching": True, "chunked_prefill": True, "cpu_offload": False,
}  # fmt: skip


def _flags(arguments: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    if isinstance(arguments, Mapping):
        return {str(k).lstrip("-").replace("_", "-"): v for k, v in arguments.items()}
    flags: dict[str, Any] = {}
    items = list(arguments)
    i = 0
    while i < len(items):
        item = items[i]
        if not item.startswith("-"):
            raise InputError(f"vLLM arguments: expected a flag beginning with '-', found {item!r}")
        name, _, value = item.lstrip("-").partition("=")
        if value:
            flags[name.replace("_", "-")] = value
        elif i + 1 < len(items) and not items[i + 1].startswith("-"):
            i += 1
            flags[name.replace("_", "-")] = items[i]
        else:
            flags[name.replace("_", "-")] = True
        i += 1
    return flags


def _number(flags: Mapping[str, Any], name: str, kind: type) -> Any:
    try:
        return kind(flags[name])
    except (TypeError, ValueError):
        raise InputError(f"vLLM argument --{name}: expected a number, found {flags[name]!r}") from None


def _weight_bytes(config: Mapping[str, Any], flags: Mapping[str, Any]) -> float:
    quantisation = config.get("quantization_config") or {}
    method = str(flags.get("quantization") or quantisation.get("quant_method") or "").lower()
    if not method or method == "none":
        dtype = str(flags.get("dtype") or config.get("torch_dtype") or config.get("dtype") or "bfloat16")
        dtype = str(config.get("torch_dtype") or "bfloat16") if dtype == "auto" else dtype
        return _DTYPE_BYTES.get(dtype, 2.0)
    bits = quantisation.get("bits") or quantisation.get("num_bits")
    if bits:
        return float(bits) / 8 + (2 / float(quantisation.get("group_size") or 128) if float(bits) < 8 else 0.0)
    for key, size in _QUANTISED_BYTES.items():
        if method.startswith(key):
            return size
    raise InputError(
        f"unknown quantization method {method!r}; known are {', '.join(_QUANTISED_BYTES)}. Or give "
        "weight_bytes_per_param in a configuration.yaml"
    )


def _moe_layers(config: Mapping[str, Any], num_layers: int) -> int:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) not in (0, 1):
        step, dense = int(config.get("decoder_sparse_step", 1)), set(config.get("mlp_only_layers") or ())
        return sum(1 for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    if config.get("interleave_moe_layer_step", 1) not in (0, 1):
        return num_layers // int(config["interleave_moe_layer_step"])
    return num_layers - int(config.get("first_k_dense_replace", 0))


def llm_from_huggingface(path: str | os.PathLike[str], vllm_args: Mapping[str, Any] | Sequence[str] = ()) -> LLMArchitecture:
    """Read an architecture from a Hugging Face `config.json`.

    Understands Llama, Mistral, Mixtral, Qwen 2 and 3, Qwen MoE (shared experts, sparse steps), DeepSeek-like
    (`n_routed_experts`, `n_shared_experts`, `first_k_dense_replace`) and Llama 4-like (`interleave_moe_layer_step`,
    nested `text_config`) keys, and FP8, AWQ, GPTQ quantisation.

    Raises
    ------
    MissingInputError, InputError
        If the file is absent, not JSON, or lacks a needed key, which is named.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInputError(f"no Hugging Face config at {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise InputError(f"{path}: expected a JSON object, found {type(config).__name__}")
    flags = _flags(vllm_args)
    text = {**config, **config.get("text_config", {})}

    def need(key: str) -> int:
        if key not in text:
            raise InputError(f"{path}: missing key {key!r}; found {', '.join(sorted(text))}")
        return int(text[key])

    layers, hidden, heads = need("num_hidden_layers"), need("hidden_size"), need("num_attention_heads")
    experts = int(text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 0)
    fields: dict[str, Any] = {
        "name": str(config.get("_name_or_path") or path.parent.name or "model"),
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": int(text.get("num_key_value_heads") or heads),
        "head_dim": int(text.get("head_dim") or hidden // heads),
        "intermediate_size": need("intermediate_size"),
        "vocab_size": need("vocab_size"),
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "weight_bytes_per_param": _weight_bytes(text, flags),
        "kv_bytes_per_element": 1.0 if str(flags.get("kv-cache-dtype", "auto")).startswith("fp8") else 2.0,
        "max_context_tokens": int(flags.get("max-model-len") or text.get("max_position_embeddings") or 4096),
    }
    if str(flags.get("kv-cache-dtype", "auto")) == "auto" and fields["weight_bytes_per_param"] == 4.0:
        fields["kv_bytes_per_element"] = 4.0
    if experts:
        width = text.get("moe_intermediate_size") or text["intermediate_size"]
        shared = text.get("shared_expert_intermediate_size") or int(text.get("n_shared_experts") or 0) * int(width)
        if text.get("interleave_moe_layer_step"):  # Llama 4: `intermediate_size` is the expert's, one shared expert
            width, shared = text["intermediate_size"], text["intermediate_size"]
            fields["intermediate_size"] = int(text.get("intermediate_size_mlp") or text["intermediate_size"])
        fields.update(
            num_experts=experts,
            num_experts_per_token=int(text.get("num_experts_per_tok") or text.get("num_experts_per_token") or 1),
            num_moe_layers=_moe_layers(text, layers),
            moe_intermediate_size=int(width),
            shared_expert_intermediate_size=int(shared),
        )
    return LLMArchitecture(**fields)


def configuration_from_huggingface(
    config_json: str | os.PathLike[str],
    hardware: str | Hardware,
    vllm_args: Mapping[str, Any] | Sequence[str] = (),
    config_id: str | None = None,
) -> ServingConfiguration:
    """Build a serving configuration from a Hugging Face config, a GPU and vLLM's arguments.

    The KV capacity is `--num-gpu-blocks-override` times `--block-size` where given, and otherwise what
    `--gpu-memory-utilization` (0.9) leaves after the weights: (utilization * memory * tp - weights) / (KV bytes per
    token), which ignores activations and so is some per cent too high.

    Parameters
    ----------
    config_json : path
        `config.json`, or the folder that holds it.
    hardware : str or Hardware
        Name of a GPU of the catalogue, or its figures.
    vllm_args : mapping or sequence of str
        As typed after `vllm serve`, for example ``["--tensor-parallel-size", "2"]``; or a mapping.
    config_id : str, optional
        Defaults to ``<model>_<gpu>_tp<n>``.

    Raises
    ------
    InputError, MissingInputError, UnknownNameError
        With the file and field at fault.
    """
    flags = _flags(vllm_args)
    llm = llm_from_huggingface(config_json, vllm_args)
    device = gpu(hardware) if isinstance(hardware, str) else hardware
    engine: dict[str, Any] = dict(_ENGINE_DEFAULTS)
    for flag, value in flags.items():
        negated = flag.startswith("no-")
        target = _FLAGS.get(flag.removeprefix("no-"))
        if target in _BOOLEAN:
            engine[target] = not negated and str(value).lower() not in {"false", "0"}
        elif target == "dtype":
            engine[target] = str(value)
        elif target:
            engine[target] = _number(flags, flag, int)
    engine["cpu_offload"] = float(flags.get("cpu-offload-gb") or 0) > 0
    tp = int(engine["tensor_parallel"])
    if "num-gpu-blocks-override" in flags:
        block = _number(flags, "block-size", int) if "block-size" in flags else 16
        engine["kv_capacity_tokens"] = float(_number(flags, "num-gpu-blocks-override", int) * block)
    else:
        share = _number(flags, "gpu-memory-utilization", float) if "gpu-memory-utilization" in flags else 0.9
        left = share * device.memory_bytes * tp - llm.weight_bytes
        if left <= 0:
            raise InputError(
                f"{llm.name} does not fit: its weights take {llm.weight_bytes / 1e9:.1f} GB and {tp} x {device.name} at "
                f"utilization {share} leave {share * device.memory_bytes * tp / 1e9:.1f} GB; raise --tensor-parallel-size"
            )
        engine["kv_capacity_tokens"] = left / llm.kv_bytes_per_token
    name = config_id or f"{llm.name.replace('/', '--')}_{device.name}_tp{tp}"
    data = {"config_id": name, "llm": llm, "hardware": device, "engine": engine}
    return configuration_from_mapping(data, f"configuration from {config_json}")
