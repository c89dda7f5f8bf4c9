"""`choose-donors`: which configurations to take, or to trace next, as donors for intended targets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import AsJson, PriorsFile, Seed, Store, features_with_priors, names_in
from hfdtl_bayes.cli.output import check_file, show, table_text, write_table, writing
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    from hfdtl_bayes.configuration import ServingConfiguration

TABLE = (".csv", ".parquet")


def choose_donors(
    store: Store,
    candidates: Annotated[
        str, typer.Option("--candidates", help="config_ids to choose from, separated by commas; two at least.")
    ],
    targets: Annotated[
        list[str],
        typer.Option(
            "--targets",
            help="What is to be predicted: YAML files of configurations, or config_ids in the store; by commas, or given again.",
        ),
    ],
    size: Annotated[str, typer.Option("--size", help="Donors in a subset: a number, or from..to.")] = "2..5",
    keep: Annotated[
        str | None, typer.Option("--keep", help="Candidates that every subset must hold, separated by commas.")
    ] = None,
    hypothetical: Annotated[
        list[Path] | None,
        typer.Option("--hypothetical", help="YAML of a configuration not yet traced: what would it add? May be given again."),
    ] = None,
    traffic: Annotated[
        Path | None,
        typer.Option(
            "--traffic", help="Batches the targets will run (steps, times not needed); by default a grid of operating points."
        ),
    ] = None,
    refit: Annotated[
        int,
        typer.Option("--refit", min=0, help="Best subsets to refit with the exact engine, and to compare with targets' traces."),
    ] = 0,
    scales: Annotated[
        str,
        typer.Option(
            "--scales", help="posterior: scales from a fit of all candidates. prior: middles of their prior ranges, at once."
        ),
    ] = "posterior",
    features: Annotated[str, typer.Option("--features", help="Feature set, for step_time.")] = "roofline",
    priors_file: PriorsFile = None,
    out: Annotated[Path | None, typer.Option("--out", help="Table to write, one line per subset (.csv, .parquet).")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Rank subsets of donors by the zero-shot error to be expected of targets, and say which donor more would help most."""
    from hfdtl_bayes.cli.traces import WatchedStore, write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.configuration import read_configuration  # noqa: PLC0415
    from hfdtl_bayes.traces import read_steps  # noqa: PLC0415
    from hfdtl_bayes.transfer.donor_choice import rank_donors  # noqa: PLC0415
    from hfdtl_bayes.transfer.donor_search import DonorChoiceSettings  # noqa: PLC0415

    if out is not None:
        check_file(out, (priors_file, traffic), TABLE)
    sizes = _sizes(size)
    settings = DonorChoiceSettings(scales=scales)  # type: ignore[arg-type]  # checked there
    watched = WatchedStore(store)
    wanted: list[str | ServingConfiguration] = []
    for name in (n for text in targets for n in names_in(text)):
        is_file = name not in watched.config_ids and Path(name).suffix in (".yaml", ".yml")
        wanted.append(read_configuration(name) if is_file else name)
    priors, chosen = features_with_priors(features, "step_time", priors_file)
    batches = {}
    if traffic is not None:
        for target in wanted:
            own = watched.configuration(target) if isinstance(target, str) else target
            batches[own.config_id] = read_steps(traffic, own, observed=False).frame
    found = rank_donors(
        watched,
        names_in(candidates),
        wanted,
        sizes=sizes,
        keep=names_in(keep),
        hypothetical=[read_configuration(p) for p in hypothetical or []],
        traffic=batches,
        features=chosen,
        priors=priors,
        refit=refit,
        settings=settings,
        seed=seed,
    )
    if out is not None:
        with writing(out):
            write_table(found.table, out)
            rejected = write_rejected(watched.tables, out)
    else:
        rejected = write_rejected(watched.tables, None)
    result: dict[str, Any] = {
        "features": chosen.name,
        "candidates": found.candidates,
        "targets": found.targets,
        "best": found.best,
        "floor": found.floor,
        "reasons": found.reasons,
        "table": found.table.to_dict(orient="records"),
        "additional": found.additional.to_dict(orient="records"),
        "contributions": found.contributions.to_dict(orient="records"),
        "searched": found.searched,
        "settings": asdict(settings),
        "out": out,
        **rejected,
        "seed": seed,
    }
    shown = found.table[found.table["rank"] <= 5].dropna(axis="columns", how="all")
    written = f"\nwrote {out}" if out is not None else ""
    text = f"{table_text(shown, 'subsets, expected zero-shot error')}\n{table_text(found.additional, 'one donor more')}\n{found}{written}"
    show(result, text, as_json=as_json)


def _sizes(text: str) -> list[int]:
    low, dots, high = text.partition("..")
    if not low.strip().isdecimal() or (dots and not high.strip().isdecimal()) or (dots and int(low) > int(high)):
        raise InputError(f"--size takes a number of donors or from..to, as 3 or 2..5, found {text!r}")
    return list(range(int(low), int(high or low) + 1))
