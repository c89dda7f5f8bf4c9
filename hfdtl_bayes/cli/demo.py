"""The demo: real vLLM traces in, a calibrated target, a verdict, BLIS coefficients and a page out, with nothing to prepare.

Three donors of the embedded recordings are fitted, an unlike target is calibrated on its quietest traffic and judged on the
rest of its recording, beside the design's ridge recipe, a fit of the target alone, and the donors alone.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfdtl_bayes.cli.output import plain, say
from hfdtl_bayes.errors import ExportError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

    from hfdtl_bayes.configuration import ServingConfiguration
    from hfdtl_bayes.export import BlisVectors
    from hfdtl_bayes.model import LatencyPosterior, SamplerSettings
    from hfdtl_bayes.report import Comparison, TargetSummary

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
    "blocks.svg": "predicted against measured, by time block (also .png)",
    "accuracy.svg": "errors by regime and method (also .png)",
    "coefficients.svg": "priors and posteriors of the coefficients (also .png)",
}
_BLIS_FILES = ("blis.yaml", "blis-flags.txt")


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
    """

    out: Path
    summary: TargetSummary
    donors: LatencyPosterior
    files: tuple[Path, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON; times in seconds, errors as fractions."""
        s = self.summary
        posterior, vectors = s.posterior, s.vectors
        blis: dict[str, Any] = {"exported": vectors is not None, "refusal": s.refusal, "note": s.export_note}
        if vectors is not None:
            blis |= {
                "alpha": vectors.alpha,
                "beta": vectors.beta,
                "projection_error": vectors.projection_error,
                "worst_projection_error": vectors.worst_projection_error,
                "batches": vectors.rows,
            }
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
                "convergence": {name: _diagnostics(p) for name, p in (("donors", self.donors), ("target", posterior))},
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


def _diagnostics(posterior: LatencyPosterior) -> dict[str, Any]:
    found = posterior.convergence()
    return {
        "passed": found.passed,
        "rhat": found.rhat,
        "ess_bulk": found.ess_bulk,
        "ess_tail": found.ess_tail,
        "divergences": found.divergences,
        "draws": found.draws,
    }


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
    with clock.stage("import", "loading PyMC, ArviZ and matplotlib"):
        from hfdtl_bayes.model.posterior import package_version  # noqa: PLC0415  (loading is a stage of its own, and timed)
        from hfdtl_bayes.report import TargetSummary, compare, summary_page  # noqa: PLC0415
        from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path  # noqa: PLC0415
        from hfdtl_bayes.traces import TraceStore  # noqa: PLC0415
        from hfdtl_bayes.transfer import (  # noqa: PLC0415
            calibrate,
            calibrate_ridge,
            fit_donors,
            fit_ridge_donors,
            held_out_rows,
            read_trace,
            usable_rows,
            verdict,
        )
    with clock.stage("read"):
        store = TraceStore(sample_store_path())
        rows = {c: usable_rows(read_trace(store, c, "step_time").frame, "step_time") for c in (*DONORS, TARGET)}
        configuration = store.configuration(TARGET)
        requests = store.requests(TARGET).frame
    with clock.stage("compile, fit donors", "fitting three donors; the first run ever compiles the model, about half a minute"):
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
        vectors, note, refusal = _vectors(posterior, configuration, recording, requests, seed)
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
        files={name: meaning for name, meaning in FILES.items() if vectors is not None or name not in _BLIS_FILES},
        version=package_version(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as made:
        folder = Path(made)
        with clock.stage("figures", "drawing"):
            summary = replace(summary, figures=_draw(folder, summary, donors, seed))
        with clock.stage("export"):
            _export(folder, summary, donors)
        summary = replace(summary, seconds=dict(clock.seconds))
        names = [*(p.name for p in folder.iterdir()), "results.json", "summary.html"]
        result = DemoResult(out, summary, donors, tuple(out / name for name in sorted(names)))
        (folder / "summary.html").write_text(summary_page(summary), encoding="utf-8")
        (folder / "results.json").write_text(json.dumps(result.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        out.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.replace(out / path.name)
    if vectors is None:
        for name in _BLIS_FILES:
            (out / name).unlink(missing_ok=True)
    return result


def _vectors(
    posterior: LatencyPosterior, configuration: ServingConfiguration, recording: pd.DataFrame, requests: pd.DataFrame, seed: int
) -> tuple[BlisVectors | None, str, str]:
    """Return the BLIS vectors and what they are valid for, or none and why not."""
    from hfdtl_bayes.export import blis_vectors, idle_api_delay_s  # noqa: PLC0415  (loaded on first use)

    alpha0 = idle_api_delay_s(requests) or 0.0
    reasons = []
    for traffic, note in (
        (None, "any batch the engine can run"),
        (recording, "traffic like the recording only: over all batches the engine can run, BLIS's basis could not follow"),
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
            "intervals are narrow and hold the orange points.",
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
            "Each cost of a step as a multiple of its physical reference. Where blue is as wide as the grey band, the rows said "
            "nothing and the prior speaks. Arrows and cut lines lie outside; the numbers are at the right.",
            coefficients,
        ),
    ):
        wide = draw(False)
        save_figure(wide, folder / f"{name}.svg")
        save_figure(wide, folder / f"{name}.png")
        found[heading] = (caption, figure_svg(wide), figure_svg(draw(True)))
    return found


def _export(folder: Path, summary: TargetSummary, donors: LatencyPosterior) -> None:
    from hfdtl_bayes.export import blis_flags, blis_yaml, write_text  # noqa: PLC0415  (loaded on first use)

    donors.save(folder / "donors.nc")
    summary.posterior.save(folder / "target.nc")
    if summary.vectors is not None:
        write_text(blis_yaml(summary.vectors), folder / "blis.yaml")
        write_text(blis_flags(summary.vectors), folder / "blis-flags.txt")


def print_demo(result: DemoResult, console: Console) -> None:
    """Print the result as one screen: verdict first, then the evidence, the files and where the time went."""
    from rich.padding import Padding  # noqa: PLC0415  (loaded on first use)
    from rich.text import Text  # noqa: PLC0415

    from hfdtl_bayes.report import answer  # noqa: PLC0415

    s = result.summary
    tone, said, why = answer(s.verdict)
    colour = {"yes": "green", "wait": "yellow", "no": "red"}[tone]

    def line(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=False)

    line(("Target ", "bold"), f"{s.posterior.target}   ", ("donors ", "bold"), ", ".join(s.posterior.donors))
    line(
        f"Calibrated on {len(s.calibration)} steps of {', '.join(s.regimes_seen)}; judged on {len(s.held_out)} steps of "
        f"{', '.join(s.regimes_judged)}."
    )
    console.print()
    line(("Can I trust it?  ", "bold"), (f"{said}: {why}", f"bold {colour}"), f"   [{s.verdict.outcome}]")
    line(("What next?       ", "bold"), s.verdict.recommendation)
    for check in s.verdict.checks:
        mark = ("  ok  ", "green") if check.passed else ("  !!  ", "red")
        line(mark, (f"{check.name}: ", "bold"), check.message)
    console.print()
    console.print(_accuracy_table(s.comparison))
    line(s.comparison.sentence())
    console.print()
    if s.vectors is None:
        line(("BLIS  ", "bold"), ("not exported: ", "red"), " ".join(s.refusal.split()))
    else:
        line(("BLIS  ", "bold"), s.vectors.summary().replace("\n", "; "))
        line(f"      valid for {s.export_note}")
    line(("Files ", "bold"), f"{result.out}/: ", ", ".join(p.name for p in result.files))
    total = sum(s.seconds.values())
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in s.seconds.items())
    line(("Time  ", "bold"), f"{stages}; total {total:.1f} s")
    console.print(Padding(Text.assemble("Open ", (str(result.out / "summary.html"), "underline")), (0, 0)))


def _accuracy_table(comparison: Comparison) -> Table:
    from rich.table import Table  # noqa: PLC0415  (loaded on first use)
    from rich.text import Text  # noqa: PLC0415

    from hfdtl_bayes.report import ALL  # noqa: PLC0415

    methods = list(comparison.mape.index)
    table = Table(title="Held-out MAPE in %, and what the 95 % intervals of the calibrated target hold", title_justify="left")
    table.add_column("regime")
    for name in ("steps", *methods, "attainable", "bias", "in 95 %", "blocks"):
        table.add_column(name, justify="right", style="bold" if name == methods[0] else "")
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
