"""The course: every notebook runs, quickly, and stands in the repository as it ran."""

import json
import re
from pathlib import Path

import pytest

import minillada
from minillada.errors import BadInput

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = "github.com/minillada/minillada"
LIMIT = 600  # seconds after which one hangs; on a quiet machine it takes ten
every = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)


def cells_of(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def code_of(path: Path) -> list[dict]:
    return [cell for cell in cells_of(path) if cell["cell_type"] == "code"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    """Where one notebook leaves a trained model for the next."""
    return str(tmp_path_factory.mktemp("cache"))


@every
def test_a_notebook_runs_from_top_to_bottom_and_its_claims_hold(path, cache):
    pytest.importorskip("nbclient", reason="notebooks need: pip install minillada[notebooks]")
    from execute import execute

    own = {"MINILLADA_CACHE": cache, "MINILLADA_COURSE": f"{cache}/none/course"}
    execute(path, LIMIT, short=True, OMP_NUM_THREADS="1", **own)


@every
def test_a_notebook_is_committed_as_it_ran_once_from_top_to_bottom(path):
    cells = code_of(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell["outputs"] or not re.search("^print", cell["source"], re.MULTILINE)
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
    assert len(re.findall("^ *assert ", "\n".join(cell["source"] for cell in code_of(path)), re.MULTILINE)) > 1
    assert 0 < text.find("## Exercises") < text.find("## Solutions")


@every
def test_the_solutions_are_folded(path):
    cells = cells_of(path)
    first = next(i for i, cell in enumerate(cells) if "## Solutions" in cell["source"])
    for cell in cells[first:]:
        if cell["cell_type"] == "code":
            assert (
                cell["source"].startswith("# @title Solution ") and cell["metadata"]["cellView"] == "form"
            )  # on Colab
            assert cell["metadata"]["jupyter"] == {"outputs_hidden": True, "source_hidden": True}
        else:
            open_text = re.sub(
                "<details><summary>Solution .*?</details>",
                "",
                cell["source"].split("## Solutions")[-1],
                flags=re.DOTALL,
            )
            assert re.fullmatch(r"\s*((Next: |This was the last notebook).*)?", open_text)


@every
def test_a_notebook_opens_on_colab_and_installs_itself_there_alone(path):
    title, setup, *_ = cells_of(path)
    assert title["source"].startswith("[![Open in Colab]")
    assert (
        f"(https://colab.research.google.com/{REPOSITORY.replace('.com', '')}/blob/main/notebooks/{path.name})"
        in title["source"]
    )
    assert (
        setup["source"] == cells_of(BOOKS[0])[1]["source"]
        and f"git clone -q --depth 1 https://{REPOSITORY}\n" in setup["source"]
    )
    assert 'if "google.colab" in sys.modules' in setup["source"] and not setup["outputs"]


@every
def test_a_reader_sees_nothing_of_the_short_form(path):
    assert not any(re.search("SHORT|short=", cell["source"]) for cell in cells_of(path))


def test_a_short_form_of_what_a_cell_does_not_say_is_refused():
    nbformat = pytest.importorskip("nbformat", reason="notebooks need: pip install minillada[notebooks]")
    from execute import shorten

    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("n = 100", metadata={"short": {"n = 100": "n = 1"}})]
    )
    shorten(book)
    assert book.cells[0].source == "n = 1"
    with pytest.raises(ValueError, match="n = 100"):
        shorten(book)


def test_the_lines_changed_from_a_gpt_are_lines_of_the_code():
    (table,) = re.findall(r"(?:^\|.*\n)+", "\n".join(cell["source"] for cell in cells_of(BOOKS[0])), re.MULTILINE)[:1]
    code = [(ROOT / "minillada" / file).read_text(encoding="utf-8") for file in ("measure/twin.py", "plain.py")]
    rows = [re.findall("`(.+?)`|none", row) for row in table.splitlines()[2:]]
    assert len(rows) > 5
    for row in rows:
        assert len(row) == 2 and all(line in text for line, text in zip(row, code, strict=True))


def test_notebook_4_begins_with_the_loop_in_fifteen_lines():
    loop = next(cell["source"] for cell in code_of(BOOKS[3]) if ".backward()" in cell["source"])
    assert len(loop.splitlines()) == 15
    assert (
        loop.index("x0 =")
        < loop.index("masked =")
        < loop.index("logits =")
        < loop.index("loss =")
        < loop.index(".step()")
    )


def test_the_readme_lists_every_notebook():
    listed = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", (ROOT / "notebooks/README.md").read_text(encoding="utf-8"))
    assert {path.name for path in BOOKS} <= set(listed)


@pytest.fixture
def course(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import course

    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(course, "RUNS", tmp_path / "course")
    monkeypatch.setattr(
        course,
        "TABLE",
        {"tales": {"preset": "nano", "data": "tales", "length": 16, "batch_size": 2}},
    )
    monkeypatch.setattr(course, "shipped", lambda name: None)
    monkeypatch.setattr(course, "BRIEF", {**course.BRIEF, "steps": 2})
    return course


def test_a_model_of_the_course_is_used_where_it_is_there(course, capsys):
    (course.RUNS / "tales").mkdir(parents=True)
    assert course.run("tales") == course.RUNS / "tales"
    assert not capsys.readouterr().out


def a_run(course, name, steps, **fields):
    """A directory such as `make demo` leaves."""
    where = course.RUNS.parent / name
    where.mkdir()
    (where / "run.json").write_text(
        json.dumps({"objective": "pretrain", "data": "tales", "preset": "nano", "balance": 0.01} | fields)
    )
    (where / "log.jsonl").write_text(f'{{"step": 1}}\n{{"step": {steps}}}\n')
    return where


def test_a_finished_run_of_the_same_kind_takes_the_place_of_a_model_of_the_course(course, capsys):
    demo = a_run(course, "tales-nano-1", 300)
    a_run(course, "stopped", 20)
    a_run(course, "of-another-text", 300, data="docs")
    assert course.run("tales") == demo and course.is_real(demo)
    assert "the run tales-nano-1" in capsys.readouterr().out


def test_the_shipped_model_takes_its_place_where_there_is_no_run(course, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(course, "shipped", lambda name: tmp_path / name)
    assert course.run("tales") == tmp_path / "tales" and course.is_real(tmp_path / "tales")
    assert "comes with the package" in capsys.readouterr().out


def test_a_model_that_is_not_there_has_a_short_version_that_says_so_and_is_trained_once(course, capsys, monkeypatch):
    where = course.run("tales")
    assert not course.is_real(where)
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
