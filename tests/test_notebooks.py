"""The course: every notebook runs, quickly, and stands in the repository as it ran."""

import json
import re
from pathlib import Path

import pytest

import minillada
from minillada.errors import BadInput

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT = 600  # seconds after which one hangs; on a quiet machine it takes ten
every = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)


def code_of(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    """Where one notebook leaves a trained model for the next."""
    return str(tmp_path_factory.mktemp("cache"))


@every
def test_a_notebook_runs_from_top_to_bottom_and_its_claims_hold(path, cache):
    pytest.importorskip("nbclient", reason="notebooks need: pip install minillada[notebooks]")
    from execute import execute

    own = {"MINILLADA_SHORT": "1", "MINILLADA_CACHE": cache, "MINILLADA_COURSE": f"{cache}/none"}
    execute(path, LIMIT, OMP_NUM_THREADS="1", **own)


@every
def test_a_notebook_is_committed_as_it_ran_once_from_top_to_bottom(path):
    cells = code_of(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell["outputs"] or not re.search("^print", "".join(cell["source"]), re.MULTILINE)
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"


@every
def test_a_notebook_names_no_place_on_the_machine_it_ran_on(path):
    text = re.sub(r'"image/png": ".*"', "", path.read_text(encoding="utf-8"))
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|var|Users|private)/|\b[A-Z]:\\\\", text)
    assert str(ROOT) not in text
    assert "a short version" not in text  # of a model, in place of that of `make course-runs`


@every
def test_a_notebook_checks_what_it_claims_and_ends_with_solved_exercises(path):
    text = path.read_text(encoding="utf-8")
    assert len(re.findall("^ *assert ", "\n".join("".join(cell["source"]) for cell in code_of(path)), re.MULTILINE)) > 1
    assert 0 < text.find("## Exercises") < text.find("## Solutions")


def test_the_readme_lists_every_notebook():
    listed = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", (ROOT / "notebooks/README.md").read_text(encoding="utf-8"))
    assert {path.name for path in BOOKS} <= set(listed)


@pytest.fixture
def course(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import course

    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(course, "RUNS", tmp_path / "course")
    monkeypatch.setattr(course, "TABLE", {"tales": {"preset": "nano", "data": "tales", "length": 16, "batch_size": 2}})
    monkeypatch.setattr(course, "BRIEF", {**course.BRIEF, "steps": 2})
    return course


def test_a_model_of_the_course_is_used_where_it_is_there(course, capsys):
    (course.RUNS / "tales").mkdir(parents=True)
    assert course.run("tales") == course.RUNS / "tales"
    assert not capsys.readouterr().out


def test_a_model_that_is_not_there_has_a_short_version_that_says_so_and_is_trained_once(course, capsys, monkeypatch):
    where = course.run("tales")
    assert minillada.load(where)[0].config.max_len == 16
    assert "2 steps in place of 300" in capsys.readouterr().out
    monkeypatch.setattr(course, "train", None)
    assert course.run("tales") == where


def test_a_model_whose_training_was_interrupted_is_not_there(course):
    config = minillada.TrainConfig(**course.TABLE["tales"] | course.BRIEF)
    steps = course.make(config, course.RUNS / "tales")
    next(steps)
    steps.close()
    assert not list(course.RUNS.iterdir())


def test_a_model_that_the_course_does_not_know_is_refused(course):
    with pytest.raises(BadInput, match="run: expected one of tales"):
        course.run("novels")
