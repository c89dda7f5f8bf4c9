"""The basis functions of BLIS's latency models, so that a fit can be exported without projection.

`blis-physics` is the basis of BLIS's `trained-physics` backend (its eleven betas), in SI units; `blis-blackbox` that of its
older `blackbox` backend. The formulas are restated from the published model, its conventions included, even where
hardware or model do otherwise: the head dimension is hidden size / heads, KV and activations take two bytes, the FP8 peak
rules where weights take exactly one byte, KV heads are divided by TP without replication, every expert's weights are
loaded in every step, experts are dispatched by all-gather (vLLM's default) and links are as fast as memory.

T tokens, A attended pairs, C context, B requests; L layers, d hidden size, H heads, dh = d // H, dkv = KV heads * dh, k experts
per token, E experts, nM and nD MoE and dense layers, fM, fS, fD their FFN widths (routed, shared, dense), G the GPUs the
experts are spread over, bW bytes per weight, P peak FLOP/s, W memory bandwidth.

nM is the configuration's `num_moe_layers`. For an interleaved mixture of experts BLIS itself counts floor(L / (s + 1)) with s
the `interleave_moe_layer_step` of the model's config.json; write that number where agreement to the microsecond matters.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, weight_loading_floor_s
from hfdtl_bayes.features.feature import Feature, FeatureSet, Level, PriorRange, constant_column, one, rows
from hfdtl_bayes.features.physics import batch_requests, batch_tokens

FloatArray = NDArray[np.float64]
_ACTIVATION_BYTES = 2.0
_KV_BYTES = 2.0


def _peak_flops(c: ServingConfiguration) -> float:
    """Return the peak BLIS takes: FP8 where a weight is exactly one byte and the GPU has it; 4-bit weights compute in BF16."""
    fp8 = c.hardware.peak_flops_fp8
    return float(fp8 if fp8 and c.llm.weight_bytes_per_param == 1 else c.hardware.peak_flops)


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
    return np.asarray(flops / _peak_flops(c), dtype=float)


def prefill_attended(frame: pd.DataFrame) -> FloatArray:
    """Return BLIS's attention count, sum over prefill chunks of t*(s + t/2) with s the whole prompt length, shape (n,).

    From column `prompt_attention_tokens` where the trace has it. Otherwise prefill_attention_tokens + q, with q = 2 *
    prefill_attention_tokens brought between T^2 / n and T^2 for n requests of T tokens together: it stands for the sum of
    t^2, which it equals where nothing was computed before (whole prompts) and for a single request in its last chunk. Tokens
    of a prompt still to come after the chunk cannot be known from a step and are left out.
    """
    if "prompt_attention_tokens" in frame.columns:
        return frame["prompt_attention_tokens"].to_numpy(float)
    tokens = frame["prefill_tokens"].to_numpy(float)
    pairs = frame["prefill_attention_tokens"].to_numpy(float)
    requests = np.maximum(frame["prefill_requests"].to_numpy(float), 1.0)
    return np.asarray(pairs + np.clip(2.0 * pairs, tokens**2 / requests, tokens**2))


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
_FFN = "nM*(k/G)*6*d*fM + nM*6*d*fS/(tp*dp) + nD*6*d*fD/(tp*dp)"
_WORK = "[T*(L*2*d*(2d + 2dkv)/(tp*dp) + {ffn}) + L*4*(H/tp)*dh*{attended}/dp] / P, T = {tokens}"

PHYSICS = FeatureSet(
    name="blis-physics",
    quantity="step_time",
    description="The basis of BLIS's trained-physics backend.",
    noise_floor=weight_loading_floor_s,
    features=(
        Feature(
            "prefill_compute", Level.BASE, "s",
            _WORK.format(ffn=_FFN, attended="sum t*(s + t/2)", tokens="prefill_tokens"),
            rows(prefill_compute_s), PriorRange(-0.2, 2.0), ("prefill_tokens", "prefill_requests", "prefill_attention_tokens"),
        ),
        Feature(
            "decode_compute", Level.BASE, "s",
            _WORK.format(ffn=_FFN, attended="context_tokens", tokens="decode_tokens"),
            rows(decode_compute_s), PriorRange(-1.0, 2.5), ("decode_tokens", "context_tokens"),
        ),
        Feature(
            "weight_loading", Level.CONFIG, "s",
            "[L*d*(2d + 2dkv)/tp + nM*(E/G)*3*d*fM + nM*3*d*fS/tp + nD*3*d*fD/tp] * bW / W",
            one(weight_s), PriorRange(0.6, 1.9),
        ),
        Feature(
            "tp_communication", Level.BASE, "s",
            "[(L + nD)/dp + nM*[MoE and dp = 1]] * T*d*2*2*(tp-1)/tp / W, T = prefill_tokens + decode_tokens",
            rows(tp_communication_s), PriorRange(-0.5, 3.0), _BATCH,
        ),
        Feature("layers", Level.CONFIG, "layer", "L", one(lambda c: c.llm.num_layers), PriorRange(-1.0, 7.0), (), 10e-6),
        Feature(
            "scheduled_requests", Level.BASE, "request", "prefill_requests + decode_requests",
            rows(lambda f, _c: batch_requests(f)), PriorRange(-0.5, 3.0), ("prefill_requests", "decode_requests"), 10e-6,
        ),
        Feature(
            "moe_layers", Level.CONFIG, "layer", "nM where 0 < nM < L (interleaved), otherwise 0",
            one(interleaved_moe_layers), PriorRange(-1.0, 8.0), (), 100e-6,
        ),
        Feature(
            "prefill_kv_write", Level.BASE, "s", "L*2*dkv/(tp*dp)*prefill_tokens*2 / W",
            rows(prefill_kv_s), PriorRange(-1.5, 2.5), ("prefill_tokens",),
        ),
        Feature(
            "decode_kv_read", Level.BASE, "s",
            "L*2*dkv/(tp*dp)*2*(context_tokens + decode_tokens) / W where decode_tokens > 0, otherwise 0",
            rows(decode_kv_s), PriorRange(0.3, 3.0), ("decode_tokens", "context_tokens"),
        ),
        Feature(
            "expert_dispatch", Level.BASE, "s",
            "[MoE and dp > 1] * nM*(T/dp)*(G-1)/G*2*d*2 / W, T = prefill_tokens + decode_tokens",
            rows(expert_dispatch_s), PriorRange(-0.5, 3.0), _BATCH,
        ),
        Feature("constant", Level.RESIDUAL, "1", "1", constant_column(lambda _c: 1.0), PriorRange(-2.0, 4.0), (), 1e-3),
    ),
)  # fmt: skip

BLACKBOX = FeatureSet(
    name="blis-blackbox",
    quantity="step_time",
    description="The basis of BLIS's older blackbox backend.",
    noise_floor=weight_loading_floor_s,
    features=(
        Feature(
            "prefill_tokens", Level.BASE, "token", "prefill_tokens (those found in the prefix cache are not computed)",
            rows(lambda f, _c: f["prefill_tokens"].to_numpy(float)), PriorRange(-0.5, 3.0), ("prefill_tokens",), 20e-6,
        ),
        Feature(
            "decode_tokens", Level.BASE, "token", "decode_tokens",
            rows(lambda f, _c: f["decode_tokens"].to_numpy(float)), PriorRange(-0.5, 3.0), ("decode_tokens",), 50e-6,
        ),
        Feature("constant", Level.RESIDUAL, "1", "1", constant_column(lambda _c: 1.0), PriorRange(-0.5, 3.0), (), 10e-3),
    ),
)  # fmt: skip
