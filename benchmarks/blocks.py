"""Turn the dial from autoregression to diffusion: bits per character and tokens per second by the length of a block.

    python benchmarks/blocks.py --file shakespeare.txt          the table of docs/blocks.md, half an hour on one core
    python benchmarks/blocks.py --file shakespeare.txt --only train
    python benchmarks/blocks.py --only draw                     docs/blocks.png from docs/blocks.json; needs matplotlib

Every model has the shape of `tiny`, reads characters, and trains so many minutes on one thread; the autoregressive twin
trains as many steps as blocks of 1 did. A training step is timed in turns with a plain one. Results: docs/blocks.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

import minillada
from minillada.diffusion import exact_count, pretraining_loss, sample_t
from minillada.files import write_json
from minillada.measure.blocks import block_levels, bound, noise_blocks
from minillada.measure.twin import twin_generate, twin_loss, twin_nll
from minillada.model import LLaDA
from minillada.sampler import SampleConfig, generate
from minillada.train import LearnConfig, Pretraining, learn
from minillada.training.config import PRESETS, TrainConfig
from minillada.training.making import make
from minillada.training.optim import make_optimizers
from minillada.training.run import train

OUT, RUNS = Path(__file__).parents[1] / "docs" / "blocks.json", Path("runs/blocks")
LENGTH, NEW, PROMPT = 128, 512, 16


class Twin(Pretraining):
    """Learn to predict the next token."""

    def losses(self, model: nn.Module, batch: Tensor, rng: Generator) -> Iterator[Tensor]:
        yield twin_loss(model, batch)


def config_of(file: str, **fields: object) -> TrainConfig:
    return TrainConfig(**{"data": file, "tokenizer": "characters", "length": LENGTH, "eval_every": 10**9, **fields})


def trained(config: TrainConfig) -> dict:
    """Train unless it was done before; return the bound in bits per character and the steps."""
    start = time.perf_counter()
    if not (Path(config.out) / "run.json").exists():
        for step in train(config):
            last = step
        found = {"bits": last.bound / 0.6931471805599453, "steps": last.step, "seconds": time.perf_counter() - start}
        write_json(Path(config.out) / "found.json", found)
    return json.loads((Path(config.out) / "found.json").read_text(encoding="utf-8"))


def twin_trained(file: str, steps: int) -> dict:
    """Train the twin for as many steps as given; return its exact bits per character on the same held-out windows."""
    made, start = make(config_of(file, steps=steps)), time.perf_counter()
    objective = Twin(made.objective.batches, made.objective.held, made.model.config.mask_id)
    for _ in learn(made.model, make_optimizers(made.model, made.config), objective, LearnConfig(steps=steps), made.rng):
        pass
    seconds = time.perf_counter() - start
    with torch.no_grad():
        nats = twin_nll(made.model, made.objective.held).mean().item()
    minillada.save(made.model, RUNS / "twin", made.saves)
    return {"bits": nats / 0.6931471805599453, "steps": steps, "seconds": seconds}


def training(file: str, minutes: float) -> dict:
    """Train all models of the dial; convert the bidirectional one to blocks of 16."""
    found = {}
    for block in (0, 16, 4, 1):
        found[str(block)] = trained(config_of(file, minutes=minutes, block=block, out=str(RUNS / f"w{block}")))
        print(block, found[str(block)], flush=True)
    found["twin"] = twin_trained(file, found["1"]["steps"])
    print("twin", found["twin"], flush=True)
    start, common = str(RUNS / "w0"), {"data": file, "length": LENGTH, "eval_every": 10**9, "block": 16}
    found["converted"] = trained(TrainConfig(**common, start=start, steps=200, out=str(RUNS / "converted")))
    print("converted", found["converted"], flush=True)
    return found


def timed(functions: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Call the functions in turns; return the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def steps(dtype: torch.dtype) -> dict[str, float]:
    """Time the forward and backward pass of a batch of 8 rows: the ratio to a plain one by length of the block."""
    model, rng = LLaDA(model_config()), Generator().manual_seed(0)
    x0 = torch.randint(0, 60, (8, LENGTH), generator=rng)

    def step(block: int | None) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if block is None:
                loss = pretraining_loss(model, x0, exact_count(x0, 63, sample_t(8, rng), rng))
            else:
                noised = noise_blocks(x0, 63, block_levels(x0, block, rng), rng, block)
                loss = bound(model, x0, noised, block=block).mean() / LENGTH
        loss.backward()
        model.zero_grad()

    found = timed({str(block): lambda block=block: step(block) for block in (None, 1, 4, 16, LENGTH)}, 15)
    return {block: seconds / found["None"] for block, seconds in found.items()}


def model_config(**fields: object) -> minillada.ModelConfig:
    return minillada.ModelConfig(vocab_size=64, mask_id=63, max_len=1024, **{**PRESETS["tiny"]["model"], **fields})


def sampling() -> dict[str, float]:
    """Time 512 tokens after 16, one a step, batch 1: tokens per second. The weights are random and the same."""
    model = LLaDA(model_config()).eval()
    prompt, common = [list(range(PROMPT))], {"gen_len": NEW, "steps": NEW, "stop_at_eos": False}
    write = lambda **how: generate(model, prompt, SampleConfig(**{**common, **how}))
    found = timed({
        "whole canvas": lambda: write(block_len=16),
        "dual cache (approximate)": lambda: write(block_len=16, cache="dual"),
        "blocks of 16, no cache": lambda: write(block_len=16, block=16),
        "blocks of 16, exact cache": lambda: write(block_len=16, block=16, cache="block"),
        "blocks of 16, exact cache, 4 tokens a step": lambda: write(
            block_len=16, block=16, cache="block", steps=NEW // 4),
        "blocks of 4, exact cache": lambda: write(block_len=16, block=4, cache="block"),
        "blocks of 1, exact cache": lambda: write(block_len=16, block=1, cache="block"),
        "twin with its cache": lambda: twin_generate(model, prompt, NEW),
    }, 3)  # fmt: skip
    return {name: NEW / seconds for name, seconds in found.items()}


def draw(found: dict) -> None:
    """Draw bits per character and tokens per second by the length of a block, from autoregression to diffusion."""
    from matplotlib.figure import Figure

    names = ["1", "4", "16", "none\n(whole text)"]
    trained, speed = found["train"], found["sampling"]
    bits = [trained[block]["bits"] for block in ("1", "4", "16", "0")]
    speeds = [speed[f"blocks of {block}, exact cache"] for block in (1, 4, 16)] + [speed["whole canvas"]]
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, values, told in ((left, bits, "{:.2f}"), (right, speeds, "{:.0f}")):
        axes.plot(names, values, "o-", color="tab:blue")
        for place, value in enumerate(values):
            axes.annotate(told.format(value), (place, value), (4, 6), textcoords="offset points", fontsize=8)
        axes.set(xlabel="tokens in a block")
        axes.margins(0.12, 0.18)
        axes.spines[["top", "right"]].set_visible(False)
    left.axhline(trained["twin"]["bits"], color="0.4", linestyle=":")
    left.text(3.2, trained["twin"]["bits"], "autoregressive twin", ha="right", va="bottom", fontsize=8)
    left.set(ylabel="bits per character, at most", title="quality after 3.3 minutes")
    right.set(ylabel="tokens per second", ylim=(0, None), title="speed, a token a step")
    figure.savefig(OUT.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", help="the text to train on")
    parser.add_argument("--minutes", type=float, default=3.3, help="of training for each model (default: 3.3)")
    parser.add_argument("--only", choices=("train", "steps", "sampling", "draw"))
    args = parser.parse_args()
    if args.file is None and args.only in (None, "train"):
        parser.error("--file: expected a text to train on, got none; add --file shakespeare.txt")
    torch.set_num_threads(1)
    found = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    parts = {
        "sampling": sampling,
        "steps": lambda: {str(kind).removeprefix("torch."): steps(kind) for kind in (torch.float32, torch.bfloat16)},
        "train": lambda: training(args.file, args.minutes),
    }
    for name in {None: list(parts), "draw": []}.get(args.only, [args.only]):
        found[name] = parts[name]()
        write_json(OUT, found)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
    draw(found)


if __name__ == "__main__":
    main()
