"""The demo end to end with the real sampler, its figures and page, and the sample of traces it runs on."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pandas as pd
import pytest
import yaml
from cli_runs import FEW_DRAWS, done
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from hfdtl_bayes.cli.demo import CALIBRATION_REGIMES, CALIBRATION_ROWS, FILES, DemoResult, print_demo, publish, run_demo
from hfdtl_bayes.cli.demo import _command as next_command
from hfdtl_bayes.features import operating_points
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.report import ALL, answer, block_mean_figure, coefficient_figure, coefficient_intervals, figure_svg, summary_page
from hfdtl_bayes.report.comparison import CALIBRATED, RIDGE, SCRATCH, ZERO_SHOT
from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH
from hfdtl_bayes.traces import TraceStore, drop_warmup
from hfdtl_bayes.transfer import Outcome

PICTURES = [f"{name}.{kind}" for name in ("accuracy", "blocks", "coefficients") for kind in ("png", "svg")]
BLIS = ["blis-flags.txt", "blis-hardware.json", "blis.yaml"]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """One run of the demo, into a folder that does not exist yet."""
    return run_demo(tmp_path_factory.mktemp("reports") / "new" / "demo", seed=0, show_progress=False)


@pytest.fixture(scope="session")
def results(demo: DemoResult) -> dict:
    return json.loads((demo.out / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def recording() -> pd.DataFrame:
    return drop_warmup(TraceStore(sample_store_path()).steps(TARGET).frame)


# Files


def test_files(demo: DemoResult, results: dict) -> None:
    expected = {*PICTURES, "donors.nc", "target.nc", "results.json", "summary.html"} | (
        set(BLIS) if demo.summary.vectors is not None else set()
    )
    assert {p.name for p in demo.out.iterdir()} == expected == set(results["files"])
    assert set(demo.files) == set(demo.out.iterdir())
    assert all(p.stat().st_size > 0 for p in demo.files)
    assert [p.name for p in demo.out.parent.iterdir()] == ["demo"], "something temporary was left"


def test_every_file_is_explained(demo: DemoResult) -> None:
    assert {p.name for p in demo.files} - set(FILES) <= {p for p in PICTURES if p.endswith(".png")}


def test_pictures_are_pictures(demo: DemoResult) -> None:
    for name in PICTURES:
        if name.endswith("png"):
            assert (demo.out / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        else:
            assert ET.parse(demo.out / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_results_are_the_result(demo: DemoResult, results: dict) -> None:
    assert results == demo.as_dict()
    assert set(results) == {
        "format", "package_version", "seed", "feature_set", "quantity", "donors", "target", "input_hash", "calibration",
        "held_out", "rejected_rows", "rejected_files", "convergence", "verdict", "comparison", "blis", "files", "seconds",
    }  # fmt: skip
    assert results["donors"] == list(DONORS)
    assert results["target"] == TARGET
    assert (results["rejected_rows"], results["rejected_files"]) == (0, [])
    assert list(results["seconds"]) == ["import", "read", "fit donors", "calibrate", "evaluate", "export", "figures"]
    assert all(s >= 0 for s in results["seconds"].values())


# What was computed


def test_the_sampler_converged(results: dict) -> None:
    for which in ("donors", "target"):
        assert results["convergence"][which]["passed"], results["convergence"][which]


def test_rows_judged_share_no_block_with_rows_calibrated_on(demo: DemoResult, recording: pd.DataFrame, results: dict) -> None:
    saved = LatencyPosterior.load(demo.out / "target.nc")
    used = recording.loc[saved.calibration_rows]
    assert len(used) == CALIBRATION_ROWS == results["calibration"]["rows"]
    assert set(used["regime"]) == set(CALIBRATION_REGIMES)
    assert used["step_id"].is_monotonic_increasing
    judged = demo.summary.held_out
    assert not set(judged["regime"]) & set(CALIBRATION_REGIMES)
    assert {"load0.85", "load1.2", "load2.0"} <= set(judged["regime"]) == set(results["held_out"]["regimes"])

    def blocks(frame: pd.DataFrame) -> set[tuple[str, int]]:
        return set(zip(frame["regime"], frame["step_id"] // DEFAULT_BLOCK_LENGTH, strict=True))

    assert not blocks(used) & blocks(judged)
    assert not set(used["step_id"]) & set(judged["step_id"])
    # Nothing of the busy traffic was dropped before it was judged.
    rest = recording[~recording["regime"].isin(CALIBRATION_REGIMES)]
    pd.testing.assert_frame_equal(judged, rest)


@pytest.mark.parametrize(("file", "method"), [("target.nc", CALIBRATED), ("donors.nc", ZERO_SHOT)])
def test_saved_posteriors_give_the_reported_errors(demo: DemoResult, results: dict, file: str, method: str) -> None:
    saved = LatencyPosterior.load(demo.out / file)
    assert saved.donors == DONORS
    assert saved.target == (TARGET if method == CALIBRATED else None)
    judged = demo.summary.held_out
    configuration = TraceStore(sample_store_path()).configuration(TARGET)
    predicted = saved.predict(judged, configuration, seed=0)
    observed = judged["step_time_s"].to_numpy()
    errors = np.abs(predicted["mean_s"].to_numpy() / observed - 1)
    inside = (observed >= predicted["q2.5_s"].to_numpy()) & (observed <= predicted["q97.5_s"].to_numpy())
    reported = {row["regime"]: row for row in results["comparison"]["by_regime"]}
    for regime, own in [
        (ALL, np.ones(len(judged), bool)),
        *((r, judged["regime"].to_numpy() == r) for r in set(judged["regime"])),
    ]:
        assert reported[regime]["rows"] == own.sum()
        assert reported[regime][method] == pytest.approx(errors[own].mean(), rel=1e-9)
        if method == CALIBRATED:
            assert reported[regime]["coverage"] == pytest.approx(inside[own].mean())
    if method == ZERO_SHOT:
        assert results["comparison"]["zero_shot_coverage"] == pytest.approx(inside.mean())


def test_all_methods_are_compared_and_the_best_named(results: dict) -> None:
    (overall,) = [row for row in results["comparison"]["by_regime"] if row["regime"] == ALL]
    scores = {m: overall[m] for m in (CALIBRATED, ZERO_SHOT, RIDGE, SCRATCH)}
    assert all(np.isfinite(v) and v > 0 for v in scores.values())
    assert results["comparison"]["best"] == min(scores, key=lambda m: scores[m])
    assert overall[CALIBRATED] == pytest.approx(results["verdict"]["held_out"]["mape"])


def test_blis_files_hold_the_reported_vectors_or_the_refusal_is_reported(demo: DemoResult, results: dict) -> None:
    blis = results["blis"]
    if not blis["exported"]:
        assert "cannot be exported" in blis["refusal"] or "not positive" in blis["refusal"]
        return
    held = yaml.safe_load((demo.out / "blis.yaml").read_text(encoding="utf-8"))["trained_physics_coefficients"]
    assert held["alpha_coeffs"] == [v["value"] for v in blis["alpha"]]
    assert held["beta_coeffs"] == [v["value"] for v in blis["beta"]]
    assert len(held["beta_coeffs"]) == 10
    assert held["alpha_coeffs"][0] > 0, "the recorded idle delay is alpha0"
    flags = (demo.out / "blis-flags.txt").read_text(encoding="utf-8").split()
    said = flags[flags.index("--beta-coeffs") + 1]
    assert [float(v) for v in said.split(",")] == held["beta_coeffs"]
    assert " ".join(flags) in " ".join(Page((demo.out / "summary.html").read_text(encoding="utf-8")).text)
    hardware = json.loads((demo.out / "blis-hardware.json").read_text(encoding="utf-8"))
    assert flags[flags.index("--hardware") + 1] in hardware


def test_files_of_a_refused_export_do_not_survive_from_an_earlier_run(tmp_path: Path) -> None:
    out, made = tmp_path / "out", tmp_path / "made"
    out.mkdir()
    made.mkdir()
    for name in ("blis.yaml", "blis-flags.txt", "summary.html", "notes.txt"):
        (out / name).write_text("old")
    (made / "summary.html").write_text("new")
    publish(made, out)
    assert {p.name: p.read_text() for p in out.iterdir()} == {"summary.html": "new", "notes.txt": "old"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(demo: DemoResult, tmp_path: Path) -> None:
    again = run_demo(tmp_path / "demo", seed=0, show_progress=False).as_dict()
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in demo.as_dict().items() if k != "seconds"}


# What is shown


class Page(HTMLParser):
    """What a browser would fetch, run and resolve."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def assert_self_contained(document: str) -> Page:
    found = Page(document)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "audio", "video"} & set(found.tags)
    for name, value in found.attributes:
        assert not name.startswith("on"), f"{name} runs a script"
        assert name not in {"src", "srcset", "action", "data", "background"}
        assert not (name.endswith("href") and not value.startswith("#")), f"{name}={value}"
    styles = re.findall(r"<style.*?</style>", document, flags=re.DOTALL)
    assert styles
    assert not any("@import" in s or re.search(r"url\((?!#)", s) for s in styles)
    return found


def test_the_page_is_one_file_that_fetches_nothing(demo: DemoResult) -> None:
    document = (demo.out / "summary.html").read_text(encoding="utf-8")
    assert_self_contained(document)
    assert not re.search(r"https?://", document)
    assert "prefers-color-scheme:dark" in document
    assert 'name="viewport"' in document
    assert document.count("<svg") == 6, "three figures, each wide and narrow"


def test_the_first_screen_answers_before_any_figure(demo: DemoResult) -> None:
    first = (demo.out / "summary.html").read_text(encoding="utf-8").split("<svg", 1)[0]
    text = " ".join(" ".join(Page(first).text).split())
    _, said, why = answer(demo.summary.verdict)
    assert f"{said} : {why}" in text or f"{said}: {why}" in text
    assert demo.summary.verdict.recommendation in text
    for number in (demo.summary.verdict.held_out.mape, demo.summary.verdict.limit, demo.summary.verdict.held_out.attainable_mape):
        assert f"{number:.1%}" in text


@pytest.mark.parametrize("outcome", list(Outcome))
def test_every_outcome_has_its_answer(demo: DemoResult, outcome: Outcome) -> None:
    tone, said, why = answer(replace(demo.summary.verdict, outcome=outcome))
    assert (tone == "yes") == (outcome is Outcome.ACCEPT) == (said == "Yes")
    assert why


HOSTILE = "<img src=x onerror=alert(1)>&\"'[bold]$y^2$"


@pytest.fixture(scope="session")
def hostile(demo: DemoResult) -> DemoResult:
    """The demo's result with names and regimes that try to be markup everywhere."""
    s = demo.summary

    def renamed(posterior: LatencyPosterior) -> LatencyPosterior:
        statistics = []
        for one in posterior.statistics:
            c = one.configuration
            llm = c.llm.model_copy(update={"name": HOSTILE})
            hardware = c.hardware.model_copy(update={"name": HOSTILE})
            statistics.append(
                replace(
                    one, configuration=c.model_copy(update={"config_id": c.config_id + HOSTILE, "llm": llm, "hardware": hardware})
                )
            )
        return replace(posterior, statistics=tuple(statistics), target=TARGET + HOSTILE if posterior.target else None)

    posterior = renamed(s.posterior)
    comparison = replace(
        s.comparison,
        mape=s.comparison.mape.rename(columns=lambda c: c if c == ALL else c + HOSTILE),
        rows=s.comparison.rows.rename(index=lambda c: c if c == ALL else c + HOSTILE),
        calibrated=replace(
            s.comparison.calibrated, by_regime=s.comparison.calibrated.by_regime.rename(index=lambda c: c + HOSTILE)
        ),
    )
    held_out = s.held_out.assign(regime=s.held_out["regime"] + HOSTILE)
    calibration = s.calibration.assign(regime=s.calibration["regime"] + HOSTILE)
    verdict = replace(s.verdict, config_id=TARGET + HOSTILE, recommendation=HOSTILE)
    figures = {}
    for narrow in (False, True):
        drawn = block_mean_figure(
            posterior,
            held_out,
            posterior.configuration(TARGET + HOSTILE),
            renamed(demo.donors),
            calibration_rows=calibration,
            narrow=narrow,
        )
        figures[narrow] = figure_svg(drawn)
    summary = replace(
        s,
        title=HOSTILE,
        posterior=posterior,
        calibration=calibration,
        held_out=held_out,
        verdict=verdict,
        comparison=comparison,
        vectors=None,
        refusal=HOSTILE,
        command=HOSTILE,
        figures={HOSTILE: (HOSTILE, figures[False], figures[True])},
        files={HOSTILE: HOSTILE},
        version=HOSTILE,
    )
    return replace(demo, summary=summary)


def test_names_cannot_become_markup(hostile: DemoResult) -> None:
    document = summary_page(hostile.summary)
    found = assert_self_contained(document)
    assert "<img" not in document
    text = "".join(found.text)
    assert text.count(HOSTILE) > 30


def test_names_cannot_become_terminal_markup(hostile: DemoResult) -> None:
    written = io.StringIO()
    print_demo(hostile, Console(width=400, file=written, force_terminal=True))
    assert written.getvalue().count(HOSTILE) > 10


def test_a_path_longer_than_a_line_is_folded_not_cut(demo: DemoResult, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"hfdtl-bayes predict /{'deep/' * 60}target.nc"
    print_demo(replace(demo, summary=replace(demo.summary, command=command)), Console(width=80))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "".join(command.split()) in "".join(printed.split())


@pytest.mark.parametrize("width", [80, 120])
def test_the_printed_result_is_one_screen(demo: DemoResult, width: int, capsys: pytest.CaptureFixture[str]) -> None:
    # In the folder a user would name: how many lines a long temporary path takes says nothing.
    command = demo.summary.command.replace(str(demo.out), "reports/demo").replace(str(sample_store_path()), "store")
    demo = replace(demo, out=Path("reports/demo"), summary=replace(demo.summary, command=command))
    print_demo(demo, Console(width=width))
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= width
    words = " ".join(printed.split())
    # Long paths are folded anywhere.
    letters = "".join(printed.split())
    assert demo.summary.verdict.recommendation in words
    assert str(demo.summary.verdict.outcome) in words
    for check in demo.summary.verdict.checks:
        assert f"{check.name}: {check.message}" in words
    assert "…" not in printed, "a cell was cut"
    for regime, row in demo.summary.comparison.table().iterrows():
        (line,) = [x for x in lines if x.strip().startswith(str(regime))]
        assert f"{100 * row[CALIBRATED]:.1f}" in line.split()
        assert f"{100 * row['attainable']:.1f}" in line.split()
    assert "".join(f"{demo.out / 'summary.html'}; it explains all {len(demo.files)} files".split()) in letters
    assert "".join(demo.summary.command.split()) in letters
    for stage in demo.summary.seconds:
        assert stage in words


@pytest.mark.parametrize("outcome", [Outcome.ACCEPT, Outcome.COLLECT_MORE])
def test_what_to_type_next_runs_as_it_stands(demo: DemoResult, tmp_path: Path, outcome: Outcome) -> None:
    s = demo.summary
    found = replace(s.verdict, outcome=outcome)
    command = next_command(TraceStore(sample_store_path()), demo.out, found, s.posterior, list(CALIBRATION_REGIMES))
    program, *words = shlex.split(command)
    assert program == "hfdtl-bayes"
    # Elsewhere, and with few draws: the other tests read what the demo wrote.
    place = words.index("--out") + 1
    words[place] = str(tmp_path / Path(words[place]).name)
    ran = done(*words, "--json", *(FEW_DRAWS if words[0] == "calibrate" else ()))
    if outcome is Outcome.COLLECT_MORE:
        assert ran.json["rows"][TARGET] > CALIBRATION_ROWS
        assert LatencyPosterior.load(words[place]).target == TARGET
    else:
        assert ran.json["rows"] == len(TraceStore(sample_store_path()).steps(TARGET).frame)


def test_vectors_of_a_target_that_is_not_accepted_come_with_a_caution(demo: DemoResult) -> None:
    for outcome in Outcome:
        written = io.StringIO()
        summary = replace(demo.summary, verdict=replace(demo.summary.verdict, outcome=outcome))
        print_demo(replace(demo, summary=summary), Console(width=120, file=written))
        words = " ".join(written.getvalue().split())
        assert ("not to plan with" in words) == (summary.vectors is not None and outcome is not Outcome.ACCEPT)


# Figures of a fitted posterior


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Return pairs of texts whose boxes overlap, and texts beyond the edge paired with an empty one."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    (axes,) = figure.axes
    # A tick beyond the limits keeps a label that is never drawn.
    labels = [
        tick.label1
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in axis.get_major_ticks()
        if min(limits) <= tick.get_loc() <= max(limits)
    ]
    texts = [t for t in [*axes.texts, *labels, axes.xaxis.label, axes.yaxis.label] if t.get_text()]
    texts += [t for legend in figure.legends for t in legend.get_texts()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_visible()]
    width, height = figure.bbox.width, figure.bbox.height
    found = [(n, "") for n, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1]
    for i, (name, box) in enumerate(boxes):
        found += [(name, other) for other, b in boxes[i + 1 :] if box.overlaps(b)]
    return found


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_block_means_are_drawn_as_measured_and_predicted(demo: DemoResult, narrow: bool) -> None:
    s = demo.summary
    configuration = s.posterior.configuration(TARGET)
    figure = block_mean_figure(
        s.posterior, s.held_out, configuration, demo.donors, calibration_rows=s.calibration, seed=0, narrow=narrow
    )
    assert overlapping(figure) == []
    (axes,) = figure.axes
    drawn = np.sort(np.concatenate([c.get_offsets()[:, 1] for c in axes.collections if type(c).__name__ == "PathCollection"]))
    own = [
        f.groupby([f["regime"], f["step_id"] // DEFAULT_BLOCK_LENGTH], sort=False)["step_time_s"].mean()
        for f in (s.calibration, s.held_out)
    ]
    np.testing.assert_allclose(drawn, np.sort(1e3 * np.concatenate(own)))
    assert "(ms)" in axes.get_ylabel()
    assert axes.get_ylim()[1] > drawn.max()
    labels = {t.get_text() for t in axes.texts}
    assert set(s.regimes_judged) <= labels


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_coefficients_are_drawn_without_overlap(demo: DemoResult, narrow: bool) -> None:
    figure = coefficient_figure(demo.summary.posterior, narrow=narrow)
    assert overlapping(figure) == []
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names == list(coefficient_intervals(demo.summary.posterior, TARGET).index)


def test_coefficient_intervals_are_those_of_the_draws_and_the_prior(demo: DemoResult) -> None:
    posterior = demo.summary.posterior
    features = posterior.feature_set
    configuration = posterior.configuration(TARGET)
    found = coefficient_intervals(posterior, TARGET)
    used = np.abs(features.design(operating_points(configuration), configuration)).sum(axis=0) > 0
    assert list(found.index) == [n for n, u in zip(features.coef_names, used, strict=True) if u]
    draws = posterior.tree["posterior"]["theta"].sel(config=TARGET)
    for name in found.index:
        own = draws.sel(coef=name).to_numpy().ravel()
        assert found.loc[name, "own_mean"] == pytest.approx(own.mean())
        assert [found.loc[name, "own_low"], found.loc[name, "own_high"]] == pytest.approx(list(np.quantile(own, [0.025, 0.975])))
    base = [f for f in features.base if f.name in found.index]
    for f in base:
        assert [found.loc[f.name, "prior_low"], found.loc[f.name, "prior_high"]] == pytest.approx([f.prior.low, f.prior.high])
    # The constant's prior contains the config features, in units of the constant's own column: compare with simulation.
    rng = np.random.default_rng(0)
    first = features.residual[0]
    seconds = features.design(operating_points(configuration).iloc[:1], configuration)[0, len(features.base)]
    simulated = rng.normal(first.prior.mean, first.prior.sd, 200_000)
    for f, value in zip(features.config, features.config_row(configuration), strict=True):
        simulated += value / seconds * rng.normal(f.prior.mean, f.prior.sd, len(simulated))
    low, high = np.quantile(simulated, [0.05, 0.95])
    width = high - low
    assert found.loc["constant", "prior_low"] == pytest.approx(low, abs=0.02 * width)
    assert found.loc["constant", "prior_high"] == pytest.approx(high, abs=0.02 * width)


# The embedded sample


def test_the_sample_is_what_its_script_makes(shared_data: Path, tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "make_sample.py"
    spec = importlib.util.spec_from_file_location("make_sample", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = list(script.make_sample(shared_data / "vllm_cpu", tmp_path / "store"))
    kept = sample_store_path()
    assert sorted(p.name for p in made) == sorted(p.name for p in kept.iterdir()) == sorted([*DONORS, TARGET])
    for folder in made:
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (kept / folder.name).iterdir())
        for table in ("steps.parquet", "requests.parquet"):
            pd.testing.assert_frame_equal(pd.read_parquet(folder / table), pd.read_parquet(kept / folder.name / table))
        assert (folder / "configuration.yaml").read_text() == (kept / folder.name / "configuration.yaml").read_text()


def test_the_sample_is_small_valid_and_described() -> None:
    root = sample_store_path()
    assert sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) < 3_000_000
    described = (root.parent / "README.md").read_text(encoding="utf-8")
    store = TraceStore(root)
    for config_id in store.config_ids:
        steps, requests = store.steps(config_id), store.requests(config_id)
        assert steps.rejected.empty
        assert requests.rejected.empty
        (line,) = [x for x in described.splitlines() if f"`{config_id}`" in x]
        assert f"| {len(steps.frame)} | {len(requests.frame)} |" in line
        assert f"{store.configuration(config_id).llm.num_layers} layers" in line
        assert all(f"`{r}`" in described for r in set(steps.frame["regime"]))
