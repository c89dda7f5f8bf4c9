"""The columns of a trace store, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column of a trace table.

    Parameters
    ----------
    name, unit, dtype, meaning : str
    required : bool
        A file without a required column is refused.
    minimum, maximum : float
        Accepted values, inclusive; rows outside are rejected and counted.
    exclusive_minimum : bool
        True if the minimum itself is not accepted.
    may_be_missing : bool
        A row without it is accepted: what it says is not known of every row.
    whole : bool
        True for counts; fractions are means over several steps, not a step.
    derivation : str
        How the column is derived where it is absent; empty if it cannot be.
    """

    name: str
    unit: str
    dtype: str
    meaning: str
    required: bool = False
    minimum: float = 0.0
    maximum: float = float("inf")
    exclusive_minimum: bool = False
    may_be_missing: bool = False
    whole: bool = False
    derivation: str = ""


STEP_SCHEMA: tuple[Column, ...] = (
    Column("step_id", "1", "int64", "number of the engine step, increasing", required=True, whole=True),
    Column("start_s", "s", "float64", "monotonic start time of the step", minimum=-float("inf"), may_be_missing=True),
    Column("step_time_s", "s", "float64", "duration of the engine's cycle", required=True, exclusive_minimum=True),
    Column("prefill_tokens", "token", "float64", "prompt tokens computed in the step", required=True, whole=True),
    Column("decode_tokens", "token", "float64", "output tokens computed in the step", required=True, whole=True),
    Column("prefill_requests", "request", "float64", "requests in prefill", whole=True, derivation="1 where prefill_tokens > 0"),
    Column("decode_requests", "request", "float64", "requests in decode", whole=True, derivation="decode_tokens"),
    Column(
        "prefill_attention_tokens",
        "token^2",
        "float64",
        "sum over prefill chunks of t * (already computed + t / 2): token pairs attended",
        derivation="prefill_tokens^2 / (2 * prefill_requests): equal chunks, nothing computed before",
    ),
    Column(
        "context_tokens",
        "token",
        "float64",
        "sum over decoding requests of their context length",
        derivation="kv_usage * kv_capacity_tokens",
    ),
    Column("waiting_requests", "request", "float64", "queue depth", whole=True),
    Column("running_requests", "request", "float64", "batch size", whole=True, derivation="prefill_requests + decode_requests"),
    Column(
        "kv_usage",
        "1",
        "float64",
        "share of the KV cache in use",
        maximum=1.0,
        derivation="min(1, context_tokens / kv_capacity_tokens)",
    ),
    Column("regime", "1", "str", "label of the traffic, for splits", derivation="'all'"),
)

REQUEST_SCHEMA: tuple[Column, ...] = (
    Column("request_id", "1", "str", "identifier of the request", required=True),
    Column("arrival_s", "s", "float64", "arrival at the server", minimum=-float("inf"), may_be_missing=True),
    Column("queued_s", "s", "float64", "entry into the scheduler's queue", required=True, minimum=-float("inf")),
    Column("scheduled_s", "s", "float64", "first scheduled", required=True, minimum=-float("inf")),
    Column("first_token_s", "s", "float64", "first output token", minimum=-float("inf"), may_be_missing=True),
    Column("finished_s", "s", "float64", "last output token; absent if unfinished", minimum=-float("inf"), may_be_missing=True),
    Column("prompt_tokens", "token", "float64", "length of the prompt", required=True, whole=True),
    Column("output_tokens", "token", "float64", "tokens generated", may_be_missing=True, whole=True),
    Column("cached_tokens", "token", "float64", "prompt tokens found in the prefix cache", may_be_missing=True, whole=True),
    Column("waiting_requests", "request", "float64", "queue depth at queueing", whole=True),
    Column("running_requests", "request", "float64", "batch size at queueing", whole=True),
    Column("kv_usage", "1", "float64", "share of the KV cache in use at queueing", maximum=1.0),
    Column("preemptions", "1", "float64", "times the request was preempted", may_be_missing=True, whole=True),
    Column("regime", "1", "str", "label of the traffic, for splits", derivation="'all'"),
)


def schema_table(schema: tuple[Column, ...]) -> str:
    """Return a schema as a Markdown table."""
    lines = ["| column | unit | required | meaning | derived where absent |", "|---|---|---|---|---|"]
    lines += [f"| {c.name} | {c.unit} | {'yes' if c.required else ''} | {c.meaning} | {c.derivation} |" for c in schema]
    return "\n".join(lines)
