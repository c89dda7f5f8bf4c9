"""Serving configurations from a Hugging Face config, a GPU and vLLM's arguments; arbitrary JSON never ends in a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_configuration_models import DEEPSEEK_V3, LLAMA_3_8B, MIXTRAL_8X7B, QWEN2_57B_A14B

from hfdtl_bayes.configuration import (
    ServingConfiguration,
    configuration_from_huggingface,
    gpu,
    read_configuration,
    write_configuration,
)
from hfdtl_bayes.errors import HfdtlError, InputError, MissingInputError, UnknownNameError


@pytest.fixture(scope="module")
def config_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "llama-3-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return folder / "config.json"


def test_every_vllm_argument_is_heeded_or_kept(config_json: Path) -> None:
    arguments = [
        "meta-llama/Meta-Llama-3-8B", "-tp", "2", "--max-num-seqs=128", "--max-num-batched-tokens", "4k",
        "--no-enable-prefix-caching", "--block-size", 32, "--num-gpu-blocks-override", "1000", "--seed", "-1", "--enforce-eager",
        "--served-model-name", "a", "b", "--compilation-config", '{"level": 3}', "--dtype", "half", "--version", "0.11.0",
    ]  # fmt: skip
    configuration = configuration_from_huggingface(config_json, "H100", arguments)
    engine = configuration.engine
    assert (engine.tensor_parallel, engine.max_num_seqs, engine.max_num_batched_tokens) == (2, 128, 4000)
    assert (engine.prefix_caching, engine.chunked_prefill, engine.dtype, engine.version) == (False, True, "float16", "0.11.0")
    assert engine.kv_capacity_tokens == 32_000
    assert engine.extra == {
        "model": "meta-llama/Meta-Llama-3-8B", "block_size": "32", "num_gpu_blocks_override": "1000", "seed": "-1",
        "enforce_eager": True, "served_model_name": "a b", "compilation_config": '{"level": 3}',
    }  # fmt: skip
    assert configuration.config_id == "meta-llama--Meta-Llama-3-8B_h100_sxm_tp2"


def test_text_list_and_mapping_mean_the_same(config_json: Path) -> None:
    text = configuration_from_huggingface(config_json, "h100", "--tensor-parallel-size 4 --max-model-len 1K")
    words = configuration_from_huggingface(config_json, "h100", ["--tensor-parallel-size=4", "--max_model_len", "1024"])
    named = configuration_from_huggingface(config_json, "h100", {"tensor_parallel_size": 4, "max-model-len": 1024, "seed": None})
    assert text.llm == words.llm == named.llm
    assert text.llm.max_context_tokens == 1024
    assert text.engine.tensor_parallel == words.engine.tensor_parallel == named.engine.tensor_parallel == 4
    assert "seed" not in named.engine.extra


def test_batch_defaults_are_those_of_the_vllm_server(config_json: Path) -> None:
    def defaults(name: str, arguments: str = "") -> tuple[int, int]:
        engine = configuration_from_huggingface(config_json, name, arguments).engine
        return engine.max_num_batched_tokens, engine.max_num_seqs

    assert defaults("h100") == defaults("mi300x") == (8192, 1024)
    assert defaults("a100") == defaults("l40s") == (2048, 256)
    assert defaults("l40s", "--no-enable-chunked-prefill") == (8192, 256)  # a prompt must fit: the context length


def test_kv_capacity_is_what_the_weights_leave(config_json: Path) -> None:
    def capacity(arguments: Any = (), name: str = "h100") -> float:
        return configuration_from_huggingface(config_json, name, arguments).engine.kv_capacity_tokens

    # 0.9 * 80 GiB less 16.06 GB of weights, over 128 KiB per token.
    assert capacity() == pytest.approx((0.9 * 80 * 2**30 - 16.06e9) / 131072, rel=1e-3)
    assert capacity() % 16 == 0
    # Eight KV heads divide by 16 GPUs only down to one each, so the cache grows with half the GPUs.
    assert capacity("-tp 16") == pytest.approx((0.9 * 80 * 2**30 - 16.06e9 / 16) / (131072 / 8), rel=1e-3)
    assert capacity({"kv_cache_memory_bytes": 2**30}) == 8192
    assert capacity({"kv_capacity_tokens": 143413}) == 143413
    assert capacity({"cpu_offload_gb": 4}) - capacity() == pytest.approx(4 * 2**30 / 131072, abs=16)
    with pytest.raises(InputError, match="does not fit"):
        capacity({"gpu_memory_utilization": 0.1})
    with pytest.raises(InputError, match="does not fit"):
        capacity((), "t4")


def test_a_latent_kv_cache_is_whole_on_every_gpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**DEEPSEEK_V3, "quantization_config": {"quant_method": "fp8"}}))
    configuration = configuration_from_huggingface(tmp_path, "h200", "--tensor-parallel-size 8", "deepseek")
    left = 0.9 * 141 * 2**30 - configuration.llm.weight_bytes / 8
    assert configuration.engine.kv_capacity_tokens == pytest.approx(left / (61 * 576 * 2), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tensor-parallel-size two", "--tensor-parallel-size: expected a positive whole number, found 'two'"),
        ("--tensor-parallel-size", "--tensor-parallel-size: expected a positive whole number, found True"),
        ("--max-num-seqs 0", "--max-num-seqs: expected a positive whole number"),
        ({"max_num_seqs": float("inf")}, "--max-num-seqs: expected a positive whole number"),
        ("--gpu-memory-utilization 90", "--gpu-memory-utilization: expected a number from 0 to 1"),
        ("--gpu-memory-utilization nan", "--gpu-memory-utilization: expected a number from 0 to 1"),
        ("--cpu-offload-gb lots", "--cpu-offload-gb: expected a number not below 0 GiB"),
        ("--enable-prefix-caching maybe", "--enable-prefix-caching: expected true or false"),
        ("--dtype int3", "--dtype: unknown type 'int3'"),
        ("--kv-cache-dtype int3", "--kv-cache-dtype: unknown type 'int3'"),
        ("--pipeline-parallel-size 2", "pipeline parallelism is not modelled"),
        ("--tensor-parallel-size 3", "does not divide llm.num_attention_heads"),
        ("--max-num-seq 5", "did you mean 'max_num_seqs'"),
        ("--extra 1", "no argument --extra"),
        ("model another", "expected a flag beginning with '-', found 'another'"),
        ("'unbalanced", "cannot be split into words"),
        (5, "cannot be split into words"),
        ({"seed": object()}, "not plain data"),
    ],
)
def test_a_bad_argument_is_named(config_json: Path, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        configuration_from_huggingface(config_json, "h100", arguments)


def test_missing_files_and_unknown_gpus(tmp_path: Path, config_json: Path) -> None:
    with pytest.raises(MissingInputError, match="no Hugging Face config"):
        configuration_from_huggingface(tmp_path, "h100")
    with pytest.raises(UnknownNameError, match="did you mean h100"):
        configuration_from_huggingface(config_json, "h1000")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": 1e999999, "b": ' + "9" * 5000 + "}", "[1]", "null", "\ufeff{}"])
def test_text_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        configuration_from_huggingface(tmp_path, "h100")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(InputError, match="is not valid JSON"):
        configuration_from_huggingface(tmp_path, "h100")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([0, -1, 1, 2, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted({*LLAMA_3_8B, *MIXTRAL_8X7B, *QWEN2_57B_A14B, *DEEPSEEK_V3} | {
    "head_dim", "text_config", "llm_config", "quantization_config", "mlp_only_layers", "moe_layers", "interleave_moe_layer_step",
    "intermediate_size_mlp", "multi_query", "n_layer", "expansion_ratio", "_name_or_path", "is_encoder_decoder", "dtype",
})  # fmt: skip


@settings(max_examples=300)
@given(
    base=st.sampled_from([{}, LLAMA_3_8B, MIXTRAL_8X7B, QWEN2_57B_A14B, DEEPSEEK_V3]),
    change=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=5),
    nested=st.none() | st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3),
    arguments=st.dictionaries(
        st.sampled_from(["tensor_parallel_size", "max_model_len", "dtype", "block_size", "x"]),
        json_values.filter(lambda value: "nan" not in repr(value)),  # unequal to itself after the round trip below
    ),
)
def test_any_json_gives_a_configuration_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory,
    base: dict[str, Any],
    change: dict[str, Any],
    nested: dict[str, Any] | None,
    arguments: dict[str, Any],
) -> None:
    folder = tmp_path_factory.mktemp("hf")
    document = {**base, **change} | ({} if nested is None else {"text_config": nested})
    (folder / "config.json").write_text(json.dumps(document))
    try:
        configuration = configuration_from_huggingface(folder, gpu("h200"), arguments, "any")
    except HfdtlError:
        return
    assert isinstance(configuration, ServingConfiguration)
    assert configuration.llm.params_total > 0
    write_configuration(configuration, folder / "configuration.yaml")
    assert read_configuration(folder / "configuration.yaml") == configuration
