"""A grid of batch compositions that a configuration can run: what to predict when no traffic is given."""

from __future__ import annotations

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration

_DECODES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_PREFILLS = (0, 128, 512, 1024, 2048, 4096, 8192)
_CONTEXTS = (512, 2048, 8192)
_SHORTEST_CONTEXT = 64
"""Where the KV cache is too small for a context of the grid, contexts shrink to what fits, but not below this: many requests
with next to no context are no batch that traffic makes."""


def operating_points(configuration: ServingConfiguration) -> pd.DataFrame:
    """Return decode, prefill and mixed batches within the engine's limits.

    Decode batches double up to max_num_seqs, prefill chunks up to the token budget, contexts of 512 to 8192 tokens per request
    as far as the KV cache and the LLM's longest context allow; a batch whose context does not fit has the longest that does.
    One prefill request at a time, nothing of it computed before. Mixed batches are absent only where the engine cannot run any
    (max_num_seqs or max_num_batched_tokens of 1, a KV cache of one token).

    Returns
    -------
    DataFrame
        Columns of a step trace but `step_time_s`; `regime` names the kind of batch: decode, prefill or mixed. Never empty.
    """
    engine, llm = configuration.engine, configuration.llm
    # Anything that serves at all holds one token.
    capacity = max(int(engine.kv_capacity_tokens), 1)
    longest = min(llm.max_context_tokens, capacity)
    budget = engine.max_num_batched_tokens
    decodes = sorted({min(d, engine.max_num_seqs, budget) for d in _DECODES})
    prefills = sorted({min(p, budget, longest) for p in _PREFILLS})
    if min(budget, longest) <= _PREFILLS[1]:
        # A chunk that fills the budget leaves no room for a decode.
        prefills = sorted({*prefills, max(min(budget, longest) // 2, 1)})
    shortest = min(_SHORTEST_CONTEXT, longest)
    batches = set()
    for decode in decodes:
        for prefill in prefills:
            requests = decode + (prefill > 0)
            left = capacity - prefill
            if not 1 <= decode + prefill <= budget or requests > engine.max_num_seqs or left < decode:
                continue
            if not decode:
                batches.add((prefill, 0, 0))
                continue
            fits = left // decode
            # The smallest batches are kept however little fits, so that no kind of batch goes missing.
            if fits >= shortest or decode == 1:
                batches |= {(prefill, decode, min(context, longest, fits)) for context in _CONTEXTS}
    table = np.array(sorted(batches), dtype=float).reshape(-1, 3)
    prefill_tokens, decode_tokens, context = table.T
    prefill_requests = (prefill_tokens > 0).astype(float)
    used = context * decode_tokens + prefill_tokens
    return pd.DataFrame(
        {
            "step_id": np.arange(len(table)),
            "prefill_tokens": prefill_tokens,
            "decode_tokens": decode_tokens,
            "prefill_requests": prefill_requests,
            "decode_requests": decode_tokens,
            "prefill_attention_tokens": prefill_tokens**2 / 2.0,
            "context_tokens": context * decode_tokens,
            "waiting_requests": np.zeros(len(table)),
            "running_requests": decode_tokens + prefill_requests,
            "kv_usage": np.minimum(used / engine.kv_capacity_tokens, 1.0),
            "regime": np.where(prefill_tokens == 0, "decode", np.where(decode_tokens == 0, "prefill", "mixed")),
        }
    )


def typical_batches(configuration: ServingConfiguration) -> pd.DataFrame:
    """Return the few batches by which anybody who runs an engine knows its speed.

    One request decoding, the largest decode batch, the largest prefill chunk, and the largest chunk beside the most decodes:
    operating points with a context nearest to 2048 tokens per request.

    Returns
    -------
    DataFrame
        Rows of `operating_points`, with what each is called in the column `batch`.
    """
    frame = operating_points(configuration)
    decode, prefill = frame["decode_tokens"].to_numpy(float), frame["prefill_tokens"].to_numpy(float)
    context = frame["context_tokens"].to_numpy(float) / np.maximum(decode, 1.0)
    unusual = np.where(decode > 0, np.abs(context - _CONTEXTS[1]), 0.0)
    named = {
        "one request decoding": ("decode", decode, prefill),
        "largest decode batch": ("decode", -decode, prefill),
        "largest prefill chunk": ("prefill", -prefill, decode),
        "most decodes beside a prefill chunk": ("mixed", -decode, -prefill),
    }
    found = []
    for name, (regime, first, second) in named.items():
        own = np.flatnonzero(frame["regime"] == regime)
        if len(own):
            order = np.lexsort((unusual[own], second[own], first[own]))
            found.append(frame.iloc[[own[order[0]]]].assign(batch=name))
    return pd.concat(found, ignore_index=True)
