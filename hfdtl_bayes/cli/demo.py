"""The demo: real vLLM traces in, a calibrated target, a verdict, BLIS coefficients and a page out, with nothing to prepare.

Three donors of the embedded recordings are fitted, an unlike target is calibrated on its quietest traffic and judged on the
rest of its recording, beside the design's ridge recipe, a fit of the target alone, and the donors alone.
"""

from __future__ import annotations

import json
import shlex
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdtl_bayes.cli.output import plain, say
from hfdtl_bayes.errors import ExportError, RejectedRowsWarning

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

    from hfdtl_bayes.configuration import ServingConfiguration
    from hfdtl_bayes.export import BlisVectors
    from hfdtl_bayes.model import LatencyPosterior, SamplerSettings
    from hfdtl_bayes.report import Comparison, TargetSummary
    from hfdtl_bayes.traces import TraceStore, TraceTable
    from hfdtl_bayes.transfer import Verdict

CALIBRATION_REGIMES = ("load0.15", "load0.5")
"""Traffic the target is calibrated on: what a cautious trial in production would offer."""

CALIBRATION_ROWS = 300
"""Rows of it, the first in time: about fifteen seconds of serving."""

FORMAT = 1
"""Version of results.json."""

FILES = {
    "summary.html": "this page: one file, nothing fetched",
    "results.json": "every number of this page",
    "donors.nc": "posterior of the donors: start another target from it (hfdtl-bayes calibrate)",
    "target.nc": "posterior of donors and target: predict, verdict, export (hfdtl-bayes predict)",
    "blis.yaml": "coefficients for blis --defaults-filepath",
    "blis-flags.txt": "the same as flags, with the engine's limits",
    "blis-hardware.json": "the hardware figures the coefficients are relative to, for blis --hardware-config",
    "blocks.svg": "predicted against measured, by time block (also .png)",
    "accuracy.svg": "errors by regime and method (also .png)",
    "coefficients.svg": "priors and posteriors of the coefficients (also .png)",
}
_REJECTED = ".rejected.csv"
_BLIS_FILES = ("blis.yaml", "blis-flags.txt", "blis-hardware.json")


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and wrote.

    Attributes
    ----------
    out : Path
        Folder of the files.
    summary : TargetSummary
        Posterior, rows, verdict, comparison, BLIS vectors and where the time went.
    donors : LatencyPosterior
    files : tuple of Path
    rejected_rows : int
        Rows of the recordings that were set aside; they are among the files.
    """

    out: Path
    summary: TargetSummary
    donors: LatencyPosterior
    files: tuple[Path, ...]
    rejected_rows: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON; times in seconds, errors as fractions."""
        s = self.summary
        posterior, vectors = s.posterior, s.vectors
        blis: dict[str, Any] = {"exported": vectors is not None, "refusal": s.refusal, "fitted_to": s.export_note}
        if vectors is not None:
            blis |= vectors.as_dict()
        found: dict[str, Any] = plain(
            {
                "format": FORMAT,
                "package_version": s.version,
                "seed": posterior.seed,
                "feature_set": posterior.feature_set.name,
                "quantity": posterior.feature_set.quantity,
                "donors": posterior.donors,
                "target": posterior.target,
                "input_hash": posterior.input_hash,
                "calibration": {"regimes": s.regimes_seen, **_extent(s.calibration)},
                "held_out": {"regimes": s.regimes_judged, **_extent(s.held_out)},
                "rejected_rows": self.rejected_rows,
                "rejected_files": [str(p) for p in self.files if p.name.endswith(_REJECTED)],
                "convergence": {name: asdict(p.convergence()) for name, p in (("donors", self.donors), ("target", posterior))},
                "verdict": s.verdict.as_dict(),
                "comparison": {
                    "by_regime": s.comparison.table().reset_index().to_dict(orient="records"),
                    "best": s.comparison.best,
                    "zero_shot_coverage": s.comparison.zero_shot.coverage,
                    "zero_shot_block_coverage": s.comparison.zero_shot.block_coverage,
                },
                "blis": blis,
                "files": [p.name for p in self.files],
                "seconds": dict(s.seconds),
            }
        )
        return found


def _extent(rows: pd.DataFrame) -> dict[str, Any]:
    return {"rows": len(rows), "first_step": int(rows["step_id"].min()), "last_step": int(rows["step_id"].max())}


class _Clock:
    """Wall-clock seconds of each stage, announced on stderr as it begins."""

    def __init__(self, announce: bool) -> None:
        self.announce = announce
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, words: str = "") -> Iterator[None]:
        if self.announce and words:
            say(words)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run_demo(out: Path, *, seed: int = 0, show_progress: bool = True, settings: SamplerSettings | None = None) -> DemoResult:
    """Run the demo on the embedded recordings and write its files.

    Nothing is written before everything is computed; then the files replace those of an earlier run.

    Parameters
    ----------
    out : Path
        Folder for the files; made if absent.
    seed : int
        The same seed gives the same numbers.
    show_progress : bool
        Say on stderr what is being done.
    settings : SamplerSettings, optional

    Returns
    -------
    DemoResult

    Raises
    ------
    ConvergenceError
        If the sampler cannot run.
    OSError
        If `out` cannot be written.
    """
    clock = _Clock(show_progress)
    with clock.stage("import", "loading the sampler and matplotlib"):
        from hfdtl_bayes.report import TargetSummary, compare, summary_page  # noqa: PLC0415
        from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path  # noqa: PLC0415
        from hfdtl_bayes.statistics import package_version  # noqa: PLC0415  (loading is a stage of its own, and timed)
        from hfdtl_bayes.traces import TraceStore, drop_warmup  # noqa: PLC0415
        from hfdtl_bayes.transfer import (  # noqa: PLC0415
            calibrate,
            calibrate_ridge,
            fit_donors,
            fit_ridge_donors,
            held_out_rows,
            verdict,
        )
    with clock.stage("read"):
        store = TraceStore(sample_store_path())
        steps = {c: store.steps(c) for c in (*DONORS, TARGET)}
        requests = store.requests(TARGET)
        tables = (*steps.values(), requests)
        rows = {c: drop_warmup(table.frame) for c, table in steps.items()}
        configuration = store.configuration(TARGET)
    _show_rejected(tables)
    with clock.stage("fit donors", "fitting three donors"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RejectedRowsWarning)  # just shown
        donors = fit_donors(store, DONORS, settings=settings, seed=seed, show_progress=show_progress)
    recording = rows[TARGET]
    low_load = recording[recording["regime"].isin(CALIBRATION_REGIMES)].iloc[:CALIBRATION_ROWS]
    with clock.stage("calibrate", f"calibrating {TARGET} on {len(low_load)} rows of {' and '.join(CALIBRATION_REGIMES)}"):
        posterior = calibrate(donors, low_load, configuration, settings=settings, seed=seed, show_progress=show_progress)
    with clock.stage("evaluate", "judging it on the rest of the recording"):
        calibration, held_out = held_out_rows(posterior, recording)
        # What is left of the quiet traffic would flatter the average.
        held_out = held_out[~held_out["regime"].isin(CALIBRATION_REGIMES)]
        found = verdict(posterior, held_out, configuration, calibration_rows=calibration, seed=seed)
        recipe = fit_ridge_donors([(rows[d], store.configuration(d)) for d in DONORS])
        recipe = calibrate_ridge(recipe, calibration, configuration)
        comparison = compare(posterior, donors, recipe, calibration, held_out, configuration, seed=seed)
    with clock.stage("export"):
        vectors, note, refusal = _vectors(posterior, configuration, recording, requests.frame, seed)
    summary = TargetSummary(
        title="From three donors to a calibrated target: the demo",
        posterior=posterior,
        calibration=calibration,
        held_out=held_out,
        verdict=found,
        comparison=comparison,
        vectors=vectors,
        refusal=refusal,
        export_note=note,
        command=_command(store, out, found, posterior, list(dict.fromkeys(calibration["regime"]))),
        files=_explained(tables, vectors),
        version=package_version(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as made:
        folder = Path(made)
        with clock.stage("figures", "drawing"):
            summary = replace(summary, figures=_draw(folder, summary, donors, seed))
        with clock.stage("export"):
            _export(folder, summary, donors)
            for table in tables:
                table.write_rejected(folder)
        summary = replace(summary, seconds=dict(clock.seconds))
        names = [*(p.name for p in folder.iterdir()), "results.json", "summary.html"]
        found_files = tuple(out / name for name in sorted(names))
        result = DemoResult(out, summary, donors, found_files, sum(len(t.rejected) for t in tables))
        (folder / "summary.html").write_text(summary_page(summary), encoding="utf-8")
        (folder / "results.json").write_text(json.dumps(result.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        publish(folder, out)
    return result


def _show_rejected(tables: Sequence[TraceTable]) -> None:
    for table in tables:
        if len(table.rejected):
            say(table.summary())


def _explained(tables: Sequence[TraceTable], vectors: BlisVectors | None) -> dict[str, str]:
    """Return what each file is, for those that this run writes."""
    files = {name: meaning for name, meaning in FILES.items() if vectors is not None or name not in _BLIS_FILES}
    if any(len(table.rejected) for table in tables):
        files[f"*{_REJECTED}"] = "rows of the recordings that were set aside, with the reasons"
    return files


def publish(made: Path, out: Path) -> None:
    """Move the files that were made into `out`; the demo's own files of an earlier run that were not made again go.

    BLIS vectors of a run before would otherwise pass for those of a run whose export was refused.
    """
    out.mkdir(exist_ok=True)
    names = {p.name for p in made.iterdir()}
    for name in sorted(names):
        (made / name).replace(out / name)
    for name in _BLIS_FILES:
        if name not in names:
            (out / name).unlink(missing_ok=True)


def _command(store: TraceStore, out: Path, found: Verdict, posterior: LatencyPosterior, seen: Sequence[str]) -> str:
    """Return what to type next, by outcome: it runs as it stands, on the demo's own files."""
    traces, steps = (shlex.quote(str(p)) for p in (store.path, store.path / found.config_id / "steps.parquet"))
    target = shlex.quote(found.config_id)
    donors, fitted = (shlex.quote(str(out / name)) for name in ("donors.nc", "target.nc"))
    assert found.held_out is not None
    worst = str(found.held_out.by_regime["mape"].idxmax())
    again = f"hfdtl-bayes calibrate {donors} {traces} --config {target} --out {fitted} --regimes"
    every = shlex.quote(",".join((*posterior.donors, found.config_id)))
    return {
        "accept": f"hfdtl-bayes predict {fitted} {steps} --out predictions.parquet",
        "collect_more": f"{again} {shlex.quote(','.join((*seen, worst)))}",
        "sample_again": f"{again} {shlex.quote(','.join(seen))} --draws 2000 --tune 2000",
        "retrain_as_donor": f"hfdtl-bayes fit {traces} --donors {every} --out {donors}",
    }.get(str(found.outcome), "")


def _vectors(
    posterior: LatencyPosterior, configuration: ServingConfiguration, recording: pd.DataFrame, requests: pd.DataFrame, seed: int
) -> tuple[BlisVectors | None, str, str]:
    """Return the BLIS vectors and what they are valid for, or none and why not."""
    from hfdtl_bayes.export import blis_vectors, idle_api_delay_s  # noqa: PLC0415  (loaded on first use)

    alpha0 = idle_api_delay_s(requests) or 0.0
    reasons = []
    for traffic, note in (
        (None, "all batches the engine can run"),
        (recording, "the recorded traffic only, because BLIS's terms cannot follow the posterior over all batches"),
    ):
        try:
            return blis_vectors(posterior, configuration, traffic, alpha0_s=alpha0, seed=seed), note, ""
        except ExportError as error:
            reasons.append(str(error))
    return None, "", reasons[0]


def _draw(folder: Path, summary: TargetSummary, donors: LatencyPosterior, seed: int) -> dict[str, tuple[str, str, str]]:
    """Write each figure as SVG and PNG; return heading to caption and the SVG documents for a page, wide and narrow."""
    from hfdtl_bayes.report import (  # noqa: PLC0415  (loaded on first use)
        accuracy_figure,
        block_mean_figure,
        coefficient_figure,
        figure_svg,
        save_figure,
    )

    posterior, verdict = summary.posterior, summary.verdict
    configuration = posterior.configuration(verdict.config_id)
    rows = summary.calibration

    def blocks(narrow: bool) -> Figure:
        return block_mean_figure(
            posterior, summary.held_out, configuration, donors, calibration_rows=rows, seed=seed, narrow=narrow
        )

    def accuracy(narrow: bool) -> Figure:
        assert verdict.held_out is not None
        attainable = verdict.held_out.attainable_mape
        return accuracy_figure(summary.comparison.mape, attainable, limit=verdict.limit, narrow=narrow)

    def coefficients(narrow: bool) -> Figure:
        return coefficient_figure(posterior, narrow=narrow)

    found = {}
    for name, heading, caption, draw in (
        (
            "blocks",
            "Predicted against measured",
            "Mean step time of each time block. Shaded: the rows calibrated on; the rest was never seen. A good model's blue "
            "intervals are narrow and hold the orange points. Regimes are named as recorded: load1.2 is random arrivals at "
            "1.2 times capacity, load0.4 begins with the backlog of the overload before it, calib is one burst at an idle one.",
            blocks,
        ),
        (
            "accuracy",
            "Against the alternatives",
            f"{summary.comparison.sentence()} Errors of the expected step time, every method on the same rows.",
            accuracy,
        ),
        (
            "coefficients",
            "What was learnt of each cost",
            "Each cost of a step as a multiple of its physical reference. A wide blue bar: the target's rows say little of this "
            "cost, and the donors and the prior speak. Arrows and cut bars go on outside; the numbers are at the right.",
            coefficients,
        ),
    ):
        wide = draw(False)
        save_figure(wide, folder / f"{name}.svg")
        save_figure(wide, folder / f"{name}.png")
        found[heading] = (caption, figure_svg(wide), figure_svg(draw(True)))
    return found


def _export(folder: Path, summary: TargetSummary, donors: LatencyPosterior) -> None:
    from hfdtl_bayes.export import blis_flags, blis_hardware_config, blis_yaml, write_text  # noqa: PLC0415  (loaded on first use)

    donors.save(folder / "donors.nc")
    summary.posterior.save(folder / "target.nc")
    if summary.vectors is not None:
        write_text(blis_yaml(summary.vectors), folder / "blis.yaml")
        write_text(blis_flags(summary.vectors, hardware_config="blis-hardware.json"), folder / "blis-flags.txt")
        write_text(blis_hardware_config(summary.vectors.configuration), folder / "blis-hardware.json")


def print_demo(result: DemoResult, console: Console) -> None:
    """Print the result as one screen: whether to trust it and what to do next, the evidence, the files, where the time went."""
    from rich.table import Table  # noqa: PLC0415  (loaded on first use)
    from rich.text import Text  # noqa: PLC0415

    from hfdtl_bayes.report import answer  # noqa: PLC0415

    s = result.summary
    tone, said, why = answer(s.verdict)
    colour = {"yes": "green", "wait": "yellow", "no": "red"}[tone]

    def grid(*rows: tuple[Text, Text]) -> None:
        # Names are user text: rich's markup never sees them.
        table = Table.grid(padding=(0, 1))
        table.add_column()
        # A path longer than the line goes on in the next: rich's default would cut it.
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    def named(name: str, words: str, style: str = "") -> tuple[Text, Text]:
        return Text(name, style="bold"), Text(words, style=style)

    grid(
        named("Target", f"{s.posterior.target}, calibrated on {len(s.calibration)} steps of {', '.join(s.regimes_seen)}"),
        named("Donors", ", ".join(s.posterior.donors)),
        named("Judged on", f"{len(s.held_out)} other steps: {', '.join(s.regimes_judged)}"),
        named("Trust it?", f"{said}: {why} [{s.verdict.outcome}]", f"bold {colour}"),
        named("Do next", s.verdict.recommendation),
        *([named("", s.command)] if s.command else []),
    )
    console.print()
    grid(
        *(
            (Text("ok" if c.passed else "!!", style="green" if c.passed else "bold red"), Text(f"{c.name}: {c.message}"))
            for c in s.verdict.checks
        )
    )
    console.print()
    # Not the table's title, which would wrap at the table's width.
    console.print(Text("Held-out MAPE in %; noise alone: a perfect mean's; held: in 95 % intervals"))
    console.print(_accuracy_table(s.comparison))
    console.print(Text(s.comparison.sentence()))
    console.print()
    if s.vectors is None:
        blis = [named("BLIS", f"not exported: {' '.join(s.refusal.split())}", "red")]
    else:
        beta = ", ".join(f"{v:.4g}" for v in s.vectors.beta)
        alpha = ", ".join(f"{v:.4g}" for v in s.vectors.alpha)
        loss = f"on average {s.vectors.projection_error:.1%} from the posterior's step time, over {s.export_note}"
        caution = "" if s.verdict.accepted else ". Not an accept: they show the format and are not to plan with"
        blis = [
            named("BLIS", f"alpha [{alpha}]  beta [{beta}]"),
            named("", f"in blis.yaml, and as flags in blis-flags.txt; {loss}{caution}"),
        ]
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in s.seconds.items())
    grid(
        *blis,
        named("Seconds", f"{sum(s.seconds.values()):.1f}: {stages}"),
        *(
            [named("Set aside", f"{result.rejected_rows} rows of the recordings, kept in *{_REJECTED}")]
            if result.rejected_rows
            else []
        ),
        named("Open", f"{result.out / 'summary.html'}; it explains all {len(result.files)} files beside it"),
    )


def _accuracy_table(comparison: Comparison) -> Table:
    from rich.table import Table  # noqa: PLC0415  (loaded on first use)
    from rich.text import Text  # noqa: PLC0415

    from hfdtl_bayes.report import ALL, CALIBRATED  # noqa: PLC0415

    methods = list(comparison.mape.index)
    table = Table(box=None, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("regime", no_wrap=True, vertical="bottom")
    for name in ("steps", *methods, "noise alone", "bias", "rows held", "blocks held"):
        heading = name.replace(" ", "\n").replace("-", "-\n")
        table.add_column(heading, justify="right", style="bold" if name == CALIBRATED else "", vertical="bottom")
    for regime, row in comparison.table().iterrows():
        table.add_row(
            Text(str(regime)),
            f"{row['rows']:.0f}",
            *(f"{100 * row[m]:.1f}" for m in methods),
            f"{100 * row['attainable']:.1f}",
            f"{100 * row['bias']:+.1f}",
            f"{100 * row['coverage']:.0f}",
            f"{100 * row['block_coverage']:.0f}",
            style="bold" if regime == ALL else "",
        )
    return table
