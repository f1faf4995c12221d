"""How fast does the default recipe learn? Its bound against time, beside LLaDA's plain recipe at several rates.

    python benchmarks/curves.py --corpus docs                                about an hour and a half, idle machine
    python benchmarks/curves.py --corpus shakespeare.txt --tokenizer characters --length 256
    python benchmarks/curves.py --corpus docs --ours 30 --rates              the default alone, for half an hour

The plain recipe: AdamW for everything, float32, and the noise of LLaDA's guidelines (independent t, Bernoulli masks,
1/p_mask). Model, tokens, batches, warm-up and decay, and the code of a step are the default's: only the recipe differs.
Time is that of training alone, without evaluations; with `--threads 1` it is the processor's, so that what else runs on
the machine does not count. Runs that OUT.json holds already are not repeated; it and the picture OUT.png are renewed
after each run.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import torch
from torch import Generator, Tensor

from minillada.diffusion import Noised, random_length, sample_t
from minillada.text.ids import validation_batch
from minillada.train import Ways, learn
from minillada.training.config import TrainConfig
from minillada.training.making import Made, make
from minillada.training.pretraining import TextPretraining

RATES = (0.0005, 0.001, 0.002, 0.004, 0.008)
PLAIN = {"optimizer": "adamw", "process": "bernoulli", "precision": "float32", "twin": 0.0, "t_min": 0.0}


def clock() -> float:
    """Seconds: the processor's if one thread works, so that what else runs on the machine does not count."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Independent(TextPretraining):
    """Pre-train with masking levels that are independent of each other, where a run has one of each equal slice."""

    def noise(self, x0: Tensor, rng: Generator) -> tuple[Tensor, Noised]:
        x0 = random_length(x0, rng)
        return x0, self.process(x0, self.mask_id, sample_t(len(x0), rng, stratified=False), rng)


def follow(made: Made, evaluations: int = 25) -> Iterator[tuple[float, float, int]]:
    """Train for `minutes`, or for `steps`; yield (seconds of training, nats per character of validation text, step)."""
    config, seconds, shown = made.config, 0.0, 0
    part = lambda step: seconds / 60 / config.minutes if config.minutes else step / config.steps
    ways = Ways(progress=lambda step: part(step - 1))
    start = clock()
    for done in learn(made.called, made.optimizers, made.objective, config, made.rng, ways=ways):
        seconds += clock() - start
        if part(done.step) >= (shown + 1) / evaluations:
            shown = int(evaluations * part(done.step))
            yield seconds, made.objective.validate(made.model)["bound"], done.step
        if part(done.step) >= 1:
            return
        start = clock()


def measure(
    name: str, config: TrainConfig, objective: type[TextPretraining] = TextPretraining,
    begin: Callable[[Made], None] | None = None,
) -> dict:  # fmt: skip
    """One run: its last and its best bound, its size and speed, and the curve [[seconds, bound, step], ...].

    objective: what it learns by, if not that of every run; begin: what to do to it before it learns.
    """
    made = make(config)
    if objective is not TextPretraining:
        c = made.model.config
        anew = objective(made.text, made.config, c.mask_id, vocab_size=c.vocab_size, spellings=made.objective.spellings)
        made = made._replace(objective=anew)
    if begin:
        begin(made)
    curve = [[round(seconds, 2), round(bound, 4), step] for seconds, bound, step in follow(made)]
    seconds, bound, step = curve[-1]
    speed = round(step * config.batch_size * config.length / seconds)
    print(f"{name}: <= {bound:.4f} nats per character, {step:,} steps, {speed:,} tokens/s", flush=True)
    found = {"bound": bound, "best": min(bound for _, bound, _ in curve), "precision": made.config.precision}
    found |= {"parameters": made.model.n_parameters(), "steps": step, "tokens_per_second": speed}
    if config.rows == "windows":
        made.objective.held = validation_batch(made.text.train, 128, config.length)
        found["on_training_text"] = round(made.objective.validate(made.model)["bound"], 4)
    return found | {"curve": curve}


def write(results: dict[str, dict], file: Path, **about: object) -> None:
    machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    file.write_text(json.dumps(machine | about | {"recipes": results}, indent=1) + "\n")


def read(file: Path) -> dict[str, dict]:
    return json.loads(file.read_text())["recipes"] if file.exists() else {}


def reached(result: dict, bound: float) -> float:
    """The seconds of training at the first evaluation that was as good; infinite if none was."""
    return next((seconds for seconds, found, *_ in result["curve"] if found <= bound), math.inf)


def draw(results: dict[str, dict], path: Path, target: float | None = None) -> None:
    """Every run's bound by minutes, default runs in black; and, given a target, when the first of those reached it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="minutes of training", ylabel="upper bound of −log p, nats per character")
    ours = [result for name, result in results.items() if name.startswith("default")]
    dashes = cycle(("-", "--", "-."))
    for name, result in sorted(results.items(), key=lambda item: item[1]["bound"]):
        style = {"linewidth": 2.5, "color": "black", "ls": next(dashes), "zorder": 3} if result in ours else {}
        minutes, bounds = zip(*((seconds / 60, bound) for seconds, bound, *_ in result["curve"]), strict=True)
        axes.plot(minutes, bounds, label=f"{name}: {result['bound']:.3f}", **{"linewidth": 1.2} | style)
    if target is not None:
        axes.axhline(target, color="0.6", linewidth=1, zorder=1)
        minutes = min((reached(result, target) / 60 for result in ours), default=math.inf)
        if minutes < math.inf:
            axes.plot(minutes, target, "o", color="black", zorder=4)
            text = f"{target:.3f} after {minutes:.1f} minutes"
            axes.annotate(text, (minutes, target), (8, 8), textcoords="offset points")
    # the first tenth of a run falls from far above, and is let out of the picture
    axes.set_ylim(top=max(bound for r in results.values() for _, bound, *_ in r["curve"][len(r["curve"]) // 10 :]))
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="docs", help="a name or a path, as for train_tiny.py (default: docs)")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--tokenizer", help="characters, bytes or bpe:SIZE (default: the preset's)")
    parser.add_argument("--length", type=int, help="tokens of context (default: the preset's)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each plain run (default: 10)")
    parser.add_argument("--rates", type=float, nargs="*", default=RATES, help=f"of the plain runs (default: {RATES})")
    parser.add_argument("--ours", type=float, nargs="*", default=[4.0, 10.0], metavar="MINUTES",
                        help="of each default run (default: 4 10)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON (default: curves-CORPUS.json); the picture goes beside it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common = {"data": args.corpus, "preset": args.preset, "tokenizer": args.tokenizer, "length": args.length}
    runs = {
        f"default, {minutes:g} min": (TrainConfig(**common, minutes=minutes), TextPretraining) for minutes in args.ours
    }
    for lr in args.rates:
        config = TrainConfig(**common, **PLAIN, minutes=args.minutes, lr=lr, adam_lr=lr)
        runs[f"plain at {lr:g}, {args.minutes:g} min"] = config, Independent
    args.out = args.out or Path(f"curves-{Path(args.corpus).stem}.json")
    results, target = read(args.out), None
    for name, (config, objective) in runs.items():
        results[name] = results.get(name) or measure(name, config, objective)
        target = min((r["bound"] for n, r in results.items() if n.startswith("plain")), default=None)
        write(results, args.out, corpus=Path(args.corpus).name, target=target)
        draw(results, args.out.with_suffix(".png"), target)
    for name, result in results.items():
        if name.startswith("default") and target is not None:
            seconds = reached(result, target)
            when = f"after {seconds:.0f} s of training" if seconds < math.inf else "not reached"
            print(f"{name}: {target:.4f}, the best plain run's end, {when}")


if __name__ == "__main__":
    main()
