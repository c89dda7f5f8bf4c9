"""What a `blis` binary reads and writes in a simulation: TraceV2 in, per-request results out, and the model's config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.replay import Requests

_COLUMNS = (
    "request_id", "client_id", "tenant_id", "slo_class", "session_id", "round_index", "prefix_group", "prefix_length", "streaming",
    "input_tokens", "output_tokens", "text_tokens", "image_tokens", "audio_tokens", "video_tokens", "reason_ratio", "model",
    "deadline_us", "server_input_tokens", "arrival_time_us", "send_time_us", "first_chunk_time_us", "last_chunk_time_us", "num_chunks",
    "status", "error_message", "finish_reason",
)  # fmt: skip
"""TraceV2, by position; the optional columns are left out."""


def short_name(configuration: ServingConfiguration) -> str:
    """Return the name a model folder of BLIS has for a configuration: lower case, no spaces or slashes."""
    return re.sub(r"[^a-z0-9._-]+", "-", configuration.config_id.lower())


def huggingface_config(configuration: ServingConfiguration) -> dict[str, Any]:
    """Return the config.json that makes BLIS's basis functions those of a configuration."""
    llm = configuration.llm
    found: dict[str, Any] = {
        "num_hidden_layers": llm.num_layers,
        "hidden_size": llm.hidden_size,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_key_value_heads,
        "head_dim": llm.head_dim,
        "intermediate_size": llm.intermediate_size,
        "vocab_size": llm.vocab_size,
        "max_position_embeddings": llm.max_context_tokens,
        "torch_dtype": "float32" if llm.weight_bytes_per_param == 4 else "bfloat16",
        "tie_word_embeddings": llm.tie_word_embeddings,
    }
    if llm.is_moe:
        found |= {
            "num_local_experts": llm.num_experts,
            "num_experts_per_tok": llm.num_experts_per_token,
            "moe_intermediate_size": llm.moe_intermediate_size,
        }
        if 0 < llm.num_moe_layers < llm.num_layers:
            found["interleave_moe_layer_step"] = max(llm.num_layers // llm.num_moe_layers - 1, 1)
    return found


def write_trace_v2(requests: Requests, folder: Path, seed: int) -> tuple[Path, Path]:
    """Write requests as a TraceV2 to be replayed; returns header and data.

    BLIS adds the shared prefix to `input_tokens`, so that holds the rest of the prompt; request ids are the numbers of the requests.

    Raises
    ------
    InputError
        If the requests wait for each other, which a TraceV2 cannot say.
    """
    if requests.concurrency is not None:
        raise InputError(
            "a limit of requests in flight cannot be written in a TraceV2, which states when each is sent; simulate it with --engine "
            "builtin, or give BLIS its own workload file (--workload-spec)"
        )
    n = len(requests)
    arrival = np.rint(1e6 * (requests.arrival_s - requests.arrival_s.min())).astype(np.int64)
    shared = requests.shared_prefix_tokens
    frame = pd.DataFrame(dict.fromkeys(_COLUMNS, 0), index=range(n)).astype(object)
    frame["request_id"] = range(n)
    frame[["client_id", "tenant_id", "slo_class"]] = ["simulate", "simulate", "standard"]
    frame[["session_id", "model", "error_message", "finish_reason"]] = ""
    frame["prefix_group"] = [f"prefix-{g}" if s else "" for g, s in zip(requests.prefix_group, shared, strict=True)]
    frame["prefix_length"] = shared
    frame["streaming"] = "true"
    frame["input_tokens"] = requests.prompt_tokens - shared
    frame["output_tokens"] = requests.output_tokens
    frame["arrival_time_us"] = frame["send_time_us"] = arrival
    frame["status"] = "ok"
    header, data = folder / "requests.yaml", folder / "requests.csv"
    frame.to_csv(data, index=False)
    head = {
        "trace_version": 3,
        "time_unit": "microseconds",
        "mode": "generated",
        "warm_up_requests": 0,
        "workload_seed": int(seed),
    }
    header.write_text(yaml.safe_dump(head, sort_keys=False), encoding="utf-8")
    return header, data


def replayed_requests(path: Path, requests: Requests) -> pd.DataFrame:
    """Read what `blis replay --results-path` wrote, as journeys of the requests.

    Raises
    ------
    InputError
        If the file is not that, or requests are missing: a horizon or a full cache drops them in silence and exits with 0.
    """
    data = _json(path)
    if not isinstance(data, list) or not all(isinstance(r, dict) and {"request_id", "ttft_us", "e2e_us"} <= set(r) for r in data):
        raise InputError(
            f"{path.name} of blis replay is not a list of request_id, ttft_us and e2e_us; this blis is of another version"
        )
    found = (
        pd.DataFrame(data, columns=["request_id", "ttft_us", "e2e_us"]).astype({"request_id": "int64"}).set_index("request_id")
    )
    missing = sorted(set(range(len(requests))) - set(found.index))
    if missing:
        raise InputError(
            f"blis finished {len(requests) - len(missing)} of {len(requests)} requests, without request {missing[0]} for one: it drops what "
            "does not fit the KV cache or the horizon. Check kv_capacity_tokens and max_context_tokens of the configuration"
        )
    found = found.loc[list(range(len(requests)))]
    arrival = requests.arrival_s
    return pd.DataFrame(
        {
            "request_id": requests.request_id,
            "arrival_s": arrival,
            "first_token_s": arrival + found["ttft_us"].to_numpy(dtype=float) * 1e-6,
            "finished_s": arrival + found["e2e_us"].to_numpy(dtype=float) * 1e-6,
            "output_tokens": requests.output_tokens,
            "regime": requests.regime,
        }
    )


def run_requests(path: Path) -> pd.DataFrame:
    """Read the requests in what `blis run --metrics-path` wrote, as journeys.

    Raises
    ------
    InputError
        If the file is not that, or fewer requests were completed than injected.
    """
    data = _json(path)
    rows = data.get("requests") if isinstance(data, dict) else None
    needed = {"arrived_at", "ttft_ms", "e2e_ms", "num_decode_tokens"}
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and needed <= set(r) for r in rows):
        raise InputError(
            f"{path.name} of blis run holds no requests with {', '.join(sorted(needed))}; this blis is of another version"
        )
    injected, completed = data.get("injected_requests"), data.get("completed_requests")
    if isinstance(injected, int) and isinstance(completed, int) and completed < injected:
        raise InputError(f"blis completed {completed} of {injected} requests: give it a longer --horizon or more KV blocks")
    frame = pd.DataFrame(rows)
    arrival = frame["arrived_at"].astype(float)
    return pd.DataFrame(
        {
            "arrival_s": arrival,
            "first_token_s": arrival + frame["ttft_ms"].astype(float) * 1e-3,
            "finished_s": arrival + frame["e2e_ms"].astype(float) * 1e-3,
            "output_tokens": frame["num_decode_tokens"].astype(int),
        }
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"blis ended well and wrote no {path.name}; this blis is of another version") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} of blis cannot be read as JSON: {error}") from None
