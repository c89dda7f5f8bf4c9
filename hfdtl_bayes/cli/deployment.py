"""The traffic that will be predicted, as `plan` and `follow` are told of it, and the options they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfdtl_bayes.cli.options import names_in
from hfdtl_bayes.cli.output import TABLE_SUFFIXES, check_file, say, writing
from hfdtl_bayes.errors import InputError, MissingInputError

if TYPE_CHECKING:
    import pandas as pd

    from hfdtl_bayes.configuration import ServingConfiguration
    from hfdtl_bayes.design.traffic_grid import TrafficGrid
    from hfdtl_bayes.design.traffic_plan import TrafficPlan
    from hfdtl_bayes.model import LatencyPosterior
    from hfdtl_bayes.replay import Traffic

DeploymentOption = Annotated[
    str,
    typer.Option(
        "--deployment",
        help="Traffic that will be predicted: a table of its steps (Parquet or CSV), a YAML list of traffic (requests per second or in "
        "flight, prompt and output lengths), or regimes of the store's traces separated by commas.",
    ),
]
Concurrencies = Annotated[
    str | None, typer.Option("--concurrency", help="Requests in flight to choose from, separated by commas.")
]
Rates = Annotated[str | None, typer.Option("--request-rate", help="Requests per second to choose from, separated by commas.")]
Prompts = Annotated[str | None, typer.Option("--prompt-tokens", help="Prompt lengths to choose from.")]
Outputs = Annotated[str | None, typer.Option("--output-tokens", help="Output lengths to choose from.")]
Prefixes = Annotated[str | None, typer.Option("--prefix-tokens", help="Shared prefixes to choose from.")]
Durations = Annotated[str | None, typer.Option("--duration", help="Durations to choose from, seconds.")]
RangeRatio = Annotated[
    float | None, typer.Option("--range-ratio", help="Lengths vary from (1 - ratio) to (1 + ratio) times their value [0.5].")
]
Budget = Annotated[
    float | None, typer.Option("--budget-minutes", help="Most minutes of traffic; as many as a verdict is expected to need.")
]
MapeLimit = Annotated[
    float | None, typer.Option("--mape-limit", help="Held-out MAPE that the verdict will ask for, as a fraction [0.1].")
]
BenchCommands = Annotated[
    Path | None, typer.Option("--bench-commands", help="Also write the plan as a script of vllm bench serve commands.")
]
BlisWorkload = Annotated[
    Path | None, typer.Option("--blis-workload", help="Also write it as BLIS workload files (.yaml), one per segment.")
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="Name of the model as the server knows it, for the commands [llm.name].")
]
Host = Annotated[str, typer.Option("--host", help="Where the server listens, for the commands.")]
Port = Annotated[int, typer.Option("--port", help="The same: its port.")]


def read_deployment(
    text: str, configuration: ServingConfiguration, posterior: LatencyPosterior, recorded: pd.DataFrame | None
) -> pd.DataFrame | Sequence[tuple[Traffic, float]]:
    """Return the deployment mix: a table of steps, traffic to replay, or rows of the target's trace by regime.

    Raises
    ------
    MissingInputError
        If a file does not exist.
    InputError
        If a file is not what it should be, or there is no such regime.
    """
    from hfdtl_bayes.design.traffic_files import read_traffic  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.traces import read_steps  # noqa: PLC0415
    from hfdtl_bayes.transfer import usable_rows  # noqa: PLC0415

    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        return read_traffic(path)
    if path.suffix in TABLE_SUFFIXES:
        if not path.exists():
            raise MissingInputError(
                f"--deployment {path} does not exist; give a table of steps, a YAML list of traffic, or regimes"
            )
        table = read_steps(path, configuration, observed=False)
        say(table.summary())
        return usable_rows(table.frame, configuration, posterior.feature_set)
    if recorded is None:
        raise InputError(
            f"--deployment {text!r} is no file of a known kind, and no traces of {configuration.config_id!r} are read whose regimes it "
            "could name; give a table of steps (.parquet, .csv) or a list of traffic (.yaml)"
        )
    known, names = sorted(set(recorded["regime"])), names_in(text)
    unknown = [n for n in names if n not in known]
    if unknown or not names:
        raise InputError(
            f"--deployment: unknown regime(s) {', '.join(unknown) or '(none given)'}; the trace has {', '.join(known)}"
        )
    return recorded[recorded["regime"].isin(names)]


def numbers_in(text: str | None, option: str) -> tuple[float, ...] | None:
    """Return the numbers of a comma-separated list; None where the option was not given.

    Raises
    ------
    InputError
        If one is not a number, or the list is empty.
    """
    if text is None:
        return None
    found = []
    for word in names_in(text):
        try:
            found.append(float(word))
        except ValueError:
            raise InputError(f"{option} takes numbers separated by commas, found {word!r}") from None
    if not found:
        raise InputError(f"the grid of traffic is empty: {option} lists no value; give at least one")
    return tuple(found)


def grid_of(configuration: ServingConfiguration, options: dict[str, str | None], range_ratio: float | None) -> TrafficGrid:
    """Return the grid asked for, by option; what is not given spans what the engine takes."""
    from hfdtl_bayes.design.traffic_grid import TrafficGrid  # noqa: PLC0415  (loaded on first use)

    fields = {
        "--concurrency": "concurrencies",
        "--request-rate": "request_rates_per_s",
        "--prompt-tokens": "prompt_tokens",
        "--output-tokens": "output_tokens",
        "--prefix-tokens": "shared_prefix_tokens",
        "--duration": "durations_s",
    }
    changed: dict[str, Any] = {fields[o]: v for o, text in options.items() if (v := numbers_in(text, o)) is not None}
    if range_ratio is not None:
        changed["range_ratio"] = range_ratio
    return TrafficGrid.for_engine(configuration, **changed)


def check_outputs(out: Path | None, bench: Path | None, blis: Path | None, inputs: Sequence[Path | None]) -> None:
    """Refuse output files that could not be written, before any work is done for them."""
    for path, suffixes in ((out, (".json",)), (bench, ()), (blis, (".yaml", ".yml"))):
        if path is not None:
            check_file(path, inputs, suffixes)


def write_plan(
    plan: TrafficPlan,
    out: Path | None,
    bench: Path | None,
    blis: Path | None,
    *,
    model: str | None,
    host: str,
    port: int,
) -> list[Path]:
    """Write a plan in the forms asked for; returns the files. Of a plan that sends nothing only the JSON is written, aloud."""
    from hfdtl_bayes.design.bench_commands import write_bench_script  # noqa: PLC0415  (loaded on first use)
    from hfdtl_bayes.design.blis_workload import write_blis_workloads  # noqa: PLC0415

    written: list[Path] = []
    if out is not None:
        with writing(out):
            written.append(plan.write(out))
    if not plan.segments:
        if bench or blis:
            say("the plan sends nothing, so no commands or workload are written")
        return written
    if bench is not None:
        with writing(bench):
            written.append(write_bench_script(plan, bench, model=model, host=host, port=port))
    if blis is not None:
        with writing(blis):
            written += write_blis_workloads(plan, blis)
    return written
