"""What the notebooks share: trained models to look at, and the look of the pictures.

    from course import run
    model, tokenizer = minillada.load(run("docs"))

`python notebooks/course.py` trains every model of the course, a few minutes each: that is `make course-runs`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import matplotlib

from minillada import TrainConfig, train
from minillada.commands import cli
from minillada.errors import check_one_of
from minillada.text.corpora import cache_dir
from minillada.training.run import RunStep
from minillada.weights.shipped import shipped

ROOT = Path(__file__).resolve().parents[1]
Step = TypeVar("Step")
RUNS = Path(os.environ.get("MINILLADA_COURSE") or ROOT / "runs" / "course")
sys.path.append(str(ROOT / "benchmarks"))  # the notebooks import from there too: `from experts import shares`

# The models of the course: name -> fields of TrainConfig.
TABLE: dict[str, dict] = {
    "docs": {},  # the default recipe
    "tales": {"data": "tales"},
    "experts": {"preset": "tiny-moe", "steps": 1000},
    "experts-unbalanced": {"preset": "tiny-moe", "steps": 1000, "balance": 0.0},
}
# What benchmarks train and measure, for an hour: the file that is there when all is done -> the command.
MADE: dict[str, list[str]] = {
    "facts-twin.json": ["versus.py", "reversal", "--out", str(RUNS), "--json", str(RUNS / "versus.json")],
    "sudoku-twin.json": ["versus.py", "sudoku", "--out", str(RUNS), "--json", str(RUNS / "versus.json")],
    "assistant/results.json": ["preference.py", "learn", "--out", str(RUNS / "assistant")],
    "seeing/results.json": ["seeing.py", "--out", str(RUNS / "seeing")],
}
# What stands in for one that is not trained yet.
BRIEF = {"steps": 60, "eval_every": 60, "rows": "windows", "tokenizer": "bpe:512", "precision": "float32"}

matplotlib.rcParams |= {"figure.figsize": (6, 3.2), "figure.dpi": 110, "figure.constrained_layout.use": True}
matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
matplotlib.rcParams |= {"axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.92", "axes.axisbelow": True}


def run(name: str) -> Path:
    """Return where a trained model is, and print which, unless it is the course's own.

    The first that is there of: runs/course/NAME, a finished run of `make demo`, the model that comes with the package;
    else a short version, trained now for some seconds and kept. Raises BadInput for a name that is not in the table.
    """
    if (RUNS / name).is_dir():
        return RUNS / name
    check_one_of("run", name, TABLE)
    config = TrainConfig(**TABLE[name])
    if demo := finished(config):
        print(f"{name}: the run {demo.name}, since there is no runs/course/{name}")
        return demo
    if ready := shipped(name):
        print(f"{name}: the model that comes with the package, since there is no runs/course/{name}")
        return ready
    brief = TrainConfig(**TABLE[name] | BRIEF)
    steps = f"{brief.steps} steps in place of {config.steps:,}"
    print(f"{name}: a short version, {steps}; `make course-runs` makes the real one, runs/course/{name}")
    where = stand_ins() / f"{name}-{sha256(repr(brief).encode()).hexdigest()[:8]}"
    if not where.is_dir():
        list(make(brief, where))
    return where


def finished(config: TrainConfig) -> Path | None:
    """Return the newest run in runs/ that learned the same text in the same way, for half as many steps or more."""
    for path in sorted(RUNS.parent.glob("*/run.json"), key=os.path.getmtime, reverse=True):
        found, log = json.loads(path.read_text()), path.with_name("log.jsonl")
        alike = all(found.get(name) == getattr(config, name) for name in ("objective", "data", "preset", "balance"))
        lines = log.read_text().splitlines() if alike and log.exists() else []
        if lines and json.loads(lines[-1])["step"] >= config.steps / 2:
            return path.parent
    return None


def stand_ins() -> Path:
    """Return where short versions are kept."""
    return cache_dir() / "course"


def is_real(*paths: Path) -> bool:
    """Return whether all of these are trained models, and none is a short version that stands in for one."""
    return not any(path.is_relative_to(stand_ins()) for path in paths)


def last(steps: Iterator[Step]) -> Step:
    """Take all steps, and return the last one."""
    (*_, step) = steps
    return step


def triples(text: str) -> list[tuple[str, ...]]:
    """Return every three neighbouring words of a text, to see whether another text has them too."""
    words = text.split()
    return list(zip(words, words[1:], words[2:], strict=False))


def make(config: TrainConfig, where: Path) -> Iterator[RunStep]:
    """Train, yielding every step. The directory `where` is there when the last step is done, or not at all."""
    where.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=where.parent, prefix=".") as draft:
        yield from train(replace(config, out=f"{draft}/run"))
        os.replace(Path(draft) / "run", where)


def main() -> None:
    """Train what is not there yet, and show how it goes."""
    for name, fields in TABLE.items():
        if (RUNS / name).is_dir():
            print(f"{name}: is there")
            continue
        for step in make(TrainConfig(**fields), RUNS / name):
            if step.bound is not None:
                done = f"step {step.step:,} of {step.config.steps:,}"
                print(f"{name}: {done}, {step.config.units(step.bound)}", flush=True)
    for last, (script, *options) in MADE.items():
        if (RUNS / last).is_file():
            print(f"{last}: is there")
        else:
            subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *options], check=True)


if __name__ == "__main__":
    cli.run(main)
