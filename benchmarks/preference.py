"""SFT and VRPO on tasks whose answers are known: how noisy a score is, and what either teaches.

    python benchmarks/preference.py variance                         how the score's variance falls, a minute
    python benchmarks/preference.py learn --out runs/assistant       pre-training, SFT and VRPO, about 40 minutes

`variance`: two versions of a model and pairs of answers; each estimate of a score costs as many evaluations as it says.
`learn`: a tiny model pre-trained on Python's reference is taught to add two numbers of two digits (sums of the test are
held out by unordered pair), then to answer in two styles, then, by preference, to use the shorter one. VRPO against
naive DPO with the same number of evaluations, three seeds each. OUT/results.json holds all numbers.
"""

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Generator, Tensor, nn

from minillada.commands.cli import Parser, run
from minillada.errors import check_one_of
from minillada.files import write_json
from minillada.sampler import SampleConfig, generate
from minillada.text.tasks import Example, make_task, write_task
from minillada.text.tokenizer import Tokenizer
from minillada.training.config import CONFIGS, TrainConfig, VRPOConfig
from minillada.training.run import train
from minillada.training.sft import Item
from minillada.training.vrpo import VRPO, scores
from minillada.weights.checkpoint import load

# How many levels, masks at each, and whether model and reference share them -> the paper's variance (arXiv:2505.19223)
ESTIMATES: dict[str, tuple[dict, str]] = {
    "1 level": ({"samples": 1}, "44.0"),
    "4 levels": ({"samples": 4}, "2.2"),
    "8 levels": ({"samples": 8}, "1.0"),
    "1 level, 4 masks": ({"samples": 1, "masks": 4}, "7.3"),
    "2 levels, 2 masks": ({"samples": 2, "masks": 2}, "4.7"),
    "4 levels, not shared": ({"samples": 4, "shared": False}, "2183.7"),
}


# ---- the variance of a score


def versions(seconds: float) -> tuple[nn.Module, nn.Module, Tokenizer]:
    """A model that has learned tales for a while, and the same some steps later; the earlier one is the reference."""
    kept = None
    config = TrainConfig(data="tales", preset="nano", length=128, minutes=seconds / 60, precision="float32")
    for step in train(config):
        if kept is None and step.seconds > 0.8 * seconds:
            kept = {name: p.clone() for name, p in step.model.state_dict().items()}
    reference = type(step.model)(step.model.config)
    reference.load_state_dict(kept)
    return step.model, reference, step.tokenizer


def pairs_of_tales(tokenizer: Tokenizer, n: int) -> list[Item]:
    """A tale's first sentence, how it goes on, and how another one does, 32 tokens each."""
    found = make_task("tales", 0, n_test=2 * n).test
    encode = lambda example, answer: (tokenizer.encode(example.prompt), tokenizer.encode(answer)[:32])
    both = zip(found[:n], found[n:], strict=True)
    return [[encode(one, one.answer), encode(one, other.answer)] for one, other in both]


@torch.no_grad()
def sampled(model: nn.Module, reference: nn.Module, item: Item, config: VRPOConfig, stratified: bool, n: int) -> Tensor:
    """n estimates (n,) of an item's score."""
    size, rng = 50, Generator().manual_seed(0)
    vrpo = VRPO(None, replace(config, precision="float32"), model.config.mask_id, reference, stratified)
    drawn = (vrpo.draw([item] * size, rng) for _ in range(n // size))
    return torch.cat([scores(*vrpo.bounds(model, batch, torch.arange(size))) for batch in drawn]).double()


def variance(args: Namespace) -> None:
    model, reference, tokenizer = versions(args.seconds)
    items = pairs_of_tales(tokenizer, args.pairs)
    print(f"{args.pairs} pairs of answers of 32 tokens, {args.repetitions} estimates of each score\n")
    print("| Estimate | variance, levels independent | stratified | paper |\n|---|---|---|---|")
    for name, (changes, paper) in ESTIMATES.items():
        config = VRPOConfig(start="tales", data="tales", **changes)
        row = [
            fmean(sampled(model, reference, item, config, stratified, args.repetitions).var().item() for item in items)
            for stratified in (False, True)
        ]
        print(f"| {name} | {row[0]:.2f} | {row[1]:.2f} | {paper} |", flush=True)


# ---- what is learned

LONG = "The sum is {}."  # the style that is to be unlearned
METHODS: dict[str, dict] = {
    "VRPO": {"samples": 8, "masks": 1, "shared": True},
    "naive DPO": {"samples": 1, "masks": 8, "shared": False},
}


def measure(directory: Path, questions: list[Example], temperature: float, longest: str = LONG, seed: int = 0) -> dict:
    """Shares of questions: "exact", the answer alone; "right", its number; "short", in the short style; "ended", with
    an end of text. And the mean "length" of an answer in characters. longest: what the canvas has room for."""
    model, tokenizer = load(directory)
    width = len(tokenizer.encode(longest.format(100))) + 1
    config = SampleConfig(width, width, width, temperature=temperature, stop_at_eos=False,
                          remasking="low_confidence" if temperature == 0 else "random")  # fmt: skip
    found = {name: [] for name in ("exact", "right", "short", "ended", "length")}
    for first in range(0, len(questions), 50):
        batch = questions[first : first + 50]
        rows = generate(model, [tokenizer.encode(example.prompt) for example in batch], config, seed)
        for example, row in zip(batch, rows, strict=True):
            text = tokenizer.decode(row[: row.index(model.config.eos_id)] if model.config.eos_id in row else row)
            number = re.search(r"\d+", text)
            found["exact"].append(text == example.answer)
            found["right"].append(number is not None and number[0] == example.answer)
            found["short"].append(re.fullmatch(r"\d+", text) is not None)
            found["ended"].append(model.config.eos_id in row)
            found["length"].append(len(text))
    return {name: fmean(values) for name, values in found.items()}


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def learned(out: Path, name: str, config: dict) -> Path:
    """Train, or finish what was begun, unless that was done before."""
    if not (done := out / f"{name}.json").exists():
        begun = (out / name / "run.json").exists()
        kind = CONFIGS[config.pop("objective", "pretrain")]
        (*_, last) = train(resume=out / name) if begun else train(kind(**config, out=str(out / name)))
        write_json(done, {"seconds": last.seconds, "bound": last.bound, "steps": last.step})
    print(f"{name}: {json.loads(done.read_text())}", flush=True)
    return out / name


def learn(args: Namespace) -> None:
    out, steps = args.out, lambda n: max(2, round(args.share * n))
    out.mkdir(parents=True, exist_ok=True)
    task = make_task("addition", 20_000, n_test=args.questions)
    if not (out / "addition").exists():
        write_task(task, out / "addition")
    styles = [{"prompt": e.prompt, "answer": ("{}", LONG)[i % 2].format(e.answer)} for i, e in enumerate(task.train)]
    pairs = [{"prompt": e.prompt, "chosen": e.answer, "rejected": LONG.format(e.answer)} for e in task.train[:4000]]
    pre = learned(out, "pretrained", {"tokenizer": "bytes", "steps": steps(2000)})
    tuned = {"objective": "sft", "batch_size": 128}
    sft = learned(out, "sft", {**tuned, "start": str(pre), "data": str(out / "addition" / "train.jsonl"),
                               "steps": steps(3000)})  # fmt: skip
    both = learned(out, "styles", {**tuned, "start": str(sft), "data": write_lines(out / "styles.jsonl", styles),
                                   "steps": steps(1000), "lr": 0.002})  # fmt: skip
    results = {"sft": measure(sft, task.test, 0.0, "{}")}
    results["styles"] = {f"temperature {t:g}": measure(both, task.test, t) for t in (0.0, 1.0)}
    tuned = {"objective": "prefer", "start": str(both), "data": write_lines(out / "pairs.jsonl", pairs)}
    tuned |= {"steps": steps(100), "lr": args.lr}
    for method, changes in METHODS.items():
        for seed in range(args.seeds):
            name = f"{method} {seed}".replace(" ", "-")
            where = learned(out, name, {**tuned, **changes, "seed": seed})
            results[name] = {f"temperature {t:g}": measure(where, task.test, t) for t in (0.0, 1.0)}
    write_json(out / "results.json", results)
    print(json.dumps(results, indent=1))


def main() -> None:
    p = Parser(__doc__.split("\n")[0], "\n".join(__doc__.split("\n")[2:4]))
    p.add_argument("what", help="variance or learn")
    p.add_argument("--seconds", type=float, default=20, help="variance: of training before (default: 20)")
    p.add_argument("--pairs", type=int, default=2, help="variance: pairs of answers (default: 2)")
    p.add_argument("--repetitions", type=int, default=200, help="variance: estimates of each score (default: 200)")
    p.add_argument("--out", type=Path, default=Path("runs/assistant"), help="learn: where runs and results are written")
    p.add_argument("--share", type=float, default=1.0, help="learn: of the steps, to try it out (default: 1)")
    p.add_argument("--questions", type=int, default=500, help="learn: of the test (default: 500)")
    p.add_argument("--seeds", type=int, default=3, help="learn: of each method (default: 3)")
    p.add_argument("--lr", type=float, default=0.0003, help="learn: of the matrices, in VRPO and DPO (default: 0.0003)")
    args = p.parse_args()
    check_one_of("what", args.what, ("variance", "learn"))
    {"variance": variance, "learn": learn}[args.what](args)


if __name__ == "__main__":
    run(main)
