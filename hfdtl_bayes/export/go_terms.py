"""The features of a set as Go: what depends on the state as an expression, what depends on the configuration as numbers.

Most features are polynomials of degree two at most in the columns of a row. Their coefficients are read off the feature itself, at rows
with ones and twos in them, for each configuration; that they give the feature's numbers everywhere is tested on random rows at
every export. So a user's own features export too, as long as they are of that form.

The others are bends, gates and the expected number of distinct experts. Their mathematics stands here a second time, as Go text beside
the constants it needs, and is known by the formula (the callable) of the feature. The test file written with every export holds
the feature set's own numbers, so `go test` proves what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ExportError
from hfdtl_bayes.features import Feature, Level, candidate, candidate_names, feature_set
from hfdtl_bayes.features import physics as p

FloatArray = NDArray[np.float64]

STEP_FIELDS = {
    "prefill_tokens": "PrefillTokens",
    "decode_tokens": "DecodeTokens",
    "prefill_requests": "PrefillRequests",
    "decode_requests": "DecodeRequests",
    "prefill_attention_tokens": "PrefillAttentionTokens",
    "context_tokens": "ContextTokens",
    "waiting_requests": "WaitingRequests",
    "running_requests": "RunningRequests",
    "kv_usage": "KVUsage",
}
REQUEST_FIELDS = {
    "prompt_tokens": "PromptTokens",
    "waiting_requests": "WaitingRequests",
    "running_requests": "RunningRequests",
    "kv_usage": "KVUsage",
}
"""Columns of the trace store and the fields of the Go structs that hold them."""

_TOLERANCE = 1e-11
"""Relative to the largest value of a feature: rounding, and nothing else."""


@dataclass(frozen=True)
class GoTerm:
    """One feature in Go.

    Attributes
    ----------
    expression : str
        Over the state `s`, the constants `k`, and the locals it names.
    locals : tuple of str
        Names of `LOCALS` it uses.
    constants : dict of str to list of str
        Fields of the constants' struct, each with one literal per configuration.
    """

    expression: str
    locals: tuple[str, ...] = ()
    constants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


LOCALS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "tokens": ("s.PrefillTokens + s.DecodeTokens", (), ()),
    "requests": ("s.PrefillRequests + s.DecodeRequests", (), ()),
    "dense": ("gemmExcess(tokens, k.gemms) + gemmExcess(requests, k.head)", ("tokens", "requests"), ("gemms",)),
    "hit": ("k.experts.hit(tokens)", ("tokens",), ("experts", "gemms")),
    "routed": ("k.experts.excess(tokens, hit)", ("tokens", "hit"), ("experts", "gemms")),
}
"""Values that several features share: expression, other locals it uses, templates it needs."""

FIELD_TYPES = {"gemms": "[]gemm", "head": "[]gemm", "experts": "experts"}
"""Types of the constants that are no float64."""


_KEYWORDS = frozenset(
    {"break", "case", "chan", "const", "continue", "default", "defer", "else", "fallthrough", "for", "func", "go"}
    | {"goto", "if", "import", "interface", "map", "package", "range", "return", "select", "struct", "switch", "type", "var"}
)
"""Words that name nothing in Go."""


def camel(name: str) -> str:
    """Return a snake_case name as the name of a Go field: kv_read as kvRead; never a keyword, nor one of `FIELD_TYPES`."""
    words = [w for w in "".join(c if c.isascii() and c.isalnum() else "_" for c in name).split("_") if w] or ["unnamed"]
    joined = words[0][:1].lower() + words[0][1:] + "".join(w[:1].upper() + w[1:] for w in words[1:])
    taken = joined in _KEYWORDS or joined in FIELD_TYPES or joined[0].isdigit()
    return f"feature{joined[:1].upper()}{joined[1:]}" if taken else joined


def number(value: float) -> str:
    """Return a float64 as a Go literal with every digit.

    Raises
    ------
    ExportError
        If it is not finite.
    """
    if not np.isfinite(value):
        raise ExportError(f"a constant of the Go source is {value}; check the configuration")
    return repr(float(value))


def go_term(feature: Feature, configurations: Sequence[ServingConfiguration], fields: Mapping[str, str]) -> GoTerm:
    """Return a feature as Go for several configurations.

    Parameters
    ----------
    feature : Feature
        Base or residual.
    configurations : sequence of ServingConfiguration
    fields : mapping of str to str
        `STEP_FIELDS` or `REQUEST_FIELDS`.

    Raises
    ------
    ExportError
        If it reads a column the state lacks, or is neither a polynomial of degree two nor known by its formula.
    """
    special = _SPECIAL.get(feature.compute)
    if special is not None:
        return special(configurations)
    foreign = [c for c in feature.columns if c not in fields]
    if foreign:
        raise ExportError(
            f"feature {feature.name!r} reads the column(s) {', '.join(foreign)}, which no state of the Go source has; it has "
            f"{', '.join(fields)}. Fit features without it"
        )
    found = [_polynomial(feature, c, tuple(fields)) for c in configurations]
    used = [m for m in found[0] if any(f[m] for f in found)]
    if not used:
        return GoTerm("0")
    parts: list[list[str]] = []
    constants = {}
    for monomial in used:
        name = camel("_per_".join([feature.name, "_".join(monomial)]) if monomial else feature.name)
        constants[name] = tuple(number(f[monomial]) for f in found)
        parts.append([f"k.{name}", *(f"s.{fields[c]}" for c in monomial)])
    if len(parts) == 1:
        return GoTerm(" * ".join(parts[0]), (), constants)
    # float64() keeps processors from fusing a product with a sum.
    expression = " + ".join(f"float64({'*'.join(x)})" if len(x) > 1 else x[0] for x in parts)
    return GoTerm(expression, (), constants)


def _polynomial(feature: Feature, c: ServingConfiguration, columns: tuple[str, ...]) -> dict[tuple[str, ...], float]:
    """Return the coefficients of a feature as a polynomial of degree two, by its monomials, zeros included."""
    size = len(columns)

    def at(rows: FloatArray) -> FloatArray:
        frame = pd.DataFrame(rows, columns=list(columns))
        return np.array(feature.compute(frame, c), dtype=float)

    pairs = list(combinations_with_replacement(range(size), 2))
    ones = np.eye(size)
    values = at(np.vstack([np.zeros(size), ones, *(ones[i] + ones[j] for i, j in pairs)]))
    zero, single, double = values[0], values[1 : size + 1], values[size + 1 :]
    found: dict[tuple[str, ...], float] = {(): float(zero)}
    second = {}
    for (i, j), value in zip(pairs, double, strict=True):
        curve = value - single[i] - single[j] + zero
        if abs(curve) <= 1e-12 * max(np.abs(values).max(), 1e-300):
            curve = 0.0
        second[i, j] = curve / 2 if i == j else curve
    for i in range(size):
        slope = single[i] - zero - second[i, i]
        found[columns[i],] = 0.0 if abs(slope) <= 1e-15 * max(np.abs(values).max(), 1e-300) else float(slope)
    found |= {(columns[i], columns[j]): float(v) for (i, j), v in second.items()}
    # Powers of the ones above would agree with any gate; these rows would not.
    rng = np.random.default_rng(0)
    rows = np.exp(rng.uniform(-3, 8, (512, size))) * (rng.random((512, size)) < 0.7)
    expected = at(rows)
    by_name = dict(zip(columns, rows.T, strict=True))
    own = sum(v * np.prod([by_name[c] for c in m], axis=0) if m else np.full(len(rows), v) for m, v in found.items())
    # A coefficient relative to its feature's largest value would hide the small ones.
    if not (np.abs(own - expected) <= _TOLERANCE * np.maximum(np.abs(expected), np.abs(values).max())).all():
        raise ExportError(
            f"feature {feature.name!r} ({feature.formula}) cannot be written as Go: it is no polynomial of degree two in "
            f"{', '.join(columns)} and none of the package's own terms. Fit features without it"
        )
    return found


# The package's own features that are no polynomials.


def _gemm_fields(configurations: Sequence[ServingConfiguration]) -> dict[str, tuple[str, ...]]:
    """Return the dense GEMMs of each configuration, those per token and the output head, per request."""
    settings = p.SETTINGS

    def literal(c: ServingConfiguration, head: bool) -> str:
        peak, width = p.peak_flops(c) * settings.compute_efficiency, c.hardware.memory_bandwidth * settings.memory_efficiency
        rows = []
        for g in p.dense_gemms(c):
            if g.per_request is head:
                seconds = (
                    2.0 * g.inner * g.outer / peak,
                    g.inner * g.outer * g.bytes_per_param / width,
                    (g.inner + g.outer) * 2 / width,
                )
                rows.append("{" + ", ".join(number(v) for v in (g.count, *seconds)) + "}")
        return "[]gemm{" + ", ".join(rows) + "}"

    return {
        "gemms": tuple(literal(c, False) for c in configurations),
        "head": tuple(literal(c, True) for c in configurations),
    }


def _work(configurations: Sequence[ServingConfiguration]) -> dict[str, tuple[str, ...]]:
    """Return the seconds of dense GEMMs per token and per request at peak."""

    def of(c: ServingConfiguration, head: bool) -> str:
        flops = sum(2.0 * g.count * g.inner * g.outer for g in p.dense_gemms(c) if g.per_request is head)
        return number(flops / p.peak_flops(c))

    return {
        "gemmPerToken": tuple(of(c, False) for c in configurations),
        "gemmPerRequest": tuple(of(c, True) for c in configurations),
    }


def routing_name(c: ServingConfiguration) -> str:
    """Return the name of the Go variable with the probabilities to miss each expert."""
    return f"miss{c.llm.num_experts}Top{c.llm.num_experts_per_token}"


def _expert_fields(configurations: Sequence[ServingConfiguration]) -> dict[str, tuple[str, ...]]:
    def literal(c: ServingConfiguration) -> str:
        if not c.llm.num_moe_layers:
            return "experts{}"
        read = p.expert_weight_read_s(pd.DataFrame({"prefill_tokens": [1e9], "decode_tokens": [0.0]}), c)[0] / c.llm.num_experts
        one_token = pd.DataFrame({"prefill_tokens": [1.0], "decode_tokens": [0.0]})
        per_row = p.expert_gemm_s(one_token, c)[0]
        return f"experts{{{routing_name(c)}, {c.engine.data_parallel}, {number(read)}, {number(per_row)}}}"

    return {"experts": tuple(literal(c) for c in configurations)}


def routing_values(c: ServingConfiguration) -> tuple[float, ...]:
    """Return the probability that one token misses each routed expert."""
    hit = p.expert_inclusion_probability(c.llm.num_experts, c.llm.num_experts_per_token, p.SETTINGS.routing_skew)
    return tuple(float(1.0 - q) for q in hit)


def _gemm_hidden(configurations: Sequence[ServingConfiguration]) -> GoTerm:
    work = "float64(k.gemmPerToken*tokens)+float64(k.gemmPerRequest*requests)"
    constants = _gemm_fields(configurations) | _work(configurations)
    return GoTerm(f"math.Max({work}-dense, 0)", ("tokens", "requests", "dense"), constants)


def _any_experts(configurations: Sequence[ServingConfiguration]) -> bool:
    return any(c.llm.num_moe_layers for c in configurations)


def _gemm_excess(configurations: Sequence[ServingConfiguration]) -> GoTerm:
    constants = _gemm_fields(configurations)
    if not _any_experts(configurations):
        return GoTerm("dense", ("tokens", "requests", "dense"), constants)
    slower = p.SETTINGS.compute_efficiency / p.SETTINGS.expert_compute_efficiency
    return GoTerm(
        f"dense + float64({number(slower)}*routed)",
        ("tokens", "requests", "dense", "hit", "routed"),
        constants | _expert_fields(configurations),
    )


def _expert_weight_read(configurations: Sequence[ServingConfiguration]) -> GoTerm:
    if not _any_experts(configurations):
        return GoTerm("0")
    return GoTerm("hit * k.experts.readS", ("tokens", "hit"), _expert_fields(configurations))


def _expert_gemm_hidden(configurations: Sequence[ServingConfiguration]) -> GoTerm:
    if not _any_experts(configurations):
        return GoTerm("0")
    constants = _expert_fields(configurations) | _gemm_fields(configurations)
    return GoTerm("math.Max(float64(tokens*k.experts.perRowS)-routed, 0)", ("tokens", "hit", "routed"), constants)


def _unit_row(**columns: float) -> pd.DataFrame:
    return pd.DataFrame([dict.fromkeys([*STEP_FIELDS, "prompt_attention_tokens"], 0.0) | columns])


def _slope(feature: Feature, c: ServingConfiguration, **columns: float) -> str:
    return number(float(np.asarray(feature.compute(_unit_row(**columns), c)).reshape(-1)[0]))


def _blis_prefill(configurations: Sequence[ServingConfiguration]) -> GoTerm:
    feature = feature_set("blis-physics")["prefill_compute"]
    constants = {
        "prefillComputePerToken": tuple(_slope(feature, c, prefill_tokens=1.0) for c in configurations),
        "prefillComputePerPair": tuple(_slope(feature, c, prompt_attention_tokens=1.0) for c in configurations),
    }
    return GoTerm(
        "float64(k.prefillComputePerToken*s.PrefillTokens) + float64(k.prefillComputePerPair*attended(s))",
        ("attended",),
        constants,
    )


def _blis_decode_kv(configurations: Sequence[ServingConfiguration]) -> GoTerm:
    feature = feature_set("blis-physics")["decode_kv_read"]
    per_token = tuple(_slope(feature, c, decode_tokens=1.0) for c in configurations)
    return GoTerm(
        "step(s.DecodeTokens > 0) * k.decodeKVReadPerToken * (s.ContextTokens + s.DecodeTokens)",
        ("step",),
        {"decodeKVReadPerToken": per_token},
    )


LOCALS["attended"] = ("", (), ("attended",))
LOCALS["step"] = ("", (), ("step",))


def _shape(
    name: str, expression: str, row: Callable[[ServingConfiguration], dict[str, float]], value: float, *used: str
) -> tuple[object, Callable[[Sequence[ServingConfiguration]], GoTerm]]:
    """Return a candidate that is one number per configuration times a shape, which is `value` in the row given."""
    feature = candidate(name).feature

    def term(configurations: Sequence[ServingConfiguration]) -> GoTerm:
        size = camel(name)
        sizes = tuple(number(float(_slope(feature, c, **row(c))) / value) for c in configurations)
        constants = {size: sizes}
        if "maxTokens" in expression:
            constants["maxTokens"] = tuple(number(c.engine.max_num_batched_tokens) for c in configurations)
        return GoTerm(f"k.{size} * {expression}", used, constants)

    return feature.compute, term


def _above(name: str, limit: int) -> tuple[object, Callable[[Sequence[ServingConfiguration]], GoTerm]]:
    return _shape(name, f"step(s.DecodeTokens > {limit})", lambda _c: {"decode_tokens": limit + 1.0}, 1.0, "step")


def _known() -> dict[object, Callable[[Sequence[ServingConfiguration]], GoTerm]]:
    roofline, physics = feature_set("roofline"), feature_set("blis-physics")
    known: dict[object, Callable[[Sequence[ServingConfiguration]], GoTerm]] = {
        roofline["gemm_hidden"].compute: _gemm_hidden,
        roofline["gemm_excess"].compute: _gemm_excess,
        roofline["expert_weight_read"].compute: _expert_weight_read,
        roofline["expert_gemm_hidden"].compute: _expert_gemm_hidden,
        candidate("gemm_excess").feature.compute: _gemm_excess,
        candidate("expert_weight_read").feature.compute: _expert_weight_read,
        physics["prefill_compute"].compute: _blis_prefill,
        physics["decode_kv_read"].compute: _blis_decode_kv,
    }

    def one_prefill(_c: ServingConfiguration) -> dict[str, float]:
        return {"prefill_tokens": 1.0, "prefill_requests": 1.0}

    shapes = [
        _shape("has_prefill", "step(s.PrefillTokens > 0)", one_prefill, 1.0, "step"),
        _shape(
            "mixed", "step(s.PrefillTokens > 0 && s.DecodeTokens > 0)", lambda _c: {"prefill_tokens": 1.0, "decode_tokens": 1.0},
            1.0, "step",
        ),
        _shape(
            "full_budget", "step(tokens >= k.maxTokens)", lambda c: {"prefill_tokens": float(c.engine.max_num_batched_tokens)},
            1.0, "tokens", "step",
        ),
        _shape("log_tokens", "math.Log1p(tokens)", one_prefill, float(np.log1p(1.0)), "tokens"),
        _shape("log_sequences", "math.Log1p(requests)", one_prefill, float(np.log1p(1.0)), "requests"),
        _shape("kv_nearly_full", "math.Max(s.KVUsage-0.9, 0)", lambda _c: {"kv_usage": 1.0}, 1.0 - 0.9),
    ]  # fmt: skip
    for name in candidate_names():
        if name.startswith("decode_above_"):
            shapes.append(_above(name, int(name.rsplit("_", 1)[1])))
    return known | dict(shapes)


_SPECIAL = _known()


def is_hat(feature: Feature) -> bool:
    """Return whether a feature is a knot of the package's discrepancy, which is exported as a table."""
    return feature.level is Level.DISCREPANCY and any(f.compute is feature.compute for f in _HATS)


_HATS = tuple(f for f in feature_set("roofline-discrepancy").features if f.level is Level.DISCREPANCY)
