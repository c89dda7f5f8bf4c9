"""`priors`: what is believed before any data, in sentences, as a file to edit, and in milliseconds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import AsJson, PriorsFile, Seed
from hfdtl_bayes.cli.output import check_file, say, show, table_text, writing
from hfdtl_bayes.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from hfdtl_bayes.configuration import ServingConfiguration
    from hfdtl_bayes.features import FeatureSet
    from hfdtl_bayes.model.prior_predictive import PriorPredictive


def priors(
    features: Annotated[str, typer.Option("--features", help="Feature set whose coefficients are meant.")] = "roofline",
    quantity: Annotated[str, typer.Option("--quantity", help="step_time, queue_delay or api_delay.")] = "step_time",
    priors_file: PriorsFile = None,
    template: Annotated[bool, typer.Option("--template", help="Print the priors as a YAML file to edit.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="With --template: file to write instead of printing.")] = None,
    configuration: Annotated[
        Path | None, typer.Option("--configuration", help="YAML of a configuration: what the priors predict for it.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Trace store: also where the rows observed of --config lie in the prediction.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="config_id in the store, in the place of --configuration.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Print every prior as a sentence, as a YAML file to edit, or as what it predicts for a configuration."""
    from hfdtl_bayes.features import feature_set  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.model import PriorSettings  # noqa: PLC0415
    from hfdtl_bayes.model.prior_files import priors_yaml, read_priors  # noqa: PLC0415
    from hfdtl_bayes.model.prior_predictive import prior_predictive  # noqa: PLC0415

    if out is not None:
        if not template:
            raise InputError("--out goes with --template: it is the YAML that is written")
        check_file(out, (priors_file, configuration))
    if (store is None) != (config is None):
        raise InputError("give --store and --config together: a trace store and the config_id in it")
    if configuration is not None and store is not None:
        raise InputError("give --configuration (a YAML file) or --store and --config, not both")
    chosen = feature_set(features, quantity)
    settings, chosen = read_priors(priors_file, chosen) if priors_file else (PriorSettings(), chosen)
    if template:
        _write_template(priors_yaml(chosen, settings), out, as_json=as_json)
        return
    sentences = settings.sentences(chosen)
    result: dict[str, Any] = {
        "features": chosen.name,
        "quantity": chosen.quantity,
        "own_priors": chosen.own_priors,
        "settings": asdict(settings),
        "sentences": sentences,
    }
    text = "\n".join(sentences)
    if configuration is not None or store is not None:
        own, observed = _subject(configuration, store, config, chosen)
        found = prior_predictive(own, chosen, settings, batches=_requests(observed, chosen), observed=observed, seed=seed)
        result |= {"config_id": own.config_id, "seed": seed, **_predicted(found)}
        text = f"{text}\n\n{_predicted_text(own.config_id, found)}"
    show(result, text, as_json=as_json)


def _write_template(text: str, out: Path | None, *, as_json: bool) -> None:
    from hfdtl_bayes.files import atomic  # noqa: PLC0415  (loaded on first use)

    if out is None:
        show({"yaml": text}, text.rstrip("\n"), as_json=as_json)
        return
    with writing(out), atomic(out) as part:
        part.write_text(text, encoding="utf-8")
    show({"out": out}, f"wrote {out}", as_json=as_json)


def _subject(
    configuration: Path | None, store: Path | None, config: str | None, features: FeatureSet
) -> tuple[ServingConfiguration, pd.DataFrame | None]:
    """Return the configuration meant, and its usable rows where a store is given."""
    from hfdtl_bayes.configuration import read_configuration  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.traces import TraceStore  # noqa: PLC0415
    from hfdtl_bayes.transfer import read_trace, usable_rows  # noqa: PLC0415

    if configuration is not None:
        return read_configuration(configuration), None
    assert store is not None
    assert config is not None
    traces = TraceStore(store)
    own = traces.configuration(config)
    table = read_trace(traces, config, features.quantity)
    say(table.summary())
    rows = usable_rows(table.frame, own, features)
    if rows.empty:
        raise InputError(f"{config!r} has no usable row of {features.quantity} to hold against the priors")
    return own, rows


_MOST_REQUESTS = 5


def _requests(observed: pd.DataFrame | None, features: FeatureSet) -> pd.DataFrame | None:
    """Return requests to predict where a delay has no list of typical ones: a few observed ones, from least to most waiting."""
    import numpy as np  # noqa: PLC0415  (loaded on first use)

    if observed is None or features.quantity == "step_time":
        return None
    ordered = observed.sort_values([c for c in ("waiting_requests", "prompt_tokens") if c in observed.columns])
    chosen = ordered.iloc[np.unique(np.linspace(0, len(ordered) - 1, _MOST_REQUESTS).astype(int))]
    return chosen.assign(batch=[f"{w:.0f} requests waiting" for w in chosen["waiting_requests"]])


def _predicted(found: PriorPredictive) -> dict[str, Any]:
    return {
        "predictive": found.table.to_dict(orient="records"),
        "observed": None if found.observed is None else asdict(found.observed),
        "flags": found.flags,
    }


def _predicted_text(config_id: str, found: PriorPredictive) -> str:
    table = found.table
    import pandas as pd  # noqa: PLC0415  (loaded on first use)

    shown = pd.DataFrame(
        {
            "batch": table["batch"],
            "hardware's least, ms": table["floor_s"] * 1e3,
            "5 %": table["q5_s"] * 1e3,
            "median": table["q50_s"] * 1e3,
            "95 %": table["q95_s"] * 1e3,
            "5 % of a row": table["q5_row_s"] * 1e3,
            "95 % of a row": table["q95_row_s"] * 1e3,
            "P(negative)": table["p_negative"],
            "P(below least)": table["p_below_floor"],
        }
    )
    said = list(found.flags) or ["nothing the priors say of these batches looks impossible"]
    if found.observed is not None:
        o = found.observed
        said.append(
            f"{o.inside_90:.0%} of {o.rows} observed rows lie inside the central 90 % of what the priors predict for them"
        )
    return "\n".join([table_text(shown, f"what the priors alone predict for {config_id}, ms"), *said])
