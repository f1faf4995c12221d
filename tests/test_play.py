"""The models that come with the package, and the commands that play with them and report on them."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from oracles import tiny_model

import minillada
from minillada.commands import play, report
from minillada.commands.ask import defaults_of, guide_of
from minillada.commands.cli import run
from minillada.commands.play import Player, verdict
from minillada.errors import BadInput
from minillada.files import verify_manifest
from minillada.show.board import board_lines
from minillada.text.tales import flawless, mistake, tales
from minillada.text.tasks import make_task
from minillada.weights.checkpoint import check, locate
from minillada.weights.shipped import HOME, SHIPPED

ROOT = Path(__file__).parents[1]


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *arguments, typed=text) -> (exit code, standard output, standard error)."""

    def call(module, *arguments, typed=()):
        lines = iter(typed)
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, "/quit"))
        code = 0
        try:
            run(module.main)
        except SystemExit as error:
            code = error.code
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


def player(name: str, seed: int = 0) -> Player:
    return Player.load(name, Namespace(seed=seed, pause=0.0, html=None, svg=None))


# ---- What comes with the package ----


def test_the_shipped_models_are_small_whole_and_neither_code_nor_pickle():
    files = [path for path in HOME.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == set(SHIPPED)
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    for name in SHIPPED:
        assert verify_manifest(HOME / name).keys() >= {"model.safetensors", "tokenizer.json", "generation_config.json"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_stored_in_bfloat16_and_loaded_by_name_in_float32(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert check(name).dtypes == ["bfloat16"]
    model, tokenizer = minillada.load(name)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and tokenizer.mask_id == model.config.mask_id
    assert isinstance(defaults_of(locate(name)), dict)
    minillada.save(tiny_model(), tmp_path / name)  # a directory of that name goes first
    assert minillada.load(name)[0].config.vocab_size == tiny_model().config.vocab_size


def test_the_teller_tells_stories_that_end_go_well_for_long_and_never_come_twice():
    teller = player("tales")
    told, _ = report.written(teller, 6)
    assert len(set(told)) == 6 and all(300 < len(text) < 600 for text in told)
    assert sum(len(text) if (at := mistake(text)) is None else at for text in told) / 6 > 150


def test_the_solver_solves_boards_it_has_not_seen_and_better_surest_first():
    found = report.solved(player("sudoku4"), 20)
    assert found["surest cell first"] >= 0.8


@pytest.mark.soak
def test_the_shipped_models_do_what_their_page_says():
    teller = player("tales")
    told, _ = report.written(teller, 200)
    assert flawless(told) >= 0.8 and len(set(told)) >= 190
    assert report.solved(player("sudoku4"), 96)["surest cell first"] >= 0.9


# ---- How a model is decoded unless told otherwise ----


def test_a_model_without_a_guide_has_the_defaults_of_the_sampler(tmp_path):
    assert guide_of(tmp_path) == {} and defaults_of(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.2, "do_sample": true}')  # of transformers
    assert defaults_of(tmp_path) == {}


@pytest.mark.parametrize("sampling", [[], {"warmth": 1}, "hot"])
def test_a_guide_of_another_form_is_one_line(tmp_path, sampling):
    (tmp_path / "generation_config.json").write_text(json.dumps({"minillada": {"sampling": sampling}}))
    with pytest.raises(BadInput, match="expected fields of SampleConfig"):
        defaults_of(tmp_path)


# ---- Play ----


def test_a_story_appears_and_is_judged_and_the_same_seed_tells_it_again(call, tmp_path):
    code, out, _ = call(play, "story", "--seed", 1, "--html", tmp_path / "story.html")
    assert code == 0 and "A story." in out and "100% written" in out
    assert re.search(r"Flawless|Not flawless", out)
    assert (tmp_path / "story.html").stat().st_size > 5000
    assert call(play, "story", "--seed", 1)[1] == out
    assert call(play, "story", "--html", tmp_path / "story.html")[0] == 2


def test_the_verdict_names_the_place_of_a_mistake():
    tale = next(tales(0, 1))
    assert verdict(tale).startswith("Flawless")
    assert f"after “…{tale[70:100]}”" in verdict(tale[:100] + "#" + tale[101:])


def test_three_words_are_hidden_and_shown_old_beside_new(call):
    code, out, _ = call(play, "fill", "--seed", 2)
    assert code == 0 and len(re.findall(r"(?m)^ +\S+ → \S+ ", out)) == 3


def test_two_boards_fill_beside_each_other(call):
    code, out, _ = call(play, "sudoku", "--seed", 4)
    assert code == 0 and "surest cell first" in out and "in reading order" in out
    top = next(line for line in out.splitlines() if "┌" in line)
    assert top.count("┌") == 2


def test_no_cell_is_an_end_of_text(call, monkeypatch):
    puzzle = make_task("sudoku4", 0, 8, 40).test[17]  # in reading order the model would end the text in a cell
    monkeypatch.setattr(play, "telling", lambda player: (puzzle, "One of 1,750 boards."))
    code, out, _ = call(play, "sudoku")
    assert code == 0 and "EOS" not in out and out.count("cells wrong") + out.count("solved") == 2


def test_a_board_is_drawn_with_its_boxes():
    lines = board_lines([(str(i % 4 + 1), "") for i in range(16)])
    assert lines == ["┌─────┬─────┐", *["│ 1 2 │ 3 4 │"] * 2, "├─────┼─────┤", *["│ 1 2 │ 3 4 │"] * 2, "└─────┴─────┘"]
    assert board_lines([("░", "\x1b[2m")] * 16)[1].count("\x1b[2m░\x1b[0m") == 4


def test_an_ending_gets_a_beginning_and_the_twin_tells_another_story(call):
    code, out, _ = call(play, "reverse", "--seed", 3)
    ending = next(tales(3, 1)).rpartition(". ")[2]
    assert code == 0 and out.count(ending) >= 2 and "autoregressive twin" in out


def test_questions_about_a_story_are_answered(call):
    code, out, _ = call(play, "chat", "--seed", 5, typed=["Who helped?", ""])
    assert code == 0 and next(tales(5, 1)) in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["stori"], "did you mean story"), (["chat", "--html", "x.html"], "html"), (["story", "--pause", "-1"], "pause")],
)
def test_what_cannot_be_played_is_one_line(call, arguments, reason):
    code, out, err = call(play, *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and reason in err and err.count("\n") == 1


def test_a_run_of_ones_own_shows_gaps_and_says_what_next(call, tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path / "cache"))
    config = minillada.TrainConfig(preset="nano", steps=4, out=str(tmp_path / "run"))
    list(minillada.train(config))
    guide = guide_of(locate(tmp_path / "run"))
    assert guide["sampling"] == {"temperature": 0.7, "remasking": "random"}
    assert guide["examples"]["fill"] and all(text.count("[MASK]") >= 3 for text in guide["examples"]["fill"])
    code, out, _ = call(play, "run", "--model", tmp_path / "run")
    assert code == 0 and "What next" in out and "nats per character" in out and out.count(" → ") >= 3


# ---- The report card ----


def test_a_report_says_what_a_teller_and_a_solver_can_do(call, tmp_path):
    code, out, _ = call(report, "tales", "--n", 3, "--out", tmp_path / "tales.html")
    page = (tmp_path / "tales.html").read_text(encoding="utf-8")
    assert code == 0 and "report written" in out and page.count("<blockquote") == 3 and "tokens/s" in page
    assert "http" not in page
    call(report, "sudoku4", "--n", 3, "--out", tmp_path / "sudoku.html")
    assert "boards solved, surest cell first" in (tmp_path / "sudoku.html").read_text(encoding="utf-8")
    code, _, err = call(report, "tales", "--out", tmp_path / "tales.html")
    assert code == 2 and "which exists" in err


def test_a_board_row_has_a_hole_for_each_empty_cell():
    solver = player("sudoku4")
    (puzzle,) = make_task("sudoku4", 0, 0, 1).test
    row = play.board_row(solver, puzzle)
    assert len(row) == 17 + 16 and row.count(solver.model.config.mask_id) == puzzle.prompt.count(".")


# ---- The speedrun ----


def test_every_entry_of_the_speedrun_is_a_training_that_can_be_made(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speedrun

    for changes in speedrun.ENTRIES.values():
        config = speedrun.config_of(changes, "tales", 3.0)
        assert (config.minutes, config.steps) == (3.0, None)
        assert {**config.model, **changes.get("model", {})} == config.model
    assert speedrun.config_of({}, "tales", 3.0).rows == "documents"
