"""Architectures from Hugging Face configs, against parameter counts and file sizes published for the real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfdtl_bayes.configuration import LLMArchitecture, llm_from_huggingface
from hfdtl_bayes.errors import InputError

LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3_70B = {**LLAMA_3_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
MIXTRAL_8X7B = {
    **LLAMA_3_8B, "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_attention_heads": 32, "num_hidden_layers": 48, "num_key_value_heads": 4, "vocab_size": 151936, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip
QWEN2_57B_A14B = {
    "model_type": "qwen2_moe", "hidden_size": 3584, "intermediate_size": 18944, "moe_intermediate_size": 2560,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 151936, "num_experts": 64,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 20480, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "max_position_embeddings": 131072,
}  # fmt: skip
DEEPSEEK_MOE_16B = {
    "model_type": "deepseek", "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16, "vocab_size": 102400,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "max_position_embeddings": 4096,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    **DEEPSEEK_MOE_16B, "model_type": "deepseek_v2", "num_hidden_layers": 27, "kv_lora_rank": 512, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
DEEPSEEK_V3 = {
    **DEEPSEEK_V2_LITE, "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 61,
    "vocab_size": 129280, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "q_lora_rank": 1536, "max_position_embeddings": 163840,
}  # fmt: skip
LLAMA_4_SCOUT_TEXT = {
    "model_type": "llama4_text", "hidden_size": 5120, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "interleave_moe_layer_step": 1, "num_attention_heads": 40, "num_hidden_layers": 48, "num_key_value_heads": 8,
    "num_local_experts": 16, "num_experts_per_tok": 1, "vocab_size": 202048, "max_position_embeddings": 10485760,
    "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_4_SCOUT = {"model_type": "llama4", "text_config": LLAMA_4_SCOUT_TEXT, "vision_config": {"hidden_size": 1408}}
LLAMA_4_MAVERICK = {
    "model_type": "llama4",
    "text_config": {**LLAMA_4_SCOUT_TEXT, "num_local_experts": 128, "interleave_moe_layer_step": 2},
}
FALCON_7B = {
    "model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "multi_query": True,
    "new_decoder_architecture": False, "vocab_size": 65024, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN25_05B = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA_2_2B = {
    "model_type": "gemma2", "hidden_size": 2304, "head_dim": 256, "intermediate_size": 9216, "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "vocab_size": 256000, "torch_dtype": "float32",
}  # fmt: skip


def read(folder: Path, config: dict[str, Any], vllm_args: Any = ()) -> LLMArchitecture:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return llm_from_huggingface(path, vllm_args)


@pytest.mark.parametrize(
    ("config", "published", "tolerance"),
    [
        # Tensor counts of the published checkpoints; biases and per-head norms (under 0.02 %) are not described.
        pytest.param(LLAMA_3_8B, 8_030_261_248, 0, id="llama-3-8b"),
        pytest.param(LLAMA_3_70B, 70_553_706_496, 0, id="llama-3-70b"),
        pytest.param(MIXTRAL_8X7B, 46_702_792_704, 0, id="mixtral-8x7b"),
        pytest.param(QWEN3_30B_A3B, 30_532_122_624, 1e-6, id="qwen3-30b-a3b"),
        pytest.param(DEEPSEEK_MOE_16B, 16_375_728_128, 1e-5, id="deepseek-moe-16b"),
        pytest.param(DEEPSEEK_V2_LITE, 15_706_484_224, 1e-3, id="deepseek-v2-lite"),
        pytest.param(QWEN25_05B, 494_032_768, 2e-4, id="qwen2.5-0.5b"),
        pytest.param(GEMMA_2_2B, 2_614_341_888, 2e-4, id="gemma-2-2b"),
        # The models' cards, to the digits they give.
        pytest.param(QWEN2_57B_A14B, 57.41e9, 1e-3, id="qwen2-57b-a14b"),
        pytest.param(DEEPSEEK_V3, 671e9, 2e-3, id="deepseek-v3"),
        pytest.param(LLAMA_4_SCOUT, 109e9, 1.5e-2, id="llama-4-scout"),  # the card counts the vision encoder, 0.9e9
        pytest.param(LLAMA_4_MAVERICK, 400e9, 5e-3, id="llama-4-maverick"),
    ],
)
def test_derived_parameters_are_those_of_the_published_model(
    tmp_path: Path, config: dict[str, Any], published: float, tolerance: float
) -> None:
    assert read(tmp_path, config).params_total == pytest.approx(published, rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("config", "published", "tolerance"),
    [
        pytest.param(MIXTRAL_8X7B, 12.9e9, 0.02, id="mixtral-8x7b"),
        pytest.param(QWEN3_30B_A3B, 3.3e9, 0.1, id="qwen3-30b-a3b"),  # cards differ by the embedding, counted or not
        pytest.param(QWEN2_57B_A14B, 14.2e9, 0.05, id="qwen2-57b-a14b"),
        pytest.param(DEEPSEEK_MOE_16B, 2.8e9, 0.1, id="deepseek-moe-16b"),
        pytest.param(DEEPSEEK_V2_LITE, 2.4e9, 0.1, id="deepseek-v2-lite"),
        pytest.param(DEEPSEEK_V3, 37e9, 0.02, id="deepseek-v3"),
        pytest.param(LLAMA_4_SCOUT, 17e9, 0.06, id="llama-4-scout"),
        pytest.param(LLAMA_4_MAVERICK, 17e9, 0.06, id="llama-4-maverick"),
    ],
)
def test_active_parameters_are_those_of_the_model_card(
    tmp_path: Path, config: dict[str, Any], published: float, tolerance: float
) -> None:
    llm = read(tmp_path, config)
    assert llm.params_active == pytest.approx(published, rel=tolerance)
    assert llm.flops_per_token == pytest.approx(2 * llm.params_active, rel=1e-3)


def test_multi_query_attention_and_an_ffn_without_a_gate(tmp_path: Path) -> None:
    llm = read(tmp_path, FALCON_7B)
    assert (llm.num_key_value_heads, llm.head_dim, llm.tie_word_embeddings) == (1, 64, True)
    # The published checkpoint (7,217,189,760 elements) stores the shared table twice.
    assert llm.params_total + llm.head_params == pytest.approx(7_217_189_760, rel=1e-4)
    assert llm.kv_bytes_per_token == 2 * 32 * 1 * 64 * 2  # K and V, layers, one head, its width, bytes


def test_grouped_query_attention_sets_the_kv_bytes(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA_3_8B).kv_bytes_per_token == 131_072  # 128 KiB per token, as vLLM's documentation says
    assert read(tmp_path, {**LLAMA_3_8B, "num_key_value_heads": None}).kv_bytes_per_token == 4 * 131_072
    assert read(tmp_path, LLAMA_3_8B, "--kv-cache-dtype fp8").kv_bytes_per_token == 65_536


def test_latent_attention_caches_one_latent_vector_per_layer(tmp_path: Path) -> None:
    llm = read(tmp_path, DEEPSEEK_V3)
    assert llm.kv_bytes_per_token == 61 * (512 + 64) * 2  # 70,272 bytes: 70 KB in the DeepSeek-V3 report
    assert llm.num_key_value_heads == 1


def test_moe_layers_by_stride_by_list_and_after_dense_ones(tmp_path: Path) -> None:
    scout, maverick = read(tmp_path, LLAMA_4_SCOUT), read(tmp_path, LLAMA_4_MAVERICK)
    assert (scout.num_moe_layers, maverick.num_moe_layers, maverick.num_dense_layers) == (48, 24, 24)
    assert (maverick.moe_intermediate_size, maverick.shared_expert_intermediate_size) == (8192, 8192)
    assert maverick.intermediate_size == 16384
    listed = {**LLAMA_4_SCOUT_TEXT, "moe_layers": [1, 3, 5]}
    assert read(tmp_path, listed).num_moe_layers == 3
    assert read(tmp_path, DEEPSEEK_MOE_16B).num_dense_layers == 1
    assert read(tmp_path, {**DEEPSEEK_MOE_16B, "moe_layer_freq": 2}).num_moe_layers == 13  # layers 2, 4, ..., 26
    assert read(tmp_path, {**DEEPSEEK_MOE_16B, "moe_layer_freq": [0] * 20 + [1] * 8}).num_moe_layers == 8
    assert read(tmp_path, {**QWEN3_30B_A3B, "decoder_sparse_step": 2, "mlp_only_layers": [1]}).num_moe_layers == 23


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    tied = read(tmp_path, {**LLAMA_3_8B, "tie_word_embeddings": True})
    assert read(tmp_path, LLAMA_3_8B).params_total - tied.params_total == 4096 * 128256
    assert tied.params_active == read(tmp_path, LLAMA_3_8B).params_active
    assert read(tmp_path, GEMMA_2_2B).tie_word_embeddings  # the family's default, which its config.json omits
    assert not read(tmp_path, {k: v for k, v in LLAMA_3_8B.items() if k != "tie_word_embeddings"}).tie_word_embeddings


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
W4A16 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}, "targets": ["Linear"]}},
}


@pytest.mark.parametrize(
    ("config", "quantisation", "gigabytes"),
    [
        # Sizes of the safetensors files of published checkpoints, GB.
        pytest.param(LLAMA_3_8B, None, 16.06, id="llama-3-8b bf16"),
        pytest.param(LLAMA_3_8B, {"quant_method": "fp8"}, 9.08, id="llama-3-8b fp8"),
        pytest.param(LLAMA_3_8B, AWQ, 5.73, id="llama-3-8b awq"),
        pytest.param(LLAMA_3_8B, W4A16, 5.73, id="llama-3-8b w4a16"),
        pytest.param(LLAMA_3_70B, AWQ, 39.77, id="llama-3-70b awq"),
    ],
)
def test_weight_bytes_are_the_size_of_the_published_files(
    tmp_path: Path, config: dict[str, Any], quantisation: dict[str, Any] | None, gigabytes: float
) -> None:
    llm = read(tmp_path, {**config, "quantization_config": quantisation})
    assert llm.weight_bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)


@pytest.mark.parametrize(
    ("change", "vllm_args", "expected"),
    [
        ({}, "", 2.0),
        ({"torch_dtype": "float32"}, "", 2.0),  # vLLM serves float32 checkpoints in 16 bits ...
        ({"torch_dtype": "float32"}, "--dtype float32", 4.0),  # ... unless told otherwise
        ({"torch_dtype": None, "dtype": "torch.float16"}, "", 2.0),
        ({}, "--quantization fp8", 1.0),
        ({}, ["-q", "fp8"], 1.0),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "", 1.0),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 128}}, "", 1.0),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}, "", 0.5 + 2 / 32),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1}}, "", 0.5),
        ({"quantization_config": AWQ}, "--quantization awq_marlin", 0.5 + 2 / 128),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "", 0.5 + 1 / 32),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "", 0.5 + 1 / 16),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "", 1.0),
    ],
)
def test_bytes_per_weight(tmp_path: Path, change: dict[str, Any], vllm_args: Any, expected: float) -> None:
    assert read(tmp_path, {**LLAMA_3_8B, **change}, vllm_args).weight_bytes_per_param == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "missing key 'hidden_size'"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers: expected a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a whole number"),
        ({"vocab_size": -1}, "vocab_size: expected a whole number"),
        ({"intermediate_size": 1.5}, "intermediate_size: expected a whole number"),
        ({"num_attention_heads": 31, "num_key_value_heads": 31}, "no multiple of num_attention_heads"),
        ({"num_key_value_heads": 5}, "must divide num_attention_heads"),
        ({"text_config": 5}, "text_config: expected an object"),
        ({"quantization_config": [1]}, "quantization_config: expected an object"),
        ({"quantization_config": {"quant_method": "magic"}}, "unknown quantization method 'magic'"),
        ({"torch_dtype": "int3"}, "torch_dtype: expected one of"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false"),
        ({"num_local_experts": 8}, "missing key 'num_experts_per_tok'"),
        ({"num_local_experts": 8, "num_experts_per_tok": 9}, "between 1 and num_experts"),
        ({"is_encoder_decoder": True}, "only decoder-only models"),
    ],
)
def test_a_bad_key_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, {**LLAMA_3_8B, **change})
    assert "config.json" in str(caught.value)
