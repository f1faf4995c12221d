"""Few-step distillation: how many evaluations does an answer need, and where does a student gain?

    python benchmarks/few_steps.py open4       boards with many solutions, where a student gains
    python benchmarks/few_steps.py sudoku4     boards with one solution, where more SFT does as well
    python benchmarks/few_steps.py boards      boards without a question, where a student loses its variety

A teacher learns a task in 900 steps of SFT; students go on for 400: by distillation (`jump`, and with the certainty
term), and by plain SFT, for comparison. Each writes the answers of the test in a given number of evaluations, and by
confidence threshold. Students of a seed share the teacher of that seed. Trainings are kept under --out, and one that
is there is not repeated; docs/few_steps.json has all results. With one thread, time is the processor's.
"""

import json
import math
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from curves import clock
from torch import Generator

from minillada.commands.cli import Parser, run
from minillada.errors import check_one_of, check_whole
from minillada.files import write_json
from minillada.model import LLaDA
from minillada.sampler import Canvas, SampleConfig, stream
from minillada.text.tasks import Example, Task, make_task, solutions, write_task
from minillada.text.tokenizer import Tokenizer
from minillada.training.config import CONFIGS, TrainConfig
from minillada.training.making import make_model
from minillada.training.run import train
from minillada.weights.checkpoint import load, save

SIZE = {"n_layer": 3, "n_head": 4, "d_model": 96, "d_ff": 256, "rope_theta": 100.0}
TOKENS = 17  # of an answer: sixteen cells and the end of text
EVALUATIONS = (1, 2, 3, 4, 6, 8, TOKENS)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
STUDENTS: dict[str, dict] = {  # what goes on from the teacher
    "SFT": {"objective": "sft"},
    "jump": {"objective": "distil"},
    "jump + certainty": {"objective": "distil", "certainty": 0.5},
}


# ---- training


def learned(out: Path, name: str, config: dict) -> Path:
    """Train, unless that was done before; return the run. What it took stands beside it."""
    if not (done := out / f"{name}.json").exists():
        kind, start = CONFIGS[config["objective"]], clock()
        given = {field: value for field, value in config.items() if field != "objective"}
        steps = kind(**given, precision="float32", eval_every=10**6, out=str(out / name))
        (*_, last) = train(steps)
        write_json(done, {"seconds": round(clock() - start, 1), "steps": last.step, "held out": last.bound})
    print(f"{name}: {json.loads(done.read_text())}", flush=True)
    return out / name


def teach(out: Path, task: Task, characters: str, seed: int = 0, steps: int = 900) -> Path:
    """Train a teacher of a task, from random weights; return its run. The task's files stand in out/TASK."""
    begun, data = out / f"begin-{seed}", out / task.name
    if not data.exists():
        write_task(task, data)
    if not begun.exists():
        tokenizer = Tokenizer.characters([characters])
        config = TrainConfig(model=SIZE, tokenizer="characters", length=64)
        save(make_model(config, tokenizer, Generator().manual_seed(seed)), begun, tokenizer)
    recipe = {"objective": "sft", "steps": steps, "batch_size": 64, "lr": 0.01, "adam_lr": 0.003, "seed": seed}
    return learned(out, f"teacher-{seed}", {**recipe, "start": str(begun), "data": str(data / "train.jsonl")})


def follow_teacher(out: Path, task: Task, name: str, teacher: Path, seed: int = 0, steps: int = 400) -> Path:
    """Train one of STUDENTS; return its run."""
    recipe = {"steps": steps, "batch_size": 64, "lr": 0.003, "adam_lr": 0.001, "seed": seed, **STUDENTS[name]}
    where = {"start": str(teacher), "data": str(out / task.name / "train.jsonl")}
    return learned(out, f"{name.replace(' + ', '-')}-{seed}", {**recipe, **where})


# ---- measuring


def write(
    model: LLaDA, tokenizer: Tokenizer, prompts: Sequence[str], steps: int = TOKENS, seed: int = 0, **how: object
) -> tuple[list[str], float]:
    """Return what a model answers, and the mean number of evaluations of an answer: those that wrote a token of it."""
    config = SampleConfig(TOKENS, steps, TOKENS, **how)
    texts, evaluations = [], []
    for first in range(0, len(prompts), 100):
        canvas = Canvas.continuation(tokenizer.encode_batch(prompts[first : first + 100]), TOKENS, model.config)
        count = torch.zeros(len(canvas.x), dtype=torch.long)
        for step in stream(model, canvas, config, seed + first):
            count += step.committed.any(1)
        texts += [tokenizer.decode(answer) for answer in canvas.answers(step.x, config, model.config)]
        evaluations += count.tolist()
    return texts, fmean(evaluations)


def aup(points: Sequence[tuple[float, float]], best: float, alpha: float = 3.0, drop: float = 5.0) -> float:
    """Return d3LLM's accuracy under parallelism (arXiv:2601.07568) of points (tokens per evaluation, accuracy in %):
    the area under them, in which an accuracy y counts exp(-alpha (1 - y / best)). It begins with all that is left of
    the first point; points whose accuracy is more than `drop` below the first one's are left out."""
    points = sorted(points)
    points = [(tokens, y) for tokens, y in points if y >= points[0][1] - drop]
    value = lambda y: y * min(math.exp(-alpha * (1 - y / best)), 1.0)
    area = points[0][0] * points[0][1]
    for (left, low), (right, high) in pairwise(points):
        area += (right - left) * (value(low) + value(high)) / 2
    return area


def right(task: Task, examples: Sequence[Example], texts: Sequence[str]) -> float:
    return 100 * fmean(task.check(example, text) for example, text in zip(examples, texts, strict=True))


def curve(where: Path, task: Task, examples: Sequence[Example]) -> dict:
    """Measure % right: {"evaluations": [[given, % right]], "thresholds": [[threshold, evaluations, % right]]}."""
    model, tokenizer = load(where)
    prompts, found = [example.prompt for example in examples], {"evaluations": [], "thresholds": []}
    for steps in EVALUATIONS:
        texts, _ = write(model, tokenizer, prompts, steps)
        found["evaluations"].append([steps, round(right(task, examples, texts), 1)])
    for threshold in THRESHOLDS:
        texts, evaluations = write(model, tokenizer, prompts, commit=f"threshold:{threshold}")
        found["thresholds"].append([threshold, round(evaluations, 2), round(right(task, examples, texts), 1)])
    return found


def add_aup(models: dict[str, dict]) -> None:
    """Add AUP to curves: of given numbers of evaluations, and of thresholds; the best accuracy is that of them all."""
    points = {
        (name, how): [(TOKENS / row[-2], row[-1]) for row in found[how]]
        for name, found in models.items()
        for how in ("evaluations", "thresholds")
    }
    best = max(y for found in points.values() for _, y in found)
    for (name, how), found in points.items():
        models[name][f"aup of {how}"] = round(aup(found, best))


def measure_boards(args: Namespace, name: str) -> dict:
    """open4, sudoku4: curves of teacher and students, a seed each; "clues" are new questions about known boards."""
    task = make_task(name, 8192, n_test=2 * args.questions)
    kinds = sorted({example.kind for example in task.test}, reverse=True)  # clues before boards
    results: dict = {}
    for seed in range(args.seeds):
        out = args.runs / name
        runs = {"teacher": teach(out, task, "\n.=1234", seed, args.teacher_steps)}
        runs |= {s: follow_teacher(out, task, s, runs["teacher"], seed, args.steps) for s in STUDENTS}
        for kind in kinds:
            examples = [example for example in task.test if example.kind == kind][: args.questions]
            models = {who: curve(where, task, examples) for who, where in runs.items()}
            add_aup(models)
            for who, found in models.items():
                trained = json.loads(runs[who].with_suffix(".json").read_text()) if runs[who] else {}
                results.setdefault(kind or "boards", {}).setdefault(who, []).append({**found, "training": trained})
                print(f"{name} {kind} {who} {seed}: {found}", flush=True)
    return results


def measure_variety(args: Namespace, name: str) -> dict:
    """boards: every question is the same, "=", and every board is right. How many boards of 500 are right, and how
    many different right ones there are, at temperature 1."""
    answers = ["".join(map(str, board)) for board in solutions([0] * 16, 2)]
    examples = [Example("=", answer) for answer in answers * 4]
    task = Task(name, examples, [], lambda example, text: float(text in answers))
    results: dict = {}
    for seed in range(args.seeds):
        out = args.runs / name
        runs = {"teacher": teach(out, task, "\n.=1234", seed, args.teacher_steps)}
        runs |= {s: follow_teacher(out, task, s, runs["teacher"], seed, args.steps) for s in STUDENTS}
        for who, where in runs.items():
            model, tokenizer = load(where)
            rows = []
            for steps in EVALUATIONS:
                texts, _ = write(model, tokenizer, ["="] * 500, steps, temperature=1.0, remasking="random")
                found = Counter(text for text in texts if text in answers)
                rows.append([steps, round(100 * found.total() / len(texts), 1), len(found)])
            results.setdefault(who, []).append({"evaluations, % right, different boards": rows})
            print(f"{name} {who} {seed}: {rows}", flush=True)
    return results


EXPERIMENTS: dict[str, Callable[[Namespace, str], dict]] = {
    "open4": measure_boards, "sudoku4": measure_boards, "boards": measure_variety,
}  # fmt: skip


def main() -> None:
    p = Parser(__doc__.split("\n")[0], "\n".join(__doc__.split("\n")[2:5]))
    p.add_argument("what", help=", ".join(EXPERIMENTS))
    p.add_argument("--out", type=Path, default=Path("few_steps.json"), help="where results are added (JSON)")
    p.add_argument("--seeds", type=int, default=3, help="teachers, each with its students (default: 3)")
    p.add_argument("--runs", type=Path, default=Path("runs/few_steps"), help="where trainings are kept")
    p.add_argument("--questions", type=int, default=500, help="of each kind (default: 500)")
    p.add_argument("--teacher-steps", type=int, default=900)
    p.add_argument("--steps", type=int, default=400, help="of each student (default: 400)")
    args = p.parse_args()
    check_one_of("what", args.what, EXPERIMENTS)
    check_whole("seeds", args.seeds, 1)
    found = EXPERIMENTS[args.what](args, args.what)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    write_json(args.out, {**results, args.what: {"threads": torch.get_num_threads(), **found}})


if __name__ == "__main__":
    run(main)
