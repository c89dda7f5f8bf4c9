"""Coefficient sets against each other: the same traces predicted by each, and which coefficient moved by how many posterior sds.

A set is a posterior, a coefficient card, vectors of a BLIS file, an ensemble of such, or the vectors BLIS ships. Sets of one feature set are
compared coefficient by coefficient. All sets that have betas of trained-physics are compared in those, folded as an export folds
them: what does not vary within a configuration (weights, layers, MoE layers) is added to b7, the only way in which two vectors of
one configuration can be told to mean the same. Single betas that the traffic does not tell apart may move without any meaning; the table
says which they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import ExportError, InputError, MissingInputError
from hfdtl_bayes.export.blis import told_apart
from hfdtl_bayes.export.card import CoefficientCard, read_card
from hfdtl_bayes.export.ensemble import MANIFEST, StoredEnsemble, blis_ensemble, read_ensemble
from hfdtl_bayes.export.files import FileVectors, parse_blis_file
from hfdtl_bayes.export.older_backends import BACKENDS
from hfdtl_bayes.export.step_time import blis_step_time_us, truncated_us
from hfdtl_bayes.export.vectors import BETA_LABELS, FEATURE_OF_BETA, IN_MICROSECONDS, MICRO, TRAINED_PHYSICS, Backend
from hfdtl_bayes.features import feature_set
from hfdtl_bayes.model import LatencyPosterior

FloatArray = NDArray[np.float64]

SHIPPED = "shipped"
SHIPPED_ALPHA = (15563.199579, 777.3455, 45.907545)
SHIPPED_BETA = (
    0.152128, 0.0, 1.36252915, 0.752037, 32.09546717, 4.41684444, 126.024825, 481.8613888, 0.0, 1.94710771, 0.752037,
)  # fmt: skip
"""The vectors in BLIS's own defaults file (August 2026): one set for all configurations."""

_DRAWS = 100
ALL = "all rows"
"""Name of the regime over all rows."""


@dataclass(frozen=True)
class Betas:
    """Betas of trained-physics in BLIS's units, folded; sd None where there is no uncertainty."""

    mean: FloatArray
    sd: FloatArray | None


@dataclass(frozen=True)
class CoefficientSet:
    """Something that predicts step times of a configuration.

    Attributes
    ----------
    name : str
    kind : {"posterior", "card", "vectors", "ensemble"}
    expected_s : callable
        ``expected_s(frame, configuration) -> array (n,)``.
    betas : callable
        ``betas(frame, configuration) -> Betas or None``.
    own : callable
        ``own(configuration) -> (feature set's name, DataFrame of mean and sd by coefficient) or None``.
    posterior : LatencyPosterior or None
    """

    name: str
    kind: str
    expected_s: Callable[[pd.DataFrame, ServingConfiguration], FloatArray]
    betas: Callable[[pd.DataFrame, ServingConfiguration], Betas | None]
    own: Callable[[ServingConfiguration], tuple[str, pd.DataFrame] | None]
    posterior: LatencyPosterior | None = None


def posterior_set(posterior: LatencyPosterior, name: str, seed: int = 0) -> CoefficientSet:
    """Return a posterior as a set of coefficients; its betas are those of the draws' projections over the rows."""

    def betas(frame: pd.DataFrame, configuration: ServingConfiguration) -> Betas | None:
        try:
            draws = min(_DRAWS, len(posterior.draws(configuration, seed).theta))
            made = blis_ensemble(posterior, configuration, frame, draws=draws, seed=seed)
        except ExportError:
            return None
        values = np.array([folded(m.vectors.beta, configuration) for m in made.members])
        return Betas(folded(made.mean.beta, configuration), values.std(axis=0, ddof=1))

    def own(configuration: ServingConfiguration) -> tuple[str, pd.DataFrame]:
        features = posterior.feature_set
        theta = posterior.draws(configuration, seed).theta * features.references
        table = pd.DataFrame({"mean": theta.mean(axis=0), "sd": theta.std(axis=0)}, index=list(features.coef_names))
        return features.name, table

    def expected_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
        return posterior.expected_s(frame, configuration, seed)

    return CoefficientSet(name, "posterior", expected_s, betas, own, posterior)


def card_set(card: CoefficientCard, name: str) -> CoefficientSet:
    """Return a card as a set of coefficients.

    Raises
    ------
    ExportError
        If one of its formulas is not that of the feature set as it is today: its coefficients would be misread.
    UnknownNameError
        If its feature set is not registered.
    """
    features = feature_set(card.feature_set)
    entries = {level: card.data[f"beta_{level}"] for level in ("base", "config", "residual")}
    formulas = {e["name"]: e["formula"] for level in entries.values() for e in level}
    changed = sorted(n for n, f in formulas.items() if n not in {g.name for g in features.features} or features[n].formula != f)
    if changed:
        raise ExportError(
            f"{name}: feature(s) {', '.join(changed)} of {features.name!r} are defined otherwise today than in the card, made by version "
            f"{card.data['provenance']['package_version']}; export the card again"
        )

    def check(configuration: ServingConfiguration) -> None:
        if configuration != card.configuration:
            raise InputError(
                f"{name} is the card of {card.config_id!r}, whose configuration is not that of {configuration.config_id!r}"
            )

    def expected_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
        check(configuration)
        total = np.zeros(len(frame))
        for e in (*entries["base"], *entries["residual"]):
            total += e["own"]["mean"] * np.asarray(features[e["name"]].compute(frame, configuration), dtype=float)
        total += sum(e["population"]["mean"] * e["feature_value"] for e in entries["config"])
        misfit = card.data["misfit"]
        if misfit is not None:
            for f, error in zip(feature_set("roofline-discrepancy").discrepancy, misfit["relative_error"], strict=True):
                total += error * np.asarray(f.compute(frame, configuration), dtype=float)
        return total

    def betas(_frame: pd.DataFrame, configuration: ServingConfiguration) -> Betas | None:
        check(configuration)
        try:
            return Betas(folded(card.vectors().beta, configuration), None)
        except ExportError:
            return None

    def own(configuration: ServingConfiguration) -> tuple[str, pd.DataFrame]:
        check(configuration)
        found = card.coefficients()
        varying = found[found["level"] != "config"][["mean", "sd"]].copy()
        constant = features.residual[0].name
        size = float(np.asarray(features[constant].compute(pd.DataFrame(index=[0]), configuration)).reshape(-1)[0])
        varying.loc[constant, "mean"] += sum(e["population"]["mean"] * e["feature_value"] for e in entries["config"]) / size
        return features.name, varying

    return CoefficientSet(name, "card", expected_s, betas, own)


def vectors_set(vectors: FileVectors, name: str) -> CoefficientSet:
    """Return vectors of a BLIS file as a set of coefficients; they are predicted with as BLIS would, truncation included."""

    def expected_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
        return backend_step_time_us(vectors.backend, vectors.beta, frame, configuration) / MICRO

    def betas(_frame: pd.DataFrame, configuration: ServingConfiguration) -> Betas | None:
        return Betas(folded(vectors.beta, configuration), None) if vectors.backend.name == TRAINED_PHYSICS.name else None

    return CoefficientSet(name, "vectors", expected_s, betas, lambda _c: None)


def ensemble_set(ensemble: StoredEnsemble, name: str) -> CoefficientSet:
    """Return an ensemble as a set of coefficients: it predicts with the mean of its draws."""
    backend = BACKENDS[ensemble.manifest["backend"]]

    def expected_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
        return np.asarray(backend_step_time_us(backend, ensemble.beta.mean(axis=0), frame, configuration) / MICRO)

    def betas(_frame: pd.DataFrame, configuration: ServingConfiguration) -> Betas | None:
        if backend.name != TRAINED_PHYSICS.name:
            return None
        values = np.array([folded(b, configuration) for b in ensemble.beta])
        return Betas(values.mean(axis=0), values.std(axis=0, ddof=1))

    return CoefficientSet(name, "ensemble", expected_s, betas, lambda _c: None)


def read_coefficients(source: str | os.PathLike[str], seed: int = 0) -> tuple[CoefficientSet, ...]:
    """Read a posterior (.nc), a card (.json), vectors of BLIS (.yaml), an ensemble (a folder), or `shipped`.

    Returns
    -------
    tuple of CoefficientSet
        One; of a file of blackbox one per entry.

    Raises
    ------
    MissingInputError, ExportError, PosteriorFileError
        If it is not there or not what its suffix says.
    InputError
        If the suffix is none of these.
    """
    if os.fspath(source) == SHIPPED:
        return (vectors_set(FileVectors(TRAINED_PHYSICS, "", SHIPPED_ALPHA, SHIPPED_BETA), SHIPPED),)
    path = Path(source)
    name = str(path)
    if path.is_dir() or path.name == MANIFEST:
        return (ensemble_set(read_ensemble(path if path.is_dir() else path.parent), name),)
    if path.suffix == ".json":
        return (card_set(read_card(path), name),)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise MissingInputError(f"no BLIS file at {path}") from None
        except (OSError, ValueError) as error:
            raise ExportError(f"{path} cannot be read: {error}") from None
        found = parse_blis_file(text, name)
        return tuple(vectors_set(v, name if len(found) == 1 else f"{name}[{i}]") for i, v in enumerate(found))
    if path.suffix == ".nc":
        posterior = LatencyPosterior.load(path)
        if posterior.feature_set.quantity != "step_time":
            raise InputError(
                f"{path} is a posterior of {posterior.feature_set.quantity}; coefficients are compared on step times"
            )
        return (posterior_set(posterior, name, seed),)
    raise InputError(
        f"{path} is no set of coefficients: accepted are a posterior (.nc), a card (.json), a BLIS file (.yaml), an ensemble (its "
        f"folder) and {SHIPPED}"
    )


def backend_step_time_us(
    backend: Backend, beta: Sequence[float] | FloatArray, frame: pd.DataFrame, configuration: ServingConfiguration
) -> NDArray[np.int64]:
    """Return the step time a backend computes for each batch, shape (n,), in whole microseconds, at least 1."""
    if backend.name == TRAINED_PHYSICS.name:
        return blis_step_time_us([float(b) for b in beta], frame, configuration)
    basis = backend.basis
    total = np.zeros(len(frame))
    for label, value in zip(backend.beta, beta, strict=True):
        feature = basis[backend.feature_of[label]]
        total = total + float(value) * np.asarray(feature.compute(frame, configuration), dtype=float)
    return truncated_us(total)


def folded(beta: Sequence[float] | FloatArray, configuration: ServingConfiguration) -> FloatArray:
    """Return ten or eleven betas as eleven, what is constant within the configuration added to b7, in BLIS's units."""
    values = dict(zip(BETA_LABELS, map(float, beta), strict=False))
    values.setdefault("b_EP", values["b4"])
    basis = TRAINED_PHYSICS.basis
    for f, row in zip(basis.config, basis.config_row(configuration), strict=True):
        label = next(n for n, g in FEATURE_OF_BETA.items() if g == f.name)
        unit = 1.0 if label in IN_MICROSECONDS else MICRO
        values["b7"] += values[label] * float(row / f.reference) * unit
        values[label] = 0.0
    return np.array([values[n] for n in BETA_LABELS])


@dataclass(frozen=True)
class CoefficientComparison:
    """What two or more sets say of one configuration.

    Attributes
    ----------
    errors : DataFrame
        A row per set and regime (`ALL` last): `set`, `regime`, `rows`, `mape`, `bias` (mean of predicted / observed - 1), `rmse_s`.
    moves : DataFrame
        A row per set but the reference and coefficient: `set`, `basis` (a feature set, or trained-physics), `coefficient`,
        `reference`, `sd` (of the reference), `value`, `moved_sds`, `told_apart`.
    reference : str
        The set whose posterior sds moves are counted in.
    """

    errors: pd.DataFrame
    moves: pd.DataFrame
    reference: str

    def sentence(self) -> str:
        """Say which set predicts best, and what moved most."""
        over_all = self.errors[self.errors["regime"] == ALL].sort_values("mape")
        listed = ", ".join(f"{r.set} {r.mape:.1%}" for r in over_all.itertuples())
        said = f"MAPE over {int(over_all['rows'].iloc[0])} rows, smallest first: {listed}."
        moved = self.moves[self.moves["told_apart"] & np.isfinite(self.moves["moved_sds"])]
        if moved.empty:
            return said + " No coefficient that the rows tell apart can be compared."
        most = moved.loc[moved["moved_sds"].abs().idxmax()]
        return (
            f"{said} Most moved, in posterior sds of {self.reference}: {most['coefficient']} ({most['basis']}) of {most['set']} by "
            f"{most['moved_sds']:+.1f}."
        )


def compare_coefficients(
    sets: Sequence[CoefficientSet], frame: pd.DataFrame, configuration: ServingConfiguration
) -> CoefficientComparison:
    """Compare sets of coefficients on the same traces.

    Parameters
    ----------
    sets : sequence of CoefficientSet
        Two or more, of different names. Moves are counted in sds of the first that has any.
    frame : DataFrame
        Validated steps, with step_time_s and regime.
    configuration : ServingConfiguration

    Raises
    ------
    InputError
        If there are fewer than two sets, a name comes twice, there are no rows, or a set is of another configuration.
    """
    names = [s.name for s in sets]
    if len(sets) < 2 or len(set(names)) < len(names):
        raise InputError(
            f"a comparison needs two sets of coefficients or more, of different names; found {', '.join(names) or 'none'}"
        )
    if frame.empty:
        raise InputError(f"no rows of {configuration.config_id!r} to compare coefficients on")
    observed = frame["step_time_s"].to_numpy(float)
    regimes = frame["regime"].astype(str).to_numpy() if "regime" in frame.columns else np.full(len(frame), "")
    errors = []
    for s in sets:
        predicted = s.expected_s(frame, configuration)
        for regime in (*dict.fromkeys(regimes), ALL):
            rows = np.full(len(frame), True) if regime == ALL else regimes == regime
            relative = predicted[rows] / observed[rows] - 1
            errors.append(
                {
                    "set": s.name,
                    "regime": regime,
                    "rows": int(rows.sum()),
                    "mape": float(np.abs(relative).mean()),
                    "bias": float(relative.mean()),
                    "rmse_s": float(np.sqrt(np.mean((predicted[rows] - observed[rows]) ** 2))),
                }
            )
    own = {s.name: s.own(configuration) for s in sets}
    betas = {s.name: s.betas(frame, configuration) for s in sets}
    reference = next((n for n in names if own[n] is not None or _has_sd(betas[n])), names[0])
    told = _told_apart(frame, configuration)
    moves = []
    for name in names:
        if name != reference:
            moves += _native_moves(name, own[reference], own[name]) + _beta_moves(name, betas[reference], betas[name], told)
    columns = ["set", "basis", "coefficient", "reference", "sd", "value", "moved_sds", "told_apart"]
    return CoefficientComparison(pd.DataFrame(errors), pd.DataFrame(moves, columns=columns), reference)


def _has_sd(betas: Betas | None) -> bool:
    return betas is not None and betas.sd is not None


def _told_apart(frame: pd.DataFrame, configuration: ServingConfiguration) -> dict[str, bool]:
    """Return which folded betas the rows tell apart; those folded away are zero in both sets."""
    basis = TRAINED_PHYSICS.basis
    apart = told_apart(basis, basis.design(frame, configuration), configuration)
    return {n: apart.get(f, False) for n, f in FEATURE_OF_BETA.items()}


def _native_moves(
    name: str, reference: tuple[str, pd.DataFrame] | None, other: tuple[str, pd.DataFrame] | None
) -> list[dict[str, object]]:
    if reference is None or other is None or reference[0] != other[0]:
        return []
    first, second = reference[1], other[1]
    return [
        _move(name, reference[0], c, float(first.loc[c, "mean"]), float(first.loc[c, "sd"]), float(second.loc[c, "mean"]), True)
        for c in first.index
        if c in second.index
    ]


def _beta_moves(name: str, reference: Betas | None, other: Betas | None, told: dict[str, bool]) -> list[dict[str, object]]:
    if reference is None or other is None:
        return []
    sd = reference.sd if reference.sd is not None else np.full(len(reference.mean), np.nan)
    return [
        _move(name, TRAINED_PHYSICS.name, n, float(a), float(s), float(b), told[n])
        for n, a, s, b in zip(BETA_LABELS, reference.mean, sd, other.mean, strict=True)
        if a or b
    ]


def _move(name: str, basis: str, coefficient: str, first: float, sd: float, second: float, told: bool) -> dict[str, object]:
    moved = (second - first) / sd if sd > 0 else (0.0 if second == first else float("nan"))
    return {
        "set": name, "basis": basis, "coefficient": coefficient, "reference": first, "sd": sd, "value": second, "moved_sds": moved,
        "told_apart": told,
    }  # fmt: skip
