"""Request spans of stock vLLM: no events, but latencies from which the journey follows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hfdtl_bayes.traces.readers.whole_numbers import whole


def request_of_span(request: str, span: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a stock ``llm_request`` span into a request in nanoseconds of the wall clock.

    arrival = start of the span; first token = arrival + time_to_first_token; scheduled = first token - time_in_model_prefill;
    queued = scheduled - time_in_queue; finished = arrival + e2e.

    Raises
    ------
    ValueError
        Naming the attribute that is missing or no duration.
    """

    def seconds(name: str) -> int:
        value = attributes.get(f"gen_ai.latency.{name}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"gen_ai.latency.{name} is missing or not a number")
        if value < 0:
            raise ValueError(f"gen_ai.latency.{name} is negative")
        return round(value * 1e9)

    if not request:
        raise ValueError("gen_ai.request.id is missing")
    arrival = whole(span.get("startTimeUnixNano"), "startTimeUnixNano")
    first, e2e = seconds("time_to_first_token"), seconds("e2e")
    scheduled = first - seconds("time_in_model_prefill")
    if first > e2e:
        raise ValueError("gen_ai.latency.time_to_first_token is above gen_ai.latency.e2e")
    return {
        "request_id": request,
        "arrival_ns": arrival,
        "queued_ns": arrival + scheduled - seconds("time_in_queue"),
        "scheduled_ns": arrival + scheduled,
        "first_token_ns": arrival + first,
        "finished_ns": arrival + e2e,
        "prompt_tokens": whole(attributes.get("gen_ai.usage.prompt_tokens"), "gen_ai.usage.prompt_tokens", 1),
        "output_tokens": whole(attributes.get("gen_ai.usage.completion_tokens"), "gen_ai.usage.completion_tokens"),
    }
