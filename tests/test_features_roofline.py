"""The default features, against values worked out by hand from their formulas, and what they promise for any batch."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping, gpu_names
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import Level, feature_set, physics
from hfdtl_bayes.features.feature import QUANTITIES

# P = 1e12 FLOP/s (2e12 in FP8), W = 1e11 byte/s, links of 1e10 byte/s: round numbers.
HARDWARE = {
    "name": "round", "peak_flops": 1e12, "peak_flops_fp8": 2e12, "memory_bandwidth": 1e11, "memory_bytes": 1e10,
    "interconnect_bandwidth": 1e10,
}  # fmt: skip
SHAPE = {
    "name": "x", "num_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
    "intermediate_size": 16, "vocab_size": 10, "max_context_tokens": 2000,
}  # fmt: skip
LIMITS = {"max_num_seqs": 40, "max_num_batched_tokens": 512, "kv_capacity_tokens": 5000}
EXPERTS = {"num_experts": 8, "num_experts_per_token": 2, "moe_intermediate_size": 4}


def _configuration(llm: dict | None = None, hardware: dict | str | None = None, **engine: object) -> ServingConfiguration:
    hardware = hardware if isinstance(hardware, str) else HARDWARE | (hardware or {})
    return configuration_from_mapping(
        {"config_id": "x", "llm": SHAPE | (llm or {}), "hardware": hardware, "engine": LIMITS | engine}
    )


def _batch(prefill: float = 0, decode: float = 0, requests: float = 1, pairs: float = 0, context: float = 0) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prefill_tokens": [float(prefill)],
            "decode_tokens": [float(decode)],
            "prefill_requests": [float(requests)],
            "decode_requests": [float(decode)],
            "prefill_attention_tokens": [float(pairs)],
            "context_tokens": [float(context)],
        }
    )


DENSE = _configuration()
MOE = _configuration(EXPERTS)
FP8 = {"weight_bytes_per_param": 1.0}
INT4 = {"weight_bytes_per_param": 0.515625}

# At tp 1 a layer has QKV 8*(4 + 2*2)*2 = 128, output 8*8 = 64, gate and up 8*32 = 256, down 16*8 = 128 parameters, and the
# head 8*10 = 80. At tp 4 each GPU has one query head and, as there are fewer KV heads than GPUs, one whole KV head: QKV
# 8*(1 + 2)*2 = 48.
WEIGHT_BYTES = {
    "tp 1": (_configuration(), (2 * (128 + 64 + 256 + 128) + 80) * 2),
    "tp 2": (_configuration(tensor_parallel=2), (2 * (64 + 32 + 128 + 64) + 40) * 2),
    "tp 4": (_configuration(tensor_parallel=4), (2 * (48 + 16 + 64 + 32) + 20) * 2),
    "fp8, head at 16 bits": (_configuration(FP8), 2 * 576 * 1 + 80 * 2),
    "int4, head at 16 bits": (_configuration(INT4), 2 * 576 * 0.515625 + 80 * 2),
    "float32, head as well": (_configuration({"weight_bytes_per_param": 4.0}), (2 * 576 + 80) * 4),
    "moe has attention and head": (MOE, (2 * (128 + 64) + 80) * 2),
    # One dense layer (384), one with shared experts of width 6: 8*12 + 6*8 = 144.
    "interleaved with shared experts": (
        _configuration(EXPERTS | {"num_moe_layers": 1, "shared_expert_intermediate_size": 6}),
        (2 * 192 + 384 + 144 + 80) * 2,
    ),
}


@pytest.mark.parametrize("case", WEIGHT_BYTES)
def test_weights_read_by_every_step(case: str) -> None:
    configuration, size = WEIGHT_BYTES[case]
    assert physics.weight_read_s(configuration) == pytest.approx(size / 1e11, rel=1e-12)


def test_precision_decides_the_peak() -> None:
    assert physics.peak_flops(DENSE) == 1e12
    assert physics.peak_flops(_configuration(FP8)) == 2e12
    # Four bits are expanded and multiplied at sixteen; without FP8 units one byte is too.
    assert physics.peak_flops(_configuration(INT4)) == 1e12
    assert physics.peak_flops(_configuration(FP8, {"peak_flops_fp8": 0})) == 1e12


def test_gemm_work_is_flops_at_peak() -> None:
    # 100 tokens through 1152 parameters, 4 requests through the head's 80.
    frame = _batch(prefill=97, decode=3)
    np.testing.assert_allclose(physics.gemm_s(frame, DENSE), 2 * (100 * 1152 + 4 * 80) / 1e12)
    np.testing.assert_allclose(physics.gemm_s(frame, _configuration(tensor_parallel=2)), 2 * (100 * 576 + 4 * 40) / 1e12)
    np.testing.assert_allclose(physics.gemm_s(frame, _configuration(FP8)), 2 * (100 * 1152 + 4 * 80) / 2e12)


def test_smooth_maximum() -> None:
    a, b = np.array([1.0, 0.0, 3.0, 1e3]), np.array([1.0, 2.0, 0.0, 1.0])
    np.testing.assert_allclose(physics.smooth_max(a, b, 3.0), [2 ** (1 / 3), 2.0, 3.0, 1e3], rtol=1e-9)


def test_excess_of_a_compute_bound_step_is_its_flops_at_peak() -> None:
    """With memory a million times faster the excess is F / P, nothing is hidden, and its slope is that of F / P."""
    fast = _configuration(hardware={"memory_bandwidth": 1e17})
    few, many = _batch(prefill=100, requests=4), _batch(prefill=300, requests=4)
    for frame in (few, many):
        np.testing.assert_allclose(physics.dense_gemm_excess_s(frame, fast), physics.gemm_s(frame, fast), rtol=1e-4)
    slope = (physics.dense_gemm_excess_s(many, fast) - physics.dense_gemm_excess_s(few, fast)) / 200
    np.testing.assert_allclose(slope, 2 * 1152 / 1e12, rtol=1e-4)


def test_excess_of_a_memory_bound_step_is_its_activations_alone() -> None:
    """With compute a million times faster what is left beyond the weights is (inner + outer) * 2 bytes per row of each GEMM."""
    fast = _configuration(hardware={"peak_flops": 1e18})
    # Per layer 8+16, 8+8, 8+32, 16+8 = 104 elements a token; head 8+10 = 18 a request.
    moved = (5 * 2 * 104 + 3 * 18) * 2 / 1e11
    np.testing.assert_allclose(physics.dense_gemm_excess_s(_batch(5, requests=3), fast), 0.75 / 0.8 * moved, rtol=1e-9)


def test_excess_of_a_small_decode_on_a_gpu_is_close_to_nothing() -> None:
    llama = _llama("h100_sxm")
    one = _batch(decode=1, requests=0)
    assert 0 < physics.dense_gemm_excess_s(one, llama)[0] < 2e-3 * physics.weight_read_s(llama)


def test_excess_between_the_two() -> None:
    """The head alone in numbers: 20 requests, compute 2*20*80/1e12/0.75, weights 160 and activations 20*18*2 bytes at 0.8e11."""
    frame = _batch(requests=20)
    compute, weights, activations = 3200 / 0.75e12, 160 / 0.8e11, 720 / 0.8e11
    head = 0.75 * ((compute**3 + (weights + activations) ** 3) ** (1 / 3) - weights)
    np.testing.assert_allclose(physics.dense_gemm_excess_s(frame, DENSE), head, rtol=1e-9)


def _llama(hardware: str, **engine: object) -> ServingConfiguration:
    llm = {
        "name": "llama3-8b", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256, "max_context_tokens": 8192,
    }  # fmt: skip
    return _configuration(llm, hardware, **engine)


def _mixtral(hardware: str, **engine: object) -> ServingConfiguration:
    llm = {
        "name": "mixtral-8x7b", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 32000, "max_context_tokens": 32768,
        "num_experts": 8, "num_experts_per_token": 2,
    }  # fmt: skip
    return _configuration(llm, hardware, **engine)


# --- experts ----------------------------------------------------------------------------------------------------------------


def test_one_token_hits_k_experts_and_many_hit_all() -> None:
    tokens = np.array([1.0, 0.0, 1e6])
    for skew in (0.0, 0.8, 1.5):
        np.testing.assert_allclose(physics.distinct_experts(tokens, MOE, skew), [2.0, 0.0, 8.0], atol=1e-9)


def test_distinct_experts_of_uniform_routing_have_a_closed_form() -> None:
    tokens = np.array([1.0, 2.0, 7.0, 7.0, 50.0])
    np.testing.assert_allclose(physics.distinct_experts(tokens, MOE, 0.0), 8 * (1 - (1 - 2 / 8) ** tokens), rtol=1e-12)


def test_distinct_experts_of_skewed_routing() -> None:
    """The equation sum q_e = k solved by another method."""
    popularity = np.arange(1.0, 129.0) ** -0.8
    popularity /= popularity.sum()
    rate = brentq(lambda r: np.sum(1 - np.exp(-r * popularity)) - 8, 1.0, 100.0, xtol=1e-13)
    expected = np.sum(1 - np.exp(-rate * popularity * 10))
    wide = _configuration(EXPERTS | {"num_experts": 128, "num_experts_per_token": 8})
    np.testing.assert_allclose(physics.distinct_experts(np.array([10.0]), wide, 0.8), expected, rtol=1e-9)
    assert expected < 128 * (1 - (1 - 8 / 128) ** 10)


@given(st.integers(1, 160), st.data(), st.floats(0, 1.5))
def test_distinct_experts_grow_with_the_batch_and_stay_within_what_there_is(
    experts: int, data: st.DataObject, skew: float
) -> None:
    k = data.draw(st.integers(1, min(experts, 8)))
    configuration = _configuration(EXPERTS | {"num_experts": experts, "num_experts_per_token": k})
    hit = physics.distinct_experts(np.arange(1.0, 400.0, 13.0), configuration, skew)
    assert hit[0] == pytest.approx(k, rel=1e-9)
    assert (np.diff(hit) >= -1e-12 * experts).all()
    assert hit.max() <= experts * (1 + 1e-12)


def test_experts_read_and_multiplied() -> None:
    """An expert has 3*8*4 = 96 parameters; two layers, two bytes: 384 bytes per expert hit."""
    one, many = _batch(decode=1, requests=0), _batch(prefill=100_000)
    np.testing.assert_allclose(physics.expert_weight_read_s(one, MOE), 2 * 384 / 1e11)
    np.testing.assert_allclose(physics.expert_weight_read_s(many, MOE), 8 * 384 / 1e11)
    np.testing.assert_allclose(physics.expert_weight_read_s(many, _configuration(EXPERTS, tensor_parallel=4)), 8 * 96 / 1e11)
    np.testing.assert_allclose(physics.expert_weight_read_s(many, _configuration(EXPERTS | FP8)), 8 * 192 / 1e11)
    np.testing.assert_allclose(physics.expert_gemm_s(many, MOE), 2 * 2 * 100_000 * 96 * 2 / 1e12)
    np.testing.assert_allclose(
        physics.expert_gemm_s(many, _configuration(EXPERTS | FP8, tensor_parallel=2)), 2 * 2 * 100_000 * 96 * 2 / 2e12 / 2
    )
    # One layer of the two is a mixture of experts.
    np.testing.assert_allclose(physics.expert_weight_read_s(one, _configuration(EXPERTS | {"num_moe_layers": 1})), 2 * 192 / 1e11)
    for formula in (physics.expert_weight_read_s, physics.expert_gemm_s, physics.expert_gemm_excess_s):
        np.testing.assert_array_equal(formula(many, DENSE), 0.0)


def test_data_parallel_engines_share_the_experts_and_nothing_else() -> None:
    """Four engines of two GPUs: 4 * 6 tokens choose among the experts, an eighth of whose bytes each GPU reads."""
    frame = _batch(prefill=4, decode=2, requests=1, pairs=8, context=90)
    alone, many = (_configuration(EXPERTS, tensor_parallel=2, data_parallel=dp) for dp in (1, 4))
    hit = physics.distinct_experts(np.array([24.0]), MOE, 0.8)
    np.testing.assert_allclose(physics.expert_weight_read_s(frame, many), hit * 384 / 8 / 1e11)
    # 6 tokens an engine, 24 in all, on four times the GPUs.
    np.testing.assert_allclose(physics.expert_gemm_s(frame, many), 2 * 2 * 24 * 96 * 2 / 8 / 1e12)
    by_expert = many.model_copy(update={"engine": many.engine.model_copy(update={"expert_parallel": True})})
    for name in STEP_TIME.coef_names:
        one, four, whole = (np.asarray(STEP_TIME[name].compute(frame, c)) for c in (alone, many, by_expert))
        np.testing.assert_array_equal(four, whole)
        # Reading fewer bytes hides less and leaves more beyond them.
        if name not in {"expert_weight_read", "expert_gemm_hidden", "gemm_excess"}:
            np.testing.assert_array_equal(one, four, err_msg=name)
    dense = [_configuration(tensor_parallel=2, data_parallel=dp) for dp in (1, 4)]
    np.testing.assert_array_equal(*(STEP_TIME.design(frame, c) for c in dense))
    assert physics.reference_step_s(dense[0]) == physics.reference_step_s(dense[1])


def test_expert_excess_has_the_limits_of_the_dense_one() -> None:
    frame = _batch(prefill=1000)
    compute_bound = _configuration(EXPERTS, {"memory_bandwidth": 1e17})
    memory_bound = _configuration(EXPERTS, {"peak_flops": 1e20})
    flops = physics.expert_gemm_s(frame, compute_bound)
    np.testing.assert_allclose(physics.expert_gemm_excess_s(frame, compute_bound), flops, rtol=1e-4)
    assert physics.expert_gemm_excess_s(frame, memory_bound)[0] < 1e-9 * physics.expert_weight_read_s(frame, memory_bound)[0]
    # In the common column an expert's second counts 0.75 / 0.5 of a dense one's.
    dense = physics.dense_gemm_excess_s(frame, compute_bound)
    np.testing.assert_allclose(physics.gemm_excess_s(frame, compute_bound), dense + 1.5 * flops, rtol=1e-4)


# --- hidden compute ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configuration", [_llama("h100_sxm"), _llama("l4", tensor_parallel=2), _mixtral("h100_sxm")])
def test_hidden_compute_is_bounded_by_the_reading_it_hides_under(configuration: ServingConfiguration) -> None:
    """excess >= F/P - e_c M_w / (e_m W), so what is hidden is at most e_c / e_m times the reading of the weights."""
    tokens = np.r_[1:300:20, 1000, 1e4, 1e6, 1e9]
    frame = _batch().loc[[0] * len(tokens)].assign(prefill_tokens=tokens)
    hidden, read = physics.gemm_hidden_s(frame, configuration), physics.weight_read_s(configuration)
    assert (hidden >= 0).all()
    assert (hidden <= np.minimum(0.75 / 0.8 * read, physics.gemm_s(frame, configuration)) * (1 + 1e-6)).all()
    assert hidden.max() > 0.1 * read
    hidden, read = (f(frame, configuration) for f in (physics.expert_gemm_hidden_s, physics.expert_weight_read_s))
    assert (hidden >= 0).all()
    assert (hidden <= 0.5 / 0.8 * read * (1 + 1e-6)).all()


def test_hidden_is_work_less_excess_and_never_negative() -> None:
    np.testing.assert_array_equal(physics.hidden_s(np.array([3.0, 1.0]), np.array([1.0, 3.0])), [2.0, 0.0])


# --- attention and communication ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "size"), [(1, 32), (2, 16), (4, 16)])
def test_kv_read(tp: int, size: float) -> None:
    """2 * 2 layers * 2 heads * 2 * 2 bytes = 32 per token; beyond two GPUs the two KV heads are replicated, not divided."""
    configuration = _configuration(tensor_parallel=tp)
    np.testing.assert_allclose(physics.kv_read_s(_batch(context=1000), configuration), 1000 * size / 1e11)


def test_kv_read_of_a_cpu_counts_a_sixth_of_its_bandwidth() -> None:
    cpu = _configuration(hardware={"name": "CPU-8 cores"})
    np.testing.assert_allclose(physics.kv_read_s(_batch(context=1000), cpu), 6 * 1000 * 32 / 1e11)


@pytest.mark.parametrize(("tp", "llm", "peak"), [(1, {}, 1e12), (4, {}, 1e12), (2, FP8, 2e12)])
def test_prefill_attention(tp: int, llm: dict, peak: float) -> None:
    """4 * 2 layers * 4 heads * 2 = 64 FLOPs a pair."""
    configuration = _configuration(llm, tensor_parallel=tp)
    np.testing.assert_allclose(physics.prefill_attention_s(_batch(pairs=500), configuration), 64 * 500 / tp / peak)


def test_all_reduce_is_two_rings_per_layer() -> None:
    """A ring moves 2 (tp - 1) / tp times the message: 2 * 2 layers * 8 * 2 bytes = 64 a token; four GPUs share the PCIe links."""
    frame = _batch(prefill=90, decode=10)
    for tp, moved in ((1, 0.0), (2, 64 * 2 * 1 / 2), (4, 64 * 2 * 3 / 4 * 4)):
        np.testing.assert_allclose(physics.all_reduce_s(frame, _configuration(tensor_parallel=tp)), 100 * moved / 1e10)
    nvlink = _configuration(hardware={"interconnect_bandwidth": 4e11}, tensor_parallel=4)
    np.testing.assert_allclose(physics.all_reduce_s(frame, nvlink), 100 * 96 / 4e11)


@pytest.mark.parametrize(
    ("hardware", "tp", "expected"),
    [("l40s", 2, 1), ("l40s", 4, 4), ("l40s", 8, 8), ("h100_pcie", 4, 4), ("h100_sxm", 4, 1), ("v100_sxm", 8, 1), ("l40s", 1, 1)],
)
def test_only_more_than_two_gpus_without_nvlink_are_in_each_other_s_way(hardware: str, tp: int, expected: float) -> None:
    assert physics.link_contention(_llama(hardware, tensor_parallel=tp)) == expected


# --- the set ----------------------------------------------------------------------------------------------------------------


STEP_TIME = feature_set("roofline")


def test_the_design_of_a_step_by_hand() -> None:
    """Every column of a mixed batch, through the design matrix that is fitted."""
    configuration = _configuration(EXPERTS, tensor_parallel=2)
    frame = _batch(prefill=6, decode=2, requests=1, pairs=18, context=300)
    columns = dict(zip(STEP_TIME.coef_names, STEP_TIME.design(frame, configuration)[0], strict=True))
    hit = physics.distinct_experts(np.array([8.0]), MOE, 0.8)[0]
    expected = {
        "weight_read": (2 * (64 + 32) + 40) * 2 / 1e11,
        "expert_weight_read": hit * 384 / 2 / 1e11,
        "prefill_attention": 64 * 18 / 2 / 1e12,
        "kv_read": 300 * 16 / 1e11,
        "all_reduce": 8 * 64 / 1e10,
        "sequences": 3 * 50e-6,
        "constant": 1e-3,
    }
    for name, value in expected.items():
        assert columns[name] == pytest.approx(value, rel=1e-9), name
    work = 2 * (8 * 2 * (64 + 32) + 3 * 40) / 1e12
    assert columns["gemm_hidden"] == max(work - physics.dense_gemm_excess_s(frame, configuration)[0], 0.0)
    config = dict(zip((f.name for f in STEP_TIME.config), STEP_TIME.config_row(configuration), strict=True))
    assert config == pytest.approx({"layers": 2 * 10e-6, "moe_layers": 2 * 10e-6, "all_reduce_latency": 4 * 10e-6})
    assert STEP_TIME.config_row(DENSE) == pytest.approx([2 * 10e-6, 0.0, 0.0])


def test_the_host_s_share_on_a_cpu() -> None:
    cpu = _configuration(hardware={"name": "cpu-4"}, tensor_parallel=2)
    assert STEP_TIME.config_row(cpu) == pytest.approx([2 * 500e-6, 0.0, 4 * 200e-6])
    columns = dict(zip(STEP_TIME.coef_names, STEP_TIME.design(_batch(8, 2), cpu)[0], strict=True))
    assert (columns["sequences"], columns["constant"]) == (pytest.approx(3 * 200e-6), 5e-3)


def test_a_second_gpu_halves_the_work() -> None:
    frame = _batch(prefill=600, decode=30, requests=2, pairs=1e5, context=1e5)
    one, two = (_mixtral("h100_sxm", tensor_parallel=tp) for tp in (1, 2))
    for name in ("weight_read", "expert_weight_read", "expert_gemm_hidden", "prefill_attention", "kv_read"):
        feature = STEP_TIME[name]
        np.testing.assert_allclose(feature.compute(frame, two), np.asarray(feature.compute(frame, one)) / 2, err_msg=name)
    np.testing.assert_allclose(physics.gemm_s(frame, two), physics.gemm_s(frame, one) / 2)
    np.testing.assert_allclose(physics.expert_gemm_excess_s(frame, two), physics.expert_gemm_excess_s(frame, one) / 2)


@st.composite
def batches(draw: st.DrawFn) -> pd.DataFrame:
    """Steps that an engine can run: at least one token, as many prefill requests as there may be, contexts of any length."""
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        prefill, decode = draw(st.integers(0, 16384)), draw(st.integers(0, 1024))
        prefill = prefill or int(decode == 0)
        requests = draw(st.integers(1, min(prefill, 64))) if prefill else 0
        context = draw(st.integers(1, 131_072)) * decode
        pairs = prefill * (draw(st.integers(0, 131_072)) + prefill / 2)
        rows.append((prefill, decode, requests, decode, pairs, context))
    names = list(_batch().columns)
    return pd.DataFrame(rows, columns=names, dtype=float)


@st.composite
def configurations(draw: st.DrawFn) -> ServingConfiguration:
    """Any tp from 1 to 8, one KV head or one per query head, dense or a mixture of experts, on any accelerator."""
    llm = {
        "num_layers": draw(st.sampled_from([1, 32, 80])), "hidden_size": draw(st.sampled_from([512, 4096, 8192])),
        "num_attention_heads": 840, "num_key_value_heads": draw(st.sampled_from([1, 840])), "head_dim": 8,
        "intermediate_size": draw(st.sampled_from([840, 14336])), "vocab_size": 128_256, "max_context_tokens": 131_072,
        "weight_bytes_per_param": draw(st.sampled_from([0.515625, 1.0, 2.0])),
    }  # fmt: skip
    if draw(st.booleans()):
        experts = draw(st.sampled_from([8, 128]))
        llm |= {
            "num_experts": experts, "num_experts_per_token": draw(st.sampled_from([1, 2, experts])),
            "num_moe_layers": draw(st.sampled_from([1, llm["num_layers"]])),
            "shared_expert_intermediate_size": draw(st.sampled_from([0, 840])),
        }  # fmt: skip
    hardware = draw(st.sampled_from(gpu_names()) | st.just({"name": "cpu", "peak_flops_fp8": 0}))
    return _configuration(llm, hardware, tensor_parallel=draw(st.integers(1, 8)), data_parallel=draw(st.sampled_from([1, 4])))


@given(batches(), configurations())
def test_every_column_is_finite_and_non_negative(frame: pd.DataFrame, configuration: ServingConfiguration) -> None:
    design, row = STEP_TIME.design(frame, configuration), STEP_TIME.config_row(configuration)
    assert np.isfinite(design).all()
    assert (design >= 0).all(), dict(zip(STEP_TIME.coef_names, design.min(axis=0), strict=True))
    assert np.isfinite(row).all()
    assert (row >= 0).all()
    assert STEP_TIME.noise_floor(configuration) > 0


FULL = pd.DataFrame(
    {
        "prefill_tokens": [100.0, 7.0], "decode_tokens": [12.0, 3.0], "prefill_requests": [4.0, 1.0],
        "decode_requests": [12.0, 3.0], "prefill_attention_tokens": [5e3, 30.0], "context_tokens": [9e3, 50.0],
        "waiting_requests": [3.0, 1.0], "running_requests": [16.0, 4.0], "kv_usage": [0.5, 0.1], "prompt_tokens": [40.0, 90.0],
    }
)  # fmt: skip


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_feature_reads_the_columns_it_says_and_no_others(quantity: str) -> None:
    features = feature_set("roofline", quantity)
    configuration = _configuration(EXPERTS, tensor_parallel=2)
    for feature in features.varying:
        full = np.asarray(feature.compute(FULL, configuration), dtype=float)
        alone = feature.compute(FULL[list(feature.columns)], configuration)
        np.testing.assert_array_equal(alone, full, err_msg=feature.name)
        for column in feature.columns:
            changed = FULL.assign(**{column: FULL[column] * 1.5})
            if feature.name != "expert_gemm_hidden" and feature.name != "gemm_hidden":  # these may rest at zero
                assert (np.asarray(feature.compute(changed, configuration)) != full).all(), (feature.name, column)
            with pytest.raises(KeyError, match=column):
                feature.compute(FULL[[c for c in feature.columns if c != column]], configuration)
    assert all(not f.columns for f in features.features if f.level is Level.CONFIG)
    with pytest.raises(InputError, match=features.columns[0]):
        features.design(FULL.drop(columns=features.columns[0]), configuration)


# --- delays -----------------------------------------------------------------------------------------------------------------


def test_the_reference_step_is_weights_at_three_quarters_of_bandwidth_and_the_host() -> None:
    assert physics.reference_step_s(DENSE) == pytest.approx(2464 / 0.75e11 + 2 * 10e-6 + 1e-3, rel=1e-12)
    cpu = _configuration(hardware={"name": "cpu"})
    assert physics.reference_step_s(cpu) == pytest.approx(2464 / 0.75e11 + 2 * 500e-6 + 5e-3, rel=1e-12)
    # Four tokens' worth of experts, at most all of them: 8 here, 4 where one expert takes each token.
    attention = (2 * 192 + 80) * 2
    host = 2 * 10e-6 + 1e-3
    assert physics.reference_step_s(MOE) == pytest.approx((attention + 8 * 384) / 0.75e11 + host, rel=1e-12)
    one = _configuration(EXPERTS | {"num_experts_per_token": 1}, tensor_parallel=2)
    assert physics.reference_step_s(one) == pytest.approx((attention + 4 * 384) / 2 / 0.75e11 + host, rel=1e-12)
    # Of two engines eight tokens' worth, over the GPUs of both.
    two = _configuration(EXPERTS | {"num_experts_per_token": 1, "num_experts": 64}, data_parallel=2)
    assert physics.reference_step_s(two) == pytest.approx((attention + 8 * 384 / 2) / 0.75e11 + host, rel=1e-12)


@pytest.mark.parametrize("quantity", ["queue_delay", "api_delay"])
def test_delays_in_reference_steps(quantity: str) -> None:
    features = feature_set("roofline", quantity)
    frame = pd.DataFrame({"waiting_requests": [10.0, 0.0], "kv_usage": [0.25, 1.0], "prompt_tokens": [256.0, 1024.0]})
    step = 2464 / 0.75e11 + 2 * 10e-6 + 1e-3
    expected = {
        "queue_depth": [10 / 40 * 30, 0.0],
        "kv_pressure": [0.25, 1.0],
        "prompt_share": [0.5, 2.0],
        "constant": [1.0, 1.0],
        "queue_depth_squared": [30 / 16, 0.0],
    }
    columns = dict(zip(features.coef_names, features.design(frame, DENSE).T / step, strict=True))
    assert list(columns) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(columns[name], values, err_msg=name)
    assert features.noise_floor(DENSE) == pytest.approx(step)


# waiting, running, kv_usage, prompt_tokens; batches of 40, a cache of 5000 tokens of which 90 % count as full.
SLOTS = [
    ((0, 39, 0.0, 10), False),  # the last free slot
    ((0, 40, 0.0, 10), True),
    ((5, 35, 0.0, 10), True),  # those queued before take the slots that are left
    ((5, 34, 0.0, 10), False),
    ((1, 2, 0.5, 1990), False),  # 0.5 + 0.398
    ((1, 2, 0.5, 2010), True),  # 0.5 + 0.402
    ((0, 2, 0.99, 4000), False),  # first in the queue: it is tried, whatever the cache
]


def test_which_requests_find_no_slot() -> None:
    names = ["waiting_requests", "running_requests", "kv_usage", "prompt_tokens"]
    frame = pd.DataFrame([row for row, _ in SLOTS], columns=names)
    expected = [waits for _, waits in SLOTS]
    queue = feature_set("roofline", "queue_delay")
    np.testing.assert_array_equal(queue.supported(frame, DENSE), expected)
    # Without the batch's size nothing is known of slots; the delay before the queue is described in every row.
    assert queue.supported(frame.drop(columns="running_requests"), DENSE).all()
    assert feature_set("roofline", "api_delay").supported(frame, DENSE).all()
    with pytest.raises(InputError, match="kv_usage"):
        queue.supported(frame.drop(columns="kv_usage"), DENSE)
