"""The rules of the house, read off the source; docs/architecture.md states them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minillada"
SOURCES = sorted(
    path for path in ROOT.rglob("*.py") if not {".venv", "build", "tests"} & set(path.relative_to(ROOT).parts)
)
OURS = [path for path in SOURCES if PACKAGE in path.parents or path.parent == ROOT]
COURSE = ["plain", "model", "diffusion", "strategies", "sampler", "train"]  # in the order in which they are read
FLOORS = {"errors": -1, "files": 0, "text": 1, "weights": 2, "decoding": 3, "measure": 3, "show": 3}
FLOORS |= dict.fromkeys(COURSE, 1) | {"training": 4, "commands": 5, "__init__": 6, "__main__": 6, "top": 6}
FORBIDDEN = {"eval", "exec", "compile", "__import__", "pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    """The folder inside the package, the name of a file directly in it, or "top" for a script."""
    if PACKAGE not in path.parents:
        return "top"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[Path]:
    """The files of this project that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                base = path.parents[node.level - 1].joinpath(*parts)
            elif parts[0] == "minillada":
                base = ROOT.joinpath(*parts)
            else:
                continue
            found |= {base.with_suffix(".py"), base / "__init__.py", *(base / f"{a.name}.py" for a in node.names)}
        elif isinstance(node, ast.Import):
            found |= {ROOT.joinpath(*a.name.split(".")).with_suffix(".py") for a in node.names}
    return {other for other in found if other in OURS and other not in (path, PACKAGE / "__init__.py")}


def calls(path: Path, attribute: str) -> list[int]:
    """The lines that call a method of this name."""
    return [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute
    ]


# ---- who may import whom ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OURS, ids=name)
def test_imports_only_go_down(path):
    here = room(path)
    allowed = {other for other, floor in FLOORS.items() if floor < FLOORS[here]} | {here}
    if here == "text":
        allowed -= set(COURSE)
    wrong = {name(other) for other in imports(path) if room(other) not in allowed}
    if here in COURSE:
        wrong = {name(other) for other in imports(path) if room(other) not in ("errors", *COURSE[: COURSE.index(here)])}
    assert not wrong


def test_no_file_imports_itself_in_a_circle():
    graph = {path: imports(path) for path in OURS if path.name != "__init__.py"}
    while free := [path for path, others in graph.items() if not others & graph.keys()]:
        for path in free:
            del graph[path]
    assert not {name(path) for path in graph}


def test_plain_imports_nothing_of_ours():
    assert not imports(PACKAGE / "plain.py")


# ---- what stands where -----------------------------------------------------------------------------------------------


def test_backward_and_the_optimisers_step_stand_in_the_course_alone():
    there = {name(p) for p in OURS if calls(p, "backward") or calls(p, "step")}
    assert there == {"minillada/plain.py", "minillada/train.py"}


@pytest.mark.parametrize("file", COURSE)
def test_no_function_of_the_course_is_longer_than_forty_lines(file):
    functions = [n for n in ast.walk(tree(PACKAGE / f"{file}.py")) if isinstance(n, ast.FunctionDef)]
    assert functions and {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 40} == {}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_course_is_short():
    assert sum(lines(PACKAGE / f"{file}.py") for file in COURSE[1:]) <= 1050
    assert lines(PACKAGE / "plain.py") <= 120


def test_the_door_shows_few_files():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


@pytest.mark.parametrize("folder", [p for p in sorted(PACKAGE.iterdir()) if (p / "__init__.py").exists()], ids=name)
def test_a_room_is_one_level_deep_and_its_init_says_what_it_is_for(folder):
    assert not [p for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len(ast.get_docstring(tree(folder / "__init__.py")) or "") > 80
    assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) > 1  # a room of one file is a file


def test_the_documents_name_every_file_and_no_other():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w/]+\.py)` \| .{10,} \|$", text, re.MULTILINE)
    assert sorted(table) == sorted(name(path) for path in OURS if path.name != "__init__.py")


# ---- what is nowhere -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_unpickled_and_no_text_is_run_as_code(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            assert not FORBIDDEN & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN
        if isinstance(node, ast.Call):
            f = node.func
            called = f.id if isinstance(f, ast.Name) else ""
            assert called not in FORBIDDEN, f"{name(path)}:{node.lineno} calls {called}"
            if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name):
                assert (f.value.id, f.attr) != ("torch", "load"), f"{name(path)}:{node.lineno} calls torch.load"
            for keyword in node.keywords:
                assert keyword.arg not in ("trust_remote_code", "allow_pickle"), f"{name(path)}:{node.lineno}"


@pytest.mark.parametrize("path", OURS, ids=name)
def test_a_fix_says_what_to_change(path):
    assert not re.search(r"; (mend|restore|repair)\b", path.read_text(encoding="utf-8"))


def test_the_readme_counts_the_lines_of_the_course():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)\.py`\]\(minillada/\1\.py\) \| (\d+) \|", readme, re.MULTILINE)
    assert [file for file, _ in rows] == COURSE
    assert all(lines(PACKAGE / f"{file}.py") == int(count) for file, count in rows)


# ---- what is said when something is refused --------------------------------------------------------------------------


def texts(node: ast.expr, known: dict[str, str]) -> str:
    """A text as it stands in the source, with `known` for the names in it and * for every other value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return texts(node.value, known) if node.format_spec is None else "*"
    return known.get(node.id, "*") if isinstance(node, ast.Name) else "*"


def refusals(path: Path) -> list[tuple[int, str]]:
    """Every message of an error of ours, with its line."""
    found = []
    for function in [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef)]:
        known: dict[str, str] = {}
        for node in sorted((n for n in ast.walk(function) if hasattr(n, "lineno")), key=lambda n: n.lineno):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                known[node.targets[0].id] = texts(node.value, known)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("BadInput", "BadLuck"):
                found.append((node.lineno, texts(node.args[0], known)))
    return found


@pytest.mark.parametrize("path", OURS, ids=name)
def test_a_refusal_says_what_was_expected_what_came_and_what_to_change(path):
    for line, message in refusals(path):
        if not re.fullmatch(r"\*+", message.replace("*: *", "*")):  # else its pieces have the form, and are joined here
            assert re.search(r"(^|: |\*)expected .+, got:? .+; .+|^\*, got .+; .+", message), (
                f"{name(path)}:{line}: {message}"
            )
