"""Learning from rewards: what does a model gain at 4 evaluations, when its own right answers are all it sees?

    python benchmarks/rewards.py open4         boards with many solutions
    python benchmarks/rewards.py countdown     numbers and a target

Teachers are those of few_steps.py: 900 steps of SFT, one for each seed. Each algorithm of training/rewards.py goes on
from them, by rollouts of 4 evaluations (JustGRPO's are left to right). Trainings are kept under --runs, and one that is
there is not repeated; docs/rewards.json has the results. With one thread, time is the processor's.
"""

import json
from pathlib import Path
from statistics import fmean

import torch
from few_steps import learned, teach

from minillada.commands.cli import Parser, run
from minillada.errors import check_one_of, check_whole
from minillada.files import write_json
from minillada.sampler import SampleConfig, generate
from minillada.text.tasks import make_task
from minillada.weights.checkpoint import load

EVALUATIONS = {"open4": (1, 2, 4, 17), "countdown": (1, 2, 4, 8)}  # the last: a token each
CHARACTERS = {"open4": "\n.=1234", "countdown": "\n0123456789,:=+-*/()"}
LEARNERS: dict[str, dict] = {  # fields of RewardConfig
    "rejection": {},
    "wd1": {"algorithm": "wd1"},
    "diffu-grpo": {"algorithm": "diffu-grpo"},
    "just-grpo": {"algorithm": "just-grpo", "batch_size": 32, "steps": 40},  # a row for each token of an answer
}


def measure(where: Path, name: str, questions: int) -> dict:
    """Return [evaluations, % right] of new questions, at temperature 0, and what the log told at both ends."""
    model, tokenizer = load(where)
    task = make_task(name, 0, n_test=2 * questions)
    examples = [example for example in task.test if example.kind in ("", "clues")][:questions]
    prompts, length, found = tokenizer.encode_batch([example.prompt for example in examples]), EVALUATIONS[name][-1], []
    for steps in EVALUATIONS[name]:
        answers = generate(model, prompts, SampleConfig(length, steps, length))
        right = fmean(map(task.check, examples, map(tokenizer.decode, answers)))
        found.append([steps, round(100 * right, 1)])
    trained = json.loads(where.with_suffix(".json").read_text())
    log = [json.loads(line) for line in (where / "log.jsonl").read_text().splitlines()]
    told = {key: [round(log[i][key], 3) for i in (0, -1)] for key in ("reward", "mixed", "distinct", "agreement")
            if key in log[0]}  # fmt: skip
    return {"evaluations": found, **trained, **told}


def main() -> None:
    p = Parser(__doc__.split("\n")[0], "\n".join(__doc__.split("\n")[2:4]))
    p.add_argument("what", help=", ".join(EVALUATIONS))
    p.add_argument("--out", type=Path, default=Path("rewards.json"), help="where results are added (JSON)")
    p.add_argument("--seeds", type=int, default=3, help="teachers, each with its learners (default: 3)")
    p.add_argument("--runs", type=Path, default=Path("runs/few_steps"), help="where trainings are kept")
    p.add_argument("--questions", type=int, default=500, help="of the test (default: 500)")
    p.add_argument("--only", nargs="+", default=list(LEARNERS), help=f"some of {', '.join(LEARNERS)}")
    args = p.parse_args()
    check_one_of("what", args.what, EVALUATIONS)
    check_whole("seeds", args.seeds, 1)
    out, task, results = args.runs / args.what, make_task(args.what, 8192), {}
    for seed in range(args.seeds):
        runs = {"teacher": teach(out, task, CHARACTERS[args.what], seed)}
        for name in args.only:
            config = {"objective": "reward", "data": args.what, "start": str(runs["teacher"]), "seed": seed}
            runs[name] = learned(out, f"{name}-{seed}", {**config, **LEARNERS[name]})
        for who, where in runs.items():
            results.setdefault(who, []).append(measure(where, args.what, args.questions))
            print(f"{args.what} {who} {seed}: {results[who][-1]}", flush=True)
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    write_json(args.out, {**done, args.what: {"threads": torch.get_num_threads(), **results}})


if __name__ == "__main__":
    run(main)
