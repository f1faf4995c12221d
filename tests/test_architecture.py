"""The rules of the house, read off the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for path in ROOT.rglob("*.py") if not {".venv", "build", "tests"} & set(path.relative_to(ROOT).parts)
)
TABLE = re.findall(r"^\| (\d+) \| `([\w/]+\.py)` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
FLOORS = {path: int(floor) for floor, path in TABLE}
FORBIDDEN = {"eval", "exec", "compile", "__import__", "pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """The files of this project that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("minillada")):
            module = (node.module or "").removeprefix("minillada").strip(".")
            found |= {module} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("minillada.") for a in node.names if a.name.startswith("minillada.")}
    return {f"minillada/{module}.py" for module in found if (ROOT / f"minillada/{module}.py").exists()}


@pytest.mark.parametrize("path", [p for p in SOURCES if name(p) in FLOORS], ids=name)
def test_a_file_imports_only_from_lower_floors(path):
    above = {other for other in imports(path) if FLOORS[other] >= FLOORS[name(path)]}
    assert not above


def test_the_table_of_floors_names_every_file_and_no_other():
    files = {name(p) for p in SOURCES if p.parent == ROOT or p.parent.name == "minillada"}
    assert set(FLOORS) == files - {"minillada/__init__.py"}


def test_the_five_files_to_read_stay_under_1100_lines():
    five = ("model", "diffusion", "strategies", "sampler", "train")
    assert sum(len((ROOT / f"minillada/{n}.py").read_text().splitlines()) for n in five) < 1100


@pytest.mark.parametrize("script", ["train_tiny.py", "sample.py", "load_8b.py"])
def test_a_script_stays_under_120_lines(script):
    assert len((ROOT / script).read_text().splitlines()) < 120


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_unpickled_and_no_text_is_run_as_code(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


def test_the_readme_counts_the_lines_of_the_five_files():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(minillada/\1\) \| (\d+) \|", readme, re.MULTILINE)
    counts = {n: len((ROOT / "minillada" / n).read_text(encoding="utf-8").splitlines()) for n, _ in rows}
    assert len(rows) == 5 and counts == {n: int(count) for n, count in rows}
    assert f"{sum(counts.values()):,} lines in one sitting" in readme
