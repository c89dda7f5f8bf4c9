"""A posterior as Go: one file with the hierarchical latencies of any number of configurations, and its table-driven test.

The file needs the standard library only. What depends on a configuration alone is computed here and written as numbers; what depends on
the state is written as Go (see `go_terms`). Coefficients come in their levels: those of the population once, each
configuration's deviation beside its config features. The discrepancy, where the features have one, is a table over log2 of the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ExportError
from hfdtl_bayes.export.go_terms import (
    FIELD_TYPES,
    LOCALS,
    REQUEST_FIELDS,
    STEP_FIELDS,
    go_term,
    is_hat,
    number,
    routing_name,
    routing_values,
)
from hfdtl_bayes.export.vectors import MICRO
from hfdtl_bayes.features import Feature, FeatureSet, feature_set, operating_points
from hfdtl_bayes.features.physics import SETTINGS
from hfdtl_bayes.features.roofline import finds_no_slot
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import config_to_constant, package_version

FloatArray = NDArray[np.float64]

PACKAGE = "latency"
"""Name of the Go package unless asked for another."""
_CLEAR_OF_TRUNCATION = 1e-4
"""Microseconds that golden values stay away from a whole one, so that the last bit of another processor changes none."""


@dataclass(frozen=True)
class GoSource:
    """Two Go files.

    Attributes
    ----------
    source : str
        `latency.go`.
    test : str
        `latency_test.go`.
    config_ids : tuple of str
    cases : int
        Golden values in the test.
    """

    source: str
    test: str
    config_ids: tuple[str, ...]
    cases: int


def go_source(
    posterior: LatencyPosterior,
    configurations: Sequence[ServingConfiguration],
    *,
    delays: LatencyPosterior | None = None,
    alpha0_s: Sequence[float] | None = None,
    package: str = PACKAGE,
    cases: int = 40,
    seed: int = 0,
) -> GoSource:
    """Write configurations as Go.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of step_time.
    configurations : sequence of ServingConfiguration
        Fitted, or never seen; at least one.
    delays : LatencyPosterior, optional
        Of api_delay (BLIS's QueueingTime: mind that its mean contains the wait for the running step) or queue_delay (which BLIS simulates
        itself), for ComputeAlphaLatency; it knows or predicts the same configurations.
    alpha0_s : sequence of float, optional
        Without `delays`: the idle delay of each configuration, seconds; 0 by default.
    package : str
        Name of the Go package.
    cases : int
        States per configuration in the test.
    seed : int
        Of a configuration never seen, and of the states.

    Raises
    ------
    ExportError
        If there is no configuration or one comes twice, a feature cannot be written as Go (it is named), the package's name is none, or a
        number is not finite.
    """
    ids = [c.config_id for c in configurations]
    if not ids or len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ExportError(
            f"go needs configurations of different names; {'twice: ' + ', '.join(twice) if twice else 'found none'}"
        )
    if posterior.feature_set.quantity != "step_time":
        raise ExportError(f"ComputeStepTime is of step times, this posterior is of {posterior.feature_set.quantity}")
    if delays is not None and delays.feature_set.quantity == "step_time":
        raise ExportError("ComputeAlphaLatency needs a posterior of api_delay or queue_delay, this one is of step_time")
    if not (package.isidentifier() and package.isascii() and package.islower()):
        raise ExportError(f"{package!r} is no name of a Go package; give lower-case letters and digits, such as {PACKAGE}")
    step = _Latency("step", posterior, configurations, STEP_FIELDS, seed)
    alpha = _Latency("alpha", delays, configurations, REQUEST_FIELDS, seed) if delays is not None else None
    idle = list(alpha0_s) if alpha0_s is not None else [0.0] * len(ids)
    needed = [t for n in step.locals for t in LOCALS[n][2]]
    knots = len(step.misfit[0]) if step.misfit is not None else 0
    names = [*_in_order(needed), *(["discrepancy"] if knots else [])]
    numbers = {
        "SHARPNESS": number(SETTINGS.sharpness),
        "COMPUTE_EFFICIENCY": number(SETTINGS.compute_efficiency),
        "MEMORY_EFFICIENCY": number(SETTINGS.memory_efficiency),
        "EXPERT_EFFICIENCY": number(SETTINGS.expert_compute_efficiency),
        "KNOTS": str(knots),
        "LAST_KNOT": str(knots - 1),
    }
    helpers = "".join(_filled(_template(n), numbers) for n in names)
    replaced = {
        "VERSION": package_version(),
        "PACKAGE": package,
        "FEATURE_SET": _line(posterior.feature_set.name),
        "DONORS": _line(", ".join(posterior.donors)) or "none",
        "INPUT_HASH": posterior.input_hash,
        "CONFIGURATION_FIELDS": _configuration_fields(step, alpha),
        "PLUS_DISCREPANCY": " + discrepancy" if step.misfit is not None else "",
        "DISCREPANCY_SUM": _DISCREPANCY_SUM if step.misfit is not None else "",
        "ALPHA_WAIT": _ALPHA_WAIT[delays.feature_set.quantity if delays is not None else "idle"],
        "ALPHA_FUNCTION": alpha.function() if alpha is not None else _IDLE_FUNCTION,
        "FEATURES": "\n".join(q.feature_function() for q in (step, alpha) if q is not None),
        "HELPERS": helpers,
        "DATA": _data(configurations, step, alpha, idle),
    }
    source = _filled(_template("latency"), replaced).rstrip("\n") + "\n"
    if "math." not in source.split("import (")[1].split(")", 1)[1]:
        source = source.replace('import (\n\t"math"\n\t"sort"\n)', 'import "sort"')
    step_cases = step.cases(cases, seed, "StepState")
    alpha_cases = alpha.cases(cases, seed, "RequestState") if alpha is not None else _idle_cases(ids, idle)
    test = _filled(
        _template("latency_test"),
        {
            "VERSION": package_version(),
            "PACKAGE": package,
            "STEP_CASES": "".join(step_cases),
            "ALPHA_CASES": "".join(alpha_cases),
        },
    )
    return GoSource(source, test, tuple(ids), len(step_cases) + len(alpha_cases))


_DISCREPANCY_SUM = """\
	prior := c.priorConfig
	for i, x := range features {
		prior += float64(priorMeans[i] * x)
	}
	total += float64(relativeError(s.PrefillTokens+s.DecodeTokens, &c.discrepancy) * prior)
"""

_ALPHA_WAIT = {
    "idle": "between its arrival and the queue of an idle engine",
    "api_delay": "between its arrival and the queue, the mean wait for the running step included: BLIS simulates that wait itself, so\n"
    "// use it in other simulators only",
    "queue_delay": "between the queue and its first step: BLIS simulates that wait itself, so use it in other simulators only",
}

_IDLE_FUNCTION = """\
func (c *Configuration) ComputeAlphaLatency(_ RequestState) int64 {
	return microseconds(c.idleSeconds, 0)
}
"""


@cache
def _template(name: str) -> str:
    return (files("hfdtl_bayes.export") / "templates" / f"{name}.go.tmpl").read_text(encoding="utf-8")


def _filled(template: str, values: dict[str, str]) -> str:
    """Fill the places of a template in one pass: what is filled in holds none, whatever a user's formula says."""
    return re.sub(r"<<([A-Z_]+)>>", lambda place: values[place[1]], template)


def _in_order(templates: Sequence[str]) -> list[str]:
    return [n for n in ("gemms", "experts", "attended", "step") if n in templates]


class _Latency:
    """One quantity of several configurations: its features as Go and the levels of its coefficients, in seconds per unit."""

    def __init__(
        self,
        name: str,
        posterior: LatencyPosterior,
        configurations: Sequence[ServingConfiguration],
        fields: dict[str, str],
        seed: int,
    ) -> None:
        self.name, self.posterior, self.configurations, self.fields = name, posterior, configurations, fields
        features = posterior.feature_set
        strange = [f.name for f in features.discrepancy if not is_hat(f)]
        if strange:
            raise ExportError(
                f"discrepancy feature(s) {', '.join(strange)} cannot be written as Go: only the package's own, a table, can"
            )
        if features.support is not None and features.support is not finds_no_slot:
            raise ExportError(
                f"the support of feature set {features.name!r} cannot be written as Go: it is not one of the package's own"
            )
        self.features: tuple[Feature, ...] = features.pooled
        self.terms = [go_term(f, configurations, fields) for f in self.features]
        self.locals = _with_their_own([n for t in self.terms for n in t.locals])
        self.constants: dict[str, tuple[str, ...]] = {}
        for f, t in zip(self.features, self.terms, strict=True):
            same = sorted(n for n, values in t.constants.items() if self.constants.get(n, values) != values)
            if same:
                raise ExportError(
                    f"feature {f.name!r} and another of {features.name!r} have one name in Go ({', '.join(same)}); rename one"
                )
            self.constants |= t.constants
        pooled = len(self.features)
        references = features.references[:pooled]
        beta, delta = posterior.draws_of("beta").mean(axis=0), posterior.draws_of("delta").mean(axis=0)
        gamma = posterior.draws_of("gamma").mean(axis=0) if features.config else np.zeros(0)
        population = np.concatenate([beta, delta])
        self.theta = [posterior.draws(c, seed).mean for c in configurations]
        deviations = []
        for c, theta in zip(configurations, self.theta, strict=True):
            own = theta[:pooled] - population
            if features.config:
                own[len(features.base)] -= float(gamma @ config_to_constant(features, c))
            deviations.append(own * references)
        self.population, self.deviations = population * references, deviations
        self.gamma = gamma * np.array([f.reference for f in features.config])
        self.config_rows = [features.config_row(c) / [f.reference for f in features.config] for c in configurations]
        self.misfit: list[FloatArray] | None = None
        if features.discrepancy:
            self._take_misfit(features)

    def _take_misfit(self, features: FeatureSet) -> None:
        roofline = feature_set("roofline")
        hats = feature_set("roofline-discrepancy").discrepancy
        if tuple(f.compute for f in features.features if f not in features.discrepancy) != tuple(
            f.compute for f in roofline.features
        ):
            raise ExportError(
                f"feature set {features.name!r} has the roofline's discrepancy without being the roofline; go cannot write it"
            )
        place = {f.compute: i for i, f in enumerate(hats)}
        self.misfit = []
        for theta in self.theta:
            knots = np.zeros(len(hats))
            for f, value in zip(features.discrepancy, theta[len(self.features) :], strict=True):
                knots[place[f.compute]] += value * f.reference
            self.misfit.append(knots)
        # The hats weigh the time at the roofline's own prior means, whatever priors a user fitted with.
        self.prior_means = np.array([f.prior.mean * f.reference for f in roofline.pooled])
        config_means = np.array([f.prior.mean * f.reference for f in roofline.config])
        self.prior_config = [float(config_means @ row) for row in self.config_rows]

    def feature_function(self) -> str:
        """Return the constants' struct and the function that computes the features."""
        name, state = self.name, "StepState" if self.name == "step" else "RequestState"
        fields = [(n, FIELD_TYPES.get(n, "float64")) for n in self.constants]
        width = max((len(n) for n, _ in fields), default=0)
        struct = "".join(f"\t{n:<{width}} {kind}\n" for n, kind in fields)
        about = "seconds per unit of the state" if name == "step" else "units of the state"
        lines = [
            f"// {name}Constants are what the features take from a configuration: {about}, or as named.",
            f"type {name}Constants struct {{" + (f"\n{struct}}}" if fields else "}"),
            "",
            f"// {name}Features returns, in this order:",
            "//",
        ]
        lines += [f"//	{_line(f.name)}: {_line(f.formula)}" for f in self.features]
        reads = any("s." in t.expression or "(s)" in t.expression for t in self.terms) or bool(self.locals)
        k, s = "k" if self.constants else "_", "s" if reads else "_"
        lines.append(f"func {name}Features({k} *{name}Constants, {s} {state}) [{len(self.features)}]float64 {{")
        lines += [f"\t{n} := {LOCALS[n][0]}" for n in self.locals if LOCALS[n][0]]
        lines += [f"\treturn [{len(self.features)}]float64{{", *(f"\t\t{t.expression}," for t in self.terms), "\t}", "}"]
        return "\n".join(lines) + "\n"

    def function(self) -> str:
        """Return ComputeAlphaLatency."""
        lines = ["func (c *Configuration) ComputeAlphaLatency(r RequestState) int64 {"]
        if self.posterior.feature_set.support is not None:
            lines += [
                "	full := r.WaitingRequests+r.RunningRequests >= c.maxNumSeqs",
                "	noRoom := r.WaitingRequests > 0 && r.KVUsage+r.PromptTokens/c.kvCapacityTokens > 0.9",
                "	if !full && !noRoom {",
                "		return 0",
                "	}",
            ]
        lines += [
            "	features := alphaFeatures(&c.alpha, r)",
            "	total := 0.0",
            "	for i, x := range features {",
            "		total += float64((alphaPopulation[i] + c.alphaDeviation[i]) * x)",
            "	}",
            "	for i, g := range c.alphaConfig {",
            "		total += float64(alphaConfigPopulation[i] * g)",
            "	}",
            "	return microseconds(total, 0)",
            "}",
            "",
        ]
        return "\n".join(lines)

    def cases(self, count: int, seed: int, state: str) -> list[str]:
        """Return golden states of every configuration as rows of a Go table."""
        lines = []
        features = self.posterior.feature_set
        for c, theta in zip(self.configurations, self.theta, strict=True):
            frame = random_states(c, features.quantity == "step_time", 2 * count, seed)
            seconds = np.where(features.supported(frame, c), features.design(frame, c) @ theta, 0.0)
            least = 1 if self.name == "step" else 0
            us = np.maximum(seconds * MICRO, least)
            clear = np.flatnonzero((us == least) | (np.abs(us - np.rint(us)) > _CLEAR_OF_TRUNCATION))[:count]
            columns = {n: f for n, f in self.fields.items() if n in frame.columns}
            for i in clear:
                values = ", ".join(f"{go}: {_short(frame[n].iloc[i])}" for n, go in columns.items())
                lines.append(f"\t{{{_quoted(c.config_id)}, {state}{{{values}}}, {int(us[i])}}},\n")
        return lines


def _line(text: str) -> str:
    """Return text as one line, which a comment takes."""
    return " ".join(text.split())


def _short(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else number(value)


def _quoted(text: str) -> str:
    """Return text as a Go string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _idle_cases(ids: Sequence[str], idle: Sequence[float]) -> list[str]:
    return [
        f"\t{{{_quoted(n)}, RequestState{{PromptTokens: 100}}, {int(max(s * MICRO, 0.0))}}},\n"
        for n, s in zip(ids, idle, strict=True)
    ]


def _with_their_own(names: Sequence[str]) -> list[str]:
    """Return locals in the order of `LOCALS`, those they use themselves included."""
    wanted, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        wanted.add(name)
        waiting += [n for n in LOCALS[name][1] if n not in wanted]
    return [n for n in LOCALS if n in wanted]


def _configuration_fields(step: _Latency, alpha: _Latency | None) -> str:
    fields = [
        ("ID", "string"),
        ("step", "stepConstants"),
        ("stepDeviation", f"[{len(step.features)}]float64"),
        ("stepConfig", f"[{len(step.gamma)}]float64"),
    ]
    if step.misfit is not None:
        fields += [("discrepancy", f"[{len(step.misfit[0])}]float64"), ("priorConfig", "float64")]
    if alpha is None:
        fields += [("idleSeconds", "float64")]
    else:
        fields += [
            ("alpha", "alphaConstants"),
            ("alphaDeviation", f"[{len(alpha.features)}]float64"),
            ("alphaConfig", f"[{len(alpha.gamma)}]float64"),
        ]
        if alpha.posterior.feature_set.support is not None:
            fields += [("maxNumSeqs", "float64"), ("kvCapacityTokens", "float64")]
    width = max(len(n) for n, _ in fields)
    return "".join(f"\t{n:<{width}} {kind}\n" for n, kind in fields)


def _array(name: str, about: str, values: Sequence[float] | FloatArray) -> str:
    body = ", ".join(number(v) for v in values)
    return f"// {name} {about}\nvar {name} = [{len(values)}]float64{{{body}}}\n\n"


def _data(configurations: Sequence[ServingConfiguration], step: _Latency, alpha: _Latency | None, idle: Sequence[float]) -> str:
    text = _array("stepPopulation", "holds the coefficients that all configurations share: base, then residual.", step.population)
    text += _array("stepConfigPopulation", "holds the coefficients of the config features.", step.gamma)
    if alpha is not None:
        text += _array("alphaPopulation", "holds the shared coefficients of the delay.", alpha.population)
        text += _array("alphaConfigPopulation", "holds the coefficients of its config features.", alpha.gamma)
    if step.misfit is not None:
        text += _array("priorMeans", "make the step time that the discrepancy is relative to.", step.prior_means)
    if "experts" in step.constants:
        for c in {routing_name(c): c for c in configurations if c.llm.num_moe_layers}.values():
            values = ", ".join(number(v) for v in routing_values(c))
            text += f"// {routing_name(c)} holds the probability that a token misses each expert.\n"
            text += f"var {routing_name(c)} = []float64{{{values}}}\n\n"
    text += "var configurations = map[string]*Configuration{\n"
    for i, c in enumerate(configurations):
        parts = [_quoted(c.config_id), *_latency_parts(step, i)]
        if step.misfit is not None:
            parts += [_floats(step.misfit[i]), number(step.prior_config[i])]
        if alpha is None:
            parts.append(number(max(idle[i], 0.0)))
        else:
            parts += _latency_parts(alpha, i)
            if alpha.posterior.feature_set.support is not None:
                parts += [number(c.engine.max_num_seqs), number(c.engine.kv_capacity_tokens)]
        text += f"\t{_quoted(c.config_id)}: {{\n" + "".join(f"\t\t{p},\n" for p in parts) + "\t},\n"
    return text + "}\n"


def _floats(values: Sequence[float] | FloatArray) -> str:
    return f"[{len(values)}]float64{{{', '.join(number(v) for v in values)}}}"


def _latency_parts(latency: _Latency, i: int) -> list[str]:
    constants = ", ".join(values[i] for values in latency.constants.values())
    return [f"{latency.name}Constants{{{constants}}}", _floats(latency.deviations[i]), _floats(latency.config_rows[i])]


def random_states(configuration: ServingConfiguration, steps: bool, count: int, seed: int) -> pd.DataFrame:
    """Return states for golden values: batches near those the engine can run, or requests as they are queued.

    Parameters
    ----------
    configuration : ServingConfiguration
    steps : bool
        False for requests.
    count : int
    seed : int

    Returns
    -------
    DataFrame, `count` rows
        Columns of `STEP_FIELDS` or `REQUEST_FIELDS`.
    """
    rng = np.random.default_rng(seed)
    engine = configuration.engine
    if not steps:
        return pd.DataFrame(
            {
                "prompt_tokens": np.floor(np.exp(rng.uniform(0, np.log(configuration.llm.max_context_tokens), count))),
                "waiting_requests": rng.integers(0, 3 * engine.max_num_seqs + 1, count) * (rng.random(count) < 0.7),
                "running_requests": rng.integers(0, engine.max_num_seqs + 1, count).astype(float),
                "kv_usage": np.round(rng.random(count), 6),
            }
        ).astype(float)
    grid = operating_points(configuration)
    frame = grid.iloc[rng.integers(0, len(grid), count)].reset_index(drop=True)
    decode = frame["decode_tokens"].to_numpy(float)
    decode = np.where(decode > 1, np.maximum(np.floor(decode * rng.random(count)), 1.0), decode)
    prefill = np.floor(frame["prefill_tokens"].to_numpy(float) * rng.random(count))
    requests = np.where(prefill > 0, np.minimum(1.0 + rng.integers(0, 4, count), np.maximum(prefill, 1.0)), 0.0)
    return pd.DataFrame(
        {
            "prefill_tokens": prefill,
            "decode_tokens": decode,
            "prefill_requests": requests,
            "decode_requests": decode,
            "prefill_attention_tokens": np.floor(prefill**2 / 2 + prefill * rng.integers(0, 4096, count)),
            "context_tokens": np.floor(decode * rng.uniform(1, configuration.llm.max_context_tokens, count)),
            "waiting_requests": rng.integers(0, 50, count).astype(float),
            "running_requests": decode + requests,
            "kv_usage": np.round(rng.random(count), 6),
        }
    )
