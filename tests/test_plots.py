"""The picture of a run shows what its log says, however short or damaged the run was."""

import json
import sys

import pytest

from minillada.show.plots import HELD_OUT, draw_levels, draw_steps, loss_curve
from minillada.training.config import CONFIGS

matplotlib_figure = pytest.importorskip("matplotlib.figure")


def record(step, loss=3.0, bound=None, **more):
    return {"step": step, "loss": loss, "bound": bound, "characters_per_token": 2.0, **more}


def drawn(draw, records):
    """Label of each labelled line -> its points, and the axes."""
    axes = matplotlib_figure.Figure().add_subplot()
    draw(axes, records)
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in lines}, axes


def write(run, records):
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run


def size(png):
    """Width and height, as its header says."""
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:], "big")


def test_losses_are_drawn_per_character_and_bounds_as_they_are():
    lines, axes = drawn(draw_steps, [record(1, 4.0), record(2, 3.0), record(3, 2.0, bound=0.75)])
    assert lines == {"training": [(1, 2.0), (2, 1.5), (3, 1.0)], "validation": [(3, 0.75)]}
    assert "nats per character" in axes.get_ylabel() and axes.get_ylim()[0] == 0


@pytest.mark.parametrize("name", [kind.held_out for kind in CONFIGS.values() if kind.held_out != "bound"])
def test_losses_of_other_objectives_are_drawn_as_they_are_beside_the_held_out_figure(name):
    records = [record(1, 0.9) | {name: None}, record(2, 0.8) | {name: 0.5}]
    for r in records:
        del r["bound"]
    lines, axes = drawn(draw_steps, records)
    assert lines == {"training": [(1, 0.9), (2, 0.8)], "validation": [(2, 0.5)]}
    assert HELD_OUT[name] in axes.get_ylabel() and "nats per character" not in axes.get_ylabel()


def test_the_running_mean_is_of_the_steps_that_its_label_says():
    lines, _ = drawn(draw_steps, [record(i, float(i)) for i in range(1, 151)])
    points = lines["training, mean of 3 steps"]
    assert points[0] == (1, 0.5) and points[1] == (2, 0.75) and points[-1] == (150, 149 / 2)


def test_what_was_not_finite_is_left_out():
    lines, _ = drawn(draw_steps, [record(1, 4.0), record(2, None), record(3, 2.0)])
    assert lines["training"] == [(1, 2.0), (3, 1.0)]


def test_the_levels_of_the_first_the_middle_and_the_last_evaluation_are_drawn():
    evaluations = [record(i, levels=[[0.1, i / 10], [0.9, None]]) for i in range(1, 8)]
    lines, axes = drawn(draw_levels, evaluations)
    assert list(lines) == ["step 1", "step 4", "step 7"] and lines["step 4"][0] == (0.1, 0.4)
    assert "per masked token" in axes.get_ylabel()
    assert list(drawn(draw_levels, evaluations[:1])[0]) == ["step 1"]
    assert list(drawn(draw_levels, evaluations[:2])[0]) == ["step 1", "step 2"]


@pytest.mark.parametrize("records", [[], [record(1)], [record(1, 0.0)], [record(1, None)], [record(1, bound=2.0)]])
def test_the_shortest_runs_can_be_drawn(tmp_path, records):
    assert loss_curve(write(tmp_path, records)) == tmp_path / "loss.png"


def test_the_second_panel_is_there_only_with_levels(tmp_path):
    narrow, _ = size(loss_curve(write(tmp_path, [record(1, bound=2.0, levels=None)])))
    wide, _ = size(loss_curve(write(tmp_path, [record(1, bound=2.0, levels=[[0.5, 2.0]])])))
    assert wide > 1.4 * narrow


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert loss_curve(write(tmp_path, [record(1)])) is None and not (tmp_path / "loss.png").exists()
