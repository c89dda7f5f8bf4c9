"""The default feature set: linear, physical, divided by tensor parallelism, non-negative by meaning.

It cures what a first set of features was seen to miss on measured steps: the reading of the weights (with the expected
number of distinct experts for a mixture of experts), KV reads that grow with context length, prefill attention,
communication, per-layer and per-sequence host time, and the change from memory-bound to compute-bound.

max(compute, memory) enters as an *excess*: `weight_read` is there in every step, `gemm_excess` is what a compute-bound step
takes beyond the reading of the weights, and `gemm_hidden` is the compute under a memory-bound step, 0 if it hides perfectly. The
hidden part is bounded, so an error made on light traffic does not grow with the batch; heavy traffic rests on the excess alone, whose
coefficient the donors inform.

Prior ranges: times the ideal, elicited from published kernel times of GPUs (AIConfigurator's tables for vLLM): large GEMMs
take 1.1 to 1.6 times F / P, weights stream at 55 to 90 % of peak bandwidth, an all-reduce of 8 to 64 MB over NVLink takes 1.4 to 3.2
times the ideal ring; a mixture of experts adds a router, a top-k, a sort and two permutations per layer, each of several microseconds.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, weight_loading_floor_s
from hfdtl_bayes.features import physics
from hfdtl_bayes.features.feature import Feature, FeatureSet, Level, PriorRange, Quantity, constant_column, one, rows

_TOKENS = ("prefill_tokens", "decode_tokens")
_REQUESTS = ("prefill_requests", "decode_requests")


STEP_TIME = FeatureSet(
    name="roofline",
    quantity="step_time",
    description="Times the ideal: work at peak figures, and host time in reference units.",
    noise_floor=weight_loading_floor_s,
    features=(
        Feature(
            "weight_read", Level.BASE, "s", "bytes of attention, dense FFN, shared experts and head / tp / bandwidth",
            constant_column(physics.weight_read_s), PriorRange(0.9, 1.8), (),
        ),
        Feature(
            "gemm_hidden", Level.BASE, "s", "max(FLOPs of the dense GEMMs / tp / peak - their excess, 0)",
            rows(physics.gemm_hidden_s), PriorRange(-0.2, 0.9), _TOKENS + _REQUESTS,
        ),
        Feature(
            "gemm_excess", Level.BASE, "s",
            "smooth max(compute, memory) - memory of each GEMM, in ideal compute seconds; the experts' count 1.5 times",
            rows(physics.gemm_excess_s), PriorRange(0.9, 1.7), _TOKENS + _REQUESTS,
        ),
        Feature(
            "expert_weight_read", Level.BASE, "s", "expected bytes of the routed experts hit by dp * tokens / (tp * dp) / bandwidth",
            rows(physics.expert_weight_read_s), PriorRange(0.7, 1.9), _TOKENS,
        ),
        Feature(
            "expert_gemm_hidden", Level.BASE, "s", "max(FLOPs of the routed experts / tp / peak - their excess, 0)",
            rows(physics.expert_gemm_hidden_s), PriorRange(-0.4, 1.4), _TOKENS,
        ),
        Feature(
            "prefill_attention", Level.BASE, "s", "4 * layers * heads / tp * head_dim * prefill_attention_tokens / peak",
            rows(physics.prefill_attention_s), PriorRange(0.8, 3.2), ("prefill_attention_tokens",),
        ),
        Feature(
            "kv_read", Level.BASE, "s", "context_tokens * KV bytes per token / tp / (attention's share of bandwidth)",
            rows(physics.kv_read_s), PriorRange(0.8, 1.5), ("context_tokens",),
        ),
        Feature(
            "all_reduce", Level.BASE, "s", "bytes of two ring all-reduces per layer / interconnect bandwidth * contention",
            rows(physics.all_reduce_s), PriorRange(1.2, 3.2), _TOKENS,
        ),
        Feature(
            "sequences", Level.BASE, "s", "(prefill_requests + decode_requests) * reference host time per sequence",
            rows(lambda f, c: physics.batch_requests(f) * physics.host_overheads(c).sequence_s),
            PriorRange(0.4, 2.0), _REQUESTS,
        ),
        Feature(
            "layers", Level.CONFIG, "s", "num_layers * reference host time per layer",
            one(lambda c: c.llm.num_layers * physics.host_overheads(c).layer_s), PriorRange(-0.3, 1.3),
        ),
        Feature(
            "moe_layers", Level.CONFIG, "s", "num_moe_layers * reference host time per layer",
            one(lambda c: c.llm.num_moe_layers * physics.host_overheads(c).layer_s), PriorRange(1.0, 4.0),
        ),
        Feature(
            "all_reduce_latency", Level.CONFIG, "s", "2 * num_layers * [tp > 1] * reference latency of a collective",
            one(lambda c: 2 * c.llm.num_layers * (c.engine.tensor_parallel > 1) * physics.host_overheads(c).collective_s),
            PriorRange(0.2, 1.8),
        ),
        Feature(
            "constant", Level.RESIDUAL, "s", "reference host time per step",
            constant_column(lambda c: physics.host_overheads(c).step_s), PriorRange(-0.1, 3.1),
        ),
    ),
)  # fmt: skip


def finds_no_slot(frame: pd.DataFrame, configuration: ServingConfiguration) -> NDArray[np.bool_]:
    """Return which requests find no free slot when they are queued, shape (n,).

    The batch, counting those already queued for it, is full; or others wait and the KV cache cannot hold this prompt as well.
    On eleven recordings of a real engine it tells who waits longer than a step in 93 to 100 % of requests. All rows where
    running_requests is not known.
    """
    if "running_requests" not in frame.columns:
        return np.ones(len(frame), dtype=bool)
    engine = configuration.engine
    waiting = frame["waiting_requests"].to_numpy(float)
    full = waiting + frame["running_requests"].to_numpy(float) >= engine.max_num_seqs
    need = frame["prompt_tokens"].to_numpy(float) / engine.kv_capacity_tokens
    no_room = (waiting > 0) & (frame["kv_usage"].to_numpy(float) + need > _NEARLY_FULL)
    return np.asarray(full | no_room)


_NEARLY_FULL = 0.9
"""Share of the KV cache beyond which vLLM is taken to admit no further prompt: blocks are reserved in whole."""


def _queueing(quantity: Quantity) -> FeatureSet:
    step = physics.reference_step_s
    return FeatureSet(
        name="roofline",
        quantity=quantity,
        description="Delays in reference decode steps, so that slopes transfer between configurations of unlike speed.",
        noise_floor=step,
        support=finds_no_slot if quantity == "queue_delay" else None,
        features=(
            Feature(
                "queue_depth", Level.BASE, "s", "waiting_requests / max_num_seqs * 30 reference steps",
                rows(lambda f, c: f["waiting_requests"].to_numpy(float) / c.engine.max_num_seqs * 30 * step(c)),
                PriorRange(-0.5, 4.5), ("waiting_requests",),
            ),
            Feature(
                "kv_pressure", Level.BASE, "s", "kv_usage * reference step",
                rows(lambda f, c: f["kv_usage"].to_numpy(float) * step(c)), PriorRange(-2, 4), ("kv_usage",),
            ),
            Feature(
                "prompt_share", Level.BASE, "s", "prompt_tokens / max_num_batched_tokens * reference step",
                rows(lambda f, c: f["prompt_tokens"].to_numpy(float) / c.engine.max_num_batched_tokens * step(c)),
                PriorRange(-2, 4), ("prompt_tokens",),
            ),
            Feature(
                "constant", Level.RESIDUAL, "s", "reference step",
                constant_column(step), PriorRange(-0.5, 2.5),
            ),
            Feature(
                "queue_depth_squared", Level.RESIDUAL, "s", "(waiting_requests / max_num_seqs)^2 * 30 reference steps",
                rows(lambda f, c: (f["waiting_requests"].to_numpy(float) / c.engine.max_num_seqs) ** 2 * 30 * step(c)),
                PriorRange(-1, 1), ("waiting_requests",),
            ),
        ),
    )  # fmt: skip


QUEUE_DELAY = _queueing("queue_delay")
API_DELAY = _queueing("api_delay")
