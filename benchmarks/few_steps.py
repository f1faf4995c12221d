"""Few-step distillation: how many evaluations does an answer need, and where does a student gain?

    python benchmarks/few_steps.py open4       boards with many solutions: a student gains
    python benchmarks/few_steps.py sudoku4     boards with one solution, beside as many steps of plain SFT
    python benchmarks/few_steps.py boards      no question: what is right, and how different it is
    python benchmarks/few_steps.py text        the third sentence of tales: likelihood under the autoregressive twin

A teacher learns boards in 900 steps of SFT; students go on from it for 400 (docs/few_steps.md). The teacher of `text`
is the shipped `tales`. Trainings are kept under --runs, and one that is there is not repeated. Results are added to
--out, seed by seed; --draw makes a picture of those of open4. One thread; seconds are the processor's.
"""

import json
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from curves import clock
from torch import Generator

from minillada.commands.cli import Parser, run
from minillada.errors import check_one_of, check_whole
from minillada.files import write_file, write_json
from minillada.measure.twin import twin_log_likelihoods
from minillada.sampler import Canvas, SampleConfig, stream
from minillada.text.tales import tales
from minillada.text.tasks import Example, Task, make_task, solutions, write_task
from minillada.text.tokenizer import Tokenizer
from minillada.training.config import CONFIGS, TrainConfig
from minillada.training.making import make_model
from minillada.training.run import train
from minillada.weights.checkpoint import load, save
from minillada.weights.shipped import shipped

SIZE = {"n_layer": 3, "n_head": 4, "d_model": 96, "d_ff": 256, "rope_theta": 100.0}
TOKENS = 17  # of an answer: sixteen cells and the end of text
WAYS = {str(steps): {"steps": steps} for steps in (1, 2, 4, 8, TOKENS)}  # to write an answer
WAYS |= {f"threshold:{p}": {"commit": f"threshold:{p}"} for p in (0.5, 0.7, 0.9)}
STUDENTS: dict[str, dict] = {  # what goes on from the teacher
    "SFT": {"objective": "sft"},
    "jump": {"objective": "distil"},
    "certainty": {"objective": "distil", "certainty": 2.0},
    "consistency": {"objective": "distil", "consistency": 1.0},
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
    return learned(out, f"{name}-{seed}", {**recipe, **where})


# ---- measuring


def write(
    where: Path, prompts: Sequence[str], length: int = TOKENS, steps: int | None = None, **how: object
) -> tuple[list[str], float]:
    """Return what a model answers, and the mean number of evaluations of an answer: those that wrote a token of it."""
    model, tokenizer = load(where)
    canvas = Canvas.continuation(tokenizer.encode_batch(prompts), length, model.config)
    config = SampleConfig(length, steps or length, length, **how)
    count = torch.zeros(len(canvas.x))
    for step in stream(model, canvas, config):
        count += step.committed.any(1)
    answers = canvas.answers(step.x, config, model.config)
    return [tokenizer.decode(answer) for answer in answers], count.mean().item()


def aup(points: Sequence[tuple[float, float]], best: float, alpha: float = 3.0, drop: float = 5.0) -> float:
    """Return d3LLM's accuracy under parallelism (arXiv:2601.07568) of points (tokens per evaluation, accuracy in %):
    the area under them, where an accuracy y counts y exp(-alpha (1 - y / best)). What lies left of the first point
    counts whole; points more than `drop` below the first, or no better than one further right, are left out."""
    points = sorted(points)
    front = [(x, y) for x, y in points if all(y > other for right, other in points if right > x)]
    front = [(x, y) for x, y in front if y >= front[0][1] - drop]
    worth = [(x, y * math.exp(-alpha * (1 - y / best))) for x, y in front]
    return front[0][0] * front[0][1] + sum((b - a) * (y + z) / 2 for (a, y), (b, z) in pairwise(worth))


def graded(where: Path, task: Task, examples: Sequence[Example]) -> dict[str, list[float]]:
    """Return for each way to write: evaluations of an answer, % right."""
    found = {}
    for name, how in WAYS.items():
        texts, evaluations = write(where, [example.prompt for example in examples], **how)
        right = 100 * fmean(task.check(example, text) for example, text in zip(examples, texts, strict=True))
        found[name] = [round(evaluations, 2), round(right, 1)]
    return found


def measure_task(args: Namespace, name: str, seed: int) -> dict:
    """open4, sudoku4: how much is right in few evaluations. Of open4, "clues" are new questions about known boards."""
    out, task = args.runs / name, make_task(name, 8192, n_test=2 * args.questions)
    runs = {"teacher": teach(out, task, "\n.=1234", seed)}
    for student in args.students or (("jump",) if name == "open4" else ("SFT", "jump")):
        runs[student] = follow_teacher(out, task, student, runs["teacher"], seed)
    seconds = {who: json.loads(path.with_suffix(".json").read_text())["seconds"] for who, path in runs.items()}
    found: dict = {"seconds": seconds}
    for kind in sorted({example.kind for example in task.test}):
        examples = [example for example in task.test if example.kind == kind][: args.questions]
        models = {who: graded(path, task, examples) for who, path in runs.items()}
        best = max(right for ways in models.values() for _, right in ways.values()) or 1.0
        for ways in models.values():
            points = [(TOKENS / n, right) for n, right in ways.values()]
            ways["AUP"], ways["area"] = round(aup(points, best)), round(aup(points, best, drop=math.inf))
        found[kind or "new boards"] = models
    return found


def measure_boards(args: Namespace, name: str, seed: int, n: int = 500) -> dict:
    """boards: every question is "=", and each of the 288 boards is right. Return, of n boards written at temperature 1
    in each number of evaluations, % right, and how many different right ones there are."""
    answers = ["".join(map(str, board)) for board in solutions([0] * 16, 2)]
    task = Task(name, [Example("=", answer) for answer in answers * 4], [], lambda example, text: 0.0)
    runs = {"teacher": teach(args.runs / name, task, "\n.=1234", seed)}
    runs["jump"] = follow_teacher(args.runs / name, task, "jump", runs["teacher"], seed)
    found: dict = {}
    for who, where in runs.items():
        for steps in (2, 4, TOKENS):
            texts, _ = write(where, ["="] * n, steps=steps, temperature=1.0)
            right = [text for text in texts if text in answers]
            found.setdefault(who, {})[str(steps)] = [round(100 * len(right) / n, 1), len(set(right))]
    return found


def sentences(seed: int, n: int) -> list[dict]:
    """Return the first two sentences of tales as prompts, and the third as answer."""
    cut = [text.replace('." ', ".” ").split(". ", 3) for text in tales(seed, n)]
    return [{"prompt": f"{a}. {b}.", "answer": f" {c}.".replace("”", '"')} for a, b, c, *_ in cut]


def measure_text(args: Namespace, name: str, seed: int, n: int = 128, length: int = 24) -> dict:
    """text: of n continuations of `length` tokens at temperature 1, nats a token under the autoregressive twin, and the
    % of their groups of three tokens that are different from each other."""
    out, data, teacher = args.runs / name, args.runs / name / "train.jsonl", shipped("tales")
    write_file(data, (f"{json.dumps(row)}\n".encode() for row in sentences(11, 640)))
    recipe = {**STUDENTS["jump"], "steps": 100, "batch_size": 16, "lr": 0.003, "adam_lr": 0.001, "seed": seed}
    jump = learned(out, f"jump-{seed}", {**recipe, "start": str(teacher), "data": str(data)})
    twin, tokenizer = load(shipped("tales-ar"))
    prompts, found = [row["prompt"] for row in sentences(12, n)], {}
    for who, where in (("teacher", teacher), ("jump", jump)):
        for steps in (length, 8, 4, 2):
            texts, _ = write(where, prompts, length, steps, temperature=1.0, stop_at_eos=False)
            encoded = tokenizer.encode_batch(prompts), tokenizer.encode_batch(texts)
            pairs = [([twin.config.eos_id, *prompt], answer) for prompt, answer in zip(*encoded, strict=True)]
            nats, size = -twin_log_likelihoods(twin, pairs).sum().item(), sum(len(answer) for _, answer in pairs)
            threes = [three for _, a in pairs for three in zip(a, a[1:], a[2:], strict=False)]
            shares = [round(nats / size, 3), round(100 * len(set(threes)) / len(threes), 1)]
            found.setdefault(who, {})[str(steps)] = shares
    return found


def draw(results: dict, path: Path) -> None:
    """Draw how much is right by the number of evaluations: of open4's new clues, the mean of all seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="evaluations of the model for an answer of 17 tokens", ylabel="boards solved, %")
    for who, colour in (("teacher", "tab:gray"), ("jump", "tab:blue")):
        for told, line in (("as many tokens each", "o-"), ("threshold", "s--")):
            ways = [way for way in WAYS if (":" in way) == (told == "threshold")]
            seeds = [[seed["clues"][who][way] for way in ways] for seed in results.values()]
            points = [[fmean(values) for values in zip(*of_way, strict=True)] for of_way in zip(*seeds, strict=True)]
            axes.plot(*zip(*points, strict=True), line, color=colour, label=f"{who}, {told}")
    axes.set(xscale="log", ylim=(0, 102))
    axes.set_xticks([1, 2, 4, 8, TOKENS], ["1", "2", "4", "8", str(TOKENS)])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


EXPERIMENTS: dict[str, Callable[[Namespace, str, int], dict]] = {
    "open4": measure_task, "sudoku4": measure_task, "boards": measure_boards, "text": measure_text,
}  # fmt: skip


def main() -> None:
    p = Parser(__doc__.split("\n")[0], "\n".join(__doc__.split("\n")[2:6]))
    p.add_argument("what", help=", ".join(EXPERIMENTS))
    p.add_argument("--out", type=Path, default=Path("few_steps.json"), help="where results are added (JSON)")
    p.add_argument("--seeds", type=int, default=3, help="teachers, each with its students (default: 3)")
    p.add_argument("--first", type=int, default=0, help="number of the first of them (default: 0)")
    p.add_argument("--runs", type=Path, default=Path("runs/few_steps"), help="where trainings are kept")
    p.add_argument("--questions", type=int, default=500, help="of each kind (default: 500)")
    p.add_argument("--students", nargs="+", choices=STUDENTS, help="of open4 and sudoku4 (default: jump; SFT too)")
    p.add_argument("--draw", type=Path, metavar="PNG", help="open4: a picture of the results in --out")
    args = p.parse_args()
    check_one_of("what", args.what, EXPERIMENTS)
    check_whole("seeds", args.seeds, 1)
    torch.set_num_threads(1)
    for seed in range(args.first, args.first + args.seeds):
        found = EXPERIMENTS[args.what](args, args.what, seed)
        results = json.loads(args.out.read_text()) if args.out.exists() else {}
        results.setdefault(args.what, {})[str(seed)] = found
        write_json(args.out, results)
        print(json.dumps({args.what: {seed: found}}), flush=True)
    if args.draw and "open4" in results:
        draw(results["open4"], args.draw)


if __name__ == "__main__":
    run(main)
