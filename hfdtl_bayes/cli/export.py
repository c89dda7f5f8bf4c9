"""`export`: a posterior as BLIS takes it, as a card, as Go, as an ensemble; of one configuration or of a fleet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import AsJson, Seed, names_in
from hfdtl_bayes.cli.output import check_file, check_folder, say, show, warn_unless_converged, writing
from hfdtl_bayes.errors import ExportError, InputError, MissingInputError

if TYPE_CHECKING:
    import pandas as pd

    from hfdtl_bayes.cli.traces import WatchedStore
    from hfdtl_bayes.configuration import ServingConfiguration
    from hfdtl_bayes.export import Backend, ExportSettings
    from hfdtl_bayes.model import LatencyPosterior
    from hfdtl_bayes.traces import StepReport, TraceTable
    from hfdtl_bayes.transfer import Verdict


class Format(StrEnum):
    """What can be written."""

    BLIS_YAML = "blis-yaml"
    BLIS_FLAGS = "blis-flags"
    JSON = "json"
    GO = "go"
    ENSEMBLE = "ensemble"


class BackendName(StrEnum):
    """BLIS's coefficient-based latency models."""

    TRAINED_PHYSICS = "trained-physics"
    BLACKBOX = "blackbox"
    CROSSMODEL = "crossmodel"


_SUFFIX = {Format.BLIS_YAML: ".yaml", Format.BLIS_FLAGS: ".txt", Format.JSON: ".json"}


@dataclass(frozen=True)
class _One:
    """A configuration to export, with what its store says of it."""

    configuration: ServingConfiguration
    traffic: pd.DataFrame | None
    alpha_us: dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class _Job:
    """What was asked for."""

    posterior: LatencyPosterior
    delays: LatencyPosterior | None
    backend: Backend
    settings: ExportSettings
    draws: int
    seed: int
    watched: WatchedStore | None

    def vectors(self, one: _One) -> Any:
        from hfdtl_bayes.export import blis_vectors  # noqa: PLC0415  (loaded on first use)

        alpha = one.alpha_us[self.backend.name]
        return blis_vectors(
            self.posterior,
            one.configuration,
            one.traffic,
            alpha_us=alpha,
            backend=self.backend,
            settings=self.settings,
            seed=self.seed,
        )

    def card(self, one: _One) -> Any:
        from hfdtl_bayes.export import BACKENDS, coefficient_card  # noqa: PLC0415  (loaded on first use)

        return coefficient_card(
            self.posterior,
            one.configuration,
            one.traffic,
            delays=self.delays,
            alpha_us=one.alpha_us,
            backends=tuple(BACKENDS.values()),
            verdict=self.verdict(one),
            settings=self.settings,
            seed=self.seed,
        )

    def verdict(self, one: _One) -> Verdict | None:
        """Return the verdict on a calibrated target whose rows are in the store, None for everything else."""
        from hfdtl_bayes.transfer import held_out_rows, usable_rows  # noqa: PLC0415  (loaded on first use)
        from hfdtl_bayes.transfer import verdict as judge  # noqa: PLC0415

        posterior, own = self.posterior, one.configuration
        if self.watched is None or one.traffic is None or posterior.target != own.config_id:
            return None
        try:
            rows = usable_rows(one.traffic, own, posterior.feature_set)
            seen, held_out = held_out_rows(posterior, rows)
        except InputError as error:
            say(f"no verdict in the card: {error}")
            return None
        return judge(posterior, held_out, own, calibration_rows=seen, seed=self.seed)


def export(
    posterior_file: Annotated[
        Path,
        typer.Argument(help="Posterior file (netCDF) written by fit or calibrate; or a coefficient card (.json) to convert."),
    ],
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="blis-yaml for --defaults-filepath, or blis-flags of blis run and replay; json, the coefficient card; go, one source "
            "file and its test; ensemble, a folder of posterior draws.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="File, or folder of an ensemble or fleet, to write; by default stdout.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="config_id that was fitted; by default the calibrated target.")
    ] = None,
    configuration: Annotated[Path | None, typer.Option("--configuration", help="YAML of a configuration never seen.")] = None,
    configurations: Annotated[
        str | None,
        typer.Option(
            "--configurations",
            help="A fleet: comma-separated config_ids that were fitted and YAML files of configurations never seen; all for all fitted.",
        ),
    ] = None,
    traffic: Annotated[
        Path | None, typer.Option("--traffic", help="Batches the vector is to be right for; by default all the engine can run.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", help="Trace store of the configuration: its steps are the traffic, its idle requests give alpha0."
        ),
    ] = None,
    backend: Annotated[
        BackendName, typer.Option("--backend", help="Latency model of BLIS; blackbox and crossmodel are of older versions.")
    ] = BackendName.TRAINED_PHYSICS,
    alpha: Annotated[
        str | None,
        typer.Option("--alpha", help="a0,a1,a2 in the units of the backend, in the place of what the store says."),
    ] = None,
    delays: Annotated[
        Path | None, typer.Option("--delays", help="Posterior of api_delay or queue_delay, for the alphas of json and go.")
    ] = None,
    draws: Annotated[int, typer.Option("--draws", min=2, help="With --format ensemble: posterior draws.")] = 100,
    max_projection_error: Annotated[
        float | None,
        typer.Option("--max-projection-error", help="Mean difference from the posterior mean to accept, as a fraction [0.1]."),
    ] = None,
    package: Annotated[str, typer.Option("--package", help="With --format go: name of the package.")] = "latency",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Export coefficients, checked: to BLIS, as a card with everything known of them, as Go source, or as an ensemble."""
    from hfdtl_bayes.cli.traces import WatchedStore, write_rejected  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.export import BACKENDS, ExportSettings  # noqa: PLC0415
    from hfdtl_bayes.model import LatencyPosterior  # noqa: PLC0415

    fleet = configurations is not None
    _check_out(out, format, fleet, backend, (posterior_file, configuration, traffic, delays))
    if posterior_file.suffix == ".json":
        _convert(posterior_file, format, out, backend, as_json=as_json)
        return
    if fleet and (config is not None or configuration is not None or traffic is not None):
        raise InputError(
            "--configurations takes the place of --config and --configuration, and the steps of --store that of --traffic"
        )
    settings = ExportSettings() if max_projection_error is None else ExportSettings(max_projection_error=max_projection_error)
    posterior = LatencyPosterior.load(posterior_file)
    warn_unless_converged(posterior.convergence())
    watched = WatchedStore(store) if store is not None else None
    tables: list[TraceTable | StepReport] = watched.tables if watched is not None else []
    own_delays = LatencyPosterior.load(delays) if delays is not None else None
    if own_delays is not None:
        warn_unless_converged(own_delays.convergence())
    job = _Job(posterior, own_delays, BACKENDS[backend], settings, draws, seed, watched)
    chosen = _chosen(posterior, config, configuration, configurations)
    every = [_prepared(c, watched, traffic, tables, _alphas(alpha, backend), may_lack=fleet) for c in chosen]
    result: dict[str, Any] = {"format": str(format), "out": out, "seed": seed}
    if format is Format.GO:
        assert out is not None
        said = _write_go(job, every, out, package, result)
    elif fleet:
        assert out is not None
        said = _write_fleet(job, every, out, format, result)
    elif format is Format.ENSEMBLE:
        assert out is not None
        said = _write_ensemble(job, every[0], out, result)
    else:
        said = _write_one(job, every[0], out, format, result)
    result |= write_rejected(tables, out)
    show(result, said, as_json=as_json)
    if result.get("refused"):
        raise ExportError(
            f"{len(result['refused'])} of {len(every)} configurations cannot be exported ({', '.join(result['refused'])}; the reasons are "
            f"above); the others are in {out}"
        )


def _check_out(out: Path | None, format: Format, fleet: bool, backend: BackendName, inputs: tuple[Path | None, ...]) -> None:
    one_file = format is Format.GO or (format is Format.BLIS_YAML and backend is BackendName.BLACKBOX)
    if fleet and format is Format.ENSEMBLE:
        raise InputError("--format ensemble is of one configuration; export a folder for each")
    if out is None:
        if fleet or format in (Format.GO, Format.ENSEMBLE):
            what = "a file" if format is Format.GO or (fleet and one_file) else "a folder"
            raise InputError(f"--format {format}{' of a fleet' if fleet else ''} writes {what}; name it with --out")
        return
    if format is Format.ENSEMBLE or (fleet and not one_file):
        check_folder(out)
        return
    check_file(out, inputs, (".go",) if format is Format.GO else ())


def _chosen(
    posterior: LatencyPosterior, config: str | None, configuration: Path | None, configurations: str | None
) -> list[ServingConfiguration]:
    from hfdtl_bayes.cli.traces import configuration_of  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.configuration import read_configuration  # noqa: PLC0415

    if configurations is None:
        return [configuration_of(posterior, config, configuration)]
    names = names_in(configurations)
    if names == ["all"]:
        names = list(posterior.config_ids)
    if not names:
        raise InputError(f"--configurations names none; accepted are all, YAML files and {', '.join(posterior.config_ids)}")
    found = [
        read_configuration(n) if n.endswith((".yaml", ".yml")) and n not in posterior.config_ids else posterior.configuration(n)
        for n in names
    ]
    ids = [c.config_id for c in found]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise InputError(f"--configurations names {', '.join(twice)} more than once; each file is called after its config_id")
    return found


def _alphas(text: str | None, backend: BackendName) -> dict[str, tuple[float, float, float]]:
    """Read --alpha."""
    if text is None:
        return {}
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise InputError(f"--alpha takes three numbers separated by commas, found {text!r}")
    return {str(backend): (values[0], values[1], values[2])}


def _prepared(
    configuration: ServingConfiguration,
    watched: WatchedStore | None,
    traffic: Path | None,
    tables: list[TraceTable | StepReport],
    alphas: dict[str, tuple[float, float, float]],
    *,
    may_lack: bool,
) -> _One:
    """Return a configuration with its traffic and alphas; in a fleet the store may lack some."""
    from hfdtl_bayes.export import BACKENDS  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.traces import drop_warmup, read_steps  # noqa: PLC0415

    frame = None
    if traffic is not None:
        table = read_steps(traffic, configuration, observed=False)
        say(table.summary())
        tables.append(table)
        frame = table.frame
    elif watched is not None and may_lack and configuration.config_id not in watched.config_ids:
        say(f"{configuration.config_id} is not in {watched.path}: exported for all batches the engine can run, alpha0 as 0")
        watched = None
    elif watched is not None:
        frame = drop_warmup(watched.steps(configuration.config_id).frame)
    alpha_us = dict.fromkeys(BACKENDS, (0.0, 0.0, 0.0)) | _recorded_alphas(watched, configuration)
    return _One(configuration, frame, alpha_us | alphas)


def _recorded_alphas(watched: WatchedStore | None, configuration: ServingConfiguration) -> dict[str, tuple[float, float, float]]:
    """Return the alphas that requests of the store give, by backend, in BLIS's units; none where no requests tell."""
    from hfdtl_bayes.export import BLACKBOX, CROSSMODEL, TRAINED_PHYSICS, idle_api_delay_s, queueing_alpha_s  # noqa: PLC0415

    if watched is None:
        return {}
    try:
        requests = watched.requests(configuration.config_id).frame
    except MissingInputError:
        say("no requests in the store: alpha0 is exported as 0")
        return {}
    found: dict[str, tuple[float, float, float]] = {}
    delay, line = idle_api_delay_s(requests), queueing_alpha_s(requests)
    if delay is None:
        say("no arrivals, or fewer than five requests that found the engine idle: alpha0 is exported as 0")
    else:
        found[TRAINED_PHYSICS.name] = (delay * 1e6, 0.0, 0.0)
    if line is not None:
        found |= {b.name: (line[0] * 1e6, line[1] * 1e6, 0.0) for b in (BLACKBOX, CROSSMODEL)}
    return found


def _text(job: _Job, one: _One, format: Format) -> tuple[str, dict[str, Any], str]:
    """Return one configuration as text, as plain data, and in words."""
    from hfdtl_bayes.export import blis_flags, blis_yaml  # noqa: PLC0415  (loaded on first use)

    if format is Format.JSON:
        card = job.card(one)
        said = [f"no {name} vectors in the card: {why}" for name, why in card.data["blis"]["refused"].items()]
        return card.text(), {"config_id": card.config_id, "card": dict(card.data)}, "\n".join(said)
    vectors = job.vectors(one)
    text = blis_yaml(vectors) if format is Format.BLIS_YAML else blis_flags(vectors)
    return text, vectors.as_dict(), vectors.summary()


def _write_one(job: _Job, one: _One, out: Path | None, format: Format, result: dict[str, Any]) -> str:
    from hfdtl_bayes.export import write_text  # noqa: PLC0415  (loaded on first use)

    text, data, summary = _text(job, one, format)
    result |= {**data, "text": text}
    if summary:
        say(summary)
    if out is None:
        return text.rstrip("\n")
    with writing(out):
        write_text(text, out)
    return f"wrote {out}"


def _write_go(job: _Job, every: list[_One], out: Path, package: str, result: dict[str, Any]) -> str:
    from hfdtl_bayes.export import TRAINED_PHYSICS, go_source, write_text  # noqa: PLC0415  (loaded on first use)

    made = go_source(
        job.posterior,
        [o.configuration for o in every],
        delays=job.delays,
        alpha0_s=[o.alpha_us[TRAINED_PHYSICS.name][0] * 1e-6 for o in every],
        package=package,
        seed=job.seed,
    )
    test = out.with_name(f"{out.stem}_test.go")
    with writing(out):
        write_text(made.source, out)
        write_text(made.test, test)
    result |= {"test": test, "config_ids": list(made.config_ids), "cases": made.cases}
    return f"wrote {out} and {test}: {len(made.config_ids)} configuration(s), {made.cases} golden values"


def _write_ensemble(job: _Job, one: _One, out: Path, result: dict[str, Any]) -> str:
    from hfdtl_bayes.export import blis_ensemble, write_ensemble  # noqa: PLC0415  (loaded on first use)

    made = blis_ensemble(
        job.posterior,
        one.configuration,
        one.traffic,
        draws=job.draws,
        alpha_us=one.alpha_us[job.backend.name],
        backend=job.backend,
        settings=job.settings,
        seed=job.seed,
    )
    say(made.summary())
    with writing(out):
        manifest = write_ensemble(made, out)
    result |= {"config_id": one.configuration.config_id, "manifest": manifest, "draws": len(made.members)}
    result["left_out"] = {str(k): v for k, v in made.refused.items()}
    return f"wrote {manifest} and {len(made.members)} draws"


def _write_fleet(job: _Job, every: list[_One], out: Path, format: Format, result: dict[str, Any]) -> str:
    """Write one file per configuration and the index, or one file that holds them all where BLIS reads it so."""
    from hfdtl_bayes.export import blis_yaml, write_fleet, write_text  # noqa: PLC0415  (loaded on first use)

    together = format is Format.BLIS_YAML and job.backend.name == BackendName.BLACKBOX
    made, refused = _each(every, lambda o: job.vectors(o) if together else _text(job, o, format))
    if not made:
        raise ExportError("no configuration can be exported:\n" + "\n".join(refused.values()))
    with writing(out):
        if together:
            write_text(blis_yaml(*made.values()), out)
            said = f"wrote {out} with {len(made)} configuration(s)"
        else:
            texts = {name: text for name, (text, _, _) in made.items()}
            result["index"] = write_fleet(out, str(format), _SUFFIX[format], texts, refused)
            said = f"wrote {len(made)} file(s) and {result['index']}"
    result |= {"config_ids": list(made), "refused": refused}
    return said


def _each(every: list[_One], made: Callable[[_One], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what is made of each configuration, and why some cannot be."""
    found: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for one in every:
        name = one.configuration.config_id
        try:
            found[name] = made(one)
        except ExportError as error:
            refused[name] = str(error)
            say(f"not exported: {error}")
    return found, refused


def _convert(card_file: Path, format: Format, out: Path | None, backend: BackendName, *, as_json: bool) -> None:
    """Write a card again, or the vectors of BLIS in it."""
    from hfdtl_bayes.export import blis_flags, blis_yaml, read_card, write_text  # noqa: PLC0415  (loaded on first use)

    if format in (Format.GO, Format.ENSEMBLE):
        raise InputError(f"a card holds no draws and no formulas to run: --format {format} needs the posterior it was made of")
    card = read_card(card_file)
    if format is Format.JSON:
        text = card.text()
    else:
        vectors = card.vectors(str(backend))
        say(vectors.summary())
        text = blis_yaml(vectors) if format is Format.BLIS_YAML else blis_flags(vectors)
    if out is not None:
        with writing(out):
            write_text(text, out)
    result = {"format": str(format), "out": out, "config_id": card.config_id, "text": text}
    show(result, f"wrote {out}" if out is not None else text.rstrip("\n"), as_json=as_json)
