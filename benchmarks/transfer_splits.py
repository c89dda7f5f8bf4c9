"""Which configurations are donors, and which rows of a target calibrate and which judge: shared by the benchmarks."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hfdtl_bayes import sample
from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.traces import split_by_blocks, time_blocks

DONORS = (
    "llama3-8b_h100-sxm_tp1_vllm0.24.0",
    "mixtral-8x7b_h100-sxm_tp2_vllm0.24.0",
    "llama3-8b_a100-sxm_tp1_vllm0.14.0",
)
"""The three donors of composed GPU steps that every figure of the README is about."""

DONOR_SETS = {
    "gpu_steps": {
        "standard": DONORS,
        "five": (*DONORS, "llama3-70b_b200-sxm_tp2_vllm0.24.0", "qwen3-30b-a3b_h100-sxm_tp2_vllm0.24.0"),
        "two": DONORS[:2],
        "only dense": (DONORS[0], DONORS[2], "qwen3-14b_h100-sxm_tp2_vllm0.24.0"),
    },
    "vllm_cpu": {
        "standard": sample.DONORS,
        "five": (*sample.DONORS, "c03_llama-s_seqs128", "c07_llama-s_fp32"),
        "two": sample.DONORS[:2],
    },
}
"""By store and name. `five` adds another GPU generation and a fine-grained mixture of experts; `only dense` has no mixture of
experts but, for the all-reduce, tensor parallelism."""

COUNTS = (10, 25, 50, 100, 250, 500)
"""Numbers of calibration rows."""

LIGHT, HEAVY = 32, 64
"""Concurrencies up to and from which composed traffic counts as light and heavy."""
LIGHT_LOAD, HEAVY_LOAD = 0.5, 0.85
"""The same for the recorded engine, as shares of its capacity."""

FINE_GRAINED = 32
"""Experts per layer from which a mixture of experts counts as fine-grained: Mixtral has 8, Qwen3-30B-A3B 128."""


@dataclass(frozen=True)
class Split:
    """Rows a target may be calibrated on, and rows that judge; in time order, no row in both.

    Attributes
    ----------
    name : str
    pool : DataFrame
        Calibration rows are drawn from it.
    test : DataFrame
    shift : bool
        Whether the test is other traffic than the pool.
    """

    name: str
    pool: pd.DataFrame
    test: pd.DataFrame
    shift: bool = True

    def drawn(self, count: int, seed: int) -> pd.DataFrame:
        """Return `count` rows of the pool at random, in time order; those of a smaller count are among those of a larger."""
        order = np.random.default_rng([seed, 1]).permutation(len(self.pool))
        return self.pool.iloc[np.sort(order[:count])]


def gpu_splits(frame: pd.DataFrame, seed: int) -> list[Split]:
    """Split composed steps at random and by four shifts of traffic; a split whose test would be empty is left out.

    Batches are composed one by one with independent noise, so a random split holds back what it should.
    """
    order = np.random.default_rng(seed).permutation(len(frame))
    most = max(COUNTS)
    chat, summaries = frame["regime"] == "conv", frame["regime"] == "arxiv"
    light, heavy = frame["target_concurrency"] <= LIGHT, frame["target_concurrency"] >= HEAVY
    decode = frame["prefill_tokens"] == 0
    made = [
        Split("random", frame.iloc[np.sort(order[:most])], frame.iloc[np.sort(order[most:])], shift=False),
        Split("low to high concurrency", frame[light], frame[heavy]),
        Split("chat to summarisation", frame[chat], frame[summaries]),
        Split("decode-only to mixed", frame[decode], frame[~decode]),
        Split("light chat to heavy others", frame[chat & light], frame[~chat & heavy]),
    ]
    return [s for s in made if len(s.pool) >= min(COUNTS) and len(s.test)]


def load(regime: str) -> float:
    """Return the load a regime of the recorded engine is named after, as a share of its capacity; NaN for another name."""
    found = re.fullmatch(r"load(\d+(?:\.\d+)?)", regime)
    return float(found[1]) if found else float("nan")


def engine_splits(frame: pd.DataFrame) -> list[Split]:
    """Split recorded steps by time, the last 30 % of every regime's blocks held out, and by load."""
    pool, test = split_by_blocks(frame, 0.3, DEFAULT_BLOCK_LENGTH)
    loads = frame["regime"].map(load)
    return [
        Split("held-out time blocks", pool, test, shift=False),
        Split("low to high load", frame[loads <= LIGHT_LOAD], frame[loads >= HEAVY_LOAD]),
    ]


def splits(store: str, frame: pd.DataFrame, seed: int) -> list[Split]:
    """Return the splits of one target of a store, by the store's name."""
    return gpu_splits(frame, seed) if store == "gpu_steps" else engine_splits(frame)


def spread_blocks(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return the rows of at most so many time blocks, evenly spread over the frame and whole."""
    blocks = time_blocks(frame, DEFAULT_BLOCK_LENGTH)
    known = np.unique(blocks)
    kept = known[np.unique(np.linspace(0, len(known) - 1, min(most, len(known))).round().astype(int))]
    return frame[np.isin(blocks, kept)]


def observed_s(test: pd.DataFrame) -> np.ndarray:
    """Return what errors are measured against: the noise-free step time where it is known, else the measured one."""
    return test["expected_step_time_s" if "expected_step_time_s" in test.columns else "step_time_s"].to_numpy()


def mape(predicted_s: np.ndarray, test: pd.DataFrame) -> float:
    """Return the mean absolute percentage error in per cent, against `observed_s`."""
    truth = observed_s(test)
    return float(100 * np.mean(np.abs(predicted_s - truth) / truth))


def unlike(configuration: ServingConfiguration, donors: list[ServingConfiguration]) -> str:
    """Return in what a configuration is unlike every donor: its GPU, fine-grained experts, or both; empty if in neither."""
    reasons = []
    if configuration.hardware.name not in {d.hardware.name for d in donors}:
        reasons.append(configuration.hardware.name)
    if configuration.llm.num_experts >= FINE_GRAINED > max(d.llm.num_experts for d in donors):
        reasons.append("fine-grained MoE")
    return ", ".join(reasons)
