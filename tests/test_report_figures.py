"""Figures and comparisons from plain numbers; those of a fitted posterior are tested with the demo."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes

from hfdtl_bayes.features import feature_set
from hfdtl_bayes.report.comparison import ALL, CALIBRATED, RIDGE, SCRATCH, ZERO_SHOT, Comparison, mape_by_regime
from hfdtl_bayes.report.figures import PALETTE, accuracy_figure, figure_svg, save_figure
from hfdtl_bayes.report.style import DARK, LIGHT
from hfdtl_bayes.sample import TARGET, sample_store_path
from hfdtl_bayes.traces import TraceStore


@pytest.fixture
def mape() -> pd.DataFrame:
    columns = ["load0.85", "$x$", ALL]
    return pd.DataFrame(
        [[0.05, 0.08, 0.07], [0.10, 0.30, 0.20], [0.5, 4.0, 2.0], [0.09, 0.12, 0.11]],
        index=[CALIBRATED, ZERO_SHOT, RIDGE, SCRATCH],
        columns=columns,
    )


def lines(axes: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_xdata()) for line in axes.get_lines()}


@pytest.mark.parametrize("narrow", [False, True])
def test_accuracy_figure_shows_the_table(mape: pd.DataFrame, narrow: bool) -> None:
    figure = accuracy_figure(mape, 0.04, limit=0.1, narrow=narrow)
    (axes,) = figure.axes
    drawn = lines(axes)
    for method, values in mape.iterrows():
        np.testing.assert_allclose(drawn[str(method)], 100 * values.to_numpy())
    verticals = [float(x[0]) for x in (np.asarray(line.get_xdata()) for line in axes.get_lines()) if len(x) == 2 and x[0] == x[1]]
    assert sorted(verticals) == pytest.approx([4.0, 10.0])
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low < 4
    assert high > 400
    assert [t.get_text() for t in axes.get_yticklabels()] == list(mape.columns)
    assert "%" in axes.get_xlabel()


def test_accuracy_figure_without_a_limit_or_with_a_perfect_method(mape: pd.DataFrame) -> None:
    mape.loc[SCRATCH] = 0.0
    low, high = accuracy_figure(mape, 0.04).axes[0].get_xlim()
    assert 0 < low < high < np.inf


def test_figures_leave_no_global_state_and_repeat_themselves(mape: pd.DataFrame, tmp_path) -> None:
    before = len(Gcf.figs)
    first, second = (figure_svg(accuracy_figure(mape, 0.04)) for _ in range(2))
    assert first == second
    paths = [save_figure(accuracy_figure(mape, 0.04), tmp_path / name) for name in ("a.svg", "b.svg", "a.png", "b.png")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[2].read_bytes() == paths[3].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]
    assert len(Gcf.figs) == before


def test_a_name_with_dollar_signs_is_not_read_as_mathematics(mape: pd.DataFrame) -> None:
    assert ">$x$<" in figure_svg(accuracy_figure(mape, 0.04))


def test_a_figure_that_cannot_be_written_leaves_nothing(mape: pd.DataFrame, tmp_path) -> None:
    target = tmp_path / "a.nonsense"
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(accuracy_figure(mape, 0.04), target)
    assert list(tmp_path.iterdir()) == []


def contrast(one: str, other: str) -> float:
    """WCAG 2.1 contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["ground", "card"])
def test_colours_can_be_seen(colours: dict[str, str], ground: str) -> None:
    assert set(PALETTE) < set(LIGHT) == set(DARK)
    for name in set(colours) - {"line", "ground", "card"}:
        # WCAG asks 4.5 of text and 3 of large text and graphics.
        least = 4.5 if name in {"ink", "muted", "blue"} else 3.0
        assert contrast(colours[name], colours[ground]) >= least, name


def test_mape_by_regime_by_hand() -> None:
    configuration = TraceStore(sample_store_path()).configuration(TARGET)
    frame = pd.DataFrame({"step_time_s": [0.1, 0.2, 0.4], "regime": ["b", "b", "a"]})
    found = mape_by_regime(frame, np.array([0.11, 0.16, 0.4]), feature_set("roofline", "step_time"), configuration)
    assert list(found.index) == ["b", "a", ALL]
    assert found.to_numpy() == pytest.approx([0.15, 0.0, 0.1])


def test_mape_of_a_delay_scores_only_those_who_waited() -> None:
    configuration = TraceStore(sample_store_path()).configuration(TARGET)
    features = feature_set("roofline", "queue_delay")
    floor = features.noise_floor(configuration)
    waits = np.array([0.0, floor / 2, 3 * floor])
    frame = pd.DataFrame({"queued_s": 1.0, "scheduled_s": 1.0 + waits, "regime": "x"})
    found = mape_by_regime(frame, np.array([9.0, 9.0, 6 * floor]), features, configuration)
    assert found[ALL] == pytest.approx(1.0)


@pytest.mark.parametrize(("own", "wins"), [(0.05, True), (0.3, False)])
def test_the_comparison_says_who_wins(mape: pd.DataFrame, own: float, wins: bool) -> None:
    mape.loc[CALIBRATED, ALL] = own
    held = SimpleNamespace(mape=own)
    compared = Comparison(mape, pd.Series(1, index=mape.columns), held, held)  # type: ignore[arg-type]
    assert (compared.best == CALIBRATED) == wins
    assert ("NOT" not in compared.sentence()) == wins
    assert f"{SCRATCH} 11.0%" in compared.sentence()
