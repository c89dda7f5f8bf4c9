"""Backends of older BLIS, for people who have not moved on: blackbox and crossmodel, and the file both read.

blackbox:    step = b0 + b1*prefill_tokens + b2*decode_tokens.
crossmodel:  step = b0*L + b1*decode_tokens*(L*kv_heads*dh/tp*1e-6) + b2*(prefill_tokens + decode_tokens)*[MoE] + b3*[tp > 1].

In both, and in no newer backend, a1 is per INPUT token: queueing = a0 + a1*input_len. Within one configuration L and [tp > 1] are
constants, so b3 of crossmodel is not told apart from b0 and exported as zero. crossmodel has no term for the prefill of a dense
model, nor has any of them one for context: the projection states what that costs, and is refused above the limit.

The file is BLIS's `defaults.yaml`: `models`, a list with one entry per configuration, for blackbox; `crossmodel_defaults`, one set for all,
for crossmodel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, weight_loading_floor_s
from hfdtl_bayes.errors import ExportError
from hfdtl_bayes.export.vectors import TRAINED_PHYSICS, Backend, BlisVectors
from hfdtl_bayes.features import Feature, FeatureSet, Level, PriorRange, feature_set
from hfdtl_bayes.features.feature import constant_column, one, rows

FloatArray = NDArray[np.float64]

_TOKENS = ("prefill_tokens", "decode_tokens")


def _kv_width(frame: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
    """Return decode_tokens * L * kv_heads * dh / tp * 1e-6, shape (n,); dh = hidden size / heads, as BLIS has it."""
    llm = c.llm
    head = llm.hidden_size // llm.num_attention_heads
    size = llm.num_layers * llm.num_key_value_heads * head / c.engine.tensor_parallel * 1e-6
    return np.asarray(frame["decode_tokens"].to_numpy(float) * size)


def _moe_tokens(frame: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
    tokens = frame["prefill_tokens"].to_numpy(float) + frame["decode_tokens"].to_numpy(float)
    return np.asarray(tokens * (c.llm.num_experts > 1))


# Ranges: layers of 20 to 400 us; the others a few times what the authors' four architectures gave.
CROSSMODEL_BASIS = FeatureSet(
    name="blis-crossmodel",
    quantity="step_time",
    description="The basis of BLIS's older crossmodel backend.",
    noise_floor=weight_loading_floor_s,
    features=(
        Feature(
            "decode_kv_width", Level.BASE, "Mtoken", "decode_tokens * L * kv_heads * dh / tp * 1e-6",
            rows(_kv_width), PriorRange(-1.0, 5.0), ("decode_tokens",), 1e-3,
        ),
        Feature(
            "moe_tokens", Level.BASE, "token", "(prefill_tokens + decode_tokens) * [MoE]",
            rows(_moe_tokens), PriorRange(-1.0, 5.0), _TOKENS, 20e-6,
        ),
        Feature("tp_barrier", Level.CONFIG, "1", "[tp > 1]", one(lambda c: float(c.engine.tensor_parallel > 1)),
                PriorRange(-1.0, 3.0), (), 10e-3),
        Feature("constant", Level.RESIDUAL, "layer", "L", constant_column(lambda c: float(c.llm.num_layers)),
                PriorRange(0.2, 4.0), (), 100e-6),
    ),
)  # fmt: skip

BLACKBOX = Backend(
    name="blackbox",
    basis=feature_set("blis-blackbox"),
    beta=("b0", "b1", "b2"),
    feature_of={"b0": "constant", "b1": "prefill_tokens", "b2": "decode_tokens"},
    in_microseconds=("b0", "b1", "b2"),
    lengths=(3,),
    alpha_units=("us", "us/input token", "us/output token"),
)
CROSSMODEL = Backend(
    name="crossmodel",
    basis=CROSSMODEL_BASIS,
    beta=("b0", "b1", "b2", "b3"),
    feature_of={"b0": "constant", "b1": "decode_kv_width", "b2": "moe_tokens", "b3": "tp_barrier"},
    in_microseconds=("b0", "b1", "b2", "b3"),
    lengths=(4,),
    alpha_units=("us", "us/input token", "us/output token"),
)

BACKENDS = {b.name: b for b in (TRAINED_PHYSICS, BLACKBOX, CROSSMODEL)}
"""Backends by name."""


def older_section(vectors: Sequence[BlisVectors]) -> dict[str, Any]:
    """Return the section of `defaults.yaml` that holds vectors of one older backend.

    Raises
    ------
    ExportError
        If the backends differ, two entries of blackbox are of the same model, GPU, TP and version (BLIS takes the first in silence), or
        there is more than one set of crossmodel, which has room for one.
    """
    backend = vectors[0].backend.name
    if any(v.backend.name != backend for v in vectors) or backend == TRAINED_PHYSICS.name:
        raise ExportError(f"one file holds one older backend; found {', '.join(v.backend.name for v in vectors)}")
    if backend == CROSSMODEL.name:
        if len(vectors) > 1:
            raise ExportError(
                f"crossmodel holds one set of coefficients for all configurations, found {len(vectors)}; write one file each"
            )
        return {"crossmodel_defaults": {"beta_coeffs": list(vectors[0].beta), "alpha_coeffs": list(vectors[0].alpha)}}
    keys = [_key(v.configuration) for v in vectors]
    twice = [k for k in keys if keys.count(k) > 1]
    if twice:
        raise ExportError(
            f"BLIS tells entries of blackbox apart by model, GPU, TP and vLLM version; {' / '.join(map(str, twice[0]))} comes twice. Export "
            "one of them, or give them another engine version"
        )
    return {
        "models": [
            {
                "id": name,
                "GPU": gpu,
                "tensor_parallelism": tp,
                "vllm_version": version,
                "alpha_coeffs": list(v.alpha),
                "beta_coeffs": list(v.beta),
                # BLIS's own is the loss of its fit; ours is the mean relative difference from the posterior mean.
                "best_loss": v.projection_error,
            }
            for v, (name, gpu, tp, version) in zip(vectors, keys, strict=True)
        ]
    }


def _key(c: ServingConfiguration) -> tuple[str, str, int, str]:
    return c.llm.name, c.hardware.name, c.engine.tensor_parallel, c.engine.version
