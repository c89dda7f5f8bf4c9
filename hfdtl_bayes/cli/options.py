"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random draw; the same seed gives the same result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
Store = Annotated[
    Path, typer.Argument(help="Trace store: STORE/<config_id>/{configuration.yaml, steps.parquet, requests.parquet}.")
]
PosteriorFile = Annotated[Path, typer.Argument(help="Posterior file (netCDF) written by fit or calibrate.")]
Draws = Annotated[int, typer.Option("--draws", min=50, help="Draws kept per chain.")]
Tune = Annotated[int, typer.Option("--tune", min=50, help="Draws per chain used to adapt, then dropped.")]
Chains = Annotated[int, typer.Option("--chains", min=2, help="Chains, from different starting points.")]
Engine = Annotated[
    str, typer.Option("--engine", help="exact (coefficients integrated out) or pymc (the PyMC model): the same posterior.")
]

TargetAccept = Annotated[
    float,
    typer.Option("--target-accept", help="Acceptance NUTS aims at, 0.5 to 1; 0.95 takes smaller steps where some diverge."),
]

# The defaults of SamplerSettings, repeated because importing it would load ArviZ for --help; a test keeps them equal.
DRAWS, TUNE, CHAINS, TARGET_ACCEPT = 500, 300, 4, 0.8


def names_in(text: str | None) -> list[str]:
    """Split a comma-separated list, dropping blanks around names and empty names."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
