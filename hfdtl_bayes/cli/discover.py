"""`discover`: which terms the latency model of some configurations lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import (
    BLOCK_LENGTH,
    AsJson,
    BlockLength,
    PriorsFile,
    Seed,
    Store,
    block_length_of,
    features_with_priors,
    names_in,
)
from hfdtl_bayes.cli.output import check_file, plain, say, show, table_text, writing
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    from hfdtl_bayes.transfer.discovery import Discovery


def discover(
    store: Store,
    configs: Annotated[
        str, typer.Option("--configs", help="config_ids to look at, separated by commas: donors together, or one target.")
    ],
    features: Annotated[str, typer.Option("--features", help="Feature set that may lack something.")] = "roofline",
    quantity: Annotated[str, typer.Option("--quantity", help="step_time, queue_delay or api_delay.")] = "step_time",
    candidates: Annotated[
        str | None, typer.Option("--candidates", help="Candidates to test, separated by commas; all registered by default.")
    ] = None,
    max_terms: Annotated[int | None, typer.Option("--max-terms", help="Terms named at most [3].")] = None,
    bayes_factor: Annotated[
        float | None,
        typer.Option("--bayes-factor", help="What the candidates' mean Bayes factor must exceed for something to be named [20]."),
    ] = None,
    calibration_rows: Annotated[
        int | None, typer.Option("--calibration-rows", help="Rows that a left-out configuration is calibrated on [400].")
    ] = None,
    improvement: Annotated[
        float | None, typer.Option("--improvement", help="Standard errors by which held-out rows must be predicted better [1].")
    ] = None,
    block_length: BlockLength = BLOCK_LENGTH,
    priors_file: PriorsFile = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write the result to, as JSON (.json).")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Find the residual and interaction terms that a feature set lacks, with what they gain on held-out rows."""
    from hfdtl_bayes.cli.traces import WatchedStore, write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.files import atomic  # noqa: PLC0415
    from hfdtl_bayes.transfer.discovery import discover as look  # noqa: PLC0415
    from hfdtl_bayes.transfer.term_search import DiscoverySettings  # noqa: PLC0415

    if out is not None:
        check_file(out, (priors_file,), (".json",))
    thresholds: dict[str, Any] = {
        "max_terms": max_terms,
        "bayes_factor": bayes_factor,
        "calibration_rows": calibration_rows,
        "improvement": improvement,
    }
    settings = DiscoverySettings(**{k: v for k, v in thresholds.items() if v is not None})
    length = block_length_of(block_length)
    if length == "auto":
        raise InputError("discover compares configurations on blocks of one length; give --block-length a number of steps")
    priors, chosen = features_with_priors(features, quantity, priors_file)
    watched = WatchedStore(store)
    found = look(
        watched,
        names_in(configs),
        chosen,
        candidates=None if candidates is None else names_in(candidates),
        block_length=length,
        priors=priors,
        settings=settings,
        seed=seed,
    )
    result: dict[str, Any] = {**found.as_dict(), **write_rejected(watched.tables, out), "out": out, "seed": seed}
    if out is not None:
        with writing(out), atomic(out) as part:
            part.write_text(json.dumps(plain(result), indent=2, allow_nan=False) + "\n")
        say(f"wrote {out}")
    show(result, _described(found), as_json=as_json)


def _described(found: Discovery) -> str:
    import pandas as pd  # noqa: PLC0415  (loaded on first use)

    sizes = [
        {
            "term": t.name,
            "config": c,
            "coefficient": s.mean,
            "sd": s.sd,
            "steps that have it": s.active,
            "share of their time": s.share,
            "MAPE points": t.gains[c].points if c in t.gains else float("nan"),
            "+-": t.gains[c].points_se if c in t.gains else float("nan"),
        }
        for t in found.terms
        for c, s in t.sizes.items()
    ]
    table = [table_text(pd.DataFrame(sizes), "terms by configuration; MAPE points gained on held-out rows")] if sizes else []
    return "\n".join([*table, *found.sentences()])
