"""Per-request snapshots of a step, summed to the exact composition of its batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hfdtl_bayes.traces.readers.whole_numbers import whole


def _count(attributes: Mapping[str, Mapping[str, Any]], name: str) -> int:
    if name not in attributes:
        raise ValueError(f"{name} is missing")
    return whole(next(iter(attributes[name].values())), name)


class Snapshots:
    """Sums over the snapshots of each step.

    vLLM calls a request with any output PREFILL or DECODE by that output alone. So after a preemption the recomputed prompt counts
    as decode there; here a request decodes in a step if it computes one token past its prompt and its earlier output.

    Whether num_computed_tokens holds this step's tokens already differs between versions: decoding requests tell, since
    prompt + output - 1 tokens were computed before a step that decodes.
    """

    def __init__(self) -> None:
        # Per step: prefill tokens, prefill requests, decode tokens, decode requests, context, t (c + t / 2), t^2, t (s + t / 2).
        self._sums: dict[int, list[float]] = {}
        self._computed_after = 0

    def add(self, attributes: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in one snapshot.

        Raises
        ------
        ValueError
            Naming the attribute that is missing or no whole number from 0.
        """
        step, tokens = _count(attributes, "step.id"), _count(attributes, "request.scheduled_tokens_this_step")
        prompt, output = _count(attributes, "request.num_prompt_tokens"), _count(attributes, "request.num_output_tokens")
        computed = _count(attributes, "request.num_computed_tokens")
        sums = self._sums.setdefault(step, [0.0] * 8)
        if not tokens:
            return
        held = prompt + output
        if output and tokens == 1 and computed in (held - 1, held):
            self._computed_after += 1 if computed == held else -1
            sums[2] += 1
            sums[3] += 1
            sums[4] += held - 1
            return
        sums[0] += tokens
        sums[1] += 1
        sums[5] += tokens * (computed + tokens / 2)
        sums[6] += tokens**2
        sums[7] += tokens * (held + tokens / 2)

    def fill(self, steps: pd.DataFrame) -> pd.DataFrame:
        """Return the steps with what snapshots say of them, where these account for all tokens of the step."""
        if not self._sums or steps.empty:
            return steps
        after = 1.0 if self._computed_after > 0 else 0.0
        ids = np.array(sorted(self._sums), dtype=np.int64)
        sums = np.array([self._sums[i] for i in ids.tolist()])
        prefill, prefills, decode, decodes, context, pairs, squares, whole_prompt = sums.T
        row = np.minimum(np.searchsorted(ids, steps["step_id"].to_numpy()), len(ids) - 1)
        tokens = (steps["prefill_tokens"] + steps["decode_tokens"]).to_numpy(dtype=float)
        use = (ids[row] == steps["step_id"].to_numpy()) & ((prefill + decode)[row] == tokens)
        values = {
            "prefill_tokens": prefill,
            "prefill_requests": prefills,
            "decode_tokens": decode,
            "decode_requests": decodes,
            "context_tokens": context,
            "prefill_attention_tokens": pairs - after * squares,
            "prompt_attention_tokens": whole_prompt,
        }
        return steps.assign(**{name: np.where(use, value[row], steps[name]) for name, value in values.items()})
