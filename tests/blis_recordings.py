"""BLIS runs with known coefficients: how their files become configurations and step columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping

RUNS = ("A_llama-3.1-8b-instruct_H100_tp1", "B_llama-3.1-70b-instruct_A100-80_tp4", "C_mixtral-8x7b-v0.1_H100_tp2")
BLIS_HARDWARE = {"H100": (989.5, 1979.0, 3.35, 80), "A100-80": (312.0, 0.0, 2.039, 80)}


def blis_hardware(name: str) -> dict[str, float | str]:
    flops, fp8, bandwidth, memory = BLIS_HARDWARE[name]
    return {
        "name": name,
        "peak_flops": flops * 1e12,
        "peak_flops_fp8": fp8 * 1e12,
        "memory_bandwidth": bandwidth * 1e12,
        "memory_bytes": memory * 2.0**30,
        "interconnect_bandwidth": 300e9,
    }


def run_configuration(truth: dict) -> ServingConfiguration:
    """The configuration of a recorded BLIS run, from what its truth file says of the architecture."""
    arch = truth["arch"]
    llm = {
        "name": truth["model"],
        "num_layers": arch["L"],
        "hidden_size": arch["d"],
        "num_attention_heads": arch["H"],
        "num_key_value_heads": arch["dkv"] // arch["dh"],
        "head_dim": arch["dh"],
        "intermediate_size": arch["dffD"],
        "moe_intermediate_size": arch["dffM"],
        "shared_expert_intermediate_size": arch["sh"],
        "vocab_size": 32000,
        "num_experts": arch["E"],
        "num_experts_per_token": arch["k"] if arch["E"] else 0,
        "num_moe_layers": arch["nM"],
        "weight_bytes_per_param": arch["w"],
        "max_context_tokens": 131072,
    }
    engine = {
        "tensor_parallel": truth["tp"],
        "data_parallel": truth["dp"],
        "max_num_seqs": 256,
        "max_num_batched_tokens": truth["max_num_batched_tokens"],
        "kv_capacity_tokens": 400_000,
    }
    return configuration_from_mapping(
        {"config_id": truth["config_id"], "llm": llm, "hardware": blis_hardware(truth["hardware"]), "engine": engine}
    )


def run_steps(folder: Path, table: str = "clean") -> tuple[pd.DataFrame, pd.DataFrame]:
    """A recorded run as BLIS wrote it, and as step columns of the trace store."""
    raw = pd.read_csv(folder / f"{table}.steps.csv.gz")
    columns = {
        "prefill_tokens": raw["prefill_tokens"],
        "decode_tokens": raw["decode_tokens"],
        "prefill_requests": raw["num_prefill_reqs"],
        "decode_requests": raw["num_decode_reqs"],
        "context_tokens": raw["sum_decode_ctx"],
        "prefill_attention_tokens": raw["prefill_tokens"] ** 2 / 2,
        "prompt_attention_tokens": raw["sum_prefill_ti_si"],
    }
    return raw, pd.DataFrame(columns).astype(float)


BLACKBOX_RUNS = ("BB1_llama-3.1-8b-instruct_H100_tp2", "BB2_phi-4_H100_tp2")


def blackbox_steps(folder: Path) -> pd.DataFrame:
    """The steps of a recorded run of the older blackbox backend: microseconds, and tokens of each phase.

    The log has no batches. A request prefills whole in the step at which it is scheduled, then decodes one token a step.
    """
    steps = pd.read_csv(folder / "steps_from_debug_log.csv")
    requests = pd.read_csv(folder / "requests.csv").set_index("requestID")
    events = pd.read_csv(folder / "events_from_debug_log.csv")
    scheduled = events[events["event"] == "Schedule"].set_index("request")["t_us"]
    steps[["prefill_tokens", "decode_tokens"]] = 0.0
    for request, row in requests.iterrows():
        first = int(np.flatnonzero(steps["ts_start_us"] == scheduled[request]).item())
        steps.loc[first, "prefill_tokens"] += row["num_prefill_tokens"]
        steps.loc[first + 1 : first + row["num_decode_tokens"] - 1, "decode_tokens"] += 1
    return steps


def blackbox_requests(folder: Path) -> pd.DataFrame:
    """The requests of such a run as columns of the trace store."""
    events = pd.read_csv(folder / "events_from_debug_log.csv")
    at = events.pivot_table(index="request", columns="event", values="t_us", aggfunc="first")
    lengths = pd.read_csv(folder / "requests.csv").set_index("requestID")["num_prefill_tokens"]
    times = at[["Arrival", "Queued"]].dropna() * 1e-6
    times.columns = pd.Index(["arrival_s", "queued_s"])
    return times.join(lengths.rename("prompt_tokens"), how="inner").sort_values("arrival_s")
