"""The summary of one calibrated target as a page: first whether to trust it and what to do next, then the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from hfdtl_bayes.export import BlisVectors, blis_flags
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.report.comparison import ALL, CALIBRATED, METHODS, Comparison
from hfdtl_bayes.report.figures import PALETTE, coefficient_intervals
from hfdtl_bayes.report.html import Html, element, inline_svg, join, page, table
from hfdtl_bayes.report.style import stylesheet
from hfdtl_bayes.transfer import Outcome, Status, Verdict

_ANSWERS: dict[Outcome, tuple[str, str, str]] = {
    Outcome.ACCEPT: ("yes", "Yes", "for traffic like the held-out traffic"),
    Outcome.COLLECT_MORE: ("wait", "Not yet", "measure more of the target first"),
    Outcome.EXPAND_RESIDUAL: ("no", "No", "the model lacks something this target does"),
    Outcome.RETRAIN_AS_DONOR: ("no", "No", "the target is unlike its donors"),
    Outcome.SAMPLE_AGAIN: ("no", "Cannot say", "the sampler has not converged"),
    Outcome.CANNOT_SAY: ("wait", "Cannot say", "what a verdict needs is not there"),
}

_RESULTS = {Status.PASS: "passed", Status.WARN: "note", Status.FAIL: "FAILED", Status.CANNOT_SAY: "cannot say"}


@dataclass(frozen=True)
class TargetSummary:
    """Everything the page of a calibrated target says.

    Attributes
    ----------
    title : str
    posterior : LatencyPosterior
        Of donors and target.
    calibration, held_out : DataFrame
        The target's rows, calibrated on and judged with.
    verdict : Verdict
    comparison : Comparison
    vectors : BlisVectors or None
    refusal : str
        Why there are no BLIS vectors; empty if there are.
    export_note : str
        The batches the vectors were fitted to.
    command : str
        What to type next; empty if nothing fits in a line.
    figures : mapping of str to (str, str, str)
        Heading to caption and the figure's SVG documents, wide and narrow.
    files : mapping of str to str
        File name to what it holds.
    seconds : mapping of str to float
        Stage to wall-clock seconds.
    version : str
        Of this package.
    """

    title: str
    posterior: LatencyPosterior
    calibration: pd.DataFrame
    held_out: pd.DataFrame
    verdict: Verdict
    comparison: Comparison
    vectors: BlisVectors | None
    refusal: str
    export_note: str = ""
    command: str = ""
    figures: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    version: str = "unknown"

    @property
    def regimes_seen(self) -> tuple[str, ...]:
        """Regimes calibrated on, in time order."""
        return tuple(map(str, pd.unique(self.calibration["regime"])))

    @property
    def regimes_judged(self) -> tuple[str, ...]:
        """Regimes held out, in time order."""
        return tuple(map(str, pd.unique(self.held_out["regime"])))


def answer(verdict: Verdict) -> tuple[str, str, str]:
    """Return (tone, answer, why) to "can I trust this?"; tone is yes, wait or no."""
    return _ANSWERS.get(verdict.outcome, ("wait", str(verdict.outcome).replace("_", " "), "see the checks"))


def summary_page(summary: TargetSummary) -> str:
    """Return the page: one file, nothing fetched, every name in it escaped."""
    return page(
        summary.title,
        stylesheet(),
        *_first_screen(summary),
        *(_figure(i, heading, *parts) for i, (heading, parts) in enumerate(summary.figures.items())),
        element("h2", "Error by regime"),
        _accuracy(summary.comparison),
        element("h2", "Checks behind the verdict"),
        _checks(summary.verdict),
        *_blis(summary),
        *_coefficients(summary.posterior),
        *_provenance(summary),
    )


def _first_screen(summary: TargetSummary) -> Sequence[Html]:
    verdict, held = summary.verdict, summary.verdict.held_out
    assert held is not None, "a summary is of a target judged on held-out rows"
    tone, said, why = answer(verdict)
    configuration = summary.posterior.configuration(verdict.config_id)
    target = (
        f"{configuration.config_id}: {configuration.llm.name} on {configuration.hardware.name}, {configuration.engine.name} "
        f"{configuration.engine.version}, TP {configuration.engine.tensor_parallel}"
    )
    banner = element(
        "section",
        element("h3", "Can I trust these predictions?"),
        element("p", element("span", said), f": {why}", class_="answer"),
        element("h3", "What to do next"),
        element("p", verdict.recommendation),
        *([element("pre", summary.command)] if summary.command else []),
        class_=f"verdict {tone}",
    )
    others = summary.comparison.mape[ALL].drop(CALIBRATED)
    convergence = next((c for c in verdict.checks if c.name == "convergence"), None)
    tiles = [
        _tile(
            "Error on held-out traffic",
            f"{held.mape:.1%}",
            f"MAPE; limit {verdict.limit:.1%}, noise alone leaves {held.attainable_mape:.1%}",
        ),
        _tile("95 % intervals hold", f"{held.coverage:.0%} of steps", f"and {held.block_coverage:.0%} of time-block means"),
        _tile(
            f"Best alternative: {others.idxmin()}",
            f"{others.min():.1%}",
            ", ".join(f"{n} {v:.1%}" for n, v in others.drop(others.idxmin()).items()),
        ),
    ]
    if convergence is not None:
        tiles.append(
            _tile("Sampler", "converged" if convergence.passed else "NOT converged", convergence.message.partition(": ")[2])
        )
    return (
        element("h1", summary.title),
        element("p", target, class_="muted"),
        banner,
        element("div", *tiles, class_="tiles"),
        element(
            "p",
            f"Calibrated on {len(summary.calibration)} steps of {', '.join(summary.regimes_seen)} with donors "
            f"{', '.join(summary.posterior.donors)}; judged on {len(summary.held_out)} steps of "
            f"{', '.join(summary.regimes_judged)}, which share no time block with them.",
            class_="muted",
        ),
    )


def _tile(name: str, value: str, detail: str) -> Html:
    return element("div", element("h3", name), element("b", value), detail, class_="tile")


def _figure(number: int, heading: str, caption: str, wide: str, narrow: str) -> Html:
    shapes = [
        element("div", inline_svg(svg, f"f{number}{shape[0]}", heading, PALETTE), class_=shape)
        for shape, svg in (("wide", wide), ("narrow", narrow))
    ]
    return element("section", element("h2", heading), element("figure", *shapes, element("figcaption", caption)))


def _percent(value: float) -> str:
    return "-" if not np.isfinite(value) else f"{100 * value:.1f}"


def _accuracy(comparison: Comparison) -> Html:
    methods = list(comparison.mape.index)
    found = comparison.table()
    header = ["regime", "rows", "attainable", *methods, "bias", "rows held", "blocks held"]
    rows = [
        [
            regime,
            int(row["rows"]),
            _percent(row["attainable"]),
            *(_percent(row[m]) for m in methods),
            f"{100 * row['bias']:+.1f}",
            f"{100 * row['coverage']:.0f}",
            f"{100 * row['block_coverage']:.0f}",
        ]
        for regime, row in found.iterrows()
    ]
    caption = (
        "MAPE in per cent. Attainable: what the noise of single steps leaves when the mean is known exactly. Bias and coverage "
        "are the calibrated target's: its 95 % intervals should hold 95 % of rows and of block means."
    )
    notes = [element("li", element("b", f"{name}: "), METHODS.get(name, "")) for name in methods]
    found_table = table(header, rows, emphasised=[3 + methods.index(CALIBRATED)])
    return join([element("p", caption, class_="muted"), found_table, element("ul", *notes, class_="muted")])


def _checks(verdict: Verdict) -> Html:
    rows = [[c.name, _RESULTS[c.status], c.message] for c in verdict.checks]
    return element("div", table(["check", "result", "found"], rows), class_="words")


def _blis(summary: TargetSummary) -> Sequence[Html]:
    heading = element("h2", "Coefficients for BLIS")
    if summary.vectors is None:
        return (heading, element("p", element("b", "Not exported. "), summary.refusal))
    vectors = summary.vectors
    card = vectors.as_dict()
    rows = [[v["label"], f"{v['value']:.6g}", v["unit"]] for v in (*card["alpha"], *card["beta"])]
    hardware = next((name for name in summary.files if name.endswith("hardware.json")), None)
    caution = "" if summary.verdict.accepted else "The verdict is not an accept: these show the format and are not to plan with."
    said = (
        f"Fitted to {summary.export_note or 'the traffic'}, {vectors.rows} batches: the mean difference from the posterior mean "
        f"is {vectors.projection_error:.2%}, the largest {vectors.worst_projection_error:.2%}; the mean itself is known to "
        f"{vectors.posterior_sd:.2%}."
    )
    return (
        heading,
        *([element("p", element("b", caution))] if caution else []),
        element("p", "Flags for blis run or blis replay:"),
        element("pre", blis_flags(vectors, hardware_config=hardware).strip()),
        element("p", said, class_="muted"),
        element("ul", *(element("li", note) for note in vectors.notes), class_="muted"),
        element("details", element("summary", "The values, one by one"), table(["coefficient", "value", "unit"], rows)),
    )


def _coefficients(posterior: LatencyPosterior) -> Sequence[Html]:
    chosen = posterior.target or posterior.config_ids[-1]
    intervals = coefficient_intervals(posterior, chosen)
    rows = []
    for name, row in intervals.iterrows():
        feature = posterior.feature_set[str(name)]
        unit = "" if feature.coefficient_unit == "1" else f" {feature.coefficient_unit}"
        low, mean, high = (row[f"own_{k}"] * feature.reference for k in ("low", "mean", "high"))
        rows.append([name, f"{mean:.4g}{unit}", f"{low:.4g} to {high:.4g}", feature.formula])
    sentences = element("ul", *(element("li", s) for s in posterior.priors.sentences(posterior.feature_set)))
    return (
        element("h2", f"Coefficients of {chosen}"),
        element("div", table(["feature", "posterior mean", "95 % interval", "multiplies"], rows), class_="words"),
        element("details", element("summary", "What was believed beforehand"), sentences),
    )


def _provenance(summary: TargetSummary) -> Sequence[Html]:
    posterior = summary.posterior
    total = sum(summary.seconds.values())
    facts: list[Sequence[object]] = [
        ["feature set", f"{posterior.feature_set.name} for {posterior.feature_set.quantity}"],
        ["rows fitted", ", ".join(f"{s.config_id} {s.rows}" for s in posterior.statistics)],
        ["hash of the statistics", posterior.input_hash],
        ["seed", posterior.seed],
        ["hfdtl_bayes", summary.version],
    ]
    files = [[element("code", name), meaning] for name, meaning in summary.files.items()]
    times = [[stage, f"{seconds:.1f}"] for stage, seconds in (*summary.seconds.items(), ("total", total))]
    parts = [element("h2", "Files and provenance")]
    if files:
        parts.append(element("div", table(["file", "holds"], files), class_="words"))
    parts.append(
        element("details", element("summary", "How this was made"), element("div", table(["", ""], facts), class_="words"))
    )
    if summary.seconds:
        parts.append(element("details", element("summary", "Where the time went"), table(["stage", "seconds"], times)))
    return parts
