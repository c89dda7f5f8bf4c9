"""`sensitivity`: what an answer owes to the priors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfdtl_bayes.cli.options import AsJson, PosteriorFile
from hfdtl_bayes.cli.output import show, table_text, warn_unless_converged


def sensitivity(
    posterior_file: PosteriorFile,
    config: Annotated[
        str | None, typer.Option("--config", help="config_id that was fitted; by default the calibrated target.")
    ] = None,
    configuration: Annotated[
        Path | None, typer.Option("--configuration", help="YAML of a configuration never seen: predicted zero-shot.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Refit at half and twice each scale between configurations, and say how predictions and coefficients change."""
    from hfdtl_bayes.cli.traces import configuration_of  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415
    from hfdtl_bayes.model.sensitivity import sensitivity as of_posterior  # noqa: PLC0415

    posterior = LatencyPosterior.load(posterior_file)
    warn_unless_converged(posterior.convergence())
    found = of_posterior(posterior, configuration_of(posterior, config, configuration), show_progress=True)
    sentences = found.sentences()
    result: dict[str, Any] = {
        "config_id": found.config_id,
        "fitted": found.fitted,
        "sentences": sentences,
        "noise": found.noise,
        "converged": found.converged,
        "predictions": found.predictions.to_dict(orient="records"),
        "coefficients": found.coefficients.to_dict(orient="records"),
        "power_scaling": found.power.to_dict(orient="records"),
        "seed": posterior.seed,
    }
    changed = found.predictions[found.predictions["factor"] != 1.0]
    power = found.power.groupby("prior", sort=False)["psense"].max().reset_index()
    tables = (
        table_text(changed, f"predictions of {found.config_id} against the fit as it is"),
        table_text(power, "power-scaling sensitivity (psense) of the expected time, largest over batches; above 0.05 it matters"),
    )
    show(result, "\n".join([*tables, *sentences]), as_json=as_json)
