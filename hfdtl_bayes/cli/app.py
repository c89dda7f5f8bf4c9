"""The commands put together, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hfdtl_bayes.cli.compare import compare
from hfdtl_bayes.cli.cross_validation import cross_validate
from hfdtl_bayes.cli.discover import discover
from hfdtl_bayes.cli.donor_choice import choose_donors
from hfdtl_bayes.cli.donors import combine, forget, promote
from hfdtl_bayes.cli.export import export
from hfdtl_bayes.cli.fit import calibrate, fit
from hfdtl_bayes.cli.follow import follow
from hfdtl_bayes.cli.ingest import ingest
from hfdtl_bayes.cli.inspection import inspect
from hfdtl_bayes.cli.options import AsJson, Seed
from hfdtl_bayes.cli.output import say, show
from hfdtl_bayes.cli.plan import plan
from hfdtl_bayes.cli.predict import predict
from hfdtl_bayes.cli.priors import priors
from hfdtl_bayes.cli.reduction import merge, statistics
from hfdtl_bayes.cli.select import select
from hfdtl_bayes.cli.sensitivity import sensitivity
from hfdtl_bayes.cli.simulate import simulate
from hfdtl_bayes.cli.verdict import verdict
from hfdtl_bayes.errors import HfdtlError, RejectedRowsWarning

BAD_INPUT = 2
INTERRUPTED = 130


class Commands(TyperGroup):
    """The group of commands; errors raised on purpose leave as one message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was chosen."""
        try:
            with warnings.catch_warnings():
                # Every command shows the summary of what it reads.
                warnings.simplefilter("ignore", RejectedRowsWarning)
                return super().invoke(ctx)
        except HfdtlError as error:
            say(f"error: {error}")
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    # A bug shows Python's own traceback, which a report can quote; bad input never shows one.
    pretty_exceptions_enable=False,
    help="Bayesian transfer of LLM serving latency models: from vLLM traces to BLIS coefficients with error bars.",
    epilog="Exit codes: 0 done, 1 the verdict says no (--gate), 2 bad input, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from hfdtl_bayes import __version__  # noqa: PLC0415  (loaded on first use)

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the posterior, BLIS files, figures and summary.")] = Path(
        "reports/demo"
    ),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit three donors, calibrate an unlike target and judge it, on the real traces that ship with the package."""
    from rich.console import Console  # noqa: PLC0415  (loaded on first use)

    from hfdtl_bayes.cli.demo import print_demo, run_demo  # noqa: PLC0415
    from hfdtl_bayes.cli.output import check_folder, writing  # noqa: PLC0415

    check_folder(out)
    with writing(out):
        result = run_demo(out, seed=seed, show_progress=True)
    if as_json:
        show(result.as_dict(), as_json=True)
    else:
        print_demo(result, Console())


app.command()(ingest)
app.command()(fit)
app.command()(calibrate)
app.command()(select)
app.command()(predict)
app.command()(verdict)
app.command()(cross_validate)
app.command()(choose_donors)
app.command()(discover)
app.command()(plan)
app.command()(follow)
app.command()(export)
app.command()(simulate)
app.command()(compare)
app.command()(inspect)
app.command()(priors)
app.command()(sensitivity)
app.command()(statistics)
app.command()(merge)
app.command()(promote)
app.command()(forget)
app.command()(combine)
