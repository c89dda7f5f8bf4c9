"""Candidate features: what a latency model may lack, each with its unit, its prior and what naming it would mean.

A candidate is a `Feature` whose prior is centred at zero: nothing is believed of it but its size. Work terms are in seconds at the
hardware's peak, as in `roofline`; products are a work term times a share between 0 and 1 (how full the KV cache, the batch or the
token budget is), so that a coefficient of 0.3 reads "this work takes 30 % longer where the share is 1"; steps and hinges are in
reference decode steps (`reference_step_s`). So a coefficient transfers between configurations of unlike speed. Terms that are constant
within a configuration are of level CONFIG: only configurations that differ tell of them.

`transfer.discovery` finds which of them a fit lacks. Users add their own with `register_candidate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import physics
from hfdtl_bayes.features.feature import QUANTITIES, Feature, Level, PriorRange, Quantity, one, rows

FloatArray = NDArray[np.float64]

TILE_ROWS = 64
"""Rows of a tile of grouped GEMMs: the tokens of an expert are padded to a multiple of it."""
GRAPH_STEP = 8
"""Decode batches run as CUDA graphs are padded to a multiple of this size, the spacing of vLLM's capture sizes."""


@dataclass(frozen=True)
class Candidate:
    """A feature that a model may lack, and the consequences of naming it.

    Attributes
    ----------
    feature : Feature
        Level RESIDUAL, or CONFIG where it is constant within a configuration; prior centred at 0.
    meaning : str
        What a positive coefficient says of the engine.
    go : str
        The term as an expression in Go, over the totals of a step (`prefillTokens`, `decodeTokens`, `contextTokens`, `kvUsage`, ...)
        and fields of the configuration (`cfg.MaxNumSeqs`, ...); seconds per unit coefficient. Empty if not stated.
    blis : str
        The beta of BLIS's trained-physics backend whose basis holds the term or one close to it; empty if none does.
    quantity : str
    """

    feature: Feature
    meaning: str = ""
    go: str = ""
    blis: str = ""
    quantity: Quantity = "step_time"

    @property
    def name(self) -> str:
        """Name of the feature."""
        return self.feature.name


def _col(frame: pd.DataFrame, name: str) -> FloatArray:
    return frame[name].to_numpy(dtype=float)


def token_s(configuration: ServingConfiguration) -> float:
    """Return the seconds that the matrix products of one token take at peak FLOP/s on one GPU: flops_per_token / (tp * peak)."""
    return configuration.llm.flops_per_token / configuration.engine.tensor_parallel / physics.peak_flops(configuration)


def expert_rows(frame: pd.DataFrame, configuration: ServingConfiguration, tile: int = TILE_ROWS) -> tuple[FloatArray, FloatArray]:
    """Return the rows of one MoE layer's grouped GEMMs: as routed, and with each hit expert's share rounded up to whole tiles.

    T * k rows over D expected distinct experts; padded: D * tile * ceil(T * k / D / tile). Shapes (n,).
    """
    tokens = physics.batch_tokens(frame)
    routed = tokens * configuration.llm.num_experts_per_token
    hit = np.maximum(physics.distinct_experts(tokens, configuration, physics.SETTINGS.routing_skew), 1e-9)
    # Just above a whole number of tiles by rounding error is that number.
    return routed, np.maximum(hit * tile * np.ceil(routed / hit / tile - 1e-9), routed)


def expert_tile_padding_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Return the time that padding the experts' tiles takes at peak, shape (n,).

    2 * padded rows * expert_params * num_moe_layers / (tp * peak_flops).
    """
    llm = configuration.llm
    if not llm.num_moe_layers:
        return np.zeros(len(frame))
    routed, padded = expert_rows(frame, configuration)
    flops = 2.0 * (padded - routed) * llm.expert_params * llm.num_moe_layers
    return np.asarray(flops / configuration.engine.tensor_parallel / physics.peak_flops(configuration))


def kv_replication_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Return the part of the KV reads that is there because KV heads are replicated (more GPUs than heads), shape (n,)."""
    heads, tp = configuration.llm.num_key_value_heads, configuration.engine.tensor_parallel
    return physics.kv_read_s(frame, configuration) * (1.0 - 1.0 / max(tp / heads, 1.0))


def graph_padding(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Return the sequences that pad a decode-only batch to its CUDA graph's size, shape (n,)."""
    decode = _col(frame, "decode_tokens")
    return np.where(_col(frame, "prefill_tokens") == 0, np.ceil(decode / GRAPH_STEP) * GRAPH_STEP - decode, 0.0)


def _share(frame: pd.DataFrame, configuration: ServingConfiguration, name: str) -> FloatArray:
    """Return how full a column's limit is: tokens against the token budget, requests against the batch limit, KV as it is."""
    if name == "kv_usage":
        return _col(frame, name)
    limit = configuration.engine.max_num_batched_tokens if name == "prefill_tokens" else configuration.engine.max_num_seqs
    return _col(frame, name) / limit


_GO_SHARE = {
    "kv_usage": "kvUsage",
    "prefill_tokens": "float64(prefillTokens)/float64(cfg.MaxNumBatchedTokens)",
    "decode_tokens": "float64(decodeTokens)/float64(cfg.MaxNumSeqs)",
    "waiting_requests": "float64(waitingRequests)/float64(cfg.MaxNumSeqs)",
}
_LIMIT = {"kv_usage": "kv_usage", "prefill_tokens": "prefill_tokens / max_num_batched_tokens"}


def _said_share(name: str) -> str:
    return _LIMIT.get(name, f"{name} / max_num_seqs")


def _product(name: str, first: str, second: str, width: float, meaning: str) -> Candidate:
    """Return first times second: prefill work at peak, or reference steps, times shares."""
    if first == "prefill_tokens":
        formula = f"prefill_tokens * flops_per_token / tp / peak_flops * {_said_share(second)}"
        go = f"float64(prefillTokens)*flopsPerToken/(float64(cfg.TP)*peakFLOPS)*{_GO_SHARE[second]}"
    else:
        formula = f"{_said_share(first)} * {_said_share(second)} * reference step"
        go = f"{_GO_SHARE[first]}*{_GO_SHARE[second]}*referenceStep"

    def compute(frame: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
        work = (
            _col(frame, first) * token_s(c)
            if first == "prefill_tokens"
            else _share(frame, c, first) * physics.reference_step_s(c)
        )
        return work * _share(frame, c, second)

    columns = tuple(dict.fromkeys((first, second)))
    feature = Feature(name, Level.RESIDUAL, "s", formula, rows(compute), PriorRange(-width, width), columns)
    return Candidate(feature, meaning, go)


def _in_steps(
    name: str,
    formula: str,
    compute: Callable[[pd.DataFrame, ServingConfiguration], FloatArray | NDArray[np.bool_]],
    columns: Sequence[str],
    meaning: str,
    go: str,
    width: float = 0.5,
) -> Candidate:
    """Return a candidate in reference steps."""

    def seconds(frame: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
        return np.asarray(compute(frame, c), dtype=float) * physics.reference_step_s(c)

    said = f"{formula} * reference step"
    feature = Feature(name, Level.RESIDUAL, "s", said, rows(seconds), PriorRange(-width, width), tuple(columns))
    return Candidate(feature, meaning, f"{go}*referenceStep")


def _work(
    name: str,
    formula: str,
    compute: Callable[[pd.DataFrame, ServingConfiguration], FloatArray],
    columns: Sequence[str],
    meaning: str,
    go: str,
    blis: str = "",
    width: float = 2.0,
) -> Candidate:
    """Return a candidate of physical work, whose coefficient is of order one if it is really done."""
    feature = Feature(name, Level.RESIDUAL, "s", formula, rows(compute), PriorRange(-width, width), tuple(columns))
    return Candidate(feature, meaning, go, blis)


def _constant(
    name: str,
    formula: str,
    compute: Callable[[ServingConfiguration], float],
    meaning: str,
    go: str,
    blis: str,
    width: float = 2.0,
) -> Candidate:
    """Return a candidate that is constant within a configuration."""
    return Candidate(Feature(name, Level.CONFIG, "s", formula, one(compute), PriorRange(-width, width)), meaning, go, blis)


def _decode_above(threshold: int) -> Candidate:
    return _in_steps(
        f"decode_above_{threshold}", f"[decode_tokens > {threshold}]",
        lambda f, _c: _col(f, "decode_tokens") > threshold, ("decode_tokens",),
        f"decode batches above {threshold} run another kernel or leave the captured CUDA graphs", f"step(decodeTokens > {threshold})",
    )  # fmt: skip


_TOKENS = ("prefill_tokens", "decode_tokens")
_REQUESTS = ("prefill_requests", "decode_requests")

_STEP_TIME = (
    _work("kv_read", "context_tokens * KV bytes per token / tp / (attention's share of bandwidth)", physics.kv_read_s,
          ("context_tokens",), "decode attention reads the KV cache of every decoding request: its time grows with context, not with "
          "the number of tokens", "float64(contextTokens)*kvBytesPerToken/(float64(cfg.TP)*bandwidth)", "b2b"),
    _constant("weight_read", "bytes of attention, dense FFN, shared experts and head / tp / bandwidth", physics.weight_read_s,
              "every step reads the weights, whatever the batch", "weightBytes/(float64(cfg.TP)*bandwidth)", "b3"),
    _work("expert_weight_read", "expected bytes of the distinct routed experts hit / (tp * dp) / bandwidth",
          physics.expert_weight_read_s, _TOKENS, "a step reads the experts its tokens hit, few for a small batch and all for a large one",
          "distinctExperts(tokens)*expertBytes/(float64(cfg.TP*cfg.DP)*bandwidth)", ""),
    _work("gemm_work", "FLOPs of the dense GEMMs / tp / peak", physics.gemm_s, _TOKENS + _REQUESTS,
          "matrix products take time in proportion to tokens, divided by TP", "denseFLOPs(tokens)/(float64(cfg.TP)*peakFLOPS)",
          "b1a, b2a"),
    _work("gemm_excess", "smooth max(compute, memory) - memory of each GEMM, in ideal compute seconds",
          physics.gemm_excess_s, _TOKENS + _REQUESTS, "max(compute, memory): matrix products hide under the reading of weights until the "
          "batch is large", "math.Max(gemmCompute-weightRead, 0)", ""),
    _work("expert_gemm_work", "FLOPs of the routed experts / tp / peak", physics.expert_gemm_s, _TOKENS,
          "the experts' matrix products take time in proportion to tokens", "expertFLOPs(tokens)/(float64(cfg.TP)*peakFLOPS)",
          "b1a, b2a"),
    _work("expert_tile_padding", f"(tokens per hit expert rounded up to {TILE_ROWS}-row tiles - tokens) * experts' FLOPs / tp / peak",
          expert_tile_padding_s, _TOKENS, "grouped GEMMs compute whole tiles: few tokens per expert cost as much as a tile of them",
          f"(hit*{TILE_ROWS}*math.Ceil(routed/hit/{TILE_ROWS})-routed)*expertFLOPsPerRow/(float64(cfg.TP)*peakFLOPS)"),
    _work("distinct_experts", "expected distinct experts hit * num_moe_layers * reference host time per layer / num_experts",
          lambda f, c: physics.distinct_experts(physics.batch_tokens(f), c, physics.SETTINGS.routing_skew) / max(c.llm.num_experts, 1)
          * c.llm.num_moe_layers * physics.host_overheads(c).layer_s if c.llm.num_moe_layers else np.zeros(len(f)),
          _TOKENS, "a cost per expert that is hit: a group of the grouped GEMM, a launch",
          "distinctExperts(tokens)/float64(cfg.NumExperts)*float64(cfg.MoELayers)*hostPerLayer"),
    _work("prefill_attention", "4 * layers * heads / tp * head_dim * prefill_attention_tokens / peak", physics.prefill_attention_s,
          ("prefill_attention_tokens",), "prefill attends every pair of tokens: its time grows with the square of the prompt",
          "4*layers*heads/float64(cfg.TP)*headDim*attendedPairs/peakFLOPS", "b1a"),
    _work("all_reduce", "bytes of two ring all-reduces per layer / interconnect bandwidth * contention", physics.all_reduce_s, _TOKENS,
          "tensor parallelism sends activations over the links in every layer", "allReduceBytes(tokens)/linkBandwidth", "b4"),
    _work("sequences", "(prefill_requests + decode_requests) * reference host time per sequence",
          lambda f, c: physics.batch_requests(f) * physics.host_overheads(c).sequence_s, _REQUESTS,
          "the host spends time on every sequence of the batch", "float64(len(batch))*hostPerSequence", "b6"),
    _work("kv_replication", "KV reads * (1 - heads / tp where there are more GPUs than KV heads)", kv_replication_s,
          ("context_tokens",), "KV heads are replicated where there are more GPUs than heads", "kvRead*(1-kvHeads/float64(cfg.TP))"),
    _constant("layers", "num_layers * reference host time per layer", lambda c: c.llm.num_layers * physics.host_overheads(c).layer_s,
              "a launch per layer and step", "float64(cfg.NumLayers)*hostPerLayer", "b5"),
    _constant("moe_layers", "num_moe_layers * reference host time per layer",
              lambda c: c.llm.num_moe_layers * physics.host_overheads(c).layer_s, "routing, sorting and permuting per MoE layer",
              "float64(cfg.MoELayers)*hostPerLayer", "b8", 4.0),
    _product("prefill_kv_usage", "prefill_tokens", "kv_usage", 1.0, "prefill slows as the KV cache fills"),
    _product("prefill_waiting", "prefill_tokens", "waiting_requests", 0.5, "prefill slows while requests wait"),
    _product("prefill_decode", "prefill_tokens", "decode_tokens", 1.0, "prefill and decode in one step slow each other"),
    _product("prefill_squared", "prefill_tokens", "prefill_tokens", 1.0, "large chunks cost more per token than small ones"),
    _product("decode_kv_usage", "decode_tokens", "kv_usage", 1.0, "decode slows as the KV cache fills"),
    _product("decode_squared", "decode_tokens", "decode_tokens", 1.0, "large decode batches cost more per sequence than small ones"),
    _product("waiting_kv_usage", "waiting_requests", "kv_usage", 0.5, "the scheduler works more where requests wait for KV blocks"),
    _product("kv_usage_squared", "kv_usage", "kv_usage", 1.0, "the engine slows as the KV cache nears its limit"),
    _in_steps("waiting", "waiting_requests / max_num_seqs", lambda f, c: _share(f, c, "waiting_requests"), ("waiting_requests",),
              "the scheduler spends time on every waiting request", _GO_SHARE["waiting_requests"]),
    _in_steps("kv_nearly_full", "max(kv_usage - 0.9, 0) / 0.1", lambda f, _c: np.maximum(_col(f, "kv_usage") - 0.9, 0.0) / 0.1,
              ("kv_usage",), "the engine preempts and evicts where the KV cache is full", "math.Max(kvUsage-0.9, 0)/0.1"),
    _work("tokens_squared", "tokens * flops_per_token / tp / peak_flops * tokens / max_num_batched_tokens",
          lambda f, c: physics.batch_tokens(f) ** 2 * token_s(c) / c.engine.max_num_batched_tokens, _TOKENS,
          "work grows faster than the batch", "tokens*flopsPerToken/(float64(cfg.TP)*peakFLOPS)*tokens/float64(cfg.MaxNumBatchedTokens)",
          width=1.0),
    _in_steps("log_tokens", "log(1 + tokens) / log(1 + max_num_batched_tokens)",
              lambda f, c: np.log1p(physics.batch_tokens(f)) / np.log1p(c.engine.max_num_batched_tokens), _TOKENS,
              "a cost that grows with the first tokens and then levels off", "math.Log1p(tokens)/math.Log1p(maxTokens)", 1.0),
    _in_steps("log_sequences", "log(1 + requests) / log(1 + max_num_seqs)",
              lambda f, c: np.log1p(physics.batch_requests(f)) / np.log1p(c.engine.max_num_seqs), _REQUESTS,
              "a host cost that grows with the first sequences and then levels off", "math.Log1p(requests)/math.Log1p(maxSeqs)", 1.0),
    _in_steps("has_prefill", "[prefill_tokens > 0]", lambda f, _c: _col(f, "prefill_tokens") > 0, ("prefill_tokens",),
              "a step with prefill does not run as a captured CUDA graph", "step(prefillTokens > 0)"),
    _in_steps("mixed", "[prefill_tokens > 0 and decode_tokens > 0]",
              lambda f, _c: (_col(f, "prefill_tokens") > 0) & (_col(f, "decode_tokens") > 0), _TOKENS,
              "a step that mixes prefill and decode runs two attention kernels", "step(prefillTokens > 0 && decodeTokens > 0)"),
    _in_steps("full_budget", "[prefill_tokens + decode_tokens >= max_num_batched_tokens]",
              lambda f, c: physics.batch_tokens(f) >= c.engine.max_num_batched_tokens, _TOKENS,
              "steps that fill the token budget cost more: a chunk was cut, its rest is kept", "step(tokens >= cfg.MaxNumBatchedTokens)"),
    _decode_above(64), _decode_above(128), _decode_above(256),
    _work("graph_padding", f"sequences that pad a decode batch to a multiple of {GRAPH_STEP} * reference host time per sequence",
          lambda f, c: graph_padding(f, c) * physics.host_overheads(c).sequence_s, _TOKENS,
          "decode batches are padded to the sizes of captured CUDA graphs", "float64(padded-decodeTokens)*hostPerSequence"),
)  # fmt: skip


def _delay(quantity: Quantity) -> tuple[Candidate, ...]:
    """Candidates of a request's delay, in reference steps: queue depth as 30 of them where it is the batch limit, as in `roofline`."""
    queue = "float64(waitingRequests)/float64(cfg.MaxNumSeqs)"

    def made(name: str, formula: str, share: Callable[[pd.DataFrame, ServingConfiguration], FloatArray], columns: Sequence[str],
             meaning: str, go: str) -> Candidate:  # fmt: skip
        feature = Feature(
            name, Level.RESIDUAL, "s", f"{formula} * 30 reference steps",
            rows(lambda f, c: 30.0 * share(f, c) * physics.reference_step_s(c)), PriorRange(-1.0, 1.0), tuple(columns),
        )  # fmt: skip
        return Candidate(feature, meaning, f"30*{go}*referenceStep", "", quantity)

    def depth(f: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
        return _col(f, "waiting_requests") / c.engine.max_num_seqs

    def prompt(f: pd.DataFrame, c: ServingConfiguration) -> FloatArray:
        return _col(f, "prompt_tokens") / c.engine.max_num_batched_tokens

    return (
        made("queue_depth_kv_usage", "waiting_requests / max_num_seqs * kv_usage", lambda f, c: depth(f, c) * _col(f, "kv_usage"),
             ("waiting_requests", "kv_usage"), "a queue moves more slowly while the KV cache is full", f"{queue}*kvUsage"),
        made("queue_depth_prompt", "waiting_requests / max_num_seqs * prompt_tokens / max_num_batched_tokens",
             lambda f, c: depth(f, c) * prompt(f, c), ("waiting_requests", "prompt_tokens"),
             "long prompts wait longer in a queue than short ones", f"{queue}*promptTokens/maxTokens"),
        made("kv_usage_squared", "kv_usage^2 / 30", lambda f, _c: _col(f, "kv_usage") ** 2 / 30, ("kv_usage",),
             "waits grow as the KV cache nears its limit", "kvUsage*kvUsage/30"),
        made("prompt_share_squared", "(prompt_tokens / max_num_batched_tokens)^2 / 30", lambda f, c: prompt(f, c) ** 2 / 30,
             ("prompt_tokens",), "prompts of several chunks wait for room more than once", "promptShare*promptShare/30"),
    )  # fmt: skip


_CANDIDATES: dict[tuple[str, Quantity], Candidate] = {}
_OWN: set[tuple[str, Quantity]] = set()


def register_candidate(
    feature: Feature, *, meaning: str = "", go: str = "", blis: str = "", quantity: Quantity = "step_time", replace: bool = False
) -> Candidate:
    """Make a user's candidate known to `discover`, here and on the command line.

    Parameters
    ----------
    feature : Feature
        Level RESIDUAL or CONFIG, its prior centred at 0 and in multiples of its reference.
    meaning, go, blis : str
        As in `Candidate`.
    quantity : {"step_time", "queue_delay", "api_delay"}
    replace : bool
        True to put it in the place of a user's candidate of the same name.

    Returns
    -------
    Candidate

    Raises
    ------
    InputError
        If the level is BASE, the prior is not centred at 0 (data alone shall speak for it), the quantity is unknown, or the name is
        taken.

    Examples
    --------
    >>> from hfdtl_bayes.features.feature import Feature, Level, PriorRange
    >>> mine = Feature("swapped", Level.RESIDUAL, "block", "swapped_blocks", lambda f, c: f["swapped_blocks"].to_numpy(float),
    ...                PriorRange(-1.0, 1.0), ("swapped_blocks",), reference=1e-4)
    >>> register_candidate(mine, meaning="swapping KV blocks costs time", replace=True).name
    'swapped'
    """
    if quantity not in QUANTITIES:
        raise InputError(f"candidate {feature.name!r} explains {quantity!r}; accepted quantities are {', '.join(QUANTITIES)}")
    found = as_candidate(feature, meaning=meaning, go=go, blis=blis, quantity=quantity)
    key = (feature.name, quantity)
    if key in _OWN:
        raise InputError(f"{feature.name!r} is a candidate of this package and stays as it is; choose another name")
    if key in _CANDIDATES and not replace:
        raise InputError(
            f"a candidate {feature.name!r} for {quantity} exists; choose another name, or register it with replace=True"
        )
    _CANDIDATES[key] = found
    return found


def as_candidate(
    feature: Feature, *, meaning: str = "", go: str = "", blis: str = "", quantity: Quantity = "step_time"
) -> Candidate:
    """Return a feature as a candidate, checked; raises InputError as `register_candidate` does."""
    if feature.level is Level.BASE:
        raise InputError(
            f"candidate {feature.name!r} is of level base, whose slopes are believed to be there; give it level residual, or config if it "
            "is constant within a configuration"
        )
    if abs(feature.prior.mean) > 1e-9 * feature.prior.sd:
        raise InputError(
            f"the prior of candidate {feature.name!r} lies between {feature.prior.low:g} and {feature.prior.high:g}; centre it at 0, so that "
            "only data speak for the candidate"
        )
    return Candidate(feature, meaning, go, blis, quantity)


def candidate(name: str, quantity: Quantity = "step_time") -> Candidate:
    """Look a candidate up.

    Raises
    ------
    UnknownNameError
        If there is none of that name; the message lists those known.
    """
    if (name, quantity) not in _CANDIDATES:
        raise UnknownNameError(f"unknown candidate {name!r} for {quantity}; known are {', '.join(candidate_names(quantity))}")
    return _CANDIDATES[name, quantity]


def candidate_names(quantity: Quantity = "step_time") -> tuple[str, ...]:
    """Return the names of the candidates for a quantity."""
    return tuple(n for n, q in _CANDIDATES if q == quantity)


for _candidate in (*_STEP_TIME, *_delay("queue_delay"), *_delay("api_delay")):
    _CANDIDATES[_candidate.name, _candidate.quantity] = _candidate
    _OWN.add((_candidate.name, _candidate.quantity))
