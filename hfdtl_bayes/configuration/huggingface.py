"""Serving configurations from what a vLLM user has: a Hugging Face `config.json`, a GPU name and vLLM's arguments."""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hfdtl_bayes.configuration.hardware import Hardware, gpu
from hfdtl_bayes.configuration.llm import LLMArchitecture
from hfdtl_bayes.configuration.quantities import LARGEST_COUNT
from hfdtl_bayes.configuration.serving import ServingConfiguration, configuration_from_mapping, explain
from hfdtl_bayes.configuration.vllm_arguments import Arguments, count, engine_settings, parse_arguments, quantity
from hfdtl_bayes.configuration.weight_formats import dtype_name, kv_bytes_per_element, weight_bytes_per_param
from hfdtl_bayes.errors import InputError, MissingInputError

# Where a multimodal model keeps the description of its language model.
_NESTED = ("text_config", "llm_config", "language_config")
# One quantity, as the families call it; the first that is present counts.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_FFN = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
_VOCABULARY = ("vocab_size", "padded_vocab_size")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k")
# Families whose FFN is two matrices without a gate, four times as wide as the model unless told otherwise.
_WITHOUT_GATE = frozenset(
    {"bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "nemotron", "opt", "phi"}
    | {"RefinedWebModel", "starcoder2"}
)
# Families that share embedding and output head unless `tie_word_embeddings` says otherwise; the others do not.
_TIED = frozenset(
    {"bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode", "mpt", "opt"}
    | {"RefinedWebModel"}
)

DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_BLOCK_SIZE = 16
DEFAULT_GPU_MEMORY_UTILIZATION = 0.9
"""vLLM's defaults where neither `config.json` nor an argument says."""


class _Keys:
    """The keys of a `config.json`, read with their types checked; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: Path) -> None:
        self.values = {k: v for k, v in values.items() if v is not None}
        self.source = source

    def fail(self, key: str, accepted: str) -> InputError:
        return InputError(f"{self.source}: {key}: expected {accepted}, found {reprlib.repr(self.values[key])}")

    def first(self, names: tuple[str, ...], *, minimum: int = 1, maximum: int = LARGEST_COUNT) -> int | None:
        for key in names:
            if key not in self.values:
                continue
            value = self.values[key]
            whole = isinstance(value, int | float) and not isinstance(value, bool)
            if not whole or not minimum <= value <= maximum or value != int(value):
                raise self.fail(key, f"a whole number from {minimum} to {maximum}")
            return int(value)
        return None

    def need(self, names: tuple[str, ...], *, maximum: int = LARGEST_COUNT) -> int:
        value = self.first(names, maximum=maximum)
        if value is None:
            known = ", ".join(sorted(map(str, self.values))[:40]) or "nothing"
            raise InputError(f"{self.source}: missing key {names[0]!r}; found {known}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key, {})
        if not isinstance(value, Mapping):
            raise self.fail(key, "an object")
        return value

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, "text")
        return value

    def whole_numbers(self, key: str) -> list[int]:
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
            raise self.fail(key, "a list of whole numbers")
        return value


def _read(path: Path) -> _Keys:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInputError(f"no Hugging Face config at {path}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise InputError(f"{path}: expected a JSON object, found {type(config).__name__}")
    keys = _Keys(config, path)
    for name in _NESTED:
        inner = _Keys(keys.mapping(name), path)
        keys = _Keys({**keys.values, **inner.values}, path)
    if keys.flag("is_encoder_decoder", False):
        raise InputError(f"{path}: an encoder-decoder model; only decoder-only models are described")
    return keys


def _moe_layers(keys: _Keys, num_layers: int) -> int:
    """Count the layers with experts: by list, by stride, or all but the first few, as the families say it."""
    every = keys.first(("decoder_sparse_step",), minimum=0) or 1
    dense = set(keys.whole_numbers("mlp_only_layers"))
    if dense or every > 1:  # Qwen MoE
        return sum(1 for i in range(num_layers) if i not in dense and (i + 1) % every == 0)
    if keys.values.get("moe_layers"):  # Llama 4, by list
        return len({i for i in keys.whole_numbers("moe_layers") if 0 <= i < num_layers})
    stride = keys.first(("interleave_moe_layer_step",), minimum=0) or 1
    if stride > 1:  # Llama 4, by stride: layers stride - 1, 2 * stride - 1, ...
        return num_layers // stride
    skipped = keys.first(("first_k_dense_replace",), minimum=0, maximum=num_layers) or 0
    frequency = keys.values.get("moe_layer_freq", 1)
    if isinstance(frequency, list):  # one 0 or 1 per layer
        return sum(1 for v in keys.whole_numbers("moe_layer_freq")[:num_layers] if v)
    step = keys.first(("moe_layer_freq",)) or 1
    return sum(1 for i in range(num_layers) if i >= skipped and i % step == 0)


def _moe_fields(keys: _Keys, num_layers: int, intermediate: int) -> dict[str, Any]:
    experts = keys.first(_EXPERTS, minimum=0) or 0
    if not experts:
        return {}
    width = keys.first(("moe_intermediate_size",)) or intermediate
    shared = keys.first(("shared_expert_intermediate_size",), minimum=0)
    if shared is None:
        shared = (keys.first(("n_shared_experts",), minimum=0, maximum=10_000) or 0) * width
    fields: dict[str, Any] = {}
    if "interleave_moe_layer_step" in keys.values or keys.values.get("model_type") == "llama4_text":
        # Llama 4: `intermediate_size` is the expert's, and there is one shared expert.
        width = shared = intermediate
        fields["intermediate_size"] = keys.first(("intermediate_size_mlp",)) or intermediate
    return fields | {
        "num_experts": experts,
        "num_experts_per_token": keys.need(_TOP_K),
        "num_moe_layers": _moe_layers(keys, num_layers),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": shared,
    }


def _attention_fields(keys: _Keys, num_layers: int, hidden: int, kv_bytes: float) -> dict[str, Any]:
    heads = keys.need(_HEADS)
    if "kv_lora_rank" in keys.values:
        return _latent_attention_fields(keys, num_layers, hidden, heads, kv_bytes)
    kv_heads = keys.first(_KV_HEADS)
    grouped = keys.flag("new_decoder_architecture", False)  # Falcon: `multi_query` counts only without it
    if keys.flag("multi_query", False) and not grouped and keys.values.get("model_type") != "chatglm":
        kv_heads = 1
    head_dim = keys.first(("head_dim", "kv_channels"))
    if head_dim is None:
        if hidden % heads:
            raise InputError(
                f"{keys.source}: hidden_size ({hidden}) is no multiple of num_attention_heads ({heads}); give head_dim"
            )
        head_dim = hidden // heads
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads or heads, "head_dim": head_dim}


def _latent_attention_fields(keys: _Keys, num_layers: int, hidden: int, heads: int, kv_bytes: float) -> dict[str, Any]:
    """Describe multi-head latent attention (DeepSeek V2, V3) by multi-query attention of the same size.

    Per token and layer the cache holds kv_lora_rank + qk_rope_head_dim elements, whole on every GPU, as one KV head
    would be. The head dimension is the one at which hidden * head_dim * (2 * heads + 2) equals the parameters of
    q_proj (or its two low-rank factors), kv_a_proj, kv_b_proj and o_proj.
    """
    latent, rope = keys.need(("kv_lora_rank",)), keys.need(("qk_rope_head_dim",))
    nope, value = keys.need(("qk_nope_head_dim",)), keys.need(("v_head_dim",))
    query_rank = keys.first(("q_lora_rank",))
    query_width = heads * (nope + rope)
    query = (hidden + query_width) * query_rank if query_rank else hidden * query_width
    params = query + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": max(1, round(params / (hidden * (2 * heads + 2)))),
        "kv_bytes_per_token": num_layers * (latent + rope) * kv_bytes,
    }


def _intermediate_size(keys: _Keys, hidden: int, without_gate: bool) -> int:
    width = keys.first(_FFN) if without_gate else keys.need(_FFN)
    if width is None:
        width = (keys.first(("expansion_ratio",)) or 4) * hidden
    return round(width * 2 / 3) if without_gate else width


def _name(keys: _Keys, flags: Mapping[str, Any]) -> str:
    given = str(flags.get("model") or keys.text("_name_or_path"))
    if given.startswith((".", "/", "~")) or not given.strip():
        given = keys.source.resolve().parent.name  # a path says where the model was, not what it is
    return re.sub(r"[^\w./+-]+", "-", given, flags=re.ASCII).strip("/.-") or "model"


def _architecture(keys: _Keys, flags: Mapping[str, Any]) -> LLMArchitecture:
    layers, hidden = keys.need(_LAYERS, maximum=100_000), keys.need(_HIDDEN)
    family = keys.text("model_type")
    without_gate = family in _WITHOUT_GATE
    dtype = dtype_name(keys.values, flags, str(keys.source))
    weight_bytes = weight_bytes_per_param(keys.values, flags, dtype, str(keys.source))
    kv_bytes = kv_bytes_per_element(flags, dtype)
    intermediate = _intermediate_size(keys, hidden, without_gate)
    context = keys.first(_CONTEXT) or DEFAULT_CONTEXT_TOKENS
    if str(flags.get("max_model_len", "auto")).strip() not in {"auto", "-1"}:
        context = count(flags, "max_model_len")
    fields: dict[str, Any] = {
        "name": _name(keys, flags),
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": keys.need(_VOCABULARY),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", family in _TIED),
        "weight_bytes_per_param": weight_bytes,
        "kv_bytes_per_element": kv_bytes,
        "max_context_tokens": context,
    }
    fields |= _attention_fields(keys, layers, hidden, kv_bytes)
    fields |= _moe_fields(keys, layers, intermediate)
    try:
        return LLMArchitecture(**fields)
    except ValidationError as error:
        raise InputError(explain(error, str(keys.source), "Hugging Face config")) from None


def llm_from_huggingface(path: str | os.PathLike[str], vllm_args: Arguments = ()) -> LLMArchitecture:
    """Read an architecture from a Hugging Face `config.json`.

    Understands Llama, Mistral, Mixtral, Qwen 2 and 3, Qwen MoE (shared experts, sparse steps), DeepSeek-like
    (`n_routed_experts`, `n_shared_experts`, `first_k_dense_replace`, latent attention), Llama 4-like
    (`interleave_moe_layer_step`, nested `text_config`), Falcon- and GPT-like (multi-query attention, FFN without a
    gate) keys, and FP8, INT8, AWQ, GPTQ and other 4-bit weights. Sliding windows and layers without attention are
    taken for full attention: set `kv_bytes_per_token` for those.

    Parameters
    ----------
    path : path
        `config.json`, or the folder that holds it.
    vllm_args : str, sequence or mapping
        `--dtype`, `--quantization`, `--kv-cache-dtype` and `--max-model-len` are heeded here.

    Raises
    ------
    MissingInputError, InputError
        If the file is absent, not JSON, or a key is missing or holds what it cannot hold; the key is named.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    return _architecture(_read(path), parse_arguments(vllm_args))


def _kv_capacity_tokens(llm: LLMArchitecture, device: Hardware, engine: Mapping[str, Any], flags: Mapping[str, Any]) -> float:
    block = count(flags, "block_size") if "block_size" in flags else DEFAULT_BLOCK_SIZE
    if "num_gpu_blocks_override" in flags:
        return float(count(flags, "num_gpu_blocks_override") * block)
    tp, dp = int(engine.get("tensor_parallel", 1)), int(engine.get("data_parallel", 1))
    if "kv_cache_memory_bytes" in flags:
        left = float(count(flags, "kv_cache_memory_bytes"))
    else:
        share = DEFAULT_GPU_MEMORY_UTILIZATION
        if "gpu_memory_utilization" in flags:
            share = quantity(flags, "gpu_memory_utilization", maximum=1.0)
        offloaded = quantity(flags, "cpu_offload_gb", unit="GiB") * 2.0**30 if "cpu_offload_gb" in flags else 0.0
        experts = llm.num_moe_layers * llm.num_experts * llm.expert_params * llm.weight_bytes_per_param
        weights = max(0.0, (llm.weight_bytes - experts) / tp + experts / (tp * dp) - offloaded)
        left = share * device.memory_bytes - weights
        if left <= 0:
            raise InputError(
                f"{llm.name} does not fit: its weights take {weights / 1e9:.1f} GB of each of {tp} x {device.name}, and "
                f"utilization {share:g} leaves {share * device.memory_bytes / 1e9:.1f} GB; raise --tensor-parallel-size"
            )
    per_gpu = llm.kv_bytes_per_token / min(tp, llm.num_key_value_heads)
    blocks = int(left / per_gpu / block)
    if blocks < 1:
        raise InputError(f"{llm.name}: {left / 1e9:.3g} GB are left for the KV cache of {device.name}, less than one block")
    return float(blocks * block)


def configuration_from_huggingface(
    config_json: str | os.PathLike[str],
    hardware: str | Hardware,
    vllm_args: Arguments = (),
    config_id: str | None = None,
) -> ServingConfiguration:
    """Build a serving configuration from a Hugging Face config, a GPU and vLLM's arguments.

    The KV capacity is `--num-gpu-blocks-override` times `--block-size` where given; otherwise, in whole blocks,
    `--kv-cache-memory-bytes` or what `--gpu-memory-utilization` (0.9) leaves on each GPU after its weights, over the
    KV bytes per token and GPU (KV heads are replicated where there are fewer of them than GPUs). The latter ignores
    activations and so is some per cent too high: pass ``{"kv_capacity_tokens": n}`` with vLLM's own figure, which its
    log calls "GPU KV cache size". Arguments that are not used are kept with the engine.

    Parameters
    ----------
    config_json : path
        `config.json`, or the folder that holds it.
    hardware : str or Hardware
        Name of a GPU of the catalogue, or its figures.
    vllm_args : str, sequence of str or mapping
        As typed after ``vllm serve``, for example ``["--tensor-parallel-size", "2"]``; or a mapping.
    config_id : str, optional
        Defaults to ``<model>_<gpu>_tp<n>``.

    Raises
    ------
    InputError, MissingInputError, UnknownNameError
        With the file and field at fault.
    """
    path = Path(config_json)
    keys = _read(path / "config.json" if path.is_dir() else path)
    flags = parse_arguments(vllm_args)
    llm = _architecture(keys, flags)
    device = gpu(hardware) if isinstance(hardware, str) else hardware
    engine = engine_settings(flags, device, llm.max_context_tokens)
    engine["dtype"] = dtype_name(keys.values, flags, str(keys.source))
    if "kv_capacity_tokens" not in engine:
        engine["kv_capacity_tokens"] = _kv_capacity_tokens(llm, device, engine, flags)
    name = config_id or f"{llm.name.replace('/', '--')}_{device.name}_tp{engine.get('tensor_parallel', 1)}"
    data = {"config_id": name, "llm": llm, "hardware": device, "engine": engine}
    return configuration_from_mapping(data, f"configuration from {config_json}")
