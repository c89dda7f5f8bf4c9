"""Posterior draws as BLIS vectors, one file each, with a manifest: uncertainty in the form a simulator can run.

Each draw is projected as the mean is. A draw of a wide posterior may give no positive time for some batches; those are taken as half the
time to read the weights, and the manifest counts the draws it was done for. The manifest also holds each draw's noise and drift, because
the drift of the machine's speed moves simulated latencies more than the coefficients do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration, weight_loading_floor_s
from hfdtl_bayes.errors import ExportError, InputError, MissingInputError
from hfdtl_bayes.export.blis import FLOOR_SHARE, Projector
from hfdtl_bayes.export.files import blis_flags, blis_yaml, parse_blis_file, write_text
from hfdtl_bayes.export.schema import schema_problems
from hfdtl_bayes.export.vectors import TRAINED_PHYSICS, Backend, BlisVectors, ExportSettings, check_vectors, coefficient_problems
from hfdtl_bayes.files import atomic_folder
from hfdtl_bayes.model import LatencyPosterior

FloatArray = NDArray[np.float64]

MANIFEST = "manifest.json"
FORMAT, VERSION = "hfdtl_bayes ensemble", 1
DRAWS = 100
"""Draws of an ensemble: the 2.5 % point of what is simulated with them is then known to about a sixth of its sd."""


@dataclass(frozen=True)
class Member:
    """One draw of an ensemble.

    Attributes
    ----------
    draw : int
        Its number among the posterior's draws.
    vectors : BlisVectors
    sigma, omega : float
        Relative sds of a step's noise and of the drift shared by a block of steps.
    floored : int
        Batches taken as half the time to read the weights because the draw asked for less.
    """

    draw: int
    vectors: BlisVectors
    sigma: float
    omega: float
    floored: int


@dataclass(frozen=True)
class Ensemble:
    """Draws of one configuration as vectors of a backend.

    Attributes
    ----------
    mean : BlisVectors
        Of the posterior mean.
    members : tuple of Member
    refused : dict of int to str
        Draws that could not be expressed, and why.
    seed : int
    input_hash : str
    feature_set : str
    """

    mean: BlisVectors
    members: tuple[Member, ...]
    refused: Mapping[int, str]
    seed: int
    input_hash: str
    feature_set: str

    @property
    def configuration(self) -> ServingConfiguration:
        """The configuration."""
        return self.mean.configuration

    def betas(self) -> FloatArray:
        """Return the betas of the draws, shape (N, J), in BLIS's units."""
        return np.array([m.vectors.beta for m in self.members])

    def summary(self) -> str:
        """Return how many draws there are and how they were made, in one sentence or two."""
        floored = sum(m.floored > 0 for m in self.members)
        worst = max(m.vectors.projection_error for m in self.members)
        said = (
            f"{len(self.members)} draws of {self.configuration.config_id} for {self.mean.backend.name}; projecting them costs "
            f"{np.mean([m.vectors.projection_error for m in self.members]):.2%} on average, {worst:.2%} at worst"
        )
        if floored:
            said += f"; {floored} asked for steps shorter than half the time to read the weights, which were taken as that long"
        if self.refused:
            said += f"; {len(self.refused)} could not be expressed and are left out"
        return said


def blis_ensemble(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    traffic: pd.DataFrame | None = None,
    *,
    draws: int = DRAWS,
    alpha_us: tuple[float, float, float] = (0.0, 0.0, 0.0),
    backend: Backend = TRAINED_PHYSICS,
    settings: ExportSettings | None = None,
    seed: int = 0,
) -> Ensemble:
    """Express posterior draws of one configuration as BLIS coefficients.

    Parameters
    ----------
    posterior, configuration, traffic, alpha_us, backend, settings, seed
        As `blis_vectors`.
    draws : int
        At most as many as the posterior has; evenly spaced among them.

    Raises
    ------
    ExportError
        As `blis_vectors` for the mean; if fewer than two draws can be expressed.
    InputError
        If fewer than two draws are asked for, or more than there are.
    """
    settings = settings or ExportSettings()
    found = posterior.draws(configuration, seed)
    if not 2 <= draws <= len(found.theta):
        raise InputError(f"an ensemble of {draws} draws; accepted are 2 to {len(found.theta)}, which the posterior has")
    projector = Projector.of(posterior, configuration, traffic, backend=backend, settings=settings, seed=seed)
    mean = projector.vectors(found.mean, alpha_us)
    check_vectors(mean, settings)
    least = FLOOR_SHARE * weight_loading_floor_s(configuration)
    members, refused = [], {}
    for s in np.linspace(0, len(found.theta) - 1, draws).astype(int).tolist():
        vectors = projector.vectors(found.theta[s], alpha_us, floor=True)
        problems = coefficient_problems(vectors.alpha, vectors.beta, settings, backend)
        if not vectors.projection_error <= settings.max_projection_error:
            problems.append(f"the mean difference is {vectors.projection_error:.1%}")
        if problems:
            refused[s] = "; ".join(problems)
            continue
        floored = int((projector.own @ found.theta[s] < least).sum())
        members.append(Member(s, vectors, float(found.sigma[s]), float(found.omega[s]), floored))
    if len(members) < 2:
        raise ExportError(
            f"{configuration.config_id!r}: {len(refused)} of {draws} draws cannot be expressed by {backend.name}, the first because "
            f"{next(iter(refused.values()))}. Calibrate on more rows, or export for narrower traffic (--traffic)"
        )
    return Ensemble(mean, tuple(members), refused, seed, posterior.input_hash, posterior.feature_set.name)


def write_ensemble(ensemble: Ensemble, folder: str | os.PathLike[str]) -> Path:
    """Write an ensemble as a folder, whole or not at all: one YAML per draw, `mean.yaml`, and the manifest; returns the manifest.

    Raises
    ------
    InputError
        If the folder exists and holds anything but an ensemble, which this would delete.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} exists and is no ensemble; an ensemble takes the place of its folder. Choose another --out")
    with atomic_folder(folder) as part:
        files = []
        for i, m in enumerate(ensemble.members):
            text = blis_yaml(m.vectors)
            name = write_text(text, part / f"draw-{i:04d}.yaml").name
            files.append(
                {
                    "file": name,
                    "sha256": hashlib.sha256(text.encode()).hexdigest(),
                    "draw": m.draw,
                    "flags": blis_flags(m.vectors).strip(),
                    "projection_error": m.vectors.projection_error,
                    "set_to_zero": list(m.vectors.clipped),
                    "floored_batches": m.floored,
                    "sigma": m.sigma,
                    "omega": m.omega,
                }
            )
        write_text(blis_yaml(ensemble.mean), part / "mean.yaml")
        data = {
            "format": FORMAT,
            "version": VERSION,
            "config_id": ensemble.configuration.config_id,
            "backend": ensemble.mean.backend.name,
            "feature_set": ensemble.feature_set,
            "input_hash": ensemble.input_hash,
            "seed": ensemble.seed,
            "batches": ensemble.mean.rows,
            "mean": "mean.yaml",
            "draws": files,
            "refused": {str(k): v for k, v in ensemble.refused.items()},
            "not_told_apart": list(ensemble.mean.not_told_apart),
        }
        write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", part / MANIFEST)
    return folder / MANIFEST


_TEXT, _TEXTS, _NUMBER = {"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "number", "minimum": 0}
_COUNT = {"type": "integer", "minimum": 0}


def _strict(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_DRAW_SCHEMA = _strict(
    {
        "file": _TEXT, "sha256": _TEXT, "draw": _COUNT, "flags": _TEXT, "projection_error": _NUMBER, "set_to_zero": _TEXTS,
        "floored_batches": _COUNT, "sigma": _NUMBER, "omega": _NUMBER,
    }
)  # fmt: skip
_MANIFEST_SCHEMA = _strict(
    {
        "format": {"const": FORMAT}, "version": {"const": VERSION}, "config_id": _TEXT,
        "backend": {"enum": ["trained-physics", "blackbox", "crossmodel"]}, "feature_set": _TEXT, "input_hash": _TEXT,
        "seed": _COUNT, "batches": _COUNT, "mean": _TEXT, "draws": {"type": "array", "items": _DRAW_SCHEMA, "minItems": 2},
        "refused": {"type": "object", "additionalProperties": _TEXT}, "not_told_apart": _TEXTS,
    }
)  # fmt: skip


@dataclass(frozen=True)
class StoredEnsemble:
    """An ensemble read from its folder.

    Attributes
    ----------
    manifest : dict
    alpha, beta : ndarray, shapes (N, 3) and (N, J)
        In BLIS's units, in the order of the manifest.
    """

    manifest: Mapping[str, Any]
    alpha: FloatArray
    beta: FloatArray


def read_ensemble(folder: str | os.PathLike[str]) -> StoredEnsemble:
    """Read an ensemble, strictly.

    Raises
    ------
    MissingInputError
        If there is no manifest, or a file it names is not there.
    ExportError
        If the manifest is not one, a file was changed since (its hash differs), or does not hold what BLIS takes.
    """
    folder = Path(folder)
    source = folder / MANIFEST
    try:
        manifest = json.loads(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingInputError(f"no ensemble at {folder}: {source} is not there") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{source} is not valid JSON: {error}") from None
    problems = schema_problems(manifest, _MANIFEST_SCHEMA)
    if problems:
        raise ExportError(f"{source} is not the manifest of an ensemble:\n  - " + "\n  - ".join(problems))
    alphas, betas = [], []
    for entry in manifest["draws"]:
        path = folder / entry["file"]
        if Path(entry["file"]).name != entry["file"]:
            raise ExportError(f"{source}: {entry['file']!r} is no name of a file beside the manifest")
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise MissingInputError(f"{source} names {entry['file']}, which is not there; export the ensemble again") from None
        if hashlib.sha256(text).hexdigest() != entry["sha256"]:
            raise ExportError(f"{path} was changed since the manifest was written; export the ensemble again")
        (found,) = parse_blis_file(text.decode(), str(path))
        alphas.append(found.alpha)
        betas.append(found.beta)
    return StoredEnsemble(manifest, np.array(alphas), np.array(betas))
