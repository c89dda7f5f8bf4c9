"""The map of uncertainty: its numbers are those of the selection, its cells hold what they say, and it draws what was picked."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cli_runs import STORE, chain, done, run
from matplotlib._pylab_helpers import Gcf
from matplotlib.collections import LineCollection
from posterior_fits import three_fitted, traffic
from simulation import BLOCK, THREE, batches, configuration

from hfdtl_bayes.design import Selection, SelectionSettings, select_rows
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.report import save_figure, uncertainty_cells, uncertainty_map
from hfdtl_bayes.report.figures import PALETTE
from hfdtl_bayes.sample import TARGET

NEW = configuration("new", "H100", 4)
SETTINGS = SelectionSettings(draws=16, block_length=BLOCK)


@cache
def pool() -> pd.DataFrame:
    return batches(np.random.default_rng(2), 240)


@cache
def heavy() -> pd.DataFrame:
    """Traffic that the pool has little of."""
    return batches(np.random.default_rng(3), 90).assign(prefill_tokens=700, decode_tokens=100)


def chosen(mix: pd.DataFrame | None = None, budget: int = 30) -> Selection:
    return select_rows(three_fitted(), pool(), NEW, budget, deployment=mix, settings=SETTINGS)


def cells_of(selection: Selection, mix: pd.DataFrame | None = None, **more: object) -> pd.DataFrame:
    return uncertainty_cells(three_fitted(), selection, pool(), NEW, mix, settings=SETTINGS, **more)  # type: ignore[arg-type]


def test_over_all_cells_it_is_the_sd_that_the_selection_expects() -> None:
    selection = chosen()
    cells = cells_of(selection, steps=(0, 1, 7))
    assert cells["picks"].unique().tolist() == [0, 1, 7, 30]
    for picks, own in cells.groupby("picks"):
        assert own["rows"].sum() == own["deployment_rows"].sum() == len(pool())
        mean_square = np.average(own["sd"] ** 2, weights=own["rows"])
        assert np.sqrt(mean_square) == pytest.approx(selection.expected_sd[int(picks)], rel=1e-9)  # type: ignore[arg-type]


def test_each_cell_becomes_surer_with_every_pick_and_the_mix_most() -> None:
    mix = heavy()
    cells = cells_of(chosen(mix), mix, steps=(0, 3, 10))
    wide = cells.pivot_table(index=["across", "down"], columns="picks", values="sd")
    assert (np.diff(wide.to_numpy(), axis=1) < 0).all()
    shares = (wide[30] / wide[0]).to_frame("left").join(cells.groupby(["across", "down"])["deployment_rows"].max())
    of_mix = shares["deployment_rows"] > 0
    assert of_mix.sum() == 1
    assert shares.loc[of_mix, "left"].max() < shares.loc[~of_mix, "left"].median()


def test_cells_by_hand() -> None:
    """Prefill up to 800 tokens: cells of 128, and one for none; decode tokens by octaves."""
    rows = pool().iloc[:4].assign(prefill_tokens=[0, 1, 128, 800], decode_tokens=[1, 2, 3, 64])
    selection = select_rows(three_fitted(), rows, NEW, 1, settings=SETTINGS)
    cells = uncertainty_cells(three_fitted(), selection, rows, NEW, settings=SETTINGS, steps=())
    assert cells["picks"].tolist() == [1] * 4
    assert cells["across"].tolist() == [0, 1, 2, 7]
    assert cells["across_tokens"].tolist() == [0, 0, 128, 768]
    assert cells["down"].tolist() == [1, 2, 2, 7]
    assert cells["down_tokens"].tolist() == [1, 2, 2, 64]
    assert cells["rows"].tolist() == [1] * 4


def test_rows_calibrated_on_before_count_for_the_drift_of_their_blocks() -> None:
    """The target of the fit has rows of its own: what is left before any pick is what its selection starts from."""
    posterior, rows = three_fitted(), traffic(THREE[2], 5, 160)
    selection = select_rows(posterior, rows, THREE[2], 6, settings=SETTINGS)
    cells = uncertainty_cells(posterior, selection, rows, THREE[2], settings=SETTINGS)
    for k in (0, 5, 6):
        own = cells[cells["picks"] == k]
        assert np.sqrt(np.average(own["sd"] ** 2, weights=own["rows"])) == pytest.approx(selection.expected_sd[k], rel=1e-9)


@pytest.mark.parametrize("narrow", [False, True])
def test_what_is_drawn(narrow: bool) -> None:
    mix = heavy()
    selection = chosen(mix, 27)
    figure = uncertainty_map(three_fitted(), selection, pool(), NEW, mix, settings=SETTINGS, narrow=narrow)
    panels = figure.axes[:4]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert [t.partition(":")[0] for t in titles] == [
        "before any measurement",
        "after 5 steps",
        "after 20 steps",
        "after 27 steps",
    ]
    assert f"{100 * selection.expected_mape[20]:.2g} %" in titles[2]
    numbers = [[t.get_text() for t in axes.texts] for axes in panels]
    assert numbers == [[], [*"12345"], [str(k) for k in range(6, 21)], [str(k) for k in range(21, 28)]]
    earlier = [sum(len(line.get_xdata()) for line in axes.lines if line.get_markersize() == 4) for axes in panels]
    assert earlier == [0, 0, 5, 20]
    # A pick is drawn where its batch is.
    first = pool().loc[selection.index[0]]
    x, y = panels[1].texts[0].get_position()
    if first["prefill_tokens"]:
        assert x == pytest.approx(1 + first["prefill_tokens"] / 128)
    assert y == pytest.approx(1 + np.log2(first["decode_tokens"]))
    # One shade scale for all, one cell of the mix outlined by its four sides, and words for both axes.
    norms = {axes.images[0].norm for axes in panels}
    assert len(norms) == 1
    for axes in panels:
        (border,) = (c for c in axes.collections if isinstance(c, LineCollection))
        assert len(border.get_segments()) == 4
    assert panels[-1].get_xlabel() == "prefill tokens in the step"
    assert panels[0].get_ylabel() == "decode tokens"


def test_many_new_picks_are_dots_and_few_panels_are_few() -> None:
    selection = chosen(budget=60)
    figure = uncertainty_map(three_fitted(), selection, pool(), NEW, settings=SETTINGS, steps=(0,))
    assert [axes.get_title(loc="left").partition(":")[0] for axes in figure.axes[:2]] == [
        "before any measurement",
        "after 60 steps",
    ]
    assert not figure.axes[1].texts
    assert sum(len(line.get_xdata()) for line in figure.axes[1].lines) == 60


def test_shades_rise_with_uncertainty_for_any_eye() -> None:
    figure = uncertainty_map(three_fitted(), chosen(budget=3), pool(), NEW, settings=SETTINGS)
    colours = figure.axes[0].images[0].get_cmap()(np.linspace(0, 1, 50))[:, :3]
    linear = np.where(colours <= 0.03928, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) < 0).all()
    assert luminance[0] / luminance[-1] > 10
    # The number of a pick is dark on white.
    assert figure.axes[1].texts[0].get_color() == PALETTE["ink"]


def test_it_repeats_itself_and_leaves_no_global_state(tmp_path: Path) -> None:
    before = len(Gcf.figs)
    for name in ("a.svg", "b.svg", "a.png"):
        save_figure(uncertainty_map(three_fitted(), chosen(budget=6), pool(), NEW, settings=SETTINGS), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert len(Gcf.figs) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"steps": (0, -1)}, "steps are numbers of picks"),
        ({"down": "waiting_requests"}, "no axis 'waiting_requests'; choose one of context_tokens, decode_tokens"),
        ({"down": "context_tokens"}, "the pool and the deployment mix lack(s) the column 'context_tokens'"),
    ],
)
def test_bad_input(more: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        cells_of(chosen(budget=2), **more)
    assert message in str(caught.value)


def test_a_pool_without_the_rows_chosen_is_refused() -> None:
    selection = chosen(budget=4)
    other = pool().drop(index=selection.index[:1])
    with pytest.raises(InputError, match=f"1 of 4 rows chosen are not in the pool, the first is row {selection.index[0]}"):
        uncertainty_cells(three_fitted(), selection, other, NEW, settings=SETTINGS)


def test_on_the_command_line(tmp_path: Path) -> None:
    words = ("select", chain().donors, STORE, "--config", TARGET, "--budget", 8, "--out", tmp_path / "s.csv")
    found = done(*words, "--figure", tmp_path / "map.svg", "--json").json
    assert found["figure"] == str(tmp_path / "map.svg")
    assert "traffic to be predicted" in (tmp_path / "map.svg").read_text()
    refused = run(*words[:-1], tmp_path / "t.csv", "--figure", tmp_path / "map.pdf")
    assert refused.code == 2
    assert ".svg or .png" in refused.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.svg", "s.csv"]
