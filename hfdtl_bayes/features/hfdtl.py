"""The feature set of the original HFD-TL design, exactly as written, kept for comparison.

It is not adequate alone (work is not divided by TP, decode work ignores context length, nothing stands for the reading
of the weights), which the benchmarks show beside the default set.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, weight_loading_floor_s
from hfdtl_bayes.features import physics
from hfdtl_bayes.features.feature import Feature, FeatureSet, Level, PriorRange, Quantity, constant_column, one, rows


def _column(frame: pd.DataFrame, name: str) -> NDArray[np.float64]:
    return frame[name].to_numpy(dtype=float)


def _queue_depth(frame: pd.DataFrame, configuration: ServingConfiguration) -> NDArray[np.float64]:
    """Return waiting_requests / max_num_seqs, shape (n,)."""
    return _column(frame, "waiting_requests") / configuration.engine.max_num_seqs


def _beta(interactions: bool) -> FeatureSet:
    features = [
        Feature(
            "prefill_work", Level.BASE, "s", "prefill_tokens * flops_per_token / peak_flops",
            rows(lambda f, c: _column(f, "prefill_tokens") * c.llm.flops_per_token / c.hardware.peak_flops),
            PriorRange(0.0, 3.0), ("prefill_tokens",),
        ),
        Feature(
            "decode_work", Level.BASE, "s", "decode_tokens * kv_bytes_per_token / memory_bandwidth",
            rows(lambda f, c: _column(f, "decode_tokens") * c.llm.kv_bytes_per_token / c.hardware.memory_bandwidth),
            PriorRange(-500.0, 1500.0), ("decode_tokens",),
        ),
        Feature(
            "batch_share", Level.BASE, "1", "(prefill_tokens + decode_tokens) / max_num_batched_tokens",
            rows(lambda f, c: physics.batch_tokens(f) / c.engine.max_num_batched_tokens),
            PriorRange(-2.0, 4.0), ("prefill_tokens", "decode_tokens"), 10e-3,
        ),
        Feature(
            "inverse_tp", Level.CONFIG, "1", "1 / tensor_parallel",
            one(lambda c: 1 / c.engine.tensor_parallel), PriorRange(-2.0, 4.0), (), 10e-3,
        ),
        Feature(
            "moe_experts", Level.CONFIG, "1", "[MoE] * num_experts / 8",
            one(lambda c: c.llm.num_experts / 8), PriorRange(-2.0, 3.0), (), 10e-3,
        ),
        Feature(
            "cpu_offload", Level.CONFIG, "1", "[cpu_offload]",
            one(lambda c: float(c.engine.cpu_offload)), PriorRange(-1.0, 5.0), (), 10e-3,
        ),
        Feature("constant", Level.RESIDUAL, "1", "1", constant_column(lambda _c: 1.0), PriorRange(-1.0, 3.0), (), 10e-3),
        Feature(
            "kv_usage_squared", Level.RESIDUAL, "1", "kv_usage^2",
            rows(lambda f, _c: _column(f, "kv_usage") ** 2), PriorRange(-2.0, 5.0), ("kv_usage",), 10e-3,
        ),
    ]  # fmt: skip
    if interactions:
        features.append(
            Feature(
                "prefill_share_kv_usage", Level.RESIDUAL, "1", "prefill_tokens / max_num_batched_tokens * kv_usage",
                rows(lambda f, c: _column(f, "prefill_tokens") / c.engine.max_num_batched_tokens * _column(f, "kv_usage")),
                PriorRange(-3.0, 3.0), ("prefill_tokens", "kv_usage"), 10e-3,
            )
        )  # fmt: skip
    return FeatureSet(
        name="hfdtl-interactions" if interactions else "hfdtl",
        quantity="step_time",
        features=tuple(features),
        noise_floor=weight_loading_floor_s,
        description="The design's own features" + (" with its interaction." if interactions else "."),
    )


def _alpha(quantity: Quantity, interactions: bool) -> FeatureSet:
    features = [
        Feature(
            "queue_depth", Level.BASE, "1", "waiting_requests / max_num_seqs",
            rows(_queue_depth),
            PriorRange(-1.0, 4.0), ("waiting_requests",), 1.0,
        ),
        Feature(
            "kv_usage", Level.BASE, "1", "kv_usage",
            rows(lambda f, _c: _column(f, "kv_usage")), PriorRange(-3.0, 3.0), ("kv_usage",), 0.1,
        ),
        Feature(
            "prompt_share", Level.BASE, "1", "prompt_tokens / max_context_tokens",
            rows(lambda f, c: _column(f, "prompt_tokens") / c.llm.max_context_tokens),
            PriorRange(-3.0, 3.0), ("prompt_tokens",), 0.1,
        ),
        Feature(
            "inverse_tp", Level.CONFIG, "1", "1 / tensor_parallel",
            one(lambda c: 1 / c.engine.tensor_parallel), PriorRange(-2.0, 2.0), (), 0.05,
        ),
        Feature(
            "prefix_caching", Level.CONFIG, "1", "[prefix_caching]",
            one(lambda c: float(c.engine.prefix_caching)), PriorRange(-2.0, 2.0), (), 0.05,
        ),
        Feature(
            "chunked_prefill", Level.CONFIG, "1", "[chunked_prefill]",
            one(lambda c: float(c.engine.chunked_prefill)), PriorRange(-2.0, 2.0), (), 0.05,
        ),
        Feature("constant", Level.RESIDUAL, "1", "1", constant_column(lambda _c: 1.0), PriorRange(-2.0, 4.0), (), 0.05),
        Feature(
            "queue_depth_squared", Level.RESIDUAL, "1", "(waiting_requests / max_num_seqs)^2",
            rows(lambda f, c: _queue_depth(f, c) ** 2),
            PriorRange(-2.0, 2.0), ("waiting_requests",), 1.0,
        ),
    ]  # fmt: skip
    if interactions:
        features.append(
            Feature(
                "queue_depth_kv_usage", Level.RESIDUAL, "1", "waiting_requests / max_num_seqs * kv_usage",
                rows(lambda f, c: _queue_depth(f, c) * _column(f, "kv_usage")),
                PriorRange(-3.0, 3.0), ("waiting_requests", "kv_usage"), 1.0,
            )
        )  # fmt: skip
    return FeatureSet(
        name="hfdtl-interactions" if interactions else "hfdtl",
        quantity=quantity,
        features=tuple(features),
        noise_floor=physics.reference_step_s,
        description="The design's own features" + (" with its interaction." if interactions else "."),
    )


SETS: tuple[FeatureSet, ...] = (
    _beta(interactions=False),
    _alpha("queue_delay", interactions=False),
    _alpha("api_delay", interactions=False),
    _beta(interactions=True),
    _alpha("queue_delay", interactions=True),
    _alpha("api_delay", interactions=True),
)
