"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    from hfdtl_bayes.features import FeatureSet
    from hfdtl_bayes.model import PriorSettings, SamplerSettings

Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random draw; the same seed gives the same result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
Store = Annotated[
    Path, typer.Argument(help="Trace store: STORE/<config_id>/{configuration.yaml, steps.parquet, requests.parquet}.")
]
PosteriorFile = Annotated[Path, typer.Argument(help="Posterior file (netCDF) written by fit or calibrate.")]
PriorsFile = Annotated[
    Path | None, typer.Option("--priors", help="YAML of prior ranges; `hfdtl-bayes priors --template` prints one to edit.")
]
Discounts = Annotated[
    list[str] | None,
    typer.Option(
        "--discount",
        help="DONOR=0.5 counts what the rows of a donor say of the population for half a donor, version<0.20=0.5 that of all donors of an "
        "older engine; its own coefficients stay sharp. Above 0, at most 1; may be given several times.",
    ),
]
Draws = Annotated[int, typer.Option("--draws", min=50, help="Draws kept per chain.")]
Tune = Annotated[int, typer.Option("--tune", min=50, help="Draws per chain used to adapt, then dropped.")]
Chains = Annotated[int, typer.Option("--chains", min=2, help="Chains, from different starting points.")]
Engine = Annotated[
    str,
    typer.Option(
        "--engine",
        help="exact (coefficients integrated out) or pymc (the PyMC model): the same posterior. rows: the PyMC model on rows.",
    ),
]
CalibrationEngine = Annotated[
    str,
    typer.Option(
        "--engine",
        help="auto: the donors' draws conditioned on the target's rows, in milliseconds, and a joint refit where that is not to be relied "
        "upon. conditional never refits; exact, pymc and rows always do.",
    ),
]
Likelihood = Annotated[
    str | None,
    typer.Option(
        "--likelihood",
        help="With --engine rows: gaussian, student_t, lognormal or outliers. Gaussian by default, or as the donors'.",
    ),
]
RowsPerConfig = Annotated[
    int,
    typer.Option(
        "--rows-per-config", min=1, help="With --engine rows: most rows of a configuration, in whole time blocks evenly spread."
    ),
]
EngineData = Annotated[
    str,
    typer.Option(
        "--engine-data",
        help="How steps are read: memory (at once), arrow (Parquet of any size in one pass) or dask (the same on a cluster).",
    ),
]
Scheduler = Annotated[str | None, typer.Option("--scheduler", help="With --engine-data dask: its address, as tcp://HOST:8786.")]
BlockLength = Annotated[
    str,
    typer.Option(
        "--block-length",
        help="Steps that share one drift of the machine's speed; auto chooses from the autocorrelation of residuals.",
    ),
]

TargetAccept = Annotated[
    float,
    typer.Option(
        "--target-accept", help="Acceptance the sampler aims at, 0.5 to 1; 0.99 takes smaller steps where some diverge."
    ),
]

# Defaults of SamplerSettings and scaled_rows, repeated because importing them would load ArviZ for --help; a test keeps them equal.
DRAWS, TUNE, CHAINS, TARGET_ACCEPT = 500, 150, 8, 0.95
ROWS_PER_CONFIG = 2000
BLOCK_LENGTH = "20"


def block_length_of(text: str) -> int | Literal["auto"]:
    """Read --block-length.

    Raises
    ------
    InputError
        If it is neither "auto" nor a whole number from 1.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--block-length takes auto or a whole number of steps from 1, found {text!r}")
    return int(text)


def sampler_settings(draws: int, tune: int, chains: int, target_accept: float) -> SamplerSettings | None:
    """Return how to sample; None, which lets the exact engine go on until its chains agree, where nothing was asked for."""
    from hfdtl_bayes.model import SamplerSettings  # noqa: PLC0415  (loaded on first use)

    asked = SamplerSettings(draws=draws, tune=tune, chains=chains, target_accept=target_accept)
    return None if asked == SamplerSettings() else asked


def names_in(text: str | None) -> list[str]:
    """Split a comma-separated list, dropping blanks around names and empty names."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def features_with_priors(features: str, quantity: str, priors_file: Path | None) -> tuple[PriorSettings | None, FeatureSet]:
    """Return the priors of a file and the feature set with its ranges; None and the set as it is without a file."""
    from hfdtl_bayes.features import feature_set  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.model.prior_files import read_priors  # noqa: PLC0415

    chosen = feature_set(features, quantity)
    return read_priors(priors_file, chosen) if priors_file else (None, chosen)
