"""`inspect`: what a posterior file knows, who told it, and where it came from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdtl_bayes.cli.options import AsJson, PosteriorFile
from hfdtl_bayes.cli.output import show, table_text, warn_unless_converged

if TYPE_CHECKING:
    import pandas as pd

    from hfdtl_bayes.model import LatencyPosterior
    from hfdtl_bayes.model.identifiability import Direction
    from hfdtl_bayes.statistics.collinearity import DesignCondition

_POPULATION = "population"


def inspect(posterior_file: PosteriorFile, as_json: AsJson = False) -> None:
    """Show coefficients with P(< 0), which directions data or the prior decided, what rows cannot tell apart, and provenance."""
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.model.identifiability import configuration_moments, directions, population_moments  # noqa: PLC0415
    from hfdtl_bayes.statistics.collinearity import design_condition  # noqa: PLC0415

    posterior = LatencyPosterior.load(posterior_file)
    convergence = posterior.convergence()
    warn_unless_converged(convergence)
    found = {_POPULATION: directions(population_moments(posterior))}
    found |= {c: directions(configuration_moments(posterior, c)) for c in posterior.config_ids}
    designs = {s.config_id: design_condition(s, posterior.feature_set) for s in posterior.statistics}
    worth = posterior.effective_rows()
    origin = _provenance(posterior, posterior_file)
    table = posterior.coefficient_table()
    result: dict[str, Any] = {
        "provenance": origin,
        "convergence": asdict(convergence),
        "rows": {w.config_id: asdict(w) for w in worth},
        "coefficients": table.to_dict(orient="records"),
        "directions": {name: [_direction(d) for d in own] for name, own in found.items()},
        "design": {name: {**asdict(d), "sentences": d.sentences()} for name, d in designs.items()},
        "priors": {"settings": asdict(posterior.priors), "sentences": posterior.priors.sentences(posterior.feature_set)},
    }
    parts = [_described(name, table, found[name], designs.get(name)) for name in (_POPULATION, *posterior.config_ids)]
    believed = [
        f"discrepancy: {len(posterior.feature_set.discrepancy)} coefficients of each configuration's own are beliefs about the features' "
        "misfit, not listed and not judged"
    ]
    closing = [
        *(believed if posterior.feature_set.discrepancy else ()),
        *map(str, worth),
        *(f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in origin.items() if v),
    ]
    show(result, "\n\n".join([repr(posterior), *parts, "\n".join(closing)]), as_json=as_json)


def _direction(direction: Direction) -> dict[str, Any]:
    return {"name": direction.name, **asdict(direction), "loadings": dict(direction.loadings), "sentence": direction.sentence()}


def _described(name: str, table: pd.DataFrame, own: tuple[Direction, ...], design: DesignCondition | None) -> str:
    lines = [table_text(table[table["config"] == name].drop(columns="config"), f"coefficients of {name}")]
    lines += [f"  {d.sentence()}" for d in own]
    if design is not None:
        number = f"{design.identified_condition_number:.3g}"
        if design.rank < design.columns:
            number += f" within the {design.rank} of {design.columns} columns that the rows tell apart"
        lines.append(f"condition number of the scaled design: {number}")
        lines += [f"  {s}" for s in design.sentences()]
    return "\n".join(lines)


def _provenance(posterior: LatencyPosterior, path: Path) -> dict[str, Any]:
    import xarray as xr  # noqa: PLC0415  (loaded on first use)

    with xr.open_datatree(path, engine="h5netcdf") as tree:
        written = json.loads(tree.attrs["hfdtl_bayes"])["package_version"]
    return {
        "features": posterior.feature_set.name,
        "quantity": posterior.feature_set.quantity,
        "own_priors": list(posterior.feature_set.own_priors),
        "donors": list(posterior.donors),
        "target": posterior.target,
        "discounts": list(posterior.priors.discount_sentences()),
        "engine": posterior.engine,
        "sampler": posterior.tree["sample_stats"].attrs.get("sampler"),
        "seed": posterior.seed,
        "input_hash": posterior.input_hash,
        "package_version": written,
    }
