"""Formulas of the work in one engine step, in seconds at the hardware's peak figures.

Every function returns the time the work would take on one GPU at peak FLOP/s or peak memory bandwidth, after the
work has been divided by tensor parallelism. The coefficients fitted on top are therefore dimensionless
"times the ideal" factors: an efficiency of 80 % shows as 1.25.

The roofline is that of Williams, Waterman & Patterson (2009), doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features.sharing import column, constant, once

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class RooflineSettings:
    """Fixed shapes of the roofline features; each is a choice with its reason.

    The values were chosen on measured kernels of A100, H100, H200, L40S and B200 and are not fitted per user:
    they decide where the bend between memory-bound and compute-bound lies, the fitted coefficients decide how
    long each side takes.
    """

    compute_efficiency: float = 0.75
    """Share of peak FLOP/s a large dense GEMM reaches: places the bend."""
    memory_efficiency: float = 0.8
    """Share of peak bandwidth weight streaming reaches: places the bend."""
    expert_compute_efficiency: float = 0.5
    """The same for grouped expert GEMMs, which reach less."""
    sharpness: float = 3.0
    """Exponent p of the smooth maximum (a^p + b^p)^(1/p). Measured GEMMs take 1.3 to 1.4 times the larger of the two where
    compute and memory are equal, which is 2^(1/p) with p between 2 and 3."""
    routing_skew: float = 0.8
    """Zipf exponent of expert popularity. Routing is not uniform, so fewer distinct experts are hit than a
    uniform draw would give; 0 is uniform."""


SETTINGS = RooflineSettings()


def peak_flops(configuration: ServingConfiguration) -> float:
    """Return the peak FLOP/s of one GPU at the precision it multiplies in.

    FP8 where weights take one byte and the hardware has it; weights of four bits are expanded and multiplied at 16.
    """
    hardware = configuration.hardware
    fp8 = hardware.peak_flops_fp8
    return float(fp8 if fp8 and configuration.llm.weight_bytes_per_param == 1 else hardware.peak_flops)


def batch_tokens(frame: pd.DataFrame) -> FloatArray:
    """Return the tokens computed in the step, shape (n,)."""
    return column(frame, "prefill_tokens") + column(frame, "decode_tokens")


def batch_requests(frame: pd.DataFrame) -> FloatArray:
    """Return the requests scheduled in the step, shape (n,)."""
    return column(frame, "prefill_requests") + column(frame, "decode_requests")


_tokens, _requests = once(batch_tokens), once(batch_requests)

_LARGEST_COUNT = 2**16
"""Largest count for which a table is made: 512 KB, which the processor's cache holds."""


_PIECE_ROWS = 2**14
"""Rows looked up at once: they stay in a processor's own cache."""


def by_count(values: FloatArray, formula: Callable[..., FloatArray], *arguments: Hashable) -> FloatArray:
    """Return formula(values, *arguments) of a formula of one count, element by element, shape (n,).

    Where all values are whole and there are more of them than counts up to the largest, the formula is evaluated once per count
    and looked up; the table is kept, for batch after batch asks for the same counts.
    """
    largest = values.max(initial=0.0)
    if not (largest < min(len(values), _LARGEST_COUNT) and values.min(initial=0.0) >= 0.0):
        return formula(values, *arguments)
    table = _table(formula, arguments, 2 ** int(largest).bit_length())
    found = np.empty(len(values))
    for at in range(0, len(values), _PIECE_ROWS):
        piece = values[at : at + _PIECE_ROWS]
        counts = piece.astype(np.intp)
        if not (counts == piece).all():
            return formula(values, *arguments)
        # No count is beyond the table; mode "clip" spares a copy.
        table.take(counts, out=found[at : at + _PIECE_ROWS], mode="clip")
    return found


@lru_cache(maxsize=32)
def _table(formula: Callable[..., FloatArray], arguments: tuple[Hashable, ...], size: int) -> FloatArray:
    return formula(np.arange(float(size)), *arguments)


@dataclass(frozen=True)
class Gemm:
    """A dense matrix product of one step on one GPU: `count` times (tokens, inner) by (inner, outer)."""

    count: int
    inner: float
    outer: float
    bytes_per_param: float
    per_request: bool = False
    """True for the output head, which runs once per request and not once per token."""


def dense_gemms(configuration: ServingConfiguration) -> tuple[Gemm, ...]:
    """List the dense GEMMs of one step, each divided by tensor parallelism.

    Per layer: the QKV projection, the output projection, gate+up and down of a dense (or shared-expert) FFN; once:
    the output head. KV heads are replicated, not divided, when there are fewer of them than GPUs.
    """
    llm, tp = configuration.llm, configuration.engine.tensor_parallel
    kv_heads = max(llm.num_key_value_heads / tp, 1.0)
    heads = llm.num_attention_heads / tp
    size = llm.weight_bytes_per_param
    gemms = [
        Gemm(llm.num_layers, llm.hidden_size, (heads + 2 * kv_heads) * llm.head_dim, size),
        Gemm(llm.num_layers, heads * llm.head_dim, llm.hidden_size, size),
    ]
    if llm.num_dense_layers:
        gemms.append(Gemm(llm.num_dense_layers, llm.hidden_size, 2 * llm.intermediate_size / tp, size))
        gemms.append(Gemm(llm.num_dense_layers, llm.intermediate_size / tp, llm.hidden_size, size))
    if llm.num_moe_layers and llm.shared_expert_intermediate_size:
        width = llm.shared_expert_intermediate_size / tp
        gemms.append(Gemm(llm.num_moe_layers, llm.hidden_size, 2 * width, size))
        gemms.append(Gemm(llm.num_moe_layers, width, llm.hidden_size, size))
    # Quantised models keep the output head at 16 bits.
    gemms.append(Gemm(1, llm.hidden_size, llm.vocab_size / tp, max(size, 2.0), per_request=True))
    return tuple(gemms)


def weight_read_s(configuration: ServingConfiguration) -> float:
    """Time to read the weights that every step reads, on one GPU, at peak bandwidth: attention, dense and shared FFN, head.

    sum over GEMMs of count * inner * outer * bytes_per_param / memory_bandwidth.
    """
    size = sum(g.count * g.inner * g.outer * g.bytes_per_param for g in dense_gemms(configuration))
    return size / configuration.hardware.memory_bandwidth


def gemm_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Dense GEMM time at peak FLOP/s: sum of 2 * rows * inner * outer * count / peak_flops, shape (n,)."""
    flops = {True: 0.0, False: 0.0}
    for g in dense_gemms(configuration):
        flops[g.per_request] += 2.0 * g.count * g.inner * g.outer
    peak = peak_flops(configuration)
    work = _tokens(frame) * (flops[False] / peak)
    work += _requests(frame) * (flops[True] / peak)
    return work


def smooth_max(a: FloatArray, b: FloatArray | float, sharpness: float) -> FloatArray:
    """Smooth maximum (a^p + b^p)^(1/p) of non-negative arrays, p = `sharpness`."""
    return (a**sharpness + b**sharpness) ** (1.0 / sharpness)


def dense_gemm_excess_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Dense GEMM time beyond the reading of the weights, in ideal compute seconds, shape (n,).

    For each GEMM: e_c * (smoothmax(F / (e_c P), M / (e_m W)) - M_w / (e_m W)), with F the FLOPs, M the bytes of weights and
    activations, M_w those of the weights alone. It is near zero while a step is memory-bound and grows like F / P once it
    is compute-bound, which is how max(compute, memory) enters a model that stays linear in its coefficients.
    """
    gemms = dense_gemms(configuration)
    peaks = peak_flops(configuration), configuration.hardware.memory_bandwidth, SETTINGS
    of_tokens = by_count(_tokens(frame), _gemm_excess_s, tuple(g for g in gemms if not g.per_request), *peaks)
    of_tokens += by_count(_requests(frame), _gemm_excess_s, tuple(g for g in gemms if g.per_request), *peaks)
    return of_tokens


def _gemm_excess_s(
    rows: FloatArray, gemms: tuple[Gemm, ...], peak: float, width: float, settings: RooflineSettings
) -> FloatArray:
    total = np.zeros(len(rows))
    for g in gemms:
        compute = 2.0 * rows * g.inner * g.outer / peak / settings.compute_efficiency
        weights = g.inner * g.outer * g.bytes_per_param / width / settings.memory_efficiency
        activations = rows * (g.inner + g.outer) * 2.0 / width / settings.memory_efficiency
        total += g.count * (smooth_max(compute, weights + activations, settings.sharpness) - weights)
    return total * settings.compute_efficiency


_dense_gemm_excess_s = once(dense_gemm_excess_s)


def hidden_s(work_s: FloatArray, excess_s: FloatArray) -> FloatArray:
    """Compute time that disappears under the reading of weights, shape (n,): max(work - excess, 0).

    It grows with the batch while a step is memory-bound and stays constant once it is compute-bound, so that its coefficient
    (0 where hiding is perfect) cannot carry an error of light traffic into heavy traffic.
    """
    rest = work_s - excess_s
    return np.maximum(rest, 0.0, out=rest)


def gemm_hidden_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """`hidden_s` of the dense GEMMs, shape (n,)."""
    return hidden_s(gemm_s(frame, configuration), _dense_gemm_excess_s(frame, configuration))


def expert_gemm_hidden_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """`hidden_s` of the routed experts' GEMMs, shape (n,)."""
    if not configuration.llm.num_moe_layers:
        return constant(0.0, len(frame))
    return hidden_s(expert_gemm_s(frame, configuration), _expert_gemm_excess_s(frame, configuration))


@cache
def expert_inclusion_probability(num_experts: int, experts_per_token: int, skew: float) -> tuple[float, ...]:
    """Probability that one token is routed to each expert, under Zipf popularity with k distinct draws.

    Uses q_e = 1 - exp(-lambda * p_e), with p_e proportional to rank^-skew and lambda such that sum q_e = k: the
    Poissonised form of sampling k experts without replacement.
    """
    ranks = np.arange(1, num_experts + 1, dtype=float)
    popularity = ranks**-skew / np.sum(ranks**-skew)
    if experts_per_token >= num_experts:
        return tuple(np.ones(num_experts))
    low, high = 0.0, 1.0
    while np.sum(1 - np.exp(-high * popularity)) < experts_per_token:
        high *= 2
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.sum(1 - np.exp(-middle * popularity)) < experts_per_token else (low, middle)
    return tuple(1 - np.exp(-high * popularity))


def distinct_experts(tokens: FloatArray, configuration: ServingConfiguration, skew: float) -> FloatArray:
    """Return the expected number of distinct routed experts hit by `tokens` tokens in one layer, shape (n,).

    sum over experts of 1 - (1 - q_e)^tokens, with q_e from `expert_inclusion_probability`.
    """
    llm = configuration.llm
    return by_count(tokens, _distinct_experts, llm.num_experts, llm.num_experts_per_token, skew)


def _distinct_experts(tokens: FloatArray, num_experts: int, experts_per_token: int, skew: float) -> FloatArray:
    q = np.array(expert_inclusion_probability(num_experts, experts_per_token, skew))
    unique, inverse = np.unique(tokens, return_inverse=True)
    # With a hundred experts their powers are a hundred columns.
    parts = np.array_split(unique, -(-max(len(unique), 1) // 1024))
    found = np.concatenate([(1.0 - (1.0 - q)[None, :] ** part[:, None]).sum(axis=1) for part in parts])
    return np.asarray(found[inverse])


def expert_group(configuration: ServingConfiguration) -> int:
    """Return the number of GPUs that share the routed experts: tp * dp, with or without expert parallelism.

    The data-parallel engines of vLLM each run their own steps on their own requests, but those of a mixture of experts keep
    in step and split the experts between all their GPUs: a slice of every expert for each GPU, or, with expert parallelism,
    whole experts, which on average are the same bytes and FLOPs per GPU
    (https://docs.vllm.ai/en/latest/serving/data_parallel_deployment/). Everything else is replicated per engine.
    """
    return configuration.engine.tensor_parallel * configuration.engine.data_parallel


def expert_weight_read_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Time to read the routed experts a step hits, at peak bandwidth, shape (n,); zero for a dense model.

    distinct_experts(dp * tokens) * MoE layers * expert_params * bytes_per_param / (tp * dp) / memory_bandwidth. A row is the
    step of one engine; the others, which run in step with it and send their tokens to the same experts, are taken to
    have batches of the same size.
    """
    if not configuration.llm.num_moe_layers:
        return constant(0.0, len(frame))
    hit = distinct_experts(configuration.engine.data_parallel * _tokens(frame), configuration, SETTINGS.routing_skew)
    return hit * _expert_s(configuration)[0]


def _expert_s(configuration: ServingConfiguration) -> tuple[float, float]:
    """Return the time to read one routed expert in every layer at peak bandwidth, and to multiply one token at peak FLOP/s."""
    llm = configuration.llm
    size = llm.num_moe_layers * llm.expert_params * llm.weight_bytes_per_param
    flops = 2.0 * llm.num_experts_per_token * llm.expert_params * llm.num_moe_layers
    read = size / expert_group(configuration) / configuration.hardware.memory_bandwidth
    return read, flops / configuration.engine.tensor_parallel / peak_flops(configuration)


def expert_gemm_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Routed-expert GEMM time at peak FLOP/s: 2 * k * tokens * expert_params * MoE layers / (tp * peak), shape (n,).

    Data parallelism leaves it as it is: dp engines send their tokens, batches of the same size, to dp times as many GPUs.
    """
    if not configuration.llm.num_moe_layers:
        return constant(0.0, len(frame))
    return _tokens(frame) * _expert_s(configuration)[1]


def expert_gemm_excess_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """As `dense_gemm_excess_s` for the grouped GEMMs of the routed experts: all together, against the experts that are hit, shape (n,)."""
    if not configuration.llm.num_moe_layers:
        return constant(0.0, len(frame))

    llm = configuration.llm
    routing = configuration.engine.data_parallel, llm.num_experts, llm.num_experts_per_token
    return by_count(_tokens(frame), _experts_excess_s, *_expert_s(configuration), *routing, SETTINGS)


def _experts_excess_s(
    tokens: FloatArray, read_s: float, token_s: float, engines: int, experts: int, per_token: int, settings: RooflineSettings
) -> FloatArray:
    compute = tokens * token_s / settings.expert_compute_efficiency
    hit = _distinct_experts(engines * tokens, experts, per_token, settings.routing_skew)
    read = hit * read_s / settings.memory_efficiency
    return (smooth_max(compute, read, settings.sharpness) - read) * settings.expert_compute_efficiency


_expert_gemm_excess_s = once(expert_gemm_excess_s)


def gemm_excess_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Time of all GEMMs beyond the reading of weights, in ideal compute seconds of a dense GEMM, shape (n,).

    dense_gemm_excess_s + expert_gemm_excess_s * compute_efficiency / expert_compute_efficiency. One column, not two: while the
    experts are compute-bound the dense layers are a small share of nearly the same shape, and a coefficient of their own would
    take any misfit of the experts' for itself and carry it to dense models.
    """
    dense = _dense_gemm_excess_s(frame, configuration)
    if not configuration.llm.num_moe_layers:
        return dense.copy()
    slower = SETTINGS.compute_efficiency / SETTINGS.expert_compute_efficiency
    return dense + slower * _expert_gemm_excess_s(frame, configuration)


def prefill_attention_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Prefill attention at peak FLOP/s: 4 * layers * heads / tp * head_dim * prefill_attention_tokens / peak, shape (n,)."""
    llm, tp = configuration.llm, configuration.engine.tensor_parallel
    pairs = column(frame, "prefill_attention_tokens")
    return pairs * (4.0 * llm.num_layers * llm.num_attention_heads / tp * llm.head_dim / peak_flops(configuration))


def kv_read_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Read the KV cache of the decoding requests, shape (n,).

    context_tokens * kv_bytes_per_token / tp / (share of the peak bandwidth that decode attention reaches), with KV heads
    replicated below one per GPU. The share is 1 on a GPU; see `HostOverheads.attention_bandwidth_share`.
    """
    llm, tp = configuration.llm, configuration.engine.tensor_parallel
    replicated = max(llm.num_key_value_heads / tp, 1.0) / llm.num_key_value_heads
    width = configuration.hardware.memory_bandwidth * host_overheads(configuration).attention_bandwidth_share
    return column(frame, "context_tokens") * (llm.kv_bytes_per_token * replicated / width)


NVLINK_FLOOR = 100e9
"""Links slower than this, in byte/s per direction, are PCIe: the slowest NVLink (V100) has 150e9, PCIe Gen5 x16 has 64e9."""


def link_contention(configuration: ServingConfiguration) -> float:
    """Return by how much an all-reduce between the GPUs slows because they share links: 1 with NVLink.

    Without NVLink the traffic of more than two GPUs crosses the host's root complex, which they share: the number of GPUs.
    Measured all-reduces of 4 MB and more on L40S (AIConfigurator, vLLM 0.22) take 1.7, 8.6 and 16.4 times the ideal ring on 2, 4
    and 8 GPUs, against 1.4 to 3.2 on NVLink whatever the number.
    """
    tp = configuration.engine.tensor_parallel
    shared = tp > 2 and configuration.hardware.interconnect_bandwidth < NVLINK_FLOOR
    return float(tp) if shared else 1.0


def all_reduce_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Two ring all-reduces per layer at the interconnect's peak, shape (n,); zero at tp = 1.

    2 * layers * tokens * hidden_size * 2 bytes * 2 * (tp - 1) / tp / interconnect_bandwidth * `link_contention`.
    """
    llm, tp = configuration.llm, configuration.engine.tensor_parallel
    if tp == 1:
        return constant(0.0, len(frame))
    volume = 2.0 * llm.num_layers * _tokens(frame) * llm.hidden_size * 2.0 * 2.0 * (tp - 1) / tp
    return volume / configuration.hardware.interconnect_bandwidth * link_contention(configuration)


@dataclass(frozen=True)
class HostOverheads:
    """Reference sizes of the host's share of a step, in seconds: what one unit of a host feature is worth.

    They are physical constants, not fitted: kernels on a GPU are launched within about ten microseconds, and vLLM
    spends about a millisecond per step and tens of microseconds per sequence. On a CPU engine the same core
    dispatches and computes small operators, which is about fifty times slower per layer.
    """

    step_s: float
    layer_s: float
    collective_s: float
    sequence_s: float
    attention_bandwidth_share: float
    """Share of the memory bandwidth that decode attention reaches when the feature counts as 1. A GPU's kernel is bound by
    memory; a CPU core converts and multiplies element by element and reads about a sixth of what it streams."""


GPU_HOST = HostOverheads(step_s=1e-3, layer_s=10e-6, collective_s=10e-6, sequence_s=50e-6, attention_bandwidth_share=1.0)
CPU_HOST = HostOverheads(step_s=5e-3, layer_s=500e-6, collective_s=200e-6, sequence_s=200e-6, attention_bandwidth_share=1 / 6)


def host_overheads(configuration: ServingConfiguration) -> HostOverheads:
    """Return the reference host overheads of a configuration: `CPU_HOST` where the hardware's name begins with "cpu"."""
    return CPU_HOST if configuration.hardware.name.lower().startswith("cpu") else GPU_HOST


def reference_step_s(configuration: ServingConfiguration) -> float:
    """Return a rough decode step from the configuration alone: weights read at 75 % of peak bandwidth plus host time, in seconds.

    Of the routed experts those of four tokens per engine, min(E, 4 k dp) / (tp dp) per GPU. It is the unit in which queueing
    features are expressed, so that their coefficients transfer.
    """
    llm = configuration.llm
    host = host_overheads(configuration)
    hit = min(llm.num_experts, 4 * configuration.engine.data_parallel * max(llm.num_experts_per_token, 1))
    experts = llm.num_moe_layers * llm.expert_params * hit
    expert_bytes = experts * llm.weight_bytes_per_param / expert_group(configuration)
    read = weight_read_s(configuration) + expert_bytes / configuration.hardware.memory_bandwidth
    return read / 0.75 + llm.num_layers * host.layer_s + host.step_s
