"""Time a training step as a run takes it, beside a step of plain.py of the same size in the same run.

    python benchmarks/training.py --threads 1 --seconds 120 --out training.json
    python benchmarks/training.py --compile --sizes "tiny, 8 × 128"    and ours compiled, which takes minutes
    python benchmarks/training.py --others-muon    and ours with PyTorch's Muon, and with ours matrix by matrix

The contestants and a large matrix product in each of their dtypes take turns, a few steps each, until the time is up;
a figure is the median of its turns, with one thread of the processor's time. "Share of peak" is the arithmetic of the
matrix products that forward and backward really do (counted, so what a step saves itself is not credited), over the
whole step's time, optimiser included, as a share of what the large product reached. What compiling takes is measured
apart, over so many steps that all shapes of batches have come.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from curves import clock
from torch import Generator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from minillada import plain
from minillada.model import LLaDA, ModelConfig
from minillada.text.ids import Tokens
from minillada.train import Ways, learn
from minillada.training.config import TrainConfig
from minillada.training.distributed import spread
from minillada.training.muon import Muon
from minillada.training.optim import choose_precision, make_optimizers
from minillada.training.pretraining import TextPretraining

W384 = {"n_layer": 6, "n_head": 6, "d_model": 384, "d_ff": 1024, "rope_theta": 100.0}
SIZES: dict[str, tuple[TrainConfig, int]] = {  # and the size of the vocabulary
    "tiny, 8 × 128": (TrainConfig(preset="tiny"), 4096),
    "10.7 M, 16 × 256": (TrainConfig(model=W384, batch_size=16, length=256), 69),
    "10.7 M, 12 × 64": (TrainConfig(model=W384, batch_size=12, length=64), 69),
}
WARM = 50  # steps that a compiled model takes before the race: by then it has met every shape
MATRIX = 1536  # rows and columns of the product that stands for the machine's peak

Step = Callable[[], object]


def pytorchs(model: LLaDA, config: TrainConfig) -> list[Optimizer]:
    """Return the optimisers of a run, but Muon as PyTorch has it: matrix by matrix, always in bfloat16."""
    inner, rest = make_optimizers(model, config)
    params = [{"params": group["params"], "initial_lr": group["initial_lr"]} for group in inner.param_groups]
    return [torch.optim.Muon(params, lr=config.lr, weight_decay=config.weight_decay), rest]


def one_by_one(model: LLaDA, config: TrainConfig) -> list[Optimizer]:
    """Return the optimisers of a run, but a Muon for each matrix."""
    inner, rest = make_optimizers(model, config)
    each = [{"params": [p], "initial_lr": config.lr} for group in inner.param_groups for p in group["params"]]
    return [*(Muon([group], config.lr, config.weight_decay, inner.dtype) for group in each), rest]


def ours(config: TrainConfig, vocab_size: int, make: Callable = make_optimizers) -> tuple[Step, Step, str, int]:
    """Return a step as `train` takes it, its forward and backward alone, the precision it chose, its parameters."""
    rng, config = Generator().manual_seed(0), replace(config, precision=choose_precision(config)[0], twin=0.0)
    ids = np.random.default_rng(0).integers(4, vocab_size, 100_000).astype(np.uint16)  # speed is the same for any text
    model = LLaDA(ModelConfig(vocab_size=vocab_size, mask_id=0, max_len=config.length, **config.model))
    called = spread(model, config)  # compiled, if the config says so
    objective = TextPretraining(Tokens(ids, ids, 1.0, 1.0, ""), config, mask_id=0)
    half = Ways(progress=lambda step: 0.5)  # at the full rate, however many steps are taken
    endless = replace(config, steps=10**9)
    steps = learn(called, make(model, config), objective, endless, rng, ways=half)
    batches = objective.batches(0)

    def passes() -> None:
        for part in objective.losses(called, next(batches), rng):
            part.backward()
        model.zero_grad()

    return lambda: next(steps), passes, config.precision, model.n_parameters()


def baseline(config: TrainConfig, vocab_size: int) -> tuple[Step, Step, str, int]:
    """Return the same four of plain.py: float32, every logit, 1/t, AdamW."""
    rng, batch = Generator().manual_seed(0), (config.batch_size, config.length)
    model, text = plain.Plain(vocab_size, mask_id=0, **config.model), torch.randint(4, vocab_size, (100_000,))
    steps = plain.learn(model, text, batch, config.steps, rng)

    def passes() -> None:
        x0 = text[torch.randint(len(text) - config.length, (config.batch_size, 1)) + torch.arange(config.length)]
        plain.bound(model, x0, 1 - 0.999 * torch.rand(len(x0), generator=rng), rng).backward()
        model.zero_grad()

    return lambda: next(steps), passes, "float32", sum(p.numel() for p in model.parameters())


def product(precision: str) -> Step:
    a, b = torch.randn(2, MATRIX, MATRIX).to(getattr(torch, precision))
    return lambda: a @ b


def arithmetic(passes: Step, n: int = 2) -> float:
    """Floating-point operations of the matrix products in a forward and backward pass, the mean of n."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # a fused kernel is not counted
        for _ in range(n):
            passes()
    return counter.get_total_flops() / n


def race(steps: dict[str, Step], seconds: float, turn: float = 0.5) -> dict[str, float]:
    """Seconds of one call of each: the median over turns of about `turn` seconds, three at least, taken in rotation."""
    calls, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        step()  # builds what kernels and optimisers keep
        start = clock()
        step()
        calls[name] = max(1, round(turn / (clock() - start)))
    end = clock() + seconds
    while clock() < end or len(times[name]) < 3:
        for name, step in steps.items():
            start = clock()
            for _ in range(calls[name]):
                step()
            times[name].append((clock() - start) / calls[name])
    return {name: median(found) for name, found in times.items()}


def measure(size: str, seconds: float, changes: dict, compile: bool, others: bool) -> dict[str, dict]:
    config, vocab_size = SIZES[size]
    config = replace(config, steps=10**6, **changes)  # more than are taken
    torch.manual_seed(0)
    contestants = {"plain": baseline(config, vocab_size), "ours": ours(config, vocab_size)}
    if others:
        contestants["PyTorch's Muon"] = ours(config, vocab_size, pytorchs)
        contestants["Muon one by one"] = ours(config, vocab_size, one_by_one)
    flops = {name: arithmetic(passes) for name, (_, passes, _, _) in contestants.items()}
    if compile:
        contestants["compiled"] = ours(replace(config, compile=True), vocab_size)
        flops["compiled"] = flops["ours"]
        start = clock()
        for _ in range(WARM):
            contestants["compiled"][0]()
        compiling = clock() - start
    steps = {name: step for name, (step, *_) in contestants.items()}
    steps |= {f"{name}, passes": passes for name, (_, passes, *_) in contestants.items()}
    steps |= {precision: product(precision) for _, _, precision, _ in contestants.values()}
    taken = race(steps, seconds)
    found = {}
    for name, (_, _, precision, parameters) in contestants.items():
        peak = 2 * MATRIX**3 / taken[precision]
        found[name] = {
            "precision": precision,
            "parameters": parameters,
            "milliseconds": 1000 * taken[name],
            "tokens_per_second": config.batch_size * config.length / taken[name],
            "matmul_gflop_per_step": flops[name] / 1e9,
            "peak_gflops": peak / 1e9,
            "share_of_peak": flops[name] / taken[name] / peak,
            "optimizer_milliseconds": 1000 * (taken[name] - taken[f"{name}, passes"]),
            "optimizer_share": 1 - taken[f"{name}, passes"] / taken[name],
            "speedup": taken["plain"] / taken[name],
            "speedup_of_passes": taken["plain, passes"] / taken[f"{name}, passes"],
        }
    if compile:
        found["compiled"]["seconds_of_compiling"] = compiling - WARM * taken["compiled"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of measuring, all sizes together")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), metavar="SIZE")
    parser.add_argument("--optimizer", default="muon", choices=("muon", "adamw"), help="of ours (default: muon)")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="of ours")
    parser.add_argument("--compile", action="store_true", help="let ours take part compiled too")
    parser.add_argument("--others-muon", action="store_true", help="let ours take part with other ways to compute Muon")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = {"python": platform.python_version(), "torch": torch.__version__, "threads": args.threads}
    changes = {"optimizer": args.optimizer, "precision": args.precision}
    results = {}
    print("| Size | Step | Precision | ms | of it optimiser | Tokens/s | Peak, GFLOP/s | Share of peak | × plain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        found = results[size] = measure(size, args.seconds / len(args.sizes), changes, args.compile, args.others_muon)
        for name, r in found.items():
            times = f"{r['speedup']:.2f} ({r['speedup_of_passes']:.2f} without optimisers)"
            print(f"| {size} | {name} | {r['precision']} | {r['milliseconds']:.1f} | {r['optimizer_share']:.0%} | "
                  f"{r['tokens_per_second']:,.0f} | {r['peak_gflops']:,.0f} | {r['share_of_peak']:.0%} | "
                  f"{1 if name == 'plain' else times} |", flush=True)  # fmt: skip
        if args.compile:
            print(f"compiling took {found['compiled']['seconds_of_compiling']:.0f} s")
        if args.out:
            args.out.write_text(json.dumps(about | changes | {"sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
