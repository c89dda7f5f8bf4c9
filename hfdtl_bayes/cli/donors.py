"""`promote`, `forget`, `combine`: posterior files in, one with another set of donors out; no trace is read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import (
    CHAINS,
    DRAWS,
    TARGET_ACCEPT,
    TUNE,
    AsJson,
    Chains,
    Discounts,
    Draws,
    PosteriorFile,
    Seed,
    TargetAccept,
    Tune,
    sampler_settings,
)
from hfdtl_bayes.cli.output import check_file, show, table_text, warn_unless_converged, writing

if TYPE_CHECKING:
    from hfdtl_bayes.model import LatencyPosterior

Out = Annotated[Path, typer.Option("--out", help="Posterior file to write (netCDF).")]


def promote(
    posterior_file: PosteriorFile,
    out: Out,
    statistics: Annotated[
        Path | None,
        typer.Option(
            "--statistics",
            help="Statistics file of all rows of the target that are to count, in place of those it was calibrated on; "
            "`hfdtl-bayes statistics` makes it.",
        ),
    ] = None,
    draws: Draws = DRAWS,
    tune: Tune = TUNE,
    chains: Chains = CHAINS,
    target_accept: TargetAccept = TARGET_ACCEPT,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Make a calibrated target one of the donors, after a verdict of retrain_as_donor; from statistics, without its traces."""
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.statistics import read_statistics  # noqa: PLC0415
    from hfdtl_bayes.transfer import promote as promote_target  # noqa: PLC0415

    check_file(out, (posterior_file, statistics))
    posterior = LatencyPosterior.load(posterior_file)
    more = None if statistics is None else read_statistics(statistics).statistics
    settings = sampler_settings(draws, tune, chains, target_accept)
    _finish(promote_target(posterior, more, settings=settings, seed=seed), out, as_json=as_json)


def forget(
    posterior_file: PosteriorFile,
    donor: Annotated[str, typer.Option("--donor", help="config_id of the donor to leave out.")],
    out: Out,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Refit the others in any case, instead of reweighting draws where that can be relied upon."),
    ] = False,
    draws: Draws = DRAWS,
    tune: Tune = TUNE,
    chains: Chains = CHAINS,
    target_accept: TargetAccept = TARGET_ACCEPT,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Leave a donor out of a posterior: what a fit without it would say, from the statistics that the file keeps."""
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.transfer import forget as forget_donor  # noqa: PLC0415

    check_file(out, (posterior_file,))
    posterior = LatencyPosterior.load(posterior_file)
    settings = sampler_settings(draws, tune, chains, target_accept)
    _finish(forget_donor(posterior, donor, refit=refit, settings=settings, seed=seed), out, as_json=as_json)


def combine(
    first: Annotated[Path, typer.Argument(help="Posterior file (netCDF) of donors, written by fit, promote, forget or combine.")],
    second: Annotated[Path, typer.Argument(help="Another, of other donors.")],
    out: Out,
    discounts: Discounts = None,
    draws: Draws = DRAWS,
    tune: Tune = TUNE,
    chains: Chains = CHAINS,
    target_accept: TargetAccept = TARGET_ACCEPT,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit the donors of two posterior files together, from the statistics that the files keep."""
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.transfer import combine_donors, discounts_from  # noqa: PLC0415

    check_file(out, (first, second))
    one, other = LatencyPosterior.load(first), LatencyPosterior.load(second)
    shares = discounts_from(discounts or [], [s.configuration for s in (*one.statistics, *other.statistics)])
    settings = sampler_settings(draws, tune, chains, target_accept)
    _finish(combine_donors(one, other, discounts=shares, settings=settings, seed=seed), out, as_json=as_json)


def _finish(posterior: LatencyPosterior, out: Path, *, as_json: bool) -> None:
    with writing(out):
        posterior.save(out)
    convergence = posterior.convergence()
    warn_unless_converged(convergence)
    every = posterior.coefficient_table()
    table = every[every["config"] == "population"].drop(columns="config")
    used = {s.config_id: s.rows for s in posterior.statistics}
    result: dict[str, Any] = {
        "out": out,
        "quantity": posterior.feature_set.quantity,
        "features": posterior.feature_set.name,
        "donors": posterior.donors,
        "target": posterior.target,
        "rows": used,
        "discounts": dict(posterior.priors.discounts),
        "engine": posterior.engine,
        "seed": posterior.seed,
        "input_hash": posterior.input_hash,
        "convergence": asdict(convergence),
        "coefficients": table.to_dict(orient="records"),
    }
    kind = f"{posterior.feature_set.quantity}, features {posterior.feature_set.name}"
    lines = [
        table_text(table, f"{kind}: coefficients of population"),
        f"donors: {', '.join(f'{d} ({used[d]} rows)' for d in posterior.donors)}",
        *([f"target: {posterior.target} ({used[posterior.target]} rows)"] if posterior.target else []),
        *posterior.priors.discount_sentences(),
        str(convergence),
        f"wrote {out}",
    ]
    show(result, "\n".join(lines), as_json=as_json)
