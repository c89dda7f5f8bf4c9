"""The coefficient card: all that is known of one configuration's coefficients, as JSON with a schema that ships with the package.

It is what a reader of the numbers needs beside the numbers: units, formulas, intervals, correlation, P(< 0), what data informed them,
where they hold, how well they did on held-out rows, the verdict, where they come from, and the vectors of BLIS made of them. Levels are
kept apart as in the model; the constant is that without the config features, so the levels add up to the expected value.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping
from hfdtl_bayes.errors import ExportError, HfdtlError, MissingInputError
from hfdtl_bayes.export.blis import blis_vectors
from hfdtl_bayes.export.go_terms import is_hat
from hfdtl_bayes.export.older_backends import BACKENDS
from hfdtl_bayes.export.schema import schema_problems
from hfdtl_bayes.export.vectors import TRAINED_PHYSICS, Backend, BlisVectors, ExportSettings, coefficient_problems
from hfdtl_bayes.features import Feature, FeatureSet, feature_set, fingerprint
from hfdtl_bayes.features.discrepancy import KNOTS
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.model.identifiability import (
    DirectionSettings,
    Moments,
    configuration_moments,
    directions,
    population_moments,
    prior_moments,
)
from hfdtl_bayes.statistics import config_to_constant, package_version
from hfdtl_bayes.transfer import Verdict
from hfdtl_bayes.transfer.evaluation import attainable_mape, error_sd

FloatArray = NDArray[np.float64]

FORMAT, VERSION = "hfdtl_bayes coefficient card", 1
LEVELS = ("base", "config", "residual")


@cache
def card_schema() -> dict[str, Any]:
    """Return the JSON Schema of a card (draft 2020-12)."""
    found: dict[str, Any] = json.loads((files("hfdtl_bayes.export") / "card.schema.json").read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class CoefficientCard:
    """A card that follows the schema.

    Attributes
    ----------
    data : dict
        Plain data; see `card_schema`.
    """

    data: Mapping[str, Any]

    def text(self) -> str:
        """Return the card as JSON; reading it and writing it again gives the same text."""
        return json.dumps(self.data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @property
    def config_id(self) -> str:
        """Identifier of the configuration."""
        return str(self.data["config_id"])

    @property
    def configuration(self) -> ServingConfiguration:
        """The serving configuration."""
        return configuration_from_mapping(self.data["configuration"], f"card of {self.config_id}")

    @property
    def feature_set(self) -> str:
        """Name of the feature set of step times."""
        return str(self.data["provenance"]["feature_set"])

    def coefficients(self, quantity: str = "beta") -> pd.DataFrame:
        """Return this configuration's own coefficients: `mean`, `sd`, `level`, `unit` by name; of config features the population's."""
        rows = [
            {
                "name": e["name"],
                "level": level,
                "unit": e["unit"],
                **{k: (e["own"] or e["population"])[k] for k in ("mean", "sd")},
            }
            for level in LEVELS
            for e in self.data[f"{quantity}_{level}"]
        ]
        return pd.DataFrame(rows, columns=["name", "level", "unit", "mean", "sd"]).set_index("name")

    def vectors(self, backend: str = TRAINED_PHYSICS.name) -> BlisVectors:
        """Return the vectors of a backend of BLIS, as they were when the card was made.

        Raises
        ------
        ExportError
            If the card has none; says why.
        """
        found = next((v for v in self.data["blis"]["vectors"] if v["backend"] == backend), None)
        if found is None:
            why = self.data["blis"]["refused"].get(backend, "it was made without")
            raise ExportError(f"the card of {self.config_id!r} holds no {backend} vectors: {why}")
        projection = found["projection"]
        return BlisVectors(
            configuration=self.configuration,
            alpha=tuple(float(a["value"]) for a in found["alpha"]),
            beta=tuple(float(b["value"]) for b in found["beta"]),
            projection_error=projection["mean_relative_difference"],
            worst_projection_error=projection["worst_relative_difference"],
            clipped=tuple(projection["set_to_zero"]),
            rows=projection["rows"],
            posterior_sd=found["posterior_relative_sd"],
            notes=tuple(found["notes"]),
            not_told_apart=tuple(b["label"] for b in found["beta"] if not b["told_apart"]),
            backend=BACKENDS[backend],
        )


def coefficient_card(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    traffic: pd.DataFrame | None = None,
    *,
    delays: LatencyPosterior | None = None,
    alpha_us: Mapping[str, tuple[float, float, float]] | None = None,
    backends: tuple[Backend, ...] = (TRAINED_PHYSICS,),
    verdict: Verdict | None = None,
    settings: ExportSettings | None = None,
    seed: int = 0,
) -> CoefficientCard:
    """Return the card of one configuration.

    Parameters
    ----------
    posterior : LatencyPosterior
        Of step_time.
    configuration : ServingConfiguration
        Fitted, or never seen.
    traffic : DataFrame, optional
        Rows the coefficients are judged on: their ranges are the regime of validity, and BLIS's vectors are made for them.
    delays : LatencyPosterior, optional
        Of api_delay or queue_delay; its coefficients are the alphas.
    alpha_us : mapping of str to tuple of float, optional
        BLIS's own alphas by backend, in its units; zeros by default.
    backends : tuple of Backend
        Whose vectors to put in; one that cannot express the posterior is named with the reason instead.
    verdict : Verdict, optional
    settings : ExportSettings, optional
    seed : int

    Raises
    ------
    ExportError
        If the posterior is not of step_time, the delays are, or a value is not finite.
    """
    if posterior.feature_set.quantity != "step_time":
        raise ExportError(f"the betas of a card are step times, this posterior is of {posterior.feature_set.quantity}")
    if delays is not None and delays.feature_set.quantity == "step_time":
        raise ExportError("the alphas of a card are of api_delay or queue_delay, this posterior is of step_time")
    held = verdict.held_out if verdict is not None else None
    beta, beta_correlation = _levels(posterior, configuration, seed)
    alpha, alpha_correlation = _levels(delays, configuration, seed) if delays is not None else ({n: [] for n in LEVELS}, None)
    data = {
        "format": FORMAT,
        "version": VERSION,
        "config_id": configuration.config_id,
        "configuration": configuration.dump(),
        **{f"alpha_{n}": alpha[n] for n in LEVELS},
        **{f"beta_{n}": beta[n] for n in LEVELS},
        "alpha_quantity": delays.feature_set.quantity if delays is not None else None,
        "alpha_correlation": alpha_correlation,
        "beta_correlation": beta_correlation,
        "misfit": _misfit(posterior, configuration, seed),
        "errors": _errors(posterior, configuration, seed),
        "directions": _directions(posterior, configuration),
        "regime_of_validity": _regime(posterior.feature_set, traffic),
        "accuracy": {
            "attainable_mape": attainable_mape(error_sd(posterior, configuration, seed)),
            "held_out_mape": held.mape if held is not None else None,
            "held_out_rows": held.rows if held is not None else None,
            "interval_coverage": held.coverage if held is not None else None,
        },
        "verdict": _verdict(verdict),
        "blis": _blis(posterior, configuration, traffic, backends, alpha_us or {}, settings, seed),
        "provenance": _provenance(posterior, configuration, delays),
    }
    card = CoefficientCard(_plain(data))
    problems = schema_problems(card.data, card_schema())
    if problems:
        raise ExportError(f"{configuration.config_id!r} makes no card:\n  - " + "\n  - ".join(problems))
    return card


def parse_card(text: str, source: str = "coefficient card") -> CoefficientCard:
    """Read a card, strictly.

    Raises
    ------
    ExportError
        If it is not JSON, does not follow the schema (every extra, missing, non-finite or negative value is named with its place), repeats
        a coefficient, holds a correlation of another size, a configuration that is none, or vectors that BLIS would not take.
    """
    try:
        data = json.loads(text, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{source} is not valid JSON: {error}") from None
    problems = schema_problems(data, card_schema())
    if not problems:
        problems = _inconsistent(data)
    if problems:
        raise ExportError(f"{source} is not a coefficient card:\n  - " + "\n  - ".join(problems))
    return CoefficientCard(data)


def read_card(path: str | os.PathLike[str]) -> CoefficientCard:
    """Read a card from a file; raises MissingInputError if there is none, ExportError as `parse_card`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingInputError(f"no coefficient card at {path}") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as a coefficient card: {error}") from None
    return parse_card(text, str(path))


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [n for n, _ in pairs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"key(s) {', '.join(twice)} come twice in one object")
    return dict(pairs)


def _inconsistent(data: Mapping[str, Any]) -> list[str]:
    """Return what a schema cannot say."""
    found = []
    for quantity in ("alpha", "beta"):
        names = [e["name"] for level in LEVELS for e in data[f"{quantity}_{level}"]]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            found.append(f"{quantity}: coefficient(s) {', '.join(twice)} come twice")
        for level in LEVELS:
            for e in data[f"{quantity}_{level}"]:
                if (e["own"] is None) != (level == "config") or (e["feature_value"] is None) == (level == "config"):
                    found.append(
                        f"{quantity}_{level}: {e['name']} must have {'a feature_value' if level == 'config' else 'its own moments'}"
                    )
        correlation = data[f"{quantity}_correlation"]
        if correlation is not None:
            varying = [e["name"] for level in ("base", "residual") for e in data[f"{quantity}_{level}"]]
            sizes = {len(correlation["matrix"]), *(len(row) for row in correlation["matrix"])}
            if correlation["names"] != varying or sizes != {len(varying)}:
                found.append(f"{quantity}_correlation: must be of {', '.join(varying)}, {len(varying)} rows and columns")
    for vectors in data["blis"]["vectors"]:
        backend = BACKENDS[vectors["backend"]]
        labels = [b["label"] for b in vectors["beta"]]
        if labels != list(backend.beta[: len(labels)]):
            found.append(f"blis: betas of {backend.name} are {', '.join(backend.beta)} in this order, found {', '.join(labels)}")
        alpha, beta = (tuple(float(v["value"]) for v in vectors[k]) for k in ("alpha", "beta"))
        found += [f"blis: {backend.name}: {p}" for p in coefficient_problems(alpha, beta, ExportSettings(), backend)]
    try:
        configuration = configuration_from_mapping(data["configuration"], "configuration")
    except HfdtlError as error:
        return [*found, str(error)]
    if configuration.config_id != data["config_id"]:
        found.append(f"config_id is {data['config_id']!r}, that of the configuration {configuration.config_id!r}")
    return found


def _plain(value: Any) -> Any:
    """Return data as JSON has them: NumPy's numbers as Python's, tuples as lists, enumerations as text; NaN as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return str(value) if isinstance(value, str) else value


def _moments(draws: FloatArray, reference: float = 1.0) -> dict[str, float]:
    low, high = np.quantile(draws, (0.025, 0.975)) * reference
    return {
        "mean": float(draws.mean() * reference),
        "sd": float(draws.std() * reference),
        "q2.5": float(low),
        "q97.5": float(high),
        "p_negative": float(np.mean(draws < 0)),
    }


def _levels(
    posterior: LatencyPosterior, configuration: ServingConfiguration, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Return the entries of each level, and the correlation of the configuration's own coefficients."""
    features = posterior.feature_set
    pooled = features.pooled
    draws = posterior.draws(configuration, seed)
    theta = draws.theta[:, : len(pooled)].copy()
    gamma = posterior.draws_of("gamma") if features.config else np.zeros((len(theta), 0))
    if features.config:
        # Without what the config features add to the constant, so that the levels add up.
        theta[:, len(features.base)] -= gamma @ config_to_constant(features, configuration)
    population = np.concatenate([posterior.draws_of("beta"), posterior.draws_of("delta")], axis=1)
    own = {
        n: _informed(m, k) for m in [_configuration_moments(posterior, configuration, draws.theta)] for k, n in enumerate(m.names)
    }
    shared = population_moments(posterior)
    of_population = {n: _informed(shared, k) for k, n in enumerate(shared.names)}
    entries: dict[str, list[dict[str, Any]]] = {n: [] for n in LEVELS}

    def entry(f: Feature, values: FloatArray, mine: FloatArray | None, value: float | None, informed: Any) -> None:
        entries[str(f.level)].append(
            {
                "name": f.name,
                "unit": f.coefficient_unit,
                "feature_unit": f.unit,
                "formula": f.formula,
                "population": _moments(values, f.reference),
                "own": _moments(mine, f.reference) if mine is not None else None,
                "feature_value": value,
                "informed": informed,
            }
        )

    for k, f in enumerate(pooled):
        entry(f, population[:, k], theta[:, k], None, own[f.name])
    for g, (f, row) in enumerate(zip(features.config, features.config_row(configuration), strict=True)):
        entry(f, gamma[:, g], None, float(row / f.reference), of_population[f.name])
    sd = theta.std(axis=0)
    centred = (theta - theta.mean(axis=0)) / np.where(sd > 0, sd, 1.0)
    correlation = centred.T @ centred / len(theta)
    np.fill_diagonal(correlation, 1.0)
    return entries, {"names": [f.name for f in pooled], "matrix": correlation}


def _configuration_moments(posterior: LatencyPosterior, configuration: ServingConfiguration, theta: FloatArray) -> Moments:
    if configuration.config_id in posterior.config_ids:
        return configuration_moments(posterior, configuration.config_id)
    mean, prior = prior_moments(posterior.feature_set, posterior.priors, configuration)
    k = len(posterior.feature_set.pooled)
    after = np.atleast_2d(np.cov(theta[:, :k], rowvar=False))
    return Moments(posterior.feature_set.pooled_names, mean[:k], prior[:k, :k], theta[:, :k].mean(axis=0), after, None)


def _informed(moments: Moments, k: int) -> dict[str, Any]:
    settings = DirectionSettings()
    prior, after = moments.prior[k, k], moments.posterior[k, k]
    data = 1.0 - after / prior
    own = None if moments.others is None else (moments.others[k, k] - after) / prior
    return {
        "data": data,
        "own_rows": own,
        "other_rows": None if own is None else data - own,
        "decided_by": settings.words[settings.band(data)],
    }


def _directions(posterior: LatencyPosterior, configuration: ServingConfiguration) -> list[dict[str, Any]]:
    if configuration.config_id not in posterior.config_ids:
        return []
    return [
        {
            "combination": d.name,
            "data": d.data,
            "own_rows": d.own_rows,
            "other_rows": d.other_rows,
            "decided_by": d.decided_by,
        }
        for d in directions(configuration_moments(posterior, configuration.config_id))
    ]


def _misfit(posterior: LatencyPosterior, configuration: ServingConfiguration, seed: int) -> dict[str, Any] | None:
    features = posterior.feature_set
    if not features.discrepancy:
        return None
    place = {f.compute: i for i, f in enumerate(feature_set("roofline-discrepancy").discrepancy)}
    mean, sd = np.zeros(len(KNOTS)), np.zeros(len(KNOTS))
    theta = posterior.draws(configuration, seed).theta[:, len(features.pooled) :]
    for k, f in enumerate(features.discrepancy):
        if is_hat(f):
            mean[place[f.compute]], sd[place[f.compute]] = theta[:, k].mean() * f.reference, theta[:, k].std() * f.reference
    return {"tokens": list(KNOTS), "relative_error": mean, "sd": sd, "size": float(np.sqrt(np.mean(mean**2 + sd**2)))}


def _errors(posterior: LatencyPosterior, configuration: ServingConfiguration, seed: int) -> dict[str, Any]:
    draws = posterior.draws(configuration, seed)
    return {"sigma": _moments(draws.sigma), "omega": _moments(draws.omega)}


def _regime(features: FeatureSet, traffic: pd.DataFrame | None) -> dict[str, Any] | None:
    if traffic is None:
        return None
    regimes = list(dict.fromkeys(traffic["regime"].astype(str))) if "regime" in traffic.columns else []
    ranges = {c: [float(traffic[c].min()), float(traffic[c].max())] for c in features.columns if c in traffic.columns}
    return {"rows": len(traffic), "regimes": regimes, "ranges": ranges}


def _verdict(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    said = verdict.as_dict()
    return {n: said[n] for n in ("outcome", "recommendation", "probability_below_limit", "limit", "checks")}


def _blis(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    traffic: pd.DataFrame | None,
    backends: tuple[Backend, ...],
    alpha_us: Mapping[str, tuple[float, float, float]],
    settings: ExportSettings | None,
    seed: int,
) -> dict[str, Any]:
    vectors, refused = [], {}
    for backend in backends:
        alpha = alpha_us.get(backend.name, (0.0, 0.0, 0.0))
        try:
            made = blis_vectors(posterior, configuration, traffic, alpha_us=alpha, backend=backend, settings=settings, seed=seed)
            vectors.append(made.as_dict())
        except ExportError as error:
            refused[backend.name] = str(error)
    return {"vectors": vectors, "refused": refused}


def _provenance(
    posterior: LatencyPosterior, configuration: ServingConfiguration, delays: LatencyPosterior | None
) -> dict[str, Any]:
    features = posterior.feature_set
    return {
        "package_version": package_version(),
        "feature_set": features.name,
        "donors": list(posterior.donors),
        "target": posterior.target,
        "fitted": configuration.config_id in posterior.config_ids,
        "rows": {s.config_id: int(s.rows) for s in posterior.statistics},
        "engine": posterior.engine,
        "likelihood": posterior.likelihood,
        "seed": int(posterior.seed),
        "converged": bool(posterior.convergence().passed),
        "input_hash": posterior.input_hash,
        "feature_hash": hashlib.sha256(json.dumps(fingerprint(features), sort_keys=True).encode()).hexdigest(),
        "alpha_input_hash": delays.input_hash if delays is not None else None,
    }
