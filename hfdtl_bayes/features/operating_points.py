"""A grid of batch compositions that a configuration can run: what to predict when no traffic is given."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration

_DECODES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_PREFILLS = (0, 128, 512, 1024, 2048, 4096, 8192)
_CONTEXTS = (512, 2048, 8192)


def operating_points(configuration: ServingConfiguration) -> pd.DataFrame:
    """Return mixed prefill and decode batches within the engine's limits.

    Decode batches double up to max_num_seqs, prefill chunks up to the token budget, contexts of 512 to 8192 tokens per request
    as far as the KV cache and the LLM's longest context allow. One prefill request at a time, nothing of it computed before.

    Returns
    -------
    DataFrame
        Columns of a step trace but `step_time_s`; `regime` names the kind of batch: decode, prefill or mixed.
    """
    engine, llm = configuration.engine, configuration.llm
    longest = min(max(_CONTEXTS[0], 1), llm.max_context_tokens)
    contexts = sorted({min(c, llm.max_context_tokens) for c in _CONTEXTS} | {longest})
    decodes = sorted({min(d, engine.max_num_seqs) for d in _DECODES})
    prefills = sorted({min(p, engine.max_num_batched_tokens, llm.max_context_tokens) for p in _PREFILLS})
    rows = []
    for context in contexts:
        for decode in decodes:
            for prefill in prefills:
                requests = decode + (prefill > 0)
                if decode + prefill == 0 or decode + prefill > engine.max_num_batched_tokens:
                    continue
                if requests > engine.max_num_seqs or decode * context + prefill > engine.kv_capacity_tokens:
                    continue
                kind = "mixed" if decode and prefill else ("decode" if decode else "prefill")
                rows.append((prefill, decode, context, requests, kind))
    frame = pd.DataFrame(rows, columns=["prefill_tokens", "decode_tokens", "context", "running_requests", "regime"])
    # Without decodes the context has no meaning: keep one of each.
    frame = frame[(frame["decode_tokens"] > 0) | (frame["context"] == contexts[0])].reset_index(drop=True)
    frame["prefill_requests"] = (frame["prefill_tokens"] > 0).astype(float)
    frame["decode_requests"] = frame["decode_tokens"].astype(float)
    frame["prefill_attention_tokens"] = frame["prefill_tokens"] ** 2 / 2.0
    frame["context_tokens"] = (frame.pop("context") * frame["decode_tokens"]).astype(float)
    frame["waiting_requests"] = 0.0
    used = frame["context_tokens"] + frame["prefill_tokens"]
    frame["kv_usage"] = np.minimum(used / engine.kv_capacity_tokens, 1.0)
    for name in ("prefill_tokens", "decode_tokens", "running_requests"):
        frame[name] = frame[name].astype(float)
    frame.insert(0, "step_id", np.arange(len(frame)))
    return frame
