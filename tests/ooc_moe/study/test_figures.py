"""The figures of a study show every run, and the same numbers as the tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from ooc_moe.study.figures import learning_and_retention, misses_and_stalls, scores_after_training
from ooc_moe.study.scores import strata
from tests.ooc_moe.study.made_up_studies import GAMES, mean, points, scores_of, small_study, write_finished_runs


def drawn(figure: Figure | None) -> Figure:
    """Checks that there is a figure, and renders it."""
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def test_every_run_is_a_point_and_the_mean_stands_on_its_row(tmp_path: Path) -> None:
    study = small_study()
    found = scores_of(study, write_finished_runs(study, tmp_path, {"full": 0.9, "dense": 0.5, "joint": 0.7}, seeds=2))
    axes = drawn(learning_and_retention(found)).axes
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == ["full", "dense", "joint", "single"]
    for ax, measure in zip(axes, ("learning", "average", "retention"), strict=True):
        shown = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
        runs = sum(len({(cell.order, cell.seed) for cell in found.cells(name, measure)}) for name in names)
        assert len(shown) == runs
        for row, name in enumerate(names):
            bars = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "|" and line.get_ydata()[0] == row]
            assert bars == ([pytest.approx(mean(found, name, measure))] if strata(found.cells(name, measure)) else [])


def test_one_run_stands_without_a_mean_on_it(tmp_path: Path) -> None:
    study = small_study(orders={"forth": GAMES}, seeds={"full": 1, "single": 1})
    axes = drawn(learning_and_retention(scores_of(study, write_finished_runs(study, tmp_path, {"full": 0.9}, seeds=1)))).axes
    assert [line.get_ydata()[0] for line in axes[0].lines if line.get_marker() == "|"] == [1]  # Of the three networks of single.


def test_a_game_is_followed_from_its_own_training_on_in_every_run(tmp_path: Path) -> None:
    study = small_study()
    found = scores_of(study, write_finished_runs(study, tmp_path, {"full": 0.9, "dense": 0.5, "joint": 0.7}, seeds=2))
    figure = drawn(scores_after_training(found))
    panels = {ax.get_title(): ax for ax in figure.axes if ax.axison}
    assert list(panels) == ["full", "dense"]  # The others are evaluated at their ends only.
    bold = {line.get_label(): line for line in panels["dense"].lines if line.get_marker() == "o"}
    assert list(bold) == list(GAMES)
    assert [list(line.get_xdata()) for line in bold.values()] == [[1, 2, 3], [2, 3], [3]]
    assert list(bold[GAMES[0]].get_ydata()) == pytest.approx([1, 0.5, 0.5], abs=0.01)
    thin = [line for line in panels["dense"].lines if line.get_marker() == "."]
    assert len(thin) == 2 * 3
    assert np.mean([line.get_ydata()[-1] for line in thin[:2]]) == pytest.approx(bold[GAMES[0]].get_ydata()[-1])


def test_misses_and_stalls_are_drawn_for_both_ways_and_blocks_last() -> None:
    four = points((0.99, 1.0), (0.9, 3.0))
    between = [replace(point, switch_every=16, hit_rate=0.95, stall_s=2.0) for point in four if point.switch_every == 1]
    figure = drawn(misses_and_stalls([*four, *between]))
    trainer, simulator, stalls, _ = figure.axes
    assert [tick.get_text() for tick in stalls.get_xticklabels()] == ["1", "16", "blocks"]
    assert list(trainer.lines[0].get_ydata()) == pytest.approx([0.1, 0.05, 0.01])
    assert list(stalls.lines[0].get_ydata()) == [3.0, 2.0, 1.0]
    assert [len(ax.lines) for ax in (trainer, simulator)] == [1, 2]
    assert list(simulator.lines[1].get_ydata()) == pytest.approx([0.01] * 3)  # Belady.
    assert simulator.lines[1].get_linestyle() == "--"
