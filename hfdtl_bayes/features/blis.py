"""The basis functions of BLIS's latency models, so that a fit can be exported without projection.

`blis-physics` is the basis of BLIS's `trained-physics` backend (its eleven betas), in SI units; `blis-blackbox` that of its
older `blackbox` backend. The formulas are restated from the published model, dtype conventions included: KV and
activations take two bytes, FP8 peak where weights take one.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, weight_loading_floor_s
from hfdtl_bayes.features.feature import Feature, FeatureSet, Level, PriorRange
from hfdtl_bayes.features.physics import batch_requests, batch_tokens, peak_flops
from hfdtl_bayes.features.roofline import constant_column, one, rows

FloatArray = NDArray[np.float64]
_ACTIVATION_BYTES = 2.0
_KV_BYTES = 2.0


def _kv_width(c: ServingConfiguration) -> float:
    return float(c.llm.num_key_value_heads * (c.llm.hidden_size // c.llm.num_attention_heads))


def _group(c: ServingConfiguration) -> int:
    """Return the GPUs over which experts are spread: tp * dp for a mixture of experts."""
    return c.engine.tensor_parallel * (c.engine.data_parallel if c.llm.is_moe else 1)


def _compute_s(tokens: FloatArray, attended: FloatArray, c: ServingConfiguration) -> FloatArray:
    """GEMM and attention work of `tokens`, in seconds at peak FLOP/s.

    [L*2*T*d*(2d + 2dkv)/(tp*dp) + L*4*(H/tp)*dh*A/dp + nM*(T*k/G)*6*d*fM + nM*T*6*d*fS/(tp*dp) + nD*T*6*d*fD/(tp*dp)] / P.
    """
    llm, tp, dp = c.llm, c.engine.tensor_parallel, c.engine.data_parallel
    d, head_dim = llm.hidden_size, llm.hidden_size // llm.num_attention_heads
    k = max(1, llm.num_experts_per_token)
    flops = llm.num_layers * 2.0 * tokens * d * (2 * d + 2 * _kv_width(c)) / (tp * dp)
    flops = flops + llm.num_layers * 4.0 * (llm.num_attention_heads / tp) * head_dim * attended / dp
    flops = flops + llm.num_moe_layers * (tokens * k / _group(c)) * 6.0 * d * llm.moe_intermediate_size
    flops = flops + llm.num_moe_layers * tokens * 6.0 * d * llm.shared_expert_intermediate_size / (tp * dp)
    flops = flops + llm.num_dense_layers * tokens * 6.0 * d * llm.intermediate_size / (tp * dp)
    return np.asarray(flops / peak_flops(c), dtype=float)


def prefill_attended(frame: pd.DataFrame) -> FloatArray:
    """Return BLIS's attention count sum t*(s + t/2), with s the whole prompt length.

    From column `prompt_attention_tokens` where the trace has it, otherwise prefill_attention_tokens + prefill_tokens^2 /
    prefill_requests, which is exact when every prompt is computed in one chunk.
    """
    if "prompt_attention_tokens" in frame.columns:
        return frame["prompt_attention_tokens"].to_numpy(float)
    tokens = frame["prefill_tokens"].to_numpy(float)
    requests = np.maximum(frame["prefill_requests"].to_numpy(float), 1.0)
    return np.asarray(frame["prefill_attention_tokens"].to_numpy(float) + tokens**2 / requests)


def prefill_compute_s(frame: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
    """Return the prefill compute time at peak FLOP/s, shape (n,)."""
    return _compute_s(frame["prefill_tokens"].to_numpy(float), prefill_attended(frame), c)


def decode_compute_s(frame: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
    """Return the decode compute time at peak FLOP/s, shape (n,)."""
    return _compute_s(frame["decode_tokens"].to_numpy(float), frame["context_tokens"].to_numpy(float), c)


def _kv_s(tokens: FloatArray, c: ServingConfiguration) -> FloatArray:
    width = _kv_width(c) / (c.engine.tensor_parallel * c.engine.data_parallel)
    return np.asarray(c.llm.num_layers * 2.0 * width * tokens * _KV_BYTES / c.hardware.memory_bandwidth)


def prefill_kv_s(frame: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
    """Return the time to write the KV of the prefilled tokens at peak bandwidth, shape (n,)."""
    return _kv_s(frame["prefill_tokens"].to_numpy(float), c)


def decode_kv_s(frame: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
    """Return the time to read the KV of the decoding requests at peak bandwidth, shape (n,); zero without decode."""
    decode = frame["decode_tokens"].to_numpy(float)
    return np.where(decode > 0, _kv_s(frame["context_tokens"].to_numpy(float) + decode, c), 0.0)


def weight_s(c: ServingConfiguration) -> float:
    """Time to load the weights at peak bandwidth, every expert included, in seconds.

    [L*d*(2d + 2dkv)/tp + nM*(E/G)*3*d*fM + nM*3*d*fS/tp + nD*3*d*fD/tp] * bW / W.
    """
    llm, tp = c.llm, c.engine.tensor_parallel
    d = llm.hidden_size
    params = llm.num_layers * d * (2 * d + 2 * _kv_width(c)) / tp
    params += llm.num_moe_layers * (llm.num_experts / _group(c)) * 3 * d * llm.moe_intermediate_size
    params += llm.num_moe_layers * 3 * d * llm.shared_expert_intermediate_size / tp
    params += llm.num_dense_layers * 3 * d * llm.intermediate_size / tp
    return params * llm.weight_bytes_per_param / c.hardware.memory_bandwidth


def tp_communication_s(frame: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
    """Return the tensor-parallel communication at peak memory bandwidth (BLIS has no link speed), shape (n,); zero at tp = 1."""
    llm, tp, dp = c.llm, c.engine.tensor_parallel, c.engine.data_parallel
    tokens = batch_tokens(frame)

    def volume(units: float) -> FloatArray:
        moved = units * tokens * llm.hidden_size * _ACTIVATION_BYTES * 2.0 * (tp - 1) / tp
        return np.asarray(moved / c.hardware.memory_bandwidth)

    total = (volume(llm.num_layers) + volume(llm.num_dense_layers)) / dp
    return total + volume(llm.num_moe_layers) if llm.is_moe and dp == 1 and tp > 1 else total


def expert_dispatch_s(frame: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
    """Return the expert-parallel all-gather at peak memory bandwidth, shape (n,); zero unless MoE and dp > 1."""
    llm, dp, group = c.llm, c.engine.data_parallel, _group(c)
    if not llm.is_moe or dp == 1:
        return np.zeros(len(frame))
    moved = llm.num_moe_layers * (batch_tokens(frame) / dp) * (group - 1) / group
    return np.asarray(moved * 2.0 * llm.hidden_size * _ACTIVATION_BYTES / c.hardware.memory_bandwidth)


def interleaved_moe_layers(c: ServingConfiguration) -> float:
    """Return the number of MoE layers of an interleaved mixture of experts, 0 otherwise."""
    return float(c.llm.num_moe_layers) if 0 < c.llm.num_moe_layers < c.llm.num_layers else 0.0


_BATCH = ("prefill_tokens", "decode_tokens")

PHYSICS = FeatureSet(
    name="blis-physics",
    quantity="step_time",
    description="The basis of BLIS's trained-physics backend.",
    noise_floor=weight_loading_floor_s,
    features=(
        Feature("prefill_compute", Level.BASE, "s", "BLIS pf_compute", rows(prefill_compute_s), PriorRange(-0.2, 2.0), (*_BATCH, "prefill_requests", "prefill_attention_tokens")),
        Feature("decode_compute", Level.BASE, "s", "BLIS dc_compute", rows(decode_compute_s), PriorRange(-1.0, 2.5), (*_BATCH, "context_tokens")),
        Feature("weight_loading", Level.CONFIG, "s", "BLIS weight", one(weight_s), PriorRange(0.6, 1.9)),
        Feature("tp_communication", Level.BASE, "s", "BLIS tp_comm", rows(tp_communication_s), PriorRange(-0.5, 3.0), _BATCH),
        Feature("layers", Level.CONFIG, "layer", "L", one(lambda c: c.llm.num_layers), PriorRange(-1.0, 7.0), (), 10e-6),
        Feature("scheduled_requests", Level.BASE, "request", "scheduled requests in the step", rows(lambda f, _c: batch_requests(f)), PriorRange(-0.5, 3.0), ("prefill_requests", "decode_requests"), 10e-6),
        Feature("moe_layers", Level.CONFIG, "layer", "MoE layers, interleaved MoE only", one(interleaved_moe_layers), PriorRange(-1.0, 8.0), (), 100e-6),
        Feature("prefill_kv_write", Level.BASE, "s", "BLIS pf_kv", rows(prefill_kv_s), PriorRange(-1.5, 2.5), ("prefill_tokens",)),
        Feature("decode_kv_read", Level.BASE, "s", "BLIS dc_kv", rows(decode_kv_s), PriorRange(0.3, 3.0), ("decode_tokens", "context_tokens")),
        Feature("expert_dispatch", Level.BASE, "s", "BLIS ep", rows(expert_dispatch_s), PriorRange(-0.5, 3.0), _BATCH),
        Feature("constant", Level.RESIDUAL, "1", "1", constant_column(lambda _c: 1.0), PriorRange(-2.0, 4.0), (), 1e-3),
    ),
)  # fmt: skip

BLACKBOX = FeatureSet(
    name="blis-blackbox",
    quantity="step_time",
    description="The basis of BLIS's older blackbox backend.",
    noise_floor=weight_loading_floor_s,
    features=(
        Feature("prefill_tokens", Level.BASE, "token", "prefill tokens not cached", rows(lambda f, _c: f["prefill_tokens"].to_numpy(float)), PriorRange(-0.5, 3.0), ("prefill_tokens",), 20e-6),
        Feature("decode_tokens", Level.BASE, "token", "decode tokens", rows(lambda f, _c: f["decode_tokens"].to_numpy(float)), PriorRange(-0.5, 3.0), ("decode_tokens",), 50e-6),
        Feature("constant", Level.RESIDUAL, "1", "1", constant_column(lambda _c: 1.0), PriorRange(-0.5, 3.0), (), 10e-3),
    ),
)  # fmt: skip
