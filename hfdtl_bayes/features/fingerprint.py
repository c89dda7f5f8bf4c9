"""What the formulas of a feature set come to on fixed examples: coefficients fitted with other formulas are told by it.

The text of a formula names its constants and does not hold them: the bend of the roofline, the host's reference times, the
skew of routing. A coefficient is relative to them, so a posterior keeps what each feature came to, and loading compares. Kept are
numbers, not their hash: the last bits of a power differ between processors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import EngineSettings, Hardware, LLMArchitecture, ServingConfiguration
from hfdtl_bayes.features.feature import FeatureSet, Level
from hfdtl_bayes.features.operating_points import operating_points

Fingerprint = dict[str, list[float]]

NOISE_FLOOR, SUPPORT = "noise floor", "support"
_DIGITS = 9
_TOLERANCE = 1e-6
"""Relative; far above rounding, far below any change of a constant that matters."""


def reference_configurations() -> tuple[ServingConfiguration, ...]:
    """Return the examples: a dense LLM on one GPU, a mixture of experts on 2 * 2 with NVLink, a dense one on 4 with PCIe, a CPU.

    Their figures are their own, not the catalogue's: a figure of the catalogue may be corrected without touching a formula.
    """
    dense = LLMArchitecture(
        name="dense", num_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=2, head_dim=128,
        intermediate_size=14336, vocab_size=128_000, max_context_tokens=32_768,
    )  # fmt: skip
    moe = LLMArchitecture(
        name="moe", num_layers=32, hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=8192, vocab_size=128_000, max_context_tokens=32_768, num_experts=64, num_experts_per_token=4,
        num_moe_layers=24, moe_intermediate_size=1024, shared_expert_intermediate_size=2048, weight_bytes_per_param=1.0,
    )  # fmt: skip

    def hardware(name: str, flops: float, bandwidth: float, link: float) -> Hardware:
        return Hardware(
            name=name, peak_flops=flops, peak_flops_fp8=2 * flops, memory_bandwidth=bandwidth, memory_bytes=80e9,
            interconnect_bandwidth=link,
        )  # fmt: skip

    def engine(tensor_parallel: int = 1, data_parallel: int = 1) -> EngineSettings:
        return EngineSettings(
            tensor_parallel=tensor_parallel, data_parallel=data_parallel, max_num_seqs=128, max_num_batched_tokens=4096,
            kv_capacity_tokens=200_000, prefix_caching=True, cpu_offload=tensor_parallel > 1,
        )  # fmt: skip

    nvlink, pcie, cpu = hardware("gpu", 1e15, 3e12, 4e11), hardware("gpu", 3e14, 9e11, 3e10), hardware("cpu", 1e12, 1e11, 1e10)
    return (
        ServingConfiguration(config_id="dense", llm=dense, hardware=nvlink, engine=engine()),
        ServingConfiguration(config_id="moe", llm=moe, hardware=nvlink, engine=engine(2, 2)),
        ServingConfiguration(config_id="pcie", llm=dense, hardware=pcie, engine=engine(4)),
        ServingConfiguration(config_id="cpu", llm=dense, hardware=cpu, engine=engine()),
    )


def _reference_rows(features: FeatureSet, configuration: ServingConfiguration) -> pd.DataFrame:
    """Return batches, or requests as they are queued, with every column the set reads; one it alone knows counts up from 1."""
    if features.quantity == "step_time":
        frame = operating_points(configuration)
        # A queue beside every batch, for formulas that read it.
        frame["waiting_requests"] = np.arange(len(frame)) % 50
    else:
        waiting, running, usage, prompt = np.meshgrid([0, 3, 100], [0, 60, 128], [0.0, 0.4, 0.88], [16, 3000, 30_000])
        frame = pd.DataFrame(
            {
                "waiting_requests": waiting.ravel(),
                "running_requests": running.ravel(),
                "kv_usage": usage.ravel(),
                "prompt_tokens": prompt.ravel(),
            }
        )
    unknown = [c for c in features.columns if c not in frame.columns]
    return frame.assign(**{c: np.arange(1.0, len(frame) + 1) for c in unknown})


def _size(formula: Callable[..., object], *given: object) -> list[float]:
    """Return mean and root mean square of what a formula gives; NaN where it cannot be computed."""
    try:
        with np.errstate(all="ignore"):
            column = np.asarray(formula(*given), dtype=float)
            sizes = (float(np.mean(column)), float(np.sqrt(np.mean(column**2))))
    except Exception:  # a user's formula may know the user's own configurations and rows only; what it then raises is its own
        sizes = (float("nan"), float("nan"))
    return [float(f"{s:.{_DIGITS}g}") for s in sizes]


def fingerprint(features: FeatureSet) -> Fingerprint:
    """Return what a feature set comes to on fixed configurations over fixed rows.

    Returns
    -------
    dict of str to list of float
        By feature, and for "noise floor" and "support": mean and root mean square of its column (of a config feature and of the
        noise floor: the value) for each of `reference_configurations`, to nine digits, in the feature's unit. NaN where a
        formula cannot be computed for the examples. By "prior of" a feature: its range in multiples of the reference, for each
        range that is a user's.
    """
    found: Fingerprint = {name: [] for name in (*(f.name for f in features.features), NOISE_FLOOR, SUPPORT)}
    for c in reference_configurations():
        frame = _reference_rows(features, c)
        for f in features.features:
            found[f.name] += _size(f.compute, None if f.level is Level.CONFIG else frame, c)
        found[NOISE_FLOOR] += _size(features.noise_floor, c)
        found[SUPPORT] += _size(features.supported, frame, c)
    for name in features.own_priors:
        found[f"prior of {name}"] = [features[name].prior.low, features[name].prior.high]
    return found


def fingerprint_differences(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the names under which two fingerprints differ by more than rounding, sorted."""

    def alike(a: Sequence[float], b: Sequence[float]) -> bool:
        return len(a) == len(b) and np.allclose(a, b, rtol=_TOLERANCE, atol=0.0, equal_nan=True)

    return sorted(n for n in {*one, *other} if n not in one or n not in other or not alike(one[n], other[n]))
